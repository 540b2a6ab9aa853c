//! Tests of this module against SQLite itself: what it writes, we must read as it means it; what we
//! write, it must read.

mod header;
mod journal;
mod locks;
mod super_journal;
mod wal;
mod wal_index;

use crate::sqlite::wal::{FRAME_HEADER_SIZE, FrameHeader, WAL_HEADER_SIZE, WalHeader};
use rusqlite::{Connection, types::FromSql};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Every page size that SQLite knows.
const PAGE_SIZES: [u32; 8] = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536];

/// A database of real SQLite in a directory of its own.
///
/// SQLite's locks are POSIX ones, which a process loses when it closes any descriptor of the file;
/// a test that depends on them keeps its own files open.
struct Db {
    dir: TempDir,
    path: PathBuf,
    conn: Connection,
}

impl Db {
    /// A database with a table `t` of `rows` rows of about 200 bytes.
    fn new(page_size: u32, journal_mode: &str, rows: u32) -> Db {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let conn = Connection::open(&path).unwrap();
        conn.execute_batch(&format!("PRAGMA page_size={page_size}"))
            .unwrap();
        let mode: String = get(&conn, &format!("PRAGMA journal_mode={journal_mode}"));
        assert_eq!(mode, journal_mode.to_lowercase());
        let db = Db { dir, path, conn };
        db.run("PRAGMA wal_autocheckpoint=0; CREATE TABLE t(id INTEGER PRIMARY KEY, v, x BLOB)");
        db.insert(rows);
        db
    }

    fn run(&self, sql: &str) {
        self.conn
            .execute_batch(sql)
            .unwrap_or_else(|e| panic!("{sql}: {e}"));
    }

    fn insert(&self, rows: u32) {
        self.run(&format!(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<{rows}) \
             INSERT INTO t(v, x) SELECT i, randomblob(200) FROM n WHERE {rows}>0"
        ));
    }

    /// The file beside the database with this suffix.
    fn file(&self, suffix: &str) -> PathBuf {
        suffixed(&self.path, suffix)
    }

    fn bytes(&self, suffix: &str) -> Vec<u8> {
        fs::read(self.file(suffix)).unwrap()
    }

    /// A read-write descriptor of its own of a file of the database.
    fn open(&self, suffix: &str) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(self.file(suffix))
            .unwrap()
    }

    /// A second connection, which fails at once where it meets a lock.
    fn connect(&self) -> Connection {
        let conn = Connection::open(&self.path).unwrap();
        conn.busy_timeout(std::time::Duration::ZERO).unwrap();
        conn
    }
}

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The one value that a query gives.
fn get<T: FromSql>(conn: &Connection, sql: &str) -> T {
    conn.query_row(sql, [], |row| row.get(0))
        .unwrap_or_else(|e| panic!("{sql}: {e}"))
}

/// Writes a database and files beside it into a directory of their own.
fn copy_of(files: &[(&str, &[u8])]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    for (suffix, bytes) in files {
        fs::write(suffixed(&path, suffix), bytes).unwrap();
    }
    (dir, path)
}

/// A WAL as a scan finds it.
struct Scan {
    header: WalHeader,
    /// The frames of committed transactions: header and page.
    frames: Vec<(FrameHeader, Vec<u8>)>,
}

impl Scan {
    /// Reads the frames of `wal` up to the last commit frame of the valid chain.
    fn of(wal: &[u8]) -> Scan {
        let header = WalHeader::decode(wal[..WAL_HEADER_SIZE].try_into().unwrap()).unwrap();
        let (mut frames, mut committed) = (Vec::new(), 0);
        let mut prev = header.checksum;
        let size = FRAME_HEADER_SIZE + header.page_size as usize;
        for bytes in wal[WAL_HEADER_SIZE..].chunks_exact(size) {
            let (frame, page) = bytes.split_at(FRAME_HEADER_SIZE);
            let frame = FrameHeader::decode(frame.try_into().unwrap());
            prev = frame.expected_checksum(header.big_endian, prev, page);
            let salts_right = (frame.salt1, frame.salt2) == (header.salt1, header.salt2);
            if frame.pgno == 0 || !salts_right || frame.checksum != prev {
                break;
            }
            frames.push((frame, page.to_vec()));
            if frame.commit != 0 {
                committed = frames.len();
            }
        }
        frames.truncate(committed);
        Scan { header, frames }
    }

    fn pgnos(&self) -> Vec<u32> {
        self.frames.iter().map(|(frame, _)| frame.pgno).collect()
    }
}
