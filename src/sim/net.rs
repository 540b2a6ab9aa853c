//! The simulated network: requests reach the API's routes of the node that they name.
//!
//! What goes over one connection stays in order; anything else overtakes each other. A link is one
//! direction between two nodes. While it is cut nothing passes, as if packets were dropped: what is
//! on its way comes later, if whoever waits for it still does. Connections are made with a handshake
//! in both directions, end as an error when they are broken or a node's process dies, and stay
//! silent when its machine loses power.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http::{Request, Response, Version};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};

use crate::http::api::{self, Api};
use crate::http::guests::Connection;
use crate::http::server;
use crate::peer::{
    self, Body, CONNECT_TIMEOUT, Incoming, PeerError, Peers, STREAM_CONNECT_TIMEOUT,
};

use super::process::{self, Process};
use super::world::World;

/// Pieces of a body that a connection has room for.
const WINDOW: usize = 8;

/// The most bytes of a piece.
const PIECE: usize = 16 << 10;

/// See the module.
pub(crate) struct Net {
    world: Arc<World>,
    hosts: Mutex<BTreeMap<usize, Host>>,
    links: Mutex<BTreeMap<(usize, usize), Link>>,
    /// Counts changes of links.
    changes: watch::Sender<u64>,
}

/// A node that listens.
struct Host {
    process: Arc<Process>,
    api: Arc<Api>,
}

#[derive(Clone, Copy, Default)]
struct Link {
    cut: bool,
    /// How much longer than usual anything takes.
    slow: Duration,
    /// How often its connections were broken.
    broken: u64,
}

impl Net {
    pub fn new(world: &Arc<World>) -> Arc<Net> {
        Arc::new(Net {
            world: world.clone(),
            hosts: Mutex::default(),
            links: Mutex::default(),
            changes: watch::Sender::new(0),
        })
    }

    /// The URL of a node.
    pub fn url(node: usize) -> String {
        format!("http://n{node}:1")
    }

    /// A node listens.
    pub fn listen(&self, node: usize, process: &Arc<Process>, api: Arc<Api>) {
        let process = process.clone();
        self.hosts.lock().insert(node, Host { process, api });
    }

    /// A node listens no more.
    pub fn close(&self, node: usize) {
        self.hosts.lock().remove(&node);
    }

    fn change(&self, from: usize, to: usize, change: impl FnOnce(&mut Link)) {
        change(self.links.lock().entry((from, to)).or_default());
        self.changes.send_modify(|n| *n += 1);
    }

    /// Cuts one direction, or mends it.
    pub fn cut(&self, from: usize, to: usize, cut: bool) {
        self.change(from, to, |link| link.cut = cut);
    }

    /// Makes one direction slower than it is.
    pub fn slow(&self, from: usize, to: usize, slow: Duration) {
        self.change(from, to, |link| link.slow = slow);
    }

    /// Breaks all connections between two nodes.
    pub fn break_connections(&self, a: usize, b: usize) {
        self.change(a, b, |link| link.broken += 1);
        self.change(b, a, |link| link.broken += 1);
    }

    /// Mends everything.
    pub fn heal(&self) {
        for link in self.links.lock().values_mut() {
            (link.cut, link.slow) = (false, Duration::ZERO);
        }
        self.changes.send_modify(|n| *n += 1);
    }

    fn link(&self, from: usize, to: usize) -> Link {
        let links = self.links.lock();
        links.get(&(from, to)).copied().unwrap_or_default()
    }

    /// Waits as long as something takes in this direction.
    async fn pass(&self, from: usize, to: usize) {
        let mut changes = self.changes.subscribe();
        loop {
            // Its sender is this.
            let _ = changes.wait_for(|_| !self.link(from, to).cut).await;
            let usual = match self.world.range(0..20) {
                0 => self.world.ms(5..80),
                _ => self.world.ms(0..4),
            };
            sleep(usual + self.link(from, to).slow).await;
            if !self.link(from, to).cut {
                return;
            }
        }
    }

    /// Returns when a connection of before is broken.
    async fn broken(&self, from: usize, to: usize, before: u64) {
        let mut changes = self.changes.subscribe();
        let _ = changes
            .wait_for(|_| self.link(from, to).broken != before)
            .await;
    }

    fn is_up(&self, node: usize) -> bool {
        self.hosts.lock().contains_key(&node)
    }
}

/// The way of one node to the others.
pub(crate) struct SimPeers {
    pub net: Arc<Net>,
    pub from: usize,
}

#[async_trait]
impl Peers for SimPeers {
    async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, PeerError> {
        let unconnected = |reason: &str| PeerError {
            unconnected: true,
            reason: reason.to_owned(),
        };
        let host = request.uri().host().and_then(|h| h.strip_prefix('n'));
        let to: usize = host
            .and_then(|h| h.parse().ok())
            .ok_or_else(|| unconnected("no such host"))?;
        let (net, from) = (&self.net, self.from);
        let limit = match request.version() {
            Version::HTTP_2 => STREAM_CONNECT_TIMEOUT,
            _ => CONNECT_TIMEOUT,
        };
        let shake = async {
            net.pass(from, to).await;
            let up = net.is_up(to);
            net.pass(to, from).await;
            up
        };
        match timeout(limit, shake).await {
            Err(_) => return Err(unconnected("connecting took too long")),
            Ok(false) => return Err(unconnected("connection refused")),
            Ok(true) => {}
        }
        let (tell, told) = oneshot::channel();
        // The network's, not the process's.
        process::spawn_free(exchange(net.clone(), from, to, request, tell));
        told.await
            .unwrap_or_else(|_| Err(PeerError::broken("connection reset")))
    }
}

type Answer = Result<Response<Incoming>, PeerError>;

/// One request and its answer.
async fn exchange(
    net: Arc<Net>,
    from: usize,
    to: usize,
    request: Request<Body>,
    mut tell: oneshot::Sender<Answer>,
) {
    let broken = net.link(from, to).broken;
    let (head, body) = request.into_parts();
    let what = format!("{from}->{to} {} {}", head.method, head.uri.path());
    let (feed, pieces) = mpsc::channel(WINDOW);
    let body = body.into_data_stream();
    process::spawn_free(pump(net.clone(), (from, to), broken, body, feed));
    let pieces = futures_util::stream::unfold(pieces, |mut pieces| async {
        Some((pieces.recv().await?, pieces))
    });
    let pieces = pieces.map(|piece: Result<Bytes, PeerError>| {
        piece
            .map(Frame::data)
            .map_err(|e| io::Error::other(e.reason))
    });
    let request = Request::from_parts(head, StreamBody::new(Box::pin(pieces) as SyncStream));
    net.pass(from, to).await;
    let connection = Connection::simulated();
    let host = net
        .hosts
        .lock()
        .get(&to)
        .map(|h| (h.process.clone(), h.api.clone()));
    let Some((process, api)) = host else {
        return net.pass(to, from).await;
    };
    let answering = server::answer(
        warp::service(api::routes(api.clone())),
        api,
        connection.clone(),
        request,
    );
    let mut answering = process.spawn(answering);
    let answer = tokio::select! {
        biased;
        answer = &mut answering => answer,
        () = tell.closed() => {
            net.pass(from, to).await;
            answering.abort();
            return;
        }
        () = net.broken(from, to, broken) => {
            answering.abort();
            return;
        }
    };
    // Its process died.
    let Ok(Ok(answer)) = answer else {
        return net.pass(to, from).await;
    };
    net.pass(to, from).await;
    net.world
        .note(format!("{what} {}", answer.status().as_u16()));
    let (head, body) = answer.into_parts();
    let (feed, mut pieces) = mpsc::channel(WINDOW);
    let body = body.into_data_stream();
    let incoming = Incoming::new(futures_util::stream::poll_fn(move |cx| {
        pieces.poll_recv(cx)
    }));
    if tell.send(Ok(Response::from_parts(head, incoming))).is_err() {
        return net.pass(from, to).await;
    }
    tokio::select! {
        biased;
        () = pump(net.clone(), (to, from), broken, body, feed) => {}
        () = connection.aborted() => {}
    }
}

type SyncStream =
    std::pin::Pin<Box<dyn Stream<Item = io::Result<Frame<Bytes>>> + Send + Sync + 'static>>;

/// Brings the pieces of a body, in order, until it ends, breaks, or nobody wants it any more.
async fn pump<E: std::fmt::Display>(
    net: Arc<Net>,
    (from, to): (usize, usize),
    broken: u64,
    body: impl Stream<Item = Result<Bytes, E>>,
    feed: mpsc::Sender<Result<Bytes, PeerError>>,
) {
    let mut body = std::pin::pin!(body);
    let brought = async {
        while let Some(piece) = body.next().await {
            let mut piece = match piece {
                Ok(piece) => piece,
                Err(e) => {
                    net.pass(from, to).await;
                    let _ = feed.send(Err(PeerError::broken(e.to_string()))).await;
                    return;
                }
            };
            while !piece.is_empty() {
                let most = match net.world.one_in(8) {
                    true => net.world.range(1..200) as usize,
                    false => PIECE,
                };
                let part = piece.split_to(piece.len().min(most));
                net.pass(from, to).await;
                if feed.send(Ok(part)).await.is_err() {
                    return;
                }
            }
        }
        net.pass(from, to).await;
    };
    tokio::select! {
        biased;
        () = brought => {}
        () = feed.closed() => net.pass(to, from).await,
        () = net.broken(from, to, broken) => {
            let _ = feed.try_send(Err(PeerError::broken("connection reset")));
        }
    }
}

/// Asks a node as an operator does, without a network in between; gives the answer's status.
pub(crate) async fn operate(net: &Arc<Net>, node: usize, path: &str) -> Option<u16> {
    let host = {
        let hosts = net.hosts.lock();
        hosts.get(&node).map(|h| (h.process.clone(), h.api.clone()))
    };
    let (process, api) = host?;
    let request = Request::post(path).body(peer::empty()).ok()?;
    let connection = Connection::simulated();
    let answering = server::answer(
        warp::service(api::routes(api.clone())),
        api,
        connection,
        request,
    );
    let answer = process.spawn(answering).await.ok()?;
    answer.ok().map(|a| a.status().as_u16())
}
