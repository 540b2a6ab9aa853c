//! Bad input: each a clear error, and nothing harmed.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::node::{TENURE, free_address, fuse_mounts};
use common::run::{Finished, run};
use common::{Cluster, Options, Pair, sqlite3};

const LIMIT: Duration = Duration::from_secs(30);

/// A pair with a database of a few pages.
fn pair_with_good_database() -> Pair {
    let pair = Cluster::static_pair(90);
    for mode in ["delete", "wal"] {
        sqlite3(
            &pair.primary.db(&format!("{mode}.db")),
            &format!(
                "PRAGMA journal_mode={mode}; CREATE TABLE t (a, b);
                 WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 200)
                   INSERT INTO t SELECT i, zeroblob(200) FROM n;"
            ),
        );
        pair.assert_same(&format!("{mode}.db"));
    }
    pair
}

/// The good databases are as they were, can be written, and are replicated.
fn assert_unharmed(pair: &mut Pair, rows: u32) {
    assert!(pair.primary.is_up() && pair.replica.is_up(), "a node ended");
    for mode in ["delete", "wal"] {
        let db = format!("{mode}.db");
        let path = pair.primary.db(&db);
        assert_eq!(
            sqlite3(&path, "SELECT count(*) FROM t;"),
            format!("{rows}\n"),
            "{db}"
        );
        sqlite3(&path, "INSERT INTO t VALUES (1, 2);");
        pair.assert_same(&db);
    }
}

fn shell(command: &str, args: &[&std::ffi::OsStr]) -> Finished {
    run(Command::new(command).args(args), b"", LIMIT)
}

#[test]
fn a_file_that_is_no_database() {
    let mut pair = pair_with_good_database();
    let source = pair.cluster.dir().join("text");
    fs::write(&source, "this is no database\n".repeat(1000)).expect("write");
    for name in ["text", "text.db", "x.db-mjunk"] {
        let done = shell(
            "cp",
            &[source.as_os_str(), pair.primary.db(name).as_os_str()],
        );
        assert!(
            !done.success() && !done.stderr.is_empty(),
            "cp to {name} went through"
        );
        assert_eq!(pair.primary.pos(name), None, "{name} has a position");
    }
    // SQLite may use the name afterwards.
    sqlite3(&pair.primary.db("text.db"), "CREATE TABLE t (a);");
    pair.assert_same("text.db");
    assert_unharmed(&mut pair, 200);
}

#[test]
fn a_partial_page_is_written() {
    let mut pair = pair_with_good_database();
    for (name, seek) in [
        ("delete.db", 5),
        ("wal.db", 45),
        ("delete.db", 0),
        ("delete.db", 4096),
    ] {
        let of = format!("of={}", pair.primary.db(name).display());
        let seek = format!("seek={seek}");
        let args = [
            "if=/dev/urandom",
            &of,
            "bs=100",
            "count=1",
            "conv=notrunc,fsync",
            &seek,
        ];
        let done = shell("dd", &args.map(std::ffi::OsStr::new));
        assert!(!done.success(), "dd into {name} at {seek} went through");
    }
    assert_unharmed(&mut pair, 200);
}

#[test]
fn a_database_is_truncated() {
    let mut pair = pair_with_good_database();
    for name in ["delete.db", "wal.db"] {
        for size in ["0", "4096", "5000", "+4096", "1G"] {
            let path = pair.primary.db(name);
            let done = shell(
                "truncate",
                &["-s".as_ref(), size.as_ref(), path.as_os_str()],
            );
            assert!(!done.success(), "truncate -s {size} {name} went through");
        }
    }
    assert_unharmed(&mut pair, 200);
}

#[test]
fn garbage_is_written_into_journals() {
    let mut pair = pair_with_good_database();
    let source = pair.cluster.dir().join("junk");
    let junk: Vec<u8> = (0..20_000_u32).map(|n| (n * 7919 % 251) as u8).collect();
    fs::write(&source, junk).expect("write");
    for name in [
        "delete.db-journal",
        "wal.db-wal",
        "delete.db-wal",
        "wal.db-journal",
    ] {
        // Whether it may be written is not what counts here: it must not count as a transaction.
        shell(
            "cp",
            &[source.as_os_str(), pair.primary.db(name).as_os_str()],
        );
        // It may have been refused.
        let _ = fs::remove_file(pair.primary.db(name));
    }
    assert_unharmed(&mut pair, 200);
}

#[test]
fn garbage_in_the_data_directory() {
    let mut pair = pair_with_good_database();
    for db in ["victim1.db", "victim2.db", "victim3.db", "victim4.db"] {
        sqlite3(
            &pair.primary.db(db),
            "CREATE TABLE t (a); INSERT INTO t VALUES (1);",
        );
        pair.assert_same(db);
    }
    assert_eq!(pair.primary.stop(), Some(0), "{}", pair.primary.log());
    let dbs = pair.primary.data().join("dbs");
    let junk = vec![0xaa; 5000];
    fs::write(pair.primary.data().join("stray"), &junk).expect("write");
    fs::write(dbs.join("stray"), &junk).expect("write");
    fs::create_dir(dbs.join("empty.db")).expect("make a directory");
    fs::create_dir(dbs.join("junk.db")).expect("make a directory");
    fs::write(dbs.join("junk.db/database"), &junk).expect("write");
    fs::create_dir(dbs.join("zero.db")).expect("make a directory");
    fs::write(dbs.join("zero.db/database"), b"").expect("write");
    for file in ["wal", "journal", "checksums", "shm"] {
        fs::write(dbs.join("victim1.db").join(file), &junk).expect("write");
    }
    fs::write(dbs.join("victim2.db/database"), b"").expect("write");
    fs::write(dbs.join("victim3.db/database"), b"short").expect("write");
    for entry in fs::read_dir(dbs.join("victim4.db")).expect("list") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            fs::write(path.join("0000000000000009-0000000000000009.ltx"), &junk).expect("write");
            fs::write(path.join("stray"), &junk).expect("write");
        }
    }
    pair.primary.start();
    assert_unharmed(&mut pair, 200);
    // Each is either as it was, or refused with a word in the log: never served wrong.
    let log = pair.primary.log();
    for db in ["victim1.db", "victim2.db", "victim3.db", "victim4.db"] {
        let done = common::sql::sqlite3_raw(
            &pair.primary.db(db),
            "PRAGMA integrity_check; SELECT a FROM t;",
            true,
        );
        let right = done.success() && done.text() == "ok\n1\n";
        assert!(
            right || log.contains(db),
            "{db}: {done:?}, and not a word in the log:\n{log}"
        );
        assert!(
            right || !done.text().starts_with("ok"),
            "{db}: wrong rows: {done:?}"
        );
    }
    for db in ["junk.db", "stray"] {
        assert_eq!(pair.primary.pos(db), None, "{db} has a position");
    }
    assert!(log.contains("junk.db"), "not a word about junk.db:\n{log}");
}

#[test]
fn a_data_directory_cut_short() {
    let mut pair = pair_with_good_database();
    assert_eq!(pair.replica.stop(), Some(0), "{}", pair.replica.log());
    // A replica that finds its databases truncated or its logs gone is given the primary's.
    for mode in ["delete", "wal"] {
        let dir = pair.replica.db_data(&format!("{mode}.db"));
        let database = fs::File::options().write(true).open(dir.join("database"));
        database.and_then(|file| file.set_len(4096)).expect("cut");
        let log = dir.join("log");
        if mode == "wal" && log.exists() {
            fs::remove_dir_all(log).expect("remove the log");
        }
    }
    pair.replica.start();
    for mode in ["delete", "wal"] {
        pair.assert_same(&format!("{mode}.db"));
    }
    assert_unharmed(&mut pair, 200);
}

/// Runs `tenure mount` with a configuration, to its end.
fn mount(cluster: &Cluster, yaml: &str) -> Finished {
    let config = cluster.dir().join("litefs.yml");
    fs::write(&config, yaml).expect("write the configuration");
    let mut command = Command::new(TENURE);
    command.args(["mount", "-config"]).arg(config);
    run(&mut command, b"", LIMIT)
}

fn yaml(dir: &Path, http: &str) -> String {
    format!(
        "fuse:\n  dir: {:?}\ndata:\n  dir: {:?}\nhttp:\n  addr: \"{http}\"\n\
         lease:\n  type: static\n  candidate: true\n  advertise-url: \"http://{http}\"\n",
        dir.join("mnt"),
        dir.join("data")
    )
}

fn assert_error(done: &Finished, code: i32, words: &[&str]) {
    assert_eq!(done.code, Some(code), "{}", done.stderr);
    assert!(done.stderr.contains("ERROR: "), "{}", done.stderr);
    for word in words {
        assert!(
            done.stderr.contains(word),
            "no {word:?} in: {}",
            done.stderr
        );
    }
}

#[test]
fn an_unknown_key_in_the_configuration() {
    let cluster = Cluster::new(60);
    let text = yaml(cluster.dir(), &free_address()).replace("  candidate:", "  candidat:");
    let done = mount(&cluster, &text);
    assert_error(&done, 2, &["candidat", "litefs.yml"]);
    let line = text
        .lines()
        .position(|l| l.contains("candidat"))
        .expect("it is there")
        + 1;
    assert!(
        done.stderr.contains(&line.to_string()),
        "no line {line}: {}",
        done.stderr
    );
    assert!(
        !cluster.dir().join("data").exists(),
        "something was made all the same"
    );
}

#[test]
fn configurations_that_make_no_sense() {
    let cluster = Cluster::new(60);
    let good = yaml(cluster.dir(), &free_address());
    let same = good.replace("/data\"", "/mnt\"");
    assert_error(&mount(&cluster, &same), 2, &["dir"]);
    assert_error(&mount(&cluster, "fuse: ["), 2, &["litefs.yml"]);
    assert_error(
        &mount(&cluster, &format!("{good}log:\n  format: xml\n")),
        2,
        &["format"],
    );
    let done = run(
        Command::new(TENURE)
            .args(["mount", "-config"])
            .arg(cluster.dir().join("nowhere.yml")),
        b"",
        LIMIT,
    );
    assert_error(&done, 2, &["nowhere.yml"]);
}

#[test]
fn command_lines_that_make_no_sense() {
    let code = |args: &[&str]| run(Command::new(TENURE).args(args), b"", LIMIT).code;
    assert_eq!(code(&["frobnicate"]), Some(1));
    assert_eq!(code(&[]), Some(2));
    assert_eq!(code(&["mount", "-frobnicate"]), Some(2));
    assert_eq!(code(&["version"]), Some(0));
}

#[test]
fn a_busy_port() {
    let cluster = Cluster::new(60);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("an address").to_string();
    let done = mount(&cluster, &yaml(cluster.dir(), &address));
    let port = address.rsplit(':').next().expect("a port");
    assert_error(&done, 1, &[port]);
    assert_not_mounted(cluster.dir());
    // With the port free, the very same configuration works.
    drop(listener);
    let options = Options {
        http: address.clone(),
        primary: ("again".into(), address),
        ..Options::primary("again")
    };
    drop(cluster.start(options));
}

fn assert_not_mounted(dir: &Path) {
    // A node that failed early has not made its mount point.
    let Ok(dir) = dir.canonicalize() else { return };
    let left: Vec<_> = fuse_mounts()
        .into_iter()
        .filter(|m| m.starts_with(&dir))
        .collect();
    assert!(left.is_empty(), "mounts are left: {left:?}");
}

#[test]
fn a_mount_point_that_does_not_exist_is_made() {
    let cluster = Cluster::new(60);
    let node = cluster.start(Options::primary("deep"));
    assert!(node.mount().is_dir());
    sqlite3(&node.db("x.db"), "CREATE TABLE t (a);");
    assert_eq!(node.txid("x.db"), 1);
}

#[test]
fn a_mount_point_that_is_not_empty() {
    let cluster = Cluster::new(60);
    let mnt = cluster.subdir("mnt");
    fs::write(mnt.join("precious"), "data").expect("write");
    let done = mount(&cluster, &yaml(cluster.dir(), &free_address()));
    assert_error(&done, 1, &["empty"]);
    assert_not_mounted(cluster.dir());
    assert_eq!(
        fs::read_to_string(mnt.join("precious")).expect("read"),
        "data"
    );
}

#[test]
fn a_mount_point_that_is_a_file() {
    let cluster = Cluster::new(60);
    fs::write(cluster.dir().join("mnt"), "data").expect("write");
    let done = mount(&cluster, &yaml(cluster.dir(), &free_address()));
    assert_error(&done, 1, &["mnt"]);
    assert_eq!(
        fs::read_to_string(cluster.dir().join("mnt")).expect("read"),
        "data"
    );
}

#[test]
fn a_data_directory_that_another_node_uses() {
    let cluster = Cluster::new(60);
    let node = cluster.start(Options::primary("first"));
    sqlite3(&node.db("x.db"), "CREATE TABLE t (a);");
    let text = yaml(cluster.dir(), &free_address()).replace(
        &format!("{:?}", cluster.dir().join("data")),
        &format!("{:?}", node.data()),
    );
    assert_error(&mount(&cluster, &text), 1, &["data"]);
    assert_not_mounted(&cluster.dir().join("mnt"));
    sqlite3(&node.db("x.db"), "INSERT INTO t VALUES (1);");
    assert_eq!(node.txid("x.db"), 2);
}

#[test]
fn no_permission_to_mount() {
    let cluster = Cluster::new(60);
    // Not the cluster's directory: another user may not be able to reach the build's.
    let dir = tempfile::tempdir().expect("temporary directory");
    let config = dir.path().join("litefs.yml");
    fs::write(&config, yaml(dir.path(), &free_address())).expect("write the configuration");
    let program = dir.path().join("tenure");
    fs::copy(TENURE, &program).expect("copy the program");
    for (path, mode) in [(dir.path(), 0o777), (&config, 0o644), (&program, 0o755)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
    }
    // No privileges, neither its own nor those of a set-user-ID fusermount.
    let mut command = Command::new("setpriv");
    command.arg("--no-new-privs");
    // SAFETY: takes and returns a number.
    if unsafe { libc::geteuid() } == 0 {
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    }
    command
        .arg(&program)
        .args(["mount", "-config"])
        .arg(&config);
    let done = run(&mut command, b"", LIMIT);
    assert_error(&done, 1, &["mount"]);
    assert_not_mounted(dir.path());
    drop(cluster);
}
