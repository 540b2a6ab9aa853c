use std::os::unix::fs::symlink;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use super::*;
use crate::ltx::{CHECKSUM_FLAG, Decoder, Encoder, page_checksum};

const SIZE: usize = 512;

/// A database of a few pages, and the files that its transactions make.
struct Past {
    pages: Vec<u8>,
    pos: Pos,
    files: Vec<(Pos, Pos, Vec<u8>)>,
}

impl Past {
    fn new() -> Past {
        Past {
            pages: Vec::new(),
            pos: Pos::default(),
            files: Vec::new(),
        }
    }

    fn checksum(&self) -> u64 {
        let pages = self.pages.chunks(SIZE).enumerate();
        pages.fold(0, |t, (i, p)| t ^ page_checksum(i as u32 + 1, p)) | CHECKSUM_FLAG
    }

    fn commit(&mut self, pages: usize, changed: &[u32], fill: u8) {
        self.pages.resize(pages * SIZE, fill);
        for pgno in changed {
            let at = (*pgno as usize - 1) * SIZE;
            self.pages[at..at + SIZE].fill(fill);
        }
        let txid = self.pos.txid + 1;
        let header = Header {
            compressed: true,
            page_size: SIZE as u32,
            commit: pages as u32,
            min_txid: txid,
            max_txid: txid,
            timestamp: 1,
            pre_apply_checksum: self.pos.checksum,
            wal_offset: 0,
            wal_size: 0,
            wal_salt1: 0,
            wal_salt2: 0,
            node_id: 1,
        };
        let mut out = Vec::new();
        let mut encoder = Encoder::new(&mut out, header).unwrap();
        for pgno in changed {
            let at = (*pgno as usize - 1) * SIZE;
            encoder.page(*pgno, &self.pages[at..at + SIZE]).unwrap();
        }
        let before = self.pos;
        self.pos = Pos {
            txid,
            checksum: self.checksum(),
        };
        encoder.finish(self.pos.checksum).unwrap();
        self.files.push((before, self.pos, out));
    }

    fn grow(transactions: u8) -> Past {
        let mut past = Past::new();
        past.commit(4, &[1, 2, 3, 4], 1);
        for i in 0..transactions {
            past.commit(4, &[u32::from(i % 4) + 1], i);
        }
        past
    }

    fn batch(&self, i: usize) -> Batch {
        let (from, end, bytes) = &self.files[i];
        batch(*from, *end, bytes)
    }
}

fn batch(from: Pos, end: Pos, bytes: &[u8]) -> Batch {
    let mut ltx = tempfile::tempfile().unwrap();
    ltx.write_all(bytes).unwrap();
    Batch {
        from,
        continues: false,
        positions: vec![end],
        ltx,
    }
}

fn restored(backup: &FileBackup) -> (Pos, Vec<u8>) {
    let mut bytes = Vec::new();
    let pos = backup.fetch_snapshot("x.db", &mut bytes).unwrap();
    let mut decoder = Decoder::new(&bytes[..]).unwrap();
    let (mut page, mut pages) = (vec![0; SIZE], Vec::new());
    while decoder.page(&mut page).unwrap().is_some() {
        pages.extend_from_slice(&page);
    }
    decoder.finish().unwrap();
    (pos, pages)
}

#[test]
fn a_chain_grows_is_merged_and_remembers_its_positions() {
    let dir = tempfile::tempdir().unwrap();
    let backup = FileBackup::new(&dir.path().join("deep/backup"));
    assert!(backup.positions().unwrap().is_empty());
    assert_eq!(backup.cluster_id().unwrap(), None);
    backup.set_cluster_id("LFSC0123456789ABCDEF").unwrap();
    assert_eq!(
        backup.cluster_id().unwrap().as_deref(),
        Some("LFSC0123456789ABCDEF")
    );
    let past = Past::grow(200);
    for i in 0..past.files.len() {
        backup.write("x.db", &mut past.batch(i)).unwrap();
        let files = backup.chain("x.db").unwrap().len();
        assert!(files <= 2 * MERGE_AT, "{files} files");
    }
    assert_eq!(backup.positions().unwrap()["x.db"], past.pos);
    assert_eq!(restored(&backup), (past.pos, past.pages.clone()));
    for (_, end, _) in &past.files {
        assert!(backup.contains("x.db", *end).unwrap(), "{end}");
    }
    let other = Pos {
        checksum: past.pos.checksum ^ 1,
        ..past.pos
    };
    assert!(!backup.contains("x.db", other).unwrap());
    // Each LTX file with its positions, and nothing else.
    let left = fs::read_dir(backup.dir("x.db")).unwrap().count();
    assert_eq!(left, 2 * backup.chain("x.db").unwrap().len());
}

#[test]
fn what_does_not_follow_is_refused_and_a_snapshot_sets_the_rest_aside() {
    let dir = tempfile::tempdir().unwrap();
    let backup = FileBackup::new(dir.path());
    let (past, other) = (Past::grow(5), Past::grow(9));
    for i in 0..3 {
        backup.write("x.db", &mut past.batch(i)).unwrap();
    }
    let gap = backup.write("x.db", &mut past.batch(4));
    assert!(matches!(gap, Err(BackupError::Gap { .. })), "{gap:?}");
    assert_eq!(backup.positions().unwrap()["x.db"], past.files[2].1);
    let files: Vec<&[u8]> = other.files.iter().map(|f| &f.2[..]).collect();
    let mut snapshot = Vec::new();
    ltx::merge(files, &mut snapshot).unwrap();
    let mut whole = batch(Pos::default(), other.pos, &snapshot);
    backup.write("x.db", &mut whole).unwrap();
    assert_eq!(restored(&backup), (other.pos, other.pages.clone()));
    let aside = fs::read_dir(backup.dir("x.db"))
        .unwrap()
        .filter_map(|e| Some(e.ok()?.path()))
        .find(|p| p.is_dir())
        .unwrap();
    assert_eq!(fs::read_dir(aside).unwrap().count(), 6);
}

#[test]
fn damage_is_an_error_and_a_cut_off_write_is_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let backup = FileBackup::new(dir.path());
    let past = Past::grow(3);
    for i in 0..3 {
        backup.write("x.db", &mut past.batch(i)).unwrap();
    }
    // A batch that was damaged on the way never becomes part of it.
    let (from, end, mut bytes) = past.files[3].clone();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    assert!(backup.write("x.db", &mut batch(from, end, &bytes)).is_err());
    fs::write(backup.dir("x.db").join(".tmp-left"), "rest").unwrap();
    assert_eq!(restored(&backup).0, past.files[2].1);
    backup.write("x.db", &mut past.batch(3)).unwrap();
    assert!(!backup.dir("x.db").join(".tmp-left").exists());
    let path = backup.chain("x.db").unwrap()[1].path.clone();
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = backup
        .fetch_snapshot("x.db", &mut io::sink())
        .unwrap_err()
        .to_string();
    assert!(error.contains(&*path.to_string_lossy()), "{error}");
    let client: Arc<dyn BackupClient> = Arc::new(FileBackup::new(dir.path()));
    assert!(client.fetch_snapshot("absent.db", &mut io::sink()).is_err());
}

/// A backup is where others may write too: nothing that is put there is waited for, or read without
/// end, or believed.
#[test]
fn what_others_put_there_is_an_error() {
    type Put = fn(&Path);
    fn pipe(path: &Path) {
        let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: a string that outlives the call.
        assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
    }
    let puts: [(&str, Put); 5] = [
        ("a pipe", pipe),
        ("a directory", |path| fs::create_dir(path).unwrap()),
        ("a device", |path| symlink("/dev/zero", path).unwrap()),
        ("a link to itself", |path| symlink(path, path).unwrap()),
        ("what is no LTX file", |path| {
            fs::write(path, "x".repeat(1000)).unwrap();
            // The chain ends there.
            let after = path.with_file_name(ltx::file_name(u64::MAX, u64::MAX));
            fs::write(after, "x").unwrap();
        }),
    ];
    for (what, put) in puts {
        let dir = tempfile::tempdir().unwrap();
        let backup = FileBackup::new(dir.path());
        let db = backup.dir("x.db");
        fs::create_dir_all(&db).unwrap();
        put(&db.join(ltx::file_name(1, u64::MAX)));
        for name in ["..", "x.db-wal", ".tmp-x", "new\nline"] {
            let _ = fs::create_dir(backup.root.join("dbs").join(name));
        }
        symlink("/dev/zero", dir.path().join("clusterid")).unwrap();
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            let pos = Pos {
                txid: 7,
                checksum: CHECKSUM_FLAG,
            };
            backup
                .cluster_id()
                .expect_err("a device as the cluster's ID");
            backup
                .fetch_snapshot("x.db", &mut io::sink())
                .expect_err("it is no snapshot");
            backup
                .verify("x.db", &mut |_| true)
                .expect_err("it is no LTX file");
            let names = backup.positions().map(|p| p.into_keys().collect());
            let found = backup.contains("x.db", pos);
            tell.send((names, found)).unwrap();
        });
        let limit = Duration::from_secs(20);
        let (names, found): (Result<Vec<_>, _>, _) = told
            .recv_timeout(limit)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(names.is_err() || names.unwrap() == ["x.db"], "{what}");
        assert!(!found.unwrap_or(false), "{what}");
    }
}
