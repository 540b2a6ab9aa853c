//! Inputs to begin from: what LiteFS and SQLite wrote (`tests/fuzz/seeds`), what this node writes, and
//! what ever broke a promise (`tests/fuzz/crashers`).

use std::fs;
use std::path::{Path, PathBuf};

use crate::ltx::Pos;
use crate::sqlite::journal::MAGIC;
use crate::store;
use crate::stream::frame::{Frame, encode_ltx};
use crate::stream::{common, posmap};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

/// The files in a directory, in the order of their names; none if there is no directory.
fn files(dir: &Path) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|p| p.is_file())
        .collect();
    paths.sort();
    paths
        .iter()
        .map(|path| fs::read(path).expect("it was listed"))
        .collect()
}

fn kept(kind: &str) -> Vec<Vec<u8>> {
    let seeds = files(&root().join("tests/fuzz/seeds").join(kind));
    assert!(!seeds.is_empty(), "no seeds in tests/fuzz/seeds/{kind}");
    seeds
}

/// Inputs that broke a promise once.
pub fn crashers(target: &str) -> Vec<Vec<u8>> {
    files(&root().join("tests/fuzz/crashers").join(target))
}

/// Inputs for a target that lead somewhere.
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    match target {
        "ltx" => kept("ltx"),
        "merge" => {
            let all = kept("ltx");
            // The six of one database come first.
            let chain: Vec<&[u8]> = all.iter().map(Vec::as_slice).take(6).collect();
            vec![lengths(&chain), lengths(&chain[..2]), lengths(&chain[1..5])]
        }
        "frames" => stream(),
        "posmap" => position_maps(),
        "journal" => journals(),
        "wal" => kept("wal"),
        "wal_index" => operations(&[
            &[
                0, 4, 1, 2, 3, 4, 0, 20, 1, 3, 5, 0, 0, 0, 7, 0, 5, 1, 0, 3, 2, 1, 2, 3,
            ],
            &[
                0, 0, 0, 255, 0, 1, 0, 255, 9, 7, 5, 0, 0, 0, 9, 1, 0, 3, 4, 2, 0, 0, 1,
            ],
        ]),
        "wal_capture" => operations(&[
            &[
                0, 1, 130, 9, 0, 0, 0, 1, 4, 140, 3, 0, 9, 1, 5, 1, 0, 140, 1,
            ],
            &[
                0, 5, 0, 1, 0, 0, 0, 0, 6, 0, 2, 0, 0, 0, 5, 1, 5, 200, 7, 7, 0, 0, 0, 9, 0, 1,
                150, 1, 0, 0,
            ],
            &[0, 1, 132, 9, 0, 0, 0, 6, 0, 40, 3, 1, 2, 3, 4],
        ]),
        "replica" => operations(&[
            &[
                0, 1, 0, 4, 9, 0, 0, 0, 5, 3, 0, 255, 0, 2, 0, 6, 3, 1, 1, 0, 0, 3, 1,
            ],
            &[
                0, 1, 0, 4, 9, 0, 0, 215, 5, 3, 0, 255, 0, 0, 205, 3, 1, 0, 255, 0, 0, 0, 0, 9,
            ],
            &[0, 1, 0, 3, 9, 0, 0, 0, 11, 255, 255, 255, 255, 1, 0, 255],
        ]),
        "log_segment" | "sums" | "intent" => store::fuzz::seeds(target),
        "config" => configurations(),
        "values" => texts(),
        other => panic!("no target {other}"),
    }
}

/// Files with their lengths before them.
fn lengths(files: &[&[u8]]) -> Vec<u8> {
    let with_length = |file: &&[u8]| [&(file.len() as u16).to_be_bytes()[..], file].concat();
    files.iter().flat_map(with_length).collect()
}

fn operations(seeds: &[&[u8]]) -> Vec<Vec<u8>> {
    seeds.iter().map(|seed| seed.to_vec()).collect()
}

fn stream() -> Vec<Vec<u8>> {
    let mut ours = Vec::new();
    for frame in [
        Frame::Ready,
        Frame::DropDb {
            name: "gone.db".into(),
        },
        Frame::HighWaterMark {
            txid: 9,
            name: "a.db".into(),
        },
        Frame::Heartbeat {
            timestamp: 1_795_380_353_000,
        },
        Frame::Handoff {
            lease_id: "56c5d282-ffdb-3ab2-04ba-b0c941aa2134".into(),
        },
    ] {
        frame.encode(&mut ours);
    }
    encode_ltx("a.db", &kept("ltx")[0], &mut ours);
    Frame::End.encode(&mut ours);
    let mut seeds = kept("stream");
    seeds.push(ours);
    seeds
}

fn position_maps() -> Vec<Vec<u8>> {
    let pos = |txid| Pos {
        txid,
        checksum: u64::MAX - txid,
    };
    let map = ["a.db", "b.db", "ünï"].map(|name| (name.to_owned(), pos(name.len() as u64)));
    vec![
        posmap::encode(&posmap::PosMap::new()),
        posmap::encode(&map.into()),
        common::encode(&[pos(9), pos(8), pos(7)]),
    ]
}

/// SQLite's, and one that names a super-journal.
fn journals() -> Vec<Vec<u8>> {
    let mut seeds = kept("journal");
    let name = b"/mnt/a.db-mj0A1B2C9D0";
    let mut named = seeds[0][..1024].to_vec();
    named.extend_from_slice(name);
    named.extend((name.len() as u32).to_be_bytes());
    named.extend(
        name.iter()
            .map(|b| u32::from(*b))
            .sum::<u32>()
            .to_be_bytes(),
    );
    named.extend(MAGIC);
    seeds.push(named);
    seeds
}

fn configurations() -> Vec<Vec<u8>> {
    let mut seeds = files(&root().join("config-examples"));
    seeds.retain(|file| file.len() < 8192);
    assert!(!seeds.is_empty(), "no examples in config-examples");
    for text in [
        "exec: \"sh -c '$A'\"\nlease: {type: static, hostname: ${A}, candidate: ${A == 'a'}}\n",
        "a: &x [1, *y]\nb: *x\n",
        "lease:\n  databases: [a.db, '../b']\n  candidate: false\n  type: static\n  advertise-url: http://h:1\n",
        "data: {retention: 1h30m, dir: /d}\nhttp: {addr: '[::1]:20202', snapshot-timeout: 1.5s}\n",
        "proxy: {addr: ':1', target: 'localhost:2', db: a.db, passthrough: ['*.png', '/x*']}\nfuse: {dir: \"/m\"}\n",
        "tracing: {path: /t, max-size: 99999999999}\nlog: {format: json}\nbackup: {type: file, path: /b}\n",
    ] {
        seeds.push(text.into());
    }
    seeds
}

fn texts() -> Vec<Vec<u8>> {
    [
        "a.db",
        "../../etc/passwd",
        "%2e%2e%2fx",
        "x-wal",
        "a.db-mj0A1B2C9D0",
        "../a-mj0A1B2C9D0",
        ".primary",
        "0000000000000001-0000000000000002.ltx",
        "00000000000000ff.log",
        "000000000000002A/8000000000000001",
        "0000000000000ABC",
        "[::1]:20202",
        "/static/%77x\n/stat*x\ncookie: a=b; __txid=000000000000002a\nconnection: keep-alive, x-y\nx-y: 1",
        "/\n*\ntransfer-encoding: chunked\ncontent-length: 3\nconnection: content-length,host\nhost: h\nte: trailers",
        "http://u:p@h:1/a?b=c\n/a\nx-forwarded-for: 1.1.1.1\nx-forwarded-for: 2.2.2.2\ncookie: a\ncookie: b",
        "\u{1}\u{2}\u{3}\u{4}\u{5}\u{6}\u{7}\u{8}",
        "a\nb",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}
