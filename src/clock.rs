//! The clocks that a node goes by.
//!
//! They are the system's; but with tokio's time paused (a simulation) all of them are tokio's.

use std::time::{Duration, Instant};

/// This moment by the monotonic clock.
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Nanoseconds since the machine was started, time asleep included. Never 0.
pub fn boot_time() -> u64 {
    #[cfg(test)]
    if let Some(nanos) = crate::sim::process::boot_time() {
        return nanos;
    }
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call fills the structure that it is given.
    let r = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut t) };
    assert_eq!(r, 0, "every Linux since 2.6.39 has CLOCK_BOOTTIME");
    (t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64).max(1)
}

/// Blocks this thread.
pub fn pause(time: Duration) {
    #[cfg(test)]
    if crate::sim::process::in_coroutine() {
        return crate::sim::process::wait(tokio::time::sleep(time));
    }
    std::thread::sleep(time);
}
