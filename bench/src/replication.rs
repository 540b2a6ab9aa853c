//! How long a commit takes to be visible at a replica, and how many commits a second it follows.
//!
//! Delay: from the return of the commit on the primary to the first read at the replica that sees
//! it. The replica's reader asks without a pause, which costs one CPU: on a machine with few of
//! them the figure is an upper bound. A negative delay means that the reader had the row before
//! the writer had its answer. In the rollback modes a reader finds the database locked while a
//! transaction is applied; this one tries again at once.
//!
//! Rate: inserts as fast as they go for a while; the clock stops when the replica has the last.

use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};

use crate::Result;
use crate::cases::{self, Mode};
use crate::measure::{median, number, quantile};

/// Commits whose delay is measured, a mode.
const COMMITS: i64 = 300;
/// Between two of them, so that each is measured alone.
const PAUSE: Duration = Duration::from_millis(5);
/// What a replica may take for one commit before the measurement fails.
const DEADLINE: Duration = Duration::from_secs(20);

/// Measures both kinds of journal, and prints a Markdown table.
pub fn run(primary: &Path, replica: &Path, seconds: f64) -> Result<()> {
    println!(
        "\n| replication | delay, median ms | p99 ms | max ms | commits/s, primary | commits/s, replica | behind at the end, ms |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    for mode in [Mode::Delete, Mode::Wal] {
        let name = format!("bench-replication-{mode}.db");
        let path = primary.join(&name);
        // Left over from an earlier run.
        let _ = std::fs::remove_file(&path);
        let writer = cases::open(&path, mode, true)?;
        writer.execute_batch("CREATE TABLE t (id INTEGER PRIMARY KEY, payload BLOB)")?;
        let replica = replica.join(&name);
        let delays = delays(&writer, &replica)?;
        let rate = rate(&writer, &replica, Duration::from_secs_f64(seconds * 5.0))?;
        drop(writer);
        std::fs::remove_file(&path)?;
        println!(
            "| {mode}, full | {:.2} | {:.2} | {:.2} | {} | {} | {:.1} |",
            median(&delays),
            quantile(&delays, 0.99),
            quantile(&delays, 1.0),
            number(rate.primary),
            number(rate.replica),
            rate.behind.as_secs_f64() * 1e3,
        );
    }
    Ok(())
}

/// Tries again without the pause that SQLite's own handler makes, which is a millisecond at least:
/// what is measured is when the row can be read. Gives up after about [`DEADLINE`].
fn at_once(tries: i32) -> bool {
    std::thread::yield_now();
    tries < 50_000_000
}

/// Opens the replica's database once it is there and has the table.
fn open_replica(path: &Path) -> Result<Connection> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let opened = Connection::open_with_flags(path, flags).and_then(|mut db| {
            db.busy_handler(Some(at_once))?;
            db.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0))?;
            Ok(db)
        });
        match opened {
            Ok(db) => return Ok(db),
            Err(e) if Instant::now() > deadline => {
                return Err(format!("open {} on the replica: {e}", path.display()).into());
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Reports the moment at which each row from 1 to `last` is first seen at the replica.
fn watch(path: &Path, last: i64, seen: &mpsc::Sender<(i64, Instant)>) -> Result<()> {
    let db = open_replica(path)?;
    let mut statement = db.prepare("SELECT coalesce(max(id), 0) FROM t")?;
    let mut known = 0;
    let mut moved = Instant::now();
    // The receiver's first sign that the reader reads.
    seen.send((0, moved))?;
    while known < last {
        let newest: i64 = statement.query_row([], |row| row.get(0))?;
        let now = Instant::now();
        if newest > known {
            for id in known + 1..=newest {
                seen.send((id, now))?;
            }
            known = newest;
            moved = now;
        } else if now - moved > DEADLINE {
            return Err(format!("the replica stays at row {known} of {last}").into());
        }
    }
    Ok(())
}

fn joined(reader: std::thread::JoinHandle<Result<()>>) -> Result<()> {
    reader.join().map_err(|_| "the replica's reader panicked")?
}

/// The delay of each commit, in milliseconds.
pub fn delays(writer: &Connection, replica: &Path) -> Result<Vec<f64>> {
    let (sender, seen) = mpsc::channel();
    let path = replica.to_path_buf();
    let reader = std::thread::spawn(move || watch(&path, COMMITS, &sender));
    let mut returned = Vec::new();
    let mut insert = writer.prepare("INSERT INTO t (id, payload) VALUES (?1, zeroblob(100))")?;
    if seen.recv_timeout(DEADLINE).is_ok() {
        for id in 1..=COMMITS {
            insert.execute([id])?;
            returned.push(Instant::now());
            std::thread::sleep(PAUSE);
        }
    }
    joined(reader)?;
    let signed_ms = |to: Instant, from: Instant| match to.checked_duration_since(from) {
        Some(after) => after.as_secs_f64() * 1e3,
        None => -(from.duration_since(to).as_secs_f64() * 1e3),
    };
    Ok(seen
        .iter()
        .filter(|(id, _)| *id > 0)
        .map(|(id, at)| signed_ms(at, returned[id as usize - 1]))
        .collect())
}

struct Sustained {
    /// Commits a second on the primary while it wrote.
    primary: f64,
    /// Commits a second until the replica had the last of them.
    replica: f64,
    /// How long after the last commit the replica had it.
    behind: Duration,
}

/// Writes without a pause for `time`. Nobody reads meanwhile: the reader comes when it is over.
fn rate(writer: &Connection, replica: &Path, time: Duration) -> Result<Sustained> {
    let mut insert = writer.prepare("INSERT INTO t (payload) VALUES (zeroblob(100))")?;
    let begin = Instant::now();
    let mut commits = 0.0;
    while begin.elapsed() < time {
        insert.execute([])?;
        commits += 1.0;
    }
    let written = Instant::now();
    let last = writer.last_insert_rowid();
    let (sender, seen) = mpsc::channel();
    watch(replica, last, &sender)?;
    drop(sender);
    let arrived = seen.iter().last().ok_or("nothing was seen")?.1;
    Ok(Sustained {
        primary: commits / (written - begin).as_secs_f64(),
        replica: commits / (arrived - begin).as_secs_f64(),
        behind: arrived - written,
    })
}
