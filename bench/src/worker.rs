//! Real processes for the cases that need several: the program starts itself again.
//!
//! A worker opens its connection, prints `ready`, waits for a line on its standard input, works
//! for the given time, and prints how much it did: all of them start at the same moment, and their
//! start is not measured.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use rusqlite::{Connection, OpenFlags};

use crate::cases::{self, Mode};
use crate::{Error, Result};

/// What a worker does.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Reads rows by key, each in its own transaction.
    Read,
    /// Inserts rows, each in its own transaction, `synchronous=NORMAL`.
    Write,
    /// The same with `synchronous=FULL`.
    WriteFull,
}

/// The hidden subcommand.
#[derive(Args)]
pub struct Worker {
    #[arg(long)]
    role: Role,
    #[arg(long)]
    database: PathBuf,
    #[arg(long)]
    seconds: f64,
    #[arg(long)]
    seed: u64,
}

impl Worker {
    /// Runs in the process of its own.
    pub fn run(&self) -> Result<()> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let db = Connection::open_with_flags(&self.database, flags)?;
        db.busy_timeout(Duration::from_secs(20))?;
        let full = self.role == Role::WriteFull;
        let synchronous = if full { "FULL" } else { "NORMAL" };
        db.pragma_update(None, "synchronous", synchronous)?;
        db.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0))?;
        println!("ready");
        std::io::stdin().lock().read_line(&mut String::new())?;
        let time = Duration::from_secs_f64(self.seconds);
        let count = match self.role {
            Role::Read => cases::read_points(&db, time, self.seed)?,
            Role::Write | Role::WriteFull => write(&db, time)?,
        };
        println!("{count}");
        Ok(())
    }
}

fn write(db: &Connection, time: Duration) -> Result<u64> {
    let mut statement = db.prepare("INSERT INTO t (payload) VALUES (?1)")?;
    let payload = [0xa5_u8; 140];
    let begin = Instant::now();
    let mut commits = 0;
    while begin.elapsed() < time {
        statement.execute([&payload[..]])?;
        commits += 1;
    }
    Ok(commits)
}

/// A started worker; killed when it is dropped before its end.
struct Running {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Running {
    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            return Err("a worker process ended before its work was done".into());
        }
        Ok(line.trim().to_string())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a process for each of these, all at the same time; what each counted.
pub fn run_all(jobs: &[(&Path, Role)], mode: Mode, time: Duration) -> Result<Vec<u64>> {
    let program = std::env::current_exe()?;
    let mut workers = Vec::new();
    for (seed, (path, role)) in jobs.iter().enumerate() {
        // The mode is set first: a worker that finds it set does not have to switch it.
        drop(cases::open(path, mode, false)?);
        let role = match role {
            Role::Read => "read",
            Role::Write => "write",
            Role::WriteFull => "write-full",
        };
        let mut child = Command::new(&program)
            .args(["worker", "--role", role, "--database"])
            .arg(path)
            .args(["--seconds", &time.as_secs_f64().to_string()])
            .args(["--seed", &seed.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| format!("start a worker process: {e}"))?;
        let output = child.stdout.take().ok_or("a worker without output")?;
        workers.push(Running {
            child,
            output: BufReader::new(output),
        });
    }
    for worker in &mut workers {
        worker.line()?;
    }
    for worker in &mut workers {
        let mut input = worker.child.stdin.take().ok_or("a worker without input")?;
        input.write_all(b"go\n")?;
    }
    workers
        .iter_mut()
        .map(|worker| worker.line()?.parse::<u64>().map_err(Error::from))
        .collect()
}
