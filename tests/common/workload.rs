//! Clients that append to a list while nodes fail, and a check of what they were told.
//!
//! Each client tries one node after another. What it does is one transaction: read the list, append
//! a token of its own, commit. A commit that succeeds is acknowledged; one that fails may have
//! happened or not. In the end every acknowledged token is in the list of the surviving history,
//! once, or its transaction was set aside and reported; and whoever was acknowledged had read
//! everything that was acknowledged before it began, unless that was lost later.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags, TransactionBehavior};

/// The database of the list.
pub const DB: &str = "list.db";

/// A transaction that was acknowledged.
#[derive(Clone, Debug)]
pub struct Acked {
    /// What it appended.
    pub token: String,
    /// The node that acknowledged it.
    pub node: usize,
    /// When it began and when its commit returned.
    pub began: Instant,
    /// See `began`.
    pub ended: Instant,
    /// How many tokens it read, and the last one.
    pub read: (usize, Option<String>),
}

/// Clients at work.
pub struct Workload {
    stop: Arc<AtomicBool>,
    acked: Arc<Mutex<Vec<Acked>>>,
    tried: Arc<AtomicU64>,
    clients: Vec<JoinHandle<()>>,
}

/// Makes the list on the primary.
pub fn create(path: &Path, mode: &str) {
    super::sqlite3(
        path,
        &format!(
            "PRAGMA journal_mode={mode}; CREATE TABLE list (n INTEGER PRIMARY KEY, token TEXT);"
        ),
    );
}

impl Workload {
    /// Starts `clients` clients of the nodes with these mounts. The first ones stay with one node
    /// each, as many as there are nodes: whoever waits for a frozen node cannot try another.
    pub fn start(clients: usize, mounts: &[PathBuf]) -> Workload {
        let stop = Arc::new(AtomicBool::new(false));
        let acked = Arc::new(Mutex::new(Vec::new()));
        let tried = Arc::new(AtomicU64::new(0));
        let nodes = mounts.len();
        let client = |id: usize| {
            let mounts = mounts.iter().enumerate();
            let chosen = mounts.filter(|(i, _)| id >= nodes || id == *i);
            let paths: Vec<(usize, PathBuf)> = chosen.map(|(i, m)| (i, m.join(DB))).collect();
            let (stop, acked, tried) = (stop.clone(), acked.clone(), tried.clone());
            std::thread::spawn(move || client(id, &paths, &stop, &acked, &tried))
        };
        Workload {
            clients: (0..clients).map(client).collect(),
            stop,
            acked,
            tried,
        }
    }

    /// How many transactions have been acknowledged so far.
    pub fn acked(&self) -> usize {
        self.acked.lock().expect("not poisoned").len()
    }

    /// The last one that was acknowledged by each node.
    pub fn last_by_node(&self) -> BTreeMap<usize, Instant> {
        let acked = self.acked.lock().expect("not poisoned");
        acked.iter().map(|a| (a.node, a.ended)).collect()
    }

    /// Waits for `n` further acknowledged transactions.
    pub fn wait_for(&self, n: usize, limit: Duration) {
        let target = self.acked() + n;
        super::wait_until(&format!("{n} acknowledged transactions"), limit, || {
            let now = self.acked();
            if now >= target { Ok(()) } else { Err(now) }
        });
    }

    /// Ends the clients; what was acknowledged, in the order of the answers.
    pub fn stop(self) -> Vec<Acked> {
        self.stop.store(true, Ordering::SeqCst);
        for client in self.clients {
            client.join().expect("a client");
        }
        let mut acked = std::mem::take(&mut *self.acked.lock().expect("not poisoned"));
        acked.sort_by_key(|a| a.ended);
        println!(
            "{} transactions tried, {} acknowledged",
            self.tried.load(Ordering::SeqCst),
            acked.len()
        );
        acked
    }
}

fn client(
    id: usize,
    paths: &[(usize, PathBuf)],
    stop: &AtomicBool,
    acked: &Mutex<Vec<Acked>>,
    tried: &AtomicU64,
) {
    let mut node = id % paths.len();
    let mut connection = None;
    for n in 0.. {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        tried.fetch_add(1, Ordering::SeqCst);
        let token = format!("<token-{id}-{n}>");
        let began = Instant::now();
        let (number, path) = &paths[node];
        match append(&mut connection, path, &token) {
            Ok(read) => {
                let ended = Instant::now();
                acked.lock().expect("not poisoned").push(Acked {
                    token,
                    node: *number,
                    began,
                    ended,
                    read,
                });
            }
            Err(_) => {
                // As an application does that was told "readonly": another node, a new connection.
                connection = None;
                node = (node + 1) % paths.len();
                std::thread::sleep(Duration::from_millis(3));
            }
        }
    }
}

fn append(
    connection: &mut Option<Connection>,
    path: &Path,
    token: &str,
) -> rusqlite::Result<(usize, Option<String>)> {
    let connection = match connection {
        Some(connection) => connection,
        None => {
            // Never made here: a database that is not there yet is another's to make.
            let opened = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
            opened.busy_timeout(Duration::from_secs(2))?;
            opened.pragma_update(None, "synchronous", "FULL")?;
            connection.insert(opened)
        }
    };
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let count: u32 = transaction.query_row("SELECT count(*) FROM list", [], |r| r.get(0))?;
    let last = "SELECT max(token) FROM list WHERE n = (SELECT max(n) FROM list)";
    let last = transaction.query_row(last, [], |r| r.get(0))?;
    transaction.execute("INSERT INTO list (token) VALUES (?1)", [token])?;
    transaction.commit()?;
    Ok((count as usize, last))
}

/// What became of what was acknowledged.
#[derive(Debug, Default)]
pub struct Outcome {
    /// How many are in the list.
    pub kept: usize,
    /// How many were set aside and reported.
    pub set_aside: usize,
}

/// Checks what was acknowledged against the list as it is in the end in `database`, and against what
/// the nodes with these data directories have set aside. Panics with everything that is wrong.
pub fn check(acked: &[Acked], database: &Path, data: &[PathBuf]) -> Outcome {
    let list = super::sqlite3(database, "SELECT token FROM list ORDER BY n;");
    let list: Vec<&str> = list.lines().collect();
    let place: BTreeMap<&str, usize> = list.iter().enumerate().map(|(i, t)| (*t, i)).collect();
    let mut wrong = String::new();
    if place.len() != list.len() {
        let _ = writeln!(wrong, "tokens are in the list twice");
    }
    let set_aside: BTreeSet<String> = data.iter().flat_map(|d| divergent_tokens(d)).collect();
    let mut lost = BTreeSet::new();
    for a in acked
        .iter()
        .filter(|a| !place.contains_key(a.token.as_str()))
    {
        if !set_aside.contains(&a.token) {
            let _ = writeln!(
                wrong,
                "{} of node {} is lost without a word",
                a.token, a.node
            );
        }
        lost.insert(a.token.as_str());
    }
    for a in acked.iter().filter(|a| !lost.contains(a.token.as_str())) {
        check_read(a, acked, &list, &place, &lost, &mut wrong);
    }
    // What was lost had been acknowledged before any other node acknowledged something that lasts.
    for l in acked.iter().filter(|a| lost.contains(a.token.as_str())) {
        let earlier = acked.iter().find(|a| {
            a.node != l.node && !lost.contains(a.token.as_str()) && {
                let later_term = place[a.token.as_str()] >= l.read.0;
                later_term && a.ended < l.began
            }
        });
        if let Some(a) = earlier {
            let _ = writeln!(
                wrong,
                "two primaries: node {} acknowledged {} before node {} began {}, which is lost",
                a.node, a.token, l.node, l.token
            );
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    Outcome {
        kept: acked.len() - lost.len(),
        set_aside: lost.len(),
    }
}

/// Whether a transaction that lasts had read exactly what comes before it in the list: then it had
/// read everything that was acknowledged before, and nothing stale.
fn check_read(
    a: &Acked,
    acked: &[Acked],
    list: &[&str],
    place: &BTreeMap<&str, usize>,
    lost: &BTreeSet<&str>,
    wrong: &mut String,
) {
    let at = place[a.token.as_str()];
    let before = at.checked_sub(1).map(|i| list[i]);
    if (at, before) != (a.read.0, a.read.1.as_deref()) {
        let _ = writeln!(
            wrong,
            "{} is number {at} in the list after {before:?}, but it had read {:?}",
            a.token, a.read
        );
    }
    let missed = acked.iter().find(|b| {
        b.ended < a.began && !lost.contains(b.token.as_str()) && place[b.token.as_str()] > at
    });
    if let Some(b) = missed {
        let _ = writeln!(
            wrong,
            "{} was acknowledged before {} began, and comes after it",
            b.token, a.token
        );
    }
}

/// The tokens in the transactions that a node has set aside, which are to be uncompressed.
fn divergent_tokens(data: &Path) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut directories = vec![data.join("divergent")];
    while let Some(directory) = directories.pop() {
        let Ok(entries) = std::fs::read_dir(&directory) else {
            continue;
        };
        for entry in entries {
            let path = entry.expect("read the directory").path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let bytes = std::fs::read(&path).expect("read what was set aside");
            let text = String::from_utf8_lossy(&bytes);
            let begins = text.split("<token-").skip(1);
            tokens.extend(begins.filter_map(|t| Some(format!("<token-{}>", t.split_once('>')?.0))));
        }
    }
    tokens
}
