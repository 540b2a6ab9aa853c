//! The halt lock: writes on a replica, forwarded to the primary, through whole nodes and
//! `tenure run -with-halt-lock-on`.

mod common;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::node::TENURE;
use common::run::{Finished, run};
use common::{Cluster, Node, assert_same, sqlite3, wait_same_pos};

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
        let pair = Cluster::static_pair_with(120, |o| common::Options {
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
