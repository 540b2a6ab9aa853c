//! The paths of the halt lock over real sockets, and the client of a replica against them.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reqwest::{Client, Method, StatusCode};
use tenure_lease::PrimaryInfo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

use crate::role::{HaltClient, Status};
use crate::store::disk::{Disk, Real, Scratch};
use crate::store::{Decided, Outgoing, Primary, Verdict};

use super::harness::{TestNode, eventually, golden, peers};

const ME: &str = "00000000000000AB";
const OTHER: &str = "00000000000000CD";
const DB: &str = "a.db";
const CASES: [&str; 2] = ["delete-4096-lz4", "wal-4096-raw"];

/// Asks as a node; the status and the text.
async fn ask(
    node: &TestNode,
    method: Method,
    path: &str,
    who: &str,
    body: Vec<u8>,
) -> (StatusCode, String) {
    let client = Client::builder().no_proxy().build().unwrap();
    let request = client.request(method, format!("{}{path}", node.url));
    let request = request.header("Litefs-Id", who).body(body);
    let answer = request.send().await.unwrap();
    (answer.status(), answer.text().await.unwrap())
}

async fn take(node: &TestNode, id: i64, who: &str) -> (StatusCode, String) {
    let path = format!("/halt?name={DB}&id={id}");
    ask(node, Method::POST, &path, who, Vec::new()).await
}

async fn give_back(node: &TestNode, name: &str, id: i64) -> StatusCode {
    let path = format!("/halt?name={name}&id={id}");
    ask(node, Method::DELETE, &path, ME, Vec::new()).await.0
}

async fn tx(node: &TestNode, id: i64, who: &str, ltx: &[u8]) -> StatusCode {
    let path = format!("/tx?name={DB}&lockID={id}");
    ask(node, Method::POST, &path, who, ltx.to_vec()).await.0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_halt_lock_is_asked_for_by_a_node_with_an_id() {
    let mut node = TestNode::primary().await;
    node.seed(DB, &golden(CASES[0])[..3]).await;
    let own = crate::stream::format_node_id(node.store.node_id());
    let (bad, no) = (StatusCode::BAD_REQUEST, StatusCode::NOT_FOUND);
    for (path, who, code) in [
        ("/halt?name=a.db&id=7", "", bad),
        ("/halt?name=a.db&id=7", "xyz", bad),
        ("/halt?name=a.db&id=7", &*own, bad),
        ("/halt?name=a.db&id=0", ME, bad),
        ("/halt?name=a.db&id=-7", ME, bad),
        ("/halt?name=a.db&id=many", ME, bad),
        ("/halt?name=a.db", ME, bad),
        ("/halt?name=..%2Fa.db&id=7", ME, bad),
        ("/halt?name=none.db&id=7", ME, no),
        ("/halt?name=a.db&id=7&renew=1", ME, StatusCode::CONFLICT),
        ("/tx?name=none.db&lockID=7", ME, no),
        ("/tx?name=..%2Fa.db&lockID=7", ME, bad),
        ("/tx?name=a.db&lockID=7", "", bad),
        ("/tx?name=a.db&lockID=7", ME, bad),
    ] {
        let (status, text) = ask(&node, Method::POST, path, who, Vec::new()).await;
        assert_eq!(status, code, "{path} {who:?}: {text}");
    }
    for name in ["none.db", DB] {
        assert_eq!(give_back(&node, name, 7).await, StatusCode::OK, "{name}");
    }
    let (status, text) = take(&node, 7, ME).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let pos = node.pos(DB);
    let begin = format!(
        "{{\"id\":7,\"pos\":{{\"TXID\":\"{:016x}\",\"PostApplyChecksum\":\"{:016x}\"}},\"expires\":\"2",
        pos.txid, pos.checksum
    );
    assert!(
        text.starts_with(&begin) && text.ends_with("Z\"}\n"),
        "{text}"
    );
    assert_eq!(take(&node, 7, ME).await.0, StatusCode::OK, "the same lock");
    assert_eq!(give_back(&node, DB, 8).await, StatusCode::OK);
    let path = "/halt?name=a.db&id=7&renew=1";
    let renewed = ask(&node, Method::POST, path, ME, Vec::new()).await.0;
    assert_eq!(renewed, StatusCode::OK, "another ID has returned nothing");
    let (status, text) = take(&node, 9, OTHER).await;
    assert!(!status.is_success(), "another node waits in vain: {text}");
    give_back(&node, DB, 7).await;
    assert_eq!(take(&node, 9, OTHER).await.0, StatusCode::OK);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_gives_no_halt_locks() {
    let mut node = TestNode::new();
    node.seed(DB, &golden(CASES[0])[..3]).await;
    node.serve("127.0.0.1:0").await;
    assert_eq!(take(&node, 7, ME).await.0, StatusCode::SERVICE_UNAVAILABLE);
    let ltx = &golden(CASES[0])[3];
    assert_eq!(tx(&node, 7, ME, ltx).await, StatusCode::SERVICE_UNAVAILABLE);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_is_taken_from_the_holder_where_it_fits() {
    for case in CASES {
        let files = golden(case);
        let mut node = TestNode::primary().await;
        node.seed(DB, &files[..3]).await;
        let (conflict, bad) = (StatusCode::CONFLICT, StatusCode::BAD_REQUEST);
        let before = (node.pos(DB), node.snapshot(DB).await);
        assert_eq!(
            tx(&node, 7, ME, &files[3]).await,
            conflict,
            "without a lock"
        );
        assert_eq!(take(&node, 7, ME).await.0, StatusCode::OK);
        let mut damaged = files[3].clone();
        let at = damaged.len() / 2;
        damaged[at] ^= 1;
        for (id, who, ltx, code) in [
            (8, ME, &files[3][..], conflict),
            (7, OTHER, &files[3], conflict),
            (7, ME, &files[4], conflict),
            (7, ME, &damaged, bad),
            (7, ME, &files[3][..files[3].len() - 1], bad),
            (7, ME, &[], bad),
        ] {
            assert_eq!(tx(&node, id, who, ltx).await, code, "{case}");
            let now = (node.pos(DB), node.snapshot(DB).await);
            assert!(now == before, "{case}: something changed");
        }
        let ok = StatusCode::OK;
        assert_eq!(tx(&node, 7, ME, &files[3]).await, ok, "{case}");
        let after = node.pos(DB);
        assert_eq!(after.txid, before.0.txid + 1, "durable when it is answered");
        assert_eq!(tx(&node, 7, ME, &files[3]).await, ok, "{case}: a retry");
        assert_eq!(node.pos(DB), after);
        assert_eq!(tx(&node, 7, ME, &files[4]).await, ok, "{case}");
        give_back(&node, DB, 7).await;
        assert_eq!(
            tx(&node, 7, ME, &files[4]).await,
            ok,
            "{case}: a late retry"
        );
        assert_eq!(tx(&node, 7, ME, &files[5]).await, conflict, "{case}");
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_expires_and_a_change_of_role_takes_it() {
    let mut node = TestNode::new();
    node.halt_ttl = Duration::from_millis(700);
    let mut node = node.into_primary().await;
    node.seed(DB, &golden(CASES[1])[..3]).await;
    assert_eq!(take(&node, 7, ME).await.0, StatusCode::OK);
    let began = Instant::now();
    assert_eq!(take(&node, 8, OTHER).await.0, StatusCode::OK);
    let waited = began.elapsed();
    assert!(waited > Duration::from_millis(500), "{waited:?}");
    assert!(waited < Duration::from_secs(8), "{waited:?}");
    let ltx = &golden(CASES[1])[3];
    assert_eq!(tx(&node, 7, ME, ltx).await, StatusCode::CONFLICT);
    let store = Arc::clone(&node.store);
    tokio::task::spawn_blocking(move || {
        store.set_role(crate::store::Role::Replica { hostname: None });
        store.set_role(crate::store::Role::Primary);
    })
    .await
    .unwrap();
    assert_eq!(tx(&node, 8, OTHER, ltx).await, StatusCode::CONFLICT);
    assert_eq!(take(&node, 9, ME).await.0, StatusCode::OK, "and it is free");
    node.stop().await;
}

/// A relay to `target` that breaks the first `broken` connections that carry a transaction, once
/// the primary has answered.
async fn relay(target: String, broken: usize) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let transactions = Arc::new(AtomicUsize::new(0));
    let seen = transactions.clone();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let (target, seen) = (target.clone(), seen.clone());
            tokio::spawn(async move {
                let mut server = TcpStream::connect(&target).await.unwrap();
                let mut breaks = false;
                let (mut a, mut b) = ([0; 65536], [0; 65536]);
                loop {
                    tokio::select! {
                        n = client.read(&mut a) => {
                            let n = n.unwrap_or(0);
                            if n == 0 { return }
                            if a.starts_with(b"POST /tx") {
                                breaks = seen.fetch_add(1, Ordering::SeqCst) < broken;
                            }
                            server.write_all(&a[..n]).await.unwrap();
                        }
                        n = server.read(&mut b) => {
                            let n = n.unwrap_or(0);
                            if n == 0 || breaks { return }
                            client.write_all(&b[..n]).await.unwrap();
                        }
                    }
                }
            });
        }
    });
    (url, transactions)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_tries_again_with_the_same_lock_when_an_answer_is_lost() {
    let files = golden(CASES[0]);
    let mut primary = TestNode::primary().await;
    primary.seed(DB, &files[..3]).await;
    let target = primary.url.trim_start_matches("http://").to_owned();
    let (url, transactions) = relay(target, 2).await;
    let replica = TestNode::new();
    replica.status.send_replace(Status {
        is_primary: false,
        primary: Some(PrimaryInfo {
            hostname: "pri".into(),
            advertise_url: url,
        }),
        ready: true,
    });
    let client = HaltClient::new(&replica.store, peers(), replica.status.subscribe());
    let client = Arc::new(client);
    let dir = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(Real);
    let mut ltx = Outgoing::new(Scratch::new(&disk, dir.path()));
    ltx.write_all(&files[3]).unwrap();
    let taking = client.clone();
    let pos = tokio::task::spawn_blocking(move || {
        let until = Instant::now() + Duration::from_secs(10);
        taking.take(DB, 77, until, &|| false)
    });
    let before = primary.pos(DB);
    assert_eq!(pos.await.unwrap().unwrap(), before);
    let (tell, told) = oneshot::channel();
    let decided = Decided::new(move |verdict| tell.send(verdict).unwrap());
    client.commit(DB, 77, Arc::new(ltx), decided);
    assert_eq!(told.await.unwrap(), Verdict::Accepted);
    assert_eq!(transactions.load(Ordering::SeqCst), 3);
    assert_eq!(primary.pos(DB).txid, before.txid + 1, "applied once");
    client.release(DB, 77);
    let db = primary.store.database(DB).unwrap();
    let node = replica.store.node_id();
    eventually("the return of the lock", || {
        !db.renew_halt(77, node, Duration::from_secs(30))
    })
    .await;
    primary.stop().await;
}
