//! A transaction that is synced and whose journal has not ended: it is on disk, and not there yet.

use rusqlite::Connection;

use super::bed::{Bed, integrity, set_mode};
use super::vfs::wait;
use crate::ltx::Pos;
use crate::store::{FileKind, Role};

const DB: &str = "a.db";
const MODES: [&str; 3] = ["delete", "truncate", "persist"];

type Found = (Pos, Vec<u8>);

/// A database, what it was, and a transaction that has been synced.
fn synced(mode: &str) -> (Bed, Found, Connection) {
    let bed = Bed::primary();
    let c = bed.connect(DB);
    assert_eq!(set_mode(&c, mode), mode);
    c.execute_batch("CREATE TABLE t(v); INSERT INTO t VALUES (randomblob(9000))")
        .unwrap();
    let before = bed.check_killed(DB);
    c.execute_batch("BEGIN; UPDATE t SET v = randomblob(20000)")
        .unwrap();
    c.cache_flush().unwrap();
    sync(&bed);
    (bed, before, c)
}

fn sync(bed: &Bed) {
    let db = bed.db(DB);
    let file = db.file(FileKind::Database).unwrap();
    wait(|done| db.sync(&file, done)).unwrap();
}

fn is_logged(bed: &Bed) -> bool {
    bed.db(DB).lock().early.is_some()
}

/// The number of transactions that a node finds that is started on the remains.
fn found_by_another(bed: &Bed) -> u64 {
    bed.killed().check(DB).0.txid
}

#[test]
fn nobody_is_told_of_it_before_its_journal_ends() {
    for mode in MODES {
        let (bed, before, c) = synced(mode);
        assert!(is_logged(&bed));
        assert_eq!(bed.check(DB), before, "{mode}");
        assert_eq!(bed.db(DB).log().last_txid(), before.0.txid, "{mode}");
        // Neither committed nor rolled back: that it is logged decides.
        assert_eq!(found_by_another(&bed), before.0.txid + 1, "{mode}");
        c.execute_batch("COMMIT").unwrap();
        assert_eq!(bed.check_killed(DB).0.txid, before.0.txid + 1, "{mode}");
        integrity(&c);
        assert_eq!(bed.vfs.take_errors(), Vec::<String>::new());
    }
}

#[test]
fn it_is_gone_from_the_disk_once_it_changes_or_is_rolled_back() {
    for mode in MODES {
        let (bed, before, c) = synced(mode);
        c.execute_batch("UPDATE t SET v = 2").unwrap();
        c.cache_flush().unwrap();
        assert!(!is_logged(&bed));
        assert_eq!(
            found_by_another(&bed),
            before.0.txid,
            "{mode}: it has changed"
        );
        sync(&bed);
        assert_eq!(found_by_another(&bed), before.0.txid + 1, "{mode}");
        c.execute_batch("ROLLBACK").unwrap();
        assert_eq!(bed.check_killed(DB), before, "{mode}: rolled back");
        c.execute_batch("INSERT INTO t VALUES (3)").unwrap();
        assert_eq!(bed.check_killed(DB).0.txid, before.0.txid + 1, "{mode}");
        integrity(&c);
    }
}

#[test]
fn it_goes_with_the_role() {
    for mode in MODES {
        let (bed, before, c) = synced(mode);
        bed.store.set_role(Role::Replica { hostname: None });
        assert_eq!(bed.check_killed(DB), before, "{mode}");
        assert!(c.execute_batch("COMMIT").is_err(), "{mode}");
        let _ = c.execute_batch("ROLLBACK");
        bed.store.set_role(Role::Primary);
        bed.connect(DB)
            .execute_batch("INSERT INTO t VALUES (3)")
            .unwrap();
        assert_eq!(bed.check_killed(DB).0.txid, before.0.txid + 1, "{mode}");
    }
}

#[test]
fn it_goes_when_the_node_stops() {
    for mode in MODES {
        let (bed, before, c) = synced(mode);
        bed.store.close();
        assert_eq!(found_by_another(&bed), before.0.txid, "{mode}");
        assert!(c.execute_batch("COMMIT").is_err(), "{mode}");
        drop(c);
        let bed = bed.restarted();
        assert_eq!(bed.check_killed(DB), before, "{mode}");
    }
}

#[test]
fn a_pause_refuses_it_at_its_commit_point() {
    for mode in MODES {
        let (bed, before, c) = synced(mode);
        bed.store.context.gate.pause();
        assert!(c.execute_batch("COMMIT").is_err(), "{mode}");
        bed.store.context.gate.resume();
        if !c.is_autocommit() {
            c.execute_batch("ROLLBACK").unwrap();
        }
        assert_eq!(bed.check_killed(DB), before, "{mode}");
        c.execute_batch("INSERT INTO t VALUES (3)").unwrap();
        assert_eq!(bed.check_killed(DB).0.txid, before.0.txid + 1, "{mode}");
    }
}

#[test]
fn a_drop_of_the_database_takes_its_place() {
    let (bed, before, _c) = synced("delete");
    let db = bed.db(DB);
    wait(|done| db.unlink(FileKind::Database, done)).unwrap();
    assert_eq!(db.pos().txid, before.0.txid + 1);
    assert_eq!(db.page_count(), 0);
    let other = bed.killed();
    let found = other.db(DB);
    assert_eq!(
        (found.pos().txid, found.page_count()),
        (before.0.txid + 1, 0)
    );
}
