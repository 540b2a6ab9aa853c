//! The log: what is appended is read back, across reopening, pruning, replacement and failures.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proptest::prelude::*;

use crate::store::log::Log;
use crate::store::{Options, StoreError};

/// Segments end by size alone.
/// The log in this directory, on the real disk.
pub(super) fn open_log(
    dir: &Path,
    segment_age: Duration,
    verified: u64,
) -> Result<Log, StoreError> {
    Log::open(&Options::new(""), dir, segment_age, verified)
}

pub(super) const LONG: Duration = Duration::from_secs(3600);

/// Bytes that only this record has; the log asks nothing of them but a length.
pub(super) fn body(txid: u64, len: usize) -> Vec<u8> {
    let mut x = txid.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let bytes = std::iter::repeat_with(|| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    });
    bytes.take(len).collect()
}

pub(super) fn append(log: &Log, min: u64, max: u64, bytes: &[u8]) {
    let mut a = log.begin(min, max).unwrap();
    a.write_all(bytes).unwrap();
    a.commit().unwrap();
}

pub(super) fn read(log: &Log, min: u64) -> Option<(u64, Vec<u8>)> {
    let mut record = log.read(min).unwrap()?;
    assert_eq!(record.header.min_txid, min);
    let mut bytes = Vec::new();
    record.body.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, record.header.length);
    Some((record.header.max_txid, bytes))
}

/// All records as `(min, max, bytes)`, in order and without a gap.
pub(super) fn records(log: &Log) -> Vec<(u64, u64, Vec<u8>)> {
    let (mut next, last) = (log.first_txid(), log.last_txid());
    let mut all = Vec::new();
    while next != 0 && next <= last {
        let (max, bytes) = read(log, next).expect("no gap");
        all.push((next, max, bytes));
        next = max + 1;
    }
    assert!(read(log, last + 1).is_none());
    all
}

/// The segment files, oldest first.
pub(super) fn segment_files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    files.sort();
    files
}

#[test]
fn a_log_is_empty_then_holds_what_was_appended() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db/log");
    let log = open_log(&path, LONG, 0).unwrap();
    assert_eq!((log.first_txid(), log.last_txid()), (0, 0));
    assert!(read(&log, 1).is_none() && read(&log, 0).is_none());
    let sizes = [200, 129, 65_537, 1 << 20, (1 << 20) + 7, 3 << 20, 200];
    let mut expected = Vec::new();
    for (i, len) in sizes.into_iter().enumerate() {
        let txid = i as u64 + 1;
        append(&log, txid, txid, &body(txid, len));
        expected.push((txid, txid, body(txid, len)));
        assert_eq!(records(&log), expected);
    }
    assert_eq!(log.stats().records, sizes.len() as u64);
    assert_eq!(log.flushed_txid(), 0);
    log.flush_wait().unwrap();
    assert_eq!(log.flushed_txid(), sizes.len() as u64);
    drop(log);
    let log = open_log(&path, LONG, 0).unwrap();
    assert_eq!(records(&log), expected);
    assert_eq!(log.flushed_txid(), sizes.len() as u64);
}

#[test]
fn the_preallocated_rest_is_zeros_and_is_given_back_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let log = open_log(dir.path(), LONG, 0).unwrap();
    append(&log, 1, 1, &body(1, 300));
    let file = segment_files(dir.path()).remove(0);
    let bytes = std::fs::read(&file).unwrap();
    let used = log.stats().bytes as usize;
    assert!(
        bytes.len() >= used + 4096,
        "{} bytes preallocated",
        bytes.len()
    );
    assert!(bytes[used..].iter().all(|b| *b == 0));
    drop(log);
    let log = open_log(dir.path(), LONG, 0).unwrap();
    append(&log, 2, 2, &body(2, 300));
    log.close().unwrap();
    assert_eq!(
        std::fs::metadata(&file).unwrap().len(),
        log.stats().bytes,
        "nothing behind the last record"
    );
    append(&log, 3, 3, &body(3, 300));
    drop(log);
    assert_eq!(
        open_log(dir.path(), LONG, 0).unwrap().last_txid(),
        3,
        "a log that was closed can go on"
    );
}

#[test]
fn segments_end_by_size_and_by_age() {
    let dir = tempfile::tempdir().unwrap();
    let log = open_log(dir.path(), LONG, 0).unwrap();
    for txid in 1..=10 {
        append(&log, txid, txid, &body(txid, 1 << 20));
    }
    let n = segment_files(dir.path()).len();
    assert!((2..=3).contains(&n), "{n} segments for 10 MiB");
    drop(log);
    let log = open_log(dir.path(), Duration::ZERO, 0).unwrap();
    append(&log, 11, 11, &body(11, 200));
    append(&log, 12, 12, &body(12, 200));
    assert_eq!(segment_files(dir.path()).len(), n + 2);
    assert_eq!(records(&log).len(), 12);
}

#[test]
fn pruning_keeps_what_is_needed_and_the_newest() {
    let dir = tempfile::tempdir().unwrap();
    let log = open_log(dir.path(), Duration::ZERO, 0).unwrap();
    for txid in 1..=6 {
        append(&log, txid, txid, &body(txid, 200));
    }
    assert_eq!(log.prune(6, LONG).unwrap(), 0, "none is that old");
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(log.prune(3, Duration::ZERO).unwrap(), 3);
    assert_eq!(log.first_txid(), 4);
    assert!(read(&log, 3).is_none());
    assert_eq!(log.prune(3, Duration::ZERO).unwrap(), 0);
    assert_eq!(
        log.prune(u64::MAX, Duration::ZERO).unwrap(),
        2,
        "all but the newest"
    );
    assert_eq!(records(&log), vec![(6, 6, body(6, 200))]);
    drop(log);
    let log = open_log(dir.path(), LONG, 0).unwrap();
    assert_eq!(records(&log), vec![(6, 6, body(6, 200))]);
    append(&log, 7, 7, &body(7, 200));
    assert_eq!(records(&log).len(), 2);
}

#[test]
fn a_record_that_is_read_outlives_its_removal() {
    let dir = tempfile::tempdir().unwrap();
    let log = open_log(dir.path(), Duration::ZERO, 0).unwrap();
    append(&log, 1, 1, &body(1, 5000));
    append(&log, 2, 2, &body(2, 200));
    let mut record = log.read(1).unwrap().unwrap();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(log.prune(2, Duration::ZERO).unwrap(), 1);
    let mut bytes = Vec::new();
    record.body.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, body(1, 5000));
}

#[test]
fn a_snapshot_replaces_the_log_whatever_its_txid() {
    for max in [1, 2, 4, 5, 6, 50] {
        let dir = tempfile::tempdir().unwrap();
        let log = open_log(dir.path(), Duration::ZERO, 0).unwrap();
        for txid in 1..=5 {
            append(&log, txid, txid, &body(txid, 200));
        }
        append(&log, 1, max, &body(99, 70_000));
        assert_eq!(records(&log), vec![(1, max, body(99, 70_000))]);
        assert_eq!(segment_files(dir.path()).len(), 1, "snapshot to {max}");
        append(&log, max + 1, max + 1, &body(100, 200));
        drop(log);
        let log = open_log(dir.path(), LONG, 0).unwrap();
        let expected = vec![
            (1, max, body(99, 70_000)),
            (max + 1, max + 1, body(100, 200)),
        ];
        assert_eq!(records(&log), expected);
    }
}

#[test]
fn an_append_given_up_leaves_no_trace() {
    for (segment_age, len) in [
        (LONG, 300),
        (LONG, 3 << 20),
        (Duration::ZERO, 300),
        (Duration::ZERO, 3 << 20),
    ] {
        for (min, max) in [(3, 3), (1, 2), (1, 9)] {
            let dir = tempfile::tempdir().unwrap();
            let log = open_log(dir.path(), segment_age, 0).unwrap();
            append(&log, 1, 1, &body(1, 200));
            append(&log, 2, 2, &body(2, 200));
            let mut a = log.begin(min, max).unwrap();
            a.write_all(&body(77, len)).unwrap();
            drop(a);
            assert_eq!(log.last_txid(), 2);
            log.flush_wait().unwrap();
            assert_eq!(log.flushed_txid(), 2);
            let mut expected: Vec<_> = (1..=2).map(|t| (t, t, body(t, 200))).collect();
            assert_eq!(records(&log), expected);
            drop(log);
            let log = open_log(dir.path(), segment_age, 0).unwrap();
            assert_eq!(records(&log), expected, "given up: {min}-{max}");
            drop(log.begin(min, max).unwrap());
            append(&log, 3, 3, &body(3, 200));
            append(&log, 4, 4, &body(4, 200));
            expected.extend((3..=4).map(|t| (t, t, body(t, 200))));
            assert_eq!(records(&log), expected, "given up: {min}-{max}");
            drop(log);
            let log = open_log(dir.path(), segment_age, 0).unwrap();
            assert_eq!(records(&log), expected, "given up: {min}-{max}");
        }
    }
}

#[test]
fn the_first_append_given_up_leaves_an_empty_log() {
    let dir = tempfile::tempdir().unwrap();
    let log = open_log(dir.path(), LONG, 0).unwrap();
    drop(log.begin(1, 7).unwrap());
    assert_eq!(log.last_txid(), 0);
    append(&log, 4, 4, &body(4, 200));
    assert_eq!(records(&log), vec![(4, 4, body(4, 200))]);
    drop(log);
    let log = open_log(dir.path(), LONG, 0).unwrap();
    assert_eq!(records(&log), vec![(4, 4, body(4, 200))]);
}

#[test]
fn everybody_who_waits_for_a_flush_is_told_once_and_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let log = Arc::new(open_log(dir.path(), LONG, 0).unwrap());
    let heard = Arc::new(AtomicU64::new(0));
    let hook = heard.clone();
    log.set_on_flushed(move |txid| {
        let before = hook.swap(txid, Ordering::SeqCst);
        assert!(before <= txid, "flushed {before}, then {txid}");
    });
    let called = Arc::new(AtomicU64::new(0));
    let turn = Arc::new(parking_lot::Mutex::new(0u64));
    const THREADS: u64 = 4;
    const EACH: u64 = 50;
    std::thread::scope(|s| {
        for _ in 0..THREADS {
            s.spawn(|| {
                for _ in 0..EACH {
                    let txid = {
                        let mut last = turn.lock();
                        *last += 1;
                        append(&log, *last, *last, &body(*last, 200));
                        *last
                    };
                    let (called, heard, of) = (called.clone(), heard.clone(), log.clone());
                    let (tx, rx) = std::sync::mpsc::channel();
                    log.flush(move |r| {
                        assert!(r.is_ok());
                        assert!(of.flushed_txid() >= txid);
                        assert!(
                            heard.load(Ordering::SeqCst) >= txid,
                            "the listener comes first"
                        );
                        called.fetch_add(1, Ordering::SeqCst);
                        tx.send(()).unwrap();
                    });
                    rx.recv_timeout(Duration::from_secs(20)).unwrap();
                }
            });
        }
    });
    assert_eq!(called.load(Ordering::SeqCst), THREADS * EACH);
    assert_eq!(log.flushed_txid(), THREADS * EACH);
}

/// Lets every descriptor of this process for `path` refer to `other` from now on, so that system
/// calls on it fail the way that a device does.
pub(super) fn redirect(path: &Path, other: &str) -> Redirected {
    let other = device(other);
    let mut redirected = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let entry = entry.unwrap().path();
        if std::fs::read_link(&entry).is_ok_and(|to| to == path) {
            let fd = entry.file_name().unwrap().to_str().unwrap();
            redirected.push(fd.parse().unwrap());
        }
    }
    for fd in &redirected {
        // SAFETY: plain system call; `fd` is one that the log owns, and stays open.
        assert!(unsafe { libc::dup2(other.as_raw_fd(), *fd) } == *fd);
    }
    assert!(!redirected.is_empty(), "nobody has {} open", path.display());
    Redirected {
        path: path.to_owned(),
        descriptors: redirected,
    }
}

/// Descriptors that refer to a device in place of this file.
pub(super) struct Redirected {
    path: PathBuf,
    descriptors: Vec<i32>,
}

impl Redirected {
    /// They refer to the file again.
    pub fn restore(self) {
        let file = device(self.path.to_str().unwrap());
        for fd in self.descriptors {
            // SAFETY: as in `redirect`.
            assert!(unsafe { libc::dup2(file.as_raw_fd(), fd) } == fd);
        }
    }
}

fn device(path: &str) -> std::fs::File {
    let mut options = std::fs::File::options();
    options.read(true).write(true).open(path).unwrap()
}

#[test]
fn after_a_failed_flush_nothing_is_called_durable() {
    let dir = tempfile::tempdir().unwrap();
    let log = open_log(dir.path(), LONG, 0).unwrap();
    append(&log, 1, 1, &body(1, 200));
    log.flush_wait().unwrap();
    append(&log, 2, 2, &body(2, 200));
    let path = segment_files(dir.path()).remove(0);
    // A device that cannot be synced; then the file again, as a disk that lost the pages and can
    // be synced ever after.
    let lost = redirect(&path, "/dev/null");
    assert!(log.flush_wait().is_err());
    assert_eq!(log.flushed_txid(), 1);
    lost.restore();
    assert!(
        log.flush_wait().is_err(),
        "a failed flush is not made good by another"
    );
    assert_eq!(log.flushed_txid(), 1);
    let refused = log.begin(3, 3).err().expect("no append").to_string();
    assert!(refused.contains("takes no more transactions"), "{refused}");
}

#[test]
fn a_full_disk_refuses_the_record_and_nothing_else() {
    for (min, max) in [(3, 3), (1, 9)] {
        let dir = tempfile::tempdir().unwrap();
        let log = open_log(dir.path(), LONG, 0).unwrap();
        append(&log, 1, 1, &body(1, 200));
        append(&log, 2, 2, &body(2, 200));
        let mut a = log.begin(min, max).unwrap();
        let newest = if min == 1 {
            dir.path().join("replacement")
        } else {
            segment_files(dir.path()).remove(0)
        };
        redirect(&newest, "/dev/full");
        let failed = a.write_all(&body(3, 3 << 20));
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::StorageFull);
        drop(a);
        assert_eq!(log.last_txid(), 2);
        drop(log);
        let log = open_log(dir.path(), LONG, 0).unwrap();
        append(&log, 3, 3, &body(3, 200));
        let expected: Vec<_> = (1..=3).map(|t| (t, t, body(t, 200))).collect();
        assert_eq!(records(&log), expected);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Append(usize),
    GiveUp(usize),
    Snapshot(u64, usize),
    GiveUpSnapshot(u64, usize),
    Flush,
    Prune(u64),
    Clear,
    Reopen(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop_oneof![8 => 129usize..2000, 1 => Just((1usize << 20) + 300)];
    let max = 1u64..12;
    prop_oneof![
        8 => len.clone().prop_map(Step::Append),
        2 => len.clone().prop_map(Step::GiveUp),
        1 => (max.clone(), len.clone()).prop_map(|(m, l)| Step::Snapshot(m, l)),
        1 => (max.clone(), len).prop_map(|(m, l)| Step::GiveUpSnapshot(m, l)),
        2 => Just(Step::Flush),
        1 => max.prop_map(Step::Prune),
        1 => Just(Step::Clear),
        3 => any::<bool>().prop_map(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Against a list: whatever is done, in whatever order, and reopened without a close.
    #[test]
    fn the_log_is_a_list(steps in prop::collection::vec(step(), 1..24)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = open_log(&path, LONG, 0).unwrap();
        let mut model: Vec<(u64, u64, Vec<u8>)> = Vec::new();
        for (i, step) in steps.into_iter().enumerate() {
            let last = model.last().map_or(0, |r| r.1);
            let mark = 1000 + i as u64;
            match step {
                Step::Append(len) => {
                    append(&log, last + 1, last + 1, &body(mark, len));
                    model.push((last + 1, last + 1, body(mark, len)));
                }
                Step::GiveUp(len) => {
                    let mut a = log.begin(last + 1, last + 1).unwrap();
                    a.write_all(&body(mark, len)).unwrap();
                }
                Step::Snapshot(max, len) => {
                    append(&log, 1, max, &body(mark, len));
                    model = vec![(1, max, body(mark, len))];
                }
                Step::GiveUpSnapshot(max, len) => {
                    let mut a = log.begin(1, max).unwrap();
                    a.write_all(&body(mark, len)).unwrap();
                }
                Step::Flush => {
                    log.flush_wait().unwrap();
                    prop_assert_eq!(log.flushed_txid(), last);
                }
                Step::Prune(keep_after) => {
                    std::thread::sleep(Duration::from_millis(5));
                    let removed = log.prune(keep_after, Duration::ZERO).unwrap();
                    let gone: Vec<_> = model.drain(..removed as usize).collect();
                    prop_assert!(gone.iter().all(|r| r.1 <= keep_after));
                    prop_assert!(last == 0 || !model.is_empty());
                }
                Step::Clear => {
                    log.clear().unwrap();
                    model.clear();
                }
                Step::Reopen(young) => {
                    drop(log);
                    let age = if young { Duration::ZERO } else { LONG };
                    log = open_log(&path, age, 0).unwrap();
                }
            }
            prop_assert_eq!(log.last_txid(), model.last().map_or(0, |r| r.1));
            prop_assert_eq!(&records(&log), &model);
            prop_assert!(log.flushed_txid() <= log.last_txid());
        }
        drop(log);
        prop_assert_eq!(&records(&open_log(&path, LONG, 0).unwrap()), &model);
    }
}
