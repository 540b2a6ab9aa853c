//! The listening side: sockets, HTTP versions, deadlines, and an orderly stop.
//!
//! One port serves HTTP/1.1 and HTTP/2: without TLS as the client begins ("prior knowledge": with
//! HTTP/2's preface), with TLS as both agree (ALPN). A client that asks in HTTP/1.1 to be upgraded is
//! simply answered in HTTP/1.1, which HTTP allows; LiteFS's nodes never ask. What a connection and a
//! request have to show first is [`super::door`]'s.
//!
//! A peer can hold a connection open only while something happens on it: the first request (and the
//! TLS handshake before it) must come within [`HEADER_TIMEOUT`], a request's head within the same time,
//! HTTP/2 connections answer pings and carry a request at least every [`IDLE_TIMEOUT`], and what is sent
//! is taken: a peer that takes no byte for [`UNREAD_TIMEOUT`] is cut off by the kernel. A handler that
//! finds its peer not reading ends the connection by [`Connection::abort`]. How many connections there
//! may be is [`super::guests`]'s.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::{HeaderValue, Request};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tower_service::Service;
use tracing::{debug, warn};
use warp::reply::Response;

use crate::config::split_addr;
use crate::stream::{CLUSTER_ID_HEADER, NODE_ID_HEADER, format_node_id};

use super::api::{self, Api};
use super::door::{Door, Entered};
use super::guests::{Admission, Connection, Guests, Limits, Open, Quotas};

/// How long a peer may take for a request's head.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long open requests may take once the node stops.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a connection may carry no request; longer than this node's own clients keep one.
const IDLE_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a peer may leave unread what is sent to it.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a peer may be silent before the kernel asks whether it is there, and how often it asks
/// then; it takes part in ending connections that have no other limit.
const PROBE_AFTER: Duration = Duration::from_secs(60);
const PROBE_EVERY: Duration = Duration::from_secs(10);

/// Requests at a time on one HTTP/2 connection.
const MAX_STREAMS: u32 = 32;

/// Bytes that one HTTP/2 connection, and each stream of it, may send before somebody reads them.
const CONNECTION_WINDOW: u32 = 512 << 10;
const STREAM_WINDOW: u32 = 256 << 10;

/// Bytes that wait to be sent on each stream of HTTP/2, besides those of its handler.
const SEND_BUFFER: usize = 64 << 10;

/// The most bytes of a request's head over HTTP/2.
const MAX_HEADERS: u32 = 16 << 10;

/// How often a quiet HTTP/2 connection is asked whether it still lives, and how long it may take.
const PING_INTERVAL: Duration = Duration::from_secs(10);

/// The most bytes of a request's head over HTTP/1.
const MAX_HEAD: usize = 64 << 10;

/// Why a server does not listen. Each names the key of the configuration that has the address.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Something else listens there.
    #[error("{0} {1}: the port is in use by another process: stop it or choose another port")]
    Busy(&'static str, String),
    /// The address is none.
    #[error("{0} {1:?} is no address: write HOST:PORT, or :PORT for all interfaces")]
    Address(&'static str, String),
    /// The system refuses.
    #[error("cannot listen on {key} {addr}: {source}")]
    Listen {
        /// The configuration's key.
        key: &'static str,
        /// The address of the configuration.
        addr: String,
        /// What the system says.
        source: io::Error,
    },
}

/// Listens on `addr`, the value of `key`: `HOST:PORT`, or `:PORT` for all interfaces; port 0 lets the
/// system choose.
///
/// # Errors
/// When `addr` is no address, somebody listens there already, or the system refuses.
pub async fn listen(key: &'static str, addr: &str) -> Result<TcpListener, ServerError> {
    let (host, port) =
        split_addr(addr).ok_or_else(|| ServerError::Address(key, addr.to_owned()))?;
    let bound = if host.is_empty() {
        match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
            // A system without IPv6.
            Err(e) if e.kind() != io::ErrorKind::AddrInUse => {
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await
            }
            bound => bound,
        }
    } else {
        TcpListener::bind((host, port)).await
    };
    bound.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ServerError::Busy(key, addr.to_owned()),
        _ => ServerError::Listen {
            key,
            addr: addr.to_owned(),
            source,
        },
    })
}

/// Has the kernel find out when the peer of a silent connection is gone.
pub fn keep_alive(socket: &TcpStream) {
    let _ = socket.set_nodelay(true);
    let probes = TcpKeepalive::new()
        .with_time(PROBE_AFTER)
        .with_interval(PROBE_EVERY);
    if let Err(error) = SockRef::from(socket).set_tcp_keepalive(&probes) {
        debug!(%error, "a connection goes without keep-alive");
    }
}

/// A server that listens and does not answer yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    addr: SocketAddr,
}

impl Server {
    /// Listens on `http.addr`; see [`listen`].
    pub async fn bind(addr: &str) -> Result<Server, ServerError> {
        const KEY: &str = "http.addr";
        let listener = listen(KEY, addr).await?;
        let addr = listener
            .local_addr()
            .map_err(|source| ServerError::Listen {
                key: KEY,
                addr: addr.to_owned(),
                source,
            })?;
        Ok(Server { listener, addr })
    }

    /// Where it listens, with the port that the system chose.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Answers until `api.shutdown` becomes true; then takes no more connections, and ends when the
    /// open ones have, [`STOP_TIMEOUT`] later at the latest.
    pub async fn serve(self, api: Arc<Api>) {
        let mut shutdown = api.shutdown.clone();
        let limits = Limits::of_process();
        let mut connections = JoinSet::new();
        let host = Arc::new(Host {
            door: Door::new(api.keys.clone()),
            guests: Guests::new(limits),
            quotas: Arc::new(Quotas::new(limits)),
            api,
        });
        loop {
            let accepted = tokio::select! {
                _ = shutdown.wait_for(|stop| *stop) => break,
                Some(_) = connections.join_next() => continue,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((socket, peer)) => match host.guests.admit(peer.ip()) {
                    Some(admission) => {
                        let peer = peer.ip().to_canonical();
                        connections.spawn(connection(socket, peer, admission, Arc::clone(&host)));
                    }
                    None => debug!(%peer, "there is no room for a connection"),
                },
                // Out of descriptors, most likely: it passes.
                Err(error) => {
                    warn!(%error, "cannot accept a connection");
                    sleep(Duration::from_millis(200)).await;
                }
            }
        }
        drop(self.listener);
        let ended = timeout(STOP_TIMEOUT, async {
            while connections.join_next().await.is_some() {}
        });
        if ended.await.is_err() {
            debug!("connections were cut off: they did not end in time");
            connections.shutdown().await;
        }
    }
}

/// The HTTP version of a request, as an extension of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Version(pub(super) http::Version);

/// What connections share.
struct Host {
    api: Arc<Api>,
    door: Door,
    guests: Arc<Guests>,
    quotas: Arc<Quotas>,
}

/// Lets one connection in and serves it to its end.
async fn connection(socket: TcpStream, peer: IpAddr, admission: Admission, host: Arc<Host>) {
    if let Err(error) = SockRef::from(&socket).set_tcp_user_timeout(Some(UNREAD_TIMEOUT)) {
        debug!(%error, "a connection goes without a limit for unread bytes");
    }
    keep_alive(&socket);
    let due = Instant::now() + HEADER_TIMEOUT;
    let entered = tokio::select! {
        entered = host.door.enter(socket, peer, due) => entered,
        () = admission.aborted() => return,
        () = host.api.stopped() => return,
    };
    match entered {
        Some(Entered::Plain(socket)) => serve_http(socket, peer, admission, host, due).await,
        Some(Entered::Tls(stream)) => serve_http(stream, peer, admission, host, due).await,
        None => {}
    }
}

/// Serves HTTP, whose first request is due at `due`.
async fn serve_http(
    socket: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    peer: IpAddr,
    admission: Admission,
    host: Arc<Host>,
    due: Instant,
) {
    let api = Arc::clone(&host.api);
    let requested = Arc::new(AtomicBool::new(false));
    let mut shutdown = api.shutdown.clone();
    let filters = warp::service(api::routes(Arc::clone(&api)));
    let (requests, state) = (
        Arc::clone(&requested),
        Arc::new(admission.connection(&host.quotas)),
    );
    let service = service_fn(move |mut request: Request<Incoming>| {
        requests.store(true, Ordering::Relaxed);
        let open = state.begin();
        let refused = host.door.refusal(&mut request, peer);
        let (filters, api, state) = (filters.clone(), Arc::clone(&api), Arc::clone(&state));
        async move {
            let response = match refused {
                Some(refused) => Ok(refused),
                None => answer(filters, api, state, request).await,
            };
            drop::<Open>(open);
            response
        }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEAD);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_INTERVAL)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .initial_stream_window_size(STREAM_WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .max_header_list_size(MAX_HEADERS)
        .max_concurrent_streams(MAX_STREAMS);
    let mut serving = pin!(builder.serve_connection(TokioIo::new(socket), service));
    let silent = async {
        sleep_until(due).await;
        if !requested.load(Ordering::Relaxed) {
            return;
        }
        loop {
            let due = admission.idle_since().unwrap_or_else(Instant::now) + IDLE_TIMEOUT;
            if due <= Instant::now() {
                return;
            }
            sleep_until(due).await;
        }
    };
    let mut silent = pin!(silent);
    let mut stopping = false;
    loop {
        tokio::select! {
            ended = &mut serving => {
                if let Err(error) = ended {
                    debug!(error, "a connection broke");
                }
                return;
            }
            () = &mut silent => return,
            () = admission.aborted() => return,
            _ = shutdown.wait_for(|stop| *stop), if !stopping => {
                stopping = true;
                serving.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Answers a request of a connection by `filters`, the API's paths.
pub(crate) fn answer<S, B>(
    mut filters: S,
    api: Arc<Api>,
    connection: Arc<Connection>,
    mut request: Request<B>,
) -> impl Future<Output = Result<Response, Infallible>>
where
    S: Service<Request<B>, Response = Response, Error = Infallible>,
{
    let version = Version(request.version());
    request.extensions_mut().insert(version);
    request.extensions_mut().insert(connection);
    let path = request.uri().path();
    let identified = path != "/metrics" && !path.starts_with("/debug/");
    let answer = filters.call(request);
    async move {
        let mut response = answer.await?;
        if identified {
            identify(&mut response, &api);
        }
        Ok(response)
    }
}

/// Says which node of which cluster answers.
fn identify(response: &mut Response, api: &Api) {
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(&format_node_id(api.store.node_id())) {
        headers.insert(NODE_ID_HEADER, id);
    }
    if let Some(Ok(id)) = api.store.cluster_id().map(|id| HeaderValue::from_str(&id)) {
        headers.insert(CLUSTER_ID_HEADER, id);
    }
}
