//! LTX version 1, the transaction file: `header · page block · trailer`.
//!
//! One file holds the pages that one transaction, a run of transactions, or a whole snapshot
//! changed. The format is LiteFS's, byte for byte, so that a cluster may mix the two. This module
//! does no I/O of its own: it works on any [`Read`](std::io::Read) and
//! [`Write`](std::io::Write).
//!
//! Invariants:
//! - what [`Encoder`] writes, [`Decoder`] accepts; both keep one set of rules (`order`);
//! - a file is to be believed only after [`Decoder::finish`]: its checksum comes last;
//! - every checksum has bit 63 set ([`CHECKSUM_FLAG`]), so that 0 means "none";
//! - the lock page is never in a file and never in a checksum.
//!
//! Whether a file fits a database is the caller's to check: it must be a snapshot, or its
//! [`Header::pre_apply_pos`] must be the database's position.

mod checksum;
mod decoder;
mod encoder;
mod error;
mod header;
mod merge;
mod order;
mod pos;
mod recode;

#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod tests;

pub use checksum::{CHECKSUM_FLAG, page_checksum};
pub use decoder::{Decoder, Summary, verify};
pub use encoder::Encoder;
pub use error::LtxError;
pub use header::{HEADER_SIZE, Header, PAGE_HEADER_SIZE, TRAILER_SIZE, Trailer};
pub use merge::merge;
pub use pos::{ParsePosError, Pos, file_name, parse_file_name, parse_txid};
pub use recode::{with_lz4, without_lz4};

/// The byte of a database file that SQLite's locks begin at.
const LOCK_BYTE: u32 = 0x4000_0000;

/// The page that holds SQLite's lock bytes (at 1 GiB), where nothing is ever stored.
/// `page_size` is in bytes and must be valid, in particular not 0.
pub fn lock_pgno(page_size: u32) -> u32 {
    LOCK_BYTE / page_size + 1
}

/// Whether SQLite can have pages of `n` bytes: a power of two, 512 to 65536.
pub fn is_valid_page_size(n: u32) -> bool {
    n.is_power_of_two() && (512..=65536).contains(&n)
}

/// Refuses a file that changes a database's checksum without changing its bytes.
///
/// A file is consistent in itself if its checksum fits (that is what [`verify`] checks), and yet
/// its post-apply checksum can be wrong; in general only who has the database can tell, by
/// computing the checksum of what results. One case shows in the file alone: it has no pages
/// (`pages` is their number), does not delete the database, and still ends at another checksum.
/// Nothing but a smaller database could justify that, and SQLite writes page 1, which holds the
/// size, whenever the size changes. LiteFS is known to write such files on a change from WAL to
/// DELETE mode.
///
/// # Errors
/// [`LtxError::PostApplyChecksum`].
pub fn check_transition(h: &Header, t: &Trailer, pages: u32) -> Result<(), LtxError> {
    if pages == 0 && h.commit > 0 && t.post_apply_checksum != h.pre_apply_checksum {
        return Err(LtxError::PostApplyChecksum {
            expected: h.pre_apply_checksum,
            found: t.post_apply_checksum,
        });
    }
    Ok(())
}
