//! Every body with all seeds, everything that ever broke it, and some thousands of mutations.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::{TARGETS, body, seeds};

/// How long the mutations of one target may take; the seeds and at least [`LEAST`] are run anyhow.
const TIME: Duration = Duration::from_millis(1500);
const LEAST: usize = 100;
/// How many mutations there are where time allows it.
const MOST: usize = 4000;

/// Bytes that numbers are made of where things break.
const EDGES: [u64; 12] = [
    0,
    1,
    2,
    7,
    0x7f,
    0xff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

fn run(target: &str) {
    let all = seeds::seeds(target);
    let mut inputs = seeds::crashers(target);
    inputs.extend(all.iter().cloned());
    inputs.push(Vec::new());
    for input in &inputs {
        attempt(target, input);
    }
    let mut random = StdRng::seed_from_u64(0x7e9_0e5);
    let begun = Instant::now();
    let mut done = 0;
    while done < LEAST || done < MOST && begun.elapsed() < TIME {
        attempt(target, &mutation(&all, &mut random));
        done += 1;
    }
    println!(
        "{target}: {} seeds, {done} mutations in {:?}",
        inputs.len(),
        begun.elapsed()
    );
}

/// Runs a body; keeps what it fails on.
fn attempt(target: &str, input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(target)(input))) {
        let kept = std::env::temp_dir().join(format!("tenure-fuzz-{target}"));
        std::fs::write(&kept, input).expect("the input is kept");
        eprintln!(
            "the input is {}: put it into tests/fuzz/crashers/{target}",
            kept.display()
        );
        std::panic::resume_unwind(panic);
    }
}

/// One of the seeds with a few changes.
fn mutation(seeds: &[Vec<u8>], random: &mut StdRng) -> Vec<u8> {
    let mut input = seeds[random.random_range(0..seeds.len())].clone();
    for _ in 0..random.random_range(1..5) {
        let at = random.random_range(0..input.len() + 1);
        let n = random.random_range(1..9).min(input.len() - at);
        match random.random_range(0..8) {
            0 if n > 0 => input[at] ^= 1 << random.random_range(0..8),
            1 if n > 0 => input[at..at + n].fill_with(|| random.random()),
            2 => input.truncate(at),
            3 => drop(input.drain(at..at + n)),
            4 => drop(input.splice(at..at, std::iter::repeat_with(|| random.random()).take(8))),
            5 => {
                let other = &seeds[random.random_range(0..seeds.len())];
                let from = random.random_range(0..other.len() + 1);
                let n = random.random_range(0..200).min(other.len() - from);
                input.splice(at..at, other[from..from + n].iter().copied());
            }
            _ => {
                let width = [1, 2, 4, 8][random.random_range(0..4)].min(input.len() - at);
                let edge = EDGES[random.random_range(0..EDGES.len())].to_be_bytes();
                input[at..at + width].copy_from_slice(&edge[8 - width..]);
            }
        }
    }
    input
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            run(stringify!($name));
        })*

        #[test]
        fn every_target_is_here_and_can_be_fuzzed() {
            let here = [$(stringify!($name)),*];
            assert!(TARGETS.iter().map(|(name, _)| *name).eq(here));
            let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/Cargo.toml");
            let manifest = std::fs::read_to_string(manifest).unwrap();
            assert!(here.iter().all(|name| manifest.contains(&format!("name = \"{name}\""))));
        }
    };
}

targets!(ltx merge frames posmap journal wal wal_index wal_capture replica log_segment sums intent config values);
