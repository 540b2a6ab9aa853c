//! What a process uses, as the kernel counts it.

use std::time::Duration;

use crate::Result;

/// Megabytes (2^20) in memory: now (`VmRSS`), or at most so far (`VmHWM`).
pub fn memory_mib(pid: u32, field: &str) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    Ok(kib.ok_or_else(|| format!("process {pid} shows no {field}"))? / 1024.0)
}

/// Now.
pub fn resident_mib(pid: u32) -> Result<f64> {
    memory_mib(pid, "VmRSS")
}

/// Processor time used so far, by all its threads.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let mut nanoseconds = 0;
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // One that has just ended is not counted: the daemon's threads stay.
        let text = std::fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
        nanoseconds += text
            .split(' ')
            .next()
            .and_then(|n| n.parse::<u64>().ok())
            .unwrap_or(0);
    }
    Ok(Duration::from_nanos(nanoseconds))
}

/// How many files it has open.
pub fn open_files(pid: u32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}
