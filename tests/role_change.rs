//! Changes of role at run time on real mounts, with SQLite in processes of its own: two stores of
//! this test program, each with a mount, whose roles the test sets itself.

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::helper::Session;
use common::{Cluster, sqlite3};
use tenure::fuse::{Mount, MountOptions, Observers};
use tenure::store::{Next, Options, Role, Store};

helper_test!();

const MODES: [&str; 4] = ["delete", "truncate", "persist", "wal"];
const REPLICA: Role = Role::Replica { hostname: None };
const DB: &str = "a.db";
const INSERT: &str = "INSERT INTO t(v) VALUES (randomblob(5000))";

/// A store and its mount.
struct Live<'a> {
    cluster: &'a Cluster,
    // Dropped in this order.
    _mount: Mount,
    store: Arc<Store>,
    dir: PathBuf,
}

impl<'a> Live<'a> {
    fn start(cluster: &'a Cluster, name: &str) -> Live<'a> {
        let dir = cluster.subdir(name);
        let store = Store::open(Options {
            compress: false,
            strict_verify: true,
            ..Options::new(dir.join("data"))
        })
        .unwrap();
        let options = MountOptions {
            dir: dir.join("mount"),
            allow_other: false,
            skip_unmount: false,
            observers: Observers::default(),
        };
        let mount = Mount::start(&store, &options).unwrap();
        Live {
            cluster,
            _mount: mount,
            store,
            dir,
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.join("mount").join(DB)
    }

    fn session(&self) -> Session {
        Session::open(&self.path(), self.cluster.dir())
    }

    /// A fresh connection's view.
    fn rows(&self) -> String {
        let said = sqlite3(
            &self.path(),
            "PRAGMA integrity_check; SELECT count(*) FROM t;",
        );
        said.strip_prefix("ok\n").expect(&said).trim().to_string()
    }

    /// Takes over what another one has.
    fn follow(&self, from: &Live<'_>) {
        from.store.positions();
        let theirs = from.store.database(DB).unwrap();
        loop {
            let pos = self.store.positions().get(DB).copied().unwrap_or_default();
            let bytes = match theirs.record_after(pos).unwrap() {
                Next::UpToDate => return,
                Next::Record(r) => r.bytes.to_vec(),
                Next::Large(r) => r.load().unwrap().bytes.to_vec(),
                Next::Snapshot => {
                    let mut bytes = Vec::new();
                    theirs.snapshot().unwrap().write_to(&mut bytes).unwrap();
                    bytes
                }
            };
            self.store
                .receive(DB, &mut &bytes[..], &mut |_, p| theirs.newest_common(p))
                .unwrap();
        }
    }
}

fn create(live: &Live<'_>, mode: &str) {
    live.store.set_role(Role::Primary);
    let sql = format!("PRAGMA journal_mode={mode}; CREATE TABLE t(k INTEGER PRIMARY KEY, v);");
    assert_eq!(sqlite3(&live.path(), &sql).trim(), mode);
}

/// Writes as an application that tries again for a moment.
fn insert_soon(session: &mut Session) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while let Err(e) = session.run(INSERT) {
        assert!(Instant::now() < deadline, "still not writable: {e}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_transaction_that_is_open_when_the_role_changes_fails() {
    for mode in MODES {
        let cluster = Cluster::new(120);
        let live = Live::start(&cluster, mode);
        create(&live, mode);
        sqlite3(&live.path(), &format!("{INSERT};"));
        let mut writer = live.session();
        let mut reader = live.session();
        let mut expected = 1;
        for (spilled, promoted_again) in
            [(false, false), (false, true), (true, false), (true, true)]
        {
            let what = format!("{mode}, spilled {spilled}, promoted again {promoted_again}");
            for sql in ["PRAGMA cache_size=5", "BEGIN IMMEDIATE"] {
                writer.run(sql).unwrap();
            }
            for _ in 0..if spilled { 40 } else { 1 } {
                writer.run(INSERT).unwrap();
            }
            live.store.set_role(REPLICA);
            if promoted_again {
                live.store.set_role(Role::Primary);
            }
            assert!(writer.run("COMMIT").is_err(), "{what}: a false success");
            // Whatever it says: it is over.
            let _ = writer.run("ROLLBACK");
            let count = "SELECT count(*) FROM t";
            assert_eq!(live.rows(), expected.to_string(), "{what}");
            for session in [&mut reader, &mut writer] {
                assert_eq!(session.run(count), Ok(expected.to_string()), "{what}");
                assert_eq!(
                    session.run("PRAGMA integrity_check"),
                    Ok("ok".into()),
                    "{what}"
                );
            }
            live.store.set_role(Role::Primary);
            insert_soon(&mut writer);
            expected += 1;
            assert_eq!(live.rows(), expected.to_string(), "{what}");
        }
    }
}

#[test]
fn primaries_take_turns() {
    for mode in MODES {
        let cluster = Cluster::new(240);
        let lives = [Live::start(&cluster, "a"), Live::start(&cluster, "b")];
        create(&lives[0], mode);
        lives[1].follow(&lives[0]);
        // Open from the first turn to the last.
        let mut held = [lives[0].session(), lives[1].session()];
        let mut expected = 0;
        for turn in 0..20 {
            let (primary, replica) = (turn % 2, 1 - turn % 2);
            let what = format!("{mode} turn {turn}");
            for reader in &mut held {
                let said = reader.run("SELECT count(*) FROM t");
                assert_eq!(said, Ok(expected.to_string()), "{what}");
            }
            sqlite3(&lives[primary].path(), &format!("{INSERT}; {INSERT};"));
            expected += 2;
            if mode != "wal" {
                held[primary].run(INSERT).expect(&what);
                expected += 1;
            }
            let mut open = lives[primary].session();
            open.run("PRAGMA cache_size=5").unwrap();
            open.run("BEGIN IMMEDIATE").unwrap();
            for _ in 0..=turn {
                open.run(INSERT).unwrap();
            }
            lives[primary].store.set_role(REPLICA);
            assert!(open.run("COMMIT").is_err(), "{what}: a false success");
            drop(open);
            lives[replica].follow(&lives[primary]);
            lives[replica].store.set_role(Role::Primary);
            for live in &lives {
                assert_eq!(live.rows(), expected.to_string(), "{what}");
            }
            let positions = lives[0].store.positions();
            assert_eq!(positions, lives[1].store.positions(), "{what}");
        }
    }
}

/// Commits, checkpoints of every kind, growth and shrinking from three connections at a time: an
/// error other than "locked" is one that the file system made.
#[test]
fn checkpoints_and_commits_race_without_an_error() {
    let cluster = Cluster::new(180);
    let live = Live::start(&cluster, "a");
    create(&live, "wal");
    sqlite3(&live.path(), "PRAGMA auto_vacuum=FULL; VACUUM;");
    let deadline = Instant::now() + Duration::from_secs(12);
    let work = |seed: u64| {
        let mut session = live.session();
        let (mut x, mut n) = (seed, 0);
        session.run("PRAGMA wal_autocheckpoint=3").unwrap();
        while Instant::now() < deadline {
            x = x
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let sql = match (x >> 33) % 12 {
                0 => "PRAGMA wal_checkpoint(PASSIVE)",
                1 => "PRAGMA wal_checkpoint(FULL)",
                2 => "PRAGMA wal_checkpoint(RESTART)",
                3 => "PRAGMA wal_checkpoint(TRUNCATE)",
                4 => "DELETE FROM t WHERE k % 3 = 0",
                5 => "INSERT INTO t(v) SELECT randomblob(4000) FROM t LIMIT 60",
                6 => "SELECT count(*), max(length(v)) FROM t",
                _ => "INSERT INTO t(v) VALUES (randomblob(9000))",
            };
            n += 1;
            if n % 40 == 0 {
                // Its handles are given up, and the node looks after the WAL index.
                session = live.session();
            }
            if let Err(e) = session.run(sql) {
                assert!(e.contains("locked"), "{sql}: {e}");
            }
        }
        n
    };
    let counts: Vec<u32> = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..=3)
            .map(|seed| scope.spawn(move || work(seed)))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(counts.iter().all(|n| *n > 50), "{counts:?}");
    assert_eq!(sqlite3(&live.path(), "PRAGMA integrity_check;"), "ok\n");
    assert_eq!(live.store.database(DB).unwrap().broken(), None);
}
