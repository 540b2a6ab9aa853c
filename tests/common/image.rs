//! The bytes of a database as of its last commit: the file, and the committed frames of its WAL.
//!
//! Written for the tests alone, without the code that is tested: the checksum of a position is
//! computed here from the format's definition, bit by bit.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::Node;
use super::run::run;

/// All pages of a database at one commit.
pub struct Image {
    /// Bytes a page.
    pub page_size: usize,
    /// The pages, one after another.
    pub bytes: Vec<u8>,
}

/// Reads a database of a node through its mount. Nobody may commit meanwhile; a checkpoint may run,
/// as the WAL is read first: its frames are then newer than the file or the same.
pub fn read(node: &Node, db: &str) -> Image {
    let wal = read_file(&node.db(&format!("{db}-wal"))).unwrap_or_default();
    let file = read_file(&node.db(db)).expect("a database file");
    Image::new(file, &wal)
}

/// Reads a file in another process: closing a descriptor of a database in this one would drop the
/// locks that SQLite holds here. `None` when there is no such file.
pub fn read_file(path: &Path) -> Option<Vec<u8>> {
    let done = run(Command::new("cat").arg(path), b"", Duration::from_secs(60));
    match done.success() {
        true => Some(done.stdout),
        false if done.stderr.contains("No such file") => None,
        false => panic!("read {}: {}", path.display(), done.stderr),
    }
}

impl Image {
    /// The image of a database file's bytes and those of its WAL (empty: none).
    pub fn new(mut bytes: Vec<u8>, wal: &[u8]) -> Image {
        let mut page_size = file_page_size(&bytes);
        if let Some((size, frames, commit)) = committed(wal) {
            page_size = size;
            bytes.resize(commit as usize * size, 0);
            for (pgno, page) in frames {
                // A page above the final size was cut off by a later transaction.
                let start = (pgno as usize - 1) * size;
                if let Some(place) = bytes.get_mut(start..start + size) {
                    place.copy_from_slice(page);
                }
            }
        }
        Image { page_size, bytes }
    }

    /// The checksum of the position that this image has.
    pub fn checksum(&self) -> u64 {
        const FLAG: u64 = 1 << 63;
        let lock_page = 0x4000_0000 / self.page_size + 1;
        let table = crc_table();
        let mut sum = 0;
        for (i, page) in self.bytes.chunks(self.page_size).enumerate() {
            if i + 1 != lock_page {
                let pgno = (i as u32 + 1).to_be_bytes();
                let crc = pgno.iter().chain(page).fold(!0_u64, |crc, byte| {
                    table[usize::from(crc as u8 ^ byte)] ^ (crc >> 8)
                });
                sum ^= !crc;
            }
        }
        sum | FLAG
    }
}

/// Panics with the first page in which two images differ.
pub fn assert_equal(a: &Image, b: &Image, what: &str) {
    assert_eq!(a.page_size, b.page_size, "page size of {what}");
    assert_eq!(a.bytes.len(), b.bytes.len(), "size of {what}");
    let pages = a.bytes.chunks(a.page_size).zip(b.bytes.chunks(b.page_size));
    for (i, (x, y)) in pages.enumerate() {
        if let Some(at) = x.iter().zip(y).position(|(x, y)| x != y) {
            panic!("{what}: page {} differs, first at byte {at}", i + 1);
        }
    }
}

/// CRC-64/GO-ISO, reflected.
fn crc_table() -> [u64; 256] {
    std::array::from_fn(|i| {
        (0..8).fold(i as u64, |crc, _| match crc & 1 {
            1 => (crc >> 1) ^ 0xd800_0000_0000_0000,
            _ => crc >> 1,
        })
    })
}

fn file_page_size(bytes: &[u8]) -> usize {
    match bytes.get(16..18).map(|b| u16::from_be_bytes([b[0], b[1]])) {
        Some(1) => 65536,
        Some(n) if n >= 512 => usize::from(n),
        _ => 4096, // an empty file
    }
}

type Frames<'a> = BTreeMap<u32, &'a [u8]>;

/// The page size, the newest committed version of each page, and the size in pages of a WAL.
fn committed(wal: &[u8]) -> Option<(usize, Frames<'_>, u32)> {
    let be = |bytes: &[u8], at: usize| {
        u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    let header = wal.get(..32)?;
    let big = match be(header, 0) {
        0x377f_0682 => false,
        0x377f_0683 => true,
        _ => return None,
    };
    let page_size = be(header, 8) as usize;
    let mut sum = add(big, (0, 0), &header[..24]);
    if sum != (be(header, 24), be(header, 28)) || !page_size.is_power_of_two() {
        return None;
    }
    let (mut done, mut pending, mut size) = (Frames::new(), Frames::new(), None);
    for frame in wal[32..].chunks_exact(24 + page_size) {
        sum = add(big, add(big, sum, &frame[..8]), &frame[24..]);
        let salts_match = frame[8..16] == header[16..24];
        if !salts_match || sum != (be(frame, 16), be(frame, 20)) || be(frame, 0) == 0 {
            break;
        }
        pending.insert(be(frame, 0), &frame[24..]);
        if be(frame, 4) != 0 {
            done.append(&mut pending);
            size = Some(be(frame, 4));
        }
    }
    size.map(|size| (page_size, done, size))
}

fn add(big: bool, seed: (u32, u32), data: &[u8]) -> (u32, u32) {
    let word = |b: &[u8]| {
        let bytes = [b[0], b[1], b[2], b[3]];
        match big {
            true => u32::from_be_bytes(bytes),
            false => u32::from_le_bytes(bytes),
        }
    };
    data.chunks_exact(8).fold(seed, |(a, b), pair| {
        let a = a.wrapping_add(word(pair)).wrapping_add(b);
        (a, b.wrapping_add(word(&pair[4..])).wrapping_add(a))
    })
}
