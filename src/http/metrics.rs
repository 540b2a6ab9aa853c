//! `/metrics` in Prometheus's text format, under LiteFS's names.
//!
//! The numbers are kept where they arise (the store's counters, the streams' [`Stats`]) and gathered
//! when somebody asks: a database that is gone is gone from here too, and nothing is exported that is
//! not counted.
//!
//! [`Stats`]: crate::stream::stats::Stats

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::UNIX_EPOCH;

use prometheus::{
    Encoder, GaugeVec, IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder,
    core::Collector,
};

use crate::store::{Counters, Role};
use crate::stream::stats::SentKind;

use super::api::Api;

/// The format's content type.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

type Read = fn(&Counters) -> &AtomicU64;

/// The counters of each database: name, help, and which of the store's it is.
const DB_COUNTERS: [(&str, &str, Read); 7] = [
    (
        "litefs_db_database_write_count",
        "Number of writes to the database file.",
        |c| &c.database_writes,
    ),
    (
        "litefs_db_journal_write_count",
        "Number of writes to the journal file.",
        |c| &c.journal_writes,
    ),
    (
        "litefs_db_wal_write_count",
        "Number of writes to the WAL file.",
        |c| &c.wal_writes,
    ),
    (
        "litefs_db_shm_write_count",
        "Number of writes to the shared memory file.",
        |c| &c.shm_writes,
    ),
    (
        "litefs_db_commit_count",
        "Number of database commits.",
        |c| &c.commits,
    ),
    (
        "litefs_db_ltx_reap_count",
        "Number of LTX files removed by retention.",
        |c| &c.ltx_reaped,
    ),
    (
        "tenure_divergent_transactions_total",
        "Transactions that the primary does not have, set aside before its snapshot.",
        |c| &c.divergent,
    ),
];

/// All metrics of the node as text.
pub(super) fn gather(api: &Api) -> Result<Vec<u8>, prometheus::Error> {
    let registry = Registry::new();
    node(api, &registry)?;
    databases(api, &registry)?;
    faults(api, &registry)?;
    streams(api, &registry)?;
    let mut text = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut text)?;
    Ok(text)
}

fn node(api: &Api, registry: &Registry) -> Result<(), prometheus::Error> {
    let is_primary = api.store.role() == Role::Primary;
    let lag = match api.store.lag() {
        _ if is_primary => 0.0,
        Some(ms) => ms as f64 / 1000.0,
        // As in the mount's `.lag` file before the first sync.
        None => f64::from(i32::MAX) / 1000.0,
    };
    for (name, help, value) in [
        (
            "litefs_db_count",
            "Number of managed databases.",
            api.store.databases().len() as f64,
        ),
        (
            "litefs_is_primary",
            "Primary status of the node.",
            f64::from(u8::from(is_primary)),
        ),
        (
            "litefs_subscriber_count",
            "Number of connected subscribers",
            api.stats.subscribers() as f64,
        ),
        (
            "litefs_http_stream_count",
            "Number of streams currently connected.",
            api.stats.streams() as f64,
        ),
        (
            "litefs_lag_seconds",
            "Lag behind the primary node, in seconds",
            lag,
        ),
    ] {
        let gauge = prometheus::Gauge::new(name, help)?;
        gauge.set(value);
        register(registry, gauge)?;
    }
    let requests = prometheus::IntCounter::new(
        "tenure_fuse_requests_total",
        "Requests of the kernel to the mount.",
    )?;
    requests.inc_by((api.fuse_requests)());
    register(registry, requests)?;
    certificate(api, registry)
}

/// Of the certificate that is in use, if there is one.
fn certificate(api: &Api, registry: &Registry) -> Result<(), prometheus::Error> {
    let keys = api.keys.borrow().clone();
    let end = keys.tls.as_ref().and_then(|tls| tls.valid_until());
    let Some(end) = end.and_then(|end| end.duration_since(UNIX_EPOCH).ok()) else {
        return Ok(());
    };
    let gauge = prometheus::Gauge::new(
        "tenure_certificate_expiry_timestamp_seconds",
        "When the certificate of http.tls ends, as seconds since the Unix epoch.",
    )?;
    gauge.set(end.as_secs() as f64);
    register(registry, gauge)
}

fn databases(api: &Api, registry: &Registry) -> Result<(), prometheus::Error> {
    let gauge = |name: &str, help: &str| IntGaugeVec::new(Opts::new(name, help), &["db"]);
    let txid = gauge("litefs_db_txid", "Current transaction ID.")?;
    let count = gauge("litefs_db_ltx_count", "Number of LTX files on disk.")?;
    let bytes = gauge(
        "litefs_db_ltx_bytes",
        "Number of bytes used by LTX files on disk.",
    )?;
    let lag = GaugeVec::new(
        Opts::new(
            "litefs_db_lag_seconds",
            "Latency between generating an LTX file and consuming it.",
        ),
        &["db"],
    )?;
    let databases = api.store.databases();
    let lags = api.stats.lags();
    for db in &databases {
        let label = &[db.name()];
        let stats = db.log_stats();
        txid.with_label_values(label).set(clamp(db.pos().txid));
        count.with_label_values(label).set(clamp(stats.records));
        bytes.with_label_values(label).set(clamp(stats.bytes));
        let ms = lags.get(db.name()).copied().unwrap_or(0);
        lag.with_label_values(label).set(ms as f64 / 1000.0);
    }
    for (name, help, read) in DB_COUNTERS {
        let counter = IntCounterVec::new(Opts::new(name, help), &["db"])?;
        for db in &databases {
            let value = read(db.counters()).load(Ordering::Relaxed);
            counter.with_label_values(&[db.name()]).inc_by(value);
        }
        register(registry, counter)?;
    }
    register(registry, txid)?;
    register(registry, count)?;
    register(registry, bytes)?;
    register(registry, lag)
}

fn faults(api: &Api, registry: &Registry) -> Result<(), prometheus::Error> {
    let stats = api.store.fault_stats();
    for (name, help, value) in [
        (
            "tenure_scrub_bytes_total",
            "Bytes of stored data that were read and compared.",
            &stats.bytes,
        ),
        (
            "tenure_scrub_pages_total",
            "Database pages that were compared with their checksums.",
            &stats.pages,
        ),
        (
            "tenure_scrub_records_total",
            "Log records that were compared with their checksums.",
            &stats.records,
        ),
        (
            "tenure_scrub_passes_total",
            "Times that everything stored was looked at.",
            &stats.passes,
        ),
    ] {
        let counter = prometheus::IntCounter::new(name, help)?;
        counter.inc_by(value.load(Ordering::Relaxed));
        register(registry, counter)?;
    }
    let last = prometheus::Gauge::new(
        "tenure_scrub_last_pass_timestamp_seconds",
        "When everything stored had last been looked at; 0: not yet.",
    )?;
    last.set(stats.last_pass.load(Ordering::Relaxed) as f64 / 1000.0);
    register(registry, last)?;
    let found = IntCounterVec::new(
        Opts::new(
            "tenure_scrub_faults_total",
            "Stored bytes that were not what was written, by database.",
        ),
        &["db"],
    )?;
    // All of them, so that a rate can be taken from the first one on.
    for db in api.store.names() {
        found.with_label_values(&[&db]);
    }
    for (db, count) in stats.faults() {
        found.with_label_values(&[&db]).inc_by(count);
    }
    register(registry, found)
}

fn streams(api: &Api, registry: &Registry) -> Result<(), prometheus::Error> {
    let sent = IntCounterVec::new(
        Opts::new("litefs_http_frame_send_count", "Number of frames sent."),
        &["db", "type"],
    )?;
    for ((db, kind), count) in api.stats.sent() {
        // Both kinds, so that a rate can be taken from the first one on.
        for other in [SentKind::Ltx, SentKind::Snapshot] {
            sent.with_label_values(&[db.as_str(), other.label()]);
        }
        sent.with_label_values(&[db.as_str(), kind.label()])
            .inc_by(count);
    }
    register(registry, sent)?;
    let (plain, sent) = api.stats.bytes();
    for (name, help, count) in [
        (
            "tenure_stream_plain_bytes_total",
            "Bytes for replicas, before compression.",
            plain,
        ),
        (
            "tenure_stream_sent_bytes_total",
            "Bytes for replicas, as they were sent.",
            sent,
        ),
    ] {
        let counter = IntCounter::new(name, help)?;
        counter.inc_by(count);
        register(registry, counter)?;
    }
    Ok(())
}

fn register(
    registry: &Registry,
    collector: impl Collector + 'static,
) -> Result<(), prometheus::Error> {
    registry.register(Box::new(collector))
}

/// Prometheus's gauges are signed.
fn clamp(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
