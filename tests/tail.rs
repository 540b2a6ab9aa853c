//! Databases that are passed through, and whose WAL is followed (`fuse.wal-capture: tail`).

mod common;

use std::time::{Duration, Instant};

use common::helper::{Session, WRITER_TABLES, Writer, assert_whole_transactions};
use common::service::{Kind, Service};
use common::{
    Cluster, Node, Options, Pair, SOON, await_following, await_primary, sqlite3, wait_same_pos,
    wait_until,
};

helper_test!();

const DB: &str = "x.db";

fn tail(options: Options) -> Options {
    Options {
        tail: true,
        strict_verify: true,
        uncompressed: true,
        ..options
    }
}

fn pair(limit_secs: u64) -> Pair {
    Cluster::static_pair_with(limit_secs, tail)
}

/// Makes the writer's tables, in WAL mode: who opens the database from here on is passed through.
fn create(node: &Node) {
    sqlite3(
        &node.db(DB),
        &format!("PRAGMA journal_mode=wal; {WRITER_TABLES}"),
    );
}

fn requests(node: &Node) -> f64 {
    node.metric("tenure_fuse_requests_total")
}

/// Waits until a writer has acknowledged so many more.
fn await_more(writer: &Writer, more: i64) {
    let from = writer.acknowledged();
    wait_until("acknowledged transactions", SOON, || {
        assert_eq!(writer.error(), None);
        match writer.acknowledged() {
            n if n >= from + more => Ok(()),
            n => Err(n),
        }
    });
}

/// Waits until a writer has met an error; which.
fn await_error(writer: &Writer) -> String {
    let mut met = String::new();
    wait_until("an error", SOON, || match writer.error() {
        Some(e) => {
            met = e;
            Ok(())
        }
        None => Err(writer.acknowledged()),
    });
    met
}

#[test]
fn commits_cost_no_requests() {
    let pair = pair(60);
    create(&pair.primary);
    let mut session = Session::open(&pair.primary.db(DB), pair.cluster.dir());
    session.run("PRAGMA synchronous=NORMAL").unwrap();
    session.run("UPDATE counter SET n = n + 1").unwrap();
    let before = requests(&pair.primary);
    for _ in 0..100 {
        session.run("UPDATE counter SET n = n + 1").unwrap();
    }
    let sent = requests(&pair.primary) - before;
    assert!(sent < 20.0, "{sent} requests for 100 commits");
    pair.assert_same(DB);
}

/// Without an index in a file: the frames themselves say what is committed.
#[test]
fn the_exclusive_locking_mode_is_followed_over_restarts_of_the_wal() {
    let pair = pair(60);
    create(&pair.primary);
    let mut session = Session::open(&pair.primary.db(DB), pair.cluster.dir());
    session.run("PRAGMA locking_mode=EXCLUSIVE").unwrap();
    session.run("PRAGMA wal_autocheckpoint=3").unwrap();
    for n in 1..=50 {
        session.run(&format!("UPDATE counter SET n = {n}")).unwrap();
        if n % 7 == 0 {
            wait_same_pos(&pair.primary, &pair.replica, DB);
            let there = sqlite3(&pair.replica.db(DB), "SELECT n FROM counter");
            assert_eq!(there, format!("{n}\n"));
        }
    }
    drop(session);
    pair.assert_same(DB);
}

/// Commits, checkpoints of every kind, growth and shrinking from three connections at a time, at all
/// settings of `synchronous`.
#[test]
fn no_commit_is_missed_over_restarts_of_the_wal() {
    let pair = pair(180);
    let path = pair.primary.db(DB);
    sqlite3(
        &path,
        "PRAGMA auto_vacuum=FULL; PRAGMA journal_mode=wal; CREATE TABLE t(k INTEGER PRIMARY KEY, v);",
    );
    let deadline = Instant::now() + Duration::from_secs(12);
    let work = |seed: u64| {
        let open = || {
            let mut session = Session::open(&path, pair.cluster.dir());
            let level = ["OFF", "NORMAL", "FULL"][seed as usize % 3];
            session.run("PRAGMA wal_autocheckpoint=3").unwrap();
            session.run(&format!("PRAGMA synchronous={level}")).unwrap();
            session
        };
        let mut session = open();
        let (mut x, mut n) = (seed, 0);
        while Instant::now() < deadline {
            x = x
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let sql = match (x >> 33) % 13 {
                0 => "PRAGMA wal_checkpoint(PASSIVE)",
                1 => "PRAGMA wal_checkpoint(FULL)",
                2 => "PRAGMA wal_checkpoint(RESTART)",
                3 => "PRAGMA wal_checkpoint(TRUNCATE)",
                4 => "DELETE FROM t WHERE k % 3 = 0",
                5 => "INSERT INTO t(v) SELECT randomblob(4000) FROM t LIMIT 60",
                6 => "SELECT count(*), max(length(v)) FROM t",
                7 => "VACUUM",
                _ => "INSERT INTO t(v) VALUES (randomblob(9000))",
            };
            n += 1;
            if n % 40 == 0 {
                drop(session);
                session = open();
            }
            if let Err(e) = session.run(sql) {
                assert!(e.contains("locked"), "{sql}: {e}");
            }
        }
        n
    };
    let counts: Vec<u32> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|seed| scope.spawn(move || work(seed))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(counts.iter().all(|n| *n > 50), "{counts:?}");
    pair.assert_same(DB);
}

#[test]
fn the_last_close_deletes_the_wal() {
    let pair = pair(90);
    create(&pair.primary);
    for n in 1..=30 {
        let level = ["OFF", "NORMAL", "FULL"][n % 3];
        let sql = format!("PRAGMA synchronous={level}; UPDATE counter SET n = {n};");
        sqlite3(&pair.primary.db(DB), &sql);
        assert!(!pair.primary.db_data(DB).join("wal").exists(), "{n}");
        if n % 10 == 0 {
            pair.assert_same(DB);
        }
    }
    assert_eq!(
        sqlite3(&pair.replica.db(DB), "SELECT n FROM counter;"),
        "30\n"
    );
}

#[test]
fn the_position_is_that_of_the_last_commit() {
    let pair = pair(60);
    create(&pair.primary);
    let mut session = Session::open(&pair.primary.db(DB), pair.cluster.dir());
    session.run("PRAGMA synchronous=NORMAL").unwrap();
    for n in 1..=50 {
        let before = pair.primary.txid(DB);
        session.run(&format!("UPDATE counter SET n = {n}")).unwrap();
        assert_eq!(pair.primary.txid(DB), before + 1);
        wait_same_pos(&pair.primary, &pair.replica, DB);
        let there = sqlite3(&pair.replica.db(DB), "SELECT n FROM counter;");
        assert_eq!(there, format!("{n}\n"));
    }
}

#[test]
fn a_database_is_dropped_and_made_again() {
    let pair = pair(60);
    for round in 0..3 {
        create(&pair.primary);
        let mut session = Session::open(&pair.primary.db(DB), pair.cluster.dir());
        session.run("UPDATE counter SET n = n + 1").unwrap();
        pair.assert_same(DB);
        std::fs::remove_file(pair.primary.db(DB)).expect("remove it");
        assert!(session.run("SELECT n FROM counter").is_err(), "{round}");
        wait_until("the replica's end of it", SOON, || {
            match pair.replica.pos(DB) {
                None => Ok(()),
                pos => Err(pos),
            }
        });
        assert!(!pair.primary.db_data(DB).join("lane").exists());
    }
}

#[test]
fn an_import_over_open_connections() {
    let mut pair = pair(90);
    create(&pair.primary);
    let other = pair.cluster.dir().join("other.db");
    sqlite3(
        &other,
        &format!("{WRITER_TABLES} UPDATE counter SET n = 1000;"),
    );
    let path = pair.primary.db(DB);
    for round in 0..3 {
        let mut session = Session::open(&path, pair.cluster.dir());
        session.run("PRAGMA synchronous=NORMAL").unwrap();
        session.run("UPDATE counter SET n = n + 1").unwrap();
        std::fs::copy(&other, &path).expect("import it");
        assert_eq!(session.run("SELECT n FROM counter"), Ok("1000".into()));
        session.run("UPDATE counter SET n = n + 1").unwrap();
        pair.assert_same(DB);
        session.run("UPDATE counter SET n = n + 1").unwrap();
        if round > 0 {
            pair.primary.kill9();
            pair.primary.start();
        }
        drop(session);
        assert_eq!(sqlite3(&path, "SELECT n FROM counter;"), "1002\n");
        pair.assert_same(DB);
    }
}

#[test]
fn wal_mode_is_not_left() {
    let pair = pair(60);
    create(&pair.primary);
    let path = pair.primary.db(DB);
    for mode in ["delete", "truncate", "persist", "memory", "off"] {
        let mut session = Session::open(&path, pair.cluster.dir());
        session.run("UPDATE counter SET n = n + 1").unwrap();
        let said = session.run(&format!("PRAGMA journal_mode={mode}"));
        assert!(said != Ok(mode.to_string()), "{mode}: {said:?}");
        drop(session);
        assert_eq!(sqlite3(&path, "PRAGMA journal_mode;"), "wal\n", "{mode}");
        sqlite3(&path, "UPDATE counter SET n = n + 1;");
        pair.assert_same(DB);
    }
    assert_eq!(sqlite3(&path, "SELECT n FROM counter;"), "10\n");
}

/// The kernel lets open files live on without the node: what is committed meanwhile is taken up.
#[test]
fn a_killed_node_takes_up_what_was_committed_without_it() {
    let mut pair = pair(240);
    create(&pair.primary);
    let mut newest = 0;
    for (round, level) in ["NORMAL", "FULL", "NORMAL", "OFF"].into_iter().enumerate() {
        let path = pair.primary.db(DB);
        let mut writer = Writer::start(&path, pair.cluster.dir(), "wal", level);
        wait_until("the first transactions", SOON, || {
            match writer.acknowledged() {
                n if n > newest + 5 => Ok(()),
                n => Err((n, writer.error())),
            }
        });
        pair.primary.kill9();
        if level != "FULL" {
            await_more(&writer, 20);
        }
        if round == 2 {
            writer.process.kill9();
        }
        pair.primary.start();
        if round != 2 {
            let e = await_error(&writer);
            println!("{level}: {e}");
        }
        newest = assert_whole_transactions(&path, writer.acknowledged());
        sqlite3(&path, "DELETE FROM many WHERE n < 0;");
        pair.assert_same(DB);
    }
}

#[test]
fn a_killed_node_and_its_writer_lose_nothing_acknowledged() {
    let mut pair = pair(240);
    create(&pair.primary);
    for round in 0..8 {
        let level = ["NORMAL", "FULL"][round % 2];
        let path = pair.primary.db(DB);
        let mut writer = Writer::start(&path, pair.cluster.dir(), "wal", level);
        await_more(&writer, 3 + 7 * round as i64);
        if round % 4 < 2 {
            pair.primary.kill9();
            writer.process.kill9();
            pair.primary.start();
        } else {
            writer.process.kill9();
        }
        assert_whole_transactions(&path, writer.acknowledged());
        pair.assert_same(DB);
    }
}

#[test]
fn a_stop_takes_up_everything_and_cuts_writers_off() {
    let mut pair = pair(180);
    create(&pair.primary);
    for _ in 0..3 {
        let path = pair.primary.db(DB);
        let writer = Writer::start(&path, pair.cluster.dir(), "wal", "NORMAL");
        await_more(&writer, 10);
        assert_eq!(pair.primary.stop(), Some(0));
        println!("{}", await_error(&writer));
        assert!(!pair.primary.db_data(DB).join("lane").exists());
        pair.primary.start();
        assert_whole_transactions(&path, writer.acknowledged());
        pair.assert_same(DB);
    }
}

#[test]
fn a_demoted_node_takes_up_everything_and_cuts_writers_off() {
    let service = Service::start(Kind::Etcd);
    let cluster = Cluster::new(180);
    let lines = Kind::Etcd.lines(service.address(), "tenure/test");
    let start = |name| cluster.start(tail(Options::candidate(name, &lines)));
    let (a, b) = (start("a"), start("b"));
    await_primary(&a, SOON);
    create(&a);
    await_following(&b, &a);
    let mut nodes = [&a, &b];
    for _ in 0..4 {
        let [primary, replica] = nodes;
        let writer = Writer::start(&primary.db(DB), cluster.dir(), "wal", "NORMAL");
        await_more(&writer, 10);
        let took = Instant::now();
        primary.http_post("/demote").expect("demoted");
        println!("{}", await_error(&writer));
        await_primary(replica, SOON);
        println!("after {:?}", took.elapsed());
        await_following(primary, replica);
        for node in nodes {
            wait_same_pos(replica, node, DB);
            assert_whole_transactions(&node.db(DB), writer.acknowledged());
        }
        nodes = [replica, primary];
    }
    for node in nodes {
        assert_eq!(node.metric_or_0("tenure_divergent_transactions_total"), 0.0);
    }
}

/// What was committed while another node was primary is reported when the node comes back.
#[test]
fn what_was_committed_past_a_dead_primary_is_set_aside() {
    let service = Service::start(Kind::Etcd);
    let cluster = Cluster::new(180);
    let lines = Kind::Etcd.lines(service.address(), "tenure/test");
    let start = |name| cluster.start(tail(Options::candidate(name, &lines)));
    let mut a = start("a");
    await_primary(&a, SOON);
    create(&a);
    let b = start("b");
    await_following(&b, &a);
    wait_same_pos(&a, &b, DB);
    let mut writer = Session::open(&a.db(DB), cluster.dir());
    let write = "UPDATE counter SET n = n + 1";
    writer.run("PRAGMA synchronous=NORMAL").unwrap();
    writer.run(write).unwrap();
    a.kill9();
    writer.run(write).unwrap();
    await_primary(&b, SOON);
    writer.run(write).unwrap();
    sqlite3(&b.db(DB), "CREATE TABLE other (x);");
    a.start();
    println!("{}", writer.run(write).unwrap_err());
    await_following(&a, &b);
    common::assert_same(&b, &a, DB);
    assert!(a.metric("tenure_divergent_transactions_total") > 0.0);
    assert!(a.data().join("divergent").exists());
    assert!(a.log().contains("is taken up"), "{}", a.log());
}

/// A node that is frozen loses its lease, and stops nobody meanwhile.
#[test]
fn what_was_committed_past_a_frozen_primary_is_set_aside() {
    let service = Service::start(Kind::Etcd);
    let cluster = Cluster::new(180);
    let lines = Kind::Etcd.lines(service.address(), "tenure/test");
    let start = |name| cluster.start(tail(Options::candidate(name, &lines)));
    let a = start("a");
    await_primary(&a, SOON);
    create(&a);
    let b = start("b");
    await_following(&b, &a);
    wait_same_pos(&a, &b, DB);
    let mut writer = Session::open(&a.db(DB), cluster.dir());
    let write = "UPDATE counter SET n = n + 1";
    writer.run("PRAGMA synchronous=NORMAL").unwrap();
    writer.run(write).unwrap();
    wait_same_pos(&a, &b, DB);
    a.freeze(true);
    await_primary(&b, SOON);
    writer.run(write).unwrap();
    sqlite3(&b.db(DB), "CREATE TABLE other (x);");
    a.freeze(false);
    wait_until("an error", SOON, || match writer.run(write) {
        Ok(_) => Err("committed"),
        Err(e) => {
            println!("{e}");
            Ok(())
        }
    });
    await_following(&a, &b);
    common::assert_same(&b, &a, DB);
    assert!(a.metric("tenure_divergent_transactions_total") > 0.0);
    assert_eq!(sqlite3(&a.db(DB), "SELECT n FROM counter;"), "1\n");
}

#[test]
fn a_file_system_without_passthrough_falls_back_and_says_so() {
    let cluster = Cluster::new(60);
    let node = cluster.start(Options {
        environment: vec![("TENURE_NO_PASSTHROUGH", "1".into())],
        ..tail(Options::primary("primary"))
    });
    create(&node);
    sqlite3(&node.db(DB), "UPDATE counter SET n = 1;");
    let log = node.log();
    let warnings = log.matches("fuse.wal-capture: tail cannot be had").count();
    assert_eq!(warnings, 1, "{log}");
    assert!(!node.db_data(DB).join("lane").exists());
}
