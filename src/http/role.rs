//! Paths about who is primary: `POST /promote`, `POST /handoff`, `POST /demote`, and
//! `POST /common`, by which a replica whose history may be another learns where it parted from the
//! primary's.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Buf;
use futures_util::Stream;
use http::StatusCode;
use serde::Deserialize;
use tokio::time::timeout;
use warp::reply::Response;
use warp::{Filter, Rejection, Reply};

use crate::role::{CommandError, PromoteError};
use crate::store::{self, check_database};
use crate::stream::common::{self, MAX_LEN};
use crate::stream::parse_node_id;
use crate::task;

use super::api::{Api, BODY_TIMEOUT, collect, refuse};
use super::guests::Connection;

/// The paths of this module.
pub(super) fn routes(
    api: impl Filter<Extract = (Arc<Api>,), Error = Infallible> + Clone + Send + Sync + 'static,
) -> impl Filter<Extract = (Response,), Error = Rejection> + Clone + Send + Sync + 'static {
    let promote = warp::path!("promote")
        .and(warp::post())
        .and(api.clone())
        .and(warp::ext::get::<Arc<Connection>>())
        .then(promote);
    let demote = warp::path!("demote")
        .and(warp::post())
        .and(api.clone())
        .and(warp::ext::get::<Arc<Connection>>())
        .then(demote);
    let handoff = warp::path!("handoff")
        .and(warp::post())
        .and(api.clone())
        .and(warp::ext::get::<Arc<Connection>>())
        .and(warp::query::<Handoff>())
        .then(hand_over);
    let common = warp::path!("common")
        .and(warp::post())
        .and(api)
        .and(warp::ext::get::<Arc<Connection>>())
        .and(warp::query::<Common>())
        .and(warp::body::stream())
        .then(find_common);
    let orders = promote.or(demote).unify().or(handoff).unify();
    orders.or(common).unify()
}

async fn promote(api: Arc<Api>, connection: Arc<Connection>) -> Response {
    let _place = match connection.place(|q| &q.jobs) {
        Ok(place) => place,
        Err((status, text)) => return refuse(status, &text),
    };
    match api.promoter.promote().await {
        Ok(()) => StatusCode::OK.into_response(),
        Err(e @ PromoteError::NotCandidate) => refuse(StatusCode::CONFLICT, &e.to_string()),
        Err(e) => refuse(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
    }
}

#[derive(Deserialize)]
struct Handoff {
    #[serde(rename = "nodeID")]
    node_id: Option<String>,
}

async fn hand_over(api: Arc<Api>, connection: Arc<Connection>, query: Handoff) -> Response {
    let Some(node_id) = query.node_id.as_deref().and_then(parse_node_id) else {
        let text = "nodeID must be the 16 hex digits of a connected replica";
        return refuse(StatusCode::BAD_REQUEST, text);
    };
    let _place = match connection.place(|q| &q.jobs) {
        Ok(place) => place,
        Err((status, text)) => return refuse(status, &text),
    };
    obeyed(api.commands.hand_over(node_id).await)
}

async fn demote(api: Arc<Api>, connection: Arc<Connection>) -> Response {
    let _place = match connection.place(|q| &q.jobs) {
        Ok(place) => place,
        Err((status, text)) => return refuse(status, &text),
    };
    obeyed(api.commands.demote().await)
}

fn obeyed(result: Result<(), CommandError>) -> Response {
    match result {
        Ok(()) => StatusCode::OK.into_response(),
        Err(e @ CommandError::NotPrimary) => {
            refuse(StatusCode::SERVICE_UNAVAILABLE, &e.to_string())
        }
        Err(e) => refuse(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
    }
}

#[derive(Deserialize)]
struct Common {
    name: String,
}

/// Which of a replica's positions this primary has had too: the newest one, or an empty answer; 404
/// if it cannot tell.
async fn find_common<B: Buf>(
    api: Arc<Api>,
    connection: Arc<Connection>,
    query: Common,
    body: impl Stream<Item = Result<B, warp::Error>>,
) -> Response {
    let bad = |text: &str| refuse(StatusCode::BAD_REQUEST, text);
    if let Err(e) = check_database(&query.name) {
        return bad(&e.to_string());
    }
    if !api.status.borrow().is_primary {
        return refuse(
            StatusCode::SERVICE_UNAVAILABLE,
            "this node is not the primary",
        );
    }
    let place = match connection.place(|q| &q.jobs) {
        Ok(place) => place,
        Err((status, text)) => return refuse(status, &text),
    };
    let bytes = match timeout(BODY_TIMEOUT, collect(body, MAX_LEN)).await {
        Err(_) => return refuse(StatusCode::REQUEST_TIMEOUT, "the positions did not come"),
        Ok(Err(e)) => return bad(&e),
        Ok(Ok(bytes)) => bytes,
    };
    let Some(positions) = common::decode(&bytes) else {
        return bad("the body is no list of positions");
    };
    let Some(db) = api.store.database(&query.name) else {
        return refuse(StatusCode::NOT_FOUND, "there is no such database");
    };
    let found = task::blocking(move || {
        let _place = place;
        db.newest_common(&positions)
    });
    match found.await {
        Ok(store::Common::At(pos)) => common::encode(&[pos]).into_response(),
        Ok(store::Common::Nothing) => common::encode(&[]).into_response(),
        Ok(store::Common::Unknown) => refuse(StatusCode::NOT_FOUND, "the log says nothing of it"),
        Err(_) => refuse(StatusCode::INTERNAL_SERVER_ERROR, "internal error"),
    }
}
