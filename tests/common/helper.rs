//! SQL through rusqlite in a process of its own: the test program starts itself again.
//!
//! A test program that uses it holds one test made by [`helper_test!`](crate::helper_test): called
//! with the environment set below it is the helper; called as a test it tries itself out. What the
//! helper has to say goes to a file, since the test harness prints to the standard output, and is
//! there as soon as it was written, whatever happens to the helper afterwards.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rusqlite::Connection;
use rusqlite::types::ValueRef;

use super::run::{Running, run};

const TASK: &str = "TENURE_TEST_HELPER";
const DATABASE: &str = "TENURE_TEST_HELPER_DATABASE";
const INPUT: &str = "TENURE_TEST_HELPER_INPUT";
const OUTPUT: &str = "TENURE_TEST_HELPER_OUTPUT";

/// Rows of the table `many` that the writer inserts in each of its transactions.
pub const ROWS_A_TRANSACTION: i64 = 5;

/// Makes the test that is also the helper's entry.
#[macro_export]
macro_rules! helper_test {
    () => {
        #[test]
        fn helper_process() {
            $crate::common::helper::main();
        }
    };
}

/// The entry: the helper when it is called as one, a test of it otherwise.
pub fn main() {
    let Ok(task) = std::env::var(TASK) else {
        return try_out();
    };
    let path = |name| PathBuf::from(std::env::var_os(name).expect("set with the task"));
    let output = OpenOptions::new()
        .append(true)
        .open(path(OUTPUT))
        .expect("open the output");
    match task.as_str() {
        "script" => {
            let sql = std::fs::read_to_string(path(INPUT)).expect("read the script");
            script(&path(DATABASE), &sql, &output);
        }
        "writer" => {
            let settings = std::fs::read_to_string(path(INPUT)).expect("read the settings");
            writer(&path(DATABASE), &settings, &output);
        }
        "session" => session(&path(DATABASE), &output),
        other => panic!("unknown task {other}"),
    }
}

fn try_out() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let sql = "CREATE TABLE t (a);\nINSERT INTO t VALUES (1), (NULL);\n\
               SELECT * FROM missing;\nSELECT a, 'x' FROM t;";
    let printed = run_script(&dir.path().join("x.db"), dir.path(), sql);
    assert_eq!(printed, "error: no such table: missing\n1|x\n|x\n");
}

fn start(task: &str, database: &Path, dir: &Path, input: &str) -> (Command, PathBuf) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let id = NEXT.fetch_add(1, Ordering::SeqCst);
    let file = |kind: &str| dir.join(format!("helper-{}-{id}.{kind}", std::process::id()));
    let (input_path, output_path) = (file("in"), file("out"));
    std::fs::write(&input_path, input).expect("write the input");
    File::create(&output_path).expect("make the output");
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command
        .args(["--exact", "helper_process", "--nocapture", "--quiet"])
        .env(TASK, task)
        .env(DATABASE, database)
        .env(INPUT, &input_path)
        .env(OUTPUT, &output_path);
    (command, output_path)
}

/// Runs a script of one statement a line, going on after errors, and returns what it prints: rows
/// as the `sqlite3` program shows them, errors as `error: …`. Files go to `dir`.
pub fn run_script(database: &Path, dir: &Path, sql: &str) -> String {
    let (mut command, output) = start("script", database, dir, sql);
    let done = run(&mut command, b"", Duration::from_secs(120));
    assert!(done.success(), "the helper failed: {}\n{sql}", done.stderr);
    let printed = std::fs::read_to_string(&output).expect("read the output");
    std::fs::remove_file(output).expect("remove the output");
    printed
}

/// One statement a line.
fn script(database: &Path, sql: &str, mut output: &File) {
    let db = open(database);
    let mut text = String::new();
    for line in sql.lines().filter(|line| !line.trim().is_empty()) {
        if let Err(e) = statement(&db, line, &mut text) {
            text += &format!("error: {}\n", message(&e));
        }
    }
    output.write_all(text.as_bytes()).expect("write the output");
}

fn open(database: &Path) -> Connection {
    let db = Connection::open(database).expect("open the database");
    db.busy_timeout(Duration::from_secs(20))
        .expect("set a limit");
    db
}

fn statement(db: &Connection, sql: &str, text: &mut String) -> rusqlite::Result<()> {
    // What a checkpoint counts depends on when others did one.
    let shown = !sql.contains("wal_checkpoint");
    let mut statement = db.prepare(sql)?;
    let columns = statement.column_count();
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let cells = (0..columns).map(|i| row.get_ref(i).map(cell));
        let cells = cells.collect::<rusqlite::Result<Vec<String>>>()?;
        if shown {
            *text += &format!("{}\n", cells.join("|"));
        }
    }
    Ok(())
}

fn cell(value: ValueRef<'_>) -> String {
    match value {
        ValueRef::Null => String::new(),
        ValueRef::Integer(i) => i.to_string(),
        ValueRef::Real(r) => r.to_string(),
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => {
            String::from_utf8_lossy(bytes).into_owned()
        }
    }
}

/// SQLite's own text of an error, without rusqlite's additions.
fn message(error: &rusqlite::Error) -> String {
    match error {
        rusqlite::Error::SqliteFailure(_, Some(text)) => text.clone(),
        rusqlite::Error::SqlInputError { msg, .. } => msg.clone(),
        other => other.to_string(),
    }
}

/// A connection in a process of its own that runs one statement after another.
pub struct Session {
    process: Running,
    output: PathBuf,
    read: usize,
}

impl Session {
    /// Opens the database; files go to `dir`.
    pub fn open(database: &Path, dir: &Path) -> Session {
        let (mut command, output) = start("session", database, dir, "");
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start the session");
        Session {
            process: Running(child),
            output,
            read: 0,
        }
    }

    /// Sends its process a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: takes numbers only; a child that was not waited for keeps its ID.
        unsafe { libc::kill(self.process.0.id() as i32, signal) };
    }

    /// Runs a statement of one line; its rows, or the text of its error.
    pub fn run(&mut self, sql: &str) -> Result<String, String> {
        assert!(!sql.contains('\n'), "one line: {sql}");
        let input = self.process.0.stdin.as_mut().expect("a pipe");
        writeln!(input, "{sql}").expect("tell the session");
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        loop {
            let text = std::fs::read_to_string(&self.output).expect("read the output");
            let text = &text[self.read..];
            // The answer's last line is a full stop.
            let whole = text
                .strip_suffix(".\n")
                .filter(|t| t.is_empty() || t.ends_with('\n'));
            if let Some(answer) = whole {
                self.read += text.len();
                return match answer.strip_prefix("error: ") {
                    Some(e) => Err(e.trim_end().to_string()),
                    None => Ok(answer.trim_end().to_string()),
                };
            }
            assert!(std::time::Instant::now() < deadline, "no answer: {sql}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn session(database: &Path, mut output: &File) {
    let db = open(database);
    for line in std::io::stdin().lines() {
        let line = line.expect("a line");
        let mut text = String::new();
        if let Err(e) = statement(&db, &line, &mut text) {
            text = format!("error: {}\n", message(&e));
        }
        text += ".\n";
        output.write_all(text.as_bytes()).expect("write the output");
    }
}

/// Tables of the writer; one statement a line.
pub const WRITER_TABLES: &str = "\
CREATE TABLE many (n INTEGER, i INTEGER, payload BLOB, PRIMARY KEY (n, i)) WITHOUT ROWID;
CREATE TABLE counter (n INTEGER);
INSERT INTO counter VALUES (0);
";

/// How many of the newest transactions the writer keeps the rows of.
pub const KEPT_TRANSACTIONS: i64 = 100;

/// A process that commits transactions until it is killed or meets an error.
pub struct Writer {
    /// The process.
    pub process: Running,
    output: PathBuf,
}

impl Writer {
    /// Starts it on a database with [`WRITER_TABLES`], in the given `PRAGMA journal_mode` and
    /// `synchronous`; files go to `dir`.
    pub fn start(database: &Path, dir: &Path, mode: &str, synchronous: &str) -> Writer {
        let (mut command, output) =
            start("writer", database, dir, &format!("{mode} {synchronous}"));
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start the writer");
        Writer {
            process: Running(child),
            output,
        }
    }

    /// The last transaction whose commit returned to it; 0 before the first.
    pub fn acknowledged(&self) -> i64 {
        let text = self.output();
        // A line that was cut short by a kill is not acknowledged.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let last = whole.lines().rev().find_map(|line| line.parse().ok());
        last.unwrap_or(0)
    }

    /// All that it reported: numbers of transactions, and the error that ended it.
    pub fn output(&self) -> String {
        std::fs::read_to_string(&self.output).expect("read the output")
    }

    /// The error that ended it by itself.
    pub fn error(&self) -> Option<String> {
        let text = self.output();
        let line = text.lines().find(|line| line.starts_with("error: "));
        line.map(str::to_string)
    }
}

fn writer(database: &Path, settings: &str, output: &File) {
    let report = |mut line: String| {
        line.push('\n');
        // One write: whoever reads the file sees all of the line or nothing of it.
        (&mut &*output)
            .write_all(line.as_bytes())
            .expect("write the output");
    };
    let (mode, synchronous) = settings.split_once(' ').expect("two settings");
    if let Err(e) = write_for_ever(database, mode, synchronous, &report) {
        report(format!("error: {e}"));
    }
}

fn write_for_ever(
    database: &Path,
    mode: &str,
    synchronous: &str,
    report: &dyn Fn(String),
) -> rusqlite::Result<()> {
    let db = open(database);
    db.execute_batch(&format!(
        "PRAGMA journal_mode={mode}; PRAGMA synchronous={synchronous}; PRAGMA cache_size=20"
    ))?;
    let mut n: i64 = db.query_row("SELECT n FROM counter", [], |row| row.get(0))?;
    loop {
        n += 1;
        // Each eighth is larger than the cache: its pages are written before its commit.
        let size = if n % 8 == 0 { 40_000 } else { 20 + n % 700 };
        db.execute_batch("BEGIN IMMEDIATE")?;
        for i in 0..ROWS_A_TRANSACTION {
            db.execute(
                "INSERT INTO many VALUES (?1, ?2, zeroblob(?3))",
                [n, i, size],
            )?;
        }
        db.execute("DELETE FROM many WHERE n <= ?1", [n - KEPT_TRANSACTIONS])?;
        db.execute("UPDATE counter SET n = ?1", [n])?;
        db.execute_batch("COMMIT")?;
        report(n.to_string());
    }
}

/// Checks what a writer left, with the last transaction that it was told to be committed: that one
/// is there, at most one more is, and each is there as a whole. Returns the newest.
pub fn assert_whole_transactions(database: &Path, acknowledged: i64) -> i64 {
    let text = super::sqlite3(
        database,
        &format!(
            "PRAGMA integrity_check;
             SELECT n FROM counter;
             SELECT coalesce(max(n), 0) FROM many;
             SELECT count(DISTINCT n) FROM many;
             SELECT count(*) FROM (SELECT n FROM many GROUP BY n
                HAVING count(*) <> {ROWS_A_TRANSACTION}
                OR max(length(payload)) <> min(length(payload)));"
        ),
    );
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 5, "{text}");
    assert_eq!(lines[0], "ok", "integrity of {}", database.display());
    let n: i64 = lines[1].parse().expect("a number");
    assert!(
        n == acknowledged || n == acknowledged + 1,
        "transaction {acknowledged} was acknowledged, the newest there is {n}"
    );
    let kept = n.min(KEPT_TRANSACTIONS).to_string();
    let newest = n.to_string();
    assert_eq!(lines[2..], [newest.as_str(), kept.as_str(), "0"], "at {n}");
    n
}
