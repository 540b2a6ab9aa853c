//! The static lease: which node is primary is written in the configuration, for ever.
//!
//! There is no service, and so nothing that could keep two nodes from being configured as primary:
//! whoever writes the configuration sees to it that there is one. The primary's lease never
//! expires, has epoch 0, and cannot be handed over. The cluster ID has no place but the nodes' own
//! data directories.

use std::future::pending;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tenure_lease::{Candidate, Lease, LeaseError, Leaser, Placement, PrimaryInfo};

/// What handing over and taking over answer.
const NO_HANDOFF: &str = "a static lease cannot be handed over or taken over: the primary is the \
                          node that is configured with lease.candidate true";

/// The static backend: the primary as configured.
#[derive(Clone, Debug)]
pub struct StaticLeaser {
    candidate: bool,
    primary: PrimaryInfo,
}

impl StaticLeaser {
    /// `candidate`: this node is the primary. `hostname` and `advertise_url` are the primary's,
    /// whichever node it is.
    pub fn new(candidate: bool, hostname: String, advertise_url: String) -> Self {
        Self {
            candidate,
            primary: PrimaryInfo {
                hostname,
                advertise_url,
            },
        }
    }
}

#[async_trait]
impl Leaser for StaticLeaser {
    fn kind(&self) -> &'static str {
        "static"
    }

    fn hostname(&self) -> &str {
        &self.primary.hostname
    }

    fn advertise_url(&self) -> &str {
        &self.primary.advertise_url
    }

    async fn acquire(&self) -> Result<Box<dyn Lease>, LeaseError> {
        if self.candidate {
            Ok(Box::new(StaticLease {
                since: Instant::now(),
            }))
        } else {
            Err(LeaseError::PrimaryExists)
        }
    }

    async fn acquire_existing(&self, _lease_id: &str) -> Result<Box<dyn Lease>, LeaseError> {
        Err(LeaseError::Unsupported(NO_HANDOFF))
    }

    async fn primary_info(&self) -> Result<PrimaryInfo, LeaseError> {
        if self.candidate {
            Err(LeaseError::NoPrimary)
        } else {
            Ok(self.primary.clone())
        }
    }

    async fn watch_primary(&self) -> Result<(), LeaseError> {
        pending().await
    }

    async fn cluster_id(&self) -> Result<Option<String>, LeaseError> {
        Ok(None)
    }

    async fn set_cluster_id(&self, _id: &str) -> Result<(), LeaseError> {
        Ok(())
    }

    async fn announce(&self, _candidate: &Candidate) -> Result<Option<Duration>, LeaseError> {
        Ok(None)
    }

    async fn candidates(&self) -> Result<Vec<Candidate>, LeaseError> {
        Ok(Vec::new())
    }

    async fn recorded(&self) -> Result<Option<Placement>, LeaseError> {
        Ok(None)
    }

    async fn close(&self) -> Result<(), LeaseError> {
        Ok(())
    }
}

/// The static primary's right: it lasts as long as the process.
struct StaticLease {
    since: Instant,
}

#[async_trait]
impl Lease for StaticLease {
    fn id(&self) -> &str {
        "static"
    }

    fn epoch(&self) -> u64 {
        0
    }

    fn ttl(&self) -> Option<Duration> {
        None
    }

    fn renewed_at(&self) -> Instant {
        self.since
    }

    async fn renew(&self) -> Result<(), LeaseError> {
        Ok(())
    }

    async fn handoff(&self, _node_id: u64) -> Result<(), LeaseError> {
        Err(LeaseError::Unsupported(NO_HANDOFF))
    }

    async fn record(&self, _placement: Placement) -> Result<(), LeaseError> {
        Ok(())
    }

    async fn close(&self) -> Result<(), LeaseError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tenure_lease::conformance::{self, Fault, Service};

    use super::*;

    /// A configuration that makes `node0` the primary.
    struct Configured;

    #[async_trait]
    impl Service for Configured {
        async fn leaser(&self, _cluster: &str, hostname: &str) -> Box<dyn Leaser> {
            let url = "http://node0:20202".into();
            Box::new(StaticLeaser::new(hostname == "node0", "node0".into(), url))
        }

        fn expires_within(&self) -> Duration {
            Duration::MAX
        }

        fn call_timeout(&self) -> Duration {
            Duration::ZERO
        }

        async fn fault(&self, _fault: Fault) {}

        async fn stop(&self) {}

        async fn start(&self) {}
    }

    /// The parts of the suite that need no service.
    #[tokio::test]
    async fn it_conforms_as_far_as_it_goes() {
        conformance::one_winner(&Configured).await;
        conformance::renewal(&Configured).await;
    }

    fn leaser(candidate: bool) -> StaticLeaser {
        StaticLeaser::new(candidate, "a".into(), "http://a:20202".into())
    }

    #[tokio::test]
    async fn the_candidate_is_primary_for_ever() {
        let leaser = leaser(true);
        assert!(matches!(
            leaser.primary_info().await,
            Err(LeaseError::NoPrimary)
        ));
        let lease = leaser.acquire().await.unwrap();
        assert_eq!((lease.epoch(), lease.ttl()), (0, None));
        lease.renew().await.unwrap();
        lease.close().await.unwrap();
        leaser.close().await.unwrap();
    }

    #[tokio::test]
    async fn the_others_follow_it() {
        let leaser = leaser(false);
        assert!(matches!(
            leaser.acquire().await,
            Err(LeaseError::PrimaryExists)
        ));
        let info = leaser.primary_info().await.unwrap();
        assert_eq!(info.hostname, "a");
        assert_eq!(info.advertise_url, "http://a:20202");
        assert_eq!(leaser.kind(), "static");
    }

    #[tokio::test]
    async fn handing_over_is_an_error_that_says_why() {
        let leaser = leaser(true);
        let lease = leaser.acquire().await.unwrap();
        let err = lease.handoff(1).await.unwrap_err();
        assert!(err.to_string().contains("static lease"), "{err}");
        let err = leaser.acquire_existing("static").await.err().unwrap();
        assert!(matches!(err, LeaseError::Unsupported(_)));
    }

    #[tokio::test]
    async fn the_primary_never_changes_and_no_cluster_id_is_kept() {
        let leaser = leaser(false);
        let wait = tokio::time::timeout(Duration::from_millis(50), leaser.watch_primary());
        assert!(wait.await.is_err());
        leaser.set_cluster_id("LFSC0123456789ABCDEF").await.unwrap();
        assert_eq!(leaser.cluster_id().await.unwrap(), None);
    }
}
