//! The checksum of every page of a database, in memory, and their file.
//!
//! Invariants:
//! - `sums[pgno - 1]` is the checksum of the newest committed version of the page; the lock page's
//!   is 0, and so is no other page's.
//! - `total` is the XOR of all of them, without the flag bit: a commit costs its own pages.
//!
//! The file `checksums` saves them with a position, so that a start need not read the database:
//! ```text
//! 0, 512: two slots of a header, the one with the higher sequence number that is whole counts:
//!         magic "TNRSUMS1" · sequence u64 · TXID u64 · checksum u64 · page size u32 · pages u32 · CRC u64
//! 4096:   page checksums, u64 each
//! ```
//! Big-endian. It is changed in place. That is safe because entries change only for pages that log
//! records after the *older* header's position hold, and those are there until the newer header is
//! on disk: a recovery from either computes them anew.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use crc_fast::CrcAlgorithm::Crc64GoIso;

use crate::ltx::{self, CHECKSUM_FLAG, Pos};

use super::database::read_or_zeros;
use super::disk::{Disk, Open};
use super::error::StoreError;
use super::pages::PageList;

const MAGIC: &[u8; 8] = b"TNRSUMS1";
const HEADER_LEN: usize = 48;
const SLOT_SIZE: u64 = 512;
const ARRAY_START: u64 = 4096;
/// Entries of one block, the unit in which changes are saved.
const BLOCK: u32 = 512;

/// Checksums of a database's pages.
#[derive(Debug, Default)]
pub struct PageSums {
    sums: Vec<u64>,
    total: u64,
    /// Blocks that changed since they were last saved.
    dirty: BTreeSet<u32>,
}

impl PageSums {
    /// Number of pages.
    pub fn len(&self) -> u32 {
        self.sums.len() as u32
    }

    /// The page's checksum; 0 if there is none.
    pub fn get(&self, pgno: u32) -> u64 {
        pgno.checked_sub(1)
            .and_then(|i| self.sums.get(i as usize))
            .copied()
            .unwrap_or(0)
    }

    /// Sets the page's checksum; pages that come to be in between have none until they are set.
    pub fn set(&mut self, pgno: u32, sum: u64) {
        let i = pgno as usize - 1;
        if i >= self.sums.len() {
            self.resize(pgno);
        }
        self.total ^= self.sums[i] ^ sum;
        self.sums[i] = sum;
        self.dirty.insert(i as u32 / BLOCK);
    }

    /// Makes it this many pages.
    pub fn resize(&mut self, pages: u32) {
        for sum in self.sums.drain((pages as usize).min(self.sums.len())..) {
            self.total ^= sum;
        }
        // Where the file has entries of a longer past, zeros have to be written too.
        let grown = self.len() / BLOCK..pages.div_ceil(BLOCK);
        if pages > self.len() {
            self.dirty.extend(grown);
        }
        self.sums.resize(pages as usize, 0);
    }

    /// The database's checksum.
    pub fn checksum(&self) -> u64 {
        self.total | CHECKSUM_FLAG
    }

    /// The database's checksum if these pages were these, and there were `pages` of them.
    pub(super) fn checksum_with(&self, changed: &PageList, pages: u32) -> u64 {
        let cut = self.sums.get(pages as usize..).unwrap_or_default();
        let kept = cut.iter().fold(self.total, |t, s| t ^ s);
        let kept_of = |pgno: u32| if pgno <= pages { self.get(pgno) } else { 0 };
        changed
            .iter()
            .fold(kept, |t, (pgno, sum)| t ^ kept_of(pgno) ^ sum)
            | CHECKSUM_FLAG
    }

    /// The sum computed anew from every entry, to check `total` against.
    pub fn recomputed(&self) -> u64 {
        self.sums.iter().fold(0, |t, s| t ^ s) | CHECKSUM_FLAG
    }

    /// Takes what has to be written to save these checksums as of `header`.
    pub fn take_changes(&mut self) -> SumsChanges {
        let blocks = std::mem::take(&mut self.dirty)
            .into_iter()
            .filter(|b| (b * BLOCK) < self.len())
            .map(|b| (b, self.block_bytes(b)))
            .collect();
        SumsChanges { blocks }
    }

    /// The entries of the saved blocks among these, with their places in the file: those that did
    /// not change since the last save.
    pub fn saved_entries(&self, blocks: Range<u32>) -> Vec<(u64, Vec<u8>)> {
        let saved = blocks.filter(|b| b * BLOCK < self.len() && !self.dirty.contains(b));
        saved
            .map(|b| (block_place(b), self.block_bytes(b)))
            .collect()
    }

    fn block_bytes(&self, block: u32) -> Vec<u8> {
        let end = ((block + 1) * BLOCK).min(self.len());
        let entries = &self.sums[(block * BLOCK) as usize..end as usize];
        entries.iter().flat_map(|s| s.to_be_bytes()).collect()
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> u32 {
        self.len().div_ceil(BLOCK)
    }

    /// After a failed save: all has to be written again.
    pub fn mark_all_dirty(&mut self) {
        self.dirty = (0..=self.len() / BLOCK).collect();
    }
}

/// Blocks of entries to be saved.
#[derive(Debug)]
pub struct SumsChanges {
    blocks: Vec<(u32, Vec<u8>)>,
}

/// The header of the checksum file: the position from which recovery goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SumsHeader {
    /// Grows with every save.
    pub sequence: u64,
    /// The database file holds everything up to here.
    pub pos: Pos,
    /// Bytes; 0 while the database has no page.
    pub page_size: u32,
    /// Entries in the file.
    pub pages: u32,
}

impl SumsHeader {
    fn encode(&self) -> [u8; HEADER_LEN] {
        let mut b = [0u8; HEADER_LEN];
        b[0..8].copy_from_slice(MAGIC);
        b[8..16].copy_from_slice(&self.sequence.to_be_bytes());
        b[16..24].copy_from_slice(&self.pos.txid.to_be_bytes());
        b[24..32].copy_from_slice(&self.pos.checksum.to_be_bytes());
        b[32..36].copy_from_slice(&self.page_size.to_be_bytes());
        b[36..40].copy_from_slice(&self.pages.to_be_bytes());
        let crc = crc_fast::checksum(Crc64GoIso, &b[..40]);
        b[40..48].copy_from_slice(&crc.to_be_bytes());
        b
    }

    fn decode(b: &[u8; HEADER_LEN]) -> Option<SumsHeader> {
        let u64_at = |i: usize| u64::from_be_bytes(b[i..i + 8].try_into().expect("8 bytes"));
        let u32_at = |i: usize| u32::from_be_bytes(b[i..i + 4].try_into().expect("4 bytes"));
        if &b[0..8] != MAGIC || u64_at(40) != crc_fast::checksum(Crc64GoIso, &b[..40]) {
            return None;
        }
        let h = SumsHeader {
            sequence: u64_at(8),
            pos: Pos {
                txid: u64_at(16),
                checksum: u64_at(24),
            },
            page_size: u32_at(32),
            pages: u32_at(36),
        };
        (h.pages == 0 || ltx::is_valid_page_size(h.page_size)).then_some(h)
    }
}

/// Where in the file a block's entries are.
fn block_place(block: u32) -> u64 {
    ARRAY_START + u64::from(block) * u64::from(BLOCK) * 8
}

/// Compares the file with what is known to be saved in it: what is wrong, if anything is.
pub fn compare(
    disk: &dyn Disk,
    path: &Path,
    header: &SumsHeader,
    entries: &[(u64, Vec<u8>)],
) -> Result<Option<String>, StoreError> {
    let file = match disk.open(path, Open::Read) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Some("the file is gone".to_owned()));
        }
        Err(e) => return Err(StoreError::io("open page checksums", path)(e)),
    };
    let matches = |at: u64, want: &[u8]| {
        let mut found = vec![0u8; want.len()];
        // What cannot be read does not match.
        file.read_exact_at(&mut found, at).is_ok() && found == want
    };
    if !matches((header.sequence % 2) * SLOT_SIZE, &header.encode()) {
        return Ok(Some("its header is not as it was saved".to_owned()));
    }
    let odd = entries.iter().find(|(at, want)| !matches(*at, want));
    Ok(odd.map(|(at, _)| format!("the entries from byte {at} on are not as they were saved")))
}

/// Writes the changes, then the header that makes them count, each flushed before the next.
pub fn save(
    disk: &dyn Disk,
    path: &Path,
    changes: &SumsChanges,
    header: &SumsHeader,
) -> Result<(), StoreError> {
    let file = disk
        .open(path, Open::Make)
        .map_err(StoreError::io("open page checksums", path))?;
    let write = || -> std::io::Result<()> {
        // The names of this file and of the database that it speaks of.
        disk.sync_dir(path.parent().unwrap_or(Path::new(".")))?;
        for (block, bytes) in &changes.blocks {
            file.write_all_at(bytes, block_place(*block))?;
        }
        if !changes.blocks.is_empty() {
            file.sync_data()?;
        }
        file.write_all_at(&header.encode(), (header.sequence % 2) * SLOT_SIZE)?;
        file.sync_all()
    };
    write().map_err(StoreError::io("save page checksums", path))
}

/// Reads the file. `None`: there is none, or none that counts.
pub fn load(disk: &dyn Disk, path: &Path) -> Result<Option<(SumsHeader, PageSums)>, StoreError> {
    let file = match disk.open(path, Open::Read) {
        Ok(f) => f,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(StoreError::io("open page checksums", path)(e)),
    };
    let read_slot = |i: u64| -> Result<Option<SumsHeader>, StoreError> {
        let mut b = [0u8; HEADER_LEN];
        read_or_zeros(&*file, i * SLOT_SIZE, &mut b)
            .map_err(StoreError::io("read page checksums", path))?;
        Ok(SumsHeader::decode(&b))
    };
    let Some(header) = [read_slot(0)?, read_slot(1)?]
        .into_iter()
        .flatten()
        .max_by_key(|h| h.sequence)
    else {
        return Ok(None);
    };
    let len = file
        .size()
        .map_err(StoreError::io("stat page checksums", path))?;
    if len < ARRAY_START + u64::from(header.pages) * 8 && header.pages > 0 {
        return Err(StoreError::corrupt(path, "shorter than its header says"));
    }
    let mut bytes = vec![0u8; header.pages as usize * 8];
    file.read_exact_at(&mut bytes, ARRAY_START)
        .map_err(StoreError::io("read page checksums", path))?;
    let sums: Vec<u64> = bytes
        .chunks_exact(8)
        .map(|c| u64::from_be_bytes(c.try_into().expect("8 bytes")))
        .collect();
    let total = sums.iter().fold(0, |t, s| t ^ s);
    Ok(Some((
        header,
        PageSums {
            sums,
            total,
            dirty: BTreeSet::new(),
        },
    )))
}
