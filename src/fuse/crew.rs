//! Which of the threads that serve requests wait for the next one.
//!
//! The kernel gives requests to waiting threads in turn. Where each commit waits for the disk, it
//! is fastest if one thread alone takes them all: the scheduler then keeps it by its client, and a
//! commit takes half the time that it takes with four (measured, see bench/RESULTS.md). So the
//! others are parked, inside the end of the last request that they served. Where one client makes
//! a run of requests, that thread goes to its processor (see [`Companion`]).
//!
//! One thread must not hold everybody up while it waits for a disk, so a monitor looks every
//! millisecond, while there are requests at all: if no thread is waiting in the kernel and none has
//! finished a request since it last looked, a parked one is called. It looks more rarely while there
//! is one client alone: each time that it wakes up the scheduler moves that client away. Where several
//! clients are at work a parked thread is called at once by the one that is about to flush.
//!
//! Invariant: `reading` is the number of threads that are, or are about to be, waiting in the
//! kernel for a request.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::Thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::thread;

use super::companion::Companion;

/// How often the monitor looks.
const TICK: Duration = Duration::from_millis(1);
/// The same while one client alone makes requests.
const TICK_ALONE: Duration = Duration::from_millis(5);
/// Ticks without a request after which the monitor sleeps.
const IDLE_TICKS: u32 = 50;

/// Requests since another client's within which several clients are at work.
const TOGETHER: u64 = 64;

/// The threads of a mount; see the module.
pub(super) struct Crew {
    reading: AtomicIsize,
    /// Requests served.
    served: AtomicU64,
    /// Whose request came last, and how many had been served when it was another client's before.
    client: AtomicU32,
    turned_at: AtomicU64,
    companion: Companion,
    parked: Mutex<Parked>,
    bell: Condvar,
    monitor: OnceLock<Thread>,
    monitor_sleeps: AtomicBool,
}

#[derive(Default)]
struct Parked {
    waiting: usize,
    called: usize,
    over: bool,
}

/// A request being served; its end decides whether the thread waits for the next one.
pub(super) struct Turn<'a>(&'a Crew);

thread_local! {
    /// Ends the crew when the first of its threads ends, because the mount has.
    static MEMBER: Cell<Option<Member>> = const { Cell::new(None) };
}

struct Member(Arc<Crew>);

impl Drop for Member {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl Crew {
    /// A crew of `size` threads, which are to be started now.
    pub fn new(size: usize) -> Arc<Crew> {
        let crew = Arc::new(Crew {
            reading: AtomicIsize::new(size as isize),
            served: AtomicU64::new(0),
            client: AtomicU32::new(0),
            turned_at: AtomicU64::new(0),
            companion: Companion::new(),
            parked: Mutex::default(),
            bell: Condvar::new(),
            monitor: OnceLock::new(),
            monitor_sleeps: AtomicBool::new(false),
        });
        let watched = Arc::downgrade(&crew);
        let watch = move || {
            let (mut last, mut idle) = (0, 0);
            while let Some(crew) = watched.upgrade().filter(|c| !c.parked.lock().over) {
                let served = crew.served.load(Ordering::Relaxed);
                let busy = crew.reading.load(Ordering::Relaxed) <= 0;
                if served == last {
                    crew.companion.note_stall();
                    if busy {
                        crew.call_one();
                    }
                }
                idle = if busy || served != last { 0 } else { idle + 1 };
                last = served;
                if idle < IDLE_TICKS {
                    std::thread::sleep(match crew.companion.is_active() {
                        true => TICK_ALONE,
                        false => TICK,
                    });
                } else {
                    crew.monitor_sleeps.store(true, Ordering::SeqCst);
                    // Woken by the next request; the time-out only ends it with the crew.
                    std::thread::park_timeout(Duration::from_secs(1));
                    crew.monitor_sleeps.store(false, Ordering::SeqCst);
                    idle = 0;
                }
            }
        };
        match thread::start("monitor", watch) {
            Ok(handle) => {
                let first = crew.monitor.set(handle.thread().clone()).is_ok();
                assert!(first, "a crew has one monitor");
            }
            // Without it, a request may wait for another client's flush.
            Err(e) => tracing::warn!(error = %e, "the mount's threads are not watched"),
        }
        crew
    }

    /// Number of requests served so far.
    pub fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }

    /// This thread serves a request of a client's thread until the turn is dropped.
    pub fn turn(self: &Arc<Self>, client: u32) -> Turn<'_> {
        self.companion.note(client);
        if self.client.swap(client, Ordering::Relaxed) != client {
            self.turned_at.store(self.served(), Ordering::Relaxed);
        }
        self.reading.fetch_sub(1, Ordering::Relaxed);
        if self.monitor_sleeps.load(Ordering::Relaxed)
            && self.monitor_sleeps.swap(false, Ordering::SeqCst)
            && let Some(monitor) = self.monitor.get()
        {
            monitor.unpark();
        }
        let member = MEMBER.take();
        MEMBER.set(Some(member.unwrap_or_else(|| Member(self.clone()))));
        Turn(self)
    }

    /// The request that this thread serves may wait for the disk.
    pub fn note_disk(&self) {
        self.companion.note_disk();
    }

    /// It may flush the log.
    pub fn note_flush(&self) {
        let turned_at = self.turned_at.load(Ordering::Relaxed);
        if self.served().saturating_sub(turned_at) < TOGETHER
            && self.reading.load(Ordering::Relaxed) <= 0
        {
            self.call_one();
        }
    }

    fn call_one(&self) {
        let mut parked = self.parked.lock();
        if parked.waiting > parked.called {
            parked.called += 1;
            self.reading.fetch_add(1, Ordering::Relaxed);
            self.bell.notify_one();
        }
    }

    fn end_turn(&self) {
        self.served.fetch_add(1, Ordering::Relaxed);
        if self.reading.fetch_add(1, Ordering::Relaxed) < 1 {
            return;
        }
        let mut parked = self.parked.lock();
        if parked.over {
            return;
        }
        self.reading.fetch_sub(1, Ordering::Relaxed);
        parked.waiting += 1;
        while parked.called == 0 && !parked.over {
            self.bell.wait(&mut parked);
        }
        parked.waiting -= 1;
        parked.called = parked.called.saturating_sub(1);
    }

    /// Lets every thread go, to find that the mount has ended.
    fn end(&self) {
        self.parked.lock().over = true;
        self.bell.notify_all();
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.end_turn();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Instant;

    /// Threads that take requests from a queue as those of a mount do from the kernel.
    fn start(
        crew: &Arc<Crew>,
        size: usize,
    ) -> (mpsc::Sender<Duration>, Vec<std::thread::JoinHandle<()>>) {
        let (tx, rx) = mpsc::channel::<Duration>();
        let rx = Arc::new(Mutex::new(rx));
        let threads = (0..size).map(|_| {
            let (crew, rx) = (crew.clone(), rx.clone());
            std::thread::spawn(move || {
                loop {
                    let request = rx.lock().recv();
                    let Ok(time) = request else { return };
                    let _turn = crew.turn(0);
                    std::thread::sleep(time);
                }
            })
        });
        let threads = threads.collect();
        (tx, threads)
    }

    #[test]
    fn a_thread_that_waits_long_is_stood_in_for() {
        let crew = Crew::new(3);
        let (tx, threads) = start(&crew, 3);
        for _ in 0..20 {
            tx.send(Duration::ZERO).unwrap();
        }
        while crew.served() < 20 - 3 {
            std::thread::sleep(TICK);
        }
        let began = Instant::now();
        tx.send(Duration::from_millis(800)).unwrap();
        tx.send(Duration::from_millis(800)).unwrap();
        tx.send(Duration::ZERO).unwrap();
        while crew.served() < 18 {
            std::thread::sleep(TICK);
        }
        assert!(
            began.elapsed() < Duration::from_millis(600),
            "held up for {:?}",
            began.elapsed()
        );
        drop(tx);
        let patience = Instant::now() + Duration::from_secs(10);
        for t in threads {
            while !t.is_finished() {
                assert!(
                    Instant::now() < patience,
                    "a parked thread does not end with the others"
                );
                std::thread::sleep(TICK);
            }
        }
    }
}
