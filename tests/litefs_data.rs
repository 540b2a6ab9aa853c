//! A data directory as LiteFS leaves it opens, goes on, and stays one that LiteFS can open.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::image::Image;
use common::run::{Finished, run};
use common::{Cluster, Options, node::TENURE, sqlite3};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/fixtures/ltx");
const CLUSTER_ID: &str = "LFSC0123456789ABCDEF";

/// A golden database: its name, last position, and the directory of its files.
struct Golden {
    name: String,
    pos: String,
    dir: PathBuf,
}

/// All cases whose database's last state is kept.
fn golden() -> Vec<Golden> {
    let mut all = Vec::new();
    for entry in fs::read_dir(FIXTURES).expect("the golden files") {
        let dir = entry.expect("an entry").path();
        let case = dir.file_name().expect("a name").to_str().expect("text");
        // The last file of this one is the known bad one: it is another test's.
        if !dir.join("final.db").exists() || case == "switch-delete-wal-delete" {
            continue;
        }
        let text = fs::read_to_string(dir.join("manifest.json")).expect("a manifest");
        let manifest: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let pos = manifest["pos"].as_str().expect("a position");
        all.push(Golden {
            name: format!("{case}.db"),
            pos: pos.to_string(),
            dir,
        });
    }
    assert!(all.len() > 10, "golden files are missing");
    all
}

/// Lays a golden database into a data directory the way LiteFS leaves it.
fn lay(data: &Path, golden: &Golden) {
    let dir = data.join("dbs").join(&golden.name);
    fs::create_dir_all(dir.join("ltx")).expect("make directories");
    copy(&golden.dir.join("final.db"), &dir.join("database"));
    for name in ltx_files(&golden.dir) {
        copy(&golden.dir.join(&name), &dir.join("ltx").join(&name));
    }
}

fn copy(from: &Path, to: &Path) {
    // Not fs::copy: the golden files are read-only, and their mode would go along.
    fs::write(to, fs::read(from).expect("read")).expect("write");
}

fn ltx_files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|e| {
            e.expect("an entry")
                .file_name()
                .into_string()
                .expect("text")
        })
        .filter(|name| name.ends_with(".ltx"))
        .collect();
    names.sort();
    names
}

fn ltx_verify(files: &[PathBuf]) -> Finished {
    let mut command = Command::new(TENURE);
    command.args(["ltx", "verify"]).args(files);
    run(&mut command, b"", Duration::from_secs(20))
}

#[test]
fn every_golden_database_opens_and_goes_on() {
    let cluster = Cluster::new(120);
    let options = Options::primary("primary");
    let data = cluster.subdir("primary/data");
    fs::write(data.join("clusterid"), format!("{CLUSTER_ID}\n")).expect("write");
    let all = golden();
    for golden in &all {
        lay(&data, golden);
    }
    let mut primary = cluster.start(options.clone());
    let replica = cluster.start(Options::replica("replica", &options));
    assert!(
        primary
            .http_get("/info")
            .expect("/info")
            .contains(CLUSTER_ID),
        "the cluster ID is not taken over"
    );
    for golden in &all {
        let name = &golden.name;
        assert_eq!(primary.pos(name).as_deref(), Some(&*golden.pos), "{name}");
        common::assert_same(&primary, &replica, name);
        let expected = sqlite3(&golden_copy(&cluster, golden), ".dump");
        assert_eq!(sqlite3(&primary.db(name), ".dump"), expected, "{name}");
        let txid = primary.txid(name);
        sqlite3(
            &primary.db(name),
            "CREATE TABLE tenure_was_here (a); INSERT INTO tenure_was_here VALUES (1);",
        );
        assert_eq!(primary.txid(name), txid + 2, "{name}");
        common::assert_same(&primary, &replica, name);
    }
    // After a clean stop LiteFS finds what it needs: the database as of the last position, and the
    // transaction file of that position.
    let last: Vec<String> = all
        .iter()
        .map(|golden| primary.pos(&golden.name).expect("a position"))
        .collect();
    assert_eq!(primary.stop(), Some(0), "{}", primary.log());
    for (golden, pos) in all.iter().zip(&last) {
        let dir = primary.db_data(&golden.name).join("ltx");
        let names = ltx_files(&dir);
        let newest = names
            .last()
            .unwrap_or_else(|| panic!("{}: no file", dir.display()));
        assert_eq!(newest[17..33], pos[..16], "{}: {names:?}", golden.name);
        let done = ltx_verify(&[dir.join(newest)]);
        assert!(
            done.success(),
            "{}: {}{}",
            golden.name,
            done.text(),
            done.stderr
        );
        let file = fs::read(primary.db_data(&golden.name).join("database")).expect("read");
        let wal = fs::read(primary.db_data(&golden.name).join("wal")).unwrap_or_default();
        let sum = Image::new(file, &wal).checksum();
        assert_eq!(pos[17..], format!("{sum:016x}"), "{}", golden.name);
    }
    primary.start();
    for (golden, pos) in all.iter().zip(&last) {
        assert_eq!(
            primary.pos(&golden.name).as_ref(),
            Some(pos),
            "{}",
            golden.name
        );
        common::assert_same(&primary, &replica, &golden.name);
    }
}

fn golden_copy(cluster: &Cluster, golden: &Golden) -> PathBuf {
    let path = cluster.subdir("plain").join(&golden.name);
    copy(&golden.dir.join("final.db"), &path);
    path
}

#[test]
fn a_replicas_directory_opens_as_a_replicas() {
    let cluster = Cluster::new(60);
    let options = Options::primary("primary");
    let all = golden();
    for data in ["primary/data", "replica/data"] {
        let data = cluster.subdir(data);
        fs::write(data.join("clusterid"), format!("{CLUSTER_ID}\n")).expect("write");
        for golden in &all {
            lay(&data, golden);
        }
    }
    let primary = cluster.start(options.clone());
    let replica = cluster.start(Options::replica("replica", &options));
    for golden in &all {
        assert_eq!(replica.pos(&golden.name).as_deref(), Some(&*golden.pos));
        sqlite3(&primary.db(&golden.name), "CREATE TABLE more (a);");
        common::assert_same(&primary, &replica, &golden.name);
    }
}

#[test]
fn the_transaction_without_pages_is_told_and_harms_nobody() {
    // Its writer gave this database a last transaction with no pages and another checksum.
    let cluster = Cluster::new(60);
    let options = Options::primary("primary");
    let data = cluster.subdir("primary/data");
    for name in ["switch-delete-wal-delete", "delete-4096-lz4"] {
        lay(
            &data,
            &Golden {
                name: format!("{name}.db"),
                pos: String::new(),
                dir: Path::new(FIXTURES).join(name),
            },
        );
    }
    let primary = cluster.start(options.clone());
    let log = primary.log();
    assert!(
        log.contains("switch-delete-wal-delete.db"),
        "nothing is said:\n{log}"
    );
    let replica = cluster.start(Options::replica("replica", &options));
    sqlite3(&primary.db("delete-4096-lz4.db"), "CREATE TABLE more (a);");
    common::assert_same(&primary, &replica, "delete-4096-lz4.db");
}

#[test]
fn the_tests_own_checksum_agrees_with_litefs() {
    for golden in golden() {
        let file = fs::read(golden.dir.join("final.db")).expect("read");
        let sum = Image::new(file, b"").checksum();
        assert_eq!(format!("{sum:016x}"), golden.pos[17..], "{}", golden.name);
    }
}

#[test]
fn golden_files_verify() {
    for golden in golden() {
        let files: Vec<PathBuf> = ltx_files(&golden.dir)
            .iter()
            .map(|name| golden.dir.join(name))
            .collect();
        let done = ltx_verify(&files);
        assert!(
            done.success(),
            "{}: {}{}",
            golden.name,
            done.text(),
            done.stderr
        );
    }
}

#[test]
fn a_damaged_file_does_not_verify() {
    let cluster = Cluster::new(60);
    let golden = golden().remove(0);
    let name = &ltx_files(&golden.dir)[0];
    let mut bytes = fs::read(golden.dir.join(name)).expect("read");
    let last = bytes.len() - 20;
    bytes[last] ^= 1;
    let bad = cluster.dir().join(name);
    fs::write(&bad, &bytes).expect("write");
    let done = ltx_verify(&[bad, golden.dir.join(name)]);
    assert_eq!(done.code, Some(1));
    let said = format!("{}{}", done.text(), done.stderr);
    assert_eq!(said.matches(name.as_str()).count(), 2, "{said}");
}
