//! A transaction of a rollback mode that is logged before its commit point.
//!
//! SQLite syncs the database before it ends the journal. What the transaction changes is complete
//! then, so its record is logged and flushed at that sync, and the end of the journal waits for no
//! disk: an unlink holds the directory, and with it the journals of all other databases.
//!
//! Invariants:
//! - Until the journal ends nobody is told of the transaction: it is neither in the state nor, for
//!   whoever reads it, in the log.
//! - Whatever changes the held-back pages, or ends the transaction in another way, withdraws the
//!   record first: it is gone from the disk before that is answered.
//! - A start that finds the record takes the transaction for committed. Its writer was told neither.

use std::sync::Arc;

use crate::sqlite::journal;

use super::capture::{Captured, WalPlace};
use super::database::{Database, FileKind, State};
use super::disk::Reader;
use super::error::StoreError;
use super::files::Done;
use super::gate::Pass;

impl Database {
    /// A sync of the database file: answered once the transaction under way, if there is one, is on
    /// disk. What cannot be logged is left to the commit point, whose answer says why.
    pub(super) fn log_at_sync(self: &Arc<Self>, done: Done) {
        let mut st = self.lock();
        let logged = match self.log_early(&mut st) {
            Ok(Some(logged)) => logged,
            Ok(None) => return done(Ok(())),
            Err(e) => {
                drop(st);
                self.warn_rarely(&e);
                return done(Ok(()));
            }
        };
        st.committing = true;
        drop(st);
        let (captured, pass) = logged;
        let db = self.clone();
        self.log().flush(move |flushed| {
            let mut st = db.lock();
            st.committing = false;
            let flushed = flushed.map_err(StoreError::io("flush the log of", &db.dir));
            let result = match flushed {
                Ok(()) if db.context.gate.is_valid() => {
                    st.early = Some(captured);
                    Ok(())
                }
                Err(e) if db.context.gate.is_valid() => Err(e),
                // The transaction was left to this when the node stopped being primary.
                flushed => {
                    st.early = flushed.is_ok().then_some(captured);
                    let e = flushed.err();
                    let e = e.unwrap_or_else(|| StoreError::NotPrimary(db.name.clone()));
                    db.take_away(&mut st).and(Err(e))
                }
            };
            drop(st);
            done(result);
            drop(pass);
        });
    }

    /// Logs the transaction under way, if it can be committed by the end of its journal alone.
    fn log_early(&self, st: &mut State) -> Result<Option<(Captured, Pass)>, StoreError> {
        let may = st.journal_active && !st.committing && !st.importing && st.page_count > 0;
        if !may || st.early.is_some() || self.holds_halt() || !self.context.gate.is_open() {
            return Ok(None);
        }
        // Its own end is the commit then.
        if self.has_super_journal(st)? {
            return Ok(None);
        }
        let Some((changed, shape)) = self.changes(st)? else {
            return Ok(None);
        };
        let pass = self.begin_commit()?;
        let read = |pgno: u32, page: &mut [u8]| self.read_view_page(st, pgno, page);
        let (captured, appender) =
            self.append_transaction(st, changed, shape, WalPlace::default(), read)?;
        appender.hold()?;
        Ok(Some((captured, pass)))
    }

    /// The transaction that was logged early, which is committed now.
    pub(super) fn confirm_early(
        &self,
        st: &mut State,
    ) -> Result<Option<(Captured, Pass)>, StoreError> {
        if st.early.is_none() {
            return Ok(None);
        }
        let pass = match self.check_usable(st).and_then(|()| self.begin_commit()) {
            Ok(pass) => pass,
            Err(e) => return self.withdraw(st).and(Err(e)),
        };
        let captured = st.early.take().filter(|c| self.log().confirm(c.pos.txid));
        Ok(captured.map(|c| (c, pass)))
    }

    /// Takes back what is logged of the transaction under way: it changes, or is rolled back.
    pub(super) fn withdraw(&self, st: &mut State) -> Result<(), StoreError> {
        match st.early.take() {
            Some(_) => self.log().withdraw(),
            None => Ok(()),
        }
    }

    /// Whether the journal names a super-journal.
    fn has_super_journal(&self, st: &State) -> Result<bool, StoreError> {
        let Some(file) = st.files.journal.as_ref().map(|j| j.file.clone()) else {
            return Ok(false);
        };
        let named = file
            .size()
            .and_then(|len| journal::super_journal_name(Reader::new(file), len));
        named
            .map(|name| name.is_some())
            .map_err(self.io("read", FileKind::Journal))
    }
}
