//! What the cluster knows beside its primary: its ID, the candidates, and how far the last primary
//! came.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::time::sleep;

use super::{Service, nodes};
use crate::{Candidate, LeaseError, Leaser, Placement};

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

/// A candidate that has that many transactions.
pub(super) fn candidate(number: u64, transactions: u64) -> Candidate {
    Candidate {
        node_id: format!("{number:016X}"),
        hostname: format!("node{number}"),
        placement: Placement {
            epoch: 1,
            transactions,
        },
        settled: transactions.is_multiple_of(2),
    }
}

/// The candidates that `node` sees, by their IDs.
async fn seen(node: &dyn Leaser) -> Vec<Candidate> {
    let mut seen = node.candidates().await.expect("reading the candidates");
    seen.sort_by(|a, b| a.node_id.cmp(&b.node_id));
    seen
}

/// Candidates see each other and what each said last, for as long as it says so and no longer,
/// unless it withdraws.
pub async fn candidates(service: &dyn Service) {
    let nodes = nodes(service, "candidates", 4).await;
    let (kept, lost, gone, other) = (&*nodes[0], &*nodes[1], &*nodes[2], &*nodes[3]);
    assert_eq!(seen(other).await, [], "candidates from nowhere");
    let say = async |node: &dyn Leaser, candidate: &Candidate| {
        let lasts = node.announce(candidate).await.expect("announcing");
        let lasts = lasts.expect("a service needs announcements");
        assert!(
            Duration::ZERO < lasts && lasts <= service.expires_within(),
            "known for {lasts:?}"
        );
        lasts
    };
    let [first, second, third] = [1, 2, 3].map(|number| candidate(number, 10));
    say(kept, &first).await;
    assert_eq!(
        seen(other).await,
        std::slice::from_ref(&first),
        "announced, but not seen"
    );
    assert_eq!(
        seen(kept).await,
        std::slice::from_ref(&first),
        "it does not see itself"
    );
    say(lost, &second).await;
    say(gone, &third).await;
    assert_eq!(seen(other).await, [first.clone(), second.clone(), third]);
    gone.close().await.expect("withdrawing");
    assert_eq!(seen(other).await, [first, second], "seen, though withdrawn");

    let first = candidate(1, 11);
    say(kept, &first).await;
    let last = Instant::now();
    let second = candidate(2, 12);
    let lasts = say(lost, &second).await;
    let both = [first.clone(), second];
    assert_eq!(
        seen(other).await,
        both,
        "another than what was announced last"
    );
    let end = Instant::now() + service.expires_within();
    let mut expired = None;
    while Instant::now() < end {
        sleep(lasts / 4).await;
        say(kept, &first).await;
        let before = Instant::now();
        let seen = seen(other).await;
        assert!(
            seen.contains(&first),
            "not seen, though it was announced in time"
        );
        if seen.len() == 1 {
            assert!(Instant::now() >= last + lasts, "gone before its time");
            expired = Some(before);
        } else {
            assert_eq!((seen.as_slice(), expired), (both.as_slice(), None));
        }
    }
    assert_eq!(
        seen(other).await,
        [first],
        "seen, though it was not announced for long"
    );
    say(lost, &both[1]).await;
    assert_eq!(seen(other).await, both, "a candidate cannot come back");
    kept.close().await.expect("withdrawing");
    lost.close().await.expect("withdrawing");
    assert_eq!(seen(other).await, [], "seen, though withdrawn");
}

/// What the holder records is there for all, outlives its lease, and is no longer its to change.
pub async fn recorded(service: &dyn Service) {
    let nodes = nodes(service, "recorded", 3).await;
    let (old, new, other) = (&*nodes[0], &*nodes[1], &*nodes[2]);
    let read = async || other.recorded().await.expect("reading what was recorded");
    let at = |transactions| Placement {
        epoch: 1,
        transactions,
    };
    assert_eq!(read().await, None, "recorded by nobody");
    let lease = old.acquire().await.expect("acquiring");
    for placement in [at(1), at(2)] {
        lease.record(placement).await.expect("recording");
        assert_eq!(read().await, Some(placement), "recorded, but not seen");
    }
    lease.renew().await.expect("renewing after recording");
    let epoch = lease.epoch();
    lease.close().await.expect("giving the lease up");
    let refused = async |when: &str| {
        let result = lease.record(at(3)).await;
        assert!(
            matches!(result, Err(LeaseError::LeaseExpired)),
            "recorded with a lease that is gone, {when}: {result:?}"
        );
        assert_eq!(read().await, Some(at(2)), "changed or gone, {when}");
    };
    refused("nobody is primary").await;
    let next = new.acquire().await.expect("acquiring");
    assert!(next.epoch() > epoch);
    refused("another is primary").await;
    next.record(at(4)).await.expect("recording");
    assert_eq!(read().await, Some(at(4)), "recorded, but not seen");
    next.close().await.expect("giving the lease up");
}
