//! What the streams of a node count, for `/metrics`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use parking_lot::Mutex;

/// What kind of LTX file a frame carried; the metric's label `type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SentKind {
    /// One transaction.
    Ltx,
    /// A whole database.
    Snapshot,
}

impl SentKind {
    /// The label as LiteFS spells it.
    pub fn label(self) -> &'static str {
        match self {
            SentKind::Ltx => "ltx",
            SentKind::Snapshot => "ltx:snapshot",
        }
    }
}

/// Counts of a node's streams. One for each node, shared by its senders, receiver and API.
#[derive(Debug, Default)]
pub struct Stats {
    streams: AtomicI64,
    readers: AtomicI64,
    sent: Mutex<BTreeMap<(String, SentKind), u64>>,
    lags: Mutex<BTreeMap<String, i64>>,
    plain_bytes: AtomicU64,
    sent_bytes: AtomicU64,
}

/// One more in a gauge for as long as it lives.
pub struct Counted<'a>(&'a AtomicI64);

impl<'a> Counted<'a> {
    fn new(gauge: &'a AtomicI64) -> Self {
        gauge.fetch_add(1, Ordering::Relaxed);
        Counted(gauge)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Stats {
    /// Counts a replica that is connected.
    pub fn stream(&self) -> Counted<'_> {
        Counted::new(&self.streams)
    }

    /// Counts a reader of `/events`.
    pub fn event_reader(&self) -> Counted<'_> {
        Counted::new(&self.readers)
    }

    /// Replicas connected now.
    pub fn streams(&self) -> i64 {
        self.streams.load(Ordering::Relaxed)
    }

    /// Replicas and readers of events connected now.
    pub fn subscribers(&self) -> i64 {
        self.streams() + self.readers.load(Ordering::Relaxed)
    }

    /// Counts an LTX frame that was sent to a replica.
    pub fn count_sent(&self, name: &str, kind: SentKind) {
        *self.sent.lock().entry((name.to_owned(), kind)).or_default() += 1;
    }

    /// LTX frames sent since the start, by database and kind.
    pub fn sent(&self) -> BTreeMap<(String, SentKind), u64> {
        self.sent.lock().clone()
    }

    /// Counts bytes of streams: how many there were to be sent, and as how many they were.
    pub fn count_bytes(&self, plain: usize, sent: usize) {
        self.plain_bytes.fetch_add(plain as u64, Ordering::Relaxed);
        self.sent_bytes.fetch_add(sent as u64, Ordering::Relaxed);
    }

    /// Bytes of streams since the start: before their compression, and as they were sent.
    pub fn bytes(&self) -> (u64, u64) {
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        (load(&self.plain_bytes), load(&self.sent_bytes))
    }

    /// Notes how long ago, in milliseconds, the transaction that was just applied had been made.
    pub fn note_lag(&self, name: &str, lag_ms: i64) {
        self.lags.lock().insert(name.to_owned(), lag_ms);
    }

    /// The last lag in milliseconds of each database that this node received something of.
    pub fn lags(&self) -> BTreeMap<String, i64> {
        self.lags.lock().clone()
    }
}
