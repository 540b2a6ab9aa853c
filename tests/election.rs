//! Who may become primary, and when: the node with all the data, never one without any, never one
//! that is no candidate; and what becomes of data as clusters and their leases change.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::events::Events;
use common::net::{Link, Net, SERVICE};
use common::node::TENURE;
use common::run::run;
use common::service::{Kind, Service};
use common::sql::{sqlite3_fails, sqlite3_raw};
use common::{
    Cluster, Node, Options, SOON, assert_same, await_following, await_primary, sqlite3,
    wait_same_pos, wait_until,
};

const ETCD: Kind = Kind::Etcd;

fn lines(service: &Service) -> String {
    ETCD.lines(service.address(), "tenure/test")
}

fn create(node: &Node) {
    let sql = "PRAGMA journal_mode=wal; CREATE TABLE t (x); INSERT INTO t VALUES (1);";
    sqlite3(&node.db("a.db"), sql);
}

fn insert(node: &Node) {
    sqlite3(&node.db("a.db"), "INSERT INTO t VALUES (2);");
}

fn rows(node: &Node) -> usize {
    let count = sqlite3(&node.db("a.db"), "SELECT count(*) FROM t;");
    count.trim().parse().expect("a number")
}

/// For so long, none of these nodes is primary at any time.
fn assert_never_primary(nodes: &[&Node], long: Duration) {
    let end = Instant::now() + long;
    while Instant::now() < end {
        for node in nodes {
            assert!(!node.is_primary(), "{} is primary", node.options.name);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until `node` is primary; `other` is not at any time until then, and for a while after.
fn await_primary_instead_of(node: &Node, other: &Node) {
    let start = Instant::now();
    while !node.is_primary() {
        assert!(start.elapsed() < ETCD.failover() + SOON, "no primary");
        assert_never_primary(&[other], Duration::from_millis(20));
    }
    println!("primary after {:?}", start.elapsed());
    assert_never_primary(&[other], Duration::from_secs(2));
}

fn assert_nothing_set_aside(nodes: &[&Node]) {
    for node in nodes {
        let name = &node.options.name;
        assert!(!node.data().join("divergent").exists(), "{name}");
        assert_eq!(
            node.metric_or_0("tenure_divergent_transactions_total"),
            0.0,
            "{name}"
        );
    }
}

/// Nodes in namespaces of their own.
struct Bed<const N: usize> {
    // Dropped in this order: nodes, service, network.
    nodes: [Node; N],
    _cluster: Cluster,
    _service: Service,
    net: Net,
}

impl<const N: usize> Bed<N> {
    /// The first is primary, has data, and the others follow it.
    fn new(names: [&str; N]) -> Bed<N> {
        let net = Net::new(N);
        let start = || Service::start_at(ETCD, SERVICE.parse().expect("an address"));
        let service = net.service.run(start);
        let cluster = Cluster::new(120);
        let nodes = std::array::from_fn(|i| {
            let node = cluster.start(Options {
                http: format!("{}:20202", net.address(i)),
                namespace: Some(net.member(i)),
                ..Options::candidate(names[i], &lines(&service))
            });
            if i == 0 {
                await_primary(&node, SOON);
                create(&node);
            }
            node
        });
        for node in &nodes[1..] {
            await_following(node, &nodes[0]);
            wait_same_pos(&nodes[0], node, "a.db");
        }
        Bed {
            nodes,
            _cluster: cluster,
            _service: service,
            net,
        }
    }
}

#[test]
fn the_one_that_has_everything_not_the_one_that_was_cut_off() {
    let mut bed = Bed::new(["a", "b", "c"]);
    let [a, b, c] = &mut bed.nodes;
    bed.net.cut(2, Link::Peers);
    for _ in 0..20 {
        insert(a);
    }
    wait_same_pos(a, b, "a.db");
    assert!(c.txid("a.db") < b.txid("a.db"));
    a.kill9();
    await_primary_instead_of(b, c);
    assert_eq!(rows(b), 21, "everything is there");
    insert(b);
    bed.net.heal(2, Link::Peers);
    a.start();
    for node in [&*a, c] {
        await_following(node, b);
        assert_same(b, node, "a.db");
    }
    assert_nothing_set_aside(&[a, b, c]);
}

#[test]
fn the_one_that_has_everything_not_the_one_that_was_frozen() {
    let service = Service::start(ETCD);
    let cluster = Cluster::new(120);
    let start = |name| cluster.start(Options::candidate(name, &lines(&service)));
    let mut a = start("a");
    await_primary(&a, SOON);
    create(&a);
    let (b, c) = (start("b"), start("c"));
    for node in [&b, &c] {
        await_following(node, &a);
        wait_same_pos(&a, node, "a.db");
    }
    c.freeze(true);
    // More than the sockets between them hold.
    for _ in 0..30 {
        sqlite3(&a.db("a.db"), "INSERT INTO t VALUES (randomblob(1000000));");
    }
    wait_same_pos(&a, &b, "a.db");
    a.kill9();
    c.freeze(false);
    await_primary_instead_of(&b, &c);
    assert_eq!(rows(&b), 31, "everything is there");
    let lines = c.log();
    await_following(&c, &b);
    assert_same(&b, &c, "a.db");
    assert_nothing_set_aside(&[&b, &c]);
    assert!(!lines.contains("this node is the primary"), "{lines}");
}

#[test]
fn a_node_without_data_waits_for_one_that_has_some() {
    let service = Service::start(ETCD);
    let cluster = Cluster::new(120);
    let start = |name| cluster.start(Options::candidate(name, &lines(&service)));
    let mut a = start("a");
    await_primary(&a, SOON);
    create(&a);
    let mut lost = start("lost");
    await_following(&lost, &a);
    wait_same_pos(&a, &lost, "a.db");
    assert_eq!(lost.stop(), Some(0));
    std::fs::remove_dir_all(lost.data().join("dbs")).expect("remove its databases");
    assert_eq!(a.stop(), Some(0));

    let mark = lost.log().len();
    lost.start();
    let fresh = start("fresh");
    assert_never_primary(&[&lost, &fresh], ETCD.ttl() + Duration::from_secs(5));
    let id = std::fs::read_to_string(a.data().join("clusterid")).expect("the cluster's ID");
    let said = [
        (
            lost.log().split_off(mark),
            "this node has no data, and its cluster has some",
        ),
        (fresh.log(), "this node is of no cluster yet"),
    ];
    for (log, why) in said {
        assert_eq!(log.matches(why).count(), 1, "{log}");
    }
    assert!(fresh.log().contains(id.trim()));
    assert!(!fresh.db("a.db").exists() && !lost.db("a.db").exists());

    a.start();
    await_primary(&a, SOON);
    insert(&a);
    for node in [&lost, &fresh] {
        await_following(node, &a);
        assert_same(&a, node, "a.db");
        assert_eq!(rows(node), 2);
    }
}

#[test]
fn who_is_no_candidate_is_never_primary() {
    let service = Service::start(ETCD);
    let cluster = Cluster::new(120);
    let mut a = cluster.start(Options::candidate("a", &lines(&service)));
    await_primary(&a, SOON);
    create(&a);
    let replica = cluster.start(Options {
        candidate: false,
        ..Options::candidate("replica", &lines(&service))
    });
    await_following(&replica, &a);
    wait_same_pos(&a, &replica, "a.db");
    let refused = replica.http_post("/promote").unwrap_err();
    assert!(refused.contains(" 409 "), "{refused}");
    assert!(refused.contains("lease.candidate"), "{refused}");

    // A command that is for candidates alone.
    let run_on = |node: &Node, flags: &[&str]| {
        let made = cluster.dir().join(format!("made-on-{}", node.options.name));
        let mut command = Command::new(TENURE);
        command.arg("run").args(flags);
        command.args(["-url", &format!("http://{}", node.options.http), "--"]);
        let done = run(command.arg("touch").arg(&made), b"", SOON);
        (done.code, made.exists())
    };
    assert_eq!(run_on(&replica, &["-if-candidate"]), (Some(0), false));
    assert_eq!(
        run_on(&replica, &["-if-candidate", "-promote"]),
        (Some(0), false)
    );
    assert_eq!(run_on(&replica, &["-promote"]), (Some(1), false));
    assert_eq!(run_on(&a, &["-if-candidate"]), (Some(0), true));
    assert!(a.is_primary());

    // Not even when it is handed the lease: that goes back to one that may have it.
    let log = a.log();
    let connected = log.rsplit_once("a replica has connected replica=\"");
    let id = &connected.expect("it is connected").1[..16];
    a.http_post(&format!("/handoff?nodeID={id}"))
        .expect("the order is obeyed");
    let said = || replica.log().contains("which is no candidate");
    wait_until("the lease to be given up", SOON, || {
        if said() { Ok(()) } else { Err("not yet") }
    });
    await_primary(&a, ETCD.failover());
    await_following(&replica, &a);

    // Not even when there is no other.
    a.kill9();
    assert_never_primary(&[&replica], ETCD.failover());
    assert_eq!(rows(&replica), 1);
    let refused = sqlite3_fails(&replica.db("a.db"), "INSERT INTO t VALUES (0);");
    assert!(refused.contains("readonly"), "{refused}");
}

#[test]
fn promote_takes_the_lease_over_once() {
    let service = Service::start(ETCD);
    let cluster = Cluster::new(120);
    let a = cluster.start(Options::candidate("a", &lines(&service)));
    await_primary(&a, SOON);
    create(&a);
    for _ in 0..10 {
        sqlite3(&a.db("a.db"), "INSERT INTO t VALUES (randomblob(300000));");
    }
    let keen = format!("  promote: true\n{}", lines(&service));
    let p = cluster.start(Options::candidate("p", &keen));
    await_primary(&p, SOON);
    await_following(&a, &p);
    assert_eq!(rows(&p), 11, "it had caught up");
    insert(&p);
    assert_same(&p, &a, "a.db");
    // Who takes it back means it.
    a.http_post("/promote").expect("promote");
    await_following(&p, &a);
    assert_never_primary(&[&p], Duration::from_secs(2));
    assert_same(&a, &p, "a.db");
    assert_nothing_set_aside(&[&a, &p]);
}

#[test]
fn who_was_demoted_leaves_the_lease_alone_for_a_while() {
    let service = Service::start(ETCD);
    let cluster = Cluster::new(60);
    let lines = format!("  demote-delay: 3s\n{}", lines(&service));
    let a = cluster.start(Options::candidate("a", &lines));
    await_primary(&a, SOON);
    create(&a);
    let start = Instant::now();
    a.http_post("/demote").expect("demote");
    assert!(!a.is_primary());
    let refused = a.http_post("/demote").unwrap_err();
    assert!(refused.contains("not the primary"), "{refused}");
    assert_never_primary(&[&a], Duration::from_millis(2_800));
    await_primary(&a, SOON);
    let took = start.elapsed();
    println!("primary again after {took:?}");
    assert!(
        (3_000..5_000).contains(&took.as_millis()),
        "primary again after {took:?}"
    );
    insert(&a);
}

/// How many snapshots a node has sent since it was started.
fn snapshots_sent(node: &Node) -> usize {
    let metrics = node.http_get("/metrics").expect("/metrics");
    assert!(metrics.contains("litefs_http_frame_send_count{"));
    let sent = metrics
        .lines()
        .filter(|l| l.starts_with("litefs_http_frame_send_count{") && l.contains("ltx:snapshot"));
    sent.filter_map(|line| line.rsplit(' ').next()?.parse::<usize>().ok())
        .sum()
}

#[test]
fn a_cluster_changes_from_static_to_consul_to_etcd() {
    let services = [Kind::Consul, Kind::Etcd].map(|kind| (kind, Service::start(kind)));
    let cluster = Cluster::new(150);
    let options = Options::primary("a");
    let replica = Options::replica("b", &options);
    let mut a = cluster.start(options);
    create(&a);
    let mut b = cluster.start(replica);
    wait_same_pos(&a, &b, "a.db");
    let mut written = 1;
    for (kind, service) in &services {
        for node in [&mut b, &mut a] {
            assert_eq!(node.stop(), Some(0));
            node.options.service = Some(kind.lines(service.address(), "tenure/test"));
        }
        a.start();
        b.start();
        wait_until("a primary", kind.failover() + SOON, || {
            match a.is_primary() || b.is_primary() {
                true => Ok(()),
                false => Err("none"),
            }
        });
        let (first, second) = if a.is_primary() { (&a, &b) } else { (&b, &a) };
        await_following(second, first);
        insert(first);
        assert_same(first, second, "a.db");
        second.http_post("/promote").expect("hand over");
        await_following(first, second);
        insert(second);
        assert_same(second, first, "a.db");
        written += 2;
        for node in [&a, &b] {
            assert_eq!(rows(node), written, "{} with {kind:?}", node.options.name);
            let name = &node.options.name;
            assert_eq!(snapshots_sent(node), 0, "{name} with {kind:?}");
        }
        assert_nothing_set_aside(&[&a, &b]);
    }
}

/// The LTX files in a directory, by name.
fn ltx_files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).expect("what was set aside");
    let mut files: Vec<PathBuf> = entries.map(|e| e.expect("an entry").path()).collect();
    files.sort();
    files
}

#[test]
fn an_old_primary_reports_what_it_sets_aside() {
    let bed = Bed::new(["a", "b"]);
    let [a, b] = &bed.nodes;
    let mut events = Events::of(a);
    let shared = a.txid("a.db");
    bed.net.cut(0, Link::Peers);
    bed.net.cut(0, Link::Service);
    // Acknowledged while its lease lasts, and known to nobody else.
    let mut alone = 0;
    for n in 1.. {
        let sql = format!("INSERT INTO t VALUES ('alone {n}');");
        if !sqlite3_raw(&a.db("a.db"), &sql, true).success() {
            break;
        }
        alone = n;
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(alone > 3, "{alone}");
    await_primary(b, ETCD.failover() + SOON);
    insert(b);
    bed.net.heal(0, Link::Peers);
    bed.net.heal(0, Link::Service);

    let event = events.next("divergent");
    await_following(a, b);
    assert_same(b, a, "a.db");
    assert_eq!(rows(a), 2);
    let (min, max) = (shared + 1, shared + alone);
    for part in [
        "\"db\":\"a.db\"".to_string(),
        format!("\"minTXID\":\"{min:016x}\",\"maxTXID\":\"{max:016x}\""),
    ] {
        assert!(event.contains(&part), "{part} in {event}");
    }
    let path = event.split("\"path\":\"").nth(1).expect("a path");
    let path = Path::new(path.split('"').next().expect("its end"));
    assert!(path.starts_with(a.data().join("divergent/a.db")), "{event}");
    let counted = a.metric("tenure_divergent_transactions_total");
    assert_eq!(counted, alone as f64);
    assert_eq!(b.metric_or_0("tenure_divergent_transactions_total"), 0.0);
    let log = a.log();
    let line = log.lines().find(|l| l.contains("they are set aside"));
    let line = line.expect("a line of the log");
    for part in [
        path.to_str().expect("text"),
        &format!("{min:016x}"),
        &format!("{max:016x}"),
    ] {
        assert!(line.contains(part), "{part} in {line}");
    }

    let files = ltx_files(path);
    assert_eq!(files.len() as u64, alone, "a file a transaction");
    for (file, txid) in files.iter().zip(min..) {
        let name = format!("{txid:016x}-{txid:016x}.ltx");
        assert_eq!(file.file_name(), Some(name.as_ref()));
    }
    let mut verify = Command::new(TENURE);
    let done = run(verify.args(["ltx", "verify"]).args(&files), b"", SOON);
    assert!(done.success(), "{}{}", done.text(), done.stderr);
    let mut list = Command::new(TENURE);
    let done = run(list.args(["ltx", "list"]).arg(path), b"", SOON);
    assert!(done.success(), "{}", done.stderr);
    assert!(
        done.text().contains(&format!("{max:016x}")),
        "{}",
        done.text()
    );
}
