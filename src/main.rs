//! The `tenure` program: arguments in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    tenure::cli::run(std::env::args_os())
}
