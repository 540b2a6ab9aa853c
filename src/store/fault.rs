//! Stored bytes that are not what was written: who is told, and what is done about it.
//!
//! Whoever finds a fault (a start, the scrub, a reader of a page) brings it here. In this order:
//! - What is whole elsewhere on this node is written anew: a page out of the log or the WAL, the
//!   checksums out of memory; a log whose database is whole begins anew.
//! - A replica sets the database aside with its evidence and fetches it again, while it runs.
//! - A primary has nobody to ask: the database is set aside, and its users get errors and nothing
//!   wrong.
//!
//! Invariant: a page whose bytes do not match its checksum is never handed to anybody. Who asks for
//! it gets an error.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::context::{Event, Job};
use super::database::{Database, FileKind, State};

/// What was done about a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The right bytes were there, and are in place again.
    Repaired,
    /// The log was given up for one that begins with the whole database.
    LogBegunAnew,
    /// The database is set aside and fetched from the primary.
    Fetch,
    /// The database is set aside.
    SetAside,
}

impl Action {
    /// As events name it.
    pub fn name(self) -> &'static str {
        match self {
            Action::Repaired => "repaired",
            Action::LogBegunAnew => "logBegunAnew",
            Action::Fetch => "fetch",
            Action::SetAside => "setAside",
        }
    }
}

/// Where a fault was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The database file.
    Database,
    /// The WAL.
    Wal,
    /// The transaction log.
    Log,
    /// The file of page checksums.
    Checksums,
    /// Its backup, elsewhere.
    Backup,
}

impl Place {
    /// As events name it.
    pub fn name(self) -> &'static str {
        match self {
            Place::Database => "database",
            Place::Wal => "wal",
            Place::Log => "log",
            Place::Checksums => "checksums",
            Place::Backup => "backup",
        }
    }
}

/// What was looked at, and what was found, since the node started.
#[derive(Debug, Default)]
pub struct FaultStats {
    /// Bytes read by the scrub.
    pub bytes: AtomicU64,
    /// Pages that were compared with their checksums.
    pub pages: AtomicU64,
    /// Log records that were compared with theirs.
    pub records: AtomicU64,
    /// Times that everything was looked at from beginning to end.
    pub passes: AtomicU64,
    /// When the last pass ended, in milliseconds since the Unix epoch; 0: none has.
    pub last_pass: AtomicI64,
    faults: Mutex<BTreeMap<String, u64>>,
}

impl FaultStats {
    /// The number of faults of each database that had one.
    pub fn faults(&self) -> BTreeMap<String, u64> {
        self.faults.lock().clone()
    }
}

/// Rung when a replica has a database to fetch again.
#[derive(Debug)]
pub(super) struct Refetch(watch::Sender<u64>);

impl Default for Refetch {
    fn default() -> Self {
        Refetch(watch::channel(0).0)
    }
}

impl Refetch {
    pub fn listen(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }
}

impl Database {
    /// The backup of this database is damaged, and a new one takes its place.
    pub fn note_backup_damage(&self, what: &str) {
        self.report_fault(Place::Backup, what, Action::Repaired);
    }

    /// Tells the log, the counters and those who listen.
    pub(super) fn report_fault(&self, place: Place, what: &str, action: Action) {
        let stats = &self.context.faults;
        *stats.faults.lock().entry(self.name.clone()).or_default() += 1;
        let said = match action {
            Action::Repaired => "stored bytes had changed: they are written anew",
            Action::LogBegunAnew => {
                "the transaction log is damaged and the database whole: the log begins anew"
            }
            Action::Fetch => {
                "stored bytes have changed: the database is set aside and fetched from the primary"
            }
            Action::SetAside => {
                "stored bytes have changed, and this node has no other copy: the database is set aside. Import another node's copy or a backup, or make another node primary and start this one anew"
            }
        };
        let (db, file) = (self.name.as_str(), place.name());
        match action {
            Action::Repaired | Action::LogBegunAnew => {
                tracing::warn!(db, file, what, "{said}");
            }
            Action::Fetch | Action::SetAside => tracing::error!(db, file, what, "{said}"),
        }
        self.context.publish(Event::Fault {
            db: self.name.clone(),
            place,
            what: what.to_owned(),
            action,
        });
    }

    /// Nothing on this node can mend it.
    pub(super) fn beyond_repair(&self, st: &mut State, place: Place, what: &str) {
        if st.broken.is_some() {
            return;
        }
        let primary = self.context.gate.is_valid();
        self.set_broken(st, format!("{}: {what}", place.name()));
        // What the kernel has cached of it may be as wrong.
        for kind in [FileKind::Database, FileKind::Wal] {
            if let Some(f) = st.files.slot(kind) {
                self.context.keep(Job::InvalidateData(f.ino));
            }
        }
        let action = if primary {
            Action::SetAside
        } else {
            Action::Fetch
        };
        self.report_fault(place, what, action);
        if !primary {
            self.context.refetch.0.send_modify(|n| *n += 1);
        }
    }

    /// A reader found that the database file has other bytes than it should have in this page.
    pub(super) fn suspect(self: &Arc<Self>, st: &mut State, pgno: u32) {
        if st.suspects.insert(pgno) && st.suspects.len() == 1 {
            self.context.keep(Job::Mend(self.clone()));
        }
    }

    /// Looks at what readers stumbled over, and at the WAL.
    pub(super) fn mend_suspects(self: &Arc<Self>) {
        let suspects: Vec<u32> = std::mem::take(&mut self.lock().suspects)
            .into_iter()
            .collect();
        self.mend_pages(&suspects);
    }

    /// Counts what the scrub has looked at.
    pub(super) fn note_scrubbed(&self, bytes: u64, pages: u64, records: u64) {
        let stats = &self.context.faults;
        stats.bytes.fetch_add(bytes, Ordering::Relaxed);
        stats.pages.fetch_add(pages, Ordering::Relaxed);
        stats.records.fetch_add(records, Ordering::Relaxed);
    }
}
