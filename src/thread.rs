//! The node's own threads: each has a name, and begins as the process did.
//!
//! A thread inherits the scheduler's class and the processors of whoever starts it. One that serves
//! requests of the mount may be of the class SCHED_IDLE, and bound to one processor (see
//! `fuse::companion`); a thread that it starts would be so for ever, as nobody would end that. So
//! every thread is started here, and those of the runtime call [`begin`].

use std::io;
use std::mem::{size_of, zeroed};
use std::sync::OnceLock;
use std::thread::{Builder, JoinHandle};

/// How a thread is scheduled.
pub struct Schedule {
    class: i32,
    parameter: libc::sched_param,
    processors: libc::cpu_set_t,
}

/// Starts a thread; `name` is without the prefix that all have.
///
/// # Errors
/// If there can be none.
pub fn start(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    // The first one finds how the process began: those that are changed were started here.
    usual();
    Builder::new()
        .name(format!("tenure-{name}"))
        .spawn(move || {
            begin();
            work();
        })
}

/// Has this thread begin as the process did, whoever started it.
pub fn begin() {
    if let Some(usual) = usual() {
        // What it inherited is better than not to run.
        let _ = usual.give(0);
    }
}

/// How the process was scheduled at its start, if that can be known.
pub fn usual() -> Option<&'static Schedule> {
    static USUAL: OnceLock<Option<Schedule>> = OnceLock::new();
    USUAL.get_or_init(Schedule::of_this_thread).as_ref()
}

impl Schedule {
    fn of_this_thread() -> Option<Schedule> {
        // SAFETY: parameters and sets are valid with all bits zero; the calls fill those given to
        // them, which are of the size that they are told and outlive them.
        unsafe {
            let class = libc::sched_getscheduler(0);
            let mut parameter: libc::sched_param = zeroed();
            let mut processors: libc::cpu_set_t = zeroed();
            let known = class >= 0
                && libc::sched_getparam(0, &mut parameter) == 0
                && libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut processors) == 0;
            known.then_some(Schedule {
                class,
                parameter,
                processors,
            })
        }
    }

    /// Has a thread (0: this one) be scheduled so. Fails too if it has ended.
    pub fn give(&self, thread: i32) -> io::Result<()> {
        // SAFETY: the calls read what is given to them, of the size that they are told, and all of it
        // outlives them.
        let (class, processors) = unsafe {
            (
                libc::sched_setscheduler(thread, self.class, &self.parameter),
                libc::sched_setaffinity(thread, size_of::<libc::cpu_set_t>(), &self.processors),
            )
        };
        match class == 0 && processors == 0 {
            true => Ok(()),
            false => Err(io::Error::last_os_error()),
        }
    }
}

/// Has this thread run on this processor alone; whether that can be.
pub fn stay_on(processor: usize) -> bool {
    if processor >= libc::CPU_SETSIZE as usize {
        return false;
    }
    // SAFETY: a set is valid with all bits zero, and the number is one of its; the call reads a set of
    // this size that outlives it.
    unsafe {
        let mut set: libc::cpu_set_t = zeroed();
        libc::CPU_SET(processor, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) == 0
    }
}

/// Has this thread give way to all others; whether that can be.
pub fn give_way() -> bool {
    // SAFETY: all bits zero are a valid parameter, which outlives the call.
    unsafe {
        let parameter: libc::sched_param = zeroed();
        libc::sched_setscheduler(0, libc::SCHED_IDLE, &parameter) == 0
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Class and number of processors of this thread.
    pub(crate) fn schedule() -> (i32, i32) {
        let now = Schedule::of_this_thread().unwrap();
        // SAFETY: counts the bits of a set that outlives the call.
        (now.class, unsafe { libc::CPU_COUNT(&now.processors) })
    }

    #[test]
    fn a_thread_does_not_inherit_what_its_starter_is_for_a_while() {
        let before = start("before", || assert_eq!(schedule().0, libc::SCHED_OTHER));
        before.unwrap().join().unwrap();
        let starter = || {
            let before = schedule();
            assert!(give_way());
            if usual().unwrap().give(0).is_err() {
                // Who cannot come back from that class never goes there.
                return;
            }
            assert!(give_way() && stay_on(0));
            assert_eq!(schedule(), (libc::SCHED_IDLE, 1));
            // What any other thread would be.
            std::thread::spawn(|| assert_eq!(schedule(), (libc::SCHED_IDLE, 1)))
                .join()
                .unwrap();
            let after = start("after", move || assert_eq!(schedule(), before));
            after.unwrap().join().unwrap();
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .on_thread_start(begin)
                .build()
                .unwrap();
            let _inside = runtime.enter();
            let blocking = tokio::task::spawn_blocking(schedule);
            assert_eq!(runtime.block_on(blocking).unwrap(), before);
        };
        std::thread::spawn(starter).join().unwrap();
    }
}
