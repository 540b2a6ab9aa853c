//! The files that a real LiteFS wrote, and what it and its tools say about them.

use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::*;

fn fixtures() -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/fixtures")).to_path_buf()
}

/// The cases, each with its directory and manifest.
fn cases() -> Vec<(PathBuf, Value)> {
    let mut cases = Vec::new();
    for entry in std::fs::read_dir(fixtures().join("ltx")).unwrap() {
        let dir = entry.unwrap().path();
        let manifest = std::fs::read(dir.join("manifest.json")).unwrap();
        cases.push((dir, serde_json::from_slice(&manifest).unwrap()));
    }
    assert!(cases.len() >= 16, "only {} cases found", cases.len());
    cases
}

fn hex(v: &Value) -> u64 {
    u64::from_str_radix(v.as_str().unwrap(), 16).unwrap()
}

fn sha256(data: &[u8]) -> String {
    Sha256::digest(data)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

struct File {
    header: Header,
    pages: Vec<(u32, Vec<u8>)>,
    trailer: Trailer,
}

fn decode(bytes: &[u8]) -> File {
    let mut decoder = Decoder::new(bytes).unwrap();
    let header = *decoder.header();
    let mut data = vec![0; header.page_size as usize];
    let mut pages = Vec::new();
    while let Some(pgno) = decoder.page(&mut data).unwrap() {
        pages.push((pgno, data.clone()));
    }
    assert_eq!(decoder.page(&mut data).unwrap(), None);
    let (rest, trailer) = decoder.finish().unwrap();
    assert!(rest.is_empty());
    File {
        header,
        pages,
        trailer,
    }
}

fn encode(file: &File, compressed: bool) -> Vec<u8> {
    let mut encoder = Encoder::new(
        Vec::new(),
        Header {
            compressed,
            ..file.header
        },
    )
    .unwrap();
    for (pgno, data) in &file.pages {
        encoder.page(*pgno, data).unwrap();
    }
    encoder.finish(file.trailer.post_apply_checksum).unwrap().0
}

fn assert_described(bytes: &[u8], file: &File, want: &Value) {
    assert_eq!(bytes.len() as u64, want["size"]);
    assert_eq!(sha256(bytes), want["sha256"]);
    let h = &file.header;
    assert_eq!(u32::from(h.compressed), want["flags"]);
    assert_eq!(h.page_size, want["page_size"]);
    assert_eq!(h.commit, want["commit"]);
    assert_eq!(h.min_txid, hex(&want["min_txid"]));
    assert_eq!(h.max_txid, hex(&want["max_txid"]));
    assert_eq!(h.timestamp, want["timestamp_ms"]);
    assert_eq!(h.pre_apply_checksum, hex(&want["pre_apply_checksum"]));
    assert_eq!(h.wal_offset, want["wal_offset"]);
    assert_eq!(h.wal_size, want["wal_size"]);
    assert_eq!(u64::from(h.wal_salt1), hex(&want["wal_salt1"]));
    assert_eq!(u64::from(h.wal_salt2), hex(&want["wal_salt2"]));
    assert_eq!(h.node_id, hex(&want["node_id"]));
    assert_eq!(
        file.trailer.post_apply_checksum,
        hex(&want["post_apply_checksum"])
    );
    assert_eq!(file.trailer.file_checksum, hex(&want["file_checksum"]));
    if let Some(pgnos) = want["pgnos"].as_array() {
        let found: Vec<_> = file
            .pages
            .iter()
            .map(|(pgno, _)| Value::from(*pgno))
            .collect();
        assert_eq!(&found, pgnos);
    }
}

/// Writing what was read gives the same bytes where nothing is compressed, and otherwise a file
/// that says the same.
fn assert_reencodes(bytes: &[u8], file: &File) {
    let again = encode(file, file.header.compressed);
    if !file.header.compressed {
        assert!(again == bytes, "not the same bytes");
    }
    for compressed in [false, true] {
        let other = decode(&encode(file, compressed));
        assert_eq!(
            other.header,
            Header {
                compressed,
                ..file.header
            }
        );
        assert_eq!(
            other.trailer.post_apply_checksum,
            file.trailer.post_apply_checksum
        );
        assert!(other.pages == file.pages);
    }
}

fn apply(db: &mut Vec<u8>, file: &File) {
    let page_size = file.header.page_size as usize;
    db.resize(file.header.commit as usize * page_size, 0);
    for (pgno, data) in &file.pages {
        db[(*pgno as usize - 1) * page_size..][..page_size].copy_from_slice(data);
    }
}

fn database_checksum(db: &[u8], page_size: u32) -> u64 {
    let pages = (1..).zip(db.chunks(page_size as usize));
    CHECKSUM_FLAG | pages.fold(0, |sum, (pgno, data)| sum ^ page_checksum(pgno, data))
}

#[test]
fn every_file_is_as_described_and_rebuilds_the_database() {
    let (mut files, mut missing) = (0, Vec::new());
    for (dir, manifest) in cases() {
        let (mut db, mut pos) = (Vec::new(), Pos::default());
        for want in manifest["ltx"].as_array().unwrap() {
            let path = dir.join(want["file"].as_str().unwrap());
            eprintln!("{}", path.display());
            let Ok(bytes) = std::fs::read(&path) else {
                missing.push(path.strip_prefix(fixtures()).unwrap().to_path_buf());
                continue;
            };
            files += 1;
            let file = decode(&bytes);
            assert_described(&bytes, &file, want);
            assert_reencodes(&bytes, &file);
            let (h, t) = (&file.header, &file.trailer);
            let name = path.file_name().unwrap().to_str().unwrap();
            assert_eq!(parse_file_name(name), Some((h.min_txid, h.max_txid)));
            assert_eq!(file_name(h.min_txid, h.max_txid), name);
            let pages = file.pages.len() as u32;
            assert_eq!(
                verify(&bytes[..]).unwrap(),
                Summary {
                    header: *h,
                    trailer: *t,
                    pages
                }
            );
            assert_eq!(h.is_snapshot(), h.min_txid == 1);

            let Some(after) = want["db_after"].as_object() else {
                continue;
            };
            assert!(h.is_snapshot() || h.pre_apply_pos() == pos);
            pos = Pos {
                txid: h.max_txid,
                checksum: t.post_apply_checksum,
            };
            apply(&mut db, &file);
            assert_eq!(db.len() as u64, after["size"]);
            if db.is_empty() {
                assert_eq!(t.post_apply_checksum, CHECKSUM_FLAG);
                check_transition(h, t, pages).unwrap();
                continue;
            }
            assert_eq!(sha256(&db), after["sha256"]);
            let checksum = database_checksum(&db, h.page_size);
            assert_eq!(checksum, hex(&after["ltx_checksum"]));
            let fits = after["equals_post_apply"].as_bool().unwrap();
            assert_eq!(checksum == t.post_apply_checksum, fits);
            assert_eq!(check_transition(h, t, pages).is_ok(), fits);
        }
        if let Ok(last) = std::fs::read(dir.join("final.db")) {
            assert!(db == last, "{}: final.db differs", dir.display());
            assert_eq!(pos.to_string(), manifest["pos"].as_str().unwrap());
        }
    }
    assert!(files >= 80, "only {files} files were found");
    let import = PathBuf::from("ltx/lockpage-65536/0000000000000001-0000000000000001.ltx");
    assert_eq!(missing, [import]);
}

#[test]
fn the_transaction_that_changes_nothing_but_the_checksum_is_refused() {
    let path = fixtures()
        .join("ltx/switch-delete-wal-delete")
        .join(file_name(6, 6));
    let summary = verify(&std::fs::read(path).unwrap()[..]).unwrap();
    assert_eq!(summary.pages, 0);
    let error = check_transition(&summary.header, &summary.trailer, summary.pages).unwrap_err();
    let LtxError::PostApplyChecksum { expected, found } = error else {
        panic!("{error}")
    };
    assert_eq!(
        (expected, found),
        (0xd835_d5fd_c538_9f38, 0x9447_80ac_3ba1_47ef)
    );
}

#[test]
fn the_lock_page_is_left_out() {
    assert_eq!(lock_pgno(65536), 16385);
    let read = |txid| {
        decode(
            &std::fs::read(
                fixtures()
                    .join("ltx/lockpage-65536")
                    .join(file_name(txid, txid)),
            )
            .unwrap(),
        )
    };
    let (before, after) = (read(3), read(4));
    assert_eq!((before.header.commit, after.header.commit), (16384, 16386));
    let pgnos: Vec<_> = after.pages.iter().map(|p| p.0).collect();
    assert!(
        pgnos.contains(&16386) && !pgnos.contains(&16385),
        "{pgnos:?}"
    );
}

#[test]
fn snapshots_of_the_stream() {
    let frames: Value =
        serde_json::from_slice(&std::fs::read(fixtures().join("stream/frames.json")).unwrap())
            .unwrap();
    let mut seen = 0;
    for frame in frames
        .as_array()
        .unwrap()
        .iter()
        .filter(|f| f["ltx"].is_object())
    {
        let name = frame["name"].as_str().unwrap();
        let bytes = std::fs::read(fixtures().join(format!("stream/{name}.snapshot.ltx"))).unwrap();
        let file = decode(&bytes);
        assert!(file.header.is_snapshot());
        assert_described(&bytes, &file, &frame["ltx"]);
        assert_reencodes(&bytes, &file);
        seen += 1;
    }
    assert_eq!(seen, 3);
}

/// The descriptor of our LZ4 frame (its options and block size) is LiteFS's.
#[test]
fn the_lz4_frame_is_as_litefs_makes_it() {
    let bytes =
        std::fs::read(fixtures().join("ltx/delete-4096-lz4").join(file_name(1, 1))).unwrap();
    let again = encode(&decode(&bytes), true);
    assert_eq!(again[..HEADER_SIZE + 7], bytes[..HEADER_SIZE + 7]);
}

/// On a stream the next frame follows: the decoder takes exactly one file from it.
#[test]
fn files_one_after_the_other() {
    let dirs = ["ltx/wal-4096-lz4", "ltx/delete-4096-raw"];
    let (mut stream, mut expected) = (Vec::new(), Vec::new());
    for dir in dirs {
        for txid in 1..=6 {
            let bytes = std::fs::read(fixtures().join(dir).join(file_name(txid, txid))).unwrap();
            expected.push(verify(&bytes[..]).unwrap().trailer);
            stream.extend_from_slice(&bytes);
        }
    }
    let mut rest = &stream[..];
    for (n, want) in expected.iter().enumerate() {
        let mut decoder = Decoder::new(rest).unwrap();
        if n % 2 == 0 {
            let mut data = vec![0; decoder.header().page_size as usize];
            while decoder.page(&mut data).unwrap().is_some() {}
        }
        let (r, trailer) = decoder.finish().unwrap();
        assert_eq!(trailer, *want);
        rest = r;
    }
    assert!(rest.is_empty());
}
