//! What every lease backend must do, as checks that run against the real service.
//!
//! A backend's tests implement [`Service`] and call [`every_check`], or, where the backend has no
//! service behind it, [`one_winner`] and [`renewal`] alone. A check that fails panics with the
//! reason. Each takes a cluster of its own (a key that nobody else uses), so that they run beside
//! each other: most of the time is spent waiting for leases to expire. Those that break something
//! ([`faults`], [`outage`]) come after them, each alone.

use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::join_all;
use tokio::time::{sleep, timeout};

use crate::{Lease, LeaseError, Leaser, PrimaryInfo};

mod broken;
mod changes;
mod holding;
mod knowledge;

pub use broken::{faults, outage};
pub use changes::{handoff, watching};
pub use holding::{expiry, foreign_leases, mutual_exclusion, one_winner, renewal};
pub use knowledge::{candidates, cluster_id, recorded};

/// A running lease service, as the suite needs it.
#[async_trait]
pub trait Service: Send + Sync {
    /// A leaser with a connection of its own, as the node `hostname` of the cluster `cluster`
    /// would have it; it advertises `http://HOSTNAME:20202`. A cluster is a key; the suite uses
    /// each name for one purpose, on a service where none has been used before.
    async fn leaser(&self, cluster: &str, hostname: &str) -> Box<dyn Leaser>;

    /// The longest time from a lease's last renewal to the moment when another node can have it.
    /// (More than the TTL, if the service is slow to notice.)
    fn expires_within(&self) -> Duration;

    /// The longest time that a call may take while the service does not answer.
    fn call_timeout(&self) -> Duration;

    /// Breaks the connections of all leasers, the present and the future ones, in one way and no
    /// other; the service itself goes on. What it forbids has ended when this returns.
    async fn fault(&self, fault: Fault);

    /// Takes the service down: connections break and new ones are refused. What it has stored
    /// is kept.
    async fn stop(&self);

    /// Brings it up again, and returns when it serves.
    async fn start(&self);
}

/// What becomes of the connections between leasers and service ([`Service::fault`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: they work.
    None,
    /// New ones are refused, as if nobody listened; open ones are reset.
    Refuse,
    /// All that is sent arrives so much later, in either direction.
    Delay(Duration),
    /// New ones are accepted and reset; open ones are reset.
    Cut,
    /// New ones are accepted; on them and on open ones nothing arrives, in either direction. What
    /// was sent may arrive later.
    Stall,
}

/// How soon something that is announced, not polled, must be known.
const AT_ONCE: Duration = Duration::from_secs(1);

/// All checks: first those that run beside each other, then the faults and the outage.
pub async fn every_check(service: &dyn Service) {
    tokio::join!(
        one_winner(service),
        mutual_exclusion(service),
        renewal(service),
        expiry(service),
        watching(service),
        handoff(service),
        foreign_leases(service),
        cluster_id(service),
        candidates(service),
        recorded(service),
    );
    faults(service).await;
    outage(service).await;
}

async fn nodes(service: &dyn Service, cluster: &str, count: usize) -> Vec<Box<dyn Leaser>> {
    let leasers = (0..count).map(|i| async move {
        let hostname = format!("node{i}");
        service.leaser(cluster, &hostname).await
    });
    join_all(leasers).await
}

fn info_of(leaser: &dyn Leaser) -> PrimaryInfo {
    PrimaryInfo {
        hostname: leaser.hostname().to_owned(),
        advertise_url: leaser.advertise_url().to_owned(),
    }
}

/// Renews `lease` again and again.
async fn keep(lease: &dyn Lease) {
    let ttl = lease.ttl().expect("a lease of a service ends");
    loop {
        lease.renew().await.expect("renewing in time");
        sleep(ttl / 3).await;
    }
}

/// Watches until `node` sees the primary that is `expected`. Fails if that takes longer than
/// announcements may, or if the watcher is a busy loop.
async fn until_seen(node: &dyn Leaser, expected: Option<PrimaryInfo>) {
    let seen = timeout(AT_ONCE, async {
        for _ in 0..20 {
            node.watch_primary().await.expect("watching");
            let primary = match node.primary_info().await {
                Ok(info) => Some(info),
                Err(LeaseError::NoPrimary) => None,
                Err(e) => panic!("reading the primary: {e}"),
            };
            if primary == expected {
                return;
            }
        }
        panic!("the watcher returns again and again, but nothing changes");
    });
    if seen.await.is_err() {
        panic!("a watcher was not told within {AT_ONCE:?} that the primary is {expected:?}");
    }
}
