//! What the figures were measured on: a figure without its machine says nothing.

use std::path::Path;
use std::process::Command;

/// Prints the machine, the file system, SQLite's version and the commit as a Markdown list.
pub fn print_description(work: &Path) {
    let kernel = read_trimmed("/proc/sys/kernel/osrelease");
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    println!("- CPU: {cpus} × {}", cpu_model());
    println!("- kernel: Linux {kernel}");
    println!("- file system of the databases: {}", file_system(work));
    println!("- SQLite {} on both sides", rusqlite::version());
    println!("- commit: {}", commit());
    println!("- {}", cache_note());
}

fn read_trimmed(path: &str) -> String {
    std::fs::read_to_string(path).map_or_else(|_| "unknown".into(), |s| s.trim().to_string())
}

fn cpu_model() -> String {
    let info = read_trimmed("/proc/cpuinfo");
    info.lines()
        .find_map(|line| line.strip_prefix("model name"))
        .and_then(|rest| rest.split_once(':'))
        .map_or_else(|| "unknown".into(), |(_, name)| name.trim().to_string())
}

/// The type of the file system that holds `path`, as the kernel's list of mounts names it.
fn file_system(path: &Path) -> String {
    let Ok(path) = path.canonicalize() else {
        return "unknown".into();
    };
    let mounts = read_trimmed("/proc/self/mountinfo");
    let mut best: (usize, &str) = (0, "unknown");
    for line in mounts.lines() {
        let mut fields = line.split(' ');
        let (Some(point), Some(kind)) = (fields.nth(4), line.split(" - ").nth(1)) else {
            continue;
        };
        if path.starts_with(point) && point.len() >= best.0 {
            best = (point.len(), kind.split(' ').next().unwrap_or("unknown"));
        }
    }
    best.1.to_string()
}

fn commit() -> String {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_string();
        output.status.success().then_some(text)
    };
    match git(&["rev-parse", "--short=12", "HEAD"]) {
        Some(id) => match git(&["status", "--porcelain"]).as_deref() {
            Some("") => id,
            _ => format!("{id}, with changes"),
        },
        None => "unknown".into(),
    }
}

const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

fn cache_note() -> &'static str {
    match std::fs::OpenOptions::new().write(true).open(DROP_CACHES) {
        Ok(_) => "cold: the kernel's whole page cache is dropped, on both sides",
        Err(_) => "cold: only the file's own pages are dropped (not root): the mount's are not",
    }
}

/// Drops the kernel's page cache where this process may; without the right it does nothing.
pub fn drop_page_cache() {
    // 1: pages only. Dentries and inodes stay, as they would on a machine that has been running.
    let _ = std::fs::write(DROP_CACHES, "1\n");
}
