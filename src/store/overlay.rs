//! Bytes of a database file that are newer than the file: the pages of a transaction that is not
//! logged yet, held back so that the file on disk never holds anything that the log does not.
//!
//! Blocks are as large as the database's pages. A bounded number of them is kept in memory; the
//! others lie in an unlinked side file in the database's directory.

use std::collections::BTreeMap;
use std::io;

use super::disk::{DiskFile, File, Scratch};

/// Bytes kept in memory by one database's overlay.
const MEMORY_LIMIT: usize = 64 << 20;
/// Bytes from which on neighbours are written apart.
const RUN: usize = 256 << 10;

/// Held-back blocks.
#[derive(Debug)]
pub struct Overlay {
    block_size: u32,
    blocks: BTreeMap<u64, Block>,
    in_memory: usize,
    memory_limit: usize,
    scratch: Scratch,
    spill: Option<Spill>,
}

#[derive(Debug)]
enum Block {
    Memory(Box<[u8]>),
    /// Index of a block in the side file.
    Spilled(u64),
}

#[derive(Debug)]
struct Spill {
    file: File,
    used: u64,
}

impl Overlay {
    /// An empty overlay whose side file, if it needs one, is made there.
    pub fn new(scratch: Scratch) -> Overlay {
        Overlay {
            block_size: 0,
            blocks: BTreeMap::new(),
            in_memory: 0,
            memory_limit: MEMORY_LIMIT,
            scratch,
            spill: None,
        }
    }

    /// Whether nothing is held back.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// How many blocks are held.
    pub fn len(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Bytes of a block; it can be set while the overlay is empty.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// See [`Overlay::block_size`].
    pub fn set_block_size(&mut self, size: u32) {
        assert!(
            self.blocks.is_empty() || self.block_size == size,
            "blocks of another size are held"
        );
        self.block_size = size;
    }

    /// Numbers of the blocks that are held, in order.
    pub fn block_numbers(&self) -> impl Iterator<Item = u64> + '_ {
        self.blocks.keys().copied()
    }

    /// Whether any block in `[offset, offset + len)` is held.
    pub fn overlaps(&self, offset: u64, len: u64) -> bool {
        if self.blocks.is_empty() || len == 0 {
            return false;
        }
        let bs = u64::from(self.block_size);
        self.blocks
            .range(offset / bs..=(offset + len - 1) / bs)
            .next()
            .is_some()
    }

    /// Copies a whole block out; false if it is not held.
    pub fn read_block(&self, number: u64, buf: &mut [u8]) -> io::Result<bool> {
        match self.blocks.get(&number) {
            None => Ok(false),
            Some(Block::Memory(b)) => {
                buf.copy_from_slice(b);
                Ok(true)
            }
            Some(Block::Spilled(at)) => {
                let spill = self
                    .spill
                    .as_ref()
                    .ok_or_else(|| io::Error::other("no side file"))?;
                spill
                    .file
                    .read_exact_at(buf, at * u64::from(self.block_size))?;
                Ok(true)
            }
        }
    }

    /// Lays the held blocks over `buf`, which holds the file's bytes from `offset` on.
    pub fn read_over(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.blocks.is_empty() || buf.is_empty() {
            return Ok(());
        }
        let bs = u64::from(self.block_size);
        let end = offset + buf.len() as u64;
        let mut block = vec![0u8; self.block_size as usize];
        for number in self
            .blocks
            .range(offset / bs..=(end - 1) / bs)
            .map(|(n, _)| *n)
        {
            self.read_block(number, &mut block)?;
            let (start, stop) = ((number * bs).max(offset), ((number + 1) * bs).min(end));
            let (from, to) = (
                (start - number * bs) as usize,
                (stop - number * bs) as usize,
            );
            buf[(start - offset) as usize..(stop - offset) as usize]
                .copy_from_slice(&block[from..to]);
        }
        Ok(())
    }

    /// Holds bytes back. `base` fills a block that the write covers in part: it reads the block's
    /// present bytes from the file, zeros beyond its end.
    pub fn write(
        &mut self,
        offset: u64,
        data: &[u8],
        base: impl Fn(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let bs = u64::from(self.block_size);
        let mut done = 0usize;
        while done < data.len() {
            let at = offset + done as u64;
            let (number, within) = (at / bs, (at % bs) as usize);
            let n = (bs as usize - within).min(data.len() - done);
            let piece = &data[done..done + n];
            if n == bs as usize {
                self.put(number, piece)?;
            } else {
                let mut block = vec![0u8; bs as usize];
                if !self.read_block(number, &mut block)? {
                    base(number * bs, &mut block)?;
                }
                block[within..within + n].copy_from_slice(piece);
                self.put(number, &block)?;
            }
            done += n;
        }
        Ok(())
    }

    fn put(&mut self, number: u64, data: &[u8]) -> io::Result<()> {
        match self.blocks.get_mut(&number) {
            Some(Block::Memory(b)) => {
                b.copy_from_slice(data);
                return Ok(());
            }
            Some(Block::Spilled(at)) => {
                let at = *at * u64::from(self.block_size);
                let spill = self
                    .spill
                    .as_ref()
                    .ok_or_else(|| io::Error::other("no side file"))?;
                return spill.file.write_all_at(data, at);
            }
            None => {}
        }
        let block = if self.in_memory + data.len() > self.memory_limit {
            let spill = self.spill()?;
            spill
                .file
                .write_all_at(data, spill.used * data.len() as u64)?;
            spill.used += 1;
            Block::Spilled(spill.used - 1)
        } else {
            self.in_memory += data.len();
            Block::Memory(data.into())
        };
        self.blocks.insert(number, block);
        Ok(())
    }

    fn spill(&mut self) -> io::Result<&mut Spill> {
        if self.spill.is_none() {
            self.spill = Some(Spill {
                file: self.scratch.file()?,
                used: 0,
            });
        }
        self.spill
            .as_mut()
            .ok_or_else(|| io::Error::other("no side file"))
    }

    /// Writes the blocks that begin before `size` bytes to the file, neighbours together.
    pub fn write_out(&self, file: &dyn DiskFile, size: u64) -> io::Result<()> {
        let bs = u64::from(self.block_size);
        let mut run = Vec::new();
        let mut at = 0;
        for number in self.block_numbers().take_while(|n| n * bs < size) {
            let offset = number * bs;
            if at + run.len() as u64 != offset || run.len() >= RUN {
                file.write_all_at(&run, at)?;
                run.clear();
                at = offset;
            }
            let start = run.len();
            run.resize(start + bs as usize, 0);
            self.read_block(number, &mut run[start..])?;
        }
        file.write_all_at(&run, at)
    }

    /// Lets go of everything at and beyond `size` bytes; the part of a block before it is kept and
    /// the rest of that block reads as zeros.
    pub fn truncate(&mut self, size: u64) -> io::Result<()> {
        if self.blocks.is_empty() {
            return Ok(());
        }
        let bs = u64::from(self.block_size);
        let (number, within) = (size / bs, (size % bs) as usize);
        let mut block = vec![0u8; self.block_size as usize];
        if within > 0 && self.read_block(number, &mut block)? {
            block[within..].fill(0);
            self.put(number, &block)?;
        }
        for (_, b) in self.blocks.split_off(&size.div_ceil(bs)) {
            if let Block::Memory(b) = b {
                self.in_memory -= b.len();
            }
        }
        Ok(())
    }

    /// Lets go of everything.
    pub fn clear(&mut self) {
        self.blocks.clear();
        self.in_memory = 0;
        self.spill = None;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::disk::{Disk, Open, Real};

    #[test]
    fn pieces_spill_and_truncate_like_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let disk: Arc<dyn Disk> = Arc::new(Real);
        let mut o = Overlay::new(Scratch::new(&disk, dir.path()));
        o.memory_limit = 2048;
        o.set_block_size(512);
        let mut model = vec![7u8; 8192];
        let base = |_: u64, b: &mut [u8]| {
            b.fill(7);
            Ok(())
        };
        let mut x = 1u64;
        for round in 0..300u32 {
            x = x
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let off = (x >> 33) as usize % 8000;
            let len = 1 + (x >> 20) as usize % (8192 - off).min(1500);
            let data = vec![round as u8; len];
            o.write(off as u64, &data, base).unwrap();
            model[off..off + len].copy_from_slice(&data);
            let mut seen = vec![7u8; 8192];
            o.read_over(0, &mut seen).unwrap();
            assert_eq!(seen, model);
        }
        assert!(o.spill.is_some(), "the side file was used");
        let file = disk.open(&dir.path().join("out"), Open::Empty).unwrap();
        file.write_all_at(&[7; 8192], 0).unwrap();
        o.write_out(&*file, 4096).unwrap();
        let mut seen = vec![0u8; 8192];
        file.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(seen[..4096], model[..4096]);
        assert!(seen[4096..].iter().all(|b| *b == 7), "beyond the size");
        o.truncate(700).unwrap();
        let mut seen = vec![7u8; 8192];
        o.read_over(0, &mut seen).unwrap();
        assert_eq!(seen[..700], model[..700]);
        assert!(seen[700..1024].iter().all(|b| *b == 0));
        assert!(seen[1024..].iter().all(|b| *b == 7));
    }
}
