//! A thread of its own that ends a primary whose lease is over.
//!
//! Commits are refused from that moment anyway: the store looks at the clock itself. The watchdog
//! is for what only waits, the streams to replicas above all, and for a runtime in which nothing
//! goes on any more: it depends on neither the task that renews nor on the lease service.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use crate::clock;
use crate::thread;

use super::Status;

#[derive(Debug)]
struct Shared {
    /// When the lease is over; `None`: the watch is.
    end: Mutex<Option<Instant>>,
    changed: Condvar,
}

/// Watches one lease until it is dropped.
#[derive(Debug)]
pub(super) struct Watchdog(Arc<Shared>);

impl Watchdog {
    /// Says in `status` that the node is no longer primary once `end` has passed.
    pub fn start(end: Instant, status: watch::Sender<Status>) -> std::io::Result<Watchdog> {
        let shared = Arc::new(Shared {
            end: Mutex::new(Some(end)),
            changed: Condvar::new(),
        });
        let watched = shared.clone();
        #[cfg(test)]
        if crate::sim::process::current().is_some() {
            // Threads have no part in a simulation.
            crate::task::spawn(async move {
                while let Some(at) = watched.check(&status) {
                    tokio::time::sleep_until(at.into()).await;
                }
            });
            return Ok(Watchdog(shared));
        }
        thread::start("watchdog", move || watched.watch(&status))?;
        Ok(Watchdog(shared))
    }

    /// The lease was renewed. False: it is too late, the node is told of as primary no longer.
    pub fn extend(&self, end: Instant) -> bool {
        let mut watched = self.0.end.lock();
        let in_time = watched.is_some();
        if in_time {
            *watched = Some(end);
            self.0.changed.notify_one();
        }
        in_time
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        *self.0.end.lock() = None;
        self.0.changed.notify_one();
    }
}

impl Shared {
    fn watch(&self, status: &watch::Sender<Status>) {
        while let Some(at) = self.check(status) {
            let mut end = self.end.lock();
            if *end == Some(at) {
                self.changed.wait_until(&mut end, at);
            }
        }
    }

    /// Ends this primary if its lease is over; else gives the moment when that will be, unless the
    /// watch is over.
    fn check(&self, status: &watch::Sender<Status>) -> Option<Instant> {
        let mut watched = self.end.lock();
        let end = (*watched)?;
        if clock::now() < end {
            return Some(end);
        }
        *watched = None;
        status.send_if_modified(|s| std::mem::replace(&mut s.is_primary, false));
        tracing::debug!("the watchdog has ended this primary: its lease is over");
        None
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn it_ends_a_primary_that_is_not_renewed() {
        let status = watch::Sender::new(Status {
            is_primary: true,
            ..Status::default()
        });
        let soon = |ms| Instant::now() + Duration::from_millis(ms);
        let watchdog = Watchdog::start(soon(50), status.clone()).unwrap();
        assert!(watchdog.extend(soon(400)));
        std::thread::sleep(Duration::from_millis(200));
        assert!(status.borrow().is_primary);
        std::thread::sleep(Duration::from_millis(400));
        assert!(!status.borrow().is_primary);
        assert!(!watchdog.extend(soon(400)), "too late");

        status.send_modify(|s| s.is_primary = true);
        drop(Watchdog::start(soon(50), status.clone()).unwrap());
        std::thread::sleep(Duration::from_millis(150));
        assert!(status.borrow().is_primary, "the watch was over");
    }
}
