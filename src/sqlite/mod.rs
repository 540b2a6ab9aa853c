//! SQLite's own file formats: what a file system under SQLite must be able to read and write.
//!
//! The formats are those of SQLite's documents "Database File Format" and "WAL-mode File Format";
//! where these leave a choice, SQLite's pager and WAL code decide, and the items here say so.
//!
//! Nothing here trusts what it reads: every size is bounded before it is used, and arbitrary bytes
//! give an error or "nothing there", never a panic. Nothing here does I/O of its own, but for
//! [`locks`], which sets byte-range locks on a descriptor of the caller's, and the journal reader,
//! which reads from a reader of the caller's.

pub mod header;
pub mod journal;
pub mod locks;
pub mod wal;
pub mod wal_index;

/// Smallest page that SQLite knows, in bytes.
pub const MIN_PAGE_SIZE: u32 = 512;
/// Largest page that SQLite knows, in bytes.
pub const MAX_PAGE_SIZE: u32 = 65536;

/// Whether a page may have this size: a power of two from 512 to 65,536 bytes.
#[must_use]
pub const fn is_page_size(size: u32) -> bool {
    size.is_power_of_two() && size >= MIN_PAGE_SIZE && size <= MAX_PAGE_SIZE
}

/// The page that holds SQLite's lock bytes (at 1 GiB), which is never written, journaled or
/// logged. `page_size` is in bytes and not zero.
#[must_use]
pub const fn lock_page(page_size: u32) -> u32 {
    (locks::PENDING_BYTE / page_size as u64) as u32 + 1
}

/// The big-endian number at `buf[at..at + 4]`; the caller knows that it is there.
fn be32(buf: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([buf[at], buf[at + 1], buf[at + 2], buf[at + 3]])
}

#[cfg(test)]
mod tests;
