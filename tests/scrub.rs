//! Bits that flip on a node's disk, at rest and while it runs: found, reported, mended from what is
//! whole, or set aside; never served, and never passed on.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::events::Events;
use common::sql::{sqlite3_fails, sqlite3_raw};
use common::{Cluster, Node, Options, SOON, sqlite3, wait_until};
use rusqlite::Connection;

const FAULTS: &str = "tenure_scrub_faults_total";

/// Flips one bit of a file.
fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path);
    let file = file.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read the byte");
    file.write_all_at(&[byte[0] ^ 0x10], at).expect("flip it");
}

fn length(path: &Path) -> u64 {
    std::fs::metadata(path).expect("its size").len()
}

/// Waits until a file has not been written for a while.
fn await_rest(path: &Path) {
    wait_until("the file to be at rest", SOON, || {
        let written = std::fs::metadata(path).and_then(|m| m.modified());
        let age = written.expect("a time").elapsed().unwrap_or_default();
        match age.as_millis() {
            1000.. => Ok(()),
            ms => Err(ms),
        }
    });
}

/// The segments of a database's log, oldest first.
fn segments(node: &Node, db: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(node.db_data(db).join("log")).expect("list the log");
    let mut files: Vec<PathBuf> = entries.map(|e| e.expect("an entry").path()).collect();
    files.sort();
    files
}

/// Tables of some 60 pages, in several transactions; the newest of them touches few of the pages.
fn create(node: &Node, db: &str, mode: &str) {
    let fill = "INSERT INTO t SELECT i, randomblob(900) FROM n;";
    let sql = format!(
        "PRAGMA journal_mode={mode}; CREATE TABLE t (a INTEGER, b BLOB); CREATE TABLE n (i);
         INSERT INTO n SELECT value FROM generate_series(1, 60);
         {fill} {fill} {fill} {fill} INSERT INTO t VALUES (0, 'newest');"
    );
    sqlite3(&node.db(db), &sql);
}

const CHECK: &str = "PRAGMA integrity_check; SELECT count(*), sum(a) FROM t;";
const CHECKED: &str = "ok\n241|7320\n";

/// A database that is whole, and takes writes.
fn assert_works(node: &Node, db: &str) {
    assert_eq!(sqlite3(&node.db(db), CHECK), CHECKED, "{db}");
    sqlite3(
        &node.db(db),
        "INSERT INTO t VALUES (1, 'more'); DELETE FROM t WHERE b = 'more';",
    );
}

fn scrubbed(options: Options) -> Options {
    Options {
        scrub: Some("200ms"),
        uncompressed: true,
        ..options
    }
}

/// The records of the log are gone as soon as they may be.
fn short_log(options: Options) -> Options {
    Options {
        retention: Some("100ms"),
        ..scrubbed(options)
    }
}

/// Writes until the log no longer has what was written before.
fn forget_log(node: &Node, db: &str) {
    let first = segments(node, db);
    wait_until("old records to go", SOON, || {
        sqlite3(&node.db(db), "UPDATE t SET b = randomblob(9) WHERE a = 0;");
        let now = segments(node, db);
        match first.iter().any(|s| now.contains(s)) {
            true => Err(now),
            false => Ok(()),
        }
    });
}

/// Waits for a fault of this database to be counted.
fn await_fault(node: &Node, db: &str, at_least: f64) {
    let metric = format!("{FAULTS}{{db=\"{db}\"}}");
    wait_until("the fault to be found", SOON, || {
        let body = node.http_get("/metrics")?;
        let line = body.lines().find_map(|l| l.strip_prefix(metric.as_str()));
        let faults: f64 = line.and_then(|n| n.trim().parse().ok()).unwrap_or(0.0);
        match faults >= at_least {
            true => Ok(()),
            false => Err(format!("{faults} faults of {db}")),
        }
    });
}

/// Waits until every database has been looked at from its beginning to its end.
fn await_whole_pass(node: &Node) {
    let passes = |node: &Node| node.metric_or_0("tenure_scrub_passes_total");
    let before = passes(node);
    wait_until("two passes", SOON, || match passes(node) {
        n if n >= before + 2.0 => Ok(()),
        n => Err(n),
    });
}

fn assert_event(event: &str, parts: &[&str]) {
    for part in parts {
        assert!(event.contains(part), "{part} in {event}");
    }
}

#[test]
fn what_is_whole_is_looked_at_and_left_alone() {
    let pair = Cluster::static_pair_with(90, scrubbed);
    for mode in ["delete", "wal"] {
        create(&pair.primary, &format!("{mode}.db"), mode);
    }
    let open = Connection::open(pair.primary.db("wal.db")).expect("open");
    for n in 0..40 {
        for mode in ["delete", "wal"] {
            let sql = format!("UPDATE t SET b = randomblob(900) WHERE a = {n};");
            sqlite3(&pair.primary.db(&format!("{mode}.db")), &sql);
        }
        if n % 10 == 0 {
            await_whole_pass(&pair.primary);
        }
    }
    await_whole_pass(&pair.replica);
    for node in [&pair.primary, &pair.replica] {
        assert_eq!(node.metric(FAULTS), 0.0, "{}", node.log());
        assert!(node.metric("tenure_scrub_bytes_total") > 200_000.0);
        assert!(node.metric("tenure_scrub_pages_total") > 60.0);
        assert!(node.metric("tenure_scrub_records_total") > 10.0);
        assert!(node.metric("tenure_scrub_last_pass_timestamp_seconds") > 1.6e9);
    }
    drop(open);
    for mode in ["delete", "wal"] {
        pair.assert_same(&format!("{mode}.db"));
    }
}

#[test]
fn a_page_that_the_log_still_has_is_written_anew() {
    let pair = Cluster::static_pair_with(90, scrubbed);
    for mode in ["delete", "wal"] {
        create(&pair.primary, &format!("{mode}.db"), mode);
        pair.assert_same(&format!("{mode}.db"));
    }
    for node in [&pair.primary, &pair.replica] {
        let mut events = Events::of(node);
        // On a replica, a database in WAL mode may be in its WAL alone.
        let database = node.db_data("delete.db").join("database");
        let before = std::fs::read(&database).expect("read the database");
        for (n, at) in [4096 * 2 + 700, before.len() as u64 - 9]
            .into_iter()
            .enumerate()
        {
            flip(&database, at);
            await_fault(node, "delete.db", n as f64 + 1.0);
            let page = format!("page {}", at / 4096 + 1);
            assert_event(
                &events.next("fault"),
                &[
                    "\"db\":\"delete.db\"",
                    "\"file\":\"database\"",
                    &page,
                    "\"action\":\"repaired\"",
                ],
            );
        }
        let after = std::fs::read(&database).expect("read the database");
        assert!(after == before, "it is as it was");
        assert_eq!(node.metric(FAULTS), 2.0, "the other one has no fault");
        let log = node.log();
        assert!(
            log.contains("delete.db") && log.contains("written anew"),
            "{log}"
        );
    }
    for mode in ["delete", "wal"] {
        assert_works(&pair.primary, &format!("{mode}.db"));
        pair.assert_same(&format!("{mode}.db"));
    }
}

#[test]
fn a_page_that_nothing_has_any_more_sets_the_primarys_database_aside() {
    let mut pair = Cluster::static_pair_with(120, short_log);
    for db in ["x.db", "other.db"] {
        create(&pair.primary, db, "delete");
        forget_log(&pair.primary, db);
        pair.assert_same(db);
    }
    let mut events = Events::of(&pair.primary);
    let open = Connection::open(pair.primary.db("x.db")).expect("open");
    let database = pair.primary.db_data("x.db").join("database");
    flip(&database, 4096 * 20 + 5);
    await_fault(&pair.primary, "x.db", 1.0);
    assert_event(
        &events.next("fault"),
        &[
            "\"db\":\"x.db\"",
            "\"file\":\"database\"",
            "page 21",
            "\"action\":\"setAside\"",
        ],
    );
    // Errors, and nothing wrong, whoever reads or writes: those who had it open too.
    for sql in [
        CHECK,
        "SELECT count(b) FROM t;",
        "INSERT INTO t VALUES (1, 1);",
    ] {
        sqlite3_fails(&pair.primary.db("x.db"), sql);
    }
    let read: rusqlite::Result<i64> =
        open.query_row("SELECT sum(length(b)) FROM t", [], |r| r.get(0));
    read.expect_err("a read of a database that is set aside");
    drop(open);
    let export = pair.primary.http_get("/export?name=x.db");
    assert!(export.is_err(), "it was exported");
    let log = pair.primary.log();
    for part in ["x.db", "page 21", "another node", "backup"] {
        assert!(log.contains(part), "{part} in {log}");
    }
    assert_works(&pair.primary, "other.db");
    pair.assert_same("other.db");
    // The replica keeps what it has, through a restart of either.
    for _ in 0..2 {
        assert_eq!(sqlite3(&pair.replica.db("x.db"), CHECK), CHECKED);
        pair.primary.stop();
        pair.replica.stop();
        pair.primary.start();
        pair.replica.start();
        sqlite3_fails(&pair.primary.db("x.db"), CHECK);
    }
    assert_works(&pair.primary, "other.db");
    // As the log says: another node's copy is imported.
    let copy = pair.cluster.dir().join("copy.db");
    let from = pair.replica.db("x.db");
    std::fs::write(&copy, std::fs::read(from).expect("read")).expect("write");
    pair.primary.stop();
    std::fs::remove_dir_all(pair.primary.db_data("x.db")).expect("move it away");
    pair.primary.start();
    let import = common::run::run(
        std::process::Command::new(common::node::TENURE)
            .args(["import", "-name", "x.db", "-url"])
            .arg(format!("http://{}", pair.primary.options.http))
            .arg(&copy),
        b"",
        SOON,
    );
    assert!(import.success(), "{}", import.stderr);
    pair.assert_same("x.db");
    assert_works(&pair.primary, "x.db");
}

#[test]
fn a_replica_fetches_a_rotten_database_again() {
    let pair = Cluster::static_pair_with(120, short_log);
    for db in ["x.db", "other.db"] {
        create(&pair.primary, db, "delete");
        forget_log(&pair.primary, db);
        pair.assert_same(db);
    }
    let mut events = Events::of(&pair.replica);
    let other = Connection::open(pair.replica.db("other.db")).expect("open");
    let count = || -> i64 {
        let count = other.query_row("SELECT count(*) FROM t", [], |r| r.get(0));
        count.expect("the other database")
    };
    assert_eq!(count(), 241);
    // Nothing is written meanwhile: the replica asks by itself.
    flip(
        &pair.replica.db_data("x.db").join("database"),
        4096 * 20 + 5,
    );
    assert_event(
        &events.next("fault"),
        &["\"db\":\"x.db\"", "page 21", "\"action\":\"fetch\""],
    );
    wait_until("the database to be fetched", SOON, || {
        let done = sqlite3_raw(&pair.replica.db("x.db"), CHECK, true);
        match done.text() == CHECKED {
            true => Ok(()),
            false => Err(done.stderr),
        }
    });
    pair.assert_same("x.db");
    assert_eq!(count(), 241, "the other one is open all the while");
    let aside = std::fs::read_dir(pair.replica.data().join("set-aside")).expect("the evidence");
    let kept: Vec<_> = aside.flatten().map(|e| e.path().join("database")).collect();
    assert_eq!(kept.len(), 1, "{kept:?}");
    let whole = pair.replica.db_data("x.db").join("database");
    assert_eq!(length(&kept[0]), length(&whole), "the rotten file is kept");
    assert_works(&pair.primary, "x.db");
    pair.assert_same("x.db");
    pair.assert_same("other.db");
    assert_eq!(pair.replica.metric(FAULTS), 1.0, "one fault, once");
}

#[test]
fn a_rotten_log_is_begun_anew() {
    let mut pair = Cluster::static_pair_with(180, scrubbed);
    let record_header = 64;
    // An old record's body, its header; the newest's; the segment's header.
    for (n, place) in ["body", "header", "newest", "segment"]
        .into_iter()
        .enumerate()
    {
        let db = format!("{place}.db");
        create(
            &pair.primary,
            &db,
            if n % 2 == 0 { "delete" } else { "wal" },
        );
        pair.assert_same(&db);
        for node in [&pair.primary, &pair.replica] {
            let mut events = Events::of(node);
            let segment = segments(node, &db).pop().expect("a segment");
            let bytes = std::fs::read(&segment).expect("read the segment");
            let newest = bytes.windows(6).rposition(|w| w == b"newest");
            flip(
                &segment,
                match place {
                    "body" => record_header + 48 + 120,
                    "header" => record_header + 20,
                    "newest" => newest.expect("its bytes") as u64,
                    _ => 9,
                },
            );
            await_fault(node, &db, 1.0);
            let name = format!("\"db\":\"{db}\"");
            let expected = [
                name.as_str(),
                "\"file\":\"log\"",
                "\"action\":\"logBegunAnew\"",
            ];
            assert_event(&events.next("fault"), &expected);
            await_whole_pass(node);
        }
        assert_works(&pair.primary, &db);
        pair.assert_same(&db);
    }
    for node in [&pair.primary, &pair.replica] {
        assert_eq!(node.metric(FAULTS), 4.0, "each once");
    }
    // What was begun anew is good for a start, after a kill too, and for a node that joins.
    pair.primary.kill9();
    pair.primary.start();
    pair.replica.stop();
    pair.replica.start();
    let late = pair
        .cluster
        .start(scrubbed(Options::replica("late", &pair.primary.options)));
    for db in ["body.db", "header.db", "newest.db", "segment.db"] {
        assert_works(&pair.primary, db);
        pair.assert_same(db);
        common::assert_same(&pair.primary, &late, db);
    }
    assert!(!pair.primary.data().join("set-aside").exists());
    assert!(!pair.replica.data().join("set-aside").exists());
}

#[test]
fn rotten_checksums_are_written_anew() {
    let mut pair = Cluster::static_pair_with(120, short_log);
    create(&pair.primary, "x.db", "delete");
    forget_log(&pair.primary, "x.db");
    pair.assert_same("x.db");
    for node in [&pair.primary, &pair.replica] {
        let checksums = node.db_data("x.db").join("checksums");
        wait_until("a checkpoint", SOON, || match checksums.exists() {
            true => Ok(()),
            false => {
                sqlite3(
                    &pair.primary.db("x.db"),
                    "UPDATE t SET b = randomblob(9) WHERE a = 0;",
                );
                Err("none yet")
            }
        });
        // A checkpoint that is still to come writes them anew by itself.
        await_rest(&checksums);
        let mut events = Events::of(node);
        for (n, at) in [4096 + 8 * 30 + 3, 4096 + 8 * 2].into_iter().enumerate() {
            flip(&checksums, at);
            await_fault(node, "x.db", n as f64 + 1.0);
            let expected = [
                "\"db\":\"x.db\"",
                "\"file\":\"checksums\"",
                "\"action\":\"repaired\"",
            ];
            assert_event(&events.next("fault"), &expected);
        }
    }
    pair.primary.kill9();
    pair.primary.start();
    pair.replica.kill9();
    pair.replica.start();
    assert_works(&pair.primary, "x.db");
    pair.assert_same("x.db");
    assert!(!pair.replica.data().join("set-aside").exists());
}

#[test]
fn a_wal_that_rots_while_it_is_used_is_mended_from_the_log() {
    let pair = Cluster::static_pair_with(120, scrubbed);
    create(&pair.primary, "x.db", "wal");
    let open = Connection::open(pair.primary.db("x.db")).expect("open");
    open.execute_batch("PRAGMA wal_autocheckpoint=0; UPDATE t SET b = randomblob(900) WHERE a < 9")
        .expect("write");
    pair.assert_same("x.db");
    for node in [&pair.primary, &pair.replica] {
        let mut events = Events::of(node);
        let wal = node.db_data("x.db").join("wal");
        let before = std::fs::read(&wal).expect("read the WAL");
        let frame = 24 + 4096;
        // A page, and the header of a frame.
        for (n, at) in [32 + frame + 24 + 2000, 32 + 2 * frame + 17]
            .into_iter()
            .enumerate()
        {
            flip(&wal, at);
            await_fault(node, "x.db", n as f64 + 1.0);
            let expected = [
                "\"db\":\"x.db\"",
                "\"file\":\"wal\"",
                "\"action\":\"repaired\"",
            ];
            assert_event(&events.next("fault"), &expected);
        }
        let after = std::fs::read(&wal).expect("read the WAL");
        assert!(after == before, "it is as it was");
    }
    open.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)")
        .expect("checkpoint");
    drop(open);
    assert_works(&pair.primary, "x.db");
    pair.assert_same("x.db");
}

#[test]
fn what_rotted_while_the_node_was_down() {
    let mut pair = Cluster::static_pair_with(180, scrubbed);
    let dbs = ["page.db", "sums.db", "old.db", "wal.db", "other.db"];
    for db in dbs {
        create(
            &pair.primary,
            db,
            if db == "wal.db" { "wal" } else { "delete" },
        );
    }
    let open = Connection::open(pair.primary.db("wal.db")).expect("open");
    open.execute_batch("UPDATE t SET a = a WHERE a < 9")
        .expect("write");
    for db in dbs {
        pair.assert_same(db);
    }
    for n in [0, 1] {
        let node = if n == 0 {
            &mut pair.primary
        } else {
            &mut pair.replica
        };
        // What a clean stop saved and a kill left are different: there is no WAL after a stop.
        node.stop();
        flip(&node.db_data("page.db").join("database"), 4096 * 9 + 1);
        flip(&node.db_data("sums.db").join("checksums"), 4096 + 8 * 30);
        let segment = segments(node, "old.db").remove(0);
        flip(&segment, 64 + 48 + 120);
        node.start();
        node.kill9();
        let wal = node.db_data("wal.db").join("wal");
        if wal.exists() && length(&wal) > 200 {
            flip(&wal, 100);
        }
        node.start();
        await_fault(node, "old.db", 1.0);
        assert!(!node.data().join("set-aside").exists(), "{}", node.log());
    }
    drop(open);
    for db in dbs {
        assert_works(&pair.primary, db);
        pair.assert_same(db);
    }
}

#[test]
fn a_database_that_rotted_beyond_its_log_while_the_node_was_down() {
    let mut pair = Cluster::static_pair_with(180, short_log);
    for db in ["page.db", "sums.db", "other.db"] {
        create(&pair.primary, db, "delete");
        forget_log(&pair.primary, db);
        pair.assert_same(db);
    }
    // The checksums can be computed again: the newest record says what they amount to.
    for n in [0, 1] {
        let node = if n == 0 {
            &mut pair.primary
        } else {
            &mut pair.replica
        };
        node.stop();
        flip(&node.db_data("sums.db").join("checksums"), 4096 + 8 * 30);
        node.start();
        std::fs::remove_file(node.db_data("sums.db").join("checksums")).expect("remove");
        node.kill9();
        node.start();
        assert!(!node.data().join("set-aside").exists(), "{}", node.log());
    }
    pair.replica.stop();
    flip(
        &pair.replica.db_data("page.db").join("database"),
        4096 * 9 + 1,
    );
    pair.replica.start();
    for db in ["page.db", "sums.db", "other.db"] {
        assert_works(&pair.primary, db);
        pair.assert_same(db);
    }
    // The primary has nobody to ask.
    pair.primary.stop();
    flip(
        &pair.primary.db_data("page.db").join("database"),
        4096 * 9 + 1,
    );
    pair.primary.start();
    sqlite3_fails(&pair.primary.db("page.db"), CHECK);
    assert_works(&pair.primary, "other.db");
    assert_eq!(sqlite3(&pair.replica.db("page.db"), CHECK), CHECKED);
    pair.assert_same("other.db");
}

/// Has the kernel forget what it has cached of a file.
fn drop_cache(path: &Path) {
    use std::os::fd::AsRawFd;
    let file = File::open(path).expect("open");
    // SAFETY: numbers, and a descriptor that lives through the call.
    let r = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(r, 0);
}

#[test]
fn a_rotten_page_is_never_passed_on() {
    // No scrub comes to its help.
    let never = |options: Options| Options {
        scrub: Some("0"),
        ..short_log(options)
    };
    let cluster = Cluster::new(120);
    let backup = cluster.subdir("backup");
    let options = Options {
        backup: Some(backup.clone()),
        ..never(Options::primary("primary"))
    };
    let primary = cluster.start(options);
    let database = primary.db_data("x.db").join("database");
    create(&primary, "x.db", "delete");
    forget_log(&primary, "x.db");
    flip(&database, 4096 * 30 + 77);
    drop_cache(&primary.db("x.db"));
    // Whoever reads it hears of it, and so nobody writes it back as a part of something new.
    let before = primary.txid("x.db");
    let e = sqlite3_fails(&primary.db("x.db"), "UPDATE t SET a = a + 1;");
    // SQLite takes the error number of a failing disk for a damaged file.
    assert!(e.contains("I/O error") || e.contains("malformed"), "{e}");
    assert_eq!(primary.txid("x.db"), before);
    assert!(primary.http_get("/export?name=x.db").is_err(), "exported");
    let replica = cluster.start(Options {
        backup: None,
        ..Options::replica("replica", &primary.options)
    });
    create(&primary, "y.db", "delete");
    common::assert_same(&primary, &replica, "y.db");
    assert_eq!(replica.pos("x.db"), None, "{}", replica.log());
    assert!(
        primary.metric(FAULTS) >= 1.0,
        "counted, though nobody scrubs"
    );
    let log = primary.log();
    assert!(log.contains("page 31"), "{log}");
}

#[test]
fn a_log_that_rotted_while_the_node_was_down() {
    let mut pair = Cluster::static_pair_with(180, |options| Options {
        scrub: Some("0"),
        uncompressed: true,
        ..options
    });
    let dbs = ["segment.db", "record.db", "newest.db", "other.db"];
    for db in dbs {
        create(&pair.primary, db, "delete");
        pair.assert_same(db);
    }
    let spoil = |node: &mut Node| {
        node.kill9();
        for db in ["segment.db", "record.db", "newest.db"] {
            let segment = segments(node, db).pop().expect("a segment");
            let bytes = std::fs::read(&segment).expect("read the segment");
            let newest = bytes.windows(6).rposition(|w| w == b"newest");
            let at = match db {
                // Its header; that of its first record.
                "segment.db" => 9,
                "record.db" => 64 + 20,
                _ => newest.expect("its bytes") as u64,
            };
            flip(&segment, at);
        }
        node.start();
    };
    // A replica asks again for what it cannot trust.
    spoil(&mut pair.replica);
    for db in dbs {
        pair.assert_same(db);
    }
    // A primary serves nothing that lacks what it had acknowledged.
    spoil(&mut pair.primary);
    for db in ["segment.db", "record.db", "newest.db"] {
        let read = sqlite3_raw(&pair.primary.db(db), CHECK, true);
        assert!(!read.success(), "{db}: {read:?}");
        assert_eq!(sqlite3(&pair.replica.db(db), CHECK), CHECKED, "{db}");
    }
    assert!(
        pair.primary.log().contains("is cut off"),
        "{}",
        pair.primary.log()
    );
    assert_works(&pair.primary, "other.db");
    pair.assert_same("other.db");
}
