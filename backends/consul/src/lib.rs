//! The lease in Consul: a session holds a key, as LiteFS has it, so that nodes of both can be in
//! one cluster.
//!
//! | key | holds |
//! | --- | --- |
//! | `KEY` | the primary's [`PrimaryInfo`], held by its session and deleted with it |
//! | `KEY/clusterid` | the cluster ID, for ever |
//! | `KEY/recorded` | a [`Placement`]: how far the last primary's data reached |
//! | `KEY/candidates/<node ID>` | a [`Candidate`], held by a session of its own |
//!
//! - Every call but a watch ends within a third of the TTL, at most 5 s; with
//!   [`LeaseError::Transient`] if Consul did not answer. A watch notices a Consul that does not
//!   answer after half a minute.
//! - No connection is used twice, and none is needed to start: the service may be down.
//! - A token needs `key_prefix "KEY" write` and `session_prefix "" write`; with a path in the URL
//!   also `node "PATH/litefs" write`.
//! - Consul ends a session some time between its TTL and twice that; then the lock-delay keeps the
//!   key free. See [`Leaser::acquire`] of [`ConsulLeaser`].

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use async_trait::async_trait;
use tenure_lease::{Candidate, Lease, LeaseError, Leaser, Placement, PrimaryInfo};

mod api;
mod candidates;
mod go_duration;
mod http;
mod lease;
mod options;
mod primary;

use api::Cluster;
use candidates::Announcement;
use http::{Agent, within};
use primary::Watcher;

pub use options::{ConsulOptions, MAX_LOCK_DELAY, MAX_TTL, MIN_TTL, TlsOptions};

/// One node's access to its cluster's lease in Consul.
pub struct ConsulLeaser {
    cluster: Arc<Cluster>,
    watcher: Watcher,
    announcement: Announcement,
}

impl ConsulLeaser {
    /// Checks the options and reads the TLS files. Consul is not asked for anything yet.
    ///
    /// # Errors
    /// [`LeaseError::Fatal`], naming the option that is wrong.
    pub fn new(options: ConsulOptions) -> Result<Self, LeaseError> {
        options::check_times(options.ttl, options.lock_delay)?;
        let address = options::address(&options.url)?;
        let node = match address.prefix.as_str() {
            "" => None,
            prefix => Some(format!("{prefix}/litefs")),
        };
        let cluster = Cluster {
            agent: Agent {
                http: options::http_client(&options.tls)?,
                base: address.base,
                token: address.token,
            },
            key: options::key(&address.prefix, &options.key)?,
            node,
            registered: AtomicBool::new(false),
            ttl: options.ttl,
            lock_delay: options.lock_delay,
            info: PrimaryInfo {
                hostname: options.hostname,
                advertise_url: options.advertise_url,
            },
            deadline: (options.ttl / 3).min(Duration::from_secs(5)),
        };
        Ok(Self {
            cluster: Arc::new(cluster),
            watcher: Watcher::default(),
            announcement: Announcement::default(),
        })
    }

    async fn within<T>(
        &self,
        what: &str,
        call: impl Future<Output = Result<T, LeaseError>>,
    ) -> Result<T, LeaseError> {
        within(self.cluster.deadline, &self.cluster.action(what), call).await
    }

    /// The value of a key below the cluster's, by what `parse` makes of it.
    async fn value<T>(
        &self,
        name: &str,
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Option<T>, LeaseError> {
        let cluster = &self.cluster;
        let key = cluster.below(name);
        let what = format!("reading {key:?}");
        let (entry, _) = self.within(&what, cluster.get(&key, None)).await?;
        match entry {
            None => Ok(None),
            Some(entry) => match parse(&entry.value) {
                Some(value) => Ok(Some(value)),
                None => Err(LeaseError::fatal(
                    cluster.action(&what),
                    "its value makes no sense: something else uses it, or it was damaged",
                )),
            },
        }
    }
}

#[async_trait]
impl Leaser for ConsulLeaser {
    fn kind(&self) -> &'static str {
        "consul"
    }

    fn hostname(&self) -> &str {
        &self.cluster.info.hostname
    }

    fn advertise_url(&self) -> &str {
        &self.cluster.info.advertise_url
    }

    /// As the trait says. While only the lock-delay of a lost holder stands in the way, this waits
    /// for its end, for three quarters of its deadline at most.
    async fn acquire(&self) -> Result<Box<dyn Lease>, LeaseError> {
        let call = lease::acquire(&self.cluster, &self.watcher);
        let lease = self.within("acquiring the lease", call).await;
        match lease {
            Ok(lease) => Ok(Box::new(lease)),
            // Of a session that was just created.
            Err(LeaseError::LeaseExpired) => Err(LeaseError::transient(
                self.cluster.action("acquiring the lease"),
                "its session was gone at once",
            )),
            Err(e) => Err(e),
        }
    }

    async fn acquire_existing(&self, lease_id: &str) -> Result<Box<dyn Lease>, LeaseError> {
        let call = lease::take_over(&self.cluster, lease_id);
        let lease = self.within("taking the lease over", call).await?;
        Ok(Box::new(lease))
    }

    async fn primary_info(&self) -> Result<PrimaryInfo, LeaseError> {
        let call = self.watcher.primary(&self.cluster);
        let (_, info) = self.within("reading the primary", call).await?;
        Ok(info)
    }

    async fn watch_primary(&self) -> Result<(), LeaseError> {
        self.watcher.changed(&self.cluster).await
    }

    async fn cluster_id(&self) -> Result<Option<String>, LeaseError> {
        let parse = |value: &[u8]| {
            let id = std::str::from_utf8(value).ok()?.trim();
            let digits = id.strip_prefix("LFSC")?;
            let hex = |b: u8| matches!(b, b'0'..=b'9' | b'A'..=b'F');
            (digits.len() == 16 && digits.bytes().all(hex)).then(|| id.to_owned())
        };
        self.value("clusterid", parse).await
    }

    async fn set_cluster_id(&self, id: &str) -> Result<(), LeaseError> {
        let cluster = &self.cluster;
        self.within("setting the cluster ID", async {
            let key = cluster.below("clusterid");
            let value = id.as_bytes().to_vec();
            if cluster.put(&key, ("cas", "0"), value).await? {
                return Ok(());
            }
            match self.cluster_id().await? {
                Some(theirs) if theirs == id => Ok(()),
                Some(theirs) => Err(LeaseError::ClusterIdMismatch {
                    ours: id.to_owned(),
                    theirs,
                }),
                None => Err(LeaseError::transient(
                    cluster.action("setting the cluster ID"),
                    "it was deleted in the same moment",
                )),
            }
        })
        .await
    }

    async fn announce(&self, candidate: &Candidate) -> Result<Option<Duration>, LeaseError> {
        let call = self.announcement.announce(&self.cluster, candidate);
        self.within("announcing a candidate", call).await.map(Some)
    }

    async fn candidates(&self) -> Result<Vec<Candidate>, LeaseError> {
        let call = candidates::candidates(&self.cluster);
        self.within("reading the candidates", call).await
    }

    async fn recorded(&self) -> Result<Option<Placement>, LeaseError> {
        let parse = |value: &[u8]| serde_json::from_slice(value).ok();
        self.value("recorded", parse).await
    }

    async fn close(&self) -> Result<(), LeaseError> {
        let call = self.announcement.withdraw(&self.cluster);
        self.within("withdrawing the candidate", call).await
    }
}
