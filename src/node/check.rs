//! Whether a node could run with a configuration on this machine, without starting one:
//! `tenure mount --check`. Nothing is mounted, changed or left behind, and no lease service is asked;
//! a node that runs with the same configuration is not disturbed.

use std::ffi::OsStr;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{TcpListener, lookup_host};
use tokio::time::timeout;

use crate::access::{Keys, Tls, tls};
use crate::config::{Config, split_addr};

use super::backend;

/// How long looking at a directory, or looking up a name, may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is in the way of a node with this configuration.
pub async fn problems(config: &Config) -> Vec<String> {
    let mut problems = Vec::new();
    let mut add = |key: &str, found: Result<(), String>| {
        if let Err(problem) = found {
            problems.push(format!("{key}: {problem}"));
        }
    };
    add("fuse", device());
    let fuse_dir = config.fuse.dir.clone();
    add("fuse.dir", patiently(move || mount_point(&fuse_dir)).await);
    let data_dir = config.data.dir.clone();
    add("data.dir", patiently(move || directory(&data_dir)).await);
    if let Some(path) = config.backup.as_ref().map(|b| b.path.clone()) {
        add("backup.path", patiently(move || directory(&path)).await);
    }
    if let Some(path) = config.tracing_file().map(Path::to_owned) {
        add("tracing.path", patiently(move || log_file(&path)).await);
    }
    add("http.addr", listens(&config.http.addr).await);
    if let (Some(addr), Some(target)) = (&config.proxy.addr, &config.proxy.target) {
        add("proxy.addr", listens(addr).await);
        add("proxy.target", resolve(target).await.map(drop));
    }
    // Reads the certificates.
    let lease = backend::leaser(config).map(drop);
    add("lease", lease.map_err(|e| e.to_string()));
    for entry in config.exec.iter().filter_map(|entry| entry.cmd.first()) {
        add("exec", program(entry));
    }
    problems.extend(keys(config).await);
    problems
}

/// What is wrong with certificates, keys and tokens.
async fn keys(config: &Config) -> Vec<String> {
    let http = config.http.clone();
    let host = super::own_host(config);
    let look = move || {
        let keys = Keys::load(&http).map_err(|e| e.to_string())?;
        Ok(keys.flaws(host.as_deref()))
    };
    match patiently(look).await {
        Ok(flaws) => flaws,
        Err(problem) => vec![problem],
    }
}

/// What a node with this configuration would be, in a line.
pub fn summary(config: &Config) -> String {
    let lease = &config.lease;
    let role = if lease.candidate {
        "candidate"
    } else {
        "replica"
    };
    let mut line = format!(
        "ok: {role}, {} lease, mount {}, data {}, http {}, advertised {}",
        lease.kind.name(),
        config.fuse.dir.display(),
        config.data.dir.display(),
        config.http.addr,
        lease.advertise_url,
    );
    if let Ok(keys) = Keys::load(&config.http) {
        if let Some(end) = keys.tls.as_ref().and_then(Tls::valid_until) {
            line += &format!(", certificate valid until {}", tls::date(end));
        }
        let tokens = config.http.auth.iter().flat_map(|auth| &auth.tokens);
        let names: Vec<_> = tokens.map(|token| token.name.as_str()).collect();
        if !names.is_empty() {
            line += &format!(", tokens {}", names.join(", "));
        }
        for warning in keys
            .warnings()
            .into_iter()
            .chain(super::open_directory(config))
        {
            line += &format!("\nWARNING: {warning}");
        }
    }
    if let (Some(addr), Some(target)) = (&config.proxy.addr, &config.proxy.target) {
        line += &format!(", proxy {addr} to {target}");
    }
    if let Some(backup) = &config.backup {
        line += &format!(", backup {}", backup.path.display());
    }
    if let Some(path) = config.tracing_file() {
        line += &format!(", operation log {}", path.display());
    }
    let programs: Vec<_> = config
        .exec
        .iter()
        .filter_map(|entry| entry.cmd.first())
        .map(|word| word.to_string_lossy())
        .collect();
    if !programs.is_empty() {
        line += &format!(", exec {}", programs.join(", "));
    }
    line
}

/// Does what may hang (a dead network file system) with a time limit.
async fn patiently<T: Send + 'static>(
    look: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    match timeout(PATIENCE, tokio::task::spawn_blocking(look)).await {
        Ok(Ok(found)) => found,
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => Err(format!("looking at it takes longer than {PATIENCE:?}")),
    }
}

fn device() -> Result<(), String> {
    match fs::metadata("/dev/fuse") {
        Ok(_) => Ok(()),
        Err(e) => Err(format!(
            "/dev/fuse: {e}. Load the kernel's module fuse; in a container, pass the device in"
        )),
    }
}

/// A directory that is empty, or a mount point, or can be made.
fn mount_point(dir: &Path) -> Result<(), String> {
    // What is mounted may be a node, which may be dead: it is not touched.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let at = dir.to_string_lossy().replace(' ', "\\040");
    if mounts.lines().any(|l| l.split(' ').nth(4) == Some(&*at)) {
        return Ok(());
    }
    match fs::read_dir(dir).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!("{} is not empty", dir.display())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => directory(dir),
        Err(e) => Err(format!("{}: {e}", dir.display())),
    }
}

/// A directory that can be written, or made.
fn directory(dir: &Path) -> Result<(), String> {
    let mut there = dir;
    let is_dir = loop {
        match (fs::metadata(there), there.parent()) {
            (Ok(found), _) => break found.is_dir(),
            (Err(e), Some(parent)) if e.kind() == std::io::ErrorKind::NotFound => there = parent,
            (Err(e), _) => return Err(format!("{}: {e}", there.display())),
        }
    };
    if !is_dir {
        return Err(format!("{} is no directory", there.display()));
    }
    // A file without a name: nothing is left of it.
    match tempfile::tempfile_in(there) {
        Ok(_) => Ok(()),
        Err(e) => Err(format!("cannot write in {}: {e}", there.display())),
    }
}

fn log_file(path: &Path) -> Result<(), String> {
    match fs::OpenOptions::new().append(true).open(path) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let path = std::path::absolute(path).map_err(|e| e.to_string())?;
            directory(path.parent().unwrap_or(Path::new("/")))
        }
        Err(e) => Err(format!("{}: {e}", path.display())),
    }
}

/// The addresses behind `HOST:PORT`; an empty host is all of this machine's.
async fn resolve(addr: &str) -> Result<Vec<SocketAddr>, String> {
    let (host, port) = split_addr(addr).ok_or_else(|| format!("{addr} is not HOST:PORT"))?;
    let host = if host.is_empty() { "0.0.0.0" } else { host };
    match timeout(PATIENCE, lookup_host((host, port))).await {
        Ok(Ok(found)) => Ok(found.collect()),
        Ok(Err(e)) => Err(format!("{host}: {e}")),
        Err(_) => Err(format!(
            "{host}: looking it up takes longer than {PATIENCE:?}"
        )),
    }
}

/// Whether the host is this machine. The port may be in use: by a node that is to be replaced.
async fn listens(addr: &str) -> Result<(), String> {
    let mut last = "it has no address".to_owned();
    for found in resolve(addr).await? {
        match TcpListener::bind((found.ip(), 0)).await {
            Ok(_) => return Ok(()),
            Err(e) => last = format!("cannot listen on {}: {e}", found.ip()),
        }
    }
    Err(last)
}

/// Whether there is such a program, as `exec` looks for it.
fn program(name: &OsStr) -> Result<(), String> {
    let runs = |path: PathBuf| {
        fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    let path = Path::new(name);
    let found = if path.components().count() > 1 || path.is_absolute() {
        runs(path.to_owned())
    } else {
        let dirs = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&dirs).any(|dir| runs(dir.join(path)))
    };
    if found {
        Ok(())
    } else {
        Err(format!("there is no program {}", path.display()))
    }
}
