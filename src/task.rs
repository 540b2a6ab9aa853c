//! Where work runs: tasks of the runtime, blocking work beside it, and how the two wait.
//!
//! The role loop, the streams and the API start whatever they start through here. These are tokio's
//! own functions; but in a simulation (see `sim`), where a cluster runs on one thread, a task belongs
//! to the node that started it, and blocking work is a coroutine that gives way when it waits.

use tokio::task::JoinHandle;

#[cfg(test)]
use crate::sim::process;

/// Starts a task.
pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    #[cfg(test)]
    if let Some(process) = process::current() {
        return process.spawn(future);
    }
    tokio::spawn(future)
}

/// Starts work that waits for disks, locks, or by [`wait`] for tasks, on a thread for such work.
pub fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    #[cfg(test)]
    if let Some(process) = process::current() {
        return process.spawn(process::coroutine(work));
    }
    tokio::task::spawn_blocking(work)
}

/// Locks what may be held by work that waits.
pub fn lock<T>(mutex: &parking_lot::Mutex<T>) -> parking_lot::MutexGuard<'_, T> {
    #[cfg(test)]
    while process::in_coroutine() {
        match mutex.try_lock() {
            Some(guard) => return guard,
            None => crate::clock::pause(std::time::Duration::from_millis(1)),
        }
    }
    mutex.lock()
}

/// Waits, within [`blocking`] work, until the future is done.
pub fn wait<F: Future>(future: F) -> F::Output {
    #[cfg(test)]
    if process::in_coroutine() {
        return process::wait(future);
    }
    tokio::runtime::Handle::current().block_on(future)
}
