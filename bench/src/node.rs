//! Starts and ends the nodes that are measured.
//!
//! Whatever happens, no mount and no process is left behind: a node is stopped when it is dropped,
//! with limits on every wait, and a thread of its own ends all of them when the whole program has
//! taken too long (a file system that hangs would hang its caller for ever).

use std::ffi::CString;
use std::fs::File;
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::{Result, requests};

/// The nodes that run, for the thread that ends them: process ID and mount.
static RUNNING: Mutex<Vec<(i32, PathBuf)>> = Mutex::new(Vec::new());

const START_LIMIT: Duration = Duration::from_secs(20);
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// The nodes of a measurement on this machine: a primary, and a replica once it is asked for.
///
/// The comparison with plain SQLite is one of a single node: a replica on the same machine would
/// compete with it for the processors.
pub struct Cluster {
    replica_site: Site,
    /// Dropped before the primary, so that it does not log the loss of its primary.
    replica: Option<Node>,
    /// The primary.
    pub primary: Node,
}

impl Cluster {
    /// Starts the primary in a directory below `work`, and waits until it is mounted and answers.
    pub fn start(work: &Path, tenure: Option<&Path>, capture: &str) -> Result<Cluster> {
        let [primary, replica_site] = sites(work, tenure, capture)?;
        Ok(Cluster {
            replica_site,
            replica: None,
            primary: primary.start()?,
        })
    }

    /// The replica, started at the first call.
    pub fn replica(&mut self) -> Result<&Node> {
        if self.replica.is_none() {
            self.replica = Some(self.replica_site.start()?);
        }
        self.replica
            .as_ref()
            .ok_or_else(|| "there is no replica".into())
    }
}

/// Where a primary and a replica of it are to run, with their configurations; nothing is started.
pub fn sites(work: &Path, tenure: Option<&Path>, capture: &str) -> Result<[Site; 2]> {
    let program = program(tenure)?;
    let (http, other) = (free_address()?, free_address()?);
    let primary = Site::make(&program, work, "primary", (&http, &http), capture)?;
    let replica = Site::make(&program, work, "replica", (&other, &http), capture)?;
    Ok([primary, replica])
}

/// The tenure program: `tenure`, or the one beside this program.
pub fn program(tenure: Option<&Path>) -> Result<PathBuf> {
    let program = match tenure {
        Some(path) => path.to_path_buf(),
        None => std::env::current_exe()?.with_file_name("tenure"),
    };
    match program.exists() {
        true => Ok(program),
        false => Err(format!(
            "there is no {}: build it (cargo build --release), or name another by --tenure",
            program.display()
        )
        .into()),
    }
}

/// A node's directory and configuration; it can be started, stopped, and started again.
pub struct Site {
    program: PathBuf,
    dir: PathBuf,
    http: String,
}

impl Site {
    fn make(
        program: &Path,
        work: &Path,
        name: &str,
        (http, primary): (&str, &str),
        capture: &str,
    ) -> Result<Site> {
        let dir = work.canonicalize()?.join(name);
        let site = Site {
            program: program.to_owned(),
            dir,
            http: http.to_owned(),
        };
        std::fs::create_dir_all(site.mount())?;
        let (mount, data) = (site.mount(), site.data());
        let candidate = http == primary;
        // JSON strings are YAML strings.
        std::fs::write(
            site.config(),
            format!(
                "fuse:\n  dir: {mount:?}\n  wal-capture: {capture}\ndata:\n  dir: {data:?}\nhttp:\n  addr: \"{http}\"\n\
                 lease:\n  type: static\n  hostname: primary\n  advertise-url: \"http://{primary}\"\n  \
                 candidate: {candidate}\n"
            ),
        )?;
        Ok(site)
    }

    /// Its data directory.
    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Where it is mounted once it runs.
    pub fn mount(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    fn config(&self) -> PathBuf {
        self.dir.join("litefs.yml")
    }

    /// Starts it, and waits until it is mounted and answers.
    pub fn start(&self) -> Result<Node> {
        self.start_within(START_LIMIT)
    }

    /// The same, for a start that may take longer.
    pub fn start_within(&self, limit: Duration) -> Result<Node> {
        let log = self.dir.join("log");
        let log_file = File::create(&log)?;
        let mut command = Command::new(&self.program);
        command
            .args(["mount", "-config"])
            .arg(self.config())
            .stdin(Stdio::null())
            .stdout(log_file.try_clone()?)
            .stderr(log_file);
        // SAFETY: prctl is a system call, which may be made between fork and exec.
        unsafe { command.pre_exec(stop_with_parent) };
        let child = command
            .spawn()
            .map_err(|e| format!("start {}: {e}", self.program.display()))?;
        let (mount, http) = (self.mount(), self.http.clone());
        if let Ok(mut running) = RUNNING.lock() {
            running.push((child.id() as i32, mount.clone()));
        }
        let mut node = Node { child, mount, http };
        node.wait_until_ready(limit).map_err(|e| {
            let log = std::fs::read_to_string(&log).unwrap_or_default();
            format!(
                "{} does not start: {e}; its log:\n{log}",
                self.dir.display()
            )
        })?;
        Ok(node)
    }
}

/// One running `tenure mount`; it is stopped when it is dropped.
pub struct Node {
    child: Child,
    mount: PathBuf,
    http: String,
}

impl Node {
    fn wait_until_ready(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("it ended, {status}").into());
            }
            let info = match is_mounted(&self.mount) {
                true => requests::get(&self.http, "/info"),
                false => Err("it is not mounted".into()),
            };
            match info {
                Ok(_) => return Ok(()),
                Err(e) if Instant::now() > deadline => return Err(e),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Its process ID.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as a loss of the process would, and waits until it is gone.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        // Nobody must wait for an answer of it any more.
        detach(&self.mount);
        self.child.wait()?;
        Ok(())
    }

    /// Its mount point.
    pub fn mount(&self) -> &Path {
        &self.mount
    }

    /// The address of its HTTP API.
    pub fn http(&self) -> &str {
        &self.http
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let pid = self.child.id() as i32;
        // SAFETY: a signal to a child that has not been waited for: the ID is still its own.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        let deadline = Instant::now() + STOP_LIMIT;
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        if matches!(self.child.try_wait(), Ok(None)) {
            eprintln!("the node at {} does not stop", self.mount.display());
            detach(&self.mount);
            // Fails only when it has ended meanwhile.
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
        detach(&self.mount);
        if let Ok(mut running) = RUNNING.lock() {
            running.retain(|(id, _)| *id != pid);
        }
    }
}

/// Has the kernel send SIGTERM to this (new) process when the one that started it ends, however
/// that comes about: the node then unmounts.
fn stop_with_parent() -> std::io::Result<()> {
    // SAFETY: takes numbers only.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Ends this program, its nodes and their mounts after `limit`.
pub fn end_after(limit: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        eprintln!("ERROR: not done after {} s, giving up", limit.as_secs());
        if let Ok(running) = RUNNING.lock() {
            for (pid, mount) in running.iter() {
                detach(mount);
                // SAFETY: a child of this process that has not been waited for (see Node::drop).
                unsafe { libc::kill(*pid, libc::SIGKILL) };
            }
        }
        std::process::exit(3);
    });
}

/// An address on the loopback that nobody listened on a moment ago.
fn free_address() -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    Ok(listener.local_addr()?.to_string())
}

/// Asks the kernel's list, never the mount itself: a dead one would not answer.
fn is_mounted(mount: &Path) -> bool {
    let wanted = mount.as_os_str().as_bytes();
    std::fs::read("/proc/self/mountinfo").is_ok_and(|list| {
        list.split(|b| *b == b'\n')
            .any(|line| line.split(|b| *b == b' ').nth(4) == Some(wanted))
    })
}

/// Takes a mount out of the tree, whoever still uses it; a node's locks session may be mounted
/// below, so everything goes that is at or below the point.
fn detach(mount: &Path) {
    let Ok(point) = CString::new(mount.as_os_str().as_bytes()) else {
        return;
    };
    for _ in 0..8 {
        if !is_mounted(mount) {
            return;
        }
        // SAFETY: a valid C string that lives through the call.
        unsafe { libc::umount2(point.as_ptr(), libc::MNT_DETACH) };
    }
}
