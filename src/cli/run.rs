//! `tenure run`: runs a command once the node is what the command needs it to be.
//!
//! The command takes this process's place: it has its process ID, gets its signals, and its exit
//! code is the exit code.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use super::client::{ClientError, NodeClient, Target, checked};
use super::report;

/// How long the node may take to become primary: the handoff, and what the replica lacks before it.
const PROMOTE_TIMEOUT: Duration = Duration::from_secs(45);

/// What `tenure run` takes.
#[derive(Debug, clap::Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    pub node: Target,
    /// Have the node made primary first; the command starts when it can write.
    #[arg(long)]
    pub promote: bool,
    /// Take the halt lock of this database, a file in the node's mount, first: the command may then
    /// write it on a replica. It is held until the command, and what it started, has ended.
    #[arg(long, value_name = "DBPATH", conflicts_with = "promote")]
    pub with_halt_lock_on: Option<PathBuf>,
    /// Do nothing, and end with exit code 0, if the node may never be primary.
    #[arg(long)]
    pub if_candidate: bool,
    /// Say what is done.
    #[arg(short, long)]
    pub verbose: bool,
    /// The command.
    #[arg(last = true, value_name = "CMD", required = true)]
    pub command: Vec<OsString>,
}

/// Runs the command. The result is an exit code only if it was not started.
pub(super) fn run(args: RunArgs) -> ExitCode {
    match prepare(&args) {
        Ok(true) => {}
        Ok(false) => return ExitCode::SUCCESS,
        Err(problem) => {
            report(&problem);
            return ExitCode::FAILURE;
        }
    }
    // Open until the exec, and beyond it in the command.
    let _lock = match args.with_halt_lock_on.as_deref().map(take_halt_lock) {
        None => None,
        Some(Ok(lock)) => Some(lock),
        Some(Err(problem)) => {
            report(&problem);
            return ExitCode::FAILURE;
        }
    };
    // `required` sees to it that there is one.
    let Some((program, rest)) = args.command.split_first() else {
        return ExitCode::FAILURE;
    };
    let error = Command::new(program).args(rest).exec();
    report(&format_args!(
        "cannot run {}: {error}",
        program.to_string_lossy()
    ));
    ExitCode::FAILURE
}

/// The byte of `X-lock` that is the halt lock.
const HALT_BYTE: i64 = 72;

/// Takes the halt lock of a database in a mount. It is held as long as the file, or a descriptor
/// that a child has inherited, is open.
fn take_halt_lock(db: &Path) -> Result<File, String> {
    let mut path = db.as_os_str().to_owned();
    path.push("-lock");
    let shown = path.to_string_lossy().into_owned();
    let failed = |e: io::Error| match e.raw_os_error() {
        Some(libc::ENOENT) => format!(
            "{shown} does not exist: is {} a database in the mount of a node?",
            db.display()
        ),
        Some(libc::EAGAIN) => format!(
            "the halt lock of {} was not to be had in time: see the node's log",
            db.display()
        ),
        _ => format!("cannot take the halt lock of {}: {e}", db.display()),
    };
    let file = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(failed)?;
    // SAFETY: a descriptor that `file` keeps open, and numbers.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) } != 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: HALT_BYTE,
        l_len: 1,
        l_pid: 0,
    };
    loop {
        // SAFETY: a descriptor that `file` keeps open, and a whole `flock` that outlives the call.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLKW, &lock) } == 0 {
            return Ok(file);
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(failed(e));
        }
    }
}

/// Does what comes before the command; false: it is not to run.
fn prepare(args: &RunArgs) -> Result<bool, String> {
    if !args.promote && !args.if_candidate {
        return Ok(true);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| format!("cannot set up the network: {e}"))?;
    let say = |text: &str| {
        if args.verbose {
            use std::io::Write;
            // Nobody is left to be told if this fails.
            let _ = writeln!(std::io::stderr(), "tenure: {text}");
        }
    };
    runtime
        .block_on(async {
            let node = NodeClient::new(&args.node)?;
            if args.if_candidate && !node.is_candidate().await? {
                say("the node is no candidate: the command is not run");
                return Ok(false);
            }
            if args.promote {
                promote(&node).await?;
                say("the node is primary");
            }
            Ok(true)
        })
        .map_err(|e: ClientError| e.to_string())
}

async fn promote(node: &NodeClient) -> Result<(), ClientError> {
    let request = node.http().post(node.path("promote"));
    let answer = request.timeout(PROMOTE_TIMEOUT).send().await;
    let answer = answer.map_err(|e| node.unreachable(e))?;
    match checked(answer).await {
        Err(ClientError::Refused(why)) => Err(ClientError::Refused(format!(
            "the node does not become primary: {why}"
        ))),
        done => done.map(drop),
    }
}
