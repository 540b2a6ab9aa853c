//! Processes that are stopped (SIGSTOP) in the middle of whatever they do, and go on later or never:
//! the writer, the primary, the replica; in every journal mode, under load.

mod common;

use std::time::{Duration, Instant};

use common::helper::{Session, WRITER_TABLES, Writer, assert_whole_transactions};
use common::{Cluster, Options, Pair, SOON, sqlite3, wait_until};
use rand::Rng;

helper_test!();

/// Who is stopped, and whether it is killed then.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Writer,
    WriterForGood,
    Primary,
    PrimaryForGood,
    Replica,
    ReplicaForGood,
}

const VICTIMS: [Victim; 6] = [
    Victim::Writer,
    Victim::Primary,
    Victim::Replica,
    Victim::WriterForGood,
    Victim::PrimaryForGood,
    Victim::ReplicaForGood,
];

/// How long it stands still: long for a transaction, short for those who wait for each other.
const STANDSTILL: Duration = Duration::from_millis(700);

fn signal(writer: &Writer, signal: i32) {
    // SAFETY: takes numbers only; a child that was not waited for keeps its ID.
    unsafe { libc::kill(writer.process.0.id() as i32, signal) };
}

/// Waits for the writer to get on from there.
fn await_progress(writer: &Writer, from: i64, what: &str) {
    let deadline = Instant::now() + SOON;
    while writer.acknowledged() <= from + 1 {
        assert!(
            Instant::now() < deadline && writer.error().is_none(),
            "{what}: the writer does not get on: {:?}",
            writer.output()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn stop_everybody_once(mode: &str, synchronous: &str) {
    let mut pair = Cluster::static_pair_with(170, |options| Options {
        strict_verify: true,
        ..options
    });
    sqlite3(&pair.primary.db("x.db"), WRITER_TABLES);
    pair.assert_same("x.db");
    let mut newest = 0;
    for victim in VICTIMS {
        newest = stopped(&mut pair, mode, synchronous, victim, newest);
    }
}

fn stopped(pair: &mut Pair, mode: &str, synchronous: &str, victim: Victim, before: i64) -> i64 {
    let path = pair.primary.db("x.db");
    let what = format!("{mode}, {synchronous}, {victim:?}");
    let mut writer = Writer::start(&path, pair.cluster.dir(), mode, synchronous);
    await_progress(&writer, before, &what);
    std::thread::sleep(Duration::from_micros(rand::rng().random_range(0..40_000)));
    match victim {
        Victim::Writer => {
            signal(&writer, libc::SIGSTOP);
            // It may hold any lock: the replica's readers do not mind, in WAL mode nor here.
            std::thread::sleep(STANDSTILL / 2);
            let at = writer.acknowledged();
            let mut reader = Session::open(&pair.replica.db("x.db"), pair.cluster.dir());
            reader
                .run("SELECT n FROM counter")
                .expect("read on the replica");
            signal(&writer, libc::SIGCONT);
            await_progress(&writer, at, &what);
        }
        Victim::WriterForGood => {
            signal(&writer, libc::SIGSTOP);
            std::thread::sleep(STANDSTILL / 2);
        }
        Victim::Primary => {
            pair.primary.freeze(true);
            std::thread::sleep(STANDSTILL);
            let at = writer.acknowledged();
            std::thread::sleep(STANDSTILL / 2);
            assert_eq!(writer.acknowledged(), at, "{what}: who acknowledged that?");
            pair.primary.freeze(false);
            await_progress(&writer, at, &what);
        }
        Victim::PrimaryForGood => {
            pair.primary.freeze(true);
            std::thread::sleep(STANDSTILL / 2);
            pair.primary.kill9();
            writer.process.wait(SOON);
            pair.primary.start();
        }
        Victim::Replica => {
            pair.replica.freeze(true);
            std::thread::sleep(STANDSTILL);
            // Nobody waits for it.
            await_progress(&writer, writer.acknowledged(), &what);
            pair.replica.freeze(false);
            await_progress(&writer, writer.acknowledged(), &what);
        }
        Victim::ReplicaForGood => {
            pair.replica.freeze(true);
            std::thread::sleep(STANDSTILL / 2);
            await_progress(&writer, writer.acknowledged(), &what);
            pair.replica.kill9();
            pair.replica.start();
            await_progress(&writer, writer.acknowledged(), &what);
        }
    }
    writer.process.kill9();
    let acknowledged = writer.acknowledged().max(before);
    println!("{what}: {acknowledged} acknowledged");
    let newest = assert_whole_transactions(&path, acknowledged);
    pair.assert_same("x.db");
    newest
}

#[test]
fn stopped_in_delete_mode() {
    stop_everybody_once("delete", "FULL");
}

#[test]
fn stopped_in_truncate_mode() {
    stop_everybody_once("truncate", "NORMAL");
}

#[test]
fn stopped_in_persist_mode() {
    stop_everybody_once("persist", "FULL");
}

#[test]
fn stopped_in_wal_mode() {
    stop_everybody_once("wal", "FULL");
}

#[test]
fn stopped_in_wal_mode_without_waiting_for_the_flush() {
    stop_everybody_once("wal", "NORMAL");
}

#[test]
fn a_writer_that_stands_still_in_its_transaction_holds_up_other_databases_of_nobody() {
    let pair = Cluster::static_pair(90);
    for mode in ["delete", "wal"] {
        for db in ["held.db", "free.db"] {
            let db = format!("{mode}-{db}");
            let sql = format!("PRAGMA journal_mode={mode}; CREATE TABLE t (a);");
            sqlite3(&pair.primary.db(&db), &sql);
        }
    }
    for mode in ["delete", "wal"] {
        let held = pair.primary.db(&format!("{mode}-held.db"));
        let mut session = Session::open(&held, pair.cluster.dir());
        session.run("BEGIN IMMEDIATE").expect("begin");
        session.run("INSERT INTO t VALUES (1)").expect("write");
        session.signal(libc::SIGSTOP);
        let began = Instant::now();
        for db in ["delete-free.db", "wal-free.db"] {
            sqlite3(&pair.primary.db(db), "INSERT INTO t VALUES (1);");
            pair.assert_same(db);
        }
        // Readers of the very database, too.
        assert_eq!(sqlite3(&held, "SELECT count(*) FROM t;"), "0\n");
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "{:?}",
            began.elapsed()
        );
        session.signal(libc::SIGKILL);
        drop(session);
        wait_until("the next writer", SOON, || {
            let done = common::sql::sqlite3_raw(&held, "INSERT INTO t VALUES (2);", true);
            match done.success() {
                true => Ok(()),
                false => Err(done.stderr),
            }
        });
        assert_eq!(sqlite3(&held, "SELECT a FROM t;"), "2\n", "{mode}");
        pair.assert_same(&format!("{mode}-held.db"));
    }
}
