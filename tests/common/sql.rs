//! SQL through the real `sqlite3` program: a process of its own for each call.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::run::{Finished, run};

/// One script may take so long.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs SQL (and dot commands) and returns what it prints; an error of any statement panics.
pub fn sqlite3(path: &Path, sql: &str) -> String {
    let done = sqlite3_raw(path, sql, true);
    assert!(
        done.success() && done.stderr.is_empty(),
        "sqlite3 {} failed: {}\nSQL: {}",
        path.display(),
        done.stderr.trim(),
        head(sql)
    );
    done.text()
}

/// Runs SQL that must fail, and returns the error's text.
pub fn sqlite3_fails(path: &Path, sql: &str) -> String {
    let done = sqlite3_raw(path, sql, true);
    assert!(
        !done.success() && !done.stderr.is_empty(),
        "sqlite3 {} must fail, and printed: {}\nSQL: {}",
        path.display(),
        done.text(),
        head(sql)
    );
    done.stderr
}

/// Runs SQL; `bail`: stop at the first error.
pub fn sqlite3_raw(path: &Path, sql: &str, bail: bool) -> Finished {
    let mut command = Command::new("sqlite3");
    // No start-up file: it may change the output.
    command.args(["-batch", "-init", "/dev/null"]);
    if bail {
        command.arg("-bail");
    }
    let script = format!(".timeout 20000\n{sql}\n");
    run(command.arg(path), script.as_bytes(), LIMIT)
}

fn head(sql: &str) -> String {
    sql.chars().take(2000).collect()
}
