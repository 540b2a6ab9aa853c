//! Super-journals: SQLite's files that make a transaction over several databases one.
//!
//! Each database's journal names it; its unlink is the commit of all of them. The parts are
//! prepared first: nothing is committed if any of them cannot be. Then an [`Intent`] that holds
//! them all is put on disk, which is the commit, and then each goes into its database's log and
//! file. The journals go afterwards, and have nothing left to say.

use std::sync::Arc;

use parking_lot::Mutex;

use super::capture::Captured;
use super::context::Job;
use super::error::StoreError;
use super::files::Done;
use super::intent::Intent;
use super::rollback::JournalEnd;
use super::{Database, Store};

/// Longest super-journal: it holds the paths of a few journals.
const MAX_SIZE: u64 = 1 << 20;
/// How many there may be at a time.
const MAX_COUNT: usize = 1024;

/// A super-journal, in memory alone: after a crash no journal that names it is left, and what was
/// committed by its end is in an intent.
#[derive(Debug)]
pub struct SuperJournal {
    /// Its inode number.
    pub ino: u64,
    data: Mutex<Vec<u8>>,
}

impl SuperJournal {
    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.data.lock().len() as u64
    }

    /// Copies bytes out; returns how many there were.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> usize {
        let data = self.data.lock();
        let start = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(data.len());
        let n = buf.len().min(data.len() - start);
        buf[..n].copy_from_slice(&data[start..start + n]);
        n
    }

    /// Writes bytes; false if it would become too long.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> bool {
        let end = offset.saturating_add(bytes.len() as u64);
        if end > MAX_SIZE {
            return false;
        }
        let mut data = self.data.lock();
        if data.len() < end as usize {
            data.resize(end as usize, 0);
        }
        data[offset as usize..end as usize].copy_from_slice(bytes);
        true
    }

    /// Sets its size; false if that is too much.
    pub fn truncate(&self, size: u64) -> bool {
        if size > MAX_SIZE {
            return false;
        }
        self.data.lock().resize(size as usize, 0);
        true
    }
}

impl Store {
    /// The super-journal of this name.
    pub fn super_journal(&self, name: &str) -> Option<Arc<SuperJournal>> {
        self.super_journals.lock().get(name).cloned()
    }

    /// Makes it if there is none.
    pub fn create_super_journal(&self, name: &str) -> Result<Arc<SuperJournal>, StoreError> {
        if !self.context.is_writable() {
            return Err(StoreError::NotPrimary(name.to_owned()));
        }
        let mut journals = self.super_journals.lock();
        if journals.len() >= MAX_COUNT && !journals.contains_key(name) {
            return Err(StoreError::Refused {
                db: name.to_owned(),
                what: format!("more than {MAX_COUNT} super-journals at a time"),
            });
        }
        let made = || {
            Arc::new(SuperJournal {
                ino: self.context.next_ino(),
                data: Mutex::default(),
            })
        };
        Ok(journals.entry(name.to_owned()).or_insert_with(made).clone())
    }

    /// The commit of every database whose journal names it.
    pub fn unlink_super_journal(&self, name: &str) -> Result<(), StoreError> {
        if self.super_journal(name).is_none() {
            return Err(StoreError::NoDatabase(name.to_owned()));
        }
        let mut parts: Vec<Arc<Database>> = Vec::new();
        for db in self.databases() {
            if db.journal_names(name)? {
                parts.push(db);
            }
        }
        match &parts[..] {
            [] => {}
            [one] => commit_one(one)?,
            _ => self.commit_together(name, &parts)?,
        }
        self.super_journals.lock().remove(name);
        Ok(())
    }

    fn commit_together(&self, name: &str, parts: &[Arc<Database>]) -> Result<(), StoreError> {
        let pass = self.context.gate.pass();
        let pass = pass.ok_or_else(|| StoreError::NotPrimary(name.to_owned()))?;
        let mut intent = Intent::create(&self.context.options.disk, self.data_dir(), name)?;
        let mut prepared: Vec<(&Arc<Database>, Captured)> = Vec::new();
        let committed = parts
            .iter()
            .try_for_each(|db| {
                let mut st = db.lock();
                db.check_writable(&mut st)?;
                let captured = intent.part(db.name(), |out| db.prepare_rollback(&mut st, out))?;
                if let Some(captured) = captured {
                    st.committing = true;
                    prepared.push((db, captured));
                }
                Ok(())
            })
            .and_then(|()| intent.commit());
        if let Err(e) = committed {
            // SQLite rolls all of them back, each with its journal.
            for (db, _) in prepared {
                let mut st = db.lock();
                st.committing = false;
                if intent.is_in_doubt() {
                    let reason = format!(
                        "{e}: whether the transaction is committed is decided when the node starts anew"
                    );
                    db.set_broken(&mut st, reason);
                }
            }
            return Err(e);
        }
        // From here on the journals that name it are no reason to roll back.
        self.super_journals.lock().remove(name);
        let results: Vec<_> = prepared
            .iter()
            .enumerate()
            .map(|(i, (db, captured))| db.finish_prepared(captured, &mut intent.body(i)))
            .collect();
        results.into_iter().collect::<Result<Vec<()>, _>>()?;
        // Those that did not change: their journals end like the others'.
        for db in parts
            .iter()
            .filter(|db| prepared.iter().all(|(p, _)| !Arc::ptr_eq(p, db)))
        {
            commit_one(db)?;
        }
        intent.remove()?;
        if pass.is_good() {
            return Ok(());
        }
        // Its name is gone, and the kernel is told an error.
        self.context
            .keep(Job::InvalidateEntries(vec![name.to_owned()]));
        Err(StoreError::Unanswered(name.to_owned()))
    }
}

/// A single database needs no intent: its log is the commit.
fn commit_one(db: &Arc<Database>) -> Result<(), StoreError> {
    let (tx, rx) = std::sync::mpsc::channel();
    let done: Done = Box::new(move |r| {
        // The receiver waits for it.
        tx.send(r).ok();
    });
    db.end_journal(JournalEnd::SuperJournal, done);
    rx.recv().unwrap_or_else(|_| {
        Err(StoreError::Refused {
            db: db.name().to_owned(),
            what: "a commit was abandoned".to_owned(),
        })
    })
}
