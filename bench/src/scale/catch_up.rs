//! A replica that was away while many small transactions were made.
//!
//! Its data directory is kept as it was when it went away, so that it can come back several times.
//! The clock starts when the node answers, and stops when its position is the primary's.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::{MAKE_TABLE, Scale, Target, insert_rows, print, txid, wait_for};
use crate::cases::{self, Mode};
use crate::{Result, node::Site};

const LIMIT: Duration = Duration::from_secs(300);

pub fn run(scale: &Scale, work: &Path) -> Result<()> {
    for mode in [Mode::Wal, Mode::Delete] {
        let dir = work.join(mode.to_string());
        std::fs::create_dir(&dir)?;
        let [primary_site, replica_site] = scale.sites(&dir)?;
        let primary = primary_site.start()?;
        let name = "behind.db";
        let writer = cases::open(&primary.mount().join(name), mode, false)?;
        writer.execute_batch(MAKE_TABLE)?;
        let replica = replica_site.start()?;
        let there = txid(primary.mount(), name);
        wait_for(replica.mount(), name, there, LIMIT)?;
        drop(replica);
        insert_rows(&writer, scale.transactions)?;
        // What is lazily flushed gets on disk.
        std::thread::sleep(Duration::from_millis(200));
        let behind = txid(primary.mount(), name) - there;
        let kept = dir.join("kept");
        copy(&replica_site.data(), &kept)?;
        let mut rates = Vec::new();
        for _ in 0..scale.runs {
            copy(&kept, &replica_site.data())?;
            let took = catch_up(&replica_site, name, there + behind)?;
            rates.push(behind as f64 / took.as_secs_f64());
        }
        let row = format!("catch-up, {mode}, {behind} transactions");
        print(&row, "a second", &rates, Target::AtLeast(20_000.0));
    }
    Ok(())
}

fn catch_up(site: &Site, name: &str, wanted: u64) -> Result<Duration> {
    let replica = site.start()?;
    let begin = Instant::now();
    wait_for(replica.mount(), name, wanted, LIMIT)?;
    Ok(begin.elapsed())
}

/// `to` becomes what `from` is.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        std::fs::remove_dir_all(to)?;
    }
    let done = Command::new("cp").arg("-a").arg(from).arg(to).status()?;
    match done.success() {
        true => Ok(()),
        false => Err(format!("cp -a {} {}: {done}", from.display(), to.display()).into()),
    }
}
