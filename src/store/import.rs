//! Importing: a SQLite database file takes the place of a database, as one transaction.
//!
//! What is checked of the file: the header (magic, page size, format versions, payload fractions,
//! reserved bytes, schema format, text encoding), that it has all the pages that its header counts
//! and nothing after them, that page 1 is the root of a table, and that the list of free pages is
//! whole. Other b-trees are not followed: `PRAGMA integrity_check` does that.
//!
//! Invariants:
//! - Nothing is locked while the file arrives or is read for the first time. Whatever fails before
//!   the record is in the log changes nothing.
//! - Writers are kept out (RESERVED, or the WAL's WRITE lock) from the moment that the transaction
//!   is made until it is applied; readers are kept out only in the rollback modes, and only while
//!   pages are written. What is waited for is waited for [`READER_WAIT`] in all.
//! - Change counter and schema cookie are above those of the old and of the new file, so that no
//!   open connection mistakes the new content for what it has cached.
//! - While connections have the database open in WAL mode it stays in WAL mode, whatever the file
//!   says, as with SQLite's own backup API. Nobody's connection can be closed from here.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;

use crate::clock;
use crate::ltx::{self, Encoder, Header, Pos};
use crate::sqlite::header::{self, DbHeader};
use crate::sqlite::locks::{LockGuard, LockKind, RESERVED_BYTE, WAL_CKPT_LOCK, WAL_WRITE_LOCK};

use super::Store;
use super::context::Job;
use super::database::{Database, FileKind, now_ms};
use super::error::StoreError;
use super::group::Group;
use super::pages::PageList;
use super::receive::{Incoming, Spool};
use super::replica::{Exclusive, READER_WAIT, ReplicaLocks, lock_timeout};

/// How long an exclusive lock is tried before it is seen whether a reader has made a WAL.
const SLICE: std::time::Duration = std::time::Duration::from_millis(50);
/// Bytes read at once while the pages are summed.
const READ_BUFFER: usize = 1 << 20;

/// Why a file was not imported. Nothing is changed then.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// It is no database, or a damaged one.
    #[error("this is no SQLite database that can be imported: {0}")]
    Invalid(String),
    /// The store. [`StoreError::LockTimeout`]: the database is busy.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn invalid<T>(what: impl Into<String>) -> Result<T, ImportError> {
    Err(ImportError::Invalid(what.into()))
}

impl Store {
    /// A file of no name in the data directory, for a database that arrives.
    pub fn spool_file(&self) -> Result<File, StoreError> {
        tempfile::tempfile_in(self.data_dir())
            .map_err(StoreError::io("make a file in", self.data_dir()))
    }

    /// Makes the database file the content of the database of this name, which need not exist.
    /// It is on disk when this returns. Blocks: on the disk, and on applications for at most 10 s.
    ///
    /// # Errors
    /// [`ImportError::Invalid`], or of the store; nothing is changed then.
    pub fn import(&self, name: &str, file: File) -> Result<Pos, ImportError> {
        super::names::check_database(name)?;
        let mut candidate = Candidate::check(file, self.data_dir())?;
        if !self.is_writable() {
            return Err(StoreError::NotPrimary(name.to_owned()).into());
        }
        let db = self.database_or_new(name)?;
        let result = db.replace(&mut Replacement::File(&mut candidate));
        self.forget_if_nothing(&db);
        Ok(result?)
    }

    /// Applies a backup's snapshot (an LTX file) on a primary, whose position of the database must
    /// still be `here`. The position is the snapshot's then, and on disk.
    ///
    /// # Errors
    /// [`StoreError::PositionMismatch`] if something was committed meanwhile. Nothing is changed on
    /// any error.
    pub fn restore(&self, name: &str, here: Pos, from: &mut dyn Read) -> Result<Pos, StoreError> {
        super::names::check_database(name)?;
        let incoming = Incoming::read(self.scratch(), from, name, false)?;
        if !incoming.header.is_snapshot() {
            return Err(StoreError::PositionMismatch {
                db: name.to_owned(),
                have: here,
                need: incoming.header.pre_apply_pos(),
            });
        }
        let db = self.database_or_new(name)?;
        let result = if incoming.header.commit == 0 {
            db.replace_by_nothing(incoming, here)
        } else {
            db.replace(&mut Replacement::Snapshot(Some(Box::new(incoming)), here))
        };
        self.forget_if_nothing(&db);
        result
    }
}

/// Pause between two looks at whether the halt lock is free.
const HALT_PAUSE: Duration = Duration::from_millis(50);

/// What takes a database's place.
enum Replacement<'a> {
    /// A file, as one more transaction.
    File(&'a mut Candidate),
    /// A snapshot, if the database is still at this position. It is taken out once.
    Snapshot(Option<Box<Incoming>>, Pos),
}

impl Replacement<'_> {
    fn page_size(&self) -> u32 {
        match self {
            Replacement::File(c) => c.header.page_size,
            Replacement::Snapshot(i, _) => i.as_ref().map_or(0, |i| i.header.page_size),
        }
    }

    /// The transaction. Writers are kept out.
    fn incoming(&mut self, db: &Database, keep_wal: bool) -> Result<Incoming, StoreError> {
        match self {
            Replacement::File(c) => db.incoming(c, keep_wal),
            Replacement::Snapshot(incoming, here) => {
                let have = db.lock().pos;
                match incoming.take() {
                    Some(incoming) if have == *here => Ok(*incoming),
                    _ => Err(StoreError::PositionMismatch {
                        db: db.name.clone(),
                        have,
                        need: *here,
                    }),
                }
            }
        }
    }
}

/// A database file that passed the checks.
struct Candidate {
    file: File,
    path: std::path::PathBuf,
    header: DbHeader,
    pages: u32,
    first_page: Vec<u8>,
    /// All of them, until they are made a transaction of.
    list: PageList,
}

impl Candidate {
    fn check(file: File, path: &std::path::Path) -> Result<Candidate, ImportError> {
        let io = |e| StoreError::io("read a spooled import in", path)(e);
        let len = file.metadata().map_err(io)?.len();
        if len < header::HEADER_SIZE as u64 {
            return invalid(format!("it has {len} bytes"));
        }
        let mut head = [0u8; header::HEADER_SIZE];
        file.read_exact_at(&mut head, 0).map_err(io)?;
        let parsed = DbHeader::parse(&head).map_err(|e| ImportError::Invalid(e.to_string()))?;
        let page_size = u64::from(parsed.page_size);
        let pages = parsed.pages(len);
        if len != u64::from(pages) * page_size {
            return invalid(format!(
                "it has {len} bytes, its header says {pages} pages of {page_size} bytes: it is cut off, or was copied while it was written to"
            ));
        }
        let mut first_page = vec![0u8; page_size as usize];
        file.read_exact_at(&mut first_page, 0).map_err(io)?;
        let mut candidate = Candidate {
            file,
            path: path.to_owned(),
            header: parsed,
            pages,
            first_page,
            list: PageList::default(),
        };
        candidate.check_first_page()?;
        candidate.check_free_list()?;
        candidate.sum()?;
        Ok(candidate)
    }

    fn field(&self, at: usize) -> u32 {
        be32(&self.first_page, at)
    }

    fn check_first_page(&self) -> Result<(), ImportError> {
        let p = &self.first_page;
        if p[21..24] != [64, 32, 32] {
            return invalid("its header's payload fractions are not 64, 32 and 32");
        }
        if self.header.page_size - u32::from(p[20]) < 480 {
            return invalid("its header reserves so much of each page that nothing fits");
        }
        if self.field(44) > 4 {
            return invalid(format!("its schema format {} is unknown", self.field(44)));
        }
        if self.field(56) > 3 {
            return invalid(format!("its text encoding {} is unknown", self.field(56)));
        }
        if !matches!(p[header::HEADER_SIZE], 0x05 | 0x0d) {
            return invalid("its page 1 is not the root of a table");
        }
        Ok(())
    }

    /// Follows the trunk pages; they can be as many as the header counts free pages.
    fn check_free_list(&self) -> Result<(), ImportError> {
        let (mut trunk, count) = (self.field(32), self.field(36));
        let usable = self.header.page_size - u32::from(self.first_page[20]);
        let lock_page = ltx::lock_pgno(self.header.page_size);
        let possible = |pgno: u32| (2..=self.pages).contains(&pgno) && pgno != lock_page;
        let mut page = vec![0u8; self.header.page_size as usize];
        let mut found = 0u32;
        while trunk != 0 {
            if !possible(trunk) || found >= count {
                return invalid("its list of free pages is damaged");
            }
            self.read(trunk, &mut page)?;
            let leaves = be32(&page, 4);
            let leaf = |i: u32| be32(&page, 8 + 4 * i as usize);
            if leaves > usable / 4 - 2 || !(0..leaves).all(|i| possible(leaf(i))) {
                return invalid(format!("its page {trunk}, of the free list, is damaged"));
            }
            found = found.saturating_add(1 + leaves);
            trunk = be32(&page, 0);
        }
        if found != count {
            return invalid(format!("its header counts {count} free pages of {found}"));
        }
        Ok(())
    }

    fn sum(&mut self) -> Result<(), StoreError> {
        let page_size = self.header.page_size as usize;
        let mut buffer = vec![0u8; READ_BUFFER];
        let mut next = 1u32;
        let lock_page = ltx::lock_pgno(self.header.page_size);
        while next <= self.pages {
            let n = (READ_BUFFER / page_size).min((self.pages - next) as usize + 1);
            let pages = &mut buffer[..n * page_size];
            self.file
                .read_exact_at(pages, u64::from(next - 1) * page_size as u64)
                .map_err(StoreError::io("read a spooled import in", &self.path))?;
            for (pgno, page) in (next..).zip(pages.chunks_exact(page_size)) {
                if pgno != lock_page {
                    self.list.push(pgno, ltx::page_checksum(pgno, page));
                }
            }
            next = next.saturating_add(n as u32);
        }
        Ok(())
    }

    fn read(&self, pgno: u32, page: &mut [u8]) -> Result<(), StoreError> {
        self.file
            .read_exact_at(page, u64::from(pgno - 1) * page.len() as u64)
            .map_err(StoreError::io("read a spooled import in", &self.path))
    }

    /// Page 1 as it takes the place of `old`.
    fn first_page(&self, old: Option<DbHeader>, keep_wal: bool) -> Vec<u8> {
        let mut page = self.first_page.clone();
        let above = |new: u32, old: Option<u32>| new.max(old.unwrap_or(0)).wrapping_add(1);
        let counter = above(self.header.change_counter, old.map(|h| h.change_counter));
        let cookie = above(self.header.schema_cookie, old.map(|h| h.schema_cookie));
        if keep_wal {
            page[18..20].fill(2);
        }
        page[24..28].copy_from_slice(&counter.to_be_bytes());
        page[28..32].copy_from_slice(&self.pages.to_be_bytes());
        page[40..44].copy_from_slice(&cookie.to_be_bytes());
        page[92..96].copy_from_slice(&counter.to_be_bytes());
        page
    }
}

fn be32(page: &[u8], at: usize) -> u32 {
    page.get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_be_bytes)
}

struct SpoolWriter<'a>(&'a mut Spool);

impl Write for SpoolWriter<'_> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.0.add(buf)?;
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Keeps those out who change a database without a lock (by unlinking it) while it lives.
struct Importing<'a>(&'a Database);

impl<'a> Importing<'a> {
    fn begin(db: &'a Database) -> Result<Importing<'a>, StoreError> {
        let mut st = db.lock();
        db.check_writable(&mut st)?;
        st.importing = true;
        Ok(Importing(db))
    }
}

impl Drop for Importing<'_> {
    fn drop(&mut self) {
        self.0.lock().importing = false;
    }
}

impl Database {
    fn replace(self: &Arc<Self>, c: &mut Replacement<'_>) -> Result<Pos, StoreError> {
        let deadline = clock::now() + READER_WAIT;
        let mut locks = self.alone(deadline)?;
        let created = self.make_file()?;
        let result = self.replace_once_idle(&mut locks, c, deadline);
        locks.close(self);
        drop(locks);
        if created && result.is_err() {
            self.remove_unwritten();
        }
        self.context.keep(Job::CheckIndex(self.clone()));
        result
    }

    /// The applier's locks, once no other import is under way and no replica has the halt lock:
    /// that holds SQLite's locks by the very descriptors that an import would lock.
    fn alone(&self, deadline: Instant) -> Result<MutexGuard<'_, ReplicaLocks>, StoreError> {
        loop {
            let Some(locks) = self.replica.try_lock_until(deadline) else {
                return Err(lock_timeout(self, "another import to end"));
            };
            if !self.halt.is_held() {
                return Ok(locks);
            }
            drop(locks);
            if clock::now() >= deadline {
                return Err(lock_timeout(self, "the halt lock, which a replica has"));
            }
            clock::pause(HALT_PAUSE);
        }
    }

    /// Makes an empty database file if there is none; whether it did.
    fn make_file(self: &Arc<Self>) -> Result<bool, StoreError> {
        if self.file(FileKind::Database).is_some() {
            return Ok(false);
        }
        self.create(FileKind::Database, true)?;
        self.show_names();
        Ok(true)
    }

    fn show_names(&self) {
        if let Some(front) = self.context.front() {
            let names = self.mount_names();
            names.iter().for_each(|n| front.invalidate_entry(n));
        }
    }

    /// Removes the file of a database that nothing came of.
    pub(super) fn remove_unwritten(&self) {
        let mut st = self.lock();
        if st.page_count > 0 || st.journal_active {
            return;
        }
        if let Err(e) = self.remove_files(&mut st) {
            tracing::warn!(db = self.name, error = %e, "the empty file of a failed import stays");
        }
        drop(st);
        self.show_names();
    }

    fn replace_once_idle(
        self: &Arc<Self>,
        locks: &mut ReplicaLocks,
        c: &mut Replacement<'_>,
        deadline: Instant,
    ) -> Result<Pos, StoreError> {
        loop {
            let (has_wal, ino) = {
                let st = self.lock();
                (
                    st.files.wal.is_some(),
                    st.database_file(&self.name).map(|f| f.ino)?,
                )
            };
            let is_through = self.lock().lane.is_some();
            let imported = if !has_wal {
                self.check_no_lane(&self.lock())?;
                self.replace_in_place(locks, ino, c, deadline)?
            } else if !is_through && self.try_leave_wal(locks, ino)? {
                None
            } else {
                self.replace_in_wal(locks, ino, c, deadline)?
            };
            if let Some(pos) = imported {
                return Ok(pos);
            }
            if clock::now() >= deadline {
                return Err(lock_timeout(self, "connections to keep one journal mode"));
            }
        }
    }

    /// Writers are kept out first, and readers once the transaction is made. `None`: there is a WAL
    /// by now.
    fn replace_in_place(
        self: &Arc<Self>,
        locks: &mut ReplicaLocks,
        ino: u64,
        c: &mut Replacement<'_>,
        deadline: Instant,
    ) -> Result<Option<Pos>, StoreError> {
        let name = self.mount_name(FileKind::Database);
        let file = locks.database(self, ino)?;
        let file = file.try_clone().map_err(StoreError::io("reopen", &name))?;
        let reserved = LockGuard::acquire(
            file.as_fd(),
            LockKind::Exclusive,
            RESERVED_BYTE,
            1,
            deadline,
        )
        .map_err(StoreError::io("lock", &name))?;
        let Some(_reserved) = reserved else {
            return Err(lock_timeout(self, "a writer to end"));
        };
        // A reader may make a WAL where the header asks for one, and rolls a hot journal back.
        let (wal_mode, hot) = {
            let st = self.lock();
            (st.wal_mode, st.journal_active)
        };
        let mut exclusive = None;
        if wal_mode || hot {
            let slice = deadline.min(clock::now() + SLICE);
            match Exclusive::acquire(self, &file, slice, false, false) {
                Ok(e) => exclusive = Some(e),
                Err(StoreError::LockTimeout { .. }) if clock::now() < deadline => {
                    return Ok(None);
                }
                Err(e) => return Err(e),
            }
            self.discard_hot_journal()?;
        }
        if self.file(FileKind::Wal).is_some() {
            return Ok(None);
        }
        let _importing = Importing::begin(self)?;
        let mut incoming = c.incoming(self, false)?;
        let captured = incoming.captured(false);
        let _exclusive = match exclusive {
            Some(e) => e,
            None => Exclusive::acquire(self, &file, deadline, false, false)?,
        };
        let pass = self.begin_commit()?;
        if incoming.header.is_snapshot() {
            self.begin_snapshot()?;
        }
        self.apply_in_place(locks, ino, &mut Group::of_one(&captured, &mut incoming))?;
        self.verdict(&pass)?;
        Ok(Some(captured.pos))
    }

    /// As a writer of the WAL; readers go on. `None`: the WAL went away.
    fn replace_in_wal(
        self: &Arc<Self>,
        locks: &mut ReplicaLocks,
        ino: u64,
        c: &mut Replacement<'_>,
        deadline: Instant,
    ) -> Result<Option<Pos>, StoreError> {
        locks.open_wal(self, ino)?;
        let Some(shared) = &mut locks.shm else {
            return Err(StoreError::NoDatabase(self.mount_name(FileKind::Shm)));
        };
        let name = self.mount_name(FileKind::Shm);
        let io = |e| StoreError::io("lock", &name)(e);
        let fd = shared
            .file
            .try_clone()
            .map_err(StoreError::io("reopen", &name))?;
        let lock = |byte| LockGuard::acquire(fd.as_fd(), LockKind::Exclusive, byte, 1, deadline);
        let Some(_checkpointer) = lock(WAL_CKPT_LOCK).map_err(io)? else {
            return Err(lock_timeout(self, "a checkpoint to end"));
        };
        let Some(_writer) = lock(WAL_WRITE_LOCK).map_err(io)? else {
            return Err(lock_timeout(self, "a writer to end"));
        };
        // From here on the WAL stays: the database is locked shared.
        if self.file(FileKind::Wal).is_none() {
            return Ok(None);
        }
        let _importing = Importing::begin(self)?;
        self.catch_up()?;
        if self.lock().wal_has_other_pages(c.page_size()) {
            self.empty_wal(shared, ino, deadline)?;
        }
        let mut incoming = c.incoming(self, true)?;
        let captured = incoming.captured(true);
        let pass = self.begin_commit()?;
        if incoming.header.is_snapshot() {
            self.begin_snapshot()?;
        }
        self.apply_to_wal(locks, ino, &captured, &mut incoming)?;
        self.log().flush_wait()?;
        self.note_flushed(self.log().flushed_txid());
        self.verdict(&pass)?;
        Ok(Some(captured.pos))
    }

    /// A snapshot that says that the database was dropped.
    fn replace_by_nothing(
        self: &Arc<Self>,
        incoming: Incoming,
        here: Pos,
    ) -> Result<Pos, StoreError> {
        let pos = incoming.pos();
        let _importing = Importing::begin(self)?;
        let incoming =
            Replacement::Snapshot(Some(Box::new(incoming)), here).incoming(self, false)?;
        self.apply(incoming)?;
        Ok(pos)
    }

    /// Rolls back what a writer left that died, as the next reader would. Under the exclusive lock.
    fn discard_hot_journal(&self) -> Result<(), StoreError> {
        let mut st = self.lock();
        if !st.journal_active {
            return Ok(());
        }
        self.withdraw(&mut st)?;
        if let Some(f) = st.files.journal.clone() {
            // One that stays is still hot, and what it stands for must stay with it.
            self.disk()
                .remove_file(&self.path(FileKind::Journal))
                .map_err(self.io("remove", FileKind::Journal))?;
            f.delete();
            st.files.journal = None;
        }
        st.journal_active = false;
        st.overlay.clear();
        let size = st.committed_size();
        let database = st.database_file(&self.name)?;
        self.set_file_size(&mut st, &*database.file, size)?;
        (st.view_size, st.base_size) = (size, size);
        drop(st);
        if let Some(front) = self.context.front() {
            front.invalidate_entry(&self.mount_name(FileKind::Journal));
            front.invalidate_data(database.ino, 0, 0);
        }
        Ok(())
    }

    /// The transaction that makes the database what the file is. Writers are kept out.
    fn incoming(&self, c: &mut Candidate, keep_wal: bool) -> Result<Incoming, StoreError> {
        let page_size = c.header.page_size;
        let (pos, first, changed, checksum) = {
            let st = self.lock();
            let old = if st.page_count > 0 {
                let mut page = vec![0u8; st.page_size as usize];
                st.read_committed(self, 1, &mut page)?;
                DbHeader::parse(&page).ok()
            } else {
                None
            };
            let first = c.first_page(old, keep_wal);
            let same_size = st.page_count > 0 && st.page_size == page_size;
            let mut list = std::mem::take(&mut c.list);
            list.set_first(ltx::page_checksum(1, &first));
            if !same_size {
                let checksum = list.total() | ltx::CHECKSUM_FLAG;
                (st.pos, first, list, checksum)
            } else {
                let differs =
                    |(pgno, sum): &(u32, u64)| *pgno > st.page_count || st.sums.get(*pgno) != *sum;
                let changed: PageList = list.iter().filter(differs).collect();
                let checksum = st.sums.checksum_with(&changed, c.pages);
                (st.pos, first, changed, checksum)
            }
        };
        let header = Header {
            compressed: self.context.options.compress,
            page_size,
            commit: c.pages,
            min_txid: pos.txid + 1,
            max_txid: pos.txid + 1,
            timestamp: now_ms(),
            pre_apply_checksum: pos.checksum,
            wal_offset: 0,
            wal_size: 0,
            wal_salt1: 0,
            wal_salt2: 0,
            node_id: self.context.node_id,
        };
        let context = || format!("import of {}", self.name);
        let ltx = StoreError::ltx;
        let mut spool = Spool::new(self.data_scratch());
        let mut encoder = Encoder::new(SpoolWriter(&mut spool), header).map_err(ltx(context()))?;
        let mut page = vec![0u8; page_size as usize];
        for pgno in changed.pgnos() {
            if pgno == 1 {
                page.copy_from_slice(&first);
            } else {
                c.read(pgno, &mut page)?;
            }
            encoder.page(pgno, &page).map_err(ltx(context()))?;
        }
        encoder.finish(checksum).map_err(ltx(context()))?;
        Ok(Incoming {
            header,
            post_apply_checksum: checksum,
            pages: Arc::new(changed),
            wal_mode: Some(first[19] == 2),
            change_counter: Some(be32(&first, 24)),
            spool,
            database: None,
        })
    }
}
