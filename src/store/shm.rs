//! The WAL index as this node uses it: opened and mapped through its own mount, so that its locks
//! and its memory are those of SQLite's connections.
//!
//! While it is mapped the node holds the DMS byte shared, as every connection does: nobody then
//! truncates the file, and the store refuses those who try without asking.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use crate::clock;
use crate::sqlite::locks::{self, LockKind};
use crate::sqlite::wal_index::{REGION_SIZE, WalIndex};

use super::database::{Database, FileKind};
use super::disk::Open;
use super::error::StoreError;

/// How long to wait for a connection that is just setting the file up.
const DMS_WAIT: Duration = Duration::from_secs(2);

/// See the module.
pub(super) struct SharedIndex {
    pub ino: u64,
    pub file: File,
    index: WalIndex,
    maps: Vec<*mut libc::c_void>,
}

// SAFETY: the mappings belong to this value alone and are reached through `WalIndex`, whose
// accesses are atomic.
unsafe impl Send for SharedIndex {}

impl SharedIndex {
    /// Opens the index of the database, which must exist in the mount.
    pub fn open(db: &Database, ino: u64) -> Result<SharedIndex, StoreError> {
        let file = open_file(db)?;
        attach(db, &file)?;
        Self::map(db, ino, file)
    }

    /// The same, if a connection has it open.
    pub fn open_if_used(db: &Database, ino: u64) -> Result<Option<SharedIndex>, StoreError> {
        let file = open_file(db)?;
        // Asked, not tried: a connection that came meanwhile would be told that it is busy.
        let is_unused = || {
            locks::is_free(file.as_fd(), locks::WAL_DMS, 1).map_err(StoreError::io(
                "ask for the locks of",
                db.mount_name(FileKind::Shm),
            ))
        };
        if is_unused()? {
            return Ok(None);
        }
        attach(db, &file)?;
        // A process that is just ending gives up its handles one by one: it may be gone by now.
        if is_unused()? {
            return Ok(None);
        }
        Self::map(db, ino, file).map(Some)
    }

    fn map(db: &Database, ino: u64, file: File) -> Result<SharedIndex, StoreError> {
        let mut shared = SharedIndex {
            ino,
            file,
            index: WalIndex::new(),
            maps: Vec::new(),
        };
        match shared.ensure(db, 1).map(|_| ()) {
            Ok(()) => Ok(shared),
            Err(e) => {
                // Else clients could never truncate the file again.
                shared.close(db);
                Err(e)
            }
        }
    }

    /// Maps at least this many regions, and returns the index.
    pub fn ensure(&mut self, db: &Database, regions: usize) -> Result<&WalIndex, StoreError> {
        while self.index.region_count() < regions {
            self.map_next(db).map_err(StoreError::io(
                "map WAL index",
                db.mount_name(FileKind::Shm),
            ))?;
        }
        Ok(&self.index)
    }

    /// The index, of which at least the first region is mapped.
    pub fn index(&self) -> &WalIndex {
        &self.index
    }

    fn map_next(&mut self, db: &Database) -> io::Result<()> {
        let start = self.maps.len() * REGION_SIZE;
        let end = (start + REGION_SIZE) as u64;
        if self.file.metadata()?.len() < end {
            self.file.set_len(end)?;
        }
        db.allocate_index(start as u64)?;
        *db.shm_mapped.lock() = (self.ino, end);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new shared mapping of an open file; the kernel chooses the address.
        let ptr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                REGION_SIZE,
                prot,
                libc::MAP_SHARED,
                self.file.as_raw_fd(),
                start as libc::off_t,
            )
        };
        if ptr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.maps.push(ptr);
        // SAFETY: REGION_SIZE bytes, page-aligned, mapped until `drop`, which ends the index too.
        unsafe { self.index.push_region(ptr.cast()) };
        Ok(())
    }

    /// To be called when the index is no longer used, so that clients may truncate the file.
    pub fn close(self, db: &Database) {
        let mut mapped = db.shm_mapped.lock();
        if mapped.0 == self.ino {
            *mapped = (0, 0);
        }
    }
}

fn open_file(db: &Database) -> Result<File, StoreError> {
    let name = db.mount_name(FileKind::Shm);
    db.open_in_mount(FileKind::Shm)
        .map_err(StoreError::io("open WAL index", name))
}

/// Becomes one of those that have the index open.
fn attach(db: &Database, file: &File) -> Result<(), StoreError> {
    let deadline = clock::now() + DMS_WAIT;
    if locks::lock_until(file.as_fd(), LockKind::Shared, locks::WAL_DMS, 1, deadline)
        .map_err(StoreError::io("lock", db.mount_name(FileKind::Shm)))?
    {
        return Ok(());
    }
    Err(StoreError::LockTimeout {
        db: db.name.clone(),
        lock: "the WAL index's DMS lock",
        holder: String::new(),
        seconds: DMS_WAIT.as_secs(),
    })
}

impl Drop for SharedIndex {
    fn drop(&mut self) {
        self.index = WalIndex::new();
        for ptr in &self.maps {
            // SAFETY: mapped by `map_next` with this size, and nothing refers to it any more.
            unsafe { libc::munmap(*ptr, REGION_SIZE) };
        }
    }
}

impl Database {
    /// Gives the region at `start` its space on disk, without changing its contents or its size: a
    /// store to a mapped hole ends the process with SIGBUS when the disk is full.
    fn allocate_index(&self, start: u64) -> io::Result<()> {
        let backing = self.disk().open(&self.path(FileKind::Shm), Open::Write)?;
        backing.reserve(start, REGION_SIZE as u64)
    }

    /// Opens one of the database's files as an application does, or its backing file if there is
    /// no mount.
    pub(super) fn open_in_mount(&self, kind: FileKind) -> io::Result<File> {
        match self.context.front() {
            Some(front) => front.open(&self.mount_name(kind)),
            None => File::options().read(true).write(true).open(self.path(kind)),
        }
    }
}
