//! Who may change the files of a database that is in use: those who know SQLite's locks.
//!
//! To the store, what is written while a journal is active belongs to the transaction, and the
//! journal's end is its commit; who it is that writes cannot be seen in the bytes. A program that
//! copies, truncates or removes files in the middle of it would make its own bytes a part of the
//! transaction. But it holds no lock: SQLite changes nothing without one. So whoever changes a file
//! of a database that is in use must be a process that has been seen to hold a lock of it.
//!
//! Allowed is whatever cannot be told: a process of another process ID name space, one whose locks
//! have no owner (open file description locks), a kernel that does not say.

use std::collections::HashSet;
use std::path::Path;

use parking_lot::Mutex;

use super::context::Job;
use super::database::{Database, DbFile, FileKind};
use super::error::StoreError;
use super::front::Holders;

/// Threads that are remembered: all are forgotten then, and looked at again.
const MAX_KNOWN: usize = 4096;

/// Threads of processes that have held locks.
#[derive(Debug, Default)]
pub(super) struct Clients(Mutex<HashSet<u32>>);

impl Clients {
    fn knows(&self, thread: u32) -> bool {
        self.0.lock().contains(&thread)
    }

    fn learn(&self, thread: u32) {
        let mut known = self.0.lock();
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        known.insert(thread);
    }
}

impl Database {
    /// Whether this thread is known to be of a process that has held locks.
    pub(super) fn is_client(&self, thread: u32) -> bool {
        self.context.clients.knows(thread)
    }

    /// Whether this thread may change a file; 0: it is not known which thread it is.
    ///
    /// # Errors
    /// [`StoreError::Busy`] if others use the database, and it is not a client of SQLite's kind.
    pub fn check_caller(&self, f: &DbFile, thread: u32) -> Result<(), StoreError> {
        if thread == 0 || self.context.clients.knows(thread) {
            return Ok(());
        }
        let Some(front) = self.context.front() else {
            return Ok(());
        };
        let (inos, journal_active) = {
            let st = self.lock();
            let files = [&st.files.database, &st.files.shm];
            let inos: Vec<u64> = files.into_iter().flatten().map(|f| f.ino).collect();
            (inos, st.journal_active)
        };
        let Some(Holders { processes, unknown }) = front.lock_holders(&inos) else {
            return Ok(());
        };
        if processes.iter().any(|p| is_thread_of(thread, *p)) {
            self.context.clients.learn(thread);
            return Ok(());
        }
        let unused = processes.is_empty() && !journal_active;
        if unused && f.kind == FileKind::Journal {
            // Without locks, and alone: a transaction of its own.
            self.context.clients.learn(thread);
        }
        // SQLite has written a journal, and is known, or holds a lock, before it writes to a database.
        // Not to be let through to where a transaction may just have begun.
        let harmless = unused && f.kind != FileKind::Database;
        if unknown || harmless || !is_there(thread) {
            return Ok(());
        }
        // What the kernel has taken into its cache on the way is not what is there.
        self.context.keep(Job::InvalidateData(f.ino));
        if unused {
            return Err(self.refuse("a change of the database by a program that holds none of SQLite's locks: only SQLite may (to load a file, use import)"));
        }
        let e = StoreError::Busy {
            file: self.mount_name(f.kind),
            thread,
        };
        self.warn_rarely(&e);
        Err(e)
    }

    /// A write that comes from a shared mapping, some time after it was made: SQLite makes none to
    /// these files, and to which transaction it belongs cannot be said.
    ///
    /// # Errors
    /// Always, but for the WAL index.
    pub fn check_mapped_write(&self, f: &DbFile) -> Result<(), StoreError> {
        if f.kind == FileKind::Shm {
            return Ok(());
        }
        self.context.keep(Job::InvalidateData(f.ino));
        Err(self.refuse("a write through a shared mapping, by a program that is not SQLite"))
    }
}

/// Whether the kernel shows the thread to this process at all.
fn is_there(thread: u32) -> bool {
    Path::new(&format!("/proc/{thread}")).exists()
}

fn is_thread_of(thread: u32, process: u32) -> bool {
    thread == process || Path::new(&format!("/proc/{process}/task/{thread}")).exists()
}
