//! Copies: a database file that a program which knows nothing of SQLite (cp, dd, a shell) writes
//! into the mount.
//!
//! SQLite opens its files for reading and writing; who opens a database for writing alone, and
//! empties it or has just made it, copies one. What it writes is collected in a file of no name, and
//! takes the database's place when it is closed, as an import does: one transaction, under SQLite's
//! own locks, that open connections see as any other.
//!
//! Invariants:
//! - Nobody sees anything of a copy before it is imported, and a copy that is no whole database
//!   changes nothing.
//! - While it is being imported it takes no writes.
//! - Once a program was told that it is refused, it stays so, unless more is written.
//! - If its file is deleted meanwhile, it goes nowhere.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::sqlite::header;

use super::Store;
use super::database::{Database, DbFile, FileKind};
use super::error::StoreError;
use super::files::MAX_FILE_SIZE;
use super::import::ImportError;

/// A database file opened for writing alone.
pub struct CopiedFile {
    store: Arc<Store>,
    db: Arc<Database>,
    file: Arc<DbFile>,
    /// It was made for this copy.
    made: bool,
    state: Mutex<State>,
}

enum State {
    /// The database is as it was: nothing may be written into it.
    Whole,
    /// The database counts as empty, nothing is written yet.
    Empty,
    /// What was written so far, and what is to be done with it.
    Begun { spool: File, then: Then },
    /// It is being imported.
    Busy,
    /// It began as no database does.
    Refused,
}

/// What is to be done with a copy when it is closed.
#[derive(Clone, Copy, PartialEq)]
enum Then {
    /// It is the database already.
    Nothing,
    Import,
    /// A program was told that it was refused. That stays true, unless more is written.
    Refuse,
}

impl CopiedFile {
    /// For a file that was opened for writing alone; `made`: by this very call.
    pub fn new(
        store: &Arc<Store>,
        db: &Arc<Database>,
        file: &Arc<DbFile>,
        made: bool,
    ) -> CopiedFile {
        assert!(file.kind == FileKind::Database, "others are no databases");
        let empty = made || db.size(file).is_ok_and(|size| size == 0);
        let state = if empty { State::Empty } else { State::Whole };
        CopiedFile {
            store: store.clone(),
            db: db.clone(),
            file: file.clone(),
            made,
            state: Mutex::new(state),
        }
    }

    /// Inode number of the file.
    pub fn ino(&self) -> u64 {
        self.file.ino
    }

    /// The file was emptied, by whoever opened it; whether nothing was written since.
    pub fn empty(&self) -> bool {
        let mut state = self.state.lock();
        if matches!(*state, State::Whole) {
            *state = State::Empty;
        }
        matches!(*state, State::Empty)
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// [`StoreError::NotADatabase`] if they are the first ones, and no database begins with them.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        if offset.saturating_add(data.len() as u64) > MAX_FILE_SIZE {
            return Err(self.refuse("a copy beyond the largest size of a database"));
        }
        let begins = data.len().min(header::MAGIC.len());
        if offset == 0 && data[..begins] != header::MAGIC[..begins] {
            let what = "what is written does not begin as a SQLite database does, and nothing else can be kept here";
            let mut state = self.state.lock();
            if matches!(*state, State::Empty) {
                *state = State::Refused;
            }
            return Err(self.not_a_database(what));
        }
        self.change(|spool| spool.write_all_at(data, offset))
    }

    /// Sets the size; 0 has the database count as empty.
    pub fn truncate(&self, size: u64) -> Result<(), StoreError> {
        if size > MAX_FILE_SIZE {
            return Err(self.refuse("a copy beyond the largest size of a database"));
        }
        if size == 0 {
            self.empty();
        }
        self.change(|spool| spool.set_len(size))
    }

    fn change(&self, change: impl FnOnce(&File) -> std::io::Result<()>) -> Result<(), StoreError> {
        let mut state = self.state.lock();
        if matches!(*state, State::Empty) {
            let spool = self.store.spool_file()?;
            *state = State::Begun {
                spool,
                then: Then::Nothing,
            };
        }
        match &mut *state {
            State::Begun { spool, then } => {
                *then = Then::Import;
                change(spool).map_err(StoreError::io(
                    "keep a copy in",
                    &self.store.context.options.data_dir,
                ))
            }
            State::Busy => {
                Err(self.refuse("a write to a copy while it takes the database's place"))
            }
            State::Refused => Err(self.not_a_database("it does not begin as a database does")),
            State::Whole | State::Empty => Err(self.refuse(
                "a write into the database behind SQLite's back: a copy replaces all of it",
            )),
        }
    }

    /// Makes what was written the database, if that is not done yet. Blocks, as an import does.
    ///
    /// # Errors
    /// Those of [`Store::import`]; nothing is changed then, and more can be written.
    pub fn finish(&self) -> Result<(), StoreError> {
        let spool = {
            let mut state = self.state.lock();
            match std::mem::replace(&mut *state, State::Busy) {
                State::Begun {
                    spool,
                    then: Then::Import,
                } => spool,
                other => {
                    let verdict = match &other {
                        State::Begun {
                            then: Then::Refuse, ..
                        } => Err(self.refuse("a copy that was refused already")),
                        _ => Ok(()),
                    };
                    *state = other;
                    return verdict;
                }
            }
        };
        let result = self.import(&spool);
        *self.state.lock() = State::Begun {
            spool,
            then: match result {
                Ok(()) => Then::Nothing,
                Err(_) => Then::Refuse,
            },
        };
        if let Err(e) = &result {
            tracing::warn!(
                db = self.db.name(),
                "a file that was copied here does not take the database's place: {e}"
            );
        }
        result
    }

    fn import(&self, spool: &File) -> Result<(), StoreError> {
        let name = self.db.name();
        let copy = spool
            .try_clone()
            .map_err(StoreError::io("read a copy of", name))?;
        if self.file.is_deleted() {
            return Err(StoreError::Deleted(name.to_owned()));
        }
        match self.store.import(name, copy) {
            Ok(_) => Ok(()),
            Err(ImportError::Store(e)) => Err(e),
            Err(ImportError::Invalid(what)) => Err(StoreError::NotADatabase {
                db: name.to_owned(),
                what: format!("no SQLite database, or not a whole one: {what}"),
            }),
        }
    }

    /// The file was closed for the last time. Blocks if something is still to be imported: a system
    /// that does not say when a file is closed by a process had no chance to be told the outcome.
    pub fn close(&self) {
        // Said in the log.
        let refused = matches!(*self.state.lock(), State::Refused);
        if (self.finish().is_err() || refused) && self.made && !self.file.is_deleted() {
            self.db.remove_unwritten();
        }
    }

    /// Whether closing it has nothing to do.
    pub fn is_done(&self) -> bool {
        !matches!(
            *self.state.lock(),
            State::Begun {
                then: Then::Import | Then::Refuse,
                ..
            } | State::Busy
                | State::Refused
        )
    }

    fn refuse(&self, what: &str) -> StoreError {
        let e = StoreError::Refused {
            db: self.db.name().to_owned(),
            what: what.to_owned(),
        };
        self.db.warn_rarely(&e);
        e
    }

    fn not_a_database(&self, what: impl Into<String>) -> StoreError {
        let e = StoreError::NotADatabase {
            db: self.db.name().to_owned(),
            what: what.into(),
        };
        self.db.warn_rarely(&e);
        e
    }
}
