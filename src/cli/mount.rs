//! `tenure mount`: runs a node until it is told to stop.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};

use crate::config::{Config, ConfigError, ExecConfig};
use crate::node;
use crate::telemetry::logging::{self, Verbosity};
use crate::thread;

use super::report;

/// What `tenure mount` takes.
#[derive(Debug, clap::Args)]
pub(super) struct MountArgs {
    /// Mount a single node here, without any configuration file; its data goes into `.DIR`
    /// beside it.
    #[arg(conflicts_with_all = ["config", "no_expand_env"])]
    pub dir: Option<PathBuf>,
    /// The configuration file [default: the first of ./litefs.yml, ~/litefs.yml, /etc/litefs.yml].
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Leave `$VAR` in the configuration file as it is.
    #[arg(long)]
    pub no_expand_env: bool,
    /// Leave a dead mount of an earlier run alone: the start fails if there is one.
    #[arg(long)]
    pub skip_unmount: bool,
    /// Say whether a node could run with this configuration, and what it would be, without
    /// starting one.
    #[arg(long)]
    pub check: bool,
    /// Log debug messages.
    #[arg(long)]
    pub debug: bool,
    /// Log each FUSE request.
    #[arg(long = "fuse.debug")]
    pub fuse_debug: bool,
    /// Log everything there is.
    #[arg(long)]
    pub tracing: bool,
    /// A command to run once the node is ready, instead of the configuration's `exec`.
    #[arg(last = true, value_name = "CMD")]
    pub exec: Vec<OsString>,
}

/// Runs the node. The result is the process's exit code.
pub(super) fn run(args: MountArgs) -> ExitCode {
    let config = match configure(&args) {
        Ok(config) => config,
        Err(e) => {
            report(&e);
            return ExitCode::from(2);
        }
    };
    if args.check {
        return check(&config);
    }
    let verbosity = Verbosity {
        trace: args.tracing,
        fuse: config.fuse.debug,
    };
    logging::init(&config.log, verbosity);
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .on_thread_start(thread::begin)
        .build()
    {
        Ok(runtime) => runtime,
        Err(e) => {
            report(&format_args!("cannot start the threads of the node: {e}"));
            return ExitCode::FAILURE;
        }
    };
    let exit_on_error = config.exit_on_error;
    let options = node::Options {
        skip_unmount: args.skip_unmount,
    };
    let code = runtime.block_on(async {
        let e = match node::run(config, options).await {
            Ok(code) => return ExitCode::from(code),
            Err(e) => e,
        };
        report(&e);
        if !exit_on_error {
            report(&"the node is down; waiting for a signal, because exit-on-error is false");
            until_signalled().await;
        }
        ExitCode::FAILURE
    });
    // Not waiting for a thread that a disk or a network file system lets stand.
    runtime.shutdown_background();
    code
}

/// The configuration that the arguments name, with what they say themselves put in.
fn configure(args: &MountArgs) -> Result<Config, ConfigError> {
    let mut config = match &args.dir {
        Some(dir) => Config::single(dir)?,
        None => Config::load(args.config.as_deref(), !args.no_expand_env)?,
    };
    config.log.debug |= args.debug;
    config.fuse.debug |= args.fuse_debug;
    if !args.exec.is_empty() {
        config.exec = vec![ExecConfig {
            cmd: args.exec.clone(),
            if_candidate: false,
        }];
    }
    Ok(config)
}

/// Says whether a node could run: one line and exit code 0, or what is in the way and 2.
fn check(config: &Config) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(e) => {
            report(&format_args!("cannot set up the network: {e}"));
            return ExitCode::FAILURE;
        }
    };
    let problems = runtime.block_on(node::check::problems(config));
    // A look-up of a name, or a look at a directory, that hangs is not waited for.
    runtime.shutdown_background();
    for problem in &problems {
        report(problem);
    }
    if !problems.is_empty() {
        return ExitCode::from(2);
    }
    // Without a standard output there is nobody to tell.
    let _ = writeln!(std::io::stdout(), "{}", node::check::summary(config));
    ExitCode::SUCCESS
}

/// Waits for SIGINT or SIGTERM.
async fn until_signalled() {
    let (Ok(mut interrupt), Ok(mut terminate)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) else {
        return;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> MountArgs {
        MountArgs {
            dir: None,
            config: None,
            no_expand_env: false,
            skip_unmount: false,
            check: false,
            debug: false,
            fuse_debug: false,
            tracing: false,
            exec: Vec::new(),
        }
    }

    #[test]
    fn arguments_go_over_the_configuration() {
        let config = configure(&MountArgs {
            dir: Some("/srv/mnt".into()),
            debug: true,
            fuse_debug: true,
            exec: vec!["sh".into(), "-c".into(), "echo 'x'".into()],
            ..args()
        })
        .unwrap();
        assert!(config.log.debug && config.fuse.debug);
        assert_eq!(config.exec[0].cmd, ["sh", "-c", "echo 'x'"]);
        assert_eq!(config.data.dir, std::path::Path::new("/srv/.mnt"));
    }

    #[test]
    fn a_configuration_that_cannot_be_used_is_exit_code_2() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for text in [
            "fuse: {dri: x}",
            "lease: {advertise-url: 'https://p:1'}",
            "http: {tls: {}}",
        ] {
            std::fs::write(file.path(), text).unwrap();
            let code = run(MountArgs {
                config: Some(file.path().into()),
                ..args()
            });
            assert_eq!(code, ExitCode::from(2), "{text}");
        }
    }
}
