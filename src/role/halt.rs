//! A replica's side of the halt lock: takes it from the primary, keeps it, returns it, and sends the
//! transactions of its holder.
//!
//! Deadlines: taking has the caller's; a transaction has [`COMMIT_WAIT`] and time for its bytes. A
//! lock is kept by asking again every [`RENEW`]; whoever has not been answered for [`HALT_TTL`] takes
//! it for lost, as the primary then does. A LiteFS primary cannot be asked to keep one, and gives it
//! for [`HALT_TTL`] at most.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream;
use http::{Method, Request, Response, StatusCode};
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout_at};
use tracing::debug;

use crate::clock;
use crate::ltx::Pos;
use crate::peer::{self, Body, PeerError, Peers, refusal};
use crate::store::{Cancelled, Decided, HALT_TTL, Outgoing, Primary, Store, Verdict};
use crate::stream::{EPOCH_HEADER, NODE_ID_HEADER, format_node_id};
use crate::task;

use super::Status;

/// How often the primary is told that the lock is still wanted.
const RENEW: Duration = Duration::from_secs(10);
/// How long one request may take whose answer costs the primary no wait.
const REQUEST: Duration = Duration::from_secs(5);
/// How long a transaction may take that has no bytes.
const COMMIT_WAIT: Duration = Duration::from_secs(10);
/// Bytes that a second is allowed for.
const BYTES_A_SECOND: u64 = 4 << 20;
/// How long a primary that takes no connections is tried for a transaction.
const CONNECT_WAIT: Duration = Duration::from_secs(2);
/// Pause between two attempts.
const RETRY: Duration = Duration::from_millis(100);
/// How often a lock is tried to be returned.
const RETURNS: usize = 3;
/// Bytes of a transaction that are read at a time.
const PIECE: usize = 64 << 10;
/// The most bytes of an answer that are read.
const MAX_ANSWER: usize = 4096;

/// See the module.
pub struct HaltClient {
    runtime: Handle,
    link: Link,
    held: Mutex<HashMap<(String, i64), Held>>,
}

/// What requests need.
#[derive(Clone)]
struct Link {
    store: Weak<Store>,
    node: String,
    peers: Arc<dyn Peers>,
    status: watch::Receiver<Status>,
}

/// A lock, and whoever keeps it.
struct Held {
    /// Its address, as the lease names it.
    primary: String,
    keeper: AbortHandle,
}

#[derive(Deserialize)]
struct Taken {
    pos: TakenPos,
}

#[derive(Deserialize)]
struct TakenPos {
    #[serde(rename = "TXID")]
    txid: String,
    #[serde(rename = "PostApplyChecksum")]
    checksum: String,
}

impl HaltClient {
    /// For this store's node, whose role loop says `status`. To be called within a runtime.
    pub fn new(
        store: &Arc<Store>,
        peers: Arc<dyn Peers>,
        status: watch::Receiver<Status>,
    ) -> HaltClient {
        HaltClient {
            runtime: Handle::current(),
            link: Link {
                store: Arc::downgrade(store),
                node: format_node_id(store.node_id()),
                peers,
                status,
            },
            held: Mutex::default(),
        }
    }

    fn primary(&self, db: &str, id: i64) -> Option<String> {
        let held = self.held.lock();
        held.get(&(db.to_owned(), id)).map(|h| h.primary.clone())
    }
}

/// A request about a halt lock.
struct Ask<'a> {
    method: Method,
    primary: &'a str,
    path: &'a str,
    query: &'a [(&'a str, &'a str)],
    limit: Duration,
}

impl Link {
    async fn ask(&self, ask: Ask<'_>, body: Body) -> Result<Response<Bytes>, PeerError> {
        let mut url = peer::url(ask.primary, ask.path).map_err(PeerError::broken)?;
        url.query_pairs_mut().extend_pairs(ask.query);
        let request = Request::builder()
            .method(ask.method)
            .uri(url.as_str())
            .header(NODE_ID_HEADER, &self.node)
            .body(body)
            .map_err(|e| PeerError::broken(e.to_string()))?;
        peer::ask(&*self.peers, request, ask.limit, MAX_ANSWER).await
    }

    async fn ask_halt(
        &self,
        method: Method,
        primary: &str,
        query: &[(&str, &str)],
        limit: Duration,
    ) -> Result<Response<Bytes>, PeerError> {
        let ask = Ask {
            method,
            primary,
            path: "/halt",
            query,
            limit,
        };
        self.ask(ask, peer::empty()).await
    }

    /// Asks for the lock until it is given or refused; whether it can be kept for longer.
    async fn take(
        &self,
        primary: &str,
        db: &str,
        id: i64,
        until: Instant,
    ) -> Result<(Pos, bool), String> {
        let id = id.to_string();
        let query = [("name", db), ("id", &*id)];
        loop {
            let left = until.saturating_duration_since(clock::now());
            let failed = match self.ask_halt(Method::POST, primary, &query, left).await {
                Ok(answer) if answer.status().is_success() => {
                    let renewable = answer.headers().contains_key(EPOCH_HEADER);
                    let taken: Taken =
                        serde_json::from_slice(answer.body()).map_err(|e| e.to_string())?;
                    let pos = format!("{}/{}", taken.pos.txid, taken.pos.checksum);
                    return Ok((
                        pos.parse().map_err(|_| format!("{pos:?} is no position"))?,
                        renewable,
                    ));
                }
                Ok(answer) => return Err(refusal(&answer)),
                Err(e) => format!("{primary}: {e}"),
            };
            if clock::now() + RETRY >= until {
                return Err(failed);
            }
            sleep(RETRY).await;
        }
    }

    /// Keeps the lock until it is lost.
    async fn keep(self, primary: String, db: String, id: i64, mut since: Instant, renewable: bool) {
        let mut status = self.status.clone();
        let number = id.to_string();
        let query = [("name", &*db), ("id", &*number), ("renew", "1")];
        let why = loop {
            let lost = since + HALT_TTL;
            let next = if renewable {
                lost.min(clock::now() + RENEW)
            } else {
                lost
            };
            let moved = status.wait_for(|s| {
                let named = s.primary.as_ref();
                named.is_some_and(|named| named.advertise_url != primary)
            });
            if timeout_at(next.into(), moved).await.is_ok() {
                break "another node is primary".to_owned();
            }
            if clock::now() >= lost {
                break "it was not heard of the primary".to_owned();
            }
            let asked = clock::now();
            match self.ask_halt(Method::POST, &primary, &query, REQUEST).await {
                Ok(answer) if answer.status().is_success() => since = asked,
                Ok(answer) if answer.status().is_client_error() => break refusal(&answer),
                Ok(answer) => {
                    debug!(db, status = %answer.status(), "the halt lock was not renewed")
                }
                Err(error) => debug!(db, %error, "the halt lock was not renewed"),
            }
        };
        let store = self.store.clone();
        let lose = move || {
            if let Some(db) = store.upgrade().and_then(|s| s.database(&db)) {
                db.lose_halt(id, &why);
            }
        };
        // The store may take this task's own end for its cue: it is not waited for.
        drop(task::blocking(lose));
    }

    async fn give_back(self, primary: String, db: String, id: i64) {
        let id = id.to_string();
        let query = [("name", &*db), ("id", &*id)];
        for _ in 0..RETURNS {
            let asked = self.ask_halt(Method::DELETE, &primary, &query, REQUEST);
            match asked.await {
                Ok(_) => return,
                Err(error) => debug!(db, %error, "the halt lock was not returned"),
            }
            sleep(RETRY).await;
        }
    }

    /// Sends a transaction until the primary has answered.
    async fn commit(&self, primary: &str, db: &str, id: i64, ltx: &Arc<Outgoing>) -> Verdict {
        let began = clock::now();
        let bytes = Duration::from_secs(ltx.size() / BYTES_A_SECOND);
        let until = began + COMMIT_WAIT + bytes;
        let id = id.to_string();
        // Whether the primary may have got it.
        let mut uncertain = false;
        loop {
            let left = until.saturating_duration_since(clock::now());
            let ask = Ask {
                method: Method::POST,
                primary,
                path: "/tx",
                query: &[("name", db), ("lockID", &*id)],
                limit: left.min(REQUEST + bytes),
            };
            let why = match self.ask(ask, peer::pieces(pieces(ltx.clone()))).await {
                Ok(answer) if answer.status().is_success() => return Verdict::Accepted,
                Ok(answer) => {
                    let status = answer.status();
                    let why = refusal(&answer);
                    match status {
                        StatusCode::LOCKED | StatusCode::BAD_REQUEST if !uncertain => {
                            return Verdict::Refused(why);
                        }
                        StatusCode::CONFLICT
                        | StatusCode::NOT_FOUND
                        | StatusCode::SERVICE_UNAVAILABLE
                            if !uncertain =>
                        {
                            return Verdict::Lost(why);
                        }
                        s if s.is_client_error() => return Verdict::Unknown(why),
                        _ => why,
                    }
                }
                Err(e) if e.unconnected && !uncertain => {
                    if clock::now().duration_since(began) > CONNECT_WAIT {
                        return Verdict::Refused(format!("{primary}: {e}"));
                    }
                    sleep(RETRY).await;
                    continue;
                }
                Err(e) => format!("{primary}: {e}"),
            };
            uncertain = true;
            if clock::now() + RETRY >= until {
                return Verdict::Unknown(why);
            }
            sleep(RETRY).await;
        }
    }
}

/// The bytes of a transaction. They are in memory, or were written a moment ago.
fn pieces(
    ltx: Arc<Outgoing>,
) -> impl futures_util::Stream<Item = std::io::Result<Bytes>> + Send + Sync + 'static {
    stream::try_unfold((ltx, 0), |(ltx, at)| async move {
        let mut piece = vec![0; PIECE];
        let n = ltx.read_at(at, &mut piece)?;
        piece.truncate(n);
        Ok((n > 0).then_some((piece.into(), (ltx, at + n as u64))))
    })
}

impl Primary for HaltClient {
    fn take(&self, db: &str, id: i64, until: Instant, cancelled: Cancelled) -> Result<Pos, String> {
        let primary = self.link.status.borrow().primary.clone();
        let primary = primary.ok_or("there is no primary")?.advertise_url;
        let asked = clock::now();
        let given_up = async {
            while !cancelled() {
                sleep(RETRY).await;
            }
        };
        let taken = self.runtime.block_on(async {
            tokio::select! {
                biased;
                taken = self.link.take(&primary, db, id, until) => taken,
                () = given_up => Err("it is not wanted any more".to_owned()),
            }
        });
        let (pos, renewable) = match taken {
            Ok(taken) => taken,
            Err(why) => {
                // It may have been given all the same.
                let link = self.link.clone();
                self.runtime
                    .spawn(link.give_back(primary, db.to_owned(), id));
                return Err(why);
            }
        };
        let link = self.link.clone();
        let keeper = link.keep(primary.clone(), db.to_owned(), id, asked, renewable);
        let keeper = self.runtime.spawn(keeper).abort_handle();
        let held = Held { primary, keeper };
        self.held.lock().insert((db.to_owned(), id), held);
        Ok(pos)
    }

    fn release(&self, db: &str, id: i64) {
        if let Some(held) = self.held.lock().remove(&(db.to_owned(), id)) {
            held.keeper.abort();
            let link = self.link.clone();
            let give_back = link.give_back(held.primary, db.to_owned(), id);
            self.runtime.spawn(give_back);
        }
    }

    fn commit(&self, db: &str, id: i64, ltx: Arc<Outgoing>, decided: Decided) {
        let Some(primary) = self.primary(db, id) else {
            return decided.call(Verdict::Lost("the halt lock is not held".into()));
        };
        let (link, db) = (self.link.clone(), db.to_owned());
        self.runtime.spawn(async move {
            let verdict = link.commit(&primary, &db, id, &ltx).await;
            // What follows from it waits for disks.
            drop(task::blocking(move || decided.call(verdict)));
        });
    }
}
