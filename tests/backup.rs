//! Backups of type file: what is committed is there, comes back, and is never overwritten by what
//! is not its continuation.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::run::run;
use common::{Cluster, Node, Options, SOON, sqlite3, wait_until};

const MODES: [&str; 4] = ["delete", "truncate", "persist", "wal"];

fn options(name: &str, backup: &Path) -> Options {
    Options {
        backup: Some(backup.to_owned()),
        strict_verify: true,
        ..Options::primary(name)
    }
}

/// The last TXID in the backup; 0: there is none.
fn backed_up(backup: &Path, db: &str) -> u64 {
    let Ok(files) = fs::read_dir(backup.join("dbs").join(db)) else {
        return 0;
    };
    let names = files.filter_map(|f| f.ok()?.file_name().into_string().ok());
    let ends =
        names.filter_map(|n| u64::from_str_radix(n.strip_suffix(".ltx")?.get(17..)?, 16).ok());
    ends.max().unwrap_or(0)
}

fn wait_backed_up(node: &Node, backup: &Path, db: &str) {
    wait_until(&format!("{db} in the backup"), SOON, || {
        let (have, want) = (backed_up(backup, db), node.txid(db));
        if have == want {
            Ok(())
        } else {
            Err((have, want))
        }
    });
}

fn copy(from: &Path, to: &Path) {
    let done = run(
        Command::new("cp").arg("-a").arg(from).arg(to),
        b"",
        Duration::from_secs(60),
    );
    assert!(done.success(), "{}", done.stderr);
}

fn replace(from: &Path, to: &Path) {
    fs::remove_dir_all(to).expect("remove");
    copy(from, to);
}

fn fill(node: &Node, db: &str, mode: &str) {
    sqlite3(
        &node.db(db),
        &format!(
            "PRAGMA journal_mode={mode}; CREATE TABLE t (a, b);
             WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 300)
               INSERT INTO t SELECT i, randomblob(200) FROM n;"
        ),
    );
}

fn setting(limit: u64) -> (Cluster, PathBuf) {
    let cluster = Cluster::new(limit);
    let backup = cluster.dir().join("backup");
    (cluster, backup)
}

#[test]
fn an_empty_node_is_restored() {
    let (cluster, backup) = setting(120);
    let mut node = cluster.start(options("first", &backup));
    let mut want = Vec::new();
    for mode in MODES {
        let db = format!("{mode}.db");
        fill(&node, &db, mode);
        for i in 0..40 {
            sqlite3(
                &node.db(&db),
                &format!("UPDATE t SET b = randomblob(100) WHERE a % 40 = {i};"),
            );
        }
        sqlite3(&node.db(&db), "DELETE FROM t WHERE a > 200; VACUUM;");
    }
    sqlite3(&node.db("dropped.db"), "CREATE TABLE t (a);");
    fs::remove_file(node.db("dropped.db")).expect("drop");
    for mode in MODES {
        let db = format!("{mode}.db");
        wait_backed_up(&node, &backup, &db);
        want.push((db.clone(), node.pos(&db), sqlite3(&node.db(&db), ".dump")));
    }
    wait_until(
        "the dropped database in the backup",
        SOON,
        || match backed_up(&backup, "dropped.db") {
            2 => Ok(()),
            n => Err(n),
        },
    );
    node.kill9();
    let second = cluster.start(options("second", &backup));
    for (db, pos, dump) in &want {
        assert_eq!(&second.pos(db), pos);
        assert_eq!(sqlite3(&second.db(db), "PRAGMA integrity_check;"), "ok\n");
        assert_eq!(&sqlite3(&second.db(db), ".dump"), dump);
        // It goes on from there, and so does its backup.
        sqlite3(&second.db(db), "INSERT INTO t VALUES (1, 2);");
        wait_backed_up(&second, &backup, db);
    }
    assert!(!second.db("dropped.db").exists());
    sqlite3(&second.db("dropped.db"), "CREATE TABLE u (a);");
    assert_eq!(second.txid("dropped.db"), 3);
    let ids = [node.data(), second.data(), backup]
        .map(|dir| fs::read(dir.join("clusterid")).expect("ID"));
    assert!(ids[0] == ids[1] && ids[1] == ids[2], "one cluster");
}

#[test]
fn a_node_that_stops_sends_what_is_left_and_old_data_is_brought_up_to_it() {
    let (cluster, backup) = setting(120);
    let mut node = cluster.start(options("node", &backup));
    for mode in ["delete", "wal"] {
        fill(&node, &format!("{mode}.db"), mode);
    }
    assert_eq!(node.stop(), Some(0));
    let old = cluster.dir().join("old");
    copy(&node.data(), &old);
    node.start();
    let mut want = Vec::new();
    for mode in ["delete", "wal"] {
        let db = format!("{mode}.db");
        sqlite3(
            &node.db(&db),
            "CREATE TABLE u (a); INSERT INTO u VALUES (randomblob(50000));",
        );
        want.push((db.clone(), node.pos(&db), sqlite3(&node.db(&db), ".dump")));
    }
    // At once: what was committed last is not lost to the second that batches take.
    assert_eq!(node.stop(), Some(0));
    replace(&old, &node.data());
    node.start();
    for (db, pos, dump) in &want {
        assert_eq!(&node.pos(db), pos);
        assert_eq!(&sqlite3(&node.db(db), ".dump"), dump);
    }
    // The same data with another present is not the backup's past: neither gives way.
    node.stop();
    replace(&old, &node.data());
    let aside = cluster.dir().join("aside");
    node.options.backup = None;
    node.start();
    sqlite3(
        &node.db("wal.db"),
        "INSERT INTO t VALUES ('another present', 1);",
    );
    node.stop();
    copy(&backup, &aside);
    node.options.backup = Some(backup.clone());
    node.start();
    let text = "another history: nothing is overwritten";
    wait_until("a complaint", SOON, || match node.log().contains(text) {
        true => Ok(()),
        false => Err(()),
    });
    let count = "SELECT count(*) FROM t WHERE a = 'another present';";
    assert_eq!(sqlite3(&node.db("wal.db"), count), "1\n");
    sqlite3(
        &node.db("wal.db"),
        "INSERT INTO t VALUES ('it goes on', 1);",
    );
    assert_eq!(backed_up(&backup, "wal.db"), backed_up(&aside, "wal.db"));
    // The other database is not held up by it.
    sqlite3(&node.db("delete.db"), "INSERT INTO t VALUES (1, 1);");
    wait_backed_up(&node, &backup, "delete.db");
}

#[test]
fn a_backup_that_fails_holds_nothing_up_and_loses_nothing() {
    let (cluster, backup) = setting(180);
    let short = |o: Options| Options {
        retention: Some("500ms"),
        ..o
    };
    let primary_options = short(options("primary", &backup));
    let replica_options = Options::replica("replica", &primary_options);
    let primary = cluster.start(primary_options);
    let mut replica = cluster.start(replica_options);
    fill(&primary, "x.db", "wal");
    wait_backed_up(&primary, &backup, "x.db");
    // Written once more, so that the replica hears where the backup is.
    sqlite3(&primary.db("x.db"), "INSERT INTO t VALUES (0, 0);");
    wait_backed_up(&primary, &backup, "x.db");
    sqlite3(&primary.db("x.db"), "INSERT INTO t VALUES (0, 0);");
    wait_backed_up(&primary, &backup, "x.db");
    let (dir, away) = (backup.join("dbs"), backup.join("away"));
    fs::rename(&dir, &away).expect("rename");
    fs::write(&dir, "in the way").expect("write");
    let before = primary.txid("x.db");
    for i in 0..30 {
        sqlite3(
            &primary.db("x.db"),
            &format!("INSERT INTO t VALUES ('outage', {i});"),
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    common::assert_same(&primary, &replica, "x.db");
    // Several retention times later, on both nodes.
    std::thread::sleep(Duration::from_secs(3));
    for node in [&primary, &replica] {
        let records = node.metric("litefs_db_ltx_count");
        assert!(
            records >= 30.0,
            "{records} records left on {}",
            node.options.name
        );
    }
    let complaints = primary.log().matches("the backup fails").count();
    assert_eq!(complaints, 1, "{}", primary.log());
    fs::remove_file(&dir).expect("remove");
    fs::rename(&away, &dir).expect("rename");
    wait_backed_up(&primary, &backup, "x.db");
    wait_until("the good news", SOON, || {
        match primary.log().contains("works again") {
            true => Ok(()),
            false => Err(()),
        }
    });
    assert_eq!(primary.txid("x.db"), before + 30);
    let aside = fs::read_dir(dir.join("x.db")).expect("list");
    assert!(
        aside.flatten().all(|e| e.path().is_file()),
        "the chain goes on: no new snapshot"
    );
    // What the backup has may go now.
    wait_until("old records to be pruned", SOON, || {
        sqlite3(&primary.db("x.db"), "INSERT INTO t VALUES (1, 1);");
        match primary.metric("litefs_db_ltx_count") {
            n if n < 30.0 => Ok(()),
            n => Err(n),
        }
    });
    replica.stop();
}

#[test]
fn an_empty_node_does_not_start_beside_a_backup_that_it_cannot_read() {
    let (cluster, backup) = setting(60);
    let mut node = cluster.start(options("node", &backup));
    fill(&node, "x.db", "delete");
    assert_eq!(node.stop(), Some(0));
    let file = fs::read_dir(backup.join("dbs/x.db")).expect("list");
    let path = file
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "ltx"));
    let path = path.expect("an LTX file");
    let mut bytes = fs::read(&path).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, &bytes).expect("write");
    // With its own data it starts: it needs nothing of the backup.
    node.start();
    assert_eq!(
        sqlite3(&node.db("x.db"), "SELECT count(*) FROM t;"),
        "300\n"
    );
    assert_eq!(node.stop(), Some(0));
    fs::remove_dir_all(node.data()).expect("remove");
    node.spawn();
    wait_until("the end of the start", SOON, || match node.is_up() {
        false if node.log().contains("cannot read the backup") => Ok(()),
        up => Err(up),
    });
    // A node of another cluster leaves it alone.
    bytes[middle] ^= 1;
    fs::write(&path, &bytes).expect("write");
    let other = cluster.start(Options {
        backup: None,
        ..options("other", &backup)
    });
    fill(&other, "x.db", "delete");
    let mut other = other;
    other.stop();
    other.options.backup = Some(backup.clone());
    other.start();
    wait_until("a complaint", SOON, || {
        match other.log().contains("the backup belongs to cluster") {
            true => Ok(()),
            false => Err(()),
        }
    });
    assert_eq!(fs::read(&path).expect("read"), bytes);
}

/// The LTX files of a database's chain.
fn chain(backup: &Path, db: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(backup.join("dbs").join(db)).expect("list the backup");
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "ltx"))
        .collect();
    files.sort();
    files
}

fn flip_middle(path: &Path) {
    let mut bytes = fs::read(path).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, &bytes).expect("write");
}

#[test]
fn a_damaged_backup_heals_and_is_reported() {
    let (cluster, backup) = setting(120);
    let mut node = cluster.start(Options {
        scrub: Some("300ms"),
        ..options("node", &backup)
    });
    for db in ["x.db", "other.db"] {
        fill(&node, db, "delete");
        wait_backed_up(&node, &backup, db);
    }
    for n in 0..3 {
        sqlite3(&node.db("x.db"), &format!("INSERT INTO t VALUES (0, {n});"));
        wait_backed_up(&node, &backup, "x.db");
    }
    let other = chain(&backup, "other.db");
    let damaged = chain(&backup, "x.db");
    assert!(damaged.len() > 2, "{damaged:?}");
    // The snapshot, and then one of those that follow.
    for which in [0, 1] {
        let path = chain(&backup, "x.db").swap_remove(which);
        flip_middle(&path);
        wait_until("the backup to heal", SOON, || {
            let chain = chain(&backup, "x.db");
            let whole = |p: &PathBuf| {
                let mut verify = Command::new(common::node::TENURE);
                let done = run(verify.args(["ltx", "verify"]).arg(p), b"", SOON);
                done.success()
            };
            match !chain.is_empty() && chain.iter().all(whole) {
                true => Ok(()),
                false => Err(format!("{chain:?}\n{}", node.log())),
            }
        });
        let log = node.log();
        let name = path
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        assert!(
            log.contains("the backup is damaged") && log.contains(&name),
            "{log}"
        );
        sqlite3(&node.db("x.db"), "INSERT INTO t VALUES (1, 1);");
        wait_backed_up(&node, &backup, "x.db");
        sqlite3(&node.db("x.db"), "INSERT INTO t VALUES (1, 2);");
        wait_backed_up(&node, &backup, "x.db");
    }
    assert_eq!(
        chain(&backup, "other.db"),
        other,
        "the other one is left alone"
    );
    // What was damaged is kept aside, and what is there restores.
    let aside = fs::read_dir(backup.join("dbs/x.db"))
        .expect("list")
        .flatten();
    let aside = aside.filter(|e| e.file_name().to_string_lossy().starts_with("aside-"));
    assert_eq!(aside.count(), 2);
    let rows = sqlite3(&node.db("x.db"), "SELECT count(*) FROM t;");
    assert_eq!(node.stop(), Some(0));
    fs::remove_dir_all(node.data()).expect("remove");
    node.start();
    assert_eq!(sqlite3(&node.db("x.db"), "SELECT count(*) FROM t;"), rows);
}

#[test]
fn a_backup_on_a_file_system_that_hangs() {
    let cluster = Cluster::new(150);
    // A mount whose server stands still: whoever asks it waits.
    let server = cluster.start(Options::primary("server"));
    let backup = server.mount().join("backup");
    let mut node = cluster.start(options("node", &cluster.subdir("backup")));
    fill(&node, "x.db", "delete");
    assert_eq!(node.stop(), Some(0));
    node.options.backup = Some(backup.clone());
    server.freeze(true);
    let logged = node.log().len();
    // With its own data it starts, and says what it does without.
    node.start();
    sqlite3(&node.db("x.db"), "INSERT INTO t VALUES (1, 1);");
    let log = node.log().split_off(logged);
    assert!(log.contains("does not answer"), "{log}");
    let began = std::time::Instant::now();
    assert_eq!(node.stop(), Some(0), "{}", node.log());
    assert!(
        began.elapsed() < Duration::from_secs(25),
        "{:?}",
        began.elapsed()
    );
    // Without any, it does not: it would begin another history.
    fs::remove_dir_all(node.data()).expect("remove");
    node.spawn();
    assert_eq!(node.wait(SOON), Some(1), "{}", node.log());
    let log = node.log();
    let said = log.lines().rfind(|l| l.contains("ERROR: ")).unwrap_or("");
    for part in ["does not answer", backup.to_str().expect("text")] {
        assert!(said.contains(part), "{part} in {log}");
    }
    server.freeze(false);
}
