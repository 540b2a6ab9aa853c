//! The thread that follows the WALs of all lanes: woken by the kernel (inotify) when one is written.
//!
//! A WAL is written a moment before its index is. So a WAL in which there is more than is captured is
//! looked at again, after longer and longer pauses, until there is not: that of a writer that died in
//! the middle of a transaction once a second, as is one that could not be captured.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::thread;

use super::super::context::Context;
use super::super::database::{Database, DbFile, State};

/// How long transactions are gathered before they are captured together.
const GATHER: Duration = Duration::from_micros(300);
/// The first and the longest pause before another look.
const FIRST_LOOK: Duration = Duration::from_micros(200);
const LAST_LOOK: Duration = Duration::from_secs(1);
/// How often the thread sees whether the store is still there.
const ALIVE: Duration = Duration::from_secs(1);
/// Bytes of events that are read at once; one takes 16.
const EVENTS: usize = 4096;

type Watched = Arc<Mutex<HashMap<i32, Weak<Database>>>>;

/// See the module. Starts with the first WAL.
#[derive(Debug, Default)]
pub(in crate::store) struct Follower(OnceLock<Inotify>);

/// What the kernel watches.
#[derive(Debug)]
struct Inotify {
    fd: Arc<OwnedFd>,
    watched: WatchedDebug,
}

/// Databases by watch.
struct WatchedDebug(Watched);

impl std::fmt::Debug for WatchedDebug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} WALs", self.0.lock().len())
    }
}

impl Database {
    /// Has the follower woken by writes to this WAL.
    pub(super) fn watch(self: &Arc<Self>, wal: &DbFile) {
        let mut handles = wal.handles.lock();
        if handles.watched {
            return;
        }
        match self.context.follower.watch(self, wal) {
            Ok(()) => handles.watched = true,
            Err(e) => {
                tracing::error!(db = self.name, error = %e, "its WAL is captured at checkpoints only: is fs.inotify.max_user_watches reached?");
            }
        }
    }

    /// Ends that.
    pub(in crate::store) fn unwatch(&self, st: &State) {
        if let Some(wal) = &st.files.wal
            && std::mem::take(&mut wal.handles.lock().watched)
        {
            self.context.follower.unwatch(self);
        }
    }
}

impl Follower {
    fn watch(&self, db: &Arc<Database>, wal: &DbFile) -> io::Result<()> {
        let inotify = match self.0.get() {
            Some(inotify) => inotify,
            None => {
                let new = Inotify::start(&db.context)?;
                // Another one that was started at the same time ends with its last database.
                self.0.get_or_init(|| new)
            }
        };
        let descriptor = wal.file.descriptor()?.as_raw_fd();
        let path = format!("/proc/self/fd/{descriptor}\0");
        let mut watched = inotify.watched.0.lock();
        // SAFETY: a system call on an open descriptor, and a string that ends in a zero and outlives it.
        let watch = unsafe {
            libc::inotify_add_watch(
                inotify.fd.as_raw_fd(),
                path.as_ptr().cast(),
                libc::IN_MODIFY,
            )
        };
        if watch < 0 {
            return Err(io::Error::last_os_error());
        }
        watched.insert(watch, Arc::downgrade(db));
        Ok(())
    }

    fn unwatch(&self, db: &Database) {
        let Some(inotify) = self.0.get() else { return };
        let mut watched = inotify.watched.0.lock();
        watched.retain(|watch, other| {
            let is_its = std::ptr::eq(other.as_ptr(), db);
            if is_its {
                // SAFETY: a system call on an open descriptor. The kernel may have ended the watch.
                unsafe { libc::inotify_rm_watch(inotify.fd.as_raw_fd(), *watch) };
            }
            !is_its
        });
    }
}

impl Inotify {
    fn start(context: &Arc<Context>) -> io::Result<Inotify> {
        // SAFETY: a system call without pointers; the result is a descriptor that nobody else owns.
        let fd = unsafe {
            let fd = libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Arc::new(OwnedFd::from_raw_fd(fd))
        };
        let watched = Watched::default();
        let looks = Looks {
            context: Arc::downgrade(context),
            fd: fd.clone(),
            watched: watched.clone(),
            again: HashMap::new(),
        };
        thread::start("follower", move || looks.run())?;
        Ok(Inotify {
            fd,
            watched: WatchedDebug(watched),
        })
    }
}

/// What the thread knows.
struct Looks {
    context: Weak<Context>,
    fd: Arc<OwnedFd>,
    watched: Watched,
    /// Databases to be looked at again, by watch: when, and after which pause then.
    again: HashMap<i32, (Instant, Duration)>,
}

impl Looks {
    fn run(mut self) {
        while self.context.strong_count() > 0 {
            let next = self.again.values().map(|(at, _)| *at).min();
            let wait = next.map_or(ALIVE, |at| at.saturating_duration_since(Instant::now()));
            if self.wait(wait.min(ALIVE)) {
                std::thread::sleep(GATHER);
                for watch in self.events() {
                    self.look(watch, FIRST_LOOK);
                }
            }
            let now = Instant::now();
            let due: Vec<(i32, Duration)> = self
                .again
                .iter()
                .filter(|(_, (at, _))| *at <= now)
                .map(|(watch, (_, pause))| (*watch, *pause))
                .collect();
            for (watch, pause) in due {
                self.look(watch, (pause * 4).min(LAST_LOOK));
            }
        }
    }

    /// Waits for events; whether there are any.
    fn wait(&self, limit: Duration) -> bool {
        let mut poll = libc::pollfd {
            fd: self.fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let limit = libc::timespec {
            tv_sec: limit.as_secs() as libc::time_t,
            tv_nsec: libc::c_long::from(limit.subsec_nanos()),
        };
        // SAFETY: one structure and a time that outlive the call; no signal mask.
        unsafe { libc::ppoll(&mut poll, 1, &limit, std::ptr::null()) > 0 }
    }

    /// The watches of which there are events.
    fn events(&self) -> Vec<i32> {
        const HEAD: usize = std::mem::size_of::<libc::inotify_event>();
        let mut watches = Vec::new();
        let mut bytes = [0u8; EVENTS];
        loop {
            // SAFETY: fills a buffer of this length that outlives the call.
            let n =
                unsafe { libc::read(self.fd.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) };
            let Some(read) = usize::try_from(n).ok().and_then(|n| bytes.get(..n)) else {
                break;
            };
            let mut rest = read;
            while let Some((head, more)) = rest.split_at_checked(HEAD) {
                let watch = i32::from_ne_bytes([head[0], head[1], head[2], head[3]]);
                let named = u32::from_ne_bytes([head[12], head[13], head[14], head[15]]);
                if !watches.contains(&watch) {
                    watches.push(watch);
                }
                rest = more.get(named as usize..).unwrap_or_default();
            }
            if read.len() < EVENTS / 2 {
                break;
            }
        }
        // The queue has overflown: it may be any.
        if watches.contains(&-1) {
            watches = self.watched.lock().keys().copied().collect();
        }
        watches
    }

    /// Captures what there is, and looks again after the pause if that is not all.
    fn look(&mut self, watch: i32, pause: Duration) {
        self.again.remove(&watch);
        let db = self.watched.lock().get(&watch).and_then(Weak::upgrade);
        let Some(db) = db else { return };
        let pause = match db.catch_up() {
            Ok(()) if !db.has_more() => return,
            Ok(()) => pause,
            Err(e) => {
                db.warn_rarely(&e);
                LAST_LOOK
            }
        };
        self.again.insert(watch, (Instant::now() + pause, pause));
    }
}
