//! A data directory on a full disk: who writes gets an error, nothing is damaged, and work goes on
//! once there is space again. Needs root, for a small file system in memory.

mod common;

use std::path::Path;

use common::disk::{SmallDisk, fill};
use common::{Cluster, Node, Options, Pair, sql, sqlite3};

/// A pair whose node of that name has a disk of 24 MB. Dropped in this order.
fn pair_with_small_disk(of: &str) -> Option<(Pair, SmallDisk)> {
    let cluster = Cluster::new(150);
    let disk = SmallDisk::mount(&cluster.subdir(&format!("{of}/data")), 24)?;
    let options = |options| Options {
        strict_verify: true,
        ..options
    };
    let primary = options(Options::primary("primary"));
    let replica = options(Options::replica("replica", &primary));
    let primary = cluster.start(primary);
    let replica = cluster.start(replica);
    let pair = Pair {
        replica,
        primary,
        cluster,
    };
    Some((pair, disk))
}

const INSERTS: &str = "INSERT INTO t (b) VALUES (randomblob(20000));";

#[test]
fn the_primarys_disk_is_full() {
    let Some((mut pair, _disk)) = pair_with_small_disk("primary") else {
        return;
    };
    for mode in ["delete", "persist", "wal"] {
        let db = format!("{mode}.db");
        let path = pair.primary.db(&db);
        sqlite3(
            &path,
            &format!("PRAGMA journal_mode={mode}; CREATE TABLE t (b); {INSERTS}"),
        );
        pair.assert_same(&db);
        let filler = fill(&pair.primary);
        // A mebibyte is preallocated at most: some may still succeed.
        let done = sql::sqlite3_raw(&path, &INSERTS.repeat(300), false);
        println!("{mode}: {}", done.stderr.lines().next().unwrap_or(""));
        assert!(!done.stderr.is_empty(), "{mode}: 6 MB fit into a full disk");
        assert!(pair.primary.is_up(), "{mode}");
        std::fs::remove_file(filler).expect("remove the filler");
        // Nothing is damaged, and a writer gets on.
        let count = |node: &Node| -> i64 {
            let text = sqlite3(
                &node.db(&db),
                "PRAGMA integrity_check; SELECT count(*) FROM t;",
            );
            let rows = text.strip_prefix("ok\n").expect("integrity");
            rows.trim().parse().expect("a number")
        };
        let before = count(&pair.primary);
        sqlite3(&path, INSERTS);
        assert_eq!(count(&pair.primary), before + 1, "{mode}");
        pair.assert_same(&db);
        if mode == "persist" {
            // The same after a start.
            pair.primary.stop();
            pair.primary.start();
            assert_eq!(count(&pair.primary), before + 1, "{mode}");
            pair.assert_same(&db);
        }
        std::fs::remove_file(path).expect("drop the database");
    }
}

#[test]
fn the_replicas_disk_is_full() {
    let Some((mut pair, _disk)) = pair_with_small_disk("replica") else {
        return;
    };
    for mode in ["delete", "wal"] {
        let db = format!("{mode}.db");
        let path = pair.primary.db(&db);
        sqlite3(
            &path,
            &format!("PRAGMA journal_mode={mode}; CREATE TABLE t (b); {INSERTS}"),
        );
        pair.assert_same(&db);
        let filler = fill(&pair.replica);
        // The primary does not mind.
        sqlite3(&path, &INSERTS.repeat(150));
        std::thread::sleep(std::time::Duration::from_millis(500));
        assert!(pair.replica.is_up(), "{mode}: the replica ended");
        std::fs::remove_file(filler).expect("remove the filler");
        pair.assert_same(&db);
        std::fs::remove_file(path).expect("drop the database");
    }
}

#[test]
fn the_replicas_disk_is_full_at_its_first_transaction_in_wal_mode() {
    let Some((mut pair, _disk)) = pair_with_small_disk("replica") else {
        return;
    };
    let path = pair.primary.db("x.db");
    sqlite3(&path, &format!("CREATE TABLE t (b); {INSERTS}"));
    pair.assert_same("x.db");
    // All sizes of what is left: for the log alone, for the WAL, and not for the WAL's index.
    for left in [0, 8, 16, 32, 64, 96, 128, 160, 192, 256] {
        sqlite3(&path, "PRAGMA journal_mode=delete;");
        pair.assert_same("x.db");
        let filler = fill(&pair.replica);
        let file = std::fs::File::options()
            .write(true)
            .open(&filler)
            .expect("open the filler");
        let size = file.metadata().expect("its size").len();
        file.set_len(size.saturating_sub(left << 10)).expect("cut");
        drop(file);
        sqlite3(&path, &format!("PRAGMA journal_mode=wal; {INSERTS}"));
        std::thread::sleep(std::time::Duration::from_millis(200));
        assert!(pair.replica.is_up(), "{left} KiB left: the replica ended");
        std::fs::remove_file(filler).expect("remove the filler");
        pair.assert_same("x.db");
        // It waited for space: its database was not given up for another.
        assert!(!pair.replica.data().join("set-aside").exists(), "{left}");
    }
}

/// Inserts numbered rows one by one, each its own transaction; which were acknowledged.
fn insert_some(path: &Path, sync: &str, numbers: std::ops::Range<u32>) -> Vec<u32> {
    let mut acknowledged = Vec::new();
    let db = rusqlite::Connection::open(path).expect("open");
    db.busy_timeout(common::SOON).expect("set a limit");
    // A full disk may refuse that too.
    let _ = db.execute_batch(&format!("PRAGMA synchronous={sync}; PRAGMA cache_size=10"));
    for n in numbers {
        let sql = "INSERT INTO t VALUES (?1, randomblob(60000))";
        if db.execute(sql, [n]).is_ok() {
            acknowledged.push(n);
        }
    }
    acknowledged
}

/// The disk of the node of that name fills up and empties again, under a writer, several times.
fn fills_and_empties(of: &str, settings: &[(&str, &str)]) {
    let Some((mut pair, _disk)) = pair_with_small_disk(of) else {
        return;
    };
    for (mode, sync) in settings {
        let db = format!("{mode}-{sync}.db");
        let path = pair.primary.db(&db);
        let table = "CREATE TABLE t (n INTEGER PRIMARY KEY, b);";
        sqlite3(&path, &format!("PRAGMA journal_mode={mode}; {table}"));
        pair.assert_same(&db);
        let mut acknowledged = Vec::new();
        for round in 0..2 {
            let numbers = |part: u32| (round * 100 + part)..(round * 100 + part + 10);
            acknowledged.extend(insert_some(&path, sync, numbers(0)));
            let node = if of == "primary" {
                &pair.primary
            } else {
                &pair.replica
            };
            let filler = fill(node);
            acknowledged.extend(insert_some(&path, sync, 100 * round + 10..100 * round + 40));
            std::fs::remove_file(filler).expect("remove the filler");
            let after = insert_some(&path, sync, numbers(40));
            assert_eq!(after.len(), 10, "{db}: it does not get on: {after:?}");
            acknowledged.extend(after);
            // Small disks: what is not needed any more goes.
            let keep = format!("UPDATE t SET b = NULL WHERE n < {};", round * 100 + 45);
            sqlite3(&path, &keep);
        }
        let rows = sqlite3(&path, "PRAGMA integrity_check; SELECT n FROM t ORDER BY n;");
        let rows = rows.strip_prefix("ok\n").expect("integrity");
        let rows: Vec<u32> = rows.lines().map(|n| n.parse().expect("a number")).collect();
        let missing: Vec<_> = acknowledged.iter().filter(|n| !rows.contains(n)).collect();
        assert!(
            missing.is_empty(),
            "{db}: acknowledged and not there: {missing:?}"
        );
        pair.assert_same(&db);
        assert!(
            pair.primary.is_up() && pair.replica.is_up(),
            "{db}: a node ended"
        );
        let aside = pair.replica.data().join("set-aside");
        assert!(!aside.exists(), "{db}: a full disk is no damage");
        std::fs::remove_file(path).expect("drop the database");
    }
}

#[test]
fn the_primarys_disk_fills_and_empties_under_writers() {
    let settings = [
        ("delete", "FULL"),
        ("truncate", "NORMAL"),
        ("persist", "FULL"),
        ("wal", "FULL"),
        ("wal", "NORMAL"),
    ];
    fills_and_empties("primary", &settings);
}

#[test]
fn the_replicas_disk_fills_and_empties_under_writers() {
    fills_and_empties("replica", &[("delete", "FULL"), ("wal", "NORMAL")]);
}
