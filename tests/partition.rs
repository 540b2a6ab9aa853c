//! Two candidates under load while the lease service, a node, or the network between them fails:
//! there is never a second primary that acknowledges, and what was acknowledged is kept, or was set
//! aside and reported. Nodes live in network namespaces; a link that is cut drops packets.

mod common;

use std::path::PathBuf;
use std::time::Duration;

use common::net::{Link, Net, SERVICE};
use common::service::{Kind, Service};
use common::workload::{self, Outcome, Workload};
use common::{Cluster, Node, Options, SOON, wait_same_pos, wait_until};

/// Two candidates, `nodes[0]` the primary, with clients that write.
struct Bed {
    load: Option<Workload>,
    // Dropped in this order: nodes, service, network.
    nodes: Vec<Node>,
    _cluster: Cluster,
    service: Service,
    net: Net,
    kind: Kind,
}

impl Bed {
    fn new(kind: Kind, mode: &str) -> Bed {
        Self::with(kind, mode, |lines| lines)
    }

    /// The same, with the lines of `lease` changed.
    fn with(kind: Kind, mode: &str, change: fn(String) -> String) -> Bed {
        let net = Net::new(2);
        let service = net
            .service
            .run(|| Service::start_at(kind, SERVICE.parse().expect("an address")));
        let cluster = Cluster::new(240);
        let lines = change(kind.lines(service.address(), "tenure/test"));
        let mut nodes = Vec::new();
        for (i, name) in ["a", "b"].into_iter().enumerate() {
            let options = Options {
                http: format!("{}:20202", net.address(i)),
                namespace: Some(net.member(i)),
                uncompressed: true,
                ..Options::candidate(name, &lines)
            };
            nodes.push(cluster.start(options));
            if i == 0 {
                wait_until("the first primary", SOON, || match nodes[0].is_primary() {
                    true => Ok(()),
                    false => Err("none"),
                });
                workload::create(&nodes[0].db(workload::DB), mode);
            }
        }
        wait_same_pos(&nodes[0], &nodes[1], workload::DB);
        let mounts: Vec<PathBuf> = nodes.iter().map(Node::mount).collect();
        let load = Workload::start(3, &mounts);
        load.wait_for(50, SOON);
        Bed {
            load: Some(load),
            nodes,
            _cluster: cluster,
            service,
            net,
            kind,
        }
    }

    fn load(&self) -> &Workload {
        self.load.as_ref().expect("runs until the end")
    }

    /// Waits until a node acknowledges writes, and a few more.
    fn await_writes_at(&self, node: usize) {
        let before = self.load().last_by_node().get(&node).copied();
        let limit = self.kind.failover() + SOON;
        wait_until(&format!("writes at node {node}"), limit, || {
            let last = self.load().last_by_node().get(&node).copied();
            if last > before { Ok(()) } else { Err(last) }
        });
        self.load().wait_for(20, SOON);
    }

    /// Nobody acknowledges anything for this long.
    fn assert_no_writes(&self, long: Duration) {
        let before = self.load().acked();
        std::thread::sleep(long);
        assert_eq!(self.load().acked(), before, "acknowledged without a lease");
    }

    /// Stops the clients once writes go on, waits until both nodes are the same, and checks.
    fn finish(mut self) -> Outcome {
        self.load().wait_for(20, self.kind.failover() + SOON);
        let acked = self.load.take().expect("runs until now").stop();
        let (a, b) = (&self.nodes[0], &self.nodes[1]);
        wait_same_pos(a, b, workload::DB);
        let data = [a.data(), b.data()];
        let outcome = workload::check(&acked, &a.db(workload::DB), &data);
        common::assert_same(a, b, workload::DB);
        let reported: f64 = [a, b]
            .map(|n| n.metric_or_0("tenure_divergent_transactions_total"))
            .iter()
            .sum();
        println!(
            "{:?}: {outcome:?}, {reported} transactions set aside",
            self.kind
        );
        assert!(
            reported >= outcome.set_aside as f64,
            "what is set aside is counted: {reported}"
        );
        let logged = [a, b].iter().any(|n| n.log().contains("divergent"));
        assert!(
            outcome.set_aside == 0 || logged,
            "what is set aside is logged"
        );
        outcome
    }
}

fn service_is_frozen(kind: Kind) {
    let bed = Bed::new(kind, "wal");
    bed.service.freeze(true);
    // The lease counts from before its last renewal was sent; then nobody may write.
    std::thread::sleep(kind.ttl());
    bed.assert_no_writes(Duration::from_secs(2));
    assert!(!bed.nodes[0].is_primary() && !bed.nodes[1].is_primary());
    bed.service.freeze(false);
    assert_eq!(bed.finish().set_aside, 0);
}

#[test]
fn etcd_is_frozen() {
    service_is_frozen(Kind::Etcd);
}

#[test]
fn consul_is_frozen() {
    service_is_frozen(Kind::Consul);
}

fn service_is_killed(kind: Kind) {
    let bed = Bed::new(kind, "delete");
    bed.service.kill();
    std::thread::sleep(kind.ttl());
    bed.assert_no_writes(Duration::from_secs(1));
    bed.net.service.run(|| bed.service.start_again());
    assert_eq!(bed.finish().set_aside, 0);
}

#[test]
fn etcd_is_killed_and_comes_back() {
    service_is_killed(Kind::Etcd);
}

#[test]
fn consul_is_killed_and_comes_back() {
    service_is_killed(Kind::Consul);
}

/// A short outage is none: the primary stays.
#[test]
fn etcd_is_away_for_a_moment() {
    // It takes seconds to be back on a machine that is busy.
    let bed = Bed::with(Kind::Etcd, "wal", |lines| {
        lines.replace("ttl: 3s", "ttl: 15s")
    });
    for _ in 0..3 {
        bed.service.kill();
        bed.net.service.run(|| bed.service.start_again());
        bed.load().wait_for(20, SOON);
    }
    assert!(bed.nodes[0].is_primary());
    assert_eq!(bed.finish().set_aside, 0);
}

/// The primary is stopped in the middle of whatever it does for longer than its lease lasts.
fn primary_is_frozen(kind: Kind, mode: &str) {
    let bed = Bed::new(kind, mode);
    for (frozen, other) in [(0, 1), (1, 0)] {
        bed.nodes[frozen].freeze(true);
        bed.await_writes_at(other);
        bed.nodes[frozen].freeze(false);
        bed.load().wait_for(20, SOON);
    }
    bed.finish();
}

#[test]
fn the_primary_is_frozen_with_etcd() {
    primary_is_frozen(Kind::Etcd, "wal");
}

#[test]
fn the_primary_is_frozen_with_etcd_in_a_rollback_mode() {
    primary_is_frozen(Kind::Etcd, "truncate");
}

#[test]
fn the_primary_is_frozen_with_consul() {
    primary_is_frozen(Kind::Consul, "delete");
}

/// The primary loses some of its links; the other takes over if the service is among them.
fn primary_is_cut_off(kind: Kind, mode: &str, links: &[Link]) -> Outcome {
    let bed = Bed::new(kind, mode);
    for link in links {
        bed.net.cut(0, *link);
    }
    if links.contains(&Link::Service) {
        bed.await_writes_at(1);
        assert!(!bed.nodes[0].is_primary());
    } else {
        // Longer than a stream may be silent.
        std::thread::sleep(Duration::from_secs(7));
        assert!(bed.nodes[0].is_primary() && !bed.nodes[1].is_primary());
    }
    for link in links {
        bed.net.heal(0, *link);
    }
    bed.finish()
}

#[test]
fn the_primary_is_cut_off_from_etcd() {
    primary_is_cut_off(Kind::Etcd, "wal", &[Link::Service]);
}

#[test]
fn the_primary_is_cut_off_from_consul() {
    primary_is_cut_off(Kind::Consul, "wal", &[Link::Service]);
}

#[test]
fn the_primary_is_cut_off_from_its_replica() {
    let outcome = primary_is_cut_off(Kind::Etcd, "persist", &[Link::Peers]);
    assert_eq!(outcome.set_aside, 0);
}

#[test]
fn the_primary_is_cut_off_from_everything() {
    let outcome = primary_is_cut_off(Kind::Etcd, "delete", &[Link::Peers, Link::Service]);
    // What it acknowledged until its lease was over had no way to the other.
    assert!(outcome.set_aside > 0, "{outcome:?}");
}

#[test]
fn the_primary_is_cut_off_from_everything_with_consul() {
    let outcome = primary_is_cut_off(Kind::Consul, "wal", &[Link::Peers, Link::Service]);
    assert!(outcome.set_aside > 0, "{outcome:?}");
}

/// The primary is killed under load, and comes back with what it could not send.
fn primary_is_killed(kind: Kind, mode: &str) {
    let mut bed = Bed::new(kind, mode);
    for (killed, other) in [(0, 1), (1, 0)] {
        bed.nodes[killed].kill9();
        bed.await_writes_at(other);
        bed.nodes[killed].start();
        bed.load().wait_for(20, SOON);
    }
    bed.finish();
}

#[test]
fn the_primary_is_killed_with_etcd() {
    primary_is_killed(Kind::Etcd, "wal");
}

#[test]
fn the_primary_is_killed_with_etcd_in_a_rollback_mode() {
    primary_is_killed(Kind::Etcd, "delete");
}

#[test]
fn the_primary_is_killed_with_consul() {
    primary_is_killed(Kind::Consul, "wal");
}
