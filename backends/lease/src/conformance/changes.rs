//! The primary changes: watchers learn it, and a handoff leaves no gap.

use std::time::Duration;

use tokio::time::sleep;

use super::{AT_ONCE, Service, info_of, keep, nodes, until_seen};
use crate::LeaseError;

/// Watchers learn at once of a new primary and of one that gives up, also when the change came
/// between reading the primary and watching; and wait while nothing changes.
pub async fn watching(service: &dyn Service) {
    let nodes = nodes(service, "watching", 3).await;
    let (holder, watcher, late) = (&*nodes[0], &*nodes[1], &*nodes[2]);
    for node in [watcher, late] {
        let primary = node.primary_info().await;
        assert!(
            matches!(primary, Err(LeaseError::NoPrimary)),
            "a primary from nowhere"
        );
    }
    let (lease, ()) = tokio::join!(
        async {
            sleep(Duration::from_millis(100)).await;
            holder.acquire().await.expect("acquiring")
        },
        until_seen(watcher, Some(info_of(holder)))
    );
    // This one has not watched so far, but it has read.
    until_seen(late, Some(info_of(holder))).await;

    let quiet = async {
        for _ in 0..5 {
            watcher.watch_primary().await.expect("watching");
        }
        panic!("a watcher returns again and again, but nothing changes");
    };
    tokio::select! {
        () = quiet => {}
        () = keep(&*lease) => {}
        () = sleep(AT_ONCE) => {}
    }

    let (closed, (), ()) = tokio::join!(
        async {
            sleep(Duration::from_millis(100)).await;
            lease.close().await
        },
        until_seen(watcher, None),
        until_seen(late, None)
    );
    closed.expect("giving the lease up");
}

/// A lease that is handed over keeps its ID, is never free, and names its new holder.
pub async fn handoff(service: &dyn Service) {
    let nodes = nodes(service, "handoff", 3).await;
    let (from, to, third) = (&*nodes[0], &*nodes[1], &*nodes[2]);
    let old = from.acquire().await.expect("acquiring");
    let done = tokio::sync::Notify::new();
    let hand_over = async {
        sleep(Duration::from_millis(50)).await;
        old.handoff(0x1122_3344_5566_7788)
            .await
            .expect("handing over");
        let new = to.acquire_existing(old.id()).await.expect("taking over");
        sleep(Duration::from_millis(50)).await;
        done.notify_one();
        new
    };
    let no_gap = async {
        let attempts = async {
            loop {
                let taken = third.acquire().await;
                assert!(
                    matches!(taken, Err(LeaseError::PrimaryExists)),
                    "a third node has acquired a lease while it was handed over"
                );
                third
                    .primary_info()
                    .await
                    .expect("the primary must be there while it was handed over");
                sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            () = attempts => {}
            () = done.notified() => {}
        }
    };
    let (new, ()) = tokio::join!(hand_over, no_gap);
    assert_eq!(new.id(), old.id(), "another lease");
    assert!(
        new.epoch() > old.epoch(),
        "the epoch has not grown with the new holder"
    );
    assert_eq!(new.ttl(), old.ttl());
    assert!(new.renewed_at() >= old.renewed_at());
    let primary = third.primary_info().await.expect("reading the primary");
    assert_eq!(
        primary,
        info_of(to),
        "the lease does not name its new holder"
    );
    new.renew().await.expect("renewing what was handed over");
    new.close().await.expect("giving the lease up");
    let primary = third.primary_info().await;
    assert!(
        matches!(primary, Err(LeaseError::NoPrimary)),
        "still held after it was given up"
    );
}
