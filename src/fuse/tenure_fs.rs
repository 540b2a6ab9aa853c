//! What names, handles and flags of the mount stand for in the store.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuser::*;
use parking_lot::Mutex;

use crate::store::{CopiedFile, Database, DbFile, FileKind, Name, Role, Store, StoreError, Way};
use crate::thread;

use super::attr::{self};
use super::copies::Copies;
use super::crew::Crew;
use super::handles::{self, SQLITE};
use super::nodes::{FileNode, Node, Nodes};
use super::observe::{Answer, Observers, Watch};

/// Largest read that is answered at once.
pub(super) const MAX_READ: usize = 1 << 20;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The file system.
pub(super) struct TenureFs {
    pub(super) store: Arc<Store>,
    pub(super) nodes: Arc<Nodes>,
    pub(super) watch: Arc<Watch>,
    pub(super) crew: Arc<Crew>,
    pub(super) copies: Copies,
    /// Whether WAL indexes are passed through to their backing files.
    pub(super) passthrough: AtomicBool,
    /// Whether databases may be, and their WALs.
    pub(super) lanes: AtomicBool,
}

pub(super) fn errno(e: &StoreError) -> Errno {
    Errno::from_i32(e.errno())
}

impl TenureFs {
    pub(super) fn new(store: Arc<Store>, crew: Arc<Crew>, observers: Observers) -> TenureFs {
        let nodes = Arc::new(Nodes::default());
        TenureFs {
            watch: Watch::new(store.clone(), nodes.clone(), observers),
            store,
            nodes,
            crew,
            copies: Copies::default(),
            passthrough: AtomicBool::new(false),
            lanes: AtomicBool::new(false),
        }
    }

    pub(super) fn file_node(db: &Arc<Database>, file: Arc<DbFile>) -> Node {
        Node::File(Arc::new(FileNode {
            db: db.clone(),
            file,
            backing: Mutex::new(None),
        }))
    }

    /// The node of a name, and whether its absence may be cached.
    pub(super) fn find(&self, name: &OsStr) -> Result<Node, bool> {
        let Some(name) = name.to_str() else {
            return Err(true);
        };
        match Name::parse(name) {
            Name::File(kind, db) => {
                let db = self.store.database(db).ok_or(true)?;
                let file = db.file(kind).ok_or(true)?;
                Ok(Self::file_node(&db, file))
            }
            Name::Pos(db) => {
                let db = self
                    .store
                    .database(db)
                    .filter(|d| d.page_count() > 0)
                    .ok_or(false)?;
                Ok(Node::Pos(db))
            }
            Name::SuperJournal(name) => self.store.super_journal(name).map(Node::Super).ok_or(true),
            Name::Primary => attr::primary_text(&self.store)
                .map(|_| Node::Primary)
                .ok_or(false),
            Name::Lag => Ok(Node::Lag),
            Name::Lock(db) => {
                let db = self.store.database(db);
                let db = db.filter(|d| d.page_count() > 0).ok_or(false)?;
                Ok(Node::Lock(db))
            }
            Name::LockDir => Ok(Node::LockDir),
            Name::Invalid => Err(true),
        }
    }

    pub(super) fn make(&self, name: &OsStr) -> Result<Node, Errno> {
        let name = name.to_str().ok_or(Errno::EINVAL)?;
        let made = match Name::parse(name) {
            Name::File(kind, db_name) => {
                let db = match kind {
                    FileKind::Database => self.store.database_or_new(db_name),
                    _ => self
                        .store
                        .database(db_name)
                        .ok_or_else(|| StoreError::NoDatabase(db_name.to_owned())),
                };
                db.and_then(|db| Ok(Self::file_node(&db, db.create(kind, false)?)))
            }
            Name::SuperJournal(name) => self.store.create_super_journal(name).map(Node::Super),
            Name::Invalid => return Err(Errno::EINVAL),
            _ => return Err(Errno::EPERM),
        };
        made.map_err(|e| errno(&e))
    }

    pub(super) fn may_open(&self, node: &Node, flags: i32) -> Result<(), Errno> {
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
        match node {
            // SQLite then takes the database for read-only and says so. The database itself can be
            // opened for writing: a connection of a replica goes on once the node is primary.
            Node::File(f)
                if writes
                    && f.file.kind == FileKind::Wal
                    && self.store.role() != Role::Primary
                    && !f.db.holds_halt() =>
            {
                Err(Errno::EACCES)
            }
            // By a name that is another file's by now, or nobody's: the kernel looks it up again.
            Node::File(f) if f.file.is_deleted() => Err(Errno::ESTALE),
            Node::File(f) if f.db.broken().is_some() => Err(Errno::EIO),
            Node::File(_) | Node::Super(_) => Ok(()),
            _ if writes => Err(Errno::EACCES),
            _ => Ok(()),
        }
    }

    pub(super) fn may_write(
        f: &FileNode,
        flags: WriteFlags,
        thread: u32,
    ) -> Result<(), StoreError> {
        if flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
            return f.db.check_mapped_write(&f.file);
        }
        f.db.check_caller(&f.file, thread)
    }

    /// Anybody may drop a database; its other files are SQLite's.
    pub(super) fn may_unlink(
        db: &Arc<Database>,
        kind: FileKind,
        thread: u32,
    ) -> Result<(), StoreError> {
        match db.file(kind).filter(|_| kind != FileKind::Database) {
            Some(file) => db.check_caller(&file, thread),
            None => Ok(()),
        }
    }

    /// The handle of a file that is opened to copy a database into it; 0 for all others.
    pub(super) fn copy_handle(&self, node: &Node, flags: i32, made: bool) -> Result<u64, Errno> {
        let Node::File(f) = node else { return Ok(0) };
        if flags & libc::O_ACCMODE != libc::O_WRONLY {
            return Ok(0);
        }
        if f.file.kind != FileKind::Database {
            f.file.begin_copy();
            return Ok(0);
        }
        if !self.store.is_writable() {
            return Err(Errno::EACCES);
        }
        let copy = CopiedFile::new(&self.store, &f.db, &f.file, made);
        self.copies.begin(copy).ok_or(Errno::EMFILE)
    }

    /// Databases are passed through if that is wanted, and can be done.
    pub(super) fn decide_lanes(&self) {
        if !self.store.passes_through() {
            return;
        }
        let problem = match self.passthrough.load(Ordering::Acquire) {
            true => self.store.cannot_pass_through(),
            false => Some(
                "the kernel (Linux 6.9 and later) passes files through for root alone".to_owned(),
            ),
        };
        match problem {
            None => {
                tracing::warn!("fuse.wal-capture: tail is experimental: see SEMANTICS.md, 13");
                self.lanes.store(true, Ordering::Release);
            }
            Some(problem) => {
                tracing::warn!("fuse.wal-capture: tail cannot be had, it is gate: {problem}");
            }
        }
    }

    /// Counts a handle that is opened, and says what it is and how the kernel is to treat it. `copy`
    /// is the handle of a copy, if it is one. `open` makes the kernel's handle of the backing file, if
    /// the file is passed through.
    pub(super) fn open_way(
        &self,
        node: &Node,
        flags: i32,
        caller: u32,
        copy: FileHandle,
        open: impl FnOnce(BorrowedFd<'_>) -> io::Result<BackingId>,
    ) -> Result<(FileHandle, FopenFlags, Option<Arc<BackingId>>), Errno> {
        let (fh, by_requests) = match copy.0 {
            0 => handles::of(node, flags),
            // Not cached, or others would see what is not imported yet, and flushed.
            _ => (copy, FopenFlags::FOPEN_DIRECT_IO),
        };
        let Node::File(f) = node else {
            return Ok((fh, by_requests, None));
        };
        let writes_only = flags & libc::O_ACCMODE == libc::O_WRONLY;
        match f.file.kind {
            FileKind::Journal => Ok((fh, by_requests, None)),
            FileKind::Shm if !self.passthrough.load(Ordering::Acquire) => {
                Ok((fh, by_requests, None))
            }
            FileKind::Shm => match Self::backing(f, open) {
                Ok(id) => Ok((SQLITE, FopenFlags::FOPEN_NOFLUSH, Some(id))),
                Err(e) => {
                    tracing::info!(error = %e, "WAL indexes are not passed through: reads in WAL mode cost a little more");
                    self.passthrough.store(false, Ordering::Release);
                    Ok((fh, by_requests, None))
                }
            },
            FileKind::Database | FileKind::Wal => {
                let may_begin =
                    self.lanes.load(Ordering::Acquire) && !writes_only && !is_own_thread(caller);
                match f.db.open_handle(&f.file, may_begin) {
                    Way::Requests { stale: false } => Ok((fh, by_requests, None)),
                    Way::Requests { stale: true } => {
                        Ok((fh, by_requests - FopenFlags::FOPEN_KEEP_CACHE, None))
                    }
                    Way::Through => {
                        let id = Self::backing(f, open).map_err(|e| {
                            tracing::warn!(error = %e, "databases are not passed through any more: their writes take longer");
                            self.lanes.store(false, Ordering::Release);
                            f.db.close_handle(&f.file);
                            Errno::EIO
                        })?;
                        // Copies come by requests all the same.
                        let flags = match (copy.0, writes_only) {
                            (0, false) => FopenFlags::FOPEN_NOFLUSH,
                            (0, true) => FopenFlags::FOPEN_NOFLUSH | FopenFlags::FOPEN_DIRECT_IO,
                            _ => FopenFlags::FOPEN_DIRECT_IO,
                        };
                        Ok((copy, flags, Some(id)))
                    }
                }
            }
        }
    }

    /// The kernel's handle of a file's backing file: one for all that have it open.
    fn backing(
        f: &FileNode,
        open: impl FnOnce(BorrowedFd<'_>) -> io::Result<BackingId>,
    ) -> io::Result<Arc<BackingId>> {
        let mut backing = f.backing.lock();
        if let Some(id) = &*backing {
            return Ok(id.clone());
        }
        let id = Arc::new(open(f.file.file.descriptor()?)?);
        *backing = Some(id.clone());
        Ok(id)
    }

    /// An answer to a write that went past the kernel's cache: given once the cache holds nothing of
    /// these bytes any more that others have read meanwhile.
    pub(super) fn uncached(
        &self,
        ino: u64,
        offset: u64,
        len: u64,
        answer: impl FnOnce(Result<(), StoreError>) + Send + 'static,
    ) -> impl FnOnce(Result<(), StoreError>) + Send + 'static {
        let store = self.store.clone();
        move |r| match r {
            // It waits for reads under way, which the threads that serve requests have to answer.
            Ok(()) => on_a_thread(move || {
                store.forget_cached(ino, offset, len);
                answer(Ok(()));
            }),
            Err(_) => answer(r),
        }
    }

    /// An answer to the removal of a database, whose other files go with it: given once the kernel
    /// asks anew whether they are there. Otherwise SQLite finds, in a database that is made again at
    /// once, the WAL of the old one, and cannot remove it. (That their names are gone the kernel
    /// can be told only later: until the answer it holds the directory.)
    pub(super) fn with_its_files(
        &self,
        db: &Arc<Database>,
        answer: impl FnOnce(Result<(), StoreError>) + Send + 'static,
    ) -> impl FnOnce(Result<(), StoreError>) + Send + 'static {
        let kinds = [FileKind::Journal, FileKind::Wal, FileKind::Shm];
        let inos: Vec<u64> = kinds
            .iter()
            .filter_map(|k| Some(db.file(*k)?.ino))
            .collect();
        let store = self.store.clone();
        move |r| {
            on_a_thread(move || {
                inos.iter().for_each(|ino| store.forget_cached(*ino, 0, 0));
                answer(r);
            })
        }
    }

    pub(super) fn read_made_up(text: &str, offset: u64, size: u32, reply: Answer<ReplyData>) {
        let bytes = text.as_bytes();
        let start = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let end = start.saturating_add(size as usize).min(bytes.len());
        reply.data(&bytes[start..end]);
    }

    pub(super) fn with_buffer(size: usize, read: impl FnOnce(&mut [u8])) {
        BUFFER.with_borrow_mut(|b| {
            if b.len() < size {
                b.resize(size, 0);
            }
            read(&mut b[..size]);
        });
    }
}

/// Whether it is one of this process's.
fn is_own_thread(thread: u32) -> bool {
    std::path::Path::new(&format!("/proc/self/task/{thread}")).exists()
}

pub(super) fn answer(
    reply: Answer<ReplyEmpty>,
) -> impl FnOnce(Result<(), StoreError>) + Send + 'static {
    move |r| match r {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(&e)),
    }
}

/// Runs what may wait for long. Dropped unrun, a reply is an error.
pub(super) fn on_a_thread(work: impl FnOnce() + Send + 'static) {
    if let Err(e) = thread::start("request", work) {
        tracing::warn!(error = %e, "no thread for a request, which fails: a copy into the mount, a write past the cache, or a removal");
    }
}
