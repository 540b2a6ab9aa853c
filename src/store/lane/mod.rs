//! The lane: databases in WAL mode that are passed through to applications (`fuse.wal-capture: tail`).
//!
//! A write through the mount costs a request to this node, which is most of a commit's time. In a
//! lane there is none: database, WAL and index are passed through, SQLite reads and writes the
//! backing files, and the node follows the WAL behind it ([`follow`]). There is no gate at commit:
//! what is acknowledged is logged a little later.
//!
//! **What is committed** is what SQLite's own connections take for committed: the frames that the
//! WAL index counts. They are never overwritten before the WAL is restarted. A transaction that is
//! whole in the WAL and not in the index is its writer's until that publishes it. When nobody can
//! publish any more (at the end of a lane, and at a start) it is committed, as it is for the next
//! connection that recovers the index.
//!
//! **No frame is lost**, and no read mark is held, because what makes a frame disappear begins with a
//! request, which is answered when everything is captured:
//! - A checkpoint that copies all there is, without which the WAL is not restarted, ends with setting
//!   the size of the database file, at every setting of `synchronous`. It is answered when the log is
//!   on disk up to there.
//! - A checkpoint begins with a sync of the WAL (but with `synchronous=OFF`): so what it copies is
//!   captured, and the database file never has a page that neither the log nor the WAL has on disk.
//! - A WAL that is cut off or deleted.
//!
//! **Syncs of the WAL** (`synchronous=FULL`) sync the WAL itself. The log cannot stand for it: the
//! transaction is not published yet, and if its writer died now, the next would overwrite it.
//!
//! **Writers are stopped** by making the WAL's inode immutable, which open descriptors feel too: the
//! kernel gives EPERM, SQLite rolls back. It is so while commits are paused, while the lease is over
//! and while the log cannot be written. A lane ends ([`fence`]) with that, and with an index that SQLite
//! does not open: its connections get errors until they are opened anew, on files of new inodes.
//! So it is when the node is no longer primary, when it stops, and at a start after it was killed: the
//! kernel lets passed-through handles live on without it, and what they commit until then is taken
//! up ([`recovery`]). Where a file system cannot do that, there are no lanes.
//!
//! **Which handles.** The kernel does not mix handles that are passed through with others on one
//! inode. So from the first open to the last close of a database and its WAL all are the one or the
//! other. A lane begins only with a database in WAL mode on a primary, and not by the node's own
//! handles.
//!
//! Invariant: while `State::lane` is there, so is the mark on disk ([`mark`]), and the WAL has been
//! written by nobody but the applications since the mark.

use std::sync::Arc;

use crate::ltx::Pos;

use super::database::{Database, DbFile, FileKind, State, read_or_zeros};
use super::error::StoreError;

mod fence;
mod follow;
mod follower;
mod mark;
mod recovery;

pub(super) use fence::READERS_WAIT;
pub(super) use follower::Follower;

use mark::Mark;

/// How a handle gets at a file's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By requests to the node. `stale`: what the kernel has cached of the file is of no use.
    Requests {
        /// See above.
        stale: bool,
    },
    /// By the kernel, from the backing file.
    Through,
}

/// The open handles of a file, all of one [`Way`].
#[derive(Debug, Default)]
pub(super) struct Handles {
    open: u64,
    through: bool,
    /// It was passed through since the kernel last cached it.
    stale: bool,
    /// The follower is woken by writes to it.
    watched: bool,
}

/// A database that is passed through; see the module.
#[derive(Debug, Default)]
pub(super) struct Lane {
    /// The WAL takes no writes.
    frozen: bool,
    /// Commits cannot be logged.
    failed: bool,
    /// Page 1, from when the WAL was deleted.
    first_page: Vec<u8>,
}

impl State {
    /// Whether the file is the one that has its name.
    fn is_current(&mut self, f: &DbFile) -> bool {
        self.files
            .slot(f.kind)
            .as_ref()
            .is_some_and(|c| c.ino == f.ino)
    }

    /// Whether database or WAL are open.
    fn has_handles(&self) -> bool {
        let files = [&self.files.database, &self.files.wal];
        let mut open = files.into_iter().flatten();
        open.any(|f| f.handles.lock().open > 0)
    }
}

impl Database {
    /// Counts a handle of a database or WAL that is being opened, and says how it gets at the bytes.
    /// `may_begin`: a lane may begin with it.
    pub fn open_handle(self: &Arc<Self>, f: &Arc<DbFile>, may_begin: bool) -> Way {
        let mut st = self.lock();
        let through = if !st.is_current(f) {
            let handles = f.handles.lock();
            handles.open > 0 && handles.through
        } else {
            st.lane.is_some() || (!st.has_handles() && may_begin && self.begin_lane(&mut st))
        };
        if through && f.kind == FileKind::Wal {
            self.watch(f);
        }
        if !through && st.marked && st.is_current(f) {
            // From here on others write the WAL.
            self.remove_mark_or_warn(&mut st);
        }
        let mut handles = f.handles.lock();
        handles.open += 1;
        handles.through = through;
        if through {
            handles.stale = true;
            return Way::Through;
        }
        Way::Requests {
            stale: std::mem::take(&mut handles.stale),
        }
    }

    /// A handle that was counted is closed, or was not opened after all.
    pub fn close_handle(self: &Arc<Self>, f: &DbFile) {
        let mut st = self.lock();
        {
            let mut handles = f.handles.lock();
            handles.open = handles.open.saturating_sub(1);
        }
        if st.lane.is_none() || !st.is_current(f) || st.has_handles() {
            return;
        }
        match self.follow_to_the_end(&mut st) {
            Ok(()) => {
                self.unwatch(&st);
                self.thaw(&mut st);
                st.lane = None;
            }
            // It stays, and with it the mark: the next to come, or the next start, tries again.
            Err(e) => self.warn_rarely(&e),
        }
    }

    /// Whether the file's handles are passed through.
    pub fn is_through(&self, f: &DbFile) -> bool {
        let handles = f.handles.lock();
        handles.open > 0 && handles.through
    }

    /// The position of everything that is committed, and on disk.
    pub fn newest_pos(self: &Arc<Self>) -> Pos {
        if self.lock().lane.is_some()
            && let Err(e) = self.try_settle()
        {
            self.warn_rarely(&e);
        }
        self.pos()
    }

    /// Begins a lane, if the database is fit for one; whether it did.
    fn begin_lane(self: &Arc<Self>, st: &mut State) -> bool {
        let fit = self.context.options.follow_wal
            && self.context.is_writable()
            && st.wal_mode
            && st.page_count > 0
            && st.broken.is_none()
            && !(st.journal_active || st.committing || st.importing)
            && !self.halt.is_held();
        if !fit {
            return false;
        }
        // After a lane that ended with its last handle it still says what is right.
        let txid = st.pos.txid;
        let marked = if st.marked {
            Ok(())
        } else {
            self.set_mark(st, txid)
        };
        match marked {
            Ok(()) => {
                // Nobody has a transaction open, and what is written from here on is not seen.
                st.wal.stale = false;
                st.wal.tail.clear();
                st.lane = Some(Lane::default());
                tracing::debug!(db = self.name, "passed through");
                true
            }
            Err(e) => {
                tracing::warn!(db = self.name, error = %e, "not passed through: its writes take longer");
                false
            }
        }
    }

    /// Notes on disk that the WAL is written past this node from here on.
    fn set_mark(&self, st: &mut State, txid: u64) -> Result<(), StoreError> {
        self.log().flush_wait()?;
        if let Some(wal) = &st.files.wal {
            let path = self.path(FileKind::Wal);
            wal.file
                .sync_data()
                .map_err(StoreError::io("sync WAL", path))?;
        }
        let (salt1, salt2) = st.wal.header.map_or((0, 0), |h| (h.salt1, h.salt2));
        let mark = Mark {
            txid,
            salt1,
            salt2,
            frames: st.wal.committed as u64,
        };
        mark.save(self.disk(), &self.dir)?;
        st.marked = true;
        Ok(())
    }

    /// The node is about to log a transaction that it writes into the WAL itself: its record does not
    /// say where in it.
    pub(super) fn mark_applied(&self, txid: u64) -> Result<(), StoreError> {
        let mut st = self.lock();
        match st.marked {
            true => self.set_mark(&mut st, txid),
            false => Ok(()),
        }
    }

    /// Takes the mark away, durably: the WAL is of no use to a recovery.
    pub(super) fn remove_mark(&self, st: &mut State) -> Result<(), StoreError> {
        if st.marked {
            self.log().flush_wait()?;
            Mark::remove(self.disk(), &self.dir)?;
            st.marked = false;
        }
        Ok(())
    }

    /// An error for what cannot be done while the database is passed through.
    pub(super) fn check_no_lane(&self, st: &State) -> Result<(), StoreError> {
        match st.lane {
            None => Ok(()),
            Some(_) => Err(self.refuse("this cannot be done with a database that is passed through: to leave WAL mode start the node with fuse.wal-capture: gate")),
        }
    }

    /// A sync of a file that is passed through.
    pub(super) fn sync_through(self: &Arc<Self>, f: &DbFile) -> Result<(), StoreError> {
        if f.kind != FileKind::Wal {
            return self.check_first_page();
        }
        let valid = || match self.context.gate.is_valid() && !f.is_deleted() {
            true => Ok(()),
            // With synchronous=FULL this is a commit's verdict.
            false => Err(StoreError::Unanswered(self.name.clone())),
        };
        valid()?;
        self.catch_up()?;
        f.file
            .sync_data()
            .map_err(StoreError::io("sync WAL", self.path(FileKind::Wal)))?;
        valid()
    }

    /// The WAL is about to be deleted: who changes page 1 then leaves WAL mode.
    pub(super) fn keep_first_page(&self, st: &mut State) -> Result<(), StoreError> {
        if st.lane.is_some() {
            let mut page = vec![0; st.page_size as usize];
            st.read_committed(self, 1, &mut page)?;
            if let Some(lane) = &mut st.lane {
                lane.first_page = page;
            }
        }
        Ok(())
    }

    /// Without a WAL nothing may be written. SQLite does so to leave WAL mode for one without a journal
    /// on disk, and syncs the file: that is taken back.
    fn check_first_page(&self) -> Result<(), StoreError> {
        let st = self.lock();
        let (Some(lane), None) = (&st.lane, &st.files.wal) else {
            return Ok(());
        };
        let file = st.database_file(&self.name)?;
        let mut page = vec![0; lane.first_page.len()];
        let path = self.path(FileKind::Database);
        read_or_zeros(&*file.file, 0, &mut page).map_err(StoreError::io("read database", &path))?;
        if page == lane.first_page {
            return Ok(());
        }
        file.file
            .write_all_at(&lane.first_page, 0)
            .map_err(StoreError::io("write database", &path))?;
        self.check_no_lane(&st)
    }

    fn remove_mark_or_warn(&self, st: &mut State) {
        if let Err(e) = self.remove_mark(st) {
            tracing::warn!(db = self.name, error = %e, "the mark of its time as passed through stays");
        }
    }
}
