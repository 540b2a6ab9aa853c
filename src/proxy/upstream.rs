//! Connections to the application, and to the primary's proxy.
//!
//! A peer that does not accept connections yet is tried again for [`PATIENCE`]: it may be starting.
//! That happens below the request, before any of it is sent, so that it is safe for every request.
//! Connections are kept for a moment only ([`KEEP`]), which is shorter than what servers grant, so that
//! a request hardly ever meets one that the server is closing at that moment; one that does is sent
//! again if it may be.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response, Uri};
use hyper::body::{Body, Incoming};
use hyper_util::client::legacy::{Client, Error as ClientError};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout_at};
use tower_service::Service;

use super::body::{ProxyBody, whole};
use crate::http::server::keep_alive;

/// How long a peer that does not accept connections is tried.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// How long an unused connection is kept.
const KEEP: Duration = Duration::from_secs(1);

/// The most unused connections to one peer.
const MAX_KEPT: usize = 64;

/// The longest wait between two attempts to connect.
const MAX_PAUSE: Duration = Duration::from_millis(250);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// It does not accept connections.
    #[error("does not accept connections: {0}")]
    Unreachable(String),
    /// It accepted the request and gave no (proper) answer.
    #[error("broke off: {0}")]
    Broken(String),
}

impl From<ClientError> for UpstreamError {
    fn from(error: ClientError) -> UpstreamError {
        // The outermost text says nothing.
        let mut cause: &dyn std::error::Error = &error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        match error.is_connect() {
            true => UpstreamError::Unreachable(cause.to_string()),
            false => UpstreamError::Broken(cause.to_string()),
        }
    }
}

/// A client of applications and proxies.
pub struct Upstream {
    client: Client<Dial, ProxyBody>,
}

impl Upstream {
    /// One that tries a peer for `patience`.
    pub fn new(patience: Duration) -> Upstream {
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(KEEP)
            .pool_max_idle_per_host(MAX_KEPT)
            .http1_preserve_header_case(true)
            .build(Dial { patience });
        Upstream { client }
    }

    /// Sends a request to the authority of its URI; the answer's body is still on its way.
    /// `repeatable`: it may be sent twice if it has no body.
    ///
    /// # Errors
    /// When nobody accepts connections there for the whole time, or the connection breaks before an
    /// answer comes.
    pub async fn send(
        &self,
        request: Request<ProxyBody>,
        repeatable: bool,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let again = (repeatable && request.body().is_end_stream()).then(|| {
            let mut again = Request::new(whole(""));
            *again.method_mut() = request.method().clone();
            *again.uri_mut() = request.uri().clone();
            *again.headers_mut() = request.headers().clone();
            again
        });
        match (self.client.request(request).await, again) {
            (Err(error), Some(again)) if !error.is_connect() => {
                tracing::debug!(%error, "a read is sent again");
                Ok(self.client.request(again).await?)
            }
            (answer, _) => Ok(answer?),
        }
    }
}

/// Connects to the authority of a URI.
#[derive(Clone)]
struct Dial {
    patience: Duration,
}

impl Service<Uri> for Dial {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TokioIo<TcpStream>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(dial(uri, Instant::now() + self.patience))
    }
}

async fn dial(uri: Uri, deadline: Instant) -> io::Result<TokioIo<TcpStream>> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let port = uri.port_u16().unwrap_or(80);
    let mut pause = Duration::from_millis(10);
    loop {
        let error = match timeout_at(deadline, TcpStream::connect((host, port))).await {
            Ok(Ok(socket)) => {
                keep_alive(&socket);
                return Ok(TokioIo::new(socket));
            }
            Ok(Err(error)) => error,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        };
        if Instant::now() + pause >= deadline {
            return Err(error);
        }
        sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}
