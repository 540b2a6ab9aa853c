//! Who is primary: the contract between a node and the service that decides it.
//!
//! One node at a time may be primary. A [`Leaser`] is one node's access to the service that
//! decides which; a [`Lease`] is the right to be primary, for as long as it lasts. The node knows
//! these traits and never which service is behind them.
//!
//! What every backend keeps, and `conformance` (feature of the same name) checks against the real
//! service:
//!
//! - At most one lease is valid at any time. A lease is valid for its TTL counted from a moment
//!   *before* the request that renewed it was sent, by the monotonic clock ([`Lease::renewed_at`]);
//!   what the service thinks can only be later than that.
//! - [`Lease::epoch`] grows with every new holder: it is the fencing token.
//! - No call waits for ever: each ends within the backend's own time-out, with
//!   [`LeaseError::Transient`] where the service did not answer, and works again once it is back.
//!   [`Leaser::watch_primary`] alone may wait as long as nothing changes.
//! - Dropping a lease or a leaser gives nothing up: the service lets go of it when its TTL is over.
//!   Only `close` releases at once.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

#[cfg(feature = "conformance")]
pub mod conformance;

/// A cause that an error carries along.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// How the primary is found. Stored in the service as JSON:
/// `{"hostname":"…","advertise-url":"…"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrimaryInfo {
    /// The primary's host name, as applications see it in the `.primary` file.
    pub hostname: String,
    /// The base URL of the primary's HTTP server, as other nodes reach it.
    #[serde(rename = "advertise-url")]
    pub advertise_url: String,
}

/// How far a node's data reaches: of two nodes the greater one is the better primary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Placement {
    /// The number of the last primary whose transactions it has; it grows with every primary.
    pub epoch: u64,
    /// The sum of the TXIDs of its databases; 0: it has no data.
    pub transactions: u64,
}

/// A node that may become primary, as it makes itself known to the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// The node's ID: 16 upper-case hexadecimal digits, new at every start.
    #[serde(rename = "node-id")]
    pub node_id: String,
    /// Its host name.
    pub hostname: String,
    /// How far its data reaches.
    pub placement: Placement,
    /// Whether that is its last word: it follows no primary, so its data does not grow.
    pub settled: bool,
}

/// Why a call to the lease service did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// Another node holds the lease.
    #[error("another node is primary")]
    PrimaryExists,
    /// No node holds the lease.
    #[error("no node is primary")]
    NoPrimary,
    /// The lease has expired, was released, or never was: it gives no right to anything.
    #[error("the lease has expired or does not exist")]
    LeaseExpired,
    /// The backend has no such operation, and never will have.
    #[error("the lease backend does not support this: {0}")]
    Unsupported(&'static str),
    /// The service belongs to another cluster.
    #[error(
        "the cluster ID of this node is {ours}, that of the lease service {theirs}: \
         check that the lease key and the data directory belong to the same cluster"
    )]
    ClusterIdMismatch {
        /// The ID that was to be set.
        ours: String,
        /// The ID that the service has.
        theirs: String,
    },
    /// The service did not answer, or not in time, or could not serve the request just now. What
    /// was asked for may or may not have happened. Trying again later is right.
    #[error("{action} failed for now: {source}")]
    Transient {
        /// What was attempted, and on what: "renewing session … at http://…".
        action: String,
        /// What went wrong.
        #[source]
        source: BoxError,
    },
    /// The service refused the request, or answered nonsense: trying again will not help until
    /// somebody changes the configuration (a wrong password, say).
    #[error("{action} failed: {source}")]
    Fatal {
        /// What was attempted, and on what.
        action: String,
        /// What went wrong.
        #[source]
        source: BoxError,
    },
}

impl LeaseError {
    /// A [`LeaseError::Transient`]: `action` says what was attempted and on what.
    pub fn transient(action: impl Into<String>, source: impl Into<BoxError>) -> Self {
        Self::Transient {
            action: action.into(),
            source: source.into(),
        }
    }

    /// A [`LeaseError::Fatal`]: `action` says what was attempted and on what.
    pub fn fatal(action: impl Into<String>, source: impl Into<BoxError>) -> Self {
        Self::Fatal {
            action: action.into(),
            source: source.into(),
        }
    }

    /// Whether the same call may well succeed a little later without anybody's doing.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Transient { .. })
    }
}

/// One node's access to the lease service.
#[async_trait]
pub trait Leaser: Send + Sync {
    /// The backend's name, as in `lease.type`: `static`, `consul`, `etcd`.
    fn kind(&self) -> &'static str;

    /// The host name that is published when this node becomes primary. (Of a static backend: the
    /// one primary's.)
    fn hostname(&self) -> &str;

    /// The base URL that is published when this node becomes primary. (Of a static backend: the
    /// one primary's.)
    fn advertise_url(&self) -> &str;

    /// Takes the lease if nobody has it.
    ///
    /// # Errors
    /// [`LeaseError::PrimaryExists`] when somebody has, this very node's older lease included.
    async fn acquire(&self) -> Result<Box<dyn Lease>, LeaseError>;

    /// Takes over a lease whose holder has handed it to this node ([`Lease::handoff`]): the
    /// lease stays held throughout, under the same ID, and names this node from now on.
    ///
    /// # Errors
    /// [`LeaseError::LeaseExpired`] when `lease_id` is no living lease, or not the one that holds
    /// the primary's key; [`LeaseError::Unsupported`] where leases cannot be handed over.
    async fn acquire_existing(&self, lease_id: &str) -> Result<Box<dyn Lease>, LeaseError>;

    /// Who is primary now, by a read that is not stale.
    ///
    /// # Errors
    /// [`LeaseError::NoPrimary`] when nobody is. (The primary of a static backend, too, gets this:
    /// there is no other node for it to follow, and it may acquire.)
    async fn primary_info(&self) -> Result<PrimaryInfo, LeaseError>;

    /// Returns when the primary may have changed since this call began, or since the last call of
    /// this or of [`Leaser::primary_info`] on this leaser, whichever is earlier; so that who reads
    /// the primary first and watches then misses nothing. It may return without a change, but not
    /// in a busy loop. It may be cancelled by dropping it. Of a static backend it never returns.
    async fn watch_primary(&self) -> Result<(), LeaseError>;

    /// The cluster ID that the service holds, or `None` if none was set yet (or the backend has
    /// no place for one).
    async fn cluster_id(&self) -> Result<Option<String>, LeaseError>;

    /// Sets the cluster ID (20 characters: `LFSC` and 16 upper-case hexadecimal digits) if none is
    /// set; once set it never changes. Setting the ID that is set already succeeds.
    ///
    /// # Errors
    /// [`LeaseError::ClusterIdMismatch`] when another one is set.
    async fn set_cluster_id(&self, id: &str) -> Result<(), LeaseError>;

    /// Makes a candidate known to the others, in place of what this leaser announced before. Gives
    /// how long it stays known: it must be announced anew before that is over; `None` where nobody
    /// needs to know it (and nothing was done).
    async fn announce(&self, candidate: &Candidate) -> Result<Option<Duration>, LeaseError>;

    /// The candidates that are alive, this node's own included, by a read that is not stale.
    /// Entries that are none are left out.
    async fn candidates(&self) -> Result<Vec<Candidate>, LeaseError>;

    /// What the last primary that said so had ([`Lease::record`]).
    async fn recorded(&self) -> Result<Option<Placement>, LeaseError>;

    /// Withdraws what was announced, and frees what the leaser holds of its own (connections).
    /// Leases are not given up by this.
    async fn close(&self) -> Result<(), LeaseError>;
}

/// The right to be primary.
#[async_trait]
pub trait Lease: Send + Sync {
    /// The service's name for the lease: what [`Leaser::acquire_existing`] takes.
    fn id(&self) -> &str;

    /// The fencing token: greater than that of every earlier holder of the same key. 0 for static.
    fn epoch(&self) -> u64;

    /// How long the lease lasts from [`Lease::renewed_at`] on; `None` if it never expires.
    fn ttl(&self) -> Option<Duration>;

    /// The moment just *before* the last successful request that took or renewed the lease was
    /// sent. It never goes backwards, and does not move when a renewal fails.
    fn renewed_at(&self) -> Instant;

    /// Makes the lease last for its TTL from now on.
    ///
    /// # Errors
    /// [`LeaseError::LeaseExpired`]: the lease is gone for good, this node is not primary.
    /// [`LeaseError::Transient`]: unknown; the lease is good until its TTL is over.
    async fn renew(&self) -> Result<(), LeaseError>;

    /// Readies the lease for the node with this ID to take it over by
    /// [`Leaser::acquire_existing`]; how that node learns the lease's ID is the caller's business.
    /// After this the holder must neither renew nor close the lease.
    ///
    /// # Errors
    /// [`LeaseError::Unsupported`] where leases cannot be handed over.
    async fn handoff(&self, node_id: u64) -> Result<(), LeaseError>;

    /// Writes down how far the primary's data reaches; it stays when the lease is gone. A holder
    /// whose lease is gone changes nothing.
    ///
    /// # Errors
    /// [`LeaseError::LeaseExpired`]: the lease is gone for good.
    async fn record(&self, placement: Placement) -> Result<(), LeaseError>;

    /// Gives the lease up at once: others may acquire from then on, and watchers are told. Closing
    /// a lease that is gone already succeeds.
    async fn close(&self) -> Result<(), LeaseError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn primary_info_is_the_json_that_litefs_stores() {
        let info = PrimaryInfo {
            hostname: "a".into(),
            advertise_url: "http://a:20202".into(),
        };
        let text = r#"{"hostname":"a","advertise-url":"http://a:20202"}"#;
        assert_eq!(serde_json::to_string(&info).unwrap(), text);
        assert_eq!(serde_json::from_str::<PrimaryInfo>(text).unwrap(), info);
    }

    #[test]
    fn placements_are_ordered_by_primary_and_then_by_transactions() {
        let at = |epoch, transactions| Placement {
            epoch,
            transactions,
        };
        assert!(at(5, 1) > at(4, 100) && at(5, 2) > at(5, 1));
        let candidate = Candidate {
            node_id: "00000000000000AB".into(),
            hostname: "a".into(),
            placement: at(5, 2),
            settled: true,
        };
        let text = r#"{"node-id":"00000000000000AB","hostname":"a","placement":{"epoch":5,"transactions":2},"settled":true}"#;
        assert_eq!(serde_json::to_string(&candidate).unwrap(), text);
    }

    #[test]
    fn only_transient_errors_are_worth_a_retry() {
        assert!(LeaseError::transient("renewing x", "time-out").is_transient());
        assert!(!LeaseError::fatal("renewing x", "forbidden").is_transient());
        assert!(!LeaseError::PrimaryExists.is_transient());
        assert_eq!(
            LeaseError::transient("renewing x", "time-out").to_string(),
            "renewing x failed for now: time-out"
        );
    }
}
