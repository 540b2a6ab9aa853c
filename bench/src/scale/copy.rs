//! A new replica of a large database, against copying its file and flushing the copy.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::{MAKE_TABLE, Scale, Target, print, txid, wait_for};
use crate::Result;
use crate::cases::{self, Mode};

const LIMIT: Duration = Duration::from_secs(300);
/// Rows of one transaction.
const BATCH: u64 = 50_000;
/// About what a row takes: text of random hex digits, which LZ4 makes a little smaller.
const ROW_BYTES: u64 = 1000;

pub fn run(scale: &Scale, work: &Path) -> Result<()> {
    let [primary_site, replica_site] = scale.sites(work)?;
    let primary = primary_site.start()?;
    let name = "copied.db";
    let db = cases::open(&primary.mount().join(name), Mode::Delete, false)?;
    db.execute_batch(MAKE_TABLE)?;
    fill(&db, (scale.copy_gb * 1e9) as u64)?;
    drop(db);
    std::thread::sleep(Duration::from_secs(1));
    let wanted = txid(primary.mount(), name);
    let from = primary_site.data().join("dbs").join(name).join("database");
    let to = work.join("copy");
    let (mut copies, mut replicas, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..scale.runs {
        settle()?;
        let begin = Instant::now();
        let done = Command::new("cp").arg(&from).arg(&to).status()?;
        if !done.success() {
            return Err(format!("cp: {done}").into());
        }
        File::open(&to)?.sync_all()?;
        let copied = begin.elapsed().as_secs_f64();
        std::fs::remove_file(&to)?;
        if replica_site.data().exists() {
            std::fs::remove_dir_all(replica_site.data())?;
        }
        settle()?;
        let begin = Instant::now();
        let replica = replica_site.start()?;
        wait_for(replica.mount(), name, wanted, LIMIT)?;
        let replicated = begin.elapsed().as_secs_f64();
        drop(replica);
        copies.push(copied);
        replicas.push(replicated);
        ratios.push(replicated / copied);
    }
    let row = |what: &str| format!("copy, {} GB, {what}", scale.copy_gb);
    print(&row("cp and sync"), "s", &copies, Target::Open);
    print(&row("new replica"), "s", &replicas, Target::Open);
    print(
        &row("against cp and sync"),
        "ratio",
        &ratios,
        Target::AtMost(2.0),
    );
    Ok(())
}

/// Whatever is to be written is on disk.
fn settle() -> Result<()> {
    let done = Command::new("sync").status()?;
    match done.success() {
        true => Ok(()),
        false => Err(format!("sync: {done}").into()),
    }
}

/// Rows until the database has about this size.
pub fn fill(db: &Connection, bytes: u64) -> Result<()> {
    let rows = bytes / ROW_BYTES;
    let mut insert = db.prepare("INSERT INTO t (payload) VALUES (hex(randomblob(480)))")?;
    for batch in 0..rows.div_ceil(BATCH) {
        db.execute_batch("BEGIN")?;
        for _ in 0..BATCH.min(rows - batch * BATCH) {
            insert.execute([])?;
        }
        db.execute_batch("COMMIT")?;
    }
    Ok(())
}
