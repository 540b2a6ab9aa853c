//! A data directory on a disk that is read-only, or becomes so while the node runs. Needs root.

mod common;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::disk::{FailingDisk, SmallDisk};
use common::sql::{sqlite3_fails, sqlite3_raw};
use common::{Cluster, Options, SOON, sqlite3, wait_until};

#[test]
fn a_start_on_a_read_only_disk_says_so() {
    let cluster = Cluster::new(90);
    let Some(disk) = SmallDisk::mount(&cluster.subdir("node/data"), 24) else {
        return;
    };
    let mut node = cluster.start(Options::primary("node"));
    for mode in ["delete", "wal"] {
        let sql =
            format!("PRAGMA journal_mode={mode}; CREATE TABLE t (a); INSERT INTO t VALUES (1);");
        sqlite3(&node.db(&format!("{mode}.db")), &sql);
    }
    // What a stop has left, and what a kill has.
    for kill in [false, true] {
        if kill {
            sqlite3(&node.db("wal.db"), "INSERT INTO t VALUES (1);");
            node.kill9();
        } else {
            node.stop();
        }
        disk.set_read_only(true);
        let logged = node.log().len();
        node.spawn();
        assert_eq!(node.wait(SOON), Some(1), "{}", node.log());
        let log = node.log().split_off(logged);
        let said = log.lines().find(|l| l.contains("ERROR: ")).unwrap_or("");
        for part in ["read-only", "data"] {
            assert!(said.to_lowercase().contains(part), "{part} in {log}");
        }
        disk.set_read_only(false);
        node.start();
        for mode in ["delete", "wal"] {
            let db = node.db(&format!("{mode}.db"));
            sqlite3(&db, "INSERT INTO t VALUES (2);");
            assert_eq!(sqlite3(&db, "PRAGMA integrity_check;"), "ok\n");
        }
    }
    node.stop();
    drop(node);
}

#[test]
fn the_primarys_disk_turns_read_only() {
    let cluster = Cluster::new(120);
    let image = cluster.dir().join("image");
    let Some(disk) = FailingDisk::mount(&cluster.subdir("primary/data"), &image, 64) else {
        return;
    };
    let options = Options::primary("primary");
    let mut primary = cluster.start(options.clone());
    let mut replica = cluster.start(Options::replica("replica", &options));
    for mode in ["delete", "truncate", "persist", "wal"] {
        let sql =
            format!("PRAGMA journal_mode={mode}; CREATE TABLE t (a); INSERT INTO t VALUES (1);");
        sqlite3(&primary.db(&format!("{mode}.db")), &sql);
        common::assert_same(&primary, &replica, &format!("{mode}.db"));
    }
    disk.fail();
    for mode in ["delete", "truncate", "persist", "wal"] {
        let db = primary.db(&format!("{mode}.db"));
        for _ in 0..3 {
            sqlite3_fails(&db, "PRAGMA synchronous=FULL; INSERT INTO t VALUES (2);");
        }
        // Nothing is wrong with what is there.
        let read = sqlite3_raw(&db, "PRAGMA integrity_check; SELECT count(*) FROM t;", true);
        assert!(
            read.text() == "ok\n1\n" || !read.success(),
            "{mode}: {read:?}"
        );
        assert_eq!(
            sqlite3(
                &replica.db(&format!("{mode}.db")),
                "SELECT count(*) FROM t;"
            ),
            "1\n",
            "{mode}: what was refused was replicated"
        );
    }
    assert!(primary.is_up() && replica.is_up(), "{}", primary.log());
    let log = primary.log().to_lowercase();
    assert!(log.contains("read-only file system"), "{log}");
    // It stops in order, and a start says what is wrong.
    primary.stop();
    primary.spawn();
    assert_eq!(primary.wait(SOON), Some(1), "{}", primary.log());
    // On a disk that works again, all is as it was.
    drop(disk);
    let Some(_disk) = remounted(&cluster, "primary", &image) else {
        return;
    };
    primary.start();
    for mode in ["delete", "truncate", "persist", "wal"] {
        let db = format!("{mode}.db");
        sqlite3(&primary.db(&db), "INSERT INTO t VALUES (3);");
        assert_eq!(sqlite3(&primary.db(&db), "SELECT count(*) FROM t;"), "2\n");
        common::assert_same(&primary, &replica, &db);
    }
    replica.stop();
    primary.stop();
}

/// Mounts the image again, after the check that every start of a machine makes.
fn remounted(cluster: &Cluster, node: &str, image: &Path) -> Option<FailingDisk> {
    // A dead mount keeps files open that were passed through.
    common::node::detach_below(&cluster.subdir(node).join("mnt"));
    wait_until("the old mount to be gone", SOON, || {
        let devices = Command::new("losetup").arg("-j").arg(image).output();
        match String::from_utf8_lossy(&devices.expect("losetup").stdout).trim() {
            "" => Ok(()),
            left => Err(left.to_string()),
        }
    });
    let check = Command::new("fsck.ext4").arg("-fy").arg(image).output();
    println!("fsck: {check:?}");
    FailingDisk::mount_image(&cluster.subdir(&format!("{node}/data")), image)
}

#[test]
fn a_replicas_disk_turns_read_only() {
    let cluster = Cluster::new(120);
    let image = cluster.dir().join("image");
    let Some(disk) = FailingDisk::mount(&cluster.subdir("replica/data"), &image, 64) else {
        return;
    };
    let options = Options::primary("primary");
    let primary = cluster.start(options.clone());
    let mut replica = cluster.start(Options::replica("replica", &options));
    for mode in ["delete", "wal"] {
        let sql =
            format!("PRAGMA journal_mode={mode}; CREATE TABLE t (a); INSERT INTO t VALUES (1);");
        sqlite3(&primary.db(&format!("{mode}.db")), &sql);
        common::assert_same(&primary, &replica, &format!("{mode}.db"));
    }
    disk.fail();
    for mode in ["delete", "wal"] {
        sqlite3(
            &primary.db(&format!("{mode}.db")),
            "INSERT INTO t VALUES (2);",
        );
    }
    wait_until("a word of it", SOON, || {
        match replica
            .log()
            .to_lowercase()
            .contains("read-only file system")
        {
            true => Ok(()),
            false => Err("none"),
        }
    });
    std::thread::sleep(Duration::from_millis(500));
    assert!(replica.is_up(), "{}", replica.log());
    for mode in ["delete", "wal"] {
        // Old, or an error: never wrong.
        let db = replica.db(&format!("{mode}.db"));
        let read = sqlite3_raw(&db, "PRAGMA integrity_check; SELECT count(*) FROM t;", true);
        assert!(
            ["ok\n1\n", "ok\n2\n"].contains(&read.text().as_str()) || !read.success(),
            "{mode}: {read:?}"
        );
    }
    replica.kill9();
    drop(disk);
    let Some(_disk) = remounted(&cluster, "replica", &image) else {
        return;
    };
    replica.start();
    for mode in ["delete", "wal"] {
        common::assert_same(&primary, &replica, &format!("{mode}.db"));
    }
    replica.stop();
}
