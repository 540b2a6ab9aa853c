//! Lease services for whole nodes: real ones, behind a proxy that can make them slow or silent.

use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tenure_test_services::consul::{Consul, ConsulOptions};
use tenure_test_services::etcd::{Etcd, EtcdOptions};

/// Which service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Consul, with the shortest TTL that it takes.
    Consul,
    /// etcd, with a TTL of 3 s.
    Etcd,
}

impl Kind {
    /// The TTL of the leases.
    pub fn ttl(self) -> Duration {
        match self {
            Kind::Consul => Duration::from_secs(10),
            Kind::Etcd => Duration::from_secs(3),
        }
    }

    /// The longest time from a primary's death to the next one: what the service takes to notice,
    /// and 2 s. Consul lets a session live for up to twice its TTL, and locks the key for the
    /// lock-delay of 1 s after that.
    pub fn failover(self) -> Duration {
        match self {
            Kind::Consul => Duration::from_secs(20 + 1 + 2),
            Kind::Etcd => Duration::from_secs(3 + 2),
        }
    }

    /// The lines of `lease` for a node that reaches the service at `address`: HOST:PORT, for Consul
    /// perhaps with a token before it (`:TOKEN@HOST:PORT`). More lines of the service's own section
    /// may be appended.
    pub fn lines(self, address: impl Display, key: &str) -> String {
        let ttl = self.ttl().as_secs();
        match self {
            Kind::Consul => format!(
                "  type: consul\n  consul:\n    url: \"http://{address}\"\n    key: {key}\n    ttl: {ttl}s\n    lock-delay: 1s\n"
            ),
            Kind::Etcd => format!(
                "  type: etcd\n  etcd:\n    endpoints: [\"http://{address}\"]\n    key: {key}\n    ttl: {ttl}s\n"
            ),
        }
    }
}

/// A service of one kind; it ends when this is dropped.
pub enum Service {
    /// Consul.
    Consul(Consul),
    /// etcd.
    Etcd(Etcd),
}

impl Service {
    /// Starts one on the loopback, and waits until it serves.
    pub fn start(kind: Kind) -> Service {
        Self::start_at(kind, [127, 0, 0, 1].into())
    }

    /// Starts one that listens on `bind`.
    pub fn start_at(kind: Kind, bind: IpAddr) -> Service {
        match kind {
            Kind::Consul => Service::Consul(Consul::start_with(ConsulOptions {
                bind,
                ..ConsulOptions::default()
            })),
            Kind::Etcd => Service::Etcd(Etcd::start_with(EtcdOptions {
                bind,
                ..EtcdOptions::default()
            })),
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        match self {
            Service::Consul(s) => s.address(),
            Service::Etcd(s) => s.address(),
        }
    }

    /// Stops its process (SIGSTOP), or lets it go on.
    pub fn freeze(&self, frozen: bool) {
        match (self, frozen) {
            (Service::Consul(s), true) => s.pause(),
            (Service::Consul(s), false) => s.resume(),
            (Service::Etcd(s), true) => s.pause(),
            (Service::Etcd(s), false) => s.resume(),
        }
    }

    /// Kills it, as `kill -9` does.
    pub fn kill(&self) {
        match self {
            Service::Consul(s) => s.kill(),
            Service::Etcd(s) => s.kill(),
        }
    }

    /// Starts it again with its data.
    pub fn start_again(&self) {
        match self {
            Service::Consul(s) => s.start_again(),
            Service::Etcd(s) => s.start_again(),
        }
    }
}
