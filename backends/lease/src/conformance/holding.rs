//! One holder at a time, for as long as it renews, and nobody else's.

use std::time::Instant;

use futures_util::future::join_all;
use tokio::time::sleep;

use super::{Service, info_of, nodes};
use crate::{Lease, LeaseError, Leaser, Placement};

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
    let end = before + service.expires_within();
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
    let recorded = old.record(Placement::default()).await;
    assert!(
        matches!(recorded, Err(LeaseError::LeaseExpired)),
        "recorded with an expired lease"
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
