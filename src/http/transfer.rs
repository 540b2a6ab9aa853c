//! Databases as files: `GET /export` and `POST /import`.
//!
//! An export is read from a snapshot while writers go on, through a bounded channel. A client that
//! takes nothing for [`STALL`] is cut off, and so is an export that takes longer than
//! `http.snapshot-timeout`. An import is spooled to a file without a name, and no lock is taken
//! before its last byte is there; a body that stalls for [`STALL`] is refused. There are at most
//! [`MAX_TRANSFERS`] at a time, each of which may hold a thread.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, StatusCode, header};
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc};
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{info, warn};
use warp::Reply;
use warp::reply::Response;

use crate::store::{ImportError, StoreError, check_database};
use crate::task;

use super::api::{Api, refuse};
use super::body;
use super::server::Connection;

/// How long a client may take nothing, or send nothing.
const STALL: Duration = Duration::from_secs(10);
/// Exports and imports at a time.
const MAX_TRANSFERS: usize = 32;
/// Bytes of one piece of a body.
const PIECE: usize = 256 << 10;
/// Pieces that wait for the connection.
const PIECES: usize = 4;

static TRANSFERS: Semaphore = Semaphore::const_new(MAX_TRANSFERS);

/// `?name=DB`.
#[derive(Deserialize)]
pub(super) struct DatabaseQuery {
    name: Option<String>,
}

type Refusal = (StatusCode, String);

impl DatabaseQuery {
    fn name(self) -> Result<String, Refusal> {
        let bad = |text| (StatusCode::BAD_REQUEST, text);
        let name = self
            .name
            .ok_or_else(|| bad("name is missing: ?name=DATABASE".to_owned()))?;
        check_database(&name).map_err(|_| {
            bad("invalid database name: a file name of at most 200 bytes that does not end in -journal, -wal, -shm, -pos or -lock".to_owned())
        })?;
        Ok(name)
    }
}

fn permit() -> Result<SemaphorePermit<'static>, Refusal> {
    TRANSFERS.try_acquire().map_err(|_| {
        let text = format!("{MAX_TRANSFERS} exports and imports are under way: try again later");
        (StatusCode::SERVICE_UNAVAILABLE, text)
    })
}

fn internal(e: impl std::fmt::Display) -> Refusal {
    (StatusCode::INTERNAL_SERVER_ERROR, e.to_string())
}

/// Answers `GET /export`.
pub(super) async fn get_export(
    api: Arc<Api>,
    connection: Arc<Connection>,
    query: DatabaseQuery,
) -> Response {
    match export(&api, connection, query).await {
        Ok(response) => response,
        Err((status, text)) => refuse(status, &text),
    }
}

async fn export(
    api: &Api,
    connection: Arc<Connection>,
    query: DatabaseQuery,
) -> Result<Response, Refusal> {
    let name = query.name()?;
    let permit = permit()?;
    let missing = || (StatusCode::NOT_FOUND, format!("no database {name:?}"));
    let db = api.store.database(&name).ok_or_else(missing)?;
    let snapshot = task::blocking(move || db.snapshot())
        .await
        .map_err(internal)?;
    let mut snapshot = snapshot.map_err(internal)?;
    let size = snapshot.database_size();
    if size == 0 {
        return Err(missing());
    }
    let (body, stream) = body::channel(PIECES);
    let mut pieces = Pieces {
        gathered: BytesMut::with_capacity(PIECE),
        out: body.channel.clone(),
        deadline: Instant::now() + api.snapshot_timeout,
        runtime: Handle::current(),
    };
    task::blocking(move || {
        let _permit = permit;
        let written = snapshot.write_database(&mut pieces);
        // Nothing is kept for it while its last piece waits.
        drop(snapshot);
        match written.and_then(|()| pieces.flush().map_err(StoreError::io("export", &name))) {
            Ok(()) => {
                drop(pieces);
                body.finish();
            }
            Err(error) => {
                info!(db = name, %error, "an export was cut off");
                drop(body);
                connection.abort();
            }
        }
    });
    let reply = warp::reply::stream(stream);
    let reply = warp::reply::with_header(reply, header::CONTENT_TYPE, "application/octet-stream");
    Ok(warp::reply::with_header(reply, header::CONTENT_LENGTH, size).into_response())
}

/// Writes to a body from a thread, within deadlines.
struct Pieces {
    gathered: BytesMut,
    out: mpsc::Sender<Bytes>,
    deadline: Instant,
    runtime: Handle,
}

impl Write for Pieces {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.gathered.extend_from_slice(buf);
        if self.gathered.len() >= PIECE {
            self.flush()?;
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let piece = self.gathered.split().freeze();
        if piece.is_empty() {
            return Ok(());
        }
        let until = self.deadline.min(Instant::now() + STALL);
        let sent = timeout_at(until, self.out.send(piece));
        match self.runtime.block_on(sent) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(io::Error::other("the client went away")),
            Err(_) if Instant::now() >= self.deadline => Err(io::Error::other(
                "it took longer than http.snapshot-timeout",
            )),
            Err(_) => Err(io::Error::other("the client took nothing for 10 s")),
        }
    }
}

/// Answers `POST /import`.
pub(super) async fn post_import<B: Buf>(
    api: Arc<Api>,
    headers: HeaderMap,
    query: DatabaseQuery,
    body: impl Stream<Item = Result<B, warp::Error>>,
) -> Response {
    match import(&api, &headers, query, body).await {
        Ok(()) => StatusCode::OK.into_response(),
        Err((status, text)) => refuse(status, &text),
    }
}

async fn import<B: Buf>(
    api: &Api,
    headers: &HeaderMap,
    query: DatabaseQuery,
    body: impl Stream<Item = Result<B, warp::Error>>,
) -> Result<(), Refusal> {
    let name = query.name()?;
    check_primary(api)?;
    let _permit = permit()?;
    check_space(api, headers)?;
    let file = api.store.spool_file().map_err(internal)?;
    let file = tokio::select! {
        file = spool(file, body) => file?,
        () = api.stopped() => {
            return Err((StatusCode::SERVICE_UNAVAILABLE, "this node stops".into()));
        }
    };
    let (store, db) = (Arc::clone(&api.store), name.clone());
    let imported = task::blocking(move || store.import(&db, file))
        .await
        .map_err(internal)?;
    match imported {
        Ok(pos) => {
            info!(db = name, %pos, "a database was imported");
            Ok(())
        }
        Err(error) => {
            warn!(db = name, %error, "an import failed, nothing was changed");
            let status = match &error {
                ImportError::Invalid(_) => StatusCode::BAD_REQUEST,
                ImportError::Store(StoreError::NotPrimary(_)) => StatusCode::SERVICE_UNAVAILABLE,
                ImportError::Store(StoreError::LockTimeout { .. }) => {
                    let text = format!("the database is busy: {error}; try again");
                    return Err((StatusCode::CONFLICT, text));
                }
                ImportError::Store(e) if e.errno() == libc::ENOSPC => {
                    StatusCode::INSUFFICIENT_STORAGE
                }
                ImportError::Store(_) => StatusCode::INTERNAL_SERVER_ERROR,
            };
            Err((status, error.to_string()))
        }
    }
}

fn check_primary(api: &Api) -> Result<(), Refusal> {
    let status = api.status.borrow();
    if status.is_primary {
        return Ok(());
    }
    let text = match &status.primary {
        Some(p) => format!(
            "this node is a replica: import at the primary, {} ({})",
            p.hostname, p.advertise_url
        ),
        None => "this node is a replica, and there is no primary at the moment".to_owned(),
    };
    Err((StatusCode::SERVICE_UNAVAILABLE, text))
}

/// Refuses at once what cannot fit.
fn check_space(api: &Api, headers: &HeaderMap) -> Result<(), Refusal> {
    let length = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.parse::<u64>().ok());
    let (Some(length), Ok(disk)) = (length, api.store.statvfs()) else {
        return Ok(());
    };
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if length > free {
        let text = format!("{length} bytes do not fit: the data directory has {free} bytes left");
        return Err((StatusCode::INSUFFICIENT_STORAGE, text));
    }
    Ok(())
}

/// Writes the whole body to the file.
async fn spool<B: Buf>(
    file: std::fs::File,
    body: impl Stream<Item = Result<B, warp::Error>>,
) -> Result<std::fs::File, Refusal> {
    let mut file = tokio::fs::File::from_std(file);
    let mut body = std::pin::pin!(body);
    let full = |e: io::Error| match e.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => (
            StatusCode::INSUFFICIENT_STORAGE,
            "the data directory is full".to_owned(),
        ),
        _ => internal(format!("cannot spool the import: {e}")),
    };
    loop {
        let piece = timeout(STALL, body.next()).await.map_err(|_| {
            let text = format!("nothing came for {} s: nothing is changed", STALL.as_secs());
            (StatusCode::REQUEST_TIMEOUT, text)
        })?;
        let Some(piece) = piece else { break };
        let mut piece = piece.map_err(|e| {
            let text = format!("the body broke off: {e}: nothing is changed");
            (StatusCode::BAD_REQUEST, text)
        })?;
        while piece.has_remaining() {
            file.write_all(piece.chunk()).await.map_err(full)?;
            let n = piece.chunk().len();
            piece.advance(n);
        }
    }
    file.flush().await.map_err(full)?;
    Ok(file.into_std().await)
}
