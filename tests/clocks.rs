//! Nodes whose clocks run at different rates, by libfaketime: a lease counts from before its renewal
//! was sent, and ends a tenth of its TTL early, so rates that differ by less than that make no second
//! primary.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::run::Running;
use common::service::{Kind, Service};
use common::workload::{self, Workload};
use common::{Cluster, Options, SOON, await_primary, wait_same_pos, wait_until};

const CLOCKS: &str = "TENURE_TEST_CLOCKS";

/// What makes a program's clocks run at this rate.
fn environment(rate: &str) -> Vec<(&'static str, String)> {
    let library = tenure_test_services::program("libfaketime.so.1");
    vec![
        ("LD_PRELOAD", library.display().to_string()),
        ("FAKETIME", format!("+0 x{rate}")),
    ]
}

/// `CLOCK_BOOTTIME` in seconds.
fn boot_time() -> f64 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call fills the structure that it is given.
    let r = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut t) };
    assert_eq!(r, 0);
    t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
}

/// Not a test of its own, but the process whose clocks are looked at in the one below: it says how
/// long the time between two lines of its input was, by both clocks that nodes go by.
#[test]
fn process_with_clocks() {
    if std::env::var_os(CLOCKS).is_none() {
        return;
    }
    let mut lines = std::io::stdin().lines();
    lines.next();
    let (monotonic, boot) = (Instant::now(), boot_time());
    println!("\nbegun");
    lines.next();
    let (monotonic, boot) = (monotonic.elapsed(), boot_time() - boot);
    println!("\ntook {} {boot}", monotonic.as_secs_f64());
}

#[test]
fn the_clocks_of_a_program_can_be_changed() {
    for rate in ["0.5", "1.5"] {
        let child = Command::new(std::env::current_exe().expect("own path"))
            .args(["--exact", "process_with_clocks", "--nocapture"])
            .env(CLOCKS, "1")
            .envs(environment(rate))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start the process");
        let mut process = Running(child);
        let mut input = process.0.stdin.take().expect("a pipe");
        let output = BufReader::new(process.0.stdout.take().expect("a pipe"));
        let mut said = output.lines().map_while(Result::ok);
        writeln!(input).expect("tell it to begin");
        said.find(|line| line == "begun").expect("it has begun");
        let start = Instant::now();
        std::thread::sleep(Duration::from_millis(500));
        writeln!(input).expect("tell it to end");
        let took = said.find_map(|line| line.strip_prefix("took ").map(str::to_string));
        let real = start.elapsed().as_secs_f64();
        let took = took.expect("an answer");
        for clock in took.split(' ') {
            let ratio = clock.parse::<f64>().expect("seconds") / real;
            let want: f64 = rate.parse().expect("a number");
            assert!((ratio - want).abs() < 0.15, "{rate}: {took} in {real}");
        }
        process.wait(SOON);
    }
}

/// One node's clock is slow, the other's fast; each in turn is frozen as primary for longer than its
/// lease lasts, under load.
#[test]
fn clocks_that_run_apart_make_no_second_primary() {
    let kind = Kind::Etcd;
    let service = Service::start(kind);
    let cluster = Cluster::new(120);
    let options = |name, rate| Options {
        environment: environment(rate),
        uncompressed: true,
        ..Options::candidate(name, &kind.lines(service.address(), "tenure/test"))
    };
    let slow = cluster.start(options("slow", "0.95"));
    await_primary(&slow, SOON);
    workload::create(&slow.db(workload::DB), "wal");
    let fast = cluster.start(options("fast", "1.05"));
    wait_same_pos(&slow, &fast, workload::DB);
    let nodes = [&slow, &fast];
    for node in nodes {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", node.pid()));
        assert!(maps.expect("its memory").contains("libfaketime"));
    }
    let mounts: Vec<PathBuf> = nodes.iter().map(|n| n.mount()).collect();
    let load = Workload::start(3, &mounts);
    load.wait_for(50, SOON);
    for (frozen, other) in [(0, 1), (1, 0)] {
        assert!(nodes[frozen].is_primary());
        nodes[frozen].freeze(true);
        let before = load.last_by_node().get(&other).copied();
        wait_until("writes at the other node", kind.failover() + SOON, || {
            let last = load.last_by_node().get(&other).copied();
            if last > before { Ok(()) } else { Err(last) }
        });
        nodes[frozen].freeze(false);
        load.wait_for(50, SOON);
    }
    let acked = load.stop();
    wait_same_pos(&slow, &fast, workload::DB);
    let data = nodes.map(|n| n.data());
    let outcome = workload::check(&acked, &slow.db(workload::DB), &data);
    println!("{outcome:?}");
    common::assert_same(&slow, &fast, workload::DB);
}
