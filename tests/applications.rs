//! What applications do to SQLite that other tests leave out: long readers, many writers, backups,
//! many databases, odd names, a database of more than 1 GiB, a writer that dies at the worst moment.

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::run::{Running, run};
use common::{Cluster, Node, Options, Pair, SOON, image, sqlite3, wait_same_pos, wait_until};
use rusqlite::Connection;

fn strict_pair(limit_secs: u64) -> Pair {
    Cluster::static_pair_with(limit_secs, |options| Options {
        strict_verify: true,
        ..options
    })
}

fn open(node: &Node, db: &str) -> Connection {
    let db = Connection::open(node.db(db)).expect("open");
    db.busy_timeout(SOON).expect("set a limit");
    db
}

fn number(db: &Connection, sql: &str) -> i64 {
    db.query_row(sql, [], |row| row.get(0)).expect("a number")
}

/// A `sqlite3` process that reads its SQL from a file, and its output.
fn start_sqlite3(path: &Path, script: &Path) -> Child {
    Command::new("sqlite3")
        .args(["-batch", "-bail", "-init", "/dev/null"])
        .arg(path)
        .stdin(File::open(script).expect("open the script"))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start sqlite3")
}

#[test]
fn many_processes_write_at_once() {
    const WRITERS: usize = 8;
    let pair = strict_pair(120);
    for mode in ["delete", "truncate", "persist", "wal"] {
        let db = format!("{mode}.db");
        let path = pair.primary.db(&db);
        sqlite3(
            &path,
            &format!(
                "PRAGMA journal_mode={mode}; CREATE TABLE t (who, n); CREATE INDEX i ON t (n);"
            ),
        );
        let writers: Vec<Running> = (0..WRITERS)
            .map(|who| {
                let mut script = format!(".timeout 60000\nPRAGMA journal_mode={mode};\n");
                for n in 0..12 {
                    script += &format!(
                        "BEGIN IMMEDIATE; INSERT INTO t VALUES ({who}, {n}); UPDATE t SET n = n WHERE who = {who}; COMMIT;\n"
                    );
                }
                let file = pair.cluster.dir().join(format!("{mode}-{who}.sql"));
                std::fs::write(&file, script).expect("write the script");
                Running(start_sqlite3(&path, &file))
            })
            .collect();
        for mut writer in writers {
            let code = writer.wait(Duration::from_secs(60));
            let mut error = String::new();
            if let Some(mut stderr) = writer.0.stderr.take() {
                std::io::Read::read_to_string(&mut stderr, &mut error).expect("read the error");
            }
            assert_eq!((code, error.as_str()), (Some(0), ""), "{mode}");
        }
        assert_eq!(
            sqlite3(&path, "SELECT count(*), sum(n) FROM t;"),
            format!("{}|{}\n", WRITERS * 12, WRITERS * 66),
            "{mode}"
        );
        pair.assert_same(&db);
    }
}

#[test]
fn a_hundred_databases_at_once() {
    let mut pair = Cluster::static_pair(120);
    let name = |n: usize| format!("d{n}.db");
    for n in 0..100 {
        let mode = ["delete", "wal"][n % 2];
        sqlite3(
            &pair.primary.db(&name(n)),
            &format!("PRAGMA journal_mode={mode}; CREATE TABLE t (a); INSERT INTO t VALUES ({n});"),
        );
    }
    for n in 0..100 {
        wait_same_pos(&pair.primary, &pair.replica, &name(n));
    }
    // Connections to all of them while both nodes are started anew.
    pair.replica.stop();
    pair.primary.kill9();
    pair.primary.start();
    pair.replica.start();
    for n in 0..100 {
        wait_same_pos(&pair.primary, &pair.replica, &name(n));
    }
    let here: Vec<_> = (0..100).map(|n| open(&pair.primary, &name(n))).collect();
    let there: Vec<_> = (0..100).map(|n| open(&pair.replica, &name(n))).collect();
    for db in &here {
        db.execute("INSERT INTO t VALUES (1000)", [])
            .expect("insert");
    }
    for (n, db) in there.iter().enumerate() {
        wait_same_pos(&pair.primary, &pair.replica, &name(n));
        assert_eq!(number(db, "SELECT sum(a) FROM t"), 1000 + n as i64);
    }
    drop((here, there));
    pair.assert_same("d0.db");
    pair.assert_same("d99.db");
}

#[test]
fn names_with_spaces_and_letters_of_all_kinds() {
    let mut pair = strict_pair(60);
    let long = format!("{}.db", "n".repeat(190));
    let names = [
        "a b.db",
        " ",
        "größe.db",
        "データ",
        "🦀.sqlite",
        "a'b\"c;$(x).db",
        "%2F..%00.db",
        "x.tar.gz",
        ".hidden",
        "-rf",
        "no-wal-here",
        long.as_str(),
    ];
    let fill = |from: usize| {
        for name in names {
            let mode = ["delete", "wal"][from % 2];
            let db = open(&pair.primary, name);
            db.execute_batch(&format!(
                "PRAGMA journal_mode={mode}; CREATE TABLE IF NOT EXISTS t (a); INSERT INTO t VALUES ({from})"
            ))
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        for name in names {
            wait_same_pos(&pair.primary, &pair.replica, name);
            let there = open(&pair.replica, name);
            let rows = number(&there, "SELECT count(*) FROM t");
            assert_eq!(rows, from as i64 + 1, "{name}");
            let (a, b) = (
                image::read(&pair.primary, name),
                image::read(&pair.replica, name),
            );
            image::assert_equal(&a, &b, name);
        }
    };
    fill(0);
    fill(1);
    pair.replica.stop();
    pair.primary.stop();
    pair.primary.start();
    pair.replica.start();
    let mut listed: Vec<String> = std::fs::read_dir(pair.replica.mount())
        .expect("list")
        .map(|e| {
            e.expect("an entry")
                .file_name()
                .into_string()
                .expect("UTF-8")
        })
        .filter(|name| names.contains(&name.as_str()))
        .collect();
    listed.sort();
    let mut expected = names.map(str::to_string);
    expected.sort();
    assert_eq!(listed, expected);
}

#[test]
fn mapped_readers_on_a_replica_during_applies() {
    let pair = strict_pair(90);
    for mode in ["delete", "wal"] {
        let db = format!("{mode}.db");
        sqlite3(
            &pair.primary.db(&db),
            &format!(
                "PRAGMA page_size=1024; PRAGMA journal_mode={mode}; CREATE TABLE t (id INTEGER PRIMARY KEY, n, b);
                 WITH RECURSIVE i(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM i WHERE x < 300)
                 INSERT INTO t (n, b) SELECT 0, zeroblob(700) FROM i;"
            ),
        );
        wait_same_pos(&pair.primary, &pair.replica, &db);
        let reader = open(&pair.replica, &db);
        reader
            .pragma_update(None, "mmap_size", 1 << 28)
            .expect("mmap");
        let writer = open(&pair.primary, &db);
        for n in 1..=40 {
            writer
                .execute("UPDATE t SET n = ?1, b = randomblob(700)", [n])
                .expect("update");
            if n % 10 == 0 {
                // It shrinks below what is mapped, and grows again.
                writer
                    .execute_batch("DELETE FROM t WHERE id > 50; VACUUM;
                        INSERT INTO t (n, b) SELECT n, zeroblob(700) FROM t, (SELECT 1 UNION SELECT 2 UNION SELECT 3);")
                    .expect("shrink");
            }
            // Whatever it sees is one transaction's.
            let seen = number(&reader, "SELECT count(DISTINCT n) FROM t");
            assert_eq!(seen, 1, "{mode}, {n}");
        }
        wait_same_pos(&pair.primary, &pair.replica, &db);
        assert_eq!(number(&reader, "SELECT max(n) FROM t"), 40);
        let whole: String = reader
            .query_row("PRAGMA integrity_check", [], |row| row.get(0))
            .expect("check");
        assert_eq!(whole, "ok");
        drop((reader, writer));
        pair.assert_same(&db);
    }
}

#[test]
fn vacuum_while_somebody_reads_on_the_replica() {
    let pair = strict_pair(90);
    for mode in ["delete", "wal"] {
        let db = format!("{mode}.db");
        let path = pair.primary.db(&db);
        sqlite3(
            &path,
            &format!(
                "PRAGMA journal_mode={mode}; CREATE TABLE t (id INTEGER PRIMARY KEY, b);
                 WITH RECURSIVE i(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM i WHERE x < 500)
                 INSERT INTO t (b) SELECT randomblob(2000) FROM i;"
            ),
        );
        pair.assert_same(&db);
        let reader = open(&pair.replica, &db);
        reader.execute_batch("BEGIN").expect("begin");
        let sum = "SELECT sum(length(b)) FROM t";
        assert_eq!(number(&reader, sum), 1_000_000);
        sqlite3(
            &path,
            "DELETE FROM t WHERE id % 5; VACUUM; PRAGMA wal_checkpoint(TRUNCATE);",
        );
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(
            number(&reader, sum),
            1_000_000,
            "{mode}: the snapshot moved"
        );
        reader.execute_batch("COMMIT").expect("end");
        wait_same_pos(&pair.primary, &pair.replica, &db);
        assert_eq!(number(&reader, sum), 200_000, "{mode}");
        drop(reader);
        pair.assert_same(&db);
        let size = |node: &Node| std::fs::metadata(node.db(&db)).expect("size").len();
        if mode == "delete" {
            assert_eq!(size(&pair.primary), size(&pair.replica));
            assert!(size(&pair.replica) < 600_000, "it did not shrink");
        }
    }
}

#[test]
fn a_wal_database_is_closed_and_opened_over_and_over() {
    let pair = strict_pair(90);
    let path = pair.primary.db("x.db");
    sqlite3(&path, "PRAGMA journal_mode=wal; CREATE TABLE t (n);");
    for n in 1..=60 {
        // The last connection's close checkpoints and removes the WAL, and its index.
        let db = open(&pair.primary, "x.db");
        db.execute("INSERT INTO t VALUES (?1)", [n])
            .expect("insert");
        drop(db);
        if n % 3 == 0 {
            wait_same_pos(&pair.primary, &pair.replica, "x.db");
            let there = open(&pair.replica, "x.db");
            assert_eq!(number(&there, "SELECT count(*) FROM t"), n);
        }
    }
    pair.assert_same("x.db");
}

#[test]
fn a_connection_on_the_replica_stays_open_over_switches_of_the_mode() {
    let pair = strict_pair(90);
    let path = pair.primary.db("x.db");
    sqlite3(&path, "CREATE TABLE t (n);");
    wait_same_pos(&pair.primary, &pair.replica, "x.db");
    let reader = open(&pair.replica, "x.db");
    assert_eq!(number(&reader, "SELECT count(*) FROM t"), 0);
    let modes = [
        "wal", "delete", "wal", "persist", "wal", "truncate", "delete",
    ];
    for (n, mode) in modes.into_iter().enumerate() {
        sqlite3(&path, &format!("PRAGMA journal_mode={mode};"));
        // A connection in WAL mode keeps a shared lock: reading is what has it notice the switch.
        for row in 1..=3 {
            sqlite3(&path, &format!("INSERT INTO t VALUES ({row});"));
            let want = n as i64 * 3 + row;
            wait_until("the row on the open connection", SOON, || {
                match number(&reader, "SELECT count(*) FROM t") {
                    have if have == want => Ok(()),
                    have => Err(format!("{mode}: {have} of {want}")),
                }
            });
        }
    }
    drop(reader);
    pair.assert_same("x.db");
}

#[test]
fn backup_and_dump_through_the_mount() {
    let pair = strict_pair(90);
    let source = pair.cluster.dir().join("source.db");
    for mode in ["delete", "wal"] {
        let db = format!("{mode}.db");
        let path = pair.primary.db(&db);
        sqlite3(
            &path,
            &format!(
                "PRAGMA journal_mode={mode}; CREATE TABLE t (id INTEGER PRIMARY KEY, b);
                 WITH RECURSIVE i(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM i WHERE x < 400)
                 INSERT INTO t (b) SELECT randomblob(900) FROM i;"
            ),
        );
        wait_same_pos(&pair.primary, &pair.replica, &db);
        let dump = sqlite3(&path, ".dump");
        // Out of the mount of each node, and back into it under another name.
        for node in [&pair.primary, &pair.replica] {
            sqlite3(&node.db(&db), &format!(".backup {}", source.display()));
            assert_eq!(sqlite3(&source, ".dump"), dump, "{mode}");
        }
        let (copy, loaded) = (format!("copy-{db}"), format!("loaded-{db}"));
        sqlite3(
            &source,
            &format!(".backup {}", pair.primary.db(&copy).display()),
        );
        // Over a database that is there, and open.
        wait_same_pos(&pair.primary, &pair.replica, &copy);
        let reader = open(&pair.replica, &copy);
        assert_eq!(number(&reader, "SELECT count(*) FROM t"), 400);
        sqlite3(
            &source,
            "DELETE FROM t WHERE id > 10; CREATE TABLE u (a); VACUUM;",
        );
        sqlite3(
            &pair.primary.db(&copy),
            &format!(".restore {}", source.display()),
        );
        wait_same_pos(&pair.primary, &pair.replica, &copy);
        assert_eq!(number(&reader, "SELECT count(*) FROM t"), 10);
        assert_eq!(number(&reader, "SELECT count(*) FROM u"), 0);
        drop(reader);
        sqlite3(
            &pair.primary.db(&loaded),
            &format!("PRAGMA journal_mode={mode};\n{dump}"),
        );
        assert_eq!(sqlite3(&pair.primary.db(&loaded), ".dump"), dump);
        pair.assert_same(&copy);
        pair.assert_same(&loaded);
    }
}

#[test]
fn a_replica_that_hangs_holds_nobody_up() {
    let pair = strict_pair(60);
    for mode in ["delete", "wal"] {
        let db = format!("{mode}.db");
        let path = pair.primary.db(&db);
        sqlite3(
            &path,
            &format!("PRAGMA journal_mode={mode}; CREATE TABLE t (b);"),
        );
        wait_same_pos(&pair.primary, &pair.replica, &db);
        pair.replica.freeze(true);
        let begin = Instant::now();
        // More than the pipes between them hold.
        let write = run(
            Command::new("sqlite3").arg(&path).arg(
                "WITH RECURSIVE i(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM i WHERE x < 20)
                 INSERT INTO t SELECT randomblob(500000) FROM i;
                 INSERT INTO t VALUES (1); INSERT INTO t VALUES (2);",
            ),
            b"",
            SOON,
        );
        let took = begin.elapsed();
        pair.replica.freeze(false);
        assert!(write.success(), "{mode}: {}", write.stderr);
        assert!(took < Duration::from_secs(15), "{mode}: {took:?}");
        pair.assert_same(&db);
    }
}

#[test]
fn databases_below_at_and_above_the_lock_page() {
    // Of 64 KiB pages the one at 1 GiB is number 16,385: never used, and in no checksum.
    const LOCK_PAGE: i64 = 16_385;
    let mut pair = Cluster::static_pair(180);
    let path = pair.primary.db("x.db");
    // Three pages besides the blob: this one ends a page below the lock page.
    let insert = |bytes: i64| format!("INSERT INTO t VALUES (zeroblob({bytes}));");
    sqlite3(
        &path,
        &format!(
            "PRAGMA page_size=65536; PRAGMA auto_vacuum=incremental; CREATE TABLE t (b); {} {}",
            insert(999_999_000),
            insert(1_073_741_824 - 999_999_000 - 9 * 65536)
        ),
    );
    let pages = |node: &Node| -> i64 {
        let text = sqlite3(&node.db("x.db"), "PRAGMA page_count;");
        text.trim().parse().expect("a number")
    };
    let below = pages(&pair.primary);
    assert!((LOCK_PAGE - 12..LOCK_PAGE).contains(&below), "{below}");
    wait_same_pos(&pair.primary, &pair.replica, "x.db");
    // A page at a time, over the lock page.
    let mut sizes = vec![below];
    while sizes.last().is_some_and(|n| *n < LOCK_PAGE + 2) {
        sqlite3(&path, &insert(65_000));
        sizes.push(pages(&pair.primary));
        wait_same_pos(&pair.primary, &pair.replica, "x.db");
        assert_eq!(pages(&pair.replica), pages(&pair.primary));
    }
    assert!(
        !sizes.contains(&LOCK_PAGE),
        "the lock page is in use: {sizes:?}"
    );
    // In WAL mode, and back below it; the replica starts anew, and one that has nothing joins.
    sqlite3(
        &path,
        &format!(
            "PRAGMA journal_mode=wal; UPDATE t SET b = zeroblob(64000) WHERE rowid > 2; {}",
            insert(200_000)
        ),
    );
    wait_same_pos(&pair.primary, &pair.replica, "x.db");
    pair.replica.kill9();
    std::fs::remove_dir_all(pair.replica.data()).expect("remove the replica's data");
    pair.replica.start();
    pair.primary.kill9();
    pair.primary.start();
    wait_same_pos(&pair.primary, &pair.replica, "x.db");
    let check = "PRAGMA quick_check; SELECT count(*), sum(length(b)) FROM t;";
    assert_eq!(
        sqlite3(&pair.replica.db("x.db"), check),
        sqlite3(&path, check)
    );
    sqlite3(
        &path,
        "PRAGMA journal_mode=delete; DELETE FROM t WHERE rowid > 2; PRAGMA incremental_vacuum;",
    );
    assert!(pages(&pair.primary) < LOCK_PAGE);
    wait_same_pos(&pair.primary, &pair.replica, "x.db");
    assert_eq!(
        sqlite3(&pair.replica.db("x.db"), check),
        sqlite3(&path, check)
    );
}

/// A connection in a `sqlite3` process that is asked now and then.
struct Keeper {
    process: Running,
    answers: std::path::PathBuf,
    asked: usize,
}

impl Keeper {
    fn start(database: &Path, dir: &Path) -> Keeper {
        let answers = dir.join("answers");
        let out = File::create(&answers).expect("make the answers");
        let child = Command::new("sqlite3")
            .args(["-batch", "-init", "/dev/null"])
            .arg(database)
            .stdin(Stdio::piped())
            .stdout(out.try_clone().expect("duplicate"))
            .stderr(out)
            .spawn()
            .expect("start sqlite3");
        Keeper {
            process: Running(child),
            answers,
            asked: 0,
        }
    }

    /// The line that it answers with.
    fn ask(&mut self, sql: &str) -> String {
        let stdin = self.process.0.stdin.as_mut().expect("piped");
        std::io::Write::write_all(stdin, format!("{sql}\n").as_bytes()).expect("ask");
        self.asked += 1;
        let mut answer = String::new();
        wait_until("an answer", SOON, || {
            let text = std::fs::read_to_string(&self.answers).expect("read");
            match text.split_inclusive('\n').nth(self.asked - 1) {
                Some(line) if line.ends_with('\n') => {
                    answer = line.trim_end().to_string();
                    Ok(())
                }
                _ => Err(text),
            }
        });
        answer
    }
}

/// Takes one of SQLite's locks, for as long as this process has no descriptor of the file closed.
fn lock(file: &File, kind: i32, byte: i64) {
    // SAFETY: all zeros is a valid `flock`.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    (lock.l_type, lock.l_whence) = (kind as i16, libc::SEEK_SET as i16);
    (lock.l_start, lock.l_len) = (byte, 1);
    // SAFETY: a descriptor and a structure that live through the call.
    let rc = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLKW, &lock) };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
}

/// Writes the commit frame as SQLite does, and ends before the index tells of it: the process here
/// lets go of its locks, as the kernel does for a process that dies.
#[test]
fn a_writer_dies_between_its_commit_and_the_index() {
    const SHM_WRITE: i64 = 120;
    const SHM_DMS: i64 = 128;
    let pair = strict_pair(60);
    let path = pair.primary.db("x.db");
    let mut keeper = Keeper::start(&path, pair.cluster.dir());
    assert_eq!(keeper.ask("PRAGMA journal_mode=wal;"), "wal");
    assert_eq!(
        keeper.ask("CREATE TABLE t (n); INSERT INTO t VALUES (1); SELECT count(*) FROM t;"),
        "1"
    );
    for n in 2..=4 {
        // The next transaction's frames, made by SQLite on a copy, which goes on in the same WAL.
        let (copy, copy_wal) = (
            pair.cluster.dir().join(format!("{n}.db")),
            pair.cluster.dir().join(format!("{n}.db-wal")),
        );
        let read = |name: &str| image::read_file(&pair.primary.db(name)).expect("a file");
        let wal = read("x.db-wal");
        std::fs::write(&copy, read("x.db")).expect("copy");
        std::fs::write(&copy_wal, &wal).expect("copy");
        let db = Connection::open(&copy).expect("open the copy");
        db.execute("INSERT INTO t VALUES (?1)", [n])
            .expect("insert");
        let longer = std::fs::read(&copy_wal).expect("read the copy");
        drop(db);
        assert!(longer.starts_with(&wal) && longer.len() > wal.len());
        let before = pair.primary.txid("x.db");
        let open = |name: &str| {
            let options = File::options()
                .read(true)
                .write(true)
                .open(pair.primary.db(name));
            options.expect("open in the mount")
        };
        let (database, shm, wal_file) = (open("x.db"), open("x.db-shm"), open("x.db-wal"));
        lock(&shm, libc::F_RDLCK, SHM_DMS);
        lock(&shm, libc::F_WRLCK, SHM_WRITE);
        // A frame at a time, header and page apart: 24 bytes, and 4096.
        let mut at = wal.len();
        while at < longer.len() {
            for len in [24, 4096] {
                wal_file
                    .write_all_at(&longer[at..at + len], at as u64)
                    .expect("write a frame");
                at += len;
            }
        }
        drop((wal_file, shm, database));
        // Acknowledged or not: it is in the log, and so it must be seen by everybody.
        wait_until("the position", SOON, || match pair.primary.txid("x.db") {
            txid if txid == before + 1 => Ok(()),
            txid => Err(txid),
        });
        wait_until("the row on the open connection", SOON, || {
            match keeper.ask("SELECT count(*) FROM t;") {
                have if have == n.to_string() => Ok(()),
                have => Err(have),
            }
        });
        wait_same_pos(&pair.primary, &pair.replica, "x.db");
        assert_eq!(
            pair.primary.log().matches("rolled forward").count(),
            n as usize - 1,
            "{}",
            pair.primary.log()
        );
    }
    assert_eq!(
        keeper.ask("INSERT INTO t VALUES (5); SELECT count(*) FROM t;"),
        "5"
    );
    drop(keeper);
    pair.assert_same("x.db");
}
