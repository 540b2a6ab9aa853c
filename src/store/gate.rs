//! The gate of commits: may applications commit at this moment, and may a commit that was begun
//! still be acknowledged?
//!
//! Applications may begin a commit while this node is primary, its lease has not ended and writes
//! are not paused. A commit holds a [`Pass`] from before it is logged until it is answered, and
//! asks it for the verdict immediately before the answer: a process that was stopped in between
//! and wakes up past the end of its lease answers an error. What is logged then stands in the log;
//! its fate is decided like that of any transaction that nobody was told of.
//!
//! The end of a lease is compared with `CLOCK_BOOTTIME`, which goes on while the machine sleeps.
//!
//! Invariants:
//! - `end` is 0 unless this node is primary. `term` changes whenever the node stops being primary,
//!   so that a pass of an earlier time as primary is never good again.
//! - A pass is counted before the gate is looked at, and the gate is closed before passes are
//!   counted: whoever paused and found none knows that no later commit is acknowledged.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::clock::{self, boot_time};

/// No end.
const FOR_EVER: u64 = u64::MAX;

/// See the module.
#[derive(Debug, Default)]
pub struct Gate {
    inputs: Mutex<Inputs>,
    /// `CLOCK_BOOTTIME`, in nanoseconds, from which on nothing is acknowledged any more.
    end: AtomicU64,
    paused: AtomicBool,
    term: AtomicU64,
    passes: AtomicUsize,
    /// Rung, with `inputs` locked, when the last pass is given back while writes are paused.
    drained: Condvar,
}

#[derive(Debug, Default)]
struct Inputs {
    primary: bool,
    /// As `end`; `None`: the lease has no end.
    lease: Option<u64>,
}

/// The right to log one commit, and to acknowledge it while [`Pass::is_good`].
#[derive(Debug)]
pub struct Pass {
    gate: Arc<Gate>,
    term: u64,
}

impl Gate {
    /// Whether applications may begin a commit.
    pub fn is_open(&self) -> bool {
        !self.paused.load(SeqCst) && self.is_valid()
    }

    /// Whether this node is primary and its lease has not ended: what was begun may be acknowledged.
    pub fn is_valid(&self) -> bool {
        match self.end.load(SeqCst) {
            0 => false,
            FOR_EVER => true,
            end => boot_time() < end,
        }
    }

    /// This node becomes primary, or stops being it. Either ends a pause.
    pub fn set_primary(&self, primary: bool) {
        let mut inputs = self.inputs.lock();
        if inputs.primary != primary {
            self.paused.store(false, SeqCst);
        }
        inputs.primary = primary;
        if !primary {
            self.term.fetch_add(1, SeqCst);
        }
        self.renew(&inputs);
    }

    /// Sets the end of the lease; `None`: it has none.
    pub fn set_lease_end(&self, until: Option<Instant>) {
        let mut inputs = self.inputs.lock();
        inputs.lease = until.map(boot_time_of);
        self.renew(&inputs);
    }

    fn renew(&self, inputs: &Inputs) {
        let end = match inputs.lease {
            _ if !inputs.primary => 0,
            None => FOR_EVER,
            Some(end) => end,
        };
        self.end.store(end, SeqCst);
    }

    /// Lets no further commit begin.
    pub fn pause(&self) {
        self.paused.store(true, SeqCst);
    }

    /// Ends a pause.
    pub fn resume(&self) {
        self.paused.store(false, SeqCst);
    }

    /// Waits until every pass is given back; false: some are out after `limit`. To be called while
    /// the gate is closed.
    pub fn drain(&self, limit: Duration) -> bool {
        let deadline = clock::now() + limit;
        #[cfg(test)]
        if crate::sim::process::in_coroutine() {
            // Nothing else runs while this thread waits.
            while self.passes.load(SeqCst) > 0 && clock::now() < deadline {
                clock::pause(Duration::from_millis(1));
            }
            return self.passes.load(SeqCst) == 0;
        }
        let mut inputs = self.inputs.lock();
        while self.passes.load(SeqCst) > 0 {
            if self.drained.wait_until(&mut inputs, deadline).timed_out() {
                return self.passes.load(SeqCst) == 0;
            }
        }
        true
    }

    /// The right to commit, if the gate is open.
    pub fn pass(self: &Arc<Self>) -> Option<Pass> {
        // The term first: if it changes after, the pass is not good.
        let term = self.term.load(SeqCst);
        self.passes.fetch_add(1, SeqCst);
        let pass = Pass {
            gate: self.clone(),
            term,
        };
        self.is_open().then_some(pass)
    }
}

impl Pass {
    /// Whether the commit may be acknowledged now.
    pub fn is_good(&self) -> bool {
        self.gate.is_valid() && self.gate.term.load(SeqCst) == self.term
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let gate = &self.gate;
        let last = gate.passes.fetch_sub(1, SeqCst) == 1;
        if last && (gate.paused.load(SeqCst) || gate.end.load(SeqCst) == 0) {
            // Locked, so that whoever has just counted is already waiting.
            let _inputs = gate.inputs.lock();
            gate.drained.notify_all();
        }
    }
}

/// [`boot_time`] at an instant, or a little before it.
fn boot_time_of(until: Instant) -> u64 {
    // In this order: what passes in between is taken off.
    let (boot, now) = (boot_time(), clock::now());
    let nanos = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(FOR_EVER);
    let end = match until.checked_duration_since(now) {
        Some(ahead) => boot.saturating_add(nanos(ahead)),
        None => boot.saturating_sub(nanos(now.duration_since(until))),
    };
    end.clamp(1, FOR_EVER - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_for_a_primary_within_its_lease_that_is_not_paused() {
        let gate = Arc::new(Gate::default());
        assert!(!gate.is_open() && gate.pass().is_none());
        gate.set_primary(true);
        assert!(gate.is_open());
        gate.set_lease_end(Some(Instant::now() + Duration::from_secs(60)));
        assert!(gate.is_open());
        gate.pause();
        assert!(!gate.is_open() && gate.pass().is_none());
        gate.resume();
        assert!(gate.is_open());
        gate.set_lease_end(Some(Instant::now()));
        assert!(!gate.is_open());
        gate.set_lease_end(Some(Instant::now() + Duration::from_millis(40)));
        assert!(gate.is_open());
        std::thread::sleep(Duration::from_millis(50));
        assert!(!gate.is_open(), "it ends by itself");
        gate.set_lease_end(None);
        assert!(gate.is_open());
        gate.set_primary(false);
        assert!(!gate.is_open());
        assert_eq!(gate.passes.load(SeqCst), 0, "refused passes are given back");
    }

    #[test]
    fn a_pass_is_good_in_its_own_term_and_within_the_lease() {
        let gate = Arc::new(Gate::default());
        gate.set_primary(true);
        let pass = gate.pass().unwrap();
        gate.pause();
        assert!(pass.is_good(), "a pause lets commits end that were begun");
        gate.set_lease_end(Some(Instant::now()));
        assert!(!pass.is_good());
        gate.set_lease_end(None);
        assert!(pass.is_good(), "the lease was renewed after all");
        gate.set_primary(false);
        assert!(!pass.is_good());
        gate.set_primary(true);
        assert!(!pass.is_good(), "another time as primary");
        assert!(gate.is_open(), "the pause ended with the role");
        assert!(gate.pass().unwrap().is_good());
    }

    #[test]
    fn a_pause_waits_for_passes() {
        let gate = Arc::new(Gate::default());
        gate.set_primary(true);
        let pass = gate.pass().unwrap();
        gate.pause();
        assert!(!gate.drain(Duration::from_millis(20)));
        let other = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            drop(pass);
        });
        let began = Instant::now();
        assert!(gate.drain(Duration::from_secs(10)));
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "woken, not timed out"
        );
        other.join().unwrap();
    }
}
