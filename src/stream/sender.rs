//! The primary's side of a stream: what one replica lacks, and then what comes.
//!
//! Protocol. The replica has said where it is in each database; the sender keeps that map up to date
//! with what it sends. It subscribes to the store *before* it looks at anything, goes once over all
//! databases that either side has, sends `ready`, and from then on goes over those that the
//! subscription names. For one database it sends the log's record for the replica's TXID + 1 if that
//! record starts from the replica's checksum, again and again up to the position that the database
//! had when the round began (what is committed later is in the subscription again, so that a busy
//! database holds up no other); in every other case it sends a snapshot, which is right whatever the
//! replica has. A database that only the replica has is answered by a `drop db` frame, once.
//!
//! Only flushed transactions are sent: the store's positions and subscription know no others. So a
//! replica never has what the primary may still lose.
//!
//! Heartbeats go out at least once a second, between frames, never inside one. A heartbeat says up to
//! when everything was sent: while the replica lags, it repeats the last moment when it did not.
//!
//! Limits. What is sent goes through a bounded channel; a replica that takes nothing for
//! [`Limits::send`] is cut off, and so is a snapshot that takes longer than [`Limits::snapshot`].
//! Nothing of this holds up a writer or another replica. When the node stops (or stops being
//! primary), what is flushed by then is still sent, within [`DRAIN_TIMEOUT`], and then `end`. A
//! stream that ends without it is an error to the replica, which is what a cut-off one is.

use std::collections::BTreeSet;
use std::future::Future;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::sync::watch;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, timeout, timeout_at};
use tracing::warn;

use crate::ltx::Pos;
use crate::store::{Database, LargeRecord, Record, Store, StoreError, Subscription};
use crate::task;

use super::batches::{Batch, Batches};
use super::frame::{ChunkWriter, Frame, encode_ltx};
use super::parse_node_id;
use super::posmap::PosMap;
use super::replicas::{Order, OrderError, Replicas};
use super::stats::{SentKind, Stats};

/// How long a replica is waited for.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long it may leave the stream's channel full.
    pub send: Duration,
    /// How long one snapshot may take as a whole (`http.snapshot-timeout`).
    pub snapshot: Duration,
}

impl Limits {
    /// The limits of a node: 30 s for a replica that takes nothing, `snapshot` for a snapshot.
    pub fn new(snapshot: Duration) -> Limits {
        Limits {
            send: Duration::from_secs(30),
            snapshot,
        }
    }
}

/// How long a stream that is to end may take to send what is flushed.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// Pieces of at most about 64 KiB that wait for the connection to take them.
pub const CHANNEL_CAPACITY: usize = 8;

/// A little less than the second that the protocol allows.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(900);

/// The heartbeat's timestamp before the replica has been in step for the first time. Not 0, which is
/// "I am the primary" in the terms of LiteFS's replicas.
const NEVER: i64 = 1;

/// What a replica said when it connected.
#[derive(Debug)]
pub struct Replica {
    /// Its node ID as it wrote it, for the log.
    pub id: String,
    /// Its position in each of its databases.
    pub positions: PosMap,
    /// The databases that it wants; all if empty.
    pub filter: BTreeSet<String>,
    /// It takes the stream compressed ([`super::coding`]).
    pub coded: bool,
}

/// Why a stream ended before its time.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The replica closed the stream or its connection broke.
    #[error("the replica went away")]
    Gone,
    /// It does not read what it is sent.
    #[error("the replica took nothing for {0:?}")]
    Slow(Duration),
    /// A snapshot took longer than `http.snapshot-timeout`.
    #[error(
        "a snapshot or a large transaction of {db} took longer than {limit:?}; raise http.snapshot-timeout"
    )]
    SnapshotTimeout {
        /// The database.
        db: String,
        /// The time that it had.
        limit: Duration,
    },
    /// The node stops and the replica did not take the last transactions in time.
    #[error("the node stops, and the replica did not take the rest within {} s", DRAIN_TIMEOUT.as_secs())]
    Drain,
    /// The log or the database could not be read; nothing of it was sent.
    #[error("cannot read {db} for a replica: {source}")]
    Store {
        /// The database.
        db: String,
        /// What the store says.
        source: StoreError,
    },
    /// The database could not be read to its end, in the middle of its frame.
    #[error("cannot go on with a snapshot or a large transaction of {db}: {source}")]
    Snapshot {
        /// The database.
        db: String,
        /// What the store says.
        source: StoreError,
    },
    /// A reading thread died; its panic is in the log.
    #[error("a thread that read a database for the replica panicked")]
    Panic,
}

/// Sends to `replica` through `out` whatever it lacks, until `stop` resolves (then `Ok`, and the last
/// frame was `end`) or something goes wrong (then the body must end as an error).
///
/// `out` is the answer's body; its capacity ([`CHANNEL_CAPACITY`]) is what a replica that stalls costs.
pub async fn run(
    store: Arc<Store>,
    stats: Arc<Stats>,
    replicas: &Replicas,
    replica: Replica,
    limits: Limits,
    out: mpsc::Sender<Bytes>,
    stop: impl Future<Output = ()>,
) -> Result<(), SendError> {
    let _counted = stats.stream();
    let mut registration = replicas.register(parse_node_id(&replica.id));
    let mut heartbeat = interval_at(Instant::now() + HEARTBEAT_INTERVAL, HEARTBEAT_INTERVAL);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut sender = Sender {
        changes: store.subscribe(),
        store,
        stats: &stats,
        batches: replicas.batches(),
        positions: replica.positions,
        filter: replica.filter,
        coded: replica.coded,
        failed: BTreeSet::new(),
        limits,
        out,
        heartbeat,
        in_step_at: NEVER,
    };
    let (stopping, stopped) = watch::channel(false);
    let drive = sender.drive(stopped, &mut registration.orders);
    tokio::pin!(drive, stop);
    tokio::select! {
        biased;
        ended = &mut drive => return ended,
        () = &mut stop => {}
    }
    stopping.send_replace(true);
    timeout(DRAIN_TIMEOUT, drive)
        .await
        .unwrap_or(Err(SendError::Drain))
}

struct Sender<'a> {
    store: Arc<Store>,
    stats: &'a Stats,
    changes: Subscription,
    batches: &'a Batches,
    /// Where the replica is once it has applied all that was sent.
    positions: PosMap,
    filter: BTreeSet<String>,
    /// The stream is compressed: transactions go into it as they are, so that it finds in one what
    /// the one before had.
    coded: bool,
    /// Databases whose failure was logged.
    failed: BTreeSet<String>,
    limits: Limits,
    out: mpsc::Sender<Bytes>,
    heartbeat: Interval,
    /// When everything had been sent for the last time, ms since the Unix epoch.
    in_step_at: i64,
}

impl Sender<'_> {
    /// The whole stream, up to and including its `end` frame.
    async fn drive(
        &mut self,
        mut stopped: watch::Receiver<bool>,
        orders: &mut mpsc::Receiver<Order>,
    ) -> Result<(), SendError> {
        self.note_unknown();
        let mut dirty: BTreeSet<String> = self.positions.keys().cloned().collect();
        dirty.extend(self.store.databases().iter().map(|db| db.name().to_owned()));
        self.round(dirty).await?;
        self.send_frame(&Frame::Ready).await?;
        self.in_step_at = now_ms();
        self.send_heartbeat().await?;
        loop {
            let stopping = *stopped.borrow_and_update();
            if stopping {
                self.settle().await?;
                return self.send_frame(&Frame::End).await;
            }
            if let Some(dirty) = self.changes.changed().now_or_never() {
                self.round(dirty).await?;
                self.in_step_at = now_ms();
                continue;
            }
            tokio::select! {
                biased;
                dirty = self.changes.changed() => self.round(dirty).await?,
                _ = self.heartbeat.tick() => {
                    self.in_step_at = now_ms();
                    self.send_heartbeat().await?;
                }
                _ = stopped.changed() => {}
                Some(order) = orders.recv() => match order {
                    Order::CatchUp(done) => {
                        self.settle().await?;
                        // Whoever asked may have given up waiting.
                        let _ = done.send(Ok(()));
                    }
                    Order::Handoff(lease_id, done) => {
                        let settled = self.settle().await;
                        if settled.is_err() {
                            let _ = done.send(Err(OrderError::Broken));
                            return settled;
                        }
                        if let Err(refusal) = self.check_complete() {
                            let _ = done.send(Err(refusal));
                            continue;
                        }
                        if done.is_closed() {
                            continue;
                        }
                        self.send_frame(&Frame::Handoff { lease_id }).await?;
                        let _ = done.send(Ok(()));
                        return Ok(());
                    }
                },
                () = self.out.closed() => return Err(SendError::Gone),
            }
        }
    }

    /// Sends all that is committed by now.
    async fn settle(&mut self) -> Result<(), SendError> {
        // Flushed, and so in the subscription.
        let store = Arc::clone(&self.store);
        let flush = move || {
            store.positions();
            Ok(())
        };
        self.off_thread("the last transactions", flush).await?;
        while let Some(dirty) = self.changes.changed().now_or_never() {
            self.round(dirty).await?;
        }
        self.in_step_at = now_ms();
        Ok(())
    }

    /// Whether the replica has all that this node has once it has applied what was sent.
    fn check_complete(&self) -> Result<(), OrderError> {
        if !self.filter.is_empty() {
            return Err(OrderError::Filtered);
        }
        for db in self.store.databases() {
            let sent = self.positions.get(db.name()).copied().unwrap_or_default();
            if db.broken().is_some() || sent != db.pos() {
                return Err(OrderError::Behind(db.name().to_owned()));
            }
        }
        Ok(())
    }

    /// Brings the replica up to date in each database of `dirty` that it wants.
    async fn round(&mut self, dirty: BTreeSet<String>) -> Result<(), SendError> {
        for name in dirty {
            if !self.filter.is_empty() && !self.filter.contains(&name) {
                continue;
            }
            match self.sync(&name).await {
                // A database that cannot be read holds up no other; it is tried at its next change.
                Err(error @ SendError::Store { .. }) => {
                    if self.failed.insert(name) {
                        warn!(%error, "a database is not replicated");
                    }
                }
                other => other?,
            }
        }
        Ok(())
    }

    /// Brings the replica up to where the database is now.
    async fn sync(&mut self, name: &str) -> Result<(), SendError> {
        let Some(db) = self.store.database(name).filter(|db| !db.pos().is_zero()) else {
            return self.send_drop(name).await;
        };
        let target = db.pos();
        loop {
            let from = self.positions.get(name).copied().unwrap_or_default();
            let batch = self.batches.after(&db, from, self.coded);
            match self.with_heartbeats(name, batch).await? {
                Batch::UpToDate => return Ok(()),
                Batch::Snapshot => self.send_snapshot(name, &db).await?,
                Batch::Large(record) => self.send_large(name, record).await?,
                Batch::Records(batch) => {
                    for record in &batch.records {
                        self.send_record(name, record).await?;
                    }
                }
            }
            if self
                .positions
                .get(name)
                .is_some_and(|pos| pos.txid >= target.txid)
            {
                return Ok(());
            }
        }
    }

    /// Says which databases only the replica has: in one line, however many it names.
    fn note_unknown(&self) {
        let here = |name: &&String| self.store.database(name).is_none();
        let unknown: Vec<&String> = self.positions.keys().filter(here).collect();
        if let Some(db) = unknown.first() {
            warn!(
                ?db,
                databases = unknown.len(),
                "a replica has databases that this node, the primary, does not have; one is named"
            );
        }
    }

    /// Tells the replica, once, that it has a database that this node has not. It keeps it.
    async fn send_drop(&mut self, name: &str) -> Result<(), SendError> {
        if self.positions.remove(name).is_none() {
            return Ok(());
        }
        self.send_frame(&Frame::DropDb {
            name: name.to_owned(),
        })
        .await
    }

    async fn send_record(&mut self, name: &str, record: &Record) -> Result<(), SendError> {
        let mut bytes = Vec::new();
        encode_ltx(name, &record.bytes, &mut bytes);
        self.high_water_mark(name).encode(&mut bytes);
        self.send(bytes.into()).await?;
        self.stats.count_sent(name, SentKind::Ltx);
        let pos = Pos {
            txid: record.max_txid,
            checksum: record.post_apply_checksum,
        };
        self.positions.insert(name.to_owned(), pos);
        Ok(())
    }

    /// Sends the whole database as of its position now, read by a thread of its own.
    async fn send_snapshot(&mut self, name: &str, db: &Arc<Database>) -> Result<(), SendError> {
        let reader = Arc::clone(db);
        let mut snapshot = self.off_thread(name, move || reader.snapshot()).await?;
        if self.coded {
            snapshot.without_lz4();
        }
        let write = move |w: &mut dyn Write| {
            let mut snapshot = snapshot;
            // It is released before its last piece waits for a slow replica.
            snapshot.write_to(w)
        };
        self.send_file(name, SentKind::Snapshot, write).await
    }

    /// Sends a transaction that is read from the log while it is sent.
    async fn send_large(&mut self, name: &str, record: LargeRecord) -> Result<(), SendError> {
        let write = move |w: &mut dyn Write| record.write_to(w);
        self.send_file(name, SentKind::Ltx, write).await?;
        self.send_frame(&self.high_water_mark(name)).await
    }

    fn high_water_mark(&self, name: &str) -> Frame {
        Frame::HighWaterMark {
            txid: self.store.database(name).map_or(0, |db| db.backed_up()),
            name: name.to_owned(),
        }
    }

    /// Sends the LTX file that a thread of its own writes, piece by piece; the replica is at the
    /// position that it gives then.
    async fn send_file(
        &mut self,
        name: &str,
        kind: SentKind,
        write: impl FnOnce(&mut dyn Write) -> Result<Pos, StoreError> + Send + 'static,
    ) -> Result<(), SendError> {
        // The thread gives up as soon as `_alive` is gone, that is when this future is dropped.
        let (_alive, cancelled) = watch::channel(());
        let job = FileJob {
            name: name.to_owned(),
            limits: self.limits,
            deadline: Instant::now() + self.limits.snapshot,
            out: self.out.clone(),
            cancelled,
        };
        let pos = task::blocking(move || job.run(write))
            .await
            .map_err(|_| SendError::Panic)??;
        self.stats.count_sent(name, kind);
        self.positions.insert(name.to_owned(), pos);
        Ok(())
    }

    /// Runs what reads the disk on a thread for such work, with heartbeats meanwhile.
    async fn off_thread<T: Send + 'static>(
        &mut self,
        db: &str,
        work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, SendError> {
        let task = task::blocking(work);
        self.with_heartbeats(db, async { task.await.ok() }).await
    }

    /// Waits for work of a thread, with heartbeats meanwhile. `None`: the thread died. The work may have
    /// a turn that others wait for: nothing else is waited for here.
    async fn with_heartbeats<T>(
        &mut self,
        db: &str,
        work: impl Future<Output = Option<Result<T, StoreError>>>,
    ) -> Result<T, SendError> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => {
                    return done
                        .ok_or(SendError::Panic)?
                        .map_err(|source| SendError::Store { db: db.to_owned(), source });
                }
                _ = self.heartbeat.tick() => self.offer_heartbeat()?,
                () = self.out.closed() => return Err(SendError::Gone),
            }
        }
    }

    fn heartbeat(&self) -> Frame {
        Frame::Heartbeat {
            timestamp: self.in_step_at,
        }
    }

    async fn send_heartbeat(&mut self) -> Result<(), SendError> {
        self.send_frame(&self.heartbeat()).await
    }

    /// Sends one if nothing waits before it: what does keeps the replica as well informed.
    fn offer_heartbeat(&self) -> Result<(), SendError> {
        match self.out.try_send(encoded(&self.heartbeat())) {
            Ok(()) | Err(TrySendError::Full(_)) => Ok(()),
            Err(TrySendError::Closed(_)) => Err(SendError::Gone),
        }
    }

    async fn send_frame(&mut self, frame: &Frame) -> Result<(), SendError> {
        self.send(encoded(frame)).await
    }

    async fn send(&mut self, bytes: Bytes) -> Result<(), SendError> {
        match timeout(self.limits.send, self.out.send(bytes)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(SendError::Gone),
            Err(_) => Err(SendError::Slow(self.limits.send)),
        }
    }
}

fn encoded(frame: &Frame) -> Bytes {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    bytes.into()
}

/// What the thread that sends one snapshot or large transaction needs.
struct FileJob {
    name: String,
    limits: Limits,
    deadline: Instant,
    out: mpsc::Sender<Bytes>,
    cancelled: watch::Receiver<()>,
}

impl FileJob {
    /// Sends the LTX frame of what `write` writes, and gives its position.
    fn run(
        mut self,
        write: impl FnOnce(&mut dyn Write) -> Result<Pos, StoreError>,
    ) -> Result<Pos, SendError> {
        // Why a piece was not sent: whoever writes only sees an I/O error.
        let mut refused = None;
        let name = self.name.clone();
        let mut writer = ChunkWriter::new(&name, |piece| {
            self.send(piece).map_err(|error| {
                let seen = io::Error::other(error.to_string());
                refused = Some(error);
                seen
            })
        });
        let written = write(&mut writer);
        let sent = match written {
            Ok(pos) => writer.finish().map(|()| pos).map_err(|_| SendError::Gone),
            Err(source) => Err(SendError::Snapshot { db: name, source }),
        };
        sent.map_err(|error| refused.unwrap_or(error))
    }

    fn send(&mut self, piece: Bytes) -> Result<(), SendError> {
        let Self {
            out,
            cancelled,
            deadline,
            ..
        } = self;
        let until = (*deadline).min(Instant::now() + self.limits.send);
        let sent = task::wait(async {
            tokio::select! {
                biased;
                _ = cancelled.changed() => None,
                sent = timeout_at(until, out.send(piece)) => Some(sent),
            }
        });
        match sent {
            _ if Instant::now() >= self.deadline => Err(SendError::SnapshotTimeout {
                db: self.name.clone(),
                limit: self.limits.snapshot,
            }),
            Some(Ok(Ok(()))) => Ok(()),
            Some(Err(_)) => Err(SendError::Slow(self.limits.send)),
            None | Some(Ok(Err(_))) => Err(SendError::Gone),
        }
    }
}

/// This moment in milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
