//! Holding a lease: renew it in time, and stop in time when that fails.
//!
//! A lease is valid for its TTL from *before* the last successful renewal was sent. [`hold`] ends a
//! margin before that moment, whatever the lease service does meanwhile: every renewal has it as its
//! deadline. The clock is the monotonic one.

use std::time::Duration;

use tenure_lease::{Lease, LeaseError};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{debug, warn};

use super::outage::Complaint;

/// How long after a transient error renewing is tried again; with a short TTL a tenth of it.
const RETRY: Duration = Duration::from_secs(1);

/// Why a node no longer holds its lease.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The node stops; the lease is still its own.
    Shutdown,
    /// The lease has expired, or will before it can be used.
    Lost,
}

/// Holds `lease` until the node stops or the lease can no longer be relied upon; `renewed` is told
/// each new moment at which that will be, and says whether that is still of use. A lease without a TTL is held until the node stops.
pub(super) async fn hold(
    lease: &dyn Lease,
    stop: &mut watch::Receiver<bool>,
    mut renewed: impl FnMut(std::time::Instant) -> bool,
) -> End {
    let Some(ttl) = lease.ttl() else {
        super::stopped(stop).await;
        return End::Shutdown;
    };
    let mut retry = None;
    let mut complaint = Complaint::default();
    loop {
        let end = reliable_until(lease.renewed_at(), ttl);
        let deadline = Instant::from_std(end);
        let half = Instant::from_std(lease.renewed_at()) + ttl / 2;
        let next = retry.take().unwrap_or(half).min(deadline);
        tokio::select! {
            biased;
            () = super::stopped(stop) => return End::Shutdown,
            () = sleep_until(next) => {}
        }
        // After a pause of the whole process the deadline has passed, whatever was slept for.
        if Instant::now() >= deadline {
            return End::Lost;
        }
        match timeout_at(deadline, lease.renew()).await {
            // An answer that was there when the process woke up may have come too late.
            Ok(Ok(())) if renewed(reliable_until(lease.renewed_at(), ttl)) => {}
            Ok(Ok(())) => return End::Lost,
            Ok(Err(LeaseError::LeaseExpired)) | Err(_) => return End::Lost,
            Ok(Err(error)) => {
                match complaint.is_due("renewal") {
                    true => {
                        warn!(%error, "the lease could not be renewed; trying again until it is over")
                    }
                    false => debug!(%error, "the lease could not be renewed"),
                }
                retry = Some(Instant::now() + RETRY.min(ttl / 10));
            }
        }
    }
}

/// When a lease that was renewed then is no longer relied upon: a margin before its end.
pub(super) fn reliable_until(renewed_at: std::time::Instant, ttl: Duration) -> std::time::Instant {
    renewed_at + ttl - margin(ttl)
}

/// How long before its end a lease is no longer relied upon.
fn margin(ttl: Duration) -> Duration {
    if ttl < Duration::from_secs(10) {
        ttl / 10
    } else {
        Duration::from_secs(1)
    }
}
