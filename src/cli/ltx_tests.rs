//! The commands on LiteFS's files, on log segments, and on damaged ones.

use super::*;
use crate::ltx::{CHECKSUM_FLAG, Encoder};
use crate::store::disk::Real;
use crate::store::segment::RecordHeader;

const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/fixtures/ltx");

struct Outcome {
    good: bool,
    out: String,
    err: String,
}

fn execute(cmd: LtxCommand) -> Outcome {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut report = Report {
        out: &mut out,
        err: &mut err,
        good: true,
    };
    report.execute(&cmd).unwrap();
    let good = report.good;
    Outcome {
        good,
        out: String::from_utf8(out).unwrap(),
        err: String::from_utf8(err).unwrap(),
    }
}

fn verify(files: &[PathBuf]) -> Outcome {
    execute(LtxCommand::Verify {
        files: files.to_vec(),
    })
}

fn golden(case: &str, txid: u64) -> PathBuf {
    Path::new(CASES).join(case).join(ltx::file_name(txid, txid))
}

/// A segment with the first transactions of a golden case, each changed by `change`.
fn segment(
    dir: &Path,
    txids: std::ops::RangeInclusive<u64>,
    change: impl Fn(u64, &mut Vec<u8>),
) -> Segment {
    let first = *txids.start();
    let mut segment =
        Segment::create(&Real, dir.join(segment::file_name(first)), 7, first, first).unwrap();
    for txid in txids {
        let mut body = std::fs::read(golden("wal-4096-raw", txid)).unwrap();
        change(txid, &mut body);
        append(&mut segment, txid, &body);
    }
    segment
}

fn append(segment: &mut Segment, txid: u64, body: &[u8]) {
    let header = RecordHeader {
        length: body.len() as u64,
        min_txid: txid,
        max_txid: txid,
        flushed_txid: txid - 1,
        body_crc: crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64GoIso, body),
    };
    let record = [&header.encode(segment.salt)[..], body].concat();
    segment.file.write_all_at(&record, segment.tail).unwrap();
    segment.push(&header);
}

#[test]
fn the_list_is_the_one_that_litefs_prints() {
    let mut seen = 0;
    for entry in std::fs::read_dir(CASES).unwrap() {
        let dir = entry.unwrap().path();
        let Ok(expected) = std::fs::read_to_string(dir.join("list.tsv")) else {
            continue;
        };
        let got = execute(LtxCommand::List {
            dir: dir.clone(),
            tsv: true,
        });
        assert_eq!(got.out, expected, "{}", dir.display());
        assert_eq!(
            got.good,
            !dir.ends_with("switch-delete-wal-delete"),
            "{}",
            got.err
        );
        seen += 1;
    }
    assert!(seen >= 15, "only {seen} lists found");
}

#[test]
fn the_table_is_aligned() {
    let got = execute(LtxCommand::List {
        dir: Path::new(CASES).join("drop"),
        tsv: false,
    });
    assert!(got.good, "{}", got.err);
    let lines: Vec<_> = got.out.lines().collect();
    assert_eq!(lines.len(), 4);
    assert_eq!(
        lines[3],
        "0000000000000003-0000000000000003.ltx  0000000000000003  0000000000000003           0           0  \
         e04fc44716e5272f  8000000000000000  2026-11-22T20:44:43Z"
    );
    assert_eq!(lines[0].find("timestamp"), lines[3].find("2026"));
    assert_eq!(lines[0].find("pre "), lines[3].find("e04f"));
}

#[test]
fn verify_reports_each_file_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let cut = dir.path().join("cut.ltx");
    let whole = std::fs::read(golden("drop", 1)).unwrap();
    std::fs::write(&cut, &whole[..whole.len() - 1]).unwrap();
    let longer = dir.path().join("longer.ltx");
    std::fs::write(&longer, [&whole[..], b"x"].concat()).unwrap();
    let misnamed = dir.path().join(ltx::file_name(2, 2));
    std::fs::write(&misnamed, &whole).unwrap();
    let missing = dir.path().join("missing.ltx");
    let defect = golden("switch-delete-wal-delete", 6);
    let good = golden("drop", 2);

    let files = [cut, longer, misnamed, missing, defect, good.clone()];
    let got = verify(&files);
    assert!(!got.good);
    assert_eq!(
        got.out,
        format!(
            "{}: OK, TXIDs 0000000000000002-0000000000000002 in 1 record(s), 2 page(s), commit 2, \
             checksum f6e9e3d7c3dbb858 to e04fc44716e5272f\n",
            good.display()
        )
    );
    let reasons = [
        "too early",
        "data follows",
        "holds TXIDs",
        "No such file",
        "post-apply checksum mismatch",
    ];
    let lines: Vec<_> = got.err.lines().collect();
    assert_eq!(lines.len(), reasons.len(), "{}", got.err);
    for ((line, file), reason) in lines.iter().zip(&files).zip(reasons) {
        assert!(
            line.starts_with(&format!("{}: ", file.display())) && line.contains(reason),
            "{line}"
        );
    }
    assert!(verify(&[good]).good);
}

#[test]
fn dump_shows_header_pages_and_trailer() {
    let got = execute(LtxCommand::Dump {
        file: golden("switch-delete-wal-delete", 4),
    });
    assert!(got.good, "{}", got.err);
    for line in [
        "compressed:          LZ4",
        "page size:           4096",
        "commit:              2",
        "min TXID:            0000000000000004",
        "pre-apply checksum:  d426e64c31ba84c7",
        "post-apply checksum: d1075c6e1c9739b9",
        "WAL offset:          32",
        "WAL salt:            33854f9f f4b072fe",
        "pages:               1",
    ] {
        assert!(
            got.out.lines().any(|l| l == line),
            "{line:?} is not in\n{}",
            got.out
        );
    }
    // The one page of the next transaction turns the checksum of the last into its own.
    let page = |txid| {
        let got = execute(LtxCommand::Dump {
            file: golden("switch-delete-wal-delete", txid),
        });
        let line = got
            .out
            .lines()
            .find(|l| l.starts_with("page ") && !l.contains(':'))
            .unwrap()
            .to_owned();
        let mut words = line.split_whitespace().skip(1);
        let pgno: u32 = words.next().unwrap().parse().unwrap();
        (
            pgno,
            u64::from_str_radix(words.next().unwrap(), 16).unwrap(),
        )
    };
    let ((pgno4, sum4), (pgno5, sum5)) = (page(4), page(5));
    assert_eq!(pgno4, pgno5);
    assert_eq!(
        (sum4 ^ sum5) | CHECKSUM_FLAG,
        (0xd107_5c6e_1c97_39b9 ^ 0xd835_d5fd_c538_9f38) | CHECKSUM_FLAG
    );
}

#[test]
fn a_segment_is_verified_as_a_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = segment(dir.path(), 1..=8, |_, _| {}).path;
    let got = verify(std::slice::from_ref(&path));
    assert!(got.good, "{}", got.err);
    let last = "checksum 0000000000000000 to edd773320bdf5756\n";
    assert!(
        got.out
            .contains("TXIDs 0000000000000001-0000000000000008 in 8 record(s)"),
        "{}",
        got.out
    );
    assert!(got.out.ends_with(last), "{}", got.out);

    // Its list is that of the files that it holds.
    let listed = execute(LtxCommand::List {
        dir: dir.path().into(),
        tsv: true,
    });
    let expected = std::fs::read_to_string(Path::new(CASES).join("wal-4096-raw/list.tsv")).unwrap();
    assert_eq!(listed.out, expected);
    let dumped = execute(LtxCommand::Dump { file: path });
    assert_eq!(dumped.out.matches("file checksum:").count(), 8);
}

#[test]
fn segments_with_bad_records() {
    // A record that is whole but holds a bad LTX file.
    let dir = tempfile::tempdir().unwrap();
    let path = segment(dir.path(), 1..=3, |txid, body| {
        body[2000] ^= u8::from(txid == 2)
    })
    .path;
    let got = verify(&[path]);
    assert!(!got.good && got.out.is_empty());
    assert!(
        got.err
            .contains("TXID 0000000000000002: LTX: file checksum mismatch"),
        "{}",
        got.err
    );

    // A torn last record is what a crash leaves; a damaged one before that is not.
    for (damaged, good, what) in [
        (3, true, "note: the record of TXID 0000000000000003"),
        (2, false, "0000000000000002 is damaged"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let segment = segment(dir.path(), 1..=3, |_, _| {});
        let offset = segment.offset_of(damaged).unwrap();
        segment.file.write_all_at(b"????", offset + 1000).unwrap();
        let got = verify(&[segment.path]);
        assert_eq!(got.good, good, "{}", got.err);
        assert!(got.err.contains(what), "{}", got.err);
    }

    // A record that does not follow the one before it.
    let dir = tempfile::tempdir().unwrap();
    let path = segment(dir.path(), 1..=2, |txid, body| {
        if txid == 2 {
            let header = *Decoder::new(&body[..]).unwrap().header();
            let header = Header {
                pre_apply_checksum: CHECKSUM_FLAG | 1,
                ..header
            };
            let mut encoder = Encoder::new(Vec::new(), header).unwrap();
            encoder.page(1, &[0; 4096]).unwrap();
            *body = encoder.finish(CHECKSUM_FLAG | 2).unwrap().0;
        }
    })
    .path;
    let got = verify(&[path]);
    assert!(
        !got.good
            && got
                .err
                .contains("needs position 0000000000000001/8000000000000001"),
        "{}",
        got.err
    );

    let file = dir.path().join("0000000000000009.log");
    std::fs::write(&file, b"nothing").unwrap();
    assert!(verify(&[file]).err.contains("not a log segment"));
}

#[test]
fn unknown_files_are_passed_over_and_a_missing_directory_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "notes.txt",
        "1-2.ltx",
        "0000000000000001-0000000000000001.ltx.tmp",
    ] {
        std::fs::write(dir.path().join(name), b"?").unwrap();
    }
    let got = execute(LtxCommand::List {
        dir: dir.path().into(),
        tsv: true,
    });
    assert!(got.good && got.out.lines().count() == 1, "{}", got.out);
    let got = execute(LtxCommand::List {
        dir: dir.path().join("missing"),
        tsv: true,
    });
    assert!(!got.good && got.err.contains("No such file"), "{}", got.err);
}

#[test]
fn a_closed_output_ends_the_command_without_a_panic() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let case = Path::new(CASES).join("drop");
    let cmds = [
        LtxCommand::Dump {
            file: golden("drop", 1),
        },
        LtxCommand::Verify {
            files: vec![golden("drop", 1)],
        },
        LtxCommand::List {
            dir: case,
            tsv: false,
        },
    ];
    for cmd in cmds {
        let mut err = Vec::new();
        let mut report = Report {
            out: &mut Closed,
            err: &mut err,
            good: true,
        };
        assert_eq!(
            report.execute(&cmd).unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
        assert!(report.good && err.is_empty());
    }
}

#[test]
fn dates() {
    for (ms, text) in [
        (0, "1970-01-01T00:00:00Z"),
        (-1, "1969-12-31T23:59:59Z"),
        (951_782_399_999, "2000-02-28T23:59:59Z"),
        (951_782_400_000, "2000-02-29T00:00:00Z"),
        (951_868_800_000, "2000-03-01T00:00:00Z"),
        (1_709_164_800_000, "2024-02-29T00:00:00Z"),
        (4_107_542_400_000, "2100-03-01T00:00:00Z"),
        (1_795_380_281_767, "2026-11-22T20:44:41Z"),
        (253_402_300_799_000, "9999-12-31T23:59:59Z"),
        (-62_135_596_800_000, "0001-01-01T00:00:00Z"),
    ] {
        assert_eq!(rfc3339(ms), text);
    }
    // Whatever a file says, it can be shown.
    assert!(rfc3339(i64::MAX).ends_with('Z') && rfc3339(i64::MIN).ends_with('Z'));
}
