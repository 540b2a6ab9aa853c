//! The disk under a store: everything that the store keeps goes through [`Disk`] and [`DiskFile`].
//!
//! The real one is the file system of the data directory. Tests have one that keeps what is not
//! synced apart, loses a part of it in a crash, fails and returns other bytes than were written.
//!
//! Not meant are files that applications see as such (those opened in the mount, for their locks
//! and the memory that they share) and files that are no state (spooled imports, `/proc`).

use std::ffi::OsString;
use std::fmt;
use std::fs::Metadata;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

mod pool;
mod real;
#[cfg(test)]
pub(crate) mod sim;

pub use pool::Pool;
pub use real::Real;

/// An open file; clones are the same one.
pub type File = Arc<dyn DiskFile>;

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open {
    /// For reading; it must exist.
    Read,
    /// For reading and writing; it must exist.
    Write,
    /// For reading and writing; made if it is missing.
    Make,
    /// For reading and writing; made if it is missing, emptied if it is not.
    Empty,
    /// For reading and writing; it must not exist.
    New,
}

/// A file system. What is done to names is durable once the directory is synced, what is done to
/// a file once that is; until then a crash may keep any part of it.
pub trait Disk: fmt::Debug + Send + Sync {
    /// Opens a file; or a directory, for reading, of which only [`DiskFile::sync_all`] is of use.
    fn open(&self, path: &Path, how: Open) -> io::Result<File>;
    /// Makes a file without a name in a directory: it is gone when it is closed.
    fn temporary(&self, dir: &Path) -> io::Result<File>;
    /// Gives a file or directory another name, in place of the file that may have that.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Takes a file's name away.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Makes a directory, which must not exist.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty directory.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// The names in a directory, in any order.
    fn list(&self, path: &Path) -> io::Result<Vec<OsString>>;
    /// What is known of a file or directory.
    fn metadata(&self, path: &Path) -> io::Result<Metadata>;
}

/// An open file of a [`Disk`].
pub trait DiskFile: fmt::Debug + Send + Sync {
    /// Its descriptor, for locks, mappings and the kernel: the same as long as there is the file.
    ///
    /// # Errors
    /// If it has to be opened again, and that fails.
    fn descriptor(&self) -> io::Result<BorrowedFd<'_>>;
    /// Copies bytes out; returns how many, fewer than asked for before the end only by chance.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes bytes; returns how many.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize>;
    /// Sets the size in bytes.
    fn set_len(&self, size: u64) -> io::Result<()>;
    /// Extends the file to at least this size, with its space allocated.
    fn allocate(&self, size: u64) -> io::Result<()>;
    /// Allocates the space of a range without changing the file's bytes or size. Where the file
    /// system cannot, nothing is done.
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes the bytes durable, and what is needed to read them.
    fn sync_data(&self) -> io::Result<()>;
    /// Makes the bytes and the attributes durable; of a directory, its names.
    fn sync_all(&self) -> io::Result<()>;
    /// Has the system begin to make a range durable, where it can: a sync that follows takes less time.
    fn begin_sync(&self, offset: u64, len: usize);
    /// Has the system forget what it keeps of a range in memory, where it can.
    fn forget_cached(&self, offset: u64, len: usize);
    /// Size, times and space.
    fn metadata(&self) -> io::Result<Metadata>;
}

impl dyn DiskFile + '_ {
    /// Fills the buffer.
    ///
    /// # Errors
    /// `UnexpectedEof` if the file ends before.
    pub fn read_exact_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match self.read_at(buf, offset) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    buf = &mut buf[n..];
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Writes all of the bytes.
    pub fn write_all_at(&self, mut buf: &[u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match self.write_at(buf, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    buf = &buf[n..];
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Size in bytes.
    pub fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl dyn Disk + '_ {
    /// Makes the names in a directory durable.
    pub fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.open(path, Open::Read)?.sync_all()
    }

    /// Makes a directory and those above it that are missing. One that is there need not be durable,
    /// nor is one that is made: whoever relies on it syncs what it is in.
    pub fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        match (self.create_dir(path), path.parent()) {
            (Err(e), Some(parent)) if e.kind() == io::ErrorKind::NotFound => {
                self.create_dir_all(parent)?;
                self.create_dir(path)
            }
            (Err(_), _) if self.metadata(path).is_ok_and(|m| m.is_dir()) => Ok(()),
            (r, _) => r,
        }
    }

    /// Removes a directory of files.
    pub fn remove_dir_of_files(&self, path: &Path) -> io::Result<()> {
        for name in self.list(path)? {
            self.remove_file(&path.join(name))?;
        }
        self.remove_dir(path)
    }

    /// Removes a file that may be missing.
    pub fn remove_file_if_there(&self, path: &Path) -> io::Result<()> {
        match self.remove_file(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            r => r,
        }
    }

    /// Whether there is something of this name.
    pub fn exists(&self, path: &Path) -> bool {
        self.metadata(path).is_ok()
    }

    /// The text of a small file; `None`: there is none.
    pub fn read_to_string(&self, path: &Path) -> io::Result<Option<String>> {
        let file = match self.open(path, Open::Read) {
            Ok(f) => f,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut bytes = vec![0; file.size()? as usize];
        file.read_exact_at(&mut bytes, 0)?;
        let text = String::from_utf8(bytes);
        text.map(Some)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is no text"))
    }

    /// Puts a file in the place of the one that has this name, if any: whole or not at all, and on
    /// disk when this returns.
    pub fn replace(
        &self,
        path: &Path,
        write: impl FnOnce(&mut Writer) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let new = PathBuf::from(new);
        let mut out = Writer::new(self.open(&new, Open::Empty)?);
        let written = write(&mut out)
            .and_then(|()| out.file.sync_all())
            .and_then(|()| self.rename(&new, path));
        if let Err(e) = written {
            // It is overwritten the next time, should it stay.
            let _ = self.remove_file(&new);
            return Err(e);
        }
        self.sync_dir(path.parent().unwrap_or(Path::new(".")))
    }
}

/// Writes a file from its beginning. Not buffered.
#[derive(Debug)]
pub struct Writer {
    file: File,
    at: u64,
}

impl Writer {
    /// At the beginning of the file.
    pub fn new(file: File) -> Writer {
        Writer { file, at: 0 }
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Write for Writer {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.file.write_at(buf, self.at)?;
        self.at += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads a file from its beginning. Not buffered.
#[derive(Debug)]
pub struct Reader {
    file: File,
    at: u64,
}

impl Reader {
    /// At the beginning of the file.
    pub fn new(file: File) -> Reader {
        Reader { file, at: 0 }
    }
}

impl Read for Reader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buf, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Seek for Reader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.file.size()?.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// Where files without a name are made.
#[derive(Clone, Debug)]
pub struct Scratch {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
}

impl Scratch {
    /// In this directory.
    pub fn new(disk: &Arc<dyn Disk>, dir: &Path) -> Scratch {
        Scratch {
            disk: disk.clone(),
            dir: dir.to_owned(),
        }
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// Where they are made.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A new one.
    pub fn file(&self) -> io::Result<File> {
        self.disk.temporary(&self.dir)
    }
}
