//! A replica in every state that it can be found in ends with the primary's bytes; and what its
//! readers see meanwhile.

mod common;

use std::time::{Duration, Instant};

use common::helper::Session;
use common::sql::{self, sqlite3_fails};
use common::{Cluster, Options, SOON, sqlite3, wait_same_pos, wait_until};
use rusqlite::Connection;

helper_test!();

const MODES: [&str; 4] = ["delete", "truncate", "persist", "wal"];

fn insert(node: &common::Node, db: &str, from: u32, to: u32) {
    let sql = (from..to).fold(String::new(), |sql, n| {
        sql + &format!("INSERT INTO t VALUES ({n}, zeroblob({}));\n", 50 + n % 900)
    });
    sqlite3(&node.db(db), &sql);
}

fn create(node: &common::Node, db: &str, mode: &str) {
    sqlite3(
        &node.db(db),
        &format!("PRAGMA journal_mode={mode}; CREATE TABLE t (n, b);"),
    );
}

fn count(db: &Connection) -> i64 {
    db.query_row("SELECT count(*) FROM t", [], |row| row.get(0))
        .expect("count the rows")
}

fn open(node: &common::Node, db: &str) -> Connection {
    let db = Connection::open(node.db(db)).expect("open");
    db.busy_timeout(Duration::from_secs(20))
        .expect("set a limit");
    db
}

#[test]
fn a_replica_that_joins_late() {
    let cluster = Cluster::new(90);
    let options = Options::primary("primary");
    let primary = cluster.start(options.clone());
    for mode in MODES {
        let db = format!("{mode}.db");
        create(&primary, &db, mode);
        insert(&primary, &db, 0, 30);
        sqlite3(&primary.db(&db), "DELETE FROM t WHERE n < 10; VACUUM;");
    }
    // One that is being written while it is sent.
    let writer = open(&primary, "wal.db");
    let replica = cluster.start(Options::replica("replica", &options));
    for n in 100..150 {
        writer
            .execute("INSERT INTO t VALUES (?1, zeroblob(3000))", [n])
            .expect("insert");
    }
    drop(writer);
    for mode in MODES {
        common::assert_same(&primary, &replica, &format!("{mode}.db"));
    }
}

#[test]
fn a_replica_that_was_away_for_a_moment() {
    let mut pair = Cluster::static_pair(90);
    for mode in MODES {
        let db = format!("{mode}.db");
        create(&pair.primary, &db, mode);
        pair.assert_same(&db);
    }
    assert_eq!(pair.replica.stop(), Some(0), "{}", pair.replica.log());
    for mode in MODES {
        insert(&pair.primary, &format!("{mode}.db"), 0, 20);
    }
    pair.replica.start();
    for mode in MODES {
        pair.assert_same(&format!("{mode}.db"));
    }
}

#[test]
fn a_replica_that_was_away_for_longer_than_the_log_is_kept() {
    let mut pair = Cluster::static_pair_with(90, |options| Options {
        retention: Some("200ms"),
        ..options
    });
    for db in ["delete.db", "wal.db"] {
        create(&pair.primary, db, db.strip_suffix(".db").expect("a suffix"));
        insert(&pair.primary, db, 0, 5);
        pair.assert_same(db);
    }
    assert_eq!(pair.replica.stop(), Some(0), "{}", pair.replica.log());
    let reaped = pair.primary.metric("litefs_db_ltx_reap_count");
    let mut n = 5;
    wait_until("the log to be shortened", SOON, || {
        for db in ["delete.db", "wal.db"] {
            // A segment that is written to is not removed: give it some size.
            sqlite3(
                &pair.primary.db(db),
                &format!("INSERT INTO t VALUES ({n}, randomblob(1000000));"),
            );
        }
        n += 1;
        std::thread::sleep(Duration::from_millis(100));
        match pair.primary.metric("litefs_db_ltx_reap_count") - reaped {
            gone if gone >= 4.0 => Ok(()),
            gone => Err(gone),
        }
    });
    pair.replica.start();
    for db in ["delete.db", "wal.db"] {
        pair.assert_same(db);
        insert(&pair.primary, db, n, n + 5);
        pair.assert_same(db);
    }
}

/// Starts two separate primaries, gives both `a.db` by `write`, and makes the second a replica of
/// the first.
fn rejoin(write: impl Fn(&common::Node, bool), keep_cluster_id: bool) -> common::Pair {
    let cluster = Cluster::new(90);
    let options = Options::primary("primary");
    let primary = cluster.start(options.clone());
    let mut replica = cluster.start(Options::primary("replica"));
    write(&primary, true);
    write(&replica, false);
    assert_eq!(replica.stop(), Some(0), "{}", replica.log());
    if !keep_cluster_id {
        std::fs::remove_file(replica.data().join("clusterid")).expect("remove the cluster ID");
    }
    replica.options = Options {
        http: replica.options.http.clone(),
        ..Options::replica("replica", &options)
    };
    replica.start();
    common::Pair {
        replica,
        primary,
        cluster,
    }
}

#[test]
fn a_replica_with_another_state_under_the_same_txid() {
    for mode in ["delete", "wal"] {
        let pair = rejoin(
            |node, first| {
                create(node, "a.db", mode);
                sqlite3(
                    &node.db("a.db"),
                    &format!(
                        "INSERT INTO t VALUES ('{}', 1);",
                        if first { "left" } else { "right" }
                    ),
                );
            },
            false,
        );
        pair.assert_same("a.db");
        assert_eq!(
            sqlite3(&pair.replica.db("a.db"), "SELECT n FROM t;"),
            "left\n"
        );
        insert(&pair.primary, "a.db", 0, 5);
        pair.assert_same("a.db");
    }
}

#[test]
fn a_replica_that_is_ahead() {
    for mode in ["delete", "wal"] {
        let pair = rejoin(
            |node, first| {
                create(node, "a.db", mode);
                insert(node, "a.db", 0, if first { 3 } else { 30 });
            },
            false,
        );
        pair.assert_same("a.db");
        assert_eq!(
            sqlite3(&pair.replica.db("a.db"), "SELECT count(*) FROM t;"),
            "3\n"
        );
        insert(&pair.primary, "a.db", 3, 6);
        pair.assert_same("a.db");
    }
}

#[test]
fn a_node_of_another_cluster_is_left_alone() {
    let pair = rejoin(
        |node, first| {
            create(node, "a.db", "delete");
            insert(node, "a.db", 0, if first { 3 } else { 7 });
        },
        true,
    );
    wait_until("a word about the cluster ID", SOON, || {
        let log = pair.replica.log();
        match log.to_lowercase().contains("cluster") {
            true => Ok(()),
            false => Err("nothing in the log yet"),
        }
    });
    insert(&pair.primary, "a.db", 3, 6);
    assert_eq!(
        sqlite3(&pair.replica.db("a.db"), "SELECT count(*) FROM t;"),
        "7\n"
    );
    assert_eq!(
        sqlite3(&pair.primary.db("a.db"), "SELECT count(*) FROM t;"),
        "6\n"
    );
}

/// SQLite counts only the first transaction of such a writer: what readers have cached looks current.
#[test]
fn a_writer_in_the_exclusive_locking_mode_is_seen_on_the_replica() {
    let pair = Cluster::static_pair(120);
    create(&pair.primary, "x.db", "delete");
    insert(&pair.primary, "x.db", 0, 50);
    pair.assert_same("x.db");
    let writer = open(&pair.primary, "x.db");
    writer
        .execute_batch("PRAGMA locking_mode = EXCLUSIVE")
        .expect("a locking mode");
    let sum = |db: &Connection| -> rusqlite::Result<i64> {
        db.query_row("SELECT sum(length(b)) FROM t", [], |row| row.get(0))
    };
    for n in 1..6 {
        let reader = open(&pair.replica, "x.db");
        sum(&reader).expect("read");
        writer
            .execute("UPDATE t SET b = zeroblob(?1)", [1000 + n])
            .expect("update");
        wait_until("what was written, on the replica", SOON, || {
            match sum(&open(&pair.replica, "x.db")) {
                Ok(sum) if sum == 50 * (1000 + n) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
        // Or it is to be opened anew.
        let read = sum(&reader);
        assert!(
            read.as_ref().map_or(true, |s| *s == 50 * (1000 + n)),
            "{read:?}"
        );
        if let Err(error) = read {
            use rusqlite::ErrorCode::{NotADatabase, SystemIoFailure};
            let code = error.sqlite_error_code();
            assert!(
                matches!(code, Some(NotADatabase | SystemIoFailure)),
                "{error}"
            );
        }
    }
    drop(writer);
    pair.assert_same("x.db");
}

#[test]
fn a_long_reader_on_a_wal_replica_keeps_its_snapshot_and_stops_nobody() {
    let pair = Cluster::static_pair(120);
    create(&pair.primary, "x.db", "wal");
    insert(&pair.primary, "x.db", 0, 50);
    pair.assert_same("x.db");
    let reader = open(&pair.replica, "x.db");
    reader.execute_batch("BEGIN").expect("begin");
    let sum = |db: &Connection| -> (i64, i64) {
        db.query_row("SELECT count(*), sum(length(b)) FROM t", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .expect("read")
    };
    let snapshot = sum(&reader);
    assert_eq!(snapshot.0, 50);
    // More than a checkpoint's worth of pages.
    let writer = open(&pair.primary, "x.db");
    for n in 50..350 {
        writer
            .execute("INSERT INTO t VALUES (?1, zeroblob(20000))", [n])
            .expect("insert");
        if n % 50 == 0 {
            assert_eq!(sum(&reader), snapshot, "after row {n}");
        }
    }
    drop(writer);
    // It does not hold replication up: another reader sees all of it, while the first still reads.
    wait_same_pos(&pair.primary, &pair.replica, "x.db");
    assert_eq!(
        sqlite3(
            &pair.replica.db("x.db"),
            "SELECT count(*) FROM t; PRAGMA integrity_check;"
        ),
        "350\nok\n"
    );
    assert_eq!(sum(&reader), snapshot);
    sqlite3(
        &pair.primary.db("x.db"),
        "DELETE FROM t WHERE n % 2; VACUUM;",
    );
    wait_same_pos(&pair.primary, &pair.replica, "x.db");
    assert_eq!(sum(&reader), snapshot);
    reader.execute_batch("COMMIT").expect("end the transaction");
    assert_eq!(count(&reader), 175);
    drop(reader);
    pair.assert_same("x.db");
}

#[test]
fn a_reader_in_a_rollback_mode_holds_replication_up_only_while_it_reads() {
    let pair = Cluster::static_pair(60);
    create(&pair.primary, "x.db", "delete");
    insert(&pair.primary, "x.db", 0, 10);
    pair.assert_same("x.db");
    let reader = open(&pair.replica, "x.db");
    reader.execute_batch("BEGIN").expect("begin");
    assert_eq!(count(&reader), 10);
    insert(&pair.primary, "x.db", 10, 20);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(count(&reader), 10, "the snapshot moved under a transaction");
    reader.execute_batch("COMMIT").expect("end the transaction");
    wait_same_pos(&pair.primary, &pair.replica, "x.db");
    assert_eq!(count(&reader), 20);
    drop(reader);
    pair.assert_same("x.db");
}

#[test]
fn open_connections_on_a_replica_see_each_commit() {
    let pair = Cluster::static_pair(120);
    for mode in MODES {
        let db = format!("{mode}.db");
        create(&pair.primary, &db, mode);
        wait_same_pos(&pair.primary, &pair.replica, &db);
        let (writer, reader) = (open(&pair.primary, &db), open(&pair.replica, &db));
        writer
            .pragma_update(None, "journal_mode", mode)
            .expect("mode");
        for n in 1..=60 {
            writer
                .execute(
                    "INSERT INTO t (n, b) VALUES (?1, randomblob(?2))",
                    [n, n * 97 % 5000],
                )
                .expect("insert");
            let deadline = Instant::now() + SOON;
            while count(&reader) != n {
                assert!(Instant::now() < deadline, "{mode}: row {n} does not arrive");
                std::thread::sleep(Duration::from_micros(200));
            }
            if n % 20 == 0 {
                let changed = format!("ALTER TABLE t ADD COLUMN c{n}");
                writer.execute_batch(&changed).expect("change the schema");
                wait_same_pos(&pair.primary, &pair.replica, &db);
                // A step: preparing alone goes by the schema that the connection knows.
                let columns = reader.query_row("SELECT * FROM t LIMIT 1", [], |row| {
                    Ok(row.as_ref().column_count())
                });
                assert_eq!(columns.expect("read"), 2 + n as usize / 20, "{mode}");
            }
        }
        drop((writer, reader));
        pair.assert_same(&db);
    }
}

/// A read that goes beyond what the kernel knows of the WAL's size, while the next transaction arrives.
#[test]
fn a_reader_on_a_wal_replica_never_reads_past_the_end() {
    let pair = Cluster::static_pair(120);
    for round in 0..30 {
        let db = format!("{round}.db");
        create(&pair.primary, &db, "wal");
        wait_same_pos(&pair.primary, &pair.replica, &db);
        let (writer, reader) = (open(&pair.primary, &db), open(&pair.replica, &db));
        std::thread::scope(|scope| {
            let reading = scope.spawn(move || {
                let deadline = Instant::now() + SOON;
                while count(&reader) < 100 {
                    assert!(Instant::now() < deadline, "the rows do not arrive");
                }
            });
            for n in 1..=100 {
                writer
                    .execute("INSERT INTO t (n, b) VALUES (?1, zeroblob(100))", [n])
                    .expect("insert");
                std::thread::sleep(Duration::from_millis(1));
            }
            reading.join().expect("it reads what is committed");
        });
    }
}

#[test]
fn a_database_is_dropped_and_made_again() {
    let pair = Cluster::static_pair(90);
    for mode in ["delete", "wal"] {
        let db = format!("{mode}.db");
        create(&pair.primary, &db, mode);
        insert(&pair.primary, &db, 0, 10);
        pair.assert_same(&db);
        let txid = pair.primary.txid(&db);
        // A connection on the replica stays open over all of it.
        let reader = open(&pair.replica, &db);
        assert_eq!(count(&reader), 10);
        std::fs::remove_file(pair.primary.db(&db)).expect("drop the database");
        wait_until("the database to be gone on the replica", SOON, || {
            match std::fs::symlink_metadata(pair.replica.db(&db)) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
        sqlite3(
            &pair.primary.db(&db),
            &format!(
                "PRAGMA page_size=1024; PRAGMA journal_mode={mode}; CREATE TABLE t (n, b, c);"
            ),
        );
        sqlite3(&pair.primary.db(&db), "INSERT INTO t VALUES (1, 2, 'new');");
        assert!(
            pair.primary.txid(&db) > txid,
            "{mode}: TXIDs go on after {txid}: {:?}",
            pair.primary.pos(&db)
        );
        drop(reader);
        pair.assert_same(&db);
        assert_eq!(
            sqlite3(
                &pair.replica.db(&db),
                "SELECT n, c FROM t; PRAGMA page_size;"
            ),
            "1|new\n1024\n"
        );
    }
}

#[test]
fn a_dump_is_loaded() {
    let pair = Cluster::static_pair(120);
    let source = pair.cluster.dir().join("source.db");
    sqlite3(
        &source,
        "CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT, b BLOB);
         CREATE TABLE u (a UNIQUE, b REFERENCES t);
         CREATE INDEX i ON t (v, id);
         CREATE VIEW w AS SELECT v FROM t;
         CREATE TRIGGER g AFTER INSERT ON u BEGIN UPDATE t SET v = 'used' WHERE id = new.b; END;
         WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 20000)
           INSERT INTO t SELECT i, 'it''s ' || i, zeroblob(i % 100) FROM n;
         INSERT INTO u SELECT v, id FROM t WHERE id % 10 = 0;",
    );
    let dump = sqlite3(&source, ".dump");
    for mode in MODES {
        let db = format!("{mode}.db");
        let path = pair.primary.db(&db);
        sqlite3(&path, &format!("PRAGMA journal_mode={mode};\n{dump}"));
        pair.assert_same(&db);
        assert!(
            sqlite3(&pair.replica.db(&db), ".dump") == dump,
            "{mode}: the dump differs"
        );
    }
}

#[test]
fn both_nodes_restart_under_a_writer() {
    let mut pair = Cluster::static_pair(120);
    for round in 0..3 {
        for mode in ["delete", "wal"] {
            let db = format!("{mode}.db");
            if round == 0 {
                create(&pair.primary, &db, mode);
            }
            insert(&pair.primary, &db, round * 20, round * 20 + 20);
        }
        // The replica first in the first round, the primary in the second, both in the third.
        if round != 1 {
            assert_eq!(pair.replica.stop(), Some(0), "{}", pair.replica.log());
        }
        if round != 0 {
            assert_eq!(pair.primary.stop(), Some(0), "{}", pair.primary.log());
            pair.primary.start();
        }
        if round != 1 {
            pair.replica.start();
        }
        for mode in ["delete", "wal"] {
            pair.assert_same(&format!("{mode}.db"));
        }
    }
    for mode in ["delete", "wal"] {
        let rows = sqlite3(
            &pair.replica.db(&format!("{mode}.db")),
            "SELECT count(*) FROM t;",
        );
        assert_eq!(rows, "60\n");
    }
}

#[test]
fn a_primary_that_hangs_and_comes_back() {
    let pair = Cluster::static_pair(120);
    create(&pair.primary, "x.db", "wal");
    pair.assert_same("x.db");
    pair.primary.freeze(true);
    // No data for 5 s ends the stream; the replica keeps answering all the while.
    let before = pair.replica.log().len();
    let deadline = Instant::now() + SOON;
    while pair.replica.log().len() == before {
        assert_eq!(
            sqlite3(&pair.replica.db("x.db"), "SELECT count(*) FROM t;"),
            "0\n"
        );
        if Instant::now() > deadline {
            pair.primary.freeze(false);
            panic!("the replica does not notice that its primary hangs");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    pair.primary.freeze(false);
    insert(&pair.primary, "x.db", 0, 10);
    pair.assert_same("x.db");
}

#[test]
fn a_stop_while_files_are_open() {
    let mut pair = Cluster::static_pair(60);
    create(&pair.primary, "x.db", "wal");
    insert(&pair.primary, "x.db", 0, 10);
    pair.assert_same("x.db");
    let readers = [open(&pair.primary, "x.db"), open(&pair.replica, "x.db")];
    for reader in &readers {
        reader.execute_batch("BEGIN").expect("begin");
        assert_eq!(count(reader), 10);
    }
    let begin = Instant::now();
    assert_eq!(pair.replica.stop(), Some(0), "{}", pair.replica.log());
    assert_eq!(pair.primary.stop(), Some(0), "{}", pair.primary.log());
    assert!(
        begin.elapsed() < Duration::from_secs(15),
        "{:?}",
        begin.elapsed()
    );
    let below = pair
        .cluster
        .dir()
        .canonicalize()
        .expect("the test's directory");
    let left: Vec<_> = common::node::fuse_mounts()
        .into_iter()
        .filter(|mount| mount.starts_with(&below))
        .collect();
    assert!(left.is_empty(), "mounts are left: {left:?}");
    drop(readers);
    pair.primary.start();
    pair.replica.start();
    insert(&pair.primary, "x.db", 10, 12);
    pair.assert_same("x.db");
}

#[test]
fn a_write_on_a_replica_says_read_only() {
    let pair = Cluster::static_pair(60);
    for mode in MODES {
        let db = format!("{mode}.db");
        create(&pair.primary, &db, mode);
        pair.assert_same(&db);
        let before = pair.replica.pos(&db);
        for sql in [
            "INSERT INTO t VALUES (1, 2);",
            "CREATE TABLE u (a);",
            "BEGIN IMMEDIATE; INSERT INTO t VALUES (1, 2); COMMIT;",
        ] {
            let error = sqlite3_fails(&pair.replica.db(&db), sql).to_lowercase();
            assert!(
                error.contains("readonly") || error.contains("read-only"),
                "{mode}: {sql}: {error}"
            );
        }
        assert_eq!(pair.replica.pos(&db), before);
        // Once a minute. In WAL mode SQLite refuses by itself, and the node hears nothing.
        let (name, http) = &pair.primary.options.primary;
        let said = format!(
            "WARNING: write refused on {db}: this node is a replica; the primary is {name} (http://{http})\n"
        );
        let times = pair.replica.log().matches(&said).count();
        let log = pair.replica.log();
        assert!(times == 1 || (mode == "wal" && times == 0), "{mode}: {log}");
        // The connection that failed left nothing that stops replication.
        insert(&pair.primary, &db, 0, 3);
        pair.assert_same(&db);
    }
    let made = sql::sqlite3_raw(&pair.replica.db("new.db"), "CREATE TABLE t (a);", true);
    assert!(!made.success(), "a database was made on a replica");
    let names = std::fs::read_dir(pair.replica.mount()).expect("list");
    let names: Vec<_> = names.flatten().map(|entry| entry.file_name()).collect();
    assert!(!names.iter().any(|n| n == "new.db"), "{names:?}");
}

/// Every counter and gauge of a database moves when there is reason to.
#[test]
fn what_is_done_to_a_database_is_counted() {
    let pair = Cluster::static_pair(60);
    for mode in ["delete", "wal"] {
        let db = format!("{mode}.db");
        create(&pair.primary, &db, mode);
        insert(&pair.primary, &db, 0, 20);
        wait_same_pos(&pair.primary, &pair.replica, &db);
    }
    let counted = |node: &common::Node, db: &str, name: &str| {
        let numbers = node.http_get("/metrics").expect("/metrics");
        let sample = format!("litefs_db_{name}{{db=\"{db}\"}} ");
        let line = numbers.lines().find_map(|l| l.strip_prefix(&sample));
        let line = line.unwrap_or_else(|| panic!("no {sample} in {numbers}"));
        line.parse::<f64>().expect("a number")
    };
    let primary = |db, name| counted(&pair.primary, db, name);
    for (db, names) in [
        ("delete.db", ["database_write_count", "journal_write_count"]),
        // What is passed through is not counted.
        ("wal.db", ["wal_write_count"; 2]),
    ] {
        let names: &[&str] = match std::env::var("TENURE_TEST_WAL_CAPTURE") {
            Ok(capture) if capture == "tail" => &names[..0],
            _ => &names,
        };
        assert!(primary(db, "commit_count") >= 21.0, "{db}");
        assert_eq!(primary(db, "txid"), pair.primary.txid(db) as f64);
        assert_eq!(primary(db, "ltx_count"), primary(db, "txid"));
        assert!(primary(db, "ltx_bytes") > 1000.0, "{db}");
        for &name in names {
            assert!(primary(db, name) >= 20.0, "{name} of {db}");
        }
        assert!(counted(&pair.replica, db, "commit_count") >= 1.0, "{db}");
        assert!(counted(&pair.replica, db, "lag_seconds") >= 0.0, "{db}");
    }
    assert_eq!(pair.primary.metric("litefs_http_stream_count"), 1.0);
    assert_eq!(pair.primary.metric("litefs_subscriber_count"), 1.0);
    assert_eq!(pair.primary.metric("litefs_is_primary"), 1.0);
    assert_eq!(pair.replica.metric("litefs_is_primary"), 0.0);
    assert_eq!(pair.primary.metric("litefs_db_count"), 2.0);
    assert!(pair.primary.metric("litefs_http_frame_send_count") >= 4.0);
    assert!(pair.replica.metric("litefs_lag_seconds") < 60.0);
}

/// A file that has become another while it was mapped: who reads it is told so, and not ended by a
/// bus error.
#[test]
fn a_mapped_reader_of_a_replaced_file_gets_an_error() {
    let pair = Cluster::static_pair(120);
    let path = pair.primary.db("x.db");
    sqlite3(
        &path,
        "CREATE TABLE t (a, b); INSERT INTO t VALUES (0, zeroblob(300000));",
    );
    pair.assert_same("x.db");
    let mut reader = Session::open(&pair.replica.db("x.db"), pair.cluster.dir());
    reader.run("PRAGMA mmap_size=100000000").expect("map");
    let sum = "SELECT sum(a), sum(length(b)) FROM t";
    assert_eq!(reader.run(sum).as_deref(), Ok("0|300000"));
    // It raises the change counter once: the replica has to make the file another.
    let writer = Connection::open(&path).expect("open");
    writer
        .execute_batch("PRAGMA locking_mode=EXCLUSIVE")
        .expect("set the mode");
    for _ in 0..3 {
        writer
            .execute_batch("UPDATE t SET a = a + 1")
            .expect("write");
        wait_same_pos(&pair.primary, &pair.replica, "x.db");
    }
    let error = reader.run(sum).expect_err("a file that is another by now");
    println!("the reader is told: {error}");
    let mut anew = Session::open(&pair.replica.db("x.db"), pair.cluster.dir());
    assert_eq!(anew.run(sum).as_deref(), Ok("3|300000"));
    drop(writer);
    pair.assert_same("x.db");
}
