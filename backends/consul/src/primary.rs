//! Who holds the key, and waiting for that to change.
//!
//! What a key may look like, the same for LiteFS: absent, or without a session and a value (its
//! holder gave it up: a release writes an empty value): no primary; held by a session, with a
//! [`PrimaryInfo`]: that one. Anything else is not ours, and nothing is written over it.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use tenure_lease::{LeaseError, PrimaryInfo};
use tokio::time::sleep;

use crate::api::{Cluster, Entry};
use crate::http::within;

/// How long Consul lets a read wait before it answers that nothing has changed.
const WAIT: Duration = Duration::from_secs(30);
/// The shortest time between two reads that find nothing new: while the key is absent Consul may
/// answer whenever its neighbours are written.
const PAUSE: Duration = Duration::from_millis(20);

/// Who is primary according to `entry`, and by which session.
///
/// # Errors
/// NoPrimary; Fatal when the key serves another purpose.
pub(crate) fn holder(
    cluster: &Cluster,
    entry: Option<Entry>,
) -> Result<(String, PrimaryInfo), LeaseError> {
    let Some(entry) = entry else {
        return Err(LeaseError::NoPrimary);
    };
    let foreign = |why: String| {
        let why = format!(
            "{why}: something else uses this key; choose another lease.consul.key or delete it"
        );
        LeaseError::fatal(cluster.action("reading the primary"), why)
    };
    match entry.session {
        None if entry.value.is_empty() => Err(LeaseError::NoPrimary),
        None => Err(foreign(
            "no session holds the key, but it has a value".into(),
        )),
        Some(session) => match serde_json::from_slice(&entry.value) {
            Ok(info) => Ok((session, info)),
            Err(e) => Err(foreign(format!("its value is no primary's ({e})"))),
        },
    }
}

/// What a read of the key has shown.
#[derive(Clone, Copy)]
struct Seen {
    /// From where a blocking query goes on.
    index: u64,
    /// The index of the key's last write; `None`: it is absent.
    version: Option<u64>,
}

/// Remembers what was read last, so that a watch that starts from there misses nothing.
#[derive(Default)]
pub(crate) struct Watcher {
    last: Mutex<Option<Seen>>,
}

impl Watcher {
    fn last(&self) -> std::sync::MutexGuard<'_, Option<Seen>> {
        // It is replaced as a whole: a panic elsewhere leaves it valid.
        self.last.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Reads the key; with an index, once it has changed or [`WAIT`] is over.
    async fn read(
        &self,
        cluster: &Cluster,
        after: Option<u64>,
    ) -> Result<(Option<Entry>, Seen), LeaseError> {
        let after = after.map(|index| (index, WAIT));
        let (entry, index) = cluster.get(&cluster.key, after).await?;
        let version = entry.as_ref().map(|entry| entry.modify_index);
        let seen = Seen { index, version };
        *self.last() = Some(seen);
        Ok((entry, seen))
    }

    /// Who is primary.
    pub async fn primary(&self, cluster: &Cluster) -> Result<(String, PrimaryInfo), LeaseError> {
        let (entry, _) = self.read(cluster, None).await?;
        holder(cluster, entry)
    }

    /// Returns when the key has changed since it was last read; at once, if it was never read.
    pub async fn changed(&self, cluster: &Cluster) -> Result<(), LeaseError> {
        let action = cluster.action("watching the primary");
        let last = *self.last();
        let Some(mut seen) = last else {
            let read = within(cluster.deadline, &action, self.read(cluster, None));
            return read.await.map(drop);
        };
        // Consul adds up to a sixteenth to the wait, lest all watchers come back at once.
        let limit = WAIT + WAIT / 16 + cluster.deadline;
        loop {
            let started = Instant::now();
            let read = within(limit, &action, self.read(cluster, Some(seen.index)));
            let (_, mut now) = read.await?;
            if now.version != seen.version {
                return Ok(());
            }
            if now.index < seen.index {
                // Consul has restored a snapshot: what comes next may have any index. Zero asks
                // for an answer at once.
                now.index = 0;
            }
            seen = now;
            sleep(PAUSE.saturating_sub(started.elapsed())).await;
        }
    }
}
