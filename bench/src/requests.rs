//! Counts the requests that reach the daemon in warm reading transactions: none is the aim.
//!
//! The daemon's own counter is read from `/metrics` before and after; the difference of two
//! readings with no transaction in between is printed as well, as what is not the reader's doing.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use crate::Result;
use crate::cases::{self, Mode};

const COUNTER: &str = "tenure_fuse_requests_total";
const READS: u32 = 1000;

/// Counts for both kinds of journal, and prints a Markdown table.
pub fn run(mount: &Path, http: &str) -> Result<()> {
    println!("\n| {READS} warm point reads, each a transaction | requests | idle before |");
    println!("| --- | ---: | ---: |");
    for mode in [Mode::Delete, Mode::Wal] {
        let path = mount.join(format!("bench-requests-{mode}.db"));
        // Left over from an earlier run.
        let _ = std::fs::remove_file(&path);
        cases::make_point_table(&path, mode)?;
        let (requests, idle) = count(&path, mode, http)?;
        std::fs::remove_file(&path)?;
        println!("| {mode} | {requests} | {idle} |");
    }
    Ok(())
}

fn count(path: &Path, mode: Mode, http: &str) -> Result<(u64, u64)> {
    let db = cases::open(path, mode, false)?;
    let mut statement = db.prepare("SELECT length(payload) FROM t WHERE id = ?1")?;
    let mut read_all = || -> Result<()> {
        for id in 1..=READS {
            statement.query_row([id], |row| row.get::<_, i64>(0))?;
        }
        Ok(())
    };
    read_all()?;
    // What the writes before left to be done by itself (flushes, invalidations) has time to end.
    std::thread::sleep(Duration::from_millis(500));
    let start = counter(http)?;
    std::thread::sleep(Duration::from_millis(200));
    let before = counter(http)?;
    read_all()?;
    let after = counter(http)?;
    Ok((after - before, before - start))
}

/// The sum of the counter's samples over all its labels.
fn counter(http: &str) -> Result<u64> {
    let body = get(http, "/metrics")?;
    let mut found = None;
    for line in body.lines() {
        let Some(rest) = line.strip_prefix(COUNTER) else {
            continue;
        };
        if rest.starts_with(['{', ' ']) {
            let value = rest.rsplit(' ').next().unwrap_or("");
            let value: f64 = value.parse().map_err(|e| format!("{line}: {e}"))?;
            *found.get_or_insert(0) += value as u64;
        }
    }
    found.ok_or_else(|| format!("http://{http}/metrics does not show {COUNTER}").into())
}

/// A plain POST over HTTP/1.1 whose body is the file; an error unless the answer is a 200.
pub fn post_file(http: &str, path: &str, mut file: File) -> Result<()> {
    let size = file.metadata()?.len();
    let mut stream = TcpStream::connect(http)?;
    write!(
        stream,
        "POST {path} HTTP/1.0\r\nHost: {http}\r\nContent-Length: {size}\r\n\r\n"
    )?;
    std::io::copy(&mut file, &mut stream)?;
    let mut answer = String::new();
    stream.take(4096).read_to_string(&mut answer)?;
    match answer.split(' ').nth(1) {
        Some("200") => Ok(()),
        _ => Err(format!("POST http://{http}{path}: {answer}").into()),
    }
}

/// A plain GET over HTTP/1.1 with a time limit; the body of a 200, else an error.
pub fn get(http: &str, path: &str) -> Result<String> {
    let answer = || -> Result<String> {
        let mut stream = TcpStream::connect(http)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.set_write_timeout(Some(Duration::from_secs(5)))?;
        // HTTP/1.0: the answer is not chunked and ends with the connection.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {http}\r\n\r\n")?;
        let mut text = Vec::new();
        stream.take(16 << 20).read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    let text = answer().map_err(|e| format!("GET http://{http}{path}: {e}"))?;
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.lines().next().unwrap_or("");
    if status.split(' ').nth(1) != Some("200") {
        return Err(format!("GET http://{http}{path}: {status}").into());
    }
    Ok(body.to_string())
}
