//! Real SQLite on the store on a disk that lies: histories from a seed, with crashes of the process
//! and of the power at any step, faults of the disk, and what the promises say is checked exactly.
//!
//! Which histories are tried is fixed: `cargo test --workspace --lib store::tests::sim` does the same
//! every time. `TENURE_SEED=n` and the name of a test try that one history again, and with
//! `TENURE_TRACE=1` every step is printed. `TENURE_SIM_SECS=n` tries others for n seconds instead.

mod history;
mod model;
mod scripts;
mod world;

use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};

use crate::store::disk::sim::Faults;
use world::World;

fn environment(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value}")))
}

/// Runs the histories of these seeds; or the one, or those of the time, that the environment names.
fn many(test: &str, regressions: &[u64], seeds: Range<u64>, history: impl Fn(u64)) {
    let mut count = 0;
    let mut run = |seed: u64| {
        if let Err(panic) = std::panic::catch_unwind(AssertUnwindSafe(|| history(seed))) {
            eprintln!(
                "again: TENURE_SEED={seed} cargo test --workspace --lib store::tests::sim::{test}"
            );
            std::panic::resume_unwind(panic);
        }
        count += 1;
    };
    let began = Instant::now();
    if let Some(seed) = environment("TENURE_SEED") {
        run(seed);
    } else if let Some(seconds) = environment("TENURE_SIM_SECS") {
        let base: u64 = rand::random();
        (0..)
            .map(|i| base.wrapping_add(i))
            .take_while(|_| began.elapsed() < Duration::from_secs(seconds))
            .for_each(&mut run);
    } else {
        regressions.iter().copied().chain(seeds).for_each(&mut run);
    }
    eprintln!("{test}: {count} histories in {:?}", began.elapsed());
}

fn world(seed: u64) -> World {
    let names = ["a.db", "b.db", "c.db"];
    let count = rand::rngs::StdRng::seed_from_u64(seed).random_range(1..=3);
    World::new(seed, &names[..count])
}

#[test]
fn histories() {
    // A page in the WAL that was written again unchanged, and a checkpoint.
    many(
        "histories",
        &[4729068161323257300, 10790100284880636661],
        0..1200,
        |seed| {
            let mut world = world(seed);
            world.live(3, 25);
        },
    );
}

/// A bit of a file at rest is another one: found, or of no effect; never anything else.
#[test]
fn rot() {
    many("rot", &[], 0..1200, |seed| {
        let mut world = world(seed);
        for _ in 0..15 {
            world.act();
        }
        world.rot_at_rest();
    });
}

#[test]
fn faults() {
    let regressions = [
        // An intent that was told to have failed, and could not be removed.
        12618118184055920327,
        // One that a start could finish in one database and not in the other.
        2462676501824856028,
        // One of which a part was applied to a database that was set aside.
        840717668361275381,
        // The file of a dropped database was gone before the drop was on disk.
        6861950989393512102,
        // The header of a WAL, and the name of a super-journal, that could not be read.
        12821949524101645346,
        12885839014938194106,
        16630864798235570569,
        // A drop was answered after a first commit that was logged and could not be flushed.
        238527847355055115,
        // An intent of which the first part could not be read, and the second was logged.
        18243154831111173695,
        // The oldest segments of a log were removed, and only the second stayed so.
        370,
        // A start could not note that it takes writes, and takes none.
        15087820446908445221,
        // A segment that another one follows held a torn record, and could not be cut.
        5129005688103429667,
        // A log had a record that it could not flush, and an intent another one of that number.
        15796111696517054067,
    ];
    let failed = std::cell::Cell::new(0);
    many("faults", &regressions, 0..900, |seed| {
        let mut world = world(seed);
        let mut rng = rand::rngs::StdRng::seed_from_u64(!seed);
        let some = |rng: &mut rand::rngs::StdRng| match rng.random_range(0..3) {
            0 => 0,
            1 => 5,
            _ => 50,
        };
        world.faults = Faults {
            eio: some(&mut rng),
            read_eio: some(&mut rng) / 5,
            full: some(&mut rng),
            rot: 0,
        };
        world.disk.set_faults(world.faults);
        world.live(3, 25);
        failed.set(failed.get() + world.disk.failed());
    });
    eprintln!("{} faults", failed.get());
}
