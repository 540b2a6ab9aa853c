//! The lock bytes: what we lock, SQLite respects, and the other way round.

use super::{Db, get};
use crate::sqlite::locks::*;
use rusqlite::{Connection, ErrorCode, ffi};
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

fn is_busy(conn: &Connection, sql: &str) -> bool {
    match conn.execute_batch(sql) {
        Ok(()) => false,
        Err(e) if e.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => true,
        Err(e) => panic!("{sql}: {e}"),
    }
}

fn take(file: &File, kind: LockKind, start: u64, len: u64) -> bool {
    try_lock(file.as_fd(), kind, start, len).unwrap()
}

const READ: &str = "SELECT count(*) FROM t";
const WRITE: &str = "UPDATE t SET v=1 WHERE id=1";

#[test]
fn sqlite_respects_our_locks_on_the_database() {
    let db = Db::new(4096, "DELETE", 10);
    let conn = db.connect();
    let file = db.open("");
    // Each lock, and whether a read and a write then meet it.
    for (kind, start, len, read, write) in [
        (LockKind::Shared, SHARED_FIRST, SHARED_SIZE, false, true),
        (LockKind::Exclusive, SHARED_FIRST, SHARED_SIZE, true, true),
        (LockKind::Exclusive, SHARED_FIRST, 1, true, true),
        (
            LockKind::Exclusive,
            SHARED_FIRST + SHARED_SIZE - 1,
            1,
            true,
            true,
        ),
        (LockKind::Exclusive, RESERVED_BYTE, 1, false, true),
        (LockKind::Exclusive, PENDING_BYTE, 1, true, true),
        (
            LockKind::Exclusive,
            SHARED_FIRST + SHARED_SIZE,
            1,
            false,
            false,
        ),
        (LockKind::Exclusive, PENDING_BYTE - 1, 1, false, false),
    ] {
        assert!(take(&file, kind, start, len));
        assert_eq!(is_busy(&conn, READ), read, "{kind:?} at {start:#x}");
        assert_eq!(is_busy(&conn, WRITE), write, "{kind:?} at {start:#x}");
        unlock(file.as_fd(), start, len).unwrap();
        assert!(!is_busy(&conn, WRITE));
    }
}

#[test]
fn we_respect_sqlites_locks_on_the_database() {
    let db = Db::new(4096, "DELETE", 10);
    let file = db.open("");
    let free = |start, len| {
        let free = take(&file, LockKind::Exclusive, start, len);
        unlock(file.as_fd(), start, len).unwrap();
        free
    };
    assert!(free(PENDING_BYTE, 2 + SHARED_SIZE));
    db.run("BEGIN; SELECT * FROM t LIMIT 1");
    assert!(!free(SHARED_FIRST, SHARED_SIZE) && free(RESERVED_BYTE, 1));
    assert!(take(&file, LockKind::Shared, SHARED_FIRST, SHARED_SIZE));
    unlock(file.as_fd(), SHARED_FIRST, SHARED_SIZE).unwrap();
    db.run(WRITE);
    assert!(!free(RESERVED_BYTE, 1) && free(PENDING_BYTE, 1));
    db.run("COMMIT; BEGIN EXCLUSIVE");
    assert!(!take(&file, LockKind::Shared, SHARED_FIRST, SHARED_SIZE));
    assert!(!free(PENDING_BYTE, 1));
    db.run("COMMIT");
    assert!(free(PENDING_BYTE, 2 + SHARED_SIZE));
}

#[test]
fn the_wal_has_its_own_lock_bytes() {
    let db = Db::new(4096, "WAL", 10);
    let conn = db.connect();
    let shm = db.open("-shm");
    let free = |byte| {
        let free = take(&shm, LockKind::Exclusive, byte, 1);
        unlock(shm.as_fd(), byte, 1).unwrap();
        free
    };
    assert!(!free(WAL_DMS));
    assert!((WAL_WRITE_LOCK..WAL_DMS).all(free));

    db.run("BEGIN; SELECT * FROM t LIMIT 1");
    assert_eq!(
        (0..5)
            .map(wal_read_lock)
            .filter(|&byte| !free(byte))
            .count(),
        1
    );
    assert!(free(WAL_WRITE_LOCK));
    db.run(WRITE);
    assert!(!free(WAL_WRITE_LOCK) && free(WAL_CKPT_LOCK));
    assert!(is_busy(&conn, WRITE));
    db.run("COMMIT");

    assert!(take(&shm, LockKind::Exclusive, WAL_WRITE_LOCK, 1));
    assert!(is_busy(&conn, WRITE) && !is_busy(&conn, READ));
    unlock(shm.as_fd(), WAL_WRITE_LOCK, 1).unwrap();
    assert!(take(&shm, LockKind::Exclusive, WAL_CKPT_LOCK, 1));
    assert_eq!(get::<i64>(&conn, "PRAGMA wal_checkpoint"), 1, "not busy");
    assert!(!is_busy(&conn, WRITE));
    unlock(shm.as_fd(), WAL_CKPT_LOCK, 1).unwrap();
    assert_eq!(get::<i64>(&conn, "PRAGMA wal_checkpoint"), 0, "busy");
}

#[test]
fn the_recovery_lock_keeps_recovery_out() {
    let db = Db::new(4096, "WAL", 10);
    let conn = db.connect();
    let shm = super::wal_index::Mapped::new(db.open("-shm"));
    shm.index.invalidate_header();
    assert!(take(&shm.file, LockKind::Exclusive, WAL_RECOVER_LOCK, 1));
    let error = conn.execute_batch(READ).unwrap_err();
    assert_eq!(
        error.sqlite_error().map(|e| e.extended_code),
        Some(ffi::SQLITE_BUSY_RECOVERY),
        "{error}"
    );
    unlock(shm.file.as_fd(), WAL_RECOVER_LOCK, 1).unwrap();
    assert!(!is_busy(&conn, READ));
}

#[test]
fn locks_of_two_descriptions_conflict_and_those_of_one_replace_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let open = || {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
    };
    let (a, b) = (open().unwrap(), open().unwrap());
    assert!(take(&a, LockKind::Shared, 0, 10) && take(&b, LockKind::Shared, 5, 10));
    assert!(!take(&a, LockKind::Exclusive, 0, 10));
    assert!(take(&a, LockKind::Exclusive, 0, 5), "nobody else has these");
    unlock(b.as_fd(), 5, 10).unwrap();
    assert!(take(&a, LockKind::Exclusive, 0, 10));
    assert!(!take(&b, LockKind::Shared, 9, 1) && take(&b, LockKind::Shared, 10, 1));
    assert!(
        take(&a, LockKind::Shared, 9, 1),
        "a lock turned into the other kind"
    );
    assert!(take(&b, LockKind::Shared, 9, 1));
    drop(a);
    assert!(
        take(&b, LockKind::Exclusive, 0, 20),
        "they go with the description"
    );
}

#[test]
fn waiting_ends_at_the_deadline_or_with_the_lock() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let open = || {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
    };
    let (a, b) = (open().unwrap(), open().unwrap());
    let until = |ms| Instant::now() + Duration::from_millis(ms);
    let exclusive = LockKind::Exclusive;

    let guard = LockGuard::acquire(a.as_fd(), exclusive, 7, 1, until(0))
        .unwrap()
        .unwrap();
    let start = Instant::now();
    assert!(!lock_until(b.as_fd(), exclusive, 7, 1, until(60)).unwrap());
    let waited = start.elapsed();
    assert!(waited >= Duration::from_millis(60), "{waited:?}");
    assert!(waited < Duration::from_secs(5), "{waited:?}");
    assert!(
        LockGuard::acquire(b.as_fd(), exclusive, 7, 1, until(0))
            .unwrap()
            .is_none()
    );

    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(30));
            drop(guard);
        });
        let guard = LockGuard::acquire(b.as_fd(), exclusive, 7, 1, until(10_000)).unwrap();
        assert!(guard.is_some());
        assert!(!take(&a, LockKind::Shared, 7, 1));
    });
    assert!(take(&a, LockKind::Shared, 7, 1));
}

#[test]
fn ranges_that_no_lock_can_have_are_errors() {
    let file = tempfile::tempfile().unwrap();
    for (start, len) in [(0, 0), (u64::MAX, 1), (0, u64::MAX), (i64::MAX as u64, 2)] {
        let error = try_lock(file.as_fd(), LockKind::Exclusive, start, len).unwrap_err();
        let overflow = error.raw_os_error() == Some(libc::EOVERFLOW);
        assert!(
            error.kind() == ErrorKind::InvalidInput || overflow,
            "{start} {len}: {error}"
        );
    }
}
