//! The conformance suite against a real Consul, behind a proxy that breaks connections.

use std::time::Duration;

use async_trait::async_trait;
use tenure_lease::Leaser;
use tenure_lease::conformance::{self, Fault, Service};
use tenure_lease_consul::{ConsulLeaser, ConsulOptions, MIN_TTL, TlsOptions};
use tenure_test_services::consul::Consul;
use tenure_test_services::proxy::{self, Proxy};

/// Consul's least.
const TTL: Duration = MIN_TTL;
const LOCK_DELAY: Duration = Duration::from_secs(1);

struct Behind {
    consul: Consul,
    proxy: Proxy,
}

#[async_trait]
impl Service for Behind {
    async fn leaser(&self, cluster: &str, hostname: &str) -> Box<dyn Leaser> {
        let leaser = ConsulLeaser::new(ConsulOptions {
            url: format!("http://{}", self.proxy.addr()),
            key: format!("conformance/{cluster}"),
            ttl: TTL,
            lock_delay: LOCK_DELAY,
            tls: TlsOptions::default(),
            hostname: hostname.to_owned(),
            advertise_url: format!("http://{hostname}:20202"),
        });
        Box::new(leaser.expect("the options are right"))
    }

    fn expires_within(&self) -> Duration {
        // Consul ends a session after twice its TTL at the latest, counted from when it was
        // renewed; a leader that is new counts from its beginning.
        2 * TTL + LOCK_DELAY + Duration::from_secs(1)
    }

    fn call_timeout(&self) -> Duration {
        TTL / 3 + Duration::from_millis(500)
    }

    async fn fault(&self, fault: Fault) {
        self.proxy.set(match fault {
            Fault::None => proxy::Fault::None,
            Fault::Refuse => proxy::Fault::Refuse,
            Fault::Delay(delay) => proxy::Fault::Delay(delay),
            Fault::Cut => proxy::Fault::Cut,
            Fault::Stall => proxy::Fault::Stall,
        });
    }

    async fn stop(&self) {
        self.consul.kill();
    }

    async fn start(&self) {
        self.consul.start_again();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_conforms() {
    let consul = Consul::start();
    let proxy = Proxy::start(consul.address());
    let service = Behind { consul, proxy };
    let checks = conformance::every_check(&service);
    tokio::time::timeout(Duration::from_secs(180), checks)
        .await
        .expect("the suite ends");
}
