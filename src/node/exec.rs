//! What a node is there for: the commands of `exec`, run in order once the node is in step with its
//! cluster (or at once, with `skip-sync`).
//!
//! Each command but the last must end with exit code 0, or the node ends with its exit code. The
//! last is the application: when it ends, so does the node, with its exit code, or with 128 and the
//! number of the signal that killed it. A command that is only for candidates is left out on other
//! nodes, and a node whose last command is left out runs until it is told to stop.
//!
//! A signal that the node gets is passed on to the command that runs, and the node stops when that
//! has ended. If it takes longer than [`GRACE`], or a second signal comes, it is killed. The exit
//! code is then the command's as well, but 0 if it was the signal passed on that ended it: it did
//! what it was told.
//!
//! Commands have the node's standard input, output and error. With a terminal as its standard input
//! a command stays in the node's process group, to be able to read from it (and gets Ctrl-C from
//! the terminal too); otherwise it has a group of its own, and being killed includes all of that.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::config::{Config, ExecConfig};
use crate::role::Status;

/// How long a command may take to end after it got a signal.
const GRACE: Duration = Duration::from_secs(10);

/// How long a command that was killed may take to be gone.
const KILLED: Duration = Duration::from_secs(5);

/// What is to be run, and when.
pub(super) struct Plan {
    commands: Vec<ExecConfig>,
    candidate: bool,
    skip_sync: bool,
    exit_on_error: bool,
}

impl Plan {
    pub(super) fn of(config: &Config) -> Plan {
        Plan {
            commands: config.exec.clone(),
            candidate: config.lease.candidate,
            skip_sync: config.skip_sync,
            exit_on_error: config.exit_on_error,
        }
    }
}

/// How a command ended.
enum End {
    /// By itself.
    Itself(u8),
    /// After the node was told to stop.
    Told(u8),
}

/// Runs the commands until the last has ended or a signal comes out of `told`. Gives the exit code.
pub(super) async fn run(
    plan: Plan,
    status: watch::Receiver<Status>,
    mut told: UnboundedReceiver<i32>,
) -> u8 {
    if !plan.commands.is_empty() && !plan.skip_sync {
        tokio::select! {
            _ = told.recv() => return 0,
            () = in_step(status) => {}
        }
    }
    for (i, entry) in plan.commands.iter().enumerate() {
        // Its arguments may hold secrets.
        let name = entry.cmd.first().map(|w| w.to_string_lossy());
        let name = name.unwrap_or_default();
        if entry.if_candidate && !plan.candidate {
            tracing::info!("exec: {name} is not run, because this node is no candidate");
            continue;
        }
        let last = i + 1 == plan.commands.len();
        let (problem, code) = match command(&entry.cmd, &mut told).await {
            Ok(End::Told(code)) => return code,
            Ok(End::Itself(code)) if last => {
                tracing::info!("exec: {name} has ended with exit code {code}: stopping");
                return code;
            }
            Ok(End::Itself(0)) => continue,
            Ok(End::Itself(code)) => (format!("{name} has failed with exit code {code}"), code),
            Err(error) => (format!("cannot run {name}: {error}"), 1),
        };
        tracing::error!("exec: {problem}");
        if plan.exit_on_error {
            return code;
        }
        tracing::warn!("nothing more is run; the node stays up, because exit-on-error is false");
        break;
    }
    // Its sender lives as long as the node.
    told.recv().await;
    0
}

/// Waits until the node has been in step with its cluster.
async fn in_step(mut status: watch::Receiver<Status>) {
    if status.wait_for(|s| s.ready).await.is_err() {
        // The role loop is over: the node stops, which is said in another way.
        std::future::pending::<()>().await;
    }
}

/// Runs one command to its end.
async fn command(words: &[OsString], told: &mut UnboundedReceiver<i32>) -> io::Result<End> {
    let Some((program, arguments)) = words.split_first() else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    let own_group = !io::stdin().is_terminal();
    let mut command = Command::new(program);
    command.args(arguments).kill_on_drop(true);
    // It is the node that systemd hears of.
    command.env_remove("NOTIFY_SOCKET");
    if own_group {
        command.process_group(0);
    }
    tracing::info!("exec: running {}", program.to_string_lossy());
    let mut child = command.spawn()?;
    let signal = tokio::select! {
        status = child.wait() => return Ok(End::Itself(exit_code(status?))),
        Some(signal) = told.recv() => signal,
    };
    send(&child, signal, false);
    let status = tokio::select! {
        status = child.wait() => status?,
        _ = timeout(GRACE, told.recv()) => {
            tracing::warn!("exec: {} does not end: killing it", program.to_string_lossy());
            send(&child, libc::SIGKILL, own_group);
            match timeout(KILLED, child.wait()).await {
                Ok(status) => status?,
                Err(_) => return Ok(End::Told(128 + libc::SIGKILL as u8)),
            }
        }
    };
    let obeyed = status.signal() == Some(signal) || status.code() == Some(128 + signal);
    Ok(End::Told(if obeyed { 0 } else { exit_code(status) }))
}

/// Sends a signal to a command that has not ended, or to its whole group.
fn send(child: &Child, signal: i32, group: bool) {
    let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()) else {
        return;
    };
    // SAFETY: takes numbers only; a child that was not waited for keeps its ID.
    let sent = unsafe { libc::kill(if group { -pid } else { pid }, signal) };
    if sent != 0 {
        let error = io::Error::last_os_error();
        tracing::warn!(%error, signal, "exec: the signal cannot be passed on");
    }
}

/// The exit code as a shell gives it.
fn exit_code(status: ExitStatus) -> u8 {
    let code = match status.signal() {
        Some(signal) => 128 + signal,
        None => status.code().unwrap_or(1),
    };
    u8::try_from(code).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc::unbounded_channel;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_command_that_does_not_end_is_killed_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let ready = dir.path().join("ready");
        let script = "trap '' TERM; echo > \"$0\"; while :; do sleep 0.2; done";
        let words = [
            "sh".into(),
            "-c".into(),
            script.into(),
            ready.clone().into(),
        ];
        let plan = Plan {
            commands: vec![ExecConfig {
                cmd: words.into(),
                if_candidate: false,
            }],
            candidate: true,
            skip_sync: true,
            exit_on_error: true,
        };
        let (_known, status) = watch::channel(Status::default());
        let (tell, told) = unbounded_channel();
        let running = tokio::spawn(run(plan, status, told));
        let patience = std::time::Instant::now() + Duration::from_secs(30);
        while !ready.exists() {
            assert!(std::time::Instant::now() < patience, "it was not started");
            tokio::task::yield_now().await;
            std::thread::sleep(Duration::from_millis(2));
        }
        let began = tokio::time::Instant::now();
        tell.send(libc::SIGTERM).unwrap();
        // The clock of the test leaps to the time limit, as there is nothing else to do.
        assert_eq!(running.await.unwrap(), 128 + 9);
        assert!(began.elapsed() >= GRACE);
    }
}
