//! The fixed parts of the file: the 100-byte header and the 16-byte trailer.
//!
//! A [`Header`] that came out of [`Header::decode`] is valid; one that was put together by hand
//! is checked by the encoder. All integers are big-endian.

use super::{CHECKSUM_FLAG, LtxError, Pos, is_valid_page_size};

/// The size of the header, in bytes.
pub const HEADER_SIZE: usize = 100;

/// The size of the trailer, in bytes.
pub const TRAILER_SIZE: usize = 16;

/// The size of the page number in front of each page, in bytes.
pub const PAGE_HEADER_SIZE: usize = 4;

const MAGIC: [u8; 4] = *b"LTX1";
const FLAG_COMPRESSED: u32 = 1;

/// What the file says about its transactions, before the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Whether the page block is one LZ4 frame.
    pub compressed: bool,
    /// Bytes per page: a power of two, 512 to 65536.
    pub page_size: u32,
    /// The database's size after the transaction, in pages; 0 = the database was deleted.
    pub commit: u32,
    /// The first transaction in the file, at least 1. A file that begins at 1 is a snapshot.
    pub min_txid: u64,
    /// The last transaction in the file.
    pub max_txid: u64,
    /// When the transaction was committed, in milliseconds since the Unix epoch.
    pub timestamp: i64,
    /// The database's checksum before the file is applied; 0 in a snapshot.
    pub pre_apply_checksum: u64,
    /// Byte offset in the WAL of the transaction's first frame; 0 if it is not from a WAL.
    pub wal_offset: i64,
    /// Size of the transaction's frames in the WAL, in bytes; 0 exactly when the offset is.
    pub wal_size: i64,
    /// The WAL's first salt, 0 if unknown.
    pub wal_salt1: u32,
    /// The WAL's second salt, 0 if unknown.
    pub wal_salt2: u32,
    /// The node that made the file, 0 if unknown.
    pub node_id: u64,
}

impl Header {
    /// The header's bytes. Does not validate: see [`Header::validate`].
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut b = [0; HEADER_SIZE];
        let flags = if self.compressed { FLAG_COMPRESSED } else { 0 };
        b[0..4].copy_from_slice(&MAGIC);
        b[4..8].copy_from_slice(&flags.to_be_bytes());
        b[8..12].copy_from_slice(&self.page_size.to_be_bytes());
        b[12..16].copy_from_slice(&self.commit.to_be_bytes());
        b[16..24].copy_from_slice(&self.min_txid.to_be_bytes());
        b[24..32].copy_from_slice(&self.max_txid.to_be_bytes());
        b[32..40].copy_from_slice(&self.timestamp.to_be_bytes());
        b[40..48].copy_from_slice(&self.pre_apply_checksum.to_be_bytes());
        b[48..56].copy_from_slice(&self.wal_offset.to_be_bytes());
        b[56..64].copy_from_slice(&self.wal_size.to_be_bytes());
        b[64..68].copy_from_slice(&self.wal_salt1.to_be_bytes());
        b[68..72].copy_from_slice(&self.wal_salt2.to_be_bytes());
        b[72..80].copy_from_slice(&self.node_id.to_be_bytes());
        b
    }

    /// Reads and validates a header.
    ///
    /// # Errors
    /// [`LtxError::Magic`], or [`LtxError::Header`] for an unknown flag, a reserved byte that
    /// is not zero, or any of the rules of [`Header::validate`].
    pub fn decode(b: &[u8; HEADER_SIZE]) -> Result<Header, LtxError> {
        let magic = field::<4>(b, 0);
        if magic != MAGIC {
            return Err(LtxError::Magic(magic));
        }
        let flags = u32::from_be_bytes(field(b, 4));
        check(
            flags & !FLAG_COMPRESSED == 0,
            "flags",
            "has an unknown bit set",
        )?;
        check(b[80..].iter().all(|&r| r == 0), "reserved", "must be zero")?;
        let header = Header {
            compressed: flags & FLAG_COMPRESSED != 0,
            page_size: u32::from_be_bytes(field(b, 8)),
            commit: u32::from_be_bytes(field(b, 12)),
            min_txid: u64::from_be_bytes(field(b, 16)),
            max_txid: u64::from_be_bytes(field(b, 24)),
            timestamp: i64::from_be_bytes(field(b, 32)),
            pre_apply_checksum: u64::from_be_bytes(field(b, 40)),
            wal_offset: i64::from_be_bytes(field(b, 48)),
            wal_size: i64::from_be_bytes(field(b, 56)),
            wal_salt1: u32::from_be_bytes(field(b, 64)),
            wal_salt2: u32::from_be_bytes(field(b, 68)),
            node_id: u64::from_be_bytes(field(b, 72)),
        };
        header.validate()?;
        Ok(header)
    }

    /// Checks the rules that the fields keep among themselves.
    ///
    /// # Errors
    /// [`LtxError::Header`] with the first field that breaks one.
    pub fn validate(&self) -> Result<(), LtxError> {
        check(
            is_valid_page_size(self.page_size),
            "page size",
            "must be a power of two from 512 to 65536",
        )?;
        check(self.min_txid > 0, "min TXID", "must be at least 1")?;
        check(
            self.max_txid >= self.min_txid,
            "max TXID",
            "must not be below min TXID",
        )?;
        if self.is_snapshot() {
            check(
                self.pre_apply_checksum == 0,
                "pre-apply checksum",
                "must be 0 in a snapshot",
            )?;
        } else {
            let flagged = self.pre_apply_checksum & CHECKSUM_FLAG != 0;
            check(
                flagged,
                "pre-apply checksum",
                "must have bit 63 set when min TXID is above 1",
            )?;
        }
        check(self.wal_offset >= 0, "WAL offset", "must not be negative")?;
        check(self.wal_size >= 0, "WAL size", "must not be negative")?;
        let from_wal = self.wal_offset != 0;
        check(
            from_wal == (self.wal_size != 0),
            "WAL size",
            "must be 0 exactly when the WAL offset is",
        )?;
        let salted = self.wal_salt1 != 0 || self.wal_salt2 != 0;
        check(
            from_wal || !salted,
            "WAL salt",
            "needs a WAL offset and size",
        )
    }

    /// Whether the file holds a whole database, and so can be applied whatever came before.
    pub fn is_snapshot(&self) -> bool {
        self.min_txid == 1
    }

    /// The position that a database must be at for the file to be applied to it; the zero
    /// position for a snapshot, which can always be applied.
    pub fn pre_apply_pos(&self) -> Pos {
        Pos {
            txid: self.min_txid.saturating_sub(1),
            checksum: self.pre_apply_checksum,
        }
    }
}

/// The end of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// The database's checksum after the file is applied; [`CHECKSUM_FLAG`] alone if deleted.
    pub post_apply_checksum: u64,
    /// The checksum of header, uncompressed page block and post-apply checksum.
    pub file_checksum: u64,
}

impl Trailer {
    pub(super) fn encode(&self) -> [u8; TRAILER_SIZE] {
        let mut b = [0; TRAILER_SIZE];
        b[0..8].copy_from_slice(&self.post_apply_checksum.to_be_bytes());
        b[8..16].copy_from_slice(&self.file_checksum.to_be_bytes());
        b
    }

    pub(super) fn decode(b: &[u8; TRAILER_SIZE]) -> Trailer {
        Trailer {
            post_apply_checksum: u64::from_be_bytes(field(b, 0)),
            file_checksum: u64::from_be_bytes(field(b, 8)),
        }
    }
}

/// `N` bytes at a constant offset of a fixed-size part.
fn field<const N: usize>(b: &[u8], offset: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&b[offset..offset + N]);
    out
}

fn check(ok: bool, field: &'static str, rule: &'static str) -> Result<(), LtxError> {
    if ok {
        Ok(())
    } else {
        Err(LtxError::Header { field, rule })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            compressed: true,
            page_size: 4096,
            commit: 9,
            min_txid: 2,
            max_txid: 3,
            timestamp: 1_795_380_281_767,
            pre_apply_checksum: CHECKSUM_FLAG | 5,
            wal_offset: 32,
            wal_size: 4120,
            wal_salt1: 0x3385_4f9f,
            wal_salt2: 0xf4b0_72fe,
            node_id: 0x3a8c_6e86_5ead_b89c,
        }
    }

    fn rejected(change: impl FnOnce(&mut Header)) -> &'static str {
        let mut h = header();
        change(&mut h);
        let Err(LtxError::Header { field, .. }) = h.validate() else {
            panic!("accepted {h:?}")
        };
        assert!(Header::decode(&h.encode()).is_err());
        field
    }

    #[test]
    fn round_trip() {
        let h = header();
        assert_eq!(Header::decode(&h.encode()).unwrap(), h);
        assert_eq!(
            h.pre_apply_pos(),
            Pos {
                txid: 1,
                checksum: CHECKSUM_FLAG | 5
            }
        );
        assert!(!h.is_snapshot());
    }

    #[test]
    fn rules() {
        for size in [0, 256, 511, 513, 1000, 131_072, u32::MAX] {
            assert_eq!(rejected(|h| h.page_size = size), "page size");
        }
        assert_eq!(rejected(|h| h.min_txid = 0), "min TXID");
        assert_eq!(rejected(|h| h.max_txid = 1), "max TXID");
        assert_eq!(rejected(|h| h.min_txid = 1), "pre-apply checksum");
        assert_eq!(rejected(|h| h.pre_apply_checksum = 0), "pre-apply checksum");
        assert_eq!(rejected(|h| h.pre_apply_checksum = 5), "pre-apply checksum");
        assert_eq!(rejected(|h| h.wal_offset = -1), "WAL offset");
        assert_eq!(rejected(|h| h.wal_size = i64::MIN), "WAL size");
        assert_eq!(rejected(|h| h.wal_size = 0), "WAL size");
        assert_eq!(rejected(|h| h.wal_offset = 0), "WAL size");
        let unsized_salt = |h: &mut Header| (h.wal_offset, h.wal_size) = (0, 0);
        assert_eq!(rejected(unsized_salt), "WAL salt");
    }

    #[test]
    fn fixed_bytes() {
        let mut b = header().encode();
        b[3] = b'2';
        assert!(matches!(Header::decode(&b), Err(LtxError::Magic(m)) if m == *b"LTX2"));
        for (at, what) in [(4, "flags"), (80, "reserved"), (99, "reserved")] {
            let mut b = header().encode();
            b[at] |= 2;
            assert!(
                matches!(Header::decode(&b), Err(LtxError::Header { field, .. }) if field == what)
            );
        }
    }
}
