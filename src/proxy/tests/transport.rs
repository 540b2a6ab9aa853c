//! How bytes get through: streams, versions, upgrades, time limits, an application that is not there.

use tokio::time::Instant;

use super::*;

fn config() -> ProxyConfig {
    ProxyConfig::default()
}

#[tokio::test]
async fn pieces_of_an_answer_come_when_they_are_made() {
    limited(async {
        let primary = Proxied::primary(config()).await;
        let mut answer = client().get(primary.url("/gated")).send().await.unwrap();
        for n in 0..3 {
            let early = timeout(Duration::from_millis(150), answer.chunk()).await;
            assert!(early.is_err(), "piece {n} is not made yet");
            primary.app.seen.gate.add_permits(1);
            let piece = timeout(Duration::from_secs(5), answer.chunk()).await;
            let piece = piece.expect("a piece at once").unwrap().unwrap();
            assert_eq!(piece, format!("piece {n}\n"));
        }
        primary.app.seen.gate.add_permits(1);
        assert_eq!(answer.chunk().await.unwrap(), None);
        primary.stop().await;
    })
    .await;
}

/// What may be on the way at a time between two ends that do not read: the buffers of sockets, most
/// of all, of which there are four.
const ON_THE_WAY: u64 = 40 << 20;
/// 100 MiB.
const PIECES: u64 = 1600;

#[tokio::test]
async fn a_large_answer_is_never_held_as_a_whole() {
    limited(async {
        let primary = Proxied::primary(config()).await;
        let path = format!("/large?{PIECES}");
        let mut answer = client().get(primary.url(&path)).send().await.unwrap();
        // Until the application is held up by a client that does not read.
        let made = || primary.app.seen.made.load(Ordering::SeqCst);
        let mut last = 0;
        while made() != last || last == 0 {
            last = made();
            sleep(Duration::from_millis(200)).await;
        }
        assert!(last < ON_THE_WAY, "{last} bytes are on the way");
        let mut read = 0u64;
        while let Some(piece) = answer.chunk().await.unwrap() {
            for (at, byte) in piece.iter().enumerate().step_by(1000) {
                let expected = ((read + at as u64) / PIECE as u64) as u8;
                assert_eq!(*byte, expected);
            }
            read += piece.len() as u64;
        }
        assert_eq!(read, PIECES * PIECE as u64);
        primary.stop().await;
    })
    .await;
}

#[tokio::test]
async fn a_large_request_is_never_held_as_a_whole() {
    limited(async {
        let primary = Proxied::primary(config()).await;
        let sent = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&sent);
        let pieces = futures_util::stream::iter(0..PIECES).map(move |n| {
            count.fetch_add(PIECE as u64, Ordering::SeqCst);
            Ok::<_, io::Error>(piece(n))
        });
        let body = reqwest::Body::wrap_stream(pieces);
        let post = tokio::spawn(read(client().post(primary.url("/sink")).body(body)));
        let mut last = 0;
        while sent.load(Ordering::SeqCst) != last || last == 0 {
            last = sent.load(Ordering::SeqCst);
            sleep(Duration::from_millis(200)).await;
        }
        assert!(last < ON_THE_WAY, "{last} bytes are on the way");
        assert_eq!(primary.app.seen.read.load(Ordering::SeqCst), 0);
        primary.app.seen.gate.add_permits(1);
        let expected = format!("{} true", PIECES * PIECE as u64);
        assert_eq!(post.await.unwrap(), (StatusCode::OK, expected));
        primary.stop().await;
    })
    .await;
}

#[tokio::test]
async fn both_directions_at_once() {
    limited(async {
        let primary = Proxied::primary(config()).await;
        let mut raw = Raw::open(
            primary.addr,
            "POST /echo HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n",
        )
        .await;
        let head = raw.until("\r\n\r\n").await.to_ascii_lowercase();
        assert!(head.contains("transfer-encoding: chunked"), "{head}");
        assert_eq!(raw.until("one\r\n").await, "3\r\none\r\n");
        raw.send("5\r\nthree\r\n").await;
        assert_eq!(raw.until("three\r\n").await, "5\r\nthree\r\n");
        raw.send("0\r\n\r\n").await;
        assert_eq!(raw.until("0\r\n\r\n").await, "0\r\n\r\n");
        // The connection can be used again.
        raw.send("GET /a HTTP/1.1\r\nHost: app\r\n\r\n").await;
        assert!(raw.until("GET /a").await.starts_with("HTTP/1.1 200"));
        primary.stop().await;
    })
    .await;
}

#[tokio::test]
async fn every_version_of_http() {
    limited(async {
        let primary = Proxied::primary(config()).await;
        let mut raw = Raw::open(primary.addr, "GET /large?2 HTTP/1.0\r\n\r\n").await;
        let answer = raw.rest().await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.0 200"), "{head}");
        assert!(!head.to_ascii_lowercase().contains("chunked"), "{head}");
        assert_eq!(body.len(), 2 * PIECE);

        let mut raw = Raw::open(primary.addr, "").await;
        for n in 0..3 {
            let request = format!("GET /{n} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
            raw.send(&request).await;
            let answer = raw.until(&format!("GET /{n}")).await;
            assert!(
                answer
                    .to_ascii_lowercase()
                    .contains("connection: keep-alive")
            );
        }
        raw.send("GET /show HTTP/1.1\r\nHost: a.b:1\r\nConnection: close\r\n\r\n")
            .await;
        let answer = raw.rest().await;
        assert!(answer.contains("host: a.b:1\n"), "{answer}");
        assert!(answer.contains("GET /show HTTP/1.1\n"), "{answer}");

        let h2 = reqwest::Client::builder()
            .http2_prior_knowledge()
            .no_proxy()
            .build()
            .unwrap();
        let request = h2.get(primary.url("/show")).header("cookie", "a=b");
        let answer = request.header("cookie", "c=d").send().await.unwrap();
        assert_eq!(answer.version(), http::Version::HTTP_2);
        let text = answer.text().await.unwrap();
        assert!(
            text.contains(&format!("host: {}\n", primary.addr)),
            "{text}"
        );
        assert!(text.contains("cookie: a=b; c=d\n"), "{text}");
        let echo = h2.post(primary.url("/echo")).body("z".repeat(2_000_000));
        assert_eq!(read(echo).await.1.len(), 2_000_000);
        primary.stop().await;
    })
    .await;
}

#[tokio::test]
async fn heads_and_answers_without_bodies() {
    limited(async {
        let primary = Proxied::primary(config()).await;
        let mut raw = Raw::open(primary.addr, "HEAD /xy HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let head = raw.until("\r\n\r\n").await.to_ascii_lowercase();
        assert!(head.contains("content-length: 8\r\n"), "{head}");
        raw.send("GET /empty HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let head = raw.until("\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 204"), "{head}");
        raw.send("GET /next HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert!(raw.until("GET /next").await.starts_with("HTTP/1.1 200"));
        raw.send("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert!(raw.until("OPTIONS *").await.starts_with("HTTP/1.1 200"));
        raw.send("CONNECT other:443 HTTP/1.1\r\nHost: other:443\r\n\r\n")
            .await;
        assert!(raw.until("\r\n\r\n").await.starts_with("HTTP/1.1 405"));
        primary.stop().await;
    })
    .await;
}

#[tokio::test]
async fn fields_of_one_connection_are_not_passed_on() {
    limited(async {
        let primary = Proxied::primary(config()).await;
        let answer = client().get(primary.url("/hop")).send().await.unwrap();
        let headers = answer.headers();
        for gone in ["x-secret", "keep-alive", "connection"] {
            assert!(!headers.contains_key(gone), "{headers:?}");
        }
        assert_eq!((&headers["x-kept"], &headers["set-cookie"]), (&"2".parse().unwrap(), &"own=1".parse().unwrap()));

        let request = "GET /show HTTP/1.1\r\nHost: a\r\nConnection: x-mine, close\r\nX-Mine: 1\r\n\
             Upgrade: h2c\r\nProxy-Connection: close\r\nX-Other: 2\r\nX-Forwarded-For: 9.9.9.9\r\n\r\n";
        let text = Raw::open(primary.addr, request).await.rest().await;
        for gone in ["x-mine", "upgrade", "proxy-connection"] {
            assert!(!text.contains(gone), "{gone} in {text}");
        }
        assert!(text.contains("x-other: 2\n"), "{text}");
        assert!(text.contains("x-forwarded-for: 9.9.9.9, 127.0.0.1\n"), "{text}");
        primary.stop().await;
    })
    .await;
}

const UPGRADE: &str = "HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\n\
     Upgrade: websocket\r\nSec-WebSocket-Key: k3y\r\n\r\n";

/// Changes the protocol and talks over it.
async fn talk(addr: SocketAddr, path: &str) -> Raw {
    let mut raw = Raw::open(addr, &format!("GET {path} {UPGRADE}")).await;
    let head = raw.until("\r\n\r\n").await.to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101"), "{head}");
    for field in [
        "connection: upgrade\r\n",
        "upgrade: websocket\r\n",
        "sec-websocket-accept: k3y\r\n",
    ] {
        assert!(head.contains(field), "{field} in {head}");
    }
    assert_eq!(raw.until(";").await, "hello;");
    for text in ["first.", "second."] {
        raw.send(text).await;
        assert_eq!(raw.until(".").await, text);
    }
    raw
}

#[tokio::test]
async fn an_upgraded_connection_is_passed_through() {
    limited(async {
        let primary = Proxied::primary(ProxyConfig {
            passthrough: vec!["/upgrade".into()],
            idle_timeout: Duration::from_millis(200),
            read_header_timeout: Duration::from_millis(200),
            write_timeout: Duration::from_millis(500),
            ..config()
        })
        .await;
        let mut raw = talk(primary.addr, "/upgrade").await;
        // The limits of requests are none of it.
        sleep(Duration::from_millis(2000)).await;
        raw.send("third.").await;
        assert_eq!(raw.until(".").await, "third.");
        // One direction can end before the other.
        raw.0.shutdown().await.unwrap();
        assert_eq!(raw.rest().await, ";bye");

        // A stop of the node ends it.
        let mut raw = talk(primary.addr, "/upgrade").await;
        let started = Instant::now();
        primary.stop().await;
        raw.rest().await;
        assert!(started.elapsed() < Duration::from_secs(4));
    })
    .await;
}

#[tokio::test]
async fn an_upgrade_reaches_the_primary() {
    limited(async {
        let config = ProxyConfig {
            always_forward: vec!["/upgrade".into()],
            forward: crate::config::ProxyForward::Proxy,
            ..config()
        };
        let primary = Proxied::primary(config.clone()).await;
        let config = ProxyConfig {
            addr: Some(format!("127.0.0.2:{}", primary.addr.port())),
            ..config
        };
        let replica = Proxied::replica("http://127.0.0.1:20202", config).await;
        talk(replica.addr, "/upgrade").await;
        assert_eq!(primary.app.requests(), ["GET /upgrade"]);
        replica.stop().await;
        primary.stop().await;
    })
    .await;
}

#[tokio::test]
async fn an_application_that_is_still_starting() {
    limited(async {
        let app = App::start().await;
        let addr = app.addr;
        let primary = Proxied::new(TestNode::primary().await, app, config()).await;
        primary.app.task.abort();
        while TcpStream::connect(addr).await.is_ok() {
            sleep(Duration::from_millis(5)).await;
        }
        let post = tokio::spawn(read(client().post(primary.url("/echo")).body("body")));
        let get = primary.get("/r");
        let start = async {
            sleep(Duration::from_millis(700)).await;
            App::listen(TcpListener::bind(addr).await.unwrap())
        };
        let (get, started) = tokio::join!(get, start);
        assert_eq!(get, (StatusCode::OK, "GET /r".into()));
        assert_eq!(post.await.unwrap(), (StatusCode::OK, "body".into()));
        assert_eq!(started.requests().len(), 2);
        primary.stop().await;
    })
    .await;
}

#[tokio::test]
async fn an_application_that_does_not_come() {
    limited(async {
        let mut primary = Proxied::primary(config()).await;
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = free.local_addr().unwrap().to_string();
        drop(free);
        primary.running.take().unwrap().stop().await;
        let primary = Proxied::new(
            primary.node,
            primary.app,
            ProxyConfig {
                target: Some(target.clone()),
                ..config()
            },
        )
        .await;
        let started = Instant::now();
        let (status, text) = primary.get("/").await;
        assert_eq!(status, StatusCode::BAD_GATEWAY);
        assert!(
            text.contains(&target) && text.contains("not accept"),
            "{text}"
        );
        let waited = started.elapsed();
        let patience = super::super::upstream::PATIENCE;
        assert!(waited > patience / 2 && waited < patience * 2, "{waited:?}");
        primary.stop().await;
    })
    .await;
}

/// Accepts `broken` connections on which it reads a request and hangs up, then answers.
async fn hangs_up(broken: usize) -> (SocketAddr, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let seen = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&seen);
    tokio::spawn(async move {
        for n in 0.. {
            let mut raw = Raw(listener.accept().await.unwrap().0);
            raw.until("\r\n\r\n").await;
            count.fetch_add(1, Ordering::SeqCst);
            if n >= broken {
                raw.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                    .await;
            }
        }
    });
    (addr, seen)
}

#[tokio::test]
async fn only_a_read_is_sent_again() {
    limited(async {
        let node = TestNode::primary().await;
        let (addr, seen) = hangs_up(1).await;
        let target = |addr: SocketAddr| ProxyConfig {
            target: Some(addr.to_string()),
            always_forward: vec!["/w".into()],
            ..config()
        };
        let primary = Proxied::new(node, App::start().await, target(addr)).await;
        assert_eq!(primary.get("/r").await, (StatusCode::OK, "ok".into()));
        assert_eq!(seen.load(Ordering::SeqCst), 2);
        primary.stop().await;

        for (request, path) in [("POST", "/r"), ("GET", "/w")] {
            let (addr, seen) = hangs_up(1).await;
            let node = TestNode::primary().await;
            let primary = Proxied::new(node, App::start().await, target(addr)).await;
            let method = request.parse().unwrap();
            let answer = read(client().request(method, primary.url(path))).await;
            assert_eq!(answer.0, StatusCode::BAD_GATEWAY, "{request} {path}");
            assert_eq!(seen.load(Ordering::SeqCst), 1, "{request} {path}");
            primary.stop().await;
        }
    })
    .await;
}

#[tokio::test]
async fn answers_that_come_early_or_break_off() {
    limited(async {
        let primary = Proxied::primary(config()).await;
        let head = "POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nonly this";
        let mut raw = Raw::open(primary.addr, head).await;
        assert!(raw.until("too large").await.starts_with("HTTP/1.1 413"));
        // A body that breaks off is not taken for a short one.
        let answer = client().get(primary.url("/break")).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        assert!(answer.bytes().await.is_err());
        assert_eq!(primary.get("/r").await.0, StatusCode::OK);
        primary.stop().await;
    })
    .await;
}

#[tokio::test]
async fn a_request_that_is_not_read_has_its_answer_all_the_same() {
    limited(async {
        let replica = Proxied::replica("http://127.0.0.1:1", config()).await;
        // More than the buffers of sockets hold: a connection that is reset would lose the answer.
        let size = 60 << 20;
        let body = Bytes::from(vec![0; size]);
        let mut raw = Raw::open(replica.addr, "").await;
        for _ in 0..2 {
            let head = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n");
            raw.send(&head).await;
            raw.0.write_all(&body).await.expect("all of it is taken");
            let head = raw.until("\r\n\r\n").await;
            assert!(head.contains("fly-replay: instance=pri"), "{head}");
        }
        // A client that asks first is not told to send what nobody wants.
        let asks = "Expect: 100-continue\r\nContent-Length: 4\r\n\r\n";
        let head = format!("POST / HTTP/1.1\r\nHost: a\r\n{asks}");
        let mut asking = Raw::open(replica.addr, &head).await;
        let answer = asking.rest().await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let primary = Proxied::primary(config()).await;
        let head = format!("POST /echo HTTP/1.1\r\nHost: a\r\n{asks}");
        let mut asking = Raw::open(primary.addr, &head).await;
        let told = asking.until("\r\n\r\n").await;
        assert!(told.starts_with("HTTP/1.1 100"), "{told}");
        asking.send("body").await;
        assert!(asking.until("body").await.starts_with("HTTP/1.1 200"));
        primary.stop().await;
        // One that goes on for ever is cut off.
        raw.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            .await;
        raw.until("\r\n\r\n").await;
        let started = Instant::now();
        while raw.0.write_all(b"1\r\nx\r\n").await.is_ok() {
            assert!(started.elapsed() < Duration::from_secs(20));
            sleep(Duration::from_millis(10)).await;
        }
        replica.stop().await;
    })
    .await;
}

#[tokio::test]
async fn connections_end_when_their_time_is_over() {
    limited(async {
        let primary = Proxied::primary(ProxyConfig {
            read_header_timeout: Duration::from_millis(300),
            idle_timeout: Duration::from_millis(1500),
            ..config()
        })
        .await;
        let took = |started: Instant, least: u64| {
            let took = started.elapsed();
            let least = Duration::from_millis(least);
            assert!(
                took >= least && took < least + Duration::from_millis(1100),
                "{took:?}"
            );
        };
        // Nothing comes at all, or not the whole of a head, at first and later.
        for begin in ["", "GET / HTTP/1.1\r\nHost:"] {
            let started = Instant::now();
            Raw::open(primary.addr, begin).await.rest().await;
            took(started, 290);
        }
        let mut raw = Raw::open(primary.addr, "GET /a HTTP/1.1\r\nHost: a\r\n\r\n").await;
        raw.until("GET /a").await;
        let started = Instant::now();
        sleep(Duration::from_millis(700)).await;
        raw.send("GET /b HTTP/1.1\r\nHost: a\r\n").await;
        assert_eq!(raw.rest().await, "");
        took(started, 990);
        // Silence between requests.
        let mut raw = Raw::open(primary.addr, "GET /a HTTP/1.1\r\nHost: a\r\n\r\n").await;
        raw.until("GET /a").await;
        let started = Instant::now();
        assert_eq!(raw.rest().await, "");
        took(started, 1490);
        // A request that takes longer than either is not disturbed.
        let mut answer = client().get(primary.url("/gated")).send().await.unwrap();
        sleep(Duration::from_millis(2000)).await;
        primary.app.seen.gate.add_permits(4);
        assert!(answer.chunk().await.unwrap().is_some());
        primary.stop().await;
    })
    .await;
}

#[tokio::test]
async fn requests_and_answers_end_when_their_time_is_over() {
    limited(async {
        let primary = Proxied::primary(ProxyConfig {
            read_timeout: Duration::from_millis(300),
            write_timeout: Duration::from_millis(1000),
            ..config()
        })
        .await;
        let slow = "POST /sink HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf";
        primary.app.seen.gate.add_permits(1);
        let mut raw = Raw::open(primary.addr, slow).await;
        let started = Instant::now();
        let text = raw.until("proxy.read-timeout\n").await;
        assert!(text.starts_with("HTTP/1.1 408"), "{text}");
        assert!(started.elapsed() < Duration::from_millis(900));

        let started = Instant::now();
        let (status, text) = primary.get("/hang").await;
        assert_eq!(status, StatusCode::GATEWAY_TIMEOUT);
        assert!(text.contains("proxy.write-timeout"), "{text}");
        assert!(started.elapsed() >= Duration::from_millis(990));

        // An answer that has begun breaks off, whether it stops or is not read.
        let answer = client().get(primary.url("/gated")).send().await.unwrap();
        assert!(answer.bytes().await.is_err());
        let request = format!("GET /large?{PIECES} HTTP/1.1\r\nHost: a\r\n\r\n");
        let mut raw = Raw::open(primary.addr, &request).await;
        sleep(Duration::from_millis(3000)).await;
        let mut read = 0;
        let mut buffer = vec![0; 1 << 20];
        while let Ok(n @ 1..) = raw.0.read(&mut buffer).await {
            read += n as u64;
        }
        assert!(read < PIECES * PIECE as u64, "all of it came");
        primary.stop().await;
    })
    .await;
}

#[tokio::test]
async fn a_stop_waits_for_open_requests_and_for_nothing_else() {
    limited(async {
        let primary = Proxied::primary(config()).await;
        let mut idle = Raw::open(primary.addr, "GET /a HTTP/1.1\r\nHost: a\r\n\r\n").await;
        idle.until("GET /a").await;
        let mut open = client().get(primary.url("/gated")).send().await.unwrap();
        let gate = Arc::clone(&primary.app.seen);
        let addr = primary.addr;
        let started = Instant::now();
        let opened = tokio::spawn(async move {
            sleep(Duration::from_millis(500)).await;
            assert!(TcpStream::connect(addr).await.is_err(), "it takes no more");
            gate.gate.add_permits(4);
            let mut text = String::new();
            while let Some(piece) = open.chunk().await.unwrap() {
                text += std::str::from_utf8(&piece).unwrap();
            }
            text
        });
        primary.stop().await;
        assert!(started.elapsed() < Duration::from_secs(4));
        assert_eq!(opened.await.unwrap(), "piece 0\npiece 1\npiece 2\n");
        assert_eq!(idle.rest().await, "");
    })
    .await;
}
