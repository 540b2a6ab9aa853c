//! What the tests against a real etcd have in common.

use std::future::Future;
use std::time::{Duration, Instant};

use tenure_lease::{LeaseError, Leaser};
use tenure_lease_etcd::{EtcdLeaser, EtcdOptions, Tls};
use tokio::time::timeout;

/// The shortest that etcd knows.
pub const TTL: Duration = Duration::from_secs(2);

/// A call's deadline at this TTL, and time for a busy machine.
pub const CALL_TIMEOUT: Duration = Duration::from_millis(666 + 500);

/// Options for the node `hostname` with the key `key`.
pub fn options(endpoints: &[String], key: &str, hostname: &str) -> EtcdOptions {
    EtcdOptions {
        endpoints: endpoints.to_vec(),
        key: key.to_owned(),
        ttl: TTL,
        username: None,
        password: None,
        tls: Tls::default(),
        hostname: hostname.to_owned(),
        advertise_url: format!("http://{hostname}:20202"),
    }
}

/// A leaser with these options.
pub fn leaser(options: EtcdOptions) -> EtcdLeaser {
    EtcdLeaser::new(options).expect("the options are right")
}

/// A leaser at `endpoint`, with the key `tenure` and the host name `a`.
#[allow(dead_code, reason = "not every test program uses it")]
pub fn node(endpoint: String) -> EtcdLeaser {
    leaser(options(&[endpoint], "tenure", "a"))
}

/// Each kind of call that a leaser has, one after another: what has become of each, by its name.
#[allow(dead_code, reason = "not every test program uses it")]
pub async fn every_call(leaser: &dyn Leaser) -> Vec<(&'static str, Result<(), LeaseError>)> {
    let candidate = tenure_lease::Candidate {
        node_id: "0123456789ABCDEF".into(),
        hostname: "a".into(),
        placement: tenure_lease::Placement::default(),
        settled: true,
    };
    let id = "LFSC0123456789ABCDEF";
    vec![
        ("acquire", timed(leaser.acquire()).await),
        (
            "acquire_existing",
            timed(leaser.acquire_existing("00000000000000AB")).await,
        ),
        ("primary_info", timed(leaser.primary_info()).await),
        ("cluster_id", timed(leaser.cluster_id()).await),
        ("set_cluster_id", timed(leaser.set_cluster_id(id)).await),
        ("announce", timed(leaser.announce(&candidate)).await),
        ("candidates", timed(leaser.candidates()).await),
        ("recorded", timed(leaser.recorded()).await),
    ]
}

/// Makes a call, which must end within its deadline.
#[allow(dead_code, reason = "not every test program uses it")]
pub async fn timed<T>(call: impl Future<Output = Result<T, LeaseError>>) -> Result<(), LeaseError> {
    let start = Instant::now();
    let result = timeout(Duration::from_secs(30), call).await;
    let took = start.elapsed();
    assert!(took < CALL_TIMEOUT, "a call took {took:?}");
    result.expect("it took less").map(drop)
}

/// The first result of `call` that is not transient; fails if that takes longer than 10 seconds.
#[allow(dead_code, reason = "not every test program uses it")]
pub async fn settled<T, F: Future<Output = Result<T, LeaseError>>>(
    call: impl Fn() -> F,
) -> Result<T, LeaseError> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match call().await {
            Err(e) if e.is_transient() => assert!(Instant::now() < end, "still: {e}"),
            result => return result,
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A fatal error's message.
#[allow(dead_code, reason = "not every test program uses it")]
pub fn fatal<T>(result: Result<T, LeaseError>) -> String {
    match result {
        Err(e @ LeaseError::Fatal { .. }) => e.to_string(),
        Err(e) => panic!("failed, but not for good: {e}"),
        Ok(_) => panic!("succeeded"),
    }
}
