//! The write-ahead log: its header, its frames, and the checksum that chains them.
//!
//! A frame is valid if its page number is not zero, its salts are the WAL header's, and its
//! checksum follows from that of the frame before it (the first one's from the header's). A frame
//! with a non-zero commit size ends a transaction; valid frames after the last such are of none.
//! The checksum reads its input as 32-bit words, little- or big-endian as the WAL's magic says;
//! everything that is stored is stored big-endian.

use super::{be32, is_page_size};
use thiserror::Error;

/// Size of the WAL header in bytes.
pub const WAL_HEADER_SIZE: usize = 32;
/// Size of a frame's header in bytes; the page follows it.
pub const FRAME_HEADER_SIZE: usize = 24;

/// The WAL's magic, of which the lowest bit is set where checksums are big-endian.
const MAGIC: u32 = 0x377f_0682;
/// The one version of the WAL format.
const VERSION: u32 = 3_007_000;

/// The two halves of a cumulative checksum; (0, 0) before anything was summed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WalChecksum(pub u32, pub u32);

/// Why bytes are not the header of a WAL. SQLite takes a WAL with such a header for empty, but for
/// a version that it does not know, on which it refuses to open the database.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum WalError {
    /// The file does not begin with one of the two magic numbers.
    #[error("the WAL begins with {0:#010x}: not a WAL header, so it holds no transactions")]
    Magic(u32),
    /// The format version is not 3007000.
    #[error("the WAL has format version {0}: only 3007000 is known")]
    Version(u32),
    /// The page size is none of SQLite's.
    #[error("the WAL header gives a page size of {0}: not a power of two from 512 to 65536")]
    PageSize(u32),
    /// The header's checksum is not that of its fields.
    #[error(
        "the WAL header's checksum is wrong: it was not completely written, so the WAL holds no transactions"
    )]
    Checksum,
}

/// Extends the checksum `seed` by `data`, whose length is a multiple of 8 bytes (what is over is
/// not summed), read as 32-bit words in the byte order given.
#[must_use]
pub fn wal_checksum(big_endian: bool, seed: WalChecksum, data: &[u8]) -> WalChecksum {
    debug_assert!(
        data.len().is_multiple_of(8),
        "a WAL checksum covers pairs of 32-bit words"
    );
    if big_endian {
        sum_words(seed, data, u32::from_be_bytes)
    } else {
        sum_words(seed, data, u32::from_le_bytes)
    }
}

/// The loop of [`wal_checksum`], compiled once for each byte order. It is in every commit: whole
/// 64-byte blocks go first so that the compiler unrolls them without bounds checks.
#[inline(always)]
fn sum_words(seed: WalChecksum, data: &[u8], word: impl Fn([u8; 4]) -> u32) -> WalChecksum {
    let WalChecksum(mut s1, mut s2) = seed;
    let mut add = |pair: &[u8; 8]| {
        let [a, b, c, d, e, f, g, h] = *pair;
        s1 = s1.wrapping_add(word([a, b, c, d])).wrapping_add(s2);
        s2 = s2.wrapping_add(word([e, f, g, h])).wrapping_add(s1);
    };
    let (pairs, _) = data.as_chunks::<8>();
    let (blocks, rest) = pairs.as_chunks::<8>();
    blocks
        .iter()
        .for_each(|block| block.iter().for_each(&mut add));
    rest.iter().for_each(&mut add);
    WalChecksum(s1, s2)
}

/// The offset in bytes of frame `frame` (from 1 on; 0 is taken for 1) in a WAL of pages of
/// `page_size` bytes.
#[must_use]
pub fn frame_offset(frame: u32, page_size: u32) -> u64 {
    let frame_size = u64::from(page_size) + FRAME_HEADER_SIZE as u64;
    WAL_HEADER_SIZE as u64 + u64::from(frame.saturating_sub(1)) * frame_size
}

/// The header of a WAL: the first 32 bytes of the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WalHeader {
    /// The byte order in which checksums read their input.
    pub big_endian: bool,
    /// Size of a page in bytes.
    pub page_size: u32,
    /// How many times the WAL was restarted after a checkpoint.
    pub checkpoint_seq: u32,
    /// First salt: incremented at each restart.
    pub salt1: u32,
    /// Second salt: random at each restart.
    pub salt2: u32,
    /// Checksum over the first 24 bytes: the seed of the first frame's.
    pub checksum: WalChecksum,
}

impl WalHeader {
    /// A header whose checksums are in this machine's byte order (the fastest to compute), with
    /// its own checksum computed. `page_size` is in bytes.
    #[must_use]
    pub fn new(page_size: u32, checkpoint_seq: u32, salt1: u32, salt2: u32) -> WalHeader {
        let mut header = WalHeader {
            big_endian: cfg!(target_endian = "big"),
            page_size,
            checkpoint_seq,
            salt1,
            salt2,
            checksum: WalChecksum::default(),
        };
        header.checksum = header.computed_checksum();
        header
    }

    /// Reads a header; it is right in every field and its checksum, or an error.
    pub fn decode(buf: &[u8; WAL_HEADER_SIZE]) -> Result<WalHeader, WalError> {
        let magic = be32(buf, 0);
        if magic & !1 != MAGIC {
            return Err(WalError::Magic(magic));
        }
        let header = WalHeader {
            big_endian: magic & 1 == 1,
            page_size: be32(buf, 8),
            checkpoint_seq: be32(buf, 12),
            salt1: be32(buf, 16),
            salt2: be32(buf, 20),
            checksum: WalChecksum(be32(buf, 24), be32(buf, 28)),
        };
        if !is_page_size(header.page_size) {
            return Err(WalError::PageSize(header.page_size));
        }
        // In SQLite's order: a version is only believed when the checksum is right.
        if wal_checksum(header.big_endian, WalChecksum::default(), &buf[..24]) != header.checksum {
            return Err(WalError::Checksum);
        }
        match be32(buf, 4) {
            VERSION => Ok(header),
            version => Err(WalError::Version(version)),
        }
    }

    /// The header's bytes, with the checksum that its other fields make.
    #[must_use]
    pub fn encode(&self) -> [u8; WAL_HEADER_SIZE] {
        let mut buf = [0; WAL_HEADER_SIZE];
        buf[..24].copy_from_slice(&self.summed_bytes());
        let WalChecksum(s1, s2) = self.computed_checksum();
        buf[24..28].copy_from_slice(&s1.to_be_bytes());
        buf[28..].copy_from_slice(&s2.to_be_bytes());
        buf
    }

    fn summed_bytes(&self) -> [u8; 24] {
        let magic = MAGIC | u32::from(self.big_endian);
        let fields = [
            magic,
            VERSION,
            self.page_size,
            self.checkpoint_seq,
            self.salt1,
            self.salt2,
        ];
        let mut buf = [0; 24];
        for (bytes, field) in buf.chunks_exact_mut(4).zip(fields) {
            bytes.copy_from_slice(&field.to_be_bytes());
        }
        buf
    }

    fn computed_checksum(&self) -> WalChecksum {
        wal_checksum(
            self.big_endian,
            WalChecksum::default(),
            &self.summed_bytes(),
        )
    }
}

/// The header of a frame: 24 bytes before its page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// The page that the frame holds; zero in no valid frame.
    pub pgno: u32,
    /// Size of the database in pages after the transaction that this frame ends; zero for a frame
    /// that ends none.
    pub commit: u32,
    /// First salt of the WAL header at the time of writing.
    pub salt1: u32,
    /// Second salt of the WAL header at the time of writing.
    pub salt2: u32,
    /// Checksum over everything from the WAL's beginning to this frame's end.
    pub checksum: WalChecksum,
}

impl FrameHeader {
    /// Reads a frame header; whether the frame is valid is for [`FrameHeader::expected_checksum`]
    /// and a comparison of the salts to say.
    #[must_use]
    pub fn decode(buf: &[u8; FRAME_HEADER_SIZE]) -> FrameHeader {
        FrameHeader {
            pgno: be32(buf, 0),
            commit: be32(buf, 4),
            salt1: be32(buf, 8),
            salt2: be32(buf, 12),
            checksum: WalChecksum(be32(buf, 16), be32(buf, 20)),
        }
    }

    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; FRAME_HEADER_SIZE] {
        let WalChecksum(s1, s2) = self.checksum;
        let mut buf = [0; FRAME_HEADER_SIZE];
        let fields = [self.pgno, self.commit, self.salt1, self.salt2, s1, s2];
        for (bytes, field) in buf.chunks_exact_mut(4).zip(fields) {
            bytes.copy_from_slice(&field.to_be_bytes());
        }
        buf
    }

    /// The checksum that this frame must have after a frame (or WAL header) with the checksum
    /// `prev`, holding `page`: over the first 8 bytes of this header (the salts are not summed),
    /// then the page.
    #[must_use]
    pub fn expected_checksum(
        &self,
        big_endian: bool,
        prev: WalChecksum,
        page: &[u8],
    ) -> WalChecksum {
        let mut fields = [0; 8];
        fields[..4].copy_from_slice(&self.pgno.to_be_bytes());
        fields[4..].copy_from_slice(&self.commit.to_be_bytes());
        wal_checksum(big_endian, wal_checksum(big_endian, prev, &fields), page)
    }

    /// The header of a frame that holds `page` as page `pgno` in the WAL of header `wal`, after a
    /// frame (or WAL header) with the checksum `prev`. `commit` is as in [`FrameHeader::commit`].
    #[must_use]
    pub fn for_page(
        wal: &WalHeader,
        prev: WalChecksum,
        pgno: u32,
        commit: u32,
        page: &[u8],
    ) -> FrameHeader {
        let mut header = FrameHeader {
            pgno,
            commit,
            salt1: wal.salt1,
            salt2: wal.salt2,
            checksum: prev,
        };
        header.checksum = header.expected_checksum(wal.big_endian, prev, page);
        header
    }
}
