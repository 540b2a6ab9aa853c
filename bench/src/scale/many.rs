//! Thousands of databases in one node: how it starts, and what it costs while nobody uses them.

use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::{MAKE_TABLE, Scale, Target, insert_rows, print, process};
use crate::Result;
use crate::cases::{self, Mode};

/// How long nothing happens before a node counts as idle.
const IDLE: Duration = Duration::from_secs(5);
/// The same after writing: the look for old transactions, once a minute, has the files synced.
const IDLE_AFTER_WRITING: Duration = Duration::from_secs(75);

pub fn run(scale: &Scale, work: &Path) -> Result<()> {
    let [site, _] = scale.sites(work)?;
    let node = site.start()?;
    let name = |i: usize| format!("db-{i}.db");
    for i in 0..scale.databases {
        let mode = [Mode::Delete, Mode::Wal][i % 2];
        let db = cases::open(&node.mount().join(name(i)), mode, false)?;
        db.execute_batch(MAKE_TABLE)?;
        insert_rows(&db, 1)?;
    }
    std::thread::sleep(IDLE_AFTER_WRITING);
    let all = scale.databases;
    let row = |what: &str| format!("many, {all} databases, {what}");
    let made = process::resident_mib(node.pid())?;
    print(
        &row("memory once they are made"),
        "MiB",
        &[made],
        Target::Open,
    );
    let files = process::open_files(node.pid())? as f64;
    print(
        &row("open files once they are made"),
        "files",
        &[files],
        Target::AtMost(200.0),
    );
    drop(node);
    let (mut starts, mut memory, mut files) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..scale.runs {
        let begin = Instant::now();
        let node = site.start()?;
        let db = Connection::open(node.mount().join(name(all / 2)))?;
        db.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0))?;
        starts.push(begin.elapsed().as_secs_f64());
        drop(db);
        std::thread::sleep(IDLE);
        memory.push(process::resident_mib(node.pid())?);
        files.push(process::open_files(node.pid())? as f64);
    }
    print(&row("start"), "s", &starts, Target::AtMost(2.0));
    print(
        &row("resident memory"),
        "MiB",
        &memory,
        Target::AtMost(80.0),
    );
    print(
        &row("open files when idle"),
        "files",
        &files,
        Target::AtMost(200.0),
    );
    Ok(())
}
