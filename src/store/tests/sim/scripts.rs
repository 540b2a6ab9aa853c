//! Short histories with a crash at every single step, each of every kind.

use std::time::Duration;

use super::world::{Crash, World};
use crate::ltx::Pos;
use crate::store::disk::sim::Keep;
use crate::store::tests::bed::{Bed, checksum, image, set_mode, snapshot};
use crate::store::{Common, Next, Role, Store};

/// What a script does next.
#[derive(Clone, Copy)]
enum Do {
    /// Connection 0 to the first database; the second attached, if there is one.
    Open,
    Sql(&'static str),
    /// A transaction on the first database.
    Write,
    /// One on both.
    WriteBoth,
    Drop,
    Import,
    /// The node saves a checkpoint and prunes its log.
    Prune,
    NewSegment,
    Close,
    Restart,
}
use Do::{Close, Drop as DropIt, Import, NewSegment, Open, Prune, Restart, Sql, Write, WriteBoth};

const KINDS: [Crash; 5] = [
    Crash::Process,
    Crash::Power(Keep::Nothing),
    Crash::Power(Keep::All),
    Crash::Power(Keep::Some),
    Crash::Power(Keep::Some),
];

fn play(world: &mut World, script: &[Do]) {
    for step in script {
        if world.disk.is_dead() {
            return;
        }
        match *step {
            Open => {
                let both = world.models.len() > 1;
                if let Err(e) = world.connect(0) {
                    return world.excuse("connect", &e);
                }
                world.run(0, "PRAGMA page_size=1024");
                if both {
                    let name = world.models[1].name.clone();
                    world.run(0, &format!("ATTACH '/{name}' AS o"));
                    world.clients[0].other = Some(1);
                }
            }
            Sql(sql) => world.run(0, sql),
            Write | WriteBoth => world.transaction_of(0, matches!(step, WriteBoth)),
            DropIt => world.drop_database(0),
            Import => world.import(0, 1024),
            Prune => world.node_does(0, 1),
            NewSegment => world.node_does(0, 2),
            Close => world.close_clients(),
            Restart => world.restart(),
        }
        world.observe();
    }
}

/// Runs the script once for every step and kind of crash. Returns how many runs that were.
fn exhaust(name: &str, databases: usize, script: &[Do]) -> u64 {
    let names = &["a.db", "b.db"][..databases];
    let mut whole = World::new(7, names);
    let first = whole.disk.steps();
    play(&mut whole, script);
    let last = whole.disk.steps();
    drop(whole);
    assert!(last > first + 10, "{name} does something");
    let mut runs = 0;
    for step in first + 1..=last + 1 {
        for (i, kind) in KINDS.into_iter().enumerate() {
            let mut world = World::new(7, names);
            world.tell(format!("{name}: {kind:?} at step {step}"));
            world.disk.crash_at(Some(step));
            world.disk.reseed(step * 8 + i as u64);
            play(&mut world, script);
            world.crash(kind, &mut |_| None);
            // It goes on working.
            play(&mut world, &[Open, Write]);
            world.crash(Crash::Power(Keep::Nothing), &mut |_| None);
            runs += 1;
        }
    }
    eprintln!("{name}: {} steps, {runs} runs", last - first);
    runs
}

const DELETE: &str = "PRAGMA journal_mode=DELETE";
const TRUNCATE: &str = "PRAGMA journal_mode=TRUNCATE";
const PERSIST: &str = "PRAGMA journal_mode=PERSIST";
const WAL: &str = "PRAGMA journal_mode=WAL";
const NORMAL: &str = "PRAGMA synchronous=NORMAL";

#[test]
fn every_step_in_the_rollback_modes() {
    for mode in [DELETE, TRUNCATE, PERSIST] {
        exhaust(mode, 1, &[Open, Sql(mode), Write, Write, Write]);
    }
    exhaust(
        "segments",
        1,
        &[Open, Write, NewSegment, Write, Prune, Write],
    );
}

#[test]
fn every_step_in_wal_mode() {
    exhaust(
        "WAL FULL",
        1,
        &[
            Open,
            Write,
            Sql(WAL),
            Write,
            Sql("PRAGMA wal_checkpoint(TRUNCATE)"),
            Write,
        ],
    );
    exhaust(
        "WAL NORMAL",
        1,
        &[
            Open,
            Sql(WAL),
            Sql(NORMAL),
            Write,
            Write,
            Sql("PRAGMA wal_checkpoint"),
            Write,
            Close,
        ],
    );
    exhaust(
        "to and fro",
        1,
        &[Open, Write, Sql(WAL), Write, Sql(DELETE), Write],
    );
}

#[test]
fn every_step_of_a_vacuum() {
    exhaust("VACUUM", 1, &[Open, Write, Write, Sql("VACUUM"), Write]);
    exhaust(
        "page size",
        1,
        &[
            Open,
            Write,
            Sql("PRAGMA page_size=512"),
            Sql("VACUUM"),
            Write,
        ],
    );
}

#[test]
fn every_step_of_a_transaction_over_two_databases() {
    exhaust("ATTACH", 2, &[Open, WriteBoth, WriteBoth]);
}

/// A snapshot takes the TXIDs back, and the power goes: the removal of the intent of a transaction over
/// two databases was not on disk yet, and that of what a clean stop leaves for LiteFS is.
#[test]
fn what_a_snapshot_took_the_place_of_does_not_come_back() {
    for restarted in [false, true] {
        let source = primary("DELETE", 0);
        let mut world = World::new(7, &["a.db", "b.db"]);
        play(
            &mut world,
            &[Open, Write, WriteBoth, Write, WriteBoth, Close],
        );
        if restarted {
            // What the stop leaves for LiteFS is gone for good.
            world.restart();
        }
        let last = world.store().database("a.db").unwrap().pos();
        // The histories of the models end here.
        world.models.clear();
        world.pairs.clear();
        let store = world.store().clone();
        store.set_role(Role::Replica { hostname: None });
        assert!(follow(&store, &source, false));
        drop(store);
        world.crash(Crash::Power(Keep::Nothing), &mut |_| None);
        for name in ["a.db", "b.db"] {
            let db = world.store().database(name).unwrap();
            assert_eq!(db.broken(), None, "{name}, restarted: {restarted}");
        }
        let pos = world.store().database("a.db").unwrap().pos();
        assert_eq!(pos, source.image.0);
        assert!(pos.txid < last.txid);
    }
}

/// A start after a crash at any step finishes all of a transaction, or nothing, whatever it could not
/// read.
#[test]
fn every_read_of_a_start_after_a_transaction_over_two_databases() {
    let script = [Open, WriteBoth, WriteBoth];
    let (mut runs, mut step) = (0, 0);
    let mut goes_on = true;
    while goes_on {
        step += 1;
        for read in 0.. {
            let mut world = World::new(7, &["a.db", "b.db"]);
            world.disk.crash_at(Some(world.disk.steps() + step));
            play(&mut world, &script);
            goes_on = world.disk.is_dead();
            runs += 1;
            if !world.start_with_a_read_error(read) {
                break;
            }
        }
    }
    eprintln!("{step} steps, {runs} runs");
    assert!(runs > 3 * step);
}

#[test]
fn every_step_of_larger_changes() {
    exhaust("drop", 1, &[Open, Write, Prune, Close, DropIt, Open, Write]);
    exhaust("import", 1, &[Open, Write, Import, Close, Import]);
    exhaust("import, WAL", 1, &[Open, Write, Sql(WAL), Write, Import]);
    exhaust("restart", 1, &[Open, Write, Restart, Open, Write]);
}

/// A primary, with a snapshot of its beginning and what it holds at the end.
struct Source {
    bed: Bed,
    early: Vec<u8>,
    image: (Pos, Vec<u8>),
}

impl Source {
    /// All positions that it has had.
    fn positions(&self) -> Vec<Pos> {
        let db = self.bed.db("a.db");
        let (mut all, last) = (vec![self.image.0], self.image.0.txid);
        for txid in 2..=last {
            let record = db.log().read(txid).unwrap().expect("nothing is pruned");
            all.push(record.ltx_header().unwrap().pre_apply_pos());
        }
        all
    }
}

/// Feeds a replica from the primary until it has all, or the disk dies.
fn follow(store: &Store, source: &Source, prune: bool) -> bool {
    let from = source.bed.db("a.db");
    for round in 0.. {
        assert!(round < 1000, "the replica follows");
        let pos = match store.database("a.db") {
            Some(db) if db.broken().is_none() => db.captured_pos(),
            _ => Pos::default(),
        };
        let bytes = match from.record_after(pos).unwrap() {
            Next::UpToDate => break,
            Next::Record(r) => r.bytes.to_vec(),
            Next::Large(r) => r.load().unwrap().bytes.to_vec(),
            Next::Snapshot => source.early.clone(),
        };
        let received = store.receive("a.db", &mut &bytes[..], &mut |_, _| Common::Unknown);
        if received.is_err() {
            return false;
        }
        if round % 3 == 2 {
            store.run_background();
        }
        if prune && round % 4 == 3 {
            let db = store.database("a.db").unwrap();
            db.log().age_segment();
            if db.prune_log(Duration::ZERO).is_err() {
                return false;
            }
        }
    }
    store.run_background();
    true
}

/// A replica receives; a crash at every step; it follows on, and ends byte-equal.
fn exhaust_replica(name: &str, first: &Source, second: Option<&Source>) {
    let beds: Vec<&Source> = std::iter::once(first).chain(second).collect();
    let known: Vec<Pos> = beds.iter().flat_map(|b| b.positions()).collect();
    let (mut step, mut runs) = (0, 0);
    loop {
        step += 1;
        let mut died = false;
        for (i, kind) in KINDS.into_iter().enumerate() {
            let mut world = World::new(9, &[]);
            world.tell(format!("{name}: {kind:?} at step {step}"));
            world.store().set_role(Role::Replica { hostname: None });
            world.disk.reseed(step * 8 + i as u64);
            world.disk.crash_at(Some(world.disk.steps() + step));
            let _ = beds
                .iter()
                .all(|bed| follow(world.store(), bed, second.is_none()));
            died |= world.disk.is_dead();
            let told = world.store().database("a.db").map(|d| d.pos());
            world.crash(kind, &mut |_| None);
            world.store().set_role(Role::Replica { hostname: None });
            let store = world.store().clone();
            if let Some(db) = store.database("a.db") {
                assert_eq!(db.broken(), None, "{name}, step {step}, {kind:?}");
                let told = told.unwrap_or_default();
                let pos = db.pos();
                let fits = pos.is_zero() || known.contains(&pos);
                assert!(fits, "{name}, step {step}, {kind:?}: {pos}");
                // A snapshot of another history may have fewer.
                let back = pos.txid < told.txid && second.is_none();
                assert!(!back, "{name}, step {step}, {kind:?}: {pos} after {told}");
            } else {
                let told = told.unwrap_or_default();
                assert!(
                    told.is_zero(),
                    "{name}, step {step}, {kind:?}: gone after {told}"
                );
            }
            for bed in &beds {
                assert!(follow(&store, bed, false), "{name}, step {step}, {kind:?}");
            }
            let last = beds.last().expect("one at least");
            let (pos, bytes) = image(&store.database("a.db").unwrap());
            let whole = (pos, &bytes) == (last.image.0, &last.image.1);
            assert!(whole, "{name}, step {step}, {kind:?}: another database");
            let page_size = store.database("a.db").unwrap().page_size();
            assert_eq!(checksum(&bytes, page_size), pos.checksum);
            drop(store);
            runs += 1;
        }
        if !died {
            break;
        }
    }
    eprintln!("{name}: {step} steps, {runs} runs");
}

fn primary(mode: &str, rounds: usize) -> Source {
    let bed = Bed::primary();
    let c = bed.connect("a.db");
    c.execute_batch("PRAGMA page_size=1024").unwrap();
    set_mode(&c, mode);
    c.execute_batch("CREATE TABLE t(v)").unwrap();
    let early = snapshot(&bed.db("a.db")).1;
    for i in 0..rounds {
        c.execute("INSERT INTO t VALUES (zeroblob(?))", [700 * (i as i64 % 4)])
            .unwrap();
        if i % 3 == 1 {
            c.execute_batch("DELETE FROM t WHERE rowid%2=0").unwrap();
        }
    }
    drop(c);
    let image = bed.check("a.db");
    Source { bed, early, image }
}

#[test]
fn every_step_of_a_replica() {
    exhaust_replica("records", &primary("DELETE", 5), None);
    exhaust_replica("records, WAL", &primary("WAL", 5), None);
}

#[test]
fn every_step_of_a_snapshot() {
    // Of another history: it takes the place of what there is.
    let (first, second) = (primary("DELETE", 4), primary("WAL", 3));
    exhaust_replica("snapshot", &first, Some(&second));
    let (first, second) = (primary("WAL", 2), primary("DELETE", 5));
    exhaust_replica("snapshot, WAL", &first, Some(&second));
}

#[test]
fn the_same_seed_does_the_same() {
    for seed in [1, 2, 3, 4, 5] {
        let trace = |_| {
            let mut world = super::world(seed);
            world.disk.start_trace();
            world.live(2, 20);
            world.disk.take_trace()
        };
        let [one, two] = [0, 1].map(trace);
        assert!(one.len() > 50);
        for (i, (a, b)) in one.iter().zip(&two).enumerate() {
            assert_eq!(a, b, "step {i} of seed {seed}");
        }
        assert_eq!(one.len(), two.len());
    }
}

/// The checks find a disk that answers syncs and does not do them.
#[test]
fn a_disk_that_does_not_sync_is_found() {
    let found = (0..20).any(|seed| {
        let history = std::panic::AssertUnwindSafe(|| {
            let mut world = World::new(seed, &["a.db"]);
            world.disk.ignore_syncs();
            play(&mut world, &[Open, Write, Write]);
            world.crash(Crash::Power(Keep::Nothing), &mut |_| None);
        });
        std::panic::catch_unwind(history).is_err()
    });
    assert!(found);
}
