//! Being primary: from the lease to its end.
//!
//! Taking office: the cluster's ID is agreed on, this primary's number is on disk, the store knows
//! when the lease is over, and only then do applications write. Leaving it: the store's role first,
//! then the status, so that streams send the rest and end; then the lease is given up, unless it was
//! handed over: from the moment when it may have been sent, this node neither renews nor closes it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tenure_lease::{Lease, LeaseError, Placement, PrimaryInfo};
use tokio::sync::{oneshot, watch};
use tokio::time::{sleep, timeout};
use tracing::{debug, error, info, warn};

use crate::clock;
use crate::store::Role;

use super::command::{CommandError, What};
use super::election::{Standing, placement};
use super::watchdog::Watchdog;
use super::{Node, Status, bounded, hold, new_cluster_id, outage};

/// How long connected replicas may take to take the last transactions before the lease is given up.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How a time in office ends.
enum End {
    Shutdown,
    Lost,
    /// A replica has the lease, or may have.
    HandedOver,
    /// Somebody asked for it, and waits.
    Demoted(oneshot::Sender<Result<(), CommandError>>),
}

/// Why a lease was not handed over.
enum Failure {
    /// Nothing of it has left: go on as primary.
    GoOn(String),
    /// The replica may have it.
    Unknown(String),
}

impl Node {
    /// Is primary for as long as the lease lasts. Gives the time to wait before the next round.
    pub(super) async fn as_primary(
        &mut self,
        lease: Box<dyn Lease>,
        stop: &mut watch::Receiver<bool>,
    ) -> Duration {
        if let Err(problem) = self.take_office(lease.as_ref()).await {
            if self.complaint.is_due(&problem) {
                error!("this node cannot be primary: {problem}");
            }
            self.no_primary().await;
            give_up(lease.as_ref()).await;
            return super::MAX_RECONNECT_DELAY;
        }
        let handed_over = AtomicBool::new(false);
        let end = self.reign(lease.as_ref(), stop, &handed_over).await;
        match &end {
            End::Shutdown => {}
            End::Lost => warn!("the lease is lost: this node is no longer the primary"),
            End::HandedOver => {
                info!("the lease is handed over: this node is no longer the primary")
            }
            End::Demoted(_) => info!("this node was asked to be primary no longer"),
        }
        // In this order: no more commits, streams end, and only then the lease goes.
        let handed_over = handed_over.load(Ordering::Acquire);
        self.handed_away = handed_over;
        let in_order = matches!(end, End::Shutdown | End::Demoted(_)) && !handed_over;
        if in_order {
            // Commits that were begun are still acknowledged, and sent.
            let paused = self.off_thread(|store| store.pause_writes()).await;
            if let Err(error) = paused {
                warn!(%error, "commits are cut off");
            }
        }
        self.no_primary().await;
        self.commands.refuse_all();
        if in_order {
            self.await_last_words().await;
            self.record(lease.as_ref()).await;
        }
        if !handed_over {
            give_up(lease.as_ref()).await;
        }
        if let End::Demoted(done) = end {
            self.not_before = Some(clock::now() + self.config.demote_delay);
            let _ = done.send(Ok(()));
        }
        Duration::ZERO
    }

    async fn take_office(&mut self, lease: &dyn Lease) -> Result<(), String> {
        self.agree_on_cluster().await?;
        self.off_thread(|store| store.prepare_writes()).await?;
        let end = lease
            .ttl()
            .map(|ttl| hold::reliable_until(lease.renewed_at(), ttl));
        let mut epoch = self.store.epoch();
        if end.is_some() {
            // Greater than all before it: by the service, or if that began anew, by what this node
            // has seen.
            epoch = lease.epoch().max(epoch.saturating_add(1));
            self.off_thread(move |store| store.set_epoch(epoch)).await?;
        }
        self.store.set_lease_end(end);
        self.store.resume_writes();
        self.set_role(Role::Primary).await;
        self.status.send_replace(Status {
            is_primary: true,
            primary: Some(PrimaryInfo {
                hostname: self.leaser.hostname().to_owned(),
                advertise_url: self.leaser.advertise_url().to_owned(),
            }),
            ready: true,
        });
        self.election.over(Standing::Primary);
        self.complaint = outage::Complaint::default();
        self.outage.forget();
        info!(
            lease = self.leaser.kind(),
            epoch, "this node is the primary"
        );
        Ok(())
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

    async fn reign(
        &self,
        lease: &dyn Lease,
        stop: &mut watch::Receiver<bool>,
        handed_over: &AtomicBool,
    ) -> End {
        let watchdog = match lease.ttl() {
            None => None,
            Some(ttl) => {
                let end = hold::reliable_until(lease.renewed_at(), ttl);
                match Watchdog::start(end, self.status.clone()) {
                    Ok(watchdog) => Some(watchdog),
                    Err(e) => {
                        error!("cannot start a thread that watches the lease: {e}");
                        return End::Lost;
                    }
                }
            }
        };
        let renewals = watch::Sender::new(());
        let store = self.store.clone();
        let renewed = |end| {
            store.set_lease_end(Some(end));
            renewals.send_replace(());
            watchdog
                .as_ref()
                .is_none_or(|watchdog| watchdog.extend(end))
        };
        let recording = self.keep_recorded(lease, renewals.subscribe());
        tokio::select! {
            biased;
            end = hold::hold(lease, stop, renewed) => match end {
                hold::End::Shutdown => End::Shutdown,
                hold::End::Lost => End::Lost,
            },
            end = self.obey(lease, handed_over) => end,
            () = recording => End::Lost,
        }
    }

    /// Does what it is asked to until that ends its time in office.
    async fn obey(&self, lease: &dyn Lease, handed_over: &AtomicBool) -> End {
        loop {
            let command = self.commands.next().await;
            let node_id = match command.what {
                What::Demote if lease.ttl().is_none() => {
                    let text = "a static primary cannot give its lease up: it is configured";
                    let _ = command.done.send(Err(CommandError::Failed(text.into())));
                    continue;
                }
                What::Demote => return End::Demoted(command.done),
                What::Handoff(node_id) => node_id,
            };
            let (answer, end) = match self.hand_over(lease, node_id, handed_over).await {
                Ok(()) => (Ok(()), true),
                Err(Failure::GoOn(text)) => {
                    self.store.resume_writes();
                    warn!("the lease was not handed over: {text}");
                    (Err(CommandError::Failed(text)), false)
                }
                Err(Failure::Unknown(text)) => {
                    warn!("the handoff is in doubt, this node gives up to be safe: {text}");
                    (Err(CommandError::Failed(text)), true)
                }
            };
            // Whoever asked may be gone.
            let _ = command.done.send(answer);
            if end {
                return End::HandedOver;
            }
        }
    }

    /// Hands the lease to a connected replica. While this node takes no writes, as little as
    /// possible is done.
    async fn hand_over(
        &self,
        lease: &dyn Lease,
        node_id: u64,
        handed_over: &AtomicBool,
    ) -> Result<(), Failure> {
        let go_on = |e: &dyn std::fmt::Display| Failure::GoOn(e.to_string());
        if lease.ttl().is_none() {
            // The backend says why not.
            lease.handoff(node_id).await.map_err(|e| go_on(&e))?;
        }
        self.replicas
            .catch_up(node_id)
            .await
            .map_err(|e| go_on(&e))?;
        // The new holder gets it fresh.
        bounded(lease.renew()).await.map_err(|e| go_on(&e))?;
        self.record(lease).await;
        self.off_thread(|store| store.pause_writes())
            .await
            .map_err(|e| go_on(&e))?;
        bounded(lease.handoff(node_id))
            .await
            .map_err(|e| go_on(&e))?;
        handed_over.store(true, Ordering::Release);
        match self.replicas.hand_over(node_id, lease.id()).await {
            Ok(()) => Ok(()),
            Err(e) if e.nothing_sent() => {
                handed_over.store(false, Ordering::Release);
                Err(go_on(&e))
            }
            Err(e) => Err(Failure::Unknown(e.to_string())),
        }
    }

    /// Writes down how far this primary is: at once when it gets its first data, and when the lease
    /// is renewed. Never ends.
    async fn keep_recorded(&self, lease: &dyn Lease, mut renewals: watch::Receiver<()>) {
        let mut changes = self.store.subscribe();
        let mut recorded = Placement::default();
        loop {
            let now = placement(&self.store).await;
            if now != recorded && self.record(lease).await {
                recorded = now;
            }
            tokio::select! {
                biased;
                _ = changes.changed(), if recorded.transactions == 0 => {}
                renewed = renewals.changed() => if renewed.is_err() {
                    return std::future::pending().await;
                },
            }
        }
    }

    async fn record(&self, lease: &dyn Lease) -> bool {
        let placement = placement(&self.store).await;
        let recorded = bounded(lease.record(placement)).await;
        if let Err(error) = &recorded {
            debug!(%error, "this primary's placement could not be recorded");
        }
        recorded.is_ok()
    }

    /// Waits for the streams to have sent everything and ended.
    async fn await_last_words(&self) {
        let ended = async {
            while self.stats.streams() > 0 {
                sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(LAST_WORDS, ended).await.is_err() {
            warn!("not every replica has taken the last transactions in time");
        }
    }
}

/// Gives a lease up; if that fails, it expires by itself.
pub(super) async fn give_up(lease: &dyn Lease) {
    if let Err(error) = bounded(lease.close()).await {
        debug!(%error, "giving up the lease failed; it expires by itself");
    }
}
