//! The lease backends: the one `match` that knows which there are.

use std::sync::Arc;

use tenure_lease::{LeaseError, Leaser};
use tenure_lease_consul::{ConsulLeaser, ConsulOptions, TlsOptions};
use tenure_lease_etcd::{EtcdLeaser, EtcdOptions, Tls};
use tenure_lease_static::StaticLeaser;

use crate::config::{Config, ConsulConfig, EtcdConfig, LeaseKind};

use super::NodeError;

/// The backend that the configuration names. No service is asked anything yet.
pub(super) fn leaser(config: &Config) -> Result<Arc<dyn Leaser>, NodeError> {
    let lease = &config.lease;
    let made: Result<Arc<dyn Leaser>, LeaseError> = match (lease.kind, &lease.consul, &lease.etcd) {
        (LeaseKind::Static, ..) => Ok(Arc::new(StaticLeaser::new(
            lease.candidate,
            lease.hostname.clone(),
            lease.advertise_url.clone(),
        ))),
        (LeaseKind::Consul, Some(consul), _) => {
            ConsulLeaser::new(consul_options(config, consul)).map(|l| Arc::new(l) as _)
        }
        (LeaseKind::Etcd, _, Some(etcd)) => {
            EtcdLeaser::new(etcd_options(config, etcd)).map(|l| Arc::new(l) as _)
        }
        // The configuration was checked: the section is there.
        (kind, ..) => Err(LeaseError::fatal(
            format!("reading lease.{}", kind.name()),
            "the section is missing",
        )),
    };
    made.map_err(NodeError::Lease)
}

fn consul_options(config: &Config, consul: &ConsulConfig) -> ConsulOptions {
    let tls = consul.tls.clone().unwrap_or_default();
    ConsulOptions {
        url: consul.url.0.clone(),
        key: consul.key.clone(),
        ttl: consul.ttl,
        lock_delay: consul.lock_delay,
        tls: TlsOptions {
            ca: tls.ca,
            cert: tls.cert,
            key: tls.key,
        },
        hostname: config.lease.hostname.clone(),
        advertise_url: config.lease.advertise_url.clone(),
    }
}

fn etcd_options(config: &Config, etcd: &EtcdConfig) -> EtcdOptions {
    let tls = etcd.tls.clone().unwrap_or_default();
    EtcdOptions {
        endpoints: etcd.endpoints.clone(),
        key: etcd.key.clone(),
        ttl: etcd.ttl,
        username: etcd.username.clone(),
        password: etcd.password.as_ref().map(|p| p.0.clone()),
        tls: Tls {
            ca: tls.ca,
            cert: tls.cert,
            key: tls.key,
        },
        hostname: config.lease.hostname.clone(),
        advertise_url: config.lease.advertise_url.clone(),
    }
}
