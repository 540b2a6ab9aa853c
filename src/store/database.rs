//! One database: its state, and how its committed bytes are read.
//!
//! Invariants, while nobody holds the state's lock:
//! - `pos`, `page_size`, `page_count`, `sums` describe the newest captured transaction. It is in
//!   the log; whether the log is on disk, `published` says.
//! - The newest committed version of a page is in the WAL if `wal` says so, else in the database
//!   file. The overlay holds what is *not* committed, or is committed and being flushed.
//! - What recovery would redo from `saved.pos` on gives exactly this state.
//!
//! Lock order: state, then the log's own locks. No call into [`Front`](super::front::Front) and no
//! wait for another process happens while the state is locked.

use std::collections::{BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::ltx::{self, Pos};

use super::capture::Captured;
use super::context::{Context, Event};
use super::disk::{Disk, DiskFile, File, Scratch};
use super::error::StoreError;
use super::forward::Hold;
use super::halt::Halt;
use super::lane::{Handles, Lane};
use super::log::{Log, LogStats};
use super::overlay::Overlay;
use super::replica::ReplicaLocks;
use super::snapshot::Preserved;
use super::sums::{PageSums, SumsHeader};
use super::wal::WalCapture;
use super::wal_cache::WalCache;

/// Counts of what applications did to a database.
#[derive(Debug, Default)]
pub struct Counters {
    /// Writes to the database file.
    pub database_writes: AtomicU64,
    /// Writes to the journal.
    pub journal_writes: AtomicU64,
    /// Writes to the WAL.
    pub wal_writes: AtomicU64,
    /// Writes to the WAL index that reached the daemon.
    pub shm_writes: AtomicU64,
    /// Transactions captured or applied.
    pub commits: AtomicU64,
    /// Log records removed by age.
    pub ltx_reaped: AtomicU64,
    /// Transactions set aside because the primary does not have them.
    pub divergent: AtomicU64,
}

/// Which of a database's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// The database itself.
    Database,
    /// The rollback journal.
    Journal,
    /// The write-ahead log.
    Wal,
    /// The WAL index.
    Shm,
}

impl FileKind {
    /// What the mount's file name adds to the database's.
    pub fn suffix(self) -> &'static str {
        match self {
            FileKind::Database => "",
            FileKind::Journal => "-journal",
            FileKind::Wal => "-wal",
            FileKind::Shm => "-shm",
        }
    }

    /// The name in the database's directory.
    pub fn backing_name(self) -> &'static str {
        match self {
            FileKind::Database => "database",
            FileKind::Journal => "journal",
            FileKind::Wal => "wal",
            FileKind::Shm => "shm",
        }
    }
}

/// One file of a database, from its creation to its deletion; made again, it is another one.
#[derive(Debug)]
pub struct DbFile {
    /// Its inode number.
    pub ino: u64,
    /// Which file it is.
    pub kind: FileKind,
    /// The bytes on disk.
    pub file: File,
    deleted: AtomicBool,
    /// It is deleted, and its bytes are another file's now.
    replaced: AtomicBool,
    /// Handles that are open for writing alone, as no handle of SQLite's is.
    copying: AtomicU64,
    /// Its open handles, and how they get at its bytes.
    pub(super) handles: Mutex<Handles>,
}

impl DbFile {
    pub(super) fn new(ino: u64, kind: FileKind, file: File) -> DbFile {
        DbFile {
            ino,
            kind,
            file,
            deleted: AtomicBool::new(false),
            replaced: AtomicBool::new(false),
            copying: AtomicU64::new(0),
            handles: Mutex::default(),
        }
    }

    /// Whether its name is gone.
    pub fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::Acquire)
    }

    /// Whether nothing can be read through it any more.
    pub(super) fn is_replaced(&self) -> bool {
        self.replaced.load(Ordering::Acquire)
    }

    /// Takes its name away, and its bytes from those who have it open.
    pub(super) fn replace(&self) {
        self.replaced.store(true, Ordering::Release);
        self.delete();
    }

    /// A program opens it for writing alone, and so is not SQLite.
    pub fn begin_copy(&self) {
        self.copying.fetch_add(1, Ordering::AcqRel);
    }

    /// It has closed it.
    pub fn end_copy(&self) {
        self.copying.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether such a program has it open.
    pub(super) fn is_being_copied(&self) -> bool {
        self.copying.load(Ordering::Acquire) > 0
    }

    /// Takes its name away; open handles keep the bytes.
    pub(super) fn delete(&self) {
        self.deleted.store(true, Ordering::Release);
    }
}

/// The files that exist at the moment.
#[derive(Debug, Default)]
pub(super) struct Files {
    pub database: Option<Arc<DbFile>>,
    pub journal: Option<Arc<DbFile>>,
    pub wal: Option<Arc<DbFile>>,
    pub shm: Option<Arc<DbFile>>,
}

impl Files {
    pub fn slot(&mut self, kind: FileKind) -> &mut Option<Arc<DbFile>> {
        match kind {
            FileKind::Database => &mut self.database,
            FileKind::Journal => &mut self.journal,
            FileKind::Wal => &mut self.wal,
            FileKind::Shm => &mut self.shm,
        }
    }
}

/// See the module's invariants.
pub(super) struct State {
    pub pos: Pos,
    /// Bytes; 0 until the first transaction.
    pub page_size: u32,
    pub page_count: u32,
    /// Whether the database's header asks for a WAL.
    pub wal_mode: bool,
    pub timestamp: i64,
    pub sums: PageSums,
    pub files: Files,
    /// Size of the database file as applications see it.
    pub view_size: u64,
    /// The database file counts only up to here; beyond, the view is zeros or the overlay.
    pub base_size: u64,
    /// Bytes of the database file that are allocated, so that applying cannot fail for want of space.
    pub reserved: u64,
    pub overlay: Overlay,
    /// The journal stands for a transaction that may still be rolled back.
    pub journal_active: bool,
    /// The transaction that the journal stands for, if it is logged already.
    pub early: Option<Captured>,
    /// A transaction of a rollback mode is logged and not yet in the state: nothing may change it.
    pub committing: bool,
    /// An import stands between the reading of the state and its change: applications may not.
    pub importing: bool,
    /// The highest change counter under which a connection may have cached pages in a rollback
    /// mode: that of the database when it last had a WAL made. 0: there is none.
    pub rollback_counter: u32,
    pub wal: WalCapture,
    pub wal_cache: WalCache,
    /// The database and its WAL are passed through to applications.
    pub lane: Option<Lane>,
    /// There is a lane's mark on disk.
    pub marked: bool,
    pub snapshots: Vec<Weak<Mutex<Preserved>>>,
    /// What the checksum file says.
    pub saved: SumsHeader,
    /// Bytes of log beyond which the next checkpoint is due.
    pub checkpoint_due: u64,
    pub broken: Option<String>,
    /// Pages that a reader of the database file found rotten, and that are to be looked at.
    pub suspects: BTreeSet<u32>,
}

impl State {
    fn new(scratch: Scratch) -> State {
        State {
            pos: Pos::default(),
            page_size: 0,
            page_count: 0,
            wal_mode: false,
            timestamp: 0,
            sums: PageSums::default(),
            files: Files::default(),
            view_size: 0,
            base_size: 0,
            reserved: 0,
            overlay: Overlay::new(scratch),
            journal_active: false,
            early: None,
            committing: false,
            importing: false,
            rollback_counter: 0,
            wal: WalCapture::default(),
            wal_cache: WalCache::default(),
            lane: None,
            marked: false,
            snapshots: Vec::new(),
            saved: SumsHeader::default(),
            checkpoint_due: super::checkpoint::LOG_BYTES,
            broken: None,
            suspects: BTreeSet::new(),
        }
    }

    /// Bytes of the database as of the newest transaction.
    pub fn committed_size(&self) -> u64 {
        u64::from(self.page_count) * u64::from(self.page_size)
    }

    pub fn database_file(&self, db: &str) -> Result<Arc<DbFile>, StoreError> {
        self.files
            .database
            .clone()
            .ok_or_else(|| StoreError::NoDatabase(db.to_owned()))
    }

    /// Copies the newest committed version of a page; zeros where the file is shorter.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if it is not what was written: rotten bytes go nowhere.
    pub fn read_committed(
        &self,
        db: &Database,
        pgno: u32,
        buf: &mut [u8],
    ) -> Result<(), StoreError> {
        if self
            .wal
            .read_newest(self.files.wal.as_deref(), pgno, buf)
            .map_err(StoreError::io("read WAL of", &db.dir))?
        {
            return Ok(());
        }
        if self.file_page_is_whole(db, pgno, buf)? || pgno == ltx::lock_pgno(self.page_size) {
            return Ok(());
        }
        let what = format!(
            "page {pgno} does not match its checksum {:016x} at {}",
            self.sums.get(pgno),
            self.pos
        );
        Err(StoreError::corrupt(db.path(FileKind::Database), what))
    }

    /// Keeps the committed versions of pages that are about to change for snapshots under way.
    pub fn preserve(
        &mut self,
        db: &Database,
        pgnos: impl Iterator<Item = u32>,
    ) -> Result<(), StoreError> {
        self.snapshots.retain(|s| s.strong_count() > 0);
        if self.snapshots.is_empty() {
            return Ok(());
        }
        let active: Vec<_> = self.snapshots.iter().filter_map(Weak::upgrade).collect();
        let mut page = vec![0u8; self.page_size as usize];
        for pgno in pgnos.filter(|p| *p <= self.page_count) {
            let wanting: Vec<_> = active.iter().filter(|s| s.lock().wants(pgno)).collect();
            if wanting.is_empty() {
                continue;
            }
            if let Err(e) = self.read_committed(db, pgno, &mut page) {
                if !db.checkpoint_is_ahead(self) {
                    return Err(e);
                }
                wanting.iter().for_each(|s| s.lock().give_up());
                continue;
            }
            for s in wanting {
                s.lock()
                    .keep(pgno, &page)
                    .map_err(StoreError::io("keep pages for a snapshot of", &db.dir))?;
            }
        }
        Ok(())
    }

    /// The same for all that a logged transaction changes or cuts off.
    pub fn preserve_before(&mut self, db: &Database, c: &Captured) -> Result<(), StoreError> {
        if c.page_size != self.page_size || c.commit == 0 {
            return self.preserve(db, 1..=self.page_count);
        }
        let cut = c.commit.saturating_add(1)..=self.page_count;
        self.preserve(db, c.changed.pgnos().chain(cut))
    }
}

/// Fills `buf` from the file, with zeros beyond its end.
pub(super) fn read_or_zeros(
    file: &dyn DiskFile,
    offset: u64,
    buf: &mut [u8],
) -> std::io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    buf[done..].fill(0);
    Ok(())
}

/// What is on disk, and known to be.
#[derive(Clone, Copy, Debug, Default)]
struct Published {
    pos: Pos,
    page_size: u32,
    page_count: u32,
    timestamp: i64,
}

/// One database of a node.
pub struct Database {
    pub(super) name: String,
    /// Inode number of its `-pos` file.
    pub pos_ino: u64,
    /// Inode number of its `-lock` file.
    pub lock_ino: u64,
    pub(super) dir: PathBuf,
    pub(super) context: Arc<Context>,
    pub(super) state: Mutex<State>,
    log: Log,
    counters: Counters,
    /// Up to this TXID the backup has it; 0: nothing is known of a backup.
    backed_up: AtomicU64,
    published: Mutex<Published>,
    /// Captured transactions whose flush is still to come, oldest first.
    pending: Mutex<VecDeque<Published>>,
    /// What a replica holds open in the mount; taken by one applier at a time.
    pub(super) replica: Mutex<ReplicaLocks>,
    /// Inode number of the WAL index that the node maps, and how many bytes of it; they may not be
    /// cut off. A newer file of the same name is not meant.
    pub(super) shm_mapped: Mutex<(u64, u64)>,
    /// A sync of the database file has failed.
    pub(super) unsyncable: AtomicBool,
    /// Held by whoever saves a checkpoint.
    pub(super) checkpointing: Mutex<()>,
    /// The position of which all that the primary does not have is set aside already.
    pub(super) aside: Mutex<Option<Pos>>,
    /// The halt lock that this node, a replica, holds.
    pub(super) hold: Hold,
    /// The halt lock that this node, the primary, has given to a replica.
    pub(super) halt: Halt,
    /// Rung when `published` moves.
    moved: Condvar,
    /// When a refusal was last logged, in seconds since the Unix epoch.
    warned: AtomicU64,
}

impl Database {
    /// A database that is nothing yet. The directory need not exist.
    pub(super) fn empty(context: &Arc<Context>, name: &str, dir: &Path, log: Log) -> Arc<Database> {
        let db = Arc::new(Database {
            name: name.to_owned(),
            pos_ino: context.next_ino(),
            lock_ino: context.next_ino(),
            dir: dir.to_owned(),
            context: context.clone(),
            state: Mutex::new(State::new(Scratch::new(&context.options.disk, dir))),
            log,
            counters: Counters::default(),
            backed_up: AtomicU64::new(0),
            published: Mutex::default(),
            pending: Mutex::default(),
            replica: Mutex::default(),
            shm_mapped: Mutex::default(),
            unsyncable: AtomicBool::new(false),
            checkpointing: Mutex::default(),
            aside: Mutex::default(),
            hold: Hold::default(),
            halt: Halt::default(),
            moved: Condvar::new(),
            warned: AtomicU64::new(0),
        });
        let weak = Arc::downgrade(&db);
        db.log.set_on_flushed(move |txid| {
            if let Some(db) = weak.upgrade() {
                db.note_flushed(txid);
            }
        });
        db
    }

    /// For `map_err`, as [`StoreError::io`]: the path is made only if there is an error.
    pub(super) fn io(
        &self,
        action: &'static str,
        kind: FileKind,
    ) -> impl FnOnce(std::io::Error) -> StoreError {
        move |e| StoreError::io(action, self.path(kind))(e)
    }

    /// Its name in the mount.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The position that is on disk.
    pub fn pos(&self) -> Pos {
        self.published.lock().pos
    }

    /// Waits until the position on disk is this one, or until then; the position.
    pub(super) fn wait_pos(&self, wanted: Pos, until: Instant) -> Pos {
        let mut published = self.published.lock();
        while published.pos != wanted {
            if self.moved.wait_until(&mut published, until).timed_out() {
                break;
            }
        }
        published.pos
    }

    /// The position that the newest commit has led to; its flush may be still to come.
    pub fn captured_pos(self: &Arc<Self>) -> Pos {
        let mut st = self.lock();
        if let Err(e) = self.follow(&mut st) {
            self.warn_rarely(&e);
        }
        st.pos
    }

    /// Bytes of a page, 0 before the first transaction.
    pub fn page_size(&self) -> u32 {
        self.published.lock().page_size
    }

    /// Number of pages, 0 if it does not exist (any more).
    pub fn page_count(&self) -> u32 {
        self.published.lock().page_count
    }

    /// When the last transaction was made, in milliseconds since the Unix epoch.
    pub fn timestamp(&self) -> i64 {
        self.published.lock().timestamp
    }

    /// Counts of operations.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The high-water mark: up to this TXID a backup has the database; 0 without a backup.
    pub fn backed_up(&self) -> u64 {
        self.backed_up.load(Ordering::Acquire)
    }

    /// Sets the high-water mark: log records above it are not pruned.
    pub fn note_backed_up(&self, txid: u64) {
        self.backed_up.store(txid, Ordering::Release);
    }

    /// The newest record that may be pruned as far as a backup is concerned.
    pub(super) fn prunable(&self) -> u64 {
        match self.backed_up() {
            0 if self.context.has_backup() => 0,
            0 => u64::MAX,
            txid => txid,
        }
    }

    /// What the log holds.
    pub fn log_stats(&self) -> LogStats {
        self.log.stats()
    }

    pub(super) fn log(&self) -> &Log {
        &self.log
    }

    pub(super) fn disk(&self) -> &dyn Disk {
        &*self.context.options.disk
    }

    pub(super) fn random(&self) -> u64 {
        self.context.options.random.next()
    }

    /// Files of no name in the data directory.
    pub(super) fn data_scratch(&self) -> Scratch {
        Scratch::new(&self.context.options.disk, &self.context.options.data_dir)
    }

    /// Files of no name in its directory.
    pub(super) fn scratch(&self) -> Scratch {
        Scratch::new(&self.context.options.disk, &self.dir)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    pub(super) fn path(&self, kind: FileKind) -> PathBuf {
        self.dir.join(kind.backing_name())
    }

    /// The name of one of its files in the mount.
    pub(super) fn mount_name(&self, kind: FileKind) -> String {
        format!("{}{}", self.name, kind.suffix())
    }

    /// Whether neither a file nor a transaction is there.
    pub(super) fn is_nothing(&self) -> bool {
        let st = self.lock();
        st.pos.is_zero() && st.files.database.is_none() && st.broken.is_none()
    }

    /// Cuts the open files off from a database that is replaced.
    pub(super) fn abandon_files(&self) {
        self.release_locks();
        let mut st = self.lock();
        for kind in [
            FileKind::Database,
            FileKind::Journal,
            FileKind::Wal,
            FileKind::Shm,
        ] {
            if let Some(f) = st.files.slot(kind).take() {
                f.delete();
            }
        }
    }

    /// As a replica: with a WAL, if the database asks for one.
    pub(super) fn prepare_replica(self: &Arc<Self>) -> Result<(), StoreError> {
        let needs_wal = {
            let st = self.lock();
            st.wal_mode && st.page_count > 0 && st.files.wal.is_none() && st.broken.is_none()
        };
        if needs_wal { self.ensure_wal() } else { Ok(()) }
    }

    /// Why it cannot be used, if it cannot.
    pub fn broken(&self) -> Option<String> {
        self.lock().broken.clone()
    }

    pub(super) fn check_usable(&self, st: &State) -> Result<(), StoreError> {
        match &st.broken {
            Some(reason) => Err(StoreError::Broken {
                db: self.name.clone(),
                reason: reason.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Sets the database aside: nothing more is read from or written to it in this life of the node.
    pub(super) fn set_broken(&self, st: &mut State, reason: String) {
        tracing::error!(db = self.name, reason, "database set aside");
        st.broken = Some(reason);
    }

    /// The error for something that no transaction of SQLite does, logged at most once a minute.
    pub(super) fn refuse(&self, what: impl Into<String>) -> StoreError {
        let e = StoreError::Refused {
            db: self.name.clone(),
            what: what.into(),
        };
        self.warn_rarely(&e);
        e
    }

    /// Logs a refusal, at most one a minute.
    pub(super) fn warn_rarely(&self, e: &StoreError) {
        let now = now_ms() as u64 / 1000;
        let last = self.warned.load(Ordering::Relaxed);
        if now.saturating_sub(last) >= 60
            && self
                .warned
                .compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            tracing::warn!(db = self.name, "{e}");
        }
    }

    /// Notes a captured transaction: it is told to the world once it is on disk.
    pub(super) fn note_captured(&self, c: &Captured) {
        self.counters.commits.fetch_add(1, Ordering::Relaxed);
        let p = Published {
            pos: c.pos,
            page_size: c.page_size,
            page_count: c.commit,
            timestamp: c.timestamp,
        };
        self.pending.lock().push_back(p);
    }

    /// A snapshot takes the place of whatever was captured and not told of yet.
    pub(super) fn forget_captured(&self) {
        self.pending.lock().clear();
    }

    /// Whether anything captured is not yet on disk.
    pub(super) fn has_unflushed(&self) -> bool {
        !self.pending.lock().is_empty()
    }

    /// Tells the world of what is on disk now. Called after every flush, and once more by those who
    /// noted a transaction that a flush of somebody else's may have overtaken.
    pub(super) fn note_flushed(&self, txid: u64) {
        // Locked to the end: the world is told in order, whoever tells it.
        let mut pending = self.pending.lock();
        let n = pending.iter().take_while(|p| p.pos.txid <= txid).count();
        for p in pending.drain(..n) {
            *self.published.lock() = p;
            self.moved.notify_all();
            self.context.publish(Event::Tx {
                db: self.name.clone(),
                pos: p.pos,
                page_size: p.page_size,
                commit: p.page_count,
                timestamp: p.timestamp,
            });
        }
    }

    /// The state as opened is what is on disk.
    pub(super) fn publish_opened(&self) {
        let st = self.lock();
        *self.published.lock() = Published {
            pos: st.pos,
            page_size: st.page_size,
            page_count: st.page_count,
            timestamp: st.timestamp,
        };
    }

    /// Compares every page with its checksum; used with `strict-verify` and at the end of a
    /// recovery that had no saved checksums.
    pub(super) fn verify_pages(&self, st: &State) -> Result<(), StoreError> {
        let lock_page = if st.page_size > 0 {
            ltx::lock_pgno(st.page_size)
        } else {
            0
        };
        let mut page = vec![0u8; st.page_size as usize];
        for pgno in (1..=st.page_count).filter(|p| *p != lock_page) {
            st.read_committed(self, pgno, &mut page)?;
        }
        if st.sums.recomputed() != st.pos.checksum && st.pos.txid > 0 {
            let what = format!(
                "database checksum {:016x} is not that of position {}",
                st.sums.recomputed(),
                st.pos
            );
            return Err(StoreError::corrupt(self.path(FileKind::Database), what));
        }
        Ok(())
    }
}

/// Milliseconds since the Unix epoch.
pub(super) fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as i64)
}
