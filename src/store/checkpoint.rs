//! Checkpoints: noting that the database file holds everything up to a position, so that a
//! recovery starts there and the log before it may go.
//!
//! Order: what the checksums describe is on disk in the log; then the database file is synced;
//! then the checksums; then the header that makes them count. In WAL mode the position is the one
//! before the oldest transaction of which a page is in the WAL alone.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::ltx::Pos;

use crate::task;

use super::context::Job;
use super::database::{Database, DbFile, FileKind, State};
use super::error::StoreError;
use super::sums::{self, SumsHeader};

/// Bytes of log after the last checkpoint that make the next one due.
pub(super) const LOG_BYTES: u64 = 16 << 20;
/// Blocks of checksums that the scrub compares at a time: 128 KiB.
const COMPARED_BLOCKS: u32 = 32;

impl Database {
    /// Asks for a checkpoint if a recovery would have much to read.
    pub(super) fn maybe_checkpoint(self: &Arc<Self>, st: &mut State) {
        let bytes = self.log().bytes_after(st.saved.pos.txid);
        if bytes >= st.checkpoint_due {
            st.checkpoint_due = bytes + LOG_BYTES;
            self.context.keep(Job::Checkpoint(self.clone()));
        }
    }

    /// Saves a checkpoint; a failure is logged, and leaves the last one in force.
    pub(super) fn checkpoint_or_warn(self: &Arc<Self>) {
        if let Err(e) = self.checkpoint() {
            tracing::warn!(db = self.name, error = %e, "checkpoint not saved: a restart will read more of the log");
        }
    }

    /// Compares some of the checksum file, from this block on, with what is saved in it: how many
    /// bytes that were, what is wrong, and where to go on.
    pub(super) fn compare_checksums(
        &self,
        block: u32,
    ) -> Result<(u64, Option<String>, Option<u32>), StoreError> {
        // The file stands still; what changes in memory meanwhile is not in it yet.
        let _one = self.checkpointing.lock();
        let next = block.saturating_add(COMPARED_BLOCKS);
        let (header, entries, blocks) = {
            let st = self.lock();
            if st.broken.is_some() || st.saved.pos.is_zero() {
                return Ok((0, None, None));
            }
            let entries = st.sums.saved_entries(block..next);
            (st.saved, entries, st.sums.blocks())
        };
        let odd = sums::compare(self.disk(), &self.dir.join("checksums"), &header, &entries)?;
        let read = entries.iter().map(|(_, e)| e.len() as u64).sum();
        Ok((read, odd, (next < blocks).then_some(next)))
    }

    /// Saves all checksums again.
    pub(super) fn save_checksums_anew(self: &Arc<Self>) -> Result<(), StoreError> {
        self.lock().sums.mark_all_dirty();
        self.save_checkpoint(true)
    }

    /// Saves a checkpoint of now.
    pub(super) fn checkpoint(self: &Arc<Self>) -> Result<(), StoreError> {
        self.save_checkpoint(false)
    }

    /// `again`: also if the position is saved already.
    fn save_checkpoint(self: &Arc<Self>, again: bool) -> Result<(), StoreError> {
        self.catch_up()?;
        let _one = task::lock(&self.checkpointing);
        let (changes, header, file) = {
            let mut st = self.lock();
            self.check_usable(&st)?;
            let Some(pos) = self.redo_position(&st)? else {
                return Ok(());
            };
            if pos == st.saved.pos && !again {
                return Ok(());
            }
            let header = SumsHeader {
                sequence: st.saved.sequence + 1,
                pos,
                page_size: st.page_size,
                pages: st.sums.len(),
            };
            (st.sums.take_changes(), header, st.files.database.clone())
        };
        let save = || -> Result<(), StoreError> {
            self.log().flush_wait()?;
            if let Some(f) = file {
                self.sync_database(&f)?;
            }
            sums::save(self.disk(), &self.dir.join("checksums"), &changes, &header)
        };
        let saved = save();
        let mut st = self.lock();
        match saved {
            Ok(()) => {
                st.saved = header;
                st.checkpoint_due = LOG_BYTES;
                Ok(())
            }
            Err(e) => {
                st.sums.mark_all_dirty();
                Err(e)
            }
        }
    }

    /// Once this has failed it fails for good: the kernel may take pages for written that are not,
    /// and only a recovery writes them again.
    fn sync_database(&self, f: &DbFile) -> Result<(), StoreError> {
        let path = self.path(FileKind::Database);
        if self.unsyncable.load(Ordering::Acquire) {
            let what = "a sync of it has failed: start the node anew once the cause is mended";
            return Err(StoreError::corrupt(path, what));
        }
        f.file.sync_data().map_err(|e| {
            self.unsyncable.store(true, Ordering::Release);
            StoreError::io("sync database", path)(e)
        })
    }

    /// The position up to which the database file alone is complete.
    fn redo_position(&self, st: &State) -> Result<Option<Pos>, StoreError> {
        let Some(oldest) = st.wal.oldest_missing() else {
            return Ok(Some(st.pos));
        };
        match self.log().read(oldest)? {
            Some(record) => Ok(Some(record.ltx_header()?.pre_apply_pos())),
            None => Ok(None),
        }
    }

    /// Removes log records that are older than `retention` and needed no more, by a recovery or a
    /// backup.
    pub(super) fn prune_log(self: &Arc<Self>, retention: Duration) -> Result<(), StoreError> {
        let behind = {
            let st = self.lock();
            st.broken.is_none() && st.saved.pos.txid < st.pos.txid
        };
        if behind {
            self.checkpoint()?;
        }
        let keep_after = self.lock().saved.pos.txid.min(self.prunable());
        let removed = self.log().prune(keep_after, retention)?;
        self.counters()
            .ltx_reaped
            .fetch_add(removed, Ordering::Relaxed);
        Ok(())
    }

    /// The clean end: everything in the database file, checksums saved, and the last transaction
    /// left as an LTX file for LiteFS, should it be started on this directory.
    pub(super) fn close(self: &Arc<Self>, readers_until: Instant) -> Result<(), StoreError> {
        self.release_locks();
        self.leave_lane(readers_until)?;
        self.log().flush_wait()?;
        {
            let mut st = self.lock();
            self.check_usable(&st)?;
            if st.page_count > 0 {
                self.backfill_all(&mut st)?;
                let file = st.database_file(&self.name)?;
                let size = st.committed_size();
                self.set_file_size(&mut st, &*file.file, size)?;
            }
        }
        self.checkpoint()?;
        for kind in [FileKind::Journal, FileKind::Wal, FileKind::Shm] {
            let path = self.path(kind);
            self.disk()
                .remove_file_if_there(&path)
                .map_err(StoreError::io("remove", &path))?;
        }
        self.log().close()?;
        super::litefs::leave_newest(self)
    }
}
