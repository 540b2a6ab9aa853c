//! The newest transaction of `proxy.db` on this node, for those who wait for one.
//!
//! One subscription to the store serves all that wait, so that a commit costs the same however many
//! do. On a replica a transaction counts once readers see it.

use std::future::Future;
use std::sync::Arc;

use tokio::sync::watch;

use crate::store::Store;

/// The TXID of database `db`, 0 while there is none, and the task that keeps it up to date until
/// `shutdown` becomes true.
pub fn follow(
    store: Arc<Store>,
    db: String,
    mut shutdown: watch::Receiver<bool>,
) -> (watch::Receiver<u64>, impl Future<Output = ()> + Send) {
    // First the subscription, then the position: no change is missed.
    let mut changes = store.subscribe();
    let txid = move || store.database(&db).map_or(0, |db| db.pos().txid);
    let (sender, receiver) = watch::channel(txid());
    let task = async move {
        loop {
            tokio::select! {
                _ = changes.changed() => {}
                _ = shutdown.wait_for(|stop| *stop) => return,
            }
            let now = txid();
            sender.send_if_modified(|known| std::mem::replace(known, now) != now);
        }
    };
    (receiver, task)
}
