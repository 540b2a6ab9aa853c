//! Programs that know nothing of SQLite, let loose on the files of databases that are written
//! meanwhile: refused with an error number that says so, or harmless. Nothing that they do becomes a
//! transaction, on this node or another. (A whole database that is copied in does: `copies.rs`.)

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::helper::{WRITER_TABLES, Writer, assert_whole_transactions};
use common::run::{Finished, run};
use common::{Cluster, Options, Pair, SOON, sqlite3, wait_same_pos, wait_until};
use rusqlite::Connection;

helper_test!();

const LIMIT: Duration = Duration::from_secs(30);

/// A shell's commands with the mount as the working directory, `$DIR` a directory of the test's.
fn shell(mount: &Path, dir: &Path, script: &str) -> Finished {
    let mut command = Command::new("sh");
    command
        .args(["-c", script])
        .current_dir(mount)
        .env("DIR", dir);
    run(&mut command, b"", LIMIT)
}

/// May it succeed?
#[derive(Clone, Copy, Debug, PartialEq)]
enum Want {
    Refused,
    Harmless,
    Either,
}
use Want::{Either, Harmless, Refused};

/// What programs do to a database `x.db` that is there, and what must come of it.
const SCRIPTS: &[(Want, &str)] = &[
    // Reading: a copy of a database that is written may be torn, as anywhere.
    (Harmless, "cp x.db $DIR/out && test -s $DIR/out"),
    (Harmless, "cat x.db > /dev/null"),
    (
        Harmless,
        "dd if=x.db of=$DIR/out bs=777 skip=3 count=9 status=none",
    ),
    (
        Harmless,
        "ls -la . && stat x.db && file x.db 2>/dev/null || true",
    ),
    (
        Harmless,
        "tar cf $DIR/out.tar --warning=no-file-changed x.db x.db-pos; test $? -le 1",
    ),
    (Harmless, "grep -c SQLite x.db x.db-pos; true"),
    // Attributes that are what they are.
    (Harmless, "touch x.db"),
    (Harmless, "touch -d 2001-01-01 x.db"),
    (Either, "chmod 600 x.db"),
    (Either, "chown 1 x.db"),
    // Writing over it. (dd reads too when it is to begin elsewhere than at the beginning.)
    (
        Refused,
        "dd if=/dev/urandom of=x.db bs=777 seek=3 count=9 conv=notrunc status=none",
    ),
    (
        Refused,
        "dd if=/dev/urandom of=x.db bs=4096 seek=2 count=1 conv=notrunc status=none",
    ),
    (
        Refused,
        "dd if=/dev/urandom of=x.db bs=1 seek=24 count=4 conv=notrunc status=none",
    ),
    (
        Refused,
        "dd if=/dev/zero of=x.db bs=4096 count=3 conv=notrunc,fsync status=none",
    ),
    (Refused, "echo more >> x.db"),
    (Refused, "echo all > x.db"),
    // So begins whoever copies a database over it (copies.rs); here nothing follows.
    (Harmless, ": > x.db"),
    (Refused, "truncate -s 0 x.db"),
    (Refused, "truncate -s 4097 x.db"),
    (Refused, "truncate -s +1M x.db"),
    (Refused, "fallocate -l 100M x.db"),
    (Refused, "fallocate -p -o 4096 -l 4096 x.db"),
    (Refused, "shred -n 1 x.db"),
    // As editors save: a file beside it that is renamed, a backup of it, in place.
    (Refused, "sed -i s/a/b/ x.db"),
    (
        Refused,
        "cp $DIR/other.db tmp.db && mv tmp.db x.db; code=$?; rm -f tmp.db; exit $code",
    ),
    (Refused, "printf text > notes.txt"),
    (Refused, "printf text > .x.db.swp"),
    (Refused, "printf text > 'x.db~'"),
    (Refused, "mv x.db x.db~ && cp $DIR/other.db x.db"),
    (Refused, "mv x.db y.db"),
    (Refused, "mv x.db $DIR/x.db-moved/nowhere"),
    (Refused, "ln x.db hard.db"),
    (Refused, "ln -s x.db soft.db"),
    (Refused, "mkdir sub"),
    (Refused, "mkdir -p a/b/c"),
    (Refused, "rmdir ."),
    (Refused, "mkfifo pipe"),
    (Refused, "mknod device c 1 3"),
    // The files that belong to it.
    (Refused, "echo 1 > x.db-pos"),
    (Refused, "rm x.db-pos"),
    (Refused, "rm .lag"),
    (Refused, "echo me > .primary"),
    (Refused, "echo me > x.db-lock"),
    (Harmless, "touch new.db && rm new.db"),
    (Harmless, "test ! -e new.db"),
];

/// A pair with a database `x.db` in this mode, and a copy of another database beside the mount.
fn pair_with_database(mode: &str) -> Pair {
    let pair = Cluster::static_pair(150);
    sqlite3(
        &pair.primary.db("x.db"),
        &format!("PRAGMA journal_mode={mode};{WRITER_TABLES}"),
    );
    sqlite3(
        &pair.cluster.dir().join("other.db"),
        "CREATE TABLE other (a); INSERT INTO other VALUES (1);",
    );
    pair.assert_same("x.db");
    pair
}

/// Kills the writer while another one has the lock. (The rollback of a large transaction leaves other
/// bytes in free pages, which is a transaction.)
fn kill_between_transactions(path: &Path, writer: &mut Writer) {
    let db = Connection::open(path).expect("open");
    wait_until("the writer's lock", SOON, || {
        // It is free for a moment between two transactions.
        (0..1000)
            .any(|_| db.execute_batch("BEGIN IMMEDIATE").is_ok())
            .then_some(())
            .ok_or("it has it")
    });
    writer.process.kill9();
}

fn under_a_writer(mode: &str) {
    let pair = pair_with_database(mode);
    let (mount, dir) = (pair.primary.mount(), pair.cluster.dir());
    let path = pair.primary.db("x.db");
    let mut writer = Writer::start(&path, dir, mode, "NORMAL");
    for (want, script) in SCRIPTS {
        let before = writer.acknowledged();
        let done = shell(&mount, dir, script);
        match want {
            Refused => assert!(!done.success(), "went through: {script}"),
            Harmless => assert!(done.success(), "{script}: {}", done.stderr),
            Either => {}
        }
        for wrong in ["Input/output error", "Operation not permitted"] {
            // What it says is for people: how it looks is only shown.
            if done.stderr.contains(wrong) {
                println!("{script}: {}", done.stderr.trim());
            }
        }
        // The writer does not notice.
        wait_until("the writer's next transactions", SOON, || {
            match (writer.error(), writer.acknowledged()) {
                (None, n) if n > before + 1 => Ok(()),
                (error, n) => Err(format!("after {script}: {error:?}, {n}")),
            }
        });
    }
    kill_between_transactions(&path, &mut writer);
    let newest = assert_whole_transactions(&path, writer.acknowledged());
    pair.assert_same("x.db");
    // Each transaction is one of the writer's: it made all of them but the tables'.
    let setup = if mode == "wal" { 4 } else { 3 };
    assert_eq!(pair.primary.txid("x.db") as i64, newest + setup, "{mode}");
    // On a replica nothing of it works, and nothing is harmed.
    let replica = pair.replica.mount();
    let pos = pair.replica.pos("x.db");
    for (want, script) in SCRIPTS.iter().filter(|(w, _)| *w == Refused) {
        let done = shell(&replica, dir, script);
        assert!(
            !done.success(),
            "{want:?} went through on a replica: {script}"
        );
    }
    assert_eq!(pair.replica.pos("x.db"), pos);
    let names = std::fs::read_dir(&mount).expect("list").flatten();
    let left: Vec<String> = names
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|n| !n.starts_with("x.db") && !n.starts_with('.'))
        .collect();
    assert_eq!(left, [""; 0], "something is left");
    pair.assert_same("x.db");
}

#[test]
fn under_a_writer_in_a_rollback_mode() {
    under_a_writer("delete");
}

#[test]
fn under_a_writer_in_wal_mode() {
    under_a_writer("wal");
}

/// Writes into a shared mapping of a file that is opened with these flags too, as some programs
/// write files.
fn scribble(path: &Path, flags: i32, at: i64) -> std::io::Result<()> {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)?;
    // SAFETY: a new mapping of an open file; the page exists.
    unsafe {
        let page = libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            at,
        );
        if page == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        std::ptr::write_bytes(page.cast::<u8>(), 0x77, 4096);
        let r = libc::msync(page, 4096, libc::MS_SYNC);
        let synced = if r == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error())
        };
        libc::munmap(page, 4096);
        synced
    }
}

#[test]
fn written_through_a_mapping() {
    for mode in ["delete", "wal"] {
        let pair = pair_with_database(mode);
        let path = pair.primary.db("x.db");
        sqlite3(
            &path,
            "INSERT INTO many VALUES (1, 1, randomblob(30000)); PRAGMA wal_checkpoint;",
        );
        pair.assert_same("x.db");
        let before = (pair.primary.pos("x.db"), sqlite3(&path, ".dump"));
        let foreign = scribble(&path, 0, 4096 * 4).expect_err("a foreign program's mapping");
        assert_eq!(foreign.raw_os_error(), Some(libc::ENODEV), "{foreign}");
        // Opened as SQLite opens, it has the kernel's cache, which has it for a moment: nobody sees
        // it there any more.
        scribble(&path, libc::O_NOFOLLOW, 4096 * 4).expect_err("garbage through a mapping");
        wait_until("what the file is", SOON, || {
            let mut page = [0; 4096];
            let file = File::open(&path).expect("open");
            file.read_exact_at(&mut page, 4096 * 4).expect("read");
            match page == [0x77; 4096] {
                true => Err("garbage"),
                false => Ok(()),
            }
        });
        assert_eq!(
            (pair.primary.pos("x.db"), sqlite3(&path, ".dump")),
            before,
            "{mode}"
        );
        sqlite3(&path, "INSERT INTO many VALUES (2, 2, randomblob(30000));");
        pair.assert_same("x.db");
    }
}

/// What is refused is read by nobody, not even at the moment at which it is written.
#[test]
fn a_refused_write_is_never_seen() {
    for mode in ["delete", "wal"] {
        let pair = pair_with_database(mode);
        let path = pair.primary.db("x.db");
        let db = Connection::open(&path).expect("open");
        // It holds a lock meanwhile, and the file is in the kernel's cache.
        db.execute_batch("INSERT INTO many VALUES (1, 1, randomblob(30000)); PRAGMA wal_checkpoint; BEGIN; SELECT * FROM many;")
            .expect("read");
        let reader = File::open(&path).expect("open");
        let page = || {
            let mut page = [0; 4096];
            reader.read_exact_at(&mut page, 8192).expect("read");
            page
        };
        let before = page();
        let done = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                let foreign = File::options().read(true).write(true).open(&path);
                let foreign = foreign.expect("open");
                for _ in 0..2000 {
                    foreign
                        .write_all_at(&[0x77; 4096], 8192)
                        .expect_err("a write behind SQLite's back");
                }
                done.store(true, Ordering::Release);
            });
            while !done.load(Ordering::Acquire) {
                assert!(page() == before, "{mode}: what was refused was read");
            }
        });
    }
}

#[test]
fn a_database_is_removed_under_open_connections() {
    for mode in ["delete", "truncate", "persist", "wal"] {
        let pair = pair_with_database(mode);
        let path = pair.primary.db("x.db");
        let idle = Connection::open(&path).expect("open");
        idle.execute_batch(&format!(
            "PRAGMA journal_mode={mode}; SELECT * FROM counter;"
        ))
        .expect("read");
        let busy = Connection::open(&path).expect("open");
        busy.execute_batch("BEGIN IMMEDIATE; INSERT INTO many VALUES (1, 1, zeroblob(50000));")
            .expect("write");
        let there = Connection::open(pair.replica.db("x.db")).expect("open");
        let read =
            |c: &Connection| c.query_row("SELECT n FROM counter", [], |r| r.get::<_, i64>(0));
        read(&there).expect("read on the replica");
        assert!(shell(&pair.primary.mount(), pair.cluster.dir(), "rm x.db").success());
        let late = busy.execute_batch("COMMIT");
        println!("{mode}: the open transaction: {late:?}");
        // Under the name there is nothing, here and there; then another database.
        wait_until("the drop at the replica", SOON, || {
            match pair.replica.db("x.db").exists() {
                true => Err("still there"),
                false => Ok(()),
            }
        });
        for c in [&idle, &busy] {
            let wrote = c.execute_batch("INSERT INTO counter VALUES (7)");
            println!("{mode}: a write afterwards: {wrote:?}");
        }
        sqlite3(
            &path,
            "CREATE TABLE fresh (a); INSERT INTO fresh VALUES (1);",
        );
        wait_same_pos(&pair.primary, &pair.replica, "x.db");
        for c in [&idle, &busy] {
            // It may see the old file for as long as it has it open. It cannot write the new one.
            let _ = c.execute_batch("INSERT INTO counter VALUES (8)");
        }
        drop((idle, busy, there));
        let dump = sqlite3(
            &path,
            "SELECT name FROM sqlite_schema; SELECT * FROM fresh;",
        );
        assert_eq!(dump, "fresh\n1\n", "{mode}");
        pair.assert_same("x.db");
    }
}

#[test]
fn files_of_a_database_are_removed_under_a_writer() {
    for mode in ["delete", "wal"] {
        let pair = pair_with_database(mode);
        let path = pair.primary.db("x.db");
        let db = Connection::open(&path).expect("open");
        db.execute_batch("PRAGMA cache_size=5")
            .expect("a small cache");
        let mut n = 0;
        for script in [
            "rm -f x.db-journal",
            "rm -f x.db-wal",
            "rm -f x.db-shm x.db-wal",
            "truncate -s 0 x.db-wal",
        ] {
            // A journal that is deleted is a commit to SQLite, and what there is of it a transaction.
            for open in [false, true] {
                n += 1;
                if open {
                    db.execute_batch("BEGIN IMMEDIATE").expect("begin");
                    let insert = format!("INSERT INTO many VALUES ({n}, 1, zeroblob(90000))");
                    db.execute_batch(&insert).expect("write");
                }
                shell(&pair.primary.mount(), pair.cluster.dir(), script);
                if open {
                    let ended = db.execute_batch("COMMIT");
                    println!("{mode}, {script}: {ended:?}");
                    let _ = db.execute_batch("ROLLBACK");
                }
            }
        }
        drop(db);
        // Another connection is not spoilt, and all nodes agree.
        sqlite3(&path, "INSERT INTO counter VALUES (9);");
        pair.assert_same("x.db");
    }
}

#[test]
fn a_sync_in_the_middle_of_a_transaction_commits_nothing() {
    let cluster = Cluster::new(60);
    let mut node = cluster.start(Options::primary("primary"));
    let path = node.db("x.db");
    sqlite3(
        &path,
        "CREATE TABLE t (a); INSERT INTO t VALUES (randomblob(9000));",
    );
    let db = Connection::open(&path).expect("open");
    db.execute_batch("BEGIN; UPDATE t SET a = 1; INSERT INTO t VALUES (2);")
        .expect("write");
    db.cache_flush().expect("write to the file");
    let synced = shell(&node.mount(), cluster.dir(), "sync x.db");
    assert!(synced.success(), "{synced:?}");
    node.kill9();
    // What it says of a transaction whose node has gone is an error.
    assert!(db.execute_batch("COMMIT").is_err());
    drop(db);
    node.start();
    assert_eq!(sqlite3(&path, "SELECT length(a) FROM t;"), "9000\n");
}
