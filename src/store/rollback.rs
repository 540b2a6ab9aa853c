//! Capture in the rollback modes (DELETE, TRUNCATE, PERSIST).
//!
//! While the journal is active, what is written to the database goes to the overlay. The end of
//! the journal, by unlink, truncation or zeroing of its header, is the commit point, and the answer
//! to that request is the verdict: pages whose checksum changed are logged and flushed, then moved
//! to the database file, then the journal ends and the request is answered. If anything fails
//! before the record is flushed, the journal stays and SQLite rolls back with it.
//!
//! A journal that ends after the original pages were put back changed nothing, and is no
//! transaction. The journal's own list of pages is never consulted: SQLite does not journal pages
//! that were free.

use std::io::{Read, Write};
use std::sync::Arc;

use crate::ltx;
use crate::sqlite::header::{self, DbHeader};

use super::capture::{Captured, Shape, WalPlace};
use super::context::Job;
use super::database::{Database, FileKind, State, read_or_zeros};
use super::disk::{DiskFile, Reader};
use super::error::StoreError;
use super::files::Done;
use super::gate::Pass;
use super::pages::PageList;

/// Largest step by which space for the database file is reserved ahead.
const RESERVE_STEP: u64 = 16 << 20;

/// Bytes that a transaction may add to a database without writing them: SQLite leaves free pages
/// out that were never written, which are as many as fit into its cache.
const MAX_HOLES: u64 = 1 << 30;

/// How a journal ends.
#[derive(Debug)]
pub(super) enum JournalEnd {
    /// Unlinked.
    Unlink,
    /// Cut to this many bytes.
    Truncate(u64),
    /// Its header overwritten with these bytes, at this offset.
    Overwrite(u64, Vec<u8>),
    /// It stays as it is: its super-journal ended.
    SuperJournal,
}

impl Database {
    /// Copies bytes of the database file as its writer sees them.
    pub(super) fn read_view(&self, st: &State, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let from_file = usize::try_from(st.base_size.saturating_sub(offset))
            .unwrap_or(usize::MAX)
            .min(buf.len());
        if from_file > 0 {
            let Some(file) = &st.files.database else {
                return Err(std::io::ErrorKind::NotFound.into());
            };
            read_or_zeros(&*file.file, offset, &mut buf[..from_file])?;
        }
        buf[from_file..].fill(0);
        st.overlay.read_over(offset, buf)
    }

    /// The journal now begins with a valid header: a transaction that writes the database file.
    pub(super) fn begin_rollback(&self, st: &mut State) -> Result<(), StoreError> {
        self.backfill_all(st)?;
        st.journal_active = true;
        Ok(())
    }

    /// Holds back a write to the database file.
    pub(super) fn hold_back(
        &self,
        st: &mut State,
        offset: u64,
        data: &[u8],
    ) -> Result<(), StoreError> {
        self.withdraw(st)?;
        if st.overlay.is_empty() {
            let written = data.len() as u32;
            let size = match st.page_size {
                0 if ltx::is_valid_page_size(written) => written,
                0 => 4096,
                size => size,
            };
            st.overlay.set_block_size(size);
        }
        let file = st.database_file(&self.name)?;
        let base_size = st.base_size;
        let base = |at: u64, block: &mut [u8]| {
            let valid = usize::try_from(base_size.saturating_sub(at))
                .unwrap_or(usize::MAX)
                .min(block.len());
            block[valid..].fill(0);
            read_or_zeros(&*file.file, at, &mut block[..valid])
        };
        st.overlay
            .write(offset, data, base)
            .map_err(self.io("hold back a write to", FileKind::Database))?;
        st.view_size = st.view_size.max(offset + data.len() as u64);
        Ok(())
    }

    /// The commit point.
    pub(super) fn end_journal(self: &Arc<Self>, end: JournalEnd, done: Done) {
        if self.holds_halt() {
            return self.end_journal_there(end, done);
        }
        let mut st = self.lock();
        let captured = match self.capture_rollback(&mut st) {
            Ok(c) => c,
            Err(e) => {
                drop(st);
                self.warn_rarely(&e);
                return done(Err(e));
            }
        };
        let Some((captured, pass)) = captured else {
            let result = self.end_unchanged(&mut st, end);
            drop(st);
            return done(result);
        };
        st.journal_active = false;
        st.committing = true;
        let journal = st.files.journal.as_ref().map(|j| j.ino);
        drop(st);
        let db = self.clone();
        self.log().flush(move |flushed| {
            let mut st = db.lock();
            st.committing = false;
            let result = match flushed {
                Ok(()) => db.apply_overlay(&mut st, &captured).and_then(|()| {
                    db.note_flushed(captured.pos.txid);
                    let ended = db.finish_journal(&mut st, end);
                    db.after_advance(&mut st);
                    ended
                }),
                Err(e) => {
                    // SQLite goes on to roll back with its journal, unless the node has done so by now.
                    st.journal_active = true;
                    let failed = StoreError::io("flush the log of", &db.dir)(e);
                    if db.context.gate.is_valid() {
                        Err(failed)
                    } else {
                        db.take_away(&mut st).and(Err(failed))
                    }
                }
            };
            drop(st);
            let result = result.and_then(|()| db.verdict(&pass));
            let unanswered = result.is_err();
            done(result);
            drop(pass);
            if unanswered {
                db.forget_journal(journal);
            }
        });
    }

    /// The end of a journal that stands for nothing.
    pub(super) fn end_unchanged(&self, st: &mut State, end: JournalEnd) -> Result<(), StoreError> {
        self.discard_overlay(st)
            .and_then(|()| self.finish_journal(st, end))
    }

    /// The kernel believes that a journal is as it was, because its end was answered with an error.
    pub(super) fn forget_journal(&self, journal: Option<u64>) {
        let name = self.mount_name(FileKind::Journal);
        self.context.keep(Job::InvalidateEntries(vec![name]));
        if let Some(ino) = journal {
            self.context.keep(Job::InvalidateData(ino));
        }
    }

    /// Does what is left of a transaction that was prepared and is committed: it goes into the log,
    /// then into the file. Whatever fails now sets the database aside, to be finished at the next
    /// start.
    pub(super) fn finish_prepared(
        self: &Arc<Self>,
        c: &Captured,
        body: &mut dyn Read,
    ) -> Result<(), StoreError> {
        let logged = self
            .log()
            .begin(c.pos.txid, c.pos.txid)
            .and_then(|mut appender| {
                std::io::copy(body, &mut appender)
                    .map_err(StoreError::io("append to the log of", &self.dir))?;
                appender.commit()?;
                self.note_captured(c);
                self.log().flush_wait()
            });
        let mut st = self.lock();
        st.committing = false;
        if let Err(e) = logged {
            self.set_broken(
                &mut st,
                format!("{e}: start the node anew once the cause is mended"),
            );
            return Err(e);
        }
        self.apply_overlay(&mut st, c)?;
        self.note_flushed(c.pos.txid);
        st.journal_active = false;
        self.after_advance(&mut st);
        Ok(())
    }

    /// Logs what changed since the journal began, if anything did and it is not logged yet.
    fn capture_rollback(&self, st: &mut State) -> Result<Option<(Captured, Pass)>, StoreError> {
        if let Some((captured, pass)) = self.confirm_early(st)? {
            self.note_captured(&captured);
            return Ok(Some((captured, pass)));
        }
        let Some((changed, shape)) = self.changes(st)? else {
            return Ok(None);
        };
        let pass = self.begin_commit()?;
        let read = |pgno: u32, page: &mut [u8]| self.read_view_page(st, pgno, page);
        let (captured, appender) =
            self.append_transaction(st, changed, shape, WalPlace::default(), read)?;
        appender.commit()?;
        self.note_captured(&captured);
        Ok(Some((captured, pass)))
    }

    /// The same, written to `out` in place of the log: a transaction that is committed elsewhere.
    pub(super) fn prepare_rollback(
        &self,
        st: &mut State,
        out: &mut dyn Write,
    ) -> Result<Option<Captured>, StoreError> {
        self.withdraw(st)?;
        // What the log cannot take afterwards may not be committed elsewhere: a record that it could
        // not flush, and that a start finds, would be taken for this one.
        self.log().check_open()?;
        let Some((changed, shape)) = self.changes(st)? else {
            return Ok(None);
        };
        let read = |pgno: u32, page: &mut [u8]| self.read_view_page(st, pgno, page);
        self.encode_transaction(st, changed, shape, WalPlace::default(), read, out)
            .map(Some)
    }

    /// What changed since the journal began, with space reserved for it.
    pub(super) fn changes(&self, st: &mut State) -> Result<Option<(PageList, Shape)>, StoreError> {
        self.check_usable(st)?;
        if st.view_size == 0 && st.page_count == 0 {
            return Ok(None);
        }
        let shape = self.view_shape(st)?;
        // What a longer transaction left behind counts too.
        let left = st.base_size.saturating_sub(st.committed_size());
        let written = st.overlay.len() * u64::from(st.overlay.block_size()) + left;
        self.check_sparse(st, (shape.commit, shape.page_size), written)?;
        let same_pages = shape.page_size == st.page_size
            || (st.page_size == 0 && st.overlay.block_size() == shape.page_size);
        let changed = if same_pages {
            self.changed_pages(st, shape)?
        } else {
            self.all_pages(st, shape)?
        };
        if changed.is_empty() && same_pages && shape.commit == st.page_count {
            return Ok(None);
        }
        self.reserve(st, u64::from(shape.commit) * u64::from(shape.page_size))?;
        Ok(Some((changed, shape)))
    }

    pub(super) fn read_view_page(
        &self,
        st: &State,
        pgno: u32,
        page: &mut [u8],
    ) -> Result<(), StoreError> {
        let read = |page: &mut [u8]| {
            if page.len() == st.overlay.block_size() as usize
                && st.overlay.read_block(u64::from(pgno - 1), page)?
            {
                return Ok(());
            }
            self.read_view(st, u64::from(pgno - 1) * page.len() as u64, page)
        };
        read(page).map_err(self.io("read database", FileKind::Database))
    }

    /// What the written database is, by its own header.
    fn view_shape(&self, st: &State) -> Result<Shape, StoreError> {
        let path = self.path(FileKind::Database);
        let mut head = [0u8; header::HEADER_SIZE];
        self.read_view(st, 0, &mut head)
            .map_err(StoreError::io("read database", &path))?;
        let h = DbHeader::parse(&head)
            .map_err(|e| self.refuse(format!("what was written is no SQLite database: {e}")))?;
        let commit = h.pages(st.view_size);
        let size = u64::from(commit) * u64::from(h.page_size);
        if commit == 0 || size > st.view_size + u64::from(h.page_size) {
            return Err(self.refuse(format!(
                "its header says {commit} pages of {} bytes, the file has {} bytes",
                h.page_size, st.view_size
            )));
        }
        Ok(Shape {
            page_size: h.page_size,
            commit,
            wal_mode: h.is_wal(),
        })
    }

    /// An error if the database would grow by much more than the `written` bytes: every page that
    /// it grows by costs its part of the log and of memory, and a header can say anything.
    pub(super) fn check_sparse(
        &self,
        st: &State,
        shape: (u32, u32),
        written: u64,
    ) -> Result<(), StoreError> {
        let (commit, page_size) = (u64::from(shape.0), u64::from(shape.1));
        if commit * page_size <= st.committed_size() + written + MAX_HOLES {
            return Ok(());
        }
        Err(self.refuse(format!(
            "a transaction that makes the database {commit} pages of {page_size} bytes, and writes {written} bytes"
        )))
    }

    fn changed_pages(&self, st: &State, shape: Shape) -> Result<PageList, StoreError> {
        let lock_page = ltx::lock_pgno(shape.page_size);
        let old_pages = st.page_count.min(shape.commit);
        let written = st
            .overlay
            .block_numbers()
            .take_while(|n| *n < u64::from(old_pages))
            .map(|n| n as u32 + 1);
        let new = old_pages + 1..=shape.commit;
        let mut page = vec![0u8; shape.page_size as usize];
        let mut changed = PageList::default();
        for pgno in written.chain(new).filter(|p| *p != lock_page) {
            self.read_view_page(st, pgno, &mut page)?;
            let sum = ltx::page_checksum(pgno, &page);
            if pgno > st.page_count || sum != st.sums.get(pgno) {
                changed.push(pgno, sum);
            }
        }
        Ok(changed)
    }

    /// Every page, for a transaction that changes their size.
    fn all_pages(&self, st: &State, shape: Shape) -> Result<PageList, StoreError> {
        let lock_page = ltx::lock_pgno(shape.page_size);
        let mut page = vec![0u8; shape.page_size as usize];
        (1..=shape.commit)
            .filter(|p| *p != lock_page)
            .map(|pgno| {
                self.read_view_page(st, pgno, &mut page)?;
                Ok((pgno, ltx::page_checksum(pgno, &page)))
            })
            .collect()
    }

    /// Makes sure that the database file can grow to `size`: once a transaction is logged,
    /// writing it must not fail for want of space.
    pub(super) fn reserve(&self, st: &mut State, size: u64) -> Result<(), StoreError> {
        if size <= st.reserved {
            return Ok(());
        }
        let file = st.database_file(&self.name)?;
        let target = size + (size / 8).clamp(64 << 10, RESERVE_STEP);
        let path = self.path(FileKind::Database);
        file.file
            .reserve(0, target)
            .map_err(StoreError::io("reserve space for", &path))?;
        st.reserved = target;
        Ok(())
    }

    /// Moves a logged transaction from the overlay to the file, and the state with it.
    fn apply_overlay(&self, st: &mut State, c: &Captured) -> Result<(), StoreError> {
        let path = self.path(FileKind::Database);
        let write = |st: &mut State| -> Result<(), StoreError> {
            st.preserve_before(self, c)?;
            let file = st.database_file(&self.name)?;
            let size = u64::from(c.commit) * u64::from(c.page_size);
            st.overlay
                .write_out(&*file.file, size)
                .map_err(StoreError::io("write held-back pages to", &path))?;
            self.set_file_size(st, &*file.file, st.view_size)
        };
        if let Err(e) = write(st) {
            self.set_broken(
                st,
                format!("{e}: its log is whole, start the node anew once the cause is mended"),
            );
            return Err(e);
        }
        st.overlay.clear();
        st.base_size = st.view_size;
        self.advance(st, c);
        Ok(())
    }

    /// Gives the database file this size. One that is right is left alone: truncation gives the
    /// reserved space back.
    pub(super) fn set_file_size(
        &self,
        st: &mut State,
        file: &dyn DiskFile,
        size: u64,
    ) -> Result<(), StoreError> {
        let resize = || -> std::io::Result<bool> {
            let differs = file.metadata()?.len() != size;
            if differs {
                file.set_len(size)?;
            }
            Ok(differs)
        };
        if resize().map_err(StoreError::io(
            "resize database",
            self.path(FileKind::Database),
        ))? {
            st.reserved = size;
        }
        Ok(())
    }

    /// Nothing changed: what is held back equals what is there.
    fn discard_overlay(&self, st: &mut State) -> Result<(), StoreError> {
        self.withdraw(st)?;
        st.overlay.clear();
        st.view_size = st.view_size.max(st.committed_size());
        if let Some(file) = st.files.database.clone() {
            self.set_file_size(st, &*file.file, st.view_size)?;
        }
        st.base_size = st.view_size;
        Ok(())
    }

    /// Does to the journal what the application asked for.
    pub(super) fn finish_journal(&self, st: &mut State, end: JournalEnd) -> Result<(), StoreError> {
        st.journal_active = false;
        let path = self.path(FileKind::Journal);
        let Some(journal) = st.files.journal.clone() else {
            return Ok(());
        };
        match end {
            JournalEnd::Unlink => {
                journal.delete();
                st.files.journal = None;
                self.disk()
                    .remove_file(&path)
                    .map_err(StoreError::io("remove journal", &path))
            }
            JournalEnd::Truncate(size) => journal
                .file
                .set_len(size)
                .map_err(StoreError::io("truncate journal", &path)),
            JournalEnd::Overwrite(at, data) => journal
                .file
                .write_all_at(&data, at)
                .map_err(StoreError::io("write journal", &path)),
            JournalEnd::SuperJournal => Ok(()),
        }
    }

    /// Whether the active journal names this super-journal.
    pub(super) fn journal_names(&self, super_journal: &str) -> Result<bool, StoreError> {
        let st = self.lock();
        let (true, Some(journal)) = (st.journal_active, st.files.journal.clone()) else {
            return Ok(false);
        };
        drop(st);
        // Whoever takes an error for a no commits one half of the transaction.
        let named = journal.file.size().and_then(|len| {
            let reader = Reader::new(journal.file.clone());
            crate::sqlite::journal::super_journal_name(reader, len)
        });
        let named = named.map_err(StoreError::io("read", self.path(FileKind::Journal)))?;
        Ok(named.is_some_and(|n| n.rsplit('/').next() == Some(super_journal)))
    }
}
