//! What the databases of a node share: its identity, its right to write, who is told of changes,
//! and the two threads that work behind the applications' backs.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use tokio::sync::{Notify, broadcast};

use crate::ltx::Pos;
use crate::thread;

use super::clients::Clients;
use super::database::{Database, FileKind};
use super::disk::{Disk, Pool};
use super::fault::{Action, FaultStats, Place, Refetch};
use super::forward::Primary;
use super::front::Front;
use super::gate::Gate;
use super::index::WRITER_WAIT;
use super::lane::Follower;
use super::lives::Lives;

/// Settings of a store.
#[derive(Clone, Debug)]
pub struct Options {
    /// The data directory.
    pub data_dir: PathBuf,
    /// LZ4 in LTX files.
    pub compress: bool,
    /// How long log records are kept.
    pub retention: Duration,
    /// Compare every page with its checksum after each transaction: for tests.
    pub strict_verify: bool,
    /// Whether databases in WAL mode may be passed through to applications, and their WAL followed.
    pub follow_wal: bool,
    /// The disk that the data directory is on.
    pub disk: Arc<dyn Disk>,
    /// Who does the work that nobody waits for.
    pub background: Background,
    /// Where numbers come from that must be unlike any other's.
    pub random: Random,
}

impl Options {
    /// The defaults, for this data directory.
    pub fn new(data_dir: impl Into<PathBuf>) -> Options {
        Options {
            data_dir: data_dir.into(),
            compress: true,
            retention: Duration::from_secs(600),
            strict_verify: false,
            follow_wal: false,
            disk: Arc::new(Pool::default()),
            background: Background::Threads,
            random: Random::default(),
        }
    }

    /// A log segment older than this is followed by a new one, so that retention can remove it.
    pub(super) fn segment_age(&self) -> Duration {
        (self.retention / 4).max(Duration::from_millis(100))
    }
}

/// Who does the work that nobody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Background {
    /// Two threads of the store's own.
    Threads,
    /// Whoever calls [`Store::run_background`](super::Store::run_background): for simulations,
    /// which must do the same every time.
    Manual,
}

/// Random numbers; clones go on with the same ones.
#[derive(Clone, Debug, Default)]
pub struct Random(Option<Arc<Mutex<StdRng>>>);

impl Random {
    /// Numbers that are the same for the same seed: for simulations.
    pub fn seeded(seed: u64) -> Random {
        Random(Some(Arc::new(Mutex::new(StdRng::seed_from_u64(seed)))))
    }

    /// The next number.
    pub fn next(&self) -> u64 {
        match &self.0 {
            Some(rng) => rng.lock().next_u64(),
            None => rand::random(),
        }
    }
}

/// Something that happened on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A transaction is on disk.
    Tx {
        /// The database.
        db: String,
        /// The position after it.
        pos: Pos,
        /// Bytes of a page.
        page_size: u32,
        /// Pages of the database after it; 0: it was dropped.
        commit: u32,
        /// When it was made, in milliseconds since the Unix epoch.
        timestamp: i64,
    },
    /// Another node is primary now, or this one.
    PrimaryChange {
        /// Whether this node is.
        is_primary: bool,
        /// The primary's host name, if it is another node and known.
        hostname: Option<String>,
    },
    /// Transactions that the primary does not have were set aside, before its snapshot takes the
    /// place of the database.
    Divergent {
        /// The database.
        db: String,
        /// First TXID; 1 if the whole database was kept as a snapshot.
        from: u64,
        /// Last TXID.
        to: u64,
        /// The directory that holds them, as LTX files.
        path: PathBuf,
    },
    /// Stored bytes were not what was written.
    Fault {
        /// The database.
        db: String,
        /// Which of its files.
        place: Place,
        /// Where in it, and what is wrong there.
        what: String,
        /// What was done about it.
        action: Action,
    },
}

/// Events that a reader may fall behind before it is cut off.
pub const EVENT_CAPACITY: usize = 1024;
/// How long a commit that nobody waits for stays unflushed: a single one, and at most, while one
/// follows the other. A flush takes a processor's time, and moves writers from the one that they are on.
const LAZY_FLUSH: Duration = Duration::from_millis(1);
const LAZIEST_FLUSH: Duration = Duration::from_millis(8);

/// Shared by all databases of a node.
pub struct Context {
    /// Settings.
    pub options: Options,
    /// Random, new at every start, never 0.
    pub node_id: u64,
    /// In which lives this node has taken writes.
    pub lives: Lives,
    /// The gate of commits.
    pub gate: Arc<Gate>,
    /// There is a backup, which may need any record of the log that it is not known to have.
    backup: AtomicBool,
    next_ino: AtomicU64,
    front: RwLock<Option<Arc<dyn Front>>>,
    primary: RwLock<Option<Arc<dyn Primary>>>,
    events: broadcast::Sender<Event>,
    subscribers: Mutex<Vec<Weak<Changes>>>,
    jobs: mpsc::Sender<Job>,
    /// The jobs that wait to be run, if no thread does it.
    waiting: Option<Mutex<mpsc::Receiver<Job>>>,
    unflushed: Mutex<Vec<Weak<Database>>>,
    flusher: std::sync::OnceLock<std::thread::Thread>,
    flusher_busy: AtomicBool,
    /// Who has been seen to hold locks.
    pub(super) clients: Clients,
    /// What was looked at for faults, and found.
    pub faults: FaultStats,
    /// Rung when a replica has a database to fetch again.
    pub(super) refetch: Refetch,
    /// Follows the WALs that are passed through.
    pub(super) follower: Follower,
}

/// Work for the keeper thread, which holds no lock of the store while it waits.
pub enum Job {
    /// Bring the WAL index of a database in step with what is committed.
    CheckIndex(Arc<Database>),
    /// Save page checksums and the position, so that the log before it is needed no more.
    Checkpoint(Arc<Database>),
    /// Look at what readers of a database found rotten.
    Mend(Arc<Database>),
    /// Tell the kernel that these names changed.
    InvalidateEntries(Vec<String>),
    /// Tell the kernel that the bytes of this inode changed.
    InvalidateData(u64),
    /// Have the kernel read this part of a database's WAL, of this inode.
    ReadWal(Arc<Database>, u64, Range<u64>),
}

#[derive(Default)]
struct Changes {
    names: Mutex<BTreeSet<String>>,
    notify: Notify,
}

/// The databases whose flushed position, or existence, changed.
pub struct Subscription {
    changes: Arc<Changes>,
}

impl Subscription {
    /// Waits until there is a change, and takes all there are.
    pub async fn changed(&mut self) -> BTreeSet<String> {
        loop {
            let taken = std::mem::take(&mut *self.changes.names.lock());
            if !taken.is_empty() {
                return taken;
            }
            self.changes.notify.notified().await;
        }
    }
}

impl Context {
    /// Starts the two threads, if they are to be; they end when the context is dropped.
    pub fn start(options: Options, lives: Lives) -> Arc<Context> {
        let (jobs, job_queue) = mpsc::channel();
        let (waiting, job_queue) = match options.background {
            Background::Threads => (None, Some(job_queue)),
            Background::Manual => (Some(Mutex::new(job_queue)), None),
        };
        let context = Arc::new(Context {
            node_id: options.random.next().max(1),
            options,
            lives,
            gate: Arc::default(),
            backup: AtomicBool::new(false),
            next_ino: AtomicU64::new(16),
            front: RwLock::new(None),
            primary: RwLock::new(None),
            events: broadcast::Sender::new(EVENT_CAPACITY),
            subscribers: Mutex::new(Vec::new()),
            jobs,
            waiting,
            unflushed: Mutex::new(Vec::new()),
            flusher: std::sync::OnceLock::new(),
            flusher_busy: AtomicBool::new(false),
            clients: Clients::default(),
            faults: FaultStats::default(),
            refetch: Refetch::default(),
            follower: Follower::default(),
        });
        let Some(job_queue) = job_queue else {
            return context;
        };
        spawn("keeper", keeper(Arc::downgrade(&context), job_queue));
        let flusher = spawn("flusher", flusher(Arc::downgrade(&context)));
        if let Some(thread) = flusher {
            let first = context.flusher.set(thread).is_ok();
            assert!(first, "one flusher");
        }
        context
    }

    /// Whether transactions of applications may be committed at this moment.
    pub fn is_writable(&self) -> bool {
        self.gate.is_open()
    }

    /// Whether this node keeps a backup.
    pub fn has_backup(&self) -> bool {
        self.backup.load(Ordering::Acquire)
    }

    /// Says that this node keeps a backup.
    pub fn set_backup(&self) {
        self.backup.store(true, Ordering::Release);
    }

    /// A number that no other file of this node has had.
    pub fn next_ino(&self) -> u64 {
        self.next_ino.fetch_add(1, Ordering::Relaxed)
    }

    /// The mount, while there is one.
    pub fn front(&self) -> Option<Arc<dyn Front>> {
        self.front.read().clone()
    }

    /// Sets or takes away the mount.
    pub fn set_front(&self, front: Option<Arc<dyn Front>>) {
        *self.front.write() = front;
    }

    /// The primary, for replicas that want to write.
    pub fn primary(&self) -> Option<Arc<dyn Primary>> {
        self.primary.read().clone()
    }

    /// Sets how the primary is reached, or takes it away.
    pub fn set_primary(&self, primary: Option<Arc<dyn Primary>>) {
        *self.primary.write() = primary;
    }

    /// Gives work to the keeper.
    pub fn keep(&self, job: Job) {
        // It ends only with the context.
        self.jobs.send(job).ok();
    }

    /// Does on this thread what the two threads would have done by now, if there are none.
    pub fn run_background(&self) {
        let Some(waiting) = &self.waiting else {
            return;
        };
        flush_all(std::mem::take(&mut *self.unflushed.lock()));
        // A job may make others, and is not to be run with the queue locked.
        let next = || waiting.lock().try_recv();
        while let Ok(job) = next() {
            // Nobody else runs: a writer that is waited for would never end.
            run(job, self.front(), Duration::ZERO);
        }
    }

    /// Has the database's log flushed within a few milliseconds.
    pub fn flush_soon(&self, db: &Arc<Database>) {
        self.unflushed.lock().push(Arc::downgrade(db));
        if !self.flusher_busy.swap(true, Ordering::AcqRel)
            && let Some(thread) = self.flusher.get()
        {
            thread.unpark();
        }
    }

    /// Tells listeners and subscribers.
    pub fn publish(&self, event: Event) {
        if let Event::Tx { db, .. } = &event {
            self.note_change(db);
        }
        // Without listeners nobody misses it.
        self.events.send(event).ok();
    }

    /// Tells subscribers that a database changed.
    pub fn note_change(&self, db: &str) {
        self.subscribers.lock().retain(|s| {
            let Some(s) = s.upgrade() else { return false };
            let mut names = s.names.lock();
            if !names.contains(db) {
                names.insert(db.to_owned());
            }
            drop(names);
            s.notify.notify_one();
            true
        });
    }

    /// A new listener.
    pub fn listen(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// A new subscriber.
    pub fn subscribe(&self) -> Subscription {
        let changes = Arc::new(Changes::default());
        self.subscribers.lock().push(Arc::downgrade(&changes));
        Subscription { changes }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Option<std::thread::Thread> {
    match thread::start(name, work) {
        Ok(handle) => Some(handle.thread().clone()),
        Err(e) => panic!("cannot start the {name} thread: {e}"),
    }
}

fn keeper(context: Weak<Context>, jobs: mpsc::Receiver<Job>) -> impl FnOnce() {
    move || {
        loop {
            let job = match jobs.recv_timeout(Duration::from_secs(1)) {
                Ok(job) => job,
                Err(RecvTimeoutError::Timeout) if context.strong_count() > 0 => continue,
                Err(_) => return,
            };
            let front = context.upgrade().and_then(|c| c.front());
            run(job, front, WRITER_WAIT);
        }
    }
}

fn run(job: Job, front: Option<Arc<dyn Front>>, wait: Duration) {
    match (job, front) {
        (Job::CheckIndex(db), _) => db.check_index(wait),
        (Job::Checkpoint(db), _) => db.checkpoint_or_warn(),
        (Job::Mend(db), _) => db.mend_suspects(),
        (Job::InvalidateEntries(names), Some(front)) => {
            names.iter().for_each(|n| front.invalidate_entry(n));
        }
        (Job::InvalidateData(ino), Some(front)) => front.invalidate_data(ino, 0, 0),
        (Job::ReadWal(db, ino, range), Some(front)) => {
            front.read_ahead(ino, &db.mount_name(FileKind::Wal), range);
        }
        (Job::InvalidateEntries(_) | Job::InvalidateData(_) | Job::ReadWal(..), None) => {}
    }
}

fn flush_all(dbs: Vec<Weak<Database>>) {
    let mut dbs: Vec<Arc<Database>> = dbs.iter().filter_map(Weak::upgrade).collect();
    dbs.sort_by(|a, b| a.name().cmp(b.name()));
    dbs.dedup_by(|a, b| Arc::ptr_eq(a, b));
    for db in dbs {
        // A failure is logged by the log, which then takes no more commits.
        db.log().flush(|_| {});
        db.note_flushed(db.log().flushed_txid());
    }
}

fn flusher(context: Weak<Context>) -> impl FnOnce() {
    move || {
        let mut pause = LAZY_FLUSH;
        loop {
            let Some(c) = context.upgrade() else { return };
            let dbs = std::mem::take(&mut *c.unflushed.lock());
            if dbs.is_empty() {
                pause = LAZY_FLUSH;
                c.flusher_busy.store(false, Ordering::Release);
                // Looked at again after the flag is down, so that no wake-up is lost.
                if c.unflushed.lock().is_empty() {
                    drop(c);
                    std::thread::park_timeout(Duration::from_secs(1));
                }
                continue;
            }
            drop(c);
            std::thread::sleep(pause);
            flush_all(dbs);
            pause = (pause * 2).min(LAZIEST_FLUSH);
        }
    }
}
