//! Asking the primary for its lease.

use std::sync::Arc;
use std::time::Duration;

use http::Request;
use tenure_lease::PrimaryInfo;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::peer::{self, Peers};
use crate::stream::{NODE_ID_HEADER, format_node_id};

use super::Status;

/// How long the primary may take to hand its lease over.
const HANDOFF_TIMEOUT: Duration = Duration::from_secs(20);

/// How long this node may take to be primary once the lease is on its way.
const OFFICE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a primary is waited for, when there is none.
const PRIMARY_TIMEOUT: Duration = Duration::from_secs(2);

/// The most bytes of a refusal that are read.
const MAX_REFUSAL: usize = 1024;

/// Why this node has not become primary.
#[derive(Debug, thiserror::Error)]
pub enum PromoteError {
    /// It never may.
    #[error("this node is not a candidate: set lease.candidate to true where it may be primary")]
    NotCandidate,
    /// There is nobody to ask.
    #[error("there is no primary that could hand its lease over")]
    NoPrimary,
    /// The primary did not do it.
    #[error("the primary {hostname} did not hand its lease over: {reason}")]
    Refused {
        /// Who.
        hostname: String,
        /// What it says, or what went wrong on the way.
        reason: String,
    },
    /// The lease did not arrive.
    #[error("the lease was handed over, but this node is not primary after {} s: see its log", OFFICE_TIMEOUT.as_secs())]
    NotPrimary,
}

/// Has this node made primary.
#[derive(Clone)]
pub struct Promoter {
    candidate: bool,
    node_id: u64,
    peers: Arc<dyn Peers>,
    status: watch::Receiver<Status>,
}

impl Promoter {
    /// For the node of this ID, whose role loop says `status`.
    pub fn new(
        candidate: bool,
        node_id: u64,
        peers: Arc<dyn Peers>,
        status: watch::Receiver<Status>,
    ) -> Promoter {
        Promoter {
            candidate,
            node_id,
            peers,
            status,
        }
    }

    /// Asks the primary for its lease, and returns once this node can write. Of a primary: nothing.
    pub async fn promote(&self) -> Result<(), PromoteError> {
        let Status {
            is_primary,
            primary,
            ..
        } = self.status.borrow().clone();
        if is_primary {
            return Ok(());
        }
        if !self.candidate {
            return Err(PromoteError::NotCandidate);
        }
        let primary = match primary {
            Some(primary) => primary,
            None => self.await_primary().await?,
        };
        let asked = self.ask(&primary.advertise_url).await;
        asked.map_err(|reason| PromoteError::Refused {
            hostname: primary.hostname,
            reason,
        })?;
        let mut status = self.status.clone();
        let office = status.wait_for(|s| s.is_primary);
        match timeout(OFFICE_TIMEOUT, office).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(PromoteError::NotPrimary),
        }
    }

    /// Waits for a primary to ask, in the moment between two of them.
    async fn await_primary(&self) -> Result<PrimaryInfo, PromoteError> {
        let mut status = self.status.clone();
        let known = status.wait_for(|s| s.primary.is_some());
        match timeout(PRIMARY_TIMEOUT, known).await {
            Ok(Ok(status)) => status.primary.clone().ok_or(PromoteError::NoPrimary),
            _ => Err(PromoteError::NoPrimary),
        }
    }

    async fn ask(&self, primary: &str) -> Result<(), String> {
        let bad = |reason: String| format!("{primary:?}: {reason}");
        let mut url = peer::url(primary, "/handoff").map_err(bad)?;
        let id = format_node_id(self.node_id);
        url.query_pairs_mut().append_pair("nodeID", &id);
        let request = Request::post(url.as_str())
            .header(NODE_ID_HEADER, id)
            .body(peer::empty())
            .map_err(|e| bad(e.to_string()))?;
        let answer = peer::ask(&*self.peers, request, HANDOFF_TIMEOUT, MAX_REFUSAL)
            .await
            .map_err(|e| e.reason)?;
        match answer.status().is_success() {
            true => Ok(()),
            false => Err(peer::refusal(&answer)),
        }
    }
}
