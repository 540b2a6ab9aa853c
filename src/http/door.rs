//! The door: what a connection and a request have to show before anything else of them is read.
//!
//! A connection: with TLS, a handshake within its deadline. Who speaks without TLS to a port that has
//! it is told so (each of its requests is answered with 400, and nothing of it is looked at) and
//! cut off. Who speaks TLS to a port that has none gets HTTP's own answer to nonsense.
//!
//! A request: with tokens, one that has the right that the path needs. That comes before the path is
//! known to exist, before the query is parsed and before a byte of the body is read. A path that is
//! not listed in [`needed`] needs [`Right::Admin`].
//!
//! Either is said in the log, once a minute for each kind of trouble. Tokens and what they are
//! compared with are never said.

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use http::header::{AUTHORIZATION, CONTENT_TYPE, WWW_AUTHENTICATE};
use http::{HeaderValue, Request, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::{debug, info, warn};
use warp::reply::Response;

use crate::access::tls;
use crate::access::tokens::Denied;
use crate::access::{Current, Tokens};
use crate::config::Right;
use crate::telemetry::seldom::Seldom;

use super::api::refuse;

/// How often each kind of trouble is said.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// The first byte of every TLS connection: a record of the handshake.
const HANDSHAKE: u8 = 0x16;

/// Reads of what a peer that is turned away has sent already.
const MAX_REST: usize = 16;

/// The most characters of a path that the log shows.
const MAX_PATH: usize = 64;

/// What is asked of those who want something of a node.
pub(super) struct Door {
    keys: Current,
    no_tls: Seldom,
    unexpected_tls: Seldom,
    handshake: Seldom,
    no_token: Seldom,
    no_right: Seldom,
}

/// A connection that may go on.
pub(super) enum Entered {
    /// Without TLS, as it is meant to be.
    Plain(TcpStream),
    /// With TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Door {
    pub(super) fn new(keys: Current) -> Door {
        let seldom = || Seldom::new(SAY_EVERY);
        Door {
            keys,
            no_tls: seldom(),
            unexpected_tls: seldom(),
            handshake: seldom(),
            no_token: seldom(),
            no_right: seldom(),
        }
    }

    /// The connection as HTTP is spoken on it; `None` if nothing comes of it until `due`.
    pub(super) async fn enter(
        &self,
        socket: TcpStream,
        peer: IpAddr,
        due: Instant,
    ) -> Option<Entered> {
        let first = timeout_at(due, first_byte(&socket)).await.ok()?.ok()??;
        let tls = self.keys.borrow().tls.as_ref().map(|tls| tls.server());
        let Some(tls) = tls else {
            if first == HANDSHAKE && self.unexpected_tls.due() {
                warn!(
                    "{peer} speaks TLS to this node's port, which has none: set http.tls here, or http:// in the URL that is used there (lease.advertise-url, -url)"
                );
            }
            return Some(Entered::Plain(socket));
        };
        if first != HANDSHAKE {
            if self.no_tls.due() {
                warn!(
                    "{peer} speaks without TLS to this node's port, and is cut off: there, https:// in the URL (lease.advertise-url, -url) and http.tls are needed"
                );
            }
            // What comes of it is the peer's business.
            let _ = timeout_at(due, tell_off(socket)).await;
            return None;
        }
        let handshake = TlsAcceptor::from(tls).accept(socket).into_fallible();
        match timeout_at(due, handshake).await {
            Ok(Ok(stream)) => Some(Entered::Tls(Box::new(stream))),
            Ok(Err((error, socket))) => {
                self.complain(peer, &error);
                let _ = timeout_at(due, hang_up(socket)).await;
                None
            }
            Err(_) => {
                debug!(%peer, "a TLS handshake took too long");
                None
            }
        }
    }

    fn complain(&self, peer: IpAddr, error: &io::Error) {
        match tls::reason(error) {
            Some(why) if self.handshake.due() => {
                warn!("a TLS handshake with {peer} has failed: {why}");
            }
            _ => debug!(%peer, %error, "a TLS handshake has failed"),
        }
    }

    /// The answer to a request that may not go on. Takes the token out of it.
    pub(super) fn refusal<B>(&self, request: &mut Request<B>, peer: IpAddr) -> Option<Response> {
        let shown = request.headers_mut().remove(AUTHORIZATION);
        let keys = self.keys.borrow().clone();
        let tokens = keys.tokens.as_ref()?;
        self.check(tokens, shown.as_ref(), request.uri().path(), peer)
    }

    fn check(
        &self,
        tokens: &Tokens,
        shown: Option<&HeaderValue>,
        path: &str,
        peer: IpAddr,
    ) -> Option<Response> {
        let path = path.trim_matches('/');
        let right = needed(path);
        let short: String = path.chars().take(MAX_PATH).collect();
        let (problem, answer) = match tokens.check(shown, right) {
            Ok(name) => {
                match path {
                    "stream" | "import" | "promote" | "handoff" | "demote" => {
                        info!("{peer} asks for /{path} with the token {name}");
                    }
                    _ => debug!(path = ?short, %peer, token = name, "a request"),
                }
                return None;
            }
            Err(Denied::NoToken) => (
                self.no_token.due().then(|| "shows no token".to_owned()),
                unauthorized(
                    "",
                    "this node asks for a token: Authorization: Bearer TOKEN",
                ),
            ),
            Err(Denied::Unknown) => (
                self.no_token
                    .due()
                    .then(|| "shows an unknown token".to_owned()),
                unauthorized(
                    ", error=\"invalid_token\"",
                    "this node does not know the token",
                ),
            ),
            Err(Denied::Right(name)) => {
                let right = right.name();
                let said = || format!("shows the token {name}, which lacks the right {right}");
                (self.no_right.due().then(said), forbidden(name, right))
            }
        };
        match problem {
            Some(problem) => warn!("{peer} is refused /{}: it {problem}", short.escape_debug()),
            None => debug!(path = ?short, %peer, "a request is refused"),
        }
        Some(answer)
    }
}

/// The right that a path needs, without its outer slashes.
fn needed(path: &str) -> Right {
    match path {
        "info" | "events" | "metrics" | "debug/vars" | "export" => Right::Read,
        "stream" | "common" => Right::Replicate,
        _ => Right::Admin,
    }
}

fn unauthorized(more: &str, text: &str) -> Response {
    let mut response = refuse(StatusCode::UNAUTHORIZED, text);
    challenge(&mut response, format!("Bearer realm=\"tenure\"{more}"));
    response
}

fn forbidden(name: &str, right: &str) -> Response {
    let text = format!("the token {name} lacks the right {right}, which this needs");
    let mut response = refuse(StatusCode::FORBIDDEN, &text);
    let more = format!("error=\"insufficient_scope\", scope=\"{right}\"");
    challenge(&mut response, format!("Bearer realm=\"tenure\", {more}"));
    response
}

fn challenge(response: &mut Response, value: String) {
    // Of constants: it is a header's value.
    if let Ok(value) = HeaderValue::try_from(value) {
        response.headers_mut().insert(WWW_AUTHENTICATE, value);
    }
}

/// The first byte that comes, which stays to be read; `None` at the end.
async fn first_byte(socket: &TcpStream) -> io::Result<Option<u8>> {
    let mut byte = [0];
    let n = socket.peek(&mut byte).await?;
    Ok((n > 0).then_some(byte[0]))
}

/// Closes a connection so that the peer gets what was sent last, the reason: it is lost if what the peer
/// has sent meanwhile is not taken.
async fn hang_up(mut socket: TcpStream) -> io::Result<()> {
    socket.shutdown().await?;
    let mut rest = [0; 4096];
    for _ in 0..MAX_REST {
        if socket.read(&mut rest).await? == 0 {
            break;
        }
    }
    Ok(())
}

/// Answers, without TLS, that there is to be TLS.
async fn tell_off(socket: TcpStream) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let service = service_fn(|_: Request<Incoming>| async {
        let text = "this node speaks TLS only: use https:// in its URL (lease.advertise-url, -url)";
        let mut response = refuse(StatusCode::BAD_REQUEST, text);
        let plain = HeaderValue::from_static("text/plain; charset=utf-8");
        response.headers_mut().insert(CONTENT_TYPE, plain);
        Ok::<Response, Infallible>(response)
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().keep_alive(false).timer(TokioTimer::new());
    builder.http2().timer(TokioTimer::new());
    let serving = builder.serve_connection(TokioIo::new(socket), service);
    serving.await
}

/// Whether somebody who reaches `addr` needs nothing more to get at the databases, or can listen in:
/// a warning for the log.
pub fn exposure(addr: std::net::SocketAddr, keys: &Current) -> Option<String> {
    if addr.ip().is_loopback() {
        return None;
    }
    let keys = keys.borrow();
    let mutual = keys.tls.as_ref().map(|tls| tls.mutual());
    match (mutual, keys.tokens.is_some()) {
        (None, false) => Some(format!(
            "whoever reaches {addr} can read and replace every database: keep it in a private network, or set http.tls and http.auth"
        )),
        (Some(false), false) => Some(format!(
            "whoever reaches {addr} can read and replace every database: TLS hides what is sent, but asks nobody for anything. Set http.auth, or http.tls.ca and http.tls.client-auth"
        )),
        (None, true) => Some(format!(
            "tokens and databases pass {addr} in the clear: keep it in a private network, or set http.tls"
        )),
        (Some(_), _) => None,
    }
}
