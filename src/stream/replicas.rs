//! The replicas that are connected, and what a primary asks of one stream: to catch up, and to end
//! with the lease.
//!
//! A handoff travels in the stream, behind every transaction: when the replica reads it, it has
//! applied all that the primary ever acknowledged. That is why the primary takes no more writes
//! before it gives the order, and why only a stream of all databases can carry it.

use std::collections::BTreeMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::timeout;

use super::batches::Batches;
use super::format_node_id;

/// How long a stream may take to send what is missing.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a replica that is not connected is waited for.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a stream may take for the last transactions and the lease.
const HANDOFF_TIMEOUT: Duration = Duration::from_secs(2);

/// What a stream is asked to do.
#[derive(Debug)]
pub(super) enum Order {
    /// Send all that there is by now.
    CatchUp(oneshot::Sender<Result<(), OrderError>>),
    /// Send all that there is, then the lease of this ID, and end.
    Handoff(String, oneshot::Sender<Result<(), OrderError>>),
}

/// Why a stream did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// No stream of this replica.
    #[error("replica {} is not connected to this node", format_node_id(*.0))]
    NotConnected(u64),
    /// The replica has asked for some databases only.
    #[error("the replica follows only some of the databases: it cannot be primary")]
    Filtered,
    /// The replica lacks something of this database.
    #[error("the replica does not have all of {0}")]
    Behind(String),
    /// The stream broke before the lease was sent.
    #[error("the stream to the replica broke before it had everything")]
    Broken,
    /// The stream broke, or did not get through in time. The lease may have been sent.
    #[error("the stream to the replica broke, or took too long")]
    Gone,
}

impl OrderError {
    /// Whether it is certain that the lease was not sent.
    pub fn nothing_sent(&self) -> bool {
        !matches!(self, OrderError::Gone)
    }
}

/// The streams of a node, by the ID of their replica. One replica may have two for a moment: the
/// newer one counts.
#[derive(Debug, Default)]
pub struct Replicas {
    streams: Mutex<BTreeMap<u64, mpsc::Sender<Order>>>,
    connected: Notify,
    batches: Batches,
}

/// A stream's end of its entry; it is gone from the list when this is dropped.
pub(super) struct Registration<'a> {
    replicas: &'a Replicas,
    id: Option<u64>,
    pub orders: mpsc::Receiver<Order>,
    sender: mpsc::Sender<Order>,
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        let mut streams = self.replicas.streams.lock();
        if let Some(id) = self.id
            && streams
                .get(&id)
                .is_some_and(|s| s.same_channel(&self.sender))
        {
            streams.remove(&id);
        }
    }
}

impl Replicas {
    /// What is read once for all of them.
    pub(super) fn batches(&self) -> &Batches {
        &self.batches
    }

    /// Enters the stream of a replica; one that does not say who it is gets no orders.
    pub(super) fn register(&self, id: Option<u64>) -> Registration<'_> {
        let (sender, orders) = mpsc::channel(1);
        if let Some(id) = id {
            self.streams.lock().insert(id, sender.clone());
            self.connected.notify_waiters();
        }
        Registration {
            replicas: self,
            id,
            orders,
            sender,
        }
    }

    /// Waits until the replica was sent all that there was when this was asked. One that is about
    /// to connect is waited for: it may have learned of this primary a moment ago.
    pub async fn catch_up(&self, id: u64) -> Result<(), OrderError> {
        let connected = async {
            loop {
                let mut change = std::pin::pin!(self.connected.notified());
                // From here on no change is missed.
                change.as_mut().enable();
                if self.streams.lock().contains_key(&id) {
                    return;
                }
                change.await;
            }
        };
        if timeout(CONNECT_TIMEOUT, connected).await.is_err() {
            return Err(OrderError::NotConnected(id));
        }
        self.order(id, CATCH_UP_TIMEOUT, Order::CatchUp).await
    }

    /// Sends the rest and then the lease to the replica. The node must not take writes any more.
    pub async fn hand_over(&self, id: u64, lease_id: &str) -> Result<(), OrderError> {
        let order = |done| Order::Handoff(lease_id.to_owned(), done);
        self.order(id, HANDOFF_TIMEOUT, order).await
    }

    async fn order(
        &self,
        id: u64,
        limit: Duration,
        order: impl FnOnce(oneshot::Sender<Result<(), OrderError>>) -> Order,
    ) -> Result<(), OrderError> {
        let stream = self.streams.lock().get(&id).cloned();
        let stream = stream.ok_or(OrderError::NotConnected(id))?;
        let (done, answer) = oneshot::channel();
        let asked = async {
            if stream.send(order(done)).await.is_err() {
                return Err(OrderError::NotConnected(id));
            }
            answer.await.unwrap_or(Err(OrderError::Gone))
        };
        timeout(limit, asked).await.unwrap_or(Err(OrderError::Gone))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn orders_reach_the_newest_stream_of_a_replica() {
        let replicas = Replicas::default();
        assert_eq!(replicas.catch_up(1).await, Err(OrderError::NotConnected(1)));
        // One that comes in time is waited for.
        let (asked, ()) = tokio::join!(replicas.catch_up(1), async {
            tokio::time::sleep(CONNECT_TIMEOUT / 2).await;
            let mut stream = replicas.register(Some(1));
            match stream.orders.recv().await {
                Some(Order::CatchUp(done)) => done.send(Ok(())).unwrap(),
                other => panic!("{other:?}"),
            }
        });
        assert_eq!(asked, Ok(()));
        let old = replicas.register(Some(1));
        let mut new = replicas.register(Some(1));
        drop(old);
        let (asked, ()) = tokio::join!(replicas.hand_over(1, "x"), async {
            match new.orders.recv().await {
                Some(Order::Handoff(lease, done)) => {
                    assert_eq!(lease, "x");
                    done.send(Ok(())).unwrap();
                }
                other => panic!("{other:?}"),
            }
        });
        assert_eq!(asked, Ok(()));
        // A stream that ends with an order in hand may have sent the lease.
        let (asked, ()) = tokio::join!(replicas.hand_over(1, "x"), async {
            drop(new.orders.recv().await);
            drop(new);
        });
        assert!(!asked.unwrap_err().nothing_sent());
        assert!(replicas.streams.lock().is_empty());
    }
}
