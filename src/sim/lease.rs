//! The simulated lease service: a key with a lease, as etcd keeps it, and what can happen on the way.
//!
//! The service's clock is its own: it takes each holder's time as shorter or longer than it is, by a
//! factor of the holder's. A request may be lost, take long, or take effect when whoever sent it has
//! given up; so may its answer. The service can be away, for one node or for all, and forgets nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::Mutex;
use tenure_lease::{Candidate, Lease, LeaseError, Leaser, Placement, PrimaryInfo};
use tokio::sync::{oneshot, watch};
use tokio::time::{sleep, timeout};

use crate::clock;

use super::process;
use super::world::World;

/// How long a call waits for its answer.
const DEADLINE: Duration = Duration::from_secs(4);

/// What is wrong with a service, for tests of the checker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Flaw {
    #[default]
    None,
    /// It gives the lease to whoever asks, whoever has it.
    GivesTwice,
    /// Its clock is much faster than those of the nodes.
    FastClock,
}

/// See the module.
pub(crate) struct Service {
    world: Arc<World>,
    state: Mutex<State>,
    /// Counts changes of the primary.
    version: watch::Sender<u64>,
    /// Counts changes of who can reach it.
    reach: watch::Sender<u64>,
    flaw: Flaw,
}

#[derive(Default)]
struct State {
    revision: u64,
    holder: Option<Holder>,
    cluster_id: Option<String>,
    recorded: Option<Placement>,
    /// By leaser, with the moment when they are forgotten.
    candidates: BTreeMap<u64, (Candidate, Instant)>,
    /// Nodes that cannot reach it.
    away: BTreeSet<usize>,
    slow: bool,
}

struct Holder {
    id: String,
    /// Changes with every holder.
    revision: u64,
    info: PrimaryInfo,
    ttl: Duration,
    expires: Instant,
}

impl Service {
    pub fn new(world: &Arc<World>, flaw: Flaw) -> Arc<Service> {
        Arc::new(Service {
            world: world.clone(),
            state: Mutex::default(),
            version: watch::Sender::new(0),
            reach: watch::Sender::new(0),
            flaw,
        })
    }

    /// Lets leases expire, for ever.
    pub async fn run(self: Arc<Self>) {
        loop {
            sleep(Duration::from_millis(20)).await;
            self.expire(&mut self.state.lock());
        }
    }

    fn expire(&self, state: &mut State) {
        let now = clock::now();
        state.candidates.retain(|_, (_, until)| *until > now);
        if state.holder.as_ref().is_some_and(|h| h.expires <= now) {
            self.world.note("the lease has expired");
            self.vacate(state);
        }
    }

    fn vacate(&self, state: &mut State) {
        state.holder = None;
        state.revision += 1;
        self.version.send_modify(|v| *v += 1);
    }

    /// Cuts a node off from the service, or mends that.
    pub fn set_away(&self, node: usize, away: bool) {
        let mut state = self.state.lock();
        match away {
            true => state.away.insert(node),
            false => state.away.remove(&node),
        };
        self.reach.send_modify(|n| *n += 1);
    }

    /// Whether calls take long.
    pub fn set_slow(&self, slow: bool) {
        self.state.lock().slow = slow;
    }

    /// The service is started anew: leases last for their whole time from now on.
    pub fn restart(&self) {
        if let Some(holder) = &mut self.state.lock().holder {
            holder.expires = holder.expires.max(clock::now() + holder.ttl);
        }
    }

    fn is_away(&self, node: usize) -> bool {
        self.state.lock().away.contains(&node)
    }

    async fn reachable(&self, node: usize) {
        let mut reach = self.reach.subscribe();
        let _ = reach.wait_for(|_| !self.is_away(node)).await;
    }

    fn delay(&self) -> Duration {
        match (self.state.lock().slow, self.world.range(0..30)) {
            (true, n) => self.world.ms(100 * n..200 * n + 1),
            (false, 0) => self.world.ms(100..6_000),
            (false, 1..4) => self.world.ms(10..300),
            (false, _) => self.world.ms(0..5),
        }
    }
}

/// One node's access.
pub(crate) struct SimLeaser {
    pub service: Arc<Service>,
    pub node: usize,
    /// Unlike that of any other leaser.
    pub id: u64,
    pub hostname: String,
    pub url: String,
    pub ttl: Duration,
    /// How long the service takes a second of this node to be, in thousandths of one.
    pub rate: u64,
    /// The version that was last read.
    pub seen: Arc<Mutex<u64>>,
}

impl SimLeaser {
    /// Sends a request to the service; gives its answer, if there is one in time.
    async fn call<T: Send + 'static>(
        &self,
        what: &str,
        effect: impl FnOnce(&Service, &mut State) -> Result<T, LeaseError> + Send + 'static,
    ) -> Result<T, LeaseError> {
        let (tell, told) = oneshot::channel();
        let (service, node) = (self.service.clone(), self.node);
        let line = format!("n{node} lease service: {what}");
        // The network's, not the process's.
        process::spawn_free(async move {
            if service.is_away(node) && service.world.one_in(2) {
                return;
            }
            service.reachable(node).await;
            sleep(service.delay()).await;
            if service.is_away(node) {
                return;
            }
            let done = {
                let mut state = service.state.lock();
                service.expire(&mut state);
                effect(&service, &mut state)
            };
            if let Err(error) = &done {
                service.world.note(format!("{line}: {error}"));
            }
            sleep(service.delay()).await;
            service.reachable(node).await;
            let _ = tell.send(done);
        });
        match timeout(DEADLINE, told).await {
            Ok(Ok(done)) => done,
            _ => Err(LeaseError::transient(what.to_owned(), "no answer in time")),
        }
    }

    fn info(&self) -> PrimaryInfo {
        PrimaryInfo {
            hostname: self.hostname.clone(),
            advertise_url: self.url.clone(),
        }
    }

    /// How long the service lets a lease of this node last.
    fn lasts(&self) -> Duration {
        let rate = match self.service.flaw {
            Flaw::FastClock => 300,
            _ => self.rate,
        };
        self.ttl * u32::try_from(rate).unwrap_or(1000) / 1000
    }

    fn lease(&self, id: String, revision: u64, sent: Instant) -> Box<dyn Lease> {
        Box::new(SimLease {
            leaser: self.clone(),
            id,
            revision,
            renewed_at: Mutex::new(sent),
        })
    }
}

impl Clone for SimLeaser {
    fn clone(&self) -> Self {
        SimLeaser {
            service: self.service.clone(),
            hostname: self.hostname.clone(),
            url: self.url.clone(),
            seen: self.seen.clone(),
            ..*self
        }
    }
}

#[async_trait]
impl Leaser for SimLeaser {
    fn kind(&self) -> &'static str {
        "simulated"
    }

    fn hostname(&self) -> &str {
        &self.hostname
    }

    fn advertise_url(&self) -> &str {
        &self.url
    }

    async fn acquire(&self) -> Result<Box<dyn Lease>, LeaseError> {
        let sent = clock::now();
        let (info, node, ttl, lasts) = (self.info(), self.node, self.ttl, self.lasts());
        let (id, revision) = self
            .call("acquire", move |service, state| {
                if state.holder.is_some() && service.flaw != Flaw::GivesTwice {
                    return Err(LeaseError::PrimaryExists);
                }
                state.revision += 1;
                let revision = state.revision;
                let id = format!("{revision:016X}");
                service.world.note(format!("n{node} gets the lease {id}"));
                state.holder = Some(Holder {
                    id: id.clone(),
                    revision,
                    info,
                    ttl,
                    expires: clock::now() + lasts,
                });
                service.version.send_modify(|v| *v += 1);
                Ok((id, revision))
            })
            .await?;
        Ok(self.lease(id, revision, sent))
    }

    async fn acquire_existing(&self, lease_id: &str) -> Result<Box<dyn Lease>, LeaseError> {
        let sent = clock::now();
        let (info, node, lasts, id) = (self.info(), self.node, self.lasts(), lease_id.to_owned());
        let revision = self
            .call("acquire_existing", move |service, state| {
                let holder = state.holder.as_mut().filter(|h| h.id == id);
                let holder = holder.ok_or(LeaseError::LeaseExpired)?;
                state.revision += 1;
                holder.revision = state.revision;
                holder.info = info;
                holder.expires = clock::now() + lasts;
                service
                    .world
                    .note(format!("n{node} takes the lease {id} over"));
                service.version.send_modify(|v| *v += 1);
                Ok(state.revision)
            })
            .await?;
        Ok(self.lease(lease_id.to_owned(), revision, sent))
    }

    async fn primary_info(&self) -> Result<PrimaryInfo, LeaseError> {
        let seen = self.seen.clone();
        self.call("primary_info", move |service, state| {
            *seen.lock() = *service.version.borrow();
            let holder = state.holder.as_ref();
            holder.map(|h| h.info.clone()).ok_or(LeaseError::NoPrimary)
        })
        .await
    }

    async fn watch_primary(&self) -> Result<(), LeaseError> {
        let seen = *self.seen.lock();
        let mut version = self.service.version.subscribe();
        let _ = version.wait_for(|v| *v != seen).await;
        sleep(self.service.delay()).await;
        self.service.reachable(self.node).await;
        *self.seen.lock() = *version.borrow();
        match self.service.world.one_in(20) {
            true => Err(LeaseError::transient("watching", "the watch broke")),
            false => Ok(()),
        }
    }

    async fn cluster_id(&self) -> Result<Option<String>, LeaseError> {
        self.call("cluster_id", |_, state| Ok(state.cluster_id.clone()))
            .await
    }

    async fn set_cluster_id(&self, id: &str) -> Result<(), LeaseError> {
        let ours = id.to_owned();
        self.call("set_cluster_id", move |_, state| {
            match state.cluster_id.get_or_insert(ours.clone()) {
                theirs if *theirs == ours => Ok(()),
                theirs => Err(LeaseError::ClusterIdMismatch {
                    ours,
                    theirs: theirs.clone(),
                }),
            }
        })
        .await
    }

    async fn announce(&self, candidate: &Candidate) -> Result<Option<Duration>, LeaseError> {
        let (id, candidate, ttl) = (self.id, candidate.clone(), self.ttl);
        self.call("announce", move |_, state| {
            let until = clock::now() + ttl;
            state.candidates.insert(id, (candidate, until));
            Ok(Some(ttl))
        })
        .await
    }

    async fn candidates(&self) -> Result<Vec<Candidate>, LeaseError> {
        self.call("candidates", |_, state| {
            Ok(state.candidates.values().map(|(c, _)| c.clone()).collect())
        })
        .await
    }

    async fn recorded(&self) -> Result<Option<Placement>, LeaseError> {
        self.call("recorded", |_, state| Ok(state.recorded)).await
    }

    async fn close(&self) -> Result<(), LeaseError> {
        let id = self.id;
        self.call("close", move |_, state| {
            state.candidates.remove(&id);
            Ok(())
        })
        .await
    }
}

struct SimLease {
    leaser: SimLeaser,
    id: String,
    revision: u64,
    renewed_at: Mutex<Instant>,
}

#[async_trait]
impl Lease for SimLease {
    fn id(&self) -> &str {
        &self.id
    }

    fn epoch(&self) -> u64 {
        self.revision
    }

    fn ttl(&self) -> Option<Duration> {
        Some(self.leaser.ttl)
    }

    fn renewed_at(&self) -> Instant {
        *self.renewed_at.lock()
    }

    async fn renew(&self) -> Result<(), LeaseError> {
        let sent = clock::now();
        let (id, revision, lasts) = (self.id.clone(), self.revision, self.leaser.lasts());
        self.leaser
            .call("renew", move |service, state| {
                if service.flaw == Flaw::GivesTwice {
                    return Ok(());
                }
                let held = state.holder.as_mut();
                let held = held.filter(|h| h.id == id && h.revision == revision);
                let holder = held.ok_or(LeaseError::LeaseExpired)?;
                holder.expires = holder.expires.max(clock::now() + lasts);
                Ok(())
            })
            .await?;
        let mut renewed_at = self.renewed_at.lock();
        *renewed_at = sent.max(*renewed_at);
        Ok(())
    }

    async fn handoff(&self, _node_id: u64) -> Result<(), LeaseError> {
        Ok(())
    }

    async fn record(&self, placement: Placement) -> Result<(), LeaseError> {
        let (id, revision) = (self.id.clone(), self.revision);
        self.leaser
            .call("record", move |_, state| {
                let held = state.holder.as_ref();
                let held = held.filter(|h| h.id == id && h.revision == revision);
                held.ok_or(LeaseError::LeaseExpired)?;
                state.recorded = Some(placement);
                Ok(())
            })
            .await
    }

    async fn close(&self) -> Result<(), LeaseError> {
        let id = self.id.clone();
        self.leaser
            .call("close lease", move |service, state| {
                // As etcd's revocation: whoever holds it.
                if state.holder.as_ref().is_some_and(|h| h.id == id) {
                    service.world.note(format!("the lease {id} is given up"));
                    service.vacate(state);
                }
                Ok(())
            })
            .await
    }
}
