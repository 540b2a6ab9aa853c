//! The candidates: each has a key under `KEY/candidates/`, bound to an etcd lease of its own, which
//! the leaser keeps alive by announcing it again and again.

use std::time::{Duration, Instant};

use etcd_client::{GetOptions, PutOptions};
use tenure_lease::{Candidate, LeaseError};
use tokio::sync::Mutex;

use crate::connection::Link;
use crate::keys;
use crate::lease::{Shared, grant, keep_alive, new_id, revoke};

/// The most candidates that are read: far more than a cluster has.
const MOST: i64 = 1000;

/// What this leaser has announced.
pub(crate) struct Announcement {
    /// Its etcd lease, made when it is needed.
    lease: i64,
    state: Mutex<State>,
}

enum State {
    /// There is nothing.
    Withdrawn,
    /// There may be something.
    Unknown,
    /// This key has this value, if the lease lives.
    Known(String, String),
}

impl Announcement {
    pub(crate) fn new() -> Self {
        Self {
            lease: new_id(),
            state: Mutex::new(State::Withdrawn),
        }
    }

    /// Announces `candidate` in place of what was announced before. Gives how long that lasts.
    pub(crate) async fn announce(
        &self,
        shared: &Shared,
        candidate: &Candidate,
    ) -> Result<Duration, LeaseError> {
        let key = &*format!("{}{}", shared.keys.candidates, candidate.node_id);
        let value = &*keys::json(candidate)?;
        let lease = self.lease;
        let mut state = self.state.lock().await;
        let mut same = false;
        if let State::Known(known_key, known_value) = &*state {
            same = known_key == key && known_value == value;
            if known_key != key {
                end(shared, lease).await?;
            }
        }
        let sent = Instant::now();
        *state = State::Unknown;
        let put = |mut link: Link| async move {
            let alive = keep_alive(&mut link, lease).await?;
            if !alive {
                grant(&mut link, lease, shared.ttl).await?;
            }
            if !alive || !same {
                let options = PutOptions::new().with_lease(lease);
                link.client.put(key, value, Some(options)).await?;
            }
            Ok(())
        };
        let action = shared.action("announcing this candidate");
        shared.connection.call(&action, put).await?;
        *state = State::Known(key.to_owned(), value.to_owned());
        Ok(shared.ttl.saturating_sub(sent.elapsed()))
    }

    /// Takes back what was announced.
    pub(crate) async fn withdraw(&self, shared: &Shared) -> Result<(), LeaseError> {
        let mut state = self.state.lock().await;
        if !matches!(*state, State::Withdrawn) {
            end(shared, self.lease).await?;
            *state = State::Withdrawn;
        }
        Ok(())
    }
}

async fn end(shared: &Shared, lease: i64) -> Result<(), LeaseError> {
    let end = |mut link: Link| async move { revoke(&mut link, lease).await };
    let action = shared.action("withdrawing this candidate");
    shared.connection.call(&action, end).await
}

/// The candidates that are alive.
pub(crate) async fn list(shared: &Shared) -> Result<Vec<Candidate>, LeaseError> {
    let prefix = &*shared.keys.candidates;
    let read = |mut link: Link| async move {
        let options = GetOptions::new().with_prefix().with_limit(MOST);
        let response = link.client.get(prefix, Some(options)).await?;
        let entries = response.kvs().iter();
        Ok(entries
            .filter_map(|entry| keys::candidate(entry, prefix))
            .collect())
    };
    let action = shared.action("reading the candidates");
    shared.connection.call(&action, read).await
}
