//! SQLite's lock bytes, and byte-range locks on them.
//!
//! The locks are open file description locks: they belong to the description that `fd` refers to,
//! conflict with SQLite's POSIX locks like those of any other process (those of this very process
//! included), and go when the last descriptor of the description is closed. Two locks on one
//! description never conflict: the later one replaces the earlier, so each holder in this process
//! needs a description of its own.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use crate::clock;

/// Database file: held while a writer waits for readers to go; keeps new ones out. It is at 1 GiB,
/// in the page that no database uses.
pub const PENDING_BYTE: u64 = 0x4000_0000;
/// Database file: held by the one connection that has begun to write.
pub const RESERVED_BYTE: u64 = PENDING_BYTE + 1;
/// Database file: the first of the bytes that readers lock shared and a committing writer
/// exclusively.
pub const SHARED_FIRST: u64 = PENDING_BYTE + 2;
/// How many bytes there are from [`SHARED_FIRST`] on.
pub const SHARED_SIZE: u64 = 510;

/// Shared-memory file: held exclusively by the one writer of the WAL.
pub const WAL_WRITE_LOCK: u64 = 120;
/// Shared-memory file: held exclusively by the one checkpointer.
pub const WAL_CKPT_LOCK: u64 = 121;
/// Shared-memory file: held exclusively by a connection that recovers the index.
pub const WAL_RECOVER_LOCK: u64 = 122;
/// How many read locks the shared-memory file has.
pub const WAL_READ_LOCKS: u64 = 5;
/// Shared-memory file: held shared by every connection that has it open; exclusively by one that
/// is about to truncate it, being the first.
pub const WAL_DMS: u64 = 128;

/// Shared-memory file: the byte of read mark `i`, from 0 to 4. Mark 0 is that of readers that read
/// nothing from the WAL.
#[must_use]
pub const fn wal_read_lock(i: u64) -> u64 {
    assert!(i < WAL_READ_LOCKS, "SQLite has five read marks");
    123 + i
}

/// What a lock permits others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockKind {
    /// Others may hold it shared too. The descriptor must be open for reading.
    Shared,
    /// Nobody else may hold it. The descriptor must be open for writing.
    Exclusive,
}

/// First pause of [`lock_until`].
const FIRST_PAUSE: Duration = Duration::from_micros(50);
/// Longest pause of [`lock_until`].
const LONGEST_PAUSE: Duration = Duration::from_millis(2);

/// Takes a lock on `len` bytes (at least one) from `start` on without waiting, or turns the one
/// that this description has there into `kind`. `Ok(false)`: another one holds it, and nothing has
/// changed.
pub fn try_lock(fd: BorrowedFd<'_>, kind: LockKind, start: u64, len: u64) -> io::Result<bool> {
    let kind = match kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Exclusive => libc::F_WRLCK,
    };
    match set_lock(fd, kind, start, len) {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Gives up whatever this description has locked of the `len` bytes (at least one) from `start` on.
pub fn unlock(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<()> {
    set_lock(fd, libc::F_UNLCK, start, len)
}

/// The process that keeps this description from locking the range exclusively, if one does and the
/// kernel knows it: locks of other open file descriptions have no process.
pub fn holder(fd: BorrowedFd<'_>, start: u64, len: u64) -> Option<i32> {
    let found = conflict(fd, start, len).ok()??;
    (found.l_pid > 0).then_some(found.l_pid)
}

/// Whether nobody else has a lock in the range, of whichever kind.
pub fn is_free(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<bool> {
    Ok(conflict(fd, start, len)?.is_none())
}

/// A lock that keeps this description from locking the range exclusively.
fn conflict(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<Option<libc::flock>> {
    let mut range = range_of(libc::F_WRLCK, start, len)?;
    // SAFETY: `fd` is open for as long as it is borrowed, and `range` is a whole `flock` that
    // outlives the call, which fills it.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &mut range) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((range.l_type != libc::F_UNLCK as libc::c_short).then_some(range))
}

/// As [`try_lock`], but tries again until `deadline` (at least once, and once more at its end),
/// with pauses from 50 µs doubling up to 2 ms. `Ok(false)`: it was held by others until then.
///
/// It tries rather than waits in the kernel because that wait has no deadline of its own.
pub fn lock_until(
    fd: BorrowedFd<'_>,
    kind: LockKind,
    start: u64,
    len: u64,
    deadline: Instant,
) -> io::Result<bool> {
    let mut pause = FIRST_PAUSE;
    loop {
        if try_lock(fd, kind, start, len)? {
            return Ok(true);
        }
        let left = deadline.saturating_duration_since(clock::now());
        if left.is_zero() {
            return Ok(false);
        }
        clock::pause(pause.min(left));
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// A lock that is given up when the guard is dropped: the whole range, whatever its kind is then.
#[derive(Debug)]
#[must_use = "the lock is given up when its guard is dropped"]
pub struct LockGuard<'a> {
    fd: BorrowedFd<'a>,
    start: u64,
    len: u64,
}

impl<'a> LockGuard<'a> {
    /// Takes a lock as [`lock_until`] does; `None`: it was held by others until the deadline.
    pub fn acquire(
        fd: BorrowedFd<'a>,
        kind: LockKind,
        start: u64,
        len: u64,
        deadline: Instant,
    ) -> io::Result<Option<Self>> {
        Ok(lock_until(fd, kind, start, len, deadline)?.then_some(Self { fd, start, len }))
    }
}

impl Drop for LockGuard<'_> {
    fn drop(&mut self) {
        // Giving up a range of an open descriptor has no way to fail that the holder could act on;
        // the lock goes with the description at the latest.
        let _ = unlock(self.fd, self.start, self.len);
    }
}

fn set_lock(fd: BorrowedFd<'_>, kind: libc::c_int, start: u64, len: u64) -> io::Result<()> {
    let range = range_of(kind, start, len)?;
    loop {
        // SAFETY: `fd` is open for as long as it is borrowed, and `range` is a whole `flock` that
        // outlives the call, which only reads it.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &range) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn range_of(kind: libc::c_int, start: u64, len: u64) -> io::Result<libc::flock> {
    // A length of zero means "to the end of the file and beyond" to the kernel; nobody here does.
    if len == 0 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a lock on no bytes",
        ));
    }
    let out_of_range = |_| io::Error::new(io::ErrorKind::InvalidInput, "a lock beyond 2^63 bytes");
    // The kernel's ABI has these as 16-bit numbers; all of libc's constants fit.
    Ok(libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start.try_into().map_err(out_of_range)?,
        l_len: len.try_into().map_err(out_of_range)?,
        l_pid: 0, // must be zero for open file description locks
    })
}
