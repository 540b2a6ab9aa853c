//! Transactions of a real SQLite: each becomes one TXID whose checksum is that of the bytes, and
//! nothing else does.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode};

use super::bed::{Bed, checksum, integrity, options, set_mode};
use super::log::{redirect, segment_files};
use super::vfs::{Vfs, wait};
use crate::store::{FileKind, Options, Role, Store};

const DB: &str = "a.db";
const MODES: [&str; 4] = ["delete", "truncate", "persist", "wal"];

/// Statements, and by how many transactions each moves the position.
const STEPS: &[(&str, u64)] = &[
    ("CREATE TABLE t(k INTEGER PRIMARY KEY, v)", 1),
    ("INSERT INTO t(v) VALUES ('one')", 1),
    ("SELECT * FROM t", 0),
    (
        "BEGIN; INSERT INTO t(v) VALUES (zeroblob(5000)); INSERT INTO t(v) VALUES (2); COMMIT",
        1,
    ),
    (
        "BEGIN; INSERT INTO t(v) VALUES (zeroblob(300000)); ROLLBACK",
        0,
    ),
    (
        "BEGIN; UPDATE t SET v = k; SAVEPOINT s; DELETE FROM t; ROLLBACK TO s; COMMIT",
        1,
    ),
    (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 300) INSERT INTO t(v) SELECT randomblob(400) FROM n",
        1,
    ),
    ("CREATE INDEX i ON t(v)", 1),
    ("DELETE FROM t WHERE k > 20", 1),
    ("DELETE FROM t WHERE k > 1000000", 0),
    ("BEGIN IMMEDIATE; COMMIT", 0),
    ("DROP INDEX i", 1),
    ("VACUUM", 1),
    ("INSERT INTO t(v) VALUES (randomblob(20000))", 1),
];

fn open(bed: &Bed, mode: &str, page_size: u32) -> Connection {
    let c = bed.connect(DB);
    c.execute_batch(&format!("PRAGMA page_size={page_size}"))
        .unwrap();
    assert_eq!(set_mode(&c, mode), mode);
    // Small, so that transactions spill into the database before they end.
    c.execute_batch("PRAGMA cache_size=20").unwrap();
    c
}

fn txid(bed: &Bed) -> u64 {
    let db = bed.db(DB);
    db.settle();
    db.pos().txid
}

#[test]
fn every_transaction_is_one_txid_in_every_mode_and_page_size() {
    for mode in MODES {
        for page_size in [512, 4096, 65536] {
            let bed = Bed::primary();
            let c = open(&bed, mode, page_size);
            let mut at = txid(&bed);
            assert_eq!(
                at,
                u64::from(mode == "wal"),
                "the header of a new WAL database"
            );
            for (i, (sql, transactions)) in STEPS.iter().enumerate() {
                c.execute_batch(sql).unwrap();
                assert_eq!(txid(&bed), at + transactions, "{mode} {page_size}: {sql}");
                at += transactions;
                if i % 4 == 3 {
                    bed.check_killed(DB);
                } else {
                    bed.check(DB);
                }
            }
            integrity(&c);
            assert_eq!(bed.db(DB).page_size(), page_size);
            drop(c);
            assert_eq!(txid(&bed), at, "a close is no transaction");
            bed.check_killed(DB);
            assert_eq!(bed.vfs.take_errors(), Vec::<String>::new());
        }
    }
}

#[test]
fn the_bytes_are_those_that_plain_sqlite_makes() {
    for mode in MODES {
        let bed = Bed::primary();
        let plain = tempfile::tempdir().unwrap();
        let path = plain.path().join("plain.db");
        let reference = Connection::open(&path).unwrap();
        reference.execute_batch("PRAGMA page_size=1024").unwrap();
        set_mode(&reference, mode);
        let c = open(&bed, mode, 1024);
        for (sql, _) in STEPS.iter().filter(|(sql, _)| !sql.contains("random")) {
            c.execute_batch(sql).unwrap();
            reference.execute_batch(sql).unwrap();
        }
        drop(c);
        drop(reference);
        let (_, image) = bed.check(DB);
        assert_eq!(image, std::fs::read(&path).unwrap(), "{mode}");
        assert_eq!(
            image,
            std::fs::read(bed.file(DB, FileKind::Database)).unwrap()
        );
    }
}

#[test]
fn modes_change_in_every_direction() {
    let bed = Bed::primary();
    let c = open(&bed, "delete", 4096);
    c.execute_batch("CREATE TABLE t(v)").unwrap();
    let mut rows: i64 = 0;
    for from in MODES {
        for to in MODES {
            for mode in [from, to] {
                assert_eq!(set_mode(&c, mode), mode);
                let before = txid(&bed);
                c.execute_batch("INSERT INTO t VALUES (randomblob(3000))")
                    .unwrap();
                rows += 1;
                assert_eq!(txid(&bed), before + 1, "{from} to {to}");
            }
            bed.check_killed(DB);
        }
    }
    let found: i64 = c
        .query_row("SELECT count(*) FROM t", [], |r| r.get(0))
        .unwrap();
    assert_eq!(found, rows);
    integrity(&c);
    assert_eq!(bed.vfs.take_errors(), Vec::<String>::new());
}

#[test]
fn the_page_size_changes_both_ways() {
    let bed = Bed::primary();
    let c = open(&bed, "delete", 4096);
    c.execute_batch(
        "CREATE TABLE t(v); INSERT INTO t VALUES (randomblob(50000)), (randomblob(9000))",
    )
    .unwrap();
    for size in [512, 65536, 1024, 4096] {
        let before = txid(&bed);
        c.execute_batch(&format!("PRAGMA page_size={size}; VACUUM"))
            .unwrap();
        assert_eq!(txid(&bed), before + 1);
        assert_eq!(bed.db(DB).page_size(), size);
        bed.check_killed(DB);
        c.execute_batch("INSERT INTO t VALUES (randomblob(2000))")
            .unwrap();
        bed.check_killed(DB);
    }
    integrity(&c);
}

#[test]
fn a_database_shrinks_and_grows_again() {
    for mode in MODES {
        let bed = Bed::primary();
        let c = bed.connect(DB);
        c.execute_batch("PRAGMA page_size=1024; PRAGMA auto_vacuum=INCREMENTAL")
            .unwrap();
        set_mode(&c, mode);
        c.execute_batch("CREATE TABLE t(v)").unwrap();
        for round in 0..3 {
            c.execute_batch("INSERT INTO t VALUES (randomblob(200000)), (randomblob(9000))")
                .unwrap();
            let large = bed.check(DB).1.len();
            c.execute_batch("DELETE FROM t WHERE length(v) > 100000")
                .unwrap();
            // A row a page: all of them have to be asked for.
            let mut vacuum = c.prepare("PRAGMA incremental_vacuum").unwrap();
            let mut rows = vacuum.query([]).unwrap();
            while rows.next().unwrap().is_some() {}
            drop(rows);
            let small = bed.check_killed(DB).1.len();
            assert!(
                small < large / 2,
                "{mode}, round {round}: {large} to {small}"
            );
            // In WAL mode the file itself shrinks with a checkpoint.
            c.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
                .unwrap();
            assert_eq!(bed.check_killed(DB).1.len(), small);
            integrity(&c);
        }
        assert_eq!(bed.vfs.take_errors(), Vec::<String>::new(), "{mode}");
    }
}

#[test]
fn checkpoints_of_every_kind_change_nothing() {
    for kind in ["PASSIVE", "FULL", "RESTART", "TRUNCATE"] {
        let bed = Bed::primary();
        let c = open(&bed, "wal", 4096);
        c.execute_batch("PRAGMA wal_autocheckpoint=0; CREATE TABLE t(v)")
            .unwrap();
        for _ in 0..3 {
            for _ in 0..5 {
                c.execute_batch("INSERT INTO t VALUES (randomblob(10000))")
                    .unwrap();
            }
            let before = bed.check_killed(DB);
            let busy: i64 = c
                .query_row(&format!("PRAGMA wal_checkpoint({kind})"), [], |r| r.get(0))
                .unwrap();
            assert_eq!(busy, 0);
            assert_eq!(bed.check_killed(DB), before, "{kind}");
            assert_eq!(
                std::fs::read(bed.file(DB, FileKind::Database)).unwrap(),
                before.1,
                "{kind}: everything is in the file"
            );
        }
        assert_eq!(bed.vfs.take_errors(), Vec::<String>::new());
    }
}

#[test]
fn a_wal_connection_left_by_a_dead_process_loses_nothing() {
    let bed = Bed::primary();
    let c = open(&bed, "wal", 4096);
    c.execute_batch("CREATE TABLE t(v); INSERT INTO t VALUES (1)")
        .unwrap();
    // Without its close: no checkpoint, and the WAL stays.
    std::mem::forget(c);
    let before = bed.check_killed(DB);
    let again = bed.killed();
    again.store.set_role(Role::Primary);
    let c = again.connect(DB);
    let found: i64 = c.query_row("SELECT v FROM t", [], |r| r.get(0)).unwrap();
    assert_eq!(found, 1);
    c.execute_batch("INSERT INTO t VALUES (2)").unwrap();
    assert_eq!(again.check_killed(DB).0.txid, before.0.txid + 1);
    integrity(&c);
}

#[test]
fn a_transaction_that_is_killed_midway_never_was() {
    for mode in MODES {
        let bed = Bed::primary();
        let c = open(&bed, mode, 4096);
        c.execute_batch("CREATE TABLE t(v); INSERT INTO t VALUES (randomblob(100000))")
            .unwrap();
        let before = bed.check(DB);
        c.execute_batch("BEGIN; UPDATE t SET v = randomblob(400000)")
            .unwrap();
        c.cache_flush().unwrap();
        assert_eq!(bed.check(DB), before, "{mode}: not committed");
        let other = bed.killed();
        assert_eq!(other.check(DB), before, "{mode}");
        other.store.set_role(Role::Primary);
        let d = other.connect(DB);
        integrity(&d);
        d.execute_batch("UPDATE t SET v = 1").unwrap();
        assert_eq!(other.check_killed(DB).0.txid, before.0.txid + 1);
        c.execute_batch("COMMIT").unwrap();
        assert_eq!(bed.check_killed(DB).0.txid, before.0.txid + 1, "{mode}");
    }
}

#[test]
fn a_replica_refuses_to_commit_and_a_role_lost_midway_rolls_back() {
    for mode in MODES {
        let bed = Bed::primary();
        let c = open(&bed, mode, 4096);
        c.execute_batch("CREATE TABLE t(v); INSERT INTO t VALUES (1)")
            .unwrap();
        let before = bed.check(DB);
        c.execute_batch("BEGIN; INSERT INTO t VALUES (randomblob(9000))")
            .unwrap();
        bed.store.set_role(Role::Replica { hostname: None });
        assert!(c.execute_batch("COMMIT").is_err(), "{mode}");
        assert!(!bed.vfs.take_errors().is_empty());
        assert_eq!(bed.check_killed(DB), before, "{mode}");
        // Whatever SQLite tries, nothing is written.
        let _ = c.execute_batch("ROLLBACK");
        let d = bed.connect(DB);
        assert!(d.execute_batch("INSERT INTO t VALUES (3)").is_err());
        drop((c, d));
        assert_eq!(bed.check_killed(DB), before, "{mode}");
        bed.store.set_role(Role::Primary);
        let c = bed.connect(DB);
        c.execute_batch("INSERT INTO t VALUES (2)").unwrap();
        let rows: i64 = c
            .query_row("SELECT count(*) FROM t", [], |r| r.get(0))
            .unwrap();
        assert_eq!((rows, bed.check_killed(DB).0.txid), (2, before.0.txid + 1));
        integrity(&c);
    }
}

#[test]
fn what_no_transaction_does_is_refused() {
    let bed = Bed::primary();
    let c = open(&bed, "delete", 4096);
    c.execute_batch("CREATE TABLE t(v); INSERT INTO t VALUES (randomblob(9000))")
        .unwrap();
    let before = bed.check(DB);
    for mode in ["memory", "off"] {
        set_mode(&c, mode);
        assert!(c.execute_batch("INSERT INTO t VALUES (2)").is_err());
        let said = bed.vfs.take_errors().concat();
        assert!(said.contains("without a journal"), "{said}");
        assert_eq!(bed.check_killed(DB), before, "journal_mode={mode}");
    }
    drop(c);
    let db = bed.db(DB);
    let file = db.file(FileKind::Database).unwrap();
    for (offset, len) in [(0, 4096), (100, 1), (8192, 4096), (1 << 50, 4096)] {
        let r = wait(|done| db.write(&file, offset, &vec![1; len], done));
        assert!(r.is_err(), "a write of {len} bytes at {offset}");
    }
    for size in [0, 4096, 4097, before.1.len() as u64 + 4096, u64::MAX] {
        assert!(
            wait(|done| db.truncate(&file, size, done)).is_err(),
            "size {size}"
        );
    }
    assert_eq!(bed.check_killed(DB), before);
    assert_eq!(
        std::fs::read(bed.file(DB, FileKind::Database)).unwrap(),
        before.1
    );
}

#[test]
fn wal_writes_that_no_connection_makes_are_refused() {
    let bed = Bed::primary();
    let c = open(&bed, "wal", 4096);
    c.execute_batch("PRAGMA wal_autocheckpoint=0; CREATE TABLE t(v)")
        .unwrap();
    c.execute_batch("INSERT INTO t VALUES (randomblob(9000))")
        .unwrap();
    let before = bed.check(DB);
    let db = bed.db(DB);
    let wal = db.file(FileKind::Wal).unwrap();
    let file = db.file(FileKind::Database).unwrap();
    assert!(wait(|done| db.write(&wal, 40, &[1; 100], done)).is_err());
    assert!(wait(|done| db.truncate(&wal, 4000, done)).is_err());
    // Pages that no transaction made, pages of no number, half pages.
    for offset in [0, 4096, 4096 * 100, 4096 << 32, (u32::MAX as u64) * 4096, 7] {
        let r = wait(|done| db.write(&file, offset, &[9; 4096], done));
        assert!(r.is_err(), "at {offset}");
    }
    // Garbage behind the committed frames is nobody's business until it is a frame.
    let end = std::fs::metadata(bed.file(DB, FileKind::Wal))
        .unwrap()
        .len();
    wait(|done| db.write(&wal, end, &[0xab; 8000], done)).unwrap();
    assert_eq!(bed.check_killed(DB), before);
    c.execute_batch("INSERT INTO t VALUES (2)").unwrap();
    integrity(&c);
    assert_eq!(bed.check_killed(DB).0.txid, before.0.txid + 1);
}

#[test]
fn a_commit_of_what_a_rollback_left_in_the_wal_is_one() {
    let bed = Bed::primary();
    let c = open(&bed, "wal", 4096);
    c.execute_batch("CREATE TABLE u(v); CREATE TABLE t(v); INSERT INTO u VALUES (1)")
        .unwrap();
    let txid = txid(&bed);
    // The frames stay in the file, without a commit: the table u's page where the next transaction
    // has page 1, which is not spilled, and then what it has too. Its last frame is complete as soon
    // as its header is written.
    c.execute_batch("BEGIN; UPDATE u SET v = 2; INSERT INTO t VALUES (zeroblob(20000))")
        .unwrap();
    c.cache_flush().unwrap();
    c.execute_batch("ROLLBACK; INSERT INTO t VALUES (zeroblob(20000))")
        .unwrap();
    integrity(&c);
    assert_eq!(bed.check_killed(DB).0.txid, txid + 1);
    // Another connection that wrote the same without knowing of it begins with the header.
    let db = bed.db(DB);
    let wal = db.file(FileKind::Wal).unwrap();
    let bytes = std::fs::read(bed.file(DB, FileKind::Wal)).unwrap();
    let last = bytes.len() - 4096 - 24;
    let write = |at: usize, to: usize| wait(|done| db.write(&wal, at as u64, &bytes[at..to], done));
    write(last + 24, bytes.len()).unwrap();
    for (at, to) in [(last, last + 24), (last, bytes.len()), (last - 4096, last)] {
        let said = write(at, to).unwrap_err().to_string();
        assert!(said.contains("does not know of the last"), "{said}");
    }
    let mut page = bytes[last + 24..].to_vec();
    page[7] ^= 1;
    assert!(wait(|done| db.write(&wal, (last + 24) as u64, &page, done)).is_err());
}

#[test]
fn the_exclusive_locking_mode_is_refused_in_wal_mode() {
    let bed = Bed::primary();
    let c = bed.connect(DB);
    c.execute_batch("PRAGMA locking_mode=EXCLUSIVE").unwrap();
    set_mode(&c, "wal");
    assert!(c.execute_batch("CREATE TABLE t(v)").is_err());
    let said = bed.vfs.take_errors().concat();
    assert!(said.contains("locking_mode"), "{said}");
}

#[test]
fn a_transaction_over_two_databases_is_one_in_each() {
    for mode in ["delete", "truncate", "persist"] {
        let bed = Bed::primary();
        let c = open(&bed, mode, 4096);
        c.execute_batch("ATTACH 'b.db' AS b; CREATE TABLE t(v); CREATE TABLE b.u(v)")
            .unwrap();
        c.query_row(&format!("PRAGMA b.journal_mode={mode}"), [], |_| Ok(()))
            .unwrap();
        let positions = bed.store.positions();
        c.execute_batch("BEGIN; INSERT INTO t VALUES (1); INSERT INTO b.u VALUES (1); COMMIT")
            .unwrap();
        let after = bed.store.positions();
        for name in [DB, "b.db"] {
            assert_eq!(after[name].txid, positions[name].txid + 1, "{mode} {name}");
            bed.check_killed(name);
        }
        c.execute_batch("BEGIN; INSERT INTO t VALUES (2); INSERT INTO b.u VALUES (2); ROLLBACK")
            .unwrap();
        assert_eq!(bed.store.positions(), after);
        let left: Vec<_> = bed.store.list();
        assert!(!left.iter().any(|(n, _)| n.contains("-mj")), "{left:?}");
        assert_eq!(bed.vfs.take_errors(), Vec::<String>::new());
    }
}

#[test]
fn one_over_two_databases_is_refused_if_one_of_them_takes_no_more() {
    for mode in ["delete", "truncate", "persist"] {
        let bed = Bed::primary();
        let c = open(&bed, mode, 4096);
        c.execute_batch("ATTACH 'b.db' AS b; CREATE TABLE t(v); CREATE TABLE b.u(v)")
            .unwrap();
        c.query_row(&format!("PRAGMA b.journal_mode={mode}"), [], |_| Ok(()))
            .unwrap();
        let lost = redirect(&newest_segment(&bed), "/dev/null");
        let insert = "INSERT INTO t VALUES (1)";
        assert!(c.execute_batch(insert).is_err(), "{mode}");
        lost.restore();
        let before = [DB, "b.db"].map(|name| bed.killed().check(name));
        let both = "BEGIN; INSERT INTO t VALUES (2); INSERT INTO b.u VALUES (2); COMMIT";
        assert!(c.execute_batch(both).is_err(), "{mode}");
        if !c.is_autocommit() {
            c.execute_batch("ROLLBACK").unwrap();
        }
        let after = bed.killed();
        assert_eq!([DB, "b.db"].map(|name| after.check(name)), before, "{mode}");
        c.execute_batch("INSERT INTO b.u VALUES (3)").unwrap();
        assert_eq!(bed.check_killed("b.db").0.txid, before[1].0.txid + 1);
    }
}

#[test]
fn a_drop_is_a_transaction_and_the_name_can_come_back() {
    let bed = Bed::primary();
    let c = open(&bed, "delete", 4096);
    c.execute_batch("CREATE TABLE t(v)").unwrap();
    drop(c);
    let db = bed.db(DB);
    let old = db.file(FileKind::Database).unwrap();
    wait(|done| db.unlink(FileKind::Database, done)).unwrap();
    assert_eq!((db.pos().txid, db.page_count()), (2, 0));
    assert_eq!(db.pos().checksum, checksum(&[], 4096));
    assert!(wait(|done| db.write(&old, 0, &[1; 4096], done)).is_err());
    let other = bed.killed();
    assert_eq!(other.db(DB).pos(), db.pos());
    assert_eq!(other.db(DB).page_count(), 0);
    assert!(other.db(DB).file(FileKind::Database).is_none());
    let c = open(&bed, "wal", 512);
    c.execute_batch("CREATE TABLE u(v); INSERT INTO u VALUES (1)")
        .unwrap();
    assert!(db.pos().txid >= 4);
    assert_eq!(db.page_size(), 512);
    bed.check_killed(DB);
    integrity(&c);
}

#[test]
fn a_database_never_written_is_no_transaction() {
    let bed = Bed::primary();
    drop(bed.connect(DB));
    assert!(bed.store.positions().is_empty());
    let c = bed.connect(DB);
    c.execute_batch("SELECT * FROM sqlite_schema").unwrap();
    drop(c);
    let other = bed.killed();
    assert!(other.store.positions().is_empty() && other.store.databases().is_empty());
    // The remains of the failed creation are gone.
    assert_eq!(
        std::fs::read_dir(other.dir.path().join("dbs"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn events_and_positions_never_go_back() {
    let bed = Bed::primary();
    let c = open(&bed, "wal", 4096);
    c.execute_batch("PRAGMA synchronous=NORMAL; CREATE TABLE t(v)")
        .unwrap();
    let mut events = bed.store.events();
    let db = bed.db(DB);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        // Others who ask for the position flush too, and tell of what they flushed.
        for _ in 0..3 {
            s.spawn(|| {
                let mut last = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    bed.store.positions();
                    let now = db.pos().txid;
                    assert!(now >= last, "position {last}, then {now}");
                    last = now;
                }
            });
        }
        for i in 0..400 {
            c.execute("INSERT INTO t VALUES (?)", [i]).unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let (pos, _) = bed.check(DB);
    let mut last = 0;
    while let Ok(event) = events.try_recv() {
        let crate::store::Event::Tx { pos, .. } = event else {
            continue;
        };
        assert!(pos.txid > last, "event {last}, then {}", pos.txid);
        last = pos.txid;
    }
    assert_eq!(last, pos.txid, "everything is told of");
}

#[test]
fn an_unflushed_commit_is_told_of_soon() {
    let bed = Bed::primary();
    let c = open(&bed, "wal", 4096);
    c.execute_batch("PRAGMA synchronous=NORMAL; CREATE TABLE t(v)")
        .unwrap();
    let newest = bed.db(DB).log().last_txid();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while bed.db(DB).pos().txid < newest {
        assert!(std::time::Instant::now() < deadline, "nobody flushed it");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn two_connections_take_turns() {
    for mode in MODES {
        let bed = Bed::primary();
        let (a, b) = (open(&bed, mode, 4096), bed.connect(DB));
        a.execute_batch("CREATE TABLE t(v)").unwrap();
        for i in 0..20 {
            let (c, other) = if i % 2 == 0 { (&a, &b) } else { (&b, &a) };
            c.execute("INSERT INTO t VALUES (?)", [i]).unwrap();
            let rows: i64 = other
                .query_row("SELECT count(*) FROM t", [], |r| r.get(0))
                .unwrap();
            assert_eq!(rows, i + 1, "{mode}");
        }
        a.execute_batch("BEGIN IMMEDIATE; INSERT INTO t VALUES (99)")
            .unwrap();
        b.busy_timeout(Duration::ZERO).unwrap();
        let e = b.execute_batch("BEGIN IMMEDIATE").unwrap_err();
        assert_eq!(
            e.sqlite_error_code(),
            Some(ErrorCode::DatabaseBusy),
            "{mode}"
        );
        a.execute_batch("COMMIT").unwrap();
        bed.check_killed(DB);
        assert_eq!(bed.vfs.take_errors(), Vec::<String>::new(), "{mode}");
    }
}

fn newest_segment(bed: &Bed) -> std::path::PathBuf {
    let log = bed.dir.path().join("dbs").join(DB).join("log");
    segment_files(&log).pop().unwrap()
}

#[test]
fn a_commit_that_cannot_be_logged_is_refused_and_leaves_no_trace() {
    for mode in MODES {
        let bed = Bed::primary();
        let c = open(&bed, mode, 4096);
        c.execute_batch("CREATE TABLE t(v); INSERT INTO t VALUES (1)")
            .unwrap();
        let before = bed.check(DB);
        let full = redirect(&newest_segment(&bed), "/dev/full");
        let e = c.execute_batch("INSERT INTO t VALUES (2)").unwrap_err();
        assert_eq!(
            e.sqlite_error_code(),
            Some(ErrorCode::DiskFull),
            "{mode}: {e}"
        );
        assert_eq!(bed.check(DB), before, "{mode}");
        if mode == "wal" {
            // Whoever recovers the index from the WAL must not find the refused commit.
            let shm = std::fs::File::options()
                .write(true)
                .open(bed.file(DB, FileKind::Shm))
                .unwrap();
            shm.write_all_at(&[0; 136], 0).unwrap();
        }
        for d in [&c, &bed.connect(DB)] {
            let rows: i64 = d
                .query_row("SELECT count(*) FROM t", [], |r| r.get(0))
                .unwrap();
            assert_eq!(rows, 1, "{mode}");
        }
        full.restore();
        c.execute_batch("INSERT INTO t VALUES (3)").unwrap();
        let found: i64 = c
            .query_row("SELECT sum(v) FROM t", [], |r| r.get(0))
            .unwrap();
        assert_eq!(found, 4, "{mode}");
        assert_eq!(bed.check_killed(DB).0.txid, before.0.txid + 1, "{mode}");
        integrity(&c);
    }
}

#[test]
fn a_commit_that_cannot_be_flushed_is_never_told_of() {
    for mode in MODES {
        let bed = Bed::primary();
        let c = open(&bed, mode, 4096);
        c.execute_batch("PRAGMA synchronous=FULL; CREATE TABLE t(v); INSERT INTO t VALUES (1)")
            .unwrap();
        let before = bed.check(DB).0;
        let lost = redirect(&newest_segment(&bed), "/dev/null");
        assert!(
            c.execute_batch("INSERT INTO t VALUES (2)").is_err(),
            "{mode}"
        );
        lost.restore();
        let db = bed.db(DB);
        for _ in 0..2 {
            db.settle();
            assert_eq!(db.pos(), before, "{mode}");
            assert!(
                c.execute_batch("INSERT INTO t VALUES (3)").is_err(),
                "{mode}"
            );
        }
        assert!(db.snapshot().is_err(), "{mode}");
        assert_eq!(bed.killed().check(DB).0, before, "{mode}");
    }
}

#[test]
fn a_large_transaction_is_compressed_where_that_pays() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(Options {
        compress: true,
        ..options(dir.path())
    });
    let store = store.unwrap();
    let bed = Bed {
        vfs: Vfs::register(&store),
        store,
        dir,
    };
    bed.store.set_role(Role::Primary);
    for mode in ["delete", "wal"] {
        let c = bed.connect(DB);
        assert_eq!(set_mode(&c, mode), mode);
        c.execute_batch("DROP TABLE IF EXISTS t; CREATE TABLE t(v)")
            .unwrap();
        for (value, compressed) in [
            ("randomblob(100000)", true),
            ("randomblob(3000000)", false),
            ("zeroblob(3000000)", true),
        ] {
            c.execute_batch(&format!("INSERT INTO t VALUES ({value})"))
                .unwrap();
            let db = bed.db(DB);
            db.settle();
            let record = db.log().read(db.pos().txid).unwrap().unwrap();
            let header = record.ltx_header().unwrap();
            assert_eq!(header.compressed, compressed, "{mode}: {value}");
        }
        drop(c);
        bed.check_killed(DB);
    }
}
