//! What the conformance suite does not ask: a real Consul with tokens, TLS, key prefixes, LiteFS
//! nodes, keys that something else uses; and that no session is left with the key.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tenure_lease::{Candidate, LeaseError, Leaser, Placement};
use tenure_lease_consul::{ConsulLeaser, ConsulOptions, MIN_TTL, TlsOptions};
use tenure_test_services::consul::{self, Acl, Consul, LIMITED_TOKEN};
use tenure_test_services::proxy::{Fault, Proxy};
use tenure_test_services::tls::Authority;
use tokio::time::{sleep, timeout};

const KEY: &str = "litefs/primary";

fn options(url: impl Into<String>) -> ConsulOptions {
    ConsulOptions {
        url: url.into(),
        key: KEY.into(),
        ttl: MIN_TTL,
        lock_delay: Duration::from_secs(1),
        tls: TlsOptions::default(),
        hostname: "a".into(),
        advertise_url: "http://a:20202".into(),
    }
}

fn leaser(url: impl Into<String>) -> ConsulLeaser {
    ConsulLeaser::new(options(url)).unwrap()
}

fn with_token(consul: &Consul, token: &str) -> String {
    format!("http://:{token}@{}", consul.address())
}

fn candidate() -> Candidate {
    Candidate {
        node_id: "00000000000000AB".into(),
        hostname: "a".into(),
        placement: Placement::default(),
        settled: false,
    }
}

/// Does everything that a node does.
async fn works(leaser: &ConsulLeaser) {
    leaser.set_cluster_id("LFSC0123456789ABCDEF").await.unwrap();
    assert!(leaser.cluster_id().await.unwrap().is_some());
    leaser.announce(&candidate()).await.unwrap();
    assert_eq!(leaser.candidates().await.unwrap(), [candidate()]);
    let lease = leaser.acquire().await.unwrap();
    lease.renew().await.unwrap();
    lease.record(Placement::default()).await.unwrap();
    assert!(leaser.recorded().await.unwrap().is_some());
    assert_eq!(leaser.primary_info().await.unwrap().hostname, "a");
    lease.handoff(1).await.unwrap();
    let lease = leaser.acquire_existing(lease.id()).await.unwrap();
    lease.close().await.unwrap();
    leaser.close().await.unwrap();
}

/// Every call fails for good, saying each of `words`.
async fn is_refused(leaser: &ConsulLeaser, words: &[&str]) {
    let placement = leaser.recorded().await.map(drop);
    let calls = [
        leaser.acquire().await.map(drop),
        leaser.primary_info().await.map(drop),
        leaser.watch_primary().await,
        leaser.cluster_id().await.map(drop),
        leaser.set_cluster_id("LFSC0123456789ABCDEF").await,
        placement,
    ];
    for call in calls {
        says(call, words);
    }
}

fn says<T>(call: Result<T, LeaseError>, words: &[&str]) {
    let error = call.err().expect("it was not refused");
    assert!(matches!(error, LeaseError::Fatal { .. }), "{error:?}");
    let error = error.to_string();
    for word in words {
        assert!(error.contains(word), "without {word:?}: {error}");
    }
    assert!(!error.contains(LIMITED_TOKEN), "{error}");
}

/// The sessions that exist, as Consul describes them.
fn sessions(consul: &Consul) -> Vec<Value> {
    let (status, list) = consul.request("GET", "/v1/session/list", "");
    assert_eq!(status, 200);
    serde_json::from_str(&list).unwrap()
}

/// Waits until there are `count` sessions.
async fn until_sessions(consul: &Consul, count: usize) {
    let end = Instant::now() + Duration::from_secs(5);
    while sessions(consul).len() != count {
        assert!(Instant::now() < end, "sessions: {:?}", sessions(consul));
        sleep(Duration::from_millis(20)).await;
    }
}

/// Makes a session and takes the key with it, as a LiteFS node would. Gives the session's ID.
fn litefs(consul: &Consul, ttl: &str, lock_delay: &str, value: &str) -> String {
    let session = json!({
        "Name": "litefs", "Behavior": "delete", "TTL": ttl, "LockDelay": lock_delay, "NodeChecks": []
    });
    let (status, made) = consul.request("PUT", "/v1/session/create", &session.to_string());
    assert_eq!(status, 200, "{made}");
    let made: Value = serde_json::from_str(&made).unwrap();
    let id = made["ID"].as_str().unwrap().to_owned();
    let path = format!("/v1/kv/{KEY}?acquire={id}");
    assert_eq!(consul.request("PUT", &path, value), (200, "true".into()));
    id
}

fn raw(consul: &Consul, key: &str) -> (u16, String) {
    consul.request("GET", &format!("/v1/kv/{key}?raw"), "")
}

const LITEFS_VALUE: &str = r#"{"hostname":"l","advertise-url":"http://l:20202"}"#;

#[tokio::test]
async fn tokens_are_sent_and_suffice_or_the_error_says_for_what_not() {
    let consul = Consul::start_with(consul::ConsulOptions {
        acl: Some(Acl {
            key_prefix: "litefs/".into(),
            node: None,
        }),
        ..Default::default()
    });
    works(&leaser(with_token(&consul, LIMITED_TOKEN))).await;
    is_refused(&leaser(consul.url()), &["token", KEY]).await;
    let unknown = "00000000-0000-4000-8000-000000000000";
    let wrong = leaser(with_token(&consul, unknown));
    is_refused(&wrong, &["ACL not found", KEY]).await;
    let elsewhere = ConsulOptions {
        key: "other/primary".into(),
        ..options(with_token(&consul, LIMITED_TOKEN))
    };
    let elsewhere = ConsulLeaser::new(elsewhere).unwrap();
    is_refused(&elsewhere, &[r#"key_prefix "other/primary""#]).await;
    let announced = elsewhere.announce(&candidate()).await;
    says(announced, &[r#"key_prefix "other/primary" write"#]);
}

#[tokio::test]
async fn tls_with_a_private_authority() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let server = authority.issue("localhost", &["127.0.0.1".parse().unwrap()]);
    let node = authority.issue("node", &[]);
    let consul = Consul::start_with(consul::ConsulOptions {
        tls: Some(server),
        ..Default::default()
    });
    let with = |url: String, ca: bool, identity: bool| {
        let tls = TlsOptions {
            ca: ca.then(|| authority.ca().to_owned()),
            cert: identity.then(|| node.cert.clone()),
            key: identity.then(|| node.key.clone()),
        };
        ConsulLeaser::new(ConsulOptions {
            tls,
            ..options(url)
        })
        .unwrap()
    };
    let https = || format!("https://{}", consul.https());
    works(&with(https(), true, true)).await;
    is_refused(&with(https(), false, true), &["TLS", "UnknownIssuer"]).await;
    is_refused(&with(https(), true, false), &["TLS", "alert"]).await;
    let plain = format!("https://{}", consul.address());
    is_refused(&with(plain, true, true), &["TLS", "lease.consul.url"]).await;
    let wrong_scheme = format!("http://{}", consul.https());
    is_refused(&with(wrong_scheme, false, false), &["HTTPS server"]).await;
}

#[tokio::test]
async fn a_path_is_a_prefix_with_a_catalog_node_of_its_own() {
    let consul = Consul::start_with(consul::ConsulOptions {
        acl: Some(Acl {
            key_prefix: "apps/one/".into(),
            node: Some("apps/one/litefs".into()),
        }),
        ..Default::default()
    });
    let url = with_token(&consul, LIMITED_TOKEN) + "/apps/one";
    works(&leaser(url.clone())).await;
    let one = leaser(url);
    let lease = one.acquire().await.unwrap();
    let key = format!("apps/one/{KEY}");
    let value = r#"{"hostname":"a","advertise-url":"http://a:20202"}"#;
    assert_eq!(raw(&consul, &key), (200, value.into()));
    assert_eq!(sessions(&consul)[0]["Node"], "apps/one/litefs");
    lease.close().await.unwrap();
    // Somebody tidies the catalog up: the next but one acquisition at the latest succeeds.
    let gone = r#"{"Node":"apps/one/litefs"}"#;
    let (status, _) = consul.request("PUT", "/v1/catalog/deregister", gone);
    assert_eq!(status, 200);
    if let Err(e) = one.acquire().await.map(drop) {
        assert!(e.is_transient(), "{e}");
    }
    let lease = one.acquire().await.unwrap();
    lease.close().await.unwrap();
    let two = leaser(with_token(&consul, LIMITED_TOKEN) + "/apps/two");
    says(
        two.acquire().await.map(drop),
        &[r#"key_prefix "apps/two/litefs/primary""#],
    );
}

#[tokio::test]
async fn a_key_that_something_else_uses_is_left_alone() {
    let consul = Consul::start();
    let leaser = leaser(consul.url());
    let path = format!("/v1/kv/{KEY}");
    let words = [KEY, "something else uses this key"];
    // Even what looks like a primary: nothing would ever take it away.
    for value in ["maintenance", "{}", LITEFS_VALUE] {
        consul.request("PUT", &path, value);
        says(leaser.primary_info().await, &words);
        says(leaser.acquire().await.map(drop), &words);
        assert_eq!(raw(&consul, KEY), (200, value.into()));
    }
    consul.request("DELETE", &path, "");
    litefs(&consul, "10s", "0s", "a lock of another program");
    says(leaser.primary_info().await, &words);
    says(leaser.acquire().await.map(drop), &words);
    consul.request("DELETE", &path, "");
    for name in ["clusterid", "recorded"] {
        let path = format!("{path}/{name}");
        consul.request("PUT", &path, "x");
    }
    says(leaser.cluster_id().await, &["clusterid"]);
    says(leaser.recorded().await, &["recorded"]);
    // Once that is mended it works, without a restart.
    consul.request("DELETE", &format!("{path}?recurse"), "");
    works(&leaser).await;
}

#[tokio::test]
async fn litefs_nodes_are_understood_and_understand() {
    let consul = Consul::start();
    let leaser = leaser(consul.url());
    let session = litefs(&consul, "10s", "0s", LITEFS_VALUE);
    let primary = leaser.primary_info().await.unwrap();
    assert_eq!(primary.advertise_url, "http://l:20202");
    let refused = leaser.acquire().await.err();
    assert!(matches!(refused, Some(LeaseError::PrimaryExists)));
    // It hands over.
    let lease = leaser.acquire_existing(&session).await.unwrap();
    assert_eq!(lease.id(), session);
    let value = r#"{"hostname":"a","advertise-url":"http://a:20202"}"#;
    assert_eq!(raw(&consul, KEY), (200, value.into()));
    lease.close().await.unwrap();
    // What a node that gives up leaves behind is no primary for either.
    assert_eq!(raw(&consul, KEY), (200, String::new()));
    let none = leaser.primary_info().await;
    assert!(matches!(none, Err(LeaseError::NoPrimary)));

    let lease = leaser.acquire().await.unwrap();
    let ours = &sessions(&consul)[0];
    assert_eq!(ours["ID"], lease.id());
    let told =
        ["Name", "Behavior", "TTL", "LockDelay", "NodeChecks"].map(|name| ours[name].clone());
    let second = 1_000_000_000;
    let expected = [
        json!("litefs"),
        json!("delete"),
        json!("10s"),
        json!(second),
        json!([]),
    ];
    assert_eq!(told, expected);
    lease.close().await.unwrap();
    assert_eq!(sessions(&consul), [] as [Value; 0]);
}

#[tokio::test]
async fn a_session_counts_with_its_own_ttl() {
    let consul = Consul::start();
    let long = ConsulLeaser::new(ConsulOptions {
        ttl: Duration::from_secs(60),
        ..options(consul.url())
    });
    let session = litefs(&consul, "12s", "0s", LITEFS_VALUE);
    let lease = long.unwrap().acquire_existing(&session).await.unwrap();
    assert_eq!(lease.ttl(), Some(Duration::from_secs(12)));
    let short = leaser(consul.url());
    let lease = short.acquire_existing(&session).await.unwrap();
    assert_eq!(lease.ttl(), Some(MIN_TTL));
}

#[tokio::test]
async fn the_lock_delay_is_waited_out_if_it_is_short() {
    let consul = Consul::start();
    let leaser = leaser(consul.url());
    for (lock_delay, soon) in [("1s", true), ("30s", false)] {
        let session = litefs(&consul, "10s", lock_delay, LITEFS_VALUE);
        let path = format!("/v1/session/destroy/{session}");
        consul.request("PUT", &path, "");
        let none = leaser.primary_info().await;
        assert!(matches!(none, Err(LeaseError::NoPrimary)));
        let start = Instant::now();
        let acquired = leaser.acquire().await;
        let took = start.elapsed();
        if soon {
            acquired.unwrap().close().await.unwrap();
            assert!(took < Duration::from_millis(1500), "{took:?}");
        } else {
            let error = acquired.err().unwrap();
            assert!(error.is_transient() && error.to_string().contains("lock-delay"));
            assert!(took < MIN_TTL / 3, "{took:?}");
        }
        until_sessions(&consul, 0).await;
    }
}

#[tokio::test]
async fn no_session_is_left_with_the_key() {
    let consul = Consul::start();
    let proxy = Proxy::start(consul.address());
    let holder = leaser(consul.url());
    let other = leaser(format!("http://{}", proxy.addr()));
    let lease = holder.acquire().await.unwrap();
    for _ in 0..3 {
        assert!(other.acquire().await.is_err());
    }
    until_sessions(&consul, 1).await;
    lease.close().await.unwrap();
    until_sessions(&consul, 0).await;
    // At whatever step the caller stops waiting.
    proxy.set(Fault::Delay(Duration::from_millis(20)));
    for millis in (30..200).step_by(10) {
        let waited = timeout(Duration::from_millis(millis), other.acquire()).await;
        match waited {
            Ok(Ok(lease)) => lease.close().await.unwrap(),
            // The last attempt is being given up just now.
            Ok(Err(LeaseError::PrimaryExists)) | Err(_) => {}
            Ok(Err(e)) => panic!("{e}"),
        }
    }
    // A session whose ID was on its way when nobody waited any more lives on until its TTL is
    // over, but none has the key.
    let end = Instant::now() + Duration::from_secs(5);
    while let Ok(primary) = holder.primary_info().await {
        assert!(Instant::now() < end, "still held: {primary:?}");
        sleep(Duration::from_millis(20)).await;
    }
    let lease = holder.acquire().await.unwrap();
    lease.close().await.unwrap();
}

#[tokio::test]
async fn a_lease_whose_key_was_deleted_or_written_is_lost() {
    let consul = Consul::start();
    let leaser = leaser(consul.url());
    let path = format!("/v1/kv/{KEY}");
    for (method, value) in [("DELETE", ""), ("PUT", "x")] {
        let lease = leaser.acquire().await.unwrap();
        consul.request(method, &path, value);
        let renewed = lease.renew().await;
        assert!(matches!(renewed, Err(LeaseError::LeaseExpired)), "{method}");
        let recorded = lease.record(Placement::default()).await;
        assert!(
            matches!(recorded, Err(LeaseError::LeaseExpired)),
            "{method}"
        );
        lease.close().await.unwrap();
    }
    // And one that was handed over is no longer its old holder's.
    let old = leaser.acquire().await.unwrap();
    let next = ConsulOptions {
        hostname: "b".into(),
        ..options(consul.url())
    };
    let next = ConsulLeaser::new(next).unwrap();
    let new = next.acquire_existing(old.id()).await.unwrap();
    assert!(matches!(old.renew().await, Err(LeaseError::LeaseExpired)));
    new.renew().await.unwrap();
}

#[tokio::test]
async fn a_watcher_does_not_wake_for_its_neighbours() {
    let consul = Consul::start();
    let leaser = leaser(consul.url());
    assert!(leaser.primary_info().await.is_err());
    let writes = async {
        for i in 0..10 {
            consul.request("PUT", &format!("/v1/kv/{KEY}/candidates/{i}"), "x");
            consul.request("PUT", &format!("/v1/kv/{KEY}{i}"), "x");
            sleep(Duration::from_millis(30)).await;
        }
    };
    tokio::select! {
        news = leaser.watch_primary() => panic!("woken: {news:?}"),
        () = writes => {}
    }
    assert_eq!(leaser.candidates().await.unwrap(), []);
    let (news, ()) = tokio::join!(
        timeout(Duration::from_secs(1), leaser.watch_primary()),
        async {
            litefs(&consul, "10s", "0s", LITEFS_VALUE);
        }
    );
    news.unwrap().unwrap();
}

#[tokio::test]
async fn a_paused_agent_is_an_outage_that_passes() {
    let consul = Consul::start();
    let leaser = leaser(consul.url());
    let lease = leaser.acquire().await.unwrap();
    leaser.primary_info().await.unwrap();
    consul.pause();
    let limit = MIN_TTL / 3 + Duration::from_millis(500);
    let own = candidate();
    let start = Instant::now();
    let (renewed, acquired, announced, recorded, primary) = tokio::join!(
        lease.renew(),
        leaser.acquire(),
        leaser.announce(&own),
        lease.record(Placement::default()),
        leaser.primary_info(),
    );
    assert!(start.elapsed() < limit, "{:?}", start.elapsed());
    let failed = [
        renewed,
        acquired.map(drop),
        announced.map(drop),
        recorded,
        primary.map(drop),
    ];
    for call in failed {
        let error = call.unwrap_err();
        assert!(error.is_transient(), "{error}");
    }
    let (news, ()) = tokio::join!(timeout(limit, leaser.watch_primary()), async {
        consul.resume();
        lease.renew().await.unwrap();
        lease.close().await.unwrap();
    });
    news.unwrap().unwrap();
    works(&leaser).await;
}
