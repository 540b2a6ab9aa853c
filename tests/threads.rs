//! How the node's threads are scheduled under load.

mod common;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Cluster, Node, Options, SOON, sqlite3, wait_until};
use rusqlite::Connection;

/// How long requests are made, at the most, until the node's thread is with its client.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, PartialEq)]
struct Scheduled {
    name: String,
    class: i32,
    processors: String,
}

/// How this thread of the node is scheduled; `None`: it has ended.
fn scheduled(task: &Path) -> Option<Scheduled> {
    let stat = fs::read_to_string(task.join("stat")).ok()?;
    let status = fs::read_to_string(task.join("status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name));
        line.map(|l| l.trim().to_owned())
    };
    // The 41st field of stat, of which the second may hold anything (proc_pid_stat(5)).
    let class = stat.rsplit_once(')')?.1.split_whitespace().nth(38)?;
    Some(Scheduled {
        name: field("Name:")?,
        class: class.parse().ok()?,
        processors: field("Cpus_allowed:")?,
    })
}

/// The threads of a node that are not scheduled as its first one is.
fn unusual(node: &Node) -> Vec<Scheduled> {
    let tasks = format!("/proc/{0}/task", node.pid());
    let first = scheduled(&Path::new(&tasks).join(node.pid().to_string())).expect("it runs");
    let all = fs::read_dir(tasks).expect("its threads").flatten();
    all.filter_map(|task| scheduled(&task.path()))
        .filter(|t| (t.class, &t.processors) != (first.class, &first.processors))
        .collect()
}

/// While one client makes a run of requests, the thread that serves it stays with it, in SCHED_IDLE.
/// What that thread starts meanwhile is not so for ever.
#[test]
fn a_thread_that_is_started_under_load_is_as_all_others() {
    let cluster = Cluster::new(180);
    let node = cluster.start(Options {
        tail: true,
        ..Options::primary("primary")
    });
    sqlite3(&node.db("run.db"), "CREATE TABLE t (a)");
    sqlite3(
        &node.db("wal.db"),
        "PRAGMA journal_mode=wal; CREATE TABLE t (a)",
    );
    let copied = cluster.dir().join("copied.db");
    sqlite3(&copied, "CREATE TABLE t (a)");
    assert_eq!(unusual(&node), []);

    let position = node.db("run.db-pos");
    let run = || {
        for _ in 0..200 {
            // Requests of which none waits for a disk.
            fs::metadata(&position).expect("its position");
        }
    };
    let seen = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let deadline = Instant::now() + PATIENCE;
            while !seen.load(Ordering::SeqCst) && Instant::now() < deadline {
                seen.store(!unusual(&node).is_empty(), Ordering::SeqCst);
            }
        });
        while !sampler.is_finished() {
            run();
        }
    });
    assert!(
        seen.load(Ordering::SeqCst),
        "no thread was ever with its client"
    );
    run();
    // The first one that is passed through: somebody has to follow its WAL from now on.
    let wal = Connection::open(node.db("wal.db")).expect("open");
    wal.query_row("SELECT count(*) FROM t", [], |_| Ok(()))
        .expect("read");
    run();
    fs::copy(&copied, node.db("copied.db")).expect("copy");
    run();
    fs::remove_file(node.db("copied.db")).expect("remove");
    run();

    let under_load = unusual(&node);
    assert!(under_load.len() <= 1, "{under_load:?}");
    wait_until("threads scheduled as ever", SOON, || match unusual(&node) {
        none if none.is_empty() => Ok(()),
        some => Err(some),
    });
}
