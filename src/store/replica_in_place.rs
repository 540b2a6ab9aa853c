//! Applying transactions by writing pages into the database file, under SQLite's exclusive lock.
//!
//! A group of transactions takes one lock and one flush of the log, and readers see all of it or
//! nothing. Every one of them is a record of its own in the log, in order: a crash leaves some first
//! ones, which is a state that the primary has had.

use std::io;
use std::sync::Arc;

use crate::clock;
use crate::sqlite::header::DbHeader;
use crate::task;

use super::capture::Captured;
use super::database::{Database, FileKind, State};
use super::disk::File;
use super::error::StoreError;
use super::group::{self, Group};
use super::loose::LooseFile;
use super::receive::Incoming;
use super::replica::{Exclusive, Held, READER_WAIT, ReplicaLocks};

impl Database {
    /// Applies files that follow each other as one, if they are such as can be; whether it did. If it
    /// did not, nothing has changed.
    pub(super) fn apply_group(
        self: &Arc<Self>,
        files: &mut [Incoming],
    ) -> Result<bool, StoreError> {
        let mut locks = self.lock_applier();
        let (each, ino) = {
            let st = self.lock();
            if !in_place(&st) {
                return Ok(false);
            }
            let Some(each) = group::check(&st, files) else {
                return Ok(false);
            };
            (each, st.files.database.as_ref().map_or(0, |f| f.ino))
        };
        self.apply_in_place(&mut locks, ino, &mut Group::new(&each, files))?;
        self.settle_mode(&mut locks)?;
        Ok(true)
    }

    /// Whether there is something that can be read.
    pub(super) fn exists(&self) -> bool {
        let st = self.lock();
        st.page_count > 0 && st.broken.is_none()
    }

    /// Whether transactions that arrive are written into the database file.
    pub(super) fn applies_in_place(&self) -> bool {
        in_place(&self.lock())
    }

    /// The applier's locks, with no halt lock on the way.
    pub(super) fn lock_applier(self: &Arc<Self>) -> parking_lot::MutexGuard<'_, ReplicaLocks> {
        loop {
            let locks = task::lock(&self.replica);
            if !self.holds_halt() {
                return locks;
            }
            drop(locks);
            self.end_hold(None);
        }
    }

    /// Writes the pages into the database file, under SQLite's exclusive lock.
    pub(super) fn apply_in_place(
        self: &Arc<Self>,
        locks: &mut ReplicaLocks,
        ino: u64,
        group: &mut Group<'_>,
    ) -> Result<(), StoreError> {
        let reserved = locks.held == Some(Held::Reserved);
        let file = locks.database(self, ino)?;
        let exclusive =
            Exclusive::acquire(self, file, clock::now() + READER_WAIT, false, reserved)?;
        // Before it is logged: after that, a full disk would cost the database.
        self.reserve(&mut self.lock(), group.size())?;
        let logged = self.append_group(group);
        if group.is_empty() {
            return logged;
        }
        self.log().flush_wait()?;
        let mut st = self.lock();
        let whole = group.whole();
        let same_size = st.page_size == whole.page_size;
        let written: Vec<u32> = whole
            .changed
            .iter()
            .filter(|(p, sum)| !same_size || st.sums.get(*p) != *sum)
            .map(|(p, _)| p)
            .collect();
        let page_size = whole.page_size;
        let shrunk = st.view_size > group.size();
        let renew = self.may_look_the_same(&st, group.change_counter());
        if let Err(e) = self.write_pages(&mut st, group) {
            self.set_broken(
                &mut st,
                format!("{e}: its log is whole, start the node anew once the cause is mended"),
            );
            return Err(e);
        }
        self.after_advance(&mut st);
        if renew {
            self.renew_file(&mut st)?;
        }
        drop(st);
        let all = shrunk || !same_size || renew;
        self.invalidate_pages(ino, page_size, if all { &[] } else { &written });
        if let Some(front) = self.context.front().filter(|_| renew) {
            front.invalidate_entry(&self.mount_name(FileKind::Database));
        }
        drop(exclusive);
        if renew {
            locks.close(self);
        }
        group.each().iter().for_each(|c| self.publish_applied(c));
        logged
    }

    /// Puts the files into the log; those that are not there, for an error, leave the group.
    fn append_group(&self, group: &mut Group<'_>) -> Result<(), StoreError> {
        for i in 0..group.files().len() {
            if let Err(e) = self.append_incoming(&mut group.files()[i], false) {
                group.truncate(i);
                return Err(e);
            }
        }
        Ok(())
    }

    /// Whether a connection in a rollback mode may take what it has cached for current once this is
    /// applied. SQLite goes by the change counter. It grows with each transaction, but: a snapshot
    /// of another history may have a lower one, which then comes by again what it was here; and a
    /// connection in the exclusive locking mode counts its first transaction only.
    fn may_look_the_same(&self, st: &State, change_counter: Option<u32>) -> bool {
        if st.page_count == 0 {
            // There is nothing that could be cached.
            return false;
        }
        match (self.change_counter(st), change_counter) {
            (Some(here), Some(counter)) => counter <= here,
            _ => true,
        }
    }

    /// The change counter of the newest transaction; `None` if it cannot be read.
    pub(super) fn change_counter(&self, st: &State) -> Option<u32> {
        let mut page = vec![0u8; st.page_size as usize];
        st.read_committed(self, 1, &mut page).ok()?;
        Some(DbHeader::parse(&page).ok()?.change_counter)
    }

    /// The same bytes become another file: who has the old one open reads and writes no more, and
    /// has to open it anew, without what it has cached. Under the exclusive lock.
    pub(super) fn renew_file(&self, st: &mut State) -> Result<(), StoreError> {
        let old = st.database_file(&self.name)?;
        old.replace();
        st.rollback_counter = 0;
        self.unwatch(st);
        st.lane = None;
        self.adopt_file(st, FileKind::Database, old.file.clone());
        tracing::info!(
            db = self.name,
            "its change counter does not tell what has changed: connections are to be opened anew"
        );
        Ok(())
    }

    /// Writes the pages that differ into the database file, and moves the state on.
    pub(super) fn write_pages(
        &self,
        st: &mut State,
        group: &mut Group<'_>,
    ) -> Result<(), StoreError> {
        let page_size = group.whole().page_size;
        let same_size = st.page_size == page_size;
        st.preserve_before(self, group.whole())?;
        let path = self.path(FileKind::Database);
        let size = group.size();
        self.reserve(st, size)?;
        let file = st.database_file(&self.name)?;
        let sums = &st.sums;
        let mut run = Run::new(&file.file);
        for (incoming, newest) in group.files_and_newest() {
            self.for_pages(incoming, |pgno, page| {
                match newest.get(pgno) {
                    Some(sum) if !same_size || sum != sums.get(pgno) => {}
                    _ => return Ok(()),
                }
                run.add(page, u64::from(pgno - 1) * u64::from(page_size))
                    .map_err(StoreError::io("write database", &path))
            })?;
        }
        run.write()
            .map_err(StoreError::io("write database", &path))?;
        self.set_file_size(st, &*file.file, size)?;
        (st.view_size, st.base_size) = (size, size);
        self.advance(st, group.whole());
        Ok(())
    }

    /// Makes a file that was written already the database, which has none so far, and moves the state
    /// on.
    pub(super) fn place_file(
        &self,
        st: &mut State,
        mut database: LooseFile,
        c: &Captured,
    ) -> Result<(), StoreError> {
        let path = self.path(FileKind::Database);
        database
            .keep_as(&path)
            .map_err(StoreError::io("rename database", &path))?;
        let file = self.adopt_file(st, FileKind::Database, database.file().clone());
        let size = u64::from(c.commit) * u64::from(c.page_size);
        self.set_file_size(st, &*file.file, size)?;
        (st.view_size, st.base_size, st.reserved) = (size, size, size);
        st.rollback_counter = 0;
        self.advance(st, c);
        Ok(())
    }
}

/// Bytes that are gathered for one write.
const RUN: usize = 256 << 10;

/// Pages that lie one behind the other, written at once.
pub(super) struct Run<'a> {
    file: &'a File,
    at: u64,
    bytes: Vec<u8>,
}

impl<'a> Run<'a> {
    pub fn new(file: &'a File) -> Run<'a> {
        Run {
            file,
            at: 0,
            bytes: Vec::new(),
        }
    }

    /// The next page, and where it belongs.
    pub fn add(&mut self, page: &[u8], at: u64) -> io::Result<()> {
        if self.at + self.bytes.len() as u64 != at || self.bytes.len() >= RUN {
            self.write()?;
            self.at = at;
        }
        self.bytes.extend_from_slice(page);
        Ok(())
    }

    /// Writes what is there.
    pub fn write(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.bytes, self.at)?;
        self.bytes.clear();
        Ok(())
    }
}

fn in_place(st: &State) -> bool {
    st.page_count > 0 && st.broken.is_none() && st.files.wal.is_none()
}
