//! A SQLite that opens its files otherwise than today's, by which the node does not know it: its
//! handles go past the kernel's cache, beside others that do not, and nobody sees a difference.

mod common;

use std::cell::Cell;
use std::ffi::{c_char, c_int};
use std::path::Path;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Cluster, SOON, sqlite3};
use rusqlite::{Connection, ffi};

thread_local! {
    /// Whether this thread's SQLite is an old one.
    static OLD: Cell<bool> = const { Cell::new(false) };
}

unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    let flags = match OLD.get() {
        true => flags & !libc::O_NOFOLLOW,
        false => flags,
    };
    // SAFETY: SQLite's own arguments.
    unsafe { libc::open(path, flags, mode) }
}

/// A connection of a SQLite that follows links, as those before 3.31 (2020); for threads that have no
/// other.
fn open_old(path: &Path) -> Connection {
    static SET: Once = Once::new();
    SET.call_once(|| {
        // SAFETY: the VFS lives as long as the process, and takes system calls of any signature,
        // under a name that says which.
        unsafe {
            let vfs = ffi::sqlite3_vfs_find(std::ptr::null());
            let set = (*vfs).xSetSystemCall.expect("SQLite's VFS has it");
            let call: unsafe extern "C" fn(*const c_char, c_int, c_int) -> c_int = open;
            let call = std::mem::transmute::<
                unsafe extern "C" fn(*const c_char, c_int, c_int) -> c_int,
                unsafe extern "C" fn(),
            >(call);
            assert_eq!(set(vfs, c"open".as_ptr(), Some(call)), ffi::SQLITE_OK);
        }
    });
    OLD.set(true);
    open_new(path)
}

/// Pages that do not fit into the kernel's, and are read from the file again and again.
fn open_new(path: &Path) -> Connection {
    let db = Connection::open(path).expect("open");
    db.busy_timeout(SOON).expect("set a limit");
    db.execute_batch("PRAGMA cache_size=2; PRAGMA mmap_size=1000000;")
        .expect("set up");
    db
}

/// Moves amounts between accounts, so that their sum stays.
fn transfer(db: &Connection, from: i64, to: i64) {
    db.execute_batch(&format!(
        "BEGIN IMMEDIATE;
         UPDATE t SET n = n - 7, v = randomblob(300) WHERE k = {from};
         UPDATE t SET n = n + 7, v = randomblob(900) WHERE k = {to};
         COMMIT;"
    ))
    .expect("a transfer");
}

fn check(db: &Connection, what: &str) {
    let sum: i64 = db
        .query_row("SELECT sum(n) FROM t", [], |r| r.get(0))
        .expect(what);
    assert_eq!(sum, 0, "{what}");
    let whole: String = db
        .query_row("PRAGMA integrity_check", [], |r| r.get(0))
        .expect(what);
    assert_eq!(whole, "ok", "{what}");
}

#[test]
fn an_old_sqlite_beside_a_new_one() {
    const TRANSFERS: i64 = 150;
    let pair = Cluster::static_pair(150);
    for mode in ["delete", "truncate", "persist", "wal"] {
        let name = format!("{mode}.db");
        let path = pair.primary.db(&name);
        sqlite3(
            &path,
            &format!(
                "PRAGMA page_size=1024; PRAGMA journal_mode={mode}; CREATE TABLE t (k INTEGER PRIMARY KEY, n, v);
                 WITH RECURSIVE i(k) AS (SELECT 1 UNION ALL SELECT k+1 FROM i WHERE k < 40)
                   INSERT INTO t SELECT k, 0, zeroblob(500) FROM i;"
            ),
        );
        let before = pair.primary.txid(&name);
        let done = AtomicBool::new(false);
        std::thread::scope(|s| {
            let old = s.spawn(|| {
                let db = open_old(&path);
                db.execute_batch(&format!("PRAGMA journal_mode={mode}"))
                    .expect("set the mode");
                for i in 0..TRANSFERS {
                    transfer(&db, i % 40 + 1, (i * 7 + 3) % 40 + 1);
                    check(&db, "what the old one reads");
                }
            });
            s.spawn(|| {
                let db = open_new(&path);
                while !done.load(Ordering::Acquire) {
                    check(&db, "what a new one reads meanwhile");
                }
            });
            let db = open_new(&path);
            db.execute_batch(&format!("PRAGMA journal_mode={mode}"))
                .expect("set the mode");
            for i in 0..TRANSFERS {
                transfer(&db, i % 39 + 1, i % 39 + 2);
                check(&db, "what the new writer reads");
            }
            old.join().expect("the old one's transfers");
            done.store(true, Ordering::Release);
        });
        let made = pair.primary.txid(&name) - before;
        assert_eq!(made as i64, 2 * TRANSFERS, "{mode}");
        pair.assert_same(&name);
    }
}
