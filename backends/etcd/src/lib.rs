//! The lease in etcd (version 3.4 and later, over gRPC).
//!
//! The contract is that of [`tenure_lease`]; this says how it is kept. The primary is whom the key
//! `KEY` names, which is bound to an etcd lease: when that expires or is revoked, etcd deletes the
//! key. The epoch is the revision at which the key was written: it grows with every holder, also
//! when the lease is handed over, which keeps the lease and writes the key again. `keys.rs` has the
//! keys and values, `lease.rs` says what makes a renewal certain, and `connection.rs` what a call
//! may take and how endpoints take turns.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use tenure_lease::{Candidate, Lease, LeaseError, Leaser, Placement, PrimaryInfo};

mod candidates;
mod connection;
mod failure;
mod keys;
mod lease;
mod options;
mod watch;

use candidates::Announcement;
use connection::{Connection, Link};
use failure::Failure;
use keys::Keys;
use lease::Shared;
pub use options::{EtcdOptions, Tls};
use watch::Seen;

/// A node's access to the lease in etcd.
pub struct EtcdLeaser {
    shared: Arc<Shared>,
    info: PrimaryInfo,
    /// `info` as it is stored.
    info_json: String,
    announcement: Announcement,
    seen: Seen,
}

impl EtcdLeaser {
    /// Makes a leaser. etcd need not be there: it is connected to when it is needed.
    ///
    /// # Errors
    /// [`LeaseError::Fatal`] when the options contradict themselves, or a PEM file cannot be read.
    pub fn new(options: EtcdOptions) -> Result<Self, LeaseError> {
        let wrong = |e| LeaseError::fatal("setting up the etcd lease", e);
        options.check().map_err(wrong)?;
        let shared = Shared {
            connection: Connection::new(&options).map_err(wrong)?,
            keys: Keys::new(&options.key),
            ttl: options.ttl,
        };
        let info = PrimaryInfo {
            hostname: options.hostname,
            advertise_url: options.advertise_url,
        };
        Ok(Self {
            shared: Arc::new(shared),
            info_json: keys::json(&info)?,
            info,
            announcement: Announcement::new(),
            seen: Seen::default(),
        })
    }

    /// Reads a key of the cluster and what `parse` makes of it.
    async fn read<T>(
        &self,
        what: &str,
        key: &str,
        parse: fn(&etcd_client::KeyValue) -> Result<T, Failure>,
    ) -> Result<(i64, Option<T>), LeaseError> {
        let read = |mut link: Link| async move {
            let (revision, entry) = keys::read(&mut link, key).await?;
            Ok((revision, entry.as_ref().map(parse).transpose()?))
        };
        let action = self.shared.action(what);
        self.shared.connection.call(&action, read).await
    }
}

#[async_trait]
impl Leaser for EtcdLeaser {
    fn kind(&self) -> &'static str {
        "etcd"
    }

    fn hostname(&self) -> &str {
        &self.info.hostname
    }

    fn advertise_url(&self) -> &str {
        &self.info.advertise_url
    }

    async fn acquire(&self) -> Result<Box<dyn Lease>, LeaseError> {
        let lease = lease::acquire(&self.shared, &self.info_json).await?;
        Ok(Box::new(lease))
    }

    async fn acquire_existing(&self, lease_id: &str) -> Result<Box<dyn Lease>, LeaseError> {
        let lease = lease::take_over(&self.shared, lease_id, &self.info_json).await?;
        Ok(Box::new(lease))
    }

    async fn primary_info(&self) -> Result<PrimaryInfo, LeaseError> {
        let key = &self.shared.keys.primary;
        let read = self.read("reading the primary", key, keys::primary).await;
        let (revision, info) = read?;
        self.seen.set(revision);
        info.ok_or(LeaseError::NoPrimary)
    }

    async fn watch_primary(&self) -> Result<(), LeaseError> {
        watch::watch(&self.shared, &self.seen).await
    }

    async fn cluster_id(&self) -> Result<Option<String>, LeaseError> {
        let key = &self.shared.keys.cluster_id;
        let read = self.read("reading the cluster ID", key, keys::cluster_id);
        Ok(read.await?.1)
    }

    async fn set_cluster_id(&self, id: &str) -> Result<(), LeaseError> {
        let key = &*self.shared.keys.cluster_id;
        let set = |mut link: Link| async move {
            let transaction = Txn::new()
                .when([Compare::create_revision(key, CompareOp::Equal, 0)])
                .and_then([TxnOp::put(key, id, None)])
                .or_else([TxnOp::get(key, None)]);
            let done = link.client.txn(transaction).await?;
            if done.succeeded() {
                return Ok(None);
            }
            keys::found(&done)
                .as_ref()
                .map(keys::cluster_id)
                .transpose()
        };
        let action = self.shared.action("setting the cluster ID");
        match self.shared.connection.call(&action, set).await? {
            Some(theirs) if theirs != id => Err(LeaseError::ClusterIdMismatch {
                ours: id.to_owned(),
                theirs,
            }),
            _ => Ok(()),
        }
    }

    async fn announce(&self, candidate: &Candidate) -> Result<Option<Duration>, LeaseError> {
        let lasts = self.announcement.announce(&self.shared, candidate).await?;
        Ok(Some(lasts))
    }

    async fn candidates(&self) -> Result<Vec<Candidate>, LeaseError> {
        candidates::list(&self.shared).await
    }

    async fn recorded(&self) -> Result<Option<Placement>, LeaseError> {
        let key = &self.shared.keys.recorded;
        let read = self.read("reading what the last primary had", key, keys::recorded);
        Ok(read.await?.1)
    }

    async fn close(&self) -> Result<(), LeaseError> {
        let withdrawn = self.announcement.withdraw(&self.shared).await;
        self.shared.connection.close();
        withdrawn
    }
}
