//! Measures a mounted file system for SQLite against plain SQLite on the same disk.
//!
//! The same work runs in a plain directory and in a mount, round by round in alternating order,
//! and what counts is the ratio of the two **within one round**: absolute figures of a shared
//! machine drift by a third, ratios of neighbouring rounds do not. Every figure is a rate, so that
//! a ratio above 1 always means that the mount was faster.
//!
//! Without `--mount` the program starts `tenure` itself, a primary, and a replica for the figures
//! of replication; with `--mount`
//! (and `--replica-mount`) it measures whatever is mounted there.

mod cases;
mod machine;
mod measure;
mod node;
mod replication;
mod requests;
mod scale;
mod worker;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::cases::{Case, Settings};
use crate::node::Cluster;

/// An error is printed and ends the program: a text is all that is needed of it.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
/// The result of every step of a measurement.
pub type Result<T> = std::result::Result<T, Error>;

#[derive(Parser)]
#[command(about = "Measures a mounted file system for SQLite against plain SQLite")]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    options: Options,
}

#[derive(Subcommand)]
enum Command {
    /// One process of a case with several; started by the program itself.
    #[command(hide = true)]
    Worker(worker::Worker),
    /// Measures the rows of the scale table: large databases, many of them, many replicas
    Scale(scale::Scale),
}

#[derive(Args)]
struct Options {
    /// Directory for the plain databases (default: a temporary one in --work)
    #[arg(long)]
    plain: Option<PathBuf>,
    /// Mount of a primary to measure (default: start one, see --start)
    #[arg(long)]
    mount: Option<PathBuf>,
    /// Mount of a replica of it, for the replication figures
    #[arg(long)]
    replica_mount: Option<PathBuf>,
    /// Address (HOST:PORT) of the primary's HTTP API, for --requests
    #[arg(long)]
    http: Option<String>,
    /// Start a primary of tenure, and a replica for replication (the default without --mount)
    #[arg(long, conflicts_with = "mount")]
    start: bool,
    /// The tenure program that --start starts (default: beside this program)
    #[arg(long)]
    tenure: Option<PathBuf>,
    /// `fuse.wal-capture` of the nodes that are started: gate or tail
    #[arg(long, default_value = "gate")]
    wal_capture: String,
    /// Where temporary directories are made: plain and mounted data share its disk
    #[arg(long, default_value = ".")]
    work: PathBuf,
    /// How often each case runs on each side
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// How long the cases that are bounded by time run, in seconds a round and side
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Size of the database that is scanned, in megabytes
    #[arg(long, default_value_t = 200)]
    scan_mb: u64,
    /// Cases to run, by name or by the beginning of a name, comma-separated
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Print the names of the cases, and stop
    #[arg(long)]
    list: bool,
    /// Only count the requests that the daemon gets in warm reading transactions
    #[arg(long)]
    requests: bool,
    /// End everything, mounts included, after so many seconds
    #[arg(long, default_value_t = 3600)]
    limit: u64,
}

const REPLICATION: &str = "replication";
const REQUESTS: &str = "requests";

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        Some(Command::Worker(worker)) => worker.run(),
        Some(Command::Scale(scale)) => scale.run(),
        None => run(&cli.options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("ERROR: {err}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let only: Vec<String> = if options.requests {
        vec![REQUESTS.into()]
    } else {
        options.only.clone()
    };
    let wanted = |name: &str| only.is_empty() || only.iter().any(|o| name.starts_with(o.as_str()));
    let cases: Vec<Case> = cases::all()
        .into_iter()
        .filter(|case| wanted(&case.name()))
        .collect();
    if options.list {
        for case in cases::all() {
            println!("{:22} {}", case.name(), case.description());
        }
        println!("{REPLICATION:22} commit on the primary to visible at the replica");
        println!("{REQUESTS:22} requests to the daemon in a warm reading transaction");
        return Ok(());
    }
    if cases.is_empty() && !wanted(REPLICATION) && !wanted(REQUESTS) {
        return Err("no case has such a name; --list shows them".into());
    }

    node::end_after(Duration::from_secs(options.limit));
    let work = tempfile::Builder::new()
        .prefix("tenure-bench-")
        .tempdir_in(&options.work)
        .map_err(|e| format!("make a directory in {}: {e}", options.work.display()))?;
    let mut started = match &options.mount {
        Some(_) => None,
        None => Some(Cluster::start(
            work.path(),
            options.tenure.as_deref(),
            &options.wal_capture,
        )?),
    };
    let primary = started.as_ref().map(|cluster| &cluster.primary);
    let mount = options
        .mount
        .clone()
        .or_else(|| primary.map(|node| node.mount().to_path_buf()))
        .ok_or("there is no mount to measure")?;
    let http = options
        .http
        .clone()
        .or_else(|| primary.map(|node| node.http().to_string()));

    machine::print_description(&options.work);
    let settings = Settings {
        seconds: options.seconds,
        scan_bytes: options.scan_mb * 1_000_000,
    };
    if !cases.is_empty() {
        let plain = match &options.plain {
            Some(dir) => dir.clone(),
            None => work.path().join("plain"),
        };
        std::fs::create_dir_all(&plain)
            .map_err(|e| format!("make the directory {}: {e}", plain.display()))?;
        compare(&cases, &plain, &mount, options.rounds.max(1), &settings)?;
    }
    if wanted(REQUESTS) {
        match &http {
            Some(http) => requests::run(&mount, http)?,
            None => eprintln!("requests are not counted: no --http"),
        }
    }
    if wanted(REPLICATION) {
        let replica = match (&options.replica_mount, &mut started) {
            (Some(mount), _) => Some(mount.clone()),
            (None, Some(cluster)) => Some(cluster.replica()?.mount().to_path_buf()),
            (None, None) => None,
        };
        match replica {
            Some(replica) => replication::run(&mount, &replica, options.seconds)?,
            None => eprintln!("replication is left out: no --replica-mount"),
        }
    }
    Ok(())
}

/// Runs every case on both sides and prints a line of the table as soon as it is known.
fn compare(
    cases: &[Case],
    plain: &Path,
    mount: &Path,
    rounds: usize,
    settings: &Settings,
) -> Result<()> {
    println!("\n{}", measure::TABLE_HEAD);
    for case in cases {
        let sides = measure::run_rounds(case, plain, mount, rounds, settings)
            .map_err(|e| format!("case {}: {e}", case.name()))?;
        for row in sides {
            println!("{row}");
        }
    }
    Ok(())
}
