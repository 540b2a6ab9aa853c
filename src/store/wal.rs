//! Capture in WAL mode.
//!
//! Frames form a chain of checksums from the WAL's header on. Whenever a write makes the chain
//! reach a frame with a commit size, the frames since the last one are a transaction; it is in the
//! log before that write is answered. Nothing is assumed about how the bytes of a frame are cut
//! into writes, and frames of the transaction being written may be overwritten in place.
//!
//! Invariants:
//! - `frames` is the valid chain; the first `committed` of them belong to logged transactions.
//! - No byte before the end of the committed frames is ever overwritten, except by a new header,
//!   and that only once every committed page is in the database file.
//! - `newest` names the pages whose newest committed version is in the WAL and not known to be in
//!   the database file.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::ltx;
use crate::sqlite::header::DbHeader;
use crate::sqlite::wal::{
    FRAME_HEADER_SIZE, FrameHeader, WAL_HEADER_SIZE, WalChecksum, WalHeader, frame_offset,
};

use super::capture::{Captured, Shape, WalPlace};
use super::context::Job;
use super::database::{Database, DbFile, FileKind, State, read_or_zeros};
use super::error::StoreError;
use super::forward::Outgoing;
use super::pages::PageList;
use super::wal_tail::WalTail;

/// A frame of the valid chain.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    pub pgno: u32,
    /// Checksum of the page.
    pub sum: u64,
    /// Checksum of the chain up to and including this frame.
    pub chain: WalChecksum,
}

/// Where the newest version of a page lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Newest {
    /// Index into the frames, from 0.
    pub frame: u32,
    pub txid: u64,
}

/// See the module's invariants.
#[derive(Debug, Default)]
pub(super) struct WalCapture {
    pub header: Option<WalHeader>,
    pub frames: Vec<Frame>,
    pub committed: usize,
    pub newest: HashMap<u32, Newest>,
    /// End of the bytes written since the header.
    pub written_to: u64,
    /// The last of these bytes: the file may lack them.
    pub tail: WalTail,
    /// How many frames this node's own checkpoints have copied (on a replica).
    pub backfilled: usize,
    /// A transaction may be open that was begun before this node last stopped being primary: it may
    /// write nothing. The index check ends this once it has had the WRITE lock.
    pub stale: bool,
    /// The primary decides about the frames beyond the committed ones: nothing may change.
    pub forwarding: bool,
}

/// What a write to the WAL made of it.
pub(super) enum Scanned {
    /// No transaction was completed.
    Nothing,
    /// One was, and is logged.
    Committed,
    /// One was, and the primary is to decide about it.
    Forward(Box<PreparedWal>),
}

/// A transaction in the WAL that is not logged yet.
pub(super) struct PreparedWal {
    pub captured: Captured,
    /// Its pages, ascending, with the indexes of their frames.
    pub pages: Vec<(u32, usize)>,
    /// The number of frames up to its end.
    pub end: usize,
    pub ltx: Arc<Outgoing>,
}

impl WalCapture {
    /// Where the frame of this index, from 0, begins.
    pub fn offset(&self, index: usize) -> u64 {
        let page_size = self.header.map_or(ltx::HEADER_SIZE as u32, |h| h.page_size);
        frame_offset(index as u32 + 1, page_size)
    }

    /// The end of what is committed.
    pub fn committed_end(&self) -> u64 {
        if self.header.is_some() {
            self.offset(self.committed)
        } else {
            0
        }
    }

    /// The chain's checksum before the frame of this index.
    pub fn chain_before(&self, index: usize) -> WalChecksum {
        match index.checked_sub(1) {
            Some(i) => self.frames[i].chain,
            None => self.header.map_or(WalChecksum(0, 0), |h| h.checksum),
        }
    }

    /// Copies the newest version of a page if it is in the WAL.
    pub fn read_newest(
        &self,
        wal: Option<&DbFile>,
        pgno: u32,
        buf: &mut [u8],
    ) -> std::io::Result<bool> {
        let Some(newest) = self.newest.get(&pgno) else {
            return Ok(false);
        };
        let wal = wal.ok_or(std::io::ErrorKind::NotFound)?;
        wal.file.read_exact_at(
            buf,
            self.offset(newest.frame as usize) + FRAME_HEADER_SIZE as u64,
        )?;
        if ltx::page_checksum(pgno, buf) != self.frames[newest.frame as usize].sum {
            let what = format!("page {pgno} in the WAL does not match its checksum");
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, what));
        }
        Ok(true)
    }

    /// Whether these are the bytes, header and page, of the frame of this index.
    pub fn frame_matches(&self, index: usize, bytes: &[u8]) -> bool {
        let (Some(header), Some((head, page))) =
            (self.header, bytes.split_first_chunk::<FRAME_HEADER_SIZE>())
        else {
            return false;
        };
        let (known, frame) = (self.frames[index], FrameHeader::decode(head));
        let before = self.chain_before(index);
        (frame.pgno, frame.checksum) == (known.pgno, known.chain)
            && (frame.salt1, frame.salt2) == (header.salt1, header.salt2)
            && frame.expected_checksum(header.big_endian, before, page) == known.chain
            && ltx::page_checksum(known.pgno, page) == known.sum
    }

    /// How many committed frames this node's own checkpoints have not copied yet.
    pub fn unbackfilled(&self) -> usize {
        self.committed - self.backfilled.min(self.committed)
    }

    /// The oldest transaction of which the database file may lack a page.
    pub fn oldest_missing(&self) -> Option<u64> {
        self.newest.values().map(|n| n.txid).min()
    }

    /// Whether a committed frame holds this version of the page.
    fn holds(&self, pgno: u32, sum: u64) -> bool {
        self.frames[..self.committed]
            .iter()
            .any(|f| f.pgno == pgno && f.sum == sum)
    }

    pub fn reset(&mut self) {
        *self = WalCapture {
            stale: self.stale,
            ..WalCapture::default()
        };
    }
}

impl Database {
    /// A write to the WAL.
    pub(super) fn write_wal(
        self: &Arc<Self>,
        st: &mut State,
        offset: u64,
        data: &[u8],
    ) -> Result<Scanned, StoreError> {
        self.check_writable(st)?;
        self.check_not_forwarding(st)?;
        if st.wal.stale {
            self.context.keep(Job::CheckIndex(self.clone()));
            return Err(self.refuse("a write to the WAL by a transaction that was begun before this node became primary: it succeeds when it is tried again"));
        }
        let wal = st
            .files
            .wal
            .clone()
            .ok_or_else(|| StoreError::Deleted(self.mount_name(FileKind::Wal)))?;
        if st.files.shm.is_none() && !wal.is_being_copied() {
            return Err(self.refuse("a write to the WAL without a WAL index: PRAGMA locking_mode=EXCLUSIVE cannot be used in WAL mode here, set it back to NORMAL"));
        }
        if st.page_size == 0 {
            return Err(self.refuse("a write to the WAL of a database that has no page"));
        }
        let end = offset + data.len() as u64;
        if offset < WAL_HEADER_SIZE as u64 {
            // A new generation may begin only when nothing of this one is needed any more.
            self.backfill_all(st)?;
        } else if offset < st.wal.committed_end() {
            if self.is_rest_of_commit(st, &wal, offset, data)? {
                return Ok(Scanned::Nothing);
            }
            self.context.keep(Job::CheckIndex(self.clone()));
            return Err(self.refuse("a write into the committed part of the WAL, by a connection that does not know of the last transaction: it will see it when it tries again"));
        } else if st.wal.header.is_none() {
            // It could not be captured. SQLite writes the header first, unless its index is wrong.
            self.context.keep(Job::CheckIndex(self.clone()));
            return Err(self.refuse("a write of a WAL frame without a valid WAL header: it succeeds when it is tried again"));
        }
        if offset < WAL_HEADER_SIZE as u64 {
            wal.file
                .write_all_at(data, offset)
                .map_err(self.io("write WAL", FileKind::Wal))?;
            self.read_wal_header(st, &wal)?;
            self.wal_begun(st, &wal);
        } else {
            st.wal
                .tail
                .write(&*wal.file, offset, data)
                .map_err(self.io("write WAL", FileKind::Wal))?;
        }
        st.wal.written_to = st.wal.written_to.max(end);
        self.read_wal_ahead(st, end);
        self.scan_wal(st, &wal, offset)
    }

    /// Whether a write brings the rest of the frame that completed the last transaction: bytes that
    /// stand there already. A transaction that was rolled back, or a savepoint, may have left the
    /// page in this very place, and the frame's header then completes the commit before SQLite has
    /// written the page. A connection that does not know of the transaction begins with the header.
    fn is_rest_of_commit(
        &self,
        st: &State,
        wal: &DbFile,
        offset: u64,
        data: &[u8],
    ) -> Result<bool, StoreError> {
        let end = st.wal.committed_end();
        let last = st.wal.offset(st.wal.committed.saturating_sub(1));
        if offset <= last || offset + data.len() as u64 > end {
            return Ok(false);
        }
        let mut known = vec![0; data.len()];
        wal.file
            .read_exact_at(&mut known, offset)
            .map_err(self.io("read WAL", FileKind::Wal))?;
        Ok(known == data)
    }

    fn read_wal_header(&self, st: &mut State, wal: &DbFile) -> Result<(), StoreError> {
        let mut h = [0u8; WAL_HEADER_SIZE];
        st.wal.reset();
        read_or_zeros(&*wal.file, 0, &mut h).map_err(self.io("read WAL", FileKind::Wal))?;
        // Half a header is none yet; the rest is still to be written.
        st.wal.header = WalHeader::decode(&h)
            .ok()
            .filter(|h| h.page_size == st.page_size);
        Ok(())
    }

    /// Follows the chain from where it was broken, and captures what it makes complete. `from`:
    /// where the last write began.
    pub(super) fn scan_wal(
        self: &Arc<Self>,
        st: &mut State,
        wal: &DbFile,
        from: u64,
    ) -> Result<Scanned, StoreError> {
        let Some(header) = st.wal.header else {
            return Ok(Scanned::Nothing);
        };
        let frame_size = u64::from(header.page_size) + FRAME_HEADER_SIZE as u64;
        let first = (from.saturating_sub(WAL_HEADER_SIZE as u64) / frame_size) as usize;
        let keep = first.max(st.wal.committed);
        st.wal.frames.truncate(keep);
        let mut buf = Vec::new();
        let mut scanned = Scanned::Nothing;
        loop {
            let index = st.wal.frames.len();
            let at = st.wal.offset(index);
            if at + frame_size > st.wal.written_to {
                return Ok(scanned);
            }
            if st.wal.tail.get(at, frame_size as usize).is_none() {
                buf.resize(frame_size as usize, 0);
                st.wal
                    .tail
                    .write_out(&*wal.file)
                    .and_then(|()| wal.file.read_exact_at(&mut buf, at))
                    .map_err(self.io("read WAL", FileKind::Wal))?;
            }
            let bytes = st.wal.tail.get(at, frame_size as usize).unwrap_or(&buf);
            let (head, page) = bytes.split_at(FRAME_HEADER_SIZE);
            let frame = FrameHeader::decode(head.try_into().expect("of this length"));
            let chain = st.wal.chain_before(index);
            let whole = frame.pgno != 0
                && (frame.salt1, frame.salt2) == (header.salt1, header.salt2)
                && frame.expected_checksum(header.big_endian, chain, page) == frame.checksum;
            if !whole {
                return Ok(scanned);
            }
            let sum = ltx::page_checksum(frame.pgno, page);
            st.wal.frames.push(Frame {
                pgno: frame.pgno,
                sum,
                chain: frame.checksum,
            });
            if frame.commit != 0 {
                match self.capture_wal(st, wal, frame.commit) {
                    // The rest, if there is one, is looked at with the next write.
                    Ok(Some(prepared)) => return Ok(Scanned::Forward(Box::new(prepared))),
                    Ok(None) => scanned = Scanned::Committed,
                    Err(e) => {
                        self.undo_commit_frame(st, index)?;
                        return Err(e);
                    }
                }
            }
        }
    }

    /// Takes back the frame that completes a transaction which is refused.
    pub(super) fn undo_commit_frame(&self, st: &mut State, index: usize) -> Result<(), StoreError> {
        let at = st.wal.offset(index);
        st.wal.frames.truncate(index);
        st.wal.tail.clear();
        // The page stays in the file. Tried again with the same bytes, the commit would
        // be complete with the frame's header, and the write of its page be refused:
        // what counts as written ends before the frame.
        st.wal.written_to = st.wal.written_to.min(at);
        let Some(wal) = st.files.wal.clone() else {
            return Ok(());
        };
        // Whoever recovers the index goes by the file: no commit may stand there that
        // was refused.
        wal.file
            .write_all_at(&[0; FRAME_HEADER_SIZE], at)
            .map_err(StoreError::io("write WAL", self.path(FileKind::Wal)))
    }

    /// An error while the primary decides about a transaction.
    pub(super) fn check_not_forwarding(&self, st: &State) -> Result<(), StoreError> {
        if st.wal.forwarding {
            return Err(self.refuse(
                "a change of the WAL while the primary decides about a transaction in it",
            ));
        }
        Ok(())
    }

    /// Logs the transaction that the frames beyond the committed ones make, or gives it to be
    /// decided by the primary.
    pub(super) fn capture_wal(
        self: &Arc<Self>,
        st: &mut State,
        wal: &DbFile,
        commit: u32,
    ) -> Result<Option<PreparedWal>, StoreError> {
        let header = st.wal.header.expect("the scan has one");
        let (start, end) = (st.wal.committed, st.wal.frames.len());
        let written = st.wal.offset(end);
        st.wal
            .tail
            .write_out_to(&*wal.file, written)
            .map_err(self.io("write WAL", FileKind::Wal))?;
        let pages = newest_frames(&st.wal.frames, start, commit);
        let written = pages.len() as u64 * u64::from(header.page_size);
        self.check_sparse(st, (commit, header.page_size), written)?;
        let holes = self.fill_holes(st, &pages, commit)?;
        let lock_page = ltx::lock_pgno(header.page_size);
        let mut changed: Vec<(u32, u64)> = pages
            .iter()
            .map(|(pgno, i)| (*pgno, st.wal.frames[*i].sum))
            .filter(|(pgno, sum)| {
                *pgno != lock_page && (*pgno > st.page_count || *sum != st.sums.get(*pgno))
            })
            .chain(holes)
            .collect();
        changed.sort_unstable();
        let changed: PageList = changed.into_iter().collect();
        if changed.is_empty() && commit == st.page_count {
            // Known already, or the padding that some settings add: no transaction, but committed.
            st.wal.committed = end;
            return Ok(None);
        }
        // Nothing may fail once the transaction is in the log.
        let cut = commit.saturating_add(1)..=st.page_count;
        st.preserve(self, changed.pgnos().chain(cut))?;
        let frame_size = i64::from(header.page_size) + FRAME_HEADER_SIZE as i64;
        let place = WalPlace {
            offset: st.wal.offset(start) as i64,
            size: (end - start) as i64 * frame_size,
            salt1: header.salt1,
            salt2: header.salt2,
        };
        let read = |pgno: u32, page: &mut [u8]| match pages.binary_search_by_key(&pgno, |(p, _)| *p)
        {
            Ok(i) => {
                let at = st.wal.offset(pages[i].1) + FRAME_HEADER_SIZE as u64;
                match st.wal.tail.get(at, page.len()) {
                    Some(bytes) => page.copy_from_slice(bytes),
                    None => wal
                        .file
                        .read_exact_at(page, at)
                        .map_err(self.io("read WAL", FileKind::Wal))?,
                }
                Ok(())
            }
            Err(_) => self.read_hole(st, pgno, page),
        };
        let wal_mode = match pages.first() {
            Some((1, _)) => {
                let mut page = vec![0u8; header.page_size as usize];
                read(1, &mut page)?;
                DbHeader::parse(&page)
                    .map_err(|e| self.refuse(format!("page 1 in the WAL: {e}")))?
                    .is_wal()
            }
            _ => st.wal_mode,
        };
        let shape = Shape {
            page_size: header.page_size,
            commit,
            wal_mode,
        };
        if self.holds_halt() {
            let mut ltx = Outgoing::new(self.scratch());
            let captured = self.encode_transaction(st, changed, shape, place, read, &mut ltx)?;
            return Ok(Some(PreparedWal {
                captured,
                pages,
                end,
                ltx: Arc::new(ltx),
            }));
        }
        let (captured, appender) = self.append_transaction(st, changed, shape, place, read)?;
        appender.commit()?;
        self.hold.decided_there.store(false, Ordering::Release);
        self.commit_wal(st, &captured, &pages, end);
        Ok(None)
    }

    /// Moves the state on to a transaction in the WAL that is logged.
    pub(super) fn commit_wal(
        self: &Arc<Self>,
        st: &mut State,
        captured: &Captured,
        pages: &[(u32, usize)],
        end: usize,
    ) {
        let shrunk = captured.commit < st.page_count;
        self.advance(st, captured);
        // A page that is written again as it was is not in the record: a recovery finds it in the
        // one that changed it, and its frame of then is as good.
        let is_changed = |pgno: u32| captured.changed.find(pgno).is_some();
        let changed: Vec<_> = pages
            .iter()
            .copied()
            .filter(|(p, _)| is_changed(*p))
            .collect();
        note_newest(st, &changed, captured.pos.txid, shrunk);
        st.wal.committed = end;
        self.note_captured(captured);
        self.context.flush_soon(self);
        self.after_advance(st);
    }

    /// Pages that the transaction adds to the database without writing them (free ones) are zeros
    /// everywhere: in the database file too, whatever stood there. Where others write that file, they
    /// are what stands there.
    fn fill_holes(
        &self,
        st: &mut State,
        pages: &[(u32, usize)],
        commit: u32,
    ) -> Result<Vec<(u32, u64)>, StoreError> {
        if commit <= st.page_count
            || pages.iter().filter(|(p, _)| *p > st.page_count).count() as u32
                == commit - st.page_count
        {
            return Ok(Vec::new());
        }
        let mut page = vec![0u8; st.page_size as usize];
        let file = st.database_file(&self.name)?;
        let lock_page = ltx::lock_pgno(st.page_size);
        (st.page_count + 1..=commit)
            .filter(|p| *p != lock_page && pages.binary_search_by_key(p, |(q, _)| *q).is_err())
            .map(|pgno| {
                self.read_hole(st, pgno, &mut page)?;
                if st.lane.is_none() {
                    file.file
                        .write_all_at(&page, u64::from(pgno - 1) * u64::from(st.page_size))
                        .map_err(StoreError::io(
                            "write database",
                            self.path(FileKind::Database),
                        ))?;
                }
                Ok((pgno, ltx::page_checksum(pgno, &page)))
            })
            .collect()
    }

    /// What a page is that no transaction has written.
    fn read_hole(&self, st: &State, pgno: u32, page: &mut [u8]) -> Result<(), StoreError> {
        if st.lane.is_none() {
            page.fill(0);
            return Ok(());
        }
        let at = u64::from(pgno - 1) * u64::from(st.page_size);
        read_or_zeros(&*st.database_file(&self.name)?.file, at, page).map_err(StoreError::io(
            "read database",
            self.path(FileKind::Database),
        ))
    }

    /// A write to the database file by a checkpoint: only committed versions of pages.
    pub(super) fn write_checkpoint(
        &self,
        st: &mut State,
        offset: u64,
        data: &[u8],
    ) -> Result<(), StoreError> {
        let ps = st.page_size as usize;
        if ps == 0 || !data.len().is_multiple_of(ps) || !offset.is_multiple_of(ps as u64) {
            return Err(self.refuse(format!(
                "a write of {} bytes at {offset} outside of a transaction",
                data.len()
            )));
        }
        let end = offset + data.len() as u64;
        let pages = u32::try_from(end / ps as u64)
            .map_err(|_| self.refuse(format!("a write at {offset}, where no page can be")))?;
        let first = pages - (data.len() / ps) as u32 + 1;
        let mut newest = Vec::new();
        for (pgno, page) in (first..=pages).zip(data.chunks_exact(ps)) {
            let sum = ltx::page_checksum(pgno, page);
            if pgno <= st.page_count && sum == st.sums.get(pgno) {
                newest.push(pgno);
            } else if !st.wal.holds(pgno, sum) {
                return Err(self.refuse(format!("a write of page {pgno} that no transaction made (journal_mode OFF and MEMORY cannot be used here; to load a database file use its SQL dump or import)")));
            }
        }
        self.reserve(st, end)?;
        let file = st.database_file(&self.name)?;
        file.file
            .write_all_at(data, offset)
            .map_err(StoreError::io(
                "write database",
                self.path(FileKind::Database),
            ))?;
        for pgno in newest {
            st.wal.newest.remove(&pgno);
        }
        st.view_size = st.view_size.max(end);
        st.base_size = st.view_size;
        Ok(())
    }

    /// Puts every page that only the WAL has into the database file. SQLite has done so by itself
    /// before it restarts, truncates or deletes a WAL; a WAL that is removed by other means must
    /// not take transactions with it.
    pub(super) fn backfill_all(&self, st: &mut State) -> Result<(), StoreError> {
        if st.wal.newest.is_empty() {
            return Ok(());
        }
        if self.has_unflushed() {
            // No commit of a rollback mode is under way, so no callback of the flush needs the state.
            assert!(
                !st.committing,
                "the WAL is put away in the middle of a commit"
            );
            self.log().flush_wait()?;
        }
        let wal = st.files.wal.clone();
        let file = st.database_file(&self.name)?;
        let mut pages: Vec<u32> = st.wal.newest.keys().copied().collect();
        pages.sort_unstable();
        self.reserve(st, st.committed_size())?;
        let mut page = vec![0u8; st.page_size as usize];
        for pgno in &pages {
            st.wal
                .read_newest(wal.as_deref(), *pgno, &mut page)
                .map_err(StoreError::io("read WAL", self.path(FileKind::Wal)))?;
            file.file
                .write_all_at(&page, u64::from(*pgno - 1) * u64::from(st.page_size))
                .map_err(StoreError::io(
                    "write database",
                    self.path(FileKind::Database),
                ))?;
        }
        st.wal.newest.clear();
        st.view_size = st.view_size.max(st.committed_size());
        st.base_size = st.view_size;
        tracing::debug!(
            db = self.name,
            pages = pages.len(),
            "WAL pages put into the database by the node"
        );
        self.context.keep(Job::InvalidateData(file.ino));
        Ok(())
    }
}

/// For each page up to `commit` its last frame from `start` on, ascending.
pub(super) fn newest_frames(frames: &[Frame], start: usize, commit: u32) -> Vec<(u32, usize)> {
    let mut pages: Vec<(u32, usize)> = frames[start..]
        .iter()
        .enumerate()
        .map(|(i, f)| (f.pgno, start + i))
        .filter(|(pgno, _)| *pgno <= commit)
        .collect();
    pages.sort_unstable_by_key(|(pgno, i)| (*pgno, std::cmp::Reverse(*i)));
    pages.dedup_by_key(|(pgno, _)| *pgno);
    pages
}

/// Notes where the pages of a transaction are now; pages that it cut off are nowhere.
pub(super) fn note_newest(st: &mut State, pages: &[(u32, usize)], txid: u64, shrunk: bool) {
    let count = st.page_count;
    if shrunk {
        st.wal.newest.retain(|p, _| *p <= count);
    }
    for (pgno, i) in pages {
        st.wal.newest.insert(
            *pgno,
            Newest {
                frame: *i as u32,
                txid,
            },
        );
    }
}
