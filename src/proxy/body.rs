//! Bodies on their way through: piece by piece, with a limit in time.

use std::error::Error;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::runtime::Handle;
use tokio::time::{Instant, Sleep, sleep_until, timeout};

use super::activity::OpenRequest;

/// How long the rest of a request is read that nobody wants.
const LINGER: Duration = Duration::from_secs(5);

/// What is said of a body that is broken off.
const LATE: &str = "the time for this body is over";

/// Why a body broke off.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// The body of a request or an answer.
pub type ProxyBody = UnsyncBoxBody<Bytes, BoxError>;

/// A body that comes from elsewhere.
pub fn streamed(body: Incoming) -> ProxyBody {
    body.map_err(Into::into).boxed_unsync()
}

/// A body of one piece.
pub fn whole(bytes: impl Into<Bytes>) -> ProxyBody {
    Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// The body of a request, which breaks off when its time is over.
///
/// What of it nobody has read when it is dropped is taken from the client and thrown away for a while
/// ([`LINGER`]): a client that is cut off in the middle of its request may lose the answer to it.
pub struct RequestBody {
    inner: Option<Incoming>,
    due: Option<Pin<Box<Sleep>>>,
    over: Arc<AtomicBool>,
    /// The client waits to be told to send it (`Expect: 100-continue`), and was not.
    held_back: bool,
}

impl RequestBody {
    /// `inner`, which must have ended by `due`; with the flag that says whether it was broken off.
    /// `held_back`: the client sends it only once somebody reads it.
    pub fn limited(
        inner: Incoming,
        due: Option<Instant>,
        held_back: bool,
    ) -> (ProxyBody, Arc<AtomicBool>) {
        let over = Arc::new(AtomicBool::new(false));
        let body = RequestBody {
            inner: Some(inner),
            due: due.map(|due| Box::pin(sleep_until(due))),
            over: Arc::clone(&over),
            held_back,
        };
        (body.boxed_unsync(), over)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if is_over(&mut self.due, cx) {
            self.over.store(true, Ordering::Release);
            self.inner = None;
            return Poll::Ready(Some(Err(LATE.into())));
        }
        self.held_back = false;
        let Some(inner) = &mut self.inner else {
            return Poll::Ready(None);
        };
        let frame = ready!(Pin::new(inner).poll_frame(cx));
        if !matches!(frame, Some(Ok(_))) {
            self.inner = None;
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.inner.as_ref().map(Incoming::size_hint);
        rest.unwrap_or_else(|| SizeHint::with_exact(0))
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        let sent = |inner: &Incoming| !self.held_back && !inner.is_end_stream();
        let rest = self.inner.take().filter(sent);
        // Without a runtime the node is ending, and the connection with it.
        if let (Some(mut rest), Ok(runtime)) = (rest, Handle::try_current()) {
            runtime.spawn(timeout(LINGER, async move {
                while let Some(Ok(_)) = rest.frame().await {}
            }));
        }
    }
}

/// The body of an answer, which breaks off when its time is over, and keeps its request open until it
/// ends.
pub struct AnswerBody {
    inner: ProxyBody,
    due: Option<Pin<Box<Sleep>>>,
    _open: OpenRequest,
}

impl AnswerBody {
    /// `inner`, which must have ended by `due`; `open` ends with it.
    pub fn new(inner: ProxyBody, due: Option<Instant>, open: OpenRequest) -> AnswerBody {
        AnswerBody {
            inner,
            due: due.map(|due| Box::pin(sleep_until(due))),
            _open: open,
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if is_over(&mut self.due, cx) {
            return Poll::Ready(Some(Err(LATE.into())));
        }
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

fn is_over(due: &mut Option<Pin<Box<Sleep>>>, cx: &mut Context<'_>) -> bool {
    due.as_mut()
        .is_some_and(|due| due.as_mut().poll(cx).is_ready())
}
