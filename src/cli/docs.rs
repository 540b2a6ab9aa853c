//! `tenure completions` and `tenure man`: made out of the same definitions that arguments are
//! parsed by, so that they cannot lie.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Command;
use clap_complete::Shell;

use super::report;

/// What `tenure completions` takes.
#[derive(Debug, clap::Args)]
pub(super) struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

/// What `tenure man` takes.
#[derive(Debug, clap::Args)]
pub(super) struct ManArgs {
    /// Write `tenure.1`, `tenure-mount.1` and so on here.
    dir: Option<PathBuf>,
}

/// Prints a shell's script.
pub(super) fn completions(args: &CompletionsArgs, mut command: Command) -> ExitCode {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "tenure", &mut script);
    print(&script)
}

/// Prints the man page, or writes them all.
pub(super) fn man(args: &ManArgs, command: Command) -> ExitCode {
    let Some(dir) = &args.dir else {
        let mut page = Vec::new();
        return match clap_mangen::Man::new(command).render(&mut page) {
            Ok(()) => print(&page),
            Err(e) => {
                report(&format_args!("cannot make the man page: {e}"));
                ExitCode::FAILURE
            }
        };
    };
    match clap_mangen::generate_to(command, dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let dir = dir.display();
            report(&format_args!("cannot write the man pages into {dir}: {e}"));
            ExitCode::FAILURE
        }
    }
}

fn print(text: &[u8]) -> ExitCode {
    match io::stdout().write_all(text) {
        Ok(()) => ExitCode::SUCCESS,
        // `tenure man | head`: whoever reads has enough.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(e) => {
            report(&format_args!("cannot write: {e}"));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn completions_know_the_options() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tenure", &mut script);
            let script = String::from_utf8(script).unwrap();
            for option in ["skip-unmount", "if-candidate", "check", "mount", "promote"] {
                assert!(script.contains(option), "{shell}: no {option}");
            }
        }
    }

    #[test]
    fn there_is_a_man_page_for_each_command() {
        let dir = tempfile::tempdir().unwrap();
        let args = ManArgs {
            dir: Some(dir.path().to_owned()),
        };
        assert_eq!(man(&args, Cli::command()), ExitCode::SUCCESS);
        for (page, text) in [
            ("tenure.1", "mount"),
            ("tenure-mount.1", "skip\\-unmount"),
            ("tenure-run.1", "if\\-candidate"),
        ] {
            let page = std::fs::read_to_string(dir.path().join(page)).unwrap();
            assert!(page.contains(text) && page.starts_with(".ie"), "{page}");
        }
    }
}
