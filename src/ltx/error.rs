//! What can be wrong with an LTX file, or with what the encoder is asked to put into one.

use std::io;

/// Why a transaction file could not be read or written.
///
/// Every variant but [`LtxError::Io`] and [`LtxError::BufferSize`] says that the bytes (or, for
/// an encoder, its input) are no valid LTX version 1: reading again will not help, a fresh copy
/// of the transaction or a snapshot will.
#[derive(Debug, thiserror::Error)]
pub enum LtxError {
    /// The underlying reader or writer failed; the file itself may be good.
    #[error("LTX: reading or writing failed: {0}")]
    Io(#[source] io::Error),
    /// The input ends before the file (or its compressed page block) is complete.
    #[error("LTX: the file ends too early: it was cut off, fetch the transaction again")]
    Truncated,
    /// The LZ4 frame around the page block is damaged or uses what LTX does not allow.
    #[error("LTX: bad LZ4 page block: {0}")]
    Compression(String),
    /// The first four bytes are not `LTX1`.
    #[error("LTX: not an LTX version 1 file: it begins with {0:02x?} in place of \"LTX1\"")]
    Magic([u8; 4]),
    /// The header breaks a rule of the format.
    #[error("LTX: invalid header: {field} {rule}")]
    Header {
        /// The header field at fault.
        field: &'static str,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// A page number that is zero, out of order, above commit, or the lock page.
    #[error("LTX: page {pgno} cannot stand here: {rule}")]
    PageNumber {
        /// The page number at fault.
        pgno: u32,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// A snapshot that does not hold every page of its database.
    #[error("LTX: incomplete snapshot: page {missing} of {commit} is missing")]
    IncompleteSnapshot {
        /// The first page that is missing.
        missing: u32,
        /// The database's size, in pages.
        commit: u32,
    },
    /// A buffer whose length is not the page size of the file.
    #[error("LTX: a page buffer of {actual} bytes was given for pages of {expected} bytes")]
    BufferSize {
        /// The file's page size, in bytes.
        expected: u32,
        /// The buffer's length, in bytes.
        actual: usize,
    },
    /// Data between the end of the page list and the end of its LZ4 frame.
    #[error("LTX: the LZ4 page block goes on after its last page")]
    TrailingData,
    /// The checksum over the whole file is wrong: its bytes were changed.
    #[error(
        "LTX: file checksum mismatch: computed {computed:016x}, the trailer says {stored:016x}"
    )]
    FileChecksum {
        /// Computed from the bytes read.
        computed: u64,
        /// Stored in the trailer.
        stored: u64,
    },
    /// The database checksum after the transaction cannot be the one given.
    #[error("LTX: post-apply checksum mismatch: expected {expected:016x}, found {found:016x}")]
    PostApplyChecksum {
        /// What the pages, or the lack of any, call for.
        expected: u64,
        /// What the trailer (or the encoder's caller) gives.
        found: u64,
    },
    /// The post-apply checksum lacks bit 63, which every checksum carries.
    #[error("LTX: post-apply checksum {0:016x} lacks the checksum flag (bit 63)")]
    PostApplyFlag(u64),
    /// Files that were to be merged do not follow each other.
    #[error("LTX: the file from TXID {min:016x} on does not follow the one up to {after:016x}")]
    NotConsecutive {
        /// First TXID of the file that does not follow.
        min: u64,
        /// Last TXID of the one before it.
        after: u64,
    },
    /// The encoder or decoder was used again after an error.
    #[error("LTX: used again after an error: start over from the file's beginning")]
    Failed,
}

impl From<io::Error> for LtxError {
    /// Sorts damaged input (a cut file, a bad LZ4 frame) from failures of the reader or writer.
    fn from(e: io::Error) -> Self {
        if let Some(frame) = e
            .get_ref()
            .and_then(|s| s.downcast_ref::<lz4_flex::frame::Error>())
        {
            return LtxError::Compression(format!("{frame:?}"));
        }
        match e.kind() {
            io::ErrorKind::UnexpectedEof => LtxError::Truncated,
            _ => LtxError::Io(e),
        }
    }
}
