//! Taking the key, keeping it, and giving it up.
//!
//! The lease is the key *as this holder wrote it*: held by its session, and not written since. Its
//! epoch is the index of that write, which Consul makes grow with every write; a session that
//! passes to another node by a handoff writes again and has a greater one. (Consul skips a write
//! that changes nothing: the two must not publish the same name and URL.) A renewal therefore
//! renews the session and looks at the key: somebody may have deleted it, and then the session
//! alone is worth nothing.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::json;
use tenure_lease::{Lease, LeaseError, Placement};
use tokio::runtime::Handle;
use tokio::time::sleep;
use tracing::debug;

use crate::api::{Cluster, encoded, is_session_id};
use crate::http::within;
use crate::primary::{Watcher, holder};

/// The name of the sessions that hold the key, the same as LiteFS's.
const SESSION_NAME: &str = "litefs";
/// How often a key that only a lock-delay keeps from being taken is tried.
const LOCK_DELAY_STEP: Duration = Duration::from_millis(100);

/// Takes the key if nobody has it.
///
/// Where only the lock-delay of a lost holder stands in the way this waits for its end, trying
/// every 100 ms: nobody is told when it ends, and each moment is one without a primary. It gives
/// up, with a transient error, after three quarters of the deadline.
pub(crate) async fn acquire(
    cluster: &Arc<Cluster>,
    watcher: &Watcher,
) -> Result<ConsulLease, LeaseError> {
    let started = Instant::now();
    match watcher.primary(cluster).await {
        Ok(_) => return Err(LeaseError::PrimaryExists),
        Err(LeaseError::NoPrimary) => {}
        Err(e) => return Err(e),
    }
    let sent = Instant::now();
    let session = cluster
        .create_session(SESSION_NAME, cluster.lock_delay)
        .await?;
    let claim = Claim::new(cluster, session);
    while !write_key(cluster, &claim.session).await? {
        let (entry, _) = cluster.get(&cluster.key, None).await?;
        match holder(cluster, entry) {
            Ok(_) => return Err(LeaseError::PrimaryExists),
            Err(LeaseError::NoPrimary) => {}
            Err(e) => return Err(e),
        }
        if started.elapsed() + LOCK_DELAY_STEP > cluster.deadline * 3 / 4 {
            let why = "the lock-delay of its last holder is not over yet";
            return Err(LeaseError::transient(
                cluster.action("acquiring the lease"),
                why,
            ));
        }
        sleep(LOCK_DELAY_STEP).await;
    }
    claim.succeed(cluster.ttl, sent).await
}

/// Takes over the key together with the session that holds it.
pub(crate) async fn take_over(
    cluster: &Arc<Cluster>,
    session: &str,
) -> Result<ConsulLease, LeaseError> {
    if !is_session_id(session) {
        return Err(LeaseError::LeaseExpired);
    }
    let (entry, _) = cluster.get(&cluster.key, None).await?;
    if entry.is_none_or(|entry| entry.session.as_deref() != Some(session)) {
        return Err(LeaseError::LeaseExpired);
    }
    let sent = Instant::now();
    let ttl = cluster.renew_session(session).await?;
    // From here on the key may be ours, and its old holder will not give it up.
    let claim = Claim::new(cluster, session.to_owned());
    if !write_key(cluster, session).await? {
        return Err(LeaseError::LeaseExpired);
    }
    claim.succeed(ttl, sent).await
}

/// Takes the key, or takes it again, for `session`, with this node as primary.
async fn write_key(cluster: &Cluster, session: &str) -> Result<bool, LeaseError> {
    let value = cluster.json(&cluster.info)?;
    cluster.put(&cluster.key, ("acquire", session), value).await
}

/// Gives the key up, if `session` holds it, and ends the session. The release comes first, because
/// there is no lock-delay after one.
async fn give_up(cluster: &Cluster, session: &str) -> Result<(), LeaseError> {
    cluster
        .put(&cluster.key, ("release", session), Vec::new())
        .await?;
    cluster.destroy_session(session).await
}

/// A session that may hold the key, until it is known that it does. If it does not come to that
/// (another was faster, the answer got lost, the caller did not wait) it is given up in the
/// background, so that it does not block the key until its TTL is over.
struct Claim {
    cluster: Arc<Cluster>,
    session: String,
    settled: bool,
}

impl Claim {
    fn new(cluster: &Arc<Cluster>, session: String) -> Self {
        Self {
            cluster: Arc::clone(cluster),
            session,
            settled: false,
        }
    }

    /// Makes a lease of it, once the key is seen to be held.
    async fn succeed(mut self, ttl: Duration, sent: Instant) -> Result<ConsulLease, LeaseError> {
        let cluster = &self.cluster;
        let (entry, _) = cluster.get(&cluster.key, None).await?;
        match entry {
            Some(entry) if entry.session.as_ref() == Some(&self.session) => {
                self.settled = true;
                Ok(ConsulLease {
                    cluster: Arc::clone(cluster),
                    session: self.session.clone(),
                    epoch: entry.modify_index,
                    ttl,
                    renewed: Mutex::new(sent),
                })
            }
            _ => {
                let why = "it was lost in the moment in which it was acquired";
                Err(LeaseError::transient(
                    cluster.action("acquiring the lease"),
                    why,
                ))
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        let cluster = Arc::clone(&self.cluster);
        let session = std::mem::take(&mut self.session);
        // Without a runtime there is no time either: the session's TTL will do.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move {
                let action = cluster.action("giving up a session");
                let result = within(cluster.deadline, &action, give_up(&cluster, &session)).await;
                if let Err(error) = result {
                    debug!(session, %error, "a session was left to its TTL");
                }
            });
        }
    }
}

/// The right to be primary: a session that holds the key.
pub(crate) struct ConsulLease {
    cluster: Arc<Cluster>,
    session: String,
    /// The key's ModifyIndex.
    epoch: u64,
    ttl: Duration,
    renewed: Mutex<Instant>,
}

impl ConsulLease {
    async fn within<T>(
        &self,
        what: &str,
        call: impl Future<Output = Result<T, LeaseError>>,
    ) -> Result<T, LeaseError> {
        within(self.cluster.deadline, &self.cluster.action(what), call).await
    }

    fn renewed(&self) -> std::sync::MutexGuard<'_, Instant> {
        self.renewed.lock().unwrap_or_else(|e| e.into_inner())
    }
}

#[async_trait]
impl Lease for ConsulLease {
    fn id(&self) -> &str {
        &self.session
    }

    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn ttl(&self) -> Option<Duration> {
        Some(self.ttl)
    }

    fn renewed_at(&self) -> Instant {
        *self.renewed()
    }

    async fn renew(&self) -> Result<(), LeaseError> {
        let sent = Instant::now();
        let cluster = &self.cluster;
        self.within("renewing the lease", async {
            cluster.renew_session(&self.session).await?;
            match cluster.get(&cluster.key, None).await?.0 {
                Some(entry)
                    if entry.session.as_ref() == Some(&self.session)
                        && entry.modify_index == self.epoch =>
                {
                    Ok(())
                }
                _ => Err(LeaseError::LeaseExpired),
            }
        })
        .await?;
        let mut renewed = self.renewed();
        *renewed = sent.max(*renewed);
        Ok(())
    }

    /// Nothing is to be done: whoever knows the session's ID may take it over.
    async fn handoff(&self, _node_id: u64) -> Result<(), LeaseError> {
        Ok(())
    }

    async fn record(&self, placement: Placement) -> Result<(), LeaseError> {
        let cluster = &self.cluster;
        let value = cluster.json(&placement)?;
        let operations = json!([
            {"KV": {"Verb": "check-session", "Key": cluster.key, "Session": self.session}},
            {"KV": {"Verb": "check-index", "Key": cluster.key, "Index": self.epoch}},
            {"KV": {"Verb": "set", "Key": cluster.below("recorded"), "Value": encoded(&value)}},
        ]);
        let what = "recording the primary's position";
        match self
            .within(what, cluster.transact(what, operations))
            .await?
        {
            true => Ok(()),
            false => Err(LeaseError::LeaseExpired),
        }
    }

    async fn close(&self) -> Result<(), LeaseError> {
        self.within("giving the lease up", give_up(&self.cluster, &self.session))
            .await
    }
}
