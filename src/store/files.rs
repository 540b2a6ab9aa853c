//! The operations of applications on a database's files. The FUSE layer only translates to these.
//!
//! A file is addressed by its [`DbFile`]: one that was deleted keeps its bytes for those who have
//! it open, and takes no writes. Operations that can wait for the disk answer through [`Done`],
//! from whatever thread the wait ends on.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::ltx;
use crate::sqlite::journal;

use super::capture::{Shape, WalPlace};
use super::context::Job;
use super::database::{Database, DbFile, FileKind, State, read_or_zeros};
use super::disk::{DiskFile, File, Open};
use super::error::StoreError;
use super::pages::PageList;
use super::rollback::JournalEnd;
use super::wal::Scanned;

/// Receives the outcome of an operation, once.
pub type Done = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// The header of a database is read by whoever reads below this: the kernel reads whole pages of
/// memory, from the beginning.
const FIRST_READ: u64 = 4096;

/// Bytes that may be written to a super-journal, journal or WAL index: far more than SQLite does.
pub(super) const MAX_FILE_SIZE: u64 = 1 << 46;

impl State {
    /// Whether this is the WAL that is written to.
    fn is_wal(&self, f: &DbFile) -> bool {
        self.files.wal.as_ref().is_some_and(|w| w.ino == f.ino)
    }

    /// Of bytes that were read from the database file, the first whole page that is not what is
    /// committed, though it must be.
    fn rotten_page(&self, f: &DbFile, offset: u64, bytes: &[u8]) -> Option<u32> {
        let size = u64::from(self.page_size);
        let current = self.files.database.as_ref().is_some_and(|d| d.ino == f.ino);
        if size == 0 || !current {
            return None;
        }
        let first = offset.div_ceil(size);
        let skipped = usize::try_from(first * size - offset).ok()?;
        let pages = bytes.get(skipped..)?.chunks_exact(size as usize);
        (first..).zip(pages).find_map(|(index, page)| {
            let pgno = u32::try_from(index + 1).ok()?;
            let (at, end) = (index * size, (index + 1) * size);
            let committed =
                self.is_in_file(pgno) && end <= self.base_size && !self.overlay.overlaps(at, size);
            (committed && ltx::page_checksum(pgno, page) != self.sums.get(pgno)).then_some(pgno)
        })
    }
}

impl Database {
    /// The file of this kind, if it exists at the moment.
    pub fn file(&self, kind: FileKind) -> Option<Arc<DbFile>> {
        self.lock().files.slot(kind).clone()
    }

    /// Makes the file if it does not exist. On a replica an application can make a WAL index only.
    pub fn create(
        self: &Arc<Self>,
        kind: FileKind,
        by_node: bool,
    ) -> Result<Arc<DbFile>, StoreError> {
        let mut st = self.lock();
        self.check_usable(&st)?;
        if let Some(f) = st.files.slot(kind) {
            return Ok(f.clone());
        }
        if !by_node && kind != FileKind::Shm && !self.is_writable() {
            return Err(StoreError::NotPrimary(self.mount_name(kind)));
        }
        if kind != FileKind::Database && st.files.database.is_none() {
            return Err(StoreError::NoDatabase(self.name.clone()));
        }
        if kind == FileKind::Journal {
            self.check_no_lane(&st)?;
        }
        self.create_file(&mut st, kind)
    }

    /// Makes the file, empty.
    pub(super) fn create_file(
        &self,
        st: &mut State,
        kind: FileKind,
    ) -> Result<Arc<DbFile>, StoreError> {
        if kind == FileKind::Database {
            self.disk()
                .create_dir_all(&self.dir)
                .map_err(StoreError::io("create directory", &self.dir))?;
            st.view_size = 0;
            st.base_size = 0;
            st.reserved = 0;
            st.rollback_counter = 0;
        }
        if kind == FileKind::Wal && st.page_count > 0 {
            let counter = self.change_counter(st).unwrap_or(u32::MAX);
            st.rollback_counter = st.rollback_counter.max(counter);
        }
        let path = self.path(kind);
        let file = self
            .disk()
            .open(&path, Open::Empty)
            .map_err(StoreError::io("create", &path))?;
        Ok(self.adopt_file(st, kind, file))
    }

    /// Makes an open file part of the database.
    pub(super) fn adopt_file(&self, st: &mut State, kind: FileKind, file: File) -> Arc<DbFile> {
        let f = Arc::new(DbFile::new(self.context.next_ino(), kind, file));
        *st.files.slot(kind) = Some(f.clone());
        f
    }

    /// Copies bytes out; returns how many there were before the end of the file.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if pages of the database are not what was written, and whatever is
    /// asked for once the database is set aside.
    pub fn read(
        self: &Arc<Self>,
        f: &DbFile,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<usize, StoreError> {
        let read =
            |buf: &mut [u8]| read_some(&*f.file, offset, buf).map_err(self.io("read", f.kind));
        if f.is_replaced() {
            return self.read_replaced(f, offset, buf);
        }
        let mut st = self.lock();
        self.check_usable(&st)?;
        if st.is_wal(f) && st.wal.tail.overlaps(offset, buf.len()) {
            let n = read(buf)?;
            return Ok(st.wal.tail.read_over(offset, buf, n));
        }
        if f.kind != FileKind::Database || f.is_deleted() {
            drop(st);
            return read(buf);
        }
        let end = st.view_size.min(offset + buf.len() as u64);
        let want = end.saturating_sub(offset) as usize;
        let buf = &mut buf[..want];
        if st.base_size >= end && !st.overlay.overlaps(offset, want as u64) {
            drop(st);
            let n = read(buf)?;
            buf[n..].fill(0);
            st = self.lock();
            if st.rotten_page(f, offset, buf).is_none() {
                return Ok(want);
            }
            // Or it was written between the two.
        }
        self.read_view(&st, offset, buf)
            .map_err(StoreError::io("read", self.path(f.kind)))?;
        let Some(pgno) = st.rotten_page(f, offset, buf) else {
            return Ok(want);
        };
        self.suspect(&mut st, pgno);
        let what = format!("page {pgno} does not match its checksum: it is not handed out");
        let e = StoreError::corrupt(self.path(f.kind), what);
        self.warn_rarely(&e);
        Err(e)
    }

    /// Of a file that has become another. A connection begins with the header, and an error there
    /// would end the process of one that has mapped the file: it finds no database instead.
    fn read_replaced(&self, f: &DbFile, offset: u64, buf: &mut [u8]) -> Result<usize, StoreError> {
        if offset >= FIRST_READ {
            return Err(StoreError::Replaced(self.mount_name(f.kind)));
        }
        buf.fill(0);
        Ok(buf.len())
    }

    /// Writes bytes.
    pub fn write(self: &Arc<Self>, f: &Arc<DbFile>, offset: u64, data: &[u8], done: Done) {
        if f.is_deleted() {
            return done(Err(StoreError::Deleted(self.mount_name(f.kind))));
        }
        if offset.saturating_add(data.len() as u64) > MAX_FILE_SIZE {
            return done(Err(
                self.refuse("a write beyond the largest size of a database")
            ));
        }
        if self.is_through(f) {
            return done(Err(self.refuse("a write by a program that is not SQLite")));
        }
        let count = match f.kind {
            FileKind::Database => &self.counters().database_writes,
            FileKind::Journal => &self.counters().journal_writes,
            FileKind::Wal => &self.counters().wal_writes,
            FileKind::Shm => &self.counters().shm_writes,
        };
        count.fetch_add(1, Ordering::Relaxed);
        let result = match f.kind {
            FileKind::Database => self.write_database(offset, data),
            FileKind::Journal => match self.write_journal(f, offset, data) {
                Ok(None) => Ok(()),
                Ok(Some(end)) => return self.end_journal(end, done),
                Err(e) => Err(e),
            },
            FileKind::Wal => return self.write_wal_answered(offset, data, done),
            FileKind::Shm => f
                .file
                .write_all_at(data, offset)
                .map_err(StoreError::io("write", self.path(f.kind))),
        };
        if let Err(e) = &result {
            self.warn_rarely(e);
        }
        done(result);
    }

    /// A write to the WAL, which may complete a transaction.
    fn write_wal_answered(self: &Arc<Self>, offset: u64, data: &[u8], done: Done) {
        if self.holds_halt() {
            return self.write_wal_there(offset, data, done);
        }
        let result = self.begin_commit().and_then(|pass| {
            let scanned = self.write_wal(&mut self.lock(), offset, data)?;
            Ok((pass, matches!(scanned, Scanned::Committed)))
        });
        // The pass is given back after the answer.
        let (result, _pass) = match result {
            Ok((pass, false)) => (Ok(()), Some(pass)),
            Ok((pass, true)) => (self.verdict(&pass), Some(pass)),
            Err(e) => {
                self.warn_rarely(&e);
                (Err(e), None)
            }
        };
        if matches!(result, Err(StoreError::Unanswered(_))) {
            // The writer will not publish what is committed all the same.
            self.context.keep(Job::CheckIndex(self.clone()));
        }
        done(result);
    }

    fn write_database(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        if self.has_unflushed() {
            // What a checkpoint copies must not be on disk before its log is.
            self.log().flush_wait()?;
        }
        let mut st = self.lock();
        self.check_writable(&mut st)?;
        if st.journal_active {
            return self.hold_back(&mut st, offset, data);
        }
        if st.wal_mode || st.files.wal.is_some() {
            return self.write_checkpoint(&mut st, offset, data);
        }
        Err(self.refuse("a write to the database without a journal: PRAGMA journal_mode OFF and MEMORY cannot be used here, nor can programs that change a database file by themselves"))
    }

    /// Whether an application may change anything at this moment. A transaction that is refused
    /// something is not committed by a start either.
    pub(super) fn check_writable(&self, st: &mut State) -> Result<(), StoreError> {
        self.check_usable(st)?;
        if !self.is_writable() {
            let refused = Err(StoreError::NotPrimary(self.name.clone()));
            return self.withdraw(st).and(refused);
        }
        if st.committing {
            return Err(self.refuse("a write while a transaction is being committed"));
        }
        if st.importing {
            return Err(self.refuse("a change while a database file takes its place"));
        }
        Ok(())
    }

    /// `Some`: this write is the commit point.
    fn write_journal(
        &self,
        f: &DbFile,
        offset: u64,
        data: &[u8],
    ) -> Result<Option<JournalEnd>, StoreError> {
        let mut st = self.lock();
        self.check_writable(&mut st)?;
        self.check_no_lane(&st)?;
        if offset >= journal::MAGIC.len() as u64 {
            drop(st);
            return f
                .file
                .write_all_at(data, offset)
                .map_err(self.io("write", FileKind::Journal))
                .map(|()| None);
        }
        let mut head = [0u8; journal::MAGIC.len()];
        read_or_zeros(&*f.file, 0, &mut head).map_err(self.io("read", FileKind::Journal))?;
        let n = data.len().min(head.len() - offset as usize);
        head[offset as usize..offset as usize + n].copy_from_slice(&data[..n]);
        let active = journal::is_active(&head);
        if st.journal_active && !active {
            return Ok(Some(JournalEnd::Overwrite(offset, data.to_vec())));
        }
        f.file
            .write_all_at(data, offset)
            .map_err(self.io("write", FileKind::Journal))?;
        if active && !st.journal_active {
            self.begin_rollback(&mut st)?;
        }
        Ok(None)
    }

    /// Sets the size of a file.
    pub fn truncate(self: &Arc<Self>, f: &Arc<DbFile>, size: u64, done: Done) {
        if f.is_deleted() || size > MAX_FILE_SIZE {
            return done(Err(StoreError::Deleted(self.mount_name(f.kind))));
        }
        let result = match f.kind {
            FileKind::Database => self.truncate_database(size),
            FileKind::Journal => {
                let mut st = self.lock();
                if let Err(e) = self.check_writable(&mut st) {
                    Err(e)
                } else if st.journal_active && size < journal::HEADER_SIZE as u64 {
                    drop(st);
                    return self.end_journal(JournalEnd::Truncate(size), done);
                } else {
                    f.file
                        .set_len(size)
                        .map_err(StoreError::io("truncate", self.path(f.kind)))
                }
            }
            FileKind::Wal => self.truncate_wal(f, size),
            FileKind::Shm => self.truncate_shm(f, size),
        };
        if let Err(e) = &result {
            self.warn_rarely(e);
        }
        done(result);
    }

    fn truncate_database(self: &Arc<Self>, size: u64) -> Result<(), StoreError> {
        let mut st = self.lock();
        self.check_writable(&mut st)?;
        if st.lane.is_some() {
            // The end of a checkpoint, after which the WAL may be overwritten.
            self.follow(&mut st)?;
            self.log().flush_wait()?;
        }
        let path = self.path(FileKind::Database);
        if st.journal_active {
            self.withdraw(&mut st)?;
            st.overlay
                .truncate(size)
                .map_err(StoreError::io("truncate", &path))?;
            st.base_size = st.base_size.min(size);
            st.view_size = size;
            return Ok(());
        }
        // SQLite cuts off what a transaction left behind, and makes room before a checkpoint.
        let committed = st.committed_size();
        let (least, most) = (committed.min(st.view_size), committed.max(st.view_size));
        if st.files.wal.is_none() && (size < committed || size > most) {
            return Err(self.refuse(format!(
                "a change of size to {size} bytes outside of a transaction: the database has {committed}"
            )));
        }
        // A checkpoint goes by the size of the transaction that it ends with; another one may have
        // committed since, and changed it. What is committed is never cut off.
        let size = size.clamp(least, most);
        if size == st.view_size {
            return Ok(());
        }
        let file = st.database_file(&self.name)?;
        self.set_file_size(&mut st, &*file.file, size)?;
        st.view_size = size;
        st.base_size = size;
        Ok(())
    }

    /// The node maps this file too: cut short, its own access would end it with a bus error.
    fn truncate_shm(&self, f: &DbFile, size: u64) -> Result<(), StoreError> {
        let (ino, mapped) = *self.shm_mapped.lock();
        if f.ino == ino && size < mapped {
            return Err(self.refuse("a truncation of the WAL index while the node uses it"));
        }
        f.file
            .set_len(size)
            .map_err(StoreError::io("truncate", self.path(FileKind::Shm)))
    }

    fn truncate_wal(self: &Arc<Self>, f: &DbFile, size: u64) -> Result<(), StoreError> {
        let mut st = self.lock();
        self.check_writable(&mut st)?;
        self.check_not_forwarding(&st)?;
        self.follow(&mut st)?;
        if size < crate::sqlite::wal::WAL_HEADER_SIZE as u64 {
            self.backfill_all(&mut st)?;
            st.wal.reset();
        } else if size < st.wal.committed_end() {
            return Err(self.refuse("a truncation of the committed part of the WAL"));
        } else {
            let committed = st.wal.committed;
            st.wal.frames.truncate(committed);
            st.wal
                .tail
                .write_out(&*f.file)
                .map_err(self.io("write WAL", FileKind::Wal))?;
            st.wal.tail.clear();
            st.wal.written_to = st.wal.written_to.min(size);
        }
        f.file
            .set_len(size)
            .map_err(StoreError::io("truncate", self.path(FileKind::Wal)))
    }

    /// As [`Database::sync`], by this thread. That of SQLite says that the transaction under way is
    /// complete. Anybody else's says nothing of it, nor does that of a file that is gone.
    pub fn sync_by(self: &Arc<Self>, f: &DbFile, thread: u32, done: Done) {
        let by_requests = f.kind == FileKind::Database && !self.is_through(f);
        if by_requests && (f.is_deleted() || !self.is_client(thread)) {
            return done(Ok(()));
        }
        self.sync(f, done);
    }

    /// An fsync: answered once what it promises is true. The log stands for the files.
    pub fn sync(self: &Arc<Self>, f: &DbFile, done: Done) {
        if self.is_through(f) {
            return done(self.sync_through(f));
        }
        match f.kind {
            FileKind::Database => return self.log_at_sync(done),
            FileKind::Wal => {}
            FileKind::Journal | FileKind::Shm => return done(Ok(())),
        }
        let (gate, name, dir) = (
            self.context.gate.clone(),
            self.name.clone(),
            self.dir.clone(),
        );
        let decided_there = self.decided_there();
        let answer = move |flushed: std::io::Result<()>| {
            // With synchronous=FULL this is a commit's verdict.
            let flushed = flushed.map_err(StoreError::io("flush the log of", dir));
            done(flushed.and_then(|()| {
                if decided_there || gate.is_valid() {
                    Ok(())
                } else {
                    Err(StoreError::Unanswered(name))
                }
            }));
        };
        if self.has_unflushed() {
            self.log().flush(answer);
        } else {
            answer(Ok(()));
        }
    }

    /// Takes a file's name away.
    pub fn unlink(self: &Arc<Self>, kind: FileKind, done: Done) {
        let mut st = self.lock();
        let Some(f) = st.files.slot(kind).clone() else {
            return done(Err(StoreError::NoDatabase(self.mount_name(kind))));
        };
        let may = self.check_writable(&mut st);
        if let Err(e) = may.and_then(|()| self.follow(&mut st)) {
            return done(Err(e));
        }
        let path = self.path(kind);
        let result = match kind {
            FileKind::Database if self.holds_halt() => {
                drop(st);
                return done(Err(StoreError::NotPrimary(self.name.clone())));
            }
            FileKind::Database => {
                drop(st);
                return self.drop_database(done);
            }
            FileKind::Journal if st.journal_active => {
                drop(st);
                return self.end_journal(JournalEnd::Unlink, done);
            }
            FileKind::Wal => self
                .check_not_forwarding(&st)
                .and_then(|()| self.backfill_all(&mut st))
                .and_then(|()| self.keep_first_page(&mut st)),
            FileKind::Journal | FileKind::Shm => Ok(()),
        };
        let result = result.and_then(|()| {
            if kind == FileKind::Wal {
                self.unwatch(&st);
                st.wal.reset();
            }
            f.delete();
            *st.files.slot(kind) = None;
            self.disk()
                .remove_file(&path)
                .map_err(StoreError::io("remove", &path))
        });
        drop(st);
        done(result);
    }

    /// Unlinking the database itself is a transaction: the database is gone everywhere.
    fn drop_database(self: &Arc<Self>, done: Done) {
        let pass = match self.begin_commit() {
            Ok(pass) => pass,
            Err(e) => return done(Err(e)),
        };
        let mut st = self.lock();
        if st.page_count == 0 {
            if self.log().last_txid() > st.pos.txid {
                let e = self.refuse("a drop after a commit that could not be flushed: whether the database exists is decided when the node starts anew");
                drop(st);
                return done(Err(e));
            }
            // Created and never written: there is nothing to tell.
            let result = self.remove_files(&mut st);
            drop(st);
            return done(result);
        }
        if let Err(e) = self.withdraw(&mut st) {
            drop(st);
            return done(Err(e));
        }
        let shape = Shape {
            page_size: st.page_size,
            commit: 0,
            wal_mode: false,
        };
        let all = 1..=st.page_count;
        let logged = st.preserve(self, all).and_then(|()| {
            let place = WalPlace::default();
            let (captured, appender) =
                self.append_transaction(&st, PageList::default(), shape, place, |_, _| Ok(()))?;
            appender.commit()?;
            Ok(captured)
        });
        let captured = match logged {
            Ok(c) => c,
            Err(e) => {
                drop(st);
                return done(Err(e));
            }
        };
        self.note_captured(&captured);
        st.committing = true;
        drop(st);
        let db = self.clone();
        self.log().flush(move |flushed| {
            let mut st = db.lock();
            st.committing = false;
            // Not before: without the record in the log, a database without its file is a lost one.
            let dropped = flushed
                .map_err(StoreError::io("flush the log of", &db.dir))
                .and_then(|()| {
                    let removed = db.remove_files(&mut st);
                    db.advance(&mut st, &captured);
                    st.page_size = 0;
                    db.note_flushed(captured.pos.txid);
                    removed
                });
            drop(st);
            let names = db.mount_names();
            db.context.keep(Job::InvalidateEntries(names));
            done(dropped.and_then(|()| db.verdict(&pass)));
            drop(pass);
        });
    }

    /// All names in the mount that this database is behind.
    pub(super) fn mount_names(&self) -> Vec<String> {
        ["", "-journal", "-wal", "-shm", "-pos"]
            .iter()
            .map(|s| format!("{}{s}", self.name))
            .collect()
    }

    /// Removes the files of the database, not its log.
    pub(super) fn remove_files(&self, st: &mut State) -> Result<(), StoreError> {
        self.forget_lane(st);
        st.overlay.clear();
        st.wal.reset();
        st.journal_active = false;
        (st.view_size, st.base_size, st.reserved) = (0, 0, 0);
        for kind in [
            FileKind::Shm,
            FileKind::Wal,
            FileKind::Journal,
            FileKind::Database,
        ] {
            if let Some(f) = st.files.slot(kind).take() {
                f.delete();
            }
            let path = self.path(kind);
            self.disk()
                .remove_file_if_there(&path)
                .map_err(StoreError::io("remove", &path))?;
        }
        Ok(())
    }

    /// A handle of a file was given up. If it was a writer's that died after its commit was logged
    /// and before others could see it, the WAL index is behind.
    pub fn released(self: &Arc<Self>, f: &DbFile, could_write: bool) {
        if f.kind == FileKind::Wal && could_write && !f.is_deleted() && self.is_writable() {
            self.context.keep(Job::CheckIndex(self.clone()));
        }
    }

    /// The size of a file as applications see it.
    pub fn size(&self, f: &DbFile) -> Result<u64, StoreError> {
        if f.kind == FileKind::Database && !f.is_deleted() && !self.is_through(f) {
            return Ok(self.lock().view_size);
        }
        let in_file = f
            .file
            .metadata()
            .map_err(StoreError::io("stat", self.path(f.kind)))?
            .len();
        let st = self.lock();
        if st.is_wal(f) {
            return Ok(in_file.max(st.wal.tail.end()));
        }
        Ok(in_file)
    }
}

fn read_some(file: &dyn DiskFile, offset: u64, buf: &mut [u8]) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}
