//! The listening side: sockets, HTTP versions, deadlines, and an orderly stop.
//!
//! One port serves HTTP/1.1 and HTTP/2 without TLS ("prior knowledge": a client that begins with
//! HTTP/2's preface). A client that asks in HTTP/1.1 to be upgraded is simply answered in HTTP/1.1,
//! which HTTP allows; LiteFS's nodes never ask.
//!
//! A peer can hold a connection open only while something happens on it: the first request must come
//! within [`HEADER_TIMEOUT`], a request's head within the same time, HTTP/2 connections answer pings.
//! A handler that finds its peer not reading ends the connection by [`Connection::abort`]. There are
//! at most [`MAX_CONNECTIONS`] connections; further ones wait to be accepted.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::{HeaderValue, Request};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tower_service::Service;
use tracing::{debug, warn};
use warp::reply::Response;

use crate::config::split_addr;
use crate::stream::{CLUSTER_ID_HEADER, NODE_ID_HEADER, format_node_id};

use super::api::{self, Api};

/// How long a peer may take for a request's head.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long open requests may take once the node stops.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// The most connections at a time.
pub const MAX_CONNECTIONS: usize = 1024;

/// How often a quiet HTTP/2 connection is asked whether it still lives, and how long it may take.
const PING_INTERVAL: Duration = Duration::from_secs(10);

/// The most bytes of a request's head over HTTP/1; the default of HTTP/2 is 16 KiB.
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
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                _ = shutdown.wait_for(|stop| *stop) => break,
                Some(_) = connections.join_next() => continue,
                accepted = accept(&self.listener, &permits) => accepted,
            };
            match accepted {
                Ok((socket, permit)) => {
                    let api = Arc::clone(&api);
                    connections.spawn(async move {
                        connection(socket, api).await;
                        drop(permit);
                    });
                }
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

async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = Arc::clone(permits)
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let (socket, _) = listener.accept().await?;
    Ok((socket, permit))
}

/// What a request knows of its connection, as an extension of the request.
#[derive(Debug, Default)]
pub(crate) struct Connection {
    requested: AtomicBool,
    aborted: Notify,
}

impl Connection {
    /// Ends the connection at once, with whatever is still to be sent.
    pub(super) fn abort(&self) {
        self.aborted.notify_one();
    }

    /// Returns when it is to be ended.
    pub(crate) async fn aborted(&self) {
        self.aborted.notified().await;
    }
}

/// The HTTP version of a request, as an extension of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Version(pub(super) http::Version);

/// Serves one connection to its end.
async fn connection(socket: TcpStream, api: Arc<Api>) {
    let _ = socket.set_nodelay(true);
    let state = Arc::new(Connection::default());
    let mut shutdown = api.shutdown.clone();
    let filters = warp::service(api::routes(Arc::clone(&api)));
    let requests = Arc::clone(&state);
    let service = service_fn(move |request: Request<Incoming>| {
        requests.requested.store(true, Ordering::Relaxed);
        answer(
            filters.clone(),
            Arc::clone(&api),
            Arc::clone(&requests),
            request,
        )
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
        .max_concurrent_streams(64);
    let mut serving = pin!(builder.serve_connection(TokioIo::new(socket), service));
    let silent = async {
        sleep(HEADER_TIMEOUT).await;
        if state.requested.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
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
            () = state.aborted() => return,
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
