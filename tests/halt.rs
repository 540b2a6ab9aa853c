//! The halt lock: writes on a replica, forwarded to the primary, through whole nodes and
//! `tenure run -with-halt-lock-on`.

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::helper::Session;
use common::node::TENURE;
use common::run::{Finished, Running, run};
use common::sql::sqlite3_fails;
use common::{Cluster, Node, Options, SOON, assert_same, sqlite3, wait_same_pos, wait_until};

helper_test!();

const MODES: [&str; 4] = ["delete", "truncate", "persist", "wal"];
const DB: &str = "a.db";
const LIMIT: Duration = Duration::from_secs(60);

/// A table on the primary, which the replica has.
fn create(primary: &Node, replica: &Node, mode: &str) {
    let sql = format!(
        "PRAGMA journal_mode={mode}; CREATE TABLE t(k INTEGER PRIMARY KEY, v); INSERT INTO t(v) VALUES ('first');"
    );
    sqlite3(&primary.db(DB), &sql);
    wait_same_pos(primary, replica, DB);
}

/// Runs a program under the halt lock.
fn locked(db: &Path, program: &[&str], input: &str) -> Finished {
    let mut command = Command::new(TENURE);
    command.args(["run", "-with-halt-lock-on"]).arg(db);
    command.arg("--").args(program);
    run(&mut command, input.as_bytes(), LIMIT)
}

/// SQL on a node under the halt lock; what it prints.
fn write(node: &Node, sql: &str) -> String {
    let db = node.db(DB);
    let path = db.to_str().expect("a path of the tests");
    let program = ["sqlite3", "-batch", "-bail", "-init", "/dev/null", path];
    let done = locked(&db, &program, &format!(".timeout 20000\n{sql}\n"));
    assert!(
        done.success() && done.stderr.is_empty(),
        "{sql}: {}",
        done.stderr
    );
    done.text()
}

#[test]
fn a_write_on_a_replica_is_everywhere_and_its_writer_sees_it() {
    for mode in MODES {
        let pair = Cluster::static_pair_with(120, |o| Options {
            strict_verify: true,
            ..o
        });
        create(&pair.primary, &pair.replica, mode);
        let seen = write(
            &pair.replica,
            "INSERT INTO t(v) VALUES ('second'); SELECT count(*) FROM t;",
        );
        assert_eq!(seen, "2\n", "{mode}: the writer sees its write");
        let there = sqlite3(&pair.primary.db(DB), "SELECT v FROM t ORDER BY k;");
        assert_eq!(
            there, "first\nsecond\n",
            "{mode}: it is on the primary at once"
        );
        pair.assert_same(DB);
        // And on: the primary writes again, then the replica, several transactions.
        sqlite3(&pair.primary.db(DB), "INSERT INTO t(v) VALUES ('third');");
        write(
            &pair.replica,
            "INSERT INTO t(v) VALUES ('fourth'); BEGIN; UPDATE t SET v = v || '!'; ROLLBACK; \
             BEGIN; UPDATE t SET v = v || '?'; DELETE FROM t WHERE k = 1; COMMIT; \
             INSERT INTO t(v) VALUES (randomblob(300000)); VACUUM; PRAGMA integrity_check;",
        );
        pair.assert_same(DB);
        let rows = sqlite3(
            &pair.replica.db(DB),
            "SELECT count(*), min(v) FROM t WHERE k < 5;",
        );
        assert_eq!(rows, "3|fourth?\n", "{mode}");
        assert_same(&pair.primary, &pair.replica, DB);
    }
}

#[test]
fn the_journal_mode_changes_under_the_lock() {
    let pair = Cluster::static_pair_with(120, |o| Options {
        strict_verify: true,
        ..o
    });
    create(&pair.primary, &pair.replica, "delete");
    for mode in ["wal", "delete", "wal", "truncate", "persist", "wal"] {
        let said = write(
            &pair.replica,
            &format!("PRAGMA journal_mode={mode}; INSERT INTO t(v) VALUES ('{mode}');"),
        );
        assert_eq!(said.trim(), mode);
        // A reader of the primary in every mode, and its writer afterwards.
        sqlite3(&pair.primary.db(DB), "INSERT INTO t(v) VALUES ('here');");
        pair.assert_same(DB);
    }
    let said = write(
        &pair.replica,
        "PRAGMA journal_mode=delete; PRAGMA page_size=1024; VACUUM; PRAGMA page_size;",
    );
    assert_eq!(said, "delete\n1024\n");
    pair.assert_same(DB);
}

#[test]
fn a_third_node_gets_the_write() {
    let cluster = Cluster::new(120);
    let options = Options::primary("primary");
    let (second, third) = (
        Options::replica("second", &options),
        Options::replica("third", &options),
    );
    let primary = cluster.start(options);
    let (second, third) = (cluster.start(second), cluster.start(third));
    create(&primary, &second, "wal");
    write(&second, "INSERT INTO t(v) VALUES ('from second');");
    write(
        &third,
        "INSERT INTO t(v) SELECT 'third saw ' || count(*) FROM t;",
    );
    assert_same(&primary, &second, DB);
    assert_same(&primary, &third, DB);
    let rows = sqlite3(&second.db(DB), "SELECT v FROM t ORDER BY k;");
    assert_eq!(rows, "first\nfrom second\nthird saw 2\n");
}

/// A process that holds the halt lock and does nothing.
fn hold(node: &Node) -> Running {
    let ready = node.mount().with_file_name("held");
    let _ = std::fs::remove_file(&ready);
    let mut command = Command::new(TENURE);
    command
        .args(["run", "-with-halt-lock-on"])
        .arg(node.db(DB))
        .args(["--", "sh", "-c", "touch \"$0\" && exec sleep 300"])
        .arg(&ready)
        .stdin(Stdio::null());
    let running = Running(command.spawn().expect("start tenure run"));
    wait_until("the halt lock", SOON, || {
        if ready.exists() {
            Ok(())
        } else {
            Err("not taken")
        }
    });
    running
}

/// How long a writer of the primary has to wait for its turn.
fn primary_writes(primary: &Node) -> Duration {
    let began = Instant::now();
    sqlite3(&primary.db(DB), "INSERT INTO t(v) VALUES ('primary');");
    began.elapsed()
}

#[test]
fn while_it_is_held_the_primary_reads_and_does_not_write() {
    for mode in MODES {
        let pair = Cluster::static_pair(120);
        create(&pair.primary, &pair.replica, mode);
        // With and without a connection that was there before.
        for connected in [true, false] {
            let mut before =
                connected.then(|| Session::open(&pair.primary.db(DB), pair.cluster.dir()));
            if let Some(before) = &mut before {
                before.run("SELECT * FROM t").unwrap();
            }
            let mut holder = hold(&pair.replica);
            let began = Instant::now();
            let sql = "SELECT v FROM t WHERE k = 1;";
            assert_eq!(sqlite3(&pair.primary.db(DB), sql), "first\n", "{mode}");
            if let Some(before) = &mut before {
                before.run("SELECT * FROM t").unwrap();
            }
            assert!(
                began.elapsed() < Duration::from_secs(5),
                "{mode}: readers hang"
            );
            let script = ".timeout 100\nINSERT INTO t(v) VALUES (0);";
            let e = sqlite3_fails(&pair.primary.db(DB), script);
            assert!(e.contains("locked"), "{mode}: {e}");
            drop(before);
            let program = ["sqlite3", "-batch", "-init", "/dev/null"];
            let mut inside = Command::new(program[0]);
            inside.args(&program[1..]).arg(pair.replica.db(DB));
            let sql = b"INSERT INTO t(v) VALUES ('by any process there');";
            let done = run(&mut inside, sql, LIMIT);
            assert!(
                done.success() && done.stderr.is_empty(),
                "{mode}: {}",
                done.stderr
            );
            assert_eq!(
                sqlite3(&pair.primary.db(DB), "PRAGMA integrity_check;"),
                "ok\n"
            );
            // Killed while idle: the lock goes at once.
            holder.kill9();
            assert!(
                primary_writes(&pair.primary) < Duration::from_secs(5),
                "{mode}"
            );
        }
        pair.assert_same(DB);
        let e = sqlite3_fails(&pair.replica.db(DB), "INSERT INTO t(v) VALUES (1);");
        assert!(!e.is_empty(), "{mode}: it is a replica again");
    }
}

#[test]
fn a_holder_that_is_killed_inside_a_transaction_leaves_nothing() {
    for mode in MODES {
        let pair = Cluster::static_pair(120);
        create(&pair.primary, &pair.replica, mode);
        let mut holder = hold(&pair.replica);
        let mut session = Session::open(&pair.replica.db(DB), pair.cluster.dir());
        // Pages are spilled before the commit.
        session.run("PRAGMA cache_size=5").unwrap();
        session.run("BEGIN").unwrap();
        session
            .run("INSERT INTO t(v) SELECT randomblob(3000) FROM (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 300) SELECT i FROM n)")
            .unwrap();
        // The lock goes first, or the writer.
        if mode == "truncate" || mode == "wal" {
            holder.kill9();
            assert!(session.run("COMMIT").is_err(), "{mode}: the lock was lost");
            drop(session);
        } else {
            drop(session);
            holder.kill9();
        }
        assert!(
            primary_writes(&pair.primary) < Duration::from_secs(5),
            "{mode}"
        );
        pair.assert_same(DB);
        assert_eq!(
            sqlite3(&pair.replica.db(DB), "SELECT count(*) FROM t;"),
            "2\n",
            "{mode}"
        );
        write(&pair.replica, "INSERT INTO t(v) VALUES ('again');");
        pair.assert_same(DB);
    }
}

#[test]
fn a_child_that_closes_an_inherited_descriptor_releases_nothing() {
    let pair = Cluster::static_pair(60);
    create(&pair.primary, &pair.replica, "delete");
    // `sh` runs `true` with the descriptor, which closes it by its end.
    let path = pair.replica.db(DB);
    let script = "true; sqlite3 -bail -init /dev/null \"$0\" \"INSERT INTO t(v) VALUES ('a')\" && true && \
         sqlite3 -bail -init /dev/null \"$0\" \"INSERT INTO t(v) VALUES ('b')\"; exit 7";
    let path = path.to_str().expect("a path of the tests");
    let done = locked(&pair.replica.db(DB), &["sh", "-c", script, path], "");
    assert_eq!((done.code, done.stderr.as_str()), (Some(7), ""));
    pair.assert_same(DB);
    assert_eq!(
        sqlite3(&pair.primary.db(DB), "SELECT count(*) FROM t;"),
        "3\n"
    );
}

#[test]
fn run_on_the_primary_needs_no_lock_and_options_are_checked() {
    let pair = Cluster::static_pair(60);
    create(&pair.primary, &pair.replica, "wal");
    write(&pair.primary, "INSERT INTO t(v) VALUES ('here');");
    pair.assert_same(DB);
    let mut command = Command::new(TENURE);
    command.args(["run", "-promote", "-with-halt-lock-on", "x", "--", "true"]);
    assert_eq!(run(&mut command, b"", LIMIT).code, Some(2));
    let done = locked(&pair.replica.db("none.db"), &["true"], "");
    assert_eq!(done.code, Some(1));
    assert!(done.stderr.contains("does not exist"), "{}", done.stderr);
    let done = locked(&pair.replica.db(DB), &["sh", "-c", "exit 9"], "");
    assert_eq!(done.code, Some(9));
}

/// `fcntl` on the lock file; the error number.
fn lock(file: &File, command: i32, kind: i32, start: i64) -> Result<(), i32> {
    let lock = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: an open descriptor and a whole `flock` that outlives the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &lock) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
    }
}

#[test]
fn the_lock_file_is_as_litefs_has_it() {
    let pair = Cluster::static_pair(90);
    create(&pair.primary, &pair.replica, "delete");
    let names: Vec<String> = std::fs::read_dir(pair.replica.mount())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(!names.iter().any(|n| n.contains("lock")), "{names:?}");
    let open = || {
        let path = pair.replica.db(&format!("{DB}-lock"));
        File::options().read(true).write(true).open(path).unwrap()
    };
    let (file, other) = (open(), open());
    let (wait, try_it) = (libc::F_OFD_SETLKW, libc::F_OFD_SETLK);
    assert_eq!(lock(&file, try_it, libc::F_WRLCK, 72), Err(libc::ENOSYS));
    assert_eq!(lock(&file, wait, libc::F_WRLCK, 71), Err(libc::EINVAL));
    assert_eq!(lock(&file, wait, libc::F_RDLCK, 72), Err(libc::EINVAL));
    assert_eq!(lock(&file, wait, libc::F_WRLCK, 72), Ok(()));
    assert_eq!(lock(&file, wait, libc::F_WRLCK, 72), Ok(()), "it has it");
    sqlite3(&pair.replica.db(DB), "INSERT INTO t(v) VALUES ('held');");
    // Another description waits its time and no longer.
    let began = Instant::now();
    assert_eq!(lock(&other, wait, libc::F_WRLCK, 72), Err(libc::EAGAIN));
    let waited = began.elapsed().as_secs();
    assert!((9..15).contains(&waited), "{waited} s");
    // Handed on within the node by an unlock, and given up by a close.
    assert_eq!(lock(&file, try_it, libc::F_UNLCK, 72), Ok(()));
    assert_eq!(lock(&other, wait, libc::F_WRLCK, 72), Ok(()));
    drop(other);
    assert!(primary_writes(&pair.primary) < Duration::from_secs(5));
    pair.assert_same(DB);
    // A local writer of the primary that does not end its transaction.
    let mut writer = Session::open(&pair.primary.db(DB), pair.cluster.dir());
    writer.run("BEGIN IMMEDIATE").unwrap();
    let waiting = std::thread::scope(|scope| {
        let waits = scope.spawn(|| lock(&file, wait, libc::F_WRLCK, 72));
        std::thread::sleep(Duration::from_millis(500));
        writer.run("COMMIT").unwrap();
        waits.join().unwrap()
    });
    assert_eq!(waiting, Ok(()), "as soon as the writer is done");
}

#[test]
fn a_frozen_primary_fails_the_commit_and_what_it_did_comes_with_the_stream() {
    for mode in ["delete", "wal"] {
        let pair = Cluster::static_pair(120);
        create(&pair.primary, &pair.replica, mode);
        let mut holder = hold(&pair.replica);
        let mut session = Session::open(&pair.replica.db(DB), pair.cluster.dir());
        session.run("INSERT INTO t(v) VALUES ('good')").unwrap();
        pair.primary.freeze(true);
        let began = Instant::now();
        let e = session
            .run("INSERT INTO t(v) VALUES ('unknown')")
            .unwrap_err();
        let took = began.elapsed();
        pair.primary.freeze(false);
        assert!(took < Duration::from_secs(25), "{mode}: {took:?} for {e}");
        assert!(took > Duration::from_secs(4), "{mode}: {took:?} for {e}");
        drop(session);
        holder.kill9();
        // Whatever became of it is the same on both, and both go on.
        primary_writes(&pair.primary);
        pair.assert_same(DB);
        write(&pair.replica, "INSERT INTO t(v) VALUES ('again');");
        pair.assert_same(DB);
        let good = sqlite3(
            &pair.primary.db(DB),
            "SELECT count(*) FROM t WHERE v IN ('good', 'again', 'primary');",
        );
        assert_eq!(good, "3\n", "{mode}");
    }
}

#[test]
fn a_killed_primary_fails_the_commit_and_a_killed_replica_the_lock() {
    let mut pair = Cluster::static_pair(150);
    create(&pair.primary, &pair.replica, "delete");
    let mut holder = hold(&pair.replica);
    let mut session = Session::open(&pair.replica.db(DB), pair.cluster.dir());
    pair.primary.kill9();
    let began = Instant::now();
    assert!(session.run("INSERT INTO t(v) VALUES ('lost')").is_err());
    assert!(began.elapsed() < Duration::from_secs(10));
    drop(session);
    holder.kill9();
    pair.primary.start();
    primary_writes(&pair.primary);
    pair.assert_same(DB);
    assert_eq!(
        sqlite3(&pair.replica.db(DB), "SELECT count(*) FROM t;"),
        "2\n"
    );
    // A replica that is gone: the primary takes the lock back by itself.
    let mut holder = hold(&pair.replica);
    pair.replica.kill9();
    holder.kill9();
    wait_until("the lock to expire", Duration::from_secs(60), || {
        let done =
            common::sql::sqlite3_raw(&pair.primary.db(DB), "INSERT INTO t(v) VALUES (0);", true);
        if done.success() {
            Ok(())
        } else {
            Err(done.stderr)
        }
    });
    pair.replica.start();
    pair.assert_same(DB);
}

#[test]
fn a_replica_that_is_behind_waits_for_the_position() {
    let pair = Cluster::static_pair(120);
    create(&pair.primary, &pair.replica, "wal");
    for round in 0..5 {
        let sql = "INSERT INTO t(v) VALUES (randomblob(2000000)), (randomblob(2000000));";
        sqlite3(&pair.primary.db(DB), &sql.repeat(3));
        let rows = write(
            &pair.replica,
            "INSERT INTO t(v) VALUES ('x'); SELECT count(*) FROM t;",
        );
        assert_eq!(rows.trim(), (1 + 7 * (round + 1)).to_string());
    }
    pair.assert_same(DB);
}

#[test]
fn commits_that_follow_each_other_at_once_are_all_taken() {
    for mode in ["delete", "wal"] {
        let pair = Cluster::static_pair(120);
        create(&pair.primary, &pair.replica, mode);
        let sql = "INSERT INTO t(v) VALUES ('x');\n".repeat(500);
        let rows = write(&pair.replica, &format!("{sql}SELECT count(*) FROM t;"));
        assert_eq!(rows, "501\n", "{mode}");
        pair.assert_same(DB);
        assert!(!pair.replica.log().contains("did not take"), "{mode}");
    }
}

/// An import waits for the lock, and is refused if that takes too long: nothing is changed then.
#[test]
fn an_import_on_the_primary_waits_for_the_lock() {
    let pair = Cluster::static_pair(120);
    for mode in ["delete", "wal"] {
        create_anew(&pair, mode);
        let file = pair.cluster.dir().join(format!("{mode}.db"));
        sqlite3(
            &file,
            "CREATE TABLE other(x); INSERT INTO other VALUES (1);",
        );
        let import = |limit| {
            let mut command = Command::new(TENURE);
            let url = format!("http://{}", pair.primary.options.http);
            command
                .args(["import", "-url", &url, "-name", DB])
                .arg(&file);
            run(&mut command, b"", limit)
        };
        let holder = hold(&pair.replica);
        let refused = import(LIMIT);
        assert!(!refused.success(), "{mode}: imported under the halt lock");
        assert!(refused.stderr.contains("halt lock"), "{}", refused.stderr);
        let seen = write_row_count(&pair.primary);
        assert_eq!(seen, "1\n", "{mode}");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| import(LIMIT));
            std::thread::sleep(Duration::from_secs(1));
            drop(holder);
            let done = waiting.join().expect("the import");
            assert!(done.success(), "{mode}: {}", done.stderr);
        });
        pair.assert_same(DB);
        assert_eq!(sqlite3(&pair.replica.db(DB), "SELECT x FROM other;"), "1\n");
    }
}

fn create_anew(pair: &common::Pair, mode: &str) {
    let _ = std::fs::remove_file(pair.primary.db(DB));
    create(&pair.primary, &pair.replica, mode);
}

fn write_row_count(node: &Node) -> String {
    sqlite3(&node.db(DB), "SELECT count(*) FROM t;")
}
