//! A replica's lag under a primary that writes as fast as it can.
//!
//! Every 50 ms both positions are read: the lag is how long ago the primary was where the replica is
//! now. One that grows would be larger in the last quarter of the time than in the first.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{MAKE_TABLE, Scale, Target, insert_rows, print, txid};
use crate::Result;
use crate::cases::{self, Mode};
use crate::measure::{median, quantile};

const SAMPLE: Duration = Duration::from_millis(50);
/// Two medians of one and the same lag may differ by this.
const NOISE_MS: f64 = 20.0;

pub fn run(scale: &Scale, work: &Path) -> Result<()> {
    for (mode, full) in [(Mode::Wal, false), (Mode::Delete, true)] {
        let dir = work.join(mode.to_string());
        std::fs::create_dir(&dir)?;
        let [primary_site, replica_site] = scale.sites(&dir)?;
        let (primary, replica) = (primary_site.start()?, replica_site.start()?);
        let name = "lag.db";
        let path = primary.mount().join(name);
        cases::open(&path, mode, full)?.execute_batch(MAKE_TABLE)?;
        let stop = AtomicBool::new(false);
        let lags = std::thread::scope(|scope| {
            let writer = scope.spawn(|| -> Result<()> {
                let db = cases::open(&path, mode, full)?;
                while !stop.load(Ordering::Relaxed) {
                    insert_rows(&db, 10)?;
                }
                Ok(())
            });
            let lags = sample(primary.mount(), replica.mount(), name, scale.seconds);
            stop.store(true, Ordering::Relaxed);
            writer.join().map_err(|_| "the writer panicked")??;
            Ok::<_, crate::Error>(lags)
        })?;
        let rate = txid(primary.mount(), name) as f64 / scale.seconds;
        let quarter = lags.len() / 4;
        let (first, last) = (&lags[..quarter], &lags[lags.len() - quarter..]);
        let row = |what: &str| format!("lag, {mode}, {rate:.0} commits/s, {what}");
        print(&row("first quarter"), "ms", first, Target::Open);
        let most = median(first) * 1.5 + NOISE_MS;
        print(&row("last quarter"), "ms", last, Target::AtMost(most));
        print(&row("most"), "ms", &[quantile(&lags, 1.0)], Target::Open);
    }
    Ok(())
}

/// The lag in milliseconds, again and again.
fn sample(primary: &Path, replica: &Path, name: &str, seconds: f64) -> Vec<f64> {
    let begin = Instant::now();
    let mut history: Vec<(Instant, u64)> = Vec::new();
    let mut lags = Vec::new();
    while begin.elapsed().as_secs_f64() < seconds {
        let there = txid(replica, name);
        history.push((Instant::now(), txid(primary, name)));
        // The last moment at which the primary had no more than the replica has now.
        let passed = history.partition_point(|(_, txid)| *txid <= there);
        let lag = match passed.checked_sub(1) {
            Some(i) => history[i].0.elapsed(),
            None => begin.elapsed(),
        };
        lags.push(lag.as_secs_f64() * 1e3);
        std::thread::sleep(SAMPLE);
    }
    lags
}
