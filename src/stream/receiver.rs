//! The replica's side of a stream: follows one primary and applies what it sends.
//!
//! Protocol. The replica connects (HTTP/2 without TLS and without asking first), posts its positions
//! and reads frames. A task of the runtime reads the connection and feeds a bounded channel; a thread
//! takes the bytes out, decodes the frames and hands each LTX file to the store, which verifies all of
//! it before it touches anything, refuses what does not fit its position, and returns when it is
//! applied. So frames take effect in order, one at a time, and a replica that is slow slows the
//! connection down, not its memory up.
//!
//! Who may do what. Only the store decides whether a file fits. A file that is refused ends the stream:
//! the next one begins with the true position, from which the primary sees what is needed. If it then
//! sends the same misfit once more, the database is left out of the next map, which asks for a snapshot
//! of it. Nothing that a primary says deletes a database here: one that the primary does not have is
//! kept as it is, and the log says once that it is not replicated.
//!
//! Cluster IDs: a replica without one takes the primary's, before the first frame; two different ones
//! never replicate. A node that reaches itself under the primary's address ends the stream.
//!
//! Deadlines: those of connecting, [`ANSWER_TIMEOUT`], and [`IDLE_TIMEOUT`] without a byte while one
//! could be taken (a primary sends a heartbeat every second). A frame that comes byte by byte is none
//! the better: what it keeps this node waiting is bounded by [`FRAME_PATIENCE`] and its bytes. A stream
//! that ends without an `end` or `handoff` frame is an error.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING};
use http::{Request, Response, StatusCode, Uri, Version};
use parking_lot::Mutex;
use tenure_lease::PrimaryInfo;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::clock;
use crate::ltx::Pos;
use crate::peer::{self, Incoming, PeerError, Peers};
use crate::store::{Arrived, Common, Store, StoreError, check_database};
use crate::task;

use super::coding::{self, Decoder};
use super::common;
use super::frame::{ChunkReader, Frame, FrameError};
use super::posmap::{self, PosMap};
use super::sender::now_ms;
use super::stats::Stats;
use super::{CLUSTER_ID_HEADER, EPOCH_HEADER, NODE_ID_HEADER, format_node_id};

/// How long the primary may take for the head of its answer.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a stream may be without a byte.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long one frame may keep this node waiting on the whole, besides a second for each
/// [`BYTES_A_SECOND`] of it.
pub const FRAME_PATIENCE: Duration = Duration::from_secs(10);

/// The least rate at which a frame comes.
const BYTES_A_SECOND: u64 = 4096;

/// How long a stream that is over waits for the transaction that is being applied.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Pieces of the body that wait to be applied; the connection makes each at most 16 KiB large.
const CHANNEL_CAPACITY: usize = 64;

/// Transactions of one database that are there already are applied together: up to so many of them,
/// and so many bytes.
const GROUP_FILES: usize = 256;
const GROUP_BYTES: u64 = 1 << 20;

/// The most bytes of a refusal's text that are read.
const MAX_REFUSAL: usize = 1024;

/// How a stream ended that did not fail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The primary ended it.
    End,
    /// The primary hands this lease over to this node.
    Handoff(String),
    /// This node gave it up.
    Cancelled,
}

/// What a stream has reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The primary has accepted the stream.
    Connected,
    /// Everything that was missing has been applied. The number of the primary, if it says one.
    Ready(Option<u64>),
}

/// Why a stream failed. Every one of them may pass by itself: try again later.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The primary's address in the lease is not one.
    #[error("{url:?}, the primary's advertise-url, is no http:// or https:// URL: {reason}")]
    Url {
        /// What the lease says.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No connection, or it broke before the answer.
    #[error("no connection to {url}: {reason}")]
    Connect {
        /// Where to.
        url: String,
        /// What the client says.
        reason: String,
    },
    /// The primary said no.
    #[error("{url} refused the stream: {status}: {text}")]
    Refused {
        /// Who.
        url: String,
        /// The status of its answer.
        status: StatusCode,
        /// The first line of its answer.
        text: String,
    },
    /// The primary's address leads here.
    #[error("{0} is this very node: correct lease.advertise-url")]
    Own(String),
    /// The primary belongs to another cluster.
    #[error(
        "{url} belongs to cluster {theirs}, this node to {ours}: correct the lease's key or address, or give this node an empty data directory"
    )]
    OtherCluster {
        /// Who.
        url: String,
        /// Its cluster ID.
        theirs: String,
        /// The ID that this data directory has.
        ours: String,
    },
    /// The primary is older than one that this node has followed.
    #[error(
        "{url} is primary number {theirs}, but this node has already followed number {ours}: it may not know that it was replaced"
    )]
    OldPrimary {
        /// Who.
        url: String,
        /// Its number.
        theirs: u64,
        /// The last number that this node has followed.
        ours: u64,
    },
    /// The cluster ID could not be kept.
    #[error("cannot keep the cluster ID: {0}")]
    ClusterId(StoreError),
    /// Nothing came, not even a heartbeat.
    #[error("the primary sent nothing for {} s", IDLE_TIMEOUT.as_secs())]
    Idle,
    /// The connection broke.
    #[error("the stream broke: {0}")]
    Broken(String),
    /// What came are no frames, or the stream ended in the middle.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The body is coded by what this node has not asked for.
    #[error("the primary sent the stream in the coding {0:?}, which was not asked for")]
    Coding(String),
    /// A name that no database can have.
    #[error("the primary sent a bad name: {0}")]
    Name(StoreError),
    /// The store did not take a transaction.
    #[error("cannot apply what the primary sent of {db}: {source}")]
    Store {
        /// The database.
        db: String,
        /// Why not.
        source: StoreError,
    },
    /// The last transaction is still being applied.
    #[error("the stream is over, but a transaction is still being applied after {} s", JOIN_TIMEOUT.as_secs())]
    StillApplying,
    /// The thread that applies died; its panic is in the log.
    #[error("the thread that applies transactions panicked")]
    Panic,
}

/// Follows primaries, one stream after another, and remembers what one stream must know of the last.
/// Clones share that memory.
#[derive(Clone)]
pub struct Receiver {
    store: Arc<Store>,
    stats: Arc<Stats>,
    peers: Arc<dyn Peers>,
    /// The databases to replicate; all if empty.
    databases: BTreeSet<String>,
    memory: Arc<Mutex<Memory>>,
}

/// What outlives a stream.
#[derive(Default)]
struct Memory {
    /// Where a file was refused last, and how often in a row there.
    refused: BTreeMap<String, (Pos, u32)>,
    /// Databases that the primary does not have, as was logged.
    unknown: BTreeSet<String>,
}

impl Receiver {
    /// A receiver that replicates `databases`, or all of them if it is empty.
    pub fn new(
        store: Arc<Store>,
        stats: Arc<Stats>,
        peers: Arc<dyn Peers>,
        databases: BTreeSet<String>,
    ) -> Self {
        Receiver {
            store,
            stats,
            peers,
            databases,
            memory: Arc::default(),
        }
    }

    /// Follows `primary` until the stream ends or `cancel` becomes true (or its sender is gone).
    /// `progress` is told what was reached; it must have room, what it has none for is lost.
    ///
    /// A primary whose number is lower than this node's epoch is refused, unless `confirmed` says
    /// that the lease service has named it once more since it was refused: then it is the numbers
    /// that began anew, with another lease service.
    pub async fn follow(
        &self,
        primary: &PrimaryInfo,
        confirmed: bool,
        cancel: &mut watch::Receiver<bool>,
        progress: mpsc::Sender<Progress>,
    ) -> Result<Ended, StreamError> {
        let url = self.url(&primary.advertise_url)?;
        let response = tokio::select! {
            biased;
            _ = cancel.wait_for(|cancel| *cancel) => return Ok(Ended::Cancelled),
            response = self.connect(&url) => response?,
        };
        let epoch = header(&response, EPOCH_HEADER).and_then(|text| text.parse().ok());
        let ours = self.store.epoch();
        if let Some(theirs) = epoch.filter(|e| (1..ours).contains(e) && !confirmed) {
            let url = url.to_string();
            return Err(StreamError::OldPrimary { url, theirs, ours });
        }
        let _ = progress.try_send(Progress::Connected);

        let (feed, bytes) = mpsc::channel(CHANNEL_CAPACITY);
        let applier = Applier {
            store: Arc::clone(&self.store),
            stats: Arc::clone(&self.stats),
            databases: self.databases.clone(),
            memory: Arc::clone(&self.memory),
            progress,
            origin: Origin {
                peers: Arc::clone(&self.peers),
                primary: primary.advertise_url.clone(),
                epoch,
            },
            ready: false,
            group: None,
        };
        let decoder = decoder(&response)?;
        let applier = task::blocking(move || applier.run(bytes, decoder));
        let pumped = pump(response, feed, cancel).await;
        let applied = match timeout(JOIN_TIMEOUT, applier).await {
            Ok(joined) => joined.map_err(|_| StreamError::Panic)?,
            Err(_) => return Err(StreamError::StillApplying),
        };
        match (applied, pumped) {
            // The bytes ran out: why they did is the reason.
            (Err(StreamError::Frame(FrameError::Eof)), pumped) => match pumped? {
                Pumped::Cancelled => Ok(Ended::Cancelled),
                Pumped::All => Err(FrameError::Eof.into()),
            },
            (Err(StreamError::Frame(FrameError::Io(_))), Err(broken)) => Err(broken),
            (Err(StreamError::Frame(FrameError::Io(_))), Ok(Pumped::Cancelled)) => {
                Ok(Ended::Cancelled)
            }
            (applied, _) => applied,
        }
    }

    fn url(&self, advertised: &str) -> Result<Uri, StreamError> {
        let bad = |reason: String| StreamError::Url {
            url: advertised.to_owned(),
            reason,
        };
        let mut url = peer::url(advertised, "/stream").map_err(bad)?;
        if !self.databases.is_empty() {
            let names: Vec<&str> = self.databases.iter().map(String::as_str).collect();
            url.query_pairs_mut()
                .append_pair("filter", &names.join(","));
        }
        url.as_str()
            .parse()
            .map_err(|e: http::uri::InvalidUri| bad(e.to_string()))
    }

    /// Posts the positions, and checks who answers.
    async fn connect(&self, url: &Uri) -> Result<Response<Incoming>, StreamError> {
        let reader = self.clone();
        let positions = task::blocking(move || reader.positions())
            .await
            .map_err(|_| StreamError::Panic)?;
        let mut request = Request::post(url.clone())
            .version(Version::HTTP_2)
            .header(NODE_ID_HEADER, format_node_id(self.store.node_id()))
            .header(ACCEPT_ENCODING, coding::ZSTD);
        if let Some(id) = self.store.cluster_id() {
            request = request.header(CLUSTER_ID_HEADER, id);
        }
        let failed = |reason| StreamError::Connect {
            url: url.to_string(),
            reason,
        };
        let request = request
            .body(peer::whole(posmap::encode(&positions)))
            .map_err(|e| failed(e.to_string()))?;
        let response = timeout(ANSWER_TIMEOUT, self.peers.send(request))
            .await
            .map_err(|_| failed(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs())))?
            .map_err(|e| failed(e.reason))?;
        if header(&response, NODE_ID_HEADER) == Some(&format_node_id(self.store.node_id())) {
            return Err(StreamError::Own(url.to_string()));
        }
        if response.status() != StatusCode::OK {
            return Err(StreamError::Refused {
                url: url.to_string(),
                status: response.status(),
                text: refusal(response).await,
            });
        }
        if let Some(theirs) = header(&response, CLUSTER_ID_HEADER).filter(|id| !id.is_empty()) {
            self.join_cluster(url, theirs.to_owned()).await?;
        }
        Ok(response)
    }

    /// Takes the primary's cluster ID if this node has none, and compares it otherwise.
    async fn join_cluster(&self, url: &Uri, theirs: String) -> Result<(), StreamError> {
        match self.store.cluster_id() {
            Some(ours) if ours == theirs => Ok(()),
            Some(ours) => Err(StreamError::OtherCluster {
                url: url.to_string(),
                theirs,
                ours,
            }),
            None => {
                let store = Arc::clone(&self.store);
                task::blocking(move || store.set_cluster_id(&theirs))
                    .await
                    .map_err(|_| StreamError::Panic)?
                    .map_err(StreamError::ClusterId)
            }
        }
    }

    /// The positions to begin from: without the databases that nobody wants here, and without those
    /// that need a snapshot. Blocks on the disk: what is applied is flushed first.
    fn positions(&self) -> PosMap {
        let memory = self.memory.lock();
        let mut positions = self.store.positions();
        positions.retain(|name, pos| {
            let wanted = self.databases.is_empty() || self.databases.contains(name);
            let refused = memory
                .refused
                .get(name)
                .is_some_and(|(at, n)| at == pos && *n >= 2);
            wanted && !refused
        });
        positions
    }
}

enum Pumped {
    /// All that the primary sent.
    All,
    Cancelled,
}

/// Feeds the body to the applier, until either ends.
async fn pump(
    response: Response<Incoming>,
    feed: mpsc::Sender<Bytes>,
    cancel: &mut watch::Receiver<bool>,
) -> Result<Pumped, StreamError> {
    let mut body = response.into_body();
    loop {
        let bytes = tokio::select! {
            biased;
            _ = cancel.wait_for(|cancel| *cancel) => return Ok(Pumped::Cancelled),
            () = feed.closed() => return Ok(Pumped::All),
            read = timeout(IDLE_TIMEOUT, body.chunk()) => match read {
                Err(_) => return Err(StreamError::Idle),
                Ok(Err(e)) => return Err(StreamError::Broken(e.reason)),
                Ok(Ok(None)) => return Ok(Pumped::All),
                Ok(Ok(Some(bytes))) => bytes,
            },
        };
        tokio::select! {
            biased;
            _ = cancel.wait_for(|cancel| *cancel) => return Ok(Pumped::Cancelled),
            fed = feed.send(bytes) => if fed.is_err() {
                return Ok(Pumped::All);
            },
        }
    }
}

/// The thread's side: takes frames from the channel and applies them.
struct Applier {
    store: Arc<Store>,
    stats: Arc<Stats>,
    databases: BTreeSet<String>,
    memory: Arc<Mutex<Memory>>,
    progress: mpsc::Sender<Progress>,
    origin: Origin,
    ready: bool,
    /// What was read and is still to be applied.
    group: Option<Group>,
}

/// Transactions of one database that follow each other.
struct Group {
    name: String,
    files: Vec<Arrived>,
    bytes: u64,
}

/// Who sends.
struct Origin {
    peers: Arc<dyn Peers>,
    /// Its address, as the lease names it.
    primary: String,
    /// The primary's number, if it says one.
    epoch: Option<u64>,
}

impl Origin {
    /// Asks the primary which of these positions it has had too. Blocks.
    fn common(&self, name: &str, history: &[Pos]) -> Common {
        if self.epoch.is_none() {
            return Common::Unknown;
        }
        match task::wait(self.ask(name, history)) {
            Ok(bytes) => match common::decode(&bytes).as_deref() {
                Some([pos]) => Common::At(*pos),
                Some([]) => Common::Nothing,
                _ => Common::Unknown,
            },
            Err(error) => {
                warn!(db = name, %error, "cannot ask the primary where its history parts from this node's");
                Common::Unknown
            }
        }
    }

    async fn ask(&self, name: &str, history: &[Pos]) -> Result<Bytes, PeerError> {
        let mut url = peer::url(&self.primary, "/common").map_err(PeerError::broken)?;
        url.query_pairs_mut().append_pair("name", name);
        let request = Request::post(url.as_str())
            .version(Version::HTTP_2)
            .body(peer::whole(common::encode(history)))
            .map_err(|e| PeerError::broken(e.to_string()))?;
        let answer = peer::ask(&*self.peers, request, ANSWER_TIMEOUT, MAX_REFUSAL).await?;
        match answer.status().is_success() {
            true => Ok(answer.into_body()),
            false => Err(PeerError::broken(peer::refusal(&answer))),
        }
    }
}

impl Applier {
    fn run(
        mut self,
        bytes: mpsc::Receiver<Bytes>,
        decoder: Option<Decoder>,
    ) -> Result<Ended, StreamError> {
        let mut input = ChannelReader {
            bytes,
            decoder,
            current: Bytes::new(),
            ended: false,
            waited: Duration::ZERO,
            came: 0,
            late: false,
        };
        let ended = self.take_frames(&mut input);
        // What had come whole before the stream broke off.
        self.apply_group()?;
        ended
    }

    fn take_frames(&mut self, input: &mut ChannelReader) -> Result<Ended, StreamError> {
        loop {
            if !input.has_more() {
                self.apply_group()?;
            }
            input.begin();
            match Frame::read(input)? {
                Frame::Ltx { name, .. } => self.receive(&name, input)?,
                // Log records above it are kept: this node may have to go on with the backup.
                Frame::HighWaterMark { txid, name } => self.store.note_high_water(&name, txid),
                frame => {
                    self.apply_group()?;
                    if let Some(ended) = self.take_frame(frame) {
                        return Ok(ended);
                    }
                }
            }
        }
    }

    /// Takes a frame that carries no transaction; how the stream ends, if it does.
    fn take_frame(&mut self, frame: Frame) -> Option<Ended> {
        match frame {
            Frame::Ready => {
                self.ready = true;
                let _ = self.progress.try_send(Progress::Ready(self.origin.epoch));
            }
            Frame::Heartbeat { timestamp } => {
                // Before `ready` there is no saying how far behind this node is.
                if self.ready {
                    self.store.note_in_step(timestamp);
                }
            }
            Frame::DropDb { name } => self.note_unknown(&name),
            Frame::Handoff { lease_id } => return Some(Ended::Handoff(lease_id)),
            Frame::End => return Some(Ended::End),
            Frame::Ltx { .. } | Frame::HighWaterMark { .. } => {}
        }
        None
    }

    /// Reads the LTX file that comes next. It is applied before more is waited for.
    fn receive(&mut self, name: &str, input: &mut ChannelReader) -> Result<(), StreamError> {
        check_database(name).map_err(StreamError::Name)?;
        let mut file = ChunkReader::new(input);
        if !self.databases.is_empty() && !self.databases.contains(name) {
            debug!(db = name, "skipped a database that was not asked for");
            return Ok(file.skip()?);
        }
        let arrived = match self.store.read_arriving(name, &mut file) {
            Ok(arrived) => arrived,
            Err(_) if input.late => return Err(FrameError::Io(input.lateness()).into()),
            // The stream broke off inside the file: nothing is wrong with what was sent.
            Err(_) if input.ended => {
                return Err(FrameError::Io(io::ErrorKind::UnexpectedEof.into()).into());
            }
            Err(source) => {
                self.apply_group()?;
                return Err(self.refused(name, source));
            }
        };
        file.finish()?;
        if self.group.as_ref().is_some_and(|group| group.name != name) {
            self.apply_group()?;
        }
        let grouped = self.store.applies_in_groups(name, &arrived);
        let group = self.group.get_or_insert_with(|| Group {
            name: name.to_owned(),
            files: Vec::new(),
            bytes: 0,
        });
        group.bytes += arrived.size();
        group.files.push(arrived);
        if !grouped || group.files.len() >= GROUP_FILES || group.bytes >= GROUP_BYTES {
            self.apply_group()?;
        }
        Ok(())
    }

    /// Applies what was read.
    fn apply_group(&mut self) -> Result<(), StreamError> {
        let Some(Group { name, files, .. }) = self.group.take() else {
            return Ok(());
        };
        // A snapshot is as old as its last transaction, which is no lag.
        let mut headers = files.iter().map(Arrived::header);
        let made = headers.rfind(|header| !header.is_snapshot());
        let made = made.map(|header| header.timestamp);
        let origin = &self.origin;
        let mut ask = |name: &str, history: &[Pos]| origin.common(name, history);
        if let Err(source) = self.store.receive_all(&name, files, &mut ask) {
            return Err(self.refused(&name, source));
        }
        let mut memory = self.memory.lock();
        memory.refused.remove(&name);
        memory.unknown.remove(&name);
        drop(memory);
        if let Some(made) = made {
            self.stats
                .note_lag(&name, now_ms().saturating_sub(made).max(0));
        }
        Ok(())
    }

    /// The error for what the store did not take.
    fn refused(&self, name: &str, source: StoreError) -> StreamError {
        // What is wrong here, a full disk for one, is not healed by a snapshot.
        if !matches!(
            source,
            StoreError::Io { .. } | StoreError::LockTimeout { .. }
        ) {
            self.note_refused(name);
        }
        StreamError::Store {
            db: name.to_owned(),
            source,
        }
    }

    /// Counts a refusal at the position that the database has.
    fn note_refused(&self, name: &str) {
        let pos = self
            .store
            .database(name)
            .map(|db| db.pos())
            .unwrap_or_default();
        let mut memory = self.memory.lock();
        let refused = memory.refused.entry(name.to_owned()).or_insert((pos, 0));
        *refused = if refused.0 == pos {
            (pos, refused.1 + 1)
        } else {
            (pos, 1)
        };
    }

    fn note_unknown(&self, name: &str) {
        // The name must be one of ours: a peer does not fill the log or the set.
        if self.store.database(name).is_some() && self.memory.lock().unknown.insert(name.to_owned())
        {
            warn!(
                db = name,
                "the primary does not have this database: it is kept here as it is and is not replicated"
            );
        }
    }
}

/// The bytes of the channel as a reader; the end of the channel is the end of the file.
struct ChannelReader {
    bytes: mpsc::Receiver<Bytes>,
    /// What the bytes are coded by, if they are.
    decoder: Option<Decoder>,
    current: Bytes,
    /// The channel has ended.
    ended: bool,
    /// How long this frame was waited for.
    waited: Duration,
    /// How many bytes came meanwhile.
    came: u64,
    /// It was waited for too long.
    late: bool,
}

impl ChannelReader {
    /// Whether bytes are there already.
    fn has_more(&self) -> bool {
        let decodable = self.decoder.as_ref().is_some_and(Decoder::has_more);
        !self.current.is_empty() || decodable || !self.bytes.is_empty()
    }

    /// A frame begins.
    fn begin(&mut self) {
        (self.waited, self.came) = (Duration::ZERO, 0);
    }

    fn lateness(&self) -> io::Error {
        let text = format!(
            "only {} bytes of a frame came in {:?}",
            self.came, self.waited
        );
        io::Error::new(io::ErrorKind::TimedOut, text)
    }

    /// The next bytes; `None` at the end.
    fn next(&mut self) -> io::Result<Option<Bytes>> {
        let begun = clock::now();
        let bytes = task::wait(self.bytes.recv());
        self.waited += clock::now().duration_since(begun);
        self.came += bytes.as_ref().map_or(0, |bytes| bytes.len() as u64);
        let patience = FRAME_PATIENCE + Duration::from_secs(self.came / BYTES_A_SECOND);
        if self.waited > patience {
            self.late = true;
            return Err(self.lateness());
        }
        Ok(bytes)
    }
}

impl Read for ChannelReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            if let Some(decoder) = &mut self.decoder
                && decoder.has_more()
            {
                self.current = decoder.decode()?;
                continue;
            }
            match (self.next()?, &mut self.decoder) {
                (Some(bytes), Some(decoder)) => decoder.add(bytes),
                (Some(bytes), None) => self.current = bytes,
                (None, _) => {
                    self.ended = true;
                    return Ok(0);
                }
            }
        }
        let n = buf.len().min(self.current.len());
        self.current.copy_to_slice(&mut buf[..n]);
        Ok(n)
    }
}

/// What the answer's body is coded by, if it is.
fn decoder(response: &Response<Incoming>) -> Result<Option<Decoder>, StreamError> {
    match header(response, CONTENT_ENCODING.as_str()) {
        None => Ok(None),
        Some(coding::ZSTD) => Decoder::new()
            .map(Some)
            .map_err(|e| FrameError::Io(e).into()),
        Some(other) => Err(StreamError::Coding(other.to_owned())),
    }
}

fn header<'r>(response: &'r Response<Incoming>, name: &str) -> Option<&'r str> {
    response.headers().get(name)?.to_str().ok()
}

/// The first line of an answer that is an error.
async fn refusal(response: Response<Incoming>) -> String {
    let mut body = response.into_body();
    let read = timeout(IDLE_TIMEOUT, body.bytes(MAX_REFUSAL)).await;
    let text = read.map_or_else(|_| Bytes::new(), Result::unwrap_or_default);
    String::from_utf8_lossy(&text)
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned()
}
