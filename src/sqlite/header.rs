//! The database header: the first 100 bytes of page 1.
//!
//! Its counters say whether its own page count can be believed: a writer that knows the field
//! (SQLite 3.7.0 and later) sets "version-valid-for" to the change counter whenever it sets the
//! count, and one that does not leaves the two unequal.

use super::{be32, is_page_size};
use thiserror::Error;

/// Size of the database header in bytes.
pub const HEADER_SIZE: usize = 100;

/// The text that every database begins with.
pub const MAGIC: [u8; 16] = *b"SQLite format 3\0";

/// The fields of the database header that matter to whoever stores the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DbHeader {
    /// Size of a page in bytes: a power of two from 512 to 65,536 (which is stored as 1).
    pub page_size: u32,
    /// File format that a writer must know: 1 for the rollback modes, 2 for WAL.
    pub write_version: u8,
    /// File format that a reader must know: 1 for the rollback modes, 2 for WAL.
    pub read_version: u8,
    /// Incremented by each transaction in the rollback modes; in WAL mode now and then.
    pub change_counter: u32,
    /// Size of the database in pages, where [`DbHeader::pages`] finds it valid.
    pub page_count: u32,
    /// Incremented whenever the schema changes.
    pub schema_cookie: u32,
    /// The change counter for which `page_count` is valid.
    pub version_valid_for: u32,
}

/// Why bytes are not the header of a database.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum HeaderError {
    /// There are fewer than [`HEADER_SIZE`] bytes.
    #[error("the database header has {0} bytes of 100: the file is cut off or is no database")]
    Short(usize),
    /// The file does not begin with [`MAGIC`].
    #[error(
        "the file does not begin with \"SQLite format 3\": it is no database, or an encrypted one"
    )]
    Magic,
    /// The page size is none of SQLite's.
    #[error("the database header gives a page size of {0}: not a power of two from 512 to 65536")]
    PageSize(u32),
    /// One of the file format versions is neither 1 nor 2.
    #[error(
        "the database header gives format versions {write} (write) and {read} (read): only 1 and 2 are known"
    )]
    Version {
        /// The write version found.
        write: u8,
        /// The read version found.
        read: u8,
    },
}

impl DbHeader {
    /// Reads the header at the beginning of `buf`, which holds at least [`HEADER_SIZE`] bytes;
    /// what follows them is not looked at.
    pub fn parse(buf: &[u8]) -> Result<DbHeader, HeaderError> {
        let buf = buf
            .get(..HEADER_SIZE)
            .ok_or(HeaderError::Short(buf.len()))?;
        if buf[..16] != MAGIC {
            return Err(HeaderError::Magic);
        }
        let page_size = match u32::from(u16::from_be_bytes([buf[16], buf[17]])) {
            1 => 65536,
            size => size,
        };
        if !is_page_size(page_size) {
            return Err(HeaderError::PageSize(page_size));
        }
        let (write, read) = (buf[18], buf[19]);
        if !matches!((write, read), (1 | 2, 1 | 2)) {
            return Err(HeaderError::Version { write, read });
        }
        Ok(DbHeader {
            page_size,
            write_version: write,
            read_version: read,
            change_counter: be32(buf, 24),
            page_count: be32(buf, 28),
            schema_cookie: be32(buf, 40),
            version_valid_for: be32(buf, 92),
        })
    }

    /// Whether connections use a WAL: SQLite goes by the read version alone.
    #[must_use]
    pub fn is_wal(&self) -> bool {
        self.read_version == 2
    }

    /// The size of the database in pages, given that of its file in bytes: the header's own count
    /// where it is valid (not zero, and the change counter is the one it was written for), else
    /// the whole pages of the file.
    #[must_use]
    pub fn pages(&self, file_size: u64) -> u32 {
        if self.page_count != 0 && self.change_counter == self.version_valid_for {
            return self.page_count;
        }
        u32::try_from(file_size / u64::from(self.page_size)).unwrap_or(u32::MAX)
    }
}
