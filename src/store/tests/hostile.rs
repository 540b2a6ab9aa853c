//! What a local program can write that speaks SQLite's formats and means ill: numbers that no
//! database has are refused at once, and cost neither memory nor disk.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::bed::{Bed, integrity, set_mode};
use crate::sqlite::wal::{FrameHeader, WalHeader};
use crate::store::{Database, DbFile, FileKind, Role, StoreError};

const DB: &str = "a.db";

fn write(db: &Arc<Database>, f: &Arc<DbFile>, at: u64, data: &[u8]) -> Result<(), StoreError> {
    let (tx, rx) = channel();
    db.write(f, at, data, Box::new(move |r| tx.send(r).unwrap()));
    rx.recv().unwrap()
}

fn truncate(db: &Arc<Database>, f: &Arc<DbFile>, size: u64) -> Result<(), StoreError> {
    let (tx, rx) = channel();
    db.truncate(f, size, Box::new(move |r| tx.send(r).unwrap()));
    rx.recv().unwrap()
}

fn unlink(db: &Arc<Database>, kind: FileKind) -> Result<(), StoreError> {
    let (tx, rx) = channel();
    db.unlink(kind, Box::new(move |r| tx.send(r).unwrap()));
    rx.recv().unwrap()
}

fn assert_quickly_refused(began: Instant, result: Result<(), StoreError>) {
    assert!(result.is_err());
    assert!(
        began.elapsed() < Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );
}

/// Bytes that the database's directory takes on disk.
fn space(bed: &Bed) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(bed.dir.path().join("dbs").join(DB)).unwrap();
    entries
        .map(|e| e.unwrap().metadata().unwrap().blocks() * 512)
        .sum()
}

#[test]
fn a_header_with_an_absurd_page_count() {
    for (page_size, pages) in [
        (4096u32, 0xffff_fffe_u32),
        (4096, 1 << 28),
        (512, 1 << 30),
        (65536, 1 << 20),
    ] {
        let bed = Bed::primary();
        let c = bed.connect(DB);
        c.execute_batch(&format!("PRAGMA page_size={page_size}; CREATE TABLE t(v)"))
            .unwrap();
        drop(c);
        let db = bed.db(DB);
        let before = (bed.check(DB), space(&bed));
        let file = db.file(FileKind::Database).unwrap();
        let mut page = vec![0u8; page_size as usize];
        db.read(&file, 0, &mut page).unwrap();
        page[28..32].copy_from_slice(&pages.to_be_bytes());
        let journal = db.create(FileKind::Journal, false).unwrap();
        let mut head = vec![0u8; 512];
        head[..8].copy_from_slice(&crate::sqlite::journal::MAGIC);
        head[16..20].copy_from_slice(&2u32.to_be_bytes());
        head[20..24].copy_from_slice(&512u32.to_be_bytes());
        head[24..28].copy_from_slice(&page_size.to_be_bytes());
        write(&db, &journal, 0, &head).unwrap();
        write(&db, &file, 0, &page).unwrap();
        // So that the file is as long as the header says.
        let _ = truncate(&db, &file, u64::from(pages) * u64::from(page_size));
        assert_quickly_refused(Instant::now(), unlink(&db, FileKind::Journal));
        assert!(space(&bed) < before.1 + (4 << 20), "disk was taken for it");
        assert_eq!(bed.check(DB), before.0);
        // A journal that restores nothing keeps the database from being written, until the node
        // forgets what was never committed.
        let other = bed.killed();
        assert_eq!(other.check(DB), before.0, "{page_size}, {pages}");
        other.store.set_role(Role::Primary);
        let c = other.connect(DB);
        c.execute_batch("INSERT INTO t VALUES (1)").unwrap();
        integrity(&c);
    }
}

#[test]
fn a_commit_frame_with_an_absurd_page_count() {
    for (page_size, pages) in [
        (4096u32, u32::MAX),
        (4096, 1 << 28),
        (512, 1 << 30),
        (65536, 1 << 20),
    ] {
        let bed = Bed::primary();
        let c = bed.connect(DB);
        c.execute_batch(&format!("PRAGMA page_size={page_size}; CREATE TABLE t(v)"))
            .unwrap();
        set_mode(&c, "wal");
        drop(c);
        let db = bed.db(DB);
        let before = (bed.check(DB), space(&bed));
        let file = db.file(FileKind::Database).unwrap();
        let mut page = vec![0u8; page_size as usize];
        db.read(&file, 0, &mut page).unwrap();
        let wal = db.create(FileKind::Wal, false).unwrap();
        db.create(FileKind::Shm, false).unwrap();
        let header = WalHeader::new(page_size, 0, 1, 2);
        let frame = FrameHeader::for_page(&header, header.checksum, 1, pages, &page);
        write(&db, &wal, 0, &header.encode()).unwrap();
        let began = Instant::now();
        let bytes = [&frame.encode()[..], &page].concat();
        assert_quickly_refused(began, write(&db, &wal, 32, &bytes));
        assert!(space(&bed) < before.1 + (4 << 20), "disk was taken for it");
        assert_eq!(bed.check(DB), before.0);
        let c = bed.connect(DB);
        c.execute_batch("INSERT INTO t VALUES (1)").unwrap();
        integrity(&c);
        drop(c);
        bed.check(DB);
    }
}
