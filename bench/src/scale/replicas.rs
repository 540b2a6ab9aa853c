//! What each replica more costs the primary: processor time for a transaction, and memory.
//!
//! The primary writes at a steady rate that it can hold with all of them, once without replicas,
//! once with half of them, once with all.

use std::path::Path;
use std::time::{Duration, Instant};

use super::raw::{Clients, Kind};
use super::{MAKE_TABLE, Scale, Target, insert_rows, print, process};
use crate::Result;
use crate::cases::{self, Mode};

/// Transactions of one measurement.
const TRANSACTIONS: u64 = 1000;
/// Between two of them.
const PACE: Duration = Duration::from_millis(5);

pub fn run(scale: &Scale, work: &Path) -> Result<()> {
    let [site, _] = scale.sites(work)?;
    let (half, all) = (scale.replicas / 2, scale.replicas);
    let (mut firsts, mut constants, mut shares, mut memory) = (vec![], vec![], vec![], vec![]);
    for _ in 0..scale.runs {
        // A node that has not held this many replicas before: what they left is not counted.
        let node = site.start()?;
        let path = node.mount().join("replicated.db");
        let db = cases::open(&path, Mode::Wal, false)?;
        db.execute_batch(&MAKE_TABLE.replace("TABLE", "TABLE IF NOT EXISTS"))?;
        let mut clients = Clients::new(node.http())?;
        let mut costs = Vec::new();
        let mut resident = Vec::new();
        for count in [0, half, all] {
            while clients.count() < count {
                clients.connect(Kind::Tenure)?;
            }
            clients.read_for(Duration::from_millis(500));
            let before = process::cpu_time(node.pid())?;
            for _ in 0..TRANSACTIONS {
                let due = Instant::now() + PACE;
                insert_rows(&db, 1)?;
                clients.read_for(due.saturating_duration_since(Instant::now()));
            }
            clients.read_for(Duration::from_millis(200));
            let used = process::cpu_time(node.pid())? - before;
            costs.push(used.as_secs_f64() * 1e6 / TRANSACTIONS as f64);
            resident.push(process::resident_mib(node.pid())?);
        }
        let first = (costs[1] - costs[0]) / half as f64;
        let second = (costs[2] - costs[1]) / (all - half) as f64;
        firsts.push((costs[2] - costs[0]) / all as f64);
        constants.push(second / first);
        shares.push((costs[2] - costs[0]) / all as f64 / costs[2]);
        memory.push((resident[2] - resident[0]) * 1024.0 / all as f64);
    }
    let row = |what: &str| format!("replicas, {all}, each more: {what}");
    print(
        &row("processor time a transaction"),
        "µs",
        &firsts,
        Target::Open,
    );
    let share = Target::AtMost(1.0 / all as f64);
    print(&row("share of the sum"), "", &shares, share);
    print(
        &row("second half against first"),
        "ratio",
        &constants,
        Target::AtMost(1.1),
    );
    print(&row("memory"), "KiB", &memory, Target::AtMost(256.0));
    Ok(())
}
