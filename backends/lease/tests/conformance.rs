//! The conformance suite, tested: a service in memory passes it, and one with any of a number of
//! flaws does not.

use std::collections::{BTreeMap, HashMap};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::FutureExt;
use tenure_lease::conformance::{self, Fault, Service};
use tenure_lease::{Candidate, Lease, LeaseError, Leaser, Placement, PrimaryInfo};
use tokio::sync::watch;

const TTL: Duration = Duration::from_secs(1);
const CALL_TIMEOUT: Duration = Duration::from_millis(300);

/// What is wrong with a service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flaw {
    None,
    TwoHolders,
    EpochStandsStill,
    ValidFromTheAnswer,
    RenewalMovesNothing,
    NeverExpires,
    ExpiresEarly,
    RenewsTheDead,
    WatcherSleeps,
    WatcherSpins,
    WatcherMissesWhatWasBefore,
    HandoffLeavesAGap,
    HandoffKeepsTheOldName,
    TakesOverAnything,
    OldHolderReleasesTheNew,
    ClusterIdIsOverwritten,
    OutageIsFatal,
    OutageHangs,
    StallIsFatal,
    StallHangs,
    StallDeafens,
    SlowIsTooSlow,
    ForgetsCandidates,
    KeepsOldCandidates,
    CandidatesNeverExpire,
    CandidatesExpireAnyway,
    CandidatesCannotWithdraw,
    AnybodyRecords,
    RecordGoesWithTheLease,
}

#[derive(Default)]
struct Key {
    holder: Option<(String, PrimaryInfo, Instant)>,
    epoch: u64,
    cluster_id: Option<String>,
    leases: u64,
    /// By leaser, with the end of their time.
    candidates: BTreeMap<u64, (Candidate, Instant)>,
    recorded: Option<Placement>,
    /// Counts the changes of the holder.
    changes: watch::Sender<u64>,
}

struct Memory {
    flaw: Flaw,
    keys: Mutex<HashMap<String, Key>>,
    fault: watch::Sender<Fault>,
}

impl Memory {
    fn new(flaw: Flaw) -> Arc<Self> {
        Arc::new(Self {
            flaw,
            keys: Mutex::default(),
            fault: watch::Sender::new(Fault::None),
        })
    }
}

struct Shared(Arc<Memory>);

#[async_trait]
impl Service for Shared {
    async fn leaser(&self, cluster: &str, hostname: &str) -> Box<dyn Leaser> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Box::new(Node {
            id: NEXT.fetch_add(1, Ordering::SeqCst),
            memory: self.0.clone(),
            key: cluster.to_owned(),
            info: PrimaryInfo {
                hostname: hostname.to_owned(),
                advertise_url: format!("http://{hostname}:20202"),
            },
            seen: Arc::new(Mutex::new(0)),
        })
    }

    fn expires_within(&self) -> Duration {
        TTL * 2
    }

    fn call_timeout(&self) -> Duration {
        CALL_TIMEOUT
    }

    async fn fault(&self, fault: Fault) {
        self.0.fault.send_replace(fault);
    }

    async fn stop(&self) {
        self.0.fault.send_replace(Fault::Refuse);
    }

    async fn start(&self) {
        self.0.fault.send_replace(Fault::None);
    }
}

#[derive(Clone)]
struct Node {
    /// Tells leasers of the same key apart.
    id: u64,
    memory: Arc<Memory>,
    key: String,
    info: PrimaryInfo,
    /// The change up to which this node knows the primary.
    seen: Arc<Mutex<u64>>,
}

impl Node {
    fn flaw(&self) -> Flaw {
        self.memory.flaw
    }

    /// A request's way to the service and back.
    async fn reach(&self) -> Result<(), LeaseError> {
        tokio::time::sleep(Duration::from_millis(1)).await;
        let fault = *self.memory.fault.borrow();
        match (fault, self.flaw()) {
            (Fault::None, _) => return Ok(()),
            (Fault::Delay(_), Flaw::SlowIsTooSlow) => {}
            (Fault::Delay(delay), _) => {
                tokio::time::sleep(2 * delay).await;
                return Ok(());
            }
            (Fault::Refuse, Flaw::OutageHangs) | (Fault::Stall, Flaw::StallHangs) => {
                std::future::pending().await
            }
            (Fault::Refuse, Flaw::OutageIsFatal) | (Fault::Stall, Flaw::StallIsFatal) => {
                return Err(LeaseError::fatal("asking", "down"));
            }
            (Fault::Stall, _) => tokio::time::sleep(CALL_TIMEOUT / 2).await,
            (Fault::Refuse | Fault::Cut, _) => {}
        }
        Err(LeaseError::transient("asking", "down"))
    }

    fn with_key<T>(&self, f: impl FnOnce(&mut Key) -> T) -> T {
        let mut keys = self.memory.keys.lock().unwrap();
        let key = keys.entry(self.key.clone()).or_default();
        let lives = |until: Instant| match self.flaw() {
            Flaw::NeverExpires => true,
            Flaw::ExpiresEarly => Instant::now() + TTL / 4 < until,
            _ => Instant::now() < until,
        };
        key.holder.take_if(|(_, _, until)| !lives(*until));
        f(key)
    }

    fn lease(&self, id: String, epoch: u64, sent: Instant) -> Box<dyn Lease> {
        self.with_key(|key| key.changes.send_modify(|n| *n += 1));
        Box::new(Held {
            node: self.clone(),
            id,
            epoch,
            renewed: Mutex::new(sent),
        })
    }
}

#[async_trait]
impl Leaser for Node {
    fn kind(&self) -> &'static str {
        "memory"
    }

    fn hostname(&self) -> &str {
        &self.info.hostname
    }

    fn advertise_url(&self) -> &str {
        &self.info.advertise_url
    }

    async fn acquire(&self) -> Result<Box<dyn Lease>, LeaseError> {
        let sent = Instant::now();
        self.reach().await?;
        let (id, epoch) = self.with_key(|key| {
            if key.holder.is_some() && self.flaw() != Flaw::TwoHolders {
                return Err(LeaseError::PrimaryExists);
            }
            key.leases += 1;
            if self.flaw() != Flaw::EpochStandsStill {
                key.epoch += 1;
            }
            let id = format!("{}/{}", self.key, key.leases);
            key.holder = Some((id.clone(), self.info.clone(), Instant::now() + TTL));
            Ok((id, key.epoch))
        })?;
        Ok(self.lease(id, epoch, sent))
    }

    async fn acquire_existing(&self, lease_id: &str) -> Result<Box<dyn Lease>, LeaseError> {
        let sent = Instant::now();
        self.reach().await?;
        let epoch = self.with_key(|key| {
            key.epoch += 1;
            match &mut key.holder {
                Some((id, info, until)) if id == lease_id => {
                    if self.flaw() != Flaw::HandoffKeepsTheOldName {
                        *info = self.info.clone();
                    }
                    *until = Instant::now() + TTL;
                }
                holder if self.flaw() == Flaw::TakesOverAnything => {
                    let until = Instant::now() + TTL;
                    *holder = Some((lease_id.to_owned(), self.info.clone(), until));
                }
                _ => return Err(LeaseError::LeaseExpired),
            }
            Ok(key.epoch)
        })?;
        Ok(self.lease(lease_id.to_owned(), epoch, sent))
    }

    async fn primary_info(&self) -> Result<PrimaryInfo, LeaseError> {
        self.reach().await?;
        self.with_key(|key| {
            *self.seen.lock().unwrap() = *key.changes.borrow();
            match &key.holder {
                Some((_, info, _)) => Ok(info.clone()),
                None => Err(LeaseError::NoPrimary),
            }
        })
    }

    async fn watch_primary(&self) -> Result<(), LeaseError> {
        self.reach().await?;
        let mut changes = self.with_key(|key| key.changes.subscribe());
        let seen = match self.flaw() {
            Flaw::WatcherSleeps => std::future::pending().await,
            Flaw::WatcherSpins => return Ok(()),
            Flaw::WatcherMissesWhatWasBefore => *changes.borrow(),
            _ => *self.seen.lock().unwrap(),
        };
        let mut fault = self.memory.fault.subscribe();
        let heard = tokio::select! {
            now = changes.wait_for(|n| *n > seen) => Some(*now.expect("the key lives")),
            _ = fault.wait_for(|fault| *fault == Fault::Stall) => None,
        };
        let now = match heard {
            Some(now) => now,
            None if self.flaw() == Flaw::StallDeafens => std::future::pending().await,
            None => return Err(LeaseError::transient("watching", "down")),
        };
        *self.seen.lock().unwrap() = now;
        Ok(())
    }

    async fn cluster_id(&self) -> Result<Option<String>, LeaseError> {
        self.reach().await?;
        Ok(self.with_key(|key| key.cluster_id.clone()))
    }

    async fn set_cluster_id(&self, id: &str) -> Result<(), LeaseError> {
        self.reach().await?;
        self.with_key(|key| match &key.cluster_id {
            Some(theirs) if theirs != id && self.flaw() != Flaw::ClusterIdIsOverwritten => {
                Err(LeaseError::ClusterIdMismatch {
                    ours: id.to_owned(),
                    theirs: theirs.clone(),
                })
            }
            _ => {
                key.cluster_id = Some(id.to_owned());
                Ok(())
            }
        })
    }

    async fn announce(&self, candidate: &Candidate) -> Result<Option<Duration>, LeaseError> {
        self.reach().await?;
        let flaw = self.flaw();
        self.with_key(|key| {
            let until = Instant::now() + TTL;
            match key.candidates.get_mut(&self.id) {
                Some((_, old)) if flaw == Flaw::KeepsOldCandidates => *old = until,
                Some((said, _)) if flaw == Flaw::CandidatesExpireAnyway => {
                    *said = candidate.clone()
                }
                _ if flaw == Flaw::ForgetsCandidates => {}
                _ => {
                    key.candidates.insert(self.id, (candidate.clone(), until));
                }
            }
        });
        Ok(Some(TTL))
    }

    async fn candidates(&self) -> Result<Vec<Candidate>, LeaseError> {
        self.reach().await?;
        let for_ever = self.flaw() == Flaw::CandidatesNeverExpire;
        Ok(self.with_key(|key| {
            key.candidates
                .retain(|_, (_, until)| for_ever || Instant::now() < *until);
            key.candidates.values().map(|(c, _)| c.clone()).collect()
        }))
    }

    async fn recorded(&self) -> Result<Option<Placement>, LeaseError> {
        self.reach().await?;
        Ok(self.with_key(|key| key.recorded))
    }

    async fn close(&self) -> Result<(), LeaseError> {
        self.reach().await?;
        if self.flaw() != Flaw::CandidatesCannotWithdraw {
            self.with_key(|key| key.candidates.remove(&self.id));
        }
        Ok(())
    }
}

struct Held {
    node: Node,
    id: String,
    epoch: u64,
    renewed: Mutex<Instant>,
}

#[async_trait]
impl Lease for Held {
    fn id(&self) -> &str {
        &self.id
    }

    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn ttl(&self) -> Option<Duration> {
        Some(TTL)
    }

    fn renewed_at(&self) -> Instant {
        *self.renewed.lock().unwrap()
    }

    async fn renew(&self) -> Result<(), LeaseError> {
        let sent = Instant::now();
        self.node.reach().await?;
        let flaw = self.node.flaw();
        self.node.with_key(|key| match &mut key.holder {
            Some((id, _, until)) if *id == self.id => {
                *until = Instant::now() + TTL;
                Ok(())
            }
            _ if flaw == Flaw::RenewsTheDead => Ok(()),
            _ => Err(LeaseError::LeaseExpired),
        })?;
        *self.renewed.lock().unwrap() = match flaw {
            Flaw::ValidFromTheAnswer => Instant::now() + TTL,
            Flaw::RenewalMovesNothing => return Ok(()),
            _ => sent,
        };
        Ok(())
    }

    async fn handoff(&self, _node_id: u64) -> Result<(), LeaseError> {
        self.node.reach().await?;
        if self.node.flaw() == Flaw::HandoffLeavesAGap {
            let held = self.node.with_key(|key| key.holder.take());
            tokio::time::sleep(Duration::from_millis(20)).await;
            self.node.with_key(|key| key.holder = held);
        }
        Ok(())
    }

    async fn record(&self, placement: Placement) -> Result<(), LeaseError> {
        self.node.reach().await?;
        let any = self.node.flaw() == Flaw::AnybodyRecords;
        self.node.with_key(|key| match &key.holder {
            _ if any => {
                key.recorded = Some(placement);
                Ok(())
            }
            Some((id, _, _)) if *id == self.id => {
                key.recorded = Some(placement);
                Ok(())
            }
            _ => Err(LeaseError::LeaseExpired),
        })
    }

    async fn close(&self) -> Result<(), LeaseError> {
        self.node.reach().await?;
        let any = self.node.flaw() == Flaw::OldHolderReleasesTheNew;
        let forgets = self.node.flaw() == Flaw::RecordGoesWithTheLease;
        self.node.with_key(|key| {
            key.recorded.take_if(|_| forgets);
            if key
                .holder
                .take_if(|(id, ..)| any || *id == self.id)
                .is_some()
            {
                key.changes.send_modify(|n| *n += 1);
            }
        });
        Ok(())
    }
}

/// Why the suite fails a service with this flaw; `None` if it does not.
async fn failure(flaw: Flaw) -> Option<String> {
    let service = Shared(Memory::new(flaw));
    let suite = AssertUnwindSafe(conformance::every_check(&service));
    let panic = suite.catch_unwind().await.err()?;
    let text = match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(other) => (*other.downcast::<&str>().expect("panics say why")).to_owned(),
    };
    Some(text)
}

#[tokio::test]
async fn a_service_that_keeps_the_contract_passes() {
    conformance::every_check(&Shared(Memory::new(Flaw::None))).await;
}

#[tokio::test]
async fn every_flaw_is_found() {
    let flaws = [
        (Flaw::TwoHolders, "two nodes have acquired"),
        (Flaw::EpochStandsStill, "the epoch has not grown"),
        (
            Flaw::ValidFromTheAnswer,
            "valid from a moment in the future",
        ),
        (Flaw::RenewalMovesNothing, "no longer valid than before"),
        (Flaw::NeverExpires, "has not expired"),
        (Flaw::ExpiresEarly, "expired before its TTL"),
        (Flaw::RenewsTheDead, "renewed what was given up"),
        (Flaw::WatcherSleeps, "was not told"),
        (Flaw::WatcherSpins, "again and again"),
        (Flaw::WatcherMissesWhatWasBefore, "was not told"),
        (Flaw::HandoffLeavesAGap, "while it was handed over"),
        (Flaw::HandoffKeepsTheOldName, "does not name its new holder"),
        (Flaw::TakesOverAnything, "took over"),
        (Flaw::OldHolderReleasesTheNew, "disturbed the new one"),
        (Flaw::ClusterIdIsOverwritten, "different IDs were set"),
        (Flaw::OutageIsFatal, "failed for good"),
        (Flaw::OutageHangs, "took longer than"),
        (Flaw::StallIsFatal, "failed for good"),
        (Flaw::StallHangs, "took longer than"),
        (Flaw::StallDeafens, "was not told after the fault"),
        (Flaw::SlowIsTooSlow, "calling a slow service"),
        (Flaw::ForgetsCandidates, "announced, but not seen"),
        (Flaw::KeepsOldCandidates, "announced last"),
        (Flaw::CandidatesNeverExpire, "not announced for long"),
        (
            Flaw::CandidatesExpireAnyway,
            "though it was announced in time",
        ),
        (Flaw::CandidatesCannotWithdraw, "seen, though withdrawn"),
        (Flaw::AnybodyRecords, "recorded with"),
        (Flaw::RecordGoesWithTheLease, "changed or gone"),
    ];
    let runs = flaws.map(|(flaw, why)| async move { (flaw, why, failure(flaw).await) });
    for (flaw, why, failure) in futures_util::future::join_all(runs).await {
        let Some(failure) = failure else {
            panic!("the suite has not found the flaw {flaw:?}");
        };
        assert!(failure.contains(why), "{flaw:?} was found as: {failure}");
    }
}
