//! Whole nodes for tests: the real program, real mounts, real SQLite in processes of its own.
//!
//! What every test can rely on:
//! - Nothing is left behind. A [`Cluster`] owns the directory, the processes and the mounts of one
//!   test; at its end, after a panic as well, all of them are gone.
//! - Nothing hangs. A cluster has a time limit; when it is over, the node processes are killed and
//!   their mounts aborted and detached, which frees whoever waits for them, the test included, and
//!   a test that goes on all the same is ended with its process.
//! - Tests run side by side: each has ports and directories of its own.
//! - A mount point is never asked whether it is there: the kernel's list of mounts is.

// Each test program uses a part of this module.
#![allow(dead_code)]

pub mod access;
pub mod disk;
pub mod events;
pub mod h2;
pub mod helper;
pub mod image;
pub mod net;
pub mod node;
pub mod run;
pub mod service;
pub mod sql;
pub mod workload;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tempfile::TempDir;

pub use node::{Node, Options};
pub use sql::sqlite3;

/// How long a node or a replica may take for something that takes milliseconds when all is well.
/// Generous: tests share two CPUs with each other.
pub const SOON: Duration = Duration::from_secs(30);

/// The directory, the processes and the mounts of one test.
pub struct Cluster {
    // Dropped in this order: the watch ends, then the directory goes.
    _watch: Watch,
    members: Members,
    dir: TempDir,
}

/// The process ID and the directory of each node that may run; shared with the watching thread.
type Members = Arc<Mutex<Vec<(i32, PathBuf)>>>;

impl Cluster {
    /// An empty cluster whose test may take `limit_secs`.
    pub fn new(limit_secs: u64) -> Cluster {
        let dir = tempfile::Builder::new()
            .prefix("node-")
            .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
            .expect("make a directory for the test");
        let members = Members::default();
        let path = dir.path().to_path_buf();
        Cluster {
            _watch: Watch::start(limit_secs, members.clone(), path),
            members,
            dir,
        }
    }

    /// A directory for what the test itself makes.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A subdirectory of the test's directory; made if it is missing.
    pub fn subdir(&self, name: &str) -> PathBuf {
        let dir = self.dir().join(name);
        std::fs::create_dir_all(&dir).expect("make a directory");
        dir
    }

    /// Starts a node and waits until it is mounted and answers.
    pub fn start(&self, options: Options) -> Node {
        let mut node = self.node(options);
        node.start();
        node
    }

    /// A node that is not started yet.
    pub fn node(&self, options: Options) -> Node {
        Node::new(&self.subdir(&options.name.clone()), options, &self.members)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Nodes clean up themselves; this is for a test that leaked one (`mem::forget`, abort).
        end_members(&self.members);
        node::detach_below(self.dir.path());
    }
}

/// A primary and a replica of it.
pub struct Pair {
    // Dropped in this order: a replica that outlives its primary would only log its loss.
    /// The replica.
    pub replica: Node,
    /// The primary.
    pub primary: Node,
    /// What owns them.
    pub cluster: Cluster,
}

impl Cluster {
    /// A static primary and one replica, both ready; the test may take `limit_secs`.
    pub fn static_pair(limit_secs: u64) -> Pair {
        Self::static_pair_with(limit_secs, |options| options)
    }

    /// As [`Cluster::static_pair`], with options changed by `change` on both nodes.
    pub fn static_pair_with(limit_secs: u64, change: impl Fn(Options) -> Options) -> Pair {
        let cluster = Cluster::new(limit_secs);
        let options = change(Options::primary("primary"));
        let replica_options = change(Options::replica("replica", &options));
        let primary = cluster.start(options);
        let replica = cluster.start(replica_options);
        Pair {
            replica,
            primary,
            cluster,
        }
    }
}

impl Pair {
    /// Waits until both have the same position of `db`, and checks that they have the same bytes.
    pub fn assert_same(&self, db: &str) {
        assert_same(&self.primary, &self.replica, db);
    }
}

/// Waits until `done` is true; panics with `what` and the last state when it takes too long.
pub fn wait_until<T: std::fmt::Debug>(
    what: &str,
    limit: Duration,
    mut state: impl FnMut() -> Result<(), T>,
) {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        match state() {
            Ok(()) => return,
            Err(last) if Instant::now() > deadline => {
                panic!("waited {limit:?} for {what}; the last that was seen: {last:?}")
            }
            Err(_) => std::thread::sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Waits until a node says that it is primary; how long it took.
pub fn await_primary(node: &Node, limit: Duration) -> Duration {
    let start = Instant::now();
    let what = format!("{} to be primary", node.options.name);
    wait_until(&what, limit, || match node.is_primary() {
        true => Ok(()),
        false => Err("not primary"),
    });
    start.elapsed()
}

/// Waits until a node says that it follows `primary`.
pub fn await_following(node: &Node, primary: &Node) {
    let want = format!("{}\n", primary.options.name);
    let what = format!("{} to follow {}", node.options.name, primary.options.name);
    wait_until(&what, SOON, || {
        match std::fs::read_to_string(node.db(".primary")) {
            Ok(name) if name == want => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

/// Waits until the replica's `X-pos` says what the primary's says; that position.
pub fn wait_same_pos(primary: &Node, replica: &Node, db: &str) -> String {
    let mut pos = String::new();
    wait_until(
        &format!("the position of {db} at the replica"),
        SOON,
        || {
            let (want, have) = (primary.pos(db), replica.pos(db));
            match (&want, &have) {
                (Some(w), Some(h)) if w == h => {
                    pos.clone_from(w);
                    Ok(())
                }
                _ => Err(format!("primary {want:?}, replica {have:?}")),
            }
        },
    );
    pos
}

/// Waits for the same position on both nodes, then checks what it stands for: the database's
/// image (file and committed WAL frames) is the same on both, has the position's checksum, passes
/// SQLite's integrity check, and dumps to the same text.
pub fn assert_same(primary: &Node, replica: &Node, db: &str) {
    let pos = wait_same_pos(primary, replica, db);
    let mut images = Vec::new();
    for node in [primary, replica] {
        let name = &node.options.name;
        assert_eq!(
            sqlite3(&node.db(db), "PRAGMA integrity_check;"),
            "ok\n",
            "integrity of {db} on the {name} at {pos}"
        );
        let image = image::read(node, db);
        assert_eq!(
            pos.split_once('/').map(|(_, sum)| sum.to_string()),
            Some(format!("{:016x}", image.checksum())),
            "checksum of the bytes of {db} on the {name} at {pos}"
        );
        images.push((image, sqlite3(&node.db(db), ".dump")));
    }
    let (a, b) = (&images[0], &images[1]);
    image::assert_equal(&a.0, &b.0, db);
    assert_eq!(a.1, b.1, "dump of {db} at {pos}");
    assert_eq!(
        primary.pos(db).as_deref(),
        Some(&*pos),
        "reading moved {db}"
    );
}

fn end_members(members: &Members) {
    let members = members.lock().unwrap_or_else(PoisonError::into_inner);
    for (pid, dir) in members.iter() {
        eprintln!("killing node {pid}");
        // SAFETY: takes numbers only. The process is this one's child and was not waited for: a
        // node leaves the list before it waits, so the ID is its own.
        unsafe { libc::kill(*pid, libc::SIGKILL) };
        node::detach_below(dir);
    }
}

/// The thread that ends a test which takes too long.
struct Watch {
    over: Arc<(Mutex<bool>, Condvar)>,
    expired: Arc<AtomicBool>,
}

impl Watch {
    fn start(limit_secs: u64, members: Members, dir: PathBuf) -> Watch {
        let over = Arc::new((Mutex::new(false), Condvar::new()));
        let expired = Arc::new(AtomicBool::new(false));
        let test = std::thread::current()
            .name()
            .unwrap_or("a test")
            .to_string();
        let (seen, flag) = (over.clone(), expired.clone());
        std::thread::spawn(move || {
            let is_over = |limit| {
                let guard = seen.0.lock().unwrap_or_else(PoisonError::into_inner);
                let (guard, _) = seen
                    .1
                    .wait_timeout_while(guard, limit, |over| !*over)
                    .unwrap_or_else(PoisonError::into_inner);
                *guard
            };
            if is_over(Duration::from_secs(limit_secs)) {
                return;
            }
            flag.store(true, Ordering::SeqCst);
            eprintln!("{test} is not done after {limit_secs} s: ending its nodes");
            print_logs(&dir);
            end_members(&members);
            node::detach_below(&dir);
            if !is_over(Duration::from_secs(30)) {
                eprintln!("{test} goes on without its nodes: ending the process");
                std::process::exit(101);
            }
        });
        Watch { over, expired }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        *self.over.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.over.1.notify_all();
        if self.expired.load(Ordering::SeqCst) && !std::thread::panicking() {
            panic!("the test's time limit was over, see above");
        }
    }
}

fn print_logs(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        node::print_log(&entry.path().join("log"));
    }
}
