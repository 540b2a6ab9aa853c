//! The conformance suite against a real etcd, behind a proxy that breaks connections.

use std::time::Duration;

use async_trait::async_trait;
use tenure_lease::Leaser;
use tenure_lease::conformance::{self, Fault, Service};
use tenure_test_services::etcd::Etcd;
use tenure_test_services::proxy::{self, Proxy};

mod common;

use common::{CALL_TIMEOUT, TTL, leaser, options};

struct Behind {
    etcd: Etcd,
    proxy: Proxy,
}

#[async_trait]
impl Service for Behind {
    async fn leaser(&self, cluster: &str, hostname: &str) -> Box<dyn Leaser> {
        let endpoint = format!("http://{}", self.proxy.addr());
        let key = format!("conformance/{cluster}");
        Box::new(leaser(options(&[endpoint], &key, hostname)))
    }

    fn expires_within(&self) -> Duration {
        // etcd looks for expired leases twice a second, and after a start gives each its TTL anew.
        TTL + Duration::from_secs(2)
    }

    fn call_timeout(&self) -> Duration {
        CALL_TIMEOUT
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
        self.etcd.kill();
    }

    async fn start(&self) {
        self.etcd.start_again();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_conforms() {
    let etcd = Etcd::start();
    let proxy = Proxy::start(etcd.address());
    let service = Behind { etcd, proxy };
    let checks = conformance::every_check(&service);
    tokio::time::timeout(Duration::from_secs(180), checks)
        .await
        .expect("the suite ends");
}
