//! Answers whose body is written by a task while it is sent.
//!
//! A body that the peer does not read costs what the channel holds. A task that fails drops its
//! [`BodySender`] without [`BodySender::finish`]: the body then ends as an error, so that the peer sees
//! a broken answer and not a short one.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use bytes::Bytes;
use futures_util::Stream;
use tokio::sync::mpsc;

/// The writing end of a body.
pub(super) struct BodySender {
    pub(super) channel: mpsc::Sender<Bytes>,
    complete: Arc<AtomicBool>,
}

impl BodySender {
    /// Ends the body as complete, once every clone of the channel is gone.
    pub(super) fn finish(self) {
        self.complete.store(true, Ordering::Release);
    }
}

/// A body of which at most `capacity` pieces wait for the connection.
pub(super) fn channel(
    capacity: usize,
) -> (
    BodySender,
    impl Stream<Item = io::Result<Bytes>> + Send + Sync + 'static,
) {
    let (sender, mut receiver) = mpsc::channel(capacity);
    let complete = Arc::new(AtomicBool::new(false));
    let ended_well = Arc::clone(&complete);
    let mut ended = false;
    let stream = futures_util::stream::poll_fn(move |cx| {
        if ended {
            return Poll::Ready(None);
        }
        receiver.poll_recv(cx).map(|piece| match piece {
            Some(bytes) => Some(Ok(bytes)),
            None => {
                ended = true;
                let broken = !ended_well.load(Ordering::Acquire);
                broken.then(|| Err(io::Error::other("the answer was cut off")))
            }
        })
    });
    (
        BodySender {
            channel: sender,
            complete,
        },
        stream,
    )
}
