//! Nodes that do not pass the WAL index through to the kernel, as on kernels before 6.9: the
//! index's pages then live in the page cache of the mount and are written back to the node.

mod common;

use std::time::{Duration, Instant};

use common::helper::{WRITER_TABLES, Writer, assert_whole_transactions};
use common::{Cluster, Options, Pair, SOON, sqlite3, wait_same_pos};
use rusqlite::Connection;

helper_test!();

fn pair() -> Pair {
    Cluster::static_pair_with(90, |options| Options {
        strict_verify: true,
        environment: vec![("TENURE_NO_PASSTHROUGH", "1".into())],
        ..options
    })
}

fn open(node: &common::Node) -> Connection {
    let db = Connection::open(node.db("x.db")).expect("open");
    db.busy_timeout(SOON).expect("set a limit");
    db
}

fn count(db: &Connection) -> i64 {
    db.query_row("SELECT count(*) FROM t", [], |row| row.get(0))
        .expect("count the rows")
}

#[test]
fn open_connections_on_both_nodes_see_each_commit_and_checkpoint() {
    let pair = pair();
    sqlite3(
        &pair.primary.db("x.db"),
        "PRAGMA journal_mode=wal; CREATE TABLE t (n, b);",
    );
    wait_same_pos(&pair.primary, &pair.replica, "x.db");
    let (writer, here, there) = (
        open(&pair.primary),
        open(&pair.primary),
        open(&pair.replica),
    );
    for n in 1..=60 {
        // Large now and then: the index grows by a region, and the WAL is begun anew.
        let size = if n % 20 == 0 { 9_000_000 } else { 3000 };
        writer
            .execute("INSERT INTO t VALUES (?1, zeroblob(?2))", [n, size])
            .expect("insert");
        assert_eq!(count(&here), n);
        wait_same_pos(&pair.primary, &pair.replica, "x.db");
        let deadline = Instant::now() + SOON;
        while count(&there) != n {
            assert!(Instant::now() < deadline, "row {n} does not arrive");
            std::thread::sleep(Duration::from_millis(1));
        }
        if n % 25 == 0 {
            sqlite3(
                &pair.primary.db("x.db"),
                "PRAGMA wal_checkpoint(TRUNCATE); PRAGMA journal_mode=wal;",
            );
        }
    }
    drop((writer, here, there));
    pair.assert_same("x.db");
}

#[derive(Clone, Copy, Debug)]
enum Victim {
    Writer,
    StoppedPrimary,
}

#[test]
fn writers_in_wal_mode_are_killed_and_stopped_under() {
    wal_rounds(&[Victim::Writer, Victim::StoppedPrimary]);
}

/// Eight rounds of writing until one of the victims is hit.
fn wal_rounds(victims: &[Victim]) {
    let mut pair = pair();
    let path = pair.primary.db("x.db");
    sqlite3(&path, WRITER_TABLES);
    pair.assert_same("x.db");
    let mut newest = 0;
    for round in 0..8 {
        // Whatever is killed, somebody on the replica has the index mapped.
        let reader = open(&pair.replica);
        reader
            .query_row("SELECT n FROM counter", [], |_| Ok(()))
            .expect("read");
        let mut writer = Writer::start(&path, pair.cluster.dir(), "wal", "FULL");
        let deadline = Instant::now() + SOON;
        while writer.acknowledged() < newest + 20 {
            assert!(
                Instant::now() < deadline && writer.error().is_none(),
                "round {round}: {}",
                writer.output()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        match victims[round % victims.len()] {
            Victim::Writer => writer.process.kill9(),
            // The files go while they are open and mapped.
            Victim::StoppedPrimary => {
                assert_eq!(pair.primary.stop(), Some(0), "{}", pair.primary.log());
                writer.process.wait(SOON);
                pair.primary.start();
            }
        }
        let acknowledged = writer.acknowledged();
        newest = assert_whole_transactions(&path, acknowledged);
        pair.assert_same("x.db");
    }
}

#[test]
fn a_stop_while_the_index_is_mapped() {
    let mut pair = pair();
    sqlite3(
        &pair.primary.db("x.db"),
        "PRAGMA journal_mode=wal; CREATE TABLE t (n); INSERT INTO t VALUES (1);",
    );
    pair.assert_same("x.db");
    let readers = [open(&pair.primary), open(&pair.replica)];
    for reader in &readers {
        reader.execute_batch("BEGIN").expect("begin");
        assert_eq!(count(reader), 1);
    }
    let begin = Instant::now();
    assert_eq!(pair.replica.stop(), Some(0), "{}", pair.replica.log());
    assert_eq!(pair.primary.stop(), Some(0), "{}", pair.primary.log());
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(15), "{took:?}");
    drop(readers);
    pair.primary.start();
    pair.replica.start();
    sqlite3(&pair.primary.db("x.db"), "INSERT INTO t VALUES (2);");
    pair.assert_same("x.db");
}
