//! The operation log: a line for each request that the kernel makes of the mount, in files that
//! roll (the configuration's `tracing`).
//!
//! A line is the time at which the request came, the operation, and what there is of
//! `file="app.db-wal" ino=7 offset=4096 size=24 result=24 us=31`: `offset` and `size` of reads,
//! writes and truncations, in bytes; `result`, the bytes that were read or written, or `error`, the
//! system's; `us`, the time until the answer was given, in microseconds.
//!
//! Invariant: whoever records an operation never waits and never fails. Operations go through a
//! queue of [`QUEUE`] entries to the one thread that writes; those that find it full are counted,
//! and the count is written in their place.

use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::time::{Duration, Instant, SystemTime};

use crate::config::TracingConfig;
use crate::thread;

use super::rolling::Rolling;

/// Operations that may wait to be written.
const QUEUE: usize = 64 * 1024;

/// Bytes that are written at once.
const BATCH: usize = 64 * 1024;

/// How often, at most, it is said in the node's log that operations are lost.
const COMPLAIN: Duration = Duration::from_secs(60);

/// One operation of the mount.
#[derive(Clone, Debug)]
pub struct Operation {
    /// When it came.
    pub at: SystemTime,
    /// How long it took.
    pub took: Duration,
    /// Which: `read`, `write`, …
    pub name: &'static str,
    /// The file's name in the mount, if it is known.
    pub file: Option<String>,
    /// The inode; 0 if the operation is about a name.
    pub ino: u64,
    /// Where and how much, in bytes, if the operation says so.
    pub range: Option<(u64, u64)>,
    /// The bytes that were read or written, else 0; or the system's error number.
    pub result: Result<u64, i32>,
}

enum Message {
    Operation(Operation),
    /// All that came before it is to be in the file when this is answered.
    Flush(SyncSender<()>),
}

/// The way into the log. The log ends when the last clone is gone.
#[derive(Clone, Debug)]
pub struct OperationLog {
    queue: SyncSender<Message>,
    lost: Arc<AtomicU64>,
}

impl OperationLog {
    /// Opens the log at `path` and starts its thread.
    pub fn start(path: &Path, config: &TracingConfig) -> io::Result<OperationLog> {
        let max_size = config.max_size.saturating_mul(1 << 20);
        let file = Rolling::open(path, max_size, config.max_count, config.compress)?;
        Self::start_with(file, QUEUE)
    }

    fn start_with(file: Rolling, size: usize) -> io::Result<OperationLog> {
        let (queue, operations) = sync_channel(size);
        let lost = Arc::new(AtomicU64::new(0));
        let writer = Writer {
            file,
            lost: lost.clone(),
            batch: Vec::with_capacity(2 * BATCH),
            line: String::new(),
            complained: None,
        };
        thread::start("oplog", move || writer.run(&operations))?;
        Ok(OperationLog { queue, lost })
    }

    /// Has an operation written, soon.
    pub fn record(&self, operation: Operation) {
        match self.queue.try_send(Message::Operation(operation)) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Waits, at most `limit`, until all that was recorded is in the file, and older files are
    /// compressed; whether it is so.
    pub fn flush(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let (done, answer) = sync_channel(1);
        let mut message = Message::Flush(done);
        loop {
            match self.queue.try_send(message) {
                Ok(()) => break,
                Err(TrySendError::Full(back)) if Instant::now() < deadline => message = back,
                Err(_) => return false,
            }
            // Full: the writer takes a batch out within milliseconds.
            std::thread::sleep(Duration::from_millis(1));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        answer.recv_timeout(left).is_ok()
    }
}

/// The thread that writes.
struct Writer {
    file: Rolling,
    lost: Arc<AtomicU64>,
    batch: Vec<u8>,
    line: String,
    complained: Option<Instant>,
}

impl Writer {
    fn run(mut self, operations: &Receiver<Message>) {
        loop {
            let message = match operations.try_recv() {
                Ok(message) => message,
                Err(TryRecvError::Empty) => {
                    self.write();
                    match operations.recv() {
                        Ok(message) => message,
                        Err(_) => return,
                    }
                }
                Err(TryRecvError::Disconnected) => return self.write(),
            };
            match message {
                Message::Operation(operation) => self.add(&operation),
                Message::Flush(done) => {
                    self.write();
                    self.file.join();
                    // Nobody waits for it any more, perhaps.
                    let _ = done.try_send(());
                }
            }
        }
    }

    fn add(&mut self, operation: &Operation) {
        self.line.clear();
        format_line(&mut self.line, operation);
        self.batch.extend_from_slice(self.line.as_bytes());
        if self.batch.len() >= BATCH {
            self.write();
        }
    }

    fn write(&mut self) {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let line = format!("(here {lost} operations are missing: they came too fast)\n");
            self.batch.extend_from_slice(line.as_bytes());
            self.complain(lost, "they came faster than they can be written");
        }
        if self.batch.is_empty() {
            return;
        }
        if let Err(error) = self.file.write(&self.batch) {
            let lines = self.batch.iter().filter(|b| **b == b'\n').count() as u64;
            self.complain(lines, &format!("it cannot be written: {error}"));
        }
        self.batch.clear();
    }

    fn complain(&mut self, lost: u64, why: &str) {
        if self.complained.is_none_or(|at| at.elapsed() >= COMPLAIN) {
            self.complained = Some(Instant::now());
            tracing::warn!("the operation log (tracing) lacks {lost} operations: {why}");
        }
    }
}

fn format_line(line: &mut String, operation: &Operation) {
    let at = humantime::format_rfc3339_micros(operation.at);
    let us = operation.took.as_micros();
    // A string takes everything.
    let _ = write!(line, "{at} {}", operation.name);
    if let Some(file) = &operation.file {
        // Quoted and escaped: a name may hold a newline.
        let _ = write!(line, " file={file:?}");
    }
    if operation.ino != 0 {
        let _ = write!(line, " ino={}", operation.ino);
    }
    if let Some((offset, size)) = operation.range {
        let _ = write!(line, " offset={offset} size={size}");
    }
    let _ = match operation.result {
        Ok(n) => writeln!(line, " result={n} us={us}"),
        Err(e) => {
            let e = io::Error::from_raw_os_error(e).to_string();
            writeln!(line, " error={e:?} us={us}")
        }
    };
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    fn operation(file: &str, result: Result<u64, i32>) -> Operation {
        Operation {
            at: SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_001),
            took: Duration::from_micros(31),
            name: "write",
            file: Some(file.to_owned()),
            ino: 7,
            range: Some((4096, 24)),
            result,
        }
    }

    #[test]
    fn a_line_says_all() {
        let mut line = String::new();
        format_line(&mut line, &operation("a\n.db", Ok(24)));
        assert_eq!(
            line,
            "2023-11-14T22:13:20.000001Z write file=\"a\\n.db\" ino=7 offset=4096 size=24 result=24 us=31\n"
        );
        line.clear();
        format_line(&mut line, &operation("a.db", Err(libc::EACCES)));
        assert!(line.contains(" error=\"Permission denied (os error 13)\" us=31\n"));
    }

    #[test]
    fn what_was_recorded_is_in_the_file_after_a_flush() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ops");
        let config = crate::config::Config::default().tracing;
        let log = OperationLog::start(&path, &config).unwrap();
        for _ in 0..1000 {
            log.record(operation("a.db", Ok(24)));
        }
        assert!(log.flush(Duration::from_secs(10)));
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 1000);
    }

    #[test]
    fn a_full_queue_holds_nobody_up_and_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ops");
        let fifo = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: a system call with a valid C string.
        assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
        let mut pipe = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .unwrap();
        // Full: the first line that is written waits until somebody reads.
        while pipe.write(&[b'.'; 4096]).is_ok() {}
        let file = Rolling::open(&path, u64::MAX, 1, false).unwrap();
        let log = OperationLog::start_with(file, 16).unwrap();
        let began = Instant::now();
        for _ in 0..50_000 {
            log.record(operation("a.db", Ok(24)));
        }
        assert!(began.elapsed() < Duration::from_secs(5));
        assert!(!log.flush(Duration::from_millis(50)));
        let drain = std::thread::spawn(move || {
            let (mut text, mut part) = (Vec::new(), [0; 65536]);
            let deadline = Instant::now() + Duration::from_secs(20);
            while !String::from_utf8_lossy(&text).contains("operations are missing") {
                assert!(
                    Instant::now() < deadline,
                    "nothing is said of what is missing"
                );
                match pipe.read(&mut part) {
                    Ok(n) => text.extend_from_slice(&part[..n]),
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        assert!(log.flush(Duration::from_secs(20)));
        drain.join().unwrap();
    }
}
