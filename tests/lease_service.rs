//! What can be wrong with a lease service, with whole nodes and real etcd and Consul: it is not
//! there, it refuses, something else answers or has the key, another cluster has it, it is slow or
//! silent. A node runs and serves reads all the while, says what is wrong and what to change, but
//! not again and again, and goes on by itself once that is put right.

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::service::{Kind, Service};
use common::sql::sqlite3_fails;
use common::{
    Cluster, Node, Options, SOON, await_following, await_primary, sqlite3, wait_same_pos,
    wait_until,
};
use tenure_test_services::consul::{Acl, Consul, ConsulOptions};
use tenure_test_services::etcd::{Etcd, EtcdOptions};
use tenure_test_services::proxy::{Fault, Proxy};

const KEY: &str = "tenure/test";

/// How often a line of one kind may come in an outage of a few seconds.
const MOST: usize = 3;

/// What a node has logged after the first `mark` bytes.
fn log_after(node: &Node, mark: usize) -> String {
    node.log().split_off(mark)
}

/// Waits for a line that has all of `parts`.
fn await_line(node: &Node, mark: usize, parts: &[&str]) {
    let what = format!("a line of {} with {parts:?}", node.options.name);
    wait_until(&what, SOON, || {
        let log = log_after(node, mark);
        let has_all = |line: &str| parts.iter().all(|part| line.contains(part));
        match log.lines().any(has_all) {
            true => Ok(()),
            false => Err(log),
        }
    });
}

/// What a node says in trouble, it does not say again and again: lines count as of one kind when
/// they begin with the same words.
fn assert_quiet(node: &Node, mark: usize) {
    let log = log_after(node, mark);
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for line in log.lines() {
        let words = line.split_whitespace();
        // The first word is the time.
        let kind: Vec<&str> = words.skip(1).take(5).collect();
        *kinds.entry(kind.join(" ")).or_default() += 1;
    }
    for (kind, count) in kinds {
        let name = &node.options.name;
        assert!(count <= MOST, "{name} says {count} times {kind:?}:\n{log}");
    }
}

fn rows(node: &Node) -> String {
    sqlite3(&node.db("a.db"), "SELECT count(*) FROM t;")
}

fn assert_refuses_writes(node: &Node) {
    let refused = sqlite3_fails(&node.db("a.db"), "INSERT INTO t VALUES (0);");
    assert!(refused.contains("readonly"), "{refused}");
}

fn create(node: &Node) {
    let sql = "PRAGMA journal_mode=wal; CREATE TABLE t (x); INSERT INTO t VALUES (1);";
    sqlite3(&node.db("a.db"), sql);
}

/// A primary `a`, which has data, and its replica `b`.
fn pair(cluster: &Cluster, a: Options, b: Options) -> (Node, Node) {
    let a = cluster.start(a);
    await_primary(&a, SOON);
    create(&a);
    let b = cluster.start(b);
    await_following(&b, &a);
    wait_same_pos(&a, &b, "a.db");
    (a, b)
}

fn starts_before_its_service(kind: Kind) {
    let service = Service::start(kind);
    let cluster = Cluster::new(120);
    let options = |name| Options::candidate(name, &kind.lines(service.address(), KEY));
    let (mut a, mut b) = pair(&cluster, options("a"), options("b"));
    for node in [&mut b, &mut a] {
        assert_eq!(node.stop(), Some(0));
    }
    service.kill();
    let marks = [a.log().len(), b.log().len()];
    a.start();
    b.start();
    let address = service.address().to_string();
    for (node, mark) in [&a, &b].into_iter().zip(marks) {
        assert_eq!(rows(node), "1\n", "what it has can be read");
        assert_refuses_writes(node);
        await_line(node, mark, &["cannot ask the lease service", KEY, &address]);
    }
    std::thread::sleep(Duration::from_secs(2));
    for (node, mark) in [&a, &b].into_iter().zip(marks) {
        assert!(!node.is_primary());
        let log = log_after(node, mark);
        let said = log.matches("cannot ask the lease service").count();
        assert_eq!(said, 1, "{log}");
        assert_quiet(node, mark);
    }
    service.start_again();
    wait_until("a primary", kind.failover() + SOON, || {
        match a.is_primary() || b.is_primary() {
            true => Ok(()),
            false => Err("none"),
        }
    });
    let (primary, replica) = if a.is_primary() { (&a, &b) } else { (&b, &a) };
    await_following(replica, primary);
    sqlite3(&primary.db("a.db"), "INSERT INTO t VALUES (2);");
    common::assert_same(primary, replica, "a.db");
    assert_eq!(rows(replica), "2\n");
}

#[test]
fn nodes_start_before_etcd() {
    starts_before_its_service(Kind::Etcd);
}

#[test]
fn nodes_start_before_consul() {
    starts_before_its_service(Kind::Consul);
}

/// A node with these lines of `lease` says a line with all of `parts`, is no primary, and becomes
/// one once somebody has put it right.
fn fails_until_put_right(lines: &str, parts: &[&str], put_right: impl FnOnce()) {
    let cluster = Cluster::new(90);
    let mut node = cluster.start(Options::candidate("a", lines));
    await_line(&node, 0, parts);
    std::thread::sleep(Duration::from_millis(1500));
    assert!(node.is_up() && !node.is_primary());
    assert_quiet(&node, 0);
    put_right();
    await_primary(&node, SOON);
    create(&node);
    assert_eq!(rows(&node), "1\n");
    assert!(node.is_up(), "it is the process that was started");
}

#[test]
fn a_wrong_password_of_etcd() {
    let etcd = Etcd::start_with(EtcdOptions {
        auth: Some(("tenure".into(), "right".into())),
        prefix: "tenure/".into(),
        ..EtcdOptions::default()
    });
    let mut lines = Kind::Etcd.lines(etcd.address(), KEY);
    lines += "    username: tenure\n    password: mistaken\n";
    let parts = [
        KEY,
        "invalid user ID or password",
        "lease.etcd.username",
        "lease.etcd.password",
    ];
    fails_until_put_right(&lines, &parts, || {
        // `user passwd` would ask on a terminal.
        etcd.ctl(&["user", "delete", "tenure"]);
        etcd.ctl(&["user", "add", "tenure:mistaken"]);
        etcd.ctl(&["user", "grant-role", "tenure", "tenure"]);
    });
}

#[test]
fn no_password_where_etcd_wants_one() {
    let etcd = Etcd::start_with(EtcdOptions {
        auth: Some(("tenure".into(), "right".into())),
        ..EtcdOptions::default()
    });
    let lines = Kind::Etcd.lines(etcd.address(), KEY);
    let parts = [KEY, "lease.etcd.username", "lease.etcd.password"];
    fails_until_put_right(&lines, &parts, || {
        etcd.ctl(&["auth", "disable"]);
    });
}

#[test]
fn a_wrong_token_of_consul() {
    const TOKEN: &str = "5ec12e70-0000-4000-8000-0000000fa15e";
    let consul = Consul::start_with(ConsulOptions {
        acl: Some(Acl {
            key_prefix: "tenure/".into(),
            node: None,
        }),
        ..ConsulOptions::default()
    });
    let address = format!(":{TOKEN}@{}", consul.address());
    let parts = [KEY, "the token (the password in lease.consul.url) must be"];
    fails_until_put_right(&Kind::Consul.lines(address, KEY), &parts, || {
        let token = format!(r#"{{"SecretID":"{TOKEN}","Policies":[{{"Name":"limited"}}]}}"#);
        let (status, answer) = consul.request("PUT", "/v1/acl/token", &token);
        assert_eq!(status, 200, "{answer}");
    });
}

/// Something else that listens where the service should be, until it is dropped.
struct Impostor {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Impostor {
    /// Takes connections, and says the same to everybody; nothing: it is silent.
    fn start(address: SocketAddr, says: &'static str) -> Impostor {
        let listener = TcpListener::bind(address).expect("the service's port is free");
        listener.set_nonblocking(true).expect("not to block");
        let over = Arc::new(AtomicBool::new(false));
        let seen = over.clone();
        let thread = std::thread::spawn(move || {
            let mut silent = Vec::new();
            while !seen.load(Ordering::SeqCst) {
                match listener.accept() {
                    Ok((connection, _)) if says.is_empty() => silent.push(connection),
                    Ok((connection, _)) => answer(connection, says),
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        });
        Impostor {
            over,
            thread: Some(thread),
        }
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the impostor");
        }
    }
}

/// Answers one request as a web server does, and hangs up.
fn answer(mut connection: TcpStream, says: &str) {
    let limit = Some(Duration::from_secs(1));
    let mut request = [0; 4096];
    let mut answer = || -> std::io::Result<()> {
        connection.set_nonblocking(false)?;
        connection.set_read_timeout(limit)?;
        connection.set_write_timeout(limit)?;
        let _ = connection.read(&mut request)?;
        connection.write_all(says.as_bytes())
    };
    // Who asked may be gone: that is its business.
    let _ = answer();
}

const WEB_SERVER: &str =
    "HTTP/1.1 404 Not Found\r\nContent-Length: 10\r\nConnection: close\r\n\r\nNot found\n";

/// The address is wrong: it is that of an impostor.
fn wrong_address(kind: Kind, says: &'static str, text: &str) {
    let service = Service::start(kind);
    let address = service.address();
    service.kill();
    let impostor = Impostor::start(address, says);
    let at = address.to_string();
    let parts = ["cannot ask the lease service", KEY, &at, text];
    fails_until_put_right(&kind.lines(address, KEY), &parts, || {
        drop(impostor);
        service.start_again();
    });
}

#[test]
fn a_web_server_at_the_address_of_etcd() {
    wrong_address(Kind::Etcd, WEB_SERVER, "lease.etcd.endpoints");
}

#[test]
fn a_web_server_at_the_address_of_consul() {
    wrong_address(Kind::Consul, WEB_SERVER, "is this Consul's HTTP API?");
}

#[test]
fn silence_at_the_address_of_etcd() {
    wrong_address(Kind::Etcd, "", "no answer within");
}

#[test]
fn silence_at_the_address_of_consul() {
    wrong_address(Kind::Consul, "", "no answer within");
}

#[test]
fn something_else_has_the_key_in_etcd() {
    let etcd = Etcd::start();
    etcd.ctl(&["put", KEY, "a setting"]);
    let lines = Kind::Etcd.lines(etcd.address(), KEY);
    let parts = [KEY, "something else uses this key", "lease.etcd.key"];
    fails_until_put_right(&lines, &parts, || {
        assert_eq!(
            etcd.ctl(&["get", KEY, "--print-value-only"]),
            "a setting\n",
            "it is not written over"
        );
        etcd.ctl(&["del", KEY]);
    });
}

#[test]
fn something_else_has_the_key_in_consul() {
    let consul = Consul::start();
    let path = format!("/v1/kv/{KEY}");
    consul.request("PUT", &path, "a setting");
    let lines = Kind::Consul.lines(consul.address(), KEY);
    let parts = [KEY, "something else uses this key", "lease.consul.key"];
    fails_until_put_right(&lines, &parts, || {
        let kept = consul.request("GET", &format!("{path}?raw"), "");
        assert_eq!(kept, (200, "a setting".into()), "it is not written over");
        consul.request("DELETE", &path, "");
    });
}

#[test]
fn two_clusters_on_one_key() {
    let kind = Kind::Etcd;
    let service = Service::start(kind);
    let cluster = Cluster::new(120);
    let options = |name, key: &str| Options::candidate(name, &kind.lines(service.address(), key));
    let mut nodes = ["a", "x"].map(|name| {
        // A cluster of its own for each at first.
        let node = cluster.start(options(name, &format!("tenure/{name}")));
        await_primary(&node, SOON);
        for db in ["same.db", &format!("{name}.db")] {
            let sql = format!("CREATE TABLE t (x); INSERT INTO t VALUES ('{name}');");
            sqlite3(&node.db(db), &sql);
        }
        node
    });
    let ids = [&nodes[0], &nodes[1]].map(|node| {
        let id = std::fs::read_to_string(node.data().join("clusterid"));
        id.expect("the cluster's ID").trim().to_string()
    });
    assert_ne!(ids[0], ids[1]);
    let [a, x] = &mut nodes;
    assert_eq!(x.stop(), Some(0));
    x.options = Options {
        http: x.options.http.clone(),
        ..options("x", "tenure/a")
    };
    let mark = x.log().len();
    x.start();
    let before = x.pos("same.db");
    await_line(x, mark, &[&ids[0], &ids[1]]);
    // Neither while there is a primary nor when there is none.
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end {
        assert!(!x.is_primary() && !x.db(".primary").exists());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(a.stop(), Some(0));
    let end = Instant::now() + kind.failover();
    while Instant::now() < end {
        assert!(!x.is_primary(), "primary of another cluster");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_quiet(x, mark);
    assert_eq!(x.pos("same.db"), before);
    assert_eq!(sqlite3(&x.db("same.db"), "SELECT x FROM t;"), "x\n");
    assert_eq!(sqlite3(&x.db("x.db"), "SELECT x FROM t;"), "x\n");
    a.start();
    await_primary(a, SOON);
    assert_eq!(sqlite3(&a.db("same.db"), "SELECT x FROM t;"), "a\n");
    assert!(!a.db("x.db").exists(), "nothing of the other cluster");
    // With its own key it is what it was.
    assert_eq!(x.stop(), Some(0));
    x.options.service = Some(kind.lines(service.address(), "tenure/x"));
    x.start();
    await_primary(x, SOON);
    sqlite3(&x.db("same.db"), "INSERT INTO t VALUES ('y');");
}

/// Each node reaches the service through a proxy of its own.
fn slow_service(kind: Kind, delay: Duration) {
    let service = Service::start(kind);
    let proxies = [(); 2].map(|()| Proxy::start(service.address()));
    let cluster = Cluster::new(150);
    let options = |i: usize, name| Options::candidate(name, &kind.lines(proxies[i].addr(), KEY));
    let (a, b) = pair(&cluster, options(0, "a"), options(1, "b"));

    for proxy in &proxies {
        proxy.set(Fault::Delay(delay));
    }
    // Some renewals long.
    let end = Instant::now() + kind.ttl() + Duration::from_secs(2);
    let mut written = 1;
    while Instant::now() < end {
        sqlite3(&a.db("a.db"), "INSERT INTO t VALUES (2);");
        written += 1;
        assert!(a.is_primary() && !b.is_primary(), "the primary stays");
        std::thread::sleep(Duration::from_millis(100));
    }
    common::assert_same(&a, &b, "a.db");
    for proxy in &proxies {
        proxy.set(Fault::None);
    }

    // The primary's way to the service alone.
    let start = Instant::now();
    let mark = a.log().len();
    proxies[0].set(Fault::Stall);
    await_primary(&b, kind.failover());
    let took = start.elapsed();
    assert!(!a.is_primary());
    println!("{kind:?}: {took:?} from the primary's stall to the next one");
    sqlite3(&b.db("a.db"), "INSERT INTO t VALUES (3);");
    assert_refuses_writes(&a);
    proxies[0].set(Fault::None);
    await_following(&a, &b);
    common::assert_same(&b, &a, "a.db");
    assert_eq!(rows(&a), format!("{}\n", written + 1), "nothing is lost");
    assert!(!a.data().join("divergent").exists());
    await_line(&a, mark, &["the lease is lost"]);
    assert_quiet(&a, mark);
}

#[test]
fn a_slow_etcd() {
    slow_service(Kind::Etcd, Duration::from_millis(100));
}

#[test]
fn a_slow_consul() {
    slow_service(Kind::Consul, Duration::from_millis(200));
}

/// Both nodes lose the service for some seconds, in every way.
#[test]
fn outages_are_not_logged_again_and_again() {
    let kind = Kind::Etcd;
    let service = Service::start(kind);
    let proxy = Proxy::start(service.address());
    let cluster = Cluster::new(120);
    let options = |name| Options::candidate(name, &kind.lines(proxy.addr(), KEY));
    let (a, b) = pair(&cluster, options("a"), options("b"));
    for fault in [Fault::Refuse, Fault::Cut, Fault::Stall] {
        let marks = [a.log().len(), b.log().len()];
        proxy.set(fault);
        std::thread::sleep(Duration::from_secs(5));
        for (node, mark) in [&a, &b].into_iter().zip(marks) {
            println!(
                "{fault:?}: {}\n{}",
                node.options.name,
                log_after(node, mark)
            );
            assert_quiet(node, mark);
            assert!(!node.is_primary());
        }
        proxy.set(Fault::None);
        wait_until("a primary", kind.failover() + SOON, || {
            let (primary, replica) = match (a.is_primary(), b.is_primary()) {
                (true, false) => (&a, &b),
                (false, true) => (&b, &a),
                other => return Err(format!("{other:?}")),
            };
            match std::fs::read_to_string(replica.db(".primary")) {
                Ok(name) if name.trim() == primary.options.name => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
    }
}
