//! Each thing that SQLite does with its files, in every journal mode: the application sees what it
//! would see on a plain directory, and the replica has the same bytes afterwards.

mod common;

use std::time::Duration;

use common::sql::{self, sqlite3_fails};
use common::{Cluster, sqlite3};

const MODES: [&str; 4] = ["delete", "truncate", "persist", "wal"];

/// A script of one transaction of each kind; ends with 60 rows in `t`.
const ORDINARY: &str = "\
CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT, b BLOB);
CREATE INDEX i ON t (v);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 100)
  INSERT INTO t SELECT i, 'value ' || i, zeroblob(i * 7) FROM n;
BEGIN; UPDATE t SET v = 'gone'; DELETE FROM t WHERE id > 3; ROLLBACK;
BEGIN; DELETE FROM t WHERE id > 90; SAVEPOINT s; DELETE FROM t; ROLLBACK TO s;
UPDATE t SET v = v || '!' WHERE id % 2; RELEASE s; COMMIT;
DELETE FROM t WHERE id BETWEEN 11 AND 40;
VACUUM;
INSERT INTO t (v) VALUES ('after the vacuum');
DELETE FROM t WHERE v = 'after the vacuum';
";

#[test]
fn every_mode_and_page_size() {
    let pair = Cluster::static_pair_with(240, |options| common::Options {
        strict_verify: true,
        ..options
    });
    for mode in MODES {
        for page_size in [512, 1024, 4096, 16384, 65536] {
            let db = format!("{mode}-{page_size}.db");
            let path = pair.primary.db(&db);
            let printed = sqlite3(
                &path,
                &format!("PRAGMA page_size={page_size};\nPRAGMA journal_mode={mode};\n{ORDINARY}"),
            );
            assert_eq!(printed.trim(), mode);
            let rows = sqlite3(
                &path,
                "SELECT count(*), sum(length(b)), sum(v LIKE '%!') FROM t; PRAGMA page_size;",
            );
            assert_eq!(rows, format!("60|23310|30\n{page_size}\n"), "{db}");
            pair.assert_same(&db);
        }
    }
}

#[test]
fn mode_switches_in_every_direction() {
    let pair = Cluster::static_pair(120);
    let path = pair.primary.db("x.db");
    sqlite3(&path, "CREATE TABLE t (a); INSERT INTO t VALUES (0);");
    // Every ordered pair of modes once.
    let tour = [0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3, 0];
    let mut steps: Vec<(usize, usize)> = tour.windows(2).map(|w| (w[0], w[1])).collect();
    steps.sort_unstable();
    steps.dedup();
    assert_eq!(steps.len(), 12, "the tour misses a direction");
    for (step, to) in tour.iter().enumerate() {
        let mode = MODES[*to];
        let printed = sqlite3(
            &path,
            &format!(
                "INSERT INTO t VALUES ('before {step}');
                 PRAGMA journal_mode={mode};
                 INSERT INTO t VALUES ('after {step}');
                 SELECT count(*) FROM t;"
            ),
        );
        assert_eq!(printed, format!("{mode}\n{}\n", 3 + 2 * step));
        pair.assert_same("x.db");
    }
}

#[test]
fn a_switch_that_another_connection_prevents_changes_nothing() {
    let pair = Cluster::static_pair(60);
    let path = pair.primary.db("x.db");
    sqlite3(&path, "PRAGMA journal_mode=wal; CREATE TABLE t (a);");
    let reader = rusqlite::Connection::open(&path).expect("open");
    reader
        .execute_batch("BEGIN; SELECT * FROM t;")
        .expect("read");
    let failed = sql::sqlite3_raw(
        &path,
        ".timeout 100\nINSERT INTO t VALUES (1); PRAGMA journal_mode=delete;",
        true,
    );
    assert!(
        !failed.success() || failed.text().trim() == "wal",
        "the switch went through beside a reader: {failed:?}"
    );
    pair.assert_same("x.db");
    reader.execute_batch("COMMIT").expect("end the transaction");
    drop(reader);
    assert_eq!(sqlite3(&path, "PRAGMA journal_mode=delete;"), "delete\n");
    sqlite3(&path, "INSERT INTO t VALUES (2);");
    pair.assert_same("x.db");
}

#[test]
fn auto_vacuum_shrinks_the_database_on_both_nodes() {
    let pair = Cluster::static_pair(120);
    for mode in MODES {
        for vacuum in ["full", "incremental"] {
            let db = format!("{mode}-{vacuum}.db");
            let path = pair.primary.db(&db);
            sqlite3(
                &path,
                &format!(
                    "PRAGMA auto_vacuum={vacuum};\nPRAGMA journal_mode={mode};
                     CREATE TABLE t (id INTEGER PRIMARY KEY, b);
                     WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 200)
                       INSERT INTO t SELECT i, zeroblob(3000) FROM n;"
                ),
            );
            let pages = |path| -> u32 {
                let text = sqlite3(path, "PRAGMA page_count;");
                text.trim().parse().expect("a number")
            };
            let before = pages(&path);
            sqlite3(&path, "DELETE FROM t WHERE id > 20;");
            if vacuum == "incremental" {
                assert_eq!(
                    pages(&path),
                    before,
                    "{db}: free pages stay until asked for"
                );
                sqlite3(&path, "PRAGMA incremental_vacuum(50);");
                assert_eq!(pages(&path), before - 50, "{db}");
                pair.assert_same(&db);
                sqlite3(&path, "PRAGMA incremental_vacuum;");
            }
            assert!(pages(&path) < before / 5, "{db}");
            pair.assert_same(&db);
            assert_eq!(pages(&pair.replica.db(&db)), pages(&path), "{db}");
        }
    }
}

#[test]
fn vacuum_changes_the_page_size() {
    let pair = Cluster::static_pair(60);
    let path = pair.primary.db("x.db");
    sqlite3(&path, &format!("PRAGMA page_size=1024;\n{ORDINARY}"));
    pair.assert_same("x.db");
    for page_size in [4096, 512, 65536] {
        sqlite3(&path, &format!("PRAGMA page_size={page_size}; VACUUM;"));
        assert_eq!(
            sqlite3(&path, "PRAGMA page_size; SELECT count(*) FROM t;"),
            format!("{page_size}\n60\n")
        );
        pair.assert_same("x.db");
    }
}

#[test]
fn one_transaction_over_two_attached_databases() {
    let pair = Cluster::static_pair(120);
    for mode in MODES {
        let (a, b) = (format!("a-{mode}.db"), format!("b-{mode}.db"));
        let attach = format!("ATTACH '{}' AS b;", pair.primary.db(&b).display());
        for db in [&a, &b] {
            sqlite3(
                &pair.primary.db(db),
                &format!("PRAGMA journal_mode={mode}; CREATE TABLE t (a);"),
            );
        }
        let path = pair.primary.db(&a);
        sqlite3(
            &path,
            &format!(
                "{attach} BEGIN; INSERT INTO main.t VALUES (1); INSERT INTO b.t VALUES (1); COMMIT;"
            ),
        );
        let before = (pair.primary.pos(&a), pair.primary.pos(&b));
        sqlite3(
            &path,
            &format!(
                "{attach} BEGIN; INSERT INTO main.t VALUES (2); INSERT INTO b.t VALUES (2); ROLLBACK;"
            ),
        );
        assert_eq!(
            (pair.primary.pos(&a), pair.primary.pos(&b)),
            before,
            "{mode}"
        );
        sqlite3(
            &path,
            &format!(
                "{attach} BEGIN; INSERT INTO main.t VALUES (3); INSERT INTO b.t VALUES (3); COMMIT;"
            ),
        );
        for db in [&a, &b] {
            assert_eq!(sqlite3(&pair.primary.db(db), "SELECT a FROM t;"), "1\n3\n");
            pair.assert_same(db);
        }
    }
    // A super-journal is no database, on neither node.
    for node in [&pair.primary, &pair.replica] {
        let mut names: Vec<String> = std::fs::read_dir(node.mount())
            .expect("list the mount")
            .map(|entry| {
                entry
                    .expect("an entry")
                    .file_name()
                    .into_string()
                    .expect("text")
            })
            .filter(|name| name.contains("-mj"))
            .collect();
        names.sort();
        assert_eq!(names, Vec::<String>::new());
        let vars = node.http_get("/debug/vars").expect("/debug/vars");
        assert!(!vars.contains("-mj"), "{vars}");
    }
}

#[test]
fn transactions_larger_than_the_cache() {
    let pair = Cluster::static_pair(120);
    for mode in MODES {
        let db = format!("{mode}.db");
        let path = pair.primary.db(&db);
        let fill = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 3000)
                    INSERT INTO t (b) SELECT zeroblob(500 + i % 300) FROM n;";
        sqlite3(
            &path,
            &format!(
                "PRAGMA journal_mode={mode};\nPRAGMA cache_size=8;
                 CREATE TABLE t (id INTEGER PRIMARY KEY, b);
                 {fill}
                 BEGIN; UPDATE t SET b = zeroblob(900); {fill} ROLLBACK;
                 BEGIN; UPDATE t SET b = zeroblob(10) WHERE id % 3 = 0; {fill}
                 UPDATE t SET b = zeroblob(20) WHERE id % 3 = 0; COMMIT;"
            ),
        );
        assert_eq!(
            sqlite3(&path, "SELECT count(*), sum(length(b) = 20) FROM t;"),
            "6000|2000\n"
        );
        pair.assert_same(&db);
    }
}

#[test]
fn a_rolled_back_transaction_moves_nothing() {
    let pair = Cluster::static_pair(60);
    for mode in MODES {
        let db = format!("{mode}.db");
        let path = pair.primary.db(&db);
        sqlite3(&path, &format!("PRAGMA journal_mode={mode};\n{ORDINARY}"));
        let before = pair.primary.pos(&db);
        sqlite3(
            &path,
            "PRAGMA cache_size=5; BEGIN; UPDATE t SET b = zeroblob(2000); DELETE FROM t WHERE id < 50; ROLLBACK;",
        );
        assert_eq!(pair.primary.pos(&db), before, "{mode}");
        sqlite3(&path, "BEGIN; SELECT count(*) FROM t; COMMIT;");
        assert_eq!(pair.primary.pos(&db), before, "{mode}");
        pair.assert_same(&db);
    }
}

#[test]
fn a_full_text_index_survives_constraint_errors() {
    let pair = Cluster::static_pair(60);
    for mode in MODES {
        let db = format!("{mode}.db");
        let path = pair.primary.db(&db);
        sqlite3(
            &path,
            &format!(
                "PRAGMA journal_mode={mode};
                 CREATE TABLE names (name TEXT UNIQUE);
                 CREATE VIRTUAL TABLE f USING fts5(body);
                 INSERT INTO names VALUES ('one');
                 INSERT INTO f VALUES ('the quick brown fox');"
            ),
        );
        let failed = sqlite3_fails(
            &path,
            "BEGIN; INSERT INTO f VALUES ('never seen'); INSERT OR ROLLBACK INTO names VALUES ('one');",
        );
        assert!(failed.contains("UNIQUE"), "{failed}");
        sqlite3(
            &path,
            "INSERT INTO f VALUES ('the lazy dog'); INSERT INTO f(f) VALUES ('optimize');
             INSERT INTO f(f) VALUES ('integrity-check');",
        );
        let query = "SELECT count(*) FROM f WHERE f MATCH 'the'; SELECT count(*) FROM f WHERE f MATCH 'never';";
        for node in [&pair.primary, &pair.replica] {
            common::wait_same_pos(&pair.primary, &pair.replica, &db);
            assert_eq!(sqlite3(&node.db(&db), query), "2\n0\n");
        }
        pair.assert_same(&db);
    }
}

#[test]
fn two_processes_write_to_one_database() {
    let pair = Cluster::static_pair(180);
    for mode in MODES {
        let db = format!("{mode}.db");
        let path = pair.primary.db(&db);
        sqlite3(
            &path,
            &format!("PRAGMA journal_mode={mode}; CREATE TABLE t (who, n);"),
        );
        let script = |who: &str| {
            (0..40).fold(String::new(), |sql, n| {
                sql + &format!("INSERT INTO t VALUES ('{who}', {n});\n")
            })
        };
        std::thread::scope(|scope| {
            for who in ["a", "b"] {
                let (path, sql) = (&path, script(who));
                scope.spawn(move || sqlite3(path, &sql));
            }
        });
        assert_eq!(
            sqlite3(&path, "SELECT who, count(*), sum(n) FROM t GROUP BY who;"),
            "a|40|780\nb|40|780\n",
            "{mode}"
        );
        pair.assert_same(&db);
    }
}

#[test]
fn memory_mapped_readers_see_commits() {
    let pair = Cluster::static_pair(60);
    for mode in ["delete", "wal"] {
        let db = format!("{mode}.db");
        let path = pair.primary.db(&db);
        sqlite3(&path, &format!("PRAGMA journal_mode={mode};\n{ORDINARY}"));
        common::wait_same_pos(&pair.primary, &pair.replica, &db);
        let readers = [&pair.primary, &pair.replica].map(|node| {
            let reader = rusqlite::Connection::open(node.db(&db)).expect("open");
            reader.busy_timeout(Duration::from_secs(20)).expect("limit");
            reader
                .pragma_update(None, "mmap_size", 1 << 28)
                .expect("mmap");
            reader
        });
        for n in 1..=10 {
            sqlite3(&path, &format!("UPDATE t SET v = 'round {n}';"));
            common::wait_same_pos(&pair.primary, &pair.replica, &db);
            for reader in &readers {
                let seen: i64 = reader
                    .query_row(
                        "SELECT count(*) FROM t WHERE v = 'round ' || ?1",
                        [n],
                        |row| row.get(0),
                    )
                    .expect("read");
                assert_eq!(seen, 60, "{mode}, round {n}");
            }
        }
        drop(readers);
        pair.assert_same(&db);
    }
}

#[test]
fn checkpoints_move_nothing() {
    let pair = Cluster::static_pair(60);
    let path = pair.primary.db("x.db");
    sqlite3(&path, &format!("PRAGMA journal_mode=wal;\n{ORDINARY}"));
    let keeper = rusqlite::Connection::open(&path).expect("open");
    keeper
        .query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0))
        .expect("read");
    for (n, kind) in ["PASSIVE", "FULL", "RESTART", "TRUNCATE"]
        .iter()
        .cycle()
        .take(8)
        .enumerate()
    {
        sqlite3(&path, &format!("UPDATE t SET v = 'checkpoint {n}';"));
        let before = pair.primary.pos("x.db");
        let done = sqlite3(&path, &format!("PRAGMA wal_checkpoint({kind});"));
        assert!(done.starts_with("0|"), "{kind}: {done}");
        assert_eq!(pair.primary.pos("x.db"), before, "{kind}");
        pair.assert_same("x.db");
    }
    drop(keeper);
    pair.assert_same("x.db");
}

#[test]
fn a_database_without_a_journal_on_disk_is_refused() {
    let pair = Cluster::static_pair(60);
    let path = pair.primary.db("x.db");
    sqlite3(&path, ORDINARY);
    let before = pair.primary.pos("x.db");
    for mode in ["memory", "off"] {
        sqlite3_fails(
            &path,
            &format!("PRAGMA journal_mode={mode}; UPDATE t SET v = 'unsafe';"),
        );
        assert_eq!(pair.primary.pos("x.db"), before, "{mode}");
        assert_eq!(
            sqlite3(&path, "SELECT count(*) FROM t WHERE v = 'unsafe';"),
            "0\n",
            "{mode}"
        );
    }
    let log = pair.primary.log();
    assert!(
        log.contains("journal_mode"),
        "the log does not say why:\n{log}"
    );
    sqlite3(&path, "UPDATE t SET v = 'safe';");
    pair.assert_same("x.db");
}

#[test]
fn exclusive_locking_mode() {
    let pair = Cluster::static_pair(60);
    for mode in ["delete", "truncate", "persist"] {
        let db = format!("{mode}.db");
        let path = pair.primary.db(&db);
        sqlite3(
            &path,
            &format!(
                "PRAGMA journal_mode={mode}; PRAGMA locking_mode=EXCLUSIVE;
                 CREATE TABLE t (a); INSERT INTO t VALUES (1);
                 BEGIN; INSERT INTO t VALUES (2); ROLLBACK; INSERT INTO t VALUES (3);"
            ),
        );
        assert_eq!(sqlite3(&path, "SELECT a FROM t;"), "1\n3\n", "{mode}");
        pair.assert_same(&db);
    }
    // In WAL mode the index would be in that process's memory alone: refused, and the log says by
    // which pragma.
    let path = pair.primary.db("wal.db");
    sqlite3(&path, "PRAGMA journal_mode=wal; CREATE TABLE t (a);");
    let before = pair.primary.pos("wal.db");
    sqlite3_fails(
        &path,
        "PRAGMA locking_mode=EXCLUSIVE; INSERT INTO t VALUES (1);",
    );
    assert_eq!(pair.primary.pos("wal.db"), before);
    let log = pair.primary.log();
    assert!(
        log.contains("locking_mode"),
        "the log does not say why:\n{log}"
    );
    sqlite3(&path, "INSERT INTO t VALUES (2);");
    pair.assert_same("wal.db");
}
