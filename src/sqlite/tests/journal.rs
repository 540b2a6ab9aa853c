//! The rollback journal: copies of real ones, taken in mid-transaction and rolled back by us and by
//! SQLite, must give the same database.

use super::{Db, PAGE_SIZES, copy_of};
use crate::sqlite::journal::{COUNT_TO_END, Journal, MAGIC, is_active, record_checksum};
use crate::sqlite::lock_page;
use proptest::prelude::*;
use rusqlite::Connection;
use std::fs;
use std::io::Cursor;

/// Rolls `journal` back into `db` as SQLite does; false: there was nothing to roll back.
pub(super) fn roll_back(db: &mut Vec<u8>, journal: &[u8]) -> bool {
    let Some(mut journal) = Journal::open(Cursor::new(journal), journal.len() as u64).unwrap()
    else {
        return false;
    };
    let page_size = journal.header().page_size as usize;
    let size = journal.header().initial_pages as usize * page_size;
    // SQLite lengthens the file by whole pages only.
    if db.len() > size || db.len() + page_size <= size {
        db.resize(size, 0);
    }
    while let Some((pgno, page)) = journal.next().unwrap() {
        let start = (pgno as usize - 1) * page_size;
        if db.len() < start + page_size {
            db.resize(start + page_size, 0);
        }
        db[start..start + page_size].copy_from_slice(page);
    }
    true
}

/// What SQLite makes of a database with a hot journal.
fn rolled_back_by_sqlite(db: &[u8], journal: &[u8]) -> Vec<u8> {
    let (_dir, path) = copy_of(&[("", db), ("-journal", journal)]);
    let conn = Connection::open(&path).unwrap();
    // A mutilated journal may leave a database that is none: the file is what matters.
    let _ = conn.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()));
    drop(conn);
    fs::read(&path).unwrap()
}

/// How many headers there are at the beginnings of sectors.
fn segments(journal: &[u8]) -> usize {
    journal
        .chunks(512)
        .filter(|sector| is_active(sector))
        .count()
}

/// Begins a transaction that spills, and changes rows all over the table.
fn change_much(db: &Db) {
    db.run(
        "PRAGMA cache_size=10; PRAGMA cache_spill=5; BEGIN; \
         UPDATE t SET x=randomblob(210) WHERE id%3=0; \
         SAVEPOINT s; DELETE FROM t WHERE id%5=0; ROLLBACK TO s; \
         INSERT INTO t(v, x) SELECT v, randomblob(1000) FROM t WHERE id%7=0; \
         DELETE FROM t WHERE id BETWEEN 100 AND 400",
    );
}

#[test]
fn rolls_back_to_the_old_bytes_in_every_mode_and_page_size() {
    for page_size in PAGE_SIZES {
        for mode in ["DELETE", "TRUNCATE", "PERSIST"] {
            for synchronous in ["OFF", "NORMAL", "FULL"] {
                // Enough rows for more pages than the cache holds.
                let db = Db::new(page_size, mode, 1000.max(page_size / 8));
                db.run(&format!("PRAGMA synchronous={synchronous}"));
                // In PERSIST mode: a larger transaction whose remains follow in the file.
                db.run("UPDATE t SET x=randomblob(220)");
                let before = db.bytes("");
                change_much(&db);
                let (mut during, journal) = (db.bytes(""), db.bytes("-journal"));
                let what = format!("{page_size} {mode} {synchronous}");
                assert!(is_active(&journal), "{what}");
                assert!(during != before, "{what}: nothing was spilled");
                if synchronous == "OFF" {
                    assert_eq!(journal[8..12], COUNT_TO_END.to_be_bytes());
                } else if page_size <= 4096 {
                    assert!(segments(&journal) > 1, "{what}: only one segment");
                }
                let by_sqlite = rolled_back_by_sqlite(&during, &journal);
                assert!(by_sqlite == before, "{what}: SQLite did not roll back");
                assert!(roll_back(&mut during, &journal));
                assert!(during == before, "{what}: not the old database");
                db.run("ROLLBACK");
            }
        }
    }
}

#[test]
fn a_finished_journal_holds_nothing() {
    for (mode, left) in [("TRUNCATE", true), ("PERSIST", true), ("DELETE", false)] {
        for end in ["COMMIT", "ROLLBACK"] {
            let db = Db::new(1024, mode, 300);
            change_much(&db);
            db.run(end);
            assert_eq!(db.file("-journal").exists(), left, "{mode}");
            if left {
                let journal = db.bytes("-journal");
                assert_eq!(journal.is_empty(), mode == "TRUNCATE");
                assert!(!is_active(&journal));
                let opened = Journal::open(Cursor::new(&journal), journal.len() as u64).unwrap();
                assert!(opened.is_none(), "{mode} {end}");
            }
        }
    }
}

#[test]
fn the_header_is_read() {
    let db = Db::new(8192, "DELETE", 500);
    let pages: u32 = super::get(&db.conn, "PRAGMA page_count");
    change_much(&db);
    let bytes = db.bytes("-journal");
    let journal = Journal::open(Cursor::new(&bytes), bytes.len() as u64)
        .unwrap()
        .unwrap();
    let header = journal.header();
    assert_eq!((header.page_size, header.sector_size), (8192, 512));
    assert_eq!(header.initial_pages, pages);
    assert_eq!(header.nonce.to_be_bytes(), bytes[12..16]);
    assert!(header.record_count > 0 && header.record_count < 1000);
    assert_eq!(journal.super_journal(), None);
}

#[test]
fn a_journal_of_no_page_size_is_an_error_and_not_nothing() {
    let db = Db::new(1024, "DELETE", 100);
    change_much(&db);
    let mut bytes = db.bytes("-journal");
    bytes[24..28].fill(0);
    let error = Journal::open(Cursor::new(&bytes), bytes.len() as u64).unwrap_err();
    assert!(error.to_string().contains("no page size"), "{error}");
}

/// A journal of one segment of 512-byte pages, each of one byte's value, for a database of 3 million
/// of them.
fn written(records: &[(u32, u8)]) -> Vec<u8> {
    let mut journal = MAGIC.to_vec();
    for field in [records.len() as u32, 99, 3_000_000, 512, 512] {
        journal.extend(field.to_be_bytes());
    }
    journal.resize(512, 0);
    for &(pgno, byte) in records {
        let page = [byte; 512];
        journal.extend(pgno.to_be_bytes());
        journal.extend(page);
        journal.extend(record_checksum(99, &page).to_be_bytes());
    }
    journal
}

fn pgnos(journal: &[u8]) -> Vec<u32> {
    let mut journal = Journal::open(Cursor::new(journal), journal.len() as u64)
        .unwrap()
        .unwrap();
    std::iter::from_fn(|| journal.next().unwrap().map(|(pgno, _)| pgno)).collect()
}

#[test]
fn page_zero_and_the_lock_page_end_a_journal() {
    let lock = lock_page(512);
    assert_eq!(
        pgnos(&written(&[(1, 1), (lock - 1, 2), (7, 3)])),
        [1, lock - 1, 7]
    );
    assert_eq!(pgnos(&written(&[(1, 1), (lock, 2), (7, 3)])), [1]);
    assert_eq!(pgnos(&written(&[(1, 1), (0, 2), (7, 3)])), [1]);
    // One beyond the old end of the database is passed over.
    assert_eq!(
        pgnos(&written(&[(1, 1), (3_000_001, 2), (3_000_000, 3)])),
        [1, 3_000_000]
    );
}

/// Whatever happens to a journal, we must read of it what SQLite reads. Every case is a change to a
/// journal of several segments that was really hot.
#[test]
fn a_damaged_journal_is_read_as_sqlite_reads_it() {
    for synchronous in ["OFF", "FULL"] {
        let db = Db::new(512, "DELETE", 200);
        db.run(&format!("PRAGMA synchronous={synchronous}"));
        change_much(&db);
        let (during, journal) = (db.bytes(""), db.bytes("-journal"));
        let mut cases: Vec<Vec<u8>> = Vec::new();
        // Cut off at odd places and at the ends of sectors and records.
        for len in [
            0,
            27,
            28,
            511,
            512,
            513,
            1031,
            1032,
            1033,
            1536,
            journal.len() - 1,
        ] {
            cases.push(journal[..len].to_vec());
        }
        cases.extend((1..12).map(|i| journal[..journal.len() * i / 12 / 512 * 512].to_vec()));
        // A byte changed: in every field of the first header and of a later one, and all over.
        let second = (1..journal.len() / 512).find(|i| is_active(&journal[i * 512..]));
        assert_eq!(second.is_some(), synchronous == "FULL");
        let fields = [0, 7, 8, 11, 12, 15, 19, 20, 22, 23, 25, 26, 27, 28, 500];
        let headers = fields
            .into_iter()
            .chain(fields.map(|at| at + second.unwrap_or(0) * 512));
        for at in headers.chain((1..150).map(|i| journal.len() * i / 150)) {
            for change in [1, 2, 0x80, 0xff] {
                let mut bytes = journal.clone();
                bytes[at] ^= change;
                cases.push(bytes);
            }
        }
        // Record counts that mean something else, and more records than there are.
        for header in [0, second.unwrap_or(0) * 512] {
            for count in [0, 1, 2, 1_000_000, u32::MAX - 1, u32::MAX] {
                let mut bytes = journal.clone();
                bytes[header + 8..header + 12].copy_from_slice(&u32::to_be_bytes(count));
                cases.push(bytes);
            }
        }
        // Something behind it: nothing, garbage, and a header without records.
        for tail in [vec![0; 5000], vec![0xa5; 5000], journal[..512].to_vec()] {
            cases.push([&journal[..], &tail].concat());
        }
        let mut rolled_back = 0;
        for (i, case) in cases.iter().enumerate() {
            let mut ours = during.clone();
            if case.get(24..28) == Some(&[0; 4]) {
                continue; // the page size of SQLite before 3.5.8: has its own test
            }
            rolled_back += u32::from(roll_back(&mut ours, case));
            assert!(
                ours == rolled_back_by_sqlite(&during, case),
                "{synchronous}: case {i}"
            );
        }
        assert!(
            rolled_back > 500,
            "only {rolled_back} of {} cases were journals",
            cases.len()
        );
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(
        mut bytes in prop::collection::vec(any::<u8>(), 0..6000),
        count in prop_oneof![Just(0), Just(COUNT_TO_END), 0..20u32, any::<u32>()],
        sector_log in 4..18u32,
        page_log in 8..18u32,
        more: u16,
        with_header: bool,
    ) {
        if with_header && bytes.len() >= 28 {
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..12].copy_from_slice(&count.to_be_bytes());
            bytes[20..24].copy_from_slice(&(1u32 << sector_log).to_be_bytes());
            bytes[24..28].copy_from_slice(&(1u32 << page_log).to_be_bytes());
        }
        // The length may be wrong: the file may have been cut since.
        let len = bytes.len() as u64 + u64::from(more) * u64::from(with_header);
        for len in [len, u64::MAX, 600] {
            if let Ok(Some(mut journal)) = Journal::open(Cursor::new(&bytes), len) {
                let mut records = 0;
                while let Ok(Some((pgno, page))) = journal.next() {
                    prop_assert!(pgno != 0 && page.len().is_power_of_two());
                    records += 1;
                }
                prop_assert!(records <= bytes.len() / 512);
                prop_assert!(matches!(journal.next(), Ok(None)));
            }
        }
    }
}
