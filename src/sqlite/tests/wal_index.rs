//! The WAL index: SQLite's as we read it, and ours as SQLite reads it.

use super::{Db, PAGE_SIZES, Scan, copy_of, get, suffixed};
use crate::sqlite::locks::{LockGuard, LockKind, WAL_WRITE_LOCK};
use crate::sqlite::wal::{FrameHeader, WalChecksum, frame_offset};
use crate::sqlite::wal_index::*;
use proptest::prelude::*;
use rusqlite::Connection;
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// The index of an `X-shm` file, mapped as SQLite maps it.
pub(super) struct Mapped {
    pub(super) index: WalIndex,
    pub(super) file: File,
    address: *mut libc::c_void,
    len: usize,
}

impl Mapped {
    pub(super) fn new(file: File) -> Mapped {
        let len = file.metadata().unwrap().len() as usize / REGION_SIZE * REGION_SIZE;
        // SAFETY: a new shared mapping of an open file, whose address the kernel chooses.
        let address = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(
                std::ptr::null_mut(),
                len,
                access,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED);
        let mut index = WalIndex::new();
        for offset in (0..len).step_by(REGION_SIZE) {
            // SAFETY: within the mapping, which is unmapped when the index goes.
            unsafe { index.push_region(address.cast::<u8>().add(offset)) };
        }
        Mapped {
            index,
            file,
            address,
            len,
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: what `new` mapped; the index, the only one who knows of it, goes with it.
        unsafe { libc::munmap(self.address, self.len) };
    }
}

/// An index of its own memory.
struct Private {
    index: WalIndex,
    memory: *mut [u64],
}

impl Private {
    fn new(regions: usize) -> Private {
        let memory = vec![0u64; regions * REGION_SIZE / 8].into_boxed_slice();
        let memory = Box::into_raw(memory);
        let mut index = WalIndex::new();
        for i in 0..regions {
            // SAFETY: within the memory, which is freed when the index goes.
            unsafe { index.push_region(memory.cast::<u8>().add(i * REGION_SIZE)) };
        }
        Private { index, memory }
    }

    fn bytes(&self) -> Vec<u8> {
        // SAFETY: the memory is ours, initialized, and nobody writes to it during the copy.
        unsafe {
            let len = self.memory.len() * 8;
            std::slice::from_raw_parts(self.memory.cast::<u8>(), len).to_vec()
        }
    }

    fn fill(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.memory.len() * 8);
        // SAFETY: the memory is ours, long enough, and nobody else accesses it during the copy.
        unsafe {
            self.memory
                .cast::<u8>()
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        // SAFETY: what `new` made of a box; the index, the only one who knows of it, goes with it.
        drop(unsafe { Box::from_raw(self.memory) });
    }
}

/// The newest frame of each page among the first `mx_frame`.
fn newest(pgnos: &[u32], mx_frame: usize) -> HashMap<u32, u32> {
    (1..)
        .zip(&pgnos[..mx_frame])
        .map(|(frame, &pgno)| (pgno, frame))
        .collect()
}

/// The index must find of every page what a scan finds, for the snapshot of `mx_frame` frames.
fn check(index: &WalIndex, pgnos: &[u32], mx_frame: usize) {
    let newest = newest(pgnos, mx_frame);
    let last = pgnos.iter().max().copied().unwrap_or(0) + 3;
    for pgno in (1..=last).chain([last + 8192, u32::MAX]) {
        let found = index.lookup(pgno, mx_frame as u32);
        assert_eq!(
            found,
            newest.get(&pgno).copied(),
            "page {pgno} up to frame {mx_frame}"
        );
    }
}

/// A database whose WAL takes three regions.
fn large() -> Db {
    let db = Db::new(512, "WAL", 2500);
    db.run("PRAGMA cache_size=-8000");
    while Scan::of(&db.bytes("-wal")).frames.len() < 9000 {
        db.run("UPDATE t SET x=randomblob(200) WHERE id%3=abs(random())%3");
    }
    db
}

#[test]
fn we_find_what_sqlite_entered() {
    let db = large();
    let shm = Mapped::new(db.open("-shm"));
    assert_eq!(shm.index.region_count(), 3);
    let scan = Scan::of(&db.bytes("-wal"));
    let &(last, _) = scan.frames.last().unwrap();
    let header = shm.index.read_header().unwrap();
    assert_eq!(header.mx_frame as usize, scan.frames.len());
    assert_eq!(header.page_count, last.commit);
    assert_eq!(header.frame_checksum, last.checksum);
    assert_eq!(
        (header.salt1, header.salt2),
        (scan.header.salt1, scan.header.salt2)
    );
    assert_eq!((header.page_size, header.is_init), (512, true));
    assert_eq!(header.big_endian_checksum, cfg!(target_endian = "big"));
    let pgnos = scan.pgnos();
    for mx_frame in [0, 1, 100, 4061, 4062, 4063, 8157, 8158, 8159, pgnos.len()] {
        check(&shm.index, &pgnos, mx_frame);
    }

    // The very bytes: SQLite's, where no transaction was rolled back, are those that we make.
    let ours = Private::new(3);
    ours.index.append_frames(1, &pgnos).unwrap();
    ours.index.write_header(&header);
    let (bytes, sqlites) = (ours.bytes(), db.bytes("-shm"));
    assert!(bytes[..96] == sqlites[..96], "header");
    assert!(bytes[136..] == sqlites[136..], "entries");
    assert_eq!(ours.index.read_header(), Some(header));
}

#[test]
fn every_page_size_survives_the_header() {
    for page_size in PAGE_SIZES {
        let db = Db::new(page_size, "WAL", 5);
        let shm = Mapped::new(db.open("-shm"));
        let header = shm.index.read_header().unwrap();
        assert_eq!(header.page_size, page_size);
        let before = db.bytes("-shm");
        shm.index.write_header(&header);
        assert!(db.bytes("-shm") == before, "{page_size}");
    }
}

#[test]
fn marks_and_backfill_are_where_sqlite_has_them() {
    let db = Db::new(4096, "WAL", 100);
    let shm = Mapped::new(db.open("-shm"));
    let mx_frame = shm.index.read_header().unwrap().mx_frame;
    assert_eq!((shm.index.n_backfill(), shm.index.read_mark(0)), (0, 0));

    db.run("BEGIN; SELECT * FROM t LIMIT 1");
    let marks: Vec<u32> = (0..READ_MARKS).map(|i| shm.index.read_mark(i)).collect();
    assert!(marks.contains(&mx_frame), "{marks:?}");
    assert!(marks.contains(&READ_MARK_UNUSED), "{marks:?}");
    db.run("COMMIT");

    // Where the frames of the last transaction are taken for backfilled, readers ignore the WAL.
    db.run("PRAGMA wal_checkpoint");
    assert_eq!(shm.index.n_backfill(), mx_frame);
    assert_eq!(shm.index.n_backfill_attempted(), mx_frame);
    db.run("BEGIN; SELECT * FROM t LIMIT 1; COMMIT; UPDATE t SET v=0 WHERE id=1");
    assert_eq!(
        shm.index.read_header().unwrap().mx_frame,
        1,
        "the WAL was not restarted"
    );
    assert_eq!(
        (shm.index.n_backfill(), shm.index.n_backfill_attempted()),
        (0, 0)
    );

    let ours = Private::new(1);
    ours.index.set_n_backfill(7);
    ours.index.set_n_backfill_attempted(9);
    (0..READ_MARKS).for_each(|i| ours.index.set_read_mark(i, 20 + i as u32));
    let words: Vec<u32> = ours.bytes()[96..136]
        .chunks_exact(4)
        .map(|word| u32::from_ne_bytes(word.try_into().unwrap()))
        .collect();
    assert_eq!(words, [7, 20, 21, 22, 23, 24, 0, 0, 9, 0]);
}

/// Appends to `db`'s WAL and index the transaction that `sql` is, under the WRITE lock, as a
/// replica does: from frames that SQLite made in a copy of the database.
fn apply(db: &Db, sql: &str) {
    let (_dir, path) = copy_of(&[("", &db.bytes("")), ("-wal", &db.bytes("-wal"))]);
    let copy = Connection::open(&path).unwrap();
    copy.execute_batch("PRAGMA wal_autocheckpoint=0").unwrap();
    copy.execute_batch(sql).unwrap();
    let made = Scan::of(&fs::read(suffixed(&path, "-wal")).unwrap());

    let shm = Mapped::new(db.open("-shm"));
    let deadline = Instant::now() + Duration::from_secs(10);
    let lock = LockGuard::acquire(
        shm.file.as_fd(),
        LockKind::Exclusive,
        WAL_WRITE_LOCK,
        1,
        deadline,
    );
    let lock = lock.unwrap().expect("nobody writes");
    let header = shm.index.read_header().unwrap();
    let wal = Scan::of(&db.bytes("-wal"));
    let done = wal.frames.len();
    assert_eq!(header.mx_frame as usize, done);
    let file = db.open("-wal");
    let (mut frame, mut prev) = (done as u32 + 1, header.frame_checksum);
    for (made, page) in &made.frames[done..] {
        let next = FrameHeader::for_page(&wal.header, prev, made.pgno, made.commit, page);
        let offset = frame_offset(frame, wal.header.page_size);
        file.write_all_at(&[&next.encode()[..], page].concat(), offset)
            .unwrap();
        (frame, prev) = (frame + 1, next.checksum);
    }
    shm.index
        .append_frames(done as u32 + 1, &made.pgnos()[done..])
        .unwrap();
    shm.index.write_header(&IndexHeader {
        change: header.change.wrapping_add(1),
        mx_frame: frame - 1,
        page_count: made.frames.last().unwrap().0.commit,
        frame_checksum: prev,
        ..header
    });
    drop(lock);
}

#[test]
fn sqlite_reads_the_transactions_that_we_append() {
    let db = Db::new(1024, "WAL", 200);
    let other = db.connect();
    assert_eq!(get::<i64>(&other, "SELECT sum(v) FROM t"), 20100);
    // A reader with a snapshot keeps it, whatever is appended.
    let reader = db.connect();
    reader
        .execute_batch("BEGIN; SELECT * FROM t LIMIT 1")
        .unwrap();

    apply(&db, "UPDATE t SET v=3, x=randomblob(300)");
    assert_eq!(get::<i64>(&other, "SELECT sum(v) FROM t"), 600);
    assert_eq!(get::<i64>(&reader, "SELECT sum(v) FROM t"), 20100);
    apply(
        &db,
        "CREATE TABLE u AS SELECT * FROM t; DELETE FROM t WHERE id>50",
    );
    assert_eq!(get::<i64>(&other, "SELECT sum(v) FROM t"), 150);
    assert_eq!(get::<i64>(&other, "SELECT sum(v) FROM u"), 600);
    assert_eq!(get::<i64>(&reader, "SELECT sum(v) FROM t"), 20100);

    // SQLite writes on after us, we after it, and a checkpoint takes it all.
    other.execute_batch("UPDATE t SET v=4").unwrap();
    apply(&db, "INSERT INTO t(v) VALUES(1)");
    assert_eq!(get::<i64>(&db.conn, "SELECT sum(v) FROM t"), 201);
    assert_eq!(get::<i64>(&reader, "SELECT sum(v) FROM t"), 20100);
    reader.execute_batch("COMMIT").unwrap();
    assert_eq!(get::<i64>(&reader, "SELECT sum(v) FROM t"), 201);
    assert_eq!(get::<i64>(&other, "PRAGMA wal_checkpoint(TRUNCATE)"), 0);
    assert_eq!(db.bytes("-wal").len(), 0);
    assert_eq!(get::<i64>(&other, "SELECT sum(v) FROM t"), 201);
    assert_eq!(get::<String>(&other, "PRAGMA integrity_check"), "ok");
}

#[test]
fn an_invalid_header_is_recovered_from_the_wal() {
    let db = large();
    let shm = Mapped::new(db.open("-shm"));
    let sum: i64 = get(&db.conn, "SELECT sum(id*length(x)) FROM t");
    let before = shm.index.read_header().unwrap();
    shm.index.invalidate_header();
    assert_eq!(shm.index.read_header(), None);
    assert_eq!(
        get::<i64>(&db.connect(), "SELECT sum(id*length(x)) FROM t"),
        sum
    );
    let after = shm.index.read_header().unwrap();
    assert_eq!(
        IndexHeader {
            change: before.change,
            ..after
        },
        before
    );
    let pgnos = Scan::of(&db.bytes("-wal")).pgnos();
    check(&shm.index, &pgnos, pgnos.len());
}

#[test]
fn remains_of_a_dead_writer_are_removed_by_the_next() {
    let db = Db::new(1024, "WAL", 200);
    let shm = Mapped::new(db.open("-shm"));
    let mx_frame = shm.index.read_header().unwrap().mx_frame;
    let pgnos = Scan::of(&db.bytes("-wal")).pgnos();

    // Ours, removed by SQLite,
    shm.index
        .append_frames(mx_frame + 1, &[1, 2, 3, 4, 5, 900, 901, 902])
        .unwrap();
    check(&shm.index, &pgnos, pgnos.len());
    db.run("UPDATE t SET v=0 WHERE id=1");
    let pgnos = Scan::of(&db.bytes("-wal")).pgnos();
    check(&shm.index, &pgnos, pgnos.len());
    assert_eq!(shm.index.lookup(902, u32::MAX >> 20), None);

    // and SQLite's, of a transaction that is not to be, removed by us.
    db.run("PRAGMA cache_size=10; PRAGMA cache_spill=5; BEGIN; UPDATE t SET x=randomblob(200)");
    assert!(
        shm.index.lookup(3, 4000) > shm.index.lookup(3, pgnos.len() as u32),
        "no spill"
    );
    shm.index.cleanup_after(pgnos.len() as u32);
    check(&shm.index, &pgnos, pgnos.len());
    let fresh = Private::new(1);
    fresh.index.append_frames(1, &pgnos).unwrap();
    assert!(fresh.bytes()[136..] == db.bytes("-shm")[136..]);
}

#[test]
fn the_first_entry_of_a_block_empties_it() {
    let mut private = Private::new(2);
    let mut garbage = vec![0x11; 2 * REGION_SIZE];
    // Even where the entry itself looks unused.
    garbage[136..140].fill(0);
    garbage[REGION_SIZE..REGION_SIZE + 4].fill(0);
    private.fill(&garbage);
    private.index.append_frames(1, &[5, 6]).unwrap();
    check(&private.index, &[5, 6], 2);
    let mut expected = Private::new(2);
    expected.index.append_frames(1, &[5, 6]).unwrap();
    assert!(private.bytes()[136..REGION_SIZE] == expected.bytes()[136..REGION_SIZE]);
    private.index.append_frames(4063, &[7]).unwrap();
    expected.fill(&[0; 2 * REGION_SIZE]);
    expected.index.append_frames(4063, &[7]).unwrap();
    assert!(private.bytes()[REGION_SIZE..] == expected.bytes()[REGION_SIZE..]);
}

#[test]
fn a_header_with_any_wrong_byte_is_none() {
    let header = IndexHeader {
        change: 5,
        is_init: true,
        big_endian_checksum: true,
        page_size: 65536,
        mx_frame: 77,
        page_count: 9,
        frame_checksum: WalChecksum(1, 2),
        salt1: 0x0102_0304,
        salt2: 4,
    };
    let mut private = Private::new(1);
    assert_eq!(private.index.read_header(), None);
    assert_eq!(WalIndex::new().read_header(), None);
    private.index.write_header(&header);
    assert_eq!(private.index.read_header(), Some(header));
    let good = private.bytes();
    assert_eq!(good[32..36], [1, 2, 3, 4], "salts are as in the WAL");
    for at in 0..48 {
        for places in [&[at][..], &[at + 48], &[at, at + 48]] {
            let mut bytes = good.clone();
            places.iter().for_each(|&place| bytes[place] ^= 4);
            private.fill(&bytes);
            assert_eq!(private.index.read_header(), None, "{places:?}");
        }
    }
    // What SQLite leaves for a WAL without frames.
    let empty = IndexHeader {
        page_size: 0,
        mx_frame: 0,
        page_count: 0,
        ..header
    };
    private.index.write_header(&empty);
    assert_eq!(private.index.read_header(), Some(empty));
    private.index.write_header(&IndexHeader {
        is_init: false,
        ..header
    });
    assert_eq!(private.index.read_header(), None);
}

#[test]
fn frames_that_cannot_be_entered_are_refused() {
    let mut private = Private::new(2);
    let index = &private.index;
    assert_eq!(index.append_frames(1, &[]), Ok(()));
    assert_eq!(
        index.append_frames(0, &[1]),
        Err(WalIndexError::FrameNumber {
            first_frame: 0,
            count: 1
        })
    );
    assert_eq!(
        index.append_frames(u32::MAX, &[1, 2]),
        Err(WalIndexError::FrameNumber {
            first_frame: u32::MAX,
            count: 2
        })
    );
    assert_eq!(index.append_frames(8158, &[1]), Ok(()));
    let missing = WalIndexError::NotMapped {
        last_frame: 8159,
        needed: 3,
        mapped: 2,
    };
    assert_eq!(index.append_frames(8158, &[1, 2]), Err(missing));
    assert_eq!(
        index.append_frames(1, &[1, 0]),
        Err(WalIndexError::PageZero { frame: 2 })
    );
    assert_eq!(index.lookup(1, u32::MAX), None);
    index.cleanup_after(u32::MAX);
    // A table without an empty slot, of entries that are no remains.
    let full: Vec<u8> = [[0, 0], 1u16.to_ne_bytes()]
        .iter()
        .flat_map(|bytes| bytes.repeat(REGION_SIZE / 4))
        .collect();
    private.fill(&full);
    let index = &private.index;
    assert_eq!(
        index.append_frames(5, &[1]),
        Err(WalIndexError::Corrupt { frame: 5 })
    );
    assert_eq!(index.lookup(1, 5), None);
}

#[test]
fn regions_are_counted_as_sqlite_counts_them() {
    for (mx_frame, regions) in [
        (0, 1),
        (1, 1),
        (4062, 1),
        (4063, 2),
        (8158, 2),
        (8159, 3),
        (u32::MAX, 1_048_577),
    ] {
        assert_eq!(WalIndex::regions_needed(mx_frame), regions, "{mx_frame}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Against a plain list: transactions are appended, cut back, or left half-entered.
    #[test]
    fn the_tables_are_a_list_of_page_numbers(
        steps in prop::collection::vec((0..4u8, 1..3000usize, 1..5000u32), 1..12),
    ) {
        let private = Private::new(4);
        let mut pgnos: Vec<u32> = Vec::new();
        for (kind, count, span) in steps {
            let more: Vec<u32> =
                (0..count as u32).map(|i| 1 + i.wrapping_mul(2_654_435_761) % span).collect();
            if pgnos.len() + count > 4062 + 3 * 4096 {
                continue;
            }
            match kind {
                // cut back, as a rollback does
                0 => {
                    pgnos.truncate(pgnos.len().saturating_sub(count));
                    private.index.cleanup_after(pgnos.len() as u32);
                }
                // left behind by a writer that died
                1 => private.index.append_frames(pgnos.len() as u32 + 1, &more).unwrap(),
                _ => {
                    private.index.append_frames(pgnos.len() as u32 + 1, &more).unwrap();
                    pgnos.extend(more);
                }
            }
            check(&private.index, &pgnos, pgnos.len());
            check(&private.index, &pgnos, pgnos.len() / 2);
        }
    }

    #[test]
    fn arbitrary_memory_never_panics(
        seed: u64,
        zeros in 0..4u64,
        frames in prop::collection::vec(1..9000u32, 1..20),
        pgnos in prop::collection::vec(any::<u32>(), 0..30),
    ) {
        let mut private = Private::new(2);
        // Garbage with more or fewer zeros in it.
        let mut state = seed | 1;
        let bytes: Vec<u8> = (0..2 * REGION_SIZE)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                if (state >> 60) < zeros * 5 { 0 } else { (state >> 33) as u8 }
            })
            .collect();
        private.fill(&bytes);
        let index = &private.index;
        prop_assert_eq!(index.read_header(), None);
        for frame in frames {
            for &pgno in &pgnos {
                if let Some(found) = index.lookup(pgno, frame) {
                    prop_assert!(found != 0 && found <= frame);
                }
            }
            let _ = index.append_frames(frame, &pgnos);
            index.cleanup_after(frame);
        }
        let _ = (index.n_backfill(), index.n_backfill_attempted(), index.read_mark(4));
    }
}

#[test]
fn a_closed_index_is_no_header_that_can_be_used() {
    let closed = IndexHeader::closed();
    assert_eq!(IndexHeader::of_copies(&closed, &closed), None);
}

#[test]
fn a_header_is_read_from_two_copies_that_are_the_same() {
    let mut memory = vec![0u32; REGION_SIZE / 4];
    let mut index = WalIndex::new();
    // SAFETY: the memory is aligned, of the right size, and lives longer than the index.
    unsafe { index.push_region(memory.as_mut_ptr().cast()) };
    let header = IndexHeader {
        change: 3,
        is_init: true,
        big_endian_checksum: false,
        page_size: 65536,
        mx_frame: 7,
        page_count: 9,
        frame_checksum: WalChecksum(1, 2),
        salt1: 4,
        salt2: 5,
    };
    index.write_header(&header);
    index.set_n_backfill(11);
    index.set_n_backfill_attempted(12);
    drop(index);
    let bytes: Vec<u8> = memory.iter().flat_map(|w| w.to_ne_bytes()).collect();
    let copy = |i: usize| {
        bytes[i * HEADER_COPY_SIZE..][..HEADER_COPY_SIZE]
            .try_into()
            .unwrap()
    };
    let (first, mut second) = (copy(0), copy(1));
    assert_eq!(IndexHeader::of_copies(&first, &second), Some(header));
    second[8] ^= 1;
    assert_eq!(IndexHeader::of_copies(&first, &second), None);
    let number = |at: u64| u32::from_ne_bytes(bytes[at as usize..][..4].try_into().unwrap());
    assert_eq!(number(N_BACKFILL_OFFSET), 11);
}
