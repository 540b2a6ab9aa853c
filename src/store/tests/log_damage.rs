//! What a crash or a bad disk leaves of a log: a torn end is cut off and is never read again;
//! damage of what was on disk is an error that removes nothing.

use std::path::Path;
use std::time::Duration;

use super::log::{LONG, append, body, open_log, records, segment_files};
use crate::store::error::StoreError;
use crate::store::log::{Log, REPLACEMENT};
use crate::store::segment::SEGMENT_HEADER_SIZE;

type Files = Vec<(String, Vec<u8>)>;

fn load(dir: &Path) -> Files {
    segment_files(dir)
        .into_iter()
        .map(|p| {
            let name = p.file_name().unwrap().to_str().unwrap().to_owned();
            (name, std::fs::read(p).unwrap())
        })
        .collect()
}

/// Opens a log that consists of these files.
fn open(files: &Files) -> (tempfile::TempDir, Result<Log, StoreError>) {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    let log = open_log(dir.path(), LONG, 0);
    (dir, log)
}

fn expected(last: u64) -> Vec<(u64, u64, Vec<u8>)> {
    (1..=last).map(|t| (t, t, body(t, 200))).collect()
}

/// The log holds a prefix of the records, of at least `at_least`, and goes on from there with
/// nothing of what was behind it.
fn check_prefix(log: Log, dir: &Path, at_least: u64, what: &str) -> u64 {
    let last = log.last_txid();
    assert!(last >= at_least, "{what}: only {last} left");
    assert_eq!(records(&log), expected(last), "{what}");
    // As long as the lost one, so that what stood behind it would be found if it were there.
    let mut all = expected(last);
    all.push((last + 1, last + 1, body(55, 200)));
    append(&log, last + 1, last + 1, &body(55, 200));
    drop(log);
    let log = open_log(dir, LONG, 0).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(records(&log), all, "{what}, after the next append");
    last
}

/// One segment: records 1 to 3 on disk, 4 and 5 not known to be.
fn one_segment() -> Files {
    let dir = tempfile::tempdir().unwrap();
    let log = open_log(dir.path(), LONG, 0).unwrap();
    for txid in 1..=5 {
        append(&log, txid, txid, &body(txid, 200));
        if txid == 3 {
            log.flush_wait().unwrap();
        }
    }
    let used = log.stats().bytes as usize;
    drop(log);
    let mut files = load(dir.path());
    // Some of the preallocated zeros are enough.
    files[0].1.truncate(used + 512);
    files
}

/// Bytes of a record of `one_segment`: 48 and 200.
const RECORD: usize = 248;

#[test]
fn a_log_cut_anywhere_is_a_prefix() {
    let whole = one_segment();
    let start = SEGMENT_HEADER_SIZE as usize;
    for cut in 0..whole[0].1.len() {
        let mut files = whole.clone();
        files[0].1.truncate(cut);
        let (dir, log) = open(&files);
        let records = (cut.saturating_sub(start) / RECORD).min(5) as u64;
        let last = check_prefix(log.unwrap(), dir.path(), records, &format!("cut at {cut}"));
        assert_eq!(last, records);
    }
}

#[test]
fn zeros_from_anywhere_on_leave_a_prefix() {
    let whole = one_segment();
    let start = SEGMENT_HEADER_SIZE as usize;
    for from in (start..whole[0].1.len()).step_by(8) {
        let mut files = whole.clone();
        files[0].1[from..].fill(0);
        let (dir, log) = open(&files);
        let records = ((from - start) / RECORD).min(5) as u64;
        check_prefix(
            log.unwrap(),
            dir.path(),
            records,
            &format!("zeros at {from}"),
        );
    }
}

#[test]
fn flipped_bytes_in_the_unflushed_end_leave_a_prefix() {
    let whole = one_segment();
    let unflushed = SEGMENT_HEADER_SIZE as usize + 3 * RECORD;
    for at in unflushed..unflushed + 2 * RECORD {
        for mask in [1, 0x80, 0xff] {
            let mut files = whole.clone();
            files[0].1[at] ^= mask;
            let (dir, log) = open(&files);
            let what = format!("{mask:02x} at {at}");
            let last = check_prefix(log.unwrap(), dir.path(), 3, &what);
            assert!(last < 5, "{what} went unnoticed");
        }
    }
}

#[test]
fn damage_before_flushed_records_is_an_error_and_removes_nothing() {
    let whole = one_segment();
    let flushed = SEGMENT_HEADER_SIZE as usize + 3 * RECORD;
    for at in 0..flushed {
        // Unused bytes of the segment's header carry a checksum all the same.
        let mut files = whole.clone();
        files[0].1[at] ^= 0x40;
        let (dir, log) = open(&files);
        let e = log.err().unwrap_or_else(|| panic!("byte {at} flipped"));
        let said = e.to_string();
        assert!(said.contains("damaged"), "{at}: {said}");
        assert_eq!(load(dir.path()), files, "the evidence stays");
    }
}

/// Segments of one record each: 1 to 3 on disk, 4 and 5 not known to be.
fn five_segments() -> Files {
    let dir = tempfile::tempdir().unwrap();
    let log = open_log(dir.path(), Duration::ZERO, 0).unwrap();
    for txid in 1..=5 {
        append(&log, txid, txid, &body(txid, 200));
        if txid == 3 {
            log.flush_wait().unwrap();
        }
    }
    drop(log);
    let files = load(dir.path());
    assert_eq!(files.len(), 5);
    files
}

#[test]
fn a_missing_segment_ends_the_log_or_is_an_error() {
    let whole = five_segments();
    for missing in 1..=5usize {
        let mut files = whole.clone();
        files.remove(missing - 1);
        let (dir, log) = open(&files);
        match missing {
            // Pruned: the log begins later.
            1 => assert_eq!(records(&log.unwrap()), expected(5)[1..]),
            2 | 3 => {
                let said = log.err().expect("a gap in what was flushed").to_string();
                assert!(said.contains("missing"), "{said}");
                assert_eq!(load(dir.path()), files, "the evidence stays");
            }
            _ => {
                let last = check_prefix(log.unwrap(), dir.path(), 3, &format!("without {missing}"));
                assert_eq!(last, missing as u64 - 1);
            }
        }
    }
}

#[test]
fn an_empty_or_headerless_segment_counts_as_torn_only_at_the_end() {
    let whole = five_segments();
    for n in 1..=5usize {
        for keep in [0, 10, SEGMENT_HEADER_SIZE as usize, 70] {
            for zeros in [false, true] {
                let mut files = whole.clone();
                if zeros {
                    files[n - 1].1[keep..].fill(0);
                } else {
                    files[n - 1].1.truncate(keep);
                }
                let what = format!("segment {n} ends at {keep}, zeros {zeros}");
                let torn_header = zeros && keep == 10;
                let (dir, log) = open(&files);
                if n <= 3 || torn_header {
                    assert!(log.is_err(), "{what}");
                    assert_eq!(load(dir.path()), files, "{what}: the evidence stays");
                } else {
                    let last = check_prefix(log.unwrap(), dir.path(), 3, &what);
                    assert_eq!(last, n as u64 - 1, "{what}");
                }
            }
        }
    }
}

/// The tail of a segment that is not the last can be torn too: its pages and those of the next
/// were all unflushed.
#[test]
fn a_torn_end_before_a_lost_segment_is_never_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let log = open_log(dir.path(), LONG, 0).unwrap();
    for txid in 1..=4 {
        append(&log, txid, txid, &body(txid, 200));
    }
    drop(log);
    let log = open_log(dir.path(), Duration::ZERO, 0).unwrap();
    append(&log, 5, 5, &body(5, 200));
    drop(log);
    let mut files = load(dir.path());
    assert_eq!(files.len(), 2);
    // Record 3 is lost, 4 behind it is there; 5 was written by a node that knew of no flush.
    let third = SEGMENT_HEADER_SIZE as usize + 2 * RECORD;
    files[0].1[third..third + RECORD].fill(0);
    files[1].1.truncate(SEGMENT_HEADER_SIZE as usize);
    let (dir, log) = open(&files);
    let last = check_prefix(log.unwrap(), dir.path(), 2, "record 3 of 5 lost");
    assert_eq!(last, 2);
}

#[test]
fn other_files_are_no_segments() {
    let mut files = one_segment();
    for name in [
        "x",
        "0000000000000001.log~",
        "1.log",
        "0000000000000001.ltx",
    ] {
        files.push((name.to_owned(), vec![7; 300]));
    }
    let (_dir, log) = open(&files);
    assert_eq!(records(&log.unwrap()), expected(5));
}

#[test]
fn a_snapshot_interrupted_anywhere_replaces_the_log_or_does_not() {
    let old = five_segments();
    let dir = tempfile::tempdir().unwrap();
    let log = open_log(dir.path(), LONG, 0).unwrap();
    append(&log, 1, 3, &body(33, 500));
    drop(log);
    let mut snapshot = load(dir.path()).remove(0).1;
    let used = SEGMENT_HEADER_SIZE as usize + 48 + 500;
    snapshot.truncate(used + 100);
    for cut in (0..=snapshot.len()).step_by(7).chain([used - 1, used]) {
        // Before the old segments go, and while they go.
        for left in [5, 3, 0] {
            if cut < used && left < 5 {
                continue;
            }
            let mut files: Files = old[5 - left..].to_vec();
            files.push((REPLACEMENT.to_owned(), snapshot[..cut].to_vec()));
            let (dir, log) = open(&files);
            let log = log.unwrap();
            let what = format!("snapshot cut at {cut}, {left} segments left");
            let replaced = vec![(1, 3, body(33, 500))];
            let expected = if cut < used { expected(5) } else { replaced };
            assert_eq!(records(&log), expected, "{what}");
            drop(log);
            let log = open_log(dir.path(), LONG, 0).unwrap();
            assert_eq!(records(&log), expected, "{what}, opened again");
            assert!(!dir.path().join(REPLACEMENT).exists(), "{what}");
        }
    }
}

#[test]
fn records_that_need_no_check_are_taken_by_their_headers() {
    let mut files = one_segment();
    // A body that a saved checkpoint covers is not read at the start; its header is.
    files[0].1[SEGMENT_HEADER_SIZE as usize + 48 + 10] ^= 1;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(&files[0].0), &files[0].1).unwrap();
    assert_eq!(open_log(dir.path(), LONG, 3).unwrap().last_txid(), 5);
    assert!(open_log(dir.path(), LONG, 0).is_err());
}
