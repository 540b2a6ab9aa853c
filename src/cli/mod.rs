//! The command line: one file a command.
//!
//! Exit codes: 0 done; 1 unknown command, failed start, or what the command was to do failed;
//! 2 bad options, no command, or an invalid configuration. Long options may have one dash or two,
//! as LiteFS's have.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

mod client;
mod docs;
mod export;
mod import;
pub mod ltx;
mod mount;
mod run;

/// A replicated file system for SQLite.
#[derive(Debug, Parser)]
#[command(name = "tenure", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a node: mount its databases, replicate them, serve the other nodes.
    Mount(mount::MountArgs),
    /// Run a command once the node is what it needs.
    Run(run::RunArgs),
    /// Write a database of a running node to a file.
    Export(export::ExportArgs),
    /// Replace a database of a running primary by a file.
    Import(import::ImportArgs),
    /// Look into transaction files and log segments.
    #[command(subcommand)]
    Ltx(ltx::LtxCommand),
    /// Print a script that completes Tenure's command lines in a shell.
    Completions(docs::CompletionsArgs),
    /// Print the man page, or write one for each command into a directory.
    Man(docs::ManArgs),
    /// Print the version.
    Version,
}

/// Does what `args` (the program's name first) say, and returns the process's exit code.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    match Cli::try_parse_from(two_dashes(args)) {
        Ok(cli) => match cli.command {
            Command::Mount(args) => mount::run(args),
            Command::Run(args) => run::run(args),
            Command::Export(args) => export::run(args),
            Command::Import(args) => import::run(args),
            Command::Ltx(command) => ltx::run(command),
            Command::Completions(args) => docs::completions(&args, Cli::command()),
            Command::Man(args) => docs::man(&args, Cli::command()),
            Command::Version => {
                // Nobody is left to be told if this fails.
                let _ = writeln!(std::io::stdout(), "tenure {}", env!("CARGO_PKG_VERSION"));
                ExitCode::SUCCESS
            }
        },
        Err(e) => {
            let _ = e.print();
            ExitCode::from(exit_code(e.kind()))
        }
    }
}

/// The exit code of a command line that was not run.
fn exit_code(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => 0,
        ErrorKind::InvalidSubcommand => 1,
        _ => 2,
    }
}

/// `-config` as `--config`, up to a `--` of its own: what follows that is another program's.
/// One letter after a dash (`-h`) stays a short option.
fn two_dashes(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut ours = true;
    let double = |arg: OsString| {
        ours &= arg != "--";
        match arg.as_bytes() {
            [b'-', first, _, ..] if ours && first.is_ascii_alphabetic() => {
                let mut doubled = OsString::from("-");
                doubled.push(arg);
                doubled
            }
            _ => arg,
        }
    };
    args.into_iter().map(double).collect()
}

/// Says on standard error what went wrong.
fn report(error: &dyn std::fmt::Display) {
    // Without a standard error there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "ERROR: {error}");
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn parse(line: &str) -> Result<Command, u8> {
        let args = line.split_whitespace().map(OsString::from);
        match Cli::try_parse_from(two_dashes(args)) {
            Ok(cli) => Ok(cli.command),
            Err(e) => Err(exit_code(e.kind())),
        }
    }

    fn mount(line: &str) -> mount::MountArgs {
        match parse(line) {
            Ok(Command::Mount(args)) => args,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn options_have_one_dash_or_two() {
        for line in [
            "tenure mount -config x.yml -skip-unmount -no-expand-env -debug -fuse.debug -tracing",
            "tenure mount --config=x.yml --skip-unmount --no-expand-env --debug --fuse.debug --tracing",
            "tenure mount -config=x.yml -tracing --fuse.debug -debug -no-expand-env -skip-unmount",
        ] {
            let args = mount(line);
            assert_eq!(args.config.as_deref(), Some(Path::new("x.yml")), "{line}");
            assert!(
                args.skip_unmount && args.no_expand_env && args.debug,
                "{line}"
            );
            assert!(args.fuse_debug && args.tracing, "{line}");
        }
    }

    #[test]
    fn what_follows_two_dashes_is_left_alone() {
        let args = mount("tenure mount -debug -- server -port 80 -- -x");
        assert_eq!(args.exec, ["server", "-port", "80", "--", "-x"]);
        assert!(args.debug && args.dir.is_none());
    }

    #[test]
    fn export_and_import_have_litefs_s_options() {
        for line in [
            "tenure export -url http://h:1 -name my.db /tmp/x",
            "tenure export --name=my.db --url=http://h:1 /tmp/x",
        ] {
            let Ok(Command::Export(args)) = parse(line) else {
                panic!("{line}");
            };
            assert_eq!(args.node.url.as_deref(), Some("http://h:1"));
            assert_eq!(args.name, "my.db");
            assert_eq!(args.path, Path::new("/tmp/x"));
        }
        let Ok(Command::Import(args)) = parse("tenure import -name my.db /tmp/x") else {
            panic!("import");
        };
        assert_eq!(args.node.url, None);
    }

    #[test]
    fn a_directory_needs_no_file() {
        let args = mount("tenure mount /mnt/x");
        assert_eq!(args.dir.as_deref(), Some(Path::new("/mnt/x")));
        assert_eq!(parse("tenure mount -config x.yml /mnt/x").err(), Some(2));
    }

    #[test]
    fn exit_codes() {
        for (line, code) in [
            ("tenure", 2),
            ("tenure mount -nonsense", 2),
            ("tenure mount -config", 2),
            ("tenure export -name x", 2),
            ("tenure export /x", 2),
            ("tenure import -name x", 2),
            ("tenure nonsense", 1),
            ("tenure run -promote", 2),
            ("tenure -nonsense", 2),
            ("tenure help", 0),
            ("tenure help mount", 0),
            ("tenure -h", 0),
            ("tenure -help", 0),
            ("tenure mount -help", 0),
            ("tenure -version", 0),
        ] {
            assert_eq!(parse(line).err(), Some(code), "{line}");
        }
        assert!(matches!(parse("tenure version"), Ok(Command::Version)));
    }
}
