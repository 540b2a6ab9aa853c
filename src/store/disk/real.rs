//! The disk that there is.

use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use crate::private;

use super::{Disk, DiskFile, File, Open};

/// The file system of the path that is asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Real;

impl Disk for Real {
    fn open(&self, path: &Path, how: Open) -> io::Result<File> {
        Ok(Arc::new(open(path, how)?))
    }

    fn temporary(&self, dir: &Path) -> io::Result<File> {
        Ok(Arc::new(tempfile::tempfile_in(dir)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        private::create_dir(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        fs::read_dir(path)?
            .map(|entry| Ok(entry?.file_name()))
            .collect()
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        fs::metadata(path)
    }
}

/// Opens a file of the real disk.
pub(super) fn open(path: &Path, how: Open) -> io::Result<fs::File> {
    private::options()
        .read(true)
        .write(how != Open::Read)
        .create(matches!(how, Open::Make | Open::Empty))
        .truncate(how == Open::Empty)
        .create_new(how == Open::New)
        .open(path)
}

impl DiskFile for fs::File {
    fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        Ok(self.as_fd())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        FileExt::write_at(self, buf, offset)
    }

    fn set_len(&self, size: u64) -> io::Result<()> {
        self.set_len(size)
    }

    fn allocate(&self, size: u64) -> io::Result<()> {
        // SAFETY: takes a descriptor that lives through the call, and numbers.
        match unsafe { libc::posix_fallocate(self.as_raw_fd(), 0, size as libc::off_t) } {
            0 => Ok(()),
            e => Err(io::Error::from_raw_os_error(e)),
        }
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        let (fd, mode) = (self.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE);
        let (offset, len) = (offset as libc::off_t, len as libc::off_t);
        loop {
            // SAFETY: takes a descriptor that lives through the call, and numbers.
            if unsafe { libc::fallocate(fd, mode, offset, len) } == 0 {
                return Ok(());
            }
            match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(()),
                e => return Err(e),
            }
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync_all()
    }

    fn metadata(&self) -> io::Result<Metadata> {
        self.metadata()
    }

    fn begin_sync(&self, offset: u64, len: usize) {
        let (fd, how) = (self.as_raw_fd(), libc::SYNC_FILE_RANGE_WRITE);
        // SAFETY: numbers, and a descriptor that lives through the call. A failure costs nothing:
        // what could not be written is told to the sync that follows.
        unsafe {
            libc::sync_file_range(fd, offset as libc::off64_t, len as libc::off64_t, how);
        }
    }

    fn forget_cached(&self, offset: u64, len: usize) {
        let (offset, len) = (offset as libc::off_t, len as libc::off_t);
        // SAFETY: numbers, and a descriptor that lives through the call. A failure costs nothing.
        unsafe {
            libc::posix_fadvise(self.as_raw_fd(), offset, len, libc::POSIX_FADV_DONTNEED);
        }
    }
}
