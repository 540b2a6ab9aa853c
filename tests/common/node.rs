//! One node: the real program with a configuration file of its own.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::access::{self, Secure};
use super::net::Namespace;
use super::run::Running;
use super::{Members, SOON, wait_until};

/// The program under test.
pub const TENURE: &str = env!("CARGO_BIN_EXE_tenure");

/// What a node's configuration says.
#[derive(Clone, Debug)]
pub struct Options {
    /// Names its directory, and is its host name.
    pub name: String,
    /// HOST:PORT of its HTTP API.
    pub http: String,
    /// Host name and HTTP address of the static primary.
    pub primary: (String, String),
    /// `data.retention`, when it is not the default.
    pub retention: Option<&'static str>,
    /// `data.scrub-interval`, when it is not the default.
    pub scrub: Option<&'static str>,
    /// `backup.path` of a backup of type file.
    pub backup: Option<PathBuf>,
    /// `strict-verify`: the node recomputes the checksum after each transaction.
    pub strict_verify: bool,
    /// The whole configuration file, which then says nothing of the rest; `http` is its address.
    pub file: Option<String>,
    /// More of the configuration file: whole sections.
    pub more_yaml: String,
    /// Environment variables of its process, besides the test's own.
    pub environment: Vec<(&'static str, String)>,
    /// With a lease service: the lines of `lease` that say which; else the lease is static.
    pub service: Option<String>,
    /// With a lease service: may it be primary?
    pub candidate: bool,
    /// With a lease service: HOST:PORT by which other nodes reach it, if not `http`.
    pub advertise: Option<String>,
    /// The network namespace that it lives in, if not the test's own.
    pub namespace: Option<Arc<Namespace>>,
    /// TLS and tokens.
    pub secure: Option<Secure>,
    /// `data.compress` is false: what is in its files can be found in them.
    pub uncompressed: bool,
    /// `fuse.wal-capture` is tail; else what TENURE_TEST_WAL_CAPTURE says, or gate.
    pub tail: bool,
}

impl Options {
    /// A static primary on a free port.
    pub fn primary(name: &str) -> Options {
        let http = free_address();
        Options {
            name: name.to_string(),
            primary: (name.to_string(), http.clone()),
            http,
            retention: None,
            scrub: None,
            backup: None,
            strict_verify: false,
            file: None,
            more_yaml: String::new(),
            environment: Vec::new(),
            service: None,
            candidate: true,
            advertise: None,
            namespace: None,
            secure: None,
            uncompressed: false,
            tail: false,
        }
    }

    /// A candidate on a free port, whose lease service the lines `service` of `lease` name.
    pub fn candidate(name: &str, service: &str) -> Options {
        Options {
            service: Some(service.to_string()),
            ..Options::primary(name)
        }
    }

    /// A replica of that primary, on a free port.
    pub fn replica(name: &str, primary: &Options) -> Options {
        Options {
            name: name.to_string(),
            http: free_address(),
            ..primary.clone()
        }
    }

    /// `https` if it speaks TLS.
    pub fn scheme(&self) -> &'static str {
        match &self.secure {
            Some(Secure { tls: Some(_), .. }) => "https",
            _ => "http",
        }
    }

    /// The configuration file.
    fn yaml(&self, mount: &Path, data: &Path) -> String {
        if let Some(file) = &self.file {
            return file.clone();
        }
        let candidate = self.http == self.primary.1;
        let retention = match self.retention {
            Some(time) => format!("  retention: {time}\n  retention-monitor-interval: 100ms\n"),
            None => String::new(),
        };
        let secure = self.secure.clone().unwrap_or_default();
        let scheme = self.scheme();
        let scrub = match self.scrub {
            Some(time) => format!("  scrub-interval: {time}\n"),
            None => String::new(),
        };
        let lease = match &self.service {
            Some(service) => format!(
                "{service}  hostname: {}\n  advertise-url: \"{scheme}://{}\"\n  candidate: {}\n",
                self.name,
                self.advertise.as_ref().unwrap_or(&self.http),
                self.candidate,
            ),
            None => format!(
                "  type: static\n  hostname: {}\n  advertise-url: \"{scheme}://{}\"\n  candidate: {candidate}\n",
                self.primary.0, self.primary.1,
            ),
        };
        let backup = match &self.backup {
            Some(path) => format!("backup:\n  type: file\n  path: {path:?}\n"),
            None => String::new(),
        };
        let capture = match std::env::var("TENURE_TEST_WAL_CAPTURE") {
            _ if self.tail => "tail".to_string(),
            Ok(capture) => capture,
            Err(_) => "gate".to_string(),
        };
        // A quoted Rust string of such a path is a quoted YAML string.
        format!(
            "{backup}fuse:\n  dir: {mount:?}\n  wal-capture: {capture}\n\
             data:\n  dir: {data:?}\n  compress: {}\n{retention}{scrub}\
             http:\n  addr: \"{}\"\n{}\
             strict-verify: {}\n\
             lease:\n{lease}  reconnect-delay: 100ms\n{}",
            !self.uncompressed, self.http, secure.lines, self.strict_verify, self.more_yaml,
        )
    }
}

/// Has the kernel send SIGTERM to this (new) process when the test's thread ends, however that
/// comes about (a test program that is killed, for one): the node then unmounts.
fn stop_with_parent() -> std::io::Result<()> {
    // SAFETY: takes numbers only.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// An address on the loopback, outside of the range that the kernel gives to others by itself, and
/// given only once: a node may listen there only later.
pub fn free_address() -> String {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let port = rand::random_range(12_000..32_000);
        let new = GIVEN
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(port);
        if new && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return format!("127.0.0.1:{port}");
        }
    }
}

/// A node that runs or has run. Stopped and unmounted when it is dropped.
pub struct Node {
    /// Its configuration; a change takes effect at the next start.
    pub options: Options,
    dir: PathBuf,
    process: Option<Running>,
    members: Members,
}

impl Node {
    pub(super) fn new(dir: &Path, options: Options, members: &Members) -> Node {
        Node {
            options,
            dir: dir.canonicalize().expect("the node's directory"),
            process: None,
            members: members.clone(),
        }
    }

    /// Its mount point.
    pub fn mount(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    /// Its data directory.
    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// A database, or any other file, in its mount.
    pub fn db(&self, name: &str) -> PathBuf {
        self.mount().join(name)
    }

    /// The directory of a database in the data directory.
    pub fn db_data(&self, name: &str) -> PathBuf {
        self.data().join("dbs").join(name)
    }

    /// All that it logged, over all its starts.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Starts the process without waiting for anything.
    pub fn spawn(&mut self) {
        assert!(self.process.is_none(), "{} runs already", self.options.name);
        let config = self.dir.join("litefs.yml");
        let yaml = self.options.yaml(&self.mount(), &self.data());
        std::fs::write(&config, yaml).expect("write the configuration");
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.join("log"))
            .expect("open the log");
        let mut command = Command::new(TENURE);
        command
            .args(["mount", "-config"])
            .arg(&config)
            .envs(self.options.environment.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("duplicate a descriptor"))
            .stderr(log);
        // SAFETY: prctl is a system call, which may be made between fork and exec.
        unsafe { command.pre_exec(stop_with_parent) };
        let child = self
            .in_namespace(move || command.spawn())
            .unwrap_or_else(|e| panic!("start {TENURE}: {e}"));
        let mut members = self.members.lock().expect("not poisoned");
        members.push((child.id() as i32, self.dir.clone()));
        self.process = Some(Running(child));
    }

    /// Starts it and waits until it is mounted and answers.
    pub fn start(&mut self) {
        self.spawn();
        let what = format!("the start of {}", self.options.name);
        let mount = self.mount();
        wait_until(&what, SOON, || {
            let process = self.process.as_mut().expect("was just started");
            if let Ok(Some(status)) = process.0.try_wait() {
                panic!("{what}: it ended, {status}; its log:\n{}", self.log());
            }
            if !fuse_mounts().contains(&mount) {
                return Err(format!("not mounted; its log:\n{}", self.log()));
            }
            self.http_get("/info").map(drop)
        });
    }

    /// Ends it with SIGTERM and waits; its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        let mut process = self.process.take()?;
        // SAFETY: takes numbers only; a child that was not waited for keeps its ID.
        unsafe { libc::kill(process.0.id() as i32, libc::SIGTERM) };
        let limit = SOON;
        self.leave(&process);
        process.wait(limit)
    }

    /// Sends its process a signal.
    pub fn signal(&self, signal: i32) {
        let process = self.process.as_ref().expect("a running node");
        // SAFETY: takes numbers only; a child that was not waited for keeps its ID.
        unsafe { libc::kill(process.0.id() as i32, signal) };
    }

    /// Waits until it has ended by itself; its exit code.
    pub fn wait(&mut self, limit: Duration) -> Option<i32> {
        let mut process = self.process.take().expect("a running node");
        let code = process.wait(limit);
        self.leave(&process);
        code
    }

    /// Ends it as `kill -9` does.
    pub fn kill9(&mut self) {
        if let Some(mut process) = self.process.take() {
            self.leave(&process);
            process.kill9();
        }
    }

    /// Freezes it (SIGSTOP) or lets it go on (SIGCONT).
    pub fn freeze(&self, frozen: bool) {
        let signal = if frozen { libc::SIGSTOP } else { libc::SIGCONT };
        let process = self.process.as_ref().expect("a running node");
        // SAFETY: takes numbers only; a child that was not waited for keeps its ID.
        unsafe { libc::kill(process.0.id() as i32, signal) };
    }

    fn leave(&self, process: &Running) {
        let pid = process.0.id() as i32;
        let mut members = self.members.lock().expect("not poisoned");
        members.retain(|(id, _)| *id != pid);
    }

    /// The ID of its process.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("a running node").0.id()
    }

    /// The most memory that its process has had at a time, in bytes.
    pub fn peak_memory(&self) -> u64 {
        let path = format!("/proc/{}/status", self.pid());
        let status = std::fs::read_to_string(path).expect("the state of the process");
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        let kib = line.and_then(|l| l.trim().strip_suffix(" kB"));
        1024 * kib.expect("VmHWM").parse::<u64>().expect("a number")
    }

    /// Whether its process is there and its mount is in the kernel's list.
    pub fn is_up(&mut self) -> bool {
        let runs = self
            .process
            .as_mut()
            .is_some_and(|p| matches!(p.0.try_wait(), Ok(None)));
        runs && fuse_mounts().contains(&self.mount())
    }

    /// What `X-pos` says: 16 digits, a slash, 16 digits; `None` while there is no such file.
    pub fn pos(&self, db: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.db(&format!("{db}-pos"))).ok()?;
        let pos = text.strip_suffix('\n').unwrap_or(&text);
        assert!(
            pos.len() == 33 && pos.as_bytes()[16] == b'/' && text.len() == 34,
            "{db}-pos holds {text:?}"
        );
        Some(pos.to_string())
    }

    /// The TXID of `X-pos`; 0 while there is no such file.
    pub fn txid(&self, db: &str) -> u64 {
        let pos = self.pos(db);
        pos.map_or(0, |pos| {
            u64::from_str_radix(&pos[..16], 16).expect("hex digits")
        })
    }

    /// GET of its HTTP API: the body of a 200, else what came instead.
    pub fn http_get(&self, path: &str) -> Result<String, String> {
        self.http("GET", path)
    }

    /// POST, with no body, to its HTTP API: the body of a 200, else what came instead.
    pub fn http_post(&self, path: &str) -> Result<String, String> {
        self.http("POST", path)
    }

    fn http(&self, method: &str, path: &str) -> Result<String, String> {
        let options = &self.options;
        self.in_namespace(|| match &options.secure {
            None => http(method, &options.http, path),
            Some(secure) => {
                let url = format!("{}://{}{path}", options.scheme(), options.http);
                access::request(method, &url, secure)
            }
        })
    }

    /// The file of its configuration, once it was started.
    pub fn config(&self) -> PathBuf {
        self.dir.join("litefs.yml")
    }

    /// Whether it says that it is primary.
    pub fn is_primary(&self) -> bool {
        self.http_get("/info")
            .is_ok_and(|info| info.contains("\"isPrimary\": true"))
    }

    /// Runs it where the node lives.
    pub fn in_namespace<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match &self.options.namespace {
            Some(namespace) => namespace.run(work),
            None => work(),
        }
    }

    /// The sum over all labels of a metric; 0 when nothing of it was counted yet.
    pub fn metric_or_0(&self, name: &str) -> f64 {
        self.samples(name).iter().sum()
    }

    /// The sum over all labels of a metric; panics when it is not shown.
    pub fn metric(&self, name: &str) -> f64 {
        let samples = self.samples(name);
        assert!(!samples.is_empty(), "/metrics does not show {name}");
        samples.iter().sum()
    }

    fn samples(&self, name: &str) -> Vec<f64> {
        let body = self.http_get("/metrics").expect("/metrics");
        body.lines()
            .filter_map(|line| line.strip_prefix(name))
            .filter(|rest| rest.starts_with(['{', ' ']))
            .filter_map(|rest| rest.rsplit(' ').next()?.parse().ok())
            .collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            print_log(&self.dir.join("log"));
        }
        if let Some(mut process) = self.process.take() {
            // SAFETY: takes numbers only; a child that was not waited for keeps its ID.
            unsafe { libc::kill(process.0.id() as i32, libc::SIGTERM) };
            for _ in 0..1000 {
                if !matches!(process.0.try_wait(), Ok(None)) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            // Frozen, perhaps, or it hangs: the mount goes first, so that nobody waits in it.
            if matches!(process.0.try_wait(), Ok(None)) {
                eprintln!("{} does not stop on SIGTERM", self.options.name);
                print_log(&self.dir.join("log"));
                detach_below(&self.dir);
            }
            self.leave(&process);
        }
        detach_below(&self.dir);
    }
}

/// GET over HTTP/1.0 with time limits.
pub fn http_get(address: &str, path: &str) -> Result<String, String> {
    http("GET", address, path)
}

fn http(method: &str, address: &str, path: &str) -> Result<String, String> {
    let answer = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.set_write_timeout(Some(Duration::from_secs(5)))?;
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nHost: {address}\r\nContent-Length: 0\r\n\r\n"
        )?;
        let mut bytes = Vec::new();
        stream.take(16 << 20).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = answer().map_err(|e| format!("{method} http://{address}{path}: {e}"))?;
    match text.split_once("\r\n\r\n") {
        Some((head, body)) if head.split(' ').nth(1) == Some("200") => Ok(body.to_string()),
        _ => Err(text),
    }
}

/// The end of a log, on the test's standard error.
pub fn print_log(path: &Path) {
    let Ok(mut file) = File::open(path) else {
        return;
    };
    let mut bytes = Vec::new();
    // What cannot be read is not shown.
    let _ = file.read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    eprintln!("--- {}", path.display());
    for line in &lines[lines.len().saturating_sub(60)..] {
        eprintln!("{line}");
    }
}

/// The mount points of all FUSE file systems, as the kernel lists them: no mount is asked.
pub fn fuse_mounts() -> Vec<PathBuf> {
    fuse_mounts_and_minors()
        .into_iter()
        .map(|(_, p)| p)
        .collect()
}

fn fuse_mounts_and_minors() -> Vec<(String, PathBuf)> {
    let list = std::fs::read_to_string("/proc/self/mountinfo").expect("the list of mounts");
    let mut mounts = Vec::new();
    for line in list.lines() {
        let kind = line.split(" - ").nth(1).unwrap_or("");
        let mut fields = line.split(' ');
        if let (Some(device), Some(point)) = (fields.nth(2), fields.nth(1))
            && kind.starts_with("fuse")
        {
            let minor = device.split(':').nth(1).unwrap_or("").to_string();
            // The tests' directories have no character that the kernel would escape.
            mounts.push((minor, PathBuf::from(point)));
        }
    }
    mounts
}

/// Aborts and detaches every FUSE mount at or below a directory.
pub fn detach_below(dir: &Path) {
    for _ in 0..16 {
        let below: Vec<_> = fuse_mounts_and_minors()
            .into_iter()
            .filter(|(_, point)| point.starts_with(dir))
            .collect();
        if below.is_empty() {
            return;
        }
        for (minor, point) in below {
            let abort = format!("/sys/fs/fuse/connections/{minor}/abort");
            // There only where fusectl is mounted; the kill of the process does the same.
            let _ = std::fs::write(abort, "1");
            let path = CString::new(point.as_os_str().as_bytes()).expect("no NUL in a path");
            // SAFETY: a valid C string that lives through the call.
            unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        }
    }
    panic!("mounts below {} cannot be detached", dir.display());
}
