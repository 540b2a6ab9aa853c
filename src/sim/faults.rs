//! What goes wrong, one thing after another and at once, from the seed.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::net;
use super::node::Cluster;
use super::process;

/// Lets things go wrong until the world ends; gives how many. What was begun is over by itself, or
/// when everything is healed.
pub(crate) async fn run(cluster: Arc<Cluster>) -> u64 {
    let world = cluster.world.clone();
    // Some seeds have it quiet.
    let pace = [300, 1_500, 5_000][world.range(0..3) as usize];
    let mut count = 0;
    while !world.has_ended() {
        sleep(world.ms(10..2 * pace)).await;
        if !world.has_ended() {
            count += 1;
            one(&cluster).await;
        }
    }
    count
}

async fn one(cluster: &Arc<Cluster>) {
    let world = &cluster.world;
    let nodes = cluster.nodes.len();
    let any = || world.range(0..nodes as u64) as usize;
    let (a, b) = (any(), any());
    match world.range(0..26) {
        0..3 if a != b => {
            let both = world.one_in(2);
            let time = world.ms(100..25_000);
            world.note(format!("{a}->{b} cut for {time:?}, both ways: {both}"));
            cluster.net.cut(a, b, true);
            if both {
                cluster.net.cut(b, a, true);
            }
            later(cluster, time, move |cluster| {
                cluster.net.cut(a, b, false);
                cluster.net.cut(b, a, false);
            });
        }
        3..5 => {
            let service = world.one_in(2);
            let time = world.ms(100..25_000);
            world.note(format!("n{a} alone for {time:?}, service too: {service}"));
            isolate(cluster, a, true, service);
            later(cluster, time, move |cluster| {
                isolate(cluster, a, false, service);
            });
        }
        5..7 if a != b => {
            world.note(format!("connections {a}-{b} break"));
            cluster.net.break_connections(a, b);
        }
        7 if a != b => {
            let slow = world.ms(10..800);
            cluster.net.slow(a, b, slow);
            let time = world.ms(1_000..20_000);
            later(cluster, time, move |cluster| {
                cluster.net.slow(a, b, Duration::ZERO);
            });
        }
        8..11 => {
            cluster.kill(a).await;
            start_again(cluster, a);
        }
        11 => {
            cluster.stop(a).await;
            start_again(cluster, a);
        }
        12..15 => {
            let Some(life) = cluster.nodes[a].life() else {
                return;
            };
            let time = world.ms(50..20_000);
            world.note(format!("n{a} stands still for {time:?}"));
            life.process.pause();
            later(cluster, time, move |cluster| {
                cluster.world.note(format!("n{a} goes on"));
                life.process.go_on();
            });
        }
        15..17 => {
            let time = world.ms(100..25_000);
            world.note(format!("the lease service is away from n{a} for {time:?}"));
            cluster.service.set_away(a, true);
            later(cluster, time, move |cluster| {
                cluster.service.set_away(a, false);
            });
        }
        17 => {
            let time = world.ms(100..20_000);
            world.note(format!("the lease service is away for {time:?}"));
            (0..nodes).for_each(|n| cluster.service.set_away(n, true));
            later(cluster, time, move |cluster| {
                cluster.service.restart();
                (0..nodes).for_each(|n| cluster.service.set_away(n, false));
            });
        }
        18 => {
            cluster.service.set_slow(true);
            let time = world.ms(1_000..15_000);
            later(cluster, time, |cluster| cluster.service.set_slow(false));
        }
        19..22 => operate(cluster, a, "/promote"),
        22 => {
            for node in 0..nodes {
                operate(cluster, node, "/demote");
            }
        }
        23 => {
            cluster.lose_power(a).await;
            start_again(cluster, a);
        }
        24 if world.one_in(2) => {
            for node in 0..nodes {
                cluster.lose_power(node).await;
                start_again(cluster, node);
            }
        }
        25 => {
            cluster.wipe(a).await;
            start_again(cluster, a);
        }
        _ => {}
    }
}

fn isolate(cluster: &Cluster, node: usize, cut: bool, service: bool) {
    for other in (0..cluster.nodes.len()).filter(|n| *n != node) {
        cluster.net.cut(node, other, cut);
        cluster.net.cut(other, node, cut);
    }
    if service {
        cluster.service.set_away(node, cut);
    }
}

fn operate(cluster: &Arc<Cluster>, node: usize, path: &'static str) {
    let cluster = cluster.clone();
    process::spawn_free(async move {
        let status = net::operate(&cluster.net, node, path).await;
        cluster.world.note(format!("n{node} {path}: {status:?}"));
    });
}

fn start_again(cluster: &Arc<Cluster>, node: usize) {
    let time = cluster.world.ms(10..12_000);
    later(cluster, time, move |cluster| cluster.start(node));
}

fn later(
    cluster: &Arc<Cluster>,
    time: Duration,
    what: impl FnOnce(&Arc<Cluster>) + Send + 'static,
) {
    let cluster = cluster.clone();
    process::spawn_free(async move {
        sleep(time).await;
        if !cluster.world.has_ended() {
            what(&cluster);
        }
    });
}
