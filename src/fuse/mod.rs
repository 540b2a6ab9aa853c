//! The mount: inodes, handles, cache invalidation. Every decision is the store's.
//!
//! Rules that keep it from hanging (each was found the hard way):
//! - Locks stay in the kernel: `FUSE_POSIX_LOCKS` is not asked for.
//! - Entries, attributes and absent names are cached for ever, and what the store changes by itself
//!   it invalidates through [`Front`], from a thread that serves no request and holds no lock that
//!   a request needs.
//! - The files of the halt locks are a mount of their own ([`lock_session`]).
//! - FLUSH is answered with ENOSYS and switched off for every handle that the node itself may have
//!   open, so that a killed node never waits for itself. Handles of copies alone have it: it is where
//!   they are told whether they are a database.
//! - A reply may be given later and from any thread; the one that serves requests does not wait.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fuser::{Config, INodeNo, MountOption, Notifier, Session, SessionACL};
use tokio::sync::watch;

use crate::store::front::{Front, Holders};
use crate::store::{LOCK_DIR, Store};
use crate::thread;

mod attr;
mod companion;
mod copies;
mod crew;
mod fs_impl;
mod handles;
mod lock_session;
mod nodes;
mod observe;
mod points;
mod tenure_fs;

use crew::Crew;
use lock_session::LockFs;
use tenure_fs::TenureFs;

pub use observe::{Observers, PrimaryName};

/// Name and type of the file system in the table of mounts.
const FS_NAME: &str = "tenure";
/// Bytes that the kernel is asked to read at a time; of more it would leave out the rest.
const READ_AHEAD: usize = 128 << 10;

/// How to mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// The mount point; made if it is missing.
    pub dir: PathBuf,
    /// Whether other users than the node's may use it.
    pub allow_other: bool,
    /// Whether to leave a dead mount of an earlier run at the mount point alone.
    pub skip_unmount: bool,
    /// Who is told of requests.
    pub observers: Observers,
}

/// Why there is no mount.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The mount point cannot be used.
    #[error("mount point {}: {what}", dir.display())]
    Point {
        /// The directory.
        dir: PathBuf,
        /// What is wrong, and what to do.
        what: String,
    },
    /// The system refused to mount.
    #[error("cannot mount at {}: {source}. It takes root, or the setuid program fusermount3 (Debian's package fuse3), and /dev/fuse", dir.display())]
    Mount {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A file system that is mounted.
pub struct Mount {
    dir: PathBuf,
    store: Arc<Store>,
    attached: bool,
    ended: watch::Receiver<bool>,
    crew: Arc<Crew>,
}

impl Mount {
    /// Mounts the store's databases. A dead mount of an earlier run is detached first.
    pub fn start(store: &Arc<Store>, options: &MountOptions) -> Result<Mount, MountError> {
        let dir = points::prepare(&options.dir, options.skip_unmount)?;
        let crew = Crew::new(worker_threads());
        let fs = TenureFs::new(store.clone(), crew.clone(), options.observers.clone());
        let mut config = session_config(options);
        config.n_threads = Some(worker_threads());
        let failed = |source| MountError::Mount {
            dir: dir.clone(),
            source,
        };
        let session = Session::new(fs, &dir, &config).map_err(failed)?;
        let notifier = session.notifier();
        let (tx, ended) = watch::channel(false);
        let serve = move || {
            if let Err(e) = session.run() {
                tracing::error!(error = %e, "the mount ended");
            }
            tx.send_replace(true);
        };
        thread::start("fuse", serve).map_err(failed)?;
        let root = open_root(&dir).map_err(failed)?;
        let device = root.metadata().map_err(failed)?.dev();
        store.set_front(Some(Arc::new(Kernel {
            root,
            device,
            notifier,
        })));
        let locks = dir.join(LOCK_DIR);
        if let Err(e) = mount_locks(store, &locks, options) {
            tracing::warn!(error = %e, "there are no -lock files, so that this node, as a replica, can take no halt locks: {} cannot be mounted", locks.display());
        }
        Ok(Mount {
            dir,
            store: store.clone(),
            attached: true,
            ended,
            crew,
        })
    }

    /// Counts the requests that the kernel has sent so far.
    pub fn requests(&self) -> impl Fn() -> u64 + Send + Sync + 'static {
        let crew = self.crew.clone();
        move || crew.served()
    }

    /// Becomes true when the kernel sends no more requests: somebody unmounted it.
    pub fn ended(&self) -> watch::Receiver<bool> {
        self.ended.clone()
    }

    /// Takes the mount out of the name space. Files that are still open go on being served until
    /// they are closed, or the process ends.
    pub fn detach(&mut self) {
        self.store.set_front(None);
        if !std::mem::take(&mut self.attached) || *self.ended.borrow() {
            return;
        }
        if let Err(e) = points::detach(&self.dir) {
            tracing::warn!(dir = %self.dir.display(), error = %e, "not unmounted");
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.detach();
    }
}

fn session_config(options: &MountOptions) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(FS_NAME.to_owned()),
        MountOption::Subtype(FS_NAME.to_owned()),
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoAtime,
    ];
    config.acl = if options.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config
}

/// Mounts the second file system on a directory of the first, with which it is detached.
fn mount_locks(store: &Arc<Store>, dir: &Path, options: &MountOptions) -> io::Result<()> {
    let session = Session::new(LockFs::new(store.clone()), dir, &session_config(options))?;
    let serve = move || {
        if let Err(e) = session.run() {
            tracing::warn!(error = %e, "the mount of the halt locks ended");
        }
    };
    thread::start("locks", serve).map(drop)
}

/// Enough that those that flush a log leave some that answer.
fn worker_threads() -> usize {
    let cpus = std::thread::available_parallelism().map_or(2, |n| n.get());
    (cpus * 4).clamp(8, 32)
}

fn open_root(dir: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(dir)
}

/// The kernel's side of the mount, as the store uses it.
struct Kernel {
    root: File,
    /// The mount's device number.
    device: u64,
    notifier: Notifier,
}

impl Kernel {
    fn open_to(&self, access: libc::c_int, name: &str) -> io::Result<File> {
        let name = CString::new(name).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: a system call on an open descriptor and a string that outlives it; the result is
        // a new descriptor that nobody else owns.
        unsafe {
            let fd = libc::openat(
                self.root.as_raw_fd(),
                name.as_ptr(),
                access | libc::O_NOFOLLOW | libc::O_CLOEXEC,
            );
            if fd < 0 {
                Err(io::Error::last_os_error())
            } else {
                Ok(File::from_raw_fd(fd))
            }
        }
    }
}

impl Front for Kernel {
    fn open(&self, name: &str) -> io::Result<File> {
        self.open_to(libc::O_RDWR, name)
    }

    fn invalidate_data(&self, ino: u64, offset: u64, len: u64) {
        let (offset, len) = (
            i64::try_from(offset).unwrap_or(0),
            i64::try_from(len).unwrap_or(0),
        );
        // An inode that the kernel does not know has nothing cached.
        if let Err(e) = self.notifier.inval_inode(INodeNo(ino), offset, len) {
            log_unless_unknown(&e, "inode");
        }
    }

    fn store(&self, ino: u64, offset: u64, bytes: &[u8]) {
        if let Err(e) = self.notifier.store(INodeNo(ino), offset, bytes) {
            log_unless_unknown(&e, "inode");
        }
    }

    fn invalidate_entry(&self, name: &str) {
        let name = std::ffi::OsStr::from_bytes(name.as_bytes());
        if let Err(e) = self.notifier.inval_entry(INodeNo::ROOT, name) {
            log_unless_unknown(&e, "entry");
        }
    }

    fn read_ahead(&self, ino: u64, name: &str, range: Range<u64>) {
        // It is gone, or the mount ends.
        let Ok(file) = self.open_to(libc::O_RDONLY, name) else {
            return;
        };
        // What it knows in part it would not read.
        self.invalidate_data(ino, range.start, range.end - range.start);
        for at in range.step_by(READ_AHEAD) {
            // SAFETY: a system call on an open descriptor that touches no memory. What it answers
            // does not matter: it is advice.
            let _ = unsafe {
                libc::posix_fadvise(
                    file.as_raw_fd(),
                    i64::try_from(at).unwrap_or(0),
                    READ_AHEAD as i64,
                    libc::POSIX_FADV_WILLNEED,
                )
            };
        }
    }

    fn lock_holders(&self, inos: &[u64]) -> Option<Holders> {
        let text = fs::read_to_string("/proc/locks").ok()?;
        Some(holders(&text, self.device, inos))
    }
}

/// Of the kernel's list of locks, those on these inodes of a device.
fn holders(list: &str, device: u64, inos: &[u64]) -> Holders {
    let (major, minor) = (libc::major(device), libc::minor(device));
    let files: Vec<String> = inos
        .iter()
        .map(|ino| format!("{major:02x}:{minor:02x}:{ino}"))
        .collect();
    let mut found = Holders::default();
    // 1: POSIX  ADVISORY  WRITE 6294 00:27:9114 1073741824 1073742335; who waits is marked by "->".
    for line in list.lines().filter(|l| !l.contains("->")) {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, kind, _, _, process, file, ..] = fields[..] else {
            continue;
        };
        if !files.iter().any(|f| f == file) {
            continue;
        }
        match (kind, process.parse()) {
            ("POSIX", Ok(process)) => found.processes.push(process),
            ("OFDLCK", _) => found.unknown = true,
            _ => {}
        }
    }
    found
}

fn log_unless_unknown(e: &io::Error, what: &str) {
    if e.kind() != io::ErrorKind::NotFound {
        tracing::debug!(error = %e, "cached {what} not invalidated");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_are_read_from_the_kernels_list() {
        let list = "\
1: POSIX  ADVISORY  WRITE 6294 00:27:9114 1073741824 1073742335
1: -> POSIX  ADVISORY  WRITE 77 00:27:9114 120 120
2: FLOCK  ADVISORY  WRITE 12408 00:27:9114 0 EOF
3: OFDLCK ADVISORY  READ -1 00:27:5 128 128
4: POSIX  ADVISORY  READ 11 fe:00:9114 128 128
5: POSIX  ADVISORY  READ 12 00:27:91 128 128
";
        let device = libc::makedev(0, 0x27);
        let only = |processes: &[u32], unknown| Holders {
            processes: processes.to_vec(),
            unknown,
        };
        assert_eq!(holders(list, device, &[9114]), only(&[6294], false));
        assert_eq!(holders(list, device, &[9114, 91]), only(&[6294, 12], false));
        assert_eq!(holders(list, device, &[5]), only(&[], true));
        assert_eq!(
            holders(list, libc::makedev(0xfe, 0), &[9114]),
            only(&[11], false)
        );
        assert_eq!(holders("", device, &[9114]), only(&[], false));
    }
}
