//! What lies above the store: the kernel's caches of the mounted files, and the locks that SQLite
//! holds on them. The FUSE layer implements it; without a mount nothing is cached above the store.
//!
//! None of these may be called while a lock is held that a file operation of the store takes: the
//! kernel may have to wait for such an operation before it returns.

use std::fs::File;
use std::io;
use std::ops::Range;

/// Who holds locks on some files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holders {
    /// The IDs of processes.
    pub processes: Vec<u32>,
    /// There are locks that belong to no process.
    pub unknown: bool,
}

/// The mount, as the store needs it.
pub trait Front: Send + Sync {
    /// Opens a file by its name in the mount, for reading and writing, the way an application
    /// does: locks on this descriptor are seen by SQLite, and a shared mapping of it is the memory
    /// that SQLite's connections map.
    fn open(&self, name: &str) -> io::Result<File>;

    /// Forgets cached data of the inode in `[offset, offset + len)` (`len` 0: to the end), and its
    /// attributes.
    fn invalidate_data(&self, ino: u64, offset: u64, len: u64);

    /// Has the kernel know that the file has these bytes there, and so reaches at least that far.
    fn store(&self, ino: u64, offset: u64, bytes: &[u8]);

    /// Forgets what the kernel knows of the name, its absence included.
    fn invalidate_entry(&self, name: &str);

    /// Has the kernel read these bytes of a file, of this inode, into its cache, soon. It may do less.
    fn read_ahead(&self, ino: u64, name: &str, range: Range<u64>);

    /// Who holds locks on any of these inodes; `None`: it cannot be told. May be called with locks
    /// held.
    fn lock_holders(&self, inos: &[u64]) -> Option<Holders>;
}
