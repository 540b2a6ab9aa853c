//! Processes with a time limit.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What a process left when it had ended.
#[derive(Debug)]
pub struct Finished {
    /// Its exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    pub stderr: String,
}

impl Finished {
    /// Its standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Whether it ended with exit code 0.
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }
}

/// A process that is killed when it is dropped.
pub struct Running(pub Child);

impl Running {
    /// Kills it as `kill -9` does, and waits for its end.
    pub fn kill9(&mut self) {
        // Fails only when it has ended already.
        let _ = self.0.kill();
        self.wait(Duration::from_secs(20));
    }

    /// Waits for its end; panics when it takes longer than `limit`.
    pub fn wait(&mut self, limit: Duration) -> Option<i32> {
        let deadline = Instant::now() + limit;
        loop {
            match self.0.try_wait() {
                Ok(Some(status)) => return status.code(),
                Ok(None) if Instant::now() > deadline => {
                    let _ = self.0.kill();
                    panic!("process {} did not end within {limit:?}", self.0.id());
                }
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                Err(e) => panic!("wait for process {}: {e}", self.0.id()),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        // Bounded: a process that hangs in a file system ends only with that.
        for _ in 0..500 {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Runs a command to its end with `input` on its standard input; panics when it cannot be started
/// or takes longer than `limit`.
pub fn run(command: &mut Command, input: &[u8], limit: Duration) -> Finished {
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("start {shown}: {e}"));
    let mut stdin = child.stdin.take().expect("piped");
    let mut stdout = child.stdout.take().expect("piped");
    let mut stderr = child.stderr.take().expect("piped");
    let mut running = Running(child);
    let input = input.to_vec();
    // The threads end with the process, whose ends of the pipes they hold the other ends of.
    let writer = std::thread::spawn(move || {
        // A process may end without reading all of its input.
        let _ = stdin.write_all(&input);
    });
    let out = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stdout.read_to_end(&mut bytes);
        bytes
    });
    let err = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stderr.read_to_end(&mut bytes);
        bytes
    });
    let code = running.wait(limit);
    writer.join().expect("writing thread");
    let stdout = out.join().expect("reading thread");
    let stderr = String::from_utf8_lossy(&err.join().expect("reading thread")).into_owned();
    Finished {
        code,
        stdout,
        stderr,
    }
}
