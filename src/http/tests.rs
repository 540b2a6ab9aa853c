//! The API over real sockets.

use std::time::Duration;

use bytes::Bytes;
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::ltx::{self, Pos};
use crate::stream::frame::{ChunkReader, Frame, FrameError};
use crate::stream::{coding, common, format_node_id, posmap};

use super::harness::{TestNode, eventually, golden};
use super::server::{Server, ServerError};

fn h2() -> Client {
    Client::builder()
        .http2_prior_knowledge()
        .no_proxy()
        .build()
        .unwrap()
}

fn h1() -> Client {
    Client::builder().http1_only().no_proxy().build().unwrap()
}

fn post_stream(node: &TestNode, body: Vec<u8>) -> RequestBuilder {
    h2().post(format!("{}/stream", node.url)).body(body)
}

async fn text(response: Response) -> (StatusCode, String) {
    (response.status(), response.text().await.unwrap())
}

/// The frames of a stream that is still open, with their LTX files.
struct Frames {
    response: Response,
    decoder: Option<coding::Decoder>,
    bytes: Vec<u8>,
}

impl Frames {
    fn new(response: Response) -> Frames {
        assert_eq!(response.status(), StatusCode::OK);
        let coded = response.headers().contains_key("content-encoding");
        Frames {
            response,
            decoder: coded.then(|| coding::Decoder::new().unwrap()),
            bytes: Vec::new(),
        }
    }

    /// The next frame, heartbeats left out.
    async fn next(&mut self) -> (Frame, Vec<u8>) {
        loop {
            let (frame, ltx) = self.next_of_all().await;
            if !matches!(frame, Frame::Heartbeat { .. }) {
                return (frame, ltx);
            }
        }
    }

    async fn next_of_all(&mut self) -> (Frame, Vec<u8>) {
        loop {
            let mut rest = &self.bytes[..];
            if let Some(found) = Self::parse(&mut rest) {
                self.bytes = rest.to_vec();
                return found;
            }
            let more = timeout(Duration::from_secs(10), self.response.chunk()).await;
            self.add(more.expect("a frame").unwrap().expect("no end yet"));
        }
    }

    fn add(&mut self, more: Bytes) {
        let Some(decoder) = &mut self.decoder else {
            return self.bytes.extend_from_slice(&more);
        };
        decoder.add(more);
        while decoder.has_more() {
            self.bytes.extend_from_slice(&decoder.decode().unwrap());
        }
    }

    /// One frame, if all of it is there.
    fn parse(bytes: &mut &[u8]) -> Option<(Frame, Vec<u8>)> {
        let frame = match Frame::read(bytes) {
            Err(FrameError::Io(_) | FrameError::Eof) => return None,
            frame => frame.unwrap(),
        };
        let mut ltx = Vec::new();
        if matches!(frame, Frame::Ltx { .. }) {
            let mut chunks = ChunkReader::new(bytes);
            std::io::Read::read_to_end(&mut chunks, &mut ltx).ok()?;
            chunks.finish().ok()?;
        }
        Some((frame, ltx))
    }

    /// Asserts that the body is at its end, and complete.
    async fn assert_end(mut self) {
        while let Some(more) = self.response.chunk().await.unwrap() {
            self.add(more);
        }
        assert_eq!(self.bytes, b"");
    }
}

#[tokio::test]
async fn unknown_paths_and_wrong_methods() {
    let node = TestNode::primary().await;
    for client in [h1(), h2()] {
        for path in ["/", "/nothing", "/info/x", "/promote/x", "/halt/x", "/tx/x"] {
            let answer = client
                .post(format!("{}{path}", node.url))
                .send()
                .await
                .unwrap();
            assert_eq!(answer.status(), StatusCode::NOT_FOUND, "{path}");
            assert_eq!(
                answer.headers()["litefs-id"],
                format_node_id(node.store.node_id())
            );
        }
        for (method, path) in [
            (Method::POST, "/info"),
            (Method::GET, "/stream"),
            (Method::DELETE, "/events"),
            (Method::PUT, "/metrics"),
            (Method::GET, "/promote"),
            (Method::GET, "/handoff"),
            (Method::GET, "/common"),
            (Method::GET, "/halt"),
            (Method::GET, "/tx"),
            (Method::POST, "/debug/vars"),
            (Method::POST, "/export?name=x"),
            (Method::GET, "/import?name=x"),
        ] {
            let answer = client
                .request(method, format!("{}{path}", node.url))
                .send()
                .await
                .unwrap();
            let (status, text) = text(answer).await;
            assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED, "{path}");
            assert_eq!(text, "method not allowed\n");
        }
    }
}

#[tokio::test]
async fn only_a_primary_with_a_lease_hands_it_over() {
    let mut node = TestNode::new();
    node.serve("127.0.0.1:0").await;
    let url = node.url.clone();
    let post =
        async |path: &str| text(h1().post(format!("{url}{path}")).send().await.unwrap()).await;
    let (status, said) = post("/promote").await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(said, "there is no primary that could hand its lease over\n");
    for path in [
        "/handoff?nodeID=00000000000000AB",
        "/demote",
        "/common?name=a.db",
    ] {
        let (status, said) = post(path).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{path}");
        assert_eq!(said, "this node is not the primary\n");
    }
    node.run_role(true, &url, &[]);
    eventually("primary", || node.status.borrow().is_primary).await;
    assert_eq!(post("/promote").await.0, StatusCode::OK);
    for path in [
        "/handoff",
        "/handoff?nodeID=x",
        "/common",
        "/common?name=../x",
    ] {
        assert_eq!(post(path).await.0, StatusCode::BAD_REQUEST, "{path}");
    }
    for path in ["/handoff?nodeID=00000000000000AB", "/demote"] {
        let (status, said) = post(path).await;
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR, "{path}");
        assert!(said.contains("static"), "{said}");
    }
    assert!(node.status.borrow().is_primary);
}

#[tokio::test]
async fn a_primary_tells_where_a_history_parts_from_its_own() {
    let node = TestNode::primary().await;
    node.seed("a.db", &golden("wal-4096-lz4")).await;
    let here = node.pos("a.db");
    let ask = async |positions: &[Pos]| {
        let url = format!("{}/common?name=a.db", node.url);
        let body = common::encode(positions);
        let answer = h1().post(url).body(body).send().await.unwrap();
        let status = answer.status();
        let list = common::decode(&answer.bytes().await.unwrap());
        if status.is_success() { list } else { None }
    };
    let other = |txid| Pos {
        txid,
        checksum: 1 << 63,
    };
    assert_eq!(ask(&[other(here.txid + 1), here]).await.unwrap(), [here]);
    assert_eq!(ask(&[other(here.txid - 1)]).await.unwrap(), []);
    // Of a time that this node knows nothing of.
    assert_eq!(ask(&[other(here.txid + 1)]).await, None);
    assert_eq!(ask(&[]).await, None);
}

#[tokio::test]
async fn info_and_vars() {
    let node = TestNode::primary().await;
    node.seed("a.db", &golden("delete-4096-raw")[..1]).await;
    let answer = h1().get(format!("{}/info", node.url)).send().await.unwrap();
    assert_eq!(
        answer.headers()["litefs-id"],
        format_node_id(node.store.node_id())
    );
    assert_eq!(
        answer.headers()["litefs-cluster-id"],
        "LFSC0123456789ABCDEF"
    );
    assert_eq!(
        answer.text().await.unwrap(),
        "{\n  \"clusterID\": \"LFSC0123456789ABCDEF\",\n  \"isPrimary\": true,\n  \"candidate\": true,\n  \"path\": \"/data\",\n  \"primary\": {\n    \"hostname\": \"pri\"\n  }\n}\n"
    );
    let answer = h2()
        .get(format!("{}/debug/vars", node.url))
        .send()
        .await
        .unwrap();
    assert!(answer.headers().get("litefs-id").is_none());
    let vars: serde_json::Value = answer.json().await.unwrap();
    let pos = node.pos("a.db");
    assert_eq!(
        vars,
        serde_json::json!({"store": {"isPrimary": true, "candidate": true, "dbs": {"a.db": {
            "name": "a.db",
            "txid": "0000000000000001",
            "checksum": format!("{:016x}", pos.checksum),
            "locks": {},
        }}}})
    );

    let mut fresh = TestNode::new();
    fresh.serve("127.0.0.1:0").await;
    let answer = h1()
        .get(format!("{}/info", fresh.url))
        .send()
        .await
        .unwrap();
    assert!(answer.headers().get("litefs-cluster-id").is_none());
    assert_eq!(
        answer.text().await.unwrap(),
        "{\n  \"isPrimary\": false,\n  \"candidate\": true,\n  \"path\": \"/data\",\n  \"primary\": {\n    \"hostname\": \"\"\n  }\n}\n"
    );
}

#[tokio::test]
async fn streams_that_are_refused() {
    let node = TestNode::primary().await;
    let empty = || posmap::encode(&Default::default());
    let answer = h1()
        .post(format!("{}/stream", node.url))
        .body(empty())
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), StatusCode::UPGRADE_REQUIRED);

    let refused = async |request: RequestBuilder| {
        let (status, text) = text(request.send().await.unwrap()).await;
        assert_eq!(text.lines().count(), 1, "{text:?}");
        (status.as_u16(), text)
    };
    for map in [
        0xffff_fff0u32.to_be_bytes().to_vec(),
        vec![],
        b"\0\0\0\x01\xff\xff\xff\xf0".to_vec(),
    ] {
        assert_eq!(refused(post_stream(&node, map)).await.0, 400);
    }
    let mut outside = b"\0\0\0\x01\0\0\0\x04../x".to_vec();
    outside.extend_from_slice(&[0; 16]);
    assert_eq!(refused(post_stream(&node, outside)).await.0, 400);
    let long = vec![0; posmap::MAX_LEN + 1];
    assert_eq!(refused(post_stream(&node, long)).await.0, 400);

    let own = format_node_id(node.store.node_id());
    let (status, text) = refused(post_stream(&node, empty()).header("Litefs-Id", own)).await;
    assert_eq!(
        (status, text.as_str()),
        (400, "a node cannot follow itself\n")
    );
    assert_eq!(
        refused(post_stream(&node, empty()).header("Litefs-Id", "xyz"))
            .await
            .0,
        400
    );
    let other = post_stream(&node, empty()).header("Litefs-Cluster-Id", "LFSCFFFFFFFFFFFFFFFF");
    assert_eq!(refused(other).await.0, 400);
    let filter = h2()
        .post(format!("{}/stream?filter=a.db,%2e%2e%2fx", node.url))
        .body(empty());
    assert_eq!(refused(filter).await.0, 400);

    node.status.send_modify(|status| status.is_primary = false);
    assert_eq!(refused(post_stream(&node, empty())).await.0, 503);
}

#[tokio::test]
async fn a_stream_from_nothing_to_the_end() {
    let mut node = TestNode::primary().await;
    let files = golden("wal-4096-lz4");
    node.seed("w.db", &files[..2]).await;
    let mut frames = Frames::new(post_stream(&node, vec![0; 4]).send().await.unwrap());
    assert_eq!(node.stats.streams(), 1);

    // What the replica lacks, as a snapshot since it has nothing; no high-water mark after that.
    let (frame, snapshot) = frames.next().await;
    assert_eq!(
        frame,
        Frame::Ltx {
            size: 0,
            name: "w.db".into()
        }
    );
    let summary = ltx::verify(&snapshot[..]).unwrap();
    assert_eq!((summary.header.min_txid, summary.header.max_txid), (1, 2));
    assert_eq!(frames.next().await.0, Frame::Ready);
    assert!(
        matches!(frames.next_of_all().await.0, Frame::Heartbeat { timestamp } if timestamp > 1 << 40)
    );

    // Then each transaction, as its LTX file.
    for (i, file) in files.iter().enumerate().skip(2).take(2) {
        node.seed("w.db", std::slice::from_ref(file)).await;
        let (frame, ltx) = frames.next().await;
        assert_eq!(
            frame,
            Frame::Ltx {
                size: 0,
                name: "w.db".into()
            }
        );
        let summary = ltx::verify(&ltx[..]).unwrap();
        assert_eq!(summary.header.min_txid, i as u64 + 1);
        let mark = Frame::HighWaterMark {
            txid: 0,
            name: "w.db".into(),
        };
        assert_eq!(frames.next().await.0, mark);
    }
    // A quiet stream has a heartbeat every second.
    for _ in 0..2 {
        let beat = timeout(Duration::from_millis(1500), frames.next_of_all())
            .await
            .unwrap();
        assert!(matches!(beat.0, Frame::Heartbeat { .. }));
    }
    // A stop ends it cleanly, the last transactions included.
    node.seed("w.db", &files[4..5]).await;
    node.stop().await;
    assert!(matches!(frames.next().await.0, Frame::Ltx { .. }));
    assert!(matches!(frames.next().await.0, Frame::HighWaterMark { .. }));
    assert_eq!(frames.next().await.0, Frame::End);
    frames.assert_end().await;
    eventually("the stream is no longer counted", || {
        node.stats.streams() == 0
    })
    .await;
}

#[tokio::test]
async fn what_a_replica_has_decides_what_it_gets() {
    let node = TestNode::primary().await;
    let files = golden("delete-4096-raw");
    node.seed("a.db", &files[..2]).await;
    let second = node.pos("a.db");
    node.seed("a.db", &files[2..4]).await;
    node.seed("b.db", &golden("wal-512-lz4")[..1]).await;
    let current = node.pos("a.db");
    let b = node.pos("b.db");
    let other = Pos {
        checksum: current.checksum ^ 1,
        ..current
    };
    let ahead = Pos {
        txid: 99,
        ..current
    };

    for (has, want) in [
        (second, vec![(3, 3), (4, 4)]),
        (current, vec![]),
        (other, vec![(1, 4)]),
        (ahead, vec![(1, 4)]),
        (
            Pos {
                checksum: 1 << 63,
                ..second
            },
            vec![(1, 4)],
        ),
    ] {
        let map = [("a.db".to_owned(), has), ("b.db".to_owned(), b)].into();
        let mut frames = Frames::new(
            post_stream(&node, posmap::encode(&map))
                .send()
                .await
                .unwrap(),
        );
        let mut got = Vec::new();
        loop {
            match frames.next().await {
                (Frame::Ready, _) => break,
                (Frame::Ltx { name, .. }, ltx) => {
                    assert_eq!(name, "a.db");
                    let header = ltx::verify(&ltx[..]).unwrap().header;
                    got.push((header.min_txid, header.max_txid));
                }
                (Frame::HighWaterMark { .. }, _) => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(got, want, "for {has}");
    }

    // A database that only the replica has, and a filter.
    let map = [
        ("ghost.db".to_owned(), current),
        ("a.db".to_owned(), current),
    ]
    .into();
    let mut frames = Frames::new(
        post_stream(&node, posmap::encode(&map))
            .send()
            .await
            .unwrap(),
    );
    assert!(matches!(frames.next().await.0, Frame::Ltx { name, .. } if name == "b.db"));
    assert_eq!(
        frames.next().await.0,
        Frame::DropDb {
            name: "ghost.db".into()
        }
    );
    assert_eq!(frames.next().await.0, Frame::Ready);
    let request = h2()
        .post(format!("{}/stream?filter=b.db", node.url))
        .body(vec![0; 4]);
    let mut frames = Frames::new(request.send().await.unwrap());
    assert!(matches!(frames.next().await.0, Frame::Ltx { name, .. } if name == "b.db"));
    assert_eq!(frames.next().await.0, Frame::Ready);
}

#[tokio::test]
async fn a_stream_is_compressed_for_who_asks_for_it() {
    let mut node = TestNode::primary().await;
    let files = golden("wal-4096-lz4");
    node.seed("w.db", &files[..2]).await;
    let litefs = post_stream(&node, vec![0; 4])
        .header("accept-encoding", "gzip")
        .send()
        .await
        .unwrap();
    assert_eq!(litefs.headers().get("content-encoding"), None);
    let ours = post_stream(&node, vec![0; 4])
        .header("accept-encoding", "gzip, zstd")
        .send()
        .await
        .unwrap();
    assert_eq!(ours.headers()["content-encoding"], "zstd");
    let (mut litefs, mut ours) = (Frames::new(litefs), Frames::new(ours));
    for frames in [&mut litefs, &mut ours] {
        while frames.next().await.0 != Frame::Ready {}
    }
    for file in &files[2..] {
        node.seed("w.db", std::slice::from_ref(file)).await;
        let as_it_is = litefs.next().await.1;
        let plain = ours.next().await.1;
        assert!(ltx::verify(&as_it_is[..]).unwrap().header.compressed);
        assert_eq!(ltx::without_lz4(&as_it_is).unwrap(), Some(plain));
        for frames in [&mut litefs, &mut ours] {
            assert!(matches!(frames.next().await.0, Frame::HighWaterMark { .. }));
        }
    }
    let (plain, sent) = node.stats.bytes();
    assert!(sent > 0 && sent < plain, "{sent} of {plain}");
    node.stop().await;
    for mut frames in [litefs, ours] {
        assert_eq!(frames.next().await.0, Frame::End);
        frames.assert_end().await;
    }
}

#[tokio::test]
async fn a_demoted_primary_ends_its_streams() {
    let node = TestNode::primary().await;
    let mut frames = Frames::new(post_stream(&node, vec![0; 4]).send().await.unwrap());
    assert_eq!(frames.next().await.0, Frame::Ready);
    node.status.send_modify(|status| status.is_primary = false);
    assert_eq!(frames.next().await.0, Frame::End);
    frames.assert_end().await;
}

#[tokio::test]
async fn events_begin_at_once_and_follow() {
    let mut node = TestNode::primary().await;
    let mut answer = h1()
        .get(format!("{}/events", node.url))
        .send()
        .await
        .unwrap();
    let first = timeout(Duration::from_secs(2), answer.chunk())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(first, "{\"type\":\"init\",\"data\":{\"isPrimary\":true}}\n");
    node.seed("a.db", &golden("delete-4096-raw")[..1]).await;
    let line = timeout(Duration::from_secs(2), answer.chunk())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    let event: serde_json::Value = serde_json::from_slice(&line).unwrap();
    assert_eq!(
        (&event["type"], &event["db"]),
        (&"tx".into(), &"a.db".into())
    );
    assert_eq!(event["data"]["txID"], "0000000000000001");
    assert_eq!(event["data"]["pageSize"], 4096);
    assert_eq!(node.stats.subscribers(), 1);
    node.stop().await;
    assert_eq!(answer.chunk().await.unwrap(), None);
}

#[tokio::test]
async fn metrics_have_litefs_names() {
    let node = TestNode::primary().await;
    node.seed("a.db", &golden("delete-4096-raw")[..2]).await;
    let mut frames = Frames::new(post_stream(&node, vec![0; 4]).send().await.unwrap());
    while frames.next().await.0 != Frame::Ready {}
    let answer = h1()
        .get(format!("{}/metrics", node.url))
        .send()
        .await
        .unwrap();
    assert!(answer.headers().get("litefs-id").is_none());
    assert!(
        answer.headers()["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/plain")
    );
    let ours = answer.text().await.unwrap();

    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/fixtures/http");
    let golden = std::fs::read_to_string(format!("{dir}/metrics-primary.txt")).unwrap();
    let types = |text: &str| -> Vec<String> {
        text.lines()
            .filter(|l| l.starts_with("# TYPE litefs_"))
            .map(str::to_owned)
            .collect()
    };
    let mut want = types(&golden);
    want.push("# TYPE litefs_db_ltx_reap_count counter".into());
    want.sort();
    assert_eq!(types(&ours), want);
    for line in [
        "litefs_db_count 1",
        "litefs_is_primary 1",
        "litefs_subscriber_count 1",
        "litefs_http_stream_count 1",
        "litefs_lag_seconds 0",
        "litefs_db_txid{db=\"a.db\"} 2",
        "litefs_http_frame_send_count{db=\"a.db\",type=\"ltx:snapshot\"} 1",
        "litefs_http_frame_send_count{db=\"a.db\",type=\"ltx\"} 0",
    ] {
        assert!(ours.lines().any(|l| l == line), "{line} in\n{ours}");
    }
}

#[tokio::test]
async fn addresses_that_cannot_be_listened_on() {
    let node = TestNode::primary().await;
    let addr = node.url.strip_prefix("http://").unwrap();
    let error = Server::bind(addr).await.unwrap_err();
    assert!(matches!(error, ServerError::Busy("http.addr", _)));
    assert!(error.to_string().contains(addr), "{error}");
    for bad in ["", "20202", "127.0.0.1", "127.0.0.1:x", ":70000"] {
        assert!(
            matches!(
                Server::bind(bad).await,
                Err(ServerError::Address("http.addr", _))
            ),
            "{bad}"
        );
    }
    let everywhere = Server::bind(":0").await.unwrap();
    assert!(everywhere.local_addr().ip().is_unspecified());
}

#[tokio::test]
async fn a_peer_that_says_nothing_is_disconnected() {
    let node = TestNode::primary().await;
    let addr = node.url.strip_prefix("http://").unwrap();
    let started = ["", "P", "GET /info HTTP/1.1\r\nHost: x\r\n"].map(|start| async move {
        let mut socket = TcpStream::connect(addr).await.unwrap();
        socket.write_all(start.as_bytes()).await.unwrap();
        let mut buf = [0; 512];
        let wait = async { while socket.read(&mut buf).await.is_ok_and(|n| n > 0) {} };
        timeout(super::server::HEADER_TIMEOUT * 2, wait)
            .await
            .expect("a disconnection");
    });
    futures_util::future::join_all(started).await;
}

#[tokio::test]
async fn a_stop_does_not_wait_for_an_idle_connection() {
    let mut node = TestNode::primary().await;
    let client = h1();
    client
        .get(format!("{}/info", node.url))
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    let addr = node.url.strip_prefix("http://").unwrap();
    let _silent = TcpStream::connect(addr).await.unwrap();
    timeout(super::server::STOP_TIMEOUT * 2, node.stop())
        .await
        .expect("an end");
    assert!(
        client
            .get(format!("{}/info", node.url))
            .send()
            .await
            .is_err()
    );
}
