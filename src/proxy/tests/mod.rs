//! The proxy over real sockets, in front of an application in this process; no mount.

mod decisions;
mod transport;

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, BodyStream, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use parking_lot::Mutex;
use tenure_lease::PrimaryInfo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::config::ProxyConfig;
use crate::http::harness::TestNode;
use crate::role::Status;

use super::body::ProxyBody;
use super::{Node, Proxy, Running};

/// One piece of a large body.
const PIECE: usize = 64 << 10;

/// Ends a test that takes too long.
async fn limited<T>(test: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), test)
        .await
        .expect("the test is done in time")
}

/// What the application has seen and done.
struct Seen {
    /// Method and path of each request.
    requests: Mutex<Vec<String>>,
    /// Bytes of bodies that it has read, and made.
    read: AtomicU64,
    made: AtomicU64,
    /// `/gated` goes on by it.
    gate: Semaphore,
}

/// An application.
struct App {
    addr: SocketAddr,
    seen: Arc<Seen>,
    task: JoinHandle<()>,
}

impl Drop for App {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl App {
    async fn start() -> App {
        App::listen(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    fn listen(listener: TcpListener) -> App {
        let seen = Arc::new(Seen {
            requests: Mutex::default(),
            read: AtomicU64::new(0),
            made: AtomicU64::new(0),
            gate: Semaphore::new(0),
        });
        let addr = listener.local_addr().unwrap();
        let state = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let state = Arc::clone(&state);
                tokio::spawn(async move {
                    let service = service_fn(|request| {
                        let state = Arc::clone(&state);
                        async move { Ok::<_, Infallible>(serve(request, state).await) }
                    });
                    let builder = auto::Builder::new(TokioExecutor::new());
                    let _ = builder
                        .serve_connection_with_upgrades(TokioIo::new(socket), service)
                        .await;
                });
            }
        });
        App { addr, seen, task }
    }

    /// What it was asked since the last time.
    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut *self.seen.requests.lock())
    }
}

fn streamed(
    pieces: impl futures_util::Stream<Item = Bytes> + Send + 'static,
) -> Response<ProxyBody> {
    let frames = pieces.map(|piece| Ok(Frame::data(piece)));
    Response::new(StreamBody::new(frames).boxed_unsync())
}

fn plain(text: impl Into<Bytes>) -> Response<ProxyBody> {
    Response::new(super::body::whole(text))
}

async fn serve(mut request: Request<Incoming>, seen: Arc<Seen>) -> Response<ProxyBody> {
    let line = format!("{} {}", request.method(), request.uri());
    seen.requests.lock().push(line.clone());
    match request.uri().path() {
        "/show" => {
            let mut text = format!("{line} {:?}\n", request.version());
            for (name, value) in request.headers() {
                text += &format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes()));
            }
            while let Some(Ok(_)) = request.body_mut().frame().await {}
            plain(text)
        }
        "/echo" => Response::new(request.into_body().map_err(Into::into).boxed_unsync()),
        // A piece whenever the gate gives one, the last one empty.
        "/gated" => streamed(futures_util::stream::unfold(0u32, move |n| {
            let seen = Arc::clone(&seen);
            async move {
                seen.gate.acquire().await.ok()?.forget();
                (n < 3).then(|| (Bytes::from(format!("piece {n}\n")), n + 1))
            }
        })),
        "/large" => {
            let pieces = large(&request);
            streamed(futures_util::stream::iter(0..pieces).map(move |n| {
                seen.made.fetch_add(PIECE as u64, Ordering::SeqCst);
                piece(n)
            }))
        }
        // Reads its body once the gate is open.
        "/sink" => {
            seen.gate.acquire().await.unwrap().forget();
            let mut right = true;
            let mut body = BodyStream::new(request.into_body());
            let mut read = 0u64;
            while let Some(Ok(frame)) = body.next().await {
                let data = frame.into_data().unwrap_or_default();
                for byte in data {
                    right &= byte == (read / PIECE as u64) as u8;
                    read += 1;
                }
                seen.read.store(read, Ordering::SeqCst);
            }
            plain(format!("{read} {right}"))
        }
        "/upgrade" => {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let Ok(upgraded) = upgrade.await else { return };
                let (mut reader, mut writer) = tokio::io::split(TokioIo::new(upgraded));
                let _ = writer.write_all(b"hello;").await;
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
                let _ = writer.write_all(b";bye").await;
                let _ = writer.shutdown().await;
            });
            let mut response = plain("");
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            let headers = response.headers_mut();
            headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
            headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
            let key = request.headers().get("sec-websocket-key").cloned();
            headers.extend(key.map(|key| (header::SEC_WEBSOCKET_ACCEPT, key)));
            response
        }
        "/hop" => {
            let mut response = plain("hop");
            let headers = response.headers_mut();
            for (name, value) in [
                ("connection", "x-secret"),
                ("x-secret", "1"),
                ("keep-alive", "timeout=1"),
                ("set-cookie", "own=1"),
                ("x-kept", "2"),
            ] {
                headers.insert(name, HeaderValue::from_static(value));
            }
            response
        }
        "/empty" => {
            let mut response = plain("");
            *response.status_mut() = StatusCode::NO_CONTENT;
            response
        }
        "/hang" => std::future::pending().await,
        "/early" => {
            let mut response = plain("too large");
            *response.status_mut() = StatusCode::PAYLOAD_TOO_LARGE;
            response
        }
        "/break" => streamed_then_broken(),
        _ => plain(line),
    }
}

fn streamed_then_broken() -> Response<ProxyBody> {
    let pieces = futures_util::stream::unfold(0, |n| async move {
        // What has come so far is on its way before the end comes.
        sleep(Duration::from_millis(100 * n)).await;
        let piece = match n {
            0 => Ok(Frame::data(Bytes::from_static(b"begun"))),
            _ => Err(io::Error::other("no more").into()),
        };
        Some((piece, n + 1))
    });
    Response::new(StreamBody::new(pieces).boxed_unsync())
}

/// The number of pieces that a request asks for.
fn large(request: &Request<Incoming>) -> u64 {
    request.uri().query().unwrap().parse().unwrap()
}

fn piece(n: u64) -> Bytes {
    Bytes::from(vec![n as u8; PIECE])
}

/// A node with a proxy in front of an application. No role loop: tests set what it is.
struct Proxied {
    node: TestNode,
    app: App,
    addr: SocketAddr,
    running: Option<Running>,
}

impl Proxied {
    async fn new(node: TestNode, app: App, config: ProxyConfig) -> Proxied {
        let config = ProxyConfig {
            target: config.target.or(Some(app.addr.to_string())),
            addr: config.addr.or(Some("127.0.0.1:0".into())),
            db: Some("a.db".into()),
            ..config
        };
        let proxy = Proxy::bind(&config).await.unwrap().unwrap();
        Proxied {
            addr: proxy.local_addr(),
            running: Some(proxy.serve(Node {
                store: Arc::clone(&node.store),
                status: node.status.subscribe(),
            })),
            node,
            app,
        }
    }

    async fn primary(config: ProxyConfig) -> Proxied {
        Proxied::new(TestNode::primary().await, App::start().await, config).await
    }

    /// A replica of the primary `pri` at this URL.
    async fn replica(url: &str, config: ProxyConfig) -> Proxied {
        let node = TestNode::new();
        node.status.send_replace(Status {
            is_primary: false,
            primary: Some(PrimaryInfo {
                hostname: "pri".into(),
                advertise_url: url.into(),
            }),
            ready: true,
        });
        Proxied::new(node, App::start().await, config).await
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    async fn get(&self, path: &str) -> (StatusCode, String) {
        read(client().get(self.url(path))).await
    }

    async fn stop(mut self) {
        self.running.take().unwrap().stop().await;
        self.node.stop().await;
    }
}

fn client() -> reqwest::Client {
    reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .timeout(Duration::from_secs(40))
        .build()
        .unwrap()
}

async fn read(request: reqwest::RequestBuilder) -> (StatusCode, String) {
    let response = request.send().await.unwrap();
    (response.status(), response.text().await.unwrap())
}

/// The TXID of the cookie that an answer sets.
fn cookie(response: &reqwest::Response) -> Option<String> {
    let values = response.headers().get_all(header::SET_COOKIE);
    let mut ours = values
        .iter()
        .filter_map(|value| value.to_str().unwrap().strip_prefix("__txid="));
    let value = ours.next()?;
    assert_eq!(ours.next(), None, "one cookie");
    let (txid, attributes) = value.split_once("; ").unwrap();
    assert!(attributes.starts_with("Path=/; Expires="), "{attributes}");
    assert!(attributes.ends_with(" GMT; HttpOnly"), "{attributes}");
    Some(txid.to_owned())
}

/// A connection on which a test speaks HTTP/1 itself.
struct Raw(TcpStream);

impl Raw {
    async fn open(addr: SocketAddr, text: &str) -> Raw {
        let mut raw = Raw(TcpStream::connect(addr).await.unwrap());
        raw.send(text).await;
        raw
    }

    async fn send(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).await.unwrap();
    }

    /// Reads until all of it ends with `end`.
    async fn until(&mut self, end: &str) -> String {
        let mut text = Vec::new();
        while !text.ends_with(end.as_bytes()) {
            let byte = timeout(Duration::from_secs(20), self.0.read_u8()).await;
            match byte.unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&text))) {
                Ok(byte) => text.push(byte),
                Err(e) => panic!("{e} after {}", String::from_utf8_lossy(&text)),
            }
        }
        String::from_utf8(text).unwrap()
    }

    /// Reads until the peer closes.
    async fn rest(&mut self) -> String {
        let mut text = Vec::new();
        let read = self.0.read_to_end(&mut text);
        // A reset is an end as well.
        let _ = timeout(Duration::from_secs(20), read)
            .await
            .expect("an end");
        String::from_utf8(text).unwrap()
    }
}
