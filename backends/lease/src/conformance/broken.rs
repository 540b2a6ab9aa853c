//! The service cannot be reached, in every way: calls end in time, and work again afterwards.

use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::knowledge::candidate;
use super::{AT_ONCE, Fault, Service, info_of, nodes};
use crate::{Lease, LeaseError, Leaser, Placement, PrimaryInfo};

/// A cluster ID.
const ID: &str = "LFSC0123456789ABCDEF";

/// Every call that asks the service, as it fails while the service cannot be reached: within
/// `limit`, for now, and as if nothing had been asked. All at once: each may take its whole time.
async fn all_fail_for_now(limit: Duration, node: &dyn Leaser, lease: &dyn Lease) {
    let renewed = lease.renewed_at();
    let announced = candidate(1, 1);
    tokio::join!(
        fails_for_now(limit, "acquire", node.acquire()),
        fails_for_now(limit, "acquire_existing", node.acquire_existing(lease.id())),
        fails_for_now(limit, "primary_info", node.primary_info()),
        fails_for_now(limit, "cluster_id", node.cluster_id()),
        fails_for_now(limit, "set_cluster_id", node.set_cluster_id(ID)),
        fails_for_now(limit, "announce", node.announce(&announced)),
        fails_for_now(limit, "candidates", node.candidates()),
        fails_for_now(limit, "recorded", node.recorded()),
        fails_for_now(limit, "renew", lease.renew()),
        fails_for_now(limit, "record", lease.record(Placement::default())),
        async {
            // A watcher may sit an outage out; if it fails, then as everything does.
            if let Ok(Err(e)) = timeout(limit, node.watch_primary()).await {
                assert!(e.is_transient(), "watching failed for good: {e}");
            }
        }
    );
    assert_eq!(
        lease.renewed_at(),
        renewed,
        "valid for longer, though it was not renewed"
    );
}

/// While connections are stalled, cut or refused every call fails in time, as something that will
/// pass, and a watcher that was there before hears of the next change; while they are slow, calls
/// succeed.
pub async fn faults(service: &dyn Service) {
    for (cluster, fault) in [
        ("fault-stall", Fault::Stall),
        ("fault-cut", Fault::Cut),
        ("fault-refuse", Fault::Refuse),
    ] {
        unreachable(service, cluster, fault).await;
    }
    slow(service).await;
}

async fn unreachable(service: &dyn Service, cluster: &str, fault: Fault) {
    let nodes = nodes(service, cluster, 4).await;
    let (holder, node, watcher, gone) = (&*nodes[0], &*nodes[1], &*nodes[2], &*nodes[3]);
    node.set_cluster_id(ID)
        .await
        .expect("setting the cluster ID");
    let lease = holder.acquire().await.expect("acquiring");
    gone.announce(&candidate(2, 2)).await.expect("announcing");
    let (report, mut primary) = watch::channel(None);
    let limit = service.call_timeout();
    let script = async {
        until_reported(&mut primary, Some(info_of(holder)), "before").await;
        // Give the watcher time to watch.
        sleep(Duration::from_millis(50)).await;
        service.fault(fault).await;
        let close = async {
            let closed = timeout(limit, gone.close()).await;
            assert!(closed.is_ok(), "close took longer than {limit:?}");
        };
        tokio::join!(all_fail_for_now(limit, node, &*lease), close);
        service.fault(Fault::None).await;
        let lease = recover(service, node, lease).await;
        until_reported(&mut primary, Some(info_of(node)), "after").await;
        lease.close().await.expect("giving the lease up");
        until_reported(&mut primary, None, "after").await;
    };
    tokio::select! {
        () = script => {}
        () = keep_watching(watcher, &report) => {}
    }
}

/// Reports the primary that `node` sees, now and whenever it changes, for ever.
async fn keep_watching(node: &dyn Leaser, report: &watch::Sender<Option<PrimaryInfo>>) {
    loop {
        let primary = node.primary_info().await;
        let heard = match primary {
            Ok(info) => {
                report.send_replace(Some(info));
                node.watch_primary().await
            }
            Err(LeaseError::NoPrimary) => {
                report.send_replace(None);
                node.watch_primary().await
            }
            Err(e) => Err(e),
        };
        if let Err(e) = heard {
            assert!(e.is_transient(), "watching failed for good: {e}");
            sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn until_reported(
    primary: &mut watch::Receiver<Option<PrimaryInfo>>,
    expected: Option<PrimaryInfo>,
    when: &str,
) {
    let reported = timeout(2 * AT_ONCE, primary.wait_for(|seen| *seen == expected)).await;
    assert!(
        reported.is_ok(),
        "a watcher was not told {when} the fault that the primary is {expected:?}"
    );
}

/// After a fault: calls work again at once, and `node` gets the lease from its holder.
async fn recover(
    service: &dyn Service,
    node: &dyn Leaser,
    lease: Box<dyn Lease>,
) -> Box<dyn Lease> {
    let soon = || Instant::now() + 2 * AT_ONCE;
    let id = works_again(soon(), || node.cluster_id()).await;
    let id = id.expect("reading the cluster ID after the fault");
    assert_eq!(id.as_deref(), Some(ID), "lost in the fault");
    match works_again(soon(), || lease.renew()).await {
        Ok(()) => lease.close().await.expect("giving the lease up"),
        Err(LeaseError::LeaseExpired) => {
            let age = lease.renewed_at().elapsed();
            assert!(
                Some(age) >= lease.ttl(),
                "expired before its TTL: after {age:?}"
            );
        }
        Err(e) => panic!("renewing after the fault: {e}"),
    }
    let limit = Instant::now() + service.expires_within();
    works_again(limit, || node.acquire())
        .await
        .expect("acquiring after the fault")
}

/// Calls succeed on a connection whose every answer is late by a tenth of the longest time.
async fn slow(service: &dyn Service) {
    let nodes = nodes(service, "fault-slow", 2).await;
    let (node, other) = (&*nodes[0], &*nodes[1]);
    service
        .fault(Fault::Delay(service.call_timeout() / 20))
        .await;
    let slow = "calling a slow service";
    node.set_cluster_id(ID).await.expect(slow);
    assert_eq!(node.cluster_id().await.expect(slow).as_deref(), Some(ID));
    node.announce(&candidate(1, 1)).await.expect(slow);
    assert_eq!(other.candidates().await.expect(slow), [candidate(1, 1)]);
    let lease = node.acquire().await.expect(slow);
    lease.record(Placement::default()).await.expect(slow);
    assert!(other.recorded().await.expect(slow).is_some());
    lease.renew().await.expect(slow);
    lease.handoff(1).await.expect(slow);
    let lease = other.acquire_existing(lease.id()).await.expect(slow);
    assert_eq!(node.primary_info().await.expect(slow), info_of(other));
    lease.close().await.expect(slow);
    node.close().await.expect(slow);
    service.fault(Fault::None).await;
}

/// While the service is down every call fails in time, as something that will pass; it passes.
pub async fn outage(service: &dyn Service) {
    let nodes = nodes(service, "outage", 2).await;
    let node = &*nodes[1];
    nodes[0]
        .set_cluster_id(ID)
        .await
        .expect("setting the cluster ID");
    let lease = nodes[0].acquire().await.expect("acquiring");
    lease.record(Placement::default()).await.expect("recording");
    service.stop().await;
    all_fail_for_now(service.call_timeout(), node, &*lease).await;

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
        seen.expect("reading").as_deref(),
        Some(ID),
        "lost in the outage"
    );
    let seen = works_again(limit, || node.recorded()).await;
    assert_eq!(
        seen.expect("reading"),
        Some(Placement::default()),
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
