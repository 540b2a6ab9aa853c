//! One segment of a transaction log: a preallocated file of records, each a whole LTX file.
//!
//! ```text
//! segment header (64 bytes): magic "TNRLOG01" · salt u64 · first TXID u64 · zeros · CRC u64
//! record, at a multiple of 8: magic u32 · header CRC u32 · length u64 · min TXID u64 ·
//!                             max TXID u64 · flushed TXID u64 · body CRC u64 · LTX file · padding
//! ```
//! All integers are big-endian; CRCs are CRC-64/GO-ISO, but a record's header CRC is
//! CRC-32/ISO-HDLC. It covers the segment's salt, so that bytes of another segment are never taken
//! for a record of this one.
//!
//! Invariants: the TXIDs of a segment are contiguous; a record that spans several TXIDs (a
//! snapshot) is the first of its segment. A record's header is written after, or together with,
//! its body. `flushed TXID` is what was known to be on disk when the record was written: a bad
//! record whose TXID a later record calls flushed is corruption, any other bad record is the torn
//! end of the log.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crc_fast::CrcAlgorithm::{Crc32IsoHdlc, Crc64GoIso};

use crate::ltx;

use super::disk::{Disk, DiskFile, File, Open};
use super::error::StoreError;

/// Bytes of the segment header.
pub const SEGMENT_HEADER_SIZE: u64 = 64;
/// Bytes of a record's own header, before the LTX file.
pub const RECORD_HEADER_SIZE: usize = 48;
const SEGMENT_MAGIC: &[u8; 8] = b"TNRLOG01";
const RECORD_MAGIC: u32 = 0x5452_4543;
/// The smallest LTX file: header, four zero bytes, trailer.
const MIN_LTX_SIZE: u64 = (ltx::HEADER_SIZE + ltx::PAGE_HEADER_SIZE + ltx::TRAILER_SIZE) as u64;

/// A record's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// Bytes of the LTX file.
    pub length: u64,
    /// First TXID.
    pub min_txid: u64,
    /// Last TXID.
    pub max_txid: u64,
    /// The TXID up to which the log was on disk when this was written. That of the record itself: it
    /// took the place of another log, once it was on disk.
    pub flushed_txid: u64,
    /// CRC of the LTX file's bytes.
    pub body_crc: u64,
}

impl RecordHeader {
    /// The bytes on disk, for a segment with this salt.
    pub fn encode(&self, salt: u64) -> [u8; RECORD_HEADER_SIZE] {
        let mut b = [0u8; RECORD_HEADER_SIZE];
        b[0..4].copy_from_slice(&RECORD_MAGIC.to_be_bytes());
        b[8..16].copy_from_slice(&self.length.to_be_bytes());
        b[16..24].copy_from_slice(&self.min_txid.to_be_bytes());
        b[24..32].copy_from_slice(&self.max_txid.to_be_bytes());
        b[32..40].copy_from_slice(&self.flushed_txid.to_be_bytes());
        b[40..48].copy_from_slice(&self.body_crc.to_be_bytes());
        let crc = header_crc(&b, salt);
        b[4..8].copy_from_slice(&crc.to_be_bytes());
        b
    }

    /// `None`: these bytes are no record header of this segment.
    pub fn decode(b: &[u8; RECORD_HEADER_SIZE], salt: u64) -> Option<RecordHeader> {
        if be32(&b[0..4]) != RECORD_MAGIC || be32(&b[4..8]) != header_crc(b, salt) {
            return None;
        }
        let h = RecordHeader {
            length: be64(&b[8..16]),
            min_txid: be64(&b[16..24]),
            max_txid: be64(&b[24..32]),
            flushed_txid: be64(&b[32..40]),
            body_crc: be64(&b[40..48]),
        };
        (h.min_txid >= 1 && h.max_txid >= h.min_txid && h.length >= MIN_LTX_SIZE).then_some(h)
    }

    /// Bytes that the whole record takes in the segment.
    pub fn disk_size(&self) -> u64 {
        (RECORD_HEADER_SIZE as u64)
            .saturating_add(self.length)
            .checked_next_multiple_of(8)
            .unwrap_or(u64::MAX)
    }
}

fn encode_header(salt: u64, first_max: u64) -> [u8; SEGMENT_HEADER_SIZE as usize] {
    let mut h = [0u8; SEGMENT_HEADER_SIZE as usize];
    h[0..8].copy_from_slice(SEGMENT_MAGIC);
    h[8..16].copy_from_slice(&salt.to_be_bytes());
    h[16..24].copy_from_slice(&first_max.to_be_bytes());
    let crc = crc_fast::checksum(Crc64GoIso, &h[..56]);
    h[56..64].copy_from_slice(&crc.to_be_bytes());
    h
}

fn header_crc(b: &[u8; RECORD_HEADER_SIZE], salt: u64) -> u32 {
    // Half of a CRC-64 would miss errors of a single bit.
    let mut crc = crc_fast::Digest::new(Crc32IsoHdlc);
    crc.update(&salt.to_be_bytes());
    crc.update(&b[8..]);
    crc.finalize() as u32
}

fn be32(b: &[u8]) -> u32 {
    u32::from_be_bytes([b[0], b[1], b[2], b[3]])
}

fn be64(b: &[u8]) -> u64 {
    u64::from_be_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])
}

/// The name of the segment whose first record ends at this TXID.
pub fn file_name(first_txid: u64) -> String {
    format!("{first_txid:016x}.log")
}

/// The TXID in a segment's file name; `None` for any other file.
pub fn parse_file_name(name: &str) -> Option<u64> {
    let hex = name.strip_suffix(".log")?;
    (hex.len() == 16 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
        .then(|| u64::from_str_radix(hex, 16).ok())?
}

/// A segment, open, with the places of its records.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Where it lies.
    pub path: PathBuf,
    /// The open file.
    pub file: File,
    /// Distinguishes this file's records from any other's.
    pub salt: u64,
    /// First TXID of the first record.
    pub first_min: u64,
    /// Last TXID of the first record; each further record holds the one TXID that follows.
    pub first_max: u64,
    /// Offsets of the records, in units of 8 bytes.
    offsets: Vec<u32>,
    /// Where the next record goes.
    pub tail: u64,
    /// Bytes preallocated.
    pub allocated: u64,
    /// Up to here it was written, be it with zeros.
    pub filled: u64,
}

impl Segment {
    /// Creates an empty segment at `path` for a first record that spans these TXIDs. The caller
    /// syncs the file and its directory.
    pub fn create(
        disk: &dyn Disk,
        path: PathBuf,
        salt: u64,
        first_min: u64,
        first_max: u64,
    ) -> Result<Segment, StoreError> {
        let file = disk
            .open(&path, Open::Empty)
            .map_err(StoreError::io("create log segment", &path))?;
        let h = encode_header(salt, first_max);
        if let Err(e) = file.write_all_at(&h, 0) {
            // Half a segment would look like damage at the next start.
            let _ = disk.remove_file(&path);
            return Err(StoreError::io("write log segment", &path)(e));
        }
        Ok(Segment {
            path,
            file,
            salt,
            first_min,
            first_max,
            offsets: Vec::new(),
            tail: SEGMENT_HEADER_SIZE,
            allocated: SEGMENT_HEADER_SIZE,
            filled: SEGMENT_HEADER_SIZE,
        })
    }

    /// Makes a file a segment of this one record, whose body is in its place already. Not synced.
    pub fn of_one(
        path: PathBuf,
        file: File,
        salt: u64,
        record: &RecordHeader,
    ) -> io::Result<Segment> {
        let mut segment = Segment {
            path,
            file,
            salt,
            first_min: record.min_txid,
            first_max: record.max_txid,
            offsets: Vec::new(),
            tail: SEGMENT_HEADER_SIZE,
            allocated: SEGMENT_HEADER_SIZE + record.disk_size(),
            filled: 0,
        };
        let mut head = encode_header(salt, record.max_txid).to_vec();
        head.extend_from_slice(&record.encode(salt));
        segment.file.write_all_at(&head, 0)?;
        segment.file.set_len(segment.allocated)?;
        segment.push(record);
        Ok(segment)
    }

    /// Opens a segment and finds its records, up to the first that is not whole. Bodies of records
    /// above `verified` are read and checked; those of older ones are not.
    pub fn open(disk: &dyn Disk, path: &Path, verified: u64) -> Result<Scanned, StoreError> {
        let file = disk
            .open(path, Open::Write)
            .map_err(StoreError::io("open log segment", path))?;
        Segment::scan(path, file, verified)
    }

    /// The same without the right to write, every body checked: for inspection.
    pub fn inspect(disk: &dyn Disk, path: &Path) -> Result<Scanned, StoreError> {
        let file = disk
            .open(path, Open::Read)
            .map_err(StoreError::io("open log segment", path))?;
        Segment::scan(path, file, 0)
    }

    fn scan(path: &Path, file: File, verified: u64) -> Result<Scanned, StoreError> {
        let len = file
            .size()
            .map_err(StoreError::io("stat log segment", path))?;
        let mut h = [0u8; SEGMENT_HEADER_SIZE as usize];
        let whole = len >= SEGMENT_HEADER_SIZE;
        if whole {
            file.read_exact_at(&mut h, 0)
                .map_err(StoreError::io("read log segment", path))?;
        }
        if !whole
            || &h[0..8] != SEGMENT_MAGIC
            || be64(&h[56..64]) != crc_fast::checksum(Crc64GoIso, &h[..56])
        {
            return Ok(Scanned {
                segment: None,
                end: ScanEnd::NoHeader,
            });
        }
        let mut seg = Segment {
            path: path.to_owned(),
            file,
            salt: be64(&h[8..16]),
            first_min: 0,
            first_max: be64(&h[16..24]),
            offsets: Vec::new(),
            tail: SEGMENT_HEADER_SIZE,
            allocated: len,
            filled: 0,
        };
        let end = loop {
            match seg.record_header_at(seg.tail, len) {
                Ok(Some(h)) if seg.fits(&h) => {
                    let checked = h.max_txid <= verified || seg.body_is_whole(seg.tail, &h)?;
                    if !checked {
                        break ScanEnd::BadRecord { txid: h.max_txid };
                    }
                    seg.push(&h);
                }
                Ok(Some(h)) => break ScanEnd::BadRecord { txid: h.max_txid },
                Ok(None) => break ScanEnd::Clean,
                Err(e) => return Err(StoreError::io("read log segment", path)(e)),
            }
        };
        Ok(Scanned {
            segment: Some(seg),
            end,
        })
    }

    fn fits(&self, h: &RecordHeader) -> bool {
        if self.offsets.is_empty() {
            h.max_txid == self.first_max
        } else {
            h.min_txid == h.max_txid
                && Some(h.min_txid) == self.last_txid().and_then(|t| t.checked_add(1))
        }
    }

    /// `None` where no record header stands, or one that reaches beyond the end of the file.
    fn record_header_at(&self, offset: u64, len: u64) -> io::Result<Option<RecordHeader>> {
        if offset + RECORD_HEADER_SIZE as u64 > len {
            return Ok(None);
        }
        let mut b = [0u8; RECORD_HEADER_SIZE];
        self.file.read_exact_at(&mut b, offset)?;
        Ok(RecordHeader::decode(&b, self.salt)
            .filter(|h| h.length <= len.saturating_sub(offset + RECORD_HEADER_SIZE as u64)))
    }

    fn body_is_whole(&self, offset: u64, h: &RecordHeader) -> Result<bool, StoreError> {
        let mut body = self.body_reader(offset, h.length);
        let mut crc = crc_fast::Digest::new(Crc64GoIso);
        let mut buf = vec![0u8; 64 << 10];
        loop {
            match body
                .read(&mut buf)
                .map_err(StoreError::io("read log segment", &self.path))?
            {
                0 => return Ok(crc.finalize() == h.body_crc),
                n => crc.update(&buf[..n]),
            }
        }
    }

    /// What is wrong with the segment's header, if anything is.
    pub fn header_damage(&self) -> Option<String> {
        let mut h = [0u8; SEGMENT_HEADER_SIZE as usize];
        let read = self.file.read_exact_at(&mut h, 0);
        (read.is_err() || h != encode_header(self.salt, self.first_max))
            .then(|| "its header is not what was written".to_owned())
    }

    /// Reads the record at `offset`, whose last TXID is this: how many bytes that were, and what is
    /// wrong with it.
    pub fn record_damage(&self, offset: u64, max_txid: u64) -> (u64, Option<String>) {
        let damage = |what: String| Some(format!("transaction {max_txid:016x}: {what}"));
        match read_header(&*self.file, self.salt, offset) {
            Ok(h) if h.max_txid != max_txid => (
                0,
                damage(format!("its header is that of {:016x}", h.max_txid)),
            ),
            Ok(h) => {
                let found = match self.body_is_whole(offset, &h) {
                    Ok(true) => None,
                    Ok(false) => damage("it does not match its checksum".to_owned()),
                    Err(e) => damage(e.to_string()),
                };
                (h.disk_size(), found)
            }
            Err(e) => (RECORD_HEADER_SIZE as u64, damage(e.to_string())),
        }
    }

    /// Looks, behind a place where the records end, for one that says that `txid` was flushed:
    /// proof that what stands there is corruption and not the torn end of the log.
    pub fn later_record_says_flushed(&self, txid: u64) -> Result<bool, StoreError> {
        let io = |e| StoreError::io("read log segment", &self.path)(e);
        let len = self.file.size().map_err(io)?;
        let (mut offset, mut buf) = (self.tail, vec![0u8; 1 << 20]);
        while offset < len {
            let n = self.file.read_at(&mut buf, offset).map_err(io)?;
            if n < RECORD_HEADER_SIZE {
                break;
            }
            let last = n - RECORD_HEADER_SIZE;
            for at in (0..=last).step_by(8) {
                if be32(&buf[at..at + 4]) != RECORD_MAGIC {
                    continue;
                }
                let header = buf[at..at + RECORD_HEADER_SIZE]
                    .try_into()
                    .expect("of this length");
                if RecordHeader::decode(header, self.salt).is_some_and(|h| h.flushed_txid >= txid) {
                    return Ok(true);
                }
            }
            offset += (last / 8 * 8 + 8) as u64;
        }
        Ok(false)
    }

    /// The TXID up to which the log was on disk when the last record was written; 0: nothing is
    /// said.
    pub fn says_flushed(&self) -> Result<u64, StoreError> {
        let Some(offset) = self.record_offsets().last() else {
            return Ok(0);
        };
        let header = read_header(&*self.file, self.salt, offset)
            .map_err(StoreError::io("read log segment", &self.path))?;
        Ok(header.flushed_txid)
    }

    /// Writes what the records after `flushed` consist of once more. If a sync of theirs has
    /// failed, the kernel may take them for written, and no sync would write them.
    pub fn write_again(&self, flushed: u64) -> io::Result<()> {
        let start = if self.last_txid().is_none() || self.first_max > flushed {
            0
        } else {
            self.offset_of(flushed + 1).unwrap_or(self.tail)
        };
        let mut buf = vec![0u8; 256 << 10];
        let mut at = start;
        while at < self.tail {
            let n = buf.len().min((self.tail - at) as usize);
            // The padding of the last record may not be there.
            match self.file.read_at(&mut buf[..n], at)? {
                0 => break,
                n => {
                    self.file.write_all_at(&buf[..n], at)?;
                    at += n as u64;
                }
            }
        }
        Ok(())
    }

    /// Notes a record that was written at the tail.
    pub fn push(&mut self, h: &RecordHeader) {
        if self.offsets.is_empty() {
            self.first_min = h.min_txid;
        }
        self.offsets.push((self.tail / 8) as u32);
        self.tail += h.disk_size();
    }

    /// Another segment follows: what is behind the last record goes. That is the rest of the
    /// preallocation, and perhaps a part of a record that could not be written, which a start that
    /// reads no bodies would take for the one that the next segment begins with.
    pub fn end(&mut self) -> std::io::Result<()> {
        self.file
            .set_len(self.tail)
            .or_else(|_| self.file.write_all_at(&[0; RECORD_HEADER_SIZE], self.tail))?;
        self.allocated = self.tail;
        Ok(())
    }

    /// Takes the last record off again.
    pub fn pop(&mut self) {
        if let Some(offset) = self.offsets.pop() {
            self.tail = u64::from(offset) * 8;
        }
    }

    /// Last TXID; `None` while empty.
    pub fn last_txid(&self) -> Option<u64> {
        let n = self.offsets.len() as u64;
        (n > 0).then(|| self.first_max.saturating_add(n - 1))
    }

    /// How many records there are.
    pub fn len(&self) -> usize {
        self.offsets.len()
    }

    /// Whether it has no record yet.
    pub fn is_empty(&self) -> bool {
        self.offsets.is_empty()
    }

    /// The offset of the record that starts with this TXID.
    pub fn offset_of(&self, min_txid: u64) -> Option<u64> {
        let index = if min_txid == self.first_min {
            0
        } else {
            min_txid.checked_sub(self.first_max)? as usize
        };
        if index == 0 && min_txid != self.first_min {
            return None;
        }
        self.offsets.get(index).map(|o| u64::from(*o) * 8)
    }

    /// Offsets of all records, in order.
    pub fn record_offsets(&self) -> impl Iterator<Item = u64> + '_ {
        self.offsets.iter().map(|o| u64::from(*o) * 8)
    }
}

/// Reads the header of the record at `offset` of a segment's file.
pub fn read_header(file: &dyn DiskFile, salt: u64, offset: u64) -> io::Result<RecordHeader> {
    let mut b = [0u8; RECORD_HEADER_SIZE];
    file.read_exact_at(&mut b, offset)?;
    RecordHeader::decode(&b, salt)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "bad log record header"))
}

impl Segment {
    /// The LTX file of the record at `offset`.
    pub fn body_reader(&self, offset: u64, length: u64) -> BodyReader {
        BodyReader::new(
            self.file.clone(),
            offset + RECORD_HEADER_SIZE as u64,
            length,
        )
    }
}

/// Reads an LTX file that is a part of another file.
#[derive(Clone, Debug)]
pub struct BodyReader {
    file: File,
    offset: u64,
    left: u64,
}

impl BodyReader {
    /// The `length` bytes from `offset` on.
    pub fn new(file: File, offset: u64, length: u64) -> Self {
        BodyReader {
            file,
            offset,
            left: length,
        }
    }

    /// Goes on behind this many bytes, at most at the end.
    pub fn skip(&mut self, bytes: u64) {
        let bytes = bytes.min(self.left);
        self.offset += bytes;
        self.left -= bytes;
    }

    /// Fills `buf` with the bytes that come next, which are read again afterwards.
    pub fn peek(&self, buf: &mut [u8]) -> io::Result<()> {
        if (buf.len() as u64) > self.left {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.file.read_exact_at(buf, self.offset)
    }
}

impl Read for BodyReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buf.len());
        let n = self.file.read_at(&mut buf[..want], self.offset)?;
        if n == 0 && want > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.offset += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

/// What opening a segment found.
#[derive(Debug)]
pub struct Scanned {
    /// The segment with its whole records; `None` if not even the header is whole.
    pub segment: Option<Segment>,
    /// How it ends.
    pub end: ScanEnd,
}

/// How the records of a segment end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScanEnd {
    /// With unwritten space, or the end of the file.
    Clean,
    /// With a record that is not whole, or out of order.
    BadRecord {
        /// The TXID that it claims.
        txid: u64,
    },
    /// The file has no valid segment header.
    NoHeader,
}
