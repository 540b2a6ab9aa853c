//! Rolling a WAL index forward.
//!
//! A writer can die after its commit frame is logged and before it has published the transaction
//! in the WAL index. The transaction is committed, so the index is invalidated: the next connection
//! recovers it from the WAL. It is done under the WRITE lock, which a living writer holds until it
//! has published, so that only a dead one's omission is ever seen.

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
    /// Invalidates the WAL index if it is behind what is committed, waiting this long for a writer.
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
            match &st.files.shm {
                Some(shm) if st.wal.committed > 0 || st.wal.stale => shm.ino,
                // Without an index nobody has a transaction open.
                _ => {
                    st.wal.stale = false;
                    return Ok(());
                }
            }
        };
        let mut shared = match SharedIndex::open(self, ino) {
            Ok(s) => s,
            // Deleted in the meantime: with it goes what was behind.
            Err(_) if self.file(FileKind::Shm).is_none_or(|f| f.ino != ino) => {
                self.lock().wal.stale = false;
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        let result = self.roll_forward(&mut shared, wait);
        shared.close(self);
        result
    }

    fn roll_forward(&self, shared: &mut SharedIndex, wait: Duration) -> Result<(), StoreError> {
        if !self.lock().wal.stale && !self.is_behind(shared.ensure(self, 1)?) {
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
        if self.is_behind(index) {
            index.invalidate_header();
            tracing::info!(
                db = self.name,
                "a writer died after its commit: the transaction was rolled forward"
            );
        }
        Ok(())
    }

    fn is_behind(&self, index: &WalIndex) -> bool {
        let Some(h) = index.read_header() else {
            return false;
        };
        let st = self.lock();
        let Some(wal) = st.wal.header else {
            return false;
        };
        // Other salts: the index was restarted already, and the WAL's header is still to follow.
        (h.salt1, h.salt2) == (wal.salt1, wal.salt2) && (h.mx_frame as usize) < st.wal.committed
    }
}
