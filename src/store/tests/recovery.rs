//! Starting again: after a clean stop, after a kill at any moment, and on damaged files.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rusqlite::Connection;
use rusqlite::config::DbConfig;

use super::bed::{Bed, integrity, options, set_mode};
use super::log::segment_files;
use crate::ltx::Pos;
use crate::store::disk::Real;
use crate::store::segment::Segment;
use crate::store::{FileKind, Role, Store, StoreError, sums};

const DB: &str = "a.db";
const PAGE: u64 = 4096;

/// Some tables: about 60 pages, in several transactions.
fn fill(c: &Connection) {
    c.execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v); CREATE TABLE u(v)")
        .unwrap();
    for _ in 0..5 {
        c.execute_batch("INSERT INTO t(v) VALUES (randomblob(40000)); INSERT INTO u VALUES (1)")
            .unwrap();
    }
}

fn filled(mode: &str) -> (Bed, Connection) {
    let bed = Bed::primary();
    let c = bed.connect(DB);
    set_mode(&c, mode);
    fill(&c);
    (bed, c)
}

fn in_db(dir: &Path, file: &str) -> std::path::PathBuf {
    dir.join("dbs").join(DB).join(file)
}

fn saved(dir: &Path) -> Pos {
    let loaded = sums::load(&Real, &in_db(dir, "checksums")).unwrap();
    loaded.map_or(Pos::default(), |(h, _)| h.pos)
}

/// A start on `dir` finds the database set aside, and says why; returns what it says.
fn broken(dir: tempfile::TempDir) -> String {
    let bed = Bed::on(dir);
    let reason = bed.db(DB).broken().expect("set aside");
    assert!(!bed.store.positions().contains_key(DB));
    bed.store.set_role(Role::Primary);
    let e = bed.db(DB).create(FileKind::Database, false).err();
    assert!(matches!(e, Some(StoreError::Broken { .. })), "{e:?}");
    assert!(bed.db(DB).snapshot().is_err());
    // The others go on.
    let c = bed.connect("other.db");
    c.execute_batch("CREATE TABLE t(v)").unwrap();
    drop(c);
    bed.check_killed("other.db");
    bed.store.close();
    reason
}

#[test]
fn a_clean_stop_leaves_nothing_to_redo() {
    for mode in ["delete", "truncate", "persist", "wal"] {
        let (bed, c) = filled(mode);
        let before = bed.check(DB);
        // A WAL that nobody checkpointed.
        c.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)
            .unwrap();
        drop(c);
        let dir = bed.dir.path().to_owned();
        bed.store.close();
        assert_eq!(saved(&dir), before.0, "{mode}");
        let mut names: Vec<String> = std::fs::read_dir(dir.join("dbs").join(DB))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["checksums", "database", "log", "ltx"], "{mode}");
        let left: Vec<_> = std::fs::read_dir(in_db(&dir, "ltx")).unwrap().collect();
        assert_eq!(left.len(), 1, "the newest transaction, for LiteFS");
        let file = left.into_iter().next().unwrap().unwrap().path();
        let newest = crate::ltx::verify(&std::fs::read(file).unwrap()[..]).unwrap();
        assert_eq!(newest.trailer.post_apply_checksum, before.0.checksum);
        assert_eq!(std::fs::read(in_db(&dir, "database")).unwrap(), before.1);
        let checksums = std::fs::metadata(in_db(&dir, "checksums")).unwrap();
        let bed = bed.restarted();
        assert_eq!(bed.check(DB), before, "{mode}");
        let now = std::fs::metadata(in_db(&dir, "checksums")).unwrap();
        assert_eq!(
            now.modified().unwrap(),
            checksums.modified().unwrap(),
            "no redo, so no checkpoint after it"
        );
        bed.store.set_role(Role::Primary);
        let c = bed.connect(DB);
        c.execute_batch("INSERT INTO u VALUES (2)").unwrap();
        integrity(&c);
        assert_eq!(bed.check_killed(DB).0.txid, before.0.txid + 1);
    }
}

#[test]
fn one_directory_serves_one_node() {
    let bed = Bed::primary();
    let e = Store::open(options(bed.dir.path())).err();
    assert!(matches!(e, Some(StoreError::InUse(_))), "{e:?}");
}

#[test]
fn missing_or_damaged_checksums_are_computed_again_from_a_whole_log() {
    let (bed, _c) = filled("delete");
    let before = bed.check(DB);
    bed.db(DB).checkpoint().unwrap();
    let whole = std::fs::read(in_db(bed.dir.path(), "checksums")).unwrap();
    type Damage = fn(&mut Vec<u8>);
    let damages: [(&str, Damage); 5] = [
        ("empty", |b| b.clear()),
        ("headers torn", |b| b[..1024].fill(0xee)),
        ("header alone", |b| b.truncate(4096)),
        ("half of the entries", |b| b.truncate(4096 + 100)),
        ("zeros", |b| b.fill(0)),
    ];
    for (what, damage) in damages {
        let dir = bed.remains();
        let mut bytes = whole.clone();
        damage(&mut bytes);
        std::fs::write(in_db(dir.path(), "checksums"), bytes).unwrap();
        let other = Bed::on(dir);
        assert_eq!(other.check(DB), before, "{what}");
    }
    let dir = bed.remains();
    std::fs::remove_file(in_db(dir.path(), "checksums")).unwrap();
    assert_eq!(Bed::on(dir).check(DB), before, "missing");
}

#[test]
fn checksums_and_file_may_be_of_any_moment_since_the_checkpoint() {
    for mode in ["delete", "wal"] {
        let (bed, c) = filled(mode);
        c.execute_batch("PRAGMA wal_autocheckpoint=3").unwrap();
        let mut moments = Vec::new();
        for i in 0..4 {
            c.execute_batch("UPDATE t SET v = randomblob(20000) WHERE k > 2")
                .unwrap();
            c.execute_batch("DELETE FROM u; INSERT INTO t(v) VALUES (randomblob(30000))")
                .unwrap();
            bed.db(DB).settle();
            if i == 1 {
                bed.db(DB).checkpoint().unwrap();
            }
            moments.push(bed.remains());
        }
        let newest = bed.check(DB);
        // The checksums of moments 1 to 3 count from the checkpoint in 1.
        for (sums_of, file_of) in [
            (1, 1),
            (1, 2),
            (1, 3),
            (3, 3),
            (0, 0),
            (0, 2),
            (0, 3),
            (2, 3),
        ] {
            let dir = bed.remains();
            for (file, of) in [("checksums", sums_of), ("database", file_of)] {
                let from = in_db(moments[of as usize].path(), file);
                if from.exists() {
                    std::fs::copy(from, in_db(dir.path(), file)).unwrap();
                } else {
                    let _ = std::fs::remove_file(in_db(dir.path(), file));
                }
            }
            let other = Bed::on(dir);
            assert_eq!(
                other.check(DB),
                newest,
                "{mode}: checksums of {sums_of}, file of {file_of}"
            );
        }
    }
}

#[test]
fn whatever_stands_in_pages_that_the_log_redoes_is_overwritten() {
    let (bed, c) = filled("delete");
    bed.db(DB).checkpoint().unwrap();
    let old = bed.check(DB).1;
    c.execute_batch("UPDATE t SET v = randomblob(30000) WHERE k = 3; INSERT INTO t(v) VALUES (randomblob(50000))")
        .unwrap();
    let before = bed.check(DB);
    let pages = before.1.len() as u64 / PAGE;
    let changed: Vec<u64> = (0..pages)
        .filter(|p| {
            let at = (p * PAGE) as usize;
            old.get(at..at + PAGE as usize) != Some(&before.1[at..at + PAGE as usize])
        })
        .collect();
    assert!(changed.len() > 15);
    let dir = bed.remains();
    let file = std::fs::File::options()
        .write(true)
        .open(in_db(dir.path(), "database"))
        .unwrap();
    for p in &changed {
        file.write_all_at(&[0x5a; PAGE as usize], p * PAGE).unwrap();
    }
    // And more behind the end.
    file.write_all_at(&[1; 9000], pages * PAGE).unwrap();
    let other = Bed::on(dir);
    assert_eq!(other.check(DB), before);
    assert_eq!(
        std::fs::read(other.file(DB, FileKind::Database)).unwrap(),
        before.1
    );
    // Cut off where the log writes all of the rest.
    let dir = bed.remains();
    std::fs::File::options()
        .write(true)
        .open(in_db(dir.path(), "database"))
        .unwrap()
        .set_len(old.len() as u64)
        .unwrap();
    assert_eq!(Bed::on(dir).check(DB), before);
}

/// Changes a byte of this page, from 0, of the database file.
fn spoil(dir: &Path, page: u64) {
    std::fs::File::options()
        .write(true)
        .open(in_db(dir, "database"))
        .unwrap()
        .write_all_at(b"!", page * PAGE + 3000)
        .unwrap();
}

/// As [`filled`], with a log that no longer has what filled it.
fn pruned() -> (Bed, Connection) {
    let bed = Bed::with_retention(tempfile::tempdir().unwrap(), Duration::ZERO);
    bed.store.set_role(Role::Primary);
    let c = bed.connect(DB);
    fill(&c);
    for i in 0..6 {
        std::thread::sleep(Duration::from_millis(110));
        c.execute("INSERT INTO u VALUES (?)", [i]).unwrap();
    }
    std::thread::sleep(Duration::from_millis(30));
    bed.check(DB);
    bed.store.prune();
    let log = bed.db(DB);
    assert!(log.log().first_txid() > 1, "something was removed");
    (bed, c)
}

#[test]
fn damage_that_the_log_has_the_bytes_of_is_mended() {
    let (bed, c) = filled("delete");
    drop(c);
    let before = bed.check(DB);
    let pages = before.1.len() as u64 / PAGE;
    bed.store.close();
    for page in [0, 5, pages - 1] {
        let dir = bed.remains();
        spoil(dir.path(), page);
        let other = Bed::on(dir);
        assert_eq!(other.check(DB), before, "page {page}");
        assert_eq!(other.store.fault_stats().faults()[DB], 1);
        assert_eq!(other.check_killed(DB), before, "it stays");
    }
}

#[test]
fn a_log_that_lost_its_last_record_does_not_take_the_transaction_back() {
    let (bed, c) = filled("delete");
    c.execute_batch("INSERT INTO u VALUES (7)").unwrap();
    bed.check(DB);
    let dir = bed.remains();
    let segment = segment_files(&in_db(dir.path(), "log")).pop().unwrap();
    let bytes = std::fs::read(&segment).unwrap();
    let end = bytes.iter().rposition(|b| *b != 0).unwrap();
    let file = std::fs::File::options().write(true).open(&segment).unwrap();
    file.write_all_at(&[bytes[end - 100] ^ 1], end as u64 - 100)
        .unwrap();
    let reason = broken(dir);
    assert!(
        reason.contains("its last transaction is damaged"),
        "{reason}"
    );
}

#[test]
fn damage_that_nothing_redoes_sets_the_database_aside() {
    let (bed, c) = pruned();
    drop(c);
    let before = bed.check(DB);
    let pages = before.1.len() as u64 / PAGE;
    bed.store.close();
    for page in [5, pages / 2] {
        let dir = bed.remains();
        spoil(dir.path(), page);
        let reason = broken(dir);
        assert!(reason.contains(&format!("page {} ", page + 1)), "{reason}");
    }
    // What the newest record has is mended from it: page 1 is in each.
    let dir = bed.remains();
    spoil(dir.path(), 0);
    assert_eq!(Bed::on(dir).check(DB), before);
    let dir = bed.remains();
    std::fs::File::options()
        .write(true)
        .open(in_db(dir.path(), "database"))
        .unwrap()
        .set_len(3 * PAGE)
        .unwrap();
    let reason = broken(dir);
    assert!(reason.contains("cut off"), "{reason}");
    let dir = bed.remains();
    std::fs::remove_file(in_db(dir.path(), "database")).unwrap();
    assert!(broken(dir).contains("cut off"));
}

#[test]
fn without_its_log_a_database_is_set_aside_and_left_as_it_is() {
    let (bed, _c) = filled("delete");
    bed.db(DB).checkpoint().unwrap();
    let database = std::fs::read(bed.file(DB, FileKind::Database)).unwrap();
    for keep_checksums in [true, false] {
        let dir = bed.remains();
        std::fs::remove_dir_all(in_db(dir.path(), "log")).unwrap();
        if !keep_checksums {
            std::fs::remove_file(in_db(dir.path(), "checksums")).unwrap();
        }
        let path = dir.path().to_owned();
        let other = Bed::on(dir);
        let reason = other.db(DB).broken().expect("set aside");
        assert!(reason.contains("log"), "{reason}");
        other.store.close();
        assert_eq!(std::fs::read(in_db(&path, "database")).unwrap(), database);
    }
}

#[test]
fn a_damaged_log_sets_the_database_aside_and_stays() {
    let (bed, _c) = filled("delete");
    let dir = bed.remains();
    let segment = segment_files(&in_db(dir.path(), "log")).remove(0);
    let file = std::fs::File::options().write(true).open(&segment).unwrap();
    file.write_all_at(b"????", 64 + 48 + 300).unwrap();
    let damaged = std::fs::read(&segment).unwrap();
    let path = dir.path().to_owned();
    let other = Bed::on(dir);
    let reason = other.db(DB).broken().expect("set aside");
    assert!(reason.contains("damaged"), "{reason}");
    other.store.close();
    let still = segment_files(&in_db(&path, "log")).remove(0);
    assert_eq!(std::fs::read(still).unwrap(), damaged);
}

#[test]
fn journals_and_wals_of_the_last_run_are_not_believed() {
    for mode in ["delete", "wal"] {
        let (bed, c) = filled(mode);
        let before = bed.check(DB);
        c.execute_batch("BEGIN; UPDATE t SET v = randomblob(90000)")
            .unwrap();
        c.cache_flush().unwrap();
        let dir = bed.remains();
        for file in ["journal", "wal", "shm"] {
            let mut bytes = std::fs::read(in_db(dir.path(), file)).unwrap_or_default();
            bytes.resize(bytes.len().max(5000), 0xd9);
            std::fs::write(in_db(dir.path(), file), bytes).unwrap();
        }
        let other = Bed::on(dir);
        assert_eq!(other.check(DB), before, "{mode}");
        for kind in [FileKind::Journal, FileKind::Wal, FileKind::Shm] {
            assert!(!other.file(DB, kind).exists());
        }
    }
}

/// Power loss: whatever of the log was not flushed is gone, while everything written to the
/// database file may have stayed.
#[test]
fn the_file_never_holds_more_than_the_flushed_log() {
    for (mode, synchronous) in [("wal", "NORMAL"), ("wal", "FULL"), ("delete", "FULL")] {
        let (bed, c) = filled(mode);
        c.execute_batch(&format!(
            "PRAGMA synchronous={synchronous}; PRAGMA wal_autocheckpoint=10"
        ))
        .unwrap();
        for round in 0..12 {
            c.execute_batch("UPDATE t SET v = randomblob(15000) WHERE k = 1 + abs(random()) % 5")
                .unwrap();
            let flushed = bed.db(DB).log().flushed_txid();
            let dir = bed.remains();
            let last = segment_files(&in_db(dir.path(), "log")).pop().unwrap();
            let segment = Segment::open(&Real, &last, 0).unwrap().segment.unwrap();
            if let Some(end) = segment.offset_of(flushed + 1) {
                segment.file.set_len(end).unwrap();
            }
            let other = Bed::on(dir);
            let (pos, _) = other.check(DB);
            assert_eq!(pos.txid, flushed, "{mode} {synchronous}, round {round}");
            other.store.set_role(Role::Primary);
            integrity(&other.connect(DB));
        }
    }
}

#[test]
fn a_pruned_log_still_recovers() {
    let (bed, c) = pruned();
    let before = bed.check(DB);
    let log = bed.db(DB);
    assert_eq!(log.log().last_txid(), before.0.txid, "never the newest");
    assert_eq!(bed.check_killed(DB), before);
    c.execute_batch("INSERT INTO u VALUES (99)").unwrap();
    let newest = bed.check_killed(DB);
    // Without its checksums the file is what the newest record says, as a whole, or nothing.
    let dir = bed.remains();
    std::fs::remove_file(in_db(dir.path(), "checksums")).unwrap();
    let other = Bed::on(dir);
    assert_eq!(other.check(DB), newest);
    assert_eq!(other.check_killed(DB), newest);
    let dir = bed.remains();
    std::fs::remove_file(in_db(dir.path(), "checksums")).unwrap();
    spoil(dir.path(), 5);
    assert!(broken(dir).contains("those of its bytes are"));
}

/// A page can be written to the WAL again as it was: the record does not hold it, and the database
/// file lacks it still.
#[test]
fn a_page_that_is_written_again_unchanged_is_still_redone() {
    let bed = Bed::primary();
    let c = bed.connect(DB);
    c.execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v)")
        .unwrap();
    set_mode(&c, "wal");
    c.execute_batch("PRAGMA wal_autocheckpoint=0; INSERT INTO t VALUES (1, zeroblob(3000))")
        .unwrap();
    let before = bed.check(DB).0;
    // Every page of the transaction before is in the WAL again, and one as it was.
    c.execute_batch("BEGIN; UPDATE t SET v = zeroblob(2999); UPDATE t SET v = zeroblob(3000); CREATE TABLE u(v); COMMIT")
        .unwrap();
    assert_eq!(bed.check(DB).0.txid, before.txid + 1);
    bed.db(DB).checkpoint().unwrap();
    bed.check_killed(DB);
}

#[test]
fn what_is_no_database_in_the_data_directory_is_left_alone() {
    let (bed, _c) = filled("delete");
    let before = bed.check(DB);
    let dir = bed.remains();
    let dbs = dir.path().join("dbs");
    std::fs::write(dbs.join("a file"), b"x").unwrap();
    std::fs::create_dir(dbs.join("bad-wal")).unwrap();
    std::fs::create_dir(dbs.join("empty.db")).unwrap();
    std::fs::create_dir(dbs.join("foreign.db")).unwrap();
    std::fs::write(dbs.join("foreign.db/database"), b"SQLite format 3\0").unwrap();
    std::fs::write(in_db(dir.path(), "notes.txt"), b"mine").unwrap();
    let path = dir.path().to_owned();
    let other = Bed::on(dir);
    assert_eq!(other.check(DB), before);
    let foreign = other.db("foreign.db").broken().expect("set aside");
    assert!(foreign.contains("without a transaction log"), "{foreign}");
    assert!(other.store.database("empty.db").is_none());
    other.store.close();
    for left in ["dbs/a file", "dbs/bad-wal", "dbs/foreign.db/database"] {
        assert!(path.join(left).exists(), "{left}");
    }
    assert!(in_db(&path, "notes.txt").exists());
}

/// Random transactions, each run of the node ended by a kill, all against plain SQLite.
#[test]
fn histories_survive_kills() {
    for seed in 0..6 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut bed = Bed::primary();
        let plain = Connection::open_in_memory().unwrap();
        let reference = |sql: &str| plain.execute_batch(sql).unwrap();
        reference("CREATE TABLE t(k INTEGER PRIMARY KEY, v)");
        let mut c = bed.connect(DB);
        c.execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v)")
            .unwrap();
        for _ in 0..40 {
            let k = rng.random_range(1..60);
            let n = rng.random_range(10..30000);
            let sql = match rng.random_range(0..12) {
                0..=4 => format!("INSERT OR REPLACE INTO t VALUES ({k}, zeroblob({n}))"),
                5..=6 => format!(
                    "UPDATE t SET v = printf('%.*c', {n}, 'x') WHERE k % 7 = {}",
                    k % 7
                ),
                7 => format!("DELETE FROM t WHERE k > {k}"),
                8 => "VACUUM".to_owned(),
                9 => {
                    let modes = ["delete", "truncate", "persist", "wal"];
                    let mode = modes[rng.random_range(0..4)];
                    assert_eq!(set_mode(&c, mode), mode);
                    continue;
                }
                10 => {
                    c.execute_batch("BEGIN; UPDATE t SET v = zeroblob(50000)")
                        .unwrap();
                    c.cache_flush().unwrap();
                    if rng.random() {
                        c.execute_batch("ROLLBACK").unwrap();
                        continue;
                    }
                    // Killed in the middle of it.
                    let next = bed.killed();
                    next.store.set_role(Role::Primary);
                    c = next.connect(DB);
                    bed = next;
                    continue;
                }
                _ => {
                    let next = bed.killed();
                    next.store.set_role(Role::Primary);
                    drop(c);
                    c = next.connect(DB);
                    bed = next;
                    continue;
                }
            };
            c.execute_batch(&sql).unwrap();
            reference(&sql);
        }
        bed.check_killed(DB);
        integrity(&c);
        let rows = |c: &Connection| -> Vec<(i64, Vec<u8>)> {
            let mut s = c
                .prepare("SELECT k, CAST(v AS BLOB) FROM t ORDER BY k")
                .unwrap();
            let rows = s.query_map([], |r| Ok((r.get(0)?, r.get(1)?))).unwrap();
            rows.map(Result::unwrap).collect()
        };
        assert_eq!(rows(&c), rows(&plain), "seed {seed}");
    }
}
