//! Paths of the halt lock: `POST /halt` and `DELETE /halt`, by which a replica takes and returns it,
//! and `POST /tx`, by which its holder commits.
//!
//! The caller is the node that the header `Litefs-Id` names. `POST /halt` is the same lock when it is
//! asked with the same ID again; with `renew` it is only kept, never taken: so a request that
//! arrives late takes nothing. Status codes of `/tx`: 400, 404, 409, 423 and 503 mean that nothing
//! changed; 500 means that nobody knows.

use std::convert::Infallible;
use std::io::{self, Read};
use std::sync::Arc;

use bytes::{Buf, Bytes};
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep_until;
use warp::reply::Response;
use warp::{Filter, Rejection, Reply};

use crate::ltx::Pos;
use crate::store::{Database, HALT_WAIT, StoreError, check_database};
use crate::stream::{EPOCH_HEADER, NODE_ID_HEADER, parse_node_id};
use crate::task;

use super::api::{Api, refuse};
use super::body::Pace;
use super::guests::{Connection, Place};
use super::timestamp;

/// Pieces of a body that wait for the store.
const CHANNEL_CAPACITY: usize = 16;

/// The paths of this module.
pub(super) fn routes(
    api: impl Filter<Extract = (Arc<Api>,), Error = Infallible> + Clone + Send + Sync + 'static,
) -> impl Filter<Extract = (Response,), Error = Rejection> + Clone + Send + Sync + 'static {
    let take = warp::path!("halt")
        .and(warp::post())
        .and(api.clone())
        .and(warp::ext::get::<Arc<Connection>>())
        .and(warp::header::headers_cloned())
        .and(warp::query::<Halt>())
        .then(take);
    let give_back = warp::path!("halt")
        .and(warp::delete())
        .and(api.clone())
        .and(warp::query::<Halt>())
        .then(give_back);
    let tx = warp::path!("tx")
        .and(warp::post())
        .and(api)
        .and(warp::ext::get::<Arc<Connection>>())
        .and(warp::header::headers_cloned())
        .and(warp::query::<Halt>())
        .and(warp::body::stream())
        .then(commit);
    take.or(give_back).unify().or(tx).unify()
}

/// What stands in the query; checked by hand, so that whatever is wrong with it is 400.
#[derive(Deserialize)]
struct Halt {
    name: Option<String>,
    #[serde(alias = "lockID")]
    id: Option<String>,
    renew: Option<String>,
}

impl Halt {
    /// The database's name and the lock's ID.
    fn names(&self) -> Result<(&str, i64), Refusal> {
        let name = self.name.as_deref().unwrap_or_default();
        check_database(name).map_err(|e| bad(&e.to_string()))?;
        let id = self.id.as_deref().and_then(|id| id.parse().ok());
        match id {
            Some(id) if id > 0 => Ok((name, id)),
            _ => Err(bad("the ID of a halt lock is a positive number")),
        }
    }
}

#[derive(Serialize)]
struct Taken {
    id: i64,
    pos: TakenPos,
    expires: String,
}

#[derive(Serialize)]
struct TakenPos {
    #[serde(rename = "TXID")]
    txid: String,
    #[serde(rename = "PostApplyChecksum")]
    checksum: String,
}

/// Why a request is not served.
struct Refusal(StatusCode, String);

impl Refusal {
    fn answer(self) -> Response {
        refuse(self.0, &self.1)
    }
}

fn bad(text: &str) -> Refusal {
    Refusal(StatusCode::BAD_REQUEST, text.to_owned())
}

/// The node that asks.
fn caller(api: &Api, headers: &HeaderMap) -> Result<u64, Refusal> {
    let id = headers.get(NODE_ID_HEADER).and_then(|v| v.to_str().ok());
    match id.and_then(parse_node_id) {
        None => Err(bad("the header Litefs-Id must name the calling node")),
        Some(id) if id == api.store.node_id() => Err(bad("this is the calling node itself")),
        Some(id) => Ok(id),
    }
}

/// A place for a request that holds a thread.
fn place(connection: &Connection) -> Result<Place, Refusal> {
    let place = connection.place(|q| &q.jobs);
    place.map_err(|(status, text)| Refusal(status, text))
}

/// The database, if this node is its primary.
fn database(api: &Api, name: &str) -> Result<Arc<Database>, Refusal> {
    if !api.status.borrow().is_primary {
        let text = "this node is not the primary";
        return Err(Refusal(StatusCode::SERVICE_UNAVAILABLE, text.to_owned()));
    }
    let db = api.store.database(name);
    db.ok_or_else(|| {
        Refusal(
            StatusCode::NOT_FOUND,
            "there is no such database".to_owned(),
        )
    })
}

async fn take(
    api: Arc<Api>,
    connection: Arc<Connection>,
    headers: HeaderMap,
    query: Halt,
) -> Response {
    let asked = caller(&api, &headers).and_then(|node| {
        let (name, id) = query.names()?;
        Ok((node, database(&api, name)?, id, place(&connection)?))
    });
    let (node, db, id, place) = match asked {
        Ok(asked) => asked,
        Err(refusal) => return refusal.answer(),
    };
    let ttl = api.halt_ttl;
    if query.renew.is_some() {
        return if db.renew_halt(id, node, ttl) {
            taken(&api, id, db.pos())
        } else {
            refuse(StatusCode::CONFLICT, "this halt lock is not given")
        };
    }
    let (tell, told) = oneshot::channel();
    let granting = db.clone();
    task::blocking(move || {
        let _place = place;
        let granted = granting.grant_halt(id, node, ttl, HALT_WAIT);
        let given = granted.is_ok();
        if given {
            task::spawn(expire(granting.clone(), id));
        }
        if tell.send(granted).is_err() && given {
            // The caller went away.
            granting.return_halt(id);
        }
    });
    match told.await {
        Ok(Ok(pos)) => taken(&api, id, pos),
        Ok(Err(e)) => refuse(status(&e), &e.to_string()),
        Err(_) => refuse(StatusCode::INTERNAL_SERVER_ERROR, "internal error"),
    }
}

fn taken(api: &Api, id: i64, pos: Pos) -> Response {
    let ttl = i64::try_from(api.halt_ttl.as_millis()).unwrap_or(0);
    let answer = Taken {
        id,
        pos: TakenPos {
            txid: format!("{:016x}", pos.txid),
            checksum: format!("{:016x}", pos.checksum),
        },
        expires: timestamp::rfc3339(crate::stream::sender::now_ms().saturating_add(ttl)),
    };
    let text = serde_json::to_string(&answer).unwrap_or_default();
    let reply = warp::reply::with_header(format!("{text}\n"), EPOCH_HEADER, api.epoch());
    warp::reply::with_header(reply, http::header::CONTENT_TYPE, "application/json").into_response()
}

/// Takes the lock back when its time is over.
async fn expire(db: Arc<Database>, id: i64) {
    loop {
        let asked = db.clone();
        match task::blocking(move || asked.expire_halt(id)).await {
            Ok(Some(at)) => sleep_until(at.into()).await,
            _ => return,
        }
    }
}

async fn give_back(api: Arc<Api>, query: Halt) -> Response {
    let (name, id) = match query.names() {
        Ok(names) => names,
        Err(refusal) => return refusal.answer(),
    };
    let Some(db) = api.store.database(name) else {
        // Whatever was locked is gone.
        return StatusCode::OK.into_response();
    };
    match task::blocking(move || db.return_halt(id)).await {
        Ok(()) => StatusCode::OK.into_response(),
        Err(_) => refuse(StatusCode::INTERNAL_SERVER_ERROR, "internal error"),
    }
}

/// The code for an error; see the module.
fn status(e: &StoreError) -> StatusCode {
    match e {
        StoreError::HaltLock { .. } | StoreError::PositionMismatch { .. } => StatusCode::CONFLICT,
        StoreError::NotPrimary(_) => StatusCode::SERVICE_UNAVAILABLE,
        StoreError::NoDatabase(_) => StatusCode::NOT_FOUND,
        StoreError::LockTimeout { .. } => StatusCode::LOCKED,
        StoreError::Refused { .. } | StoreError::Ltx { .. } | StoreError::Name(_) => {
            StatusCode::BAD_REQUEST
        }
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

async fn commit<B: Buf>(
    api: Arc<Api>,
    connection: Arc<Connection>,
    headers: HeaderMap,
    query: Halt,
    body: impl Stream<Item = Result<B, warp::Error>>,
) -> Response {
    let asked = caller(&api, &headers).and_then(|node| {
        let (name, id) = query.names()?;
        database(&api, name)?;
        Ok((node, name.to_owned(), id, place(&connection)?))
    });
    let (node, name, id, place) = match asked {
        Ok(asked) => asked,
        Err(refusal) => return refusal.answer(),
    };
    let (feed, pieces) = mpsc::channel(CHANNEL_CAPACITY);
    let store = api.store.clone();
    let applying = task::blocking(move || {
        let _place = place;
        let mut reader = BodyReader {
            pieces,
            current: Bytes::new(),
        };
        store.commit_forwarded(&name, id, node, &mut reader)
    });
    pump(body, feed).await;
    match applying.await {
        Ok(Ok(())) => StatusCode::OK.into_response(),
        Ok(Err(e)) => refuse(status(&e), &e.to_string()),
        Err(_) => refuse(StatusCode::INTERNAL_SERVER_ERROR, "internal error"),
    }
}

/// Feeds the body to the store, until it ends, breaks off, comes too slowly, or is not wanted any more.
async fn pump<B: Buf>(body: impl Stream<Item = Result<B, warp::Error>>, feed: mpsc::Sender<Bytes>) {
    let mut body = std::pin::pin!(body);
    let mut pace = Pace::new();
    while let Some(Some(Ok(mut piece))) = pace.wait(body.next()).await {
        let piece = piece.copy_to_bytes(piece.remaining());
        pace.came(piece.len());
        if feed.send(piece).await.is_err() {
            return;
        }
    }
}

/// The pieces of a body as a reader.
struct BodyReader {
    pieces: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Read for BodyReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match task::wait(self.pieces.recv()) {
                Some(piece) => self.current = piece,
                None => return Ok(0),
            }
        }
        let n = buf.len().min(self.current.len());
        self.current.copy_to_slice(&mut buf[..n]);
        Ok(n)
    }
}
