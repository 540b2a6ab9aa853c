//! The loop of a node: primary while it holds the lease, replica otherwise.
//!
//! Who may do what. A node is primary exactly while it holds a lease that has not expired. One round of
//! the loop: if the lease service names another cluster, nothing is done but waiting; a lease that was
//! handed over is taken; a primary that exists is followed; if there is none, a candidate tries to
//! acquire the lease, and whoever is no candidate waits for one to appear. What the loop decides it
//! tells the store ([`Store::set_role`]: what the mount allows) and everybody else by [`Status`].
//!
//! Why it is safe. Becoming primary: the lease first, the cluster ID second, only then the store's role.
//! Ceasing: the store's role first (commits are refused), then the status (streams to replicas send the
//! last transactions and end), and only then the lease is given up, so that nobody else can be primary
//! while this node still takes writes.
//! A lease with a TTL counts from before the request that renewed it was sent, less a margin; every
//! renewal has that moment as its deadline (see [`hold`]). The static lease never expires.
//!
//! Logging: an operator hears once that a primary became unreachable and why, once a minute at most
//! while it stays so, and once that it is back (see [`outage`]). A replica keeps the primary's hostname
//! in the mount through a short break and drops it when a reconnection fails.

mod hold;
mod outage;

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tenure_lease::{Lease, LeaseError, Leaser, PrimaryInfo};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tracing::{debug, error, info, warn};

use crate::store::{Role, Store, StoreError};
use crate::stream::receiver::{Ended, Progress, Receiver, StreamError};
use crate::stream::stats::Stats;

use self::outage::Outage;

/// How long one question to the lease service may take; backends have their own, shorter deadlines.
const LEASE_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest wait between two attempts to reach a primary.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(5);

/// What the node is at the moment, for everybody who needs to know.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Status {
    /// This node holds the lease and takes writes.
    pub is_primary: bool,
    /// The primary as the lease names it, this node included; `None` while there is none.
    pub primary: Option<PrimaryInfo>,
    /// The node has been in step with its cluster since it started: it is primary, or has received
    /// all that it lacked. Never becomes false again.
    pub ready: bool,
}

/// What the loop needs of the configuration.
#[derive(Debug, Clone)]
pub struct RoleConfig {
    /// May this node become primary (`lease.candidate`)?
    pub candidate: bool,
    /// How long to wait before a broken stream is tried again (`lease.reconnect-delay`).
    pub reconnect_delay: Duration,
    /// The databases to replicate (`lease.databases`); all if empty.
    pub databases: Vec<String>,
}

/// Why the loop could not start.
#[derive(Debug, thiserror::Error)]
pub enum RoleError {
    /// The client that follows primaries could not be built.
    #[error("cannot set up the replication client: {0}")]
    Client(#[from] StreamError),
}

/// Runs the loop until `shutdown` becomes true, then gives up the role and the lease.
pub async fn run(
    store: Arc<Store>,
    stats: Arc<Stats>,
    leaser: Arc<dyn Leaser>,
    config: RoleConfig,
    status: watch::Sender<Status>,
    shutdown: watch::Receiver<bool>,
) -> Result<(), RoleError> {
    let databases: BTreeSet<String> = config.databases.iter().cloned().collect();
    let receiver = Receiver::new(Arc::clone(&store), stats, databases)?;
    let outage = Outage::new(config.reconnect_delay, MAX_RECONNECT_DELAY);
    let mut node = Node {
        store,
        leaser,
        config,
        receiver,
        status,
        outage,
        handed_over: None,
        complaint: outage::Complaint::default(),
    };
    node.set_role(Role::Replica { hostname: None }).await;
    let mut stop = shutdown.clone();
    while !*stop.borrow() {
        let wait = node.round(&mut stop).await;
        // The delay ends early when a lease was handed over; a watcher's news would be one more.
        if node.handed_over.is_none() {
            tokio::select! {
                () = sleep(wait) => {}
                () = stopped(&mut stop) => {}
            }
        }
    }
    if let Err(error) = bounded(node.leaser.close()).await {
        debug!(%error, "closing the lease client failed");
    }
    Ok(())
}

struct Node {
    store: Arc<Store>,
    leaser: Arc<dyn Leaser>,
    config: RoleConfig,
    receiver: Receiver,
    status: watch::Sender<Status>,
    outage: Outage,
    /// A lease that the last primary handed over.
    handed_over: Option<String>,
    /// What was last said about the lease service.
    complaint: outage::Complaint,
}

impl Node {
    /// One round of the loop. Gives the time to wait before the next.
    async fn round(&mut self, stop: &mut watch::Receiver<bool>) -> Duration {
        match self.try_round(stop).await {
            Ok(wait) => wait,
            Err(problem) => {
                self.no_primary().await;
                if self.complaint.is_due(&problem) {
                    warn!("{problem}");
                }
                self.config.reconnect_delay.max(Duration::from_millis(100))
            }
        }
    }

    async fn try_round(&mut self, stop: &mut watch::Receiver<bool>) -> Result<Duration, String> {
        let ask = "cannot ask the lease service";
        let service_id = bounded(self.leaser.cluster_id())
            .await
            .map_err(|e| format!("{ask}: {e}"))?;
        let own_id = self.store.cluster_id();
        if let (Some(theirs), Some(ours)) = (&service_id, &own_id)
            && theirs != ours
        {
            return Err(format!(
                "the lease belongs to cluster {theirs}, this node to {ours}: correct the lease's key or give this node an empty data directory"
            ));
        }
        if let Some(lease_id) = self.handed_over.take() {
            let lease = bounded(self.leaser.acquire_existing(&lease_id)).await;
            let lease = lease.map_err(|e| format!("cannot take over lease {lease_id}: {e}"))?;
            return Ok(self.as_primary(lease, stop).await);
        }
        match bounded(self.leaser.primary_info()).await {
            Ok(primary) => return Ok(self.as_replica(primary, stop).await),
            Err(LeaseError::NoPrimary) => {}
            Err(e) => return Err(format!("{ask} for the primary: {e}")),
        }
        // A node without a cluster ID may only follow where the service has one.
        if !self.config.candidate || (own_id.is_none() && service_id.is_some()) {
            self.no_primary().await;
            self.await_news(stop).await;
            return Ok(Duration::ZERO);
        }
        match bounded(self.leaser.acquire()).await {
            Ok(lease) => Ok(self.as_primary(lease, stop).await),
            // Somebody was faster: the next round follows it.
            Err(LeaseError::PrimaryExists) => Ok(Duration::from_millis(50)),
            Err(e) => Err(format!("cannot acquire the lease: {e}")),
        }
    }

    /// Waits for the watcher's news, or for a while if it has none.
    async fn await_news(&self, stop: &mut watch::Receiver<bool>) {
        tokio::select! {
            news = self.leaser.watch_primary() => if let Err(error) = news {
                debug!(%error, "watching for a primary failed");
                sleep(self.config.reconnect_delay).await;
            },
            () = sleep(MAX_RECONNECT_DELAY) => {}
            () = stopped(stop) => {}
        }
    }

    /// Is primary for as long as the lease lasts.
    async fn as_primary(
        &mut self,
        lease: Box<dyn Lease>,
        stop: &mut watch::Receiver<bool>,
    ) -> Duration {
        let mut wait = Duration::ZERO;
        match self.agree_on_cluster().await {
            Ok(()) => {
                self.set_role(Role::Primary).await;
                let primary = PrimaryInfo {
                    hostname: self.leaser.hostname().to_owned(),
                    advertise_url: self.leaser.advertise_url().to_owned(),
                };
                self.status.send_replace(Status {
                    is_primary: true,
                    primary: Some(primary),
                    ready: true,
                });
                self.complaint = outage::Complaint::default();
                self.outage.forget();
                info!(
                    lease = self.leaser.kind(),
                    epoch = lease.epoch(),
                    "this node is the primary"
                );
                match hold::hold(lease.as_ref(), stop).await {
                    hold::End::Shutdown => {}
                    hold::End::Lost => {
                        warn!("the lease is lost: this node is no longer the primary")
                    }
                }
                self.no_primary().await;
            }
            Err(problem) => {
                error!("this node cannot be primary: {problem}");
                wait = MAX_RECONNECT_DELAY;
            }
        }
        if let Err(error) = bounded(lease.close()).await {
            debug!(%error, "giving up the lease failed; it expires by itself");
        }
        wait
    }

    /// Makes sure that the cluster has an ID, and that it is this node's.
    async fn agree_on_cluster(&self) -> Result<(), String> {
        let id = match self.store.cluster_id() {
            Some(id) => id,
            None => {
                let id = new_cluster_id();
                self.off_thread({
                    let id = id.clone();
                    move |store| store.set_cluster_id(&id)
                })
                .await
                .map_err(|e| format!("cannot keep the cluster ID: {e}"))?;
                id
            }
        };
        match bounded(self.leaser.cluster_id()).await {
            Ok(Some(theirs)) if theirs == id => Ok(()),
            Ok(Some(theirs)) => Err(format!(
                "the lease belongs to cluster {theirs}, not to {id}"
            )),
            Ok(None) => match bounded(self.leaser.set_cluster_id(&id)).await {
                // A service that keeps no cluster ID has nothing to disagree about.
                Ok(()) | Err(LeaseError::Unsupported(_)) => Ok(()),
                Err(e) => Err(format!("cannot set the cluster ID: {e}")),
            },
            Err(e) => Err(format!("cannot read the cluster ID: {e}")),
        }
    }

    /// Follows a primary until the stream ends or the watcher says that it may be another.
    async fn as_replica(
        &mut self,
        primary: PrimaryInfo,
        stop: &mut watch::Receiver<bool>,
    ) -> Duration {
        self.status.send_modify(|status| {
            status.is_primary = false;
            status.primary = Some(primary.clone());
        });
        self.complaint = outage::Complaint::default();
        let (cancel, mut cancelled) = watch::channel(false);
        let (progress, mut reached) = mpsc::channel(8);
        let receiver = self.receiver.clone();
        let target = primary.clone();
        let mut stream =
            tokio::spawn(async move { receiver.follow(&target, &mut cancelled, progress).await });
        let leaser = Arc::clone(&self.leaser);
        let news = async {
            if leaser.watch_primary().await.is_err() {
                sleep(MAX_RECONNECT_DELAY).await;
            }
        };
        tokio::pin!(news);
        let mut watching = true;
        let ended = loop {
            tokio::select! {
                biased;
                Some(progress) = reached.recv() => self.note_progress(progress, &primary).await,
                ended = &mut stream => break ended.unwrap_or(Err(StreamError::Panic)),
                () = stopped(stop), if watching => {
                    watching = false;
                    cancel.send_replace(true);
                }
                () = &mut news, if watching => {
                    watching = false;
                    cancel.send_replace(true);
                }
            }
        };
        match ended {
            Ok(Ended::Cancelled) => Duration::ZERO,
            Ok(Ended::Handoff(lease_id)) => {
                info!(
                    primary = primary.hostname,
                    "the primary hands its lease over to this node"
                );
                self.handed_over = Some(lease_id);
                Duration::ZERO
            }
            Ok(Ended::End) => {
                info!(
                    primary = primary.hostname,
                    "the primary has ended the stream"
                );
                self.config.reconnect_delay
            }
            Err(error) => {
                // A stream that broke is tried again at once in the mount's eyes: only when that
                // fails too does this node follow nobody.
                if self.outage.is_on() {
                    self.set_role(Role::Replica { hostname: None }).await;
                }
                self.outage.failed(&primary, &error)
            }
        }
    }

    async fn note_progress(&mut self, progress: Progress, primary: &PrimaryInfo) {
        match progress {
            Progress::Connected => {
                self.set_role(Role::Replica {
                    hostname: Some(primary.hostname.clone()),
                })
                .await;
            }
            Progress::Ready => {
                self.outage.over(primary);
                self.status
                    .send_if_modified(|status| !std::mem::replace(&mut status.ready, true));
            }
        }
    }

    /// Neither primary nor following one.
    async fn no_primary(&mut self) {
        self.set_role(Role::Replica { hostname: None }).await;
        self.status.send_if_modified(|status| {
            let changed = status.is_primary || status.primary.is_some();
            (status.is_primary, status.primary) = (false, None);
            changed
        });
    }

    /// Tells the store, if it is news.
    async fn set_role(&mut self, role: Role) {
        if self.store.role() == role {
            return;
        }
        if let Err(error) = self
            .off_thread(move |store| {
                store.set_role(role);
                Ok(())
            })
            .await
        {
            error!(%error, "the change of role failed");
        }
    }

    /// Runs what may touch the disk or the mount on a thread for such work.
    async fn off_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, String> {
        let store = Arc::clone(&self.store);
        match tokio::task::spawn_blocking(move || work(&store)).await {
            Ok(done) => done.map_err(|e| e.to_string()),
            Err(_) => Err("a thread of the store panicked".into()),
        }
    }
}

/// `LFSC` and 16 upper-case hex digits.
fn new_cluster_id() -> String {
    format!("LFSC{:016X}", rand::random::<u64>())
}

/// Resolves when the node is to stop.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error is the sender's end: whoever could say "stop" is gone.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Bounds a call of the lease service.
async fn bounded<T>(call: impl Future<Output = Result<T, LeaseError>>) -> Result<T, LeaseError> {
    match timeout(LEASE_TIMEOUT, call).await {
        Ok(done) => done,
        Err(_) => Err(LeaseError::transient(
            "a call of the lease service",
            "it took too long",
        )),
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
