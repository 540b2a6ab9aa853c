//! The scrub beside writers: it takes no change for damage, and finds damage while all changes.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rusqlite::Connection;

use super::bed::{Bed, integrity, set_mode};
use super::log::segment_files;
use crate::store::{Scrub, ScrubOptions};

const DB: &str = "a.db";
const MODES: [&str; 4] = ["delete", "truncate", "persist", "wal"];

/// One pass after the other, as fast as can be.
fn scrub(bed: &Bed) -> Scrub {
    let options = ScrubOptions {
        interval: Duration::from_millis(1),
        rate: 1 << 40,
    };
    bed.store.scrub(options).unwrap()
}

fn passes(bed: &Bed) -> u64 {
    use std::sync::atomic::Ordering;
    bed.store.fault_stats().passes.load(Ordering::Relaxed)
}

/// A change of some pages, or of many, or of the size.
fn change(c: &Connection, random: &mut StdRng) {
    let sql = match random.random_range(0..12) {
        0 => "VACUUM".to_owned(),
        1 => "PRAGMA wal_checkpoint(TRUNCATE)".to_owned(),
        2 => "DELETE FROM t WHERE k % 3 = 0".to_owned(),
        3 => "BEGIN; UPDATE t SET v = randomblob(3000); ROLLBACK".to_owned(),
        4 => "UPDATE t SET v = randomblob(2000)".to_owned(),
        n => format!("INSERT INTO t(v) VALUES (randomblob({}))", n * 900),
    };
    c.execute_batch(&sql).unwrap();
}

#[test]
fn what_changes_is_not_taken_for_damage() {
    for mode in MODES {
        let (primary, replica) = (Bed::primary(), Bed::replica());
        let c = primary.connect(DB);
        set_mode(&c, mode);
        c.execute_batch("PRAGMA cache_size=10; CREATE TABLE t(k INTEGER PRIMARY KEY, v)")
            .unwrap();
        let running = [scrub(&primary), scrub(&replica)];
        let mut random = StdRng::seed_from_u64(7);
        let until = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until || passes(&primary).min(passes(&replica)) < 5 {
            change(&c, &mut random);
            replica.follow(&primary, DB);
        }
        drop(running);
        for bed in [&primary, &replica] {
            let faults = bed.store.fault_stats().faults();
            assert!(faults.is_empty(), "{mode}: {faults:?}");
        }
        integrity(&c);
        let newest = primary.check_killed(DB);
        assert_eq!(replica.check(DB), newest, "{mode}");
    }
}

#[test]
fn a_log_that_is_written_all_the_time_gets_rid_of_a_damaged_segment() {
    for mode in MODES {
        let bed = Bed::primary();
        let c = bed.connect(DB);
        set_mode(&c, mode);
        c.execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v)")
            .unwrap();
        let mut random = StdRng::seed_from_u64(8);
        (0..20).for_each(|_| change(&c, &mut random));
        let log = bed.dir.path().join("dbs").join(DB).join("log");
        let segment = segment_files(&log).remove(0);
        let file = std::fs::File::options().write(true).open(segment).unwrap();
        file.write_all_at(b"????", 64 + 48 + 200).unwrap();
        let running = scrub(&bed);
        let until = Instant::now() + Duration::from_secs(20);
        while bed.store.fault_stats().faults().is_empty() {
            assert!(Instant::now() < until, "{mode}: it is still there");
            change(&c, &mut random);
        }
        let found = passes(&bed);
        while passes(&bed) < found + 2 {
            change(&c, &mut random);
        }
        drop(running);
        assert_eq!(bed.store.fault_stats().faults()[DB], 1, "{mode}: once");
        integrity(&c);
        bed.check_killed(DB);
    }
}
