//! The work that is measured: what each case prepares, and what one round of it does.
//!
//! A case has one database a side, named after the case. Connections are opened anew in every
//! round with SQLite's default cache, so that both sides begin alike.

use std::fmt;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rusqlite::{Connection, params};

use crate::worker::{self, Role};
use crate::{Result, machine};

/// Rows of the table that point reads read, about 150 bytes each.
pub const POINT_ROWS: i64 = 100_000;
/// Rows of the one big transaction.
const BULK_ROWS: i64 = 100_000;
/// Processes that read beside the one that writes.
const READERS: usize = 4;
/// Databases that are written at once.
const WRITERS: usize = 8;
const MAKE_TABLE: &str = "CREATE TABLE t (id INTEGER PRIMARY KEY, payload BLOB)";
/// Bytes of a row of the table that is scanned.
const SCAN_ROW_BYTES: u64 = 980;

/// What the command line says about all cases.
pub struct Settings {
    /// Length of a round of the cases that are bounded by time, in seconds.
    pub seconds: f64,
    /// Size of the scanned database, in bytes.
    pub scan_bytes: u64,
}

/// What one round yields: an amount of work a second.
pub struct Rate {
    /// Follows the case's name when a case has several rates.
    pub suffix: &'static str,
    /// What is counted.
    pub unit: &'static str,
    /// How much of it a second.
    pub per_second: f64,
}

/// `PRAGMA journal_mode`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The journal is unlinked at commit.
    Delete,
    /// The journal is cut to nothing at commit.
    Truncate,
    /// The journal's header is zeroed at commit.
    Persist,
    /// Write-ahead log.
    Wal,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mode::Delete => "delete",
            Mode::Truncate => "truncate",
            Mode::Persist => "persist",
            Mode::Wal => "wal",
        })
    }
}

/// One thing that is measured.
#[derive(Clone, Copy)]
pub enum Case {
    /// Single-row inserts, each a transaction; `full`: `synchronous=FULL`, else NORMAL.
    Insert { mode: Mode, full: bool },
    /// One transaction of 100,000 rows.
    Bulk { mode: Mode },
    /// Reads of one row by its key; all of a round in one transaction, or each in its own.
    Points { mode: Mode, one_transaction: bool },
    /// The same, each its own, with the database mapped into memory.
    Mapped { mode: Mode },
    /// One transaction that reads a row of every page, in random order, from cold caches.
    FirstTouch { mode: Mode },
    /// A full scan of a large table, with all caches warm or all of them dropped.
    Scan { cold: bool },
    /// Four processes that read while a fifth writes.
    Mixed { mode: Mode },
    /// Eight processes that each insert into a database of its own, `synchronous=FULL`.
    Several { mode: Mode },
}

/// All cases, in the order of the table.
pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for mode in [Mode::Delete, Mode::Truncate, Mode::Persist, Mode::Wal] {
        for full in [false, true] {
            cases.push(Case::Insert { mode, full });
        }
    }
    let modes = [Mode::Delete, Mode::Wal];
    cases.extend(modes.map(|mode| Case::Bulk { mode }));
    for one_transaction in [false, true] {
        cases.extend(modes.map(|mode| Case::Points {
            mode,
            one_transaction,
        }));
    }
    cases.extend(modes.map(|mode| Case::Mapped { mode }));
    cases.extend(modes.map(|mode| Case::FirstTouch { mode }));
    cases.extend([false, true].map(|cold| Case::Scan { cold }));
    cases.extend(modes.map(|mode| Case::Mixed { mode }));
    cases.extend(modes.map(|mode| Case::Several { mode }));
    cases
}

impl Case {
    /// The name that `--only` takes and the table shows.
    pub fn name(&self) -> String {
        match self {
            Case::Insert { mode, full } => {
                format!("insert-{mode}-{}", if *full { "full" } else { "normal" })
            }
            Case::Bulk { mode } => format!("bulk-{mode}"),
            Case::Points {
                mode,
                one_transaction,
            } => {
                let how = if *one_transaction { "many" } else { "own" };
                format!("points-{how}-{mode}")
            }
            Case::Scan { cold } => format!("scan-{}", if *cold { "cold" } else { "warm" }),
            Case::Mixed { mode } => format!("mixed-{mode}"),
            Case::Mapped { mode } => format!("points-mapped-{mode}"),
            Case::FirstTouch { mode } => format!("first-touch-{mode}"),
            Case::Several { mode } => format!("several-{mode}"),
        }
    }

    /// One line for `--list`.
    pub fn description(&self) -> &'static str {
        match self {
            Case::Insert { .. } => "single-row inserts, each a transaction",
            Case::Bulk { .. } => "one transaction of 100,000 rows",
            Case::Points {
                one_transaction: false,
                ..
            } => "reads by key, each a transaction",
            Case::Points { .. } => "reads by key, all in one transaction",
            Case::Scan { .. } => "full scan of a large table",
            Case::Mapped { .. } => "reads by key, each a transaction, with mmap_size",
            Case::FirstTouch { .. } => {
                "a row of every page, all in one transaction, from cold caches"
            }
            Case::Mixed { .. } => "4 reading processes beside 1 writing",
            Case::Several { .. } => "8 processes, each inserting into its own database",
        }
    }

    fn database(&self, dir: &Path) -> PathBuf {
        dir.join(format!("bench-{}.db", self.name()))
    }

    fn databases(&self, dir: &Path) -> Vec<PathBuf> {
        match self {
            Case::Several { .. } => (0..WRITERS)
                .map(|i| dir.join(format!("bench-{}-{i}.db", self.name())))
                .collect(),
            _ => vec![self.database(dir)],
        }
    }

    /// Makes the database that the rounds work on.
    pub fn prepare(&self, dir: &Path, settings: &Settings) -> Result<()> {
        self.clean(dir)?;
        let path = self.database(dir);
        match *self {
            Case::Insert { mode, full } => {
                let db = open(&path, mode, full)?;
                db.execute_batch(MAKE_TABLE)?;
            }
            Case::Bulk { mode } => {
                open(&path, mode, true)?;
            }
            Case::Points { mode, .. }
            | Case::Mapped { mode }
            | Case::FirstTouch { mode }
            | Case::Mixed { mode } => make_point_table(&path, mode)?,
            Case::Several { mode } => {
                for path in self.databases(dir) {
                    open(&path, mode, true)?.execute_batch(MAKE_TABLE)?;
                }
            }
            Case::Scan { .. } => make_scan_table(&path, settings.scan_bytes)?,
        }
        Ok(())
    }

    /// Removes the database and what SQLite keeps beside it.
    pub fn clean(&self, dir: &Path) -> Result<()> {
        self.databases(dir).iter().try_for_each(|path| remove(path))
    }

    /// One round: does the work once and says how fast it went.
    pub fn run(&self, dir: &Path, settings: &Settings, seed: u64) -> Result<Vec<Rate>> {
        let path = self.database(dir);
        let time = Duration::from_secs_f64(settings.seconds);
        let (unit, per_second) = match *self {
            Case::Insert { mode, full } => ("commits/s", insert(&path, mode, full, time)?),
            Case::Bulk { mode } => ("rows/s", bulk(&path, mode)?),
            Case::Points {
                mode,
                one_transaction,
            } => ("reads/s", points(&path, mode, one_transaction, time, seed)?),
            Case::Mapped { mode } => ("reads/s", mapped(&path, mode, time, seed)?),
            Case::FirstTouch { mode } => ("reads/s", first_touch(&path, mode, seed)?),
            Case::Scan { cold } => ("MB/s", scan(&path, cold)?),
            Case::Mixed { mode } => return mixed(&path, mode, time),
            Case::Several { mode } => {
                let paths = self.databases(dir);
                let jobs: Vec<_> = paths
                    .iter()
                    .map(|path| (&**path, Role::WriteFull))
                    .collect();
                let counts = worker::run_all(&jobs, mode, time)?;
                let sum = counts.iter().sum::<u64>() as f64;
                ("commits/s", sum / time.as_secs_f64())
            }
        };
        Ok(vec![Rate {
            suffix: "",
            unit,
            per_second,
        }])
    }
}

/// Opens a database in a journal mode; a mode that does not take is an error.
pub fn open(path: &Path, mode: Mode, full: bool) -> Result<Connection> {
    let db = Connection::open(path).map_err(|e| format!("open {}: {e}", path.display()))?;
    db.busy_timeout(Duration::from_secs(20))?;
    let got: String = db
        .query_row(&format!("PRAGMA journal_mode={mode}"), [], |row| row.get(0))
        .map_err(|e| format!("journal mode {mode} of {}: {e}", path.display()))?;
    if got != mode.to_string() {
        return Err(format!("{} stays in journal mode {got}, not {mode}", path.display()).into());
    }
    db.pragma_update(None, "synchronous", if full { "FULL" } else { "NORMAL" })?;
    Ok(db)
}

/// Makes the table of the point reads: 100,000 rows, about 16 MB.
pub fn make_point_table(path: &Path, mode: Mode) -> Result<()> {
    let db = open(path, mode, false)?;
    db.execute_batch(MAKE_TABLE)?;
    db.execute(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < ?1)
         INSERT INTO t SELECT i, randomblob(140) FROM n",
        [POINT_ROWS],
    )?;
    checkpoint(&db, mode)
}

/// Makes the table of the scans in transactions of about 10 MB.
fn make_scan_table(path: &Path, bytes: u64) -> Result<()> {
    let db = open(path, Mode::Wal, false)?;
    db.execute_batch(MAKE_TABLE)?;
    let rows = bytes / (SCAN_ROW_BYTES + 20);
    let mut first = 0;
    while first < rows {
        let last = (first + 10_000).min(rows);
        db.execute(
            "WITH RECURSIVE n(i) AS (SELECT ?1 + 1 UNION ALL SELECT i+1 FROM n WHERE i < ?2)
             INSERT INTO t SELECT i, randomblob(?3) FROM n",
            params![first as i64, last as i64, SCAN_ROW_BYTES as i64],
        )?;
        first = last;
    }
    checkpoint(&db, Mode::Wal)
}

fn checkpoint(db: &Connection, mode: Mode) -> Result<()> {
    if mode == Mode::Wal {
        db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
    }
    Ok(())
}

fn insert(path: &Path, mode: Mode, full: bool, time: Duration) -> Result<f64> {
    let db = open(path, mode, full)?;
    let mut statement = db.prepare("INSERT INTO t (payload) VALUES (?1)")?;
    let payload = [0xa5_u8; 100];
    let begin = Instant::now();
    let mut commits = 0;
    while begin.elapsed() < time {
        statement.execute([&payload[..]])?;
        commits += 1;
    }
    Ok(f64::from(commits) / begin.elapsed().as_secs_f64())
}

fn bulk(path: &Path, mode: Mode) -> Result<f64> {
    let db = open(path, mode, true)?;
    db.execute_batch(
        "DROP TABLE IF EXISTS t; CREATE TABLE t (id INTEGER PRIMARY KEY, payload BLOB)",
    )?;
    let payload = [0x5a_u8; 100];
    let begin = Instant::now();
    db.execute_batch("BEGIN IMMEDIATE")?;
    let mut statement = db.prepare("INSERT INTO t (id, payload) VALUES (?1, ?2)")?;
    for id in 0..BULK_ROWS {
        statement.execute(params![id, &payload[..]])?;
    }
    db.execute_batch("COMMIT")?;
    Ok(BULK_ROWS as f64 / begin.elapsed().as_secs_f64())
}

/// Removes a database and what SQLite keeps beside it.
fn remove(path: &Path) -> Result<()> {
    for suffix in ["-journal", "-wal", "-shm", ""] {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        match std::fs::remove_file(&name) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(format!("remove {}: {e}", Path::new(&name).display()).into());
            }
            _ => {}
        }
    }
    Ok(())
}

fn mapped(path: &Path, mode: Mode, time: Duration, seed: u64) -> Result<f64> {
    let db = open(path, mode, false)?;
    let mapped: i64 = db.query_row("PRAGMA mmap_size=1000000000", [], |row| row.get(0))?;
    if mapped == 0 {
        return Err("SQLite maps nothing".into());
    }
    // One scan warms the mapping, on both sides.
    db.query_row("SELECT sum(length(payload)) FROM t", [], |row| {
        row.get::<_, i64>(0)
    })?;
    let begin = Instant::now();
    let reads = read_points(&db, time, seed)?;
    Ok(reads as f64 / begin.elapsed().as_secs_f64())
}

/// Reads every 20th row, which is about one of each page.
fn first_touch(path: &Path, mode: Mode, seed: u64) -> Result<f64> {
    drop_caches(path)?;
    let db = open(path, mode, false)?;
    let mut ids: Vec<i64> = (1..=POINT_ROWS).step_by(20).collect();
    ids.shuffle(&mut StdRng::seed_from_u64(seed));
    let begin = Instant::now();
    db.execute_batch("BEGIN")?;
    let mut statement = db.prepare("SELECT length(payload) FROM t WHERE id = ?1")?;
    for id in &ids {
        statement.query_row([id], |row| row.get::<_, i64>(0))?;
    }
    db.execute_batch("COMMIT")?;
    Ok(ids.len() as f64 / begin.elapsed().as_secs_f64())
}

fn points(path: &Path, mode: Mode, one: bool, time: Duration, seed: u64) -> Result<f64> {
    let db = open(path, mode, false)?;
    // One scan warms the kernel's cache, on both sides.
    db.query_row("SELECT sum(length(payload)) FROM t", [], |row| {
        row.get::<_, i64>(0)
    })?;
    let begin = Instant::now();
    if one {
        db.execute_batch("BEGIN")?;
    }
    let reads = read_points(&db, time, seed)?;
    if one {
        db.execute_batch("COMMIT")?;
    }
    Ok(reads as f64 / begin.elapsed().as_secs_f64())
}

/// Reads random rows of the point table for `time`; how many were read.
pub fn read_points(db: &Connection, time: Duration, seed: u64) -> Result<u64> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut statement = db.prepare("SELECT length(payload) FROM t WHERE id = ?1")?;
    let begin = Instant::now();
    let mut reads = 0;
    while begin.elapsed() < time {
        // The clock is asked once in 16 reads: it is not what is measured.
        for _ in 0..16 {
            let id = rng.random_range(1..=POINT_ROWS);
            statement.query_row([id], |row| row.get::<_, i64>(0))?;
            reads += 1;
        }
    }
    Ok(reads)
}

fn scan(path: &Path, cold: bool) -> Result<f64> {
    let bytes = std::fs::metadata(path)?.len();
    let query = |db: &Connection| {
        db.query_row("SELECT sum(length(payload)) FROM t", [], |row| {
            row.get::<_, i64>(0)
        })
    };
    if cold {
        drop_caches(path)?;
    } else {
        query(&open(path, Mode::Wal, false)?)?;
    }
    let db = open(path, Mode::Wal, false)?;
    let begin = Instant::now();
    query(&db)?;
    Ok(bytes as f64 / 1e6 / begin.elapsed().as_secs_f64())
}

/// Drops what the kernel caches of a file: all of its page cache where this process may (the file
/// behind a mounted one is cached, too), else that of the file as it is seen here.
fn drop_caches(path: &Path) -> Result<()> {
    let file = std::fs::File::open(path)?;
    // A synchronous flush first: dirty pages are not dropped.
    file.sync_all()?;
    machine::drop_page_cache();
    // SAFETY: the descriptor is open for the whole call, which only takes numbers.
    let errno = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    match errno {
        0 => Ok(()),
        e => Err(std::io::Error::from_raw_os_error(e).into()),
    }
}

fn mixed(path: &Path, mode: Mode, time: Duration) -> Result<Vec<Rate>> {
    let mut jobs = vec![(path, Role::Read); READERS];
    jobs.push((path, Role::Write));
    let counts = worker::run_all(&jobs, mode, time)?;
    let per_second = |n: u64| n as f64 / time.as_secs_f64();
    Ok(vec![
        Rate {
            suffix: ", reading",
            unit: "reads/s",
            per_second: per_second(counts[..READERS].iter().sum()),
        },
        Rate {
            suffix: ", writing",
            unit: "commits/s",
            per_second: per_second(counts[READERS..].iter().sum()),
        },
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let mut names: Vec<String> = all().iter().map(Case::name).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn every_single_process_case_runs_on_a_plain_directory() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let settings = Settings {
            seconds: 0.02,
            scan_bytes: 2_000_000,
        };
        for case in all() {
            if matches!(case, Case::Mixed { .. } | Case::Several { .. }) {
                continue; // need this program as processes of their own
            }
            case.prepare(dir.path(), &settings).expect("prepare");
            let rates = case.run(dir.path(), &settings, 1).expect("run");
            assert!(rates.iter().all(|r| r.per_second > 0.0), "{}", case.name());
            case.clean(dir.path()).expect("clean");
        }
        let left = std::fs::read_dir(dir.path()).expect("list").count();
        assert_eq!(left, 0, "a case leaves files behind");
    }
}
