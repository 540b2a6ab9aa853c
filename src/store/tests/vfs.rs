//! SQLite's view of a store without a mount: a VFS whose files are the store's.
//!
//! Locks are real ones, on descriptors of the backing files, in the order of SQLite's own "unix"
//! VFS; the WAL index is a shared mapping of its backing file. So several connections of a test,
//! and the node itself when it applies transactions, meet as they do through a mount.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::TryRecvError;
use std::time::Duration;

use parking_lot::Mutex;
use rusqlite::ffi;

use crate::clock;
use crate::sim::process;
use crate::sqlite::locks::{self, LockKind};
use crate::sqlite::wal_index::REGION_SIZE;
use crate::store::{Database, DbFile, Done, FileKind, Name, Role, Store, StoreError, SuperJournal};

/// How long an operation may take to be answered.
const ANSWER: Duration = Duration::from_secs(20);

/// Waits for the answer of an operation.
pub(in crate::store) fn wait(operation: impl FnOnce(Done)) -> Result<(), StoreError> {
    let (tx, rx) = std::sync::mpsc::channel();
    operation(Box::new(move |r| tx.send(r).expect("somebody waits")));
    if process::in_coroutine() {
        return loop {
            match rx.try_recv() {
                Ok(answer) => break answer,
                Err(TryRecvError::Empty) => clock::pause(Duration::from_millis(1)),
                Err(TryRecvError::Disconnected) => panic!("every operation is answered"),
            }
        };
    }
    rx.recv_timeout(ANSWER)
        .expect("every operation is answered")
}

/// What SQLite's calls find behind the VFS.
struct Shared {
    store: Arc<Store>,
    /// Errors that the store answered with.
    errors: Mutex<Vec<String>>,
}

/// A registered VFS. All connections must be closed, or forgotten, before it goes.
pub(crate) struct Vfs {
    pub name: CString,
    raw: Box<ffi::sqlite3_vfs>,
    shared: Arc<Shared>,
}

// SAFETY: the raw structure is registered with SQLite, which takes it for shared by threads, and
// nothing changes it until `drop`.
unsafe impl Send for Vfs {}
// SAFETY: as above.
unsafe impl Sync for Vfs {}

impl Vfs {
    pub fn register(store: &Arc<Store>) -> Vfs {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = CString::new(format!("store-{number}")).unwrap();
        let shared = Arc::new(Shared {
            store: store.clone(),
            errors: Mutex::default(),
        });
        // SAFETY: the default VFS is never unregistered, and its structure can be copied: all but
        // the fields that are set here is its functions for time, sleep and randomness.
        let mut raw = Box::new(unsafe {
            ffi::sqlite3_initialize();
            *ffi::sqlite3_vfs_find(std::ptr::null())
        });
        raw.szOsFile = size_of::<RawFile>() as c_int;
        raw.pNext = std::ptr::null_mut();
        raw.zName = name.as_ptr();
        raw.pAppData = Arc::as_ptr(&shared).cast_mut().cast();
        raw.xOpen = Some(x_open);
        raw.xDelete = Some(x_delete);
        raw.xAccess = Some(x_access);
        raw.xFullPathname = Some(x_full_pathname);
        // SAFETY: `raw` is boxed and lives until it is unregistered in `drop`.
        assert_eq!(unsafe { ffi::sqlite3_vfs_register(&mut *raw, 0) }, 0);
        Vfs { name, raw, shared }
    }

    /// What the store refused since the last call.
    pub fn take_errors(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.errors.lock())
    }
}

impl Drop for Vfs {
    fn drop(&mut self) {
        // SAFETY: registered by `register`, and no connection uses it any more.
        unsafe { ffi::sqlite3_vfs_unregister(&mut *self.raw) };
        if Arc::strong_count(&self.shared) > 1 {
            // Connections that were left as a killed process leaves them still refer to it.
            std::mem::forget(self.shared.clone());
        }
    }
}

impl Shared {
    /// The result code of an operation of the store.
    fn code(&self, r: Result<(), StoreError>, otherwise: c_int) -> c_int {
        match r {
            Ok(()) => ffi::SQLITE_OK,
            Err(e) => {
                let full = e.errno() == libc::ENOSPC;
                self.errors.lock().push(e.to_string());
                if full { ffi::SQLITE_FULL } else { otherwise }
            }
        }
    }

    /// The existing file of a path as the VFS makes them.
    fn find(&self, name: &str) -> Option<Target> {
        match Name::parse(name) {
            Name::File(kind, db) => {
                let db = self.store.database(db)?;
                let file = db.file(kind)?;
                Some(Target::File(db, file))
            }
            Name::SuperJournal(name) => self.store.super_journal(name).map(Target::Super),
            _ => None,
        }
    }

    fn make(&self, name: &str) -> Result<Target, StoreError> {
        match Name::parse(name) {
            Name::File(kind, db_name) => {
                let db = match kind {
                    FileKind::Database => self.store.database_or_new(db_name)?,
                    _ => self
                        .store
                        .database(db_name)
                        .ok_or_else(|| StoreError::NoDatabase(db_name.to_owned()))?,
                };
                let file = db.create(kind, false)?;
                Ok(Target::File(db, file))
            }
            Name::SuperJournal(name) => self.store.create_super_journal(name).map(Target::Super),
            _ => Err(StoreError::Name(name.to_owned())),
        }
    }
}

enum Target {
    File(Arc<Database>, Arc<DbFile>),
    Super(Arc<SuperJournal>),
    Temporary(File),
}

/// The WAL index of one connection.
struct Index {
    file: Arc<DbFile>,
    /// A description of its own, which its locks belong to.
    locks: File,
    maps: Vec<*mut c_void>,
}

impl Drop for Index {
    fn drop(&mut self) {
        for map in &self.maps {
            // SAFETY: mapped by `x_shm_map` with this size; SQLite is done with it.
            unsafe { libc::munmap(*map, REGION_SIZE) };
        }
    }
}

/// An open file.
struct Open {
    shared: Arc<Shared>,
    target: Target,
    /// A description of its own of a database's backing file, which its locks belong to.
    locks: Option<File>,
    level: c_int,
    index: Option<Index>,
}

#[repr(C)]
struct RawFile {
    base: ffi::sqlite3_file,
    open: *mut Open,
}

static METHODS: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    iVersion: 2,
    xClose: Some(x_close),
    xRead: Some(x_read),
    xWrite: Some(x_write),
    xTruncate: Some(x_truncate),
    xSync: Some(x_sync),
    xFileSize: Some(x_file_size),
    xLock: Some(x_lock),
    xUnlock: Some(x_unlock),
    xCheckReservedLock: Some(x_check_reserved_lock),
    xFileControl: Some(x_file_control),
    xSectorSize: Some(x_sector_size),
    xDeviceCharacteristics: Some(x_device_characteristics),
    xShmMap: Some(x_shm_map),
    xShmLock: Some(x_shm_lock),
    xShmBarrier: Some(x_shm_barrier),
    xShmUnmap: Some(x_shm_unmap),
    xFetch: None,
    xUnfetch: None,
};

/// The value behind a file that SQLite passes.
fn opened<'a>(file: *mut ffi::sqlite3_file) -> &'a mut Open {
    // SAFETY: SQLite passes files that `x_open` filled and `x_close` has not yet emptied, one call
    // at a time for each.
    unsafe { &mut *(*file.cast::<RawFile>()).open }
}

fn shared_of(vfs: *mut ffi::sqlite3_vfs) -> Arc<Shared> {
    // SAFETY: `Vfs::register` put the pointer of a live `Arc` there.
    unsafe {
        let shared = (*vfs).pAppData.cast::<Shared>().cast_const();
        Arc::increment_strong_count(shared);
        Arc::from_raw(shared)
    }
}

fn file_name<'a>(name: *const c_char) -> &'a str {
    // SAFETY: SQLite passes paths that end in a zero byte and outlive the call.
    let name = unsafe { CStr::from_ptr(name) };
    name.to_str()
        .expect("a name of a test")
        .trim_start_matches('/')
}

unsafe extern "C" fn x_open(
    vfs: *mut ffi::sqlite3_vfs,
    name: ffi::sqlite3_filename,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    let raw = file.cast::<RawFile>();
    // SAFETY: SQLite passes room for `szOsFile` bytes; without methods nothing needs to be closed.
    unsafe { (*raw).base.pMethods = std::ptr::null() };
    let shared = shared_of(vfs);
    let mut flags = flags;
    let target = if name.is_null() {
        Target::Temporary(tempfile::tempfile().expect("room for a temporary file"))
    } else {
        let name = file_name(name);
        let wal = matches!(Name::parse(name), Name::File(FileKind::Wal, _));
        if wal && shared.store.role() != Role::Primary {
            // As the mount answers, and SQLite's "unix" VFS goes on from there.
            flags = flags & !ffi::SQLITE_OPEN_READWRITE | ffi::SQLITE_OPEN_READONLY;
        }
        let found = shared.find(name).ok_or(());
        let create = flags & ffi::SQLITE_OPEN_CREATE != 0;
        match found.or_else(|()| {
            if create {
                shared.make(name).map_err(drop)
            } else {
                Err(())
            }
        }) {
            Ok(target) => target,
            Err(()) => return ffi::SQLITE_CANTOPEN,
        }
    };
    let locks = match &target {
        Target::File(db, f) if f.kind == FileKind::Database => {
            let path = db.path(FileKind::Database);
            match File::options().read(true).write(true).open(path) {
                Ok(locks) => Some(locks),
                Err(_) => return ffi::SQLITE_CANTOPEN,
            }
        }
        _ => None,
    };
    let open = Box::new(Open {
        shared,
        target,
        locks,
        level: ffi::SQLITE_LOCK_NONE,
        index: None,
    });
    // SAFETY: as above; `out_flags` is null or room for an integer.
    unsafe {
        (*raw).open = Box::into_raw(open);
        (*raw).base.pMethods = &METHODS;
        if !out_flags.is_null() {
            *out_flags = flags;
        }
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn x_close(file: *mut ffi::sqlite3_file) -> c_int {
    let raw = file.cast::<RawFile>();
    // SAFETY: `x_open` made it out of a box, and SQLite closes a file once.
    unsafe {
        drop(Box::from_raw((*raw).open));
        (*raw).open = std::ptr::null_mut();
        (*raw).base.pMethods = std::ptr::null();
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn x_read(
    file: *mut ffi::sqlite3_file,
    buf: *mut c_void,
    amount: c_int,
    offset: ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: SQLite passes room for `amount` bytes.
    let buf = unsafe { std::slice::from_raw_parts_mut(buf.cast::<u8>(), amount as usize) };
    let open = opened(file);
    let read = match &open.target {
        Target::File(db, f) => match db.read(f, offset as u64, buf) {
            Ok(n) => n,
            Err(e) => return open.shared.code(Err(e), ffi::SQLITE_IOERR_READ),
        },
        Target::Super(j) => j.read(offset as u64, buf),
        Target::Temporary(f) => f.read_at(buf, offset as u64).expect("a temporary file"),
    };
    buf[read..].fill(0);
    if read < buf.len() {
        return ffi::SQLITE_IOERR_SHORT_READ;
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn x_write(
    file: *mut ffi::sqlite3_file,
    data: *const c_void,
    amount: c_int,
    offset: ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: SQLite passes `amount` bytes.
    let data = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), amount as usize) };
    let (open, offset) = (opened(file), offset as u64);
    match &open.target {
        Target::File(db, f) => {
            let r = wait(|done| db.write(f, offset, data, done));
            open.shared.code(r, ffi::SQLITE_IOERR_WRITE)
        }
        Target::Super(j) if j.write(offset, data) => ffi::SQLITE_OK,
        Target::Super(_) => ffi::SQLITE_IOERR_WRITE,
        Target::Temporary(f) => {
            f.write_all_at(data, offset).expect("a temporary file");
            ffi::SQLITE_OK
        }
    }
}

unsafe extern "C" fn x_truncate(file: *mut ffi::sqlite3_file, size: ffi::sqlite3_int64) -> c_int {
    let (open, size) = (opened(file), size as u64);
    match &open.target {
        Target::File(db, f) => {
            let r = wait(|done| db.truncate(f, size, done));
            open.shared.code(r, ffi::SQLITE_IOERR_TRUNCATE)
        }
        Target::Super(j) if j.truncate(size) => ffi::SQLITE_OK,
        Target::Super(_) => ffi::SQLITE_IOERR_TRUNCATE,
        Target::Temporary(f) => {
            f.set_len(size).expect("a temporary file");
            ffi::SQLITE_OK
        }
    }
}

unsafe extern "C" fn x_sync(file: *mut ffi::sqlite3_file, _flags: c_int) -> c_int {
    let open = opened(file);
    match &open.target {
        Target::File(db, f) => {
            let r = wait(|done| db.sync(f, done));
            open.shared.code(r, ffi::SQLITE_IOERR_FSYNC)
        }
        _ => ffi::SQLITE_OK,
    }
}

unsafe extern "C" fn x_file_size(
    file: *mut ffi::sqlite3_file,
    size: *mut ffi::sqlite3_int64,
) -> c_int {
    let open = opened(file);
    let found = match &open.target {
        Target::File(db, f) => match db.size(f) {
            Ok(size) => size,
            Err(e) => return open.shared.code(Err(e), ffi::SQLITE_IOERR_FSTAT),
        },
        Target::Super(j) => j.size(),
        Target::Temporary(f) => f.metadata().expect("a temporary file").len(),
    };
    // SAFETY: SQLite passes room for it.
    unsafe { *size = found as ffi::sqlite3_int64 };
    ffi::SQLITE_OK
}

fn set(file: &File, kind: LockKind, start: u64, len: u64) -> bool {
    locks::try_lock(file.as_fd(), kind, start, len).expect("a lock")
}

fn unset(file: &File, start: u64, len: u64) {
    locks::unlock(file.as_fd(), start, len).expect("a lock given up");
}

unsafe extern "C" fn x_lock(file: *mut ffi::sqlite3_file, level: c_int) -> c_int {
    let open = opened(file);
    let Some(f) = &open.locks else {
        return ffi::SQLITE_OK;
    };
    if open.level >= level {
        return ffi::SQLITE_OK;
    }
    let (first, size) = (locks::SHARED_FIRST, locks::SHARED_SIZE);
    let got = match level {
        ffi::SQLITE_LOCK_SHARED => {
            let got = set(f, LockKind::Shared, locks::PENDING_BYTE, 1)
                && set(f, LockKind::Shared, first, size);
            unset(f, locks::PENDING_BYTE, 1);
            got
        }
        ffi::SQLITE_LOCK_RESERVED => set(f, LockKind::Exclusive, locks::RESERVED_BYTE, 1),
        _ => {
            let pending = set(f, LockKind::Exclusive, locks::PENDING_BYTE, 1);
            if pending {
                open.level = ffi::SQLITE_LOCK_PENDING;
            }
            pending && set(f, LockKind::Exclusive, first, size)
        }
    };
    if got {
        open.level = level;
        return ffi::SQLITE_OK;
    }
    ffi::SQLITE_BUSY
}

unsafe extern "C" fn x_unlock(file: *mut ffi::sqlite3_file, level: c_int) -> c_int {
    let open = opened(file);
    let Some(f) = &open.locks else {
        return ffi::SQLITE_OK;
    };
    if open.level <= level {
        return ffi::SQLITE_OK;
    }
    let (first, size) = (locks::SHARED_FIRST, locks::SHARED_SIZE);
    if level == ffi::SQLITE_LOCK_SHARED {
        assert!(set(f, LockKind::Shared, first, size));
    } else {
        unset(f, first, size);
    }
    unset(f, locks::PENDING_BYTE, 2);
    open.level = level;
    ffi::SQLITE_OK
}

unsafe extern "C" fn x_check_reserved_lock(
    file: *mut ffi::sqlite3_file,
    reserved: *mut c_int,
) -> c_int {
    let open = opened(file);
    let mut held = open.level > ffi::SQLITE_LOCK_SHARED;
    if let (false, Some(f)) = (held, &open.locks) {
        held = !set(f, LockKind::Exclusive, locks::RESERVED_BYTE, 1);
        unset(f, locks::RESERVED_BYTE, 1);
    }
    // SAFETY: SQLite passes room for it.
    unsafe { *reserved = held.into() };
    ffi::SQLITE_OK
}

unsafe extern "C" fn x_file_control(
    _file: *mut ffi::sqlite3_file,
    _op: c_int,
    _arg: *mut c_void,
) -> c_int {
    ffi::SQLITE_NOTFOUND
}

unsafe extern "C" fn x_sector_size(_file: *mut ffi::sqlite3_file) -> c_int {
    4096
}

unsafe extern "C" fn x_device_characteristics(_file: *mut ffi::sqlite3_file) -> c_int {
    ffi::SQLITE_IOCAP_POWERSAFE_OVERWRITE
}

/// Opens the WAL index as the "unix" VFS does: who comes first empties it.
fn open_index(open: &Open) -> Result<Index, c_int> {
    let Target::File(db, _) = &open.target else {
        return Err(ffi::SQLITE_IOERR_SHMOPEN);
    };
    let file = db
        .create(FileKind::Shm, false)
        .map_err(|e| open.shared.code(Err(e), ffi::SQLITE_IOERR_SHMOPEN))?;
    let path = db.path(FileKind::Shm);
    let Ok(locks) = File::options().read(true).write(true).open(path) else {
        return Err(ffi::SQLITE_IOERR_SHMOPEN);
    };
    if set(&locks, LockKind::Exclusive, locks::WAL_DMS, 1) {
        let r = wait(|done| db.truncate(&file, 3, done));
        match open.shared.code(r, ffi::SQLITE_IOERR_SHMOPEN) {
            ffi::SQLITE_OK => {}
            code => return Err(code),
        }
    }
    if !set(&locks, LockKind::Shared, locks::WAL_DMS, 1) {
        return Err(ffi::SQLITE_BUSY);
    }
    Ok(Index {
        file,
        locks,
        maps: Vec::new(),
    })
}

unsafe extern "C" fn x_shm_map(
    file: *mut ffi::sqlite3_file,
    region: c_int,
    size: c_int,
    extend: c_int,
    out: *mut *mut c_void,
) -> c_int {
    assert_eq!(size as usize, REGION_SIZE);
    let open = opened(file);
    // SAFETY: SQLite passes room for a pointer.
    unsafe { *out = std::ptr::null_mut() };
    if open.index.is_none() {
        match open_index(open) {
            Ok(index) => open.index = Some(index),
            Err(code) => return code,
        }
    }
    let index = open.index.as_mut().expect("opened above");
    while index.maps.len() <= region as usize {
        let start = index.maps.len() * REGION_SIZE;
        let end = (start + REGION_SIZE) as u64;
        let Ok(len) = index.file.file.size() else {
            return ffi::SQLITE_IOERR_SHMSIZE;
        };
        if len < end {
            if extend == 0 {
                return ffi::SQLITE_OK;
            }
            if index.file.file.set_len(end).is_err() {
                return ffi::SQLITE_IOERR_SHMSIZE;
            }
        }
        // SAFETY: a new shared mapping of an open file; the kernel chooses the address.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                REGION_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                index.locks.as_raw_fd(),
                start as libc::off_t,
            )
        };
        assert!(map != libc::MAP_FAILED);
        index.maps.push(map);
    }
    // SAFETY: as above.
    unsafe { *out = index.maps[region as usize] };
    ffi::SQLITE_OK
}

unsafe extern "C" fn x_shm_lock(
    file: *mut ffi::sqlite3_file,
    first: c_int,
    n: c_int,
    flags: c_int,
) -> c_int {
    let Some(index) = &opened(file).index else {
        return ffi::SQLITE_IOERR_SHMLOCK;
    };
    let (start, len) = (locks::WAL_WRITE_LOCK + first as u64, n as u64);
    if flags & ffi::SQLITE_SHM_UNLOCK != 0 {
        unset(&index.locks, start, len);
        return ffi::SQLITE_OK;
    }
    let kind = if flags & ffi::SQLITE_SHM_SHARED != 0 {
        LockKind::Shared
    } else {
        LockKind::Exclusive
    };
    if set(&index.locks, kind, start, len) {
        ffi::SQLITE_OK
    } else {
        ffi::SQLITE_BUSY
    }
}

unsafe extern "C" fn x_shm_barrier(_file: *mut ffi::sqlite3_file) {
    std::sync::atomic::fence(Ordering::SeqCst);
}

unsafe extern "C" fn x_shm_unmap(file: *mut ffi::sqlite3_file, delete: c_int) -> c_int {
    let open = opened(file);
    let Some(index) = open.index.take() else {
        return ffi::SQLITE_OK;
    };
    // The last one deletes it, as nobody else holds the DMS byte then.
    let last = set(&index.locks, LockKind::Exclusive, locks::WAL_DMS, 1);
    drop(index);
    if let (true, true, Target::File(db, _)) = (last, delete != 0, &open.target) {
        let r = wait(|done| db.unlink(FileKind::Shm, done));
        return open.shared.code(r, ffi::SQLITE_IOERR_SHMOPEN);
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn x_delete(
    vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    _sync_dir: c_int,
) -> c_int {
    let (shared, name) = (shared_of(vfs), file_name(name));
    let r = match (Name::parse(name), shared.find(name)) {
        (_, None) => return ffi::SQLITE_IOERR_DELETE_NOENT,
        (Name::File(kind, _), Some(Target::File(db, _))) => wait(|done| db.unlink(kind, done)),
        _ => shared.store.unlink_super_journal(name),
    };
    shared.code(r, ffi::SQLITE_IOERR_DELETE)
}

unsafe extern "C" fn x_access(
    vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    flags: c_int,
    out: *mut c_int,
) -> c_int {
    let found = shared_of(vfs).find(file_name(name));
    let yes = match found {
        // The "unix" VFS takes an empty file for none.
        Some(Target::File(db, f)) if flags == ffi::SQLITE_ACCESS_EXISTS => {
            db.size(&f).is_ok_and(|s| s > 0)
        }
        found => found.is_some(),
    };
    // SAFETY: SQLite passes room for it.
    unsafe { *out = yes.into() };
    ffi::SQLITE_OK
}

unsafe extern "C" fn x_full_pathname(
    _vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    size: c_int,
    out: *mut c_char,
) -> c_int {
    let path = CString::new(format!("/{}", file_name(name))).expect("no zero byte");
    let bytes = path.as_bytes_with_nul();
    if bytes.len() > size as usize {
        return ffi::SQLITE_CANTOPEN;
    }
    // SAFETY: SQLite passes room for `size` bytes.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), out, bytes.len()) };
    ffi::SQLITE_OK
}
