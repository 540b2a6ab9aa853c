//! How far it goes: many transactions, large databases, many of them, many replicas.
//!
//! Each row has its own nodes in a directory of its own, and is measured several times. A row prints
//! the median and the spread of what was found, and what the figure is to be. Rows know nothing of
//! each other; `--only` runs some of them.

mod catch_up;
mod copy;
mod delay;
mod lag;
mod large;
mod many;
mod memory;
mod process;
mod raw;
mod replicas;
mod wire;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use rusqlite::Connection;

use crate::measure::{median, number, quantile};
use crate::node::{self, Site};
use crate::{Result, machine};

/// `scale`: the rows of the scale table.
#[derive(Args)]
pub struct Scale {
    /// The tenure program (default: beside this program)
    #[arg(long)]
    tenure: Option<PathBuf>,
    /// Where the nodes' directories are made
    #[arg(long, default_value = ".")]
    work: PathBuf,
    /// How often each row is measured
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Rows to measure, by name or by the beginning of a name, comma-separated
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Print the names of the rows, and stop
    #[arg(long)]
    list: bool,
    /// How many transactions the replica of the row catch-up is behind
    #[arg(long, default_value_t = 100_000)]
    transactions: u64,
    /// How long the primary of the row lag writes, in seconds
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
    /// Size of the large database, in gigabytes
    #[arg(long, default_value_t = 20.0)]
    large_gb: f64,
    /// Size of the database that is copied to a new replica, in gigabytes
    #[arg(long, default_value_t = 2.0)]
    copy_gb: f64,
    /// How many databases there are in the row many
    #[arg(long, default_value_t = 2000)]
    databases: usize,
    /// How many replicas there are in the row replicas
    #[arg(long, default_value_t = 50)]
    replicas: usize,
    /// End everything, mounts included, after so many seconds
    #[arg(long, default_value_t = 1800)]
    limit: u64,
}

/// What a figure is to be.
#[derive(Clone, Copy)]
pub enum Target {
    /// No more than this.
    AtMost(f64),
    /// No less than this.
    AtLeast(f64),
    /// Nothing: it explains another one.
    Open,
}

/// A row's measuring function.
type Measure = fn(&Scale, &Path) -> Result<()>;

const ROWS: [(&str, &str, Measure); 10] = [
    (
        "delay",
        "from the commit's return to visible at the replica",
        delay::run,
    ),
    (
        "catch-up",
        "a replica that is behind by many small transactions",
        catch_up::run,
    ),
    (
        "lag",
        "a replica's lag while the primary writes at full speed",
        lag::run,
    ),
    (
        "large",
        "a 20 GB database: commit, start, memory",
        large::run,
    ),
    (
        "many",
        "2,000 databases: start, memory, open files",
        many::run,
    ),
    (
        "copy",
        "a new replica of a 2 GB database, against cp and sync",
        copy::run,
    ),
    (
        "wire",
        "bytes on the wire for a small transaction",
        wire::run,
    ),
    (
        "replicas",
        "processor time and memory for each replica more",
        replicas::run,
    ),
    (
        "stall",
        "memory while a replica takes nothing",
        memory::stall,
    ),
    ("import", "memory while a database comes in", memory::import),
];

impl Scale {
    /// Measures the rows, and prints the table.
    pub fn run(&self) -> Result<()> {
        if self.list {
            for (name, what, _) in ROWS {
                println!("{name:10} {what}");
            }
            return Ok(());
        }
        let wanted =
            |name: &str| self.only.is_empty() || self.only.iter().any(|o| name.starts_with(&**o));
        let rows: Vec<_> = ROWS.iter().filter(|(name, ..)| wanted(name)).collect();
        if rows.is_empty() {
            return Err("no row has such a name; --list shows them".into());
        }
        node::end_after(Duration::from_secs(self.limit));
        machine::print_description(&self.work);
        println!("\n| row | unit | median | min–max | runs | target | |");
        println!("| --- | --- | ---: | ---: | ---: | ---: | --- |");
        for (name, _, measure) in rows {
            let work = tempfile::Builder::new()
                .prefix("tenure-scale-")
                .tempdir_in(&self.work)
                .map_err(|e| format!("make a directory in {}: {e}", self.work.display()))?;
            measure(self, work.path()).map_err(|e| format!("row {name}: {e}"))?;
        }
        Ok(())
    }

    fn sites(&self, work: &Path) -> Result<[Site; 2]> {
        node::sites(work, self.tenure.as_deref(), "gate")
    }
}

/// Prints one line of the table.
fn print(row: &str, unit: &str, values: &[f64], target: Target) {
    let found = median(values);
    let (aim, met) = match target {
        Target::AtMost(most) => (format!("≤ {}", number(most)), Some(found <= most)),
        Target::AtLeast(least) => (format!("≥ {}", number(least)), Some(found >= least)),
        Target::Open => (String::new(), None),
    };
    let met = met.map_or("", |met| if met { "met" } else { "missed" });
    println!(
        "| {row} | {unit} | {} | {}–{} | {} | {aim} | {met} |",
        number(found),
        number(quantile(values, 0.0)),
        number(quantile(values, 1.0)),
        values.len(),
    );
}

/// The TXID in a node's `-pos` file; 0 while there is none.
fn txid(mount: &Path, db: &str) -> u64 {
    let text = std::fs::read_to_string(mount.join(format!("{db}-pos"))).unwrap_or_default();
    let hex = text.split('/').next().unwrap_or_default();
    u64::from_str_radix(hex, 16).unwrap_or(0)
}

/// Waits until a node is at this TXID.
fn wait_for(mount: &Path, db: &str, wanted: u64, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let here = txid(mount, db);
        if here >= wanted {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!("{db} is at {here} of {wanted} after {limit:?}").into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Commits `count` rows of 100 bytes, each in its own transaction.
fn insert_rows(db: &Connection, count: u64) -> Result<()> {
    let mut insert = db.prepare("INSERT INTO t (payload) VALUES (hex(randomblob(50)))")?;
    for _ in 0..count {
        insert.execute([])?;
    }
    Ok(())
}

const MAKE_TABLE: &str = "CREATE TABLE t (id INTEGER PRIMARY KEY, payload BLOB)";
