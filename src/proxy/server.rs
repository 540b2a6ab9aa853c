//! The listening side: sockets, HTTP versions, and an orderly stop.
//!
//! One port serves HTTP/1.0, HTTP/1.1 with upgrades, and HTTP/2 without TLS. There are at most
//! [`MAX_CONNECTIONS`], upgraded ones included; further ones wait to be accepted. How long a
//! connection may stay is [`activity`](super::activity)'s.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use crate::http::server::keep_alive;

use super::STOP_TIMEOUT;
use super::activity::{Activity, Limits, Watched};
use super::handler::{Client, Handler};

/// The most connections at a time.
const MAX_CONNECTIONS: usize = 1024;

/// The most bytes of a request's head over HTTP/1; the default of HTTP/2 is 16 KiB.
const MAX_HEAD: usize = 64 << 10;

/// The most requests at a time on one HTTP/2 connection.
const MAX_STREAMS: u32 = 64;

/// The right to be a connection; given back when the last holder drops it.
pub type Permit = Arc<OwnedSemaphorePermit>;

/// Answers until `shutdown` becomes true; then takes no more connections, and ends when the open ones
/// have, [`STOP_TIMEOUT`] later at the latest.
pub async fn serve(
    listener: TcpListener,
    handler: Arc<Handler>,
    limits: Limits,
    mut shutdown: watch::Receiver<bool>,
) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            _ = shutdown.wait_for(|stop| *stop) => break,
            Some(_) = connections.join_next() => continue,
            accepted = accept(&listener, &permits) => accepted,
        };
        match accepted {
            Ok((socket, peer, permit)) => {
                let client = Client { peer, permit };
                let activity = Activity::new(limits);
                let handler = Arc::clone(&handler);
                connections.spawn(connection(
                    socket,
                    client,
                    activity,
                    handler,
                    shutdown.clone(),
                ));
            }
            // Out of descriptors, most likely: it passes.
            Err(error) => {
                warn!(%error, "the proxy cannot accept a connection");
                sleep(Duration::from_millis(200)).await;
            }
        }
    }
    drop(listener);
    let ended = timeout(STOP_TIMEOUT, async {
        while connections.join_next().await.is_some() {}
    });
    if ended.await.is_err() {
        debug!("connections of the proxy were cut off: they did not end in time");
        connections.shutdown().await;
    }
}

async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, Permit)> {
    let permit = Arc::clone(permits)
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let (socket, peer) = listener.accept().await?;
    Ok((socket, peer, Arc::new(permit)))
}

/// Serves one connection to its end, or to its upgrade.
async fn connection(
    socket: TcpStream,
    client: Client,
    activity: Arc<Activity>,
    handler: Arc<Handler>,
    mut shutdown: watch::Receiver<bool>,
) {
    keep_alive(&socket);
    let io = TokioIo::new(Watched::new(socket, Arc::clone(&activity)));
    let service = service_fn(|request: Request<Incoming>| {
        let http2 = request.version() == http::Version::HTTP_2;
        let open = activity.begin(http2);
        let (handler, client, limits) = (Arc::clone(&handler), client.clone(), *activity.limits());
        async move { Ok::<_, Infallible>(handler.answer(request, client, limits, open).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .preserve_header_case(true)
        .max_buf_size(MAX_HEAD);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS);
    let mut serving = pin!(builder.serve_connection_with_upgrades(io, service));
    let mut expired = pin!(activity.expired());
    let mut stopping = false;
    loop {
        tokio::select! {
            ended = &mut serving => {
                if let Err(error) = ended {
                    debug!(error, "a connection of the proxy broke");
                }
                return;
            }
            why = &mut expired => return debug!(why, "a connection of the proxy was ended"),
            _ = shutdown.wait_for(|stop| *stop), if !stopping => {
                stopping = true;
                serving.as_mut().graceful_shutdown();
            }
        }
    }
}
