//! The rollback journal: the original pages of the transaction being written.
//!
//! A journal is a run of segments. Each begins, at a multiple of the sector size, with a header
//! that fills one sector: magic (8 bytes), record count, nonce, pages of the database before the
//! transaction, sector size, page size. Records follow: page number, the original page, checksum.
//! At the end there may be the name of a super-journal. All numbers are big-endian.
//!
//! [`Journal`] reads one as SQLite's pager does when it finds it hot, that is, after its writer
//! died; in particular
//! - sector size, page size and the database's size are those of the first header;
//! - a record count of −1 (written with `synchronous=OFF`) stands for all whole records up to the
//!   end of the file; one of 0 stands for none, since a writer that syncs fills it in before it
//!   touches the database (only a live writer that rolls back its own transaction reads on there);
//! - a record with a wrong checksum, page number zero or that of the lock page, or the end of the
//!   file amidst a record, ends the journal without an error: what follows was never synced, so
//!   the database was not changed on its account;
//! - records of pages beyond the original size of the database are passed over.

use super::{be32, is_page_size, lock_page};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use thiserror::Error;

/// The bytes that a journal header begins with; a committed journal is deleted, emptied, or has
/// them zeroed.
pub const MAGIC: [u8; 8] = [0xd9, 0xd5, 0x05, 0xf9, 0x20, 0xa1, 0x63, 0xd7];

/// Bytes of a journal header that have a meaning; the rest of its sector is padding.
pub const HEADER_SIZE: usize = 28;

/// The record count that stands for "all up to the end of the file".
pub const COUNT_TO_END: u32 = u32::MAX;

/// The sector size that SQLite's unix VFS reads the first header with. A shorter file has no header
/// to it.
const DEFAULT_SECTOR_SIZE: u64 = 512;
/// Bounds that SQLite sets to the sector size that a header gives.
const SECTOR_SIZES: std::ops::RangeInclusive<u32> = 32..=65536;
/// Longest super-journal name that SQLite reads, in bytes: its longest path.
const MAX_SUPER_JOURNAL_NAME: u32 = 512;
/// What follows the super-journal's name: its length, its checksum, and the magic.
const SUPER_JOURNAL_TRAILER: u64 = 16;

/// Whether a journal that begins with these bytes (8 or more) belongs to a transaction that is
/// being written or was when its writer died. Whether that one is committed nevertheless may
/// depend on its super-journal.
#[must_use]
pub fn is_active(first_bytes: &[u8]) -> bool {
    first_bytes.starts_with(&MAGIC)
}

/// The fields of a journal header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JournalHeader {
    /// Number of records of this segment; [`COUNT_TO_END`] for all up to the end of the file.
    pub record_count: u32,
    /// Random number that the checksums of this segment's records start from.
    pub nonce: u32,
    /// Size of the database before the transaction, in pages: what a rollback truncates it to.
    pub initial_pages: u32,
    /// Size that the header is padded to, in bytes, and that segments start at multiples of.
    pub sector_size: u32,
    /// Size of a page in bytes.
    pub page_size: u32,
}

impl JournalHeader {
    /// Reads the fields after the magic. Nothing is checked: SQLite only looks at the sizes of the
    /// first header.
    fn decode(buf: &[u8; HEADER_SIZE]) -> JournalHeader {
        JournalHeader {
            record_count: be32(buf, 8),
            nonce: be32(buf, 12),
            initial_pages: be32(buf, 16),
            sector_size: be32(buf, 20),
            page_size: be32(buf, 24),
        }
    }
}

/// Why a journal cannot be read.
#[derive(Debug, Error)]
pub enum JournalError {
    /// The reader failed.
    #[error("reading the rollback journal at offset {offset}: {source}")]
    Io {
        /// Where, in bytes.
        offset: u64,
        /// How.
        source: io::Error,
    },
    /// SQLite before 3.5.8 wrote journals without a page size, which only the database could give.
    #[error(
        "the rollback journal gives no page size, as SQLite before 3.5.8 wrote it: \
         open the database with SQLite once to roll it back"
    )]
    NoPageSize,
}

/// The checksum of a journal record: the segment's nonce and every 200th byte of the page, counted
/// from its end.
#[must_use]
pub fn record_checksum(nonce: u32, page: &[u8]) -> u32 {
    let sampled = page.iter().rev().skip(199).step_by(200);
    sampled.fold(nonce, |sum, &byte| sum.wrapping_add(u32::from(byte)))
}

/// A journal that is being read, record by record; see the module for what counts as one.
#[derive(Debug)]
pub struct Journal<R> {
    reader: R,
    len: u64,
    first: JournalHeader,
    super_journal: Option<String>,
    /// Where the next record or header is.
    offset: u64,
    /// The nonce of the segment being read.
    nonce: u32,
    /// Records of it that are still to be read.
    left: u64,
    /// Nothing more is to be read, whatever the file holds.
    ended: bool,
    page: Vec<u8>,
}

impl<R: Read + Seek> Journal<R> {
    /// Opens a journal of `len` bytes. `None`: it holds no transaction to roll back, being empty,
    /// zeroed, or cut off within its first header, or that header being one that SQLite ignores.
    pub fn open(mut reader: R, len: u64) -> Result<Option<Self>, JournalError> {
        if len < DEFAULT_SECTOR_SIZE {
            return Ok(None);
        }
        let Some(first) = read_header(&mut reader, 0)? else {
            return Ok(None);
        };
        if first.page_size == 0 {
            return Err(JournalError::NoPageSize);
        }
        if !is_page_size(first.page_size)
            || !first.sector_size.is_power_of_two()
            || !SECTOR_SIZES.contains(&first.sector_size)
        {
            return Ok(None);
        }
        let super_journal =
            super_journal_name(&mut reader, len).map_err(|source| JournalError::Io {
                offset: len,
                source,
            })?;
        let mut journal = Journal {
            reader,
            len,
            first,
            super_journal,
            offset: 0,
            nonce: 0,
            left: 0,
            ended: false,
            page: vec![0; first.page_size as usize],
        };
        journal.enter_segment(first);
        Ok(Some(journal))
    }

    /// The first segment's header.
    pub fn header(&self) -> &JournalHeader {
        &self.first
    }

    /// The path of the super-journal as its writer saw it, if the journal has one: the transaction
    /// is then committed if no file of that name exists, and to be rolled back if one does.
    pub fn super_journal(&self) -> Option<String> {
        self.super_journal.clone()
    }

    /// The next page number and original page, over all segments; `None` at the journal's end.
    /// A page that comes twice is to be written twice.
    #[expect(
        clippy::should_implement_trait,
        reason = "the page is lent, which an Iterator cannot do"
    )]
    pub fn next(&mut self) -> Result<Option<(u32, &[u8])>, JournalError> {
        while !self.ended {
            if self.left == 0 {
                self.next_segment()?;
                continue;
            }
            self.left -= 1;
            match self.read_record()? {
                Record::Page(pgno) => return Ok(Some((pgno, &self.page))),
                Record::Skipped => {}
                Record::End => self.ended = true,
            }
        }
        Ok(None)
    }

    /// Reads the header of the next segment, at the next multiple of the sector size, or finds that
    /// there is none.
    fn next_segment(&mut self) -> Result<(), JournalError> {
        let sector = u64::from(self.first.sector_size);
        self.offset = self.offset.next_multiple_of(sector);
        if self.offset.saturating_add(sector) > self.len {
            self.ended = true;
            return Ok(());
        }
        match read_header(&mut self.reader, self.offset)? {
            Some(header) => self.enter_segment(header),
            None => self.ended = true,
        }
        Ok(())
    }

    /// Sets out to read the records after `header`, which is at `self.offset`.
    fn enter_segment(&mut self, header: JournalHeader) {
        let sector = u64::from(self.first.sector_size);
        self.offset += sector;
        self.nonce = header.nonce;
        self.left = match header.record_count {
            // A writer that does not sync writes one segment, so this counts from its header; in
            // any other the file's end comes first.
            COUNT_TO_END => self.len.saturating_sub(sector) / self.record_size(),
            count => u64::from(count),
        };
    }

    fn record_size(&self) -> u64 {
        u64::from(self.first.page_size) + 8
    }

    /// Reads the record at `self.offset` and moves past it.
    fn read_record(&mut self) -> Result<Record, JournalError> {
        let offset = self.offset;
        // The length that the caller gave bounds the journal even where the file is longer.
        if offset.saturating_add(self.record_size()) > self.len {
            return Ok(Record::End);
        }
        self.offset += self.record_size();
        let (mut pgno, mut checksum) = ([0; 4], [0; 4]);
        if !(read_at(&mut self.reader, offset, &mut pgno)?
            && read_on(&mut self.reader, offset, &mut self.page)?
            && read_on(&mut self.reader, offset, &mut checksum)?)
        {
            return Ok(Record::End);
        }
        let pgno = u32::from_be_bytes(pgno);
        if pgno == 0 || pgno == lock_page(self.first.page_size) {
            return Ok(Record::End);
        }
        if pgno > self.first.initial_pages {
            return Ok(Record::Skipped);
        }
        if record_checksum(self.nonce, &self.page) != u32::from_be_bytes(checksum) {
            return Ok(Record::End);
        }
        Ok(Record::Page(pgno))
    }
}

/// What was found where a record was expected.
enum Record {
    /// An original page, now in the journal's buffer.
    Page(u32),
    /// A page that the database did not have before the transaction.
    Skipped,
    /// The end of what can be believed.
    End,
}

/// Reads a header; `None` if there is none at `offset`.
fn read_header<R: Read + Seek>(
    reader: &mut R,
    offset: u64,
) -> Result<Option<JournalHeader>, JournalError> {
    let mut buf = [0; HEADER_SIZE];
    let there = read_at(reader, offset, &mut buf)? && is_active(&buf);
    Ok(there.then(|| JournalHeader::decode(&buf)))
}

/// Fills `buf` from `offset`; false if the file ends before.
fn read_at<R: Read + Seek>(
    reader: &mut R,
    offset: u64,
    buf: &mut [u8],
) -> Result<bool, JournalError> {
    reader
        .seek(SeekFrom::Start(offset))
        .map_err(|source| JournalError::Io { offset, source })?;
    read_on(reader, offset, buf)
}

/// Fills `buf` from where the reader is; false if the file ends before. `offset` is for the error.
fn read_on<R: Read>(reader: &mut R, offset: u64, buf: &mut [u8]) -> Result<bool, JournalError> {
    match reader.read_exact(buf) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(source) => Err(JournalError::Io { offset, source }),
    }
}

/// The path of the super-journal that a journal of `len` bytes names at its end, as its writer saw
/// it; `None` if it names none. The name is followed by its length, its checksum (the sum of its
/// bytes, each taken as signed), and the magic; all must be right, and the name be a super-journal's.
/// Bytes of it that are not UTF-8 are replaced; they can only be in its directory.
pub fn super_journal_name<R: Read + Seek>(mut reader: R, len: u64) -> io::Result<Option<String>> {
    if len < SUPER_JOURNAL_TRAILER {
        return Ok(None);
    }
    let mut trailer = [0; SUPER_JOURNAL_TRAILER as usize];
    reader.seek(SeekFrom::Start(len - SUPER_JOURNAL_TRAILER))?;
    if !filled(reader.read_exact(&mut trailer))? {
        return Ok(None);
    }
    let (name_len, checksum) = (be32(&trailer, 0), be32(&trailer, 4));
    if trailer[8..] != MAGIC
        || name_len == 0
        || name_len > MAX_SUPER_JOURNAL_NAME
        || u64::from(name_len) > len - SUPER_JOURNAL_TRAILER
    {
        return Ok(None);
    }
    let mut name = vec![0; name_len as usize];
    reader.seek(SeekFrom::Start(
        len - SUPER_JOURNAL_TRAILER - u64::from(name_len),
    ))?;
    if !filled(reader.read_exact(&mut name))? {
        return Ok(None);
    }
    let sum = name.iter().fold(0u32, |sum, &byte| {
        sum.wrapping_add_signed(i32::from(byte as i8))
    });
    // To SQLite the name is a C string.
    if let Some(end) = name.iter().position(|&byte| byte == 0) {
        name.truncate(end);
    }
    let valid = sum == checksum && has_super_journal_suffix(&name, u8::is_ascii_hexdigit);
    Ok(valid.then(|| String::from_utf8_lossy(&name).into_owned()))
}

/// Whether a buffer was filled; false if the file ended before.
fn filled(read: io::Result<()>) -> io::Result<bool> {
    match read {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

/// Length of `-mjHHHHHH9HH`.
const SUPER_JOURNAL_SUFFIX: usize = 12;

/// Whether `name` ends as a super-journal's does, `-mj` and nine hexadecimal digits of which the
/// seventh is a 9, by the definition of a digit given.
fn has_super_journal_suffix(name: &[u8], is_digit: impl Fn(&u8) -> bool) -> bool {
    let Some((_, suffix)) = name.split_last_chunk::<SUPER_JOURNAL_SUFFIX>() else {
        return false;
    };
    suffix.starts_with(b"-mj") && suffix[9] == b'9' && suffix[3..].iter().all(is_digit)
}

/// The database beside which SQLite made a super-journal of this file name, which is the database's
/// followed by `-mj`, six hexadecimal digits in upper case, a 9, and two more; `None` for any other
/// name.
#[must_use]
pub fn super_journal_database(name: &str) -> Option<&str> {
    let is_digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'A'..=b'F');
    if !has_super_journal_suffix(name.as_bytes(), is_digit) {
        return None;
    }
    // The suffix is ASCII, so this is a character boundary.
    let database = &name[..name.len() - SUPER_JOURNAL_SUFFIX];
    (!database.is_empty()).then_some(database)
}

/// Whether SQLite makes super-journals with such file names; see [`super_journal_database`].
#[must_use]
pub fn is_super_journal_file_name(name: &str) -> bool {
    super_journal_database(name).is_some()
}
