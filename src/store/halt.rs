//! The halt lock of a database, on the primary: one replica at a time may write it by forwarding
//! its transactions.
//!
//! While it is given away, the node holds SQLite's own locks on its files in the mount: RESERVED
//! without a WAL, the WAL's WRITE lock with one. Writers wait or get SQLITE_BUSY as from any other
//! connection; readers notice nothing, because an index that they would have to recover (under that
//! WRITE lock) is made valid first.
//!
//! Invariants:
//! - The slot changes to and from `Held` only under `Database::replica`, together with the locks.
//! - `Halt::given` is true from before the lock's position is told until the locks are given up.
//! - A transaction is taken only from the holder, only at the lock's position, and is on disk before
//!   it can be seen here.

use std::io::Read;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::clock;
use crate::ltx::Pos;
use crate::sqlite::locks::{self, LockKind, WAL_WRITE_LOCK};
use crate::sqlite::wal_index::{IndexHeader, READ_MARK_UNUSED, READ_MARKS, WalIndex};

use crate::task;

use super::Store;
use super::context::Job;
use super::database::Database;
use super::divergent::Common;
use super::error::StoreError;
use super::receive::Incoming;
use super::replica::{Held, ReplicaLocks};

/// Pause between two attempts to get SQLite's locks.
const LOCK_PAUSE: Duration = Duration::from_millis(5);
/// How long the locks may take after a transaction that changed which ones they are.
const REGAIN_WAIT: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Default)]
pub(super) struct Halt {
    slot: Mutex<Slot>,
    changed: Condvar,
    given: AtomicBool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Slot {
    #[default]
    Free,
    /// Somebody waits for SQLite's locks; `cancelled`: in vain.
    Taking {
        id: i64,
        cancelled: bool,
    },
    Held(Grant),
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Grant {
    id: i64,
    node: u64,
    expires: Instant,
}

impl Halt {
    /// Whether a replica has the lock.
    pub fn is_held(&self) -> bool {
        self.given.load(Ordering::Acquire)
    }

    fn set(&self, slot: Slot) {
        self.given
            .store(matches!(slot, Slot::Held(_)), Ordering::Release);
        *self.slot.lock() = slot;
        self.changed.notify_all();
    }

    fn grant(&self) -> Option<Grant> {
        match *self.slot.lock() {
            Slot::Held(grant) => Some(grant),
            _ => None,
        }
    }
}

impl Database {
    /// Gives the lock to a node for `ttl`, and says the position that it is for. The same ID asked
    /// again is the same lock, for another `ttl`. Blocks up to `wait` on another holder and on
    /// local writers.
    ///
    /// # Errors
    /// [`StoreError::HaltLock`] after that time; [`StoreError::NotPrimary`].
    pub fn grant_halt(
        self: &Arc<Self>,
        id: i64,
        node: u64,
        ttl: Duration,
        wait: Duration,
    ) -> Result<Pos, StoreError> {
        let until = clock::now() + wait;
        {
            let mut slot = self.halt.slot.lock();
            loop {
                match &mut *slot {
                    Slot::Free => break,
                    Slot::Held(grant) if grant.id == id && grant.node == node => {
                        grant.expires = clock::now() + ttl;
                        drop(slot);
                        return Ok(self.captured_pos());
                    }
                    _ => {}
                }
                if self.halt.changed.wait_until(&mut slot, until).timed_out() {
                    return Err(self.halt_error("another replica has the halt lock"));
                }
            }
            *slot = Slot::Taking {
                id,
                cancelled: false,
            };
        }
        let taken = self.take_locks(Some(id), until, |db| {
            db.log().flush_wait()?;
            let expires = clock::now() + ttl;
            db.halt.set(Slot::Held(Grant { id, node, expires }));
            Ok(db.captured_pos())
        });
        if taken.is_err() {
            self.halt.set(Slot::Free);
            self.context.keep(Job::CheckIndex(self.clone()));
        }
        taken
    }

    /// Tries until `until` to get SQLite's locks, and does `then` with them.
    fn take_locks<T>(
        self: &Arc<Self>,
        taking: Option<i64>,
        until: Instant,
        then: impl Fn(&Arc<Self>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        loop {
            if !self.context.is_writable() {
                return Err(StoreError::NotPrimary(self.name.clone()));
            }
            if let Some(id) = taking
                && *self.halt.slot.lock()
                    == (Slot::Taking {
                        id,
                        cancelled: true,
                    })
            {
                return Err(self.halt_error("the halt lock was given up before it was granted"));
            }
            // Not held while waiting: others look after the WAL index in between.
            let mut locks = task::lock(&self.replica);
            let done = match self.try_halt_locks(&mut locks) {
                Ok(true) => Some(then(self)),
                Ok(false) => None,
                Err(e) => Some(Err(e)),
            };
            match done {
                Some(Ok(t)) => return Ok(t),
                Some(Err(e)) => {
                    locks.close(self);
                    return Err(e);
                }
                None => locks.close(self),
            }
            drop(locks);
            if clock::now() >= until {
                return Err(self.halt_error("a local writer does not end its transaction"));
            }
            clock::pause(LOCK_PAUSE);
        }
    }

    /// SQLite's locks against writers, if nobody has them.
    fn try_halt_locks(self: &Arc<Self>, locks: &mut ReplicaLocks) -> Result<bool, StoreError> {
        let (wal, lacks_wal, ino, exists) = {
            let st = self.lock();
            self.check_usable(&st)?;
            let has_wal = st.files.wal.is_some();
            let ino = st.files.database.as_ref().map_or(0, |f| f.ino);
            (
                st.wal_mode || has_wal,
                st.wal_mode && !has_wal,
                ino,
                st.page_count > 0,
            )
        };
        if !exists {
            return Err(StoreError::NoDatabase(self.name.clone()));
        }
        if wal {
            if lacks_wal {
                self.ensure_wal()?;
            }
            locks.open_wal(self, ino)?;
            let lock = locks.shm.as_mut().map(|shm| {
                let fd = shm.file.as_fd();
                locks::try_lock(fd, LockKind::Exclusive, WAL_WRITE_LOCK, 1)
            });
            if !matches!(lock, Some(Ok(true))) {
                return lock
                    .unwrap_or(Ok(false))
                    .map_err(StoreError::io("lock the WAL index of", &self.dir));
            }
            locks.held = Some(Held::Write);
            self.catch_up()?;
            self.make_index_valid(locks)?;
            return Ok(true);
        }
        if !locks.try_reserve(self, ino)? {
            return Ok(false);
        }
        // RESERVED was free: whoever began this transaction is dead.
        if self.lock().journal_active {
            locks.clear_dead_transaction(self, ino)?;
        }
        Ok(true)
    }

    /// Sets the WAL index up from what is known of the WAL, unless it is in step: no reader can
    /// recover it while the WRITE lock is held.
    fn make_index_valid(&self, locks: &mut ReplicaLocks) -> Result<(), StoreError> {
        let Some(shared) = &mut locks.shm else {
            return Ok(());
        };
        let (pgnos, last, wal, page_count, page_size) = {
            let st = self.lock();
            let frames = &st.wal.frames[..st.wal.committed];
            let pgnos: Vec<u32> = frames.iter().map(|f| f.pgno).collect();
            let last = st.wal.chain_before(st.wal.committed);
            (pgnos, last, st.wal.header, st.page_count, st.page_size)
        };
        let mx_frame = pgnos.len() as u32;
        let salts = wal.map_or((0, 0), |w| (w.salt1, w.salt2));
        let fd = shared
            .file
            .try_clone()
            .map_err(StoreError::io("reopen the WAL index of", &self.dir))?;
        let index = shared.ensure(self, WalIndex::regions_needed(mx_frame))?;
        let old = index.read_header();
        if old.is_some_and(|h| {
            h.mx_frame == mx_frame && (mx_frame == 0 || (h.salt1, h.salt2) == salts)
        }) {
            return Ok(());
        }
        index.invalidate_header();
        index
            .append_frames(1, &pgnos)
            .map_err(|e| self.halt_error(format!("the WAL index cannot be set up: {e}")))?;
        index.set_n_backfill(0);
        index.set_n_backfill_attempted(mx_frame);
        index.set_read_mark(0, 0);
        for i in 1..READ_MARKS {
            let lock = locks::wal_read_lock(i as u64);
            let io = |e| StoreError::io("lock the WAL index of", &self.dir)(e);
            if locks::try_lock(fd.as_fd(), LockKind::Exclusive, lock, 1).map_err(io)? {
                let mark = if i == 1 && mx_frame > 0 {
                    mx_frame
                } else {
                    READ_MARK_UNUSED
                };
                index.set_read_mark(i, mark);
                locks::unlock(fd.as_fd(), lock, 1).map_err(io)?;
            }
        }
        index.write_header(&IndexHeader {
            change: old.map_or(1, |h| h.change.wrapping_add(1)),
            is_init: true,
            big_endian_checksum: wal.is_some_and(|w| w.big_endian),
            page_size: wal.map_or(page_size, |w| w.page_size),
            mx_frame,
            page_count: if mx_frame > 0 { page_count } else { 0 },
            frame_checksum: last,
            salt1: salts.0,
            salt2: salts.1,
        });
        Ok(())
    }

    /// Keeps the lock for another `ttl`; false if it is not this node's any more.
    pub fn renew_halt(&self, id: i64, node: u64, ttl: Duration) -> bool {
        match &mut *self.halt.slot.lock() {
            Slot::Held(grant) if grant.id == id && grant.node == node => {
                grant.expires = clock::now() + ttl;
                true
            }
            _ => false,
        }
    }

    /// Takes the lock back that has this ID; nothing, if another one or none is given.
    pub fn return_halt(self: &Arc<Self>, id: i64) {
        if let Slot::Taking { id: i, cancelled } = &mut *self.halt.slot.lock()
            && *i == id
        {
            *cancelled = true;
        }
        self.take_back_halt(|grant| grant.id == id);
    }

    /// Takes the lock of this ID back if its time is over; else says when to ask again, `None` if it
    /// is not given any more.
    pub fn expire_halt(self: &Arc<Self>, id: i64) -> Option<Instant> {
        let now = clock::now();
        let expired = |grant: &Grant| grant.id == id && grant.expires <= now;
        if self.take_back_halt(expired) {
            tracing::warn!(
                db = self.name,
                "the replica that has the halt lock was not heard of: it is taken back"
            );
        }
        let grant = self.halt.grant().filter(|grant| grant.id == id);
        grant.map(|grant| grant.expires)
    }

    /// Takes the lock back, whoever has it.
    pub(super) fn revoke_halt(self: &Arc<Self>, why: &str) {
        if self.take_back_halt(|_| true) {
            tracing::warn!(db = self.name, why, "the halt lock is taken back");
        }
    }

    fn take_back_halt(self: &Arc<Self>, meant: impl Fn(&Grant) -> bool) -> bool {
        if !self.halt.grant().is_some_and(|grant| meant(&grant)) {
            return false;
        }
        let mut locks = task::lock(&self.replica);
        if !self.halt.grant().is_some_and(|grant| meant(&grant)) {
            return false;
        }
        self.give_up(&mut locks);
        true
    }

    fn give_up(self: &Arc<Self>, locks: &mut ReplicaLocks) {
        if let Err(e) = self.settle_mode(locks) {
            tracing::warn!(db = self.name, error = %e, "left in the journal mode of a replica");
        }
        locks.close(self);
        self.halt.set(Slot::Free);
        self.context.keep(Job::CheckIndex(self.clone()));
    }

    /// Applies what the holder of the lock commits; see the module.
    fn commit_for(
        self: &Arc<Self>,
        id: i64,
        node: u64,
        mut incoming: Incoming,
    ) -> Result<(), StoreError> {
        let pass = self.context.gate.pass();
        let pass = pass.ok_or_else(|| StoreError::NotPrimary(self.name.clone()))?;
        let mut locks = task::lock(&self.replica);
        // A retry, whose first answer was lost.
        if let Common::At(_) = self.newest_common(&[incoming.pos()]) {
            return self.verdict(&pass);
        }
        let grant = self.halt.grant();
        if !grant.is_some_and(|g| g.id == id && g.node == node) || locks.held.is_none() {
            return Err(self.halt_error("the sender does not hold the halt lock"));
        }
        let h = &incoming.header;
        if h.is_snapshot() || h.commit == 0 || h.min_txid != h.max_txid {
            return Err(self.refuse("a forwarded file that is not one transaction"));
        }
        self.check_follows(&incoming)?;
        let applied = self.apply_incoming(&mut locks, &mut incoming);
        let regained = self.regain(&mut locks);
        if let Err(e) = applied.and(regained) {
            if self.captured_pos() != incoming.pos() {
                return Err(e);
            }
            // It is part of the history, whatever came after.
            tracing::warn!(db = self.name, error = %e, "after a forwarded transaction");
        }
        self.verdict(&pass)
    }

    /// After a transaction: the locks are those of the mode that the database is in now.
    fn regain(self: &Arc<Self>, locks: &mut ReplicaLocks) -> Result<(), StoreError> {
        let wanted = match self.lock().files.wal {
            Some(_) => Held::Write,
            None => Held::Reserved,
        };
        if locks.held == Some(wanted) {
            return Ok(());
        }
        let until = clock::now() + REGAIN_WAIT;
        locks.close(self);
        loop {
            match self.try_halt_locks(locks) {
                Ok(true) => return Ok(()),
                Ok(false) if clock::now() < until => clock::pause(LOCK_PAUSE),
                other => {
                    self.give_up(locks);
                    return other.and(Err(self.halt_error(
                        "a local writer was faster when the journal mode changed: the halt lock is taken back",
                    )));
                }
            }
        }
    }
}

impl Store {
    /// Reads one LTX file and commits it for the replica `node`, which holds the halt lock `id`.
    /// Blocks: on the reader, on the disk, and in the rollback modes on local readers. It is on disk
    /// when this returns; one that is part of the history already is fine.
    ///
    /// # Errors
    /// Nothing is changed if the error is [`StoreError::HaltLock`] (the lock is not the sender's),
    /// [`StoreError::PositionMismatch`], [`StoreError::NotPrimary`], [`StoreError::LockTimeout`],
    /// [`StoreError::Refused`], [`StoreError::Ltx`], [`StoreError::Name`] or
    /// [`StoreError::NoDatabase`]. With others nobody knows.
    pub fn commit_forwarded(
        &self,
        name: &str,
        id: i64,
        node: u64,
        from: &mut dyn Read,
    ) -> Result<(), StoreError> {
        super::names::check_database(name)?;
        let db = self
            .database(name)
            .ok_or_else(|| StoreError::NoDatabase(name.to_owned()))?;
        let incoming = Incoming::read(self.scratch(), from, name, false)?;
        db.commit_for(id, node, incoming)
    }
}
