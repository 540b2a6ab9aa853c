//! A database of 20 GB beside one of 20 MB: commits, starts, memory.
//!
//! Both are sparse: SQLite makes a small database, whose file is then stretched; the pages that
//! are added are zeros that no table knows. With an LTX file that has the checksum of all pages they
//! are a data directory of LiteFS's, which the first start carries over.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rusqlite::Connection;
use tenure::ltx::{self, CHECKSUM_FLAG, Encoder, Header};

use super::{MAKE_TABLE, Scale, Target, insert_rows, print, process};
use crate::cases::{self, Mode};
use crate::measure::median;
use crate::{Result, node::Site};

const PAGE_SIZE: u32 = 4096;
const SMALL_BYTES: u64 = 20_000_000;
/// The first start reads all of both.
const CARRY_OVER_LIMIT: Duration = Duration::from_secs(120);
/// How long the node is under load before it is killed.
const LOAD: Duration = Duration::from_secs(3);
/// How long one side commits before the other does.
const SLICE: Duration = Duration::from_millis(300);

pub fn run(scale: &Scale, work: &Path) -> Result<()> {
    let [site, _] = scale.sites(work)?;
    let pages = (scale.large_gb * 1e9 / f64::from(PAGE_SIZE)) as u32;
    make(&site, "large.db", pages)?;
    make(
        &site,
        "small.db",
        (SMALL_BYTES / u64::from(PAGE_SIZE)) as u32,
    )?;
    drop(site.start_within(CARRY_OVER_LIMIT)?);

    let mut starts = Vec::new();
    for _ in 0..scale.runs {
        let begin = Instant::now();
        let node = site.start()?;
        read(node.mount())?;
        starts.push(begin.elapsed().as_secs_f64());
        drop(node);
    }
    let clean = "large, start after a clean stop";
    print(clean, "s", &starts, Target::AtMost(1.0));

    for mode in [Mode::Delete, Mode::Wal] {
        commits(&site, mode, scale.runs)?;
        after_kill(&site, mode, scale.runs)?;
    }
    let node = site.start()?;
    load(node.mount(), Mode::Wal)?;
    let all_pages = f64::from(pages) + (SMALL_BYTES / u64::from(PAGE_SIZE)) as f64;
    let most = 16.0 + 9.0 * all_pages / f64::from(1 << 20);
    let resident = process::resident_mib(node.pid())?;
    print(
        "large, resident memory",
        "MiB",
        &[resident],
        Target::AtMost(most),
    );
    Ok(())
}

/// A row of the table, at both sizes.
fn read(mount: &Path) -> Result<()> {
    for name in ["large.db", "small.db"] {
        let db = Connection::open(mount.join(name))?;
        db.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0))?;
    }
    Ok(())
}

/// Commits of one row, alternating between the two.
fn commits(site: &Site, mode: Mode, runs: usize) -> Result<()> {
    let node = site.start()?;
    let open = |name: &str| cases::open(&node.mount().join(name), mode, true);
    let (large, small) = (open("large.db")?, open("small.db")?);
    let mut ratios = Vec::new();
    for _ in 0..runs.max(5) {
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..4 {
            for (db, times) in [&large, &small].into_iter().zip(&mut times) {
                let begin = Instant::now();
                while begin.elapsed() < SLICE {
                    let one = Instant::now();
                    insert_rows(db, 1)?;
                    times.push(one.elapsed().as_secs_f64());
                }
            }
        }
        ratios.push(median(&times[0]) / median(&times[1]));
    }
    let row = format!("large, commit against 20 MB, {mode}");
    print(&row, "ratio", &ratios, Target::AtMost(1.1));
    Ok(())
}

/// Writes to both, as fast as it goes, for a while.
fn load(mount: &Path, mode: Mode) -> Result<()> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers = ["large.db", "small.db"].map(|name| {
            let (stop, path) = (&stop, mount.join(name));
            scope.spawn(move || -> Result<()> {
                let db = cases::open(&path, mode, true)?;
                while !stop.load(Ordering::Relaxed) {
                    insert_rows(&db, 1)?;
                }
                Ok(())
            })
        });
        std::thread::sleep(LOAD);
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.join().map_err(|_| "a writer panicked")??;
        }
        Ok(())
    })
}

/// Starts after a `kill -9` while both are written to.
fn after_kill(site: &Site, mode: Mode, runs: usize) -> Result<()> {
    let mut starts = Vec::new();
    let mut node = site.start()?;
    for _ in 0..runs {
        let mount = site.mount();
        let writer = std::thread::spawn(move || load(&mount, mode));
        std::thread::sleep(LOAD - Duration::from_millis(500));
        node.kill()?;
        // Its writes have failed, as they must.
        let _ = writer.join();
        let begin = Instant::now();
        node = site.start()?;
        read(node.mount())?;
        starts.push(begin.elapsed().as_secs_f64());
    }
    let row = format!("large, start after kill -9 under load, {mode}");
    print(&row, "s", &starts, Target::AtMost(3.0));
    Ok(())
}

/// Puts a database of this many pages into the data directory.
fn make(site: &Site, name: &str, pages: u32) -> Result<()> {
    let dir = site.data().join("dbs").join(name);
    std::fs::create_dir_all(dir.join("ltx"))?;
    let path = dir.join("database");
    let db = Connection::open(&path)?;
    db.execute_batch(&format!("PRAGMA page_size={PAGE_SIZE}; {MAKE_TABLE}"))?;
    insert_rows(&db, 1)?;
    drop(db);
    let mut bytes = std::fs::read(&path)?;
    // The number of pages in the database's header.
    bytes[28..32].copy_from_slice(&pages.to_be_bytes());
    std::fs::write(&path, &bytes)?;
    let file = File::options().write(true).open(&path)?;
    file.set_len(u64::from(pages) * u64::from(PAGE_SIZE))?;
    let mut made = bytes.chunks_exact(PAGE_SIZE as usize);
    let (zeros, lock_page) = ([0u8; PAGE_SIZE as usize], ltx::lock_pgno(PAGE_SIZE));
    let sums = (1..=pages).filter(|pgno| *pgno != lock_page);
    let checksum = sums.fold(0, |total, pgno| {
        total ^ ltx::page_checksum(pgno, made.next().unwrap_or(&zeros))
    });
    let header = Header {
        compressed: true,
        page_size: PAGE_SIZE,
        commit: pages,
        min_txid: 2,
        max_txid: 2,
        timestamp: 1,
        pre_apply_checksum: CHECKSUM_FLAG | 1,
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: 0,
    };
    let file = File::create(dir.join("ltx").join(ltx::file_name(2, 2)))?;
    let mut encoder = Encoder::new(file, header)?;
    encoder.page(1, &bytes[..PAGE_SIZE as usize])?;
    encoder.finish(checksum | CHECKSUM_FLAG)?;
    Ok(())
}
