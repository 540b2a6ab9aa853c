//! Each file in `config-examples/` is started, as it is but for directories and addresses.

mod common;

use std::path::Path;
use std::process::Command;

use common::access::Secure;
use common::node::free_address;
use common::run::run;
use common::service::{Kind, Service};
use common::{Cluster, Node, Options, SOON, sqlite3, wait_same_pos, wait_until};
use tenure_test_services::tls::Identity;

const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/config-examples");

/// A node that runs with an example; `changes` are made to its text, each of which must fit.
fn example(cluster: &Cluster, name: &str, http: &str, changes: &[(&str, &str)]) -> Node {
    let path = Path::new(EXAMPLES).join(format!("{name}.yml"));
    let mut text = std::fs::read_to_string(&path).expect("the example");
    let dir = cluster.subdir(name).canonicalize().unwrap();
    let mount = format!("dir: {}", dir.join("mnt").display());
    let data = dir.join("data").display().to_string();
    let directories = [("dir: /litefs", &*mount), ("/var/lib/litefs", &*data)];
    for (from, to) in directories.iter().chain(changes) {
        assert!(text.contains(from), "{name}.yml does not say {from}");
        text = text.replace(from, to);
    }
    cluster.node(Options {
        http: http.to_owned(),
        file: Some(text),
        ..Options::primary(name)
    })
}

/// It becomes primary, and writes.
fn assert_writes(node: &mut Node) {
    wait_until("a primary", SOON, || {
        if node.is_primary() {
            Ok(())
        } else {
            Err(node.log())
        }
    });
    let sql = "CREATE TABLE t (x); INSERT INTO t VALUES (1); SELECT x FROM t;";
    assert_eq!(sqlite3(&node.db("a.db"), sql), "1\n");
}

#[test]
fn single_node() {
    let cluster = Cluster::new(60);
    // It says nothing of addresses: a port of its own is all that is added.
    let http = free_address();
    let section = format!("http: {{addr: \"{http}\"}}\nfuse:\n");
    let mut node = example(&cluster, "single-node", &http, &[("fuse:\n", &section)]);
    node.start();
    assert_writes(&mut node);
    assert_eq!(node.stop(), Some(0));
}

#[test]
fn static_primary_and_replica() {
    let cluster = Cluster::new(60);
    let (http, replica_http) = (free_address(), free_address());
    let url = format!("http://{http}");
    let changes = |http: &str| {
        [
            ("\":20202\"".to_owned(), format!("\"{http}\"")),
            ("http://primary:20202".to_owned(), url.clone()),
        ]
    };
    let start = |name: &str, http: &str| {
        let changes = changes(http);
        let changes: Vec<_> = changes.iter().map(|(a, b)| (&**a, &**b)).collect();
        let mut node = example(&cluster, name, http, &changes);
        node.start();
        node
    };
    let mut primary = start("static-primary", &http);
    let mut replica = start("static-replica", &replica_http);
    assert_writes(&mut primary);
    wait_same_pos(&primary, &replica, "a.db");
    assert_eq!(sqlite3(&replica.db("a.db"), "SELECT x FROM t;"), "1\n");
    let named = std::fs::read_to_string(replica.db(".primary")).unwrap();
    assert_eq!(named, "primary\n");
    assert_eq!(replica.stop(), Some(0));
    assert_eq!(primary.stop(), Some(0));
}

#[test]
fn secure_primary_and_replica() {
    let cluster = Cluster::new(60);
    let etc = cluster.dir().join("etc");
    // Each has an address of its own, and so a certificate.
    let hosts = ["127.0.0.1", "127.0.0.2"];
    let mut make = Command::new(Path::new(EXAMPLES).join("make-certificates"));
    let made = run(make.arg(&etc).args(hosts), b"", SOON);
    assert!(made.success(), "{}", made.stderr);
    let addresses = hosts.map(|host| free_address().replace("127.0.0.1", host));
    let url = format!("https://{}", addresses[0]);
    let start = |name: &str, at: usize| {
        let file = |end: &str| {
            etc.join(format!("{}.{end}", hosts[at]))
                .display()
                .to_string()
        };
        let (cert, key) = (file("pem"), file("key"));
        let short = name.trim_start_matches("secure-");
        let changes = [
            (format!("/etc/tenure/{short}.pem"), cert.clone()),
            (format!("/etc/tenure/{short}.key"), key.clone()),
            ("/etc/tenure".to_owned(), etc.display().to_string()),
            ("\":20202\"".to_owned(), format!("\"{}\"", addresses[at])),
            ("https://primary:20202".to_owned(), url.clone()),
        ];
        let changes: Vec<_> = changes.iter().map(|(a, b)| (&**a, &**b)).collect();
        let mut node = example(&cluster, name, &addresses[at], &changes);
        let token = std::fs::read_to_string(etc.join("token")).unwrap();
        node.options.secure = Some(Secure {
            lines: String::new(),
            tls: Some(Identity {
                ca: etc.join("ca.pem"),
                cert: cert.into(),
                key: key.into(),
            }),
            token: Some(token.trim().to_owned()),
        });
        node.start();
        node
    };
    let mut primary = start("secure-primary", 0);
    let mut replica = start("secure-replica", 1);
    assert_writes(&mut primary);
    wait_same_pos(&primary, &replica, "a.db");
    assert_eq!(sqlite3(&replica.db("a.db"), "SELECT x FROM t;"), "1\n");
    for node in [&mut replica, &mut primary] {
        let log = node.log();
        assert!(!log.contains("WARNING"), "{log}");
        assert_eq!(node.stop(), Some(0));
    }
}

fn with_service(kind: Kind, name: &str, usual: &str) {
    let service = Service::start(kind);
    let cluster = Cluster::new(90);
    let http = free_address();
    let (url, at) = (
        format!("http://{http}"),
        format!("http://{}", service.address()),
    );
    let changes = [
        ("\":20202\"", format!("\"{http}\"")),
        ("http://${HOSTNAME}:20202", url),
        (usual, at),
    ];
    let changes: Vec<_> = changes.iter().map(|(a, b)| (*a, &**b)).collect();
    let mut node = example(&cluster, name, &http, &changes);
    node.start();
    assert_writes(&mut node);
    assert_eq!(node.stop(), Some(0));
}

#[test]
fn consul() {
    with_service(Kind::Consul, "consul", "http://localhost:8500");
}

#[test]
fn etcd() {
    with_service(Kind::Etcd, "etcd", "http://localhost:2379");
}

#[test]
fn proxy_with_its_application() {
    let cluster = Cluster::new(90);
    let (http, proxy, app) = (free_address(), free_address(), free_address());
    let app_port = app.rsplit(':').next().unwrap();
    let mount = cluster.subdir("proxy").canonicalize().unwrap().join("mnt");
    let command = format!(
        "python3 {EXAMPLES}/proxy-app.py {}/app.db {app_port}",
        mount.display()
    );
    let changes = [
        ("\":20202\"", format!("\"{http}\"")),
        ("http://primary:20202", format!("http://{http}")),
        ("\":8080\"", format!("\"{proxy}\"")),
        ("\"localhost:8081\"", format!("\"{app}\"")),
        ("python3 proxy-app.py /litefs/app.db 8081", command),
    ];
    let changes: Vec<_> = changes.iter().map(|(a, b)| (*a, &**b)).collect();
    let mut node = example(&cluster, "proxy", &http, &changes);
    node.start();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (added, notes) = runtime.block_on(async {
        let client = reqwest::Client::builder().no_proxy().timeout(SOON);
        let client = client.build().unwrap();
        let url = format!("http://{proxy}/notes");
        let added = client.post(&url).body("text=hello").send().await.unwrap();
        let notes = client.get(&url).send().await.unwrap();
        (added.status(), notes.text().await.unwrap())
    });
    assert_eq!(added, 201, "{}", node.log());
    assert_eq!(notes, "hello\n");
    assert_eq!(
        sqlite3(&node.db("app.db"), "SELECT text FROM notes;"),
        "hello\n"
    );
    assert_eq!(node.stop(), Some(0), "{}", node.log());
    assert!(
        std::net::TcpStream::connect(&app).is_err(),
        "the application still runs"
    );
}

#[test]
fn there_is_no_other_example() {
    let mut names: Vec<_> = std::fs::read_dir(EXAMPLES)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".yml"))
        .collect();
    names.sort();
    let tested = [
        "consul",
        "etcd",
        "proxy",
        "secure-primary",
        "secure-replica",
        "single-node",
        "static-primary",
        "static-replica",
    ];
    assert_eq!(names, tested.map(|name| format!("{name}.yml")));
}
