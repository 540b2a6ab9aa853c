//! The log of file operations (`tracing`) of real nodes.

mod common;

use std::io::Read;
use std::path::{Path, PathBuf};

use common::{Cluster, Node, Options, sqlite3, wait_same_pos};

fn options(options: Options, path: &Path, more: &str) -> Options {
    Options {
        more_yaml: format!("tracing: {{path: {path:?}{more}}}\n"),
        ..options
    }
}

/// The lines about an operation on a file.
fn lines<'a>(log: &'a str, operation: &str, file: &str) -> Vec<&'a str> {
    let (operation, file) = (format!(" {operation} "), format!("file={file:?}"));
    let about = |l: &&str| l.contains(&operation) && l.contains(&file);
    log.lines().filter(about).collect()
}

#[test]
fn each_operation_is_a_line() {
    let cluster = Cluster::new(60);
    let (one, two) = (cluster.dir().join("logs/one"), cluster.dir().join("two"));
    let mut primary = cluster.start(options(Options::primary("primary"), &one, ""));
    let replica = Options::replica("replica", &primary.options);
    let mut replica = cluster.start(options(replica, &two, ""));
    sqlite3(&primary.db("a.db"), "CREATE TABLE t (x);");
    wait_same_pos(&primary, &replica, "a.db");
    common::sql::sqlite3_fails(&replica.db("a.db"), "INSERT INTO t VALUES (1);");
    assert_eq!(replica.stop(), Some(0));
    assert_eq!(primary.stop(), Some(0));

    // All of it is there once the node has ended.
    let log = std::fs::read_to_string(&one).unwrap();
    for line in log.lines() {
        assert!(line.starts_with("20") && line.contains(" us="), "{line}");
    }
    assert!(!lines(&log, "create", "a.db-journal").is_empty(), "{log}");
    assert!(!lines(&log, "unlink", "a.db-journal").is_empty(), "{log}");
    let writes = lines(&log, "write", "a.db");
    let first = |l: &&str| l.contains(" offset=0 size=4096 result=4096 ");
    assert!(writes.iter().any(first), "{log}");
    assert!(!log.contains("error=\"Permission"), "{log}");

    let log = std::fs::read_to_string(&two).unwrap();
    let refused = |l: &&str| l.contains(" error=\"Permission denied (os error 13)\" ");
    assert!(
        lines(&log, "create", "a.db-journal").iter().any(refused),
        "{log}"
    );
}

/// All that the node has logged, and how many files it is in.
fn everything(path: &Path) -> (String, Vec<PathBuf>) {
    let (mut text, mut files) = (String::new(), Vec::new());
    for entry in std::fs::read_dir(path.parent().unwrap()).unwrap() {
        let path = entry.unwrap().path();
        let file = std::fs::File::open(&path).unwrap();
        if path.extension().is_some_and(|e| e == "gz") {
            flate2::read::GzDecoder::new(file)
                .read_to_string(&mut text)
                .unwrap();
        } else {
            (&file).read_to_string(&mut text).unwrap();
        }
        files.push(path);
    }
    files.sort();
    (text, files)
}

/// Reads `.lag` so often: three lines each at least, of some 90 bytes.
fn busy(node: &Node, times: usize) {
    for _ in 0..times {
        std::fs::read_to_string(node.db(".lag")).unwrap();
    }
}

#[test]
fn it_rolls_and_is_compressed() {
    let cluster = Cluster::new(120);
    let path = cluster.dir().join("logs/ops");
    let with = |more: &str| options(Options::primary("primary"), &path, more);
    let mut node = cluster.start(with(", max-size: 1, max-count: 9"));
    busy(&node, 5000);
    assert_eq!(node.stop(), Some(0));
    let (text, files) = everything(&path);
    assert!(lines(&text, "read", ".lag").len() >= 5000, "{files:?}");
    assert_eq!(files[0], path);
    let older = &files[1..];
    let packed = |p: &PathBuf| p.extension().is_some_and(|e| e == "gz");
    assert!(!older.is_empty() && older.iter().all(packed), "{files:?}");

    // Off, whatever else is said.
    let before = std::fs::metadata(&path).unwrap().len();
    node.options = Options {
        more_yaml: with(", enabled: false").more_yaml,
        ..node.options.clone()
    };
    node.start();
    busy(&node, 10);
    assert_eq!(node.stop(), Some(0));
    assert_eq!(std::fs::metadata(&path).unwrap().len(), before);
}
