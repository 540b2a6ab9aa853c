//! A cluster in one process: the real role loops, stores, streams and API handlers of some nodes, on a
//! simulated network, clock and lease service, with everything that can go wrong, from a seed.
//!
//! One thread, tokio's paused time: the same seed does the same ([`process`] says how). A run has a
//! time of faults and load, after which everything is healed; then all nodes must come to be the same,
//! and [`check`] says what must hold all along.
//!
//! `TENURE_SIM_SEED=N cargo test --workspace --lib sim::one_seed -- --nocapture` replays a seed (with
//! `TENURE_SIM_TRACE=1` it shows everything). `many_seeds` runs the same seeds every time; with
//! `TENURE_SIM_SECS=N` it hunts for so long among others, from `TENURE_SIM_FIRST` on if that is set.

mod check;
mod clients;
mod disk;
mod faults;
mod lease;
mod net;
mod node;
pub(crate) mod process;
mod world;

use std::collections::BTreeMap;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant as RealInstant};

use tokio::time::{sleep, timeout};

use crate::ltx::Pos;
use crate::store::Role;
use crate::store::disk::sim::Sim;
use crate::store::tests::bed;

use self::check::{Checker, Tally};
use self::lease::{Flaw, Service};
use self::net::Net;
use self::node::{Cluster, Node};
use self::world::World;

/// How long a healed cluster may take to come to rest.
const HEALING: Duration = Duration::from_secs(180);

/// The seeds that are run every time.
const SEEDS: std::ops::Range<u64> = 1_000..1_250;

/// How long a run may take in real time.
const LIMIT: Duration = Duration::from_secs(60);

/// What a run has shown.
#[derive(Debug)]
struct Report {
    hash: u64,
    tally: Tally,
    violation: Option<String>,
    trace: String,
}

/// Runs one seed.
fn run(seed: u64, flaw: Flaw, show: impl FnOnce(&Arc<World>)) -> Report {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    let report = runtime.block_on(async {
        process::begin(seed);
        let world = World::new(seed);
        show(&world);
        let (cluster, faults) = simulate(&world, flaw).await;
        let mut tally = cluster.checker.tally();
        tally.faults = faults;
        Report {
            hash: world.hash(),
            tally,
            violation: world.violation(),
            trace: world.trace(),
        }
    });
    drop(runtime);
    process::end();
    report
}

async fn simulate(world: &Arc<World>, flaw: Flaw) -> (Arc<Cluster>, u64) {
    let count = world.range(3..6) as usize;
    let nodes = (0..count).map(|id| {
        // The first two are candidates always.
        let candidate = id < 2 || !world.one_in(3);
        // The service's clock against the node's, within what is promised.
        let rate = match world.range(0..3) {
            0 => world.range(905..1_000),
            _ => world.range(1_000..1_400),
        };
        let disk = Sim::new(world.range(0..u64::MAX));
        let prunes = world.one_in(2);
        Node::new(id, disk, candidate, rate, prunes)
    });
    let cluster = Arc::new(Cluster {
        world: world.clone(),
        net: Net::new(world),
        service: Service::new(world, flaw),
        checker: Checker::new(world),
        nodes: nodes.collect(),
        ttl: Duration::from_secs(10),
    });
    let background = [
        process::spawn_free(cluster.service.clone().run()),
        process::spawn_free({
            let cluster = cluster.clone();
            async move { cluster.listen().await }
        }),
    ];
    let mut clients = Vec::new();
    for node in 0..count {
        // One comes late, now and then.
        if node < 2 || !world.one_in(4) {
            cluster.start(node);
        }
        clients.push(process::spawn_free(clients::writer(
            cluster.clone(),
            node,
            2 * node,
        )));
        let reader = clients::reader(cluster.clone(), node, 2 * node + 1);
        clients.push(process::spawn_free(reader));
    }
    let faults = process::spawn_free(faults::run(cluster.clone()));
    let length = world.ms(20_000..90_000);
    let step = Duration::from_millis(500);
    let mut time = Duration::ZERO;
    while time < length && world.violation().is_none() {
        sleep(step).await;
        time += step;
    }
    world.end();
    // The last one may still be about to happen.
    let faults = faults.await.unwrap_or_default();
    heal(&cluster);
    for client in clients {
        let _ = client.await;
    }
    if world.violation().is_none() {
        settle(&cluster).await;
    }
    for node in 0..count {
        match world.violation() {
            None => cluster.stop(node).await,
            Some(_) => cluster.kill(node).await,
        }
    }
    background.iter().for_each(|task| task.abort());
    (cluster, faults)
}

/// Ends all that is wrong.
fn heal(cluster: &Arc<Cluster>) {
    cluster.world.note("healed");
    cluster.net.heal();
    cluster.service.set_slow(false);
    for node in &cluster.nodes {
        cluster.service.set_away(node.id, false);
        if let Some(life) = node.life() {
            life.process.go_on();
        }
        cluster.start(node.id);
    }
}

/// Waits until all nodes are the same, and checks that they are.
async fn settle(cluster: &Arc<Cluster>) {
    let world = &cluster.world;
    let same = async {
        clients::last_words(cluster).await;
        // What was committed last is on its way.
        sleep(Duration::from_secs(5)).await;
        while !at_rest(cluster) {
            sleep(Duration::from_millis(200)).await;
        }
    };
    if timeout(HEALING, same).await.is_err() {
        cluster.hear_all();
        return world.violate(format!(
            "not healed after {HEALING:?}: {:?}",
            positions(cluster)
        ));
    }
    cluster.hear_all();
    world.note(format!("at rest: {:?}", positions(cluster)[0].1));
    for (db, _) in clients::DATABASES {
        check_database(cluster, db);
    }
}

type Positions = Vec<(bool, BTreeMap<String, Pos>)>;

/// Who is primary, and where each node is.
fn positions(cluster: &Cluster) -> Positions {
    let lives = cluster.nodes.iter().filter_map(|n| n.life());
    lives
        .map(|l| (l.store.role() == Role::Primary, l.store.positions()))
        .collect()
}

fn at_rest(cluster: &Cluster) -> bool {
    let all = positions(cluster);
    let primaries = all.iter().filter(|(primary, _)| *primary).count();
    all.len() == cluster.nodes.len()
        && primaries == 1
        && all.iter().all(|(_, positions)| *positions == all[0].1)
}

/// Checks that a database is the same on all nodes, byte by byte, and has what was acknowledged.
fn check_database(cluster: &Cluster, db: &str) {
    let world = &cluster.world;
    let mut first = None;
    for node in &cluster.nodes {
        let Some(life) = node.life() else { continue };
        let Some(database) = life.store.database(db) else {
            continue;
        };
        if let Some(reason) = database.broken() {
            return world.violate(format!("n{}: {db} is set aside: {reason}", node.id));
        }
        if database.pos().is_zero() {
            continue;
        }
        let (pos, image) = bed::image(&database);
        if bed::checksum(&image, database.page_size()) != pos.checksum {
            return world.violate(format!("n{}: {db} is not what {pos} says", node.id));
        }
        match &first {
            None => first = Some(image),
            Some(first) if *first != image => {
                return world.violate(format!("n{}: other bytes of {db} at {pos}", node.id));
            }
            Some(_) => {}
        }
        let read = life.connect(db).and_then(|c| {
            let said: String = c.query_row("PRAGMA integrity_check", [], |r| r.get(0))?;
            Ok((said, clients::rows(&c)?))
        });
        match read {
            Ok((said, rows)) if said == "ok" && rows.wrong().is_none() => {
                cluster.checker.kept(db, &rows.ids);
            }
            Ok((said, rows)) => {
                world.violate(format!("n{}: {db}: {said}, {:?}", node.id, rows.wrong()));
            }
            Err(error) => world.violate(format!("n{}: {db}: {error}", node.id)),
        }
    }
}

/// Runs a seed on a thread of its own, with a limit of real time: a deadlock is a violation too.
fn run_apart(seed: u64, flaw: Flaw) -> Report {
    let (tell, told) = mpsc::channel();
    let (show, shown) = mpsc::channel();
    let thread = std::thread::Builder::new()
        .name(format!("seed-{seed}"))
        .spawn(move || {
            let show = move |world: &Arc<World>| drop(show.send(world.clone()));
            let _ = tell.send(run(seed, flaw, show));
        })
        .expect("a thread");
    let violation = match told.recv_timeout(LIMIT) {
        Ok(report) => return report,
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            let panic = thread.join().expect_err("it sent nothing");
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            format!("it panics: {text:?}")
        }
        Err(mpsc::RecvTimeoutError::Timeout) => {
            format!("it hangs (process {})", std::process::id())
        }
    };
    Report {
        hash: 0,
        tally: Tally::default(),
        violation: Some(violation),
        trace: shown
            .recv()
            .map_or_else(|_| String::new(), |world| world.trace()),
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn replay(seed: u64) -> String {
    format!(
        "replay: TENURE_SIM_SEED={seed} TENURE_SIM_TRACE=1 cargo test --workspace --lib sim::one_seed -- --nocapture"
    )
}

#[test]
fn one_seed() {
    let seed = number("TENURE_SIM_SEED").unwrap_or(1);
    if std::env::var_os("TENURE_SIM_TRACE").is_some() {
        // The nodes' own logs, as RUST_LOG wants them.
        let _ = tracing_subscriber::fmt()
            .with_ansi(false)
            .without_time()
            .try_init();
    }
    let report = run_apart(seed, Flaw::None);
    if std::env::var_os("TENURE_SIM_SEED").is_some() || report.violation.is_some() {
        println!("{}{:?}", report.trace, report.tally);
    }
    if let Some(violation) = report.violation {
        panic!("seed {seed}: {violation}\n{}", replay(seed));
    }
}

#[test]
fn the_same_seed_does_the_same() {
    for seed in 1..4 {
        let (a, b) = (run_apart(seed, Flaw::None), run_apart(seed, Flaw::None));
        assert_eq!(a.violation, None, "{}", replay(seed));
        assert_eq!((a.hash, a.tally), (b.hash, b.tally), "seed {seed}");
    }
    assert_ne!(run_apart(1, Flaw::None).hash, run_apart(2, Flaw::None).hash);
}

#[test]
fn many_seeds() {
    let hunt = number("TENURE_SIM_SECS").map(Duration::from_secs);
    let first = number("TENURE_SIM_FIRST").or(hunt.map(|_| rand::random_range(0..1 << 40)));
    let seeds = match hunt {
        Some(_) => first.unwrap_or(0)..u64::MAX,
        None => first.map_or(SEEDS, |first| first..first + SEEDS.end - SEEDS.start),
    };
    let began = RealInstant::now();
    let (mut runs, mut sum, mut failures) = (0, Tally::default(), Vec::new());
    // Of all traces: two builds that do the same have the same.
    let mut hash = 0u64;
    for seed in seeds.clone() {
        if hunt.is_some_and(|time| began.elapsed() >= time) {
            break;
        }
        let report = run_apart(seed, Flaw::None);
        runs += 1;
        hash = hash.rotate_left(1) ^ report.hash;
        sum.acks += report.tally.acks;
        sum.transactions += report.tally.transactions;
        sum.primaries += report.tally.primaries;
        sum.divergent += report.tally.divergent;
        sum.reads += report.tally.reads;
        sum.faults += report.tally.faults;
        if let Some(violation) = report.violation {
            println!("seed {seed}: {violation}\n{}", replay(seed));
            failures.push(seed);
            if failures.len() >= 20 {
                break;
            }
        }
    }
    println!(
        "{runs} runs from {} on in {:?}, hash {hash:016x}: {sum:?}",
        seeds.start,
        began.elapsed()
    );
    assert!(failures.is_empty(), "seeds {failures:?}");
    assert!(sum.acks > 0 && sum.primaries > runs, "{sum:?}");
}

/// The checks can fail.
#[test]
fn a_service_that_breaks_its_promise_is_found_out() {
    for flaw in [Flaw::GivesTwice, Flaw::FastClock] {
        let found = (1..40).any(|seed| {
            let violation = run_apart(seed, flaw).violation;
            violation.is_some_and(|v| v.contains("acknowledge"))
        });
        assert!(found, "{flaw:?} is not found");
    }
}
