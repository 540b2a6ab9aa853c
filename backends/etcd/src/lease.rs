//! The lease of the primary: an etcd lease, to which `KEY` is bound.
//!
//! - The ID of the etcd lease is chosen here, not by etcd, so that a lease can be revoked, and
//!   asking for it repeated, though no answer has come.
//! - Whoever holds it is known by the lease of `KEY` *and* by the revision at which `KEY` was written
//!   last, which is the epoch: a lease that is handed over keeps its ID, and its holders differ by
//!   the revision alone.
//! - etcd answers a keep-alive from its leader's memory, and a leader that was cut off or paused
//!   believes for a while that it still is one. So a renewal counts only if a read (or write) that
//!   the majority has confirmed comes after it, in the same Raft term as before it; and the read
//!   shows that `KEY` is still ours (somebody may have deleted it by hand).

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use etcd_client::{
    Compare, CompareOp, KeyValue, LeaseGrantOptions, LeaseTimeToLiveOptions, PutOptions, Txn, TxnOp,
};
use tenure_lease::{Lease, LeaseError, Placement};
use tokio::time::sleep;

use crate::connection::{Connection, Link};
use crate::failure::{Failure, lease_exists, no_such_lease};
use crate::keys::{self, Keys};

/// What all that a leaser gives out shares with it.
pub(crate) struct Shared {
    pub(crate) connection: Connection,
    pub(crate) keys: Keys,
    pub(crate) ttl: Duration,
}

impl Shared {
    /// What a call does, for an error message.
    pub(crate) fn action(&self, what: &str) -> String {
        format!("{what} (etcd key {})", self.keys.primary)
    }
}

/// A lease that this node has.
pub(crate) struct EtcdLease {
    shared: Arc<Shared>,
    id: i64,
    id_text: String,
    /// The revision at which this node wrote `KEY`.
    revision: i64,
    ttl: Duration,
    renewed_at: Mutex<Instant>,
}

/// An ID for a new etcd lease.
pub(crate) fn new_id() -> i64 {
    rand::random_range(1..=i64::MAX)
}

/// The etcd lease that a lease ID means: 16 hexadecimal digits of a positive number.
fn parse_id(text: &str) -> Option<i64> {
    let digits = text.len() == 16 && text.bytes().all(|c| c.is_ascii_hexdigit());
    let id = i64::from_str_radix(text, 16).ok().filter(|id| *id > 0);
    id.filter(|_| digits)
}

/// Makes the etcd lease `id`, if it does not exist, with this TTL.
pub(crate) async fn grant(link: &mut Link, id: i64, ttl: Duration) -> Result<(), Failure> {
    let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
    let options = LeaseGrantOptions::new().with_id(id);
    match link.client.lease_grant(seconds, Some(options)).await {
        Err(e) if !lease_exists(&e) => Err(e.into()),
        _ => Ok(()),
    }
}

/// Lets the etcd lease `id` last for its TTL from now on. Gives whether it (still) exists.
pub(crate) async fn keep_alive(link: &mut Link, id: i64) -> Result<bool, Failure> {
    match link.client.lease_keep_alive(id).await {
        Ok(_) => Ok(true),
        Err(e) if no_such_lease(&e) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Ends the etcd lease `id`, and deletes the keys that are bound to it. Succeeds if there is none.
pub(crate) async fn revoke(link: &mut Link, id: i64) -> Result<(), Failure> {
    match link.client.lease_revoke(id).await {
        Err(e) if !no_such_lease(&e) => Err(e.into()),
        _ => Ok(()),
    }
}

/// Renews the etcd lease `id` for certain (see the module's notes). Gives the moment from which it
/// lasts, and `KEY` as it was after that.
async fn renew(
    link: &mut Link,
    id: i64,
    key: &str,
) -> Result<(Instant, Option<KeyValue>), Failure> {
    loop {
        let (term, sent) = (link.term(), Instant::now());
        if term != 0 && !keep_alive(link, id).await? {
            return Err(LeaseError::LeaseExpired.into());
        }
        let (_, entry) = keys::read(link, key).await?;
        // Terms change only with an election, so this ends (and else with the call's deadline).
        if term != 0 && term == link.term() {
            return Ok((sent, entry));
        }
    }
}

/// Writes `KEY`, bound to the etcd lease `id`.
fn put_primary(key: &str, info: &str, id: i64) -> TxnOp {
    TxnOp::put(key, info, Some(PutOptions::new().with_lease(id)))
}

/// Takes the lease if nobody has it; `info` is the value for `KEY`.
pub(crate) async fn acquire(shared: &Arc<Shared>, info: &str) -> Result<EtcdLease, LeaseError> {
    let id = new_id();
    let unclaimed = Unclaimed {
        shared: shared.clone(),
        id,
        until: Instant::now() + shared.ttl + shared.connection.deadline(),
        claimed: false,
    };
    let sent = Instant::now();
    let key = &*shared.keys.primary;
    let take = |mut link: Link| async move {
        grant(&mut link, id, shared.ttl).await?;
        let put = put_primary(key, info, id);
        let free = Compare::create_revision(key, CompareOp::Equal, 0);
        let transaction = Txn::new().when([free]).and_then([put]);
        let transaction = transaction.or_else([TxnOp::get(key, None)]);
        let done = link.client.txn(transaction).await?;
        if done.succeeded() {
            return Ok(keys::revision_of(&done));
        }
        match keys::found(&done) {
            // This request was made before, and its answer lost.
            Some(entry) if entry.lease() == id => Ok(entry.mod_revision()),
            Some(entry) => {
                keys::primary(&entry)?;
                Err(LeaseError::PrimaryExists.into())
            }
            None => Err(LeaseError::PrimaryExists.into()),
        }
    };
    let action = shared.action("acquiring the lease");
    let revision = shared.connection.call(&action, take).await?;
    unclaimed.claim();
    Ok(EtcdLease::new(shared, id, revision, shared.ttl, sent))
}

/// Takes over the lease `id_text` from the holder that has handed it over; `info` is the value for
/// `KEY`.
pub(crate) async fn take_over(
    shared: &Arc<Shared>,
    id_text: &str,
    info: &str,
) -> Result<EtcdLease, LeaseError> {
    let id = parse_id(id_text).ok_or(LeaseError::LeaseExpired)?;
    let key = &*shared.keys.primary;
    let take = |mut link: Link| async move {
        // Before it is kept alive: it may be a lease of something else.
        let mut same = link.clone();
        let options: Option<LeaseTimeToLiveOptions> = None;
        let ((_, entry), granted) = tokio::try_join!(
            keys::read(&mut link, key),
            same.client.lease_time_to_live(id, options)
        )?;
        let held = entry.filter(|entry| entry.lease() == id);
        let before = held.ok_or(LeaseError::LeaseExpired)?.mod_revision();
        let (term, mut sent) = (same.term(), Instant::now());
        if !keep_alive(&mut same, id).await? {
            return Err(LeaseError::LeaseExpired.into());
        }
        // Nothing has been written in between: the same request, delayed on a connection that was
        // given up, must not name this node once the lease has been handed on.
        let transaction = Txn::new()
            .when([
                Compare::lease(key, CompareOp::Equal, id),
                Compare::mod_revision(key, CompareOp::Equal, before),
            ])
            .and_then([put_primary(key, info, id)]);
        let done = same.client.txn(transaction).await?;
        if !done.succeeded() {
            return Err(LeaseError::LeaseExpired.into());
        }
        if done.header().map(|header| header.raft_term()) != Some(term) {
            sent = renew(&mut same, id, key).await?.0;
        }
        let granted = u64::try_from(granted.granted_ttl()).unwrap_or(0);
        let ttl = shared.ttl.min(Duration::from_secs(granted));
        Ok((keys::revision_of(&done), ttl, sent))
    };
    let action = shared.action("taking the lease over");
    let (revision, ttl, sent) = shared.connection.call(&action, take).await?;
    Ok(EtcdLease::new(shared, id, revision, ttl, sent))
}

impl EtcdLease {
    fn new(shared: &Arc<Shared>, id: i64, revision: i64, ttl: Duration, sent: Instant) -> Self {
        Self {
            shared: shared.clone(),
            id,
            id_text: format!("{id:016X}"),
            revision,
            ttl,
            renewed_at: Mutex::new(sent),
        }
    }
}

#[async_trait]
impl Lease for EtcdLease {
    fn id(&self) -> &str {
        &self.id_text
    }

    fn epoch(&self) -> u64 {
        self.revision.unsigned_abs()
    }

    fn ttl(&self) -> Option<Duration> {
        Some(self.ttl)
    }

    fn renewed_at(&self) -> Instant {
        *self.renewed_at.lock().unwrap_or_else(|e| e.into_inner())
    }

    async fn renew(&self) -> Result<(), LeaseError> {
        let key = &*self.shared.keys.primary;
        let again = |mut link: Link| async move { renew(&mut link, self.id, key).await };
        let action = self.shared.action("renewing the lease");
        let (sent, entry) = self.shared.connection.call(&action, again).await?;
        let ours =
            |entry: &KeyValue| entry.lease() == self.id && entry.mod_revision() == self.revision;
        if !entry.as_ref().is_some_and(ours) {
            return Err(LeaseError::LeaseExpired);
        }
        let mut renewed_at = self.renewed_at.lock().unwrap_or_else(|e| e.into_inner());
        *renewed_at = sent.max(*renewed_at);
        Ok(())
    }

    async fn handoff(&self, _node_id: u64) -> Result<(), LeaseError> {
        // Whoever knows the ID may take it over: there is nothing to do.
        Ok(())
    }

    async fn record(&self, placement: Placement) -> Result<(), LeaseError> {
        let (key, value) = (&*self.shared.keys.primary, &*keys::json(&placement)?);
        let write = |mut link: Link| async move {
            let held = [
                Compare::lease(key, CompareOp::Equal, self.id),
                Compare::mod_revision(key, CompareOp::Equal, self.revision),
            ];
            let put = TxnOp::put(&*self.shared.keys.recorded, value, None);
            let transaction = Txn::new().when(held).and_then([put]);
            match link.client.txn(transaction).await?.succeeded() {
                true => Ok(()),
                false => Err(LeaseError::LeaseExpired.into()),
            }
        };
        let action = self.shared.action("recording what the primary has");
        self.shared.connection.call(&action, write).await
    }

    async fn close(&self) -> Result<(), LeaseError> {
        let end = |mut link: Link| async move { revoke(&mut link, self.id).await };
        let action = self.shared.action("giving the lease up");
        self.shared.connection.call(&action, end).await
    }
}

/// An etcd lease that was asked for, but may come to hold nothing, or to hold `KEY` without its
/// holder's knowing: because another node was faster, an answer was lost, or the call was cancelled.
/// Unless it is claimed it is revoked in the background; that is tried until it has expired by
/// itself.
struct Unclaimed {
    shared: Arc<Shared>,
    id: i64,
    until: Instant,
    claimed: bool,
}

impl Unclaimed {
    fn claim(mut self) {
        self.claimed = true;
    }
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        let (shared, id, until) = (self.shared.clone(), self.id, self.until);
        // Without a runtime the program is about to end, and the lease expires.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        if self.claimed {
            return;
        }
        runtime.spawn(async move {
            let action = shared.action("revoking a lease that was not acquired");
            let end = |mut link: Link| async move { revoke(&mut link, id).await };
            while let Err(e) = shared.connection.call(&action, end).await {
                if !e.is_transient() || Instant::now() > until {
                    return;
                }
                sleep(Duration::from_secs(1)).await;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_id_is_16_digits_of_either_case() {
        assert_eq!(parse_id("00000000000000aF"), Some(0xAF));
        assert_eq!(parse_id("7FFFFFFFFFFFFFFF"), Some(i64::MAX));
        for text in [
            "",
            "1",
            "0000000000000000",
            "8000000000000000",
            "+000000000000001",
        ] {
            assert_eq!(parse_id(text), None, "{text}");
        }
        assert_eq!(parse_id("01234567-89ab-cdef-0123-456789abcdef"), None);
    }
}
