//! A backup in a directory: `backup: {type: file, path: DIR}`.
//!
//! ```text
//! DIR/clusterid                     the cluster's ID and a newline
//! DIR/dbs/NAME/MIN-MAX.ltx          an LTX file of transactions MIN to MAX (16 hex digits each)
//! DIR/dbs/NAME/MIN-MAX.pos          the positions that are known after each of them, one a line,
//!                                   as `TXID/checksum`; the newest 65,536 at most
//! DIR/dbs/NAME/aside-MILLISECONDS/  a chain that a snapshot took the place of
//! ```
//! The chain: from TXID 1 on, always the file that begins there and reaches farthest. A file is
//! written under a temporary name, flushed, read again and checked, renamed, and then the directory
//! is flushed; it is never changed. The positions come before their LTX file.
//!
//! Files are merged so that there are never many: the newest ones as soon as there are
//! [`MERGE_AT`], together with older ones that are not much larger, and all of them with the
//! snapshot once they have outgrown it. What a byte costs in the end is a few rewrites. A merged
//! file is there before those that it stands for go.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use tempfile::NamedTempFile;

use crate::ltx::{self, HEADER_SIZE, Header, Pos, TRAILER_SIZE};
use crate::private;
use crate::store::check_database;

use super::{BackupClient, BackupError, Batch};

/// So many files after the snapshot are merged.
const MERGE_AT: usize = 32;
/// Files are merged with newer ones as long as they are not larger than this many times those.
const MERGE_RATIO: u64 = 2;
/// Positions kept with a file.
const MAX_POSITIONS: usize = 65_536;
/// Bytes of a buffer for reading or writing a file.
const BUFFER: usize = 64 << 10;
/// Longest file of positions that is read.
const MAX_POS_FILE: u64 = MAX_POSITIONS as u64 * 40;
/// Longest file with a cluster's ID that is read.
const MAX_CLUSTER_ID: u64 = 1 << 10;

/// See the module.
#[derive(Debug)]
pub struct FileBackup {
    root: PathBuf,
}

/// A file of a chain.
#[derive(Clone, Debug)]
struct Link {
    min: u64,
    max: u64,
    path: PathBuf,
}

impl FileBackup {
    /// In this directory, which is made when it is first written to.
    pub fn new(root: &Path) -> FileBackup {
        FileBackup {
            root: root.to_owned(),
        }
    }

    fn dir(&self, db: &str) -> PathBuf {
        self.root.join("dbs").join(db)
    }

    fn chain(&self, db: &str) -> Result<Vec<Link>, BackupError> {
        let dir = self.dir(db);
        let mut files = Vec::new();
        for entry in list(&dir)? {
            let name = entry.file_name();
            if let Some((min, max)) = name.to_str().and_then(ltx::parse_file_name) {
                let path = entry.path();
                files.push(Link { min, max, path });
            }
        }
        let mut chain: Vec<Link> = Vec::new();
        loop {
            let Some(next) = chain.last().map_or(Some(1), |l| l.max.checked_add(1)) else {
                return Ok(chain);
            };
            let begins = files.iter().filter(|l| l.min == next && l.max >= l.min);
            match begins.max_by_key(|l| l.max) {
                Some(link) => chain.push(link.clone()),
                None => return Ok(chain),
            }
        }
    }

    fn end(&self, chain: &[Link]) -> Result<Pos, BackupError> {
        chain.last().map_or(Ok(Pos::default()), Link::end)
    }

    /// Merges what is to be merged.
    fn tidy(&self, db: &str) -> Result<(), BackupError> {
        let chain = self.chain(db)?;
        let Some(deltas) = chain.get(1..).filter(|d| d.len() >= MERGE_AT) else {
            return Ok(());
        };
        let mut sizes = Vec::with_capacity(chain.len());
        for link in &chain {
            let size = fs::metadata(&link.path).map_err(BackupError::io("stat", &link.path))?;
            sizes.push(size.len());
        }
        let mut first = chain.len() - MERGE_AT.min(deltas.len());
        let mut sum: u64 = sizes[first..].iter().sum();
        while first > 0 && sizes[first - 1] <= sum.saturating_mul(MERGE_RATIO) {
            first -= 1;
            sum += sizes[first];
        }
        self.merge(db, &chain[first..])
    }

    fn merge(&self, db: &str, links: &[Link]) -> Result<(), BackupError> {
        let dir = self.dir(db);
        let temp = self.temporary(&dir)?;
        let mut positions = Vec::new();
        for link in links {
            positions.extend(link.positions()?);
        }
        let end = merge_into(links, &mut BufWriter::with_capacity(BUFFER, temp.as_file()))?;
        let min = links.first().map_or(1, |l| l.min);
        positions.drain(..positions.len().saturating_sub(MAX_POSITIONS));
        self.put(&dir, temp, min, end.txid, &positions)?;
        for link in links {
            link.remove()?;
        }
        sync(&dir)
    }

    fn temporary(&self, dir: &Path) -> Result<NamedTempFile, BackupError> {
        tempfile::Builder::new()
            .prefix(".tmp-")
            .tempfile_in(dir)
            .map_err(BackupError::io("make a file in", dir))
    }

    /// Makes a written file, once it is checked, part of the backup.
    fn put(
        &self,
        dir: &Path,
        temp: NamedTempFile,
        min: u64,
        max: u64,
        positions: &[Pos],
    ) -> Result<(), BackupError> {
        let path = dir.join(ltx::file_name(min, max));
        let flushed = BackupError::io("flush", &path);
        temp.as_file().sync_all().map_err(flushed)?;
        let mut file = temp.as_file();
        file.seek(SeekFrom::Start(0))
            .map_err(BackupError::io("read", &path))?;
        let summary =
            ltx::verify(BufReader::with_capacity(BUFFER, file)).map_err(BackupError::ltx(&path))?;
        if (summary.header.min_txid, summary.header.max_txid) != (min, max) {
            return Err(corrupt(&path, "the file holds other transactions"));
        }
        let text: String = positions.iter().map(|p| format!("{p}\n")).collect();
        put_text(&path.with_extension("pos"), &text)?;
        temp.persist(&path)
            .map_err(|e| BackupError::io("rename to", &path)(e.error))?;
        sync(dir)
    }

    /// Makes the database's directory. What a write left that was cut off goes.
    fn make(&self, db: &str) -> Result<PathBuf, BackupError> {
        let dir = self.dir(db);
        if !dir.is_dir() {
            private::create_dir_all(&dir).map_err(BackupError::io("create", &dir))?;
            for parent in dir.ancestors().skip(1).take(3) {
                sync(parent)?;
            }
        }
        for entry in list(&dir)? {
            if entry.file_name().to_string_lossy().starts_with(".tmp-") {
                let path = entry.path();
                fs::remove_file(&path).map_err(BackupError::io("remove", &path))?;
            }
        }
        Ok(dir)
    }

    /// After a snapshot: what it does not need goes, or is kept aside.
    fn replaced(&self, dir: &Path, old: &[Link], batch: &Batch) -> Result<(), BackupError> {
        let old: Vec<&Link> = old
            .iter()
            .filter(|l| (l.min, l.max) != (1, batch.end().txid))
            .collect();
        if old.is_empty() {
            return Ok(());
        }
        if batch.continues {
            old.iter().try_for_each(|l| l.remove())?;
            return sync(dir);
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let aside = dir.join(format!("aside-{}", since.unwrap_or_default().as_millis()));
        private::create_dir_all(&aside).map_err(BackupError::io("create", &aside))?;
        for link in &old {
            for path in [link.path.clone(), link.path.with_extension("pos")] {
                let target = aside.join(path.file_name().unwrap_or_default());
                match fs::rename(&path, target) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => {
                        return Err(BackupError::io("set aside", &path)(e));
                    }
                    _ => {}
                }
            }
        }
        tracing::warn!(kept = %aside.display(), "a snapshot takes the place of a backup that may be of another history; the old one is set aside");
        sync(&aside)?;
        sync(dir)
    }
}

impl Link {
    fn header(&self) -> Result<Header, BackupError> {
        let mut bytes = [0u8; HEADER_SIZE];
        open(&self.path)
            .and_then(|f| f.read_exact_at(&mut bytes, 0))
            .map_err(BackupError::io("read", &self.path))?;
        Header::decode(&bytes).map_err(BackupError::ltx(&self.path))
    }

    /// The position that it ends at.
    fn end(&self) -> Result<Pos, BackupError> {
        let read = || -> io::Result<u64> {
            let file = open(&self.path)?;
            let len = file.metadata()?.len();
            let mut bytes = [0u8; 8];
            let at = len.saturating_sub(TRAILER_SIZE as u64);
            file.read_exact_at(&mut bytes, at)?;
            Ok(u64::from_be_bytes(bytes))
        };
        let checksum = read().map_err(BackupError::io("read", &self.path))?;
        Ok(Pos {
            txid: self.max,
            checksum,
        })
    }

    /// The positions that are known within it.
    fn positions(&self) -> Result<Vec<Pos>, BackupError> {
        let path = self.path.with_extension("pos");
        let mut text = String::new();
        let read = open(&path).and_then(|f| f.take(MAX_POS_FILE).read_to_string(&mut text));
        match read {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![self.end()?]),
            Err(e) => return Err(BackupError::io("read", &path)(e)),
        }
        let positions: Option<Vec<Pos>> = text.lines().map(|l| l.parse().ok()).collect();
        positions.ok_or_else(|| corrupt(&path, "a line is no position (TXID/checksum)"))
    }

    fn remove(&self) -> Result<(), BackupError> {
        for path in [self.path.clone(), self.path.with_extension("pos")] {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(BackupError::io("remove", &path)(e));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Errors name the newest of the files; which one it is shows when each is checked alone.
fn merge_into(links: &[Link], out: &mut dyn Write) -> Result<Pos, BackupError> {
    let mut files = Vec::with_capacity(links.len());
    for link in links {
        let file = open(&link.path).map_err(BackupError::io("open", &link.path))?;
        files.push(BufReader::with_capacity(BUFFER, file));
    }
    let failed = || {
        // The first that is damaged by itself, else the last.
        let damaged = links.iter().find(|l| {
            let file = open(&l.path);
            file.map_or(true, |f| ltx::verify(BufReader::new(f)).is_err())
        });
        damaged.or(links.last()).map(|l| l.path.clone())
    };
    let end = ltx::merge(files, &mut *out)
        .map_err(|e| BackupError::ltx(failed().unwrap_or_default())(e))?;
    out.flush()
        .map_err(BackupError::io("write", failed().unwrap_or_default()))?;
    Ok(end)
}

fn corrupt(path: &Path, what: &str) -> BackupError {
    BackupError::Corrupt {
        path: path.to_owned(),
        what: what.to_owned(),
    }
}

/// Opens a file of a backup for reading. Whoever can write there may have put something else in its
/// place: a pipe would be waited for, a device never ends.
fn open(path: &Path) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    Ok(file)
}

fn list(dir: &Path) -> Result<Vec<fs::DirEntry>, BackupError> {
    match fs::read_dir(dir).and_then(Iterator::collect) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries.map_err(BackupError::io("list", dir)),
    }
}

fn sync(dir: &Path) -> Result<(), BackupError> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(BackupError::io("flush directory", dir))
}

fn put_text(path: &Path, text: &str) -> Result<(), BackupError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let write = || -> io::Result<()> {
        let mut temp = tempfile::Builder::new().prefix(".tmp-").tempfile_in(dir)?;
        temp.write_all(text.as_bytes())?;
        temp.as_file().sync_all()?;
        temp.persist(path)?;
        Ok(())
    };
    write().map_err(BackupError::io("write", path))
}

/// A file that tells how much of it is read.
struct Told<'a> {
    file: File,
    read: &'a mut dyn FnMut(u64) -> bool,
    stopped: bool,
}

impl Read for Told<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buf)?;
        if !(self.read)(n as u64) {
            self.stopped = true;
            return Err(io::Error::other("it is not read on"));
        }
        Ok(n)
    }
}

impl BackupClient for FileBackup {
    fn place(&self) -> String {
        self.root.display().to_string()
    }

    fn verify(&self, db: &str, read: &mut dyn FnMut(u64) -> bool) -> Result<(), BackupError> {
        for link in self.chain(db)? {
            let file = match open(&link.path) {
                Ok(file) => file,
                // Merged meanwhile.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(BackupError::io("open", &link.path)(e)),
            };
            let mut told = Told {
                file,
                read,
                stopped: false,
            };
            let verified = ltx::verify(BufReader::with_capacity(BUFFER, &mut told));
            if told.stopped {
                return Ok(());
            }
            let summary = verified.map_err(BackupError::ltx(&link.path))?;
            if (summary.header.min_txid, summary.header.max_txid) != (link.min, link.max) {
                return Err(corrupt(&link.path, "the file holds other transactions"));
            }
        }
        Ok(())
    }

    fn cluster_id(&self) -> Result<Option<String>, BackupError> {
        let path = self.root.join("clusterid");
        let mut text = String::new();
        let read = open(&path).and_then(|f| f.take(MAX_CLUSTER_ID).read_to_string(&mut text));
        match read {
            Ok(_) => Ok(Some(text.trim_end().to_owned())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(BackupError::io("read", &path)(e)),
        }
    }

    fn set_cluster_id(&self, id: &str) -> Result<(), BackupError> {
        private::create_dir_all(&self.root).map_err(BackupError::io("create", &self.root))?;
        put_text(&self.root.join("clusterid"), &format!("{id}\n"))?;
        sync(&self.root)
    }

    fn positions(&self) -> Result<BTreeMap<String, Pos>, BackupError> {
        let mut positions = BTreeMap::new();
        for entry in list(&self.root.join("dbs"))? {
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|n| check_database(n).is_ok()) else {
                continue;
            };
            let pos = self.end(&self.chain(name)?)?;
            if !pos.is_zero() {
                positions.insert(name.to_owned(), pos);
            }
        }
        Ok(positions)
    }

    fn contains(&self, db: &str, pos: Pos) -> Result<bool, BackupError> {
        for link in self.chain(db)?.iter().rev() {
            let within = (link.min..=link.max).contains(&pos.txid);
            if within && (link.end()? == pos || link.positions()?.contains(&pos)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn write(&self, db: &str, batch: &mut Batch) -> Result<(), BackupError> {
        let dir = self.make(db)?;
        // What a snapshot takes the place of may be damaged.
        if !batch.from.is_zero() {
            self.tidy(db)?;
        }
        let chain = self.chain(db)?;
        if !batch.from.is_zero() {
            let end = self.end(&chain)?;
            if batch.from != end {
                return Err(BackupError::Gap {
                    db: db.to_owned(),
                    min: batch.from.txid + 1,
                    end,
                });
            }
        }
        let temp = self.temporary(&dir)?;
        batch
            .ltx
            .seek(SeekFrom::Start(0))
            .and_then(|_| io::copy(&mut batch.ltx, &mut temp.as_file()))
            .map_err(BackupError::io("write a file in", &dir))?;
        let kept = batch.positions.len().saturating_sub(MAX_POSITIONS);
        let (min, max) = (batch.from.txid + 1, batch.end().txid);
        self.put(&dir, temp, min, max, &batch.positions[kept..])?;
        if batch.from.is_zero() {
            self.replaced(&dir, &chain, batch)?;
        }
        Ok(())
    }

    fn fetch_snapshot(&self, db: &str, out: &mut dyn Write) -> Result<Pos, BackupError> {
        let chain = self.chain(db)?;
        let end = merge_into(&chain, out)?;
        if chain.first().map(Link::header).transpose()?.is_none() {
            return Err(corrupt(&self.dir(db), "there is no snapshot to begin with"));
        }
        Ok(end)
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
