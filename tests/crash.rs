//! Processes that are killed at random moments, a hundred times over the four modes: nothing
//! acknowledged is missing, nothing unacknowledged is half there, the next writer works, and the
//! replica follows.
//!
//! `TENURE_CRASH_ROUNDS` is the number of rounds a mode (25). Each round kills one of: the writing
//! process, the primary, the replica, or the primary together with the writer.

mod common;

use std::time::{Duration, Instant};

use common::helper::{WRITER_TABLES, Writer, assert_whole_transactions};
use common::{Cluster, Options, Pair, SOON, sqlite3};
use rand::Rng;

helper_test!();

fn rounds() -> u32 {
    match std::env::var("TENURE_CRASH_ROUNDS") {
        Ok(text) => text.parse().expect("TENURE_CRASH_ROUNDS is a number"),
        Err(_) => 25,
    }
}

#[derive(Clone, Copy, Debug)]
enum Victim {
    Writer,
    Primary,
    Replica,
    PrimaryAndWriter,
}

const VICTIMS: [Victim; 4] = [
    Victim::Writer,
    Victim::Primary,
    Victim::Replica,
    Victim::PrimaryAndWriter,
];

fn crash_rounds(mode: &str, synchronous: &str, rounds: u32) {
    let mut pair = Cluster::static_pair_with(60 + u64::from(rounds) * 12, |options| Options {
        strict_verify: true,
        ..options
    });
    sqlite3(&pair.primary.db("x.db"), WRITER_TABLES);
    pair.assert_same("x.db");
    let mut newest = 0;
    for round in 0..rounds {
        let victim = VICTIMS[round as usize % VICTIMS.len()];
        newest = crash_round(&mut pair, mode, synchronous, round, victim, newest);
    }
    assert!(newest > i64::from(rounds), "hardly anything was written");
}

/// Starts a writer, kills the victim, starts it again, and checks; the newest transaction.
fn crash_round(
    pair: &mut Pair,
    mode: &str,
    synchronous: &str,
    round: u32,
    victim: Victim,
    before: i64,
) -> i64 {
    let path = pair.primary.db("x.db");
    let mut writer = Writer::start(&path, pair.cluster.dir(), mode, synchronous);
    let what = format!("{mode}, {synchronous}, round {round}, {victim:?}");
    // The moment is any within a few transactions after the first.
    let deadline = Instant::now() + SOON;
    while writer.acknowledged() <= before {
        assert!(
            Instant::now() < deadline && writer.error().is_none(),
            "{what}: the writer does not get on: {:?}",
            writer.output()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_micros(rand::rng().random_range(0..60_000)));
    match victim {
        Victim::Writer => writer.process.kill9(),
        Victim::Primary => {
            pair.primary.kill9();
            // Its files are gone: it meets an error, and must not call a commit acknowledged.
            writer.process.wait(SOON);
            pair.primary.start();
        }
        Victim::Replica => {
            pair.replica.kill9();
            std::thread::sleep(Duration::from_millis(20));
            writer.process.kill9();
            pair.replica.start();
        }
        Victim::PrimaryAndWriter => {
            pair.primary.kill9();
            writer.process.kill9();
            pair.primary.start();
        }
    }
    let acknowledged = writer.acknowledged().max(before);
    println!("{what}: {acknowledged} acknowledged");
    if matches!(victim, Victim::Writer | Victim::Replica) {
        assert_eq!(writer.error(), None, "{what}");
    }
    let newest = assert_whole_transactions(&path, acknowledged);
    pair.assert_same("x.db");
    newest
}

#[test]
fn killed_in_delete_mode() {
    crash_rounds("delete", "FULL", rounds());
}

#[test]
fn killed_in_truncate_mode() {
    crash_rounds("truncate", "FULL", rounds());
}

#[test]
fn killed_in_persist_mode() {
    crash_rounds("persist", "NORMAL", rounds());
}

#[test]
fn killed_in_wal_mode() {
    crash_rounds("wal", "FULL", rounds().div_ceil(2));
}

#[test]
fn killed_in_wal_mode_without_waiting_for_the_flush() {
    crash_rounds("wal", "NORMAL", rounds().div_ceil(2));
}

/// Databases of one transaction: with many, most kills fall between the first and the last of them.
const PARTS: [&str; 6] = ["a.db", "b.db", "c.db", "d.db", "e.db", "f.db"];

/// Transactions of one process over all of [`PARTS`], each a row with the same number in all.
fn transactions_over_all(dir: &std::path::Path, numbers: std::ops::Range<u32>) -> String {
    let attach = |sql: String, db: &&str| {
        let path = dir.join(db);
        sql + &format!("ATTACH '{}' AS \"{db}\";\n", path.display())
    };
    let attached = PARTS[1..].iter().fold(String::new(), attach);
    numbers.fold(attached, |sql, n| {
        let inserts = PARTS[1..].iter().fold(
            format!("BEGIN; INSERT INTO main.t VALUES ({n});"),
            |sql, db| sql + &format!(" INSERT INTO \"{db}\".t VALUES ({n});"),
        );
        sql + &inserts + " COMMIT;\n"
    })
}

#[test]
fn a_transaction_over_several_databases_is_in_all_or_in_none() {
    let mut pair = Cluster::static_pair(60 + u64::from(rounds()) * 8);
    for db in PARTS {
        sqlite3(
            &pair.primary.db(db),
            "CREATE TABLE t (n INTEGER PRIMARY KEY);",
        );
    }
    for round in 0..rounds() {
        let file = pair.cluster.dir().join("script.sql");
        let numbers = round * 2000..round * 2000 + 2000;
        let script = transactions_over_all(&pair.primary.mount(), numbers);
        std::fs::write(&file, script).expect("write the script");
        let mut child = common::run::Running(
            std::process::Command::new("sqlite3")
                .args(["-batch", "-init", "/dev/null"])
                .arg(pair.primary.db(PARTS[0]))
                .stdin(std::fs::File::open(&file).expect("open the script"))
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .spawn()
                .expect("start sqlite3"),
        );
        let start = pair.primary.txid(PARTS[0]);
        common::wait_until("the first transactions", SOON, || {
            match pair.primary.txid(PARTS[0]) {
                txid if txid > start + 1 => Ok(()),
                txid => Err(txid),
            }
        });
        std::thread::sleep(Duration::from_micros(rand::rng().random_range(0..40_000)));
        if round % 2 == 0 {
            pair.primary.kill9();
            child.kill9();
            pair.primary.start();
        } else {
            child.kill9();
        }
        let counts = PARTS.map(|db| {
            sqlite3(
                &pair.primary.db(db),
                "SELECT count(*), max(n) FROM t; PRAGMA integrity_check;",
            )
        });
        assert!(
            counts.iter().all(|n| *n == counts[0]),
            "round {round}: rows and last row of each database: {counts:?}"
        );
        for db in PARTS {
            pair.assert_same(db);
        }
    }
}
