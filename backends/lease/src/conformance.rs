//! What every lease backend must do, as checks that run against the real service.
//!
//! A backend's tests implement [`Service`] and call [`every_check`], or, where the backend has no
//! service behind it, [`one_winner`] and [`renewal`] alone. A check that fails panics with the
//! reason. Each takes a cluster of its own (a key that nobody else uses), so that they run beside
//! each other: most of the time is spent waiting for leases to expire.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::future::join_all;
use tokio::time::{sleep, timeout};

use crate::{Lease, LeaseError, Leaser, PrimaryInfo};

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

    /// Takes the service down: connections break and new ones are refused. What it has stored
    /// is kept.
    async fn stop(&self);

    /// Brings it up again, and returns when it serves.
    async fn start(&self);
}

/// How soon something that is announced, not polled, must be known.
const AT_ONCE: Duration = Duration::from_secs(1);

/// All checks: first those that run beside each other, then the outage.
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
    );
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

/// Lets all of `nodes` acquire at once; the one that did, by its index. All others must have been
/// told that there is a primary.
async fn race(nodes: &[Box<dyn Leaser>]) -> (usize, Box<dyn Lease>) {
    let mut winner = None;
    let results = join_all(nodes.iter().map(|node| node.acquire())).await;
    for (i, result) in results.into_iter().enumerate() {
        match result {
            Ok(lease) => {
                assert!(winner.is_none(), "two nodes have acquired the same lease");
                winner = Some((i, lease));
            }
            Err(LeaseError::PrimaryExists) => {}
            Err(e) => panic!("acquiring a lease that another node takes: {e}"),
        }
    }
    winner.expect("no node has acquired a lease that nobody had")
}

/// Of several nodes that acquire at once one becomes primary, and the others see which.
/// (The first of them, `node0`, must be one that may.)
pub async fn one_winner(service: &dyn Service) {
    let nodes = nodes(service, "one-winner", 8).await;
    let (winner, lease) = race(&nodes).await;
    for (i, node) in nodes.iter().enumerate().filter(|(i, _)| *i != winner) {
        let seen = node.primary_info().await.expect("reading the primary");
        assert_eq!(
            seen,
            info_of(&*nodes[winner]),
            "node {i} sees another primary"
        );
    }
    lease.close().await.expect("giving the lease up");
    for node in nodes {
        node.close().await.expect("closing a leaser");
    }
}

/// Over many rounds there is one winner each, its epoch is higher than the one before, and it
/// cannot acquire a second time.
pub async fn mutual_exclusion(service: &dyn Service) {
    let nodes = nodes(service, "mutual-exclusion", 8).await;
    let mut epoch = None;
    for round in 0..10 {
        let (winner, lease) = race(&nodes).await;
        assert!(
            epoch < Some(lease.epoch()),
            "the epoch has not grown in round {round}"
        );
        epoch = Some(lease.epoch());
        assert!(
            matches!(
                nodes[winner].acquire().await,
                Err(LeaseError::PrimaryExists)
            ),
            "a node has acquired the lease that it holds"
        );
        lease.close().await.expect("giving the lease up");
        lease.close().await.expect("giving up a lease that is gone");
        let after = lease.renew().await;
        assert!(
            matches!(after, Err(LeaseError::LeaseExpired)),
            "renewed what was given up"
        );
    }
}

/// A lease that is renewed lasts, and says from when on it does.
pub async fn renewal(service: &dyn Service) {
    let nodes = nodes(service, "renewal", 2).await;
    let before = Instant::now();
    let lease = nodes[0].acquire().await.expect("acquiring");
    assert!(
        lease.renewed_at() >= before,
        "valid from before it was asked for"
    );
    let Some(ttl) = lease.ttl() else {
        lease.renew().await.expect("renewing a lease without end");
        assert_eq!(lease.epoch(), 0, "a lease without end has no epoch");
        return;
    };
    let end = before + service.expires_within() + ttl;
    while Instant::now() < end {
        sleep(ttl / 2).await;
        let sent = Instant::now();
        let last = lease.renewed_at();
        assert!(last < sent, "valid from a moment in the future");
        lease.renew().await.expect("renewing in time");
        let now = lease.renewed_at();
        assert!(now >= sent, "renewed, but no longer valid than before");
        assert!(now <= Instant::now(), "valid from a moment in the future");
        let other = nodes[1].acquire().await;
        assert!(
            matches!(other, Err(LeaseError::PrimaryExists)),
            "took a living lease"
        );
    }
    lease.close().await.expect("giving the lease up");
}

/// A lease that is not renewed is another's: after its TTL, never before; and then its first
/// holder learns it and disturbs nobody.
pub async fn expiry(service: &dyn Service) {
    let nodes = nodes(service, "expiry", 2).await;
    let old = nodes[0].acquire().await.expect("acquiring");
    let ttl = old.ttl().expect("a lease of a service ends");
    let limit = old.renewed_at() + service.expires_within();
    let new = loop {
        match nodes[1].acquire().await {
            Ok(lease) => break lease,
            Err(LeaseError::PrimaryExists) => {}
            Err(e) => panic!("acquiring a lease that is not renewed: {e}"),
        }
        assert!(Instant::now() < limit, "the lease has not expired");
        sleep(ttl / 20).await;
    };
    assert!(
        Instant::now() >= old.renewed_at() + ttl,
        "expired before its TTL"
    );
    assert!(new.epoch() > old.epoch(), "the epoch has not grown");
    let renewed = old.renew().await;
    assert!(
        matches!(renewed, Err(LeaseError::LeaseExpired)),
        "renewed an expired lease"
    );
    let resumed = nodes[0].acquire_existing(old.id()).await;
    assert!(
        matches!(resumed, Err(LeaseError::LeaseExpired)),
        "took over an expired lease"
    );
    old.close().await.expect("giving up an expired lease");
    let primary = nodes[0].primary_info().await.ok();
    let new_holder = Some(info_of(&*nodes[1]));
    assert_eq!(
        primary, new_holder,
        "the old holder has disturbed the new one"
    );
    new.renew().await.expect("renewing");
    new.close().await.expect("giving the lease up");
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
                    .expect("a primary during the handoff");
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

/// What is no living lease of this cluster cannot be taken over, and trying it hurts nobody.
pub async fn foreign_leases(service: &dyn Service) {
    let ours = nodes(service, "foreign", 2).await;
    let theirs = nodes(service, "foreign-other", 1).await;
    let foreign = theirs[0]
        .acquire()
        .await
        .expect("acquiring in the other cluster");
    let refused = async |id: &str| {
        let result = ours[1].acquire_existing(id).await;
        assert!(
            matches!(result, Err(LeaseError::LeaseExpired)),
            "took over {id:?}, or failed otherwise: {:?}",
            result.err()
        );
    };
    let nonsense = [
        "",
        "x",
        "../../x?y=z",
        "0000000000000000",
        "01234567-89ab-cdef-0123-456789abcdef",
    ];
    for id in nonsense.into_iter().chain([foreign.id()]) {
        refused(id).await;
    }
    let lease = ours[0].acquire().await.expect("acquiring");
    for id in nonsense.into_iter().chain([foreign.id()]) {
        refused(id).await;
    }
    let primary = ours[1].primary_info().await.expect("reading the primary");
    assert_eq!(primary, info_of(&*ours[0]));
    lease.renew().await.expect("renewing");
    foreign
        .renew()
        .await
        .expect("renewing in the other cluster");
    lease.close().await.expect("giving the lease up");
    refused(lease.id()).await;
    foreign.close().await.expect("giving the other lease up");
}

/// The cluster ID is set once, whoever tries, and stays.
pub async fn cluster_id(service: &dyn Service) {
    let nodes = nodes(service, "cluster-id", 8).await;
    assert_eq!(nodes[0].cluster_id().await.expect("reading"), None);
    let id = |i: usize| format!("LFSC{i:016X}");
    let attempts = nodes.iter().enumerate();
    let attempts = attempts.map(|(i, node)| async move { node.set_cluster_id(&id(i)).await });
    let results = join_all(attempts).await;
    let set = nodes[0]
        .cluster_id()
        .await
        .expect("reading")
        .expect("no ID after it was set");
    let winners = results.iter().filter(|result| result.is_ok()).count();
    assert_eq!(winners, 1, "{winners} of 8 different IDs were set");
    for (i, (node, result)) in nodes.iter().zip(results).enumerate() {
        assert_eq!(
            node.cluster_id().await.expect("reading").as_ref(),
            Some(&set)
        );
        match result {
            Ok(()) => assert_eq!(set, id(i), "set, but another one is there"),
            Err(LeaseError::ClusterIdMismatch { ours, theirs }) => {
                assert_eq!((ours, &theirs), (id(i), &set));
            }
            Err(e) => panic!("setting the cluster ID: {e}"),
        }
    }
    nodes[1]
        .set_cluster_id(&set)
        .await
        .expect("setting the same ID again");
    let lease = nodes[0].acquire().await.expect("acquiring");
    lease.close().await.expect("giving the lease up");
    assert_eq!(
        nodes[2].cluster_id().await.expect("reading"),
        Some(set),
        "gone with the lease"
    );
}

/// While the service is down every call fails in time, as something that will pass; it passes.
pub async fn outage(service: &dyn Service) {
    let nodes = nodes(service, "outage", 2).await;
    let id = "LFSC0123456789ABCDEF";
    nodes[0]
        .set_cluster_id(id)
        .await
        .expect("setting the cluster ID");
    let lease = nodes[0].acquire().await.expect("acquiring");
    let renewed = lease.renewed_at();
    service.stop().await;

    let node = &*nodes[1];
    let limit = service.call_timeout();
    fails_for_now(limit, "acquire", node.acquire()).await;
    fails_for_now(limit, "acquire_existing", node.acquire_existing(lease.id())).await;
    fails_for_now(limit, "primary_info", node.primary_info()).await;
    fails_for_now(limit, "cluster_id", node.cluster_id()).await;
    fails_for_now(limit, "set_cluster_id", node.set_cluster_id(id)).await;
    fails_for_now(limit, "renew", lease.renew()).await;
    assert_eq!(
        lease.renewed_at(),
        renewed,
        "valid for longer, though it was not renewed"
    );
    // A watcher may sit an outage out; if it fails, then as everything does.
    if let Ok(Err(e)) = timeout(limit, node.watch_primary()).await {
        assert!(e.is_transient(), "watching failed for good: {e}");
    }

    service.start().await;
    let mut limit = Instant::now() + service.expires_within() + service.call_timeout();
    match works_again(limit, || lease.renew()).await {
        Ok(()) => lease.close().await.expect("giving the lease up"),
        Err(LeaseError::LeaseExpired) => {}
        Err(e) => panic!("renewing after the outage: {e}"),
    }
    limit += service.call_timeout();
    let seen = works_again(limit, || node.cluster_id()).await;
    assert_eq!(
        seen.expect("reading"),
        Some(id.to_owned()),
        "lost in the outage"
    );
    let lease = works_again(limit, || node.acquire())
        .await
        .expect("acquiring");
    let primary = nodes[0].primary_info().await.expect("reading the primary");
    assert_eq!(primary, info_of(node));
    lease.close().await.expect("giving the lease up");
}

async fn fails_for_now<T>(
    limit: Duration,
    what: &str,
    call: impl Future<Output = Result<T, LeaseError>>,
) {
    match timeout(limit, call).await {
        Err(_) => panic!("{what} took longer than {limit:?} while the service was down"),
        Ok(Ok(_)) => panic!("{what} succeeded while the service was down"),
        Ok(Err(e)) => assert!(e.is_transient(), "{what} failed for good: {e}"),
    }
}

/// The first answer of `call` that is not transient (nor a primary that has yet to expire).
async fn works_again<T, F: Future<Output = Result<T, LeaseError>>>(
    limit: Instant,
    call: impl Fn() -> F,
) -> Result<T, LeaseError> {
    loop {
        match call().await {
            Err(e) if e.is_transient() || matches!(e, LeaseError::PrimaryExists) => {
                assert!(
                    Instant::now() < limit,
                    "still failing after the outage: {e}"
                );
            }
            result => return result,
        }
        sleep(Duration::from_millis(50)).await;
    }
}
