//! The paths of the API and what they answer.
//!
//! Every request is one of: `GET /info`, `GET /events`, `GET /metrics`, `GET /debug/vars`,
//! `POST /stream`, `GET /export`, `POST /import` ([`super::transfer`]), those that change or ask for
//! the primary's role ([`super::role`]), and those of the halt lock ([`super::halt`]). Another method
//! on one of these paths is 405, another path 404, and every error is a
//! text of one line. What a request carries is bounded and checked before it is used.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Buf;
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, StatusCode, header};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};
use warp::reject::{InvalidQuery, MethodNotAllowed};
use warp::reply::Response;
use warp::{Filter, Rejection, Reply};

use crate::access::Current;
use crate::role::{Commands, Promoter, Status};
use crate::store::{Store, check_database};
use crate::stream::coding::{self, Coder};
use crate::stream::posmap;
use crate::stream::replicas::Replicas;
use crate::stream::sender::{self, Limits, Replica, SendError};
use crate::stream::stats::Stats;
use crate::stream::{CLUSTER_ID_HEADER, EPOCH_HEADER, NODE_ID_HEADER, parse_node_id};
use crate::task;

use super::guests::{Connection, Place};
use super::server::Version;
use super::{body, events, halt, metrics, role, transfer};

/// How long a peer may take to send a request's body.
pub(super) const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the streams of a node that stops wait for it to take no more writes.
const STEP_DOWN: Duration = Duration::from_secs(1);

/// What the API answers from.
pub struct Api {
    /// The node's databases.
    pub store: Arc<Store>,
    /// What its streams count.
    pub stats: Arc<Stats>,
    /// The replicas that are connected.
    pub replicas: Arc<Replicas>,
    /// What the role loop can be asked to do.
    pub commands: Commands,
    /// How this node asks to be primary.
    pub promoter: Promoter,
    /// What the node is, as the role loop says.
    pub status: watch::Receiver<Status>,
    /// May the node become primary?
    pub candidate: bool,
    /// Whether primaries have numbers: not with a static lease.
    pub fenced: bool,
    /// The path that `/info` names.
    pub path: PathBuf,
    /// How long a snapshot may take (`http.snapshot-timeout`).
    pub snapshot_timeout: Duration,
    /// How long a halt lock is given for.
    pub halt_ttl: Duration,
    /// Requests that the kernel has sent to the mount.
    pub fuse_requests: Box<dyn Fn() -> u64 + Send + Sync>,
    /// What is asked of those who connect.
    pub keys: Current,
    /// Becomes true when the node stops.
    pub shutdown: watch::Receiver<bool>,
}

impl Api {
    /// This primary's number, for those who follow it.
    pub(super) fn epoch(&self) -> u64 {
        if self.fenced { self.store.epoch() } else { 0 }
    }

    /// Resolves when the node stops.
    pub(super) fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut shutdown = self.shutdown.clone();
        async move {
            let _ = shutdown.wait_for(|stop| *stop).await;
        }
    }

    /// Resolves when the node is no longer primary. A node that stops has [`STEP_DOWN`] to become
    /// none, so that the streams carry everything that it still acknowledged.
    fn demoted(&self) -> impl Future<Output = ()> + Send + 'static {
        let stopped = self.stopped();
        let mut status = self.status.clone();
        async move {
            tokio::select! {
                biased;
                () = async { stopped.await; sleep(STEP_DOWN).await } => {}
                _ = status.wait_for(|status| !status.is_primary) => {}
            }
        }
    }
}

/// All paths.
pub(crate) fn routes(
    api: Arc<Api>,
) -> impl Filter<Extract = (Response,), Error = Infallible> + Clone + Send + Sync + 'static {
    let with = |api: &Arc<Api>| {
        let api = Arc::clone(api);
        warp::any().map(move || Arc::clone(&api))
    };
    let info = warp::path!("info")
        .and(warp::get())
        .and(with(&api))
        .map(|api: Arc<Api>| info(&api));
    let vars = warp::path!("debug" / "vars")
        .and(warp::get())
        .and(with(&api))
        .map(|api: Arc<Api>| debug_vars(&api));
    let numbers = warp::path!("metrics")
        .and(warp::get())
        .and(with(&api))
        .and(warp::ext::get::<Arc<Connection>>())
        .then(numbers);
    let events = warp::path!("events")
        .and(warp::get())
        .and(with(&api))
        .and(warp::ext::get::<Arc<Connection>>())
        .map(follow_events);
    let stream = warp::path!("stream")
        .and(warp::post())
        .and(with(&api))
        .and(warp::ext::get::<Arc<Connection>>())
        .and(warp::ext::get::<Version>())
        .and(warp::header::headers_cloned())
        .and(warp::query::<StreamQuery>())
        .and(warp::body::stream())
        .then(post_stream);
    let gets = info.or(vars).unify().or(numbers).unify().or(events).unify();
    let export = warp::path!("export")
        .and(warp::get())
        .and(with(&api))
        .and(warp::ext::get::<Arc<Connection>>())
        .and(warp::query::<transfer::DatabaseQuery>())
        .then(transfer::get_export);
    let import = warp::path!("import")
        .and(warp::post())
        .and(with(&api))
        .and(warp::ext::get::<Arc<Connection>>())
        .and(warp::header::headers_cloned())
        .and(warp::query::<transfer::DatabaseQuery>())
        .and(warp::body::stream())
        .then(transfer::post_import);
    let files = export.or(import).unify();
    let role = role::routes(with(&api));
    let halt = halt::routes(with(&api));
    gets.or(stream)
        .unify()
        .or(files)
        .unify()
        .or(role)
        .unify()
        .or(halt)
        .unify()
        .recover(rejected)
        .unify()
}

/// The answer to a request that no path took.
async fn rejected(rejection: Rejection) -> Result<Response, Infallible> {
    Ok(if rejection.find::<MethodNotAllowed>().is_some() {
        refuse(StatusCode::METHOD_NOT_ALLOWED, "method not allowed")
    } else if rejection.is_not_found() {
        refuse(StatusCode::NOT_FOUND, "not found")
    } else if rejection.find::<InvalidQuery>().is_some() {
        refuse(StatusCode::BAD_REQUEST, "invalid query")
    } else {
        warn!(?rejection, "a request failed");
        refuse(StatusCode::INTERNAL_SERVER_ERROR, "internal error")
    })
}

pub(super) fn refuse(status: StatusCode, text: &str) -> Response {
    warp::reply::with_status(format!("{text}\n"), status).into_response()
}

fn json(text: String) -> Response {
    warp::reply::with_header(text, header::CONTENT_TYPE, "application/json").into_response()
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Info<'a> {
    #[serde(rename = "clusterID", skip_serializing_if = "Option::is_none")]
    cluster_id: Option<String>,
    is_primary: bool,
    candidate: bool,
    path: &'a str,
    primary: InfoPrimary<'a>,
}

#[derive(Serialize)]
struct InfoPrimary<'a> {
    hostname: &'a str,
}

fn info(api: &Api) -> Response {
    let status = api.status.borrow().clone();
    let info = Info {
        cluster_id: api.store.cluster_id(),
        is_primary: status.is_primary,
        candidate: api.candidate,
        path: &api.path.to_string_lossy(),
        primary: InfoPrimary {
            hostname: status
                .primary
                .as_ref()
                .map_or("", |primary| &primary.hostname),
        },
    };
    pretty(&info)
}

#[derive(Serialize)]
struct Vars<'a> {
    store: VarsStore<'a>,
}

#[derive(Serialize)]
struct VarsStore<'a> {
    #[serde(rename = "isPrimary")]
    is_primary: bool,
    candidate: bool,
    dbs: BTreeMap<&'a str, VarsDb<'a>>,
}

#[derive(Serialize)]
struct VarsDb<'a> {
    name: &'a str,
    txid: String,
    checksum: String,
    /// SQLite's locks live in the kernel: there are none for the daemon to tell of.
    locks: BTreeMap<&'static str, &'static str>,
}

fn debug_vars(api: &Api) -> Response {
    let databases = api.store.databases();
    let dbs = databases.iter().map(|db| {
        let pos = db.pos();
        let vars = VarsDb {
            name: db.name(),
            txid: format!("{:016x}", pos.txid),
            checksum: format!("{:016x}", pos.checksum),
            locks: BTreeMap::new(),
        };
        (db.name(), vars)
    });
    let store = VarsStore {
        is_primary: api.status.borrow().is_primary,
        candidate: api.candidate,
        dbs: dbs.collect(),
    };
    pretty(&Vars { store })
}

/// JSON indented by two spaces, with a newline at the end.
fn pretty(value: &impl Serialize) -> Response {
    match serde_json::to_string_pretty(value) {
        Ok(text) => json(text + "\n"),
        Err(error) => refuse(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

async fn numbers(api: Arc<Api>, connection: Arc<Connection>) -> Response {
    // The job goes on when its request is given up, and so does its place.
    let place = match connection.place(|q| &q.jobs) {
        Ok(place) => place,
        Err((status, text)) => return refuse(status, &text),
    };
    let gathered = task::blocking(move || {
        let _place = place;
        metrics::gather(&api)
    })
    .await;
    match gathered {
        Ok(Ok(text)) => warp::reply::with_header(text, header::CONTENT_TYPE, metrics::CONTENT_TYPE)
            .into_response(),
        Ok(Err(error)) => refuse(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        Err(_) => refuse(
            StatusCode::INTERNAL_SERVER_ERROR,
            "gathering the metrics failed",
        ),
    }
}

fn follow_events(api: Arc<Api>, connection: Arc<Connection>) -> Response {
    let place = match connection.place(|q| &q.events) {
        Ok(place) => place,
        Err((status, text)) => return refuse(status, &text),
    };
    let (body, stream) = body::channel(16);
    // Subscribed first: what happens after the first line was made is not lost.
    let events = api.store.events();
    let _ = body.channel.try_send(events::init_line(&api.store.role()));
    let stopped = api.stopped();
    task::spawn(async move {
        let _place = place;
        let _counted = api.stats.event_reader();
        match events::run(events, &body.channel, stopped).await {
            events::End::Behind => {
                info!(
                    "a reader of /events fell {} behind and was disconnected",
                    events::MAX_BEHIND
                );
                connection.abort();
            }
            events::End::Stalled => {
                info!(
                    "a reader of /events took nothing for {} s and was disconnected",
                    events::STALL.as_secs()
                );
                connection.abort();
            }
            events::End::Stopped => body.finish(),
            events::End::Gone => {}
        }
    });
    json_lines(warp::reply::stream(stream))
}

fn json_lines(reply: impl Reply) -> Response {
    warp::reply::with_header(reply, header::CONTENT_TYPE, "application/x-ndjson").into_response()
}

#[derive(Deserialize)]
struct StreamQuery {
    filter: Option<String>,
}

/// Answers `POST /stream`.
async fn post_stream<B: Buf>(
    api: Arc<Api>,
    connection: Arc<Connection>,
    version: Version,
    headers: HeaderMap,
    query: StreamQuery,
    body: impl Stream<Item = Result<B, warp::Error>>,
) -> Response {
    let place = match connection.place(|q| &q.streams) {
        Ok(place) => place,
        Err((status, text)) => return refuse(status, &text),
    };
    match replica(&api, version.0, &headers, &query, body).await {
        Ok(replica) => stream(api, connection, place, replica),
        Err((status, text)) => refuse(status, &text),
    }
}

/// What a replica asks for, or the answer that refuses it.
async fn replica<B: Buf>(
    api: &Api,
    version: http::Version,
    headers: &HeaderMap,
    query: &StreamQuery,
    body: impl Stream<Item = Result<B, warp::Error>>,
) -> Result<Replica, (StatusCode, String)> {
    if version < http::Version::HTTP_2 {
        let text = "the stream needs HTTP/2: connect with prior knowledge".to_owned();
        return Err((StatusCode::UPGRADE_REQUIRED, text));
    }
    let bad = |text: String| (StatusCode::BAD_REQUEST, text);
    let given = |name| {
        headers
            .get(name)
            .map(|value| String::from_utf8_lossy(value.as_bytes()))
    };
    let id = given(NODE_ID_HEADER).unwrap_or_default().into_owned();
    match parse_node_id(&id) {
        Some(id) if id == api.store.node_id() => {
            return Err(bad("a node cannot follow itself".into()));
        }
        None if !id.is_empty() => return Err(bad("Litefs-Id is not 16 hex digits".into())),
        _ => {}
    }
    if let (Some(theirs), Some(ours)) = (given(CLUSTER_ID_HEADER), api.store.cluster_id())
        && !theirs.is_empty()
        && theirs != ours
    {
        return Err(bad(format!(
            "this node belongs to cluster {ours}, not to yours"
        )));
    }
    if !api.status.borrow().is_primary {
        return Err((
            StatusCode::SERVICE_UNAVAILABLE,
            "this node is not the primary".into(),
        ));
    }
    let mut filter = BTreeSet::new();
    for name in query
        .filter
        .iter()
        .flat_map(|f| f.split(','))
        .filter(|name| !name.is_empty())
    {
        check_database(name).map_err(|e| bad(e.to_string()))?;
        filter.insert(name.to_owned());
    }
    let bytes = timeout(BODY_TIMEOUT, collect(body, posmap::MAX_LEN))
        .await
        .map_err(|_| {
            (
                StatusCode::REQUEST_TIMEOUT,
                "the position map did not come".to_owned(),
            )
        })?
        .map_err(bad)?;
    let positions = posmap::decode(&bytes).map_err(|e| bad(e.to_string()))?;
    Ok(Replica {
        id,
        positions,
        filter,
        coded: given("accept-encoding").is_some_and(|list| coding::accepts(&list)),
    })
}

/// The whole body, if it is no longer than `max` bytes.
pub(super) async fn collect<B: Buf>(
    body: impl Stream<Item = Result<B, warp::Error>>,
    max: usize,
) -> Result<Vec<u8>, String> {
    let mut body = std::pin::pin!(body);
    let mut bytes = Vec::new();
    while let Some(piece) = body.next().await {
        let mut piece = piece.map_err(|e| format!("the body broke off: {e}"))?;
        if piece.remaining() > max - bytes.len() {
            return Err(format!("the body is longer than {max} bytes"));
        }
        while piece.has_remaining() {
            let chunk = piece.chunk();
            bytes.extend_from_slice(chunk);
            let n = chunk.len();
            piece.advance(n);
        }
    }
    Ok(bytes)
}

/// Starts to send to a replica.
fn stream(api: Arc<Api>, connection: Arc<Connection>, place: Place, replica: Replica) -> Response {
    let coder = match replica.coded.then(Coder::new).transpose() {
        Ok(coder) => coder,
        Err(error) => {
            let text = format!("the stream cannot be compressed: {error}");
            return refuse(StatusCode::INTERNAL_SERVER_ERROR, &text);
        }
    };
    let stats = Arc::clone(&api.stats);
    let (body, stream) = body::channel(sender::CHANNEL_CAPACITY);
    let epoch = api.epoch();
    task::spawn(async move {
        let _place = place;
        let id = replica.id.clone();
        info!(
            replica = id,
            databases = replica.positions.len(),
            "a replica has connected"
        );
        let sent = sender::run(
            Arc::clone(&api.store),
            Arc::clone(&api.stats),
            &api.replicas,
            replica,
            Limits::new(api.snapshot_timeout),
            body.channel.clone(),
            api.demoted(),
        );
        match sent.await {
            Ok(()) => {
                info!(replica = id, "the stream to a replica is ended");
                body.finish();
            }
            Err(error) => {
                info!(replica = id, %error, "the stream to a replica broke off");
                // A replica that does not read does not learn of a broken body either.
                if !matches!(error, SendError::Gone) {
                    drop(body);
                    sleep(Duration::from_secs(1)).await;
                    connection.abort();
                }
            }
        }
    });
    let reply = match coder {
        Some(coder) => {
            let stream = body::coded(stream, coder, Arc::clone(&stats));
            let reply = warp::reply::stream(stream);
            warp::reply::with_header(reply, header::CONTENT_ENCODING, coding::ZSTD).into_response()
        }
        None => warp::reply::stream(body::counted(stream, stats)).into_response(),
    };
    let reply = warp::reply::with_header(reply, EPOCH_HEADER, epoch);
    warp::reply::with_header(reply, header::CONTENT_TYPE, "application/octet-stream")
        .into_response()
}
