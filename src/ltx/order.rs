//! The rules on the sequence of pages in a file, and on the checksum that it ends with: the same
//! for the encoder and the decoder.

use super::{CHECKSUM_FLAG, Header, LtxError, lock_pgno, page_checksum};

/// Follows the pages of one file. Invariant: every page accepted was above the one before, at
/// most `commit`, and not the lock page; in a snapshot, none was left out.
pub(super) struct PageOrder {
    commit: u32,
    lock_pgno: u32,
    last: u32,
    /// The checksum of the pages so far: of snapshots only, which must end with it.
    snapshot: Option<u64>,
}

impl PageOrder {
    /// Takes a valid header.
    pub(super) fn new(header: &Header) -> Self {
        PageOrder {
            commit: header.commit,
            lock_pgno: lock_pgno(header.page_size),
            last: 0,
            snapshot: header.is_snapshot().then_some(CHECKSUM_FLAG),
        }
    }

    /// Checks the number of the next page; only an accepted page changes anything.
    pub(super) fn accept(&mut self, pgno: u32) -> Result<(), LtxError> {
        let rule = if pgno <= self.last {
            "pages must come in ascending order, from 1"
        } else if pgno > self.commit {
            "it is above the size of the database (commit)"
        } else if pgno == self.lock_pgno {
            "the lock page is never in a transaction file"
        } else if self.snapshot.is_some() && pgno != self.next() {
            return Err(LtxError::IncompleteSnapshot {
                missing: self.next(),
                commit: self.commit,
            });
        } else {
            self.last = pgno;
            return Ok(());
        };
        Err(LtxError::PageNumber { pgno, rule })
    }

    /// Takes the data of an accepted page into account.
    pub(super) fn add_content(&mut self, pgno: u32, data: &[u8]) {
        if let Some(checksum) = &mut self.snapshot {
            *checksum = (*checksum ^ page_checksum(pgno, data)) | CHECKSUM_FLAG;
        }
    }

    /// Checks that the file may end here, with this checksum of the database.
    pub(super) fn check_end(&self, post_apply_checksum: u64) -> Result<(), LtxError> {
        if self.snapshot.is_some() && self.next() <= self.commit {
            return Err(LtxError::IncompleteSnapshot {
                missing: self.next(),
                commit: self.commit,
            });
        }
        if post_apply_checksum & CHECKSUM_FLAG == 0 {
            return Err(LtxError::PostApplyFlag(post_apply_checksum));
        }
        let expected = if self.commit == 0 {
            Some(CHECKSUM_FLAG)
        } else {
            self.snapshot
        };
        match expected {
            Some(expected) if expected != post_apply_checksum => Err(LtxError::PostApplyChecksum {
                expected,
                found: post_apply_checksum,
            }),
            _ => Ok(()),
        }
    }

    /// The page after the last one, stepping over the lock page. Saturates: u32::MAX pages are
    /// more than SQLite can have, and only make a snapshot incomplete.
    fn next(&self) -> u32 {
        let next = self.last.saturating_add(1);
        if next == self.lock_pgno {
            next.saturating_add(1)
        } else {
            next
        }
    }
}
