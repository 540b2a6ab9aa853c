//! The WAL index: the memory that all connections to a database in WAL mode share (`X-shm`).
//!
//! It is a run of 32 KiB regions. Each ends in a hash table of 8,192 16-bit slots and has before it
//! the page numbers of the frames that the table covers: 4,096 of them, but 4,062 in the first
//! region, which begins with a header of 136 bytes. All of it is in this machine's byte order but
//! for the salts, which are as in the WAL.
//!
//! What holds:
//! - The header is there twice. Who changes it writes the second copy, then the first; who reads
//!   reads the first, then the second, and believes them only if they are equal and their checksum
//!   is right. Between the copies is a full memory barrier.
//! - Entries of frames beyond the header's mxFrame mean nothing, and readers pass over them, so
//!   frames are appended first and the header is written afterwards: a reader's snapshot never
//!   changes. A writer that died may leave such entries; the next one removes them.
//! - Other processes change the memory at any time, and none of them is trusted. Every access is
//!   atomic, no number read from it is used as an index without a bound, and every loop over it
//!   ends.
//!
//! Who calls must hold the locks that the rules of SQLite ask for: WRITE to append frames, to
//! remove entries or to write the header; a read mark's own exclusively to change it; CKPT to
//! raise `n_backfill`.

use super::is_page_size;
use super::wal::{WalChecksum, wal_checksum};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};
use thiserror::Error;

/// Size of a region in bytes; SQLite maps the file by these.
pub const REGION_SIZE: usize = 32768;
/// How many read marks there are.
pub const READ_MARKS: usize = 5;
/// The value of a read mark that no reader uses.
pub const READ_MARK_UNUSED: u32 = u32::MAX;

/// Size in bytes of a copy of the header; the file begins with two of them.
pub const HEADER_COPY_SIZE: usize = COPY_WORDS * 4;
/// Where the number of frames that checkpoints have copied is in the file, a word of 32 bits.
pub const N_BACKFILL_OFFSET: u64 = BACKFILL_WORD as u64 * 4;

/// The one version of the format.
const VERSION: u32 = 3_007_000;
/// Words of 32 bits in a copy of the header, of which the last two are its checksum.
const COPY_WORDS: usize = 12;
/// Word of `n_backfill`, after the two copies; the read marks follow it.
const BACKFILL_WORD: usize = 2 * COPY_WORDS;
/// Word of `n_backfill_attempted`, after the read marks and two words of lock bytes.
const BACKFILL_ATTEMPTED_WORD: usize = BACKFILL_WORD + 1 + READ_MARKS + 2;
/// Words before the first region's page numbers.
const HEADER_WORDS: usize = 34;
/// Frames of each region but the first.
const FRAMES: u32 = 4096;
/// Frames of the first region.
const FIRST_FRAMES: u32 = FRAMES - HEADER_WORDS as u32;
/// Slots of a hash table: twice as many as frames, so that there are always empty ones.
const SLOTS: usize = 8192;
/// Where the hash table begins in a region, in bytes.
const SLOTS_OFFSET: usize = FRAMES as usize * 4;

/// What the header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IndexHeader {
    /// Counter that each transaction increments, so that connections see that there was one.
    pub change: u32,
    /// Whether the index may be used. Written as false, it makes connections recover the index.
    pub is_init: bool,
    /// Whether the WAL's checksums are big-endian.
    pub big_endian_checksum: bool,
    /// Size of a page in bytes; 0 in the index of a WAL that has no frames yet.
    pub page_size: u32,
    /// The last frame of the last committed transaction, from 1 on; 0 for none.
    pub mx_frame: u32,
    /// Size of the database in pages as of that transaction; 0 if there is none.
    pub page_count: u32,
    /// Checksum of that frame.
    pub frame_checksum: WalChecksum,
    /// First salt of the WAL.
    pub salt1: u32,
    /// Second salt of the WAL.
    pub salt2: u32,
}

impl IndexHeader {
    /// What the two copies at the beginning of the file say, read in this order; `None` if they
    /// differ, are not initialized or wrong in any field.
    #[must_use]
    pub fn of_copies(
        first: &[u8; HEADER_COPY_SIZE],
        second: &[u8; HEADER_COPY_SIZE],
    ) -> Option<IndexHeader> {
        let (words, _) = first.as_chunks::<4>();
        let words = std::array::from_fn(|i| u32::from_ne_bytes(words[i]));
        (first == second)
            .then(|| IndexHeader::decode(&words))
            .flatten()
    }

    /// A copy of a header that is whole, and of a version that no SQLite knows: whoever begins a
    /// transaction by it is told that the database cannot be opened, and recovers nothing.
    #[must_use]
    pub fn closed() -> [u8; HEADER_COPY_SIZE] {
        let mut words = IndexHeader {
            change: u32::MAX,
            is_init: true,
            big_endian_checksum: false,
            page_size: 4096,
            mx_frame: 0,
            page_count: 0,
            frame_checksum: WalChecksum::default(),
            salt1: 0,
            salt2: 0,
        }
        .encode();
        words[0] = VERSION + 1;
        let WalChecksum(sum1, sum2) = checksum_of(&words);
        words[COPY_WORDS - 2] = sum1;
        words[COPY_WORDS - 1] = sum2;
        let mut bytes = [0; HEADER_COPY_SIZE];
        let (chunks, _) = bytes.as_chunks_mut::<4>();
        for (chunk, word) in chunks.iter_mut().zip(words) {
            *chunk = word.to_ne_bytes();
        }
        bytes
    }

    /// The words of a copy of the header, checksum included.
    fn encode(&self) -> [u32; COPY_WORDS] {
        // 65,536 does not fit in its 16 bits and is stored as 1.
        let size = (self.page_size & 0xff00 | self.page_size >> 16) as u16;
        let [size0, size1] = size.to_ne_bytes();
        let flags = [
            u8::from(self.is_init),
            u8::from(self.big_endian_checksum),
            size0,
            size1,
        ];
        let WalChecksum(frame1, frame2) = self.frame_checksum;
        let mut words = [
            VERSION,
            0,
            self.change,
            u32::from_ne_bytes(flags),
            self.mx_frame,
            self.page_count,
            frame1,
            frame2,
            self.salt1.to_be(),
            self.salt2.to_be(),
            0,
            0,
        ];
        let WalChecksum(sum1, sum2) = checksum_of(&words);
        words[COPY_WORDS - 2] = sum1;
        words[COPY_WORDS - 1] = sum2;
        words
    }

    /// Reads a copy of the header; `None` if it is not initialized or wrong in any field.
    fn decode(words: &[u32; COPY_WORDS]) -> Option<IndexHeader> {
        let [init, big_endian, size0, size1] = words[3].to_ne_bytes();
        let page_size = match u32::from(u16::from_ne_bytes([size0, size1])) {
            1 => 65536,
            size => size,
        };
        let sum = WalChecksum(words[COPY_WORDS - 2], words[COPY_WORDS - 1]);
        let valid = words[0] == VERSION
            && init != 0
            && (page_size == 0 || is_page_size(page_size))
            && checksum_of(words) == sum;
        valid.then(|| IndexHeader {
            change: words[2],
            is_init: true,
            big_endian_checksum: big_endian != 0,
            page_size,
            mx_frame: words[4],
            page_count: words[5],
            frame_checksum: WalChecksum(words[6], words[7]),
            salt1: u32::from_be(words[8]),
            salt2: u32::from_be(words[9]),
        })
    }
}

/// The checksum of a header's words, the two that hold it left out; in native byte order whatever
/// the WAL's is.
fn checksum_of(words: &[u32; COPY_WORDS]) -> WalChecksum {
    let mut bytes = [0; (COPY_WORDS - 2) * 4];
    for (bytes, word) in bytes.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    wal_checksum(cfg!(target_endian = "big"), WalChecksum::default(), &bytes)
}

/// Why frames were not appended. Where some were, they are beyond mxFrame and mean nothing.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum WalIndexError {
    /// Not all of the regions that the frames belong to are mapped.
    #[error(
        "the WAL index has {mapped} regions mapped of the {needed} that frame {last_frame} needs: \
         map them first"
    )]
    NotMapped {
        /// The last frame to append.
        last_frame: u32,
        /// Regions needed for it.
        needed: usize,
        /// Regions there are.
        mapped: usize,
    },
    /// Frames are numbered from 1 on, and by 32 bits.
    #[error(
        "there are no {count} WAL frames from number {first_frame} on: frames are 1 to 4294967295"
    )]
    FrameNumber {
        /// The first frame to append.
        first_frame: u32,
        /// How many of them.
        count: usize,
    },
    /// No page has number zero.
    #[error("WAL frame {frame} would hold page 0, which no database has")]
    PageZero {
        /// The frame.
        frame: u32,
    },
    /// The hash table has more entries than frames: somebody overwrote it.
    #[error(
        "the hash table of the WAL index is corrupt near frame {frame}: \
         invalidate the index so that it is recovered from the WAL"
    )]
    Corrupt {
        /// The frame that could not be entered.
        frame: u32,
    },
}

/// A view of the mapped WAL index; see the module for its rules.
#[derive(Debug, Default)]
pub struct WalIndex {
    regions: Vec<NonNull<u8>>,
}

// SAFETY: the regions are shared memory, mapped for as long as the view is (the contract of
// `push_region`), and tied to no thread.
unsafe impl Send for WalIndex {}
// SAFETY: through a shared reference the memory is only accessed atomically.
unsafe impl Sync for WalIndex {}

/// The page numbers and the hash table of one region.
#[derive(Clone, Copy)]
struct Block<'a> {
    region: Region<'a>,
    /// The number of the frame before its first.
    zero: u32,
    /// How many frames it has room for.
    frames: u32,
    /// Word of its first page number.
    first_word: usize,
}

/// One mapped region.
#[derive(Clone, Copy)]
struct Region<'a>(&'a NonNull<u8>);

impl<'a> Region<'a> {
    fn word(self, i: usize) -> &'a AtomicU32 {
        assert!(
            i < SLOTS_OFFSET / 4,
            "word {i} is not before the hash table"
        );
        // SAFETY: by the contract of `push_region` the region is mapped, aligned and writable for
        // as long as the index that `self` borrows from; word `i` is within it; and nobody in this
        // process accesses it but by this function, that is, atomically and with this size.
        unsafe { AtomicU32::from_ptr(self.0.as_ptr().cast::<u32>().add(i)) }
    }

    fn slot(self, i: usize) -> &'a AtomicU16 {
        assert!(i < SLOTS, "slot {i} is not in the hash table");
        // SAFETY: as for `word`; the slots are the half of the region that no word is in.
        unsafe { AtomicU16::from_ptr(self.0.as_ptr().add(SLOTS_OFFSET).cast::<u16>().add(i)) }
    }
}

impl Block<'_> {
    /// The page number of the block's `n`th frame, `n` from 1 to `frames`.
    fn pgno(&self, n: u32) -> &AtomicU32 {
        self.region.word(self.first_word + n as usize - 1)
    }

    /// The slots to probe for a page, in order; each once.
    fn probes(&self, pgno: u32) -> impl Iterator<Item = &AtomicU16> {
        let start = pgno.wrapping_mul(383) as usize;
        (0..SLOTS).map(move |i| self.region.slot((start.wrapping_add(i)) % SLOTS))
    }

    /// Removes the entries of all but the first `keep` frames.
    fn truncate(&self, keep: u32) {
        for slot in (0..SLOTS).map(|i| self.region.slot(i)) {
            if u32::from(slot.load(Ordering::Relaxed)) > keep {
                slot.store(0, Ordering::Relaxed);
            }
        }
        for n in keep + 1..=self.frames {
            self.pgno(n).store(0, Ordering::Relaxed);
        }
    }

    /// Enters page `pgno` as that of the `n`th frame; false if the table is fuller than it can be.
    fn append(&self, n: u32, pgno: u32) -> bool {
        if n == 1 {
            self.truncate(0);
        }
        // Left by a writer that died within its transaction: all from here on is.
        if self.pgno(n).load(Ordering::Relaxed) != 0 {
            self.truncate(n - 1);
        }
        // The frames before this one have `n - 1` slots, so one of any `n` is free.
        let free = self
            .probes(pgno)
            .take(n as usize)
            .find(|slot| slot.load(Ordering::Relaxed) == 0);
        let Some(slot) = free else { return false };
        self.pgno(n).store(pgno, Ordering::Relaxed);
        // After the page number, so that no reader finds the slot with an older one.
        slot.store(n as u16, Ordering::Release);
        true
    }

    /// The newest of the block's frames up to number `mx_frame` that holds page `pgno`.
    fn lookup(&self, pgno: u32, mx_frame: u32) -> Option<u32> {
        let mut found = None;
        for slot in self.probes(pgno) {
            let n = u32::from(slot.load(Ordering::Acquire));
            if n == 0 {
                return found;
            }
            let frame = self.zero.checked_add(n).filter(|&frame| frame <= mx_frame);
            if n <= self.frames && frame.is_some() && self.pgno(n).load(Ordering::Relaxed) == pgno {
                found = found.max(frame);
            }
        }
        None // a table without an empty slot is corrupt
    }
}

/// The region that has the entry of frame `frame`, which is not zero.
fn region_of(frame: u32) -> usize {
    // The first region is short by the words of the header.
    ((u64::from(frame) - 1 + HEADER_WORDS as u64) / u64::from(FRAMES)) as usize
}

impl WalIndex {
    /// An index of which nothing is mapped yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next region, in the file's order.
    ///
    /// # Safety
    /// `ptr` is the address of [`REGION_SIZE`] bytes of memory, aligned to 4 bytes, mapped shared
    /// and for reading and writing, that stay mapped, and backed by the file, for as long as this
    /// index lives. This process accesses them by this view or others of this type only (what other
    /// processes, and SQLite in this one, do is no matter).
    pub unsafe fn push_region(&mut self, ptr: *mut u8) {
        let region = NonNull::new(ptr).filter(|region| region.cast::<u32>().is_aligned());
        self.regions
            .push(region.expect("a mapped region is not null, and aligned to its page"));
    }

    /// How many regions are mapped.
    #[must_use]
    pub fn region_count(&self) -> usize {
        self.regions.len()
    }

    /// How many regions the entries of `mx_frame` frames take; at least one, for the header.
    #[must_use]
    pub fn regions_needed(mx_frame: u32) -> usize {
        region_of(mx_frame.max(1)) + 1
    }

    /// The header, if it is one: both copies equal, initialized, of the known version, and with the
    /// right checksum. `None` also while another process is writing it: who needs to know reads
    /// again, and only under the WRITE lock takes it for invalid.
    #[must_use]
    pub fn read_header(&self) -> Option<IndexHeader> {
        self.regions.first()?;
        let first = self.load_copy(0);
        fence(Ordering::SeqCst);
        let second = self.load_copy(1);
        if first != second {
            return None;
        }
        IndexHeader::decode(&first)
    }

    /// Publishes a header: frames up to its `mx_frame` are seen by readers from now on.
    ///
    /// # Panics
    /// Without a region, as all that follow.
    pub fn write_header(&self, header: &IndexHeader) {
        self.store_header(&header.encode());
    }

    /// Zeroes both copies of the header, so that the next connection recovers the index from the
    /// WAL.
    pub fn invalidate_header(&self) {
        self.store_header(&[0; COPY_WORDS]);
    }

    /// Enters `pgnos` as the pages of the frames from `first_frame` (from 1 on) on, whose entries
    /// follow those of the frames before. Entries there of a writer that died are removed. Readers
    /// see nothing of it until [`WalIndex::write_header`].
    pub fn append_frames(&self, first_frame: u32, pgnos: &[u32]) -> Result<(), WalIndexError> {
        let Some(more) = pgnos.len().checked_sub(1) else {
            return Ok(());
        };
        let last_frame = u32::try_from(more)
            .ok()
            .and_then(|more| first_frame.checked_add(more))
            .filter(|_| first_frame != 0)
            .ok_or(WalIndexError::FrameNumber {
                first_frame,
                count: pgnos.len(),
            })?;
        let (needed, mapped) = (Self::regions_needed(last_frame), self.region_count());
        if mapped < needed {
            return Err(WalIndexError::NotMapped {
                last_frame,
                needed,
                mapped,
            });
        }
        for (frame, &pgno) in (first_frame..=last_frame).zip(pgnos) {
            if pgno == 0 {
                return Err(WalIndexError::PageZero { frame });
            }
            let block = self.block(region_of(frame));
            if !block.append(frame - block.zero, pgno) {
                return Err(WalIndexError::Corrupt { frame });
            }
        }
        Ok(())
    }

    /// Removes the entries of frames after `mx_frame` from the block that has its entry: those of a
    /// transaction that is not to be. Later blocks are emptied when a frame first enters them, and
    /// so is the first, which is why 0 changes nothing.
    pub fn cleanup_after(&self, mx_frame: u32) {
        if mx_frame == 0 || region_of(mx_frame) >= self.region_count() {
            return;
        }
        let block = self.block(region_of(mx_frame));
        block.truncate(mx_frame - block.zero);
    }

    /// The newest frame up to `mx_frame` that holds page `pgno`, as a reader of that snapshot finds
    /// it; `None` if there is none, or if the table is corrupt or not mapped that far.
    #[must_use]
    pub fn lookup(&self, pgno: u32, mx_frame: u32) -> Option<u32> {
        if mx_frame == 0 || region_of(mx_frame) >= self.region_count() {
            return None;
        }
        (0..=region_of(mx_frame))
            .rev()
            .find_map(|i| self.block(i).lookup(pgno, mx_frame))
    }

    /// How many frames, from the first on, checkpoints have copied into the database file.
    #[must_use]
    pub fn n_backfill(&self) -> u32 {
        self.info(BACKFILL_WORD).load(Ordering::Acquire)
    }

    /// Sets [`WalIndex::n_backfill`].
    pub fn set_n_backfill(&self, frames: u32) {
        self.info(BACKFILL_WORD).store(frames, Ordering::Release);
    }

    /// How many frames checkpoints may have copied, set before they begin to.
    #[must_use]
    pub fn n_backfill_attempted(&self) -> u32 {
        self.info(BACKFILL_ATTEMPTED_WORD).load(Ordering::Acquire)
    }

    /// Sets [`WalIndex::n_backfill_attempted`].
    pub fn set_n_backfill_attempted(&self, frames: u32) {
        self.info(BACKFILL_ATTEMPTED_WORD)
            .store(frames, Ordering::Release);
    }

    /// The last frame that readers holding read lock `i` (0 to 4) may read, or [`READ_MARK_UNUSED`].
    #[must_use]
    pub fn read_mark(&self, i: usize) -> u32 {
        self.info(read_mark_word(i)).load(Ordering::Acquire)
    }

    /// Sets [`WalIndex::read_mark`]; mark 0 is always 0.
    pub fn set_read_mark(&self, i: usize, frame: u32) {
        self.info(read_mark_word(i)).store(frame, Ordering::Release);
    }

    fn load_copy(&self, copy: usize) -> [u32; COPY_WORDS] {
        std::array::from_fn(|i| self.info(copy * COPY_WORDS + i).load(Ordering::Relaxed))
    }

    fn store_header(&self, words: &[u32; COPY_WORDS]) {
        for copy in [1, 0] {
            // Before the second copy: what it speaks of is there. Before the first: the second is.
            fence(Ordering::SeqCst);
            for (i, &word) in words.iter().enumerate() {
                self.info(copy * COPY_WORDS + i)
                    .store(word, Ordering::Relaxed);
            }
        }
        fence(Ordering::SeqCst);
    }

    /// A word of the first region's header.
    fn info(&self, word: usize) -> &AtomicU32 {
        let region = self
            .regions
            .first()
            .expect("the first region is mapped before the index is used");
        Region(region).word(word)
    }

    /// The block of region `i`, which is mapped.
    fn block(&self, i: usize) -> Block<'_> {
        let region = Region(&self.regions[i]);
        match i as u32 {
            0 => Block {
                region,
                zero: 0,
                frames: FIRST_FRAMES,
                first_word: HEADER_WORDS,
            },
            i => {
                let zero = FIRST_FRAMES + (i - 1) * FRAMES;
                Block {
                    region,
                    zero,
                    frames: FRAMES,
                    first_word: 0,
                }
            }
        }
    }
}

fn read_mark_word(i: usize) -> usize {
    assert!(i < READ_MARKS, "SQLite has five read marks");
    BACKFILL_WORD + 1 + i
}
