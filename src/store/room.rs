//! Room on the disk and in memory for what others send.
//!
//! What a peer says of a size is believed only as far as this machine could hold it: a database that
//! its disk or its memory cannot have is refused at the header that states it, before anything is
//! allocated for it. What arrives is spooled beside the databases, and leaves the reserve of
//! [`Room::usable`] to those who write here.

use std::path::Path;

use super::Store;
use super::error::StoreError;
use crate::ltx::Header;

/// What stays free at most.
const RESERVE: u64 = 256 << 20;
/// Memory that a page costs while a database arrives: its number and checksum in the transaction, and
/// its checksum in the database.
const BYTES_A_PAGE: u64 = 32;

/// A file system's size, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// All of it.
    pub total: u64,
    /// What is free.
    pub free: u64,
}

impl Room {
    /// That of the file system that `dir` is on; `None` if nobody can tell.
    pub(super) fn of(dir: &Path) -> Option<Room> {
        let disk = super::statvfs(dir).ok()?;
        Some(Room {
            total: disk.f_blocks.saturating_mul(disk.f_frsize),
            free: disk.f_bavail.saturating_mul(disk.f_frsize),
        })
    }

    /// What may be taken by what others send: 256 MiB stay free, or a sixteenth of a smaller disk.
    pub fn usable(&self) -> u64 {
        self.free.saturating_sub(RESERVE.min(self.total / 16))
    }
}

impl Store {
    /// The room in the data directory; `None` if nobody can tell.
    pub fn room(&self) -> Option<Room> {
        Room::of(self.data_dir())
    }
}

/// An error if no database of the size that a transaction states could be here.
pub(super) fn check(dir: &Path, db: &str, header: &Header) -> Result<(), StoreError> {
    let size = u64::from(header.commit) * u64::from(header.page_size);
    let memory = u64::from(header.commit) * BYTES_A_PAGE;
    let refuse = |what: String| {
        let db = db.to_owned();
        let what = format!("a database of {size} bytes: {what}");
        Err(StoreError::Refused { db, what })
    };
    if let Some(room) = Room::of(dir).filter(|room| room.total < size) {
        return refuse(format!("the data directory's disk has {}", room.total));
    }
    match physical_memory() {
        Some(have) if memory > have / 2 => refuse(format!(
            "its checksums take {memory} bytes of memory, this machine has {have}"
        )),
        _ => Ok(()),
    }
}

/// This machine's memory, in bytes.
fn physical_memory() -> Option<u64> {
    // SAFETY: takes and returns numbers.
    let (pages, size) = unsafe {
        (
            libc::sysconf(libc::_SC_PHYS_PAGES),
            libc::sysconf(libc::_SC_PAGESIZE),
        )
    };
    Some(u64::try_from(pages).ok()? * u64::try_from(size).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_that_cannot_be_here_is_refused() {
        let header = |commit, page_size| Header {
            compressed: false,
            page_size,
            commit,
            min_txid: 1,
            max_txid: 1,
            timestamp: 0,
            pre_apply_checksum: 0,
            wal_offset: 0,
            wal_size: 0,
            wal_salt1: 0,
            wal_salt2: 0,
            node_id: 0,
        };
        let dir = std::env::temp_dir();
        assert!(check(&dir, "x", &header(1000, 4096)).is_ok());
        let said = |result: Result<(), StoreError>| result.unwrap_err().to_string();
        // 256 TiB.
        assert!(said(check(&dir, "x", &header(u32::MAX, 65_536))).contains("disk has"));
        // 128 GiB of memory, if the disk should have its 2 TiB.
        let small = said(check(&dir, "x", &header(u32::MAX, 512)));
        assert!(
            small.contains("disk has") || small.contains("of memory"),
            "{small}"
        );
    }

    #[test]
    fn a_reserve_stays_free() {
        let room = |total, free| Room { total, free }.usable();
        assert_eq!(room(1 << 40, 1 << 30), (1 << 30) - RESERVE);
        assert_eq!(room(160, 100), 90);
        assert_eq!(room(1 << 40, 1000), 0);
    }
}
