//! A WAL index that does not say what is committed: nobody goes by it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use rusqlite::config::DbConfig;

use super::bed::{Bed, integrity, set_mode};
use super::vfs::wait;
use crate::sqlite::wal::WalChecksum;
use crate::sqlite::wal_index::IndexHeader;
use crate::store::FileKind;
use crate::store::shm::SharedIndex;

const DB: &str = "a.db";
const SOON: Duration = Duration::from_secs(10);

/// A primary with a database in WAL mode, some of whose frames are not checkpointed.
fn bed() -> (Bed, Connection) {
    let bed = Bed::primary();
    let c = bed.connect(DB);
    assert_eq!(set_mode(&c, "wal"), "wal");
    c.execute_batch("PRAGMA wal_autocheckpoint=0; CREATE TABLE t(v); INSERT INTO t VALUES (1)")
        .unwrap();
    (bed, c)
}

fn with_index<T>(bed: &Bed, f: impl FnOnce(&SharedIndex) -> T) -> T {
    let db = bed.db(DB);
    let shared = SharedIndex::open(&db, db.file(FileKind::Shm).unwrap().ino).unwrap();
    let result = f(&shared);
    shared.close(&db);
    result
}

/// What the index says, changed.
fn publish(bed: &Bed, change: impl FnOnce(&mut IndexHeader)) {
    with_index(bed, |shared| {
        let mut header = shared.index().read_header().unwrap();
        change(&mut header);
        // Where the root of the table is sought by who believes it.
        shared.index().append_frames(header.mx_frame, &[2]).unwrap();
        shared.index().write_header(&header);
    });
}

fn one_more(h: &mut IndexHeader) {
    h.mx_frame += 1;
    h.change += 1;
}

/// The end of a process that had the WAL open.
fn end_of_a_process(bed: &Bed) {
    let db = bed.db(DB);
    db.released(&db.file(FileKind::Wal).unwrap(), true);
}

fn wait_until_disbelieved(bed: &Bed, what: &str) {
    let deadline = Instant::now() + SOON;
    while with_index(bed, |s| s.index().read_header()).is_some() {
        assert!(Instant::now() < deadline, "{what}: still believed");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn count(c: &Connection) -> i64 {
    c.query_row("SELECT count(*) FROM t", [], |r| r.get(0))
        .unwrap()
}

#[test]
fn an_open_index_that_differs_from_the_wal_is_recovered() {
    type Change = fn(&mut IndexHeader);
    let changes: [(&str, Change); 4] = [
        ("ahead", one_more),
        ("another frame", |h| {
            h.frame_checksum = WalChecksum(1, 2);
            h.change += 1;
        }),
        ("another WAL", |h| {
            h.salt2 ^= 1;
            h.change += 1;
        }),
        ("behind", |h| {
            h.mx_frame -= 1;
            h.change += 1;
        }),
    ];
    for (what, change) in changes {
        let (bed, c) = bed();
        let before = bed.check_killed(DB);
        let published = with_index(&bed, |s| s.index().read_header()).unwrap();
        publish(&bed, change);
        end_of_a_process(&bed);
        wait_until_disbelieved(&bed, what);
        assert_eq!(count(&c), 1, "{what}");
        let found = with_index(&bed, |s| s.index().read_header()).unwrap();
        assert_eq!(found.mx_frame, published.mx_frame, "{what}");
        assert_eq!(bed.check_killed(DB), before, "{what}");
        c.execute_batch("INSERT INTO t VALUES (2)").unwrap();
        assert_eq!(count(&bed.connect(DB)), 2, "{what}");
        integrity(&c);
        bed.check_killed(DB);
    }
}

#[test]
fn an_index_in_order_is_left_alone() {
    let (bed, c) = bed();
    for turn in 0..20 {
        let published = with_index(&bed, |s| s.index().read_header());
        end_of_a_process(&bed);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(
            with_index(&bed, |s| s.index().read_header()),
            published,
            "turn {turn}"
        );
        // Restarted, emptied, begun anew.
        let mode = ["PASSIVE", "RESTART", "TRUNCATE"][turn % 3];
        c.execute_batch(&format!(
            "PRAGMA wal_checkpoint({mode}); INSERT INTO t VALUES (2)"
        ))
        .unwrap();
    }
    integrity(&c);
    bed.check_killed(DB);
}

/// The node looks at the index just as somebody else opens it.
#[test]
fn an_index_that_nobody_has_open_is_begun_anew() {
    let (bed, mut c) = bed();
    publish(&bed, one_more);
    let ahead = std::fs::read(bed.file(DB, FileKind::Shm)).unwrap();
    end_of_a_process(&bed);
    wait_until_disbelieved(&bed, "ahead");
    for turn in 0..300 {
        assert_eq!(count(&c), 1, "turn {turn}");
        // The last one leaves the WAL and its index where they are, as a process does that dies.
        c.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)
            .unwrap();
        drop(c);
        let shm = File::options()
            .write(true)
            .open(bed.file(DB, FileKind::Shm));
        shm.unwrap().write_all_at(&ahead, 0).unwrap();
        end_of_a_process(&bed);
        std::thread::sleep(Duration::from_micros(turn * 2));
        c = bed.connect(DB);
    }
    assert_eq!(count(&c), 1);
    integrity(&c);
    bed.check_killed(DB);
}

#[test]
fn a_wal_frame_without_a_header_is_refused() {
    let (bed, c) = bed();
    let db = bed.db(DB);
    let wal = db.file(FileKind::Wal).unwrap();
    let frame = std::fs::read(bed.file(DB, FileKind::Wal)).unwrap()[32..][..24 + 4096].to_vec();
    wait(|done| db.write(&wal, 32, &frame, done)).expect_err("committed already");
    c.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    let before = bed.check_killed(DB);
    wait(|done| db.write(&wal, 32, &frame, done)).expect_err("no header");
    assert_eq!(
        std::fs::metadata(bed.file(DB, FileKind::Wal))
            .unwrap()
            .len(),
        0
    );
    assert_eq!(bed.check_killed(DB), before);
    c.execute_batch("INSERT INTO t VALUES (2)").unwrap();
    assert_eq!(count(&c), 2);
    integrity(&c);
    bed.check_killed(DB);
}
