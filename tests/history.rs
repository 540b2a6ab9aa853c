//! Random histories of SQL, run alike on a plain directory and in the mount.
//!
//! A history is a sequence of sessions; a session is one script, run by one process (the `sqlite3`
//! program, or rusqlite), first on the plain side, then in the mount. Both must print the same.
//! After each session the replica must have the same bytes as the primary, and now and then the
//! databases must dump to the same text as the plain ones.
//!
//! `TENURE_SEED` runs one history again; `TENURE_HISTORY_SECS` says for how long (20).

mod common;

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{Cluster, Options, Pair, helper, sql, sqlite3};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

helper_test!();

const MODES: [&str; 4] = ["delete", "truncate", "persist", "wal"];
const PAGE_SIZES: [u32; 8] = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536];
const VACUUMS: [&str; 3] = ["none", "full", "incremental"];
const DATABASES: [&str; 2] = ["one.db", "two.db"];

/// Stands for the directory in a script: each side has its own.
const HERE: &str = "{here}";

fn environment<T: std::str::FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text}: not a number")),
    )
}

#[test]
fn random_histories() {
    let seconds = environment("TENURE_HISTORY_SECS").unwrap_or(20);
    let seed: Option<u64> = environment("TENURE_SEED");
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        let seed = seed.unwrap_or_else(rand::random);
        println!("TENURE_SEED={seed}");
        let sessions = history(seed, deadline);
        println!("{sessions} sessions");
        if Instant::now() > deadline {
            return;
        }
    }
}

/// Runs one history with nodes of its own, until it is long enough or the time is over.
fn history(seed: u64, deadline: Instant) -> u32 {
    let left = deadline.saturating_duration_since(Instant::now());
    let pair = Cluster::static_pair_with(left.as_secs() + 120, |options| Options {
        strict_verify: true,
        ..options
    });
    let plain = pair.cluster.subdir("plain");
    let mut history = History {
        rng: StdRng::seed_from_u64(seed),
        next: 0,
        modes: ["delete"; 2],
        vacuums: ["none"; 2],
    };
    for which in 0..DATABASES.len() {
        let session = history.creation(which);
        run_session(&pair, &plain, &session, seed);
    }
    let mut sessions = 0;
    while sessions < 60 && (Instant::now() < deadline || sessions < 10) {
        let session = history.session();
        run_session(&pair, &plain, &session, seed);
        sessions += 1;
        if sessions % 10 == 0 {
            compare_with_plain(&pair, &plain, seed);
        }
    }
    compare_with_plain(&pair, &plain, seed);
    sessions
}

/// One script and who runs it.
struct Session {
    which: usize,
    /// One statement a line.
    script: String,
    /// By rusqlite in a process of its own; else by the `sqlite3` program.
    by_helper: bool,
}

fn run_session(pair: &Pair, plain: &Path, session: &Session, seed: u64) {
    let name = DATABASES[session.which];
    let mount = pair.primary.mount();
    let [expected, got] = [plain, &mount].map(|dir: &Path| {
        let script = session.script.replace(HERE, &dir.display().to_string());
        let printed = match session.by_helper {
            true => helper::run_script(&dir.join(name), pair.cluster.dir(), &script),
            false => {
                let done = sql::sqlite3_raw(&dir.join(name), &script, false);
                format!("{}{}", done.text(), done.stderr)
            }
        };
        printed.replace(&dir.display().to_string(), HERE)
    });
    assert_eq!(
        got, expected,
        "TENURE_SEED={seed}: {name} in the mount (left) and on the plain directory (right), after:\n{}",
        session.script
    );
    for name in DATABASES {
        if pair.primary.pos(name).is_some() {
            // The seed in the message of whatever fails in there.
            let guard = Told(seed, &session.script);
            pair.assert_same(name);
            std::mem::forget(guard);
        }
    }
}

/// Says which history failed, when a comparison panics.
struct Told<'a>(u64, &'a str);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        eprintln!("TENURE_SEED={}, after the session:\n{}", self.0, self.1);
    }
}

fn compare_with_plain(pair: &Pair, plain: &Path, seed: u64) {
    for name in DATABASES {
        let both: [PathBuf; 2] = [plain.join(name), pair.replica.db(name)];
        let [expected, got] = both.map(|path| sqlite3(&path, ".dump"));
        assert!(
            expected == got,
            "TENURE_SEED={seed}: {name}: the replica dumps\n{got}\nand the plain database\n{expected}"
        );
    }
}

struct History {
    rng: StdRng,
    /// Makes the values of rows: no two are alike.
    next: u32,
    modes: [&'static str; 2],
    vacuums: [&'static str; 2],
}

impl History {
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        *from
            .choose(&mut self.rng)
            .expect("something to choose from")
    }

    fn creation(&mut self, which: usize) -> Session {
        let page_size = self.pick(&PAGE_SIZES);
        self.modes[which] = self.pick(&MODES);
        self.vacuums[which] = self.pick(&VACUUMS);
        let rows = self.insert("", 20);
        let script = format!(
            "PRAGMA page_size={page_size};\nPRAGMA auto_vacuum={};\nPRAGMA journal_mode={};\n\
             CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT, b BLOB);\n\
             CREATE TABLE u (k TEXT PRIMARY KEY, n INTEGER) WITHOUT ROWID;\n\
             CREATE INDEX t_v ON t (v);\n{rows}",
            self.vacuums[which], self.modes[which],
        );
        Session {
            which,
            script,
            by_helper: self.rng.random(),
        }
    }

    fn session(&mut self) -> Session {
        let which = self.rng.random_range(0..2);
        let mut script = String::new();
        let synchronous = self.pick(&["NORMAL", "FULL", "EXTRA"]);
        let _ = writeln!(script, "PRAGMA synchronous={synchronous};");
        // SQLite forgets PERSIST and TRUNCATE with the connection; WAL is in the file.
        let mode = self.modes[which];
        let _ = writeln!(script, "PRAGMA journal_mode={mode};");
        if self.rng.random_bool(0.3) {
            let cache = self.pick(&[1, 5, 20]);
            let _ = writeln!(script, "PRAGMA cache_size={cache};");
        }
        let mut by_helper = self.rng.random();
        for _ in 0..self.rng.random_range(1..=4) {
            by_helper |= self.step(which, &mut script);
        }
        script += "SELECT count(*), sum(length(v)), sum(length(b)) FROM t;\n\
                   SELECT count(*), sum(n) FROM u;\nPRAGMA integrity_check;\n";
        Session {
            which,
            script,
            by_helper,
        }
    }

    /// Adds a step; true when only the helper can run it.
    fn step(&mut self, which: usize, script: &mut String) -> bool {
        match self.rng.random_range(0..100) {
            0..45 => {
                let statements = self.statements("");
                *script += &statements;
            }
            45..65 => self.transaction(script),
            65..73 => self.two_databases(which, script),
            73..78 => *script += "VACUUM;\n",
            78..82 => {
                // It takes effect outside of WAL mode, and is ignored in it, as on any file system.
                let page_size = self.pick(&PAGE_SIZES);
                let _ = writeln!(script, "PRAGMA page_size={page_size};\nVACUUM;");
            }
            82..86 if self.vacuums[which] == "incremental" => {
                let pages = self.rng.random_range(1..30);
                let _ = writeln!(script, "PRAGMA incremental_vacuum({pages});");
            }
            82..88 if self.modes[which] == "wal" => {
                let kind = self.pick(&["PASSIVE", "FULL", "RESTART", "TRUNCATE"]);
                let _ = writeln!(script, "PRAGMA wal_checkpoint({kind});");
                return true;
            }
            82..90 => {
                let size = self.pick(&[512, 4096, 65536]);
                let _ = writeln!(script, "PRAGMA journal_size_limit={size};");
            }
            _ => {
                self.modes[which] = self.pick(&MODES);
                let _ = writeln!(script, "PRAGMA journal_mode={};", self.modes[which]);
            }
        }
        false
    }

    fn transaction(&mut self, script: &mut String) {
        let begin = self.pick(&["BEGIN", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"]);
        let _ = writeln!(script, "{begin};");
        let mut depth = 0;
        for _ in 0..self.rng.random_range(1..6) {
            match self.rng.random_range(0..10) {
                0..2 => {
                    depth += 1;
                    let _ = writeln!(script, "SAVEPOINT s{depth};");
                }
                2..5 if depth > 0 => {
                    let how = self.pick(&["ROLLBACK TO", "RELEASE"]);
                    let _ = writeln!(script, "{how} s{depth};");
                    depth -= i32::from(how == "RELEASE");
                }
                _ => {
                    let statements = self.statements("");
                    *script += &statements;
                }
            }
        }
        let end = self.pick(&["COMMIT", "COMMIT", "COMMIT", "ROLLBACK"]);
        let _ = writeln!(script, "{end};");
    }

    fn two_databases(&mut self, which: usize, script: &mut String) {
        let other = DATABASES[1 - which];
        let _ = writeln!(script, "ATTACH '{HERE}/{other}' AS o;\nBEGIN;");
        for _ in 0..self.rng.random_range(1..4) {
            let here = self.statements("main.");
            let there = self.statements("o.");
            *script += &here;
            *script += &there;
        }
        let end = self.pick(&["COMMIT", "COMMIT", "ROLLBACK"]);
        let _ = writeln!(script, "{end};\nDETACH o;");
    }

    fn statements(&mut self, schema: &str) -> String {
        let from = self.rng.random_range(1..400);
        let to = from + self.rng.random_range(0..120);
        let size = self.pick(&[0, 1, 30, 500, 3000, 20_000]);
        match self.rng.random_range(0..12) {
            0..4 => {
                let rows = self.rng.random_range(1..60);
                self.insert(schema, rows)
            }
            4..6 => format!(
                "UPDATE {schema}t SET v = 'changed ' || id, b = zeroblob({size}) \
                 WHERE id BETWEEN {from} AND {};\n",
                from + 5
            ),
            6..8 => format!(
                "UPDATE {schema}t SET v = v || 'x' WHERE id % 7 = {};\n",
                from % 7
            ),
            8..10 => format!("DELETE FROM {schema}t WHERE id BETWEEN {from} AND {to};\n"),
            // A constraint that is violated now and then.
            10 => format!(
                "INSERT INTO {schema}u VALUES ('key {}', {to});\n",
                from % 40
            ),
            _ => format!(
                "DROP INDEX IF EXISTS {schema}extra;\n\
                 CREATE INDEX {schema}extra ON t (id % {}, v);\n",
                2 + from % 5
            ),
        }
    }

    fn insert(&mut self, schema: &str, rows: u32) -> String {
        let size = self.pick(&[0, 10, 200, 1500, 9000]);
        let first = self.next;
        self.next += rows;
        // Inserted below the top as well, so that pages split in the middle.
        format!(
            "WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i+1 FROM n WHERE i < {}) \
             INSERT OR REPLACE INTO {schema}t SELECT i * 7919 % 500, 'value ' || i, zeroblob({size} + i % 50) FROM n;\n",
            self.next - 1
        )
    }
}
