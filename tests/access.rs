//! Who may talk to a node: whole nodes with TLS, certificates and tokens, and those who lack them.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::access::{
    ADMIN_TOKEN, Keys, NODE_TOKEN, READ_TOKEN, Secure, private, request, tls, write_secret,
};
use common::helper::{WRITER_TABLES, Writer, run_script};
use common::node::{TENURE, free_address};
use common::run::{Finished, run};
use common::{
    Cluster, Node, Options, SOON, assert_same, await_following, await_primary, sqlite3,
    wait_same_pos, wait_until,
};
use tenure_test_services::etcd::{Etcd, EtcdOptions};
use tenure_test_services::tls::{Authority, Identity};

helper_test!();

const LIMIT: Duration = Duration::from_secs(60);

/// What no node may ever print.
const SECRETS: [&str; 1] = ["sesame"];

/// Everything that a node says: its log, and what it tells a monitor.
fn assert_no_secrets(nodes: &[&Node]) {
    for node in nodes {
        let mut said = vec![("log", node.log())];
        for path in ["/info", "/metrics", "/debug/vars"] {
            said.push((path, node.http_get(path).unwrap_or_default()));
        }
        for (place, text) in said {
            assert_clean(&format!("{} {place}", node.options.name), &text);
        }
    }
}

fn assert_clean(place: &str, text: &str) {
    for secret in SECRETS {
        let line = text.lines().find(|line| line.contains(secret));
        assert!(line.is_none(), "a secret in {place}: {line:?}");
    }
}

fn tenure(args: &[&str], env: &[(&str, &str)]) -> Finished {
    let mut command = Command::new(TENURE);
    command.args(args).envs(env.iter().copied());
    let done = run(&mut command, b"", LIMIT);
    assert_clean("the standard error of a command", &done.stderr);
    done
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Waits until the log of a node has `want` after its first `from` bytes.
fn await_log(node: &Node, from: usize, want: &str) {
    let what = format!("{want:?} in the log of {}", node.options.name);
    wait_until(&what, SOON, || {
        let log = node.log();
        match log[from..].contains(want) {
            true => Ok(()),
            false => Err(log[from..].to_owned()),
        }
    });
}

#[test]
fn a_cluster_does_all_its_work_over_mutual_tls() {
    let cluster = Cluster::new(150);
    let keys = Keys::new(cluster.dir());
    let etcd = Etcd::start_with(EtcdOptions {
        auth: Some(("tenure".into(), "etcd-sesame".into())),
        ..EtcdOptions::default()
    });
    let service = format!(
        "  type: etcd\n  etcd:\n    endpoints: [\"http://{}\"]\n    key: /access/primary\n    ttl: 3s\n    username: tenure\n    password: etcd-sesame\n",
        etcd.address()
    );
    let options = |name: &str| Options {
        secure: Some(keys.secure(name)),
        environment: vec![("RUST_LOG", "trace".to_owned())],
        ..Options::candidate(name, &service)
    };
    let a = cluster.start(options("a"));
    await_primary(&a, SOON);
    let b = cluster.start(options("b"));
    await_following(&b, &a);
    let sql = "CREATE TABLE t (x); INSERT INTO t VALUES (1);";
    sqlite3(&a.db("x.db"), sql);
    assert_same(&a, &b, "x.db");

    // The halt lock and a forwarded write.
    let db = b.db("x.db");
    let insert = ["sqlite3", text(&db), "INSERT INTO t VALUES (2);"];
    let locked = ["run", "-with-halt-lock-on", text(&db), "--"];
    let done = tenure(&[&locked[..], &insert].concat(), &[]);
    assert!(done.success(), "{}\n{}", done.stderr, b.log());
    assert_eq!(sqlite3(&a.db("x.db"), "SELECT sum(x) FROM t;"), "3\n");

    // Files, by options and by the environment.
    let files = keys.issue("operator");
    let url = format!("https://{}", a.options.http);
    let tls = [
        ("TENURE_TLS_CA", text(&files.ca)),
        ("TENURE_TLS_CERT", text(&files.cert)),
        ("TENURE_TLS_KEY", text(&files.key)),
    ];
    let copy = cluster.dir().join("copy.db");
    let admin = keys.token("admin");
    let command = |what| [what, "-url", &url, "-token-file", text(&admin), "-name"];
    let done = tenure(
        &[&command("export")[..], &["x.db", text(&copy)]].concat(),
        &tls,
    );
    assert!(done.success(), "{}", done.stderr);
    sqlite3(&copy, "INSERT INTO t VALUES (4);");
    let environment = [&tls[..], &[("TENURE_TOKEN", ADMIN_TOKEN)]].concat();
    let import = ["import", "-url", &url, "-name", "y.db", text(&copy)];
    let done = tenure(&import, &environment);
    assert!(done.success(), "{}", done.stderr);
    assert_same(&a, &b, "y.db");
    assert_eq!(sqlite3(&b.db("y.db"), "SELECT sum(x) FROM t;"), "7\n");

    // Promotion by the node's own configuration, and a handoff back.
    let config = b.config();
    let done = tenure(
        &["run", "-config", text(&config), "-promote", "--", "true"],
        &[],
    );
    assert!(done.success(), "{}\n{}", done.stderr, b.log());
    assert!(b.is_primary());
    await_following(&a, &b);
    sqlite3(&b.db("x.db"), "INSERT INTO t VALUES (8);");
    assert_same(&b, &a, "x.db");
    a.http_post("/promote").expect("promoted");
    assert!(a.is_primary());
    await_following(&b, &a);
    b.http_post("/promote").expect("promoted");
    b.http_post("/demote").expect("demoted");
    await_primary(&a, SOON);
    assert_no_secrets(&[&a, &b]);
    let log = b.log();
    assert!(
        log.contains("asks for /stream with the token node"),
        "{log}"
    );
    assert!(a.log().contains("asks for /import with the token admin"));
}

/// A static primary with mutual TLS and tokens, and a database in it.
fn primary(cluster: &Cluster, keys: &Keys) -> Node {
    let node = cluster.start(Options {
        secure: Some(keys.secure("primary")),
        ..Options::primary("primary")
    });
    sqlite3(&node.db("x.db"), "CREATE TABLE t (x);");
    node
}

#[test]
fn who_lacks_something_is_not_let_in_and_told_why() {
    let cluster = Cluster::new(120);
    let keys = Keys::new(cluster.dir());
    let node = primary(&cluster, &keys);
    let elsewhere = cluster.subdir("elsewhere");
    let local = [[127, 0, 0, 1].into()];
    let foreign = Authority::new(&elsewhere).issue("foreign", &local);
    let expired = keys.authority.issue_expired("expired", &local);
    let good = keys.issue("operator");
    let url = format!("https://{}", node.options.http);
    let misnamed = url.replace("127.0.0.1", "localhost");
    let plain = url.replace("https:", "http:");
    let with = |cert: &Identity, ca: &Path| Identity {
        ca: ca.to_owned(),
        ..cert.clone()
    };
    let ours = keys.authority.ca();
    let out = cluster.dir().join("out.db");
    let none = "";
    for (url, shows, token, want) in [
        (&url, Some(with(&good, ours)), READ_TOKEN, None),
        (
            &url,
            Some(with(&good, &foreign.ca)),
            READ_TOKEN,
            Some("an authority that is not in the CA file"),
        ),
        (
            &url,
            Some(with(&foreign, ours)),
            READ_TOKEN,
            Some("does not know the authority"),
        ),
        (
            &url,
            Some(with(&expired, ours)),
            READ_TOKEN,
            Some("has expired"),
        ),
        (&url, None, READ_TOKEN, Some("asks for a certificate")),
        (
            &misnamed,
            Some(with(&good, ours)),
            READ_TOKEN,
            Some("for another host name"),
        ),
        (&plain, None, READ_TOKEN, Some("speaks TLS only")),
        (
            &url,
            Some(with(&good, ours)),
            none,
            Some("asks for a token"),
        ),
        (
            &url,
            Some(with(&good, ours)),
            "wrong-0123456789-sesame",
            Some("does not know the token"),
        ),
    ] {
        let mut env = vec![("TENURE_TOKEN", token), ("TENURE_TLS_CA", text(ours))];
        if let Some(files) = &shows {
            env.extend([
                ("TENURE_TLS_CA", text(&files.ca)),
                ("TENURE_TLS_CERT", text(&files.cert)),
                ("TENURE_TLS_KEY", text(&files.key)),
            ]);
        }
        let done = tenure(&["export", "-url", url, "-name", "x.db", text(&out)], &env);
        match want {
            None => assert!(done.success(), "{}", done.stderr),
            Some(want) => {
                assert_eq!(done.code, Some(1), "{want}");
                assert!(done.stderr.contains(want), "{}: not {want}", done.stderr);
            }
        }
    }
    // The right to look is not the one to replace.
    let tls = [
        ("TENURE_TLS_CA", text(ours)),
        ("TENURE_TLS_CERT", text(&good.cert)),
        ("TENURE_TLS_KEY", text(&good.key)),
        ("TENURE_TOKEN", READ_TOKEN),
    ];
    let before = node.pos("x.db");
    let done = tenure(&["import", "-url", &url, "-name", "x.db", text(&out)], &tls);
    assert_eq!(done.code, Some(1));
    assert!(
        done.stderr.contains("lacks the right admin"),
        "{}",
        done.stderr
    );
    let done = tenure(&["run", "-url", &url, "-promote", "--", "false"], &tls);
    assert!(
        done.stderr.contains("lacks the right admin"),
        "{}",
        done.stderr
    );
    assert_eq!(node.pos("x.db"), before);
    // What the log says is said once.
    let log = node.log();
    for once in [
        "shows no token",
        "speaks without TLS",
        "a TLS handshake with",
    ] {
        assert_eq!(log.matches(once).count(), 1, "{once}: {log}");
    }
    assert_no_secrets(&[&node]);
}

#[test]
fn a_replica_that_lacks_something_is_told_why() {
    let cluster = Cluster::new(120);
    let keys = Keys::new(cluster.dir());
    let node = primary(&cluster, &keys);
    let elsewhere = cluster.subdir("elsewhere");
    let foreign = private(Authority::new(&elsewhere).issue("foreign", &[[127, 0, 0, 1].into()]));
    let good = keys.issue("replica");
    let trusting = Identity {
        ca: keys.authority.ca().to_owned(),
        ..foreign.clone()
    };
    for (name, lines, want) in [
        (
            "foreign",
            tls(&foreign) + &keys.auth("node"),
            &["an authority that is not in the CA file"][..],
        ),
        // HTTP/2 may learn no more than that the connection is over.
        (
            "unknown",
            tls(&trusting) + &keys.auth("node"),
            &[
                "does not know the authority",
                "may not accept this node's certificate",
            ][..],
        ),
        ("tokenless", tls(&good), &["401 Unauthorized"][..]),
        (
            "reader",
            tls(&good) + &keys.auth("read"),
            &["the token read lacks the right replicate"][..],
        ),
    ] {
        let mut replica = cluster.node(Options {
            secure: Some(Secure {
                lines,
                ..keys.secure("replica")
            }),
            ..Options::replica(name, &node.options)
        });
        replica.spawn();
        await_log(&replica, 0, "not replicating");
        let log = replica.log();
        let want = want.iter().any(|want| log.contains(want));
        assert!(want, "{name}: {log}");
        assert_eq!(log.matches("not replicating").count(), 1, "{log}");
        assert!(!replica.db("x.db").exists());
        assert_clean(name, &log);
        replica.stop();
    }
}

/// Replaces a node's certificate, in the files that it has, by another one.
fn replace(files: &Identity, new: &Identity) {
    fs::copy(&new.cert, &files.cert).expect("copy");
    fs::copy(&new.key, &files.key).expect("copy");
}

#[test]
fn certificates_and_tokens_change_under_a_stream_that_goes_on() {
    let cluster = Cluster::new(150);
    let keys = Keys::new(cluster.dir());
    let primary = primary(&cluster, &keys);
    let replica_options = Options {
        secure: Some(keys.secure("replica")),
        ..Options::replica("replica", &primary.options)
    };
    let mut replica = cluster.start(replica_options);
    run_script(&primary.db("w.db"), cluster.dir(), WRITER_TABLES);
    let writer = Writer::start(&primary.db("w.db"), cluster.dir(), "wal", "normal");
    let taken = |node: &Node| node.log().matches("were read again").count();
    let all_take = |times: usize, replica: &Node| {
        for node in [&primary, replica] {
            wait_until("the change to be taken", SOON, || match taken(node) {
                n if n >= times => Ok(()),
                _ => Err(node.log()),
            });
        }
    };

    // Another authority: first both are trusted, then new certificates, then only the new one.
    let new_dir = cluster.subdir("new");
    let new = Authority::new(&new_dir);
    let ca = keys.authority.ca().to_owned();
    let old_ca = fs::read_to_string(&ca).unwrap();
    let new_ca = fs::read_to_string(new.ca()).unwrap();
    fs::write(&ca, old_ca + &new_ca).unwrap();
    all_take(1, &replica);
    for (node, name) in [(&primary, "primary"), (&replica, "replica")] {
        let files = node
            .options
            .secure
            .as_ref()
            .and_then(|s| s.tls.as_ref())
            .unwrap();
        replace(files, &private(new.issue(name, &[[127, 0, 0, 1].into()])));
    }
    all_take(2, &replica);
    fs::write(&ca, &new_ca).unwrap();
    all_take(3, &replica);
    // Another token: both, the new one first, the new one alone.
    let fresh = "fr3sh-sesame-0123456789abcdef";
    let mut times = 3;
    for lines in [
        format!("{NODE_TOKEN}\n{fresh}\n"),
        format!("{fresh}\n{NODE_TOKEN}\n"),
        fresh.to_owned(),
    ] {
        write_secret(&keys.token("node"), &lines);
        times += 1;
        all_take(times, &replica);
    }
    // A bad file is reported, and nothing changes.
    let from = primary.log().len();
    let files = primary
        .options
        .secure
        .as_ref()
        .and_then(|s| s.tls.clone())
        .unwrap();
    let certificate = fs::read_to_string(&files.cert).unwrap();
    fs::write(&files.cert, "oops").unwrap();
    await_log(&primary, from, "what was read before stays in use");
    let other = replica.options.secure.as_ref().unwrap();
    let url = format!("https://{}/info", primary.options.http);
    request("GET", &url, other).expect("it answers as before");
    std::thread::sleep(2 * tenure::access::LOOK_EVERY);
    assert_eq!(primary.log()[from..].matches("stays in use").count(), 1);
    fs::write(&files.cert, certificate).unwrap();

    // Through all of that: one stream, and every write.
    let log = primary.log();
    assert_eq!(log.matches("a replica has connected").count(), 1, "{log}");
    assert!(
        !replica.log().contains("not replicating"),
        "{}",
        replica.log()
    );
    let before = writer.acknowledged();
    wait_until("more writes", SOON, || match writer.acknowledged() {
        n if n > before => Ok(()),
        n => Err(n),
    });
    drop(writer);
    wait_same_pos(&primary, &replica, "w.db");
    // And a new stream, by the new keys alone.
    replica.stop();
    sqlite3(&primary.db("x.db"), "INSERT INTO t VALUES (1);");
    replica.start();
    assert_same(&primary, &replica, "x.db");
    assert_no_secrets(&[&primary, &replica]);
}

#[test]
fn nodes_that_disagree_on_tls_say_so_and_heal() {
    let cluster = Cluster::new(150);
    let keys = Keys::new(cluster.dir());
    let plain = Options::primary("primary");
    let with = |secure: Option<Secure>, options: &Options| Options {
        secure,
        ..options.clone()
    };
    let secure = || {
        Some(Secure {
            token: None,
            lines: tls(&keys.issue("node")),
            ..keys.secure("node")
        })
    };
    let replica_options = Options::replica("replica", &plain);
    for primary_has_tls in [true, false] {
        let name = format!("round-{primary_has_tls}");
        let primary_options = Options {
            name: format!("{name}-primary"),
            ..plain.clone()
        };
        let replica_options = Options {
            name: format!("{name}-replica"),
            ..replica_options.clone()
        };
        let one = |tls: bool| if tls { secure() } else { None };
        let mut primary = cluster.start(with(one(primary_has_tls), &primary_options));
        let replica = cluster.start(with(one(!primary_has_tls), &replica_options));
        let (primary_says, replica_says) = match primary_has_tls {
            true => (
                "speaks without TLS to this node's port",
                "this node speaks TLS only",
            ),
            false => (
                "speaks TLS to this node's port, which has none",
                "does not speak TLS",
            ),
        };
        await_log(&primary, 0, primary_says);
        await_log(&replica, 0, replica_says);
        std::thread::sleep(Duration::from_secs(2));
        for (node, says) in [(&primary, primary_says), (&replica, replica_says)] {
            let log = node.log();
            assert_eq!(log.matches(says).count(), 1, "{log}");
        }
        // The primary is put right; nobody touches the replica.
        primary.stop();
        primary.options.secure = one(!primary_has_tls);
        primary.start();
        sqlite3(&primary.db("x.db"), "CREATE TABLE t (x);");
        assert_same(&primary, &replica, "x.db");
    }
}

#[test]
fn an_open_node_says_so_once() {
    let cluster = Cluster::new(120);
    let keys = Keys::new(cluster.dir());
    let hosts = [[127, 0, 0, 1].into(), [0, 0, 0, 0].into()];
    let identity = private(keys.authority.issue("open", &hosts));
    let warning = "WARNING: ";
    for (name, host, lines, want) in [
        ("loopback", "127.0.0.1", String::new(), None),
        (
            "open",
            "0.0.0.0",
            String::new(),
            Some("can read and replace every database"),
        ),
        (
            "tokens",
            "0.0.0.0",
            keys.auth("node"),
            Some("pass 0.0.0.0:"),
        ),
        (
            "one-sided",
            "0.0.0.0",
            tls(&identity) + "    client-auth: none\n",
            Some("asks nobody for anything"),
        ),
        ("mutual", "0.0.0.0", tls(&identity), None),
    ] {
        let address = free_address();
        let port = address.rsplit(':').next().unwrap();
        let mut node = cluster.node(Options {
            http: format!("{host}:{port}"),
            primary: (name.to_owned(), format!("{host}:{port}")),
            secure: Some(Secure {
                tls: lines.contains("tls:").then(|| identity.clone()),
                lines,
                token: Some(ADMIN_TOKEN.into()),
            }),
            ..Options::primary(name)
        });
        node.spawn();
        wait_until("its mount", SOON, || match node.is_up() {
            true => Ok(()),
            false => Err(node.log()),
        });
        std::thread::sleep(Duration::from_millis(300));
        let log = node.log();
        assert_eq!(
            log.matches(warning).count(),
            usize::from(want.is_some()),
            "{name}: {log}"
        );
        if let Some(want) = want {
            assert!(log.contains(want), "{name}: {log}");
        }
        node.stop();
    }
}

#[test]
fn check_looks_at_certificates_and_tokens() {
    let cluster = Cluster::new(60);
    let keys = Keys::new(cluster.dir());
    let local = [[127, 0, 0, 1].into()];
    let good = keys.issue("good");
    let expired = private(keys.authority.issue_expired("expired", &local));
    let other = keys.issue("other");
    let elsewhere = private(keys.authority.issue("elsewhere", &[]));
    let missing = Identity {
        ca: cluster.dir().join("nowhere.pem"),
        ..good.clone()
    };
    let mixed = Identity {
        key: other.key.clone(),
        ..good.clone()
    };
    write_secret(&cluster.dir().join("short.token"), "sesame");
    let short = keys.auth("node").replace("node.token", "short.token");
    for (lines, want) in [
        (tls(&good) + &keys.auth("node"), None),
        (
            tls(&expired),
            Some("http.tls.cert: the certificate has expired"),
        ),
        (
            tls(&elsewhere),
            Some("http.tls.cert: the certificate is not for 127.0.0.1"),
        ),
        (tls(&missing), Some("http.tls.ca: ")),
        (tls(&mixed), Some("is not the key of the certificate")),
        (
            tls(&good) + &short,
            Some("has 6 characters: a token has 16"),
        ),
    ] {
        let address = free_address();
        let dir = cluster.subdir("check");
        let yaml = format!(
            "fuse:\n  dir: {:?}\ndata:\n  dir: {:?}\nhttp:\n  addr: \"{address}\"\n{lines}lease:\n  type: static\n  advertise-url: \"https://{address}\"\n",
            dir.join("mnt"),
            dir.join("data"),
        );
        let config = dir.join("litefs.yml");
        fs::write(&config, yaml).unwrap();
        let done = tenure(&["mount", "--check", "-config", text(&config)], &[]);
        assert_clean("the output of --check", &done.text());
        match want {
            None => {
                assert!(done.success(), "{}", done.stderr);
                let said = done.text();
                assert!(said.contains(", certificate valid until "), "{said}");
                assert!(said.contains(", tokens node, admin, read"), "{said}");
            }
            Some(want) => {
                assert_eq!(done.code, Some(2), "{}", done.text());
                assert!(done.stderr.contains(want), "{}: not {want}", done.stderr);
            }
        }
    }
}

#[test]
fn a_service_s_secrets_are_not_told_when_it_fails() {
    let cluster = Cluster::new(90);
    let etcd = Etcd::start_with(EtcdOptions {
        auth: Some(("tenure".into(), "right".into())),
        ..EtcdOptions::default()
    });
    let services = [
        (
            "consul",
            format!(
                "  type: consul\n  consul:\n    url: \"http://:consul-sesame@{}\"\n    key: k\n",
                free_address()
            ),
        ),
        (
            "etcd",
            format!(
                "  type: etcd\n  etcd:\n    endpoints: [\"http://{}\"]\n    key: k\n    ttl: 3s\n    username: tenure\n    password: wrong-sesame\n",
                etcd.address()
            ),
        ),
    ];
    for (name, service) in services {
        let mut node = cluster.node(Options {
            environment: vec![("RUST_LOG", "trace".to_owned())],
            more_yaml: "tracing:\n  path: /dev/null\n".replace(
                "/dev/null",
                text(&cluster.dir().join(format!("{name}.operations"))),
            ),
            ..Options::candidate(name, &service)
        });
        node.spawn();
        wait_until("its mount", SOON, || match node.is_up() {
            true => Ok(()),
            false => Err(node.log()),
        });
        let began = Instant::now();
        wait_until("a complaint", SOON, || {
            match node.log().contains("WARNING: ") {
                true => Ok(()),
                false => Err(began.elapsed()),
            }
        });
        std::thread::sleep(Duration::from_secs(2));
        assert_no_secrets(&[&node]);
        let config = node.config();
        let check = tenure(&["mount", "--check", "-config", text(&config)], &[]);
        assert_clean("the output of --check", &check.text());
        let operations = cluster.dir().join(format!("{name}.operations"));
        assert_clean(
            "the operation log",
            &fs::read_to_string(operations).unwrap_or_default(),
        );
        node.stop();
    }
}

/// Calls `look` with every file and directory below `dir`, and with `dir`.
fn walk(dir: &Path, look: &mut impl FnMut(&Path)) {
    look(dir);
    for entry in fs::read_dir(dir).expect("list a directory") {
        let path = entry.expect("an entry").path();
        match path.is_dir() {
            true => walk(&path, look),
            false => look(&path),
        }
    }
}

#[test]
fn what_a_node_keeps_is_its_owner_s_alone() {
    let cluster = Cluster::new(90);
    let backup = cluster.dir().join("backup");
    let operations = cluster.dir().join("operations");
    let options = |name: &str| Options {
        backup: (name == "primary").then(|| backup.clone()),
        more_yaml: format!("tracing:\n  path: {operations:?}\n"),
        ..Options::primary(name)
    };
    // SAFETY: takes and returns a number. Nothing else of this test makes files that matter.
    let umask = unsafe { libc::umask(0) };
    let mut primary = cluster.start(options("primary"));
    let mut replica = cluster.start(Options {
        more_yaml: String::new(),
        ..Options::replica("replica", &primary.options)
    });
    // SAFETY: as above.
    unsafe { libc::umask(umask) };
    for mode in ["wal", "delete"] {
        let db = primary.db(&format!("{mode}.db"));
        let sql =
            format!("PRAGMA journal_mode={mode}; CREATE TABLE t (x); INSERT INTO t VALUES (1);");
        sqlite3(&db, &sql);
        assert_same(&primary, &replica, &format!("{mode}.db"));
    }
    wait_until("a backup", SOON, || {
        match backup.join("wal.db").exists() || backup.exists() {
            true => Ok(()),
            false => Err("none"),
        }
    });
    std::thread::sleep(Duration::from_secs(2));
    assert!(!primary.log().contains("chmod 700"), "{}", primary.log());
    let mut seen = 0;
    let mut look = |path: &Path| {
        let mode = fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
        let want = if path.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(mode, want, "{}: {mode:o}", path.display());
        seen += 1;
    };
    for dir in [&primary.data(), &replica.data(), &backup, &operations] {
        match dir.is_dir() {
            true => walk(dir, &mut look),
            false => look(dir),
        }
    }
    assert!(seen > 30, "only {seen} files");
    assert_eq!(primary.stop(), Some(0));
    assert_eq!(replica.stop(), Some(0));
    let mut look = |path: &Path| {
        let mode = fs::metadata(path).expect("metadata").permissions().mode();
        assert_eq!(mode & 0o077, 0, "{}: {mode:o}", path.display());
    };
    walk(&primary.data(), &mut look);
    // One that LiteFS has made, say, is left as it is and complained of.
    fs::set_permissions(primary.data(), fs::Permissions::from_mode(0o755)).unwrap();
    primary.start();
    assert!(primary.log().contains("chmod 700"), "{}", primary.log());
    assert_eq!(
        fs::metadata(primary.data()).unwrap().permissions().mode() & 0o777,
        0o755
    );
}

#[test]
fn a_read_token_is_enough_for_a_monitor() {
    let cluster = Cluster::new(60);
    let keys = Keys::new(cluster.dir());
    let node = primary(&cluster, &keys);
    let mut monitor = node.options.secure.clone().unwrap();
    let ask = |monitor: &Secure, method: &str, path: &str| {
        request(
            method,
            &format!("https://{}{path}", node.options.http),
            monitor,
        )
    };
    monitor.token = Some(READ_TOKEN.into());
    assert!(
        ask(&monitor, "GET", "/metrics")
            .unwrap()
            .contains("litefs_db_count")
    );
    assert!(ask(&monitor, "GET", "/info").is_ok() && ask(&monitor, "GET", "/debug/vars").is_ok());
    let refused = ask(&monitor, "POST", "/demote").unwrap_err();
    assert!(refused.starts_with("403"), "{refused}");
    monitor.token = None;
    let refused = ask(&monitor, "GET", "/metrics").unwrap_err();
    assert!(refused.starts_with("401"), "{refused}");
}
