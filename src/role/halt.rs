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

use futures_util::stream;
use parking_lot::Mutex;
use reqwest::{Client, StatusCode, Url};
use serde::Deserialize;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout_at};
use tracing::debug;

use crate::ltx::Pos;
use crate::store::{Cancelled, Decided, HALT_TTL, Outgoing, Primary, Store, Verdict};
use crate::stream::{EPOCH_HEADER, NODE_ID_HEADER, format_node_id};

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
/// The most characters of a refusal's text that are told on.
const MAX_REFUSAL: usize = 512;

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
    client: Client,
    status: watch::Receiver<Status>,
}

/// A lock, and whoever keeps it.
struct Held {
    primary: Url,
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
    ///
    /// # Errors
    /// What the HTTP client says.
    pub fn new(
        store: &Arc<Store>,
        status: watch::Receiver<Status>,
    ) -> Result<HaltClient, reqwest::Error> {
        let client = Client::builder()
            .connect_timeout(CONNECT_WAIT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()?;
        Ok(HaltClient {
            runtime: Handle::current(),
            link: Link {
                store: Arc::downgrade(store),
                node: format_node_id(store.node_id()),
                client,
                status,
            },
            held: Mutex::default(),
        })
    }

    fn primary(&self, db: &str, id: i64) -> Option<Url> {
        let held = self.held.lock();
        held.get(&(db.to_owned(), id)).map(|h| h.primary.clone())
    }
}

fn halt_url(primary: &Url, db: &str, id: i64) -> Url {
    let mut url = primary.clone();
    url.set_path("/halt");
    url.query_pairs_mut()
        .append_pair("name", db)
        .append_pair("id", &id.to_string());
    url
}

impl Link {
    /// Asks for the lock until it is given or refused; whether it can be kept for longer.
    async fn take(
        &self,
        primary: &Url,
        db: &str,
        id: i64,
        until: Instant,
    ) -> Result<(Pos, bool), String> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let request = self
                .client
                .post(halt_url(primary, db, id))
                .header(NODE_ID_HEADER, &self.node)
                .timeout(left);
            let failed = match request.send().await {
                Ok(answer) if answer.status().is_success() => {
                    let renewable = answer.headers().contains_key(EPOCH_HEADER);
                    let taken = answer.json::<Taken>().await.map_err(|e| e.to_string())?;
                    let pos = format!("{}/{}", taken.pos.txid, taken.pos.checksum);
                    return Ok((
                        pos.parse().map_err(|_| format!("{pos:?} is no position"))?,
                        renewable,
                    ));
                }
                Ok(answer) => return Err(refusal(answer).await),
                Err(e) => e.to_string(),
            };
            if Instant::now() + RETRY >= until {
                return Err(failed);
            }
            sleep(RETRY).await;
        }
    }

    /// Keeps the lock until it is lost.
    async fn keep(self, primary: Url, db: String, id: i64, mut since: Instant, renewable: bool) {
        let mut status = self.status.clone();
        let mut url = halt_url(&primary, &db, id);
        url.query_pairs_mut().append_pair("renew", "1");
        let why = loop {
            let lost = since + HALT_TTL;
            let next = if renewable {
                lost.min(Instant::now() + RENEW)
            } else {
                lost
            };
            let moved = status.wait_for(|s| {
                let names = s.primary.as_ref().map(|p| base(&p.advertise_url));
                names.is_some_and(|named| named.as_ref() != Ok(&primary))
            });
            if timeout_at(next.into(), moved).await.is_ok() {
                break "another node is primary".to_owned();
            }
            if Instant::now() >= lost {
                break "it was not heard of the primary".to_owned();
            }
            let asked = Instant::now();
            let request = self
                .client
                .post(url.clone())
                .header(NODE_ID_HEADER, &self.node)
                .timeout(REQUEST);
            match request.send().await {
                Ok(answer) if answer.status().is_success() => since = asked,
                Ok(answer) if answer.status().is_client_error() => break refusal(answer).await,
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
        drop(tokio::task::spawn_blocking(lose));
    }

    async fn give_back(self, primary: Url, db: String, id: i64) {
        for _ in 0..RETURNS {
            let request = self
                .client
                .delete(halt_url(&primary, &db, id))
                .header(NODE_ID_HEADER, &self.node)
                .timeout(REQUEST);
            match request.send().await {
                Ok(_) => return,
                Err(error) => debug!(db, %error, "the halt lock was not returned"),
            }
            sleep(RETRY).await;
        }
    }

    /// Sends a transaction until the primary has answered.
    async fn commit(&self, primary: Url, db: &str, id: i64, ltx: &Arc<Outgoing>) -> Verdict {
        let began = Instant::now();
        let bytes = Duration::from_secs(ltx.size() / BYTES_A_SECOND);
        let until = began + COMMIT_WAIT + bytes;
        let mut url = primary;
        url.set_path("/tx");
        url.query_pairs_mut()
            .append_pair("name", db)
            .append_pair("lockID", &id.to_string());
        // Whether the primary may have got it.
        let mut uncertain = false;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let request = self
                .client
                .post(url.clone())
                .header(NODE_ID_HEADER, &self.node)
                .timeout(left.min(REQUEST + bytes))
                .body(reqwest::Body::wrap_stream(pieces(ltx.clone())));
            let why = match request.send().await {
                Ok(answer) if answer.status().is_success() => return Verdict::Accepted,
                Ok(answer) => {
                    let status = answer.status();
                    let why = refusal(answer).await;
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
                Err(e) if e.is_connect() && !uncertain => {
                    if began.elapsed() > CONNECT_WAIT {
                        return Verdict::Refused(e.to_string());
                    }
                    sleep(RETRY).await;
                    continue;
                }
                Err(e) => e.to_string(),
            };
            uncertain = true;
            if Instant::now() + RETRY >= until {
                return Verdict::Unknown(why);
            }
            sleep(RETRY).await;
        }
    }
}

/// The bytes of a transaction. They are in memory, or were written a moment ago.
fn pieces(
    ltx: Arc<Outgoing>,
) -> impl futures_util::Stream<Item = std::io::Result<Vec<u8>>> + Send + 'static {
    stream::try_unfold((ltx, 0), |(ltx, at)| async move {
        let mut piece = vec![0; PIECE];
        let n = ltx.read_at(at, &mut piece)?;
        piece.truncate(n);
        Ok((n > 0).then_some((piece, (ltx, at + n as u64))))
    })
}

/// The address of a node's API, from how the lease names it.
fn base(advertised: &str) -> Result<Url, String> {
    let mut url = Url::parse(advertised).map_err(|e| format!("{advertised:?}: {e}"))?;
    url.set_path("");
    url.set_query(None);
    Ok(url)
}

async fn refusal(answer: reqwest::Response) -> String {
    let status = answer.status();
    let text = answer.text().await.unwrap_or_default();
    let told: String = text.trim().chars().take(MAX_REFUSAL).collect();
    format!("{status}: {told}")
}

impl Primary for HaltClient {
    fn take(&self, db: &str, id: i64, until: Instant, cancelled: Cancelled) -> Result<Pos, String> {
        let primary = self.link.status.borrow().primary.clone();
        let primary = primary.ok_or("there is no primary")?;
        let primary = base(&primary.advertise_url)?;
        let asked = Instant::now();
        let given_up = async {
            while !cancelled() {
                sleep(RETRY).await;
            }
        };
        let taken = self.runtime.block_on(async {
            tokio::select! {
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
            let verdict = link.commit(primary, &db, id, &ltx).await;
            // What follows from it waits for disks.
            drop(tokio::task::spawn_blocking(move || decided.call(verdict)));
        });
    }
}
