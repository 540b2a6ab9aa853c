//! What a node asks of another node: the one way out to the others.
//!
//! Every request of one node to another (the stream, where histories parted, halt locks and their
//! transactions, handoffs) goes through [`Peers`]. How a peer is reached is [`HttpPeers`]'s alone.
//!
//! A peer is not trusted: an answer is read only as far as its reader asks for, redirects are not
//! followed, and proxies of the environment are not used. Deadlines for anything but the connection
//! itself are the caller's: dropping the future, or the answer's body, ends the request.

use std::io;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use http::{Request, Response, Version};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Frame;
use reqwest::{Client, Url};
use tokio::time::timeout;

/// How long connecting for a request may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long connecting for a stream may take.
pub const STREAM_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What is sent with a request.
pub type Body = BoxBody<Bytes, io::Error>;

/// Nothing.
pub fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed()
}

/// These bytes, whose number is sent first.
pub fn whole(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed()
}

/// Pieces as they come.
pub fn pieces<S>(pieces: S) -> Body
where
    S: futures_util::Stream<Item = io::Result<Bytes>> + Send + Sync + 'static,
{
    BodyExt::boxed(StreamBody::new(pieces.map_ok(Frame::data)))
}

/// The body of an answer, as it comes.
pub struct Incoming(BoxStream<'static, Result<Bytes, PeerError>>);

impl Incoming {
    /// A body of these pieces; what follows an error is not read.
    pub fn new<S>(pieces: S) -> Incoming
    where
        S: futures_util::Stream<Item = Result<Bytes, PeerError>> + Send + 'static,
    {
        Incoming(pieces.boxed())
    }

    /// The next piece; `None` after the last one.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, PeerError> {
        self.0.next().await.transpose()
    }

    /// The beginning of the body, at most `max` bytes of it.
    pub async fn bytes(&mut self, max: usize) -> Result<Bytes, PeerError> {
        let mut bytes = BytesMut::new();
        while bytes.len() < max
            && let Some(piece) = self.chunk().await?
        {
            let room = max - bytes.len();
            bytes.extend_from_slice(&piece[..piece.len().min(room)]);
        }
        Ok(bytes.freeze())
    }
}

/// Why there is no answer, or not all of it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{reason}")]
pub struct PeerError {
    /// There was no connection: the peer has seen nothing of the request.
    pub unconnected: bool,
    /// What went wrong.
    pub reason: String,
}

impl PeerError {
    /// The peer may have seen the request.
    pub fn broken(reason: impl Into<String>) -> PeerError {
        PeerError {
            unconnected: false,
            reason: reason.into(),
        }
    }
}

impl From<reqwest::Error> for PeerError {
    /// With all causes, which say what really happened, and without the URL.
    fn from(error: reqwest::Error) -> PeerError {
        let unconnected = error.is_connect();
        let error = error.without_url();
        let mut reason = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            reason.push_str(": ");
            reason.push_str(&error.to_string());
            cause = error.source();
        }
        PeerError {
            unconnected,
            reason,
        }
    }
}

/// A node's way to the others.
#[async_trait]
pub trait Peers: Send + Sync {
    /// Sends a request to the node that its absolute URI names; gives the answer as soon as its head
    /// is there, whatever its status. A request of version HTTP/2 has a connection of its own, others
    /// share connections.
    async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, PeerError>;
}

/// Sends a request and reads the answer, which must be there within `limit`; what a body has beyond
/// `max` bytes is cut off.
pub async fn ask(
    peers: &dyn Peers,
    request: Request<Body>,
    limit: Duration,
    max: usize,
) -> Result<Response<Bytes>, PeerError> {
    let asked = async {
        let (head, mut body) = peers.send(request).await?.into_parts();
        Ok(Response::from_parts(head, body.bytes(max).await?))
    };
    timeout(limit, asked).await.unwrap_or_else(|_| {
        let late = format!("no answer within {} s", limit.as_secs_f32());
        Err(PeerError::broken(late))
    })
}

/// The most characters of a refusal's text that are told on.
const MAX_REFUSAL: usize = 512;

/// What an answer says that is an error.
pub fn refusal(answer: &Response<Bytes>) -> String {
    let text = String::from_utf8_lossy(answer.body());
    let told: String = text.trim().chars().take(MAX_REFUSAL).collect();
    format!("{}: {told}", answer.status())
}

/// The address of a node's API, from how the lease names it: `path` of it, without a query.
pub fn url(advertised: &str, path: &str) -> Result<Url, String> {
    let mut url = Url::parse(advertised).map_err(|e| e.to_string())?;
    if url.scheme() != "http" {
        return Err(format!("{} is not supported", url.scheme()));
    }
    url.set_path(path);
    url.set_query(None);
    Ok(url)
}

/// Peers that are reached over TCP.
#[derive(Debug, Clone)]
pub struct HttpPeers {
    /// HTTP/2 without asking first.
    streams: Client,
    requests: Client,
}

impl HttpPeers {
    /// Peers over HTTP without TLS.
    ///
    /// # Errors
    /// What the HTTP client says.
    pub fn new() -> Result<HttpPeers, PeerError> {
        let builder = || {
            Client::builder()
                .redirect(reqwest::redirect::Policy::none())
                .no_proxy()
        };
        let streams = builder()
            .http2_prior_knowledge()
            .http2_initial_stream_window_size(1 << 20)
            .http2_initial_connection_window_size(2 << 20)
            .connect_timeout(STREAM_CONNECT_TIMEOUT)
            .pool_max_idle_per_host(0)
            .build()?;
        let requests = builder().connect_timeout(CONNECT_TIMEOUT).build()?;
        Ok(HttpPeers { streams, requests })
    }
}

#[async_trait]
impl Peers for HttpPeers {
    async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, PeerError> {
        let client = match request.version() {
            Version::HTTP_2 => &self.streams,
            _ => &self.requests,
        };
        let request = reqwest::Request::try_from(request.map(reqwest::Body::wrap))?;
        let answer: Response<reqwest::Body> = client.execute(request).await?.into();
        Ok(answer.map(|body| Incoming::new(body.into_data_stream().map_err(PeerError::from))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_body_is_read_no_further_than_asked() {
        let piece = |s: &'static str| Ok(Bytes::from_static(s.as_bytes()));
        let mut body = Incoming::new(futures_util::stream::iter([piece("abc"), piece("def")]));
        assert_eq!(body.bytes(4).await.unwrap(), "abcd");
        assert_eq!(body.bytes(4).await.unwrap(), "");
        let broken = [piece("abc"), Err(PeerError::broken("gone"))];
        let mut body = Incoming::new(futures_util::stream::iter(broken));
        assert_eq!(body.bytes(100).await.unwrap_err().reason, "gone");
    }

    #[tokio::test]
    async fn who_is_not_there_has_seen_nothing() {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", port.local_addr().unwrap());
        drop(port);
        let peers = HttpPeers::new().unwrap();
        for version in [Version::HTTP_2, Version::HTTP_11] {
            let request = Request::post(&url).version(version).body(empty()).unwrap();
            let error = ask(&peers, request, CONNECT_TIMEOUT, 1).await.unwrap_err();
            assert!(error.unconnected, "{error}");
            assert!(!error.reason.contains("127.0.0.1:"), "{error}");
        }
    }

    #[test]
    fn addresses_are_http() {
        let url = |text| url(text, "/x").map(String::from);
        assert_eq!(url("http://a:1/b?c").unwrap(), "http://a:1/x");
        assert!(url("ftp://a").is_err() && url("a").is_err());
    }
}
