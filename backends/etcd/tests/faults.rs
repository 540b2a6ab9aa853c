//! What the conformance suite cannot know of: etcd paused, compacted, replaced, of several members,
//! and changed by hand.

use std::time::{Duration, Instant};

use tenure_lease::{LeaseError, Leaser};
use tenure_test_services::etcd::{Etcd, EtcdOptions};
use tenure_test_services::proxy::{Fault, Proxy};
use tokio::time::{sleep, timeout};

mod common;

use common::{CALL_TIMEOUT, TTL, every_call, leaser, node, options, settled, timed};

const AT_ONCE: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread")]
async fn while_etcd_is_paused_every_call_fails_in_time() {
    let etcd = Etcd::start();
    let (holder, other) = (node(etcd.endpoint()), node(etcd.endpoint()));
    let lease = holder.acquire().await.expect("acquiring");
    lease.renew().await.expect("renewing");
    let renewed = lease.renewed_at();
    other.primary_info().await.expect("reading the primary");
    etcd.pause();
    let transient = |name: &str, result: Result<(), LeaseError>| {
        let transient = result.as_ref().is_err_and(LeaseError::is_transient);
        assert!(transient, "{name}: {result:?}");
    };
    transient("renew", timed(lease.renew()).await);
    for (name, result) in every_call(&other).await {
        transient(name, result);
    }
    transient("record", timed(lease.record(Default::default())).await);
    transient("close", timed(lease.close()).await);
    assert_eq!(
        lease.renewed_at(),
        renewed,
        "lasts longer without an answer"
    );
    // A connection on which nothing comes is noticed.
    let watched = timeout(Duration::from_secs(15), other.watch_primary()).await;
    transient("watch_primary", watched.expect("it ends"));
    etcd.resume();
    match settled(|| lease.renew()).await {
        Ok(()) => lease.close().await.expect("giving the lease up"),
        Err(LeaseError::LeaseExpired) => {}
        Err(e) => panic!("renewing after the pause: {e}"),
    }
    settled(|| other.cluster_id()).await.expect("reading");
    let end = Instant::now() + TTL + Duration::from_secs(3);
    while let Err(e) = other.acquire().await {
        assert!(Instant::now() < end, "acquiring: {e}");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_whose_connection_stalls_ends() {
    let etcd = Etcd::start();
    let proxy = Proxy::start(etcd.address());
    let node = node(format!("http://{}", proxy.addr()));
    assert!(matches!(
        node.primary_info().await,
        Err(LeaseError::NoPrimary)
    ));
    let stall = async {
        sleep(Duration::from_millis(200)).await;
        proxy.set(Fault::Stall);
    };
    let watch = timeout(Duration::from_secs(15), node.watch_primary());
    let (watched, ()) = tokio::join!(watch, stall);
    let error = watched.expect("it ends").expect_err("nothing has changed");
    assert!(error.is_transient(), "{error}");
    proxy.set(Fault::None);
    settled(|| node.cluster_id()).await.expect("reading");
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_need_not_be_there_when_a_leaser_is_made() {
    let etcd = Etcd::start();
    etcd.kill();
    let node = node(etcd.endpoint());
    for (name, result) in every_call(&node).await {
        assert!(result.is_err_and(|e| e.is_transient()), "{name}");
    }
    etcd.start_again();
    settled(|| node.acquire()).await.expect("acquiring");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_from_a_revision_that_was_compacted_away_says_that_there_may_be_a_change() {
    let etcd = Etcd::start();
    let node = node(etcd.endpoint());
    assert!(matches!(
        node.primary_info().await,
        Err(LeaseError::NoPrimary)
    ));
    for i in 0..10 {
        etcd.ctl(&["put", "other", &i.to_string()]);
    }
    let header = etcd.ctl(&["get", "other", "--write-out", "json"]);
    let revision = header.split("\"revision\":").nth(1).expect("a revision");
    let revision = revision.split([',', '}']).next().expect("a number");
    etcd.ctl(&["compaction", revision]);
    let told = timeout(AT_ONCE, node.watch_primary()).await;
    told.expect("told of the compaction").expect("watching");
    // Not again and again.
    let quiet = timeout(AT_ONCE, node.watch_primary()).await;
    assert!(quiet.is_err(), "told of a compaction twice: {quiet:?}");
    let watch = timeout(AT_ONCE, node.watch_primary());
    let (told, lease) = tokio::join!(watch, async {
        sleep(Duration::from_millis(100)).await;
        node.acquire().await.expect("acquiring")
    });
    told.expect("told of the new primary").expect("watching");
    lease.close().await.expect("giving the lease up");
}

#[tokio::test(flavor = "multi_thread")]
async fn whose_key_is_deleted_or_overwritten_by_hand_is_not_primary() {
    let etcd = Etcd::start();
    let node = node(etcd.endpoint());
    let stranger = r#"{"hostname":"b","advertise-url":"http://b:20202"}"#;
    for change in [&["del", "tenure"][..], &["put", "tenure", stranger]] {
        let lease = node.acquire().await.expect("acquiring");
        lease.renew().await.expect("renewing");
        etcd.ctl(change);
        let renewed = lease.renew().await;
        assert!(
            matches!(renewed, Err(LeaseError::LeaseExpired)),
            "{renewed:?}"
        );
        let recorded = lease.record(Default::default()).await;
        assert!(matches!(recorded, Err(LeaseError::LeaseExpired)));
        lease.close().await.expect("closing what is lost");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_handed_over_can_neither_renew_nor_record() {
    let etcd = Etcd::start();
    let endpoint = [etcd.endpoint()];
    let (a, b) = (
        leaser(options(&endpoint, "tenure", "a")),
        leaser(options(&endpoint, "tenure", "b")),
    );
    let old = a.acquire().await.expect("acquiring");
    old.handoff(1).await.expect("handing over");
    let id = old.id().to_lowercase();
    let new = b.acquire_existing(&id).await.expect("taking over");
    assert_eq!(new.id(), old.id());
    for result in [old.renew().await, old.record(Default::default()).await] {
        assert!(
            matches!(result, Err(LeaseError::LeaseExpired)),
            "{result:?}"
        );
    }
    new.renew().await.expect("renewing");
    new.record(Default::default()).await.expect("recording");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_is_taken_over_lasts_as_long_as_it_was_granted_for() {
    let etcd = Etcd::start();
    let endpoint = [etcd.endpoint()];
    let ttl = Duration::from_secs(20);
    let longer = leaser(tenure_lease_etcd::EtcdOptions {
        ttl,
        ..options(&endpoint, "tenure", "b")
    });
    let short = leaser(options(&endpoint, "tenure", "a"));
    let lease = short.acquire().await.expect("acquiring");
    let taken = longer
        .acquire_existing(lease.id())
        .await
        .expect("taking over");
    assert_eq!(taken.ttl(), Some(TTL));
    taken.close().await.expect("giving it up");
    let lease = longer.acquire().await.expect("acquiring");
    let taken = short
        .acquire_existing(lease.id())
        .await
        .expect("taking over");
    assert_eq!(taken.ttl(), Some(TTL), "renewed in time for its own TTL");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_was_not_acquired_is_not_left_behind() {
    let etcd = Etcd::start();
    let (a, b) = (node(etcd.endpoint()), node(etcd.endpoint()));
    let lease = a.acquire().await.expect("acquiring");
    for _ in 0..3 {
        let second = b.acquire().await;
        assert!(matches!(second, Err(LeaseError::PrimaryExists)));
    }
    let end = Instant::now() + AT_ONCE;
    loop {
        let leases = etcd.ctl(&["lease", "list"]);
        if leases.lines().count() == 2 && leases.contains(&lease.id().to_lowercase()) {
            break;
        }
        assert!(Instant::now() < end, "left over: {leases}");
        sleep(Duration::from_millis(50)).await;
    }
    lease.close().await.expect("giving the lease up");

    // However far a call has come when it is cancelled, it holds nothing afterwards.
    for micros in (0..40).map(|i| i * i * 10) {
        let call = timeout(Duration::from_micros(micros), b.acquire()).await;
        if let Ok(lease) = call {
            lease
                .expect("acquiring")
                .close()
                .await
                .expect("giving it up");
        }
        let end = Instant::now() + AT_ONCE;
        let lease = loop {
            match a.acquire().await {
                Ok(lease) => break lease,
                Err(e) => assert!(Instant::now() < end, "cancelled after {micros} µs: {e}"),
            }
        };
        lease.close().await.expect("giving the lease up");
    }
}

/// The TTL of the tests with several members: time enough for an election.
const LONG_TTL: Duration = Duration::from_secs(12);

#[tokio::test(flavor = "multi_thread")]
async fn with_several_members_any_one_may_be_paused_or_killed() {
    let members = Etcd::cluster(3, EtcdOptions::default());
    let endpoints: Vec<String> = members.iter().map(Etcd::endpoint).collect();
    let node = leaser(tenure_lease_etcd::EtcdOptions {
        ttl: LONG_TTL,
        ..options(&endpoints, "tenure", "a")
    });
    let lease = node.acquire().await.expect("acquiring");
    for member in &members {
        member.pause();
        settled(|| lease.renew()).await.expect("renewing elsewhere");
        member.resume();
        member.wait();
        member.kill();
        settled(|| lease.renew()).await.expect("renewing elsewhere");
        node.primary_info().await.expect("reading the primary");
        member.start_again();
    }
    // One endpoint that is wrong is no harm, either.
    let endpoints = ["http://127.0.0.1:1".to_owned(), endpoints[1].clone()];
    let other = leaser(options(&endpoints, "tenure", "b"));
    other.primary_info().await.expect("reading the primary");
    lease.close().await.expect("giving the lease up");
}

/// A paused leader does not know that there is a new one. What it answers when it goes on must not
/// make a holder believe that its lease was renewed: it lasts no longer here than in the cluster.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_was_paused_renews_nothing_on_its_own() {
    let members = Etcd::cluster(3, EtcdOptions::default());
    let leader = members.iter().find(|member| {
        let status = member.ctl(&["endpoint", "status"]);
        status.split(", ").nth(4) == Some("true")
    });
    let leader = leader.expect("one member is the leader");
    let other = members
        .iter()
        .find(|member| member.address() != leader.address());
    let other = other.expect("another member");
    let ours = leaser(tenure_lease_etcd::EtcdOptions {
        ttl: LONG_TTL,
        ..options(&[leader.endpoint()], "tenure", "a")
    });
    let lease = ours.acquire().await.expect("acquiring");
    lease.renew().await.expect("renewing");
    leader.pause();
    let paused = Instant::now();
    other.wait();
    // Asked again and again while it is paused, so that requests wait for it when it goes on.
    let renewals = async {
        loop {
            if lease.renew().await.is_ok() {
                return lease.renewed_at();
            }
        }
    };
    let go_on = async {
        sleep(Duration::from_secs(6)).await;
        leader.resume();
    };
    let both = async { tokio::join!(renewals, go_on) };
    let (renewed, ()) = timeout(Duration::from_secs(20), both)
        .await
        .expect("renewing");
    assert!(renewed > paused);
    // What the cluster as a whole believes of the lease.
    let asked = Instant::now();
    let left = other.ctl(&["lease", "timetolive", &lease.id().to_lowercase()]);
    let left = left
        .split("remaining(")
        .nth(1)
        .and_then(|s| s.split('s').next());
    let left: u64 = left.and_then(|s| s.parse().ok()).expect("seconds");
    let ours = (renewed + LONG_TTL).saturating_duration_since(asked);
    let theirs = Duration::from_secs(left + 1);
    assert!(
        ours <= theirs + CALL_TIMEOUT,
        "ours {ours:?}, theirs {theirs:?}"
    );
}
