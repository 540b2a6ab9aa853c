//! The databases of a node: capture, log, apply, recover, snapshot, retention.
//!
//! Blocking code with short critical sections, one lock a database; it knows `ltx` and `sqlite`
//! and nobody else. The FUSE layer above translates requests to [`Store`]'s and [`Database`]'s
//! operations and implements [`front::Front`] for what the store needs of it.
//!
//! The log (`log`, `segment`) is the truth; see those and `database` for the invariants.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use tokio::sync::{broadcast, watch};

use crate::clock;
use crate::ltx::Pos;

mod appender;
mod capture;
mod checkpoint;
mod clients;
mod context;
mod copy;
mod database;
pub mod disk;
mod divergent;
mod early;
mod epoch;
mod error;
mod fault;
mod files;
mod forward;
pub mod front;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod gate;
mod group;
mod halt;
mod import;
mod index;
mod intent;
mod lane;
mod litefs;
mod lives;
mod log;
mod log_recovery;
mod loose;
mod mend;
mod names;
mod overlay;
mod pages;
mod receive;
mod records;
mod recover;
mod replica;
mod replica_in_place;
mod replica_wal;
mod role_change;
mod rollback;
mod room;
mod scrub;
pub mod segment;
mod shm;
mod snapshot;
mod sums;
mod super_journal;
#[cfg(test)]
pub(crate) mod tests;
mod wal;
mod wal_cache;
mod wal_tail;

pub use context::{Background, Event, Options, Random, Subscription};
pub use copy::CopiedFile;
pub use database::{Counters, Database, DbFile, FileKind};
pub use divergent::{Common, MAX_POSITIONS};
pub use error::StoreError;
pub use fault::{Action as FaultAction, FaultStats, Place as FaultPlace};
pub use files::Done;
pub use forward::{Cancelled, Decided, HALT_TTL, HALT_WAIT, Outgoing, Primary, Verdict};
pub use import::ImportError;
pub use lane::Way;
pub use log::{LogPlace, LogStats};
pub use names::{LOCK_DIR, Name, check_database};
pub use receive::{Arrived, Received};
pub use records::{LargeRecord, Next, Record};
pub use room::Room;
pub use scrub::{Scrub, ScrubOptions};
pub use snapshot::Snapshot;
pub use super_journal::SuperJournal;

use context::Context;
use disk::Disk;

/// What this node is in its cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// It writes.
    Primary,
    /// It follows the primary of this host name, or looks for one.
    Replica {
        /// The primary's host name.
        hostname: Option<String>,
    },
}

/// How long [`Store::pause_writes`] waits for commits in flight.
pub const PAUSE_WAIT: Duration = Duration::from_secs(5);
/// The most databases of a node, dropped ones included: nobody creates more, no primary and no backup.
pub const MAX_DATABASES: usize = 16_384;
/// Lag of a replica that has never been in step.
const NEVER_IN_STEP: i64 = i64::MIN;

/// All databases of a node.
pub struct Store {
    context: Arc<Context>,
    databases: RwLock<BTreeMap<String, Arc<Database>>>,
    super_journals: Mutex<HashMap<String, Arc<SuperJournal>>>,
    role: RwLock<Role>,
    /// Held by whoever changes the role: one change at a time.
    role_change: Mutex<()>,
    cluster_id: RwLock<Option<String>>,
    epoch: epoch::Epoch,
    /// Locked as long as the node lives: two nodes on one directory would destroy it.
    _lock: fs::File,
    /// The primary's time as of which this node has everything, ms since the Unix epoch.
    in_step_at: AtomicI64,
    /// See [`MAX_DATABASES`].
    most_databases: AtomicUsize,
}

impl Store {
    /// Opens the data directory, making it if it is missing, and recovers every database in it.
    /// The node is a replica without a primary until [`Store::set_role`].
    ///
    /// # Errors
    /// Of the directory itself; a single database that is damaged is set aside and logged.
    pub fn open(options: Options) -> Result<Arc<Store>, StoreError> {
        let dir = options.data_dir.clone();
        let dbs = dir.join("dbs");
        let disk = options.disk.clone();
        let is_new = !disk.exists(&dir);
        disk.create_dir_all(&dbs)
            .and_then(|()| disk.sync_dir(&dir))
            .and_then(|()| match dir.parent() {
                Some(parent) if is_new => disk.sync_dir(parent),
                _ => Ok(()),
            })
            .map_err(StoreError::io("create data directory", &dbs))?;
        let lock = lock_directory(&dir)?;
        // Else the first that finds out is a transaction, or a database that seems damaged.
        options
            .disk
            .temporary(&dir)
            .map_err(StoreError::io("write to data directory", &dir))?;
        loose::clear(&*disk, &dir)?;
        let lives = lives::Lives::open(&disk, &dir)?;
        let context = Context::start(options, lives);
        let store = Store {
            cluster_id: RwLock::new(read_cluster_id(&*disk, &dir)?),
            epoch: epoch::Epoch::open(&disk, &dir)?,
            context,
            _lock: lock,
            databases: RwLock::default(),
            super_journals: Mutex::default(),
            role: RwLock::new(Role::Replica { hostname: None }),
            role_change: Mutex::default(),
            in_step_at: AtomicI64::new(NEVER_IN_STEP),
            most_databases: AtomicUsize::new(MAX_DATABASES),
        };
        store.open_databases(&dbs)?;
        store.finish_intents()?;
        Ok(Arc::new(store))
    }

    fn open_databases(&self, dbs: &Path) -> Result<(), StoreError> {
        let disk = self.disk();
        let mut entries = disk
            .list(dbs)
            .map_err(StoreError::io("list databases in", dbs))?;
        entries.sort_unstable();
        for entry in entries {
            let path = dbs.join(&entry);
            let name = entry
                .to_str()
                .map(str::to_owned)
                .filter(|n| check_database(n).is_ok());
            let is_dir = disk.metadata(&path).is_ok_and(|m| m.is_dir());
            let (true, Some(name)) = (is_dir, name) else {
                tracing::warn!(path = %path.display(), "not a database: left alone");
                continue;
            };
            match recover::open(&self.context, &name, &path)? {
                Some(db) => {
                    self.databases.write().insert(name, db);
                }
                // Created and never written, or the rest of a failed creation. Only empty ones go.
                None => remove_empty(disk, &path),
            }
        }
        Ok(())
    }

    /// What was looked at for faults, and found.
    pub fn fault_stats(&self) -> &FaultStats {
        &self.context.faults
    }

    /// Changes whenever this node, as a replica, has a database to fetch from the primary again:
    /// it is left out of [`Store::positions`].
    pub fn refetch(&self) -> watch::Receiver<u64> {
        self.context.refetch.listen()
    }

    /// Random, new at every start.
    pub fn node_id(&self) -> u64 {
        self.context.node_id
    }

    fn data_dir(&self) -> &Path {
        &self.context.options.data_dir
    }

    /// Files of no name in the data directory.
    fn scratch(&self) -> disk::Scratch {
        disk::Scratch::new(&self.context.options.disk, self.data_dir())
    }

    fn disk(&self) -> &dyn Disk {
        &*self.context.options.disk
    }

    /// Does on this thread all that waits to be done behind the applications' backs, if the store
    /// was opened with [`Background::Manual`].
    pub fn run_background(&self) {
        self.context.run_background();
    }

    /// The cluster that this data directory belongs to, once it belongs to one.
    pub fn cluster_id(&self) -> Option<String> {
        self.cluster_id.read().clone()
    }

    /// Joins a cluster, for ever: the ID is kept in the data directory.
    ///
    /// # Errors
    /// If it belongs to another one, or the file cannot be written.
    pub fn set_cluster_id(&self, id: &str) -> Result<(), StoreError> {
        let mut current = self.cluster_id.write();
        match &*current {
            Some(have) if have == id => return Ok(()),
            Some(have) => {
                return Err(StoreError::ClusterId {
                    have: have.clone(),
                    other: id.to_owned(),
                });
            }
            None => {}
        }
        write_cluster_id(self.disk(), self.data_dir(), id)?;
        *current = Some(id.to_owned());
        Ok(())
    }

    /// Leaves the cluster that this data directory belongs to for another one, if it has never had a
    /// database; whether it has.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn change_cluster_id(&self, id: &str) -> Result<bool, StoreError> {
        let mut current = self.cluster_id.write();
        if !self.databases.read().values().all(|db| db.is_nothing()) {
            return Ok(false);
        }
        write_cluster_id(self.disk(), self.data_dir(), id)?;
        *current = Some(id.to_owned());
        Ok(true)
    }

    /// All databases, dropped ones included.
    pub fn databases(&self) -> Vec<Arc<Database>> {
        self.databases.read().values().cloned().collect()
    }

    /// The database of this name.
    pub fn database(&self, name: &str) -> Option<Arc<Database>> {
        self.databases.read().get(name).cloned()
    }

    /// The database of this name, made if there is none; it has no file yet.
    pub fn database_or_new(&self, name: &str) -> Result<Arc<Database>, StoreError> {
        check_database(name)?;
        if let Some(db) = self.database(name) {
            return Ok(db);
        }
        let mut databases = self.databases.write();
        if let Some(db) = databases.get(name) {
            return Ok(db.clone());
        }
        let most = self.most_databases.load(Ordering::Relaxed);
        if databases.len() >= most {
            return Err(StoreError::TooManyDatabases(most));
        }
        let db = self.new_database(name)?;
        databases.insert(name.to_owned(), db.clone());
        Ok(db)
    }

    fn new_database(&self, name: &str) -> Result<Arc<Database>, StoreError> {
        let dir = self.data_dir().join("dbs").join(name);
        let options = &self.context.options;
        let log = log::Log::open(options, &dir.join("log"), options.segment_age(), 0)?;
        Ok(Database::empty(&self.context, name, &dir, log))
    }

    /// Sets another limit than [`MAX_DATABASES`].
    #[cfg(test)]
    pub(crate) fn set_most_databases(&self, most: usize) {
        self.most_databases.store(most, Ordering::Relaxed);
    }

    /// The same for the applier; a database that is set aside gives way to a snapshot.
    fn database_for_apply(&self, name: &str, snapshot: bool) -> Result<Arc<Database>, StoreError> {
        let db = self.database_or_new(name)?;
        let Some(reason) = db.broken().filter(|_| snapshot) else {
            return Ok(db);
        };
        let aside = self.data_dir().join("set-aside");
        let target = aside.join(format!("{name}-{}", database::now_ms()));
        tracing::warn!(db = name, reason, kept = %target.display(), "the primary's database takes the place of a damaged one");
        let from = self.data_dir().join("dbs").join(name);
        let disk = self.disk();
        disk.create_dir_all(&aside)
            .map_err(StoreError::io("create", &aside))?;
        // Before the databases are locked: the keeper may hold the replica's locks while it waits
        // for the mount to look a name up.
        db.abandon_files();
        let mut databases = self.databases.write();
        disk.rename(&from, &target)
            .and_then(|()| disk.sync_dir(&aside))
            .and_then(|()| disk.sync_dir(self.data_dir()))
            .map_err(StoreError::io("set aside", &from))?;
        let new = self.new_database(name)?;
        databases.insert(name.to_owned(), new.clone());
        Ok(new)
    }

    /// A name under which nothing came to be is no database.
    fn forget_if_nothing(&self, db: &Arc<Database>) {
        let mut databases = self.databases.write();
        let nothing = db.pos().is_zero() && db.is_nothing();
        if nothing && databases.get(db.name()).is_some_and(|d| Arc::ptr_eq(d, db)) {
            databases.remove(db.name());
            remove_empty(self.disk(), &self.data_dir().join("dbs").join(db.name()));
        }
    }

    /// Positions of all databases that have had a transaction. What is applied is flushed first.
    pub fn positions(&self) -> BTreeMap<String, Pos> {
        let mut positions = BTreeMap::new();
        for db in self.databases() {
            db.settle();
            let pos = db.pos();
            if !pos.is_zero() && db.broken().is_none() {
                positions.insert(db.name().to_owned(), pos);
            }
        }
        positions
    }

    /// Databases that change from now on.
    pub fn subscribe(&self) -> Subscription {
        self.context.subscribe()
    }

    /// Events from now on. A listener that falls 1,024 behind misses some, and is told so.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.context.listen()
    }

    /// What this node is.
    pub fn role(&self) -> Role {
        self.role.read().clone()
    }

    /// Whether applications may commit transactions at this moment.
    pub fn is_writable(&self) -> bool {
        self.context.is_writable()
    }

    /// Until when applications may commit as long as this node is primary; `None`: without an end.
    /// A commit that is not answered by then is answered with an error.
    pub fn set_lease_end(&self, until: Option<Instant>) {
        self.context.gate.set_lease_end(until);
        self.regulate_lanes();
    }

    /// Lets no further commit of an application begin. When this returns, those that were begun
    /// are decided and on disk: [`Store::positions`] is all that was ever acknowledged. The pause
    /// ends with [`Store::resume_writes`], or with the role.
    ///
    /// # Errors
    /// If commits have not ended after [`PAUSE_WAIT`], or the log could not be flushed; the pause
    /// is on then too.
    pub fn pause_writes(&self) -> Result<(), StoreError> {
        self.context.gate.pause();
        if !self.context.gate.drain(PAUSE_WAIT) {
            return Err(StoreError::CommitsInFlight {
                seconds: PAUSE_WAIT.as_secs(),
            });
        }
        self.regulate_lanes();
        self.drain_lanes(PAUSE_WAIT)?;
        self.databases().iter().try_for_each(|db| db.try_settle())
    }

    /// Lets applications commit again after [`Store::pause_writes`].
    pub fn resume_writes(&self) {
        self.context.gate.resume();
        self.regulate_lanes();
    }

    /// How many transactions this node has, over all databases: of two nodes with a common past the
    /// one with more is further. What is applied is flushed first.
    pub fn transactions(&self) -> u64 {
        let all = self.positions();
        all.values().fold(0, |n, p| n.saturating_add(p.txid))
    }

    /// The data directory's file system.
    pub fn statvfs(&self) -> io::Result<libc::statvfs> {
        statvfs(self.data_dir())
    }

    /// Sets or takes away the mount.
    pub fn set_front(&self, front: Option<Arc<dyn front::Front>>) {
        if front.is_none() {
            self.databases().iter().for_each(|d| d.release_locks());
        }
        self.context.set_front(front);
    }

    /// Has the kernel forget what it has cached of bytes of a mounted file. Blocks until reads of
    /// them that are under way are answered.
    pub fn forget_cached(&self, ino: u64, offset: u64, len: u64) {
        if let Some(front) = self.context.front() {
            front.invalidate_data(ino, offset, len);
        }
    }

    /// Sets how the primary is reached by this node as a replica that wants to write; `None`: every
    /// halt lock that it holds is given up first.
    pub fn set_primary(&self, primary: Option<Arc<dyn Primary>>) {
        if primary.is_none() {
            self.databases().iter().for_each(|d| d.end_hold(None));
        }
        self.context.set_primary(primary);
    }

    /// The primary's clock, at a moment when this replica had all that the primary had.
    pub fn note_in_step(&self, timestamp_ms: i64) {
        self.in_step_at.store(timestamp_ms, Ordering::Release);
    }

    /// How far this node is behind the primary, in ms: 0 on the primary, `None` before the first sync.
    pub fn lag(&self) -> Option<i64> {
        if self.role() == Role::Primary {
            return Some(0);
        }
        match self.in_step_at.load(Ordering::Acquire) {
            NEVER_IN_STEP => None,
            at => Some((database::now_ms() - at).max(0)),
        }
    }

    /// The primary's time that [`Store::lag`] counts from, ms since the Unix epoch.
    pub fn in_step_at(&self) -> Option<i64> {
        Some(self.in_step_at.load(Ordering::Acquire)).filter(|t| *t != NEVER_IN_STEP)
    }

    /// Says that this node keeps a backup: from now on nothing is pruned that it is not known to have.
    pub fn keep_for_backup(&self) {
        self.context.set_backup();
    }

    /// Notes what the primary says of its backup: it has the database up to this TXID; 0: there is
    /// none.
    pub fn note_high_water(&self, name: &str, txid: u64) {
        if let Some(db) = self.database(name) {
            db.note_backed_up(txid);
        }
    }

    /// Removes log records that are older than the retention and in the backup, if there is one, in
    /// every database.
    pub fn prune(&self) {
        for db in self.databases() {
            if let Err(e) = db.prune_log(self.context.options.retention) {
                tracing::warn!(db = db.name(), error = %e, "old transactions not removed");
            }
        }
    }

    /// Brings every database to rest: everything in the database files, and saved so that the next
    /// start has nothing to redo. The mount must be gone, or nobody writing.
    pub fn close(&self) {
        self.context.gate.set_primary(false);
        self.regulate_lanes();
        let readers_until = clock::now() + lane::READERS_WAIT;
        for db in self.databases() {
            if db.broken().is_some() {
                continue;
            }
            if let Err(e) = db.close(readers_until) {
                tracing::warn!(db = db.name(), error = %e, "not closed cleanly: the next start recovers it");
            }
        }
    }

    /// Names in the mount's root: the files of databases, and the positions of those that have a page.
    pub fn list(&self) -> Vec<(String, u64)> {
        let mut names = Vec::new();
        for db in self.databases() {
            // One that has had no transaction has a file, and no position.
            if db.page_count() > 0 {
                names.push((format!("{}-pos", db.name()), db.pos_ino));
            }
            for kind in [
                FileKind::Database,
                FileKind::Journal,
                FileKind::Wal,
                FileKind::Shm,
            ] {
                names.extend(db.file(kind).map(|f| (db.mount_name(kind), f.ino)));
            }
        }
        names.extend(
            self.super_journals
                .lock()
                .iter()
                .map(|(n, j)| (n.clone(), j.ino)),
        );
        names
    }

    /// Names of databases, for those who compare nodes.
    pub fn names(&self) -> BTreeSet<String> {
        self.databases.read().keys().cloned().collect()
    }
}

fn statvfs(dir: &Path) -> io::Result<libc::statvfs> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(dir.as_os_str().as_bytes())?;
    // SAFETY: all zeros is a valid `statvfs`, which the call fills; the path outlives it.
    unsafe {
        let mut s: libc::statvfs = std::mem::zeroed();
        if libc::statvfs(path.as_ptr(), &mut s) == 0 {
            Ok(s)
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

fn lock_directory(dir: &Path) -> Result<fs::File, StoreError> {
    let file = fs::File::open(dir).map_err(StoreError::io("open data directory", dir))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(StoreError::InUse(dir.to_owned())),
        Err(fs::TryLockError::Error(e)) => Err(StoreError::io("lock data directory", dir)(e)),
    }
}

/// Removes a directory and those in it that are empty; files are never removed by it, except
/// an empty database.
fn remove_empty(disk: &dyn Disk, path: &Path) {
    for file in ["database", "journal", "wal", "shm"] {
        let file = path.join(file);
        if disk.metadata(&file).is_ok_and(|m| m.len() == 0) {
            let _ = disk.remove_file(&file);
        }
    }
    // What is not empty stays, and is looked at again at the next start.
    for dir in [path.join("log"), path.join("ltx"), path.to_owned()] {
        let _ = disk.remove_dir(&dir);
    }
}

fn cluster_id_path(dir: &Path) -> PathBuf {
    dir.join("clusterid")
}

fn read_cluster_id(disk: &dyn Disk, dir: &Path) -> Result<Option<String>, StoreError> {
    let path = cluster_id_path(dir);
    match disk.read_to_string(&path) {
        Ok(Some(s)) => {
            let id = s.trim_end().to_owned();
            let valid = id.len() == 20
                && id.starts_with("LFSC")
                && id[4..].bytes().all(|b| b.is_ascii_hexdigit());
            if valid {
                Ok(Some(id))
            } else {
                Err(StoreError::corrupt(
                    &path,
                    "not a cluster ID (LFSC and 16 hex digits)",
                ))
            }
        }
        Ok(None) => Ok(None),
        Err(e) => Err(StoreError::io("read", &path)(e)),
    }
}

fn write_cluster_id(disk: &dyn Disk, dir: &Path, id: &str) -> Result<(), StoreError> {
    let path = cluster_id_path(dir);
    disk.replace(&path, |out| writeln!(out, "{id}"))
        .map_err(StoreError::io("write", &path))
}
