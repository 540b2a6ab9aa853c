//! What the backend asks of Consul: sessions, keys and transactions of one cluster.
//!
//! - Every read is a consistent one: never of a server that only believes to be the leader.
//! - Nothing here waits longer than its caller's deadline, and every session ID that gets into a
//!   URL is one that Consul gave, or has the form of one ([`is_session_id`]).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use reqwest::{Method, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tenure_lease::{LeaseError, PrimaryInfo};

use crate::go_duration;
use crate::http::{Agent, Answer, Request, denied};

/// A cluster's place in Consul, as one node of it sees it.
pub(crate) struct Cluster {
    pub agent: Agent,
    /// The key that the primary holds.
    pub key: String,
    /// The catalog node that sessions are made on, if not the agent's own.
    pub node: Option<String>,
    /// Whether that node is registered, as far as is known.
    pub registered: AtomicBool,
    pub ttl: Duration,
    pub lock_delay: Duration,
    /// What this node publishes as primary.
    pub info: PrimaryInfo,
    /// The longest time that a call may take.
    pub deadline: Duration,
}

/// A key and its value.
pub(crate) struct Entry {
    pub key: String,
    /// The session that holds it.
    pub session: Option<String>,
    pub value: Vec<u8>,
    /// Consul's index at the last write: it grows with every write of any key.
    pub modify_index: u64,
}

/// [`Entry`], as Consul writes it.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WireEntry {
    key: String,
    session: Option<String>,
    value: Option<String>,
    modify_index: u64,
}

/// The parts of a session that matter.
#[derive(Deserialize)]
struct WireSession {
    #[serde(rename = "TTL")]
    ttl: Option<String>,
}

/// What creating a session answers.
#[derive(Deserialize)]
struct Created {
    #[serde(rename = "ID")]
    id: String,
}

/// What a transaction that did not take place answers.
#[derive(Deserialize)]
struct Refused {
    #[serde(rename = "Errors")]
    errors: Vec<RefusedOp>,
}

#[derive(Deserialize)]
struct RefusedOp {
    #[serde(rename = "What")]
    what: String,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct NewSession<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<&'a str>,
    name: &'a str,
    behavior: &'a str,
    #[serde(rename = "TTL")]
    ttl: String,
    lock_delay: String,
    /// None: the session lives by its TTL alone, whatever Consul thinks of the agent's health.
    node_checks: [&'a str; 0],
}

impl Cluster {
    /// What is attempted and on what, for errors.
    pub fn action(&self, what: &str) -> String {
        let at = self.agent.base.as_str().trim_end_matches('/');
        format!("{what} (Consul key {:?} at {at})", self.key)
    }

    /// A key below the cluster's.
    pub fn below(&self, name: &str) -> String {
        format!("{}/{name}", self.key)
    }

    async fn send(
        &self,
        what: &str,
        needs: &str,
        request: Request<'_>,
    ) -> Result<Answer, LeaseError> {
        self.agent.send(&self.action(what), needs, request).await
    }

    /// Reads `key`, or every key that begins with it if `recurse`. With `after`, an index and a
    /// wait, that waits for a write after the index. Also gives the index from which to wait next.
    async fn read(
        &self,
        key: &str,
        recurse: bool,
        after: Option<(u64, Duration)>,
    ) -> Result<(Vec<Entry>, u64), LeaseError> {
        let what = format!("reading {key:?}");
        let mut query = vec![("consistent", "")];
        if recurse {
            query.push(("recurse", ""));
        }
        let (index, wait);
        if let Some(after) = after {
            index = after.0.to_string();
            wait = format!("{}s", after.1.as_secs());
            query.extend([("index", index.as_str()), ("wait", wait.as_str())]);
        }
        let request = Request {
            method: Method::GET,
            path: &["kv", key],
            query: &query,
            body: Vec::new(),
        };
        let answer = self
            .send(&what, &format!("key_prefix {:?} read", self.key), request)
            .await?;
        let Some(index) = answer.index else {
            let why = format!(
                "{} without X-Consul-Index: is this Consul's HTTP API?",
                answer.status
            );
            return Err(LeaseError::fatal(self.action(&what), why));
        };
        if answer.status == StatusCode::NOT_FOUND {
            return Ok((Vec::new(), index));
        }
        let entries: Vec<WireEntry> = self.parse(&what, &answer)?;
        let entries = entries.into_iter().map(|wire| {
            let value = BASE64.decode(wire.value.unwrap_or_default()).map_err(|e| {
                LeaseError::fatal(self.action(&what), format!("its value is not base64: {e}"))
            })?;
            Ok(Entry {
                key: wire.key,
                session: wire.session.filter(|session| !session.is_empty()),
                value,
                modify_index: wire.modify_index,
            })
        });
        Ok((entries.collect::<Result<_, _>>()?, index))
    }

    /// Reads one key; see [`Cluster::read`].
    pub async fn get(
        &self,
        key: &str,
        after: Option<(u64, Duration)>,
    ) -> Result<(Option<Entry>, u64), LeaseError> {
        let (entries, index) = self.read(key, false, after).await?;
        Ok((entries.into_iter().next(), index))
    }

    /// Reads every key that begins with `prefix`.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Entry>, LeaseError> {
        Ok(self.read(prefix, true, None).await?.0)
    }

    /// Writes `key` if the condition `how` holds: (`acquire`, session), (`release`, session) or
    /// (`cas`, index). Whether it did.
    ///
    /// # Errors
    /// [`LeaseError::LeaseExpired`] when the session that acquires does not exist.
    pub async fn put(
        &self,
        key: &str,
        how: (&str, &str),
        body: Vec<u8>,
    ) -> Result<bool, LeaseError> {
        let what = format!("writing {key:?}");
        let request = Request {
            method: Method::PUT,
            path: &["kv", key],
            query: &[how],
            body,
        };
        let needs = format!("key_prefix {:?} write", self.key);
        let answer = self.send(&what, &needs, request).await?;
        self.parse(&what, &answer)
    }

    /// Carries out a transaction; `false`: one of its conditions did not hold.
    pub async fn transact(
        &self,
        what: &str,
        operations: serde_json::Value,
    ) -> Result<bool, LeaseError> {
        let request = Request {
            method: Method::PUT,
            path: &["txn"],
            query: &[],
            body: operations.to_string().into_bytes(),
        };
        let needs = format!("key_prefix {:?} write", self.key);
        let answer = self.send(what, &needs, request).await?;
        if answer.status != StatusCode::CONFLICT {
            return Ok(true);
        }
        let refused: Refused = self.parse(what, &answer)?;
        let denial = refused
            .errors
            .iter()
            .find(|e| e.what.contains("Permission denied"));
        match denial {
            Some(error) => Err(denied(&self.action(what), &needs, &error.what)),
            None => Ok(false),
        }
    }

    /// Creates a session whose keys vanish with it, and gives its ID.
    pub async fn create_session(
        &self,
        name: &str,
        lock_delay: Duration,
    ) -> Result<String, LeaseError> {
        self.register_node().await?;
        let session = NewSession {
            node: self.node.as_deref(),
            name,
            behavior: "delete",
            ttl: go_duration::format(self.ttl),
            lock_delay: go_duration::format(lock_delay),
            node_checks: [],
        };
        let what = "creating a session";
        let request = Request {
            method: Method::PUT,
            path: &["session", "create"],
            query: &[],
            body: self.json(&session)?,
        };
        let answer = self.send(what, &self.session_permission(), request).await;
        if answer.is_err() {
            // Perhaps the node is gone from the catalog.
            self.registered.store(false, Ordering::Relaxed);
        }
        let Created { id } = self.parse(what, &answer?)?;
        if !is_session_id(&id) {
            let why = format!("the session's ID is {id:?}, which is no UUID");
            return Err(LeaseError::fatal(self.action(what), why));
        }
        Ok(id)
    }

    fn session_permission(&self) -> String {
        match &self.node {
            Some(node) => format!("session {node:?} write"),
            None => "session_prefix \"\" write".into(),
        }
    }

    /// Registers the catalog node that a URL with a path asks for, once.
    async fn register_node(&self) -> Result<(), LeaseError> {
        let Some(node) = &self.node else {
            return Ok(());
        };
        if self.registered.load(Ordering::Relaxed) {
            return Ok(());
        }
        let what = format!("registering the catalog node {node:?}");
        let request = Request {
            method: Method::PUT,
            path: &["catalog", "register"],
            query: &[],
            body: json!({"Node": node, "Address": "localhost"})
                .to_string()
                .into_bytes(),
        };
        let answer = self
            .send(&what, &format!("node {node:?} write"), request)
            .await?;
        if self.parse::<bool>(&what, &answer)? {
            self.registered.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Makes a session last for its TTL from now on; gives that TTL, which another node may have
    /// chosen, but never more than this node's.
    ///
    /// # Errors
    /// [`LeaseError::LeaseExpired`] when there is no such session.
    pub async fn renew_session(&self, session: &str) -> Result<Duration, LeaseError> {
        let what = format!("renewing session {session}");
        let answer = self.put_session("renew", session, &what).await?;
        if answer.status == StatusCode::NOT_FOUND {
            return Err(LeaseError::LeaseExpired);
        }
        let sessions: Vec<WireSession> = self.parse(&what, &answer)?;
        let Some(session) = sessions.into_iter().next() else {
            return Err(LeaseError::LeaseExpired);
        };
        let ttl = session.ttl.unwrap_or_default();
        match go_duration::parse(&ttl) {
            Some(ttl) if !ttl.is_zero() => Ok(ttl.min(self.ttl)),
            // A session that never expires would do, but how long others take it for granted
            // would not be known.
            _ => Err(LeaseError::fatal(
                self.action(&what),
                format!("its TTL is {ttl:?}"),
            )),
        }
    }

    /// Ends a session, and with it the keys that it holds. One that does not exist is well, too.
    pub async fn destroy_session(&self, session: &str) -> Result<(), LeaseError> {
        let what = format!("destroying session {session}");
        self.put_session("destroy", session, &what).await?;
        Ok(())
    }

    async fn put_session(
        &self,
        verb: &str,
        session: &str,
        what: &str,
    ) -> Result<Answer, LeaseError> {
        let request = Request {
            method: Method::PUT,
            path: &["session", verb, session],
            query: &[],
            body: Vec::new(),
        };
        self.send(what, &self.session_permission(), request).await
    }

    /// The JSON of `value`, its fields in their order, as LiteFS writes it.
    pub fn json(&self, value: &impl Serialize) -> Result<Vec<u8>, LeaseError> {
        serde_json::to_vec(value)
            .map_err(|e| LeaseError::fatal(self.action("writing a value as JSON"), e))
    }

    fn parse<T: DeserializeOwned>(&self, what: &str, answer: &Answer) -> Result<T, LeaseError> {
        serde_json::from_slice(&answer.body).map_err(|e| {
            let why = format!("{}, and the answer makes no sense: {e}", answer.status);
            LeaseError::fatal(self.action(what), why)
        })
    }
}

/// Whether `text` has the form of a session's ID: a UUID.
pub(crate) fn is_session_id(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(i, byte)| match i {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

/// A value of the kind that a transaction wants.
pub(crate) fn encoded(value: &[u8]) -> String {
    BASE64.encode(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_ids_are_uuids() {
        assert!(is_session_id("56c5d282-ffdb-3ab2-04ba-b0c941aa2134"));
        for bad in [
            "",
            "x",
            "56c5d282-ffdb-3ab2-04ba-b0c941aa213",
            "56c5d282-ffdb-3ab2-04ba-b0c941aa21345",
            "56c5d282/ffdb-3ab2-04ba-b0c941aa2134",
            "56c5d282-ffdb-3ab2-04ba-b0c941aa21?4",
        ] {
            assert!(!is_session_id(bad), "took {bad:?}");
        }
    }

    #[test]
    fn a_session_is_asked_for_as_litefs_does() {
        let session = NewSession {
            node: None,
            name: "litefs",
            behavior: "delete",
            ttl: go_duration::format(Duration::from_secs(10)),
            lock_delay: go_duration::format(Duration::from_secs(1)),
            node_checks: [],
        };
        assert_eq!(
            json!(session),
            json!({"Name": "litefs", "Behavior": "delete", "TTL": "10s", "LockDelay": "1s", "NodeChecks": []})
        );
    }
}
