//! What happens on one connection of a client, and for how long nothing may.
//!
//! A connection is *quiet* while no request on it is open. It ends
//! - when a request's head takes longer than `proxy.read-header-timeout`, from its first byte, or from
//!   the connection's beginning for the first request;
//! - when it is quiet and moves no byte for `proxy.idle-timeout`;
//! - when an answer is still not sent [`WRITE_GRACE`] after `proxy.write-timeout`: by then the answer
//!   has been broken off, and only a peer that does not read can keep it.
//!
//! 0 means no limit. Over HTTP/2 the second request's head and later ones have the idle limit alone:
//! they share the connection with bytes that mean nothing.

use std::collections::BTreeSet;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::config::ProxyConfig;

/// How much longer than `proxy.write-timeout` an answer may need to leave.
const WRITE_GRACE: Duration = Duration::from_secs(1);

/// The limits of a connection; `None`: none.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For a request's head.
    pub head: Option<Duration>,
    /// For silence between requests.
    pub idle: Option<Duration>,
    /// For a request with its body, from the end of its head.
    pub read: Option<Duration>,
    /// For the answer with its body, from the end of the request's head.
    pub write: Option<Duration>,
}

impl Limits {
    /// Those of the configuration.
    pub fn new(config: &ProxyConfig) -> Limits {
        let limit = |time: Duration| Some(time).filter(|time| !time.is_zero());
        Limits {
            head: limit(config.read_header_timeout),
            idle: limit(config.idle_timeout),
            read: limit(config.read_timeout),
            write: limit(config.write_timeout),
        }
    }
}

/// What happens on a connection.
pub struct Activity {
    limits: Limits,
    state: Mutex<State>,
    /// Whether the next byte read is worth a look at the state.
    awaits_head: AtomicBool,
    /// A limit has come nearer.
    nearer: Notify,
}

struct State {
    /// Requests that are open.
    open: usize,
    /// Their limits, made different by a number.
    answers_due: BTreeSet<(Instant, u64)>,
    next: u64,
    /// Since when a head is being read.
    head_since: Option<Instant>,
    /// The last sign of life.
    seen: Instant,
    http2: bool,
}

impl Activity {
    /// Of a connection that begins now.
    pub fn new(limits: Limits) -> Arc<Activity> {
        let now = Instant::now();
        Arc::new(Activity {
            limits,
            state: Mutex::new(State {
                open: 0,
                answers_due: BTreeSet::new(),
                next: 0,
                head_since: Some(now),
                seen: now,
                http2: false,
            }),
            awaits_head: AtomicBool::new(false),
            nearer: Notify::new(),
        })
    }

    /// The limits of this connection.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// A request's head has been read. The request is open until what comes back is dropped.
    pub fn begin(self: &Arc<Activity>, http2: bool) -> OpenRequest {
        let due = self.limits.write.map(|limit| Instant::now() + limit);
        let mut state = self.state.lock();
        state.open += 1;
        state.head_since = None;
        state.http2 |= http2;
        state.next += 1;
        let entry = due.map(|due| (due + WRITE_GRACE, state.next));
        state.answers_due.extend(entry);
        self.awaits_head.store(false, Ordering::Relaxed);
        drop(state);
        if entry.is_some() {
            self.nearer.notify_one();
        }
        OpenRequest {
            activity: Arc::clone(self),
            entry,
        }
    }

    fn end(&self, entry: Option<(Instant, u64)>) {
        let mut state = self.state.lock();
        if let Some(entry) = entry {
            state.answers_due.remove(&entry);
        }
        state.open -= 1;
        if state.open == 0 {
            state.seen = Instant::now();
            self.awaits_head.store(!state.http2, Ordering::Relaxed);
            drop(state);
            self.nearer.notify_one();
        }
    }

    fn has_read(&self) {
        if self.awaits_head.swap(false, Ordering::Relaxed) {
            let mut state = self.state.lock();
            if state.open == 0 && state.head_since.is_none() {
                state.head_since = Some(Instant::now());
                drop(state);
                self.nearer.notify_one();
            }
        }
    }

    fn has_written(&self) {
        // The library lets go of an answer before the last of it has left.
        let mut state = self.state.lock();
        if state.open == 0 {
            state.seen = Instant::now();
        }
    }

    /// When the connection is to end unless something happens, and why.
    fn due(&self) -> Option<(Instant, &'static str)> {
        let state = self.state.lock();
        if state.open > 0 {
            let (due, _) = state.answers_due.first()?;
            return Some((*due, "the answer was not read in time"));
        }
        match (state.head_since, self.limits.head) {
            (Some(since), Some(limit)) => Some((since + limit, "no request came in time")),
            _ => {
                let limit = self.limits.idle?;
                Some((state.seen + limit, "it was idle"))
            }
        }
    }

    /// Resolves when the connection is to end, and says why.
    pub async fn expired(&self) -> &'static str {
        loop {
            let Some((due, why)) = self.due() else {
                self.nearer.notified().await;
                continue;
            };
            tokio::select! {
                () = sleep_until(due) => {}
                () = self.nearer.notified() => continue,
            }
            // What happened meanwhile may have put the limit off.
            if self.due().is_some_and(|(due, _)| due <= Instant::now()) {
                return why;
            }
        }
    }
}

/// A request that is open. Dropped with the end of its answer.
pub struct OpenRequest {
    activity: Arc<Activity>,
    entry: Option<(Instant, u64)>,
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.activity.end(self.entry);
    }
}

/// The socket of a connection, which tells what happens on it.
pub struct Watched {
    socket: TcpStream,
    activity: Arc<Activity>,
}

impl Watched {
    /// `socket`, of which `activity` is told.
    pub fn new(socket: TcpStream, activity: Arc<Activity>) -> Watched {
        Watched { socket, activity }
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut self.socket).poll_read(cx, buf));
        if buf.filled().len() > before {
            self.activity.has_read();
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.socket).poll_write(cx, buf));
        self.activity.has_written();
        Poll::Ready(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.socket).poll_write_vectored(cx, bufs));
        self.activity.has_written();
        Poll::Ready(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
