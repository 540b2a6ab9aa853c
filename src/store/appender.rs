//! Writing one record to a log.
//!
//! Invariants:
//! - The log is locked as long as there is an appender.
//! - Until the record is committed, the room of its header keeps the zeros that end the log: a crash
//!   leaves the log as it was.

use std::io::{self, Write};

use crc_fast::CrcAlgorithm::Crc64GoIso;
use parking_lot::MutexGuard;

use super::disk::Disk;
use super::error::StoreError;
use super::log::{Inner, SEGMENT_SIZE, WRITE_BUFFER};
use super::segment::{RECORD_HEADER_SIZE, RecordHeader, Segment};

/// First preallocation of a segment; doubled up to a quarter of the segment.
const FIRST_ALLOCATION: u64 = 64 << 10;
/// The least and the most that is filled with zeros at a time; in between, as much as there is.
const FIRST_FILL: u64 = 16 << 10;
const LARGEST_FILL: u64 = 256 << 10;
/// Records from this size on, in bytes, are written without zeros behind them.
const LARGE: usize = 64 << 10;

static ZEROS: [u8; LARGEST_FILL as usize] = [0; LARGEST_FILL as usize];

/// A record being written. Dropped without [`Appender::commit`], it never was.
pub struct Appender<'a> {
    disk: &'a dyn Disk,
    inner: MutexGuard<'a, Inner>,
    min_txid: u64,
    max_txid: u64,
    replaces: bool,
    length: u64,
    crc: crc_fast::Digest,
    /// Bytes not written yet; they go to `buffer_at` after the tail. The first ones are the header.
    buffer: Vec<u8>,
    buffer_at: u64,
}

impl<'a> Appender<'a> {
    /// For the last of the segments, which may have been made for it.
    pub(super) fn new(
        disk: &'a dyn Disk,
        inner: MutexGuard<'a, Inner>,
        min_txid: u64,
        max_txid: u64,
        replaces: bool,
    ) -> Appender<'a> {
        Appender {
            disk,
            inner,
            min_txid,
            max_txid,
            replaces,
            length: 0,
            crc: crc_fast::Digest::new(Crc64GoIso),
            buffer: vec![0u8; RECORD_HEADER_SIZE],
            buffer_at: 0,
        }
    }

    /// Makes the record part of the log. Returns nothing: whoever needs it on disk flushes.
    pub fn commit(mut self) -> Result<(), StoreError> {
        let path = self.segment().path.clone();
        self.finish()
            .map_err(StoreError::io("append to log segment", &path))?;
        if self.replaces {
            let new = self.inner.segments.pop_back().expect("the snapshot's");
            return self.inner.replace(self.disk, new);
        }
        Ok(())
    }

    /// Leaves the record out of the log until it is [confirmed](super::log::Log::confirm): the next
    /// flush takes it to the disk, and only a start that finds it there takes it for a part of the log.
    pub fn hold(mut self) -> Result<(), StoreError> {
        assert!(!self.replaces, "a snapshot is never held");
        let path = self.segment().path.clone();
        let header = self
            .write()
            .map_err(StoreError::io("append to log segment", &path))?;
        self.inner.seq += 1;
        self.inner.held = Some(header);
        Ok(())
    }

    fn segment(&mut self) -> &mut Segment {
        self.inner.segments.back_mut().expect("begin() made one")
    }

    fn finish(&mut self) -> io::Result<()> {
        let header = self.write()?;
        self.segment().push(&header);
        self.inner.seq += 1;
        Ok(())
    }

    /// The whole record, at the tail.
    fn write(&mut self) -> io::Result<RecordHeader> {
        let header = RecordHeader {
            length: self.length,
            min_txid: self.min_txid,
            max_txid: self.max_txid,
            flushed_txid: match self.replaces {
                true => self.max_txid,
                false => self.inner.flushed_txid,
            },
            body_crc: self.crc.finalize(),
        };
        let salt = self.segment().salt;
        let encoded = header.encode(salt);
        if self.buffer_at == 0 {
            self.buffer[..RECORD_HEADER_SIZE].copy_from_slice(&encoded);
            self.write_out()?;
        } else {
            self.write_out()?;
            let seg = self.segment();
            seg.file.write_all_at(&encoded, seg.tail)?;
        }
        Ok(header)
    }

    /// Writes the buffered bytes, preallocating as needed.
    fn write_out(&mut self) -> io::Result<()> {
        let at = self.buffer_at;
        let buffer = std::mem::take(&mut self.buffer);
        let seg = self.segment();
        let (start, end) = (seg.tail + at, seg.tail + at + buffer.len() as u64);
        if end > seg.allocated {
            preallocate(seg, end);
        }
        // Before the header is in place, its room keeps the zeros that end the log.
        let skip = if at == 0 && buffer[..4] == [0; 4] {
            RECORD_HEADER_SIZE
        } else {
            0
        };
        seg.file
            .write_all_at(&buffer[skip..], start + skip as u64)?;
        if buffer.len() >= WRITE_BUFFER {
            // The flush will have to wait for the last pieces only.
            seg.file.begin_sync(start, buffer.len());
        } else if at == 0 && buffer.len() < LARGE && end > seg.filled {
            fill(seg, end);
        }
        self.buffer_at = at + buffer.len() as u64;
        self.buffer = buffer;
        self.buffer.clear();
        Ok(())
    }
}

impl Drop for Appender<'_> {
    /// A segment that was begun for a record that is given up goes with it: the next record is
    /// another one, and an empty segment between others would look like a gap.
    fn drop(&mut self) {
        let is_empty = self.inner.segments.back().is_some_and(Segment::is_empty);
        if !is_empty || self.inner.held.is_some() {
            return;
        }
        if let Some(s) = self.inner.segments.pop_back()
            && let Err(e) = self.disk.remove_file(&s.path)
        {
            let reason = format!("{} is empty and cannot be removed: {e}", s.path.display());
            self.inner.failed = Some(reason);
        }
    }
}

impl Write for Appender<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(buf);
        self.crc.update(buf);
        self.length += buf.len() as u64;
        if self.buffer.len() >= WRITE_BUFFER {
            self.write_out()?;
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes zeros where the next records go. Space that is only allocated is still marked as unwritten:
/// the flush of each record there has to note in the file system's journal that it is not any more,
/// which nearly doubles the time that it takes. A failure costs speed only.
fn fill(seg: &mut Segment, from: u64) {
    let to = (from + from.clamp(FIRST_FILL, LARGEST_FILL)).min(seg.allocated) & !4095;
    let len = to.saturating_sub(from);
    if seg.file.write_all_at(&ZEROS[..len as usize], from).is_ok() {
        seg.filled = from + len;
    }
}

/// Extends the file, so that commits do not. A file system that cannot costs speed only.
fn preallocate(seg: &mut Segment, end: u64) {
    let step = seg.allocated.clamp(FIRST_ALLOCATION, SEGMENT_SIZE / 4);
    let target = end.next_multiple_of(4096) + step;
    if seg.file.allocate(target).is_ok() {
        seg.allocated = target;
    }
}
