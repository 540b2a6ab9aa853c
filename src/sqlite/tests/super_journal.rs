//! Super-journals, and journals at the very commit point: copies that a VFS takes for us, which is
//! SQLite's own but for its deletion of files.

use super::journal::roll_back;
use super::{Db, get};
use crate::sqlite::journal::{
    Journal, MAGIC, is_super_journal_file_name, super_journal_database, super_journal_name,
};
use proptest::prelude::*;
use rusqlite::{Connection, OpenFlags, ffi};
use std::ffi::{CStr, c_char, c_int};
use std::fs;
use std::io::Cursor;
use std::path::Path;
use std::sync::Once;

/// Before it deletes `path`, copies all files beside it into the directory `at-delete` there, the
/// first time in each directory.
unsafe extern "C" fn copying_delete(
    vfs: *mut ffi::sqlite3_vfs,
    path: *const c_char,
    sync: c_int,
) -> c_int {
    // SAFETY: SQLite gives a terminated string.
    let name = unsafe { CStr::from_ptr(path) }.to_str().unwrap_or_default();
    if let Some(dir) = Path::new(name).parent() {
        let to = dir.join("at-delete");
        if name.contains("-journal") || name.contains("-mj") {
            copy_files(dir, &to);
        }
    }
    // SAFETY: the default VFS is valid for the whole life of the process, and so are its functions;
    // its deletion function uses nothing of the `vfs` that it gets.
    unsafe {
        let real = ffi::sqlite3_vfs_find(std::ptr::null());
        (*real)
            .xDelete
            .map_or(ffi::SQLITE_ERROR, |delete| delete(vfs, path, sync))
    }
}

fn copy_files(from: &Path, to: &Path) {
    if fs::create_dir(to).is_err() {
        return; // this was not the first
    }
    for entry in fs::read_dir(from).into_iter().flatten().flatten() {
        if entry.path().is_file() {
            let _ = fs::copy(entry.path(), to.join(entry.file_name()));
        }
    }
}

/// A connection whose deletions are those of [`copying_delete`].
fn connect(path: &Path) -> Connection {
    static REGISTER: Once = Once::new();
    REGISTER.call_once(|| {
        // SAFETY: the copy of the default VFS lives for ever, as a registered VFS must; it is only
        // registered once.
        unsafe {
            let mut vfs = *ffi::sqlite3_vfs_find(std::ptr::null());
            vfs.zName = c"copying".as_ptr();
            vfs.pNext = std::ptr::null_mut();
            vfs.xDelete = Some(copying_delete);
            let vfs = Box::into_raw(Box::new(vfs));
            assert_eq!(ffi::sqlite3_vfs_register(vfs, 0), ffi::SQLITE_OK);
        }
    });
    Connection::open_with_flags_and_vfs(path, OpenFlags::default(), c"copying").unwrap()
}

#[test]
fn both_journals_of_a_transaction_name_the_super_journal() {
    for mode in ["DELETE", "PERSIST", "TRUNCATE"] {
        let one = Db::new(4096, mode, 200);
        let other = one.dir.path().join("other.db");
        Connection::open(&other)
            .and_then(|conn| {
                conn.execute_batch(
                    "PRAGMA page_size=1024; CREATE TABLE u(a); INSERT INTO u VALUES(1)",
                )
            })
            .unwrap();
        let before = [fs::read(&one.path).unwrap(), fs::read(&other).unwrap()];
        let conn = connect(&one.path);
        conn.execute("ATTACH ? AS o", [other.to_str()]).unwrap();
        conn.execute_batch(&format!(
            "PRAGMA journal_mode={mode}; PRAGMA o.journal_mode={mode}"
        ))
        .unwrap();
        let at_delete = one.dir.path().join("at-delete");
        let _ = fs::remove_dir_all(&at_delete);
        conn.execute_batch("BEGIN; UPDATE t SET x=1; UPDATE o.u SET a=2; COMMIT")
            .unwrap();

        // The first file deleted was the super-journal: the commit of both.
        let named: Vec<String> = fs::read_dir(&at_delete)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| is_super_journal_file_name(name))
            .collect();
        let [super_journal] = &named[..] else {
            panic!("{mode}: {named:?}")
        };
        assert_eq!(super_journal_database(super_journal), Some("a.db"));
        for (name, before) in ["a.db", "other.db"].into_iter().zip(before) {
            let mut db = fs::read(at_delete.join(name)).unwrap();
            assert!(db != before);
            let bytes = fs::read(at_delete.join(format!("{name}-journal"))).unwrap();
            let len = bytes.len() as u64;
            let path = super_journal_name(Cursor::new(&bytes), len)
                .unwrap()
                .unwrap();
            assert!(Path::new(&path).ends_with(super_journal), "{path}");
            let journal = Journal::open(Cursor::new(&bytes), len).unwrap().unwrap();
            assert_eq!(journal.super_journal(), Some(path));
            assert!(roll_back(&mut db, &bytes));
            assert!(db == before, "{mode} {name}: not the old database");
        }
        assert_eq!(get::<i64>(&conn, "SELECT a FROM o.u"), 2);
    }
}

#[test]
fn a_journal_at_its_commit_point_gives_the_old_database() {
    let statements = [
        "VACUUM",
        "UPDATE t SET x=randomblob(300)",
        "DELETE FROM t WHERE id>10",
        "DROP TABLE t",
        "PRAGMA page_size=1024; VACUUM",
        "PRAGMA page_size=16384; VACUUM",
        "PRAGMA user_version=7",
    ];
    for auto_vacuum in ["NONE", "FULL"] {
        for statement in statements {
            let db = Db::new(4096, "DELETE", 500);
            db.run(&format!("PRAGMA auto_vacuum={auto_vacuum}; VACUUM"));
            db.run("DELETE FROM t WHERE id%2=0");
            let before = db.bytes("");
            connect(&db.path).execute_batch(statement).unwrap();
            let at_delete = db.dir.path().join("at-delete");
            let mut copy = fs::read(at_delete.join("a.db")).unwrap();
            assert!(copy != before, "{statement}: nothing was written");
            let journal = fs::read(at_delete.join("a.db-journal")).unwrap();
            assert!(roll_back(&mut copy, &journal));
            assert!(
                copy == before,
                "{auto_vacuum} {statement}: not the old database"
            );
        }
    }
}

#[test]
fn the_first_transaction_of_a_database_rolls_back_to_nothing() {
    let dir = tempfile::tempdir().unwrap();
    connect(&dir.path().join("a.db"))
        .execute_batch("CREATE TABLE t(a)")
        .unwrap();
    let mut copy = fs::read(dir.path().join("at-delete/a.db")).unwrap();
    assert_eq!(copy.len(), 8192);
    let journal = fs::read(dir.path().join("at-delete/a.db-journal")).unwrap();
    assert!(roll_back(&mut copy, &journal));
    assert!(copy.is_empty());
}

#[test]
fn names_are_told_apart() {
    for (name, database) in [
        ("a.db-mj0123AB9CD", Some("a.db")),
        ("x-mj00000090F", Some("x")),
        ("ä-mjFFFFFF9FF", Some("ä")),
        ("a-mj-mjFFFFFF9FF", Some("a-mj")),
        ("a.db-mj0123ab9cd", None),
        ("a.db-mj0123AB8CD", None),
        ("a.db-mj0123AB9C", None),
        ("a.db-mj0123AB9CDE", None),
        ("a.db-mj0123AG9CD", None),
        ("a.db_mj0123AB9CD", None),
        ("-mj0123AB9CD", None),
        ("ääääää9ää", None),
        ("a.db", None),
        ("", None),
    ] {
        assert_eq!(super_journal_database(name), database, "{name}");
        assert_eq!(
            is_super_journal_file_name(name),
            database.is_some(),
            "{name}"
        );
    }
}

/// The end of a journal that names `name`, with `len` and `sum` as its length and checksum.
fn trailer(name: &[u8], len: u32, sum: u32) -> Vec<u8> {
    [
        &[0, 4, 0, 1],
        name,
        &len.to_be_bytes(),
        &sum.to_be_bytes(),
        &MAGIC,
    ]
    .concat()
}

#[test]
fn only_a_whole_and_right_name_counts() {
    let read = |bytes: &[u8]| super_journal_name(Cursor::new(bytes), bytes.len() as u64).unwrap();
    let sum = |name: &[u8]| {
        name.iter()
            .fold(0u32, |sum, &b| sum.wrapping_add(b as i8 as u32))
    };
    let good = |name: &[u8]| trailer(name, name.len() as u32, sum(name));

    // Bytes beyond ASCII count as negative in the checksum.
    let name = "/måunt/ä.db-mj0123AB9CD";
    assert_eq!(read(&good(name.as_bytes())).as_deref(), Some(name));
    assert_eq!(
        read(&good(b"/d/\xff/a-mj0123AB9CD")).as_deref(),
        Some("/d/\u{fffd}/a-mj0123AB9CD")
    );
    let longest = format!("{}-mj0123AB9CD", "d".repeat(500));
    assert_eq!(
        read(&good(longest.as_bytes())).as_deref(),
        Some(&longest[..])
    );

    let too_long = format!("{}-mj0123AB9CD", "d".repeat(501));
    let name = b"a-mj0123AB9CD";
    let mut no_magic = good(name);
    *no_magic.last_mut().unwrap() ^= 1;
    let bad = [
        good(too_long.as_bytes()),
        good(b"some other name at all"),
        good(b""),
        trailer(name, 13, sum(name) + 1),
        trailer(name, 12, sum(name)),
        trailer(name, 0, 0),
        trailer(name, 1000, sum(name)),
        trailer(name, u32::MAX, sum(name)),
        good(name)[..good(name).len() - 1].to_vec(),
        no_magic,
        MAGIC.to_vec(),
        Vec::new(),
    ];
    for (i, bytes) in bad.iter().enumerate() {
        assert_eq!(read(bytes), None, "case {i}");
    }
}

proptest! {
    #[test]
    fn arbitrary_ends_never_panic(
        name in prop::collection::vec(any::<u8>(), 0..600),
        len: u32,
        sum: u32,
        file_len: u64,
    ) {
        for len in [len, name.len() as u32] {
            let bytes = trailer(&name, len, sum);
            let _ = super_journal_name(Cursor::new(&bytes), bytes.len() as u64).unwrap();
            let _ = super_journal_name(Cursor::new(&bytes), file_len).unwrap();
        }
        let _ = is_super_journal_file_name(&String::from_utf8_lossy(&name));
    }
}
