//! Clusters of real nodes whose primary is chosen through real Consul and etcd: how it changes when
//! all goes well, and how when a node or the service fails.

mod common;

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use common::node::TENURE;
use common::run::run;
use common::service::{Kind, Service};
use common::workload::{self, Workload};
use common::{
    Cluster, Node, Options, SOON, await_following, await_primary, sqlite3, wait_same_pos,
};

/// How soon another node is primary when the old one stops, or hands over.
const AT_ONCE: Duration = Duration::from_secs(1);

fn options(kind: Kind, service: &Service, name: &str) -> Options {
    Options {
        uncompressed: true,
        strict_verify: true,
        ..Options::candidate(name, &kind.lines(service.address(), "tenure/test"))
    }
}

fn rows(node: &Node) -> String {
    sqlite3(&node.db("a.db"), "SELECT count(*) FROM t;")
}

/// The whole life of a cluster of two.
fn lifecycle(kind: Kind) {
    let service = Service::start(kind);
    let cluster = Cluster::new(180);
    let mut a = cluster.start(options(kind, &service, "a"));
    await_primary(&a, SOON);
    sqlite3(
        &a.db("a.db"),
        "PRAGMA journal_mode=wal; CREATE TABLE t (x); INSERT INTO t VALUES (1);",
    );
    sqlite3(&a.db("b.db"), "CREATE TABLE t (x);");
    let mut b = cluster.start(options(kind, &service, "b"));
    await_following(&b, &a);
    assert!(!a.db(".primary").exists(), "a primary follows nobody");
    wait_same_pos(&a, &b, "a.db");
    let refused = common::sql::sqlite3_fails(&b.db("a.db"), "INSERT INTO t VALUES (0);");
    assert!(refused.contains("readonly"), "{refused}");

    // A clean stop hands over at once, and nothing is lost.
    let start = Instant::now();
    assert_eq!(a.stop(), Some(0));
    await_primary(&b, SOON);
    let took = start.elapsed();
    println!("{kind:?}: {took:?} from SIGTERM to the next primary");
    assert!(took < AT_ONCE, "{took:?} from SIGTERM to the next primary");
    assert_eq!(rows(&b), "1\n");
    sqlite3(&b.db("a.db"), "INSERT INTO t VALUES (2);");
    sqlite3(&b.db("b.db"), "INSERT INTO t VALUES (2);");

    // Back again, it converges as a replica.
    a.start();
    await_following(&a, &b);
    for db in ["a.db", "b.db"] {
        common::assert_same(&b, &a, db);
    }

    // kill -9: the other takes over as soon as the service has noticed.
    let start = Instant::now();
    b.kill9();
    await_primary(&a, kind.failover());
    let took = start.elapsed();
    println!("{kind:?}: {took:?} from kill -9 to the next primary");
    sqlite3(&a.db("a.db"), "INSERT INTO t VALUES (3);");
    b.start();
    await_following(&b, &a);
    wait_same_pos(&a, &b, "a.db");

    // Asked for, by HTTP and by command, which starts when the node can write.
    b.http_post("/promote").expect("promote");
    assert!(b.is_primary() && !a.is_primary());
    sqlite3(&b.db("a.db"), "INSERT INTO t VALUES (4);");
    let url = format!("http://{}", a.options.http);
    let insert = "INSERT INTO t VALUES (5);";
    let mut command = Command::new(TENURE);
    command.args([
        "run",
        "-promote",
        "-if-candidate",
        "-url",
        &url,
        "--",
        "sqlite3",
    ]);
    let done = run(command.arg(a.db("a.db")).arg(insert), b"", SOON);
    assert!(done.success(), "{}", done.stderr);
    await_following(&b, &a);
    wait_same_pos(&a, &b, "a.db");
    assert_eq!(rows(&b), "5\n");
    // Of a primary it is no question.
    a.http_post("/promote").expect("promote the primary");

    // Given up for a while, it goes to the other.
    a.http_post("/demote").expect("demote");
    await_primary(&b, AT_ONCE * 2);
    await_following(&a, &b);
    sqlite3(&b.db("a.db"), "INSERT INTO t VALUES (6);");
    common::assert_same(&b, &a, "a.db");
    let refused = a.http_post("/handoff?nodeID=00000000000000AB").unwrap_err();
    assert!(refused.contains("not the primary"), "{refused}");
    let refused = b.http_post("/handoff?nodeID=00000000000000AB").unwrap_err();
    assert!(refused.contains("not connected"), "{refused}");
}

#[test]
fn a_clusters_life_with_etcd() {
    lifecycle(Kind::Etcd);
}

#[test]
fn a_clusters_life_with_consul() {
    lifecycle(Kind::Consul);
}

/// The lease goes back and forth under load: writes fail for a moment only, and none is lost.
fn handoff_under_load(kind: Kind, mode: &str) {
    let service = Service::start(kind);
    let cluster = Cluster::new(120);
    let a = cluster.start(options(kind, &service, "a"));
    await_primary(&a, SOON);
    workload::create(&a.db(workload::DB), mode);
    let b = cluster.start(options(kind, &service, "b"));
    wait_same_pos(&a, &b, workload::DB);
    let nodes = [&a, &b];
    let mounts: Vec<PathBuf> = nodes.iter().map(|n| n.mount()).collect();
    let load = Workload::start(4, &mounts);
    load.wait_for(100, SOON);
    let mut handoffs = Vec::new();
    for i in 0..6 {
        let to = nodes[(i + 1) % 2];
        let asked = Instant::now();
        to.http_post("/promote").expect("promote");
        load.wait_for(60, SOON);
        handoffs.push(asked);
    }
    let acked = load.stop();
    let mut gaps: Vec<Duration> = handoffs
        .iter()
        .map(|asked| {
            // The pause in which the node changes: between two answers of different nodes.
            let i = acked.partition_point(|a| a.ended < *asked).max(1);
            let change = (i..acked.len()).find(|i| acked[*i].node != acked[*i - 1].node);
            let change = change.expect("the other node has acknowledged something");
            acked[change].ended - acked[change - 1].ended
        })
        .collect();
    gaps.sort();
    println!("{kind:?} {mode}: without an acknowledged write for {gaps:?}");
    assert!(
        gaps[gaps.len() / 2] < Duration::from_millis(100),
        "writes fail for too long: {gaps:?}"
    );
    wait_same_pos(&a, &b, workload::DB);
    let outcome = workload::check(&acked, &a.db(workload::DB), &[a.data(), b.data()]);
    assert_eq!(outcome.set_aside, 0, "a handoff loses nothing");
    common::assert_same(&a, &b, workload::DB);
}

#[test]
fn handoff_under_load_with_etcd() {
    handoff_under_load(Kind::Etcd, "wal");
}

#[test]
fn handoff_under_load_with_consul() {
    handoff_under_load(Kind::Consul, "delete");
}
