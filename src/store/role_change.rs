//! What becomes of the databases when a node stops being primary, or becomes it, at run time.
//!
//! Stopping. The gate of commits closes first; commits that were begun end, and are answered with
//! an error. Then every transaction that an application has open loses what it has written: the
//! overlay is dropped and the journal deleted, frames that are not committed are forgotten, and
//! super-journals are gone. Its next step fails, whatever it is and whenever it comes, for the files
//! that it holds are deleted ones. Its locks are the kernel's and stay until it gives them up: until
//! then the applier waits for them.
//!
//! A writer of the WAL holds no file of its own. What it writes is refused until the node has had
//! the WAL's WRITE lock once since, and so knows that the transaction is over (`WalCapture::stale`).
//!
//! Becoming primary. The applier's locks are given up, WALs that are left of another journal mode
//! put away if nobody uses them, and only then the gate opens. Connections in a rollback mode go on
//! as writers. One that opened a WAL on the replica stays a reader for its life: its file is open
//! for reading alone, because SQLite would else say "disk I/O error" to whoever writes on a replica.

use std::sync::Arc;
use std::time::Duration;

use crate::clock;
use crate::task;

use super::context::{Event, Job};
use super::database::{Database, FileKind, State};
use super::error::StoreError;
use super::lane::READERS_WAIT;
use super::wal_cache::WalCache;
use super::{Role, Store};

/// How long a change of role waits for commits in flight. One that takes longer ends by itself.
const COMMIT_WAIT: Duration = Duration::from_secs(5);

/// What the kernel has to forget after a demotion.
#[derive(Default)]
struct Stale {
    /// The database file, if a transaction had written to it.
    database: Option<u64>,
    /// The WAL, from this offset on.
    wal: Option<(u64, u64)>,
}

impl Store {
    /// Changes what this node is: who may write, and what the mount shows. Blocks for a bounded
    /// time, on commits in flight and on a transaction that is being applied. Transactions that
    /// applications have open when it stops being primary fail.
    pub fn set_role(&self, role: Role) {
        let _one = task::lock(&self.role_change);
        let is_primary = role == Role::Primary;
        if !is_primary {
            self.context.gate.set_primary(false);
        } else {
            // The primary that gave this node its halt locks is none any more.
            self.databases().iter().for_each(|db| db.end_hold(None));
        }
        let old = std::mem::replace(&mut *self.role.write(), role.clone());
        if is_primary {
            if old != role {
                self.databases().iter().for_each(Database::promote);
            }
            match self.prepare_writes() {
                Ok(()) => self.context.gate.set_primary(true),
                Err(e) => tracing::error!(error = %e, "this primary takes no writes"),
            }
            // One that was being taken meanwhile; from now on none is.
            self.databases().iter().for_each(|db| db.end_hold(None));
        } else {
            if old == Role::Primary {
                self.demote();
            }
            self.prepare_replicas();
        }
        if old == role {
            return;
        }
        let mut names = vec![".primary".to_owned(), ".lag".to_owned()];
        if (old == Role::Primary) != is_primary {
            // Modes are others now.
            names.extend(self.databases().iter().flat_map(|d| d.mount_names()));
        }
        self.context.keep(Job::InvalidateEntries(names));
        self.context.publish(Event::PrimaryChange {
            is_primary,
            hostname: match role {
                Role::Replica { hostname } => hostname,
                Role::Primary => None,
            },
        });
    }

    /// Notes that this life of the node is one in which it takes writes: on disk when this returns.
    /// Without it none are taken.
    pub fn prepare_writes(&self) -> Result<(), StoreError> {
        self.context.lives.add(self.context.node_id)
    }

    fn demote(&self) {
        if !self.context.gate.drain(COMMIT_WAIT) {
            tracing::warn!(
                "commits in flight have not ended after {} s: is the disk stuck? They will be answered with an error",
                COMMIT_WAIT.as_secs()
            );
        }
        let gone: Vec<String> = self
            .super_journals
            .lock()
            .drain()
            .map(|(name, _)| name)
            .collect();
        self.context.keep(Job::InvalidateEntries(gone));
        self.regulate_lanes();
        let readers_until = clock::now() + READERS_WAIT;
        for db in self.databases() {
            if let Err(e) = db.leave_lane(readers_until) {
                tracing::error!(db = db.name(), error = %e, "what was written past this node could not be taken up");
                db.set_broken(
                    &mut db.lock(),
                    format!("{e}: start the node anew once the cause is mended"),
                );
                continue;
            }
            db.revoke_halt("this node is primary no more");
            if let Err(e) = db.demote() {
                tracing::error!(db = db.name(), error = %e, "a transaction that was open could not be cleared away");
            }
            self.forget_if_nothing(&db);
        }
    }

    fn prepare_replicas(&self) {
        for db in self.databases() {
            if let Err(e) = db.prepare_replica() {
                tracing::error!(db = db.name(), error = %e, "replica cannot be read in WAL mode");
            }
        }
    }
}

impl Database {
    /// Takes open transactions away from applications; see the module.
    pub(super) fn demote(self: &Arc<Self>) -> Result<(), StoreError> {
        let (stale, result) = {
            let mut st = self.lock();
            let mut stale = Stale::default();
            let result = self.take_back(&mut st, &mut stale);
            (stale, result)
        };
        if let Some(front) = self.context.front() {
            // Before anybody can get a lock that the writer gives up, or soon after: its pages
            // were never committed.
            if let Some(ino) = stale.database {
                front.invalidate_data(ino, 0, 0);
            }
            if let Some((ino, from)) = stale.wal {
                front.invalidate_data(ino, from, 0);
            }
            front.invalidate_entry(&self.mount_name(FileKind::Journal));
        }
        // A writer that was told an error has published nothing of what is committed.
        self.context.keep(Job::CheckIndex(self.clone()));
        result
    }

    fn take_back(&self, st: &mut State, stale: &mut Stale) -> Result<(), StoreError> {
        if st.committing || st.broken.is_some() {
            // The commit's flush is under way, and its end clears it away.
            return Ok(());
        }
        if let Some(wal) = &st.files.wal {
            stale.wal = Some((wal.ino, st.wal.committed_end()));
            let committed = st.wal.committed;
            st.wal.frames.truncate(committed);
            st.wal.tail.clear();
            st.wal.written_to = st.wal.written_to.min(st.wal.committed_end());
            st.wal.stale = true;
            st.wal_cache = WalCache::default();
        }
        if st.page_count == 0 {
            // Its first transaction never was.
            return self.remove_files(st);
        }
        stale.database = st.files.database.as_ref().map(|f| f.ino);
        self.roll_back(st)
    }

    /// The same for one that was being flushed then, by the thread that answers it.
    pub(super) fn take_away(&self, st: &mut State) -> Result<(), StoreError> {
        let inos = [&st.files.database, &st.files.journal].map(|f| f.as_ref().map(|f| f.ino));
        let rolled_back = self.roll_back(st);
        self.context.keep(Job::InvalidateEntries(vec![
            self.mount_name(FileKind::Journal),
        ]));
        for ino in inos.into_iter().flatten() {
            self.context.keep(Job::InvalidateData(ino));
        }
        rolled_back
    }

    /// Drops what a transaction of a rollback mode has written, and its journal.
    pub(super) fn roll_back(&self, st: &mut State) -> Result<(), StoreError> {
        self.withdraw(st)?;
        st.overlay.clear();
        st.journal_active = false;
        if let Some(file) = &st.files.database {
            let len = file
                .file
                .metadata()
                .map_err(StoreError::io("stat", self.path(FileKind::Database)))?
                .len();
            (st.view_size, st.base_size) = (len, len);
        }
        let Some(journal) = st.files.journal.take() else {
            return Ok(());
        };
        journal.delete();
        let path = self.path(FileKind::Journal);
        self.disk()
            .remove_file(&path)
            .map_err(StoreError::io("remove journal", &path))
    }

    /// Makes the database ready for writers; see the module.
    fn promote(self: &Arc<Self>) {
        if self.broken().is_some() {
            return;
        }
        if let Err(e) = self.settle_as_primary() {
            tracing::warn!(db = self.name, error = %e, "left in the journal mode of a replica");
        }
        // Most often nobody is in the middle of anything. Who is, is asked about again when it writes.
        self.check_index(Duration::ZERO);
    }
}
