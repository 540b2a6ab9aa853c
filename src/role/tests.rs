//! The role loop with the static lease, and holding a lease that expires.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant as StdInstant;

use async_trait::async_trait;
use parking_lot::Mutex;
use tenure_lease::Lease;
use tokio::time::Instant;

use crate::http::harness::{TestNode, eventually, golden, peers};
use crate::stream::CLUSTER_ID_HEADER;

use super::*;

#[test]
fn cluster_ids_have_20_characters() {
    let id = new_cluster_id();
    assert_eq!(id.len(), 20);
    let digits = id.strip_prefix("LFSC").unwrap();
    assert!(
        digits
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b)),
        "{id}"
    );
    assert_ne!(id, new_cluster_id());
}

/// A primary under a role loop of its own.
async fn primary() -> TestNode {
    let mut node = TestNode::new();
    node.serve("127.0.0.1:0").await;
    let url = node.url.clone();
    node.run_role(true, &url, &[]);
    eventually("primary", || node.status.borrow().is_primary).await;
    node
}

fn replica_of(primary: &TestNode, databases: &[&str]) -> TestNode {
    let mut node = TestNode::new();
    node.run_role(false, &primary.url, databases);
    node
}

async fn assert_same(a: &TestNode, b: &TestNode, name: &str) {
    eventually("the same position", || a.pos(name) == b.pos(name)).await;
    assert!(
        a.snapshot(name).await == b.snapshot(name).await,
        "the bytes of {name}"
    );
}

#[tokio::test]
async fn a_static_primary_and_its_replica() {
    let mut pri = primary().await;
    assert_eq!(pri.store.role(), Role::Primary);
    let id = pri.store.cluster_id().expect("a cluster ID");
    let files = golden("wal-4096-lz4");
    pri.seed("w.db", &files[..2]).await;

    let mut rep = replica_of(&pri, &[]);
    eventually("ready", || rep.status.borrow().ready).await;
    assert_eq!(rep.store.cluster_id(), Some(id));
    assert_eq!(
        rep.store.role(),
        Role::Replica {
            hostname: Some("pri".into())
        }
    );
    assert_same(&pri, &rep, "w.db").await;
    for file in &files[2..] {
        pri.seed("w.db", std::slice::from_ref(file)).await;
    }
    pri.seed("d.db", &golden("drop-recreate")).await;
    assert_same(&pri, &rep, "w.db").await;
    assert_same(&pri, &rep, "d.db").await;
    eventually("a heartbeat", || rep.store.lag().is_some()).await;
    assert!(rep.stats.lags()["w.db"] >= 0);

    // The primary goes away, and the replica says so after a failed attempt; then it is back.
    let addr = pri.url.strip_prefix("http://").unwrap().to_owned();
    pri.stop().await;
    assert_eq!(pri.store.role(), Role::Replica { hostname: None });
    eventually("no primary", || {
        rep.store.role() == Role::Replica { hostname: None }
    })
    .await;
    assert_eq!(
        rep.status.borrow().primary.as_ref().unwrap().hostname,
        "pri"
    );
    pri.shutdown.send_replace(false);
    pri.serve(&addr).await;
    let url = pri.url.clone();
    pri.run_role(true, &url, &[]);
    pri.seed("later.db", &golden("delete-512-lz4")).await;
    assert_same(&pri, &rep, "later.db").await;
    rep.stop().await;
    pri.stop().await;
}

#[tokio::test]
async fn a_replica_with_another_history_gets_the_primarys() {
    let pri = primary().await;
    pri.seed("same.db", &golden("delete-4096-lz4")[..3]).await;
    pri.seed("ahead.db", &golden("delete-4096-lz4")[..2]).await;
    let mut rep = TestNode::new();
    // The same TXID with another checksum, a longer history, and a database of its own.
    rep.seed("same.db", &golden("wal-4096-lz4")[..3]).await;
    rep.seed("ahead.db", &golden("wal-4096-lz4")).await;
    rep.seed("ghost.db", &golden("wal-512-lz4")).await;
    let ghost = rep.pos("ghost.db");
    assert_ne!(pri.pos("same.db"), rep.pos("same.db"));
    rep.run_role(false, &pri.url, &[]);
    eventually("ready", || rep.status.borrow().ready).await;
    assert_same(&pri, &rep, "same.db").await;
    assert_same(&pri, &rep, "ahead.db").await;
    assert_eq!(rep.pos("ghost.db"), ghost);
    assert!(pri.store.database("ghost.db").is_none());
}

#[tokio::test]
async fn only_the_databases_that_were_asked_for() {
    let pri = primary().await;
    pri.seed("a.db", &golden("delete-4096-lz4")).await;
    pri.seed("b.db", &golden("wal-4096-lz4")).await;
    let rep = replica_of(&pri, &["b.db"]);
    eventually("ready", || rep.status.borrow().ready).await;
    assert_same(&pri, &rep, "b.db").await;
    assert!(rep.store.database("a.db").is_none());
}

#[tokio::test]
async fn different_clusters_never_replicate() {
    let pri = primary().await;
    pri.seed("a.db", &golden("delete-4096-lz4")).await;
    let mut rep = TestNode::new();
    rep.store.set_cluster_id("LFSC00000000000000FF").unwrap();
    rep.run_role(false, &pri.url, &[]);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!rep.status.borrow().ready);
    assert!(rep.store.database("a.db").is_none());
    assert_eq!(rep.store.cluster_id().unwrap(), "LFSC00000000000000FF");

    // Nor does a primary that says so only in its answer.
    let receiver = Receiver::new(
        Arc::clone(&rep.store),
        Arc::default(),
        peers(),
        BTreeSet::new(),
    );
    let other = TestNode::primary().await;
    let answer = reqwest::get(format!("{}/info", other.url)).await.unwrap();
    assert_eq!(answer.headers()[CLUSTER_ID_HEADER], "LFSC0123456789ABCDEF");
    let info = PrimaryInfo {
        hostname: "x".into(),
        advertise_url: other.url.clone(),
    };
    let never = watch::Sender::new(false);
    let error = receiver
        .follow(&info, false, &mut never.subscribe(), mpsc::channel(8).0)
        .await
        .unwrap_err();
    assert!(matches!(error, StreamError::Refused { .. }), "{error}");
}

/// A lease whose renewals go as they are told.
struct Scripted {
    ttl: Option<Duration>,
    renewed: Mutex<StdInstant>,
    renewals: AtomicU32,
    /// From this renewal on the service hangs.
    hangs_at: u32,
    /// These renewals fail transiently.
    fails: std::ops::Range<u32>,
}

impl Scripted {
    fn new(ttl: Option<Duration>, hangs_at: u32, fails: std::ops::Range<u32>) -> Self {
        let renewed = Mutex::new(Instant::now().into_std());
        Scripted {
            ttl,
            renewed,
            renewals: AtomicU32::new(0),
            hangs_at,
            fails,
        }
    }
}

#[async_trait]
impl Lease for Scripted {
    fn id(&self) -> &str {
        "scripted"
    }
    fn epoch(&self) -> u64 {
        7
    }
    fn ttl(&self) -> Option<Duration> {
        self.ttl
    }
    fn renewed_at(&self) -> StdInstant {
        *self.renewed.lock()
    }
    async fn renew(&self) -> Result<(), LeaseError> {
        let n = self.renewals.fetch_add(1, Ordering::Relaxed);
        let sent = Instant::now().into_std();
        if n >= self.hangs_at {
            std::future::pending::<()>().await;
        }
        if self.fails.contains(&n) {
            return Err(LeaseError::transient("renewing", "scripted"));
        }
        *self.renewed.lock() = sent;
        Ok(())
    }
    async fn handoff(&self, _node_id: u64) -> Result<(), LeaseError> {
        Err(LeaseError::Unsupported("handoff"))
    }
    async fn record(&self, _placement: tenure_lease::Placement) -> Result<(), LeaseError> {
        Ok(())
    }

    async fn close(&self) -> Result<(), LeaseError> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_ends_a_margin_before_its_ttl_whatever_the_service_does() {
    let mut stop = watch::Sender::new(false).subscribe();
    let stopper = watch::Sender::new(false);
    let mut running = stopper.subscribe();
    assert!(stop.has_changed().is_err(), "its sender is gone");
    assert_eq!(
        hold::hold(&Scripted::new(None, 0, 0..0), &mut stop, |_| true).await,
        hold::End::Shutdown
    );

    let ttl = Some(Duration::from_secs(10));
    // Renewed at 5 s and 10 s; the third hangs: the end is 9 s after 10 s.
    let start = Instant::now();
    let lease = Scripted::new(ttl, 2, 0..0);
    assert_eq!(
        hold::hold(&lease, &mut running, |_| true).await,
        hold::End::Lost
    );
    assert_eq!(start.elapsed().as_secs(), 19);

    // Failures for a while (at 5, 6 and 7 s) do no harm; the next renewal counts from 8 s.
    let start = Instant::now();
    let lease = Scripted::new(ttl, 4, 0..3);
    assert_eq!(
        hold::hold(&lease, &mut running, |_| true).await,
        hold::End::Lost
    );
    assert_eq!(start.elapsed().as_secs(), 17);

    // A short TTL has a tenth of it as its margin.
    let start = Instant::now();
    let lease = Scripted::new(Some(Duration::from_secs(2)), 0, 0..0);
    assert_eq!(
        hold::hold(&lease, &mut running, |_| true).await,
        hold::End::Lost
    );
    assert_eq!(start.elapsed(), Duration::from_millis(1800));
}
