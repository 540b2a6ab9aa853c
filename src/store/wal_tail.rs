//! The last bytes that were written to the WAL: those of the transaction being written.
//!
//! SQLite writes a frame in two pieces, and each costs a request. Gathered here, the frames of a
//! transaction are looked at without reading them back, and go to the file in one write.
//!
//! Invariants:
//! - The bytes are newer than the file's; what is not `dirty` is the same there.
//! - No more than [`MOST`] bytes are kept from one write to the next.
//! - Whoever reads beyond what is committed lays these bytes over the file's, and whoever changes the
//!   file there writes them out, or drops them.

use std::io;

use super::disk::DiskFile;

/// Bytes that are kept. Of a larger transaction, the end.
const MOST: usize = 1 << 20;
/// A buffer larger than this is given back once it is empty.
const KEPT: usize = 64 << 10;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct WalTail {
    /// Where in the file the first byte belongs.
    at: u64,
    bytes: Vec<u8>,
    /// Index of the first byte that is not in the file.
    dirty: usize,
}

impl WalTail {
    /// The end of the last byte in the file; 0 if there is none here.
    pub fn end(&self) -> u64 {
        if self.bytes.is_empty() {
            return 0;
        }
        self.at + self.bytes.len() as u64
    }

    /// Whether any byte of a range is here.
    pub fn overlaps(&self, offset: u64, len: usize) -> bool {
        offset < self.end() && offset + len as u64 > self.at
    }

    /// Lays the bytes over `buf`, whose first `n` bytes are the file's from `offset` on; returns how
    /// many there are now.
    pub fn read_over(&self, offset: u64, buf: &mut [u8], n: usize) -> usize {
        let start = self.at.max(offset);
        let stop = self.end().min(offset + buf.len() as u64);
        if start >= stop {
            return n;
        }
        let (from, to) = ((start - offset) as usize, (stop - offset) as usize);
        if n < from {
            buf[n..from].fill(0);
        }
        let index = (start - self.at) as usize;
        buf[from..to].copy_from_slice(&self.bytes[index..index + to - from]);
        n.max(to)
    }

    /// Takes a write. Afterwards `file` has it, or this.
    pub fn write(&mut self, file: &dyn DiskFile, offset: u64, data: &[u8]) -> io::Result<()> {
        let clean = self.dirty == self.bytes.len();
        let end = self.at + self.bytes.len() as u64;
        if !(self.at..=end).contains(&offset) || (clean && offset == end) {
            self.write_out(file)?;
            self.clear();
            self.at = offset;
        }
        let index = (offset - self.at) as usize;
        let replaced = data.len().min(self.bytes.len() - index);
        self.bytes[index..index + replaced].copy_from_slice(&data[..replaced]);
        self.bytes.extend_from_slice(&data[replaced..]);
        self.dirty = self.dirty.min(index);
        if self.bytes.len() > MOST {
            self.write_out(file)?;
            self.clear();
        }
        Ok(())
    }

    /// The bytes of a range, if they are all here.
    pub fn get(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let start = usize::try_from(offset.checked_sub(self.at)?).ok()?;
        self.bytes.get(start..start.checked_add(len)?)
    }

    /// Writes to the file what it lacks.
    pub fn write_out(&mut self, file: &dyn DiskFile) -> io::Result<()> {
        self.write_out_to(file, u64::MAX)
    }

    /// The same, up to `end` in the file.
    pub fn write_out_to(&mut self, file: &dyn DiskFile, end: u64) -> io::Result<()> {
        let end = end.saturating_sub(self.at).min(self.bytes.len() as u64) as usize;
        if self.dirty < end {
            file.write_all_at(&self.bytes[self.dirty..end], self.at + self.dirty as u64)?;
            self.dirty = end;
        }
        Ok(())
    }

    /// Forgets everything, written out or not.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.dirty = 0;
        if self.bytes.capacity() > KEPT {
            self.bytes = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::store::disk::{Disk, Open, Real};

    proptest! {
        #[test]
        fn tail_and_file_are_together_what_was_written(
            writes in prop::collection::vec((0u64..9000, 1usize..5000, any::<u8>(), 0u8..8), 1..60)
        ) {
            let dir = tempfile::tempdir().unwrap();
            let disk: Arc<dyn Disk> = Arc::new(Real);
            let file = disk.open(&dir.path().join("wal"), Open::Empty).unwrap();
            let (mut tail, mut model) = (WalTail::default(), Vec::new());
            for (offset, len, byte, then) in writes {
                // Without gaps, as a scan of the file would find them.
                let offset = offset.min(model.len() as u64);
                let data = vec![byte; len];
                tail.write(&*file, offset, &data).unwrap();
                let end = offset as usize + len;
                model.resize(model.len().max(end), 0);
                model[offset as usize..end].copy_from_slice(&data);
                if let Some(bytes) = tail.get(offset, len) {
                    prop_assert_eq!(bytes, &data[..]);
                }
                let mut seen = vec![0; model.len() + 10];
                let n = file.read_at(&mut seen, 0).unwrap();
                let n = tail.read_over(0, &mut seen, n);
                prop_assert_eq!(&seen[..n], &model[..]);
                match then {
                    0 => tail.write_out(&*file).unwrap(),
                    1 => tail.write_out_to(&*file, offset + len as u64 / 2).unwrap(),
                    _ => {}
                }
            }
            tail.write_out(&*file).unwrap();
            let mut seen = vec![0; model.len()];
            file.read_exact_at(&mut seen, 0).unwrap();
            prop_assert_eq!(seen, model);
        }

        #[test]
        fn a_large_transaction_takes_no_more_memory_than_a_small_one(pages in 300usize..600) {
            let dir = tempfile::tempdir().unwrap();
            let disk: Arc<dyn Disk> = Arc::new(Real);
            let file = disk.open(&dir.path().join("wal"), Open::Empty).unwrap();
            let mut tail = WalTail::default();
            for i in 0..pages {
                tail.write(&*file, i as u64 * 4096, &[i as u8; 4096]).unwrap();
                prop_assert!(tail.bytes.len() <= MOST);
            }
        }
    }
}
