//! The write-ahead log.

use super::{Db, PAGE_SIZES, Scan, copy_of, get, suffixed};
use crate::sqlite::wal::{
    FRAME_HEADER_SIZE, FrameHeader, WAL_HEADER_SIZE, WalChecksum, WalError, WalHeader,
    frame_offset, wal_checksum,
};
use proptest::prelude::*;
use rusqlite::Connection;
use std::collections::BTreeMap;
use std::fs;

/// The WAL of a scan's transactions, written anew with checksums in the byte order given.
fn rewritten(scan: &Scan, big_endian: bool) -> Vec<u8> {
    let header = WalHeader {
        big_endian,
        ..scan.header
    };
    let mut wal = header.encode().to_vec();
    let header = WalHeader::decode(&header.encode()).unwrap();
    let mut prev = header.checksum;
    for (i, (frame, page)) in scan.frames.iter().enumerate() {
        assert_eq!(
            wal.len() as u64,
            frame_offset(i as u32 + 1, header.page_size)
        );
        let frame = FrameHeader::for_page(&header, prev, frame.pgno, frame.commit, page);
        wal.extend(frame.encode());
        wal.extend(page);
        prev = frame.checksum;
    }
    wal
}

/// A database in WAL mode with spilled, rewritten and rolled-back frames behind it.
fn eventful(page_size: u32) -> Db {
    // Enough rows for more pages than the cache holds.
    let db = Db::new(page_size, "WAL", 300.max(page_size / 8));
    db.run("PRAGMA cache_size=10; PRAGMA cache_spill=5");
    for _ in 0..3 {
        // Spilled pages that change again are overwritten in the WAL, and all that follows them
        // gets new checksums at the commit.
        db.run(
            "BEGIN; UPDATE t SET x=randomblob(210); UPDATE t SET x=randomblob(190); \
             UPDATE t SET v=v+1 WHERE id%2=0; COMMIT; \
             BEGIN; UPDATE t SET x=randomblob(220); ROLLBACK; \
             UPDATE t SET v=0 WHERE id=5",
        );
    }
    db
}

#[test]
fn frames_verify_up_to_the_last_commit() {
    for page_size in PAGE_SIZES {
        let db = eventful(page_size);
        let committed = Scan::of(&db.bytes("-wal"));
        assert_eq!(committed.header.page_size, page_size);
        let &(last, _) = committed.frames.last().unwrap();
        assert_eq!(last.commit, get::<u32>(&db.conn, "PRAGMA page_count"));

        // Of a transaction in progress, nothing counts.
        db.run("BEGIN; UPDATE t SET x=randomblob(215); UPDATE t SET x=randomblob(185)");
        let during = db.bytes("-wal");
        assert!(during.len() as u64 > frame_offset(committed.frames.len() as u32 + 1, page_size));
        assert!(Scan::of(&during).frames == committed.frames);
        db.run("COMMIT");
        let after = Scan::of(&db.bytes("-wal"));
        assert!(after.frames.len() > committed.frames.len());
        assert!(after.frames.starts_with(&committed.frames));

        // The newest version of each page is what a checkpoint puts into the database.
        let (checkpointed, log): (i64, i64) = db
            .conn
            .query_row("PRAGMA wal_checkpoint(FULL)", [], |row| {
                Ok((row.get(2)?, row.get(1)?))
            })
            .unwrap();
        assert_eq!(
            (checkpointed, log),
            (after.frames.len() as i64, after.frames.len() as i64)
        );
        let bytes = db.bytes("");
        let newest: BTreeMap<u32, &[u8]> = after
            .frames
            .iter()
            .map(|(frame, page)| (frame.pgno, &page[..]))
            .collect();
        for (pgno, page) in newest {
            let start = (pgno as usize - 1) * page_size as usize;
            assert!(bytes[start..start + page.len()] == *page, "page {pgno}");
        }
    }
}

#[test]
fn what_is_decoded_encodes_to_the_same_bytes() {
    let db = eventful(1024);
    let wal = db.bytes("-wal");
    let scan = Scan::of(&wal);
    let committed = frame_offset(scan.frames.len() as u32 + 1, 1024) as usize;
    assert_eq!(scan.header.encode(), wal[..WAL_HEADER_SIZE]);
    // SQLite writes checksums in the machine's order, as `new` does.
    assert!(rewritten(&scan, cfg!(target_endian = "big")) == wal[..committed]);
    let WalHeader {
        page_size,
        checkpoint_seq,
        salt1,
        salt2,
        ..
    } = scan.header;
    assert_eq!(
        WalHeader::new(page_size, checkpoint_seq, salt1, salt2),
        scan.header
    );
}

#[test]
fn sqlite_reads_what_we_write_in_both_byte_orders() {
    for page_size in [512, 4096, 65536] {
        let db = eventful(page_size);
        let expected: i64 = get(&db.conn, "SELECT sum(v*id)+sum(length(x)) FROM t");
        let scan = Scan::of(&db.bytes("-wal"));
        for big_endian in [false, true] {
            let wal = rewritten(&scan, big_endian);
            assert_eq!(Scan::of(&wal).pgnos(), scan.pgnos());
            let (_dir, path) = copy_of(&[("", &db.bytes("")), ("-wal", &wal)]);
            let conn = Connection::open(&path).unwrap();
            assert_eq!(
                get::<i64>(&conn, "SELECT sum(v*id)+sum(length(x)) FROM t"),
                expected
            );
            assert_eq!(get::<String>(&conn, "PRAGMA integrity_check"), "ok");
            // And goes on in the order that it found.
            conn.execute_batch("PRAGMA wal_autocheckpoint=0; UPDATE t SET v=1")
                .unwrap();
            let more = Scan::of(&fs::read(suffixed(&path, "-wal")).unwrap());
            assert_eq!(more.header.big_endian, big_endian);
            assert!(more.frames.len() > scan.frames.len());
        }
    }
}

#[test]
fn a_wrong_header_is_refused() {
    let good = WalHeader::new(4096, 3, 1, 2).encode();
    assert_eq!(WalHeader::decode(&good), Ok(WalHeader::new(4096, 3, 1, 2)));
    for at in 0..WAL_HEADER_SIZE {
        let mut bytes = good;
        bytes[at] ^= 0x40;
        let error = WalHeader::decode(&bytes).unwrap_err();
        match at {
            0..4 => assert!(matches!(error, WalError::Magic(_)), "{at}: {error}"),
            8..12 => assert!(matches!(error, WalError::PageSize(_)), "{at}: {error}"),
            _ => assert_eq!(error, WalError::Checksum, "{at}"),
        }
    }
    // The other byte order needs other checksums; another version is only believed if it is whole.
    let mut other_order = good;
    other_order[3] ^= 1;
    assert_eq!(WalHeader::decode(&other_order), Err(WalError::Checksum));
    let mut newer = good;
    newer[4..8].copy_from_slice(&3_007_001u32.to_be_bytes());
    let big_endian = cfg!(target_endian = "big");
    let WalChecksum(s1, s2) = wal_checksum(big_endian, WalChecksum(0, 0), &newer[..24]);
    newer[24..28].copy_from_slice(&s1.to_be_bytes());
    newer[28..].copy_from_slice(&s2.to_be_bytes());
    assert_eq!(WalHeader::decode(&newer), Err(WalError::Version(3_007_001)));
}

/// The definition of the checksum, one word at a time.
fn plain_checksum(big_endian: bool, seed: WalChecksum, data: &[u8]) -> WalChecksum {
    let words: Vec<u32> = data
        .chunks_exact(4)
        .map(|word| word.try_into().unwrap())
        .map(if big_endian {
            u32::from_be_bytes
        } else {
            u32::from_le_bytes
        })
        .collect();
    let WalChecksum(mut s1, mut s2) = seed;
    for pair in words.chunks_exact(2) {
        s1 = s1.wrapping_add(pair[0]).wrapping_add(s2);
        s2 = s2.wrapping_add(pair[1]).wrapping_add(s1);
    }
    WalChecksum(s1, s2)
}

proptest! {
    #[test]
    fn the_checksum_is_its_definition(
        words in prop::collection::vec(any::<u64>(), 0..40),
        s1: u32,
        s2: u32,
        big_endian: bool,
    ) {
        let data: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let seed = WalChecksum(s1, s2);
        prop_assert_eq!(
            wal_checksum(big_endian, seed, &data),
            plain_checksum(big_endian, seed, &data)
        );
        // It is cumulative at any border of 8 bytes.
        let (head, tail) = data.split_at(data.len() / 16 * 8);
        let half = wal_checksum(big_endian, seed, head);
        prop_assert_eq!(
            wal_checksum(big_endian, half, tail),
            wal_checksum(big_endian, seed, &data)
        );
    }

    #[test]
    fn arbitrary_headers_never_panic(wal: [u8; WAL_HEADER_SIZE], frame: [u8; FRAME_HEADER_SIZE]) {
        let _ = WalHeader::decode(&wal);
        let mut with_magic = wal;
        with_magic[..4].copy_from_slice(&0x377f_0682u32.to_be_bytes());
        let _ = WalHeader::decode(&with_magic);
        prop_assert_eq!(FrameHeader::decode(&frame).encode(), frame);
    }

    #[test]
    fn offsets_never_overflow(frame: u32, page_size: u32) {
        let offset = frame_offset(frame, page_size);
        prop_assert!(offset >= WAL_HEADER_SIZE as u64);
    }
}
