//! Memory while much data goes through: it is not to grow with the data.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::copy::fill;
use super::raw::{Clients, Kind};
use super::{MAKE_TABLE, Scale, Target, print, process, txid, wait_for};
use crate::Result;
use crate::cases::{self, Mode};

/// What is written while a replica takes nothing, first and then: twice this.
const STALLED_BYTES: u64 = 150_000_000;
/// Measured memory of one and the same load differs by this.
const NOISE_MIB: f64 = 4.0;
const LIMIT: Duration = Duration::from_secs(300);

/// A replica that connects and then takes nothing: what its primary's memory grows by while data is
/// written, beside the growth of one that has no replica.
pub fn stall(scale: &Scale, work: &Path) -> Result<()> {
    let mut grown = [Vec::new(), Vec::new()];
    for run in 0..scale.runs {
        for (stalled, grown) in [false, true].into_iter().zip(&mut grown) {
            let dir = work.join(format!("{run}-{stalled}"));
            std::fs::create_dir(&dir)?;
            grown.push(growth(scale, &dir, stalled)?);
            std::fs::remove_dir_all(&dir)?;
        }
    }
    let row = |what: &str| format!("stall, growth beyond 9 bytes a page over 300 MB, {what}");
    let [without, with] = &grown;
    print(&row("without a replica"), "MiB", without, Target::Open);
    print(&row("with one"), "MiB", with, Target::Open);
    let more: Vec<f64> = with.iter().zip(without).map(|(w, o)| w - o).collect();
    print(
        &row("the difference"),
        "MiB",
        &more,
        Target::AtMost(NOISE_MIB),
    );
    Ok(())
}

fn growth(scale: &Scale, dir: &Path, stalled: bool) -> Result<f64> {
    let [site, _] = scale.sites(dir)?;
    let node = site.start()?;
    let db = cases::open(&node.mount().join("stall.db"), Mode::Wal, false)?;
    db.execute_batch(MAKE_TABLE)?;
    let mut clients = Clients::new(node.http())?;
    if stalled {
        clients.connect(Kind::Stalled)?;
    }
    let mut resident = [0.0; 2];
    for (i, resident) in resident.iter_mut().enumerate() {
        let begin = Instant::now();
        fill(&db, STALLED_BYTES * (1 + i as u64))?;
        if begin.elapsed() > Duration::from_secs(25) {
            return Err("the replica was cut off before the writing was done".into());
        }
        *resident = process::resident_mib(node.pid())?;
    }
    // The sums of the pages that were added.
    let pages = STALLED_BYTES as f64 * 2.0 / 4096.0;
    Ok(resident[1] - resident[0] - pages * 9.0 / f64::from(1 << 20))
}

/// Databases of half the size and of the whole come in: the most memory that each needed, at the
/// primary that takes it, and at its replica.
pub fn import(scale: &Scale, work: &Path) -> Result<()> {
    let sizes = [scale.copy_gb * 0.5e9, scale.copy_gb * 1e9];
    let files = ["half", "whole"].map(|name| work.join(name));
    for (file, size) in files.iter().zip(sizes) {
        let db = Connection::open(file)?;
        db.execute_batch(&format!(
            "PRAGMA synchronous=OFF; PRAGMA journal_mode=OFF; {MAKE_TABLE}"
        ))?;
        fill(&db, size as u64)?;
    }
    let pages = |i: usize| -> Result<f64> { Ok(files[i].metadata()?.len() as f64 / 4096.0) };
    let more = (pages(1)? - pages(0)?) * 9.0 / f64::from(1 << 20);
    let (mut grown, mut peaks) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for run in 0..scale.runs {
        let mut most = [[0.0; 2]; 2];
        for (i, file) in files.iter().enumerate() {
            let dir = work.join(format!("{run}-{i}"));
            std::fs::create_dir(&dir)?;
            let [primary_site, replica_site] = scale.sites(&dir)?;
            let (primary, replica) = (primary_site.start()?, replica_site.start()?);
            crate::requests::post_file(primary.http(), "/import?name=in.db", File::open(file)?)?;
            let there = txid(primary.mount(), "in.db");
            wait_for(replica.mount(), "in.db", there, LIMIT)?;
            for (node, most) in [&primary, &replica].into_iter().zip(&mut most) {
                most[i] = process::memory_mib(node.pid(), "VmHWM")?;
            }
            drop((primary, replica));
            std::fs::remove_dir_all(&dir)?;
        }
        for (side, most) in most.iter().enumerate() {
            peaks[side].push(most[1]);
            grown[side].push(most[1] - most[0] - more);
        }
    }
    for (side, name) in ["primary", "replica"].into_iter().enumerate() {
        let row = |what: &str| format!("import, {} GB, {name}, {what}", scale.copy_gb);
        print(&row("most memory"), "MiB", &peaks[side], Target::Open);
        let what = "growth from half the size, beyond 9 bytes a page";
        print(&row(what), "MiB", &grown[side], Target::AtMost(NOISE_MIB));
    }
    Ok(())
}
