//! The receiving side against primaries that misbehave, and the sending side with replicas that do.

use std::convert::Infallible;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame as BodyFrame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use parking_lot::Mutex;
use tenure_lease::PrimaryInfo;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

use crate::http::harness::{TestNode, eventually, golden, peers};
use crate::ltx::Pos;
use crate::store::StoreError;

use super::batches::{Batch, Batches};
use super::frame::{Frame, FrameError, encode_ltx};
use super::posmap::{self, PosMap};
use super::receiver::{Ended, Progress, Receiver, StreamError};
use super::replicas::Replicas;
use super::sender::{self, Limits, Replica, SendError};
use super::stats::Stats;

/// What a fake primary does after it has sent its bytes.
#[derive(Clone, Copy)]
enum Then {
    End,
    Hang,
    /// Sends 0xff, a byte each half second.
    Drip,
}

/// A primary that answers every stream with `body`, and the position maps that it was sent.
async fn fake_primary(body: Vec<u8>, then: Then) -> (PrimaryInfo, Arc<Mutex<Vec<PosMap>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let maps = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&maps);
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let (body, seen) = (Bytes::from(body.clone()), Arc::clone(&seen));
            let service = service_fn(move |request: Request<Incoming>| {
                let (body, seen) = (body.clone(), Arc::clone(&seen));
                async move {
                    let map = request.into_body().collect().await.unwrap().to_bytes();
                    seen.lock().push(posmap::decode(&map).unwrap());
                    let sent = stream::iter([Ok::<_, Infallible>(BodyFrame::data(body))]);
                    let rest = match then {
                        Then::End => stream::empty().boxed(),
                        Then::Hang => stream::pending().boxed(),
                        Then::Drip => stream::repeat(())
                            .then(|()| tokio::time::sleep(Duration::from_millis(500)))
                            .map(|()| Ok(BodyFrame::data(Bytes::from_static(&[0xff]))))
                            .boxed(),
                    };
                    let response = Response::new(StreamBody::new(sent.chain(rest)));
                    Ok::<_, Infallible>(response)
                }
            });
            tokio::spawn(async move {
                let builder = auto::Builder::new(TokioExecutor::new());
                let _ = builder
                    .serve_connection(TokioIo::new(socket), service)
                    .await;
            });
        }
    });
    (
        PrimaryInfo {
            hostname: "fake".into(),
            advertise_url: url,
        },
        maps,
    )
}

fn receiver(node: &TestNode) -> Receiver {
    Receiver::new(
        Arc::clone(&node.store),
        Arc::clone(&node.stats),
        peers(),
        Default::default(),
    )
}

async fn follow(receiver: &Receiver, primary: &PrimaryInfo) -> Result<Ended, StreamError> {
    let never = watch::Sender::new(false);
    receiver
        .follow(primary, false, &mut never.subscribe(), mpsc::channel(8).0)
        .await
}

fn golden_body() -> Vec<u8> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/fixtures/stream");
    fs::read(format!("{dir}/stream-body.bin")).unwrap()
}

#[tokio::test]
async fn a_primary_that_is_older_than_one_that_was_followed_is_refused() {
    let mut old = TestNode::new();
    old.store.set_epoch(5).unwrap();
    old.serve("127.0.0.1:0").await;
    let url = old.url.clone();
    old.run_role(true, &url, &[]);
    old.seed("a.db", &golden("delete-4096-lz4")).await;
    eventually("primary", || old.status.borrow().is_primary).await;
    let primary = PrimaryInfo {
        hostname: "old".into(),
        advertise_url: url,
    };
    let node = TestNode::new();
    node.store.set_epoch(6).unwrap();
    let error = follow(&receiver(&node), &primary).await.unwrap_err();
    assert!(
        matches!(
            error,
            StreamError::OldPrimary {
                theirs: 5,
                ours: 6,
                ..
            }
        ),
        "{error}"
    );
    assert!(node.store.database("a.db").is_none());

    // Named by the service once more, it is the numbers that began anew; and one that is as old as
    // the last is the last.
    for (epoch, confirmed) in [(6, true), (5, false), (0, false)] {
        let node = TestNode::new();
        node.store.set_epoch(epoch).unwrap();
        let cancel = watch::Sender::new(false);
        let (progress, mut reached) = mpsc::channel(8);
        let mut cancelled = cancel.subscribe();
        let receiver = receiver(&node);
        let (ended, ()) = tokio::join!(
            receiver.follow(&primary, confirmed, &mut cancelled, progress),
            async {
                assert_eq!(reached.recv().await, Some(Progress::Connected));
                assert_eq!(reached.recv().await, Some(Progress::Ready(Some(5))));
                cancel.send_replace(true);
            }
        );
        assert_eq!(ended.unwrap(), Ended::Cancelled);
        assert_eq!(node.pos("a.db"), old.pos("a.db"));
    }
}

#[tokio::test]
async fn a_stream_of_litefs_is_applied_and_its_silence_ends_it() {
    let node = TestNode::new();
    let (primary, maps) = fake_primary(golden_body(), Then::Hang).await;
    let (progress, mut reached) = mpsc::channel(8);
    let never = watch::Sender::new(false);
    let start = Instant::now();
    let error = receiver(&node)
        .follow(&primary, false, &mut never.subscribe(), progress)
        .await
        .unwrap_err();
    assert!(matches!(error, StreamError::Idle), "{error}");
    assert!(
        (5..8).contains(&start.elapsed().as_secs()),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(*maps.lock(), [PosMap::new()]);
    assert_eq!(reached.recv().await, Some(Progress::Connected));
    assert_eq!(reached.recv().await, Some(Progress::Ready(None)));
    let pos = Pos {
        txid: 8,
        checksum: 0xedd7_7332_0bdf_5756,
    };
    assert_eq!(node.pos("wal4096.db"), pos);
    assert_eq!(
        node.pos("drop.db"),
        Pos {
            txid: 3,
            checksum: 1 << 63
        }
    );
    assert_eq!(node.pos("delete4096.db").txid, 6);
    assert!(
        node.store.lag().unwrap() != 0,
        "the heartbeats are of another day"
    );
    assert!(node.stats.lags().is_empty(), "snapshots have no lag");
}

#[tokio::test]
async fn a_stream_that_breaks_off_is_an_error() {
    for cut in [golden_body().len(), 3, 500, 2378] {
        let node = TestNode::new();
        let (primary, _) = fake_primary(golden_body()[..cut].to_vec(), Then::End).await;
        let receiver = receiver(&node);
        let error = follow(&receiver, &primary).await.unwrap_err();
        assert!(
            matches!(
                error,
                StreamError::Frame(FrameError::Eof | FrameError::Io(_))
            ),
            "cut at {cut}: {error}"
        );
        // Half a file leaves nothing behind.
        let applied = node.pos("wal4096.db").txid;
        assert_eq!(applied, if cut > 1112 { 8 } else { 0 }, "cut at {cut}");
    }
}

#[tokio::test]
async fn the_ends_that_are_no_error() {
    let node = TestNode::new();
    let mut end = Vec::new();
    Frame::Ready.encode(&mut end);
    // Both are ignored, and so is a database that nobody here has.
    Frame::DropDb {
        name: "ghost.db".into(),
    }
    .encode(&mut end);
    Frame::HighWaterMark {
        txid: 0,
        name: "x.db".into(),
    }
    .encode(&mut end);
    let mut handoff = end.clone();
    Frame::End.encode(&mut end);
    Frame::Handoff {
        lease_id: "abc".into(),
    }
    .encode(&mut handoff);
    let (primary, _) = fake_primary(end, Then::Hang).await;
    assert_eq!(
        follow(&receiver(&node), &primary).await.unwrap(),
        Ended::End
    );
    let (primary, _) = fake_primary(handoff, Then::Hang).await;
    assert_eq!(
        follow(&receiver(&node), &primary).await.unwrap(),
        Ended::Handoff("abc".into())
    );

    let (primary, _) = fake_primary(Vec::new(), Then::Hang).await;
    let cancel = watch::Sender::new(false);
    let mut cancelled = cancel.subscribe();
    let receiver = receiver(&node);
    let following = receiver.follow(&primary, false, &mut cancelled, mpsc::channel(8).0);
    let stopping = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        cancel.send_replace(true);
    };
    let (ended, ()) = tokio::join!(following, stopping);
    assert_eq!(ended.unwrap(), Ended::Cancelled);
}

#[tokio::test]
async fn a_transaction_that_does_not_fit_twice_is_replaced_by_a_snapshot() {
    let node = TestNode::new();
    let files = golden("delete-4096-raw");
    node.seed("a.db", &files[..2]).await;
    let pos = node.pos("a.db");
    let mut body = Vec::new();
    encode_ltx("a.db", &files[4], &mut body);
    let (primary, maps) = fake_primary(body, Then::Hang).await;
    let receiver = receiver(&node);
    for _ in 0..3 {
        let error = follow(&receiver, &primary).await.unwrap_err();
        let StreamError::Store {
            source: StoreError::PositionMismatch { have, .. },
            ..
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!(have, pos);
    }
    assert_eq!(node.pos("a.db"), pos);
    let with = PosMap::from([("a.db".to_owned(), pos)]);
    assert_eq!(*maps.lock(), [with.clone(), with.clone(), PosMap::new()]);

    // A file that fits puts an end to it.
    let mut body = Vec::new();
    encode_ltx("a.db", &files[2], &mut body);
    Frame::End.encode(&mut body);
    let (primary, _) = fake_primary(body, Then::Hang).await;
    assert_eq!(follow(&receiver, &primary).await.unwrap(), Ended::End);
    assert_eq!(node.pos("a.db").txid, 3);
}

#[tokio::test]
async fn names_and_files_from_a_primary_are_checked() {
    let node = TestNode::new();
    let file = &golden("delete-4096-raw")[0];
    for name in ["../x", "a-wal", ".lag"] {
        let mut body = Vec::new();
        encode_ltx(name, file, &mut body);
        let (primary, _) = fake_primary(body, Then::Hang).await;
        let error = follow(&receiver(&node), &primary).await.unwrap_err();
        assert!(matches!(error, StreamError::Name(_)), "{error}");
    }
    // More than one file in a frame, and a damaged one.
    let mut two = file.clone();
    two.extend_from_slice(file);
    let mut damaged = file.clone();
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    for (name, ltx) in [("two.db", two), ("damaged.db", damaged)] {
        let mut body = Vec::new();
        encode_ltx(name, &ltx, &mut body);
        let (primary, _) = fake_primary(body, Then::Hang).await;
        let error = follow(&receiver(&node), &primary).await.unwrap_err();
        assert!(
            matches!(
                error,
                StreamError::Frame(FrameError::TrailingBytes) | StreamError::Store { .. }
            ),
            "{error}"
        );
    }
    assert!(node.pos("damaged.db").is_zero());
}

#[tokio::test]
async fn addresses_that_lead_nowhere() {
    let node = TestNode::new();
    let closed = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let replica = receiver(&node);
    let go = async |url: String| {
        let primary = PrimaryInfo {
            hostname: "p".into(),
            advertise_url: url,
        };
        follow(&replica, &primary).await.unwrap_err()
    };
    assert!(matches!(
        go("not a url".into()).await,
        StreamError::Url { .. }
    ));
    let refused = go("https://127.0.0.1:1".into()).await.to_string();
    assert!(refused.ends_with("this node has no http.tls"), "{refused}");
    let refused = go(format!("http://{closed}")).await;
    assert!(matches!(&refused, StreamError::Connect { .. }), "{refused}");
    assert!(
        refused.to_string().to_lowercase().contains("refused"),
        "{refused}"
    );
    let own = TestNode::primary().await;
    let follower = receiver(&own);
    let primary = PrimaryInfo {
        hostname: "p".into(),
        advertise_url: own.url.clone(),
    };
    let error = follow(&follower, &primary).await.unwrap_err();
    assert!(matches!(error, StreamError::Own(_)), "{error}");
}

const MINUTE: Duration = Duration::from_secs(60);

/// A replica that has nothing.
fn empty_replica() -> Replica {
    Replica {
        id: "r".into(),
        positions: PosMap::new(),
        filter: Default::default(),
        coded: false,
    }
}

#[tokio::test]
async fn what_is_read_for_one_replica_is_there_for_others_while_the_log_has_it() {
    let node = TestNode::new();
    let files = golden("delete-4096-raw");
    node.seed("a.db", &files[..1]).await;
    let from = node.pos("a.db");
    node.seed("a.db", &files[1..3]).await;
    let db = node.store.database("a.db").unwrap();
    let batches = Batches::default();
    let ask = async |plain| match batches.after(&db, from, plain).await.unwrap().unwrap() {
        Batch::Records(records) => records,
        _ => panic!("the log has records"),
    };
    let (one, other) = tokio::join!(ask(false), ask(false));
    assert!(Arc::ptr_eq(&one, &other));
    assert_eq!(one.records.len(), 2);
    assert!(Arc::ptr_eq(&one, &ask(false).await));
    assert!(!Arc::ptr_eq(&one, &ask(true).await));

    // The same once more, in a log that took the place of the other.
    let one = ask(false).await;
    node.seed("a.db", &files[..1]).await;
    let now = batches.after(&db, from, false).await.unwrap().unwrap();
    assert!(matches!(now, Batch::UpToDate));
    node.seed("a.db", &files[1..3]).await;
    let again = ask(false).await;
    assert!(!Arc::ptr_eq(&one, &again));
    assert_eq!(again.records.len(), 2);
}

#[tokio::test]
async fn a_replica_that_reads_nothing_is_cut_off() {
    let node = TestNode::new();
    node.seed("a.db", &golden("delete-4096-raw")[..1]).await;
    // Room for the snapshot alone: the next frame finds the channel full.
    let (out, _unread) = mpsc::channel(1);
    let limits = Limits {
        send: Duration::from_millis(300),
        snapshot: MINUTE,
    };
    let start = Instant::now();
    let (store, stats) = (Arc::clone(&node.store), Arc::new(Stats::default()));
    let replicas = Replicas::default();
    let sent = sender::run(
        store,
        stats,
        &replicas,
        empty_replica(),
        limits,
        out,
        std::future::pending(),
    );
    assert!(matches!(
        timeout(MINUTE, sent).await.unwrap(),
        Err(SendError::Slow(_))
    ));
    assert!(start.elapsed() >= limits.send);
}

#[tokio::test]
async fn a_snapshot_has_its_time_and_no_more() {
    let node = TestNode::new();
    // 65,536-byte pages: more than one piece.
    node.seed("big.db", &golden("delete-65536-lz4")).await;
    let (out, mut unread) = mpsc::channel(1);
    out.send(Bytes::new()).await.unwrap();
    let (store, stats) = (Arc::clone(&node.store), Arc::new(Stats::default()));
    let limits = Limits::new(Duration::from_millis(300));
    let error = sender::run(
        store,
        stats,
        &Replicas::default(),
        empty_replica(),
        limits,
        out,
        std::future::pending(),
    )
    .await
    .unwrap_err();
    assert!(
        matches!(error, SendError::SnapshotTimeout { .. }),
        "{error}"
    );
    unread.close();
}

#[tokio::test]
async fn a_stop_during_a_snapshot_ends_its_thread() {
    let node = TestNode::new();
    node.seed("big.db", &golden("delete-65536-lz4")).await;
    let (out, mut taken) = mpsc::channel(1);
    out.send(Bytes::new()).await.unwrap();
    let (store, stats) = (Arc::clone(&node.store), Arc::new(Stats::default()));
    let limits = Limits::new(MINUTE);
    let error = sender::run(
        store,
        stats,
        &Replicas::default(),
        empty_replica(),
        limits,
        out,
        std::future::ready(()),
    )
    .await
    .unwrap_err();
    assert!(matches!(error, SendError::Drain), "{error}");
    // Every sender is gone once the thread has given up.
    let end = async { while taken.recv().await.is_some() {} };
    timeout(Duration::from_secs(5), end)
        .await
        .expect("the end of the channel");
}

#[tokio::test]
async fn a_frame_that_comes_byte_by_byte_ends_the_stream() {
    let mut head = Vec::new();
    let name = "a".repeat(200);
    Frame::Ltx { size: 0, name }.encode(&mut head);
    let mut chunk = head.clone();
    // A chunk of 65,535 bytes, of which the LTX header and the first page's number are there.
    chunk.extend([0xff, 0xff]);
    chunk.extend_from_slice(&golden("delete-4096-raw")[0][..104]);
    // Inside the name in a frame's head, and inside of an LTX file.
    let drips = [head[..30].to_vec(), chunk].map(|body| async move {
        let node = TestNode::new();
        let (primary, _) = fake_primary(body, Then::Drip).await;
        let (receiver, begun) = (receiver(&node), Instant::now());
        let error = timeout(MINUTE, follow(&receiver, &primary))
            .await
            .unwrap()
            .unwrap_err();
        let late = matches!(&error, StreamError::Frame(FrameError::Io(e)) if e.kind() == std::io::ErrorKind::TimedOut);
        assert!(late, "{error}");
        assert!(begun.elapsed() < Duration::from_secs(20), "{error}");
        assert!(node.store.databases().is_empty());
    });
    futures_util::future::join_all(drips).await;
}

/// An LTX file of one page of zeros.
fn one_page(header: crate::ltx::Header, post_apply: u64) -> Vec<u8> {
    let mut encoder = crate::ltx::Encoder::new(Vec::new(), header).unwrap();
    encoder
        .page(2, &vec![0; header.page_size as usize])
        .unwrap();
    encoder.finish(post_apply).unwrap().0
}

#[tokio::test]
async fn sizes_that_a_primary_states_are_not_believed() {
    let node = TestNode::new();
    node.seed("a.db", &golden("wal-512-lz4")).await;
    let before = (node.pos("a.db"), node.snapshot("a.db").await);
    let pos = before.0;
    for (commit, min_txid, max_txid) in [
        (u32::MAX, pos.txid + 1, pos.txid + 1),
        (u32::MAX - 1, pos.txid + 1, u64::MAX),
        (1 << 31, pos.txid + 1, pos.txid + 1),
    ] {
        let mut header =
            crate::ltx::Header::decode(golden("wal-512-lz4")[1].first_chunk().unwrap()).unwrap();
        (header.commit, header.min_txid, header.max_txid) = (commit, min_txid, max_txid);
        header.pre_apply_checksum = pos.checksum;
        // Whoever has the database can make its checksum right.
        let sums = |zeros: &[u8]| crate::ltx::page_checksum(2, zeros);
        let old = {
            let pages = &before.1;
            pages.chunks(516).find(|p| p[..4] == [0, 0, 0, 2]).unwrap()[4..].to_vec()
        };
        let post = (pos.checksum ^ sums(&old) ^ sums(&[0; 512])) | crate::ltx::CHECKSUM_FLAG;
        let mut body = Vec::new();
        encode_ltx("a.db", &one_page(header, post), &mut body);
        Frame::End.encode(&mut body);
        let (primary, _) = fake_primary(body, Then::End).await;
        let error = follow(&receiver(&node), &primary).await.unwrap_err();
        assert!(matches!(error, StreamError::Store { .. }), "{error}");
        assert_eq!(
            (node.pos("a.db"), node.snapshot("a.db").await),
            before,
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_primary_creates_a_bounded_number_of_databases() {
    let node = TestNode::new();
    node.store.set_most_databases(3);
    let mut body = Vec::new();
    for n in 0..100 {
        encode_ltx(&format!("{n}.db"), &golden("delete-512-lz4")[0], &mut body);
    }
    let (primary, _) = fake_primary(body, Then::End).await;
    let error = follow(&receiver(&node), &primary).await.unwrap_err();
    let full = matches!(
        &error,
        StreamError::Store {
            source: StoreError::TooManyDatabases(3),
            ..
        }
    );
    assert!(full, "{error}");
    assert_eq!(node.store.databases().len(), 3);
    assert_eq!(node.store.names().len(), 3);
}

#[tokio::test]
async fn a_large_transaction_is_sent_piece_by_piece() {
    let node = TestNode::with(|options| options.compress = false);
    node.seed("a.db", &golden("delete-65536-lz4")[..1]).await;
    let pos = node.pos("a.db");
    // 40 pages of 64 KiB that do not compress.
    let mut header =
        crate::ltx::Header::decode(golden("delete-65536-lz4")[1].first_chunk().unwrap()).unwrap();
    (header.commit, header.compressed, header.pre_apply_checksum) = (44, false, pos.checksum);
    let mut encoder = crate::ltx::Encoder::new(Vec::new(), header).unwrap();
    let mut post = pos.checksum;
    let old = golden("delete-65536-lz4");
    let commit = crate::ltx::verify(&old[0][..]).unwrap().header.commit;
    for pgno in commit + 1..=44 {
        let page: Vec<u8> = (0..65_536u32)
            .map(|i| (i.wrapping_mul(pgno + 7) >> 3) as u8)
            .collect();
        post ^= crate::ltx::page_checksum(pgno, &page);
        encoder.page(pgno, &page).unwrap();
    }
    let file = encoder.finish(post | crate::ltx::CHECKSUM_FLAG).unwrap().0;
    assert!(file.len() > 2 << 20);
    node.seed("a.db", std::slice::from_ref(&file)).await;
    let (out, mut taken) = mpsc::channel(2);
    let replica = Replica {
        positions: PosMap::from([("a.db".to_owned(), pos)]),
        ..empty_replica()
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let (store, stats) = (Arc::clone(&node.store), Arc::new(Stats::default()));
    let sending = tokio::spawn(async move {
        let stopped = async { drop(stopped.await) };
        sender::run(
            store,
            stats,
            &Replicas::default(),
            replica,
            Limits::new(MINUTE),
            out,
            stopped,
        )
        .await
    });
    let (mut bytes, began) = (Vec::new(), std::time::Instant::now());
    let mut stop = Some(stop);
    while let Some(piece) = timeout(MINUTE, taken.recv()).await.unwrap() {
        assert!(piece.len() <= 66_000, "a piece of {} bytes", piece.len());
        bytes.extend_from_slice(&piece);
        assert!(began.elapsed() < MINUTE, "heartbeats, and no file");
        if bytes.len() > file.len() {
            stop = None;
        }
    }
    assert!(stop.is_none());
    sending.await.unwrap().unwrap();
    let mut rest = &bytes[..];
    assert!(matches!(Frame::read(&mut rest), Ok(Frame::Ltx { name, .. }) if name == "a.db"));
    let mut found = Vec::new();
    std::io::Read::read_to_end(&mut super::frame::ChunkReader::new(&mut rest), &mut found).unwrap();
    assert!(found == file, "another file");
    assert!(matches!(
        Frame::read(&mut rest),
        Ok(Frame::HighWaterMark { txid: 0, .. })
    ));
}
