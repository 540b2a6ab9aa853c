//! Whether a WAL index says what is committed.
//!
//! A writer can die after its commit frame is logged and before it has published the transaction
//! in the WAL index; one whose writes are lost on their way has published what is not there. Such
//! an index is invalidated: the next connection recovers it from the WAL.
//!
//! Invariants:
//! - An index that nobody has open is left alone: who opens it next finds nobody, and begins it
//!   anew. The node must not be somebody to it then, or it would be taken for good.
//! - One that is open is compared under the WRITE lock, which a living writer holds until it has
//!   published, so that only a dead one's doing is ever seen.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crate::clock;
use crate::sqlite::locks::{LockGuard, LockKind, WAL_WRITE_LOCK};
use crate::sqlite::wal_index::WalIndex;

use super::database::{Database, FileKind};
use super::error::StoreError;
use super::shm::SharedIndex;

/// How long the keeper waits for a writer. Whoever comes later asks again.
pub(super) const WRITER_WAIT: Duration = Duration::from_secs(2);

impl Database {
    /// Invalidates the WAL index if it differs from what is committed, waiting this long for a
    /// writer.
    pub(super) fn check_index(self: &Arc<Self>, wait: Duration) {
        if let Err(e) = self.try_check_index(wait) {
            tracing::warn!(db = self.name, error = %e, "the WAL index could not be checked");
        }
    }

    fn try_check_index(&self, wait: Duration) -> Result<(), StoreError> {
        // One user of the mapping at a time: the replica's applier has its own, kept open.
        // An import, which holds it long, asks for a check when it is done.
        let Some(replica) = self.replica.try_lock() else {
            return Ok(());
        };
        if replica.shm.is_some() {
            return Ok(());
        }
        let ino = {
            let mut st = self.lock();
            if st.lane.is_some() {
                // What is committed follows the index.
                return Ok(());
            }
            match &st.files.shm {
                Some(shm) if st.files.wal.is_some() || st.wal.stale => shm.ino,
                // Without an index nobody has a transaction open.
                _ => {
                    st.wal.stale = false;
                    return Ok(());
                }
            }
        };
        let mut shared = match SharedIndex::open_if_used(self, ino) {
            Ok(Some(s)) => s,
            // Nor does anybody without a connection.
            Ok(None) => {
                self.lock().wal.stale = false;
                return Ok(());
            }
            // Deleted in the meantime: with it goes what was wrong.
            Err(_) if self.file(FileKind::Shm).is_none_or(|f| f.ino != ino) => {
                self.lock().wal.stale = false;
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        let result = self.correct(&mut shared, wait);
        shared.close(self);
        result
    }

    fn correct(&self, shared: &mut SharedIndex, wait: Duration) -> Result<(), StoreError> {
        if !self.lock().wal.stale && self.fault_of(shared.ensure(self, 1)?).is_none() {
            return Ok(());
        }
        let fd = shared
            .file
            .try_clone()
            .map_err(StoreError::io("reopen", self.mount_name(FileKind::Shm)))?;
        let deadline = clock::now() + wait;
        let lock = LockGuard::acquire(fd.as_fd(), LockKind::Exclusive, WAL_WRITE_LOCK, 1, deadline)
            .map_err(StoreError::io("lock", self.mount_name(FileKind::Shm)))?;
        // A living writer publishes by itself.
        if lock.is_none() {
            return Ok(());
        }
        // Whoever writes now has begun since.
        self.lock().wal.stale = false;
        let index = shared.ensure(self, 1)?;
        if let Some(fault) = self.fault_of(index) {
            index.invalidate_header();
            tracing::info!(db = self.name, "{fault}");
        }
        Ok(())
    }

    /// What is wrong with the index, if no writer is at work.
    fn fault_of(&self, index: &WalIndex) -> Option<&'static str> {
        const AHEAD: &str = "the WAL index has frames that are not committed: it is recovered";
        let h = index.read_header()?;
        let st = self.lock();
        let (mx_frame, committed) = (h.mx_frame as usize, st.wal.committed);
        let salts = st.wal.header.map(|wal| (wal.salt1, wal.salt2));
        if salts != Some((h.salt1, h.salt2)) {
            // The index is restarted first, and the WAL's header follows.
            return (mx_frame > 0).then_some(AHEAD);
        }
        if mx_frame < committed {
            return Some("a writer died after its commit: the transaction was rolled forward");
        }
        let is_it = mx_frame == committed
            && (mx_frame == 0 || h.frame_checksum == st.wal.chain_before(mx_frame));
        (!is_it).then_some(AHEAD)
    }
}
