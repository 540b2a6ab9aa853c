//! The loop of a node: primary while it holds the lease, replica otherwise.
//!
//! Who may do what. A node is primary exactly while it holds a lease that has not expired. One round of
//! the loop: if the lease service names another cluster, nothing is done but waiting; a lease that was
//! handed over is taken; a primary that exists is followed; if there is none, a candidate whose turn it
//! is (see [`election`]) acquires the lease, and everybody else waits for one to appear. What the loop
//! decides it tells the store ([`Store::set_role`]: what the mount allows) and everybody else by
//! [`Status`]. Being primary is [`primary`]'s.
//!
//! Why it is safe. A lease with a TTL counts from before the request that renewed it was sent, less a
//! margin (see [`hold`]); the store knows that moment and acknowledges nothing after it, whatever this
//! loop is doing, and [`watchdog`] ends the streams. Each primary has a number, its epoch, greater than
//! those of all before it: a replica follows none that is lower than one it has followed.
//!
//! Logging: an operator hears once that a primary became unreachable and why, once a minute at most
//! while it stays so, and once that it is back (see [`outage`]). A replica keeps the primary's hostname
//! in the mount through a short break and drops it when a reconnection fails.

mod command;
mod election;
mod halt;
mod hold;
mod outage;
mod primary;
mod promote;
mod watchdog;

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;
use tenure_lease::{LeaseError, Leaser, PrimaryInfo};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tracing::{debug, error, info, warn};

use crate::clock;
use crate::peer::Peers;
use crate::store::{Role, Store, StoreError};
use crate::stream::receiver::{Ended, Progress, Receiver, StreamError};
use crate::stream::replicas::Replicas;
use crate::stream::stats::Stats;
use crate::task;

use self::election::{Election, Standing, Turn};
use self::outage::Outage;

pub use self::command::{CommandError, CommandQueue, Commands, commands};
pub use self::halt::HaltClient;
pub use self::promote::{PromoteError, Promoter};

/// What is said when the lease service does not answer.
const ASK: &str = "cannot ask the lease service";

/// How long one question to the lease service may take; backends have their own, shorter deadlines.
const LEASE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long after a failed question to the lease service it is asked again.
const RETRY: Duration = Duration::from_secs(1);

/// How long a stream may go on once its primary is none any more.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How often, and after which time, a primary is asked again that has the lease and is not in
/// office yet.
const EARLY: u32 = 20;

/// See [`EARLY`].
const EARLY_DELAY: Duration = Duration::from_millis(20);

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
    /// Does it ask for the lease once it has caught up (`lease.promote`)?
    pub promote: bool,
    /// How long it leaves the lease to others after it was asked to give it up
    /// (`lease.demote-delay`).
    pub demote_delay: Duration,
    /// How long to wait before a broken stream is tried again (`lease.reconnect-delay`).
    pub reconnect_delay: Duration,
    /// The databases to replicate (`lease.databases`); all if empty.
    pub databases: Vec<String>,
}

/// What the loop works with.
pub struct Parts {
    /// The node's databases.
    pub store: Arc<Store>,
    /// What its streams count.
    pub stats: Arc<Stats>,
    /// The replicas that are connected.
    pub replicas: Arc<Replicas>,
    /// The other nodes.
    pub peers: Arc<dyn Peers>,
    /// The lease service.
    pub leaser: Arc<dyn Leaser>,
    /// Where the loop says what the node is.
    pub status: watch::Sender<Status>,
    /// What others ask of it.
    pub commands: CommandQueue,
}

/// Runs the loop until `shutdown` becomes true, then gives up the role and the lease.
pub async fn run(parts: Parts, config: RoleConfig, shutdown: watch::Receiver<bool>) {
    let databases: BTreeSet<String> = config.databases.iter().cloned().collect();
    let receiver = Receiver::new(
        parts.store.clone(),
        parts.stats.clone(),
        parts.peers.clone(),
        databases,
    );
    let outage = Outage::new(config.reconnect_delay, MAX_RECONNECT_DELAY);
    let election = Election::new(parts.store.clone(), parts.leaser.clone(), config.candidate);
    let mut node = Node {
        store: parts.store,
        stats: parts.stats,
        replicas: parts.replicas,
        peers: parts.peers,
        leaser: parts.leaser,
        config,
        receiver,
        election,
        status: parts.status,
        commands: parts.commands,
        outage,
        handed_over: None,
        handed_away: false,
        not_before: None,
        refused: None,
        early: 0,
        complaint: outage::Complaint::default(),
    };
    // It is one already, but what a replica needs for its readers is made by this call.
    node.tell_store(Role::Replica { hostname: None }).await;
    let mut stop = shutdown.clone();
    while !*stop.borrow() {
        let wait = node.round(&mut stop).await;
        if node.handed_over.is_none() && !wait.is_zero() {
            node.await_news(wait, &mut stop).await;
        }
    }
    if let Err(error) = bounded(node.leaser.close()).await {
        debug!(%error, "closing the lease client failed");
    }
}

/// Why a round came to nothing.
struct Problem {
    /// What it is told of once a minute as.
    kind: String,
    text: String,
}

impl Problem {
    /// While a service is away, what exactly fails changes from one attempt to the next: that is all
    /// one trouble. What somebody must change is trouble of its own.
    fn new(what: &str, error: &LeaseError) -> Problem {
        let text = format!("{what}: {error}");
        match error.is_transient() {
            true => Problem {
                kind: what.to_owned(),
                text,
            },
            false => Problem::lasting(text),
        }
    }

    fn lasting(text: String) -> Problem {
        Problem {
            kind: text.clone(),
            text,
        }
    }
}

struct Node {
    store: Arc<Store>,
    stats: Arc<Stats>,
    replicas: Arc<Replicas>,
    peers: Arc<dyn Peers>,
    leaser: Arc<dyn Leaser>,
    config: RoleConfig,
    receiver: Receiver,
    /// A node that is no candidate takes no part.
    election: Election,
    status: watch::Sender<Status>,
    commands: CommandQueue,
    outage: Outage,
    /// A lease that the last primary handed over.
    handed_over: Option<String>,
    /// The lease was handed over, and the service may still name this node.
    handed_away: bool,
    /// Until then the lease is left to others.
    not_before: Option<Instant>,
    /// The primary that was refused last, because its number is too low.
    refused: Option<PrimaryInfo>,
    /// How often in a row a primary was not in office yet.
    early: u32,
    /// What was last said about the lease service.
    complaint: outage::Complaint,
}

impl Node {
    /// One round of the loop. Gives the time to wait before the next, if there is no news.
    async fn round(&mut self, stop: &mut watch::Receiver<bool>) -> Duration {
        match self.try_round(stop).await {
            Ok(wait) => wait,
            Err(problem) => {
                self.no_primary().await;
                if self.complaint.is_due(&problem.kind) {
                    warn!("{}", problem.text);
                }
                let delay = self.config.reconnect_delay.max(Duration::from_millis(100));
                tokio::select! {
                    biased;
                    () = stopped(stop) => {}
                    () = sleep(delay) => {}
                }
                Duration::ZERO
            }
        }
    }

    async fn try_round(&mut self, stop: &mut watch::Receiver<bool>) -> Result<Duration, Problem> {
        if let Some(lease_id) = self.handed_over.take() {
            // The last primary belongs to this node's cluster, and takes no writes until this is done.
            let lease = bounded(self.leaser.acquire_existing(&lease_id)).await;
            let lease = lease
                .map_err(|e| Problem::new("cannot take over the lease that was handed over", &e))?;
            if !self.config.candidate {
                // Whoever gave the order meant another node; given up, the lease finds a candidate.
                warn!("the lease was handed to this node, which is no candidate: giving it up");
                primary::give_up(lease.as_ref()).await;
                return Ok(Duration::ZERO);
            }
            return Ok(self.as_primary(lease, stop).await);
        }
        let service_id = bounded(self.leaser.cluster_id())
            .await
            .map_err(|e| Problem::new(ASK, &e))?;
        let own_id = self.store.cluster_id();
        if let (Some(theirs), Some(ours)) = (&service_id, &own_id)
            && theirs != ours
            && !self.change_cluster(theirs).await?
        {
            return Err(Problem::lasting(format!(
                "the lease belongs to cluster {theirs}, this node to {ours}: correct the lease's key or give this node an empty data directory"
            )));
        }
        match bounded(self.leaser.primary_info()).await {
            Ok(primary) if self.is_this_node(&primary) => {
                self.no_primary().await;
                let problem = format!(
                    "the lease names this very node ({}, {}), which does not hold it: waiting for it to expire (or does another node have this lease.advertise-url?)",
                    primary.hostname, primary.advertise_url
                );
                if self.handed_away {
                    debug!("the lease still names this node, which has handed it over");
                } else if self.complaint.is_due(&problem) {
                    info!("{problem}");
                }
                return Ok(MAX_RECONNECT_DELAY);
            }
            Ok(primary) => return Ok(self.as_replica(primary, stop).await),
            Err(LeaseError::NoPrimary) => {}
            Err(e) => return Err(Problem::new(ASK, &e)),
        }
        let left_to_others = self
            .not_before
            .and_then(|until| until.checked_duration_since(clock::now()));
        self.no_primary().await;
        if let Some(wait) = left_to_others {
            return Ok(wait);
        }
        if !self.config.candidate {
            return Ok(MAX_RECONNECT_DELAY);
        }
        if let (None, Some(theirs)) = (&own_id, &service_id) {
            let problem = format!(
                "this node is of no cluster yet, and the lease is cluster {theirs}'s: waiting for another to be primary"
            );
            if self.complaint.is_due(&problem) {
                warn!("{problem}");
            }
            return Ok(MAX_RECONNECT_DELAY);
        }
        self.stand(stop).await
    }

    /// Joins the service's cluster if this node has never had data; whether it did. A node that ends
    /// between making an ID and setting it at the service is left with one that is nobody's.
    async fn change_cluster(&self, id: &str) -> Result<bool, Problem> {
        let theirs = id.to_owned();
        let changed = self.off_thread(move |store| store.change_cluster_id(&theirs));
        let changed = changed
            .await
            .map_err(|e| Problem::lasting(format!("cannot keep the cluster ID: {e}")))?;
        if changed {
            info!(
                cluster = id,
                "this node has no data: it joins the lease's cluster"
            );
        }
        Ok(changed)
    }

    /// A candidate without a primary: acquires the lease, if it is this node's turn.
    async fn stand(&mut self, stop: &mut watch::Receiver<bool>) -> Result<Duration, Problem> {
        match self.election.turn().await {
            Ok(Turn::Mine) => {}
            Ok(Turn::Wait(wait)) => return Ok(wait),
            Ok(Turn::Never) => {
                let problem = "this node has no data, and its cluster has some: waiting for another to be primary";
                if self.complaint.is_due(problem) {
                    warn!("{problem}");
                }
                return Ok(MAX_RECONNECT_DELAY);
            }
            Err(e) => return Err(Problem::new(ASK, &e)),
        }
        match bounded(self.leaser.acquire()).await {
            Ok(lease) => Ok(self.as_primary(lease, stop).await),
            // Somebody was faster: the next round follows it.
            Err(LeaseError::PrimaryExists) => Ok(Duration::from_millis(50)),
            Err(e) => Err(Problem::new("cannot acquire the lease", &e)),
        }
    }

    /// Whether the lease names this node, which does not hold it: from before a crash or a handoff.
    fn is_this_node(&self, primary: &PrimaryInfo) -> bool {
        self.config.candidate
            && primary.hostname == self.leaser.hostname()
            && primary.advertise_url == self.leaser.advertise_url()
    }

    /// Waits for the watcher's news, at most this long.
    async fn await_news(&self, wait: Duration, stop: &mut watch::Receiver<bool>) {
        let news = async {
            if let Err(error) = self.leaser.watch_primary().await {
                debug!(%error, "watching for a primary failed");
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            biased;
            () = stopped(stop) => {}
            () = news => {}
            () = sleep(wait) => {}
        }
    }

    /// Follows a primary until the stream ends or the lease service names another.
    async fn as_replica(
        &mut self,
        primary: PrimaryInfo,
        stop: &mut watch::Receiver<bool>,
    ) -> Duration {
        self.status.send_modify(|status| {
            status.is_primary = false;
            status.primary = Some(primary.clone());
        });
        self.election.over(Standing::Following);
        self.handed_away = false;
        self.complaint = outage::Complaint::default();
        let (cancel, mut cancelled) = watch::channel(false);
        let (progress, mut reached) = mpsc::channel(8);
        let receiver = self.receiver.clone();
        let target = primary.clone();
        let confirmed = self.refused.take().as_ref() == Some(&primary);
        let mut stream = task::spawn(async move {
            receiver
                .follow(&target, confirmed, &mut cancelled, progress)
                .await
        });
        let leaser = Arc::clone(&self.leaser);
        let news = another_primary(leaser.as_ref(), &primary);
        tokio::pin!(news);
        let mut refetch = self.store.refetch();
        let (mut watching, mut stopping) = (true, false);
        let ended = loop {
            tokio::select! {
                biased;
                Some(progress) = reached.recv() => self.note_progress(progress, &primary).await,
                ended = &mut stream => break ended.unwrap_or(Err(StreamError::Panic)),
                () = stopped(stop), if !stopping => {
                    stopping = true;
                    cancel.send_replace(true);
                }
                // A database is set aside: the next stream begins without it, and brings it.
                Ok(()) = refetch.changed() => {
                    cancel.send_replace(true);
                }
                () = &mut news, if watching => {
                    // A primary that gave its lease up in order has sent everything and ends the
                    // stream: its last words may still be on their way.
                    watching = false;
                    let cancel = cancel.clone();
                    task::spawn(async move {
                        sleep(LAST_WORDS).await;
                        cancel.send_replace(true);
                    });
                }
            }
        };
        self.after_stream(ended, &primary, !watching).await
    }

    /// A stream has ended; `replaced`: the service no longer names this primary. Gives the time to
    /// wait before the next round.
    async fn after_stream(
        &mut self,
        ended: Result<Ended, StreamError>,
        primary: &PrimaryInfo,
        replaced: bool,
    ) -> Duration {
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
            // There is another primary, or none: nothing is left to be said of this one.
            Ok(Ended::End) | Err(_) if replaced => Duration::ZERO,
            Ok(Ended::End) => {
                info!(
                    primary = primary.hostname,
                    "the primary has ended the stream"
                );
                self.config.reconnect_delay
            }
            Err(error) => {
                if matches!(error, StreamError::OldPrimary { .. }) {
                    self.refused = Some(primary.clone());
                }
                if let StreamError::Refused { status, .. } = &error
                    && *status == StatusCode::SERVICE_UNAVAILABLE
                    && self.early < EARLY
                {
                    // It has the lease, and will be primary in a moment.
                    self.early += 1;
                    debug!(primary = primary.hostname, %error, "too early");
                    return EARLY_DELAY;
                }
                // A stream that broke is tried again at once in the mount's eyes: only when that
                // fails too does this node follow nobody.
                if self.outage.is_on() {
                    self.set_role(Role::Replica { hostname: None }).await;
                }
                self.outage.failed(primary, &error)
            }
        }
    }

    async fn note_progress(&mut self, progress: Progress, primary: &PrimaryInfo) {
        match progress {
            Progress::Connected => {
                self.early = 0;
                self.set_role(Role::Replica {
                    hostname: Some(primary.hostname.clone()),
                })
                .await;
            }
            Progress::Ready(epoch) => {
                if let Some(epoch) = epoch.filter(|e| *e > 0)
                    && let Err(error) = self.off_thread(move |store| store.set_epoch(epoch)).await
                {
                    error!(%error, "cannot keep the primary's number");
                }
                self.outage.over(primary);
                self.status
                    .send_if_modified(|status| !std::mem::replace(&mut status.ready, true));
                if self.config.promote && self.config.candidate {
                    // Once: whoever takes the lease back later means it.
                    self.config.promote = false;
                    let node_id = self.store.node_id();
                    let peers = Arc::clone(&self.peers);
                    let promoter = Promoter::new(true, node_id, peers, self.status.subscribe());
                    task::spawn(async move {
                        if let Err(error) = promoter.promote().await {
                            warn!(%error, "lease.promote: this node does not become primary");
                        }
                    });
                }
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
        if self.store.role() != role {
            self.tell_store(role).await;
        }
    }

    async fn tell_store(&self, role: Role) {
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
        match task::blocking(move || work(&store)).await {
            Ok(done) => done.map_err(|e| e.to_string()),
            Err(_) => Err("a thread of the store panicked".into()),
        }
    }
}

/// Returns when the service says that `primary` is primary no longer.
async fn another_primary(leaser: &dyn Leaser, primary: &PrimaryInfo) {
    loop {
        if leaser.watch_primary().await.is_err() {
            sleep(MAX_RECONNECT_DELAY).await;
        }
        match bounded(leaser.primary_info()).await {
            Ok(now) if now == *primary => {}
            Ok(_) | Err(LeaseError::NoPrimary) => return,
            // The stream may well outlive the service's outage.
            Err(error) => {
                debug!(%error, "cannot ask who is primary");
                sleep(RETRY).await;
            }
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
