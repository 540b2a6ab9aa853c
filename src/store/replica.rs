//! Applying the primary's transactions while applications read.
//!
//! Which way is taken is a matter of this node's files, not of the header's journal mode: while
//! there is a WAL, transactions are appended to it, and readers keep their snapshots; without one,
//! pages are written in place under SQLite's exclusive lock, which waits for readers. When the
//! primary has left WAL mode, the WAL is given up as soon as no connection uses it.
//!
//! Order, so that a crash at any point leaves what recovery can redo: locks; the record in the
//! log (flushed before pages are written in place); pages; the kernel's caches; then the lock is
//! given up, or the WAL index published, and readers see the transaction.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock;
use crate::ltx::Decoder;
use crate::sqlite::locks::{self, LockGuard, LockKind};

use crate::task;

use super::capture::Captured;
use super::database::{Database, FileKind, State};
use super::error::StoreError;
use super::group::Group;
use super::intent;
use super::receive::Incoming;
use super::shm::SharedIndex;
use super::sums::SumsHeader;

/// How long an apply waits for readers, holding new ones up, before it gives up for this time.
pub(super) const READER_WAIT: Duration = Duration::from_secs(10);
/// Up to this many pages are invalidated one by one, more at once.
const SINGLE_INVALIDATIONS: usize = 64;

/// What the applier holds open in the mount.
#[derive(Default)]
pub(super) struct ReplicaLocks {
    /// The database, with its inode number.
    database: Option<(u64, File)>,
    pub shm: Option<SharedIndex>,
    /// A lock against writers that stays when a transaction is applied: of the halt lock.
    pub held: Option<Held>,
}

/// Which of SQLite's locks keeps writers out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// RESERVED, on the database file.
    Reserved,
    /// WRITE, on the WAL index.
    Write,
}

impl ReplicaLocks {
    /// Lets go of everything: the files were replaced, or the mount ends.
    pub fn close(&mut self, db: &Database) {
        if let Some(shm) = self.shm.take() {
            shm.close(db);
        }
        self.database = None;
        self.held = None;
    }

    /// RESERVED, if nobody has it.
    pub fn try_reserve(&mut self, db: &Database, ino: u64) -> Result<bool, StoreError> {
        let file = self.database(db, ino)?;
        let reserved = locks::try_lock(file.as_fd(), LockKind::Exclusive, locks::RESERVED_BYTE, 1)
            .map_err(StoreError::io("lock", db.mount_name(FileKind::Database)))?;
        self.held = reserved.then_some(Held::Reserved);
        Ok(reserved)
    }

    /// Drops what a writer that died has left, as the next connection would by its hot journal. To
    /// be called with RESERVED.
    pub fn clear_dead_transaction(&mut self, db: &Database, ino: u64) -> Result<(), StoreError> {
        let file = self.database(db, ino)?;
        let _exclusive = Exclusive::acquire(db, file, clock::now() + READER_WAIT, false, true)?;
        db.roll_back(&mut db.lock())?;
        if let Some(front) = db.context.front() {
            front.invalidate_data(ino, 0, 0);
            front.invalidate_entry(&db.mount_name(FileKind::Journal));
        }
        Ok(())
    }

    /// The database file in the mount.
    pub fn database(&mut self, db: &Database, ino: u64) -> Result<&File, StoreError> {
        if self.database.as_ref().is_none_or(|(i, _)| *i != ino) {
            self.close(db);
            let file = db
                .open_in_mount(FileKind::Database)
                .map_err(StoreError::io("open", db.mount_name(FileKind::Database)))?;
            self.database = Some((ino, file));
        }
        self.database
            .as_ref()
            .map(|(_, f)| f)
            .ok_or_else(|| StoreError::NoDatabase(db.name.clone()))
    }

    /// Has the WAL index open, and the database locked shared as every connection in WAL mode does.
    pub fn open_wal(&mut self, db: &Arc<Database>, ino: u64) -> Result<(), StoreError> {
        let shm = db.create(FileKind::Shm, true)?;
        if self
            .shm
            .as_ref()
            .is_some_and(|s| s.ino == shm.ino && !shm.is_deleted())
            && self.database.as_ref().is_some_and(|(i, _)| *i == ino)
        {
            return Ok(());
        }
        let file = self.database(db, ino)?;
        let deadline = clock::now() + READER_WAIT;
        let locked = locks::lock_until(
            file.as_fd(),
            LockKind::Shared,
            locks::SHARED_FIRST,
            locks::SHARED_SIZE,
            deadline,
        )
        .map_err(StoreError::io("lock", db.mount_name(FileKind::Database)))?;
        if !locked {
            let range = (locks::SHARED_FIRST, locks::SHARED_SIZE);
            return Err(held_lock_timeout(db, file.as_fd(), range, "a shared lock"));
        }
        if let Some(front) = db.context.front() {
            front.invalidate_entry(&db.mount_name(FileKind::Shm));
        }
        self.shm = Some(SharedIndex::open(db, shm.ino)?);
        Ok(())
    }
}

/// The error for a lock that was not to be had; who has it is logged, at most once a minute.
fn held_lock_timeout(
    db: &Database,
    fd: BorrowedFd<'_>,
    (start, len): (u64, u64),
    lock: &'static str,
) -> StoreError {
    let holder = locks::holder(fd, start, len).map_or_else(String::new, describe);
    timed_out(db, lock, holder)
}

/// The same for something of which it cannot be told who has it.
pub(super) fn lock_timeout(db: &Database, lock: &'static str) -> StoreError {
    timed_out(db, lock, String::new())
}

fn timed_out(db: &Database, lock: &'static str, holder: String) -> StoreError {
    let e = StoreError::LockTimeout {
        db: db.name.clone(),
        lock,
        holder,
        seconds: READER_WAIT.as_secs(),
    };
    db.warn_rarely(&e);
    e
}

/// For a message: a process, and what it is called.
fn describe(pid: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    match name.trim_end() {
        "" => format!(", which process {pid} holds"),
        name => format!(", which process {pid} ({name}) holds"),
    }
}

/// SQLite's exclusive lock on the database file, PENDING first so that new readers wait.
pub(super) struct Exclusive<'a> {
    file: &'a File,
    /// What to leave behind: a connection in WAL mode keeps its shared lock.
    keep_shared: bool,
    /// RESERVED was held before, and stays.
    keep_reserved: bool,
}

impl<'a> Exclusive<'a> {
    pub fn acquire(
        db: &Database,
        file: &'a File,
        deadline: Instant,
        keep_shared: bool,
        keep_reserved: bool,
    ) -> Result<Exclusive<'a>, StoreError> {
        let exclusive = Exclusive {
            file,
            keep_shared,
            keep_reserved,
        };
        for (start, len, name) in [
            (locks::RESERVED_BYTE, 1, "the RESERVED lock"),
            (locks::PENDING_BYTE, 1, "the PENDING lock"),
            (
                locks::SHARED_FIRST,
                locks::SHARED_SIZE,
                "readers to end, for an exclusive lock",
            ),
        ] {
            let locked = locks::lock_until(file.as_fd(), LockKind::Exclusive, start, len, deadline)
                .map_err(StoreError::io("lock", db.mount_name(FileKind::Database)))?;
            if !locked {
                return Err(held_lock_timeout(db, file.as_fd(), (start, len), name));
            }
        }
        Ok(exclusive)
    }
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        let fd = self.file.as_fd();
        // Failures cannot be acted on; the locks go with the descriptor at the latest.
        let _ = if self.keep_shared {
            locks::try_lock(
                fd,
                LockKind::Shared,
                locks::SHARED_FIRST,
                locks::SHARED_SIZE,
            )
            .map(|_| ())
        } else {
            locks::unlock(fd, locks::SHARED_FIRST, locks::SHARED_SIZE)
        };
        let bytes = if self.keep_reserved { 1 } else { 2 };
        let _ = locks::unlock(fd, locks::PENDING_BYTE, bytes);
    }
}

impl Database {
    /// Applies a file that follows the position; see the module.
    pub(super) fn apply_incoming(
        self: &Arc<Self>,
        locks: &mut ReplicaLocks,
        incoming: &mut Incoming,
    ) -> Result<(), StoreError> {
        let (exists, page_size, has_wal, was_wal, ino) = {
            let st = self.lock();
            let ino = st.files.database.as_ref().map_or(0, |f| f.ino);
            (
                st.page_count > 0 && st.broken.is_none(),
                st.page_size,
                st.files.wal.is_some(),
                st.wal_mode,
                ino,
            )
        };
        let captured = incoming.captured(was_wal);
        if incoming.header.is_snapshot() {
            self.begin_snapshot()?;
        }
        if captured.commit == 0 {
            self.append_incoming(incoming, true)?;
            locks.close(self);
            return self.apply_drop(&captured);
        }
        if !exists {
            locks.close(self);
            self.apply_new(&captured, incoming)?;
        } else {
            // Pages of another size: the WAL goes if nobody uses it, else it starts over with them.
            let keeps_wal =
                has_wal && (page_size == captured.page_size || !self.try_leave_wal(locks, ino)?);
            // Without its WAL it may be another file by now.
            let ino = self.lock().database_file(&self.name)?.ino;
            if keeps_wal {
                self.apply_to_wal(locks, ino, &captured, incoming)?;
            } else {
                self.apply_in_place(locks, ino, &mut Group::of_one(&captured, incoming))?;
            }
        }
        self.settle_mode(locks)
    }

    /// A snapshot is to take the place of everything.
    pub(super) fn begin_snapshot(&self) -> Result<(), StoreError> {
        intent::flush_removals(self.disk(), self.context.options.data_dir.as_path())?;
        self.forget_captured();
        // The last checkpoint may be of another history, and say nothing of this log.
        let mut st = self.lock();
        st.saved = SumsHeader {
            sequence: st.saved.sequence,
            ..Default::default()
        };
        Ok(())
    }

    /// Has a WAL if the database asks for one, and gives up one that it asks for no more.
    pub(super) fn settle_mode(
        self: &Arc<Self>,
        locks: &mut ReplicaLocks,
    ) -> Result<(), StoreError> {
        let (wal_mode, has_wal, ino) = {
            let st = self.lock();
            (
                st.wal_mode,
                st.files.wal.is_some(),
                st.files.database.as_ref().map_or(0, |f| f.ino),
            )
        };
        if wal_mode && !has_wal {
            self.ensure_wal()?;
        } else if !wal_mode && has_wal {
            // While a connection is open in WAL mode it stays; the next transaction tries again.
            self.try_leave_wal(locks, ino)?;
        }
        Ok(())
    }

    /// Gives the WAL up if no connection has the database open in WAL mode; whether it did.
    pub(super) fn try_leave_wal(
        self: &Arc<Self>,
        locks: &mut ReplicaLocks,
        ino: u64,
    ) -> Result<bool, StoreError> {
        match self.leave_wal(locks, ino, clock::now()) {
            Ok(()) => Ok(true),
            Err(StoreError::LockTimeout { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// A replica's database in WAL mode always has a WAL: readers cannot create one there.
    pub(super) fn ensure_wal(self: &Arc<Self>) -> Result<(), StoreError> {
        self.create(FileKind::Wal, true)?;
        if let Some(front) = self.context.front() {
            front.invalidate_entry(&self.mount_name(FileKind::Wal));
            front.invalidate_entry(&self.mount_name(FileKind::Shm));
        }
        Ok(())
    }

    /// Puts the file's bytes into the log.
    pub(super) fn append_incoming(
        &self,
        incoming: &mut Incoming,
        flush: bool,
    ) -> Result<(), StoreError> {
        let header = incoming.header;
        let (min_txid, max_txid) = (header.min_txid, header.max_txid);
        if let Some(loose) = incoming.spool.loose() {
            self.log().take(loose, min_txid, max_txid)?;
        } else {
            let mut appender = self.log().begin(min_txid, max_txid)?;
            std::io::copy(&mut incoming.spool.reader(), &mut appender)
                .map_err(StoreError::io("append to the log of", &self.dir))?;
            appender.commit()?;
        }
        if flush {
            self.log().flush_wait()
        } else {
            Ok(())
        }
    }

    /// Calls `each` for the file's pages, ascending.
    pub(super) fn for_pages(
        &self,
        incoming: &mut Incoming,
        mut each: impl FnMut(u32, &[u8]) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let context = || {
            format!(
                "transaction {:016x} of {}",
                incoming.header.max_txid, self.name
            )
        };
        let context = context();
        let reader = incoming.spool.reader();
        let mut decoder = Decoder::new(reader).map_err(StoreError::ltx(&context))?;
        let mut page = vec![0u8; decoder.header().page_size as usize];
        while let Some(pgno) = decoder.page(&mut page).map_err(StoreError::ltx(&context))? {
            each(pgno, &page)?;
        }
        Ok(())
    }

    fn apply_drop(self: &Arc<Self>, c: &Captured) -> Result<(), StoreError> {
        let mut st = self.lock();
        let removed = st
            .preserve_before(self, c)
            .and_then(|()| self.remove_files(&mut st));
        if let Err(e) = removed {
            self.set_broken(&mut st, e.to_string());
            return Err(e);
        }
        self.advance(&mut st, c);
        st.page_size = 0;
        st.broken = None;
        drop(st);
        self.show_applied(c);
        Ok(())
    }

    /// The database came to be, or is gone: names first, so that who sees the position sees them.
    fn show_applied(self: &Arc<Self>, c: &Captured) {
        if let Some(front) = self.context.front() {
            let names = self.mount_names();
            names.iter().for_each(|n| front.invalidate_entry(n));
        }
        self.publish_applied(c);
    }

    /// A database that nobody can have open.
    fn apply_new(
        self: &Arc<Self>,
        c: &Captured,
        incoming: &mut Incoming,
    ) -> Result<(), StoreError> {
        // Before it is logged: after that, a full disk would cost the database.
        let size = u64::from(c.commit) * u64::from(c.page_size);
        let written = incoming.database.take();
        let reserve = |st: &mut State| {
            self.remove_files(st)?;
            if written.is_some() {
                return Ok(());
            }
            self.create_file(st, FileKind::Database)?;
            self.reserve(st, size)
        };
        let made = reserve(&mut self.lock()).and_then(|()| self.append_incoming(incoming, true));
        if let Err(e) = made {
            // There was nothing before, and there is nothing now.
            self.remove_files(&mut self.lock())?;
            return Err(e);
        }
        let mut st = self.lock();
        st.sums = Default::default();
        // Not before it is logged: a start takes a file that no log explains for damage.
        let made = match written {
            Some(database) => self.place_file(&mut st, database, c),
            None => self.write_pages(&mut st, &mut Group::of_one(c, incoming)),
        };
        if let Err(e) = made {
            self.set_broken(&mut st, e.to_string());
            return Err(e);
        }
        st.broken = None;
        self.after_advance(&mut st);
        drop(st);
        self.show_applied(c);
        Ok(())
    }

    /// Tells the kernel that these pages changed; all of them, if none is named.
    pub(super) fn invalidate_pages(&self, ino: u64, page_size: u32, pages: &[u32]) {
        let Some(front) = self.context.front() else {
            return;
        };
        if pages.is_empty() || pages.len() > SINGLE_INVALIDATIONS {
            front.invalidate_data(ino, 0, 0);
        } else {
            for pgno in pages {
                front.invalidate_data(
                    ino,
                    u64::from(*pgno - 1) * u64::from(page_size),
                    u64::from(page_size),
                );
            }
        }
        self.show_size(FileKind::Database);
    }

    /// Has the kernel know how far a file reaches now. That it has forgotten the attributes is not
    /// enough: it asks for them when a read goes beyond the size that it knows, and if another
    /// invalidation crosses the answer it drops that and lets the read end short. Of a WAL that is an
    /// error to SQLite, of a database a page of zeros.
    pub(super) fn show_size(&self, kind: FileKind) {
        let Some(front) = self.context.front() else {
            return;
        };
        let (file, size) = {
            let mut st = self.lock();
            let size = match kind {
                FileKind::Wal => st.wal.committed_end(),
                _ => st.view_size,
            };
            (st.files.slot(kind).clone(), size)
        };
        let mut last = [0u8];
        if let (Some(f), Some(at)) = (file, size.checked_sub(1))
            && f.file.read_exact_at(&mut last, at).is_ok()
        {
            front.store(f.ino, at, &last);
        }
    }

    /// The transaction is visible to readers: it may be told of once it is on disk.
    pub(super) fn publish_applied(self: &Arc<Self>, c: &Captured) {
        self.note_captured(c);
        if self.log().flushed_txid() >= c.pos.txid {
            self.note_flushed(c.pos.txid);
        } else {
            self.context.flush_soon(self);
        }
    }

    /// Puts everything into the database file and removes the WAL, if no connection has the
    /// database open in WAL mode until `deadline`.
    fn leave_wal(
        self: &Arc<Self>,
        locks: &mut ReplicaLocks,
        ino: u64,
        deadline: Instant,
    ) -> Result<(), StoreError> {
        let had_index = locks.shm.is_some();
        let file = locks.database(self, ino)?;
        let exclusive = Exclusive::acquire(self, file, deadline, had_index, false)?;
        self.log().flush_wait()?;
        let mut st = self.lock();
        self.backfill_all(&mut st)?;
        let database = st.database_file(&self.name)?;
        let size = st.committed_size();
        self.set_file_size(&mut st, &*database.file, size)?;
        (st.view_size, st.base_size) = (size, size);
        // Whoever read it before there was a WAL goes by the change counter again.
        let renew = self
            .change_counter(&st)
            .is_none_or(|counter| counter <= st.rollback_counter);
        if renew {
            self.renew_file(&mut st)?;
        }
        st.wal.reset();
        for kind in [FileKind::Wal, FileKind::Shm] {
            if let Some(f) = st.files.slot(kind).take() {
                f.delete();
                let path = self.path(kind);
                self.disk()
                    .remove_file(&path)
                    .map_err(StoreError::io("remove", &path))?;
            }
        }
        drop(st);
        if let Some(front) = self.context.front() {
            front.invalidate_entry(&self.mount_name(FileKind::Wal));
            front.invalidate_entry(&self.mount_name(FileKind::Shm));
            front.invalidate_data(ino, 0, 0);
            if renew {
                front.invalidate_entry(&self.mount_name(FileKind::Database));
            }
        }
        drop(exclusive);
        locks.close(self);
        Ok(())
    }

    /// The applier's end: a WAL that the database asks for no more goes if nobody uses it, and all
    /// locks are given up.
    pub(super) fn settle_as_primary(self: &Arc<Self>) -> Result<(), StoreError> {
        let mut locks = task::lock(&self.replica);
        let exists = self.lock().page_count > 0;
        let settled = if exists {
            self.settle_mode(&mut locks)
        } else {
            Ok(())
        };
        locks.close(self);
        settled
    }

    /// After the role or the mount changed: nothing of the old one is held on to.
    pub(super) fn release_locks(&self) {
        task::lock(&self.replica).close(self);
    }
}

/// Takes a lock of the WAL index for as long as the guard lives.
pub(super) fn index_lock<'a>(
    db: &Database,
    file: &'a File,
    start: u64,
    len: u64,
    name: &'static str,
) -> Result<LockGuard<'a>, StoreError> {
    LockGuard::acquire(
        file.as_fd(),
        LockKind::Exclusive,
        start,
        len,
        clock::now() + READER_WAIT,
    )
    .map_err(StoreError::io("lock", db.mount_name(FileKind::Shm)))?
    .ok_or_else(|| held_lock_timeout(db, file.as_fd(), (start, len), name))
}
