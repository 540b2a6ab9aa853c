//! Round trips, the rules on pages, and damaged or hostile input.

use std::io::{Cursor, Read, Write};

use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};
use proptest::prelude::*;

use super::checksum::Crc;
use super::*;

/// Page numbers and data.
type Pages = Vec<(u32, Vec<u8>)>;

fn header(compressed: bool, page_size: u32, commit: u32, min_txid: u64) -> Header {
    Header {
        compressed,
        page_size,
        commit,
        min_txid,
        max_txid: min_txid + 1,
        timestamp: 1_795_380_281_767,
        pre_apply_checksum: if min_txid == 1 { 0 } else { CHECKSUM_FLAG | 77 },
        wal_offset: 32,
        wal_size: 4120,
        wal_salt1: 1,
        wal_salt2: 2,
        node_id: 3,
    }
}

/// A page that compresses a little.
fn page(page_size: u32, seed: u32) -> Vec<u8> {
    let noise = |i: u32| (i ^ seed).wrapping_mul(2_654_435_761).rotate_left(11) as u8;
    (0..page_size)
        .map(|i| if i % 16 < 5 { noise(i) } else { seed as u8 })
        .collect()
}

fn sum(pages: &[(u32, Vec<u8>)]) -> u64 {
    CHECKSUM_FLAG
        | pages
            .iter()
            .fold(0, |sum, (pgno, data)| sum ^ page_checksum(*pgno, data))
}

fn encode(h: Header, pages: &[(u32, Vec<u8>)], post: u64) -> Result<Vec<u8>, LtxError> {
    let mut encoder = Encoder::new(Vec::new(), h)?;
    for (pgno, data) in pages {
        encoder.page(*pgno, data)?;
    }
    Ok(encoder.finish(post)?.0)
}

/// A file put together by hand, with a right file checksum whatever the pages are.
fn forge(h: Header, pages: &[(u32, Vec<u8>)], post: u64, frame: Option<FrameInfo>) -> Vec<u8> {
    let mut block = Vec::new();
    for (pgno, data) in pages {
        block.extend_from_slice(&pgno.to_be_bytes());
        block.extend_from_slice(data);
    }
    block.extend_from_slice(&[0; PAGE_HEADER_SIZE]);
    let mut crc = Crc::new();
    crc.update(&h.encode());
    crc.update(&block);
    crc.update(&post.to_be_bytes());
    let mut file = h.encode().to_vec();
    match frame {
        None => file.extend_from_slice(&block),
        Some(info) => {
            let mut w = FrameEncoder::with_frame_info(info, &mut file);
            w.write_all(&block).unwrap();
            w.finish().unwrap();
        }
    }
    let trailer = Trailer {
        post_apply_checksum: post,
        file_checksum: crc.value() | CHECKSUM_FLAG,
    };
    file.extend_from_slice(&trailer.encode());
    file
}

#[test]
fn page_sizes_and_lock_pages() {
    for (size, lock) in [(512, 2_097_153), (4096, 262_145), (65536, 16_385)] {
        assert!(is_valid_page_size(size));
        assert_eq!(lock_pgno(size), lock);
    }
    for size in [0, 1, 256, 513, 4095, 131_072, u32::MAX] {
        assert!(!is_valid_page_size(size));
    }
}

#[test]
fn page_order_is_enforced_on_both_sides() {
    let lock = lock_pgno(65536);
    let cases: [(&[u32], u32); 6] = [
        (&[0], 9),
        (&[2, 2], 9),
        (&[3, 2], 9),
        (&[10], 9),
        (&[lock], lock + 1),
        (&[1, u32::MAX], 9),
    ];
    for (pgnos, commit) in cases {
        let h = header(false, 65536, commit, 5);
        let pages: Vec<_> = pgnos.iter().map(|&n| (n, page(65536, n))).collect();
        let error = encode(h, &pages, CHECKSUM_FLAG | 1).unwrap_err();
        assert!(matches!(error, LtxError::PageNumber { .. }), "{error}");
        if pgnos != [0] {
            let error = verify(&forge(h, &pages, CHECKSUM_FLAG | 1, None)[..]).unwrap_err();
            assert!(matches!(error, LtxError::PageNumber { .. }), "{error}");
        }
    }
}

#[test]
fn a_refused_page_leaves_the_encoder_usable() {
    let h = header(true, 512, 3, 5);
    let mut encoder = Encoder::new(Vec::new(), h).unwrap();
    encoder.page(2, &page(512, 2)).unwrap();
    assert!(matches!(
        encoder.page(3, &[0; 511]),
        Err(LtxError::BufferSize {
            expected: 512,
            actual: 511
        })
    ));
    assert!(matches!(
        encoder.page(4, &page(512, 4)),
        Err(LtxError::PageNumber { pgno: 4, .. })
    ));
    encoder.page(3, &page(512, 3)).unwrap();
    let (file, trailer) = encoder.finish(CHECKSUM_FLAG | 9).unwrap();
    assert_eq!(
        verify(&file[..]).unwrap(),
        Summary {
            header: h,
            trailer,
            pages: 2
        }
    );
}

#[test]
fn snapshots_are_complete_and_carry_their_own_checksum() {
    let h = header(false, 512, 3, 1);
    let pages: Vec<_> = (1..=3).map(|n| (n, page(512, n))).collect();
    let post = sum(&pages);
    assert_eq!(
        verify(&encode(h, &pages, post).unwrap()[..]).unwrap().pages,
        3
    );

    for (kept, missing) in [(&pages[1..], 1), (&pages[..2], 3), (&[][..], 1)] {
        let hole =
            |e| matches!(e, LtxError::IncompleteSnapshot { missing: m, commit: 3 } if m == missing);
        assert!(hole(encode(h, kept, sum(kept)).unwrap_err()));
        assert!(hole(
            verify(&forge(h, kept, sum(kept), None)[..]).unwrap_err()
        ));
    }
    let wrong = |e| matches!(e, LtxError::PostApplyChecksum { expected, found } if expected == post && found == post ^ 1);
    assert!(wrong(encode(h, &pages, post ^ 1).unwrap_err()));
    assert!(wrong(
        verify(&forge(h, &pages, post ^ 1, None)[..]).unwrap_err()
    ));
}

/// By the rules alone: such a snapshot is 1 GiB.
#[test]
fn a_snapshot_steps_over_the_lock_page() {
    let lock = lock_pgno(65536);
    for commit in [lock - 1, lock, lock + 1] {
        let mut order = order::PageOrder::new(&header(true, 65536, commit, 1));
        for pgno in (1..=commit).filter(|&n| n != lock) {
            assert!(
                matches!(order.check_end(CHECKSUM_FLAG), Err(LtxError::IncompleteSnapshot { missing, .. }) if missing == pgno)
            );
            order.accept(pgno).unwrap();
        }
        order.check_end(CHECKSUM_FLAG).unwrap();
    }
}

#[test]
fn deletions_and_checksum_flags() {
    let deleted = header(true, 4096, 0, 5);
    assert!(verify(&encode(deleted, &[], CHECKSUM_FLAG).unwrap()[..]).is_ok());
    let wrong = |e| {
        matches!(
            e,
            LtxError::PostApplyChecksum {
                expected: CHECKSUM_FLAG,
                ..
            }
        )
    };
    assert!(wrong(encode(deleted, &[], CHECKSUM_FLAG | 1).unwrap_err()));
    assert!(wrong(
        verify(&forge(deleted, &[], CHECKSUM_FLAG | 1, Some(FrameInfo::new()))[..]).unwrap_err()
    ));

    let h = header(false, 512, 1, 5);
    assert!(matches!(
        encode(h, &[(1, page(512, 1))], 5),
        Err(LtxError::PostApplyFlag(5))
    ));
    assert!(matches!(
        verify(&forge(h, &[(1, page(512, 1))], 5, None)[..]),
        Err(LtxError::PostApplyFlag(5))
    ));
}

#[test]
fn transitions_without_pages() {
    let (h, t) = (header(false, 512, 4, 5), |post| Trailer {
        post_apply_checksum: post,
        file_checksum: 0,
    });
    check_transition(&h, &t(h.pre_apply_checksum), 0).unwrap();
    check_transition(&h, &t(CHECKSUM_FLAG | 8), 1).unwrap();
    check_transition(&Header { commit: 0, ..h }, &t(CHECKSUM_FLAG), 0).unwrap();
    assert!(matches!(
        check_transition(&h, &t(CHECKSUM_FLAG | 8), 0),
        Err(LtxError::PostApplyChecksum { .. })
    ));
}

#[test]
fn any_legal_frame_is_read() {
    let h = header(true, 4096, 200, 5);
    let pages: Vec<_> = (1..=150).map(|n| (n, page(4096, n % 7))).collect();
    let sizes = [
        BlockSize::Max64KB,
        BlockSize::Max256KB,
        BlockSize::Max1MB,
        BlockSize::Max4MB,
    ];
    for mode in [BlockMode::Independent, BlockMode::Linked] {
        for size in sizes {
            for on in [false, true] {
                let info = FrameInfo::new()
                    .block_mode(mode)
                    .block_size(size)
                    .content_checksum(on)
                    .block_checksums(!on);
                let file = forge(h, &pages, CHECKSUM_FLAG | 1, Some(info));
                let stream = [&file[..], b"next"].concat();
                let (rest, _) = Decoder::new(&stream[..]).unwrap().finish().unwrap();
                assert_eq!(rest, b"next");
            }
        }
    }
}

/// A few KiB that expand to 64 MiB of zero pages end at the first page that is out of order.
#[test]
fn a_decompression_bomb_ends_early() {
    let mut file = header(true, 512, 1000, 5).encode().to_vec();
    let mut w =
        FrameEncoder::with_frame_info(FrameInfo::new().block_size(BlockSize::Max64KB), file);
    let one = [&1u32.to_be_bytes()[..], &[0; 512]].concat();
    for _ in 0..(64 << 20) / one.len() {
        w.write_all(&one).unwrap();
    }
    file = w.finish().unwrap();
    let mut input = Cursor::new(&file);
    assert!(matches!(
        verify(&mut input),
        Err(LtxError::PageNumber { pgno: 1, .. })
    ));
    assert!(
        input.position() < 2000,
        "read {} of {} bytes",
        input.position(),
        file.len()
    );
}

#[test]
fn data_behind_the_last_page_is_refused() {
    let h = header(true, 512, 1, 5);
    let mut w = FrameEncoder::new(h.encode().to_vec());
    w.write_all(&[0; PAGE_HEADER_SIZE + 1]).unwrap();
    let file = w.finish().unwrap();
    let mut decoder = Decoder::new(&file[..]).unwrap();
    assert!(matches!(
        decoder.page(&mut [0; 511]),
        Err(LtxError::BufferSize {
            expected: 512,
            actual: 511
        })
    ));
    assert!(matches!(
        decoder.page(&mut [0; 512]),
        Err(LtxError::TrailingData)
    ));
    assert!(matches!(decoder.page(&mut [0; 512]), Err(LtxError::Failed)));
    assert!(matches!(decoder.finish(), Err(LtxError::Failed)));
}

#[test]
fn failures_of_reader_and_writer_are_told_from_bad_input() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::ConnectionReset.into())
        }
    }
    for compressed in [false, true] {
        let file = encode(
            header(compressed, 512, 1, 5),
            &[(1, page(512, 1))],
            CHECKSUM_FLAG,
        )
        .unwrap();
        for at in [0, 50, 100, 103, 120, file.len() - 1] {
            assert!(
                matches!(verify(file[..at].chain(Broken)), Err(LtxError::Io(_))),
                "{at}"
            );
            assert!(
                matches!(verify(&file[..at]), Err(LtxError::Truncated)),
                "{at}"
            );
        }
        // A writer that is full at any point fails the encoder, and it stays failed.
        for room in [0, 100, 150] {
            let mut space = vec![0; room];
            let Ok(mut encoder) = Encoder::new(&mut space[..], header(compressed, 4096, 99, 5))
            else {
                assert_eq!(room, 0);
                continue;
            };
            let error = (1..99)
                .find_map(|n| encoder.page(n, &page(4096, n)).err())
                .unwrap();
            assert!(matches!(error, LtxError::Io(_)), "{error}");
            assert!(matches!(
                encoder.page(99, &page(4096, 1)),
                Err(LtxError::Failed)
            ));
            assert!(matches!(
                encoder.finish(CHECKSUM_FLAG),
                Err(LtxError::Failed)
            ));
        }
    }
}

fn decode(bytes: &[u8]) -> Result<(Header, Pages, Trailer), LtxError> {
    let mut decoder = Decoder::new(bytes)?;
    let h = *decoder.header();
    let mut pages = Vec::new();
    let mut data = vec![0; h.page_size as usize];
    while let Some(pgno) = decoder.page(&mut data)? {
        pages.push((pgno, data.clone()));
    }
    Ok((h, pages, decoder.finish()?.1))
}

/// Whether a damaged file is refused. There is one way for it not to be: LZ4 can say the same
/// content in several ways (as a match at another distance, say), and the checksums are of the
/// content.
fn refused_or_same(good: &[u8], bad: &[u8]) -> bool {
    match decode(bad) {
        Err(_) => verify(bad).is_err(),
        Ok(content) => content.0.compressed && content == decode(good).unwrap(),
    }
}

/// A file with some of its pages, and what was put into it.
fn any_file() -> impl Strategy<Value = (Header, Pages, u64)> {
    let shape = (
        any::<bool>(),
        9u32..=13,
        1u32..60,
        1u64..4,
        any::<u64>(),
        any::<u64>(),
    );
    shape.prop_map(|(compressed, log, commit, min, seed, post)| {
        let h = header(compressed, 1 << log, commit, min);
        let chosen = |n: u32| h.is_snapshot() || seed.rotate_left(n) & 3 == 0;
        let pages: Vec<_> = (1..=commit)
            .filter(|&n| chosen(n))
            .map(|n| (n, page(1 << log, n ^ seed as u32)))
            .collect();
        let post = if h.is_snapshot() {
            sum(&pages)
        } else {
            post | CHECKSUM_FLAG
        };
        (h, pages, post)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn round_trip((h, pages, post) in any_file(), tail in any::<[u8; 7]>()) {
        let mut stream = encode(h, &pages, post).unwrap();
        stream.extend_from_slice(&tail);
        let mut decoder = Decoder::new(&stream[..]).unwrap();
        prop_assert_eq!(*decoder.header(), h);
        let mut data = vec![0; h.page_size as usize];
        for (pgno, want) in &pages {
            prop_assert_eq!(decoder.page(&mut data).unwrap(), Some(*pgno));
            prop_assert!(data == *want);
        }
        prop_assert_eq!(decoder.page(&mut data).unwrap(), None);
        let (rest, trailer) = decoder.finish().unwrap();
        prop_assert_eq!(rest, &tail[..]);
        prop_assert_eq!(trailer.post_apply_checksum, post);
    }

    #[test]
    fn damage_is_found((h, pages, post) in any_file(), at in any::<prop::sample::Index>(), flip in 1u8..) {
        let good = encode(h, &pages, post).unwrap();
        let at = at.index(good.len());
        prop_assert!(verify(&good[..at]).is_err(), "cut at {at}");
        let mut bad = good.clone();
        bad[at] ^= flip;
        prop_assert!(refused_or_same(&good, &bad), "byte {at} of {} changed by {flip:02x}", good.len());
    }

    #[test]
    fn noise_is_never_a_file(compressed: bool, linked: bool, noise in prop::collection::vec(any::<u8>(), 0..300)) {
        // A good header and frame descriptor, so that the rest gets as far as it can.
        let mut file = header(compressed, 512, 9, 5).encode().to_vec();
        if compressed {
            let mode = if linked { BlockMode::Linked } else { BlockMode::Independent };
            let info = FrameInfo::new().block_size(BlockSize::Max64KB).block_mode(mode);
            let mut w = FrameEncoder::with_frame_info(info, Vec::new());
            w.write_all(&1u32.to_be_bytes()).unwrap();
            w.flush().unwrap();
            file.extend_from_slice(w.get_ref());
        }
        file.extend_from_slice(&noise);
        prop_assert!(verify(&file[..]).is_err());
        prop_assert!(verify(&noise[..]).is_err());
    }
}

/// Every byte of one small file, every bit of it, and every length of it.
#[test]
fn every_bit_and_length_of_a_small_file() {
    for compressed in [false, true] {
        let pages: Vec<_> = (1..=2).map(|n| (n, page(512, n))).collect();
        let good = encode(header(compressed, 512, 2, 1), &pages, sum(&pages)).unwrap();
        verify(&good[..]).unwrap();
        for at in 0..good.len() {
            assert!(verify(&good[..at]).is_err(), "cut at {at}");
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                assert!(refused_or_same(&good, &bad), "bit {bit} of byte {at}");
            }
        }
    }
}
