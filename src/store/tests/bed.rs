//! A store in a directory of its own, driven by SQLite; and what every test asks of a database.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use super::vfs::Vfs;
use crate::ltx::{self, Decoder, Pos};
use crate::store::{Common, Database, FileKind, Next, Options, Received, Role, Store, StoreError};

/// Fields are dropped in order: the VFS goes before its store, the directory last.
pub(crate) struct Bed {
    pub vfs: Vfs,
    pub store: Arc<Store>,
    pub dir: tempfile::TempDir,
}

pub(super) fn options(dir: &Path) -> Options {
    Options {
        compress: false,
        retention: Duration::from_secs(3600),
        strict_verify: true,
        ..Options::new(dir)
    }
}

impl Bed {
    /// An empty primary.
    pub fn primary() -> Bed {
        let bed = Bed::replica();
        bed.store.set_role(Role::Primary);
        bed
    }

    /// An empty replica.
    pub fn replica() -> Bed {
        Bed::on(tempfile::tempdir().unwrap())
    }

    /// A replica on this data directory, opened.
    pub fn on(dir: tempfile::TempDir) -> Bed {
        Bed::with_retention(dir, options(Path::new("")).retention)
    }

    /// The same, with log records kept for another time.
    pub fn with_retention(dir: tempfile::TempDir, retention: Duration) -> Bed {
        let options = Options {
            retention,
            ..options(dir.path())
        };
        let store = Store::open(options).unwrap();
        Bed {
            vfs: Vfs::register(&store),
            store,
            dir,
        }
    }

    /// What another node would find if this one were killed now: a copy, not opened.
    pub fn remains(&self) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        copy(self.dir.path(), dir.path());
        dir
    }

    /// A node started on the remains of this one.
    pub fn killed(&self) -> Bed {
        Bed::on(self.remains())
    }

    /// Stops cleanly and starts again. No connection may be open.
    pub fn restarted(self) -> Bed {
        self.store.close();
        let Bed { vfs, store, dir } = self;
        drop(vfs);
        drop(store);
        // The store's threads may hold it for another moment.
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        loop {
            match Store::open(options(dir.path())) {
                Ok(store) => {
                    return Bed {
                        vfs: Vfs::register(&store),
                        store,
                        dir,
                    };
                }
                Err(e) if std::time::Instant::now() > deadline => panic!("{e}"),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    pub fn connect(&self, db: &str) -> Connection {
        let name = format!("/{db}");
        let c = Connection::open_with_flags_and_vfs(
            name,
            OpenFlags::default(),
            self.vfs.name.as_c_str(),
        )
        .unwrap();
        c.busy_timeout(Duration::from_secs(10)).unwrap();
        c
    }

    pub fn db(&self, name: &str) -> Arc<Database> {
        self.store.database(name).unwrap()
    }

    pub fn file(&self, db: &str, kind: FileKind) -> PathBuf {
        self.db(db).path(kind)
    }

    /// Checks all that holds at rest, and returns the position with the database's bytes.
    pub fn check(&self, name: &str) -> (Pos, Vec<u8>) {
        let db = self.db(name);
        assert_eq!(db.broken(), None);
        db.settle();
        let (pos, image) = image(&db);
        assert_eq!(db.pos(), pos, "the position is that of the newest commit");
        assert_eq!(
            checksum(&image, db.page_size()),
            pos.checksum,
            "the position's checksum is that of the bytes at {pos}"
        );
        assert_eq!(
            image.len() as u64 / 512,
            u64::from(db.page_count()) * u64::from(db.page_size()) / 512
        );
        (pos, image)
    }

    /// As [`Bed::check`], and a node that starts on the remains finds the same.
    pub fn check_killed(&self, name: &str) -> (Pos, Vec<u8>) {
        let found = self.check(name);
        let other = self.killed();
        assert_eq!(other.check(name), found, "after a kill");
        for kind in [FileKind::Journal, FileKind::Wal, FileKind::Shm] {
            assert!(!other.file(name, kind).exists(), "{kind:?} is left");
        }
        found
    }

    /// Receives a file from a primary that cannot tell what it shares.
    pub fn receive(&self, name: &str, bytes: &[u8]) -> Result<Received, StoreError> {
        self.store
            .receive(name, &mut &bytes[..], &mut |_, _| Common::Unknown)
    }

    /// Gives this replica everything that the primary has of a database, record by record.
    pub fn follow(&self, primary: &Bed, name: &str) {
        let from = primary.db(name);
        from.settle();
        loop {
            let pos = self.store.database(name).map_or(Pos::default(), |d| {
                d.settle();
                d.pos()
            });
            match from.record_after(pos).unwrap() {
                Next::UpToDate => return,
                Next::Record(r) => {
                    self.receive(name, &r.bytes).unwrap();
                }
                Next::Large(r) => {
                    self.receive(name, &r.load().unwrap().bytes).unwrap();
                }
                Next::Snapshot => {
                    let bytes = snapshot(&from).1;
                    self.receive(name, &bytes).unwrap();
                }
            }
        }
    }
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir(&target).unwrap();
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// A snapshot of now, as an LTX file.
pub(crate) fn snapshot(db: &Arc<Database>) -> (Pos, Vec<u8>) {
    let mut bytes = Vec::new();
    let pos = db.snapshot().unwrap().write_to(&mut bytes).unwrap();
    (pos, bytes)
}

/// The database that a snapshot holds.
pub(crate) fn unpack(ltx: &[u8]) -> Vec<u8> {
    let mut decoder = Decoder::new(ltx).unwrap();
    let header = *decoder.header();
    assert!(header.is_snapshot());
    let size = header.page_size as usize;
    let mut image = vec![0; header.commit as usize * size];
    let mut page = vec![0; size];
    while let Some(pgno) = decoder.page(&mut page).unwrap() {
        image[(pgno as usize - 1) * size..][..size].copy_from_slice(&page);
    }
    decoder.finish().unwrap();
    image
}

/// The newest committed bytes.
pub(crate) fn image(db: &Arc<Database>) -> (Pos, Vec<u8>) {
    let (pos, ltx) = snapshot(db);
    (pos, unpack(&ltx))
}

/// The checksum of a database's bytes, from nothing but the bytes.
pub(crate) fn checksum(image: &[u8], page_size: u32) -> u64 {
    if image.is_empty() {
        return ltx::CHECKSUM_FLAG;
    }
    image
        .chunks_exact(page_size as usize)
        .zip(1u32..)
        .filter(|(_, pgno)| *pgno != ltx::lock_pgno(page_size))
        .fold(0, |t, (page, pgno)| t ^ ltx::page_checksum(pgno, page))
        | ltx::CHECKSUM_FLAG
}

pub(super) fn integrity(c: &Connection) {
    let said: String = c
        .query_row("PRAGMA integrity_check", [], |r| r.get(0))
        .unwrap();
    assert_eq!(said, "ok");
}

/// `PRAGMA journal_mode`; returns the mode that it then is.
pub(super) fn set_mode(c: &Connection, mode: &str) -> String {
    c.query_row(&format!("PRAGMA journal_mode={mode}"), [], |r| r.get(0))
        .unwrap()
}
