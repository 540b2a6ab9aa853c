//! LTX files.

use std::io::Read;

use lz4_flex::frame::FrameDecoder;

use super::Input;
use super::memory::bounded;
use crate::ltx::{
    self, CHECKSUM_FLAG, Decoder, Encoder, HEADER_SIZE, Header, LtxError, TRAILER_SIZE, Trailer,
};

/// The most that a reader of an LTX file may allocate: a block of the largest size that an LZ4 frame
/// may have, packed and unpacked (8 MiB, in frames of the old kind; 4 MiB and a window in others), a
/// page, and what is small.
pub const READER_MEMORY: usize = (16 << 20) + (128 << 10);

/// How much of a compressed block is unpacked to be sealed.
const MAX_CONTENT: u64 = 1 << 20;

/// Pages with their numbers.
type Pages = Vec<(u32, Vec<u8>)>;

/// An LTX file, as it is and sealed.
pub fn ltx(data: &[u8]) {
    read(data);
    if let Some((sealed, plausible)) = seal(data) {
        let accepted = read(&sealed);
        assert_eq!(accepted, plausible, "a naive reader has another opinion");
    }
}

/// Several LTX files that are merged, each with its length before it. Whatever is merged has the
/// effect of its parts.
pub fn merge(data: &[u8]) {
    let mut input = Input(data);
    let mut files = Vec::new();
    while !input.is_empty() && files.len() < 8 {
        let len = usize::from(input.short());
        let file = input.bytes(len);
        files.push(seal(file).map_or(file.to_vec(), |(sealed, _)| sealed));
    }
    let readers: Vec<&[u8]> = files.iter().map(Vec::as_slice).collect();
    let mut merged = Vec::new();
    let limit =
        files.len() * (READER_MEMORY + (64 << 10)) + READER_MEMORY + 4 * data.len() + (4 << 20);
    let Ok(end) = bounded("a merge", limit, || {
        ltx::merge(readers.clone(), &mut merged)
    }) else {
        return;
    };
    let (header, pages, trailer) = decode(&merged).expect("what is merged is a file");
    assert_eq!(
        (header.max_txid, trailer.post_apply_checksum),
        (end.txid, end.checksum)
    );
    let mut newest = std::collections::BTreeMap::new();
    let mut page_size = 0;
    for file in readers {
        let (header, pages, _) = decode(file).expect("it was merged");
        if header.page_size != page_size {
            newest.clear();
            page_size = header.page_size;
        }
        newest.extend(pages);
        newest.retain(|pgno, _| *pgno <= header.commit);
    }
    assert!(
        newest.into_iter().eq(pages),
        "other pages than those of the parts"
    );
}

/// The whole of a file.
fn decode(data: &[u8]) -> Result<(Header, Pages, Trailer), LtxError> {
    let (header, pages, trailer, _) = decode_from(data)?;
    Ok((header, pages, trailer))
}

/// The same, and how many bytes it takes.
fn decode_from(data: &[u8]) -> Result<(Header, Pages, Trailer, usize), LtxError> {
    let mut decoder = Decoder::new(data)?;
    let header = *decoder.header();
    let mut page = vec![0; header.page_size as usize];
    let mut pages = Vec::new();
    while let Some(pgno) = decoder.page(&mut page)? {
        pages.push((pgno, page.clone()));
    }
    let (rest, trailer) = decoder.finish()?;
    Ok((header, pages, trailer, data.len() - rest.len()))
}

/// Writes a file of these parts.
pub fn encode(
    header: Header,
    pages: &[(u32, Vec<u8>)],
    post_apply: u64,
) -> Result<Vec<u8>, LtxError> {
    let mut encoder = Encoder::new(Vec::new(), header)?;
    for (pgno, page) in pages {
        encoder.page(*pgno, page)?;
    }
    Ok(encoder.finish(post_apply)?.0)
}

/// Reads a file and, if it is one, writes it again in both ways, cuts it and flips a bit. Whether it
/// is one.
fn read(data: &[u8]) -> bool {
    let verified = bounded("an LTX file", READER_MEMORY, || ltx::verify(data));
    let decoded = decode_from(data);
    assert_eq!(verified.is_ok(), decoded.is_ok());
    let Ok((header, pages, trailer, size)) = decoded else {
        return false;
    };
    let lock = ltx::lock_pgno(header.page_size);
    assert!(pages.windows(2).all(|w| w[0].0 < w[1].0));
    assert!(
        pages
            .iter()
            .all(|(p, _)| (1..=header.commit).contains(p) && *p != lock)
    );
    for compressed in [false, true] {
        let header = Header {
            compressed,
            ..header
        };
        let again = encode(header, &pages, trailer.post_apply_checksum).expect("it was accepted");
        let same = decode(&again).expect("it was written by us");
        assert_eq!(
            (same.0, same.2.post_apply_checksum),
            (header, trailer.post_apply_checksum)
        );
        assert!(same.1 == pages);
    }
    let seed = trailer.file_checksum as usize;
    for cut in [0, size - 1, seed % size] {
        assert!(
            ltx::verify(&data[..cut]).is_err(),
            "{cut} of {size} bytes are accepted"
        );
    }
    let mut flipped = data[..size].to_vec();
    let at = (seed >> 7) % size;
    flipped[at] ^= 1 << (seed % 8);
    if let Ok(same) = decode(&flipped) {
        // There is more than one way to compress the same bytes.
        assert!(
            header.compressed && at >= HEADER_SIZE,
            "a bit flipped at {at} is accepted"
        );
        assert!(same == (header, pages, trailer));
    }
    true
}

/// The uncompressed form of a file with its checksums set right, and whether a naive reader takes it
/// for one. `None` without a header.
pub fn seal(data: &[u8]) -> Option<(Vec<u8>, bool)> {
    let header = Header::decode(data.first_chunk()?).ok()?;
    let mut rest = &data[HEADER_SIZE..];
    let content = if header.compressed {
        let mut content = Vec::new();
        let mut unpacked = FrameDecoder::new(&mut rest).take(MAX_CONTENT);
        // What there is up to an error is good to be sealed.
        let _ = unpacked.read_to_end(&mut content);
        content
    } else {
        rest[..rest.len().saturating_sub(TRAILER_SIZE)].to_vec()
    };
    let post = data.last_chunk::<TRAILER_SIZE>()?.first_chunk::<8>()?;
    let header = Header {
        compressed: false,
        ..header
    };
    let (plausible, sum) = naive(&header, &content);
    let post = match (header.commit, header.is_snapshot()) {
        (0, _) => CHECKSUM_FLAG,
        (_, true) => sum,
        (_, false) => u64::from_be_bytes(*post) | CHECKSUM_FLAG,
    };
    let mut sealed = header.encode().to_vec();
    sealed.extend_from_slice(&content);
    sealed.extend_from_slice(&post.to_be_bytes());
    let sum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64GoIso, &sealed) | CHECKSUM_FLAG;
    sealed.extend_from_slice(&sum.to_be_bytes());
    Some((sealed, plausible))
}

/// Whether these bytes are exactly a page block that may follow this header, and the checksum of its
/// pages.
fn naive(header: &Header, content: &[u8]) -> (bool, u64) {
    let size = header.page_size as usize;
    let (lock, commit) = (
        u64::from(ltx::lock_pgno(header.page_size)),
        u64::from(header.commit),
    );
    let (mut at, mut last, mut sum) = (0, 0, 0);
    loop {
        let Some(number) = content.get(at..at + 4) else {
            return (false, sum | CHECKSUM_FLAG);
        };
        let pgno = u64::from(u32::from_be_bytes(number.try_into().expect("4 bytes")));
        at += 4;
        if pgno == 0 {
            break;
        }
        let Some(page) = content.get(at..at + size) else {
            return (false, sum | CHECKSUM_FLAG);
        };
        at += size;
        let next = if last + 1 == lock { last + 2 } else { last + 1 };
        let order = if header.is_snapshot() {
            pgno == next
        } else {
            pgno > last
        };
        if !order || pgno > commit || pgno == lock {
            return (false, sum | CHECKSUM_FLAG);
        }
        sum ^= ltx::page_checksum(pgno as u32, page);
        last = pgno;
    }
    let end = if commit == lock { commit - 1 } else { commit };
    let whole = !header.is_snapshot() || last == end;
    (whole && at == content.len(), sum | CHECKSUM_FLAG)
}
