//! Databases as files: `GET /export` and `POST /import`.
//!
//! An export is read from a snapshot while writers go on, through a bounded channel. A client that
//! takes no piece for [`STALL`] is cut off, and so is an export that takes longer than
//! `http.snapshot-timeout`. An import is spooled to a file without a name, and no lock is taken
//! before its last byte is there. A body that stalls, or comes too slowly ([`Pace`]), is refused; one
//! that is longer than its database says it is, or leaves too little of the disk ([`Room::usable`](crate::store::Room::usable)), is
//! refused as soon as that shows.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, StatusCode, header};
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tracing::{info, warn};
use warp::Reply;
use warp::reply::Response;

use crate::sqlite::header::{DbHeader, HEADER_SIZE};
use crate::store::{ImportError, StoreError, check_database};
use crate::task;

use super::api::{Api, refuse};
use super::body::{self, PATIENCE, Pace};
use super::guests::{Connection, Place};

/// How long a client may take for one piece.
const STALL: Duration = Duration::from_secs(10);
/// How many bytes of an import are spooled between two looks at the free space.
const LOOK_EVERY: u64 = 8 << 20;
/// Bytes of one piece of a body.
const PIECE: usize = 256 << 10;
/// Pieces that wait for the connection.
const PIECES: usize = 4;

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

fn place(connection: &Connection) -> Result<Place, Refusal> {
    connection.place(|q| &q.transfers)
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
    let place = place(&connection)?;
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
        let _place = place;
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
    connection: Arc<Connection>,
    headers: HeaderMap,
    query: DatabaseQuery,
    body: impl Stream<Item = Result<B, warp::Error>>,
) -> Response {
    match import(&api, &connection, &headers, query, body).await {
        Ok(()) => StatusCode::OK.into_response(),
        Err((status, text)) => refuse(status, &text),
    }
}

async fn import<B: Buf>(
    api: &Api,
    connection: &Connection,
    headers: &HeaderMap,
    query: DatabaseQuery,
    body: impl Stream<Item = Result<B, warp::Error>>,
) -> Result<(), Refusal> {
    let name = query.name()?;
    check_primary(api)?;
    let place = place(connection)?;
    check_space(api, content_length(headers).unwrap_or(0))?;
    let file = api.store.spool_file().map_err(internal)?;
    let file = tokio::select! {
        file = spool(api, file, body) => file?,
        () = api.stopped() => {
            return Err((StatusCode::SERVICE_UNAVAILABLE, "this node stops".into()));
        }
    };
    let (store, db) = (Arc::clone(&api.store), name.clone());
    let imported = task::blocking(move || {
        let _place = place;
        store.import(&db, file)
    })
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

fn content_length(headers: &HeaderMap) -> Option<u64> {
    let value = headers.get(header::CONTENT_LENGTH)?;
    value.to_str().ok()?.parse().ok()
}

/// Refuses what does not fit, with so many bytes still to come.
fn check_space(api: &Api, coming: u64) -> Result<(), Refusal> {
    match api.store.room() {
        Some(room) if coming > room.usable() => {
            let free = room.free;
            let text =
                format!("{coming} bytes do not fit: the data directory has {free} bytes left");
            Err((StatusCode::INSUFFICIENT_STORAGE, text))
        }
        _ => Ok(()),
    }
}

/// Writes the whole body to the file.
async fn spool<B: Buf>(
    api: &Api,
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
    let mut pace = Pace::new();
    let mut length = Length::default();
    let mut looked_at = 0;
    loop {
        let piece = pace.wait(body.next()).await.ok_or_else(|| {
            let text = format!(
                "next to nothing came for {} s: nothing is changed",
                PATIENCE.as_secs()
            );
            (StatusCode::REQUEST_TIMEOUT, text)
        })?;
        let Some(piece) = piece else { break };
        let mut piece = piece.map_err(|e| {
            let text = format!("the body broke off: {e}: nothing is changed");
            (StatusCode::BAD_REQUEST, text)
        })?;
        pace.came(piece.remaining());
        if length.came >= looked_at + LOOK_EVERY {
            looked_at = length.came;
            check_space(api, LOOK_EVERY)?;
        }
        while piece.has_remaining() {
            let chunk = piece.chunk();
            length.add(chunk)?;
            file.write_all(chunk).await.map_err(full)?;
            let n = chunk.len();
            piece.advance(n);
        }
    }
    file.flush().await.map_err(full)?;
    Ok(file.into_std().await)
}

/// How much of a database file has come, and how much there is by its header.
#[derive(Default)]
struct Length {
    head: Vec<u8>,
    came: u64,
    due: Option<u64>,
}

impl Length {
    /// Refuses what is no database, and more than there is of one: a body need not have an end.
    fn add(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let bad = |text: String| Err((StatusCode::BAD_REQUEST, text + ": nothing is changed"));
        self.came += bytes.len() as u64;
        if self.due.is_none() {
            let missing = HEADER_SIZE - self.head.len();
            self.head
                .extend_from_slice(&bytes[..missing.min(bytes.len())]);
            if self.head.len() < HEADER_SIZE {
                return Ok(());
            }
            match DbHeader::parse(&self.head) {
                Ok(header) => {
                    // Without a count of its own, a database is as long as its file.
                    let pages = u64::from(header.pages(u64::MAX));
                    self.due = Some(pages * u64::from(header.page_size));
                }
                Err(e) => return bad(e.to_string()),
            }
        }
        match self.due {
            Some(due) if self.came > due => bad(format!(
                "there is more than the {due} bytes that its header says"
            )),
            _ => Ok(()),
        }
    }
}
