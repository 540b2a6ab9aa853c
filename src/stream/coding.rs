//! The stream's compression between nodes of this kind: the content coding `zstd` of HTTP.
//!
//! A replica says `accept-encoding: zstd`, the primary answers with `content-encoding: zstd` if it
//! does that. LiteFS's nodes know neither header in this place: they send none and ignore it, and what
//! they get and send is as it always was.
//!
//! The coding lies over the stream's frames and knows nothing of them. It has a window of [`WINDOW`]
//! bytes over what was sent last: a transaction mostly changes pages that the transactions before it
//! changed too. Each piece is flushed, so that it can be decoded when it arrives. Large pieces, which
//! are those of snapshots and of large transactions, are compressed as fast as LZ4 would be, without
//! the past: another level needs another zstd frame.
//!
//! Invariants: a decoder keeps at most [`MAX_WINDOW`] bytes and what goes with them, whatever the peer
//! sends, and gives at most [`STEP`] bytes at a time: what bytes on the wire can become is decoded only
//! as fast as it is taken.

use std::io;

use bytes::{Buf, Bytes};
use zstd::stream::raw::{CParameter, DParameter, Decoder as Zstd, Encoder, Operation};
use zstd::zstd_safe::{InBuffer, OutBuffer};

/// The coding's name in headers.
pub const ZSTD: &str = "zstd";

/// log2 of [`WINDOW`].
const WINDOW_LOG: u32 = 15;
/// Bytes of the past that a piece is compressed with.
pub const WINDOW: usize = 1 << WINDOW_LOG;
/// log2 of [`MAX_WINDOW`].
const MAX_WINDOW_LOG: u32 = 17;
/// Bytes of the past that a decoder keeps for a peer.
pub const MAX_WINDOW: usize = 1 << MAX_WINDOW_LOG;
/// The most bytes that are decoded at once.
pub const STEP: usize = 64 << 10;
/// zstd's level for small pieces, and for those from [`LARGE`] bytes on.
const LEVEL: i32 = 1;
const LARGE_LEVEL: i32 = -3;
const LARGE: usize = 32 << 10;
/// log2 of the entries that a coder remembers places of the window by: enough for the window, and
/// less than zstd would take.
const HASH_LOG: u32 = 12;
/// The least bytes that a large piece becomes. HTTP/2's receivers end a connection in which too many
/// frames that are smaller wait to be read, as those of a snapshot with little in it would.
const LEAST: usize = 256;
/// What a frame begins with that zstd's decoders skip (RFC 8878, 3.1.2); its length follows, as a u32.
const SKIPPED: [u8; 4] = 0x184d_2a50_u32.to_le_bytes();
/// Bytes that are compressed at once: what a coder needs beside the window is a multiple of it.
const BLOCK: u32 = 8 << 10;

/// Whether a header's list of codings has this one.
pub fn accepts(list: &str) -> bool {
    let mut codings = list.split(',').map(|c| c.split(';').next().unwrap_or(c));
    codings.any(|c| c.trim().eq_ignore_ascii_case(ZSTD))
}

/// The primary's side.
pub struct Coder {
    zstd: Encoder<'static>,
    level: i32,
}

impl Coder {
    /// At the beginning of a stream.
    pub fn new() -> io::Result<Coder> {
        let mut zstd = Encoder::new(LEVEL)?;
        zstd.set_parameter(CParameter::WindowLog(WINDOW_LOG))?;
        zstd.set_parameter(CParameter::HashLog(HASH_LOG))?;
        zstd.set_parameter(CParameter::MaxBlockSize(BLOCK))?;
        Ok(Coder { zstd, level: LEVEL })
    }

    /// The bytes that this piece is sent as.
    pub fn encode(&mut self, piece: &[u8]) -> io::Result<Bytes> {
        let mut coded = Vec::with_capacity(piece.len() / 8 + 128);
        self.set_level(
            if piece.len() < LARGE {
                LEVEL
            } else {
                LARGE_LEVEL
            },
            &mut coded,
        )?;
        let mut input = InBuffer::around(piece);
        while input.pos() < piece.len() {
            with_room(&mut coded, |out| self.zstd.run(&mut input, out))?;
        }
        while with_room(&mut coded, |out| self.zstd.flush(out))? > 0 {}
        if piece.len() >= LARGE && coded.len() < LEAST {
            self.end_frame(&mut coded)?;
            pad(&mut coded);
        }
        Ok(coded.into())
    }

    /// The bytes that end the stream.
    pub fn finish(&mut self) -> io::Result<Bytes> {
        let mut coded = Vec::new();
        self.end_frame(&mut coded)?;
        Ok(coded.into())
    }

    fn set_level(&mut self, level: i32, coded: &mut Vec<u8>) -> io::Result<()> {
        if level != self.level {
            self.end_frame(coded)?;
            self.zstd.reinit()?;
            let level = CParameter::CompressionLevel(level);
            self.zstd.set_parameter(level)?;
        }
        self.level = level;
        Ok(())
    }

    fn end_frame(&mut self, coded: &mut Vec<u8>) -> io::Result<()> {
        while with_room(coded, |out| self.zstd.finish(out, true))? > 0 {}
        Ok(())
    }
}

/// Makes [`LEAST`] bytes of less, between two frames.
fn pad(coded: &mut Vec<u8>) {
    let rest = LEAST.saturating_sub(coded.len() + SKIPPED.len() + size_of::<u32>());
    coded.extend_from_slice(&SKIPPED);
    coded.extend_from_slice(&(rest as u32).to_le_bytes());
    coded.resize(coded.len() + rest, 0);
}

/// Runs a step of zstd with room for its output behind what is there.
fn with_room<T>(
    bytes: &mut Vec<u8>,
    step: impl FnOnce(&mut OutBuffer<'_, Vec<u8>>) -> io::Result<T>,
) -> io::Result<T> {
    // zstd writes into the capacity, and sets the length.
    bytes.reserve(128);
    let at = bytes.len();
    step(&mut OutBuffer::around_pos(bytes, at))
}

/// The replica's side.
pub struct Decoder {
    zstd: Zstd<'static>,
    /// Bytes that came and were not decoded yet.
    coded: Bytes,
    /// The last step filled its room: more may come without more bytes.
    pending: bool,
}

impl Decoder {
    /// At the beginning of a stream.
    pub fn new() -> io::Result<Decoder> {
        let mut zstd = Zstd::new()?;
        zstd.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))?;
        Ok(Decoder {
            zstd,
            coded: Bytes::new(),
            pending: false,
        })
    }

    /// Whether [`Decoder::decode`] may give something before more is added.
    pub fn has_more(&self) -> bool {
        self.pending || self.coded.has_remaining()
    }

    /// More bytes of the stream, once [`Decoder::decode`] gives none.
    pub fn add(&mut self, coded: Bytes) {
        self.coded = coded;
    }

    /// Up to [`STEP`] bytes; none: more bytes are needed.
    pub fn decode(&mut self) -> io::Result<Bytes> {
        while self.has_more() {
            let mut decoded = Vec::with_capacity(STEP.min((16 << 10).max(self.coded.len() * 8)));
            let mut input = InBuffer::around(&self.coded);
            let mut output = OutBuffer::around(&mut decoded);
            self.zstd.run(&mut input, &mut output)?;
            let taken = input.pos();
            self.pending = decoded.len() == decoded.capacity();
            if taken == 0 && decoded.is_empty() && !self.coded.is_empty() {
                return Err(io::Error::other("the stream's compression goes nowhere"));
            }
            self.coded.advance(taken);
            if !decoded.is_empty() {
                return Ok(decoded.into());
            }
        }
        Ok(Bytes::new())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode_all(decoder: &mut Decoder, coded: Bytes) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        decoder.add(coded);
        loop {
            let piece = decoder.decode()?;
            assert!(piece.len() <= STEP);
            if piece.is_empty() {
                return Ok(all);
            }
            all.extend_from_slice(&piece);
        }
    }

    fn page(seed: u64) -> Vec<u8> {
        let word = |i: u64| (i + seed * 1000).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (0..512).flat_map(|i| word(i).to_be_bytes()).collect()
    }

    #[test]
    fn each_piece_is_there_when_it_arrives_and_the_past_helps() {
        let (mut coder, mut decoder) = (Coder::new().unwrap(), Decoder::new().unwrap());
        let first = coder.encode(&page(1)).unwrap();
        assert_eq!(decode_all(&mut decoder, first).unwrap(), page(1));
        let mut changed = page(1);
        changed[100] ^= 1;
        let again = coder.encode(&changed).unwrap();
        assert!(again.len() < 200, "{}", again.len());
        assert_eq!(decode_all(&mut decoder, again).unwrap(), changed);
        let end = coder.finish().unwrap();
        assert_eq!(decode_all(&mut decoder, end).unwrap(), b"");
    }

    #[test]
    fn a_peer_does_not_choose_how_much_is_kept() {
        let mut zstd = Encoder::new(1).unwrap();
        zstd.set_parameter(CParameter::WindowLog(MAX_WINDOW_LOG + 1))
            .unwrap();
        let mut coder = Coder { zstd, level: LEVEL };
        let coded = coder.encode(&page(1)).unwrap();
        let refused = decode_all(&mut Decoder::new().unwrap(), coded);
        assert!(refused.is_err(), "{refused:?}");
    }

    #[test]
    fn large_pieces_come_between_small_ones() {
        let (mut coder, mut decoder) = (Coder::new().unwrap(), Decoder::new().unwrap());
        let large: Vec<u8> = (0..40).flat_map(page).collect();
        for piece in [page(1), large.clone(), large, page(1), page(1)] {
            let coded = coder.encode(&piece).unwrap();
            assert_eq!(decode_all(&mut decoder, coded).unwrap(), piece);
        }
        let last = coder.encode(&page(1)).unwrap();
        assert!(last.len() < 100, "{}", last.len());
    }

    #[test]
    fn much_that_comes_as_little_is_decoded_in_steps() {
        let zeros = vec![0; 100 << 20];
        let coded = Coder::new().unwrap().encode(&zeros).unwrap();
        assert!(coded.len() < 100_000);
        let mut decoder = Decoder::new().unwrap();
        assert_eq!(decode_all(&mut decoder, coded).unwrap(), zeros);
    }

    #[test]
    fn a_large_piece_with_little_in_it_is_no_tiny_frame() {
        let (mut coder, mut decoder) = (Coder::new().unwrap(), Decoder::new().unwrap());
        let zeros = vec![0; 64 << 10];
        for piece in [zeros.clone(), zeros.clone(), page(1), zeros, page(1)] {
            let coded = coder.encode(&piece).unwrap();
            assert!(coded.len() >= LEAST, "{}", coded.len());
            assert_eq!(decode_all(&mut decoder, coded).unwrap(), piece);
        }
    }

    #[test]
    fn what_accepts_it() {
        assert!(accepts("zstd") && accepts("gzip, ZSTD;q=0.5"));
        assert!(!accepts("gzip") && !accepts("") && !accepts("zstd2, x"));
    }

    proptest! {
        #[test]
        fn pieces_come_out_as_they_went_in(
            pieces in prop::collection::vec(prop::collection::vec(0u8..4, 0..3000), 0..20),
            cut in 1usize..500,
        ) {
            let (mut coder, mut decoder) = (Coder::new().unwrap(), Decoder::new().unwrap());
            for piece in pieces {
                let coded = coder.encode(&piece).unwrap();
                let mut all = Vec::new();
                for part in coded.chunks(cut) {
                    all.extend(decode_all(&mut decoder, Bytes::copy_from_slice(part)).unwrap());
                }
                prop_assert_eq!(all, piece);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
            let mut coded = vec![0x28, 0xb5, 0x2f, 0xfd];
            coded.extend_from_slice(&bytes);
            let _ = decode_all(&mut Decoder::new().unwrap(), coded.into());
            let _ = decode_all(&mut Decoder::new().unwrap(), bytes.into());
        }
    }
}
