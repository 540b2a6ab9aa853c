//! Transactions that are applied together lead to what each by itself leads to.

use rusqlite::Connection;

use super::bed::{Bed, image, options, set_mode, snapshot};
use super::vfs::Vfs;
use crate::ltx::{self, Pos};
use crate::store::{Arrived, Common, Event, Next, Options, Role, Store, StoreError};

const DB: &str = "a.db";

/// The transactions of a primary after its first one, of which it gives a snapshot.
struct History {
    _bed: Bed,
    first: Vec<u8>,
    files: Vec<Vec<u8>>,
    /// Where each of them leads.
    positions: Vec<Pos>,
}

/// A database that grows, shrinks and grows again.
fn history() -> History {
    let bed = Bed::primary();
    let c = bed.connect(DB);
    set_mode(&c, "delete");
    c.execute_batch("PRAGMA auto_vacuum=FULL; CREATE TABLE t(k INTEGER PRIMARY KEY, v)")
        .unwrap();
    let db = bed.db(DB);
    let first = snapshot(&db).1;
    let mut at = db.pos();
    grow(&c, 20);
    c.execute_batch("DELETE FROM t WHERE k > 3").unwrap();
    grow(&c, 5);
    c.execute_batch("DROP TABLE t; VACUUM; CREATE TABLE t(k INTEGER PRIMARY KEY, v)")
        .unwrap();
    grow(&c, 3);
    db.settle();
    let (mut files, mut positions) = (Vec::new(), Vec::new());
    while let Next::Record(record) = db.record_after(at).unwrap() {
        at = Pos {
            txid: record.max_txid,
            checksum: record.post_apply_checksum,
        };
        files.push(record.bytes.to_vec());
        positions.push(at);
    }
    assert_eq!(at, db.pos());
    assert!(files.len() > 20);
    drop(c);
    History {
        _bed: bed,
        first,
        files,
        positions,
    }
}

fn grow(c: &Connection, rows: usize) {
    for _ in 0..rows {
        c.execute_batch("INSERT INTO t(v) VALUES (randomblob(9000))")
            .unwrap();
    }
}

fn arrived(bed: &Bed, files: &[Vec<u8>]) -> Vec<Arrived> {
    let read = |file: &Vec<u8>| bed.store.read_arriving(DB, &mut &file[..]).unwrap();
    files.iter().map(read).collect()
}

fn receive_all(bed: &Bed, files: &[Vec<u8>]) -> Result<(), StoreError> {
    let files = arrived(bed, files);
    bed.store
        .receive_all(DB, files, &mut |_, _| Common::Unknown)
}

#[test]
fn a_group_leads_to_what_its_files_lead_to_one_by_one() {
    let history = history();
    let (one, all) = (Bed::replica(), Bed::replica());
    for bed in [&one, &all] {
        bed.receive(DB, &history.first).unwrap();
    }
    for file in &history.files {
        one.receive(DB, file).unwrap();
    }
    let mut events = all.store.events();
    for file in arrived(&all, &history.files[..1]) {
        assert!(all.store.applies_in_groups(DB, &file));
    }
    receive_all(&all, &history.files).unwrap();
    assert_eq!(all.check_killed(DB), one.check(DB));
    // Each of them is told of, and is in the log.
    for (pos, file) in history.positions.iter().zip(&history.files) {
        match events.try_recv().unwrap() {
            Event::Tx { pos: told, .. } => assert_eq!(told, *pos),
            other => panic!("{other:?}"),
        }
        let before = Pos {
            txid: pos.txid - 1,
            checksum: ltx::verify(&file[..]).unwrap().header.pre_apply_checksum,
        };
        match all.db(DB).record_after(before).unwrap() {
            Next::Record(record) => assert_eq!(record.bytes, file[..]),
            other => panic!("{other:?}"),
        }
    }
    // A connection that was open all the time reads what is there.
    let c = all.connect(DB);
    let rows: i64 = c
        .query_row("SELECT count(*) FROM t", [], |row| row.get(0))
        .unwrap();
    assert_eq!(rows, 3);
}

#[test]
fn what_does_not_follow_ends_a_group_and_what_is_before_it_stays() {
    let history = history();
    let bed = Bed::replica();
    bed.receive(DB, &history.first).unwrap();
    let mut files = history.files[..6].to_vec();
    files.remove(4);
    let refused = receive_all(&bed, &files);
    assert!(
        matches!(refused, Err(StoreError::PositionMismatch { .. })),
        "{refused:?}"
    );
    assert_eq!(bed.check_killed(DB).0, history.positions[3]);
    receive_all(&bed, &history.files[4..]).unwrap();
    assert_eq!(Some(&bed.check(DB).0), history.positions.last());
}

#[test]
fn a_group_in_wal_mode_and_one_of_the_nodes_own_are_taken_one_by_one() {
    let bed = Bed::primary();
    let c = bed.connect(DB);
    set_mode(&c, "wal");
    c.execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v)")
        .unwrap();
    let db = bed.db(DB);
    let first = snapshot(&db).1;
    let mut at = db.pos();
    grow(&c, 5);
    db.settle();
    let mut files = Vec::new();
    while let Next::Record(record) = db.record_after(at).unwrap() {
        at = Pos {
            txid: record.max_txid,
            checksum: record.post_apply_checksum,
        };
        files.push(record.bytes.to_vec());
    }
    let replica = Bed::replica();
    replica.receive(DB, &first).unwrap();
    let read = arrived(&replica, &files);
    assert!(!replica.store.applies_in_groups(DB, &read[0]));
    receive_all(&replica, &files).unwrap();
    assert_eq!(replica.check_killed(DB), image(&db));
    // Its own are no group's.
    assert!(!bed.store.applies_in_groups(DB, &arrived(&bed, &files)[0]));
}

#[test]
fn what_arrives_plain_is_compressed_in_the_log() {
    let history = history();
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        compress: true,
        ..options(dir.path())
    };
    let store = Store::open(options).unwrap();
    store.set_role(Role::Replica { hostname: None });
    let bed = Bed {
        vfs: Vfs::register(&store),
        store,
        dir,
    };
    bed.receive(DB, &history.first).unwrap();
    receive_all(&bed, &history.files).unwrap();
    let last = &history.positions[history.positions.len() - 2];
    match bed.db(DB).record_after(*last).unwrap() {
        Next::Record(record) => {
            let summary = ltx::verify(&record.bytes[..]).unwrap();
            assert!(summary.header.compressed);
            let plain = ltx::without_lz4(&record.bytes).unwrap().unwrap();
            assert_eq!(Some(&plain), history.files.last());
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(Some(&bed.check(DB).0), history.positions.last());
}
