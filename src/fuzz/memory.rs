//! What a thread allocates, counted, so that a bound on it can be asserted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// One allocation that nobody who reads hostile input may ask for; it fails, which ends the process.
const ABSURD: usize = 4 << 30;

thread_local! {
    static NOW: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, with a count for each thread.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

fn add(bytes: usize) {
    // A thread that ends may have no counters any more.
    let _ = NOW.try_with(|now| {
        now.set(now.get().wrapping_add(bytes));
        // Memory that another thread allocated and this one gave back makes it negative.
        if now.get() as isize > PEAK.get() as isize {
            PEAK.set(now.get());
        }
    });
}

fn subtract(bytes: usize) {
    let _ = NOW.try_with(|now| now.set(now.get().wrapping_sub(bytes)));
}

// SAFETY: memory comes from and goes back to the system's allocator with the layouts given; the
// counters are plain cells without destructors, whose use allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > ABSURD {
            return std::ptr::null_mut();
        }
        add(layout.size());
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() > ABSURD {
            return std::ptr::null_mut();
        }
        add(layout.size());
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        subtract(layout.size());
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if size > ABSURD {
            return std::ptr::null_mut();
        }
        subtract(layout.size());
        add(size);
        // SAFETY: the caller's contract is the same.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

/// What `work` gives; panics if this thread had more than `limit` bytes more than before at any
/// moment of it.
pub fn bounded<T>(what: &str, limit: usize, work: impl FnOnce() -> T) -> T {
    let before = NOW.get();
    PEAK.set(before);
    let result = work();
    let peak = PEAK.get().wrapping_sub(before);
    assert!(
        peak <= limit,
        "{what} took {peak} bytes, {limit} are allowed"
    );
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_at_any_moment_counts() {
        let small = |_| vec![0u8; 1000];
        assert_eq!(
            bounded("ten, one after the other", 1100, || (0..10)
                .map(small)
                .map(|v| v.len())
                .sum::<usize>()),
            10_000
        );
        let kept = std::panic::catch_unwind(|| {
            bounded("ten at once", 1100, || {
                (0..10).map(small).collect::<Vec<_>>()
            })
        });
        assert!(kept.is_err());
    }
}
