//! `exec`: what a node runs, when, and how both end.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::node::{TENURE, fuse_mounts};
use common::run::{Finished, Running, run};
use common::{Cluster, Node, Options, SOON, sqlite3, wait_until};

/// A static primary that runs commands: `exec` and what follows it in the configuration.
fn primary(exec: &str) -> Options {
    Options {
        more_yaml: exec.to_owned(),
        ..Options::primary("primary")
    }
}

fn node(cluster: &Cluster, options: Options) -> Node {
    let mut node = cluster.node(options);
    node.spawn();
    node
}

/// A program that a configuration can name.
fn script(cluster: &Cluster, name: &str, text: &str) -> String {
    let path = cluster.dir().join(name);
    std::fs::write(
        &path,
        format!("#!/bin/sh\ncd {:?}\n{text}\n", cluster.dir()),
    )
    .unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.display().to_string()
}

fn wait_for_file(path: &Path) -> String {
    wait_until(
        &format!("{}", path.display()),
        SOON,
        || match std::fs::read_to_string(path) {
            Ok(text) if text.ends_with('\n') => Ok(()),
            other => Err(format!("{other:?}")),
        },
    );
    std::fs::read_to_string(path).unwrap()
}

/// Waits until it has ended by itself: its exit code.
fn ended(node: &mut Node) -> Option<i32> {
    let code = node.wait(SOON);
    let mount = node.mount();
    assert!(
        !fuse_mounts().contains(&mount),
        "{} is mounted",
        mount.display()
    );
    code
}

#[test]
fn commands_run_in_order_when_the_databases_are_there() {
    let cluster = Cluster::new(120);
    let one = script(
        &cluster,
        "migrate",
        "sqlite3 primary/mnt/app.db \"CREATE TABLE t (x); INSERT INTO t VALUES ('$*')\" && sleep 0.3",
    );
    let two = script(&cluster, "for-candidates", "echo skipped > skipped");
    let last = script(
        &cluster,
        "app",
        "sqlite3 primary/mnt/app.db 'SELECT x FROM t' > result; cat >> result; exit 7",
    );
    let mut node = node(
        &cluster,
        primary(&format!(
            "exec:\n  - cmd: {one} 'two words' \"and more\"\n    if-candidate: true\n  - cmd: {last}\n"
        )),
    );
    assert_eq!(ended(&mut node), Some(7), "{}", node.log());
    let result = std::fs::read_to_string(cluster.dir().join("result")).unwrap();
    assert_eq!(result, "two words and more\n");
    assert!(
        node.log().contains("has ended with exit code 7"),
        "{}",
        node.log()
    );

    // On a node that is no candidate, a command for candidates is left out; being the last, it leaves
    // the node running.
    let mut primary = cluster.start(Options::primary("p"));
    let mut replica = node_of_replica(
        &cluster,
        &primary,
        &format!("exec:\n  - cmd: {two}\n    if-candidate: true\n"),
    );
    wait_until("the message", SOON, || {
        let log = replica.log();
        if log.contains("no candidate") {
            Ok(())
        } else {
            Err(log)
        }
    });
    assert!(replica.is_up());
    assert!(!cluster.dir().join("skipped").exists());
    assert_eq!(replica.stop(), Some(0));
    assert_eq!(primary.stop(), Some(0));
}

fn node_of_replica(cluster: &Cluster, primary: &Node, more: &str) -> Node {
    node(
        cluster,
        Options {
            more_yaml: more.to_owned(),
            ..Options::replica("replica", &primary.options)
        },
    )
}

#[test]
fn an_early_command_that_fails_ends_the_node() {
    let cluster = Cluster::new(120);
    let bad = script(&cluster, "bad", "exit 3");
    let app = script(&cluster, "app", "echo ran > ran");
    let list = format!("exec:\n  - cmd: {bad}\n  - cmd: {app}\n");
    let mut a = node(&cluster, primary(&list));
    assert_eq!(ended(&mut a), Some(3), "{}", a.log());
    assert!(a.log().contains("ERROR: exec: "), "{}", a.log());

    // One that is not there.
    let mut b = node(&cluster, primary("exec: /nonexistent/app\n"));
    assert_eq!(ended(&mut b), Some(1), "{}", b.log());
    assert!(
        b.log().contains("cannot run /nonexistent/app"),
        "{}",
        b.log()
    );

    // With exit-on-error off the node stays, with its mount, to be looked at.
    let mut c = node(&cluster, primary(&format!("{list}exit-on-error: false\n")));
    wait_until("the message", SOON, || {
        let log = c.log();
        if log.contains("the node stays up") {
            Ok(())
        } else {
            Err(log)
        }
    });
    assert!(c.is_up());
    sqlite3(&c.db("x.db"), "CREATE TABLE t (x);");
    assert_eq!(c.stop(), Some(0));
    assert!(!cluster.dir().join("ran").exists());
}

#[test]
fn exit_on_error_off_keeps_a_failed_start() {
    let cluster = Cluster::new(120);
    let first = cluster.start(Options::primary("first"));
    // Its address is taken.
    let mut second = node(
        &cluster,
        Options {
            http: first.options.http.clone(),
            more_yaml: "exit-on-error: false\n".to_owned(),
            ..Options::primary("second")
        },
    );
    wait_until("the message", SOON, || {
        let log = second.log();
        if log.contains("the node is down") {
            Ok(())
        } else {
            Err(log)
        }
    });
    assert_eq!(second.stop(), Some(1), "{}", second.log());
    second.options.more_yaml.clear();
    second.spawn();
    assert_eq!(ended(&mut second), Some(1));
}

#[test]
fn signals_are_passed_on_and_the_mount_outlives_the_application() {
    let cluster = Cluster::new(120);
    let app = script(
        &cluster,
        "app",
        "stop() { sqlite3 primary/mnt/app.db \"INSERT INTO t VALUES ('$1')\"; kill $!; exit 0; }\n\
         trap 'stop TERM' TERM; trap 'stop INT' INT\n\
         sqlite3 primary/mnt/app.db 'CREATE TABLE IF NOT EXISTS t (x)'\n\
         sleep 60 & echo ready > ready; wait",
    );
    let mut node = node(&cluster, primary(&format!("exec: {app}\n")));
    for (signal, all) in [(libc::SIGTERM, "TERM\n"), (libc::SIGINT, "TERM\nINT\n")] {
        wait_for_file(&cluster.dir().join("ready"));
        std::fs::remove_file(cluster.dir().join("ready")).unwrap();
        node.signal(signal);
        assert_eq!(ended(&mut node), Some(0), "{}", node.log());
        node.options.more_yaml.clear();
        node.start();
        assert_eq!(sqlite3(&node.db("app.db"), "SELECT x FROM t;"), all);
        assert_eq!(node.stop(), Some(0));
        node.options.more_yaml = format!("exec: {app}\n");
        node.spawn();
    }
    wait_for_file(&cluster.dir().join("ready"));
}

#[test]
fn exit_codes_of_signals() {
    let cluster = Cluster::new(120);
    // Killed by a signal that the node has nothing to do with.
    let suicide = script(&cluster, "suicide", "kill -9 $$");
    let mut a = node(&cluster, primary(&format!("exec: {suicide}\n")));
    assert_eq!(ended(&mut a), Some(128 + 9), "{}", a.log());

    // Ended by the signal that was passed on: it did what it was told.
    let plain = script(&cluster, "plain", "echo $$ > ready; exec sleep 60");
    let mut b = node(&cluster, primary(&format!("exec: {plain}\n")));
    wait_for_file(&cluster.dir().join("ready"));
    b.signal(libc::SIGTERM);
    assert_eq!(ended(&mut b), Some(0), "{}", b.log());

    // Told twice: killed, with all that it has started.
    std::fs::remove_file(cluster.dir().join("ready")).unwrap();
    let deaf = script(
        &cluster,
        "deaf",
        "trap 'echo heard > heard' TERM; sleep 61 & echo $! > ready; while :; do wait; done",
    );
    let mut c = node(&cluster, primary(&format!("exec: {deaf}\n")));
    let sleeper = wait_for_file(&cluster.dir().join("ready"));
    c.signal(libc::SIGTERM);
    wait_for_file(&cluster.dir().join("heard"));
    assert!(c.is_up());
    let told = Instant::now();
    c.signal(libc::SIGTERM);
    assert_eq!(ended(&mut c), Some(128 + 9), "{}", c.log());
    assert!(
        told.elapsed() < Duration::from_secs(9),
        "{:?}",
        told.elapsed()
    );
    let sleeper: u32 = sleeper.trim().parse().unwrap();
    let running = || {
        let stat = std::fs::read_to_string(format!("/proc/{sleeper}/stat")).unwrap_or_default();
        let state = stat.rsplit(") ").next().unwrap_or("").to_owned();
        !state.is_empty() && !state.starts_with('Z')
    };
    wait_until("the end of the group", SOON, || {
        if running() { Err(sleeper) } else { Ok(()) }
    });
}

#[test]
fn a_node_out_of_step_waits_and_ends_at_once_when_told() {
    let cluster = Cluster::new(120);
    let app = script(&cluster, "app", "echo ran > ran; exec sleep 60");
    // Its primary is not there.
    let absent = Options::primary("absent");
    let with = |more: &str| Options {
        more_yaml: format!("exec: {app}\n{more}"),
        ..Options::replica("replica", &absent)
    };
    let mut waiting = node(&cluster, with(""));
    wait_until("the mount", SOON, || {
        if waiting.is_up() {
            Ok(())
        } else {
            Err(waiting.log())
        }
    });
    std::thread::sleep(Duration::from_secs(3));
    assert!(!cluster.dir().join("ran").exists());
    let told = Instant::now();
    assert_eq!(waiting.stop(), Some(0), "{}", waiting.log());
    assert!(
        told.elapsed() < Duration::from_secs(5),
        "{:?}",
        told.elapsed()
    );

    // It need not wait.
    let mut hasty = node(&cluster, with("skip-sync: true\n"));
    wait_for_file(&cluster.dir().join("ran"));
    assert_eq!(hasty.stop(), Some(0));
    std::fs::remove_file(cluster.dir().join("ran")).unwrap();

    // And the one that waits goes on when its primary comes.
    let mut waiting = node(&cluster, with(""));
    wait_until("the mount", SOON, || {
        if waiting.is_up() {
            Ok(())
        } else {
            Err(waiting.log())
        }
    });
    let _primary = cluster.start(absent);
    wait_for_file(&cluster.dir().join("ran"));
    assert_eq!(waiting.stop(), Some(0));
}

fn tenure(dir: &Path, args: &[&str]) -> Finished {
    run(
        Command::new(TENURE).args(args).current_dir(dir),
        b"",
        Duration::from_secs(60),
    )
}

#[test]
fn a_command_of_the_command_line_replaces_exec() {
    let cluster = Cluster::new(60);
    let dir = cluster.dir();
    // The first of the search path.
    let text =
        "fuse: {dir: mnt}\ndata: {dir: data}\nhttp: {addr: '127.0.0.1:0'}\nexec: /nonexistent\n";
    std::fs::write(dir.join("litefs.yml"), text).unwrap();
    let script = "sqlite3 \"$1\" 'CREATE TABLE t (x)'; ls mnt; cat; exit 9";
    let child = Command::new(TENURE)
        .args([
            "mount",
            "-skip-unmount",
            "--",
            "sh",
            "-c",
            script,
            "sh",
            "mnt/a b",
        ])
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut running = Running(child);
    assert_eq!(running.wait(SOON), Some(9));
    let mut out = String::new();
    use std::io::Read;
    running
        .0
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut out)
        .unwrap();
    assert!(out.lines().any(|l| l == "a b"), "{out}");

    let home = cluster.subdir("home");
    std::fs::rename(dir.join("litefs.yml"), home.join("litefs.yml")).unwrap();
    let mut command = Command::new(TENURE);
    command
        .args(["mount", "--check"])
        .env("HOME", &home)
        .current_dir(dir);
    let found = run(&mut command, b"", SOON);
    assert_eq!(found.code, Some(2));
    assert!(
        found
            .stderr
            .contains("exec: there is no program /nonexistent"),
        "{}",
        found.stderr
    );
    std::fs::remove_file(home.join("litefs.yml")).unwrap();
    let none = run(&mut command, b"", SOON);
    assert_eq!(none.code, Some(2));
    assert!(
        none.stderr.contains("looked for litefs.yml, "),
        "{}",
        none.stderr
    );
}

#[test]
fn a_check_says_all_that_is_wrong_and_leaves_nothing() {
    let cluster = Cluster::new(60);
    let dir = cluster.dir();
    let good =
        "fuse: {dir: m}\ndata: {dir: deep/d}\nhttp: {addr: '127.0.0.1:1'}\nexec: sh -c true\n";
    std::fs::write(dir.join("good.yml"), good).unwrap();
    let done = tenure(dir, &["mount", "--check", "-config", "good.yml"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let text = done.text();
    assert!(
        text.starts_with("ok: candidate, static lease, mount "),
        "{text}"
    );
    assert!(
        text.ends_with(", exec sh\n") && text.lines().count() == 1,
        "{text}"
    );
    std::fs::write(dir.join("file"), "x").unwrap();
    std::fs::write(dir.join("bad.pem"), "no certificate").unwrap();
    let bad = "
fuse: {dir: full}
data: {dir: file/d}
http: {addr: '192.0.2.1:1'}
tracing: {path: file/t}
backup: {type: file, path: file/b}
exec:
  - cmd: no-such-program-here
  - cmd: ./file
lease:
  type: consul
  consul: {url: 'https://localhost:1', key: k, tls: {ca: bad.pem}}
";
    std::fs::create_dir_all(dir.join("full/x")).unwrap();
    std::fs::write(dir.join("bad.yml"), bad).unwrap();
    let done = tenure(dir, &["mount", "--check", "-config", "bad.yml"]);
    assert_eq!(done.code, Some(2), "{}", done.text());
    for expected in [
        "ERROR: fuse.dir: ",
        "ERROR: data.dir: ",
        "ERROR: http.addr: cannot listen on 192.0.2.1",
        "ERROR: tracing.path: ",
        "ERROR: backup.path: ",
        "ERROR: exec: there is no program no-such-program-here",
        "ERROR: exec: there is no program ./file",
        "bad.pem",
    ] {
        assert!(
            done.stderr.contains(expected),
            "{expected} is not in\n{}",
            done.stderr
        );
    }
    assert_eq!(done.text(), "");
    assert!(!dir.join("deep").exists() && !dir.join("m").exists());
    // A configuration that cannot be read is the same, with file, line and suggestion.
    std::fs::write(dir.join("slip.yml"), "fuse:\n  dri: x\n").unwrap();
    let done = tenure(dir, &["mount", "--check", "-config", "slip.yml"]);
    assert_eq!(done.code, Some(2));
    let expected = "ERROR: slip.yml:2: fuse.dri: unknown key; did you mean \"dir\"?\n";
    assert_eq!(done.stderr, expected);
}

#[test]
fn completions_and_man_pages() {
    let cluster = Cluster::new(60);
    for (args, expected) in [
        (&["completions", "bash"][..], "skip-unmount"),
        (&["completions", "zsh"], "skip-unmount"),
        (&["completions", "fish"], "skip-unmount"),
        (&["man"], "tenure\\-mount(1)"),
    ] {
        let done = tenure(cluster.dir(), args);
        assert!(
            done.success() && done.text().contains(expected),
            "{args:?}: {}",
            done.text()
        );
    }
    let man = cluster.subdir("man");
    assert!(tenure(&man, &["man", "."]).success());
    let page = std::fs::read_to_string(man.join("tenure-mount.1")).unwrap();
    assert!(page.contains("skip\\-unmount"), "{page}");
}

#[test]
fn systemd_is_told() {
    use std::os::unix::net::UnixDatagram;
    let cluster = Cluster::new(60);
    let path = cluster.dir().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    let app = script(
        &cluster,
        "app",
        "echo \"[$NOTIFY_SOCKET]\" > app-saw; exec sleep 60",
    );
    let path: &'static str = path.display().to_string().leak();
    let mut node = node(
        &cluster,
        Options {
            environment: vec![("NOTIFY_SOCKET", path.to_string())],
            ..primary(&format!("exec: {app}\n"))
        },
    );
    let next = || {
        let mut bytes = [0; 256];
        let n = socket.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..n]).into_owned()
    };
    assert!(next().contains("READY=1"));
    assert!(node.is_up());
    assert_eq!(wait_for_file(&cluster.dir().join("app-saw")), "[]\n");
    assert_eq!(node.stop(), Some(0));
    assert!(next().contains("STOPPING=1"));
}
