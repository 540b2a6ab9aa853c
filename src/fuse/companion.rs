//! The thread that serves requests, on the processor of a client that makes one after the other.
//!
//! Client and node take turns, so each waits for the other to be woken. On one processor that takes
//! a third of the time that it takes across two (measured, see bench/RESULTS.md), but left alone the
//! scheduler moves the client to the processor that is idle as soon as it is woken. So while one
//! client has a run of requests, the thread that serves them stays on its processor, and is of the
//! class (SCHED_IDLE) that the scheduler lets a woken client displace at once.
//!
//! It moves it all the same when anything else wakes up for a moment, so the thread looks whether it
//! has to follow, and the node's other threads wake up rarely while there is a run.
//!
//! A thread of that class gets nearly nothing of a processor that others want too. So the crew's
//! monitor looks from time to time: no request served since, and the thread is as it was, for a
//! while that is doubled each time if it was kept from the processor.
//!
//! Invariants:
//! - `active` names the only thread that may be of that class. A thread that finds itself not named
//!   any more makes itself as it was.
//! - Without CAP_SYS_NICE, which it takes to come back from that class, nothing is done.

use std::cell::Cell;
use std::mem::zeroed;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use crate::clock;
use crate::thread::{self, Schedule};

/// Requests of one client in a row with which a run begins.
const RUN: u32 = 16;
/// Requests in a run after which the thread sees whether it is still on the client's processor.
const LOOK: u32 = 8;
/// Looks in a run after which nothing keeps the thread from the processor.
const STEADY: u32 = 64;
/// The first and the longest pause after a run in which the thread was kept from the processor.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Number of the capability CAP_SYS_NICE.
const CAP_SYS_NICE: u32 = 23;

/// See the module.
pub(super) struct Companion {
    /// How the threads are otherwise; `None`: nothing can be done.
    usual: Option<&'static Schedule>,
    /// ID of the thread that is with its client; 0: none.
    active: AtomicI32,
    /// In nanoseconds of [`clock::boot_time`]: no run begins before.
    rest_until: AtomicU64,
    /// Nanoseconds.
    pause: AtomicU64,
}

/// What a thread knows of the client whose request it serves.
#[derive(Clone, Copy, Default)]
struct Served {
    client: u32,
    count: u32,
    /// The processor that the thread stays on.
    processor: Option<usize>,
    /// How often the thread had gone to sleep when that was last seen to.
    slept: i64,
    /// How often it was seen to be with the client.
    steady: u32,
}

thread_local! {
    static SERVED: Cell<Served> = const { Cell::new(Served { client: 0, count: 0, processor: None, slept: 0, steady: 0 }) };
}

impl Companion {
    pub fn new() -> Companion {
        Companion {
            usual: thread::usual().filter(|_| has_capability(CAP_SYS_NICE)),
            active: AtomicI32::new(0),
            rest_until: AtomicU64::new(0),
            pause: AtomicU64::new(nanos(FIRST_PAUSE)),
        }
    }

    /// This thread serves a request of this client's thread; 0: nobody knows which.
    pub fn note(&self, client: u32) {
        if self.usual.is_none() {
            return;
        }
        let mut served = SERVED.get();
        if client != served.client || client == 0 {
            if served.processor.is_some() {
                self.leave();
            }
            served = Served {
                client,
                ..Served::default()
            };
        } else {
            served.count += 1;
            let enough = match served.processor {
                Some(_) => LOOK,
                None => RUN,
            };
            if served.count >= enough {
                served.count = 0;
                self.look(client, &mut served);
            }
        }
        SERVED.set(served);
    }

    fn look(&self, client: u32, served: &mut Served) {
        // On one processor the next request is there when the last one is answered.
        let before = std::mem::replace(&mut served.slept, times_slept());
        let is_apart = served.slept - before >= i64::from(LOOK / 2);
        let is_with_it = served.processor.is_some() && self.active.load(SeqCst) == thread_id();
        if is_with_it && !is_apart {
            served.steady += 1;
            if served.steady == STEADY {
                self.pause.store(nanos(FIRST_PAUSE), SeqCst);
            }
        } else {
            served.processor = self.accompany(client, served.processor);
            if served.processor.is_none() {
                served.steady = 0;
            }
        }
    }

    /// Whether a client is accompanied: nobody else makes requests.
    pub fn is_active(&self) -> bool {
        self.active.load(SeqCst) != 0
    }

    /// The client waits for the disk now: a run of its ends, and another is yet to begin. Where each
    /// commit does so there is nothing to be won.
    pub fn note_disk(&self) {
        let served = SERVED.take();
        if served.processor.is_some() {
            self.leave();
        }
    }

    /// No request was served for a while.
    pub fn note_stall(&self) {
        let thread = self.active.swap(0, SeqCst);
        if thread == 0 {
            return;
        }
        let is_kept_from_it =
            field_of_stat(&format!("self/task/{thread}"), 3) == Some("R".to_owned());
        self.restore(thread);
        if !is_kept_from_it {
            // It waits for the disk, or for the client.
            return;
        }
        let pause = self.pause.load(SeqCst);
        self.rest_until
            .store(clock::boot_time().saturating_add(pause), SeqCst);
        self.pause
            .store((pause * 2).min(nanos(LONGEST_PAUSE)), SeqCst);
    }

    /// Goes to the client's processor, or stays there; which it is, if it is one.
    fn accompany(&self, client: u32, processor: Option<usize>) -> Option<usize> {
        let this = thread_id();
        if processor.is_some() && self.active.load(SeqCst) != this {
            self.restore(this);
            return None;
        }
        if processor.is_none() && clock::boot_time() < self.rest_until.load(SeqCst) {
            return None;
        }
        let Some(its) = processor_of(client) else {
            return processor;
        };
        if processor == Some(its) {
            return processor;
        }
        if processor.is_none()
            && self
                .active
                .compare_exchange(0, this, SeqCst, SeqCst)
                .is_err()
        {
            return None;
        }
        if !thread::stay_on(its) || !thread::give_way() {
            self.leave();
            return None;
        }
        if self.active.load(SeqCst) != this {
            // A stall was noticed just now.
            self.restore(this);
            return None;
        }
        Some(its)
    }

    fn leave(&self) {
        let this = thread_id();
        // Fails if the monitor was first.
        let _ = self.active.compare_exchange(this, 0, SeqCst, SeqCst);
        self.restore(this);
    }

    fn restore(&self, thread: i32) {
        let done = self.usual.map_or(Ok(()), |usual| usual.give(thread));
        // It may have ended.
        if let Err(error) = done
            && error.raw_os_error() != Some(libc::ESRCH)
        {
            tracing::warn!(%error, "a thread that serves requests stays in the class SCHED_IDLE");
        }
    }
}

fn nanos(time: Duration) -> u64 {
    time.as_nanos() as u64
}

fn thread_id() -> i32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::gettid() }
}

/// How often this thread went to sleep so far.
fn times_slept() -> i64 {
    // SAFETY: the call fills a structure that is valid with all bits zero and outlives it.
    unsafe {
        let mut usage: libc::rusage = zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &mut usage);
        usage.ru_nvcsw
    }
}

/// The processor that a thread runs on, or ran on last.
fn processor_of(thread: u32) -> Option<usize> {
    field_of_stat(&thread.to_string(), 39)?.parse().ok()
}

/// A field, from the third on, of a thread's /proc/…/stat; see proc_pid_stat(5).
fn field_of_stat(thread: &str, number: usize) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{thread}/stat")).ok()?;
    // The second, in parentheses, may be of any characters.
    let (_, fields) = text.rsplit_once(')')?;
    let field = fields.split_ascii_whitespace().nth(number - 3)?;
    Some(field.to_owned())
}

fn has_capability(number: u32) -> bool {
    let text = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = text.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let bits = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    bits.is_some_and(|bits| bits >> number & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::thread::tests::schedule;

    /// A thread of its own, whose class and processors the others do not share.
    fn alone(test: impl FnOnce() + Send + 'static) {
        std::thread::spawn(test).join().unwrap();
    }

    #[test]
    fn a_run_of_one_client_is_accompanied_until_another_comes() {
        alone(|| {
            let companion = Companion::new();
            if companion.usual.is_none() {
                return;
            }
            let (before, client) = (schedule().1, std::process::id());
            for _ in 0..=RUN {
                assert_eq!(schedule().0, libc::SCHED_OTHER);
                companion.note(client);
            }
            assert_eq!(schedule(), (libc::SCHED_IDLE, 1));
            companion.note(1);
            assert_eq!(schedule(), (libc::SCHED_OTHER, before));
            for _ in 0..10 * RUN {
                companion.note(0);
            }
            assert_eq!(
                schedule().0,
                libc::SCHED_OTHER,
                "a client that nobody knows"
            );
        });
    }

    #[test]
    fn after_a_stall_the_thread_is_as_it_was_and_stays_so_for_a_while() {
        alone(|| {
            let companion = Companion::new();
            if companion.usual.is_none() {
                return;
            }
            let (before, client) = (schedule().1, std::process::id());
            companion.note_stall();
            (0..=RUN).for_each(|_| companion.note(client));
            assert_eq!(schedule().0, libc::SCHED_IDLE);
            companion.note_stall();
            assert_eq!(schedule(), (libc::SCHED_OTHER, before));
            (0..10 * RUN).for_each(|_| companion.note(client));
            assert_eq!(schedule(), (libc::SCHED_OTHER, before));
            companion.rest_until.store(0, SeqCst);
            (0..=RUN).for_each(|_| companion.note(client));
            assert_eq!(schedule().0, libc::SCHED_IDLE);
        });
    }

    #[test]
    fn a_client_that_waits_for_the_disk_is_not_accompanied() {
        alone(|| {
            let companion = Companion::new();
            if companion.usual.is_none() {
                return;
            }
            let (before, client) = (schedule().1, std::process::id());
            for _ in 0..10 {
                (1..RUN).for_each(|_| companion.note(client));
                companion.note_disk();
            }
            assert_eq!(schedule().0, libc::SCHED_OTHER);
            (0..=RUN).for_each(|_| companion.note(client));
            assert_eq!(schedule().0, libc::SCHED_IDLE);
            companion.note_disk();
            assert_eq!(schedule(), (libc::SCHED_OTHER, before));
        });
    }

    #[test]
    fn one_thread_at_a_time_accompanies_a_client() {
        alone(|| {
            let companion = Companion::new();
            if companion.usual.is_none() {
                return;
            }
            let client = std::process::id();
            (0..=RUN).for_each(|_| companion.note(client));
            assert_eq!(schedule().0, libc::SCHED_IDLE);
            std::thread::scope(|s| {
                s.spawn(|| {
                    // It inherits the class.
                    companion.restore(thread_id());
                    (0..10 * RUN).for_each(|_| companion.note(client));
                    assert_eq!(schedule().0, libc::SCHED_OTHER);
                });
            });
        });
    }
}
