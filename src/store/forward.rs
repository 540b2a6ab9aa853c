//! Forwarded writes: what a replica that holds the halt lock of a database does.
//!
//! While the lock is held, the database is for applications of this node what it is on a primary:
//! they write, and the same modules capture. Two things differ. The verdict of a commit is the
//! primary's: the LTX file goes there first, and only what it has taken is logged and applied here,
//! before the application is answered. And the lock may be lost at any time; then open transactions
//! fail as at a change of role (`role_change`), and the database follows the stream again.
//!
//! Invariants:
//! - The lock counts as held only from a moment at which the database was at exactly the lock's
//!   position, and nothing that another node made is applied while it is: what comes ends it first.
//! - While a commit is in flight the state does not move. It is decided exactly once: by the
//!   primary's answer, by the stream that brings it, or by the end of the wait for either.
//! - A commit that nobody can decide ends the lock: whatever the primary has comes with the stream.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::clock;
use crate::ltx::Pos;

use crate::task;

use super::capture::Captured;
use super::context::Job;
use super::database::{Database, State};
use super::disk::Scratch;
use super::error::StoreError;
use super::files::Done;
use super::receive::{Incoming, Spool};
use super::rollback::JournalEnd;
use super::wal::{PreparedWal, Scanned};

/// How long the primary keeps the lock for a holder that it does not hear of.
pub const HALT_TTL: Duration = Duration::from_secs(30);
/// How long taking the lock may take, all in all.
pub const HALT_WAIT: Duration = Duration::from_secs(10);
/// How often it is looked whether the one who waits for the lock still wants it.
const CANCEL_CHECK: Duration = Duration::from_millis(100);
/// How long to wait for a writer of an earlier time to leave the WAL.
const INDEX_WAIT: Duration = Duration::from_millis(500);

/// What the primary says of a transaction that was forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is part of the history, and durable.
    Accepted,
    /// It is not, and the lock is still held. The reason.
    Refused(String),
    /// It is not, and the lock is lost. The reason.
    Lost(String),
    /// Nobody knows. The reason.
    Unknown(String),
}

/// Whether whoever waits has given up.
pub type Cancelled<'a> = &'a (dyn Fn() -> bool + Sync);

/// The primary, as a replica that wants to write needs it. Its calls block for a bounded time.
pub trait Primary: Send + Sync {
    /// Takes the halt lock `id` and keeps it alive until [`Primary::release`]; the position that the
    /// replica must be at. A failure leaves nothing taken. Says [`Database::lose_halt`] when the
    /// lock cannot be kept.
    fn take(&self, db: &str, id: i64, until: Instant, cancelled: Cancelled) -> Result<Pos, String>;

    /// Gives the lock up, in the background.
    fn release(&self, db: &str, id: i64);

    /// Sends a transaction. `decided` is called in any case, from a thread that may block.
    fn commit(&self, db: &str, id: i64, ltx: Arc<Outgoing>, decided: Decided);
}

/// Answers the application. It may commit again at once, so nothing is in flight then.
type Answer = Box<dyn FnOnce()>;
type Decide = Box<dyn FnOnce(Verdict) + Send>;

/// Receives a verdict, the first one; dropped without, it is [`Verdict::Unknown`].
pub struct Decided(Arc<Mutex<Option<Decide>>>);

impl Decided {
    #[cfg(test)]
    pub(crate) fn new(decide: impl FnOnce(Verdict) + Send + 'static) -> Decided {
        Decided(Arc::new(Mutex::new(Some(Box::new(decide)))))
    }

    /// Decides the commit, if it is not yet.
    pub fn call(self, verdict: Verdict) {
        decide(&self.0, verdict);
    }
}

impl Drop for Decided {
    fn drop(&mut self) {
        decide(&self.0, Verdict::Unknown("the commit was abandoned".into()));
    }
}

fn decide(slot: &Mutex<Option<Decide>>, verdict: Verdict) {
    let first = slot.lock().take();
    if let Some(first) = first {
        first(verdict);
    }
}

/// The LTX file of a transaction on its way to the primary: in memory, or in a file if it is large.
pub struct Outgoing(Spool);

impl Outgoing {
    pub(crate) fn new(scratch: Scratch) -> Outgoing {
        Outgoing(Spool::new(scratch))
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.0.size()
    }

    /// Copies bytes from `offset` on; returns how many, 0 at the end.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read_at(offset, buf)
    }
}

impl Write for Outgoing {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.add(buf)?;
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads an [`Outgoing`] from its beginning.
struct FromStart<'a>(&'a Outgoing, u64);

impl Read for FromStart<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.0.read_at(self.1, buf)?;
        self.1 += n as u64;
        Ok(n)
    }
}

/// Whether this node holds the halt lock of a database, see the module.
#[derive(Default)]
pub(super) struct Hold {
    state: Mutex<HoldState>,
    changed: Condvar,
    held: AtomicBool,
    /// What was last committed to the WAL, if anything, was the primary's decision: a flush has
    /// nothing to add.
    pub(super) decided_there: AtomicBool,
}

#[derive(Default)]
struct HoldState {
    phase: Phase,
    in_flight: Option<InFlight>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Free,
    /// Somebody is asking the primary, or waits for the position.
    Taking,
    Held(i64),
    /// Open transactions are being cleared away.
    Ending,
}

struct InFlight {
    pos: Pos,
    slot: Arc<Mutex<Option<Decide>>>,
}

impl Hold {
    /// Whether applications of this node may write.
    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    fn set(&self, state: &mut HoldState, phase: Phase) {
        state.phase = phase;
        let held = matches!(phase, Phase::Held(_));
        self.held.store(held, Ordering::Release);
        self.changed.notify_all();
    }
}

impl Database {
    /// Whether applications may commit: on the primary, or while this node holds the halt lock.
    pub fn is_writable(&self) -> bool {
        self.context.is_writable() || self.hold.is_held()
    }

    /// Whether this node, a replica, holds the halt lock.
    pub fn holds_halt(&self) -> bool {
        self.hold.is_held()
    }

    /// Takes the halt lock for applications of this node, and returns its ID once they may write.
    /// Blocks: on others here who have it, on the primary, and until the position is reached.
    ///
    /// # Errors
    /// [`StoreError::HaltLock`] at `until`, when `cancelled`, or when the primary refuses; nothing is
    /// taken then.
    pub fn take_halt(
        self: &Arc<Self>,
        until: Instant,
        cancelled: Cancelled,
    ) -> Result<i64, StoreError> {
        let primary = self.context.primary();
        let primary =
            primary.ok_or_else(|| self.halt_error("there is nobody to ask for the halt lock"))?;
        self.enter_taking(until, cancelled)?;
        let id = rand::random_range(1..=i64::MAX);
        let taken = match primary.take(&self.name, id, until, cancelled) {
            Err(why) => Err(self.halt_error(format!("the halt lock was not granted: {why}"))),
            Ok(pos) => self
                .await_pos(pos, until, cancelled)
                .and_then(|()| self.begin_hold(id, pos))
                .inspect_err(|_| primary.release(&self.name, id)),
        };
        if let Err(e) = taken {
            let mut state = self.hold.state.lock();
            self.hold.set(&mut state, Phase::Free);
            return Err(e);
        }
        // A transaction of an earlier time may have left the WAL's index behind.
        self.check_index(INDEX_WAIT);
        self.context
            .keep(Job::InvalidateEntries(self.mount_names()));
        Ok(id)
    }

    fn enter_taking(&self, until: Instant, cancelled: Cancelled) -> Result<(), StoreError> {
        let mut state = self.hold.state.lock();
        while state.phase != Phase::Free {
            if cancelled() || clock::now() >= until {
                return Err(self.halt_error("the halt lock is in use on this node"));
            }
            let step = until.min(clock::now() + CANCEL_CHECK);
            self.hold.changed.wait_until(&mut state, step);
        }
        self.hold.set(&mut state, Phase::Taking);
        Ok(())
    }

    /// Waits until the database is at this position.
    fn await_pos(
        &self,
        wanted: Pos,
        until: Instant,
        cancelled: Cancelled,
    ) -> Result<(), StoreError> {
        loop {
            let pos = self.wait_pos(wanted, until.min(clock::now() + CANCEL_CHECK));
            if pos == wanted {
                return Ok(());
            }
            if cancelled() || clock::now() >= until {
                return Err(self.halt_error(format!(
                    "the halt lock is for position {wanted}, this replica is at {pos}"
                )));
            }
        }
    }

    /// Makes the database the applications', if it is where the lock is.
    fn begin_hold(self: &Arc<Self>, id: i64, pos: Pos) -> Result<(), StoreError> {
        // The applier is not in the middle of anything, and comes to see that the lock is held.
        let mut locks = task::lock(&self.replica);
        self.check_usable(&self.lock())?;
        if self.captured_pos() != pos || self.context.is_writable() {
            return Err(self.halt_error("the position moved while the halt lock was taken"));
        }
        self.settle_mode(&mut locks)?;
        locks.close(self);
        // No commit of an earlier time is still to be answered by a flush: its writer is gone.
        self.hold.decided_there.store(true, Ordering::Release);
        let mut state = self.hold.state.lock();
        self.hold.set(&mut state, Phase::Held(id));
        Ok(())
    }

    /// Gives the lock up, if it is still this one.
    pub fn release_halt(self: &Arc<Self>, id: i64) {
        self.end_hold(Some(id));
    }

    /// The lock is lost: open transactions fail. `id`: if it is still this one.
    pub fn lose_halt(self: &Arc<Self>, id: i64, why: &str) {
        if self.hold.state.lock().phase == Phase::Held(id) {
            tracing::warn!(db = self.name, why, "the halt lock is lost");
            self.end_hold(Some(id));
        }
    }

    /// Ends the hold, whoever began it, and waits for its end if another one ends it. Nothing, if
    /// the lock is not held.
    pub(super) fn end_hold(self: &Arc<Self>, only: Option<i64>) {
        let id = {
            let mut state = self.hold.state.lock();
            while state.phase == Phase::Ending {
                self.hold.changed.wait(&mut state);
            }
            let Phase::Held(id) = state.phase else { return };
            if only.is_some_and(|only| only != id) {
                return;
            }
            self.hold.set(&mut state, Phase::Ending);
            while state.in_flight.is_some() {
                self.hold.changed.wait(&mut state);
            }
            id
        };
        self.clear_away(id);
    }

    /// The end of [`Database::end_hold`].
    fn clear_away(self: &Arc<Self>, id: i64) {
        let cleared = self.demote().and_then(|()| {
            if self.context.is_writable() {
                Ok(())
            } else {
                self.prepare_replica()
            }
        });
        if let Err(e) = cleared {
            tracing::error!(db = self.name, error = %e, "a transaction that was open could not be cleared away");
        }
        self.context
            .keep(Job::InvalidateEntries(self.mount_names()));
        let mut state = self.hold.state.lock();
        self.hold.set(&mut state, Phase::Free);
        drop(state);
        if let Some(primary) = self.context.primary() {
            primary.release(&self.name, id);
        }
    }

    /// Whether this transaction, which this node made, is here. One that is in flight is decided by
    /// it: the primary has it.
    pub(super) fn knows_own(&self, incoming: &Incoming) -> bool {
        let mut state = self.hold.state.lock();
        let arrived = |f: &InFlight| f.pos == incoming.pos();
        if let Some(slot) = state.in_flight.as_ref().filter(|f| arrived(f)) {
            let slot = slot.slot.clone();
            drop(state);
            decide(&slot, Verdict::Accepted);
            state = self.hold.state.lock();
            while state.in_flight.as_ref().is_some_and(arrived) {
                self.hold.changed.wait(&mut state);
            }
        }
        drop(state);
        self.lock().pos.txid >= incoming.pos().txid
    }

    /// Sends a transaction that was prepared on the state. `finish` does what the verdict asks for
    /// and gives the application's answer; the state does not move before.
    fn forward(
        self: &Arc<Self>,
        pos: Pos,
        ltx: Arc<Outgoing>,
        finish: impl FnOnce(&Verdict) -> Answer + Send + 'static,
    ) {
        let mut state = self.hold.state.lock();
        let (Phase::Held(id), None, Some(primary)) =
            (state.phase, &state.in_flight, self.context.primary())
        else {
            drop(state);
            return finish(&Verdict::Refused("the halt lock is not held".into()))();
        };
        let db = self.clone();
        let decide: Decide = Box::new(move |verdict| db.decided(id, &verdict, finish));
        let slot = Arc::new(Mutex::new(Some(decide)));
        state.in_flight = Some(InFlight {
            pos,
            slot: slot.clone(),
        });
        drop(state);
        primary.commit(&self.name, id, ltx, Decided(slot));
    }

    fn decided(
        self: &Arc<Self>,
        id: i64,
        verdict: &Verdict,
        finish: impl FnOnce(&Verdict) -> Answer,
    ) {
        let lost = match verdict {
            Verdict::Accepted | Verdict::Refused(_) => false,
            Verdict::Lost(why) | Verdict::Unknown(why) => {
                tracing::warn!(db = self.name, why, "the halt lock is lost at a commit");
                true
            }
        };
        let mut state = self.hold.state.lock();
        // Nothing more is written from here on; whoever ends the hold already does the rest.
        let ends = lost && state.phase == Phase::Held(id);
        if ends {
            self.hold.set(&mut state, Phase::Ending);
        }
        drop(state);
        let answer = finish(verdict);
        self.hold.state.lock().in_flight = None;
        self.hold.changed.notify_all();
        answer();
        if ends {
            self.clear_away(id);
        }
    }

    /// The commit point of a rollback mode.
    pub(super) fn end_journal_there(self: &Arc<Self>, end: JournalEnd, done: Done) {
        let mut st = self.lock();
        let mut ltx = Outgoing::new(self.scratch());
        let captured = self
            .check_writable(&mut st)
            .and_then(|()| self.prepare_rollback(&mut st, &mut ltx));
        let captured = match captured {
            Ok(Some(c)) => c,
            Ok(None) => {
                let result = self.end_unchanged(&mut st, end);
                drop(st);
                return done(result);
            }
            Err(e) => {
                drop(st);
                self.warn_rarely(&e);
                return done(Err(e));
            }
        };
        st.committing = true;
        let journal = st.files.journal.as_ref().map(|j| j.ino);
        drop(st);
        let (db, ltx) = (self.clone(), Arc::new(ltx));
        self.forward(captured.pos, ltx.clone(), move |verdict| {
            let result = match db.accepted(verdict) {
                Ok(()) => db
                    .finish_prepared(&captured, &mut FromStart(&ltx, 0))
                    .and_then(|()| db.finish_journal(&mut db.lock(), end)),
                Err(e) => {
                    // SQLite goes on to roll back with its journal.
                    db.lock().committing = false;
                    Err(e)
                }
            };
            Box::new(move || {
                let failed = result.is_err();
                done(result);
                if failed {
                    db.forget_journal(journal);
                }
            })
        });
    }

    /// A write to the WAL.
    pub(super) fn write_wal_there(self: &Arc<Self>, offset: u64, data: &[u8], done: Done) {
        let mut st = self.lock();
        match self.write_wal(&mut st, offset, data) {
            Ok(Scanned::Forward(prepared)) => {
                st.wal.forwarding = true;
                drop(st);
                self.commit_wal_there(*prepared, done);
            }
            Ok(Scanned::Nothing | Scanned::Committed) => {
                drop(st);
                done(Ok(()));
            }
            Err(e) => {
                drop(st);
                self.warn_rarely(&e);
                done(Err(e));
            }
        }
    }

    fn commit_wal_there(self: &Arc<Self>, prepared: PreparedWal, done: Done) {
        let db = self.clone();
        let ltx = prepared.ltx.clone();
        self.forward(prepared.captured.pos, ltx.clone(), move |verdict| {
            let mut st = db.lock();
            st.wal.forwarding = false;
            let result = match db.accepted(verdict) {
                Ok(()) => db.take_prepared_wal(&mut st, &prepared),
                Err(e) => db.undo_commit_frame(&mut st, prepared.end - 1).and(Err(e)),
            };
            drop(st);
            Box::new(move || done(result))
        });
    }

    /// Logs what the primary has taken, and moves the state on. What fails now sets the database
    /// aside, until a snapshot of the primary's takes its place.
    fn take_prepared_wal(
        self: &Arc<Self>,
        st: &mut State,
        prepared: &PreparedWal,
    ) -> Result<(), StoreError> {
        let c: &Captured = &prepared.captured;
        let logged = self
            .log()
            .begin(c.pos.txid, c.pos.txid)
            .and_then(|mut appender| {
                io::copy(&mut FromStart(&prepared.ltx, 0), &mut appender)
                    .map_err(StoreError::io("append to the log of", &self.dir))?;
                appender.commit()
            });
        if let Err(e) = logged {
            self.set_broken(st, format!("{e}: the primary has a transaction that could not be kept here; start the node anew once the cause is mended"));
            return Err(e);
        }
        self.hold.decided_there.store(true, Ordering::Release);
        self.commit_wal(st, c, &prepared.pages, prepared.end);
        Ok(())
    }

    fn accepted(&self, verdict: &Verdict) -> Result<(), StoreError> {
        let why = match verdict {
            Verdict::Accepted => return Ok(()),
            Verdict::Refused(why) => format!("the primary did not take a transaction: {why}"),
            Verdict::Lost(why) => {
                format!("the primary did not take a transaction, and the halt lock is lost: {why}")
            }
            Verdict::Unknown(why) => format!(
                "the primary may or may not have taken a transaction, and the halt lock is given up: {why}"
            ),
        };
        let e = self.halt_error(why);
        self.warn_rarely(&e);
        Err(e)
    }

    pub(super) fn halt_error(&self, what: impl Into<String>) -> StoreError {
        StoreError::HaltLock {
            db: self.name.clone(),
            what: what.into(),
        }
    }

    /// Whether an fsync of the WAL answers no commit of this node's own.
    pub(super) fn decided_there(&self) -> bool {
        self.hold.decided_there.load(Ordering::Acquire)
    }
}
