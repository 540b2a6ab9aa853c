//! What can go wrong in the store. Every error is logged or answered by whoever receives it; the
//! file system's callers see only [`StoreError::errno`].

use std::io;
use std::path::{Path, PathBuf};

use crate::ltx::{LtxError, Pos};

/// An error of the store: what was attempted, on what, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A system call on a file of the data directory failed.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A transaction file does not keep its format.
    #[error("{context}: {source}")]
    Ltx {
        /// Where the file came from.
        context: String,
        /// What is wrong with it.
        source: LtxError,
    },
    /// A received transaction does not follow the position that the database is at.
    #[error(
        "transaction of {db} needs position {need}, this node has {have}: a snapshot is needed"
    )]
    PositionMismatch {
        /// The database.
        db: String,
        /// The position that this node has.
        have: Pos,
        /// The position that the transaction was made on.
        need: Pos,
    },
    /// The database cannot be used until it is repaired or fetched again.
    #[error("database {db} is set aside: {reason}")]
    Broken {
        /// The database.
        db: String,
        /// Why it was set aside.
        reason: String,
    },
    /// Stored bytes are not what was written.
    #[error("{}: {what}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// There is room for no more databases.
    #[error(
        "there are {0} databases already, the most that a node can have, dropped ones included"
    )]
    TooManyDatabases(usize),
    /// This name cannot be that of a database.
    #[error(
        "invalid database name {0:?}: it must be a file name of at most 200 bytes that does not end in -journal, -wal, -shm, -pos or -lock"
    )]
    Name(String),
    /// No database has this name.
    #[error("no database {0:?} on this node")]
    NoDatabase(String),
    /// A write arrived at a node that may not write.
    #[error("{0}: this node is a replica, writes go to the primary")]
    NotPrimary(String),
    /// Another process uses the data directory.
    #[error("data directory {} is in use by another node: stop it, or give this one a directory of its own", .0.display())]
    InUse(PathBuf),
    /// The node belongs to another cluster.
    #[error(
        "this node belongs to cluster {have}, not to {other}: give it an empty data directory or correct the lease key"
    )]
    ClusterId {
        /// The cluster of this data directory.
        have: String,
        /// The cluster that was offered.
        other: String,
    },
    /// An application did what no transaction of SQLite does.
    #[error("{db}: {what}")]
    Refused {
        /// The database.
        db: String,
        /// What was refused, and what to do instead.
        what: String,
    },
    /// A program that holds none of SQLite's locks would change a file of a database in use.
    #[error(
        "{file}: thread {thread} would change it, holds none of SQLite's locks, and others use the database: only SQLite may (to load a file, use import)"
    )]
    Busy {
        /// The file's name in the mount.
        file: String,
        /// The thread's ID.
        thread: u32,
    },
    /// A file that was to become a database is none, or a damaged one.
    #[error("{db}: {what}")]
    NotADatabase {
        /// The database.
        db: String,
        /// What is the matter with the file.
        what: String,
    },
    /// The file was deleted while it was open.
    #[error("{0} was deleted")]
    Deleted(String),
    /// The file has become another while it was open, as its change counter does not tell that what
    /// an application has cached of it is of no use.
    #[error("{0} was replaced by the primary's: it is to be opened anew")]
    Replaced(String),
    /// Commits that were begun did not end in time.
    #[error("commits in flight have not ended after {seconds} s: the disk may be stuck")]
    CommitsInFlight {
        /// How long was waited, in seconds.
        seconds: u64,
    },
    /// The halt lock is not to be had, is not the caller's, or a forwarded commit failed.
    #[error("{db}: {what}")]
    HaltLock {
        /// The database.
        db: String,
        /// What is the matter with it.
        what: String,
    },
    /// A commit cannot be acknowledged any more.
    #[error(
        "{0}: this node stopped being primary before the transaction was answered: it may or may not be kept"
    )]
    Unanswered(String),
    /// A lock that a client holds was not given up in time.
    #[error("{db}: waited {seconds} s for {lock}{holder}")]
    LockTimeout {
        /// The database.
        db: String,
        /// Which of SQLite's locks.
        lock: &'static str,
        /// Who holds it, as the end of the message; empty if that is not known.
        holder: String,
        /// How long, in seconds.
        seconds: u64,
    },
}

impl StoreError {
    /// For `map_err`: names the action and the file.
    pub fn io(
        action: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(io::Error) -> StoreError {
        let path = path.as_ref().to_owned();
        move |source| StoreError::Io {
            action,
            path,
            source,
        }
    }

    /// For `map_err`: says where a transaction file came from.
    pub fn ltx(context: impl Into<String>) -> impl FnOnce(LtxError) -> StoreError {
        let context = context.into();
        move |source| StoreError::Ltx { context, source }
    }

    /// For `map_err`: stored bytes that break a format.
    pub fn corrupt(path: impl AsRef<Path>, what: impl Into<String>) -> StoreError {
        StoreError::Corrupt {
            path: path.as_ref().to_owned(),
            what: what.into(),
        }
    }

    /// The error number that an application's system call ends with.
    pub fn errno(&self) -> i32 {
        match self {
            StoreError::Io { source, .. } => match source.raw_os_error() {
                Some(
                    e @ (libc::ENOSPC | libc::EDQUOT | libc::EFBIG | libc::EMFILE | libc::ENFILE),
                ) => e,
                _ => libc::EIO,
            },
            StoreError::NotPrimary(_) => libc::EACCES,
            StoreError::Busy { .. } | StoreError::LockTimeout { .. } => libc::EBUSY,
            StoreError::Name(_) | StoreError::NotADatabase { .. } => libc::EINVAL,
            StoreError::TooManyDatabases(_) => libc::ENOSPC,
            StoreError::NoDatabase(_) => libc::ENOENT,
            // Of EIO SQLite makes a corrupt database.
            StoreError::Replaced(_) => libc::ESTALE,
            _ => libc::EIO,
        }
    }
}
