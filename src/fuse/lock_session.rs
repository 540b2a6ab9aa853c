//! The second file system: one file `X-lock` a database, whose byte 72 is the halt lock.
//!
//! It is a mount of its own, at the directory `.lock` of the main one, because it asks for
//! `FUSE_POSIX_LOCKS`: here the node must see locks, there they stay in the kernel. The main mount's
//! `X-lock` are links to these files.
//!
//! Rules:
//! - A lock belongs to the open file description, whatever process asks: it goes with an unlock or
//!   with the description's last close (RELEASE, which comes for a killed process too). What a
//!   process does to an inherited descriptor by closing it does not matter: FLUSH is not asked for.
//! - Who waits does so on a thread of its own, and is answered by [`HALT_WAIT`] at the latest, or as
//!   soon as a signal is pending for it: fuser does not pass the kernel's interrupts on.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, UNIX_EPOCH};

use fuser::*;
use parking_lot::Mutex;

use crate::store::{Database, HALT_WAIT, Name, Role, Store, StoreError};
use crate::thread;

use super::nodes::ROOT;

/// The byte that is the halt lock.
const HALT_BYTE: u64 = 72;
/// How many may wait for halt locks at a time.
const MAX_WAITING: usize = 64;

/// The file system.
pub(super) struct LockFs {
    store: Arc<Store>,
    next_handle: AtomicU64,
    shared: Arc<Shared>,
}

/// What the waiting threads share with the file system.
#[derive(Default)]
struct Shared {
    handles: Mutex<HashMap<u64, Handle>>,
    waiting: AtomicUsize,
}

/// An open file description.
struct Handle {
    db: Arc<Database>,
    /// The halt lock that was taken through it.
    lock: Option<i64>,
}

impl LockFs {
    pub fn new(store: Arc<Store>) -> LockFs {
        LockFs {
            store,
            next_handle: AtomicU64::new(1),
            shared: Arc::default(),
        }
    }

    fn database(&self, ino: INodeNo) -> Option<Arc<Database>> {
        self.store
            .databases()
            .into_iter()
            .find(|db| db.lock_ino == ino.0)
    }
}

fn attributes(ino: u64) -> FileAttr {
    let root = ino == ROOT;
    FileAttr {
        ino: INodeNo(ino),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if root {
            FileType::Directory
        } else {
            FileType::RegularFile
        },
        perm: if root { 0o777 } else { 0o666 },
        nlink: 1,
        // SAFETY: these two system calls cannot fail and touch no memory.
        uid: unsafe { libc::geteuid() },
        // SAFETY: as above.
        gid: unsafe { libc::getegid() },
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Shared {
    /// Takes the halt lock for a handle; an error number if it is not to be had.
    fn take(&self, handle: u64, store: &Store, thread: u32) -> Result<(), Errno> {
        let db = match self.handles.lock().get(&handle) {
            Some(Handle { lock: Some(_), .. }) => return Ok(()),
            Some(handle) => handle.db.clone(),
            None => return Err(Errno::EBADF),
        };
        if store.role() == Role::Primary {
            return Ok(());
        }
        let cancelled = || has_signal(thread);
        let id = db.take_halt(Instant::now() + HALT_WAIT, &cancelled);
        let id = id.map_err(|e| {
            let interrupted = cancelled();
            tracing::info!(db = db.name(), error = %e, interrupted, "the halt lock was not taken");
            match e {
                _ if interrupted => Errno::EINTR,
                StoreError::HaltLock { .. } => Errno::EAGAIN,
                e => Errno::from_i32(e.errno()),
            }
        })?;
        let kept = match self.handles.lock().get_mut(&handle) {
            Some(handle) if handle.lock.is_none() => {
                handle.lock = Some(id);
                true
            }
            _ => false,
        };
        if !kept {
            db.release_halt(id);
        }
        Ok(())
    }

    fn release(&self, handle: u64) {
        let lock = self
            .handles
            .lock()
            .get_mut(&handle)
            .and_then(|handle| Some((handle.db.clone(), handle.lock.take()?)));
        if let Some((db, id)) = lock {
            db.release_halt(id);
        }
    }
}

/// Runs `work` on a thread of its own; not at all if there are too many.
fn apart(shared: &Arc<Shared>, work: impl FnOnce(&Shared) + Send + 'static) -> bool {
    if shared.waiting.fetch_add(1, Ordering::AcqRel) >= MAX_WAITING {
        shared.waiting.fetch_sub(1, Ordering::AcqRel);
        return false;
    }
    let inner = shared.clone();
    let run = move || {
        work(&inner);
        inner.waiting.fetch_sub(1, Ordering::AcqRel);
    };
    let started = thread::start("halt", run);
    if started.is_err() {
        shared.waiting.fetch_sub(1, Ordering::AcqRel);
    }
    started.is_ok()
}

/// Whether a signal that it does not block is pending for a thread, or the thread is gone.
fn has_signal(thread: u32) -> bool {
    if thread == 0 {
        // Of another process name space: unknown.
        return false;
    }
    let Ok(status) = std::fs::read_to_string(format!("/proc/{thread}/status")) else {
        return true;
    };
    let mask = |field: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(field));
        line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
            .unwrap_or(0)
    };
    (mask("SigPnd:") | mask("ShdPnd:")) & !mask("SigBlk:") != 0
}

impl Filesystem for LockFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        config
            .add_capabilities(InitFlags::FUSE_POSIX_LOCKS)
            .map_err(|_| io::Error::other("the kernel has no FUSE_POSIX_LOCKS"))
    }

    fn lookup(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let db = match name.to_str().map(Name::parse) {
            Some(Name::Lock(db)) => self.store.database(db).filter(|d| d.page_count() > 0),
            _ => None,
        };
        match db {
            Some(db) => reply.entry(&Duration::ZERO, &attributes(db.lock_ino), Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        if ino.0 == ROOT || self.database(ino).is_some() {
            reply.attr(&Duration::ZERO, &attributes(ino.0));
        } else {
            reply.error(Errno::ESTALE);
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let Some(db) = self.database(ino) else {
            return reply.error(Errno::ESTALE);
        };
        let handle = self.next_handle.fetch_add(1, Ordering::Relaxed);
        let entry = Handle { db, lock: None };
        self.shared.handles.lock().insert(handle, entry);
        let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH;
        reply.opened(FileHandle(handle), flags);
    }

    fn setlk(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _lock_owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        _pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let unlock = typ == libc::F_UNLCK;
        if unlock && (start..=end).contains(&HALT_BYTE) {
            // The answer comes when open transactions are cleared away. Without a thread to do so
            // the lock goes with the last close; the reply, dropped, says EIO.
            let work = move |shared: &Shared| {
                shared.release(fh.0);
                reply.ok();
            };
            apart(&self.shared, work);
            return;
        }
        if unlock {
            return reply.ok();
        }
        if (start, end) != (HALT_BYTE, HALT_BYTE) || typ != libc::F_WRLCK {
            return reply.error(Errno::EINVAL);
        }
        if !sleep {
            return reply.error(Errno::ENOSYS);
        }
        let (store, thread) = (self.store.clone(), req.pid());
        let reply = Arc::new(Mutex::new(Some(reply)));
        let answer = reply.clone();
        let work = move |shared: &Shared| {
            let taken = shared.take(fh.0, &store, thread);
            match (answer.lock().take(), taken) {
                (Some(reply), Ok(())) => reply.ok(),
                (Some(reply), Err(e)) => reply.error(e),
                (None, _) => {}
            }
        };
        if !apart(&self.shared, work)
            && let Some(reply) = reply.lock().take()
        {
            reply.error(Errno::EAGAIN);
        }
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
        let handle = self.shared.handles.lock().remove(&fh.0);
        let Some(Handle { db, lock: Some(id) }) = handle else {
            return;
        };
        let spare = db.clone();
        if !apart(&self.shared, move |_| db.release_halt(id)) {
            spare.release_halt(id);
        }
    }

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn readdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        reply: ReplyDirectory,
    ) {
        // The files are found by those who know their names.
        reply.ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pending_signal_is_seen() {
        // SAFETY: takes no arguments and cannot fail.
        let thread = unsafe { libc::gettid() } as u32;
        assert!(!has_signal(thread));
        assert!(!has_signal(0));
        assert!(has_signal(u32::MAX >> 2), "a thread that is gone");
    }
}
