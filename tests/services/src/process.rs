//! A service's process, which a test can kill, start again, pause and resume.
//!
//! - It dies with the test process, however that ends: the kernel kills it when the thread that
//!   started it is gone, and that thread lasts as long as the test process does. (The thread of a
//!   single test would not do: the service may be shared by several tests.)
//! - It lives in the network namespace of the thread that asks for its start.
//! - What it prints goes to a file, of which the end is shown whenever something goes wrong.
//! - Starting it again gives it the same arguments, and thus the same ports and data.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rand::Rng;

/// How long a service may take until it serves.
const START_LIMIT: Duration = Duration::from_secs(60);

/// A process that runs a service.
pub struct Process {
    program: PathBuf,
    args: Vec<OsString>,
    log: PathBuf,
    child: Mutex<Option<Child>>,
}

impl Process {
    /// Starts `program`. What it prints is appended to the file `log`. Panics if it cannot be
    /// started; whether it serves is for [`Process::wait_until`] to find out.
    pub fn start(program: PathBuf, args: Vec<OsString>, log: PathBuf) -> Self {
        let process = Self {
            program,
            args,
            log,
            child: Mutex::new(None),
        };
        process.start_again();
        process
    }

    /// Starts it again, as it was, after [`Process::kill`]. Does nothing if it runs.
    pub fn start_again(&self) {
        let mut child = self.child();
        if child.is_none() {
            let name = self.program.display();
            let started = self.command().and_then(spawn);
            *child = Some(started.unwrap_or_else(|e| panic!("starting {name}: {e}")));
        }
    }

    fn command(&self) -> io::Result<Command> {
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut command = Command::new(&self.program);
        command
            .args(&self.args)
            .stdin(Stdio::null())
            .stderr(log.try_clone()?)
            .stdout(log);
        let network = own_network()?;
        let prepare = move || {
            // SAFETY: takes numbers only; the descriptor is open as long as the closure lives.
            let done = unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0
                    && network
                        .as_ref()
                        .is_none_or(|n| libc::setns(n.as_raw_fd(), libc::CLONE_NEWNET) == 0)
            };
            if done { Ok(()) } else { Err(last_error()) }
        };
        // SAFETY: between fork and exec only prctl and setns are called, plain system calls.
        unsafe { command.pre_exec(prepare) };
        Ok(command)
    }

    /// Asks `ready` again and again until it says `Ok`; panics with what it said last and with the
    /// log if the process ends or that takes too long.
    pub fn wait_until(&self, ready: impl Fn() -> Result<(), String>) {
        let end = Instant::now() + START_LIMIT;
        loop {
            let Err(why) = ready() else { return };
            let ended = match self.child().as_mut() {
                Some(child) => child.try_wait().map(|status| status.is_some()),
                None => Ok(true),
            };
            let ended = ended.unwrap_or(true);
            if ended || Instant::now() > end {
                let name = self.program.display();
                let what = if ended { "ended" } else { "does not serve" };
                panic!("{name} {what}: {why}; its log ends:\n{}", self.log_end());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills it (SIGKILL) and waits until it is gone. Does nothing if it does not run.
    pub fn kill(&self) {
        if let Some(mut child) = self.child().take() {
            // It cannot have ended unnoticed: only `wait` frees its ID.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Stops it in its tracks (SIGSTOP): connections stay, nothing is answered.
    pub fn pause(&self) {
        self.signal(libc::SIGSTOP);
    }

    /// Lets it go on (SIGCONT) after [`Process::pause`].
    pub fn resume(&self) {
        self.signal(libc::SIGCONT);
    }

    fn signal(&self, signal: libc::c_int) {
        let child = self.child();
        let name = self.program.display();
        let id = child.as_ref().map(Child::id);
        let id = id.unwrap_or_else(|| panic!("{name} does not run: no signal {signal}"));
        // SAFETY: no memory is involved. The ID is that of our child, since nobody has waited for
        // it: that needs the lock that is held here.
        let sent = unsafe { libc::kill(id as libc::pid_t, signal) };
        assert_eq!(sent, 0, "signal {signal} to {name}: {}", last_error());
    }

    /// The last 8 KiB of what it has printed.
    pub fn log_end(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let from = log.len().saturating_sub(8 << 10);
        String::from_utf8_lossy(&log[from..]).into_owned()
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        // A panic while it was held has left the child as it is.
        self.child.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SIGKILL ends a stopped process, too.
        self.kill();
        if thread::panicking() {
            let name = self.program.display();
            eprintln!("the log of {name} ends:\n{}", self.log_end());
        }
    }
}

/// The calling thread's network namespace, if it is another than the process's.
fn own_network() -> io::Result<Option<File>> {
    let (thread, process) = ("/proc/thread-self/ns/net", "/proc/self/ns/net");
    if fs::read_link(thread)? == fs::read_link(process)? {
        return Ok(None);
    }
    File::open(thread).map(Some)
}

fn last_error() -> io::Error {
    io::Error::last_os_error()
}

/// Starts a process from a thread that lasts: see the module's notes.
fn spawn(command: Command) -> io::Result<Child> {
    type Order = (Command, mpsc::Sender<io::Result<Child>>);
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Order>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, incoming) = mpsc::channel::<Order>();
        thread::spawn(move || {
            for (mut command, reply) in incoming {
                // Who ordered it waits for the reply.
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let (reply, answer) = mpsc::channel();
    let orders = spawner.lock().unwrap_or_else(|e| e.into_inner());
    orders
        .send((command, reply))
        .map_err(|_| io::Error::other("the thread that starts services is gone"))?;
    drop(orders);
    answer.recv().map_err(io::Error::other)?
}

/// `N` ports of `ip` on which nobody listens, none of them given before to this test process. They
/// are below the range from which the kernel takes ports for outgoing connections, so that they
/// are still free when a service is started again.
pub fn free_ports<const N: usize>(ip: IpAddr) -> [u16; N] {
    static GIVEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);
    let mut given = GIVEN.lock().unwrap_or_else(|e| e.into_inner());
    let given = given.get_or_insert_with(HashSet::new);
    std::array::from_fn(|_| {
        for _ in 0..1000 {
            let port = rand::rng().random_range(10_000..32_000);
            if !given.contains(&port) && TcpListener::bind((ip, port)).is_ok() {
                given.insert(port);
                return port;
            }
        }
        panic!("{ip} has no free port between 10000 and 32000");
    })
}

/// A temporary directory for a service's data, removed when it is dropped.
pub fn directory(service: &str) -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix(&format!("tenure-{service}-"))
        .tempdir()
        .unwrap_or_else(|e| panic!("making a directory for {service}: {e}"))
}

/// Writes a file that a service reads. Panics if that fails.
pub fn write(path: &Path, content: &str) {
    fs::write(path, content).unwrap_or_else(|e| panic!("writing {}: {e}", path.display()));
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::io::{BufRead, BufReader};

    use super::*;

    const PART: &str = "TENURE_TEST_SERVICES_PART";

    /// Not a test of its own, but the process that is killed in the one below.
    #[test]
    fn part_that_is_killed() {
        let Some(dir) = env::var_os(PART).map(PathBuf::from) else {
            return;
        };
        let program = PathBuf::from("sleep");
        // Started from a thread that ends at once.
        let start = || Process::start(program, vec!["600".into()], dir.join("log"));
        let process = thread::scope(|scope| scope.spawn(start).join()).expect("starting");
        let id = process.child().as_ref().map(Child::id);
        println!("\nid={}", id.expect("it runs"));
        thread::sleep(START_LIMIT);
    }

    #[test]
    fn a_service_outlives_the_thread_that_started_it_but_not_the_process() {
        let dir = directory("sleep");
        let mut part = Command::new(env::current_exe().expect("the test program"))
            .args([
                "--exact",
                "process::tests::part_that_is_killed",
                "--nocapture",
            ])
            .env(PART, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starting the part");
        let output = BufReader::new(part.stdout.take().expect("its output"));
        let id = output.lines().map_while(Result::ok);
        let id = id
            .filter_map(|line| line.strip_prefix("id=").map(str::to_owned))
            .next();
        let service = PathBuf::from(format!("/proc/{}", id.expect("the service's ID")));
        thread::sleep(Duration::from_millis(100));
        assert!(service.exists(), "ended with the thread that started it");
        part.kill().expect("killing the part");
        part.wait().expect("the part ends");
        let end = Instant::now() + Duration::from_secs(5);
        let zombie = || fs::read_to_string(service.join("stat")).is_ok_and(|s| s.contains(") Z "));
        while service.exists() && !zombie() {
            assert!(Instant::now() < end, "outlived the test process");
            thread::sleep(Duration::from_millis(10));
        }
    }
}
