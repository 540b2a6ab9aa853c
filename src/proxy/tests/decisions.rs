//! Who answers what: reads, writes, cookies, roles, health.

use reqwest::Method;
use tokio::time::Instant;

use crate::config::ProxyForward;
use crate::http::harness::golden;
use crate::store::Role;

use super::*;

fn with_cookie(request: reqwest::RequestBuilder, txid: &str) -> reqwest::RequestBuilder {
    request.header("cookie", format!("x=1; __txid={txid}"))
}

fn become_primary(node: &TestNode, is_primary: bool) {
    node.status
        .send_modify(|status| status.is_primary = is_primary);
}

#[tokio::test]
async fn a_write_on_the_primary_gives_a_cookie_of_the_position_after_it() {
    limited(async {
        let primary = Proxied::primary(ProxyConfig {
            always_forward: vec!["/w/*".into()],
            passthrough: vec!["/p/*".into()],
            ..ProxyConfig::default()
        })
        .await;
        let post = client().post(primary.url("/x"));
        let answer = post.send().await.unwrap();
        assert_eq!(cookie(&answer), None, "there is no database yet");

        let files = golden("delete-4096-lz4");
        primary.node.seed("a.db", &files[..2]).await;
        for (method, path, txid) in [
            (Method::POST, "/x", Some("0000000000000002")),
            (Method::DELETE, "/x", Some("0000000000000002")),
            (Method::GET, "/w/1", Some("0000000000000002")),
            (Method::HEAD, "/w/1", Some("0000000000000002")),
            (Method::GET, "/x", None),
            (Method::POST, "/p/1", None),
        ] {
            let request = client().request(method.clone(), primary.url(path));
            let answer = request.send().await.unwrap();
            assert_eq!(answer.status(), StatusCode::OK);
            assert_eq!(cookie(&answer).as_deref(), txid, "{method} {path}");
        }

        // What is written while the application answers counts.
        let post = tokio::spawn(client().post(primary.url("/sink")).body("").send());
        while !primary.app.requests().contains(&"POST /sink".into()) {
            sleep(Duration::from_millis(5)).await;
        }
        primary.node.seed("a.db", &files[2..3]).await;
        primary.app.seen.gate.add_permits(1);
        let answer = post.await.unwrap().unwrap();
        assert_eq!(cookie(&answer).as_deref(), Some("0000000000000003"));

        // The application's own cookies stay.
        let answer = client().post(primary.url("/hop")).send().await.unwrap();
        assert_eq!(answer.headers().get_all("set-cookie").iter().count(), 2);
        assert!(cookie(&answer).is_some());
        primary.stop().await;
    })
    .await;
}

#[tokio::test]
async fn a_read_waits_for_what_its_client_has_written() {
    limited(async {
        let replica = Proxied::replica("http://127.0.0.1:1", ProxyConfig::default()).await;
        let files = golden("delete-4096-lz4");
        replica.node.seed("a.db", &files[..2]).await;
        for txid in ["0000000000000001", "0000000000000002", "nonsense", ""] {
            let started = Instant::now();
            let answer = read(with_cookie(client().get(replica.url("/r")), txid)).await;
            assert_eq!(answer, (StatusCode::OK, "GET /r".into()), "{txid}");
            assert!(started.elapsed() < Duration::from_secs(3), "{txid}");
        }
        replica.app.requests();

        let request = with_cookie(client().get(replica.url("/r")), "0000000000000003");
        let waiting = tokio::spawn(read(request));
        // Passed through all the while.
        sleep(Duration::from_millis(300)).await;
        assert!(replica.app.requests().is_empty() && !waiting.is_finished());
        let arrived = Instant::now();
        replica.node.seed("a.db", &files[2..3]).await;
        assert_eq!(waiting.await.unwrap().0, StatusCode::OK);
        assert!(arrived.elapsed() < Duration::from_secs(2));

        let started = Instant::now();
        let request = with_cookie(client().head(replica.url("/r")), "0000000000000009");
        assert_eq!(read(request).await.0, StatusCode::GATEWAY_TIMEOUT);
        let waited = started.elapsed();
        assert!(waited >= super::super::TXID_TIMEOUT, "{waited:?}");
        assert!(waited < super::super::TXID_TIMEOUT * 3, "{waited:?}");
        assert_eq!(
            replica.app.requests(),
            ["GET /r"],
            "the late one was not sent"
        );
        replica.stop().await;
    })
    .await;
}

#[tokio::test]
async fn passthrough_waits_for_nothing() {
    limited(async {
        let config = ProxyConfig {
            passthrough: vec!["/p*".into()],
            ..ProxyConfig::default()
        };
        let replica = Proxied::replica("http://127.0.0.1:1", config).await;
        let request = with_cookie(client().get(replica.url("/p")), "ffffffffffffffff");
        assert_eq!(read(request).await, (StatusCode::OK, "GET /p".into()));
        let post = read(client().post(replica.url("/p?q"))).await;
        assert_eq!(post, (StatusCode::OK, "POST /p?q".into()));
        replica.stop().await;
    })
    .await;
}

#[tokio::test]
async fn health_is_lag() {
    limited(async {
        let config = || ProxyConfig {
            passthrough: vec!["*".into()],
            max_lag: Duration::from_millis(2000),
            ..ProxyConfig::default()
        };
        let primary = Proxied::primary(config()).await;
        let healthy = (StatusCode::OK, "OK\n".to_owned());
        assert_eq!(primary.get("/litefs/health").await, healthy);
        primary.stop().await;

        let replica = Proxied::replica("http://127.0.0.1:1", config()).await;
        let (status, text) = replica.get("/litefs/health").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(text.contains("not been in step"), "{text}");
        let now = || {
            let since = std::time::UNIX_EPOCH.elapsed().unwrap();
            since.as_millis() as i64
        };
        replica.node.store.note_in_step(now());
        assert_eq!(replica.get("/litefs/health").await, healthy);
        replica.node.store.note_in_step(now() - 5000);
        let (status, text) = replica.get("/litefs/health").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(text.contains("proxy.max-lag is 2000 ms"), "{text}");
        let head = read(client().head(replica.url("/litefs/health"))).await;
        assert_eq!(head, (StatusCode::SERVICE_UNAVAILABLE, String::new()));
        assert!(replica.app.requests().is_empty());
        replica.stop().await;
    })
    .await;
}

#[tokio::test]
async fn fly_replay_and_redirect_name_the_primary() {
    limited(async {
        let config = ProxyConfig {
            always_forward: vec!["/w".into()],
            ..ProxyConfig::default()
        };
        let replica = Proxied::replica("http://primary.internal:20202", config.clone()).await;
        for (method, path) in [(Method::POST, "/x"), (Method::GET, "/w")] {
            let request = client().request(method, replica.url(path)).body("unread");
            let answer = request.send().await.unwrap();
            assert_eq!(answer.status(), StatusCode::OK);
            assert_eq!(answer.headers()["fly-replay"], "instance=pri");
            assert_eq!(cookie(&answer), None);
            assert_eq!(answer.text().await.unwrap(), "");
        }
        assert!(replica.app.requests().is_empty());
        replica.stop().await;

        for (url, host) in [
            ("http://primary.internal:20202", "primary.internal"),
            ("http://[::1]:20202/", "[::1]"),
            ("https://10.0.0.1", "10.0.0.1"),
        ] {
            let config = ProxyConfig {
                forward: ProxyForward::Redirect,
                ..config.clone()
            };
            let replica = Proxied::replica(url, config).await;
            let request = client().put(replica.url("/a%20b?c=d&e=%2F")).body("unread");
            let answer = request.send().await.unwrap();
            assert_eq!(answer.status(), StatusCode::TEMPORARY_REDIRECT);
            let expected = format!("http://{host}:{}/a%20b?c=d&e=%2F", replica.addr.port());
            assert_eq!(answer.headers()["location"], expected);
            assert!(replica.app.requests().is_empty());
            replica.stop().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_primary_without_a_usable_address_is_an_error() {
    limited(async {
        let config = ProxyConfig {
            forward: ProxyForward::Proxy,
            ..ProxyConfig::default()
        };
        let replica = Proxied::replica("not a url", config).await;
        let (status, text) = read(client().post(replica.url("/"))).await;
        assert_eq!(status, StatusCode::BAD_GATEWAY);
        assert!(text.contains("no usable address"), "{text}");
        replica.stop().await;
    })
    .await;
}

#[tokio::test]
async fn a_write_waits_for_a_primary_to_be_known() {
    limited(async {
        let config = ProxyConfig {
            primary_redirect_timeout: Duration::from_millis(1500),
            ..ProxyConfig::default()
        };
        let replica = Proxied::replica("http://127.0.0.1:1", config).await;
        let primary = replica.node.status.borrow().primary.clone();
        replica
            .node
            .status
            .send_modify(|status| status.primary = None);
        let started = Instant::now();
        let (status, text) = read(client().post(replica.url("/"))).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(text.contains("no primary"), "{text}");
        let waited = started.elapsed();
        assert!(waited >= Duration::from_millis(1500), "{waited:?}");
        assert_eq!(replica.get("/").await.0, StatusCode::OK, "reads go on");

        let post = tokio::spawn(client().post(replica.url("/x")).send());
        sleep(Duration::from_millis(200)).await;
        assert!(!post.is_finished());
        replica
            .node
            .status
            .send_modify(|status| status.primary = primary);
        let answer = post.await.unwrap().unwrap();
        assert_eq!(answer.headers()["fly-replay"], "instance=pri");

        // This node itself becomes primary.
        replica
            .node
            .status
            .send_modify(|status| status.primary = None);
        let post = tokio::spawn(client().post(replica.url("/x")).send());
        sleep(Duration::from_millis(200)).await;
        become_primary(&replica.node, true);
        let answer = post.await.unwrap().unwrap();
        assert_eq!(answer.text().await.unwrap(), "POST /x");
        replica.stop().await;
    })
    .await;
}

/// A primary, and a replica whose proxy has the same port on another address.
async fn pair(forward: ProxyForward) -> (Proxied, Proxied) {
    let config = ProxyConfig {
        forward,
        primary_redirect_timeout: Duration::from_millis(500),
        ..ProxyConfig::default()
    };
    let primary = Proxied::primary(config.clone()).await;
    let config = ProxyConfig {
        addr: Some(format!("127.0.0.2:{}", primary.addr.port())),
        ..config
    };
    let replica = Proxied::replica("http://127.0.0.1:20202", config).await;
    (primary, replica)
}

#[tokio::test]
async fn a_replica_sends_writes_to_the_primary_itself() {
    limited(async {
        let (primary, replica) = pair(ProxyForward::Proxy).await;
        let files = golden("delete-4096-lz4");
        primary.node.seed("a.db", &files[..2]).await;
        let request = client()
            .post(replica.url("/show?q=1"))
            .header("x-mine", "2")
            .body("x".repeat(300_000));
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        let txid = cookie(&answer).expect("the primary's cookie");
        assert_eq!(txid, "0000000000000002");
        let text = answer.text().await.unwrap();
        for line in [
            "POST /show?q=1 HTTP/1.1",
            "x-mine: 2",
            "content-length: 300000",
            &format!("host: {}", replica.addr),
            "x-forwarded-for: 127.0.0.1, 127.0.0.1",
            "x-forwarded-proto: http",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in {text}");
        }
        assert!(!text.contains("tenure-forwarded"), "{text}");
        assert!(replica.app.requests().is_empty());

        // Read at the replica: not before it has the write.
        let waiting = tokio::spawn(read(with_cookie(client().get(replica.url("/r")), &txid)));
        sleep(Duration::from_millis(100)).await;
        assert!(!waiting.is_finished());
        replica.node.seed("a.db", &files[..2]).await;
        assert_eq!(waiting.await.unwrap().1, "GET /r");

        // Bodies flow in both directions.
        let echo = client()
            .post(replica.url("/echo"))
            .body("y".repeat(3_000_000));
        assert_eq!(read(echo).await.1.len(), 3_000_000);
        replica.stop().await;
        primary.stop().await;
    })
    .await;
}

#[tokio::test]
async fn no_request_goes_round_in_circles() {
    limited(async {
        let (primary, replica) = pair(ProxyForward::Proxy).await;
        // Each takes the other for the primary.
        primary
            .node
            .store
            .set_role(Role::Replica { hostname: None });
        primary.node.status.send_replace(Status {
            is_primary: false,
            primary: Some(PrimaryInfo {
                hostname: "rep".into(),
                advertise_url: "http://127.0.0.2:20202".into(),
            }),
            ready: true,
        });
        let (status, text) = read(client().post(replica.url("/"))).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(text.contains("took this one for the primary"), "{text}");
        assert!(primary.app.requests().is_empty() && replica.app.requests().is_empty());

        // One that is about to be primary takes it.
        let post = tokio::spawn(read(client().post(replica.url("/x"))));
        sleep(Duration::from_millis(100)).await;
        become_primary(&primary.node, true);
        assert_eq!(post.await.unwrap(), (StatusCode::OK, "POST /x".into()));
        replica.stop().await;
        primary.stop().await;
    })
    .await;
}
