//! What the door asks of connections and requests, over real sockets.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::{Client, StatusCode, header};
use tempfile::TempDir;
use tenure_test_services::tls::{Authority, Identity};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::access::{Current, Keys, tls};
use crate::config::{
    ClientAuth, Config, HttpAuth, HttpConfig, HttpTls, Right, TokenConfig, TokenSource,
};

use super::harness::TestNode;

const READ: &str = "read-0123456789abcdef";
const REPLICATE: &str = "replicate-0123456789";
const ADMIN: &str = "admin-0123456789abcd";

/// An authority, and what it issued for a node.
struct Pki {
    _dir: TempDir,
    authority: Authority,
    node: Identity,
}

impl Pki {
    fn new() -> Pki {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new(dir.path());
        let node = authority.issue("node", &["127.0.0.1".parse().unwrap()]);
        Pki {
            _dir: dir,
            authority,
            node,
        }
    }

    fn config(&self, client_auth: ClientAuth) -> HttpTls {
        HttpTls {
            cert: self.node.cert.clone(),
            key: self.node.key.clone(),
            ca: Some(self.node.ca.clone()),
            client_auth,
        }
    }

    /// A client that shows this certificate, if any, and offers this protocol.
    fn client(&self, shows: Option<&Identity>, protocol: &str) -> Client {
        let (cert, key) = (shows.map(|i| &*i.cert), shows.map(|i| &*i.key));
        client(Some(self.authority.ca()), cert, key, protocol)
    }
}

fn client(ca: Option<&Path>, cert: Option<&Path>, key: Option<&Path>, protocol: &str) -> Client {
    let mut config = tls::client(["ca", "cert", "key"], ca, cert, key).unwrap();
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    let client = Client::builder().no_proxy().use_preconfigured_tls(config);
    let client = client.timeout(Duration::from_secs(20));
    client.build().unwrap()
}

fn keys(tls: Option<HttpTls>, auth: Option<HttpAuth>) -> Current {
    let config = HttpConfig {
        tls,
        auth,
        ..Config::default().http
    };
    watch::channel(Arc::new(Keys::load(&config).unwrap())).1
}

async fn node(keys: Current) -> TestNode {
    let mut node = TestNode::new();
    node.keys = keys;
    node.into_primary().await
}

/// What TLS had against the other side.
fn why(error: &reqwest::Error) -> String {
    tls::reason(error).unwrap_or_else(|| panic!("no reason in {error:?}"))
}

fn https(node: &TestNode, path: &str) -> String {
    node.url.replacen("http://", "https://", 1) + path
}

#[tokio::test]
async fn tls_speaks_both_versions_and_asks_for_certificates() {
    let pki = Pki::new();
    let mut node = node(keys(Some(pki.config(ClientAuth::Required)), None)).await;
    let info = https(&node, "/info");
    for (protocol, version) in [
        ("h2", http::Version::HTTP_2),
        ("http/1.1", http::Version::HTTP_11),
    ] {
        let answer = pki
            .client(Some(&pki.node), protocol)
            .get(&info)
            .send()
            .await
            .unwrap();
        assert_eq!(
            (answer.status(), answer.version()),
            (StatusCode::OK, version)
        );
        let none = pki
            .client(None, protocol)
            .get(&info)
            .send()
            .await
            .unwrap_err();
        assert!(why(&none).contains("asks for a certificate"), "{none:?}");
    }
    // Others that are not let in, or do not come in.
    let elsewhere = tempfile::tempdir().unwrap();
    let foreign = Authority::new(elsewhere.path()).issue("x", &["127.0.0.1".parse().unwrap()]);
    let expired = pki
        .authority
        .issue_expired("old", &["127.0.0.1".parse().unwrap()]);
    for (shows, want) in [
        (&foreign, "does not know the authority"),
        (&expired, "this side's certificate has expired"),
    ] {
        let error = pki
            .client(Some(shows), "h2")
            .get(&info)
            .send()
            .await
            .unwrap_err();
        assert!(why(&error).contains(want), "{}", why(&error));
    }
    let suspicious = client(
        Some(&foreign.ca),
        Some(&pki.node.cert),
        Some(&pki.node.key),
        "h2",
    );
    let error = suspicious.get(&info).send().await.unwrap_err();
    assert!(
        why(&error).contains("an authority that is not in the CA file"),
        "{}",
        why(&error)
    );
    let misnamed = info.replace("127.0.0.1", "localhost");
    let error = pki
        .client(Some(&pki.node), "h2")
        .get(&misnamed)
        .send()
        .await
        .unwrap_err();
    assert!(
        why(&error).contains("for another host name"),
        "{}",
        why(&error)
    );
    node.stop().await;
}

#[tokio::test]
async fn the_end_of_the_certificate_is_a_metric() {
    let pki = Pki::new();
    let config = pki.config(ClientAuth::None);
    let end = tls::Tls::load(&config).unwrap().valid_until().unwrap();
    let end = end.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let mut secure = node(keys(Some(config), None)).await;
    let mut plain = node(Keys::none()).await;
    let told = async |url: String| {
        let answer = pki.client(None, "h2").get(url).send().await.unwrap();
        let text = answer.text().await.unwrap();
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix("tenure_certificate_expiry_timestamp_seconds "));
        line.map(|n| n.parse::<u64>().unwrap())
    };
    assert_eq!(told(https(&secure, "/metrics")).await, Some(end));
    assert_eq!(told(format!("{}/metrics", plain.url)).await, None);
    secure.stop().await;
    plain.stop().await;
}

#[tokio::test]
async fn who_speaks_the_wrong_protocol_is_told() {
    let pki = Pki::new();
    let mut secure = node(keys(Some(pki.config(ClientAuth::None)), None)).await;
    let mut plain = node(Keys::none()).await;
    let error = pki
        .client(None, "h2")
        .get(https(&plain, "/info"))
        .send()
        .await
        .unwrap_err();
    assert!(
        why(&error).contains("does not speak TLS"),
        "{}",
        why(&error)
    );
    let h1 = Client::builder().no_proxy().build().unwrap();
    let h2 = Client::builder()
        .no_proxy()
        .http2_prior_knowledge()
        .build()
        .unwrap();
    for client in [h1, h2] {
        let answer = client
            .get(format!("{}/info", secure.url))
            .send()
            .await
            .unwrap();
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
        assert!(!answer.headers().contains_key("litefs-id"));
        let text = answer.text().await.unwrap();
        assert!(text.contains("speaks TLS only: use https://"), "{text}");
    }
    // It is cut off, whatever it wants besides.
    let mut socket = TcpStream::connect(secure.url.strip_prefix("http://").unwrap())
        .await
        .unwrap();
    socket
        .write_all(b"GET /info HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    let mut all = Vec::new();
    let end = timeout(Duration::from_secs(5), socket.read_to_end(&mut all)).await;
    end.expect("it is closed").unwrap();
    assert!(
        all.starts_with(b"HTTP/1.1 400 "),
        "{}",
        String::from_utf8_lossy(&all)
    );
    secure.stop().await;
    plain.stop().await;
}

#[tokio::test]
async fn stalled_handshakes_hold_nobody_up_and_end() {
    let pki = Pki::new();
    let mut node = node(keys(Some(pki.config(ClientAuth::None)), None)).await;
    let addr = node.url.strip_prefix("http://").unwrap().to_owned();
    let mut stalled = Vec::new();
    for i in 0..100 {
        let mut socket = TcpStream::connect(&addr).await.unwrap();
        // Half of them have begun: the head of a record of 512 bytes.
        if i % 2 == 0 {
            socket.write_all(&[0x16, 3, 1, 2, 0, 1]).await.unwrap();
        }
        stalled.push(socket);
    }
    let began = Instant::now();
    let answer = pki
        .client(None, "h2")
        .get(https(&node, "/info"))
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    for mut socket in stalled {
        let end = timeout(super::server::HEADER_TIMEOUT * 2, socket.read(&mut [0; 64])).await;
        match end.expect("it is cut off") {
            Ok(0) => {}
            Ok(n) => panic!("{n} bytes to somebody who says nothing"),
            Err(e) => assert_eq!(e.kind(), io::ErrorKind::ConnectionReset),
        }
    }
    node.stop().await;
}

fn tokens(dir: &Path) -> HttpAuth {
    let token = |text: &str, right: Right| {
        let path = dir.join(right.name());
        std::fs::write(&path, text).unwrap();
        TokenConfig {
            name: format!("the-{}", right.name()),
            source: TokenSource::File(path),
            rights: vec![right],
        }
    };
    HttpAuth {
        send: None,
        tokens: vec![
            token(READ, Right::Read),
            token(REPLICATE, Right::Replicate),
            token(ADMIN, Right::Admin),
        ],
    }
}

#[tokio::test]
async fn every_path_asks_for_its_right_before_anything_else() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = node(keys(None, Some(tokens(dir.path())))).await;
    let client = Client::builder()
        .no_proxy()
        .timeout(Duration::from_secs(20))
        .build()
        .unwrap();
    let paths = [
        ("GET", "/info", READ),
        ("GET", "/metrics", READ),
        ("GET", "/debug/vars", READ),
        ("GET", "/events", READ),
        ("GET", "/export?name=../x", READ),
        ("POST", "/stream", REPLICATE),
        ("POST", "/common?name=x", REPLICATE),
        ("POST", "/import?name=../x", ADMIN),
        ("POST", "/promote", ADMIN),
        ("POST", "/demote", ADMIN),
        ("POST", "/handoff", ADMIN),
        ("POST", "/halt?name=x&id=1", ADMIN),
        ("DELETE", "/halt?name=x&id=1", ADMIN),
        ("POST", "/tx?name=x&lockID=1", ADMIN),
        ("GET", "/no/such/path", ADMIN),
        ("GET", "/", ADMIN),
        ("GET", "/info/../import", ADMIN),
        ("PATCH", "/info", READ),
    ];
    for (method, path, needs) in paths {
        let asked = async |token: Option<&str>| {
            let method = method.parse().unwrap();
            let mut request = client.request(method, format!("{}{path}", node.url));
            if let Some(token) = token {
                request = request.bearer_auth(token);
            }
            request.send().await.unwrap()
        };
        let answer = asked(None).await;
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{path}");
        let challenge = answer.headers()[header::WWW_AUTHENTICATE].to_str().unwrap();
        assert_eq!(challenge, "Bearer realm=\"tenure\"");
        assert!(!answer.headers().contains_key("litefs-id"), "{path}");
        let answer = asked(Some("wrong-0123456789abcdef")).await;
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{path}");
        let challenge = answer.headers()[header::WWW_AUTHENTICATE].to_str().unwrap();
        assert!(
            challenge.ends_with("error=\"invalid_token\""),
            "{challenge}"
        );
        for token in [READ, REPLICATE, ADMIN] {
            let answer = asked(Some(token)).await;
            let refused = answer.status() == StatusCode::FORBIDDEN;
            assert_eq!(refused, token != needs && token != ADMIN, "{path} {token}");
            if refused {
                let text = answer.text().await.unwrap();
                assert!(
                    text.starts_with("the token the-") && !text.contains(token),
                    "{text}"
                );
            }
        }
    }
    node.stop().await;
}

#[tokio::test]
async fn a_refused_request_s_body_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = node(keys(None, Some(tokens(dir.path())))).await;
    let mut socket = TcpStream::connect(node.url.strip_prefix("http://").unwrap())
        .await
        .unwrap();
    // A body that never comes.
    let head = format!(
        "POST /import?name=x HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\nAuthorization: Bearer {READ}\r\n\r\n"
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 13];
    let read = timeout(Duration::from_secs(5), socket.read_exact(&mut answer)).await;
    read.expect("at once").unwrap();
    assert_eq!(&answer, b"HTTP/1.1 403 ");
    node.stop().await;
}

#[tokio::test]
async fn new_keys_are_asked_of_new_connections_only() {
    let pki = Pki::new();
    let dir = tempfile::tempdir().unwrap();
    let config = |client_auth| HttpConfig {
        tls: Some(pki.config(client_auth)),
        auth: Some(tokens(dir.path())),
        ..Config::default().http
    };
    let first = Keys::load(&config(ClientAuth::None)).unwrap();
    let later = config(ClientAuth::Required);
    let (change, current) = watch::channel(Arc::new(first));
    let mut node = node(current).await;
    let stays = pki.client(None, "h2");
    let mut events = stays
        .get(https(&node, "/events"))
        .bearer_auth(READ)
        .send()
        .await
        .unwrap();
    assert!(
        events
            .chunk()
            .await
            .unwrap()
            .unwrap()
            .starts_with(b"{\"type\":\"init\"")
    );
    std::fs::write(dir.path().join("read"), "another-0123456789abcdef").unwrap();
    change.send_replace(Arc::new(Keys::load(&later).unwrap()));
    // The old connection goes on, its requests show the new token.
    let info = https(&node, "/info");
    let old = stays.get(&info).bearer_auth(READ).send().await.unwrap();
    assert_eq!(old.status(), StatusCode::UNAUTHORIZED);
    let new = stays
        .get(&info)
        .bearer_auth("another-0123456789abcdef")
        .send()
        .await
        .unwrap();
    assert_eq!(new.status(), StatusCode::OK);
    let waiting = timeout(Duration::from_millis(100), events.chunk()).await;
    assert!(
        waiting.is_err(),
        "the old stream of events has ended: {waiting:?}"
    );
    let late = pki
        .client(None, "h2")
        .get(&info)
        .bearer_auth(ADMIN)
        .send()
        .await
        .unwrap_err();
    assert!(why(&late).contains("asks for a certificate"), "{late:?}");
    node.stop().await;
}
