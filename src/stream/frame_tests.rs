//! Tests of the frames: LiteFS's own bytes, round trips, and whatever a peer may send.

use std::fs;

use proptest::prelude::*;

use super::*;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/fixtures/stream");

/// Reads every frame of a body, LTX files included.
fn read_all(mut body: &[u8]) -> Result<Vec<(Frame, Vec<u8>)>, FrameError> {
    let mut frames = Vec::new();
    loop {
        let frame = match Frame::read(&mut body) {
            Err(FrameError::Eof) => return Ok(frames),
            other => other?,
        };
        let mut ltx = Vec::new();
        if let Frame::Ltx { .. } = frame {
            let mut chunks = ChunkReader::new(&mut body);
            chunks.read_to_end(&mut ltx)?;
            chunks.finish()?;
        }
        frames.push((frame, ltx));
    }
}

#[test]
fn golden_stream_decodes_and_encodes() {
    let body = fs::read(format!("{FIXTURES}/stream-body.bin")).unwrap();
    let described: serde_json::Value =
        serde_json::from_slice(&fs::read(format!("{FIXTURES}/frames.json")).unwrap()).unwrap();
    let described = described.as_array().unwrap();
    let frames = read_all(&body).unwrap();
    assert_eq!(frames.len(), described.len());

    let mut encoded = Vec::new();
    for ((frame, ltx), want) in frames.iter().zip(described) {
        assert_eq!(want["offset"].as_u64().unwrap(), encoded.len() as u64);
        frame.encode(&mut encoded);
        match frame {
            Frame::Ltx { size, name } => {
                assert_eq!(want["type"], 1);
                assert_eq!(*size, want["size_field"].as_u64().unwrap());
                assert_eq!(name, want["name"].as_str().unwrap());
                let golden = fs::read(format!("{FIXTURES}/{name}.snapshot.ltx")).unwrap();
                assert_eq!(*ltx, golden);
                // LiteFS cuts its chunks where its encoder happens to write.
                let mut rest = &ltx[..];
                for len in want["chunks"].as_array().unwrap() {
                    let (chunk, tail) = rest.split_at(len.as_u64().unwrap() as usize);
                    encoded.extend_from_slice(&(chunk.len() as u16).to_be_bytes());
                    encoded.extend_from_slice(chunk);
                    rest = tail;
                }
                assert!(rest.is_empty());
                encoded.extend_from_slice(&[0, 0]);
            }
            Frame::Ready => assert_eq!(want["type"], 2),
            Frame::Heartbeat { timestamp } => {
                assert_eq!(want["type"], 7);
                assert_eq!(*timestamp, want["ts"].as_i64().unwrap());
            }
            other => panic!("not in the golden stream: {other:?}"),
        }
    }
    assert_eq!(encoded, body);
}

#[test]
fn lengths_are_checked_before_anything_is_allocated() {
    let mut ltx = Vec::new();
    put_u32(&mut ltx, TYPE_LTX);
    ltx.extend_from_slice(&[0; 8]);
    put_u32(&mut ltx, 0xffff_fff0);
    assert!(matches!(
        Frame::read(&mut &ltx[..]),
        Err(FrameError::TooLong {
            len: 0xffff_fff0,
            max: MAX_NAME_LEN,
            ..
        })
    ));
    let mut handoff = Vec::new();
    put_u32(&mut handoff, TYPE_HANDOFF);
    put_u32(&mut handoff, 1025);
    assert!(matches!(
        Frame::read(&mut &handoff[..]),
        Err(FrameError::TooLong { len: 1025, .. })
    ));
    assert!(matches!(
        Frame::read(&mut &[0u8, 0, 0, 9][..]),
        Err(FrameError::UnknownType(9))
    ));
    assert!(matches!(Frame::read(&mut &[][..]), Err(FrameError::Eof)));
    assert!(matches!(
        Frame::read(&mut &[0u8, 0][..]),
        Err(FrameError::Io(_))
    ));
}

#[test]
fn a_chunk_reader_wants_exactly_one_file() {
    let mut body = Vec::new();
    encode_ltx("a", b"file", &mut body);
    let mut rest = &body[..];
    Frame::read(&mut rest).unwrap();
    let mut chunks = ChunkReader::new(&mut rest);
    let mut half = [0; 2];
    chunks.read_exact(&mut half).unwrap();
    assert!(matches!(chunks.finish(), Err(FrameError::TrailingBytes)));

    let mut rest = &body[..];
    Frame::read(&mut rest).unwrap();
    let mut chunks = ChunkReader::new(&mut rest);
    let mut file = [0; 4];
    chunks.read_exact(&mut file).unwrap();
    chunks.finish().unwrap();
    assert!(rest.is_empty());

    let mut cut = &body[..body.len() - 3];
    Frame::read(&mut cut).unwrap();
    let error = ChunkReader::new(&mut cut)
        .read_to_end(&mut Vec::new())
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

fn any_frame() -> impl Strategy<Value = Frame> {
    let name = "[a-z0-9.é-]{0,80}";
    prop_oneof![
        Just(Frame::Ready),
        Just(Frame::End),
        name.prop_map(|name| Frame::DropDb { name }),
        name.prop_map(|lease_id| Frame::Handoff { lease_id }),
        (any::<u64>(), name).prop_map(|(txid, name)| Frame::HighWaterMark { txid, name }),
        any::<i64>().prop_map(|timestamp| Frame::Heartbeat { timestamp }),
    ]
}

proptest! {
    #[test]
    fn frames_round_trip(frames in prop::collection::vec(any_frame(), 0..20)) {
        let mut body = Vec::new();
        frames.iter().for_each(|frame| frame.encode(&mut body));
        let read: Vec<Frame> = read_all(&body).unwrap().into_iter().map(|(f, _)| f).collect();
        prop_assert_eq!(read, frames);
    }

    #[test]
    fn ltx_files_round_trip(len in 0usize..200_000, writes in prop::collection::vec(1usize..90_000, 1..9)) {
        let file: Vec<u8> = (0..len).map(|i| (i * 31 % 251) as u8).collect();
        let mut whole = Vec::new();
        encode_ltx("x.db", &file, &mut whole);
        let frame = Frame::Ltx { size: 0, name: "x.db".into() };
        prop_assert_eq!(read_all(&whole).unwrap(), vec![(frame, file.clone())]);

        // However the file is written piece by piece, the frame is the same.
        let mut pieces = Vec::new();
        let mut writer = ChunkWriter::new("x.db", |piece: Bytes| {
            pieces.extend_from_slice(&piece);
            Ok(())
        });
        let mut rest = &file[..];
        for size in writes.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at((*size).min(rest.len()));
            writer.write_all(now).unwrap();
            rest = later;
        }
        writer.finish().unwrap();
        prop_assert!(pieces == whole);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), kind in 0u32..9) {
        let _ = read_all(&bytes);
        let mut framed = kind.to_be_bytes().to_vec();
        framed.extend_from_slice(&bytes);
        // What was read accounts for bytes of the input: nothing is invented.
        if let Ok(frames) = read_all(&framed) {
            let ltx: usize = frames.iter().map(|(_, ltx)| ltx.len()).sum();
            prop_assert!(ltx < framed.len());
        }
    }

    #[test]
    fn damaged_streams_never_panic(at in any::<prop::sample::Index>(), flip in 1u8.., cut in any::<prop::sample::Index>()) {
        let mut body = fs::read(format!("{FIXTURES}/stream-body.bin")).unwrap();
        let at = at.index(body.len());
        body[at] ^= flip;
        let _ = read_all(&body);
        let _ = read_all(&body[..cut.index(body.len())]);
    }
}
