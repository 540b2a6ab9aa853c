//! The stream's formats and SQLite's.

use std::io::{Cursor, Read, Write};

use super::Input;
use super::memory::bounded;
use crate::sqlite::journal::{self, Journal};
use crate::sqlite::wal::{
    FRAME_HEADER_SIZE, FrameHeader, WAL_HEADER_SIZE, WalChecksum, WalHeader, frame_offset,
    wal_checksum,
};
use crate::sqlite::wal_index::{IndexHeader, READ_MARKS, REGION_SIZE, WalIndex};
use crate::sqlite::{is_page_size, lock_page};
use crate::store::check_database;
use crate::stream::frame::{ChunkReader, ChunkWriter, Frame, FrameError, MAX_LEASE_ID_LEN};
use crate::stream::{common, posmap};

/// What was read of a stream.
#[derive(Debug, PartialEq)]
enum Item {
    Frame(Frame, usize),
    File(Vec<u8>),
    End(String),
}

/// The body of a stream. However it is cut into pieces, it is read the same; frames are written again
/// as they were.
pub fn frames(data: &[u8]) {
    // A list of what was read costs more than the reading.
    let limit = 64 * data.len() + 4 * MAX_LEASE_ID_LEN + (64 << 10);
    let whole = bounded("a stream", limit, || {
        read_frames(&mut &data[..], data.len())
    });
    let step = 1 + data.len() % 7;
    assert_eq!(
        whole,
        read_frames(&mut Pieces { rest: data, step }, data.len())
    );
    let mut at = 0;
    for item in &whole {
        let Item::Frame(frame, size) = item else {
            continue;
        };
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        let found = data[at..].windows(bytes.len()).next();
        assert_eq!(
            found,
            Some(&bytes[..]),
            "{frame:?} is written in another way"
        );
        at += size;
    }
    for item in &whole {
        let Item::File(file) = item else { continue };
        let mut bytes = Vec::new();
        let mut writer = ChunkWriter::new("x", |piece| {
            bytes.extend_from_slice(&piece);
            Ok(())
        });
        writer.write_all(file).expect("it goes into memory");
        writer.finish().expect("it goes into memory");
        let again = read_frames(&mut &bytes[..], bytes.len());
        assert!(
            matches!(&again[..], [Item::Frame(..), Item::File(same), Item::End(_)] if same == file)
        );
    }
}

fn read_frames(from: &mut dyn Rest, whole: usize) -> Vec<Item> {
    let mut items = Vec::new();
    loop {
        let before = whole - from.left();
        let frame = match Frame::read(&mut &mut *from) {
            Ok(frame) => frame,
            Err(FrameError::Io(e)) => {
                items.push(Item::End(e.kind().to_string()));
                return items;
            }
            Err(e) => {
                items.push(Item::End(e.to_string()));
                return items;
            }
        };
        let mut file = None;
        if matches!(frame, Frame::Ltx { .. }) {
            let mut bytes = Vec::new();
            let mut from = &mut *from;
            let mut chunks = ChunkReader::new(&mut from);
            match chunks.read_to_end(&mut bytes) {
                Ok(_) => file = Some(bytes),
                Err(e) => {
                    items.push(Item::End(e.kind().to_string()));
                    return items;
                }
            }
            chunks.finish().expect("it was read to its end");
        }
        items.push(Item::Frame(frame, whole - from.left() - before));
        items.extend(file.map(Item::File));
    }
}

/// A reader that knows how much is left.
trait Rest: Read {
    fn left(&self) -> usize;
}

impl Rest for &[u8] {
    fn left(&self) -> usize {
        self.len()
    }
}

/// Gives a few bytes at a time.
struct Pieces<'a> {
    rest: &'a [u8],
    step: usize,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = self.step.min(buf.len());
        self.rest.read(&mut buf[..n])
    }
}

impl Rest for Pieces<'_> {
    fn left(&self) -> usize {
        self.rest.len()
    }
}

/// A position map, or a list of common positions.
pub fn posmap(data: &[u8]) {
    let limit = 16 * data.len() + (16 << 10);
    if let Ok(map) = bounded("a position map", limit, || posmap::decode(data)) {
        assert!(map.keys().all(|name| check_database(name).is_ok()));
        let again = posmap::encode(&map);
        assert_eq!(again.len(), data.len());
        assert_eq!(posmap::decode(&again).as_ref(), Ok(&map));
    }
    if let Some(list) = bounded("common positions", limit, || common::decode(data)) {
        assert_eq!(common::encode(&list), data);
    }
}

/// A rollback journal. A second reader, which knows nothing but the format, finds the same pages.
pub fn journal(data: &[u8]) {
    for len in [data.len(), data.len() / 2] {
        let rolled_back = bounded("a journal", 64 * data.len() + (512 << 10), || {
            let mut pages = Vec::new();
            if let Ok(Some(mut journal)) = Journal::open(Cursor::new(data), len as u64) {
                while let Some((pgno, page)) = journal.next().expect("memory does not fail") {
                    pages.push((pgno, page.to_vec()));
                }
            }
            pages
        });
        assert!(rolled_back == naive_journal(data, len).unwrap_or_default());
        let named = journal::super_journal_name(Cursor::new(data), len as u64);
        if let Some(name) = named.expect("memory does not fail") {
            // Bytes that are not UTF-8 are replaced, by three bytes each.
            assert!(name.len() <= 3 * 512 && !name.contains('\0') && name.contains("-mj"));
        }
    }
}

fn naive_journal(data: &[u8], len: usize) -> Option<Vec<(u32, Vec<u8>)>> {
    let number = |at: usize| Some(u32::from_be_bytes(data.get(at..at + 4)?.try_into().ok()?));
    let header_at = |at: usize| {
        let magic = data.get(at..at + 28)?.starts_with(&journal::MAGIC);
        magic.then_some((number(at + 8)?, number(at + 12)?))
    };
    header_at(0).filter(|_| len >= 512)?;
    let (pages, sector, page_size) = (number(16)?, number(20)?, number(24)?);
    if !is_page_size(page_size) || !sector.is_power_of_two() || !(32..=65536).contains(&sector) {
        return None;
    }
    let (sector, size) = (sector as usize, page_size as usize);
    let (mut found, mut at) = (Vec::new(), 0);
    while let Some((count, nonce)) = header_at(at) {
        at += sector;
        let records = match count {
            u32::MAX => len.saturating_sub(sector) / (size + 8),
            n => n as usize,
        };
        for _ in 0..records {
            if at + size + 8 > len {
                return Some(found);
            }
            let (pgno, page) = (number(at)?, &data[at + 4..at + 4 + size]);
            let sum = number(at + 4 + size)?;
            at += size + 8;
            if pgno == 0 || pgno == lock_page(page_size) {
                return Some(found);
            }
            if pgno > pages {
                continue;
            }
            let mut expected = nonce;
            let mut sampled = size as i64 - 200;
            while sampled > 0 {
                expected = expected.wrapping_add(u32::from(page[sampled as usize]));
                sampled -= 200;
            }
            if expected != sum {
                return Some(found);
            }
            found.push((pgno, page.to_vec()));
        }
        at = at.next_multiple_of(sector);
        if at + sector > len {
            break;
        }
    }
    Some(found)
}

/// The header and the frames of a WAL: written again as they were; checksums are those of the
/// definition.
pub fn wal(data: &[u8]) {
    let Some(head) = data.first_chunk::<WAL_HEADER_SIZE>() else {
        return;
    };
    let Ok(header) = WalHeader::decode(head) else {
        return;
    };
    assert_eq!(header.encode(), *head);
    assert!(is_page_size(header.page_size));
    let (size, mut chain) = (header.page_size as usize, header.checksum);
    for frame in 1.. {
        let at = frame_offset(frame, header.page_size) as usize;
        let Some(page) = data.get(at + FRAME_HEADER_SIZE..at + FRAME_HEADER_SIZE + size) else {
            return;
        };
        let head = data[at..].first_chunk().expect("a page follows");
        let parsed = FrameHeader::decode(head);
        assert_eq!(parsed.encode(), *head);
        let expected = parsed.expected_checksum(header.big_endian, chain, page);
        let naive = naive_checksum(header.big_endian, chain, &[&head[..8], page].concat());
        assert_eq!(expected, naive);
        chain = parsed.checksum;
    }
}

fn naive_checksum(big_endian: bool, seed: WalChecksum, data: &[u8]) -> WalChecksum {
    let word = |b: &[u8]| {
        let b = b.try_into().expect("4 bytes");
        if big_endian {
            u32::from_be_bytes(b)
        } else {
            u32::from_le_bytes(b)
        }
    };
    let sum = data
        .chunks_exact(8)
        .fold((seed.0, seed.1), |(s0, s1), pair| {
            let s0 = s0.wrapping_add(word(&pair[..4])).wrapping_add(s1);
            (s0, s1.wrapping_add(word(&pair[4..])).wrapping_add(s0))
        });
    let sum = WalChecksum(sum.0, sum.1);
    assert_eq!(wal_checksum(big_endian, seed, data), sum);
    sum
}

/// Memory of a WAL index: whatever somebody else has written there, nothing fails and all ends; and
/// one that only this code writes says what was written.
pub fn wal_index(data: &[u8]) {
    let mut input = Input(data);
    let filling = usize::from(input.short());
    let filling = input.bytes(filling);
    let mut hostile = Regions::new(filling);
    exercise(&mut hostile, input.0, None);
    exercise(&mut Regions::new(&[]), input.0, Some(Vec::new()));
}

/// Two regions of a WAL index.
struct Regions {
    memory: Vec<u64>,
    index: WalIndex,
}

impl Regions {
    fn new(filling: &[u8]) -> Regions {
        let mut bytes = vec![0u8; 2 * REGION_SIZE];
        for (to, from) in bytes.iter_mut().zip(filling.iter().cycle()) {
            *to = *from;
        }
        let words = bytes.as_chunks::<8>().0;
        let mut regions = Regions {
            memory: words.iter().map(|word| u64::from_ne_bytes(*word)).collect(),
            index: WalIndex::new(),
        };
        for n in 0..2 {
            let at = n * REGION_SIZE / 8;
            // SAFETY: the memory is as long as two regions and aligned to 8 bytes; it lives as long
            // as the index, does not move, and nobody else touches it.
            unsafe {
                regions
                    .index
                    .push_region(regions.memory[at..].as_mut_ptr().cast())
            };
        }
        regions
    }
}

/// Does to an index what the bytes say; with a list of frames, the index must agree with it.
fn exercise(regions: &mut Regions, operations: &[u8], mut model: Option<Vec<u32>>) {
    let index = &regions.index;
    let mut input = Input(operations);
    let mut steps = 0;
    while !input.is_empty() && steps < 64 {
        steps += 1;
        match input.byte() % 6 {
            0 => {
                let count = usize::from(input.byte()) + 1;
                let (base, factor) = (u32::from(input.byte()), u32::from(input.byte()));
                let pgnos: Vec<u32> = (0..count as u32)
                    .map(|i| 1 + base + i * factor % 97)
                    .collect();
                let first = match &model {
                    Some(frames) => frames.len() as u32 + 1,
                    None => input.word(),
                };
                let appended = index.append_frames(first, &pgnos);
                if let Some(frames) = &mut model {
                    let fits = WalIndex::regions_needed(first + count as u32 - 1) <= 2;
                    assert_eq!(appended.is_ok(), fits);
                    frames.extend(pgnos.iter().filter(|_| fits));
                }
            }
            1 => {
                let keep = input.short();
                match &mut model {
                    Some(frames) => {
                        frames.truncate(usize::from(keep) % (frames.len() + 1));
                        index.cleanup_after(frames.len() as u32);
                    }
                    None => index.cleanup_after(input.word()),
                }
            }
            2 => {
                let header = IndexHeader {
                    change: input.word(),
                    is_init: true,
                    big_endian_checksum: input.byte() & 1 == 1,
                    page_size: 512 << (input.byte() % 8),
                    mx_frame: input.word(),
                    page_count: input.word(),
                    frame_checksum: WalChecksum(input.word(), input.word()),
                    salt1: input.word(),
                    salt2: input.word(),
                };
                index.write_header(&header);
                assert_eq!(index.read_header(), Some(header));
            }
            3 => {
                index.invalidate_header();
                assert_eq!(index.read_header(), None);
            }
            4 => {
                let (mark, frame) = (usize::from(input.byte()) % READ_MARKS, input.word());
                index.set_read_mark(mark, frame);
                assert_eq!(index.read_mark(mark), frame);
                index.set_n_backfill(frame);
                index.set_n_backfill_attempted(frame);
                assert_eq!(
                    (index.n_backfill(), index.n_backfill_attempted()),
                    (frame, frame)
                );
            }
            _ => {
                let pgno = input.word() % 300;
                let mx_frame = match &model {
                    Some(frames) => u32::from(input.short()) % (frames.len() as u32 + 1),
                    None => input.word(),
                };
                let found = index.lookup(pgno, mx_frame);
                assert!(found.is_none_or(|frame| frame <= mx_frame));
                if let Some(frames) = &model {
                    let newest = frames[..mx_frame as usize].iter().rposition(|p| *p == pgno);
                    assert_eq!(found, newest.map(|i| i as u32 + 1));
                }
            }
        }
    }
    let _ = index.read_header();
}
