//! What a replica makes of what it receives: it applies what follows, and anything else changes
//! nothing.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::Connection;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::bed::{Bed, checksum, image, integrity, set_mode, snapshot};
use crate::ltx::{self, CHECKSUM_FLAG, Encoder, Header, LtxError, Pos};
use crate::store::{Common, FileKind, Next, Received, Role, StoreError};

const DB: &str = "a.db";

fn fixtures() -> PathBuf {
    Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../shared/fixtures/ltx"
    ))
    .to_owned()
}

/// The files of a case, each with what its manifest says of it.
fn case(name: &str) -> Vec<(Vec<u8>, Value)> {
    let dir = fixtures().join(name);
    let manifest = std::fs::read(dir.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let entries = manifest["ltx"].as_array().unwrap().iter();
    entries
        .filter_map(|e| {
            let bytes = std::fs::read(dir.join(e["file"].as_str().unwrap())).ok()?;
            Some((bytes, e.clone()))
        })
        .collect()
}

fn hex(v: &Value) -> u64 {
    u64::from_str_radix(v.as_str().unwrap(), 16).unwrap()
}

fn receive(bed: &Bed, bytes: &[u8]) -> Result<Received, StoreError> {
    bed.receive(DB, bytes)
}

/// A primary with some transactions.
fn filled(mode: &str, rows: usize) -> (Bed, Connection) {
    let bed = Bed::primary();
    let c = bed.connect(DB);
    set_mode(&c, mode);
    c.execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v)")
        .unwrap();
    for _ in 0..rows {
        c.execute_batch("INSERT INTO t(v) VALUES (randomblob(9000))")
            .unwrap();
    }
    bed.db(DB).settle();
    (bed, c)
}

/// Everything that a refusal must leave as it is.
fn untouched(bed: &Bed) -> (Pos, Vec<u8>, u64) {
    let (pos, image) = bed.check(DB);
    (pos, image, bed.db(DB).log_stats().records)
}

#[test]
fn golden_files_give_golden_databases() {
    let mut cases = 0;
    for entry in std::fs::read_dir(fixtures()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name == "lockpage-65536" {
            continue;
        }
        cases += 1;
        let bed = Bed::replica();
        for (bytes, says) in case(&name) {
            let txid = hex(&says["max_txid"]);
            let what = format!("{name}, TXID {txid}");
            if says["db_after"]["equals_post_apply"] == Value::Bool(false) {
                let before = untouched(&bed);
                let e = receive(&bed, &bytes).expect_err(&what);
                let mismatch = matches!(
                    e,
                    StoreError::Ltx {
                        source: LtxError::PostApplyChecksum { .. },
                        ..
                    }
                );
                assert!(mismatch, "{what}: {e}");
                assert_eq!(untouched(&bed), before, "{what}");
                break;
            }
            let pos = Pos {
                txid,
                checksum: hex(&says["post_apply_checksum"]),
            };
            let got = receive(&bed, &bytes).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(got, Received::Applied(pos), "{what}");
            let (at, image) = bed.check_or_dropped(DB);
            assert_eq!(at, pos, "{what}");
            if !image.is_empty() {
                let digest = Sha256::digest(&image);
                let digest: String = digest.iter().map(|b| format!("{b:02x}")).collect();
                assert_eq!(digest, says["db_after"]["sha256"], "{what}");
            }
        }
        let after = bed.check_or_dropped(DB);
        assert_eq!(bed.killed().check_or_dropped(DB), after, "{name}");
        assert_eq!(bed.restarted().check_or_dropped(DB), after, "{name}");
    }
    assert!(cases >= 15, "only {cases} cases");
}

impl Bed {
    fn check_or_dropped(&self, name: &str) -> (Pos, Vec<u8>) {
        let db = self.db(name);
        db.settle();
        if db.page_count() > 0 {
            return self.check(name);
        }
        assert_eq!(db.broken(), None);
        assert!(db.file(FileKind::Database).is_none());
        assert_eq!(db.pos().checksum, CHECKSUM_FLAG);
        (db.pos(), Vec::new())
    }
}

#[test]
fn the_defective_transaction_of_litefs_is_refused_and_a_snapshot_goes_past_it() {
    let files = case("switch-delete-wal-delete");
    let bed = Bed::replica();
    for (bytes, _) in &files[..5] {
        receive(&bed, bytes).unwrap();
    }
    let before = untouched(&bed);
    assert!(receive(&bed, &files[5].0).is_err());
    let e = receive(&bed, &files[6].0).unwrap_err();
    assert!(matches!(e, StoreError::PositionMismatch { .. }), "{e}");
    assert_eq!(untouched(&bed), before);
    let (other, _c) = filled("delete", 9);
    let (pos, bytes) = snapshot(&other.db(DB));
    assert_eq!(receive(&bed, &bytes).unwrap(), Received::Applied(pos));
    assert_eq!(bed.check_killed(DB), other.check(DB));
}

#[test]
fn a_transaction_that_does_not_follow_changes_nothing() {
    for name in ["delete-4096-lz4", "wal-4096-raw"] {
        let files = case(name);
        let bed = Bed::replica();
        // Without what it builds on there is no database.
        let e = receive(&bed, &files[1].0).unwrap_err();
        assert!(matches!(e, StoreError::PositionMismatch { .. }), "{e}");
        assert!(bed.store.database(DB).is_none(), "nothing came to be");
        assert!(!bed.dir.path().join("dbs").join(DB).exists());
        for (bytes, _) in &files[..3] {
            receive(&bed, bytes).unwrap();
        }
        let before = untouched(&bed);
        for (bytes, _) in [&files[1], &files[4], &files[5]] {
            let e = receive(&bed, bytes).unwrap_err();
            assert!(matches!(e, StoreError::PositionMismatch { .. }), "{e}");
            assert_eq!(untouched(&bed), before);
        }
        assert_eq!(receive(&bed, &files[2].0).unwrap(), Received::Known);
        assert_eq!(untouched(&bed), before);
        // The same TXID on another state.
        let other = case("autovacuum-truncate");
        assert!(receive(&bed, &other[3].0).is_err());
        assert_eq!(untouched(&bed), before);
        receive(&bed, &files[3].0).unwrap();
        bed.check_killed(DB);
    }
}

#[test]
fn a_file_that_is_not_whole_changes_nothing() {
    for name in ["delete-512-lz4", "wal-4096-raw"] {
        let files = case(name);
        let bed = Bed::replica();
        for (bytes, _) in &files[..2] {
            receive(&bed, bytes).unwrap();
        }
        let before = untouched(&bed);
        let good = &files[2].0;
        let step = good.len() / 97 + 1;
        for cut in (0..good.len()).step_by(step) {
            assert!(receive(&bed, &good[..cut]).is_err(), "{name} cut at {cut}");
        }
        for at in (0..good.len()).step_by(step).chain(0..ltx::HEADER_SIZE) {
            let mut bad = good.clone();
            bad[at] ^= 0x11;
            assert!(receive(&bed, &bad).is_err(), "{name} flipped at {at}");
        }
        assert_eq!(untouched(&bed), before, "{name}");
        // Exactly one file is taken from the reader.
        let mut stream = good.clone();
        stream.extend_from_slice(b"the next frame");
        let mut reader = &stream[..];
        bed.store
            .receive(DB, &mut reader, &mut |_, _| Common::Unknown)
            .unwrap();
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "the next frame");
    }
}

/// How many files lie in the data directory that belong to nothing.
fn loose(bed: &Bed) -> usize {
    let dir = bed.dir.path().join("loose");
    std::fs::read_dir(dir).map_or(0, Iterator::count)
}

/// The bytes of the log's record that begins with this TXID.
fn logged(bed: &Bed, txid: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let record = bed.db(DB).log().read(txid).unwrap();
    let mut body = record.expect("a record").body;
    body.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_large_file_becomes_a_segment_of_the_log_as_it_came() {
    for mode in ["delete", "wal"] {
        let (primary, c) = filled(mode, 20);
        let (pos, first) = snapshot(&primary.db(DB));
        let bed = Bed::replica();
        let mut flipped = first.clone();
        flipped[first.len() / 2] ^= 1;
        for bad in [&first[..first.len() - 1], &flipped] {
            assert!(receive(&bed, bad).is_err());
            assert_eq!(loose(&bed), 0, "{mode}");
        }
        assert_eq!(receive(&bed, &first).unwrap(), Received::Applied(pos));
        assert_eq!(logged(&bed, 1), first);
        assert_eq!(bed.check_killed(DB), primary.check(DB));

        c.execute_batch("INSERT INTO t(v) VALUES (randomblob(300000))")
            .unwrap();
        c.execute_batch("INSERT INTO t(v) VALUES (1)").unwrap();
        bed.follow(&primary, DB);
        assert!(logged(&bed, pos.txid + 1).len() > 300_000);
        assert_eq!(bed.db(DB).log_stats().records, 3);
        assert_eq!(bed.check_killed(DB), primary.check(DB));

        let (pos, second) = snapshot(&primary.db(DB));
        let (other, _c) = filled(mode, 30);
        let (_, foreign) = snapshot(&other.db(DB));
        assert!(receive(&bed, &foreign).is_ok());
        assert_eq!(bed.check_killed(DB), other.check(DB));
        assert_eq!(receive(&bed, &second).unwrap(), Received::Applied(pos));
        assert_eq!(logged(&bed, 1), second);
        assert_eq!(bed.db(DB).log_stats().records, 1);
        assert_eq!(bed.check_killed(DB), primary.check(DB));
        assert_eq!(loose(&bed), 0, "{mode}");
    }
}

#[test]
fn what_was_arriving_when_the_node_ended_is_gone_at_the_next_start() {
    let bed = Bed::replica();
    let left = bed.remains();
    let dir = left.path().join("loose");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("0"), "half").unwrap();
    let bed = Bed::on(left);
    assert_eq!(loose(&bed), 0);
}

#[test]
fn names_from_the_network_are_checked() {
    let bed = Bed::replica();
    let files = case("delete-4096-raw");
    let long = "x".repeat(300);
    for name in ["", "..", "../a.db", "a/b", "a.db-wal", ".primary", &long] {
        let e = bed.receive(name, &files[0].0).unwrap_err();
        assert!(matches!(e, StoreError::Name(_)), "{name:?}: {e}");
    }
    assert!(bed.store.databases().is_empty());
}

/// A transaction made by hand: these pages on top of a position.
fn transaction(
    on: Pos,
    page_size: u32,
    commit: u32,
    pages: &[(u32, Vec<u8>)],
    post: u64,
) -> Vec<u8> {
    let header = Header {
        compressed: false,
        page_size,
        commit,
        min_txid: on.txid + 1,
        max_txid: on.txid + 1,
        timestamp: 1,
        pre_apply_checksum: on.checksum,
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: 7,
    };
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, header).unwrap();
    for (pgno, page) in pages {
        encoder.page(*pgno, page).unwrap();
    }
    encoder.finish(post).unwrap();
    bytes
}

#[test]
fn a_wrong_checksum_is_refused_whatever_the_page_size() {
    for mode in ["delete", "wal"] {
        let (primary, _c) = filled(mode, 3);
        let bed = Bed::replica();
        bed.follow(&primary, DB);
        let before = untouched(&bed);
        let (on, image) = (before.0, &before.1);
        let count = (image.len() / 4096) as u32;
        let mut page = image[4096..8192].to_vec();
        page[100] ^= 1;
        let wrong = on.checksum ^ 1 | CHECKSUM_FLAG;
        let bad = transaction(on, 4096, count, &[(2, page.clone())], wrong);
        assert!(receive(&bed, &bad).is_err());
        // The same as 512-byte pages, of which some are missing, and then with a wrong sum.
        let mut small = image.clone();
        small[16..18].copy_from_slice(&512u16.to_be_bytes());
        let pages: Vec<(u32, Vec<u8>)> =
            (1..).zip(small.chunks_exact(512).map(Vec::from)).collect();
        let sum = checksum(&small, 512);
        let part = transaction(on, 512, pages.len() as u32, &pages[..9], sum);
        assert!(receive(&bed, &part).is_err(), "{mode}: pages are missing");
        let bad = transaction(on, 512, pages.len() as u32, &pages, sum ^ 2);
        assert!(receive(&bed, &bad).is_err(), "{mode}: a wrong sum");
        assert_eq!(untouched(&bed), before, "{mode}");
        let good = transaction(on, 512, pages.len() as u32, &pages, sum);
        receive(&bed, &good).unwrap();
        assert_eq!(bed.db(DB).page_size(), 512);
        assert_eq!(bed.check_killed(DB).1, small, "{mode}");
    }
}

#[test]
fn a_snapshot_takes_the_place_of_any_other_state() {
    for (mine, theirs) in [
        ("delete", "delete"),
        ("wal", "wal"),
        ("delete", "wal"),
        ("wal", "delete"),
    ] {
        // Fewer, as many, and more transactions than this node has.
        for rows in [1, 4, 5, 9] {
            let (old, _c) = filled(mine, if mine == "wal" { 4 } else { 5 });
            let bed = Bed::replica();
            bed.follow(&old, DB);
            for checkpoint in [false, true] {
                let what = format!("{mine} by {theirs}, {rows} rows, checkpoint {checkpoint}");
                if checkpoint {
                    bed.db(DB).checkpoint().unwrap();
                }
                let (new, d) = filled(theirs, rows);
                let (pos, bytes) = snapshot(&new.db(DB));
                let copy = bed.killed();
                assert_eq!(
                    receive(&copy, &bytes).unwrap(),
                    Received::Applied(pos),
                    "{what}"
                );
                assert_eq!(copy.check_killed(DB), new.check(DB), "{what}");
                assert_eq!(copy.db(DB).log_stats().records, 1, "{what}");
                // And on from there, also after the log was pruned.
                d.execute_batch("INSERT INTO t(v) VALUES (1); INSERT INTO t(v) VALUES (2)")
                    .unwrap();
                copy.follow(&new, DB);
                assert_eq!(copy.check_killed(DB), new.check(DB), "{what}");
                copy.db(DB).prune_log(Duration::ZERO).unwrap();
                assert_eq!(copy.check_killed(DB), new.check(DB), "{what}, pruned");
                assert_eq!(copy.restarted().check(DB), new.check(DB), "{what}, stopped");
            }
        }
    }
}

/// The last checkpoint was of another history, with more transactions.
#[test]
fn pruning_after_a_snapshot_goes_by_the_history_that_it_began() {
    for mode in ["delete", "wal"] {
        let (old, _c) = filled(mode, 9);
        let bed = Bed::with_retention(tempfile::tempdir().unwrap(), Duration::ZERO);
        bed.follow(&old, DB);
        bed.db(DB).checkpoint().unwrap();
        let (new, d) = filled(mode, 2);
        receive(&bed, &snapshot(&new.db(DB)).1).unwrap();
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(110));
            d.execute_batch("INSERT INTO t(v) VALUES (1)").unwrap();
            bed.follow(&new, DB);
        }
        std::thread::sleep(Duration::from_millis(30));
        bed.db(DB).settle();
        bed.store.prune();
        assert_eq!(bed.check_killed(DB), new.check(DB), "{mode}");
    }
}

/// The replica was stopped cleanly, with more transactions than the cluster has now.
#[test]
fn what_a_stop_left_for_litefs_is_not_taken_for_news() {
    let (old, _c) = filled("delete", 9);
    let bed = Bed::replica();
    bed.follow(&old, DB);
    let bed = bed.restarted();
    let (new, _d) = filled("delete", 2);
    receive(&bed, &snapshot(&new.db(DB)).1).unwrap();
    assert_eq!(bed.check_killed(DB), new.check(DB));
    assert_eq!(bed.restarted().check(DB), new.check(DB));
}

#[test]
fn a_set_aside_database_gives_way_to_a_snapshot_and_is_kept() {
    let (primary, c) = filled("delete", 5);
    let bed = Bed::replica();
    bed.follow(&primary, DB);
    let dir = bed.remains();
    let log = dir.path().join("dbs").join(DB).join("log");
    std::fs::remove_dir_all(&log).unwrap();
    bed.db(DB).checkpoint().unwrap();
    std::fs::copy(
        bed.dir.path().join("dbs").join(DB).join("checksums"),
        dir.path().join("dbs").join(DB).join("checksums"),
    )
    .unwrap();
    let bed = Bed::on(dir);
    assert!(bed.db(DB).broken().is_some());
    c.execute_batch("INSERT INTO t(v) VALUES (1)").unwrap();
    primary.db(DB).settle();
    let on = primary.db(DB).pos();
    // A transaction does not mend it.
    let page = vec![0; 4096];
    let e = receive(&bed, &transaction(on, 4096, 9, &[(2, page)], CHECKSUM_FLAG)).unwrap_err();
    assert!(matches!(e, StoreError::Broken { .. }), "{e}");
    let (pos, bytes) = snapshot(&primary.db(DB));
    assert_eq!(receive(&bed, &bytes).unwrap(), Received::Applied(pos));
    assert_eq!(bed.check_killed(DB), primary.check(DB));
    let kept: Vec<_> = std::fs::read_dir(bed.dir.path().join("set-aside"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    assert_eq!(kept.len(), 1);
    assert!(kept[0].join("database").exists(), "the evidence");
}

#[test]
fn a_node_knows_its_own_transactions() {
    let (bed, _c) = filled("delete", 3);
    let db = bed.db(DB);
    let before = bed.check(DB);
    for txid in 2..=before.0.txid {
        let mut record = db.log().read(txid).unwrap().unwrap();
        let mut bytes = Vec::new();
        record.body.read_to_end(&mut bytes).unwrap();
        assert_eq!(receive(&bed, &bytes).unwrap(), Received::Known);
    }
    assert_eq!(bed.check(DB), before);
}

#[test]
fn a_replica_follows_in_every_mode_and_can_take_over() {
    for mode in ["delete", "truncate", "persist", "wal"] {
        let primary = Bed::primary();
        let replica = Bed::replica();
        let c = primary.connect(DB);
        set_mode(&c, mode);
        for sql in [
            "CREATE TABLE t(k INTEGER PRIMARY KEY, v)",
            "INSERT INTO t(v) VALUES (randomblob(5000000))",
            "DELETE FROM t",
            "INSERT INTO t(v) VALUES (randomblob(3000)), (randomblob(70000))",
            "VACUUM",
            "PRAGMA journal_mode=delete",
            "PRAGMA page_size=1024",
            "VACUUM",
            "PRAGMA journal_mode=wal",
            "UPDATE t SET v = randomblob(900000)",
            "UPDATE t SET v = randomblob(9000)",
            "PRAGMA journal_mode=truncate",
            "INSERT INTO t(v) VALUES (1)",
        ] {
            let mut statement = c.prepare(sql).unwrap();
            let mut rows = statement.query([]).unwrap();
            while rows.next().unwrap().is_some() {}
            drop(rows);
            drop(statement);
            replica.follow(&primary, DB);
            assert_eq!(replica.check(DB), primary.check(DB), "{mode}: {sql}");
            assert_eq!(
                replica.killed().check(DB),
                primary.check(DB),
                "{mode}: {sql}"
            );
        }
        let end = replica.check(DB);
        replica.store.set_role(Role::Primary);
        let d = replica.connect(DB);
        integrity(&d);
        d.execute_batch("INSERT INTO t(v) VALUES (2)").unwrap();
        assert_eq!(replica.check_killed(DB).0.txid, end.0.txid + 1);
        // The old primary follows the new one.
        drop(c);
        primary.store.set_role(Role::Replica { hostname: None });
        primary.follow(&replica, DB);
        assert_eq!(primary.check_killed(DB), replica.check(DB));
    }
}

#[test]
fn readers_of_a_replica_keep_their_snapshot_and_hold_nothing_up() {
    let (primary, c) = filled("wal", 3);
    let replica = Bed::replica();
    replica.follow(&primary, DB);
    let reader = replica.connect(DB);
    let count = |c: &Connection| -> i64 {
        c.query_row("SELECT count(*) FROM t", [], |r| r.get(0))
            .unwrap()
    };
    assert_eq!(count(&reader), 3);
    reader.execute_batch("BEGIN").unwrap();
    assert_eq!(count(&reader), 3);
    // More frames than a checkpoint is due for.
    for _ in 0..6 {
        c.execute_batch("INSERT INTO t(v) VALUES (randomblob(1500000))")
            .unwrap();
        replica.follow(&primary, DB);
        assert_eq!(count(&reader), 3, "the snapshot of the transaction");
    }
    assert_eq!(replica.check_killed(DB), primary.check(DB));
    reader.execute_batch("COMMIT").unwrap();
    assert_eq!(count(&reader), 9);
    for _ in 0..3 {
        c.execute_batch("INSERT INTO t(v) VALUES (randomblob(5000000))")
            .unwrap();
        replica.follow(&primary, DB);
        integrity(&reader);
    }
    assert_eq!(count(&reader), 12);
    assert_eq!(replica.check_killed(DB), primary.check(DB));
    let wal = std::fs::metadata(replica.file(DB, FileKind::Wal))
        .unwrap()
        .len();
    assert!(wal < 20 << 20, "the WAL was started over: {wal} bytes");
}

#[test]
fn readers_of_a_replica_without_a_wal_are_waited_for() {
    let (primary, c) = filled("delete", 3);
    let replica = Bed::replica();
    replica.follow(&primary, DB);
    let before = replica.check(DB);
    let reader = replica.connect(DB);
    reader.execute_batch("BEGIN; SELECT * FROM t").unwrap();
    c.execute_batch("INSERT INTO t(v) VALUES (1)").unwrap();
    let followed = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            replica.follow(&primary, DB);
            followed.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(!followed.load(std::sync::atomic::Ordering::SeqCst));
        assert_eq!(image(&replica.db(DB)), before);
        reader.execute_batch("COMMIT").unwrap();
    });
    assert_eq!(replica.check_killed(DB), primary.check(DB));
    integrity(&reader);
}

#[test]
fn any_position_gets_an_answer() {
    let (bed, _c) = filled("delete", 3);
    let db = bed.db(DB);
    let here = db.pos();
    let at = |txid, checksum| db.record_after(Pos { txid, checksum }).unwrap();
    assert!(matches!(at(here.txid, here.checksum), Next::UpToDate));
    for (txid, checksum) in [
        (0, 0),
        (here.txid, 1),
        (here.txid - 1, 1),
        (here.txid + 1, here.checksum),
        (u64::MAX, u64::MAX),
    ] {
        assert!(
            matches!(at(txid, checksum), Next::Snapshot),
            "{txid} {checksum}"
        );
    }
}
