//! Backups: what the primary commits goes to a place outside of the cluster, within about a second.
//!
//! The protocol, which [`task`] keeps and every [`BackupClient`] relies on:
//! - A backup holds, for each database, a chain of LTX files that begins with a snapshot. Only the
//!   primary adds to it, and only transactions that are on its disk. It adds what follows the
//!   chain's end: many transactions in one file.
//! - Log records above the chain's end are not pruned, here or at replicas, which are told of it
//!   (`HWM` frames): whoever is primary next can go on where this one stopped.
//! - A database that the backup is ahead of is restored from it if the node has nothing of it, or
//!   if the node's position is one that the backup has had. Otherwise the two have different pasts:
//!   that is an error, which an operator resolves, and neither is overwritten.
//! - If the node is ahead and it is not known whether the chain is its past, the node's snapshot
//!   begins a new chain, and the old one is set aside within the backup.
//! - A chain that is damaged is set aside within the backup, and a new snapshot begins another. It is
//!   looked at as often, and as slowly, as the node's own data ([`check`]).
//! - A backup that fails stops nothing else. It is tried again, and complained of once a minute.
//!
//! An object store would be another implementation of [`BackupClient`]; `file` documents a layout
//! in which objects are written once under a name that says what they hold, and never changed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::ltx::{LtxError, Pos};
use crate::store::StoreError;

mod check;
pub mod file;
mod patience;
pub mod task;

/// Why something could not be backed up or restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// A system call on a file of the backup failed.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file of the backup is damaged, or no LTX file.
    #[error("{}: {source}", path.display())]
    Ltx {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: LtxError,
    },
    /// Something in the backup is not as it must be.
    #[error("{}: {what}", path.display())]
    Corrupt {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Whoever keeps the backup says nothing, neither yes nor no.
    #[error(
        "the backup {place} does not answer within {seconds} s: look at the disk or network that it is on"
    )]
    Hangs {
        /// Where it is.
        place: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// This node's database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What was to be added does not follow the backup's end.
    #[error("transactions of {db} from {min:016x} on do not follow the backup, which is at {end}")]
    Gap {
        /// The database.
        db: String,
        /// First TXID of what was to be added.
        min: u64,
        /// Where the backup is.
        end: Pos,
    },
    /// Backup and node have different pasts.
    #[error(
        "{db} is at {here} on this node and at {backup} in the backup, which is another history: \
         nothing is overwritten. Import the one that is right, or move the backup of {db} away"
    )]
    Diverged {
        /// The database.
        db: String,
        /// This node's position.
        here: Pos,
        /// The backup's.
        backup: Pos,
    },
    /// The backup is another cluster's.
    #[error(
        "the backup belongs to cluster {backup}, this node to {here}: name another backup.path, or \
         start with an empty data directory to restore"
    )]
    Cluster {
        /// The backup's.
        backup: String,
        /// This node's, or "none".
        here: String,
    },
}

impl BackupError {
    /// Whether what is stored is not what was written.
    pub fn is_damage(&self) -> bool {
        match self {
            BackupError::Ltx { source, .. } => !matches!(source, LtxError::Io(_)),
            BackupError::Corrupt { .. } => true,
            _ => false,
        }
    }

    /// For `map_err`: names the action and the file.
    pub(crate) fn io(
        action: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(io::Error) -> BackupError {
        let path = path.as_ref().to_owned();
        move |source| BackupError::Io {
            action,
            path,
            source,
        }
    }

    /// For `map_err`: says which file it was.
    pub(crate) fn ltx(path: impl AsRef<Path>) -> impl FnOnce(LtxError) -> BackupError {
        let path = path.as_ref().to_owned();
        move |source| BackupError::Ltx { path, source }
    }
}

/// Transactions in a row, in one LTX file.
#[derive(Debug)]
pub struct Batch {
    /// The position before the first of them; zero: the file is a snapshot.
    pub from: Pos,
    /// For a snapshot: whether the backup's end is known to be in its past.
    pub continues: bool,
    /// The positions after each of them that are known, ascending; the last is the file's end.
    pub positions: Vec<Pos>,
    /// The LTX file, from byte 0 on.
    pub ltx: File,
}

impl Batch {
    /// The position that it ends at.
    pub fn end(&self) -> Pos {
        self.positions.last().copied().unwrap_or_default()
    }
}

/// A place for backups. Its methods block, and are called by one thread, but for
/// [`BackupClient::verify`], which another calls.
///
/// What an implementation guarantees: when [`BackupClient::write`] returns, the batch is there for
/// good; if it fails or the process dies, the chain is as before. What is damaged is an error, and
/// is never returned.
pub trait BackupClient: Send + Sync {
    /// Where it is, for messages.
    fn place(&self) -> String;

    /// The cluster whose backup this is; `None` while there is nothing in it.
    fn cluster_id(&self) -> Result<Option<String>, BackupError>;

    /// Makes it that cluster's.
    fn set_cluster_id(&self, id: &str) -> Result<(), BackupError>;

    /// The end of each database's chain.
    fn positions(&self) -> Result<BTreeMap<String, Pos>, BackupError>;

    /// Whether the chain of the database has gone through this position. May say no of one that is
    /// long past.
    fn contains(&self, db: &str, pos: Pos) -> Result<bool, BackupError>;

    /// Adds to the chain; a snapshot takes its place.
    ///
    /// # Errors
    /// [`BackupError::Gap`] if the batch does not follow the chain's end.
    fn write(&self, db: &str, batch: &mut Batch) -> Result<(), BackupError>;

    /// Reads the whole chain and checks it; `read` is told of bytes as they are read, and says
    /// whether to go on. What is added or replaced meanwhile may be left out.
    ///
    /// # Errors
    /// [`BackupError::is_damage`] if it is not what was written.
    fn verify(&self, db: &str, read: &mut dyn FnMut(u64) -> bool) -> Result<(), BackupError>;

    /// Writes the whole chain as one snapshot (an LTX file), checked to its last byte.
    fn fetch_snapshot(&self, db: &str, out: &mut dyn Write) -> Result<Pos, BackupError>;
}
