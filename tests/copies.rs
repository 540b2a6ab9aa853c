//! Database files that programs which know nothing of SQLite copy into the mount.

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use common::run::{Finished, Running, run};
use common::{Cluster, Pair, sqlite3, wait_until};

const LIMIT: Duration = Duration::from_secs(60);

fn shell(script: &str, from: &Path, to: &Path) -> Finished {
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(from).arg(to);
    run(&mut command, b"", LIMIT)
}

fn gone(path: &Path) -> Result<(), u64> {
    fs::metadata(path).map_or(Ok(()), |m| Err(m.len()))
}

fn count(db: &Path) -> String {
    sqlite3(db, "PRAGMA integrity_check; SELECT count(*) FROM t;")
}

/// A database of `rows` rows outside of the mount, in this journal mode.
fn source(pair: &Pair, name: &str, mode: &str, rows: u32) -> std::path::PathBuf {
    let path = pair.cluster.dir().join(name);
    sqlite3(
        &path,
        &format!(
            "PRAGMA journal_mode={mode}; CREATE TABLE t (a, b);
             WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < {rows})
               INSERT INTO t SELECT i, zeroblob(500) FROM n;"
        ),
    );
    path
}

#[test]
fn a_database_copied_in_is_one_transaction() {
    let pair = Cluster::static_pair(120);
    let commands = [
        ("cp", "cp \"$1\" \"$2\""),
        ("cp-p", "cp -p --sparse=always \"$1\" \"$2\""),
        (
            "dd",
            "dd if=\"$1\" of=\"$2\" bs=3000 conv=fsync status=none",
        ),
        ("cat", "cat \"$1\" > \"$2\""),
        ("install", "install \"$1\" \"$2\""),
    ];
    for mode in ["delete", "wal"] {
        let from = source(&pair, &format!("source-{mode}.db"), mode, 2000);
        for (name, command) in commands {
            let db = format!("{name}-{mode}.db");
            let to = pair.primary.db(&db);
            let done = shell(command, &from, &to);
            assert!(done.success(), "{db}: {}", done.stderr);
            // It is there when the program has ended, and not before the first look at it.
            assert_eq!(pair.primary.txid(&db), 1, "{db}");
            assert_eq!(count(&to), "ok\n2000\n", "{db}");
            pair.assert_same(&db);
        }
    }
}

#[test]
fn a_copy_takes_the_place_of_a_database_that_is_in_use() {
    let pair = Cluster::static_pair(120);
    let from = source(&pair, "source.db", "delete", 300);
    for mode in ["delete", "truncate", "persist", "wal"] {
        let db = format!("{mode}.db");
        let to = pair.primary.db(&db);
        let open = Connection::open(&to).expect("open");
        open.execute_batch(&format!(
            "PRAGMA journal_mode={mode}; PRAGMA mmap_size=1000000; CREATE TABLE other (x); \
             CREATE TABLE t (x); INSERT INTO t VALUES (zeroblob(100000)); SELECT * FROM t;"
        ))
        .expect("write");
        let before = pair.primary.txid(&db);
        let done = shell("cp \"$1\" \"$2\"", &from, &to);
        assert!(done.success(), "{db}: {}", done.stderr);
        assert_eq!(pair.primary.txid(&db), before + 1, "{db}");
        // The open connection sees it, and goes on.
        let rows: i64 = open
            .query_row("SELECT count(b) FROM t", [], |r| r.get(0))
            .expect("read");
        assert_eq!(rows, 300, "{db}");
        open.execute("INSERT INTO t VALUES (1, 2)", [])
            .expect("write again");
        assert_eq!(count(&to), "ok\n301\n", "{db}");
        pair.assert_same(&db);
    }
}

#[test]
fn what_is_no_whole_database_changes_nothing() {
    let pair = Cluster::static_pair(120);
    let good = source(&pair, "good.db", "delete", 300);
    let cut = pair.cluster.dir().join("cut.db");
    let bytes = fs::read(&good).expect("read");
    fs::write(&cut, &bytes[..bytes.len() - 5000]).expect("write");
    let text = pair.cluster.dir().join("text");
    fs::write(&text, "no database\n".repeat(1000)).expect("write");
    for mode in ["delete", "wal"] {
        let to = pair.primary.db(&format!("{mode}.db"));
        sqlite3(
            &to,
            &format!("PRAGMA journal_mode={mode}; CREATE TABLE t (a); INSERT INTO t VALUES (1);"),
        );
    }
    for from in [&cut, &text] {
        for command in [
            "cp \"$1\" \"$2\"",
            "dd if=\"$1\" of=\"$2\" bs=1000 status=none",
            "cp \"$1\" \"$2\" && truncate -s 0 \"$2\"",
        ] {
            for db in ["delete.db", "wal.db", "new.db"] {
                let to = pair.primary.db(db);
                let done = shell(command, from, &to);
                assert!(
                    !done.success() && !done.stderr.is_empty(),
                    "{command} of {} to {db} went through",
                    from.display()
                );
            }
        }
    }
    for db in ["delete.db", "wal.db"] {
        let to = pair.primary.db(db);
        let emptied = shell("truncate -s 0 \"$2\"", &text, &to);
        assert!(!emptied.success(), "{db} was emptied");
        assert_eq!(count(&to), "ok\n1\n", "{db}");
        pair.assert_same(db);
    }
    // Nothing is left of what was to be a new one; SQLite may use the name.
    let new = pair.primary.db("new.db");
    wait_until("the refused copy to go", LIMIT, || gone(&new));
    sqlite3(&new, "CREATE TABLE t (a);");
    pair.assert_same("new.db");
    let log = pair.primary.log();
    assert!(log.contains("no SQLite database"), "no reason in:\n{log}");
}

#[test]
fn a_copy_that_is_broken_off_changes_nothing() {
    let pair = Cluster::static_pair(120);
    let from = source(&pair, "source.db", "delete", 3000);
    let bytes = fs::read(&from).expect("read");
    for db in ["old.db", "new.db"] {
        let to = pair.primary.db(db);
        if db == "old.db" {
            sqlite3(&to, "CREATE TABLE t (a); INSERT INTO t VALUES (1);");
        }
        let mut command = Command::new("dd");
        command
            .arg(format!("of={}", to.display()))
            .arg("bs=4096")
            .stdin(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null());
        let mut dd = Running(command.spawn().expect("start dd"));
        let half = &bytes[..bytes.len() / 2];
        let input = dd.0.stdin.as_mut().expect("it has an input");
        input.write_all(half).expect("write half of it");
        input.flush().expect("flush");
        std::thread::sleep(Duration::from_millis(300));
        dd.kill9();
        if db == "old.db" {
            assert_eq!(count(&to), "ok\n1\n");
            pair.assert_same(db);
        } else {
            wait_until("half a copy to go", LIMIT, || gone(&to));
        }
    }
}

#[test]
fn a_copy_to_a_replica_is_refused() {
    let pair = Cluster::static_pair(90);
    let from = source(&pair, "source.db", "delete", 10);
    sqlite3(&pair.primary.db("x.db"), "CREATE TABLE t (a);");
    pair.assert_same("x.db");
    for db in ["x.db", "new.db"] {
        let done = shell("cp \"$1\" \"$2\"", &from, &pair.replica.db(db));
        assert!(!done.success(), "cp to {db} on a replica went through");
    }
    pair.assert_same("x.db");
    assert_eq!(pair.replica.pos("new.db"), None);
}

#[test]
fn a_copy_waits_for_a_writer_and_then_says_busy() {
    let pair = Cluster::static_pair(120);
    let from = source(&pair, "source.db", "delete", 10);
    let to = pair.primary.db("x.db");
    sqlite3(&to, "CREATE TABLE t (a); INSERT INTO t VALUES (1);");
    let open = Connection::open(&to).expect("open");
    open.execute_batch("BEGIN IMMEDIATE; INSERT INTO t VALUES (2);")
        .expect("begin");
    let began = Instant::now();
    let done = shell("cp \"$1\" \"$2\"", &from, &to);
    assert!(!done.success(), "it went through");
    assert!(done.stderr.contains("busy"), "{}", done.stderr);
    assert!(began.elapsed() < Duration::from_secs(30));
    open.execute_batch("COMMIT").expect("commit");
    assert_eq!(count(&to), "ok\n2\n");
    pair.assert_same("x.db");
}

#[test]
fn a_database_and_its_wal_are_copied_in() {
    let pair = Cluster::static_pair(90);
    let from = source(&pair, "source.db", "wal", 100);
    // Kept open: what it has written since is in the WAL alone.
    let open = Connection::open(&from).expect("open");
    open.execute_batch("PRAGMA wal_autocheckpoint=0; INSERT INTO t SELECT * FROM t;")
        .expect("write");
    let done = shell(
        "cp \"$1\" \"$2\" && cp \"$1-wal\" \"$2-wal\"",
        &from,
        &pair.primary.db("x.db"),
    );
    assert!(done.success(), "{}", done.stderr);
    assert_eq!(count(&pair.primary.db("x.db")), "ok\n200\n");
    sqlite3(&pair.primary.db("x.db"), "INSERT INTO t VALUES (1, 2);");
    assert_eq!(count(&pair.primary.db("x.db")), "ok\n201\n");
    pair.assert_same("x.db");
}

#[test]
fn sqlites_own_ways_to_copy() {
    let pair = Cluster::static_pair(90);
    let from = source(&pair, "source.db", "delete", 100);
    let show = |db: &str| pair.primary.db(db).display().to_string();
    sqlite3(&from, &format!("VACUUM INTO '{}';", show("vacuum.db")));
    sqlite3(&from, &format!(".backup {}", show("backup.db")));
    sqlite3(
        &pair.primary.db("restore.db"),
        &format!("CREATE TABLE t (a);\n.restore {}", from.display()),
    );
    sqlite3(
        &pair.primary.db("attach.db"),
        &format!(
            "ATTACH '{}' AS other; CREATE TABLE t AS SELECT 1; CREATE TABLE other.t AS SELECT 2;",
            show("attached.db")
        ),
    );
    sqlite3(
        &pair.primary.db("vacuum.db"),
        &format!("VACUUM INTO '{}';", show("vacuum-2.db")),
    );
    for (db, rows) in [
        ("vacuum.db", 100),
        ("vacuum-2.db", 100),
        ("backup.db", 100),
        ("restore.db", 100),
        ("attach.db", 1),
        ("attached.db", 1),
    ] {
        assert_eq!(count(&pair.primary.db(db)), format!("ok\n{rows}\n"), "{db}");
        pair.assert_same(db);
    }
}
