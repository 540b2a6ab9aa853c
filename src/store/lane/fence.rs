//! Stopping those who write past the node.
//!
//! An immutable inode takes no more writes, not even by descriptors that are open: that stops
//! writers for as long as it is so. The end of a lane against its connections' will is for good: its
//! WAL stays immutable, its index is one that SQLite does not open, and the database goes on in
//! other inodes, so that what the old connections still hold, locks included, means nothing.
//!
//! Order at the end of a lane: writers are stopped; what is whole in the WAL is captured; new
//! transactions are refused by the index; transactions that read are waited for, with a bound; the
//! log is flushed and the WAL's pages are put into the database file; the WAL's name goes; then the
//! mark. A crash in between finds the WAL and the mark.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock;
use crate::sqlite::locks::{self, LockKind, WAL_CKPT_LOCK, WAL_WRITE_LOCK};
use crate::sqlite::wal_index::{HEADER_COPY_SIZE, IndexHeader};

use super::super::Store;
use super::super::database::{Database, DbFile, FileKind, State};
use super::super::error::StoreError;
use super::mark::Mark;

/// The flag of an inode that nobody may change (`chattr +i`).
const IMMUTABLE: libc::c_long = 0x10;
/// How long transactions that read are waited for at the end of lanes, of all databases together.
pub(in crate::store) const READERS_WAIT: Duration = Duration::from_secs(2);
/// Pause between two looks at whether a writer has published its transaction.
const PUBLISH_PAUSE: Duration = Duration::from_millis(1);
/// How many bytes of locks there are in an index from the checkpointer's on, the last reader's with them.
const OTHER_LOCKS: u64 = 7;

/// Makes an inode immutable, or ends that.
pub(super) fn set_immutable(fd: BorrowedFd<'_>, immutable: bool) -> io::Result<()> {
    let mut flags: libc::c_long = 0;
    // SAFETY: the call fills a number that outlives it; the descriptor is open.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::FS_IOC_GETFLAGS, &mut flags) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let wanted = match immutable {
        true => flags | IMMUTABLE,
        false => flags & !IMMUTABLE,
    };
    if wanted == flags {
        return Ok(());
    }
    // SAFETY: the call reads a number that outlives it; the descriptor is open.
    match unsafe { libc::ioctl(fd.as_raw_fd(), libc::FS_IOC_SETFLAGS, &wanted) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The same for a file of a database.
fn set_file_immutable(file: &DbFile, immutable: bool) -> io::Result<()> {
    set_immutable(file.file.descriptor()?, immutable)
}

/// Whether writers can be stopped in this directory's file system.
fn probe(dir: &Path) -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    let file = tempfile::tempfile_in(dir)?;
    file.write_all_at(&[1], 0)?;
    set_immutable(file.as_fd(), true)?;
    Ok(file.write_all_at(&[2], 0).is_err())
}

impl Store {
    /// Whether databases in WAL mode are to be passed through to applications.
    pub fn passes_through(&self) -> bool {
        self.context.options.follow_wal
    }

    /// Why no database can be passed through here, if the file system is the reason.
    pub fn cannot_pass_through(&self) -> Option<String> {
        match probe(self.data_dir()) {
            Ok(true) => None,
            Ok(false) => {
                Some("its file system lets open files be written that are immutable".to_owned())
            }
            Err(e) => Some(format!("its files cannot be made immutable: {e}")),
        }
    }

    /// Stops the writers of all lanes, or lets them go on, as the gate says.
    pub(in crate::store) fn regulate_lanes(&self) {
        if self.context.options.follow_wal {
            for db in self.databases() {
                db.regulate(&mut db.lock());
            }
        }
    }

    /// Waits until what was written to lanes whose writers are stopped is published and captured.
    ///
    /// # Errors
    /// If a writer does not publish until then, or the log cannot be written.
    pub(in crate::store) fn drain_lanes(&self, limit: Duration) -> Result<(), StoreError> {
        let deadline = clock::now() + limit;
        for db in self.databases() {
            loop {
                db.catch_up()?;
                if !db.has_unpublished()? || !db.has_writer() {
                    // Who published has given the lock up since.
                    db.catch_up()?;
                    break;
                }
                if clock::now() >= deadline {
                    return Err(StoreError::CommitsInFlight {
                        seconds: limit.as_secs(),
                    });
                }
                clock::pause(PUBLISH_PAUSE);
            }
        }
        Ok(())
    }
}

impl Database {
    /// Notes whether what is committed could be captured.
    pub(super) fn note_followed(&self, st: &mut State, failed: bool) {
        if let Some(lane) = &mut st.lane {
            lane.failed = failed;
        }
        self.regulate(st);
    }

    /// Stops the writers or lets them go on, as it is right now.
    fn regulate(&self, st: &mut State) {
        let Some(lane) = &st.lane else { return };
        if lane.failed || !self.context.gate.is_open() {
            self.freeze(st);
        } else if lane.frozen {
            self.thaw(st);
        }
    }

    /// Writes to the WAL fail from here on.
    pub(super) fn freeze(&self, st: &mut State) {
        let (Some(lane), Some(wal)) = (&mut st.lane, &st.files.wal) else {
            return;
        };
        if lane.frozen {
            return;
        }
        match set_file_immutable(wal, true) {
            Ok(()) => lane.frozen = true,
            Err(e) => {
                tracing::error!(db = self.name, error = %e, "writers could not be stopped");
            }
        }
    }

    /// Writes to the WAL succeed again.
    pub(super) fn thaw(&self, st: &mut State) {
        let (Some(lane), Some(wal)) = (&mut st.lane, &st.files.wal) else {
            return;
        };
        match set_file_immutable(wal, false) {
            Ok(()) => lane.frozen = false,
            Err(e) => {
                tracing::error!(db = self.name, error = %e, "writers stay stopped");
            }
        }
    }

    /// Ends the lane, if there is one, whatever connections do; see the module. `readers_until`: how
    /// long those are waited for that are reading.
    pub(in crate::store) fn leave_lane(
        self: &Arc<Self>,
        readers_until: Instant,
    ) -> Result<(), StoreError> {
        let shm = {
            let mut st = self.lock();
            if st.lane.is_none() {
                return self.remove_mark(&mut st);
            }
            self.freeze(&mut st);
            self.follow_to_the_end(&mut st)?;
            st.files.shm.clone()
        };
        if let Some(shm) = shm {
            close_index(&shm)
                .map_err(StoreError::io("close WAL index", self.path(FileKind::Shm)))?;
            if let Err(e) = self.await_transactions(&shm, readers_until) {
                tracing::warn!(db = self.name, error = %e, "connections that are reading may see what comes now");
            }
        }
        let mut st = self.lock();
        self.put_away(&mut st)?;
        self.renew(&mut st);
        drop(st);
        if let Some(front) = self.context.front() {
            let names = self.mount_names();
            names.iter().for_each(|n| front.invalidate_entry(n));
        }
        tracing::info!(
            db = self.name,
            "not passed through any more: connections that have it open are to be opened anew"
        );
        Ok(())
    }

    /// Captures the rest, and removes the WAL.
    pub(super) fn put_away(self: &Arc<Self>, st: &mut State) -> Result<(), StoreError> {
        self.follow_to_the_end(st)?;
        self.log().flush_wait()?;
        if let Some(wal) = st.files.wal.clone() {
            let path = self.path(FileKind::Wal);
            // An immutable file keeps its name.
            self.thaw(st);
            let removed = self.disk().remove_file_if_there(&path);
            self.freeze(st);
            removed.map_err(StoreError::io("remove", &path))?;
            // Who was quick enough in between has committed.
            self.follow_to_the_end(st)?;
            self.log().flush_wait()?;
            self.backfill_all(st)?;
            wal.delete();
        }
        if st.page_count > 0 {
            let file = st.database_file(&self.name)?;
            let size = st.committed_size();
            self.set_file_size(st, &*file.file, size)?;
            (st.view_size, st.base_size) = (size, size);
        }
        self.remove_mark(st)
    }

    /// The database goes on in other inodes, of which nobody has a handle.
    fn renew(&self, st: &mut State) {
        self.unwatch(st);
        if let Some(old) = st.files.database.take() {
            old.delete();
            self.adopt_file(st, FileKind::Database, old.file.clone());
        }
        if let Some(shm) = st.files.shm.take() {
            shm.delete();
            let path = self.path(FileKind::Shm);
            if let Err(e) = self.disk().remove_file_if_there(&path) {
                tracing::warn!(path = %path.display(), error = %e, "not removed");
            }
        }
        st.files.wal = None;
        st.wal.reset();
        st.lane = None;
    }

    /// Whether anybody holds the lock of the one writer; also if it cannot be told. What stands in
    /// the WAL unpublished is else a dead writer's.
    fn has_writer(&self) -> bool {
        let free = self
            .open_in_mount(FileKind::Shm)
            .and_then(|shm| locks::is_free(shm.as_fd(), WAL_WRITE_LOCK, 1));
        !free.unwrap_or(false)
    }

    /// Takes the WAL index away from those who have it, when the database is no more.
    pub(in crate::store) fn forget_lane(&self, st: &mut State) {
        if st.lane.is_some() {
            self.unwatch(st);
            if let Some(shm) = &st.files.shm
                && let Err(e) = close_index(shm)
            {
                tracing::warn!(db = self.name, error = %e, "connections to what is gone are not told");
            }
            st.lane = None;
        }
        if !st.marked {
            return;
        }
        // Without the files it means nothing. The log is not flushed: this may be the end of a flush.
        match Mark::remove(self.disk(), &self.dir) {
            Ok(()) => st.marked = false,
            Err(e) => {
                tracing::warn!(db = self.name, error = %e, "the mark of its time as passed through stays");
            }
        }
    }

    /// Waits for those who are in the middle of a transaction by this index.
    fn await_transactions(&self, shm: &DbFile, until: Instant) -> Result<(), StoreError> {
        if self.context.front().is_none()
            || self.file(FileKind::Shm).is_none_or(|f| f.ino != shm.ino)
        {
            return Ok(());
        }
        let name = self.mount_name(FileKind::Shm);
        let file: File = self
            .open_in_mount(FileKind::Shm)
            .map_err(StoreError::io("open WAL index", &name))?;
        // The writer's lock too: who publishes just now would make the index good again.
        for (start, len) in [(WAL_WRITE_LOCK, 1), (WAL_CKPT_LOCK, OTHER_LOCKS)] {
            let locked = locks::lock_until(file.as_fd(), LockKind::Exclusive, start, len, until)
                .map_err(StoreError::io("lock", &name))?;
            if !locked {
                close_index(shm).map_err(StoreError::io("close WAL index", &name))?;
                return Err(StoreError::LockTimeout {
                    db: self.name.clone(),
                    lock: "transactions of connections that are passed through",
                    holder: String::new(),
                    seconds: READERS_WAIT.as_secs(),
                });
            }
        }
        close_index(shm).map_err(StoreError::io("close WAL index", &name))
    }

    /// Whether there is a mark, and what it says.
    pub(super) fn load_mark(&self) -> Result<Option<Mark>, StoreError> {
        Mark::load(self.disk(), &self.dir)
    }
}

/// No transaction begins by this index any more. The second copy first, as a writer does.
pub(super) fn close_index(shm: &DbFile) -> io::Result<()> {
    let closed = IndexHeader::closed();
    shm.file.write_all_at(&closed, HEADER_COPY_SIZE as u64)?;
    shm.file.write_all_at(&closed, 0)
}
