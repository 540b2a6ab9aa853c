//! The database header.

use super::{Db, PAGE_SIZES, get};
use crate::sqlite::header::{DbHeader, HEADER_SIZE, HeaderError};
use crate::sqlite::{is_page_size, lock_page};
use proptest::prelude::*;

#[test]
fn fields_are_what_sqlite_says() {
    for page_size in PAGE_SIZES {
        for mode in ["DELETE", "WAL"] {
            let db = Db::new(page_size, mode, 50);
            db.run("PRAGMA wal_checkpoint(TRUNCATE)");
            let bytes = db.bytes("");
            let header = DbHeader::parse(&bytes).unwrap();
            assert_eq!(header.page_size, page_size);
            assert_eq!(header.is_wal(), mode == "WAL");
            assert_eq!(header.write_version, header.read_version);
            let cookie: u32 = get(&db.conn, "PRAGMA schema_version");
            assert_eq!(header.schema_cookie, cookie);
            let pages: u32 = get(&db.conn, "PRAGMA page_count");
            assert_eq!(header.page_count, pages);
            assert_eq!(header.change_counter, header.version_valid_for);
            assert_eq!(header.pages(bytes.len() as u64 + 12345), pages);
        }
    }
}

#[test]
fn the_count_is_believed_only_where_it_is_valid() {
    let header = DbHeader::parse(&Db::new(4096, "DELETE", 0).bytes("")).unwrap();
    let pages = header.page_count;
    let stale = DbHeader {
        change_counter: header.change_counter + 1,
        ..header
    };
    assert_eq!(stale.pages(7 * 4096 + 4095), 7);
    let zero = DbHeader {
        page_count: 0,
        ..header
    };
    assert_eq!(zero.pages(9 * 4096), 9);
    assert_eq!(header.pages(0), pages);
    assert_eq!(zero.pages(u64::MAX), u32::MAX);
}

#[test]
fn what_is_no_header_is_refused() {
    let good = Db::new(4096, "DELETE", 0).bytes("")[..HEADER_SIZE].to_vec();
    assert!(DbHeader::parse(&good).is_ok());
    assert_eq!(DbHeader::parse(&good[..99]), Err(HeaderError::Short(99)));
    assert_eq!(DbHeader::parse(&[]), Err(HeaderError::Short(0)));
    assert_eq!(DbHeader::parse(&[0; 100]), Err(HeaderError::Magic));
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        DbHeader::parse(&bytes)
    };
    assert_eq!(with(15, 1), Err(HeaderError::Magic));
    assert_eq!(with(16, 1), Err(HeaderError::PageSize(256)));
    assert_eq!(with(17, 1), Err(HeaderError::PageSize(4097)));
    assert_eq!(with(18, 3), Err(HeaderError::Version { write: 3, read: 1 }));
    assert_eq!(with(19, 0), Err(HeaderError::Version { write: 1, read: 0 }));
}

#[test]
fn the_lock_page_is_the_one_at_1_gib() {
    for page_size in PAGE_SIZES {
        let offset = u64::from(lock_page(page_size) - 1) * u64::from(page_size);
        assert_eq!(offset, 1 << 30);
    }
    assert_eq!(lock_page(4096), 262_145);
    assert!(PAGE_SIZES.into_iter().all(is_page_size));
    assert!(
        [0, 1, 256, 513, 4095, 131_072, u32::MAX]
            .into_iter()
            .all(|size| !is_page_size(size))
    );
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(
        mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        magic: bool,
        size: u64,
    ) {
        if magic && bytes.len() >= 16 {
            bytes[..16].copy_from_slice(b"SQLite format 3\0");
        }
        if let Ok(header) = DbHeader::parse(&bytes) {
            prop_assert!(is_page_size(header.page_size));
            let _ = header.pages(size);
        }
    }
}
