//! The keys of a cluster in etcd, what their values are, and how they are read and written. All of
//! it is given here once, for the modules that work with it.
//!
//! | key | value | lease |
//! | --- | --- | --- |
//! | `KEY` | the primary, [`PrimaryInfo`] as JSON | the primary's |
//! | `KEY/clusterid` | the cluster ID, 20 characters | none |
//! | `KEY/recorded` | what a primary had, [`Placement`] as JSON | none |
//! | `KEY/candidates/NODE-ID` | [`Candidate`] as JSON | one of the candidate's own |

use etcd_client::{GetResponse, KeyValue, TxnOpResponse, TxnResponse};
use tenure_lease::{Candidate, LeaseError, Placement, PrimaryInfo};

use crate::connection::Link;
use crate::failure::Failure;

/// The names of a cluster's keys.
pub(crate) struct Keys {
    pub(crate) primary: String,
    pub(crate) cluster_id: String,
    pub(crate) recorded: String,
    /// What the keys of all candidates begin with.
    pub(crate) candidates: String,
}

impl Keys {
    pub(crate) fn new(key: &str) -> Self {
        Self {
            primary: key.to_owned(),
            cluster_id: format!("{key}/clusterid"),
            recorded: format!("{key}/recorded"),
            candidates: format!("{key}/candidates/"),
        }
    }
}

/// Reads a key, by a read that the majority has confirmed. Gives the revision of the whole store at
/// that time, too.
pub(crate) async fn read(
    link: &mut Link,
    key: &str,
) -> Result<(i64, Option<KeyValue>), etcd_client::Error> {
    let mut response = link.client.get(key, None).await?;
    let (mut revision, mut term) = (0, 0);
    if let Some(header) = response.header() {
        (revision, term) = (header.revision(), header.raft_term());
    }
    link.set_term(term);
    Ok((revision, response.take_kvs().pop()))
}

/// The key that a transaction's only operation, a get, has found.
pub(crate) fn found(transaction: &TxnResponse) -> Option<KeyValue> {
    let first = transaction.op_responses().pop()?;
    let TxnOpResponse::Get(read) = first else {
        return None;
    };
    GetResponse::take_kvs(&mut { read }).pop()
}

/// The revision at which a transaction's writes were made.
pub(crate) fn revision_of(transaction: &TxnResponse) -> i64 {
    transaction.header().map_or(0, |header| header.revision())
}

/// The primary that `KEY` names; an error if it is no primary's key.
pub(crate) fn primary(entry: &KeyValue) -> Result<PrimaryInfo, Failure> {
    match serde_json::from_slice(entry.value()) {
        Ok(_) if entry.lease() == 0 => Err(used(entry, "it has no lease")),
        Ok(info) => Ok(info),
        Err(e) => Err(used(entry, &format!("its value names no primary: {e}"))),
    }
}

/// The cluster ID that `KEY/clusterid` holds.
pub(crate) fn cluster_id(entry: &KeyValue) -> Result<String, Failure> {
    let id = entry.value_str().ok().filter(|id| is_cluster_id(id));
    id.map(str::to_owned)
        .ok_or_else(|| used(entry, "its value is no cluster ID"))
}

/// What `KEY/recorded` holds.
pub(crate) fn recorded(entry: &KeyValue) -> Result<Placement, Failure> {
    serde_json::from_slice(entry.value())
        .map_err(|e| used(entry, &format!("its value is no record of a primary: {e}")))
}

/// The candidate that a key under `KEY/candidates/` holds, if it does.
pub(crate) fn candidate(entry: &KeyValue, prefix: &str) -> Option<Candidate> {
    let candidate: Candidate = serde_json::from_slice(entry.value()).ok()?;
    let own = format!("{prefix}{}", candidate.node_id);
    (entry.lease() != 0 && entry.key() == own.as_bytes()).then_some(candidate)
}

fn is_cluster_id(id: &str) -> bool {
    let digit = |c: char| c.is_ascii_digit() || ('A'..='F').contains(&c);
    id.strip_prefix("LFSC")
        .is_some_and(|digits| digits.len() == 16 && digits.chars().all(digit))
}

fn used(entry: &KeyValue, why: &str) -> Failure {
    let key = String::from_utf8_lossy(entry.key());
    LeaseError::fatal(
        format!("reading the etcd key {key}"),
        format!(
            "something else uses this key ({why}): \
             set lease.etcd.key to one of this cluster's own, or delete the key"
        ),
    )
    .into()
}

/// The JSON of a value of ours.
pub(crate) fn json(value: &impl serde::Serialize) -> Result<String, LeaseError> {
    serde_json::to_string(value).map_err(|e| LeaseError::fatal("writing JSON", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_id_is_20_characters_of_its_kind() {
        assert!(is_cluster_id("LFSC0123456789ABCDEF"));
        for id in ["", "LFSC", "LFSC0123456789abcdef", "LFSC0123456789ABCDEF0"] {
            assert!(!is_cluster_id(id), "{id}");
        }
    }
}
