//! Candidates: each is a key `KEY/candidates/<node ID>`, held by a session of the candidate's own
//! and deleted with it.
//!
//! The session is known here before the key is written, and is forgotten only once it is gone or
//! destroyed: whatever answer gets lost, the next announcement finds its way.

use std::time::Duration;

use tenure_lease::{Candidate, LeaseError};
use tokio::sync::Mutex;

use crate::api::Cluster;

/// The name of a candidate's session.
const SESSION_NAME: &str = "tenure-candidate";

/// What this node has announced.
#[derive(Default)]
pub(crate) struct Announcement {
    current: Mutex<Option<Announced>>,
}

struct Announced {
    session: String,
    key: String,
    /// What the key holds, if that is known.
    value: Option<Vec<u8>>,
}

impl Announcement {
    /// Makes `candidate` known for as long as is returned.
    pub async fn announce(
        &self,
        cluster: &Cluster,
        candidate: &Candidate,
    ) -> Result<Duration, LeaseError> {
        let id = &candidate.node_id;
        if id.is_empty() || id.len() > 64 || !id.bytes().all(|b| b.is_ascii_alphanumeric()) {
            let why = format!("{id:?} is no node ID");
            return Err(LeaseError::fatal(
                cluster.action("announcing a candidate"),
                why,
            ));
        }
        let key = cluster.below(&format!("candidates/{id}"));
        let value = cluster.json(candidate)?;
        let mut current = self.current.lock().await;
        if let Some(last) = &*current {
            if last.key != key {
                cluster.destroy_session(&last.session).await?;
                *current = None;
            } else {
                match cluster.renew_session(&last.session).await {
                    Ok(ttl) if last.value.as_ref() == Some(&value) => return Ok(ttl),
                    Ok(_) => {}
                    Err(LeaseError::LeaseExpired) => *current = None,
                    Err(e) => return Err(e),
                }
            }
        }
        let announced = match &mut *current {
            Some(announced) => announced,
            None => {
                let session = cluster.create_session(SESSION_NAME, Duration::ZERO).await?;
                current.insert(Announced {
                    session,
                    key,
                    value: None,
                })
            }
        };
        announced.value = None;
        let how = ("acquire", announced.session.as_str());
        match cluster.put(&announced.key, how, value.clone()).await {
            Ok(true) => {
                announced.value = Some(value);
                Ok(cluster.ttl)
            }
            Ok(false) => {
                let why = format!("the key {:?} is held by another session", announced.key);
                Err(LeaseError::transient(
                    cluster.action("announcing a candidate"),
                    why,
                ))
            }
            Err(LeaseError::LeaseExpired) => {
                *current = None;
                let why = "the session was gone at once";
                Err(LeaseError::transient(
                    cluster.action("announcing a candidate"),
                    why,
                ))
            }
            Err(e) => Err(e),
        }
    }

    /// Withdraws what was announced.
    pub async fn withdraw(&self, cluster: &Cluster) -> Result<(), LeaseError> {
        let mut current = self.current.lock().await;
        if let Some(announced) = &*current {
            cluster.destroy_session(&announced.session).await?;
            *current = None;
        }
        Ok(())
    }
}

/// The candidates that are alive. What is not held by a session, is no candidate, or has another
/// node's name is left out.
pub(crate) async fn candidates(cluster: &Cluster) -> Result<Vec<Candidate>, LeaseError> {
    let folder = cluster.below("candidates/");
    let entries = cluster.list(&folder).await?;
    let candidates = entries.into_iter().filter_map(|entry| {
        entry.session?;
        let candidate: Candidate = serde_json::from_slice(&entry.value).ok()?;
        (entry.key.strip_prefix(&folder) == Some(&candidate.node_id)).then_some(candidate)
    });
    Ok(candidates.collect())
}
