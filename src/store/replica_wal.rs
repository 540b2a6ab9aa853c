//! The replica as a writer of the WAL: appending, checkpointing and restarting as SQLite does.
//!
//! Invariants:
//! - Applications never write this WAL (they cannot open it for writing), so what is in memory of
//!   it is what is in the file. They may recover its index, which they do under the WRITE lock.
//! - The index is written only if it is in step: valid, and at the frames that were there before.
//!   Else it is left invalid, and the next connection recovers it from the WAL.
//! - Frames are copied into the database only up to the lowest frame that a reader may still be
//!   at, and the WAL is restarted only when no reader uses it. Neither ever waits for a reader.

use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock;
use crate::sqlite::locks::{self, LockKind, WAL_CKPT_LOCK, WAL_WRITE_LOCK, wal_read_lock};
use crate::sqlite::wal::{FRAME_HEADER_SIZE, FrameHeader, WAL_HEADER_SIZE, WalHeader};
use crate::sqlite::wal_index::{IndexHeader, READ_MARK_UNUSED, READ_MARKS, WalIndex};

use super::capture::Captured;
use super::database::{Database, FileKind, State};
use super::error::StoreError;
use super::pages::PageList;
use super::receive::Incoming;
use super::replica::{Held, READER_WAIT, ReplicaLocks, index_lock, lock_timeout};
use super::shm::SharedIndex;
use super::wal::{Frame, newest_frames, note_newest};

/// Frames that are not in the database file before they are copied there, as SQLite's default.
const CHECKPOINT_FRAMES: usize = 1000;
/// How often readers are looked at while they hold up a change of the page size.
const DRAIN_PAUSE: Duration = Duration::from_millis(5);
/// Bytes of frames gathered for one write.
const WRITE_BUFFER: usize = 1 << 20;
/// How many bytes more of the WAL are reserved than are needed at once.
const RESERVE_STEP: u64 = 256 << 10;

impl State {
    /// Whether there is a WAL whose frames are of another size.
    pub(super) fn wal_has_other_pages(&self, page_size: u32) -> bool {
        self.wal.header.is_some_and(|h| h.page_size != page_size)
    }
}

impl Database {
    /// Appends a transaction to the WAL and publishes it to readers.
    pub(super) fn apply_to_wal(
        self: &Arc<Self>,
        locks: &mut ReplicaLocks,
        ino: u64,
        c: &Captured,
        incoming: &mut Incoming,
    ) -> Result<(), StoreError> {
        locks.open_wal(self, ino)?;
        let Some(shared) = &mut locks.shm else {
            return Err(StoreError::NoDatabase(self.mount_name(FileKind::Shm)));
        };
        let fd = shared
            .file
            .try_clone()
            .map_err(StoreError::io("reopen", self.mount_name(FileKind::Shm)))?;
        // Under the halt lock it is held already, by this very description, and stays.
        let held = locks.held == Some(Held::Write);
        let write_lock = if held {
            None
        } else {
            let name = "the WAL's WRITE lock";
            Some(index_lock(self, &fd, WAL_WRITE_LOCK, 1, name)?)
        };
        if self.lock().wal_has_other_pages(c.page_size) {
            let _checkpointer = index_lock(self, &fd, WAL_CKPT_LOCK, 1, "the WAL's CKPT lock")?;
            self.empty_wal(shared, ino, clock::now() + READER_WAIT)?;
        }
        let start = {
            let mut st = self.lock();
            self.follow(&mut st)?;
            self.restart_wal(&mut st, shared)?;
            st.wal.committed
        };
        self.reserve_frames(shared, c)?;
        self.mark_applied(c.pos.txid)?;
        // The log's flush follows by itself: a power loss before it takes back what the primary sends
        // again. On the primary there is nobody to do so.
        self.append_incoming(incoming, held)?;
        let wal_ino = {
            let mut st = self.lock();
            if let Err(e) = self.write_frames(&mut st, c, incoming) {
                self.set_broken(
                    &mut st,
                    format!("{e}: its log is whole, start the node anew once the cause is mended"),
                );
                return Err(e);
            }
            st.files.wal.as_ref().map_or(0, |w| w.ino)
        };
        if let Some(front) = self.context.front() {
            let st = self.lock();
            let from = if start == 0 { 0 } else { st.wal.offset(start) };
            let len = st.wal.committed_end() - from;
            drop(st);
            front.invalidate_data(wal_ino, from, len);
            self.show_size(FileKind::Wal);
        }
        let shown = self.publish_in_index(shared, start);
        drop(write_lock);
        // It is logged and in the WAL, whatever became of the index: the position says so.
        self.publish_applied(c);
        shown?;
        if self.lock().wal.unbackfilled() >= CHECKPOINT_FRAMES {
            self.checkpoint_wal(shared, ino, held)?;
        }
        let mut st = self.lock();
        self.after_advance(&mut st);
        Ok(())
    }

    /// Makes sure of the space for a transaction's frames, and for their places in the index: once
    /// it is logged, a full disk would cost the database.
    fn reserve_frames(&self, shared: &mut SharedIndex, c: &Captured) -> Result<(), StoreError> {
        let (file, start, from, frames) = {
            let st = self.lock();
            let file = st.files.wal.clone();
            let file = file.ok_or_else(|| StoreError::Deleted(self.mount_name(FileKind::Wal)))?;
            let other_size = st.page_size != c.page_size;
            let written = c
                .changed
                .iter()
                .filter(|(p, s)| other_size || st.sums.get(*p) != *s);
            let (start, from) = (st.wal.committed, st.wal.committed_end());
            (file, start, from, written.count().max(1))
        };
        shared.ensure(self, WalIndex::regions_needed((start + frames) as u32))?;
        let io = |e| StoreError::io("reserve space for", self.path(FileKind::Wal))(e);
        let end = from + frames as u64 * (u64::from(c.page_size) + 24) + 32;
        // In steps: most transactions find theirs reserved.
        if file.file.metadata().map_err(io)?.blocks() * 512 >= end {
            return Ok(());
        }
        let target = end + RESERVE_STEP;
        file.file.reserve(0, target).map_err(io)
    }

    /// Writes the frames of a transaction behind the committed ones, and moves the state on.
    fn write_frames(
        &self,
        st: &mut State,
        c: &Captured,
        incoming: &mut Incoming,
    ) -> Result<(), StoreError> {
        let path = self.path(FileKind::Wal);
        let wal = st
            .files
            .wal
            .clone()
            .ok_or_else(|| StoreError::Deleted(self.mount_name(FileKind::Wal)))?;
        let mut out = Vec::new();
        let mut at = st.wal.committed_end();
        let header = match st.wal.header {
            Some(h) if h.page_size == c.page_size => h,
            Some(_) if st.wal.committed > 0 => {
                return Err(self.refuse("pages of another size behind those in the WAL"));
            }
            _ => {
                let h = WalHeader::new(c.page_size, 0, self.random() as u32, self.random() as u32);
                st.wal.header = Some(h);
                h
            }
        };
        if st.wal.committed == 0 {
            out.extend_from_slice(&header.encode());
            at = 0;
        }
        let start = st.wal.committed;
        st.wal.frames.truncate(start);
        st.wal.tail.clear();
        let mut chain = st.wal.chain_before(start);
        // A snapshot brings pages that are there already; a transaction brings none of these.
        let mut pages: PageList = c
            .changed
            .iter()
            .filter(|(p, s)| {
                st.page_size != c.page_size || st.sums.get(*p) != *s || *p > st.page_count
            })
            .collect();
        if pages.is_empty() {
            // The commit needs a frame to stand on.
            let first = c.changed.iter().next();
            first.into_iter().for_each(|(p, s)| pages.push(p, s));
        }
        st.preserve_before(self, c)?;
        let last = pages.last().unwrap_or(0);
        let mut frames: Vec<Frame> = Vec::with_capacity(pages.len());
        self.for_pages(incoming, |pgno, page| {
            let Some(i) = pages.find(pgno) else {
                return Ok(());
            };
            let commit = if pgno == last { c.commit } else { 0 };
            let frame = FrameHeader::for_page(&header, chain, pgno, commit, page);
            chain = frame.checksum;
            frames.push(Frame {
                pgno,
                sum: pages.sum(i),
                chain,
            });
            out.extend_from_slice(&frame.encode());
            out.extend_from_slice(page);
            if out.len() >= WRITE_BUFFER {
                wal.file
                    .write_all_at(&out, at)
                    .map_err(StoreError::io("write WAL", &path))?;
                at += out.len() as u64;
                out.clear();
            }
            Ok(())
        })?;
        wal.file
            .write_all_at(&out, at)
            .map_err(StoreError::io("write WAL", &path))?;
        st.wal.frames.append(&mut frames);
        st.wal.committed = st.wal.frames.len();
        st.wal.written_to = st.wal.committed_end();
        let newest = newest_frames(&st.wal.frames, start, c.commit);
        let shrunk = c.commit < st.page_count;
        self.advance(st, c);
        note_newest(st, &newest, c.pos.txid, shrunk);
        Ok(())
    }

    /// Lets readers see the frames from `start` on, if the index is in step.
    fn publish_in_index(&self, shared: &mut SharedIndex, start: usize) -> Result<(), StoreError> {
        let (frames, header, page_count) = {
            let st = self.lock();
            (
                st.wal.frames[start..st.wal.committed].to_vec(),
                st.wal.header,
                st.page_count,
            )
        };
        let (Some(wal), Some(last)) = (header, frames.last()) else {
            return Ok(());
        };
        let mx_frame = (start + frames.len()) as u32;
        let index = shared.ensure(self, WalIndex::regions_needed(mx_frame))?;
        let in_step = index.read_header().filter(|h| {
            h.mx_frame as usize == start
                && (start == 0 || (h.salt1, h.salt2) == (wal.salt1, wal.salt2))
        });
        let Some(old) = in_step else {
            index.invalidate_header();
            return Ok(());
        };
        let pgnos: Vec<u32> = frames.iter().map(|f| f.pgno).collect();
        if let Err(e) = index.append_frames(start as u32 + 1, &pgnos) {
            tracing::debug!(db = self.name, error = %e, "WAL index is left to be recovered");
            index.invalidate_header();
            return Ok(());
        }
        index.write_header(&IndexHeader {
            change: old.change.wrapping_add(1),
            is_init: true,
            big_endian_checksum: wal.big_endian,
            page_size: wal.page_size,
            mx_frame,
            page_count,
            frame_checksum: last.chain,
            salt1: wal.salt1,
            salt2: wal.salt2,
        });
        Ok(())
    }

    /// Puts everything into the database file and starts the WAL over, which needs every reader of
    /// the WAL to end its transaction once. Under the WRITE and CKPT locks.
    pub(super) fn empty_wal(
        &self,
        shared: &mut SharedIndex,
        ino: u64,
        deadline: Instant,
    ) -> Result<(), StoreError> {
        self.log().flush_wait()?;
        while !self.try_empty_wal(shared, ino)? {
            if clock::now() >= deadline {
                return Err(lock_timeout(self, "readers to end, for another page size"));
            }
            clock::pause(DRAIN_PAUSE);
        }
        Ok(())
    }

    fn try_empty_wal(&self, shared: &mut SharedIndex, ino: u64) -> Result<bool, StoreError> {
        let name = self.mount_name(FileKind::Shm);
        let io = |e| StoreError::io("lock", &name)(e);
        let fd = shared
            .file
            .try_clone()
            .map_err(StoreError::io("reopen", &name))?;
        let fd = fd.as_fd();
        let index = shared.ensure(self, 1)?;
        let committed = self.lock().wal.committed;
        if committed == 0 {
            return Ok(true);
        }
        if (safe_frame(fd, index, committed as u32).map_err(io)? as usize) < committed
            || !locks::try_lock(fd, LockKind::Exclusive, wal_read_lock(0), 1).map_err(io)?
        {
            return Ok(false);
        }
        {
            let _read0 = locks_guard(fd, wal_read_lock(0), 1);
            let mut st = self.lock();
            self.backfill_all(&mut st)?;
            st.wal.backfilled = committed;
            let page_size = st.page_size;
            drop(st);
            self.invalidate_pages(ino, page_size, &[]);
            // From now on readers take nothing from the WAL, and the others end one by one.
            if index
                .read_header()
                .is_some_and(|h| h.mx_frame as usize == committed)
            {
                index.set_n_backfill_attempted(committed as u32);
                index.set_n_backfill(committed as u32);
            }
        }
        let mut st = self.lock();
        self.restart_wal(&mut st, shared)?;
        Ok(st.wal.committed == 0)
    }

    /// Starts the WAL over if everything in it is in the database file and nobody reads it. Under
    /// the WRITE lock.
    fn restart_wal(&self, st: &mut State, shared: &mut SharedIndex) -> Result<(), StoreError> {
        let Some(old) = st.wal.header else {
            return Ok(());
        };
        if st.wal.committed == 0 || st.wal.unbackfilled() > 0 || !st.wal.newest.is_empty() {
            return Ok(());
        }
        let name = self.mount_name(FileKind::Shm);
        let fd = shared.file.as_fd();
        let readers = wal_read_lock(1);
        let count = READ_MARKS as u64 - 1;
        if !locks::try_lock(fd, LockKind::Exclusive, readers, count)
            .map_err(StoreError::io("lock", &name))?
        {
            return Ok(());
        }
        let new = WalHeader::new(
            old.page_size,
            old.checkpoint_seq.wrapping_add(1),
            old.salt1.wrapping_add(1),
            self.random() as u32,
        );
        let committed = st.wal.committed;
        st.wal.reset();
        st.wal.header = Some(new);
        if let Some(wal) = &st.files.wal {
            // So that a recovery of the index, which may come at once, finds this generation empty.
            wal.file
                .write_all_at(&new.encode(), 0)
                .map_err(StoreError::io("write WAL", self.path(FileKind::Wal)))?;
            st.wal.written_to = WAL_HEADER_SIZE as u64;
        }
        let _unlock = locks_guard(fd, readers, count);
        // No reader holds a mark on the WAL now, as their locks are ours.
        let index = shared.index();
        match index.read_header() {
            Some(h)
                if h.mx_frame as usize == committed
                    && (h.salt1, h.salt2) == (old.salt1, old.salt2) =>
            {
                index.write_header(&IndexHeader {
                    mx_frame: 0,
                    salt1: new.salt1,
                    salt2: new.salt2,
                    change: h.change,
                    ..h
                });
                index.set_n_backfill(0);
                index.set_n_backfill_attempted(0);
                index.set_read_mark(1, 0);
                (2..READ_MARKS).for_each(|i| index.set_read_mark(i, READ_MARK_UNUSED));
            }
            _ => index.invalidate_header(),
        }
        Ok(())
    }

    /// Copies frames into the database file, as far as readers permit.
    fn checkpoint_wal(
        self: &Arc<Self>,
        shared: &mut SharedIndex,
        ino: u64,
        write_held: bool,
    ) -> Result<(), StoreError> {
        self.log().flush_wait()?;
        let name = self.mount_name(FileKind::Shm);
        let io = |e| StoreError::io("lock", &name)(e);
        let fd = shared
            .file
            .try_clone()
            .map_err(StoreError::io("reopen", &name))?;
        let fd = fd.as_fd();
        // WRITE as well: nobody recovers the index meanwhile.
        let first = if write_held {
            WAL_CKPT_LOCK
        } else {
            WAL_WRITE_LOCK
        };
        let count = WAL_CKPT_LOCK + 1 - first;
        if !locks::try_lock(fd, LockKind::Exclusive, first, count).map_err(io)? {
            return Ok(());
        }
        let _locks = locks_guard(fd, first, count);
        let (committed, backfilled) = {
            let st = self.lock();
            (st.wal.committed, st.wal.backfilled)
        };
        let index = shared.ensure(self, 1)?;
        let in_step = index
            .read_header()
            .is_some_and(|h| h.mx_frame as usize == committed);
        let safe = safe_frame(fd, index, committed as u32).map_err(io)? as usize;
        if safe <= backfilled
            || !locks::try_lock(fd, LockKind::Exclusive, wal_read_lock(0), 1).map_err(io)?
        {
            return Ok(());
        }
        let _read0 = locks_guard(fd, wal_read_lock(0), 1);
        if in_step {
            index.set_n_backfill_attempted(safe as u32);
        }
        let pages = self.backfill_to(safe)?;
        let page_size = self.lock().page_size;
        self.invalidate_pages(ino, page_size, &pages);
        if in_step {
            index.set_n_backfill(safe as u32);
        }
        Ok(())
    }

    /// Copies the frames below `safe` into the database file. Returns the pages.
    fn backfill_to(&self, safe: usize) -> Result<Vec<u32>, StoreError> {
        let mut st = self.lock();
        let (db_path, wal_path) = (self.path(FileKind::Database), self.path(FileKind::Wal));
        let size = st.committed_size();
        self.reserve(&mut st, size)?;
        let wal = st
            .files
            .wal
            .clone()
            .ok_or_else(|| StoreError::Deleted(self.mount_name(FileKind::Wal)))?;
        let file = st.database_file(&self.name)?;
        let pages = newest_frames(&st.wal.frames[..safe], st.wal.backfilled, u32::MAX);
        let mut page = vec![0u8; st.page_size as usize];
        for (pgno, frame) in &pages {
            if *pgno > st.page_count {
                continue;
            }
            wal.file
                .read_exact_at(&mut page, st.wal.offset(*frame) + FRAME_HEADER_SIZE as u64)
                .map_err(StoreError::io("read WAL", &wal_path))?;
            file.file
                .write_all_at(&page, u64::from(pgno - 1) * u64::from(st.page_size))
                .map_err(StoreError::io("write database", &db_path))?;
            if st
                .wal
                .newest
                .get(pgno)
                .is_some_and(|n| n.frame as usize == *frame)
            {
                st.wal.newest.remove(pgno);
            }
        }
        st.wal.backfilled = safe;
        if safe == st.wal.committed {
            self.set_file_size(&mut st, &*file.file, size)?;
            st.view_size = size;
        }
        st.view_size = st.view_size.max(size);
        st.base_size = st.view_size;
        Ok(pages.into_iter().map(|(p, _)| p).collect())
    }
}

/// The last frame, up to `committed`, that no reader is before; read marks that nobody holds are
/// moved up to it.
fn safe_frame(
    fd: std::os::fd::BorrowedFd<'_>,
    index: &WalIndex,
    committed: u32,
) -> std::io::Result<u32> {
    let mut safe = committed;
    for i in 1..READ_MARKS {
        let mark = index.read_mark(i);
        if mark >= safe {
            continue;
        }
        let lock = wal_read_lock(i as u64);
        if locks::try_lock(fd, LockKind::Exclusive, lock, 1)? {
            index.set_read_mark(i, if i == 1 { safe } else { READ_MARK_UNUSED });
            locks::unlock(fd, lock, 1)?;
        } else {
            safe = mark;
        }
    }
    Ok(safe)
}

/// Gives a range up at the end of a scope.
fn locks_guard(fd: std::os::fd::BorrowedFd<'_>, start: u64, len: u64) -> impl Drop + '_ {
    struct Unlock<'a>(std::os::fd::BorrowedFd<'a>, u64, u64);
    impl Drop for Unlock<'_> {
        fn drop(&mut self) {
            // The locks go with the descriptor at the latest.
            let _ = locks::unlock(self.0, self.1, self.2);
        }
    }
    Unlock(fd, start, len)
}
