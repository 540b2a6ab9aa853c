//! Changes of role at run time, the end of a lease, and pauses: what an application is told is
//! true, and a transaction that was open never half happens.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::bed::{Bed, integrity, set_mode};
use super::vfs::wait;
use crate::sqlite::header::DbHeader;
use crate::store::{Event, FileKind, Role};

const DB: &str = "a.db";
const MODES: [&str; 4] = ["delete", "truncate", "persist", "wal"];
const REPLICA: Role = Role::Replica { hostname: None };

fn create(bed: &Bed, mode: &str) -> Connection {
    let c = bed.connect(DB);
    assert_eq!(set_mode(&c, mode), mode);
    c.execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v)")
        .unwrap();
    c
}

fn insert(c: &Connection) -> rusqlite::Result<()> {
    c.execute_batch("INSERT INTO t(v) VALUES (randomblob(5000))")
}

/// Writes as an application that tries again for a moment.
fn insert_soon(c: &Connection) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while let Err(e) = insert(c) {
        assert!(Instant::now() < deadline, "still not writable: {e}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn rows(c: &Connection) -> u64 {
    let n: i64 = c
        .query_row("SELECT count(*) FROM t", [], |r| r.get(0))
        .unwrap();
    n as u64
}

/// What an application has open when the role changes, and what it does then.
#[derive(Clone, Copy, Debug)]
struct Case {
    mode: &'static str,
    /// Whether its pages have left its cache for the files.
    spilled: bool,
    /// Whether the node is primary again before the transaction ends.
    promoted_again: bool,
    end: &'static str,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for mode in MODES {
        for spilled in [false, true] {
            for promoted_again in [false, true] {
                for end in ["COMMIT", "ROLLBACK", "INSERT INTO t(v) VALUES (1); COMMIT"] {
                    cases.push(Case {
                        mode,
                        spilled,
                        promoted_again,
                        end,
                    });
                }
            }
        }
    }
    cases
}

#[test]
fn a_transaction_that_is_open_when_the_role_changes_fails() {
    for case in cases() {
        let bed = Bed::primary();
        let c = create(&bed, case.mode);
        insert(&c).unwrap();
        let before = bed.check(DB);
        c.execute_batch("PRAGMA cache_size=5; BEGIN IMMEDIATE")
            .unwrap();
        for _ in 0..if case.spilled { 40 } else { 1 } {
            insert(&c).unwrap();
        }
        bed.store.set_role(REPLICA);
        assert_eq!(bed.check(DB), before, "{case:?}");
        assert!(bed.db(DB).file(FileKind::Journal).is_none(), "{case:?}");
        if case.promoted_again {
            bed.store.set_role(Role::Primary);
        }
        let said = c.execute_batch(case.end);
        if case.end != "ROLLBACK" {
            assert!(said.is_err(), "{case:?}: a false success");
        }
        if !c.is_autocommit() {
            // Whatever it says: it is over.
            let _ = c.execute_batch("ROLLBACK");
        }
        assert!(c.is_autocommit(), "{case:?}");
        assert_eq!(bed.check(DB), before, "{case:?}");
        let other = bed.connect(DB);
        assert_eq!((rows(&other), rows(&c)), (1, 1), "{case:?}");
        drop(other);
        bed.store.set_role(Role::Primary);
        insert_soon(&c);
        insert(&bed.connect(DB)).unwrap();
        assert_eq!(rows(&c), 3, "{case:?}");
        integrity(&c);
        drop(c);
        bed.check_killed(DB);
    }
}

#[test]
fn a_database_whose_first_transaction_is_open_never_was() {
    for mode in ["delete", "truncate"] {
        let bed = Bed::primary();
        let c = bed.connect(DB);
        set_mode(&c, mode);
        c.execute_batch("BEGIN IMMEDIATE; CREATE TABLE t(k)")
            .unwrap();
        bed.store.set_role(REPLICA);
        assert!(bed.store.database(DB).is_none());
        bed.store.set_role(Role::Primary);
        assert!(c.execute_batch("COMMIT").is_err());
        drop(c);
        let c = create(&bed, mode);
        insert(&c).unwrap();
        bed.check_killed(DB);
    }
}

#[test]
fn a_transaction_over_two_databases_fails_in_both() {
    for mode in ["delete", "truncate", "persist"] {
        for promoted_again in [false, true] {
            let bed = Bed::primary();
            let c = create(&bed, mode);
            c.execute_batch("ATTACH '/b.db' AS b").unwrap();
            c.execute_batch(&format!(
                "PRAGMA b.journal_mode={mode}; CREATE TABLE b.u(v)"
            ))
            .unwrap();
            let before = (bed.check(DB), bed.check("b.db"));
            c.execute_batch("BEGIN; INSERT INTO t(v) VALUES (1); INSERT INTO u VALUES (1)")
                .unwrap();
            bed.store.set_role(REPLICA);
            if promoted_again {
                bed.store.set_role(Role::Primary);
            }
            assert!(c.execute_batch("COMMIT").is_err());
            drop(c);
            assert_eq!((bed.check(DB), bed.check("b.db")), before);
            bed.store.set_role(Role::Primary);
            let c = bed.connect(DB);
            insert(&c).unwrap();
            integrity(&c);
        }
    }
}

#[test]
fn primaries_take_turns() {
    for mode in MODES {
        let beds = [Bed::primary(), Bed::replica()];
        drop(create(&beds[0], mode));
        beds[1].follow(&beds[0], DB);
        // Open from the first turn to the last.
        let held = [beds[0].connect(DB), beds[1].connect(DB)];
        let mut expected = 0;
        for turn in 0..20 {
            let (primary, replica) = (turn % 2, 1 - turn % 2);
            let c = beds[primary].connect(DB);
            for _ in 0..3 {
                insert(&c).unwrap();
            }
            expected += 3;
            if mode != "wal" {
                insert(&held[primary]).unwrap();
                expected += 1;
            }
            c.execute_batch("PRAGMA cache_size=5; BEGIN IMMEDIATE")
                .unwrap();
            for _ in 0..turn {
                insert(&c).unwrap();
            }
            beds[primary].store.set_role(REPLICA);
            let open = turn > 0;
            assert_eq!(c.execute_batch("COMMIT").is_err(), open, "{mode} {turn}");
            drop(c);
            beds[replica].follow(&beds[primary], DB);
            assert_eq!(
                beds[replica].check(DB),
                beds[primary].check(DB),
                "{mode} {turn}"
            );
            for reader in &held {
                assert_eq!(rows(reader), expected, "{mode} {turn}");
            }
            beds[replica].store.set_role(Role::Primary);
        }
        held.iter().for_each(integrity);
        drop(held);
        assert_eq!(beds[0].check_killed(DB), beds[1].check_killed(DB));
    }
}

#[test]
fn a_wal_that_the_primary_left_is_put_away_by_who_takes_over() {
    let (a, b) = (Bed::primary(), Bed::replica());
    let c = create(&a, "wal");
    insert(&c).unwrap();
    b.follow(&a, DB);
    // Keeps the replica in WAL mode for as long as it is open.
    let reader = b.connect(DB);
    assert_eq!(rows(&reader), 1);
    assert_eq!(set_mode(&c, "delete"), "delete");
    insert(&c).unwrap();
    a.store.set_role(REPLICA);
    b.follow(&a, DB);
    assert!(b.db(DB).file(FileKind::Wal).is_some(), "the test's premise");
    drop(reader);
    b.store.set_role(Role::Primary);
    assert!(b.db(DB).file(FileKind::Wal).is_none());
    let c = b.connect(DB);
    insert(&c).unwrap();
    assert_eq!(rows(&c), 3);
    integrity(&c);
    b.check_killed(DB);
}

#[test]
fn what_is_answered_after_the_leases_end_is_an_error() {
    for mode in MODES {
        let bed = Bed::primary();
        let c = create(&bed, mode);
        c.execute_batch("PRAGMA synchronous=FULL").unwrap();
        let (mut acknowledged, mut unanswered, mut n) = (0, 0, 0u64);
        let deadline = Instant::now() + Duration::from_secs(30);
        while unanswered < 3 {
            assert!(
                Instant::now() < deadline,
                "{mode}: {n} tries, never between"
            );
            n += 1;
            let lease = Duration::from_micros(n * 37 % 3000);
            bed.store.set_lease_end(Some(Instant::now() + lease));
            let said = insert(&c);
            let over = !bed.store.is_writable();
            let refused = bed.vfs.take_errors();
            let has = |text: &str| refused.iter().any(|e| e.contains(text));
            // Before the index tells of the transaction that was not answered, a writer is sent back.
            let behind = has("does not know of the last transaction");
            assert!(
                said.is_ok() || over || behind,
                "{mode}: {said:?} {refused:?}"
            );
            acknowledged += u64::from(said.is_ok());
            let late = has("before the transaction was answered");
            unanswered += u64::from(late && said.is_err());
            bed.store.set_lease_end(None);
        }
        bed.store.set_lease_end(Some(Instant::now()));
        assert!(insert(&c).is_err(), "{mode}: refused from the start");
        bed.store.set_lease_end(None);
        insert_soon(&c);
        let found = rows(&c);
        assert!(found > acknowledged, "{mode}: {found} of {acknowledged}");
        integrity(&c);
        drop(c);
        bed.check_killed(DB);
    }
}

#[test]
fn a_drop_that_is_answered_after_the_leases_end_is_an_error() {
    let bed = Bed::primary();
    drop(create(&bed, "delete"));
    let db = bed.db(DB);
    bed.store.set_lease_end(Some(Instant::now()));
    assert!(wait(|done| db.unlink(FileKind::Database, done)).is_err());
    bed.check(DB);
}

#[test]
fn after_a_pause_the_positions_are_all_that_was_acknowledged() {
    let bed = Arc::new(Bed::primary());
    let stop = Arc::new(AtomicBool::new(false));
    let acknowledged: Arc<[AtomicU64; 4]> = Arc::default();
    let mut base = [0; 4];
    let names: Vec<String> = MODES.iter().map(|m| format!("{m}.db")).collect();
    for (i, mode) in MODES.iter().enumerate() {
        let c = bed.connect(&names[i]);
        set_mode(&c, mode);
        c.execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v)")
            .unwrap();
        base[i] = bed.check(&names[i]).0.txid;
    }
    let writers: Vec<_> = (0..4)
        .map(|i| {
            let (bed, stop, acknowledged) = (bed.clone(), stop.clone(), acknowledged.clone());
            let name = names[i].clone();
            std::thread::spawn(move || {
                let c = bed.connect(&name);
                while !stop.load(Ordering::SeqCst) {
                    match c.execute_batch("INSERT INTO t(v) VALUES (1)") {
                        Ok(()) => acknowledged[i].fetch_add(1, Ordering::SeqCst),
                        Err(_) => continue,
                    };
                }
            })
        })
        .collect();
    for round in 0..30 {
        std::thread::sleep(Duration::from_millis(20));
        bed.store.pause_writes().unwrap();
        let paused = bed.store.positions();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(bed.store.positions(), paused, "round {round}");
        for i in 0..4 {
            let told = || base[i] + acknowledged[i].load(Ordering::SeqCst);
            let txid = paused[&names[i]].txid;
            // A thread that was just told may not have counted it yet.
            let deadline = Instant::now() + Duration::from_secs(10);
            while told() < txid && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(txid, told(), "{} round {round}", names[i]);
        }
        let sum: u64 = paused.values().map(|p| p.txid).sum();
        assert_eq!(bed.store.transactions(), sum);
        bed.store.resume_writes();
    }
    stop.store(true, Ordering::SeqCst);
    writers.into_iter().for_each(|w| w.join().unwrap());
    for (i, name) in names.iter().enumerate() {
        assert!(acknowledged[i].load(Ordering::SeqCst) > 30, "{name}");
        bed.check(name);
    }
}

#[test]
fn a_change_of_role_is_told_once() {
    let bed = Bed::replica();
    let mut events = bed.store.events();
    let role = |h: &str| Role::Replica {
        hostname: Some(h.to_owned()),
    };
    for role in [role("a"), role("a"), Role::Primary, Role::Primary, REPLICA] {
        bed.store.set_role(role);
    }
    let mut seen = Vec::new();
    while let Ok(Event::PrimaryChange {
        is_primary,
        hostname,
    }) = events.try_recv()
    {
        seen.push((is_primary, hostname));
    }
    assert_eq!(
        seen,
        [(false, Some("a".to_owned())), (true, None), (false, None)]
    );
}

/// What SQLite's checkpoint does when another connection has made the database larger after the
/// checkpointer looked: it cuts the file to the size that it saw.
#[test]
fn a_checkpoint_that_a_commit_overtook_cuts_nothing_off() {
    let bed = Bed::primary();
    let c = create(&bed, "wal");
    insert(&c).unwrap();
    let db = bed.db(DB);
    let file = db.file(FileKind::Database).unwrap();
    let before = u64::from(db.page_count()) * u64::from(db.page_size());
    c.execute_batch("PRAGMA wal_checkpoint(FULL)").unwrap();
    for _ in 0..20 {
        insert(&c).unwrap();
    }
    // Only the WAL has the new pages: nothing is lost by the cut.
    wait(|done| db.truncate(&file, before, done)).unwrap();
    bed.check(DB);
    c.execute_batch("PRAGMA wal_checkpoint(FULL)").unwrap();
    let committed = db.size(&file).unwrap();
    wait(|done| db.truncate(&file, before, done)).unwrap();
    assert_eq!(
        db.size(&file).unwrap(),
        committed,
        "what is committed stays"
    );
    bed.check(DB);
    integrity(&c);
    drop(c);
    bed.check_killed(DB);
}

/// A header is the application's word alone.
#[test]
fn a_database_that_says_to_be_absurdly_large_is_refused() {
    let bed = Bed::primary();
    let c = create(&bed, "delete");
    insert(&c).unwrap();
    let before = bed.check(DB);
    let db = bed.db(DB);
    let file = db.file(FileKind::Database).unwrap();
    let mut page = vec![0; db.page_size() as usize];
    db.read(&file, 0, &mut page).unwrap();
    let pages = 1u32 << 30;
    page[28..32].copy_from_slice(&pages.to_be_bytes());
    assert_eq!(
        DbHeader::parse(&page).unwrap().pages(0),
        pages,
        "the test's premise"
    );
    // A journal of one segment, with the magic number that makes it count.
    let journal = db.create(FileKind::Journal, false).unwrap();
    let magic = crate::sqlite::journal::MAGIC;
    wait(|done| db.write(&journal, 0, &magic, done)).unwrap();
    wait(|done| db.write(&file, 0, &page, done)).unwrap();
    let size = u64::from(pages) * page.len() as u64;
    wait(|done| db.truncate(&file, size, done)).unwrap();
    let began = Instant::now();
    let e = wait(|done| db.unlink(FileKind::Journal, done)).unwrap_err();
    assert!(e.to_string().contains("1073741824 pages"), "{e}");
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
    bed.store.set_role(REPLICA);
    assert_eq!(bed.check(DB), before);
}

#[test]
fn only_a_node_without_data_changes_its_cluster() {
    let id = |n: u64| format!("LFSC{n:016X}");
    let bed = Bed::primary();
    bed.store.set_cluster_id(&id(1)).unwrap();
    // A name that somebody looked up is no database.
    bed.store.database_or_new("none.db").unwrap();
    assert!(bed.store.change_cluster_id(&id(2)).unwrap());
    assert_eq!(bed.store.cluster_id(), Some(id(2)));
    let c = bed.connect("a.db");
    c.execute_batch("CREATE TABLE t(x)").unwrap();
    drop(c);
    assert!(!bed.store.change_cluster_id(&id(3)).unwrap());
    let bed = bed.restarted();
    assert!(!bed.store.change_cluster_id(&id(3)).unwrap());
    assert_eq!(bed.store.cluster_id(), Some(id(2)));
}
