//! Answers whose body is written by a task while it is sent.
//!
//! A body that the peer does not read costs what the channel holds. A task that fails drops its
//! [`BodySender`] without [`BodySender::finish`]: the body then ends as an error, so that the peer sees
//! a broken answer and not a short one.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use crate::stream::coding::Coder;
use crate::stream::stats::Stats;

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

/// The stream to a replica, compressed. What is sent is counted.
pub(super) fn coded(
    stream: impl Stream<Item = io::Result<Bytes>> + Send + Sync + 'static,
    mut coder: Coder,
    stats: Arc<Stats>,
) -> impl Stream<Item = io::Result<Bytes>> + Send + Sync + 'static {
    let mut stream = Box::pin(stream);
    let mut ended = false;
    futures_util::stream::poll_fn(move |cx| {
        if ended {
            return Poll::Ready(None);
        }
        let piece = ready!(stream.as_mut().poll_next(cx));
        let plain = match &piece {
            Some(Ok(piece)) => piece.len(),
            _ => 0,
        };
        let coded = match piece {
            Some(piece) => piece.and_then(|piece| coder.encode(&piece)),
            None => coder.finish(),
        };
        ended = plain == 0 || coded.is_err();
        if let Ok(coded) = &coded {
            stats.count_bytes(plain, coded.len());
        }
        Poll::Ready(Some(coded))
    })
}

/// The stream to a replica as it is. What is sent is counted.
pub(super) fn counted(
    stream: impl Stream<Item = io::Result<Bytes>> + Send + Sync + 'static,
    stats: Arc<Stats>,
) -> impl Stream<Item = io::Result<Bytes>> + Send + Sync + 'static {
    stream.inspect_ok(move |piece| stats.count_bytes(piece.len(), piece.len()))
}

/// How long a body may keep its reader waiting, on the whole, before its bytes count for nothing.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes that buy a second more, up to [`PATIENCE`] again: the least rate of a body.
const BYTES_A_SECOND: f64 = 4096.0;

/// Time that a body may still take. Only waiting for it counts, not what is done with it: a body that
/// comes byte by byte ends no later than one of which nothing comes.
pub(super) struct Pace(Duration);

impl Pace {
    pub fn new() -> Pace {
        Pace(PATIENCE)
    }

    /// What `piece` gives; `None` once the body took too long.
    pub async fn wait<T>(&mut self, piece: impl Future<Output = T>) -> Option<T> {
        let begun = Instant::now();
        let piece = timeout(self.0, piece).await.ok();
        self.0 = self.0.saturating_sub(begun.elapsed());
        piece
    }

    /// So many bytes came.
    pub fn came(&mut self, bytes: usize) {
        let bought = Duration::from_secs_f64(bytes as f64 / BYTES_A_SECOND);
        self.0 = (self.0 + bought).min(PATIENCE);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    /// How long pieces of this size are taken that come each second.
    async fn taken(size: usize) -> Duration {
        let (begun, mut pace) = (Instant::now(), Pace::new());
        for _ in 0..100 {
            if pace.wait(sleep(Duration::from_secs(1))).await.is_none() {
                break;
            }
            pace.came(size);
        }
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_has_a_least_rate() {
        assert!(taken(1).await < Duration::from_secs(11));
        assert!(taken(2048).await < Duration::from_secs(21));
        assert!(taken(4096).await >= Duration::from_secs(100));
    }

    #[tokio::test(start_paused = true)]
    async fn only_waiting_counts() {
        let mut pace = Pace::new();
        for _ in 0..10 {
            pace.wait(std::future::ready(())).await.unwrap();
            sleep(PATIENCE).await;
        }
        assert!(pace.wait(std::future::pending::<()>()).await.is_none());
    }
}
