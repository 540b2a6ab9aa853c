//! Intents: transactions over several databases that are committed, and not yet in every log.
//!
//! ```text
//! <data>/super/<super-journal's name>:
//!   the LTX files of the parts, one after another
//!   table: per part  name length u32 · name · offset u64 · length u64
//!   tail:  table length u64 · CRC of the table u64 · magic "TNRSUPER"
//! ```
//! Big-endian, CRC-64/GO-ISO. The file counts from the moment when all of it is on disk: that is
//! the commit of all parts. Each part is then logged as a transaction of its database, and the file
//! is removed. A start finishes what it finds: a part that the log has is skipped, so that doing it
//! twice does no harm. Therefore a removal is not flushed, but for one moment: before a snapshot of
//! another history takes a database's TXIDs back ([`flush_removals`]).

use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crc_fast::CrcAlgorithm::Crc64GoIso;

use crate::ltx::LtxError;

use super::Store;
use super::database::Database;
use super::disk::{Disk, DiskFile, File, Open, Writer};
use super::error::StoreError;
use super::log_recovery::sync_dir;
use super::names;
use super::receive::Incoming;
use super::segment::BodyReader;

const MAGIC: &[u8; 8] = b"TNRSUPER";
const TAIL: u64 = 24;
/// Longest table: SQLite attaches 125 databases at most, whose names have at most 255 bytes.
const MAX_TABLE: u64 = 64 << 10;

/// A part of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    db: String,
    offset: u64,
    length: u64,
}

/// An intent being written, or written. Dropped before [`Intent::commit`], it never was.
pub(super) struct Intent {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    out: BufWriter<Writer>,
    written: u64,
    parts: Vec<Part>,
    committed: bool,
    in_doubt: bool,
}

impl Intent {
    /// Begins one; `name` is the super-journal's.
    pub fn create(disk: &Arc<dyn Disk>, data_dir: &Path, name: &str) -> Result<Intent, StoreError> {
        let dir = data_dir.join("super");
        disk.create_dir_all(&dir)
            .map_err(StoreError::io("create", &dir))?;
        let path = dir.join(name);
        let file = disk
            .open(&path, Open::Empty)
            .map_err(StoreError::io("create", &path))?;
        Ok(Intent {
            disk: disk.clone(),
            path,
            out: BufWriter::with_capacity(256 << 10, Writer::new(file)),
            written: 0,
            parts: Vec::new(),
            committed: false,
            in_doubt: false,
        })
    }

    /// Adds the LTX file that `write` writes, if it says that there is one.
    pub fn part<T>(
        &mut self,
        db: &str,
        write: impl FnOnce(&mut dyn Write) -> Result<Option<T>, StoreError>,
    ) -> Result<Option<T>, StoreError> {
        let offset = self.written;
        let made = write(self)?;
        if made.is_some() {
            let length = self.written - offset;
            self.parts.push(Part {
                db: db.to_owned(),
                offset,
                length,
            });
        }
        Ok(made)
    }

    /// The commit of all parts: on disk when this returns. After an error it never was, unless
    /// [`Intent::is_in_doubt`].
    pub fn commit(&mut self) -> Result<(), StoreError> {
        let table = encode_table(&self.parts);
        let mut tail = (table.len() as u64).to_be_bytes().to_vec();
        tail.extend(crc_fast::checksum(Crc64GoIso, &table).to_be_bytes());
        tail.extend(MAGIC);
        let path = self.path.clone();
        self.write_and_sync(&table)
            .map_err(StoreError::io("write", &path))?;
        // Its name, and that of the directory, which an earlier life may have made.
        for dir in path.ancestors().skip(1).take(2) {
            sync_dir(&*self.disk, dir)?;
        }
        // Nothing counts before this, and nothing can fail after it.
        if let Err(e) = self.write_and_sync(&tail) {
            self.in_doubt = self.withdraw().is_err();
            return Err(StoreError::io("write", &path)(e));
        }
        self.committed = true;
        Ok(())
    }

    fn write_and_sync(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.out.flush()?;
        self.out.get_ref().file().sync_all()
    }

    /// Makes sure that no start ever takes it for committed.
    fn withdraw(&self) -> io::Result<()> {
        let file = self.out.get_ref().file();
        let emptied = file.set_len(0).and_then(|()| file.sync_all());
        emptied.or_else(|_| {
            self.disk.remove_file(&self.path)?;
            let dir = self.path.parent().unwrap_or(Path::new("."));
            self.disk.sync_dir(dir)
        })
    }

    /// Whether it cannot be told if the commit that failed is on disk: the next start decides.
    pub fn is_in_doubt(&self) -> bool {
        self.in_doubt
    }

    /// The LTX file of the part with this index.
    pub fn body(&self, index: usize) -> impl Read + use<> {
        let part = &self.parts[index];
        BodyReader::new(self.out.get_ref().file().clone(), part.offset, part.length)
    }

    /// All parts are in their logs.
    pub fn remove(&self) -> Result<(), StoreError> {
        self.disk
            .remove_file(&self.path)
            .map_err(StoreError::io("remove", &self.path))
    }
}

impl Write for Intent {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.out.write_all(buf)?;
        self.written += buf.len() as u64;
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Intent {
    fn drop(&mut self) {
        if !self.committed && !self.in_doubt {
            // Without its tail it counts for nothing, should it stay.
            let _ = self.disk.remove_file(&self.path);
        }
    }
}

/// From now on no start finds an intent that was removed.
pub(super) fn flush_removals(disk: &dyn Disk, data_dir: &Path) -> Result<(), StoreError> {
    let dir = data_dir.join("super");
    if disk.exists(&dir) {
        sync_dir(disk, &dir)?;
    }
    Ok(())
}

fn encode_table(parts: &[Part]) -> Vec<u8> {
    let mut table = Vec::new();
    for p in parts {
        table.extend((p.db.len() as u32).to_be_bytes());
        table.extend(p.db.as_bytes());
        table.extend(p.offset.to_be_bytes());
        table.extend(p.length.to_be_bytes());
    }
    table
}

fn take<'a>(bytes: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (head, rest) = bytes.split_at_checked(n)?;
    *bytes = rest;
    Some(head)
}

fn decode_table(mut table: &[u8]) -> Option<Vec<Part>> {
    let mut parts = Vec::new();
    while !table.is_empty() {
        let len = u32::from_be_bytes(take(&mut table, 4)?.try_into().ok()?);
        let db = std::str::from_utf8(take(&mut table, len as usize)?)
            .ok()?
            .to_owned();
        names::check_database(&db).ok()?;
        let offset = u64::from_be_bytes(take(&mut table, 8)?.try_into().ok()?);
        let length = u64::from_be_bytes(take(&mut table, 8)?.try_into().ok()?);
        parts.push(Part { db, offset, length });
    }
    Some(parts)
}

/// The parts of a whole intent; `None`: its commit was never reached.
fn read_parts(file: &dyn DiskFile) -> io::Result<Option<Vec<Part>>> {
    let len = file.size()?;
    let mut tail = [0u8; TAIL as usize];
    if len < TAIL {
        return Ok(None);
    }
    file.read_exact_at(&mut tail, len - TAIL)?;
    let number = |i: usize| u64::from_be_bytes(tail[i..i + 8].try_into().expect("8 bytes"));
    let (table_len, crc) = (number(0), number(8));
    if &tail[16..] != MAGIC || table_len > MAX_TABLE || table_len > len - TAIL {
        return Ok(None);
    }
    let mut table = vec![0u8; table_len as usize];
    file.read_exact_at(&mut table, len - TAIL - table_len)?;
    let whole = crc_fast::checksum(Crc64GoIso, &table) == crc;
    Ok(if whole { decode_table(&table) } else { None })
}

impl Store {
    /// Finishes what the last run committed over several databases and did not log in all of them.
    pub(super) fn finish_intents(&self) -> Result<(), StoreError> {
        let dir = self.data_dir().join("super");
        let entries = match self.disk().list(&dir) {
            Ok(e) => e,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(StoreError::io("list", &dir)(e)),
        };
        for entry in entries {
            let path = dir.join(entry);
            let file = self
                .disk()
                .open(&path, Open::Read)
                .map_err(StoreError::io("open", &path))?;
            let parts = read_parts(&*file).map_err(StoreError::io("read", &path))?;
            // Without one of its databases the others would show half of it.
            let parts = parts.unwrap_or_default().into_iter();
            let parts: Vec<_> = parts
                .map(|p| Ok((self.database_or_new(&p.db)?, p)))
                .collect::<Result<_, StoreError>>()?;
            match self.finish_intent(&file, parts) {
                Ok(()) => self
                    .disk()
                    .remove_file(&path)
                    .map_err(StoreError::io("remove", &path))?,
                Err(e) => {
                    tracing::error!(path = %path.display(), error = %e, "a transaction over several databases is not in all of them: it is tried again at the next start");
                }
            }
        }
        Ok(())
    }

    fn finish_intent(
        &self,
        file: &File,
        parts: Vec<(Arc<Database>, Part)>,
    ) -> Result<(), StoreError> {
        let (mut incoming, mut unread) = (Vec::new(), Vec::new());
        for (db, p) in parts {
            let mut body = BodyReader::new(file.clone(), p.offset, p.length);
            match Incoming::read(self.scratch(), &mut body, &p.db, false) {
                Ok(part) => incoming.push((db, part)),
                Err(e) => unread.push((db, e)),
            }
        }
        let damaged = !unread.is_empty() && unread.iter().all(|(_, e)| is_damage(e));
        if damaged && !any_logged(&incoming) {
            // The power went before all of it was on disk, and so before any log had a part.
            tracing::warn!(error = %unread[0].1, "an unfinished transaction over several databases never was");
            return Ok(());
        }
        let mut failed = Ok(());
        for (db, e) in unread {
            set_unfinished(&db, &e);
            failed = failed.and(Err(e));
        }
        for (db, part) in incoming {
            if let Err(e) = db.check_usable(&db.lock()) {
                // Whether it has its part is not known, and nothing of it is to be touched.
                failed = failed.and(Err(e));
                continue;
            }
            if db.lock().pos.txid >= part.header.max_txid {
                continue;
            }
            let result = db.apply(part);
            db.release_locks();
            match result {
                Ok(_) => {
                    tracing::info!(db = db.name(), pos = %db.lock().pos, "finished a transaction over several databases");
                }
                Err(e) => {
                    set_unfinished(&db, &e);
                    failed = failed.and(Err(e));
                }
            }
        }
        failed
    }
}

/// Half of a transaction is not shown, nor written on.
fn set_unfinished(db: &Database, e: &StoreError) {
    let reason = format!(
        "{e}: a transaction over several databases is still to be finished in this one, start the node anew once the cause is mended"
    );
    db.set_broken(&mut db.lock(), reason);
}

/// Whether a part is not what was written; else it could not be read this time.
fn is_damage(e: &StoreError) -> bool {
    match e {
        StoreError::Ltx { source, .. } => !matches!(source, LtxError::Io(_)),
        _ => matches!(e, StoreError::Corrupt { .. }),
    }
}

/// Whether a part is in its log, or may be.
fn any_logged(parts: &[(Arc<Database>, Incoming)]) -> bool {
    parts.iter().any(|(db, part)| {
        let st = db.lock();
        st.broken.is_some() || st.pos.txid >= part.header.max_txid
    })
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;
    use crate::store::disk::Real;

    fn intent(dir: &Path) -> Intent {
        let disk: Arc<dyn Disk> = Arc::new(Real);
        let mut intent = Intent::create(&disk, dir, "a-mj0000009AB").unwrap();
        for (db, text) in [("a", "first"), ("b", "the second")] {
            let made = intent.part(db, |w| {
                w.write_all(text.as_bytes()).unwrap();
                Ok(Some(()))
            });
            assert!(made.unwrap().is_some());
        }
        assert!(intent.part("c", |_| Ok(None::<()>)).unwrap().is_none());
        intent
    }

    #[test]
    fn counts_only_when_whole() {
        let dir = tempfile::tempdir().unwrap();
        let mut intent = intent(dir.path());
        intent.commit().unwrap();
        let bytes = fs::read(&intent.path).unwrap();
        for (i, text) in ["first", "the second"].into_iter().enumerate() {
            let mut body = String::new();
            intent.body(i).read_to_string(&mut body).unwrap();
            assert_eq!(body, text);
        }
        let parts = read_parts(&File::open(&intent.path).unwrap())
            .unwrap()
            .unwrap();
        assert_eq!(parts, intent.parts);
        let cut = dir.path().join("cut");
        for n in 0..bytes.len() {
            fs::write(&cut, &bytes[..n]).unwrap();
            assert_eq!(
                read_parts(&File::open(&cut).unwrap()).unwrap(),
                None,
                "{n} bytes"
            );
        }
        for n in 15..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[n] ^= 0x10;
            fs::write(&cut, &flipped).unwrap();
            assert_eq!(
                read_parts(&File::open(&cut).unwrap()).unwrap(),
                None,
                "byte {n}"
            );
        }
    }

    #[test]
    fn never_was_without_its_commit() {
        let dir = tempfile::tempdir().unwrap();
        let intent = intent(dir.path());
        let path = intent.path.clone();
        drop(intent);
        assert!(!path.exists());
    }
}
