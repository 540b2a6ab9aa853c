//! The mount as an application sees it: names, modes, the files that the node makes, and what it
//! refuses.

mod common;

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use common::{Cluster, Node, SOON, sqlite3, wait_same_pos, wait_until};
use rusqlite::Connection;

/// What is listed, without the node's own files (their names begin with a dot).
fn names(node: &Node) -> Vec<String> {
    let mut names = all_names(node);
    names.retain(|name| !name.starts_with('.'));
    names
}

fn all_names(node: &Node) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(node.mount())
        .expect("list the mount")
        .map(|e| {
            e.expect("an entry")
                .file_name()
                .into_string()
                .expect("text")
        })
        .collect();
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    let metadata = fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    metadata.permissions().mode() & 0o777
}

fn errno(result: std::io::Result<impl Sized>) -> Option<i32> {
    match result {
        Ok(_) => None,
        Err(e) => Some(e.raw_os_error().unwrap_or(-1)),
    }
}

#[test]
fn names_and_modes() {
    let pair = Cluster::static_pair(60);
    assert_eq!(names(&pair.primary), Vec::<String>::new());
    sqlite3(&pair.primary.db("a.db"), "CREATE TABLE t (a);");
    sqlite3(
        &pair.primary.db("with space é"),
        "PRAGMA journal_mode=wal; CREATE TABLE t (a);",
    );
    pair.assert_same("a.db");
    pair.assert_same("with space é");
    assert_eq!(
        names(&pair.primary),
        ["a.db", "a.db-pos", "with space é", "with space é-pos"]
    );
    let on_replica = all_names(&pair.replica);
    for name in [
        "a.db",
        "a.db-pos",
        "with space é",
        "with space é-pos",
        ".primary",
    ] {
        assert!(
            on_replica.iter().any(|n| n == name),
            "{name} in {on_replica:?}"
        );
    }
    assert_eq!(mode(&pair.primary.mount()), 0o777);
    assert_eq!(mode(&pair.replica.mount()), 0o555);
    assert_eq!(mode(&pair.primary.db("a.db")), 0o666);
    assert_eq!(mode(&pair.replica.db("a.db")), 0o444);
    assert_eq!(mode(&pair.primary.db("a.db-pos")) & 0o222, 0);
    assert_eq!(
        errno(fs::symlink_metadata(pair.primary.db(".primary"))),
        Some(libc::ENOENT)
    );
    let primary = fs::read_to_string(pair.replica.db(".primary")).expect("read .primary");
    assert_eq!(primary, "primary\n");
}

#[test]
fn a_journal_is_listed_while_it_is_there() {
    let pair = Cluster::static_pair(60);
    sqlite3(&pair.primary.db("x.db"), "CREATE TABLE t (a);");
    let db = Connection::open(pair.primary.db("x.db")).expect("open");
    db.execute_batch("BEGIN; INSERT INTO t VALUES (1);")
        .expect("write");
    assert!(names(&pair.primary).iter().any(|n| n == "x.db-journal"));
    db.execute_batch("COMMIT").expect("commit");
    assert!(!names(&pair.primary).iter().any(|n| n == "x.db-journal"));
    db.execute_batch("PRAGMA journal_mode=wal; INSERT INTO t VALUES (2);")
        .expect("write");
    let with_wal = names(&pair.primary);
    for name in ["x.db-wal", "x.db-shm"] {
        assert!(with_wal.iter().any(|n| n == name), "{name} in {with_wal:?}");
    }
    drop(db);
    assert_eq!(names(&pair.primary), ["x.db", "x.db-pos"]);
    pair.assert_same("x.db");
}

#[test]
fn the_position_is_never_stale_on_an_open_descriptor() {
    let pair = Cluster::static_pair(60);
    for journal in ["delete", "wal"] {
        let name = format!("{journal}.db");
        sqlite3(
            &pair.primary.db(&name),
            &format!("PRAGMA journal_mode={journal}; CREATE TABLE t (a);"),
        );
        wait_same_pos(&pair.primary, &pair.replica, &name);
        let open = |node: &Node| File::open(node.db(&format!("{name}-pos"))).expect("open X-pos");
        let (mut here, mut there) = (open(&pair.primary), open(&pair.replica));
        let read = |file: &mut File| -> String {
            let mut text = String::new();
            file.seek(SeekFrom::Start(0)).expect("seek");
            file.read_to_string(&mut text).expect("read");
            assert_eq!(text.len(), 34, "{text:?}");
            text
        };
        assert_eq!(
            fs::metadata(pair.primary.db(&format!("{name}-pos")))
                .expect("stat")
                .len(),
            34
        );
        let db = Connection::open(pair.primary.db(&name)).expect("open");
        db.pragma_update(None, "synchronous", "FULL")
            .expect("synchronous");
        let mut last = read(&mut here);
        for n in 0..30 {
            db.execute("INSERT INTO t VALUES (?1)", [n])
                .expect("insert");
            let now = read(&mut here);
            assert_ne!(now, last, "{journal}: X-pos after commit {n}");
            let txid = |text: &str| u64::from_str_radix(&text[..16], 16).expect("digits");
            assert_eq!(txid(&now), txid(&last) + 1, "{journal}: commit {n}");
            last = now;
        }
        wait_until("the replica's open X-pos", SOON, || {
            match read(&mut there) {
                pos if pos == last => Ok(()),
                pos => Err(pos),
            }
        });
    }
}

#[test]
fn the_lag() {
    let mut pair = Cluster::static_pair(60);
    let lag = |node: &Node| fs::read_to_string(node.db(".lag")).expect("read .lag");
    assert_eq!(lag(&pair.primary), "+000000000\n");
    sqlite3(&pair.primary.db("x.db"), "CREATE TABLE t (a);");
    pair.assert_same("x.db");
    let value = |text: &str| -> i64 { text.trim().parse().expect("a number") };
    // Heartbeats come at least once a second.
    for _ in 0..8 {
        let text = lag(&pair.replica);
        assert_eq!(text.len(), 11, "{text:?}");
        assert!((0..5000).contains(&value(&text)), "{text:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
    let changed = fs::metadata(pair.replica.db(".lag"))
        .expect("stat .lag")
        .modified();
    let age = SystemTime::now().duration_since(changed.expect("a time"));
    assert!(age.expect("in the past") < Duration::from_secs(10));
    // Never synced: no figure yet. Lost: the figure grows.
    pair.primary.kill9();
    wait_until("a growing lag", SOON, || match value(&lag(&pair.replica)) {
        ms if ms > 1500 => Ok(()),
        ms => Err(ms),
    });
    assert_eq!(pair.replica.stop(), Some(0), "{}", pair.replica.log());
    pair.replica.start();
    assert_eq!(lag(&pair.replica), "+2147483647\n");
    assert_eq!(
        errno(fs::symlink_metadata(pair.replica.db(".primary"))),
        Some(libc::ENOENT),
        "there is no primary to follow"
    );
}

#[test]
fn what_the_mount_refuses() {
    let pair = Cluster::static_pair(60);
    let x = pair.primary.db("x.db");
    sqlite3(&x, "CREATE TABLE t (a); INSERT INTO t VALUES (1);");
    pair.assert_same("x.db");
    let before = pair.primary.pos("x.db");
    assert!(
        errno(fs::create_dir(pair.primary.db("dir"))).is_some(),
        "mkdir"
    );
    assert!(
        errno(fs::rename(&x, pair.primary.db("y.db"))).is_some(),
        "rename"
    );
    assert!(
        errno(std::os::unix::fs::symlink("x.db", pair.primary.db("link"))).is_some(),
        "symlink"
    );
    assert!(
        errno(fs::hard_link(&x, pair.primary.db("hard"))).is_some(),
        "link"
    );
    assert!(
        errno(fs::write(pair.primary.db("x.db-pos"), "0")).is_some(),
        "writing X-pos"
    );
    assert!(
        errno(fs::remove_file(pair.primary.db("x.db-pos"))).is_some(),
        "unlinking X-pos"
    );
    assert!(
        errno(fs::remove_file(pair.replica.db("x.db"))).is_some(),
        "dropping on a replica"
    );
    assert!(
        errno(fs::write(pair.replica.db("new.db"), "")).is_some(),
        "a file on a replica"
    );
    let path = std::ffi::CString::new(x.to_str().expect("text")).expect("no NUL");
    // SAFETY: both are C strings that live through the call; no buffer is given.
    let got = unsafe { libc::getxattr(path.as_ptr(), c"user.a".as_ptr(), std::ptr::null_mut(), 0) };
    let error = std::io::Error::last_os_error().raw_os_error();
    // The kernel turns a file system's ENOSYS into EOPNOTSUPP.
    assert_eq!(
        (got, error),
        (-1, Some(libc::EOPNOTSUPP)),
        "extended attributes"
    );
    assert_eq!(names(&pair.primary), ["x.db", "x.db-pos"]);
    assert_eq!(pair.primary.pos("x.db"), before);
    pair.assert_same("x.db");
}

#[test]
fn statfs_is_the_data_directorys() {
    let pair = Cluster::static_pair(60);
    let total = |path: &Path| {
        let path = std::ffi::CString::new(path.to_str().expect("text")).expect("no NUL");
        // SAFETY: all zeros are a valid value of this structure of numbers.
        let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
        // SAFETY: a C string and a structure that live through the call.
        assert_eq!(unsafe { libc::statvfs(path.as_ptr(), &mut stat) }, 0);
        stat.f_blocks * stat.f_frsize
    };
    assert_eq!(total(&pair.primary.mount()), total(&pair.primary.data()));
}

#[test]
fn an_unlinked_database_is_dropped_everywhere() {
    let pair = Cluster::static_pair(60);
    for journal in ["delete", "wal"] {
        let name = format!("{journal}.db");
        let path = pair.primary.db(&name);
        sqlite3(
            &path,
            &format!("PRAGMA journal_mode={journal}; CREATE TABLE t (a);"),
        );
        pair.assert_same(&name);
        fs::remove_file(&path).expect("unlink");
        assert!(!names(&pair.primary).iter().any(|n| n == &name));
        assert_eq!(errno(fs::metadata(&path)), Some(libc::ENOENT));
        wait_until("the drop at the replica", SOON, || {
            match names(&pair.replica) {
                left if left.iter().any(|n| n == &name) => Err(left),
                _ => Ok(()),
            }
        });
        assert_eq!(
            errno(File::open(pair.replica.db(&name))),
            Some(libc::ENOENT)
        );
    }
}

#[test]
fn a_new_file_is_no_database_until_it_has_a_page() {
    let pair = Cluster::static_pair(60);
    let path = pair.primary.db("x.db");
    // What SQLite does when it opens a new database: an empty file.
    drop(File::create(&path).expect("create"));
    // The suite's swarmvtabfault found that it was there and not listed.
    assert_eq!(names(&pair.primary), ["x.db"]);
    assert_eq!(names(&pair.replica), Vec::<String>::new());
    sqlite3(&path, "CREATE TABLE t (a);");
    pair.assert_same("x.db");
    assert_eq!(pair.primary.txid("x.db"), 1);
}

#[test]
fn a_warm_reading_transaction_asks_the_daemon_nothing() {
    const COUNTER: &str = "tenure_fuse_requests_total";
    let pair = Cluster::static_pair(90);
    for journal in ["delete", "wal"] {
        let name = format!("{journal}.db");
        sqlite3(
            &pair.primary.db(&name),
            &format!(
                "PRAGMA journal_mode={journal}; CREATE TABLE t (id INTEGER PRIMARY KEY, b);
                 WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 1000)
                   INSERT INTO t SELECT i, zeroblob(300) FROM n;"
            ),
        );
        wait_same_pos(&pair.primary, &pair.replica, &name);
        for node in [&pair.primary, &pair.replica] {
            let db = Connection::open(node.db(&name)).expect("open");
            let mut statement = db
                .prepare("SELECT b FROM t WHERE id = ?1")
                .expect("prepare");
            let mut read_all = || {
                for id in 1..=1000 {
                    let got: Vec<u8> = statement.query_row([id], |r| r.get(0)).expect("read");
                    assert_eq!(got.len(), 300);
                }
            };
            read_all();
            // What the writes before left to be done (invalidations, a flush) has time to end.
            std::thread::sleep(Duration::from_millis(500));
            let before = node.metric(COUNTER);
            assert!(before > 0.0, "nothing is counted");
            read_all();
            let asked = node.metric(COUNTER) - before;
            assert_eq!(
                asked, 0.0,
                "{journal}, {}: 1,000 transactions",
                node.options.name
            );
        }
    }
}

/// The kernel has read the WAL by the time that it is written again: of a frame it makes two requests,
/// where it makes three of one that is written for the first time.
#[test]
fn a_frame_is_two_requests_once_the_wal_has_been_begun_again() {
    const COUNTER: &str = "tenure_fuse_requests_total";
    let cluster = Cluster::new(60);
    let node = cluster.start(common::Options::primary("primary"));
    let db = Connection::open(node.db("x.db")).expect("open");
    db.execute_batch(
        "PRAGMA journal_mode=wal; PRAGMA wal_autocheckpoint=0; PRAGMA synchronous=NORMAL;
         CREATE TABLE t (id INTEGER PRIMARY KEY, v); INSERT INTO t VALUES (1, 0);
         PRAGMA wal_checkpoint(TRUNCATE);",
    )
    .expect("begin");
    // A transaction is one frame.
    let round = || {
        let before = node.metric(COUNTER);
        for v in 0..500 {
            db.execute("UPDATE t SET v = ?1", [v]).expect("write");
        }
        let asked = (node.metric(COUNTER) - before) / 500.0;
        let _: i64 = db
            .query_row("PRAGMA wal_checkpoint(RESTART)", [], |r| r.get(0))
            .expect("a checkpoint");
        asked
    };
    let (first, _, third) = (round(), round(), round());
    assert!(first > 2.9, "{first} requests a frame: the test's premise");
    assert!(third < 2.2, "{third} requests a frame, {first} at first");
}

#[test]
fn an_application_may_not_write_without_a_transaction() {
    let pair = Cluster::static_pair(60);
    let path = pair.primary.db("x.db");
    sqlite3(&path, "CREATE TABLE t (a); INSERT INTO t VALUES (1);");
    pair.assert_same("x.db");
    let before = pair.primary.pos("x.db");
    let mut file = File::options().write(true).open(&path).expect("open");
    file.seek(SeekFrom::Start(4096)).expect("seek");
    let wrote = file.write_all(&[0x55; 4096]).and_then(|()| file.sync_all());
    assert!(errno(wrote).is_some(), "a page written without a journal");
    assert!(
        errno(file.set_len(4096)).is_some(),
        "a cut without a journal"
    );
    drop(file);
    assert_eq!(pair.primary.pos("x.db"), before);
    pair.assert_same("x.db");
    assert_eq!(fs::metadata(&path).expect("stat").size(), 8192);
}

/// SQLite leaves a WAL where it is asked to, or where its process is killed. It goes with its database,
/// and a database that is made under the same name at once does not find it.
#[test]
fn a_database_made_again_at_once_finds_nothing_of_the_old_one() {
    let pair = Cluster::static_pair(120);
    let path = pair.primary.db("x.db");
    for round in 0..200 {
        let db = Connection::open(&path).expect("open");
        let mut on: std::ffi::c_int = 1;
        // SAFETY: an open connection, a name that ends in 0, and a number that outlives the call.
        let set = unsafe {
            rusqlite::ffi::sqlite3_file_control(
                db.handle(),
                c"main".as_ptr(),
                rusqlite::ffi::SQLITE_FCNTL_PERSIST_WAL,
                (&raw mut on).cast(),
            )
        };
        assert_eq!(set, rusqlite::ffi::SQLITE_OK);
        db.execute_batch("PRAGMA journal_mode=wal; CREATE TABLE t (a); INSERT INTO t VALUES (1);")
            .unwrap_or_else(|e| panic!("round {round}: {e}"));
        drop(db);
        let wal = pair.primary.db("x.db-wal");
        assert!(fs::metadata(&wal).expect("the WAL").size() > 0);
        fs::remove_file(&path).expect("remove");
        assert!(!wal.exists(), "round {round}: the WAL is still to be seen");
    }
}
