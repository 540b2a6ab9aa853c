//! What only one node has is never dropped without a word.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode};

use super::bed::{Bed, integrity, set_mode, snapshot, unpack};
use crate::ltx::{self, CHECKSUM_FLAG, Decoder, Pos};
use crate::store::{Common, Event, Received, Role, StoreError};

const DB: &str = "a.db";

fn insert(c: &Connection, n: usize) {
    for _ in 0..n {
        c.execute_batch("INSERT INTO t(v) VALUES (randomblob(3000))")
            .unwrap();
    }
}

/// A primary with some transactions.
fn primary(mode: &str) -> Bed {
    let bed = Bed::primary();
    let c = bed.connect(DB);
    set_mode(&c, mode);
    c.execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v)")
        .unwrap();
    insert(&c, 4);
    drop(c);
    bed.db(DB).settle();
    bed
}

fn write_table(bed: &Bed) {
    bed.store.set_role(Role::Primary);
    let c = bed.connect(DB);
    c.execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v)")
        .unwrap();
}

fn write(bed: &Bed, n: usize) {
    bed.store.set_role(Role::Primary);
    insert(&bed.connect(DB), n);
    bed.db(DB).settle();
}

/// A former primary with `old` transactions of its own, and its successor with `new` ones.
fn parted(mode: &str, old: usize, new: usize) -> (Bed, Bed, Pos) {
    let a = primary(mode);
    let b = Bed::replica();
    b.follow(&a, DB);
    let common = a.check(DB).0;
    write(&a, old);
    write(&b, new);
    a.store.set_role(Role::Replica { hostname: None });
    (a, b, common)
}

fn receive_asking(bed: &Bed, from: &Bed) -> Result<Received, StoreError> {
    let db = from.db(DB);
    bed.store
        .receive(DB, &mut &snapshot(&db).1[..], &mut |name, positions| {
            assert_eq!(name, DB);
            db.newest_common(positions)
        })
}

/// The files that were set aside, by first and last TXID.
fn kept(bed: &Bed) -> Vec<(PathBuf, (u64, u64))> {
    let dir = bed.dir.path().join("divergent").join(DB);
    let list = |dir: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).into_iter().flatten();
        entries.map(|e| e.unwrap().path()).collect()
    };
    let mut files: Vec<_> = list(&dir)
        .iter()
        .flat_map(|d| list(d))
        .map(|f| {
            let name = f.file_name().unwrap().to_str().unwrap();
            let range = ltx::parse_file_name(name).expect("the name of an LTX file");
            (f, range)
        })
        .collect();
    files.sort_by_key(|(_, range)| *range);
    files
}

fn ranges(bed: &Bed) -> Vec<(u64, u64)> {
    kept(bed).into_iter().map(|(_, range)| range).collect()
}

fn count(bed: &Bed) -> u64 {
    let db = bed.db(DB);
    let counter = &db.counters().divergent;
    counter.load(std::sync::atomic::Ordering::Relaxed)
}

fn rows(c: &Connection) -> rusqlite::Result<Vec<(i64, Vec<u8>)>> {
    let mut select = c.prepare("SELECT k, CAST(v AS BLOB) FROM t ORDER BY k")?;
    let rows = select.query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?;
    rows.collect()
}

#[test]
fn what_is_cached_of_another_history_is_neither_read_nor_written() {
    // Of as many transactions, and of fewer that come to be as many.
    for (old, new, more) in [(3, 3, 0), (3, 1, 2), (1, 1, 4)] {
        let (a, b, _) = parted("delete", old, new);
        let cached = a.connect(DB);
        rows(&cached).unwrap();
        receive_asking(&a, &b).unwrap();
        write(&b, more);
        a.follow(&b, DB);
        for _ in 0..2 {
            rows(&cached).unwrap_err();
        }
        // It becomes primary again.
        a.store.set_role(Role::Primary);
        let insert = "INSERT INTO t(v) VALUES (randomblob(3000))";
        cached.execute_batch(insert).unwrap_err();
        let anew = a.connect(DB);
        assert_eq!(rows(&anew).unwrap(), rows(&b.connect(DB)).unwrap());
        anew.execute_batch(insert).unwrap();
        cached.execute_batch(insert).unwrap_err();
        integrity(&anew);
        drop((cached, anew));
        a.check_killed(DB);
    }
}

#[test]
fn what_was_cached_before_there_was_a_wal_is_not_read_after_it() {
    let (a, b) = (primary("delete"), Bed::replica());
    b.follow(&a, DB);
    write(&a, 3);
    let cached = a.connect(DB);
    rows(&cached).unwrap();
    // The change counter goes back while nobody needs it, and has been here before when the database
    // leaves WAL mode.
    let in_wal_mode = a.connect(DB);
    set_mode(&in_wal_mode, "wal");
    rows(&in_wal_mode).unwrap();
    a.store.set_role(Role::Replica { hostname: None });
    write(&b, 1);
    receive_asking(&a, &b).unwrap();
    drop(in_wal_mode);
    write(&b, 2);
    a.follow(&b, DB);
    assert_eq!(a.check(DB), b.check(DB));
    let theirs = rows(&b.connect(DB)).unwrap();
    rows(&cached).expect_err("what it has cached is of another history");
    assert_eq!(rows(&a.connect(DB)).unwrap(), theirs);
    drop(cached);
    a.check_killed(DB);
}

#[test]
fn a_writer_that_keeps_its_lock_is_seen_by_readers_of_a_replica() {
    let a = primary("delete");
    let b = Bed::replica();
    b.follow(&a, DB);
    let writer = a.connect(DB);
    writer
        .execute_batch("PRAGMA locking_mode = EXCLUSIVE")
        .unwrap();
    for _ in 0..4 {
        let cached = b.connect(DB);
        rows(&cached).unwrap();
        writer.execute_batch("UPDATE t SET v = v + 1").unwrap();
        b.follow(&a, DB);
        let theirs = rows(&b.connect(DB)).unwrap();
        // Or it has to be opened anew: what it must not do is to read what was there before.
        assert!(rows(&cached).map_or(true, |ours| ours == theirs));
    }
    drop(writer);
    assert_eq!(b.check(DB), a.check(DB));
}

#[test]
fn transactions_that_the_primary_does_not_have_are_set_aside() {
    for mode in ["delete", "wal"] {
        for new in [1, 3, 6] {
            let (a, b, common) = parted(mode, 3, new);
            let mut events = a.store.events();
            let last = a.check(DB).0.txid;
            let reader = a.connect(DB);
            rows(&reader).unwrap();
            assert_eq!(
                receive_asking(&a, &b).unwrap(),
                Received::Applied(b.check(DB).0)
            );
            let expected: Vec<_> = (common.txid + 1..=last).map(|t| (t, t)).collect();
            assert_eq!(ranges(&a), expected, "{mode} {new}");
            let mut at = common;
            for (file, (_, txid)) in kept(&a) {
                let bytes = std::fs::read(file).unwrap();
                let mut decoder = Decoder::new(&bytes[..]).unwrap();
                assert_eq!(decoder.header().pre_apply_pos(), at);
                let mut page = vec![0; decoder.header().page_size as usize];
                while decoder.page(&mut page).unwrap().is_some() {}
                let checksum = decoder.finish().unwrap().1.post_apply_checksum;
                at = Pos { txid, checksum };
            }
            let told = std::iter::from_fn(|| events.try_recv().ok())
                .find(|e| matches!(e, Event::Divergent { .. }));
            let dir = kept(&a)[0].0.parent().unwrap().to_owned();
            let expected = Event::Divergent {
                db: DB.to_owned(),
                from: common.txid + 1,
                to: last,
                path: dir,
            };
            assert_eq!(told, Some(expected));
            assert_eq!(count(&a), 3);
            let theirs = rows(&b.connect(DB)).unwrap();
            if mode == "wal" || new > 3 {
                assert_eq!(rows(&reader).unwrap(), theirs);
                integrity(&reader);
            } else {
                // The change counter has been here before: what is cached would look current.
                let error = rows(&reader).unwrap_err();
                assert_eq!(error.sqlite_error_code(), Some(ErrorCode::NotADatabase));
                assert_eq!(rows(&a.connect(DB)).unwrap(), theirs);
            }
            drop(reader);
            assert_eq!(a.check_killed(DB), b.check(DB), "{mode} {new}");
            // The next one is an ordinary transaction again.
            write(&b, 1);
            a.follow(&b, DB);
            assert_eq!(a.check(DB), b.check(DB));
            assert_eq!(count(&a), 3, "once");
        }
    }
}

#[test]
fn a_node_that_is_only_behind_sets_nothing_aside() {
    let (a, b, _) = parted("delete", 0, 5);
    receive_asking(&a, &b).unwrap();
    assert_eq!(a.check(DB), b.check(DB));
    assert_eq!((ranges(&a), count(&a)), (vec![], 0));
    // Nor one that knows its snapshot already.
    assert_eq!(receive_asking(&a, &b).unwrap(), Received::Known);
    assert_eq!(ranges(&a), []);
}

#[test]
fn a_database_that_shares_nothing_is_kept_whole() {
    for mode in ["delete", "wal"] {
        let (a, b) = (primary(mode), Bed::primary());
        let c = b.connect(DB);
        // From the first transaction on another one.
        c.execute_batch("PRAGMA page_size=1024; CREATE TABLE t(k INTEGER PRIMARY KEY, v)")
            .unwrap();
        insert(&c, 6);
        drop(c);
        let (pos, image) = a.check(DB);
        a.store.set_role(Role::Replica { hostname: None });
        receive_asking(&a, &b).unwrap();
        assert_eq!(ranges(&a), [(1, pos.txid)]);
        let bytes = std::fs::read(&kept(&a)[0].0).unwrap();
        assert_eq!(unpack(&bytes), image);
        assert_eq!(a.check_killed(DB), b.check(DB));
        assert_eq!(count(&a), pos.txid);
    }
}

#[test]
fn what_the_log_has_no_more_is_kept_whole() {
    let (a, b, common) = parted("delete", 3, 5);
    let (pos, image) = a.check(DB);
    let bytes = snapshot(&b.db(DB)).1;
    // The primary shares a position that this node's log no longer tells of.
    let older = Pos {
        txid: common.txid - 1,
        checksum: CHECKSUM_FLAG | 77,
    };
    a.store
        .receive(DB, &mut &bytes[..], &mut |_, _| Common::At(older))
        .unwrap();
    assert_eq!(ranges(&a), [(1, pos.txid)]);
    assert_eq!(unpack(&std::fs::read(&kept(&a)[0].0).unwrap()), image);
}

#[test]
fn without_the_primarys_word_what_this_node_made_is_kept() {
    // Made in this life.
    let (a, b, common) = parted("wal", 2, 5);
    let last = a.check(DB).0.txid;
    a.receive(DB, &snapshot(&b.db(DB)).1).unwrap();
    let own: Vec<_> = (1..=last).map(|t| (t, t)).collect();
    assert_eq!(ranges(&a), own, "all of it was made here");
    // Received, all of it older than the snapshot.
    let c = Bed::replica();
    c.follow(&primary("wal"), DB);
    c.receive(DB, &snapshot(&b.db(DB)).1).unwrap();
    assert_eq!(ranges(&c), []);
    // Made in an earlier life: no less, however far the snapshot reaches.
    for new in [1, 9] {
        let (a, b, _) = parted("wal", 4, new);
        let a = a.restarted().restarted();
        a.receive(DB, &snapshot(&b.db(DB)).1).unwrap();
        let own: Vec<_> = (1..=common.txid + 4).map(|t| (t, t)).collect();
        assert_eq!(ranges(&a), own);
        assert_eq!(a.check_killed(DB), b.check(DB));
    }
    // Made since the last transaction that was received: whoever made that one may have gone on as this
    // node did, and then takes it for received with all that followed, so nobody else would keep it.
    let (a, b, common) = parted("wal", 4, 9);
    let c = Bed::replica();
    c.follow(&a, DB);
    c.store.set_role(Role::Replica { hostname: None });
    let c = c.restarted();
    write(&c, 2);
    c.store.set_role(Role::Replica { hostname: None });
    let c = c.restarted();
    c.receive(DB, &snapshot(&b.db(DB)).1).unwrap();
    let received = (1, common.txid + 4);
    let own = [common.txid + 5, common.txid + 6].map(|t| (t, t));
    assert_eq!(ranges(&c), [&[received][..], &own].concat());
}

#[test]
fn what_this_node_made_and_its_log_may_lack_is_kept_whole() {
    let a = Bed::with_retention(tempfile::tempdir().unwrap(), Duration::ZERO);
    write_table(&a);
    // Into a segment of their own.
    std::thread::sleep(Duration::from_millis(150));
    write(&a, 3);
    a.db(DB).checkpoint().unwrap();
    a.store.prune();
    let (pos, image) = a.check(DB);
    assert!(a.db(DB).log().first_txid() > 1, "the oldest are gone");
    a.store.set_role(Role::Replica { hostname: None });
    let b = primary("delete");
    write(&b, 9);
    a.receive(DB, &snapshot(&b.db(DB)).1).unwrap();
    assert_eq!(ranges(&a), [(1, pos.txid)]);
    assert_eq!(unpack(&std::fs::read(&kept(&a)[0].0).unwrap()), image);
}

#[test]
fn a_snapshot_is_refused_where_nothing_can_be_set_aside() {
    let (a, b, common) = parted("delete", 3, 5);
    let before = a.check(DB);
    let place = a.dir.path().join("divergent");
    std::fs::write(&place, "no directory").unwrap();
    let e = receive_asking(&a, &b).unwrap_err();
    assert!(matches!(e, StoreError::Io { .. }), "{e}");
    assert_eq!(a.check(DB), before);
    assert_eq!(count(&a), 0);
    std::fs::remove_file(&place).unwrap();
    receive_asking(&a, &b).unwrap();
    assert_eq!(ranges(&a).len() as u64, before.0.txid - common.txid);
    assert_eq!(a.check(DB), b.check(DB));
}

#[test]
fn a_dropped_database_that_came_back_elsewhere() {
    let (a, b, common) = parted("delete", 1, 2);
    a.store.set_role(Role::Primary);
    let db = a.db(DB);
    super::vfs::wait(|done| db.unlink(crate::store::FileKind::Database, done)).unwrap();
    a.store.set_role(Role::Replica { hostname: None });
    receive_asking(&a, &b).unwrap();
    let own = common.txid + 1;
    assert_eq!(ranges(&a), [(own, own), (own + 1, own + 1)]);
    assert_eq!(a.check_killed(DB), b.check(DB));
}

#[test]
fn the_newest_position_in_common_is_found() {
    let (a, b, common) = parted("delete", 3, 5);
    let (theirs, ours) = (a.db(DB), b.db(DB));
    let at = |txid, checksum| Pos { txid, checksum };
    let here = ours.pos();
    assert_eq!(ours.newest_common(&[here]), Common::At(here));
    assert_eq!(
        ours.newest_common(&[theirs.pos(), common]),
        Common::At(common)
    );
    assert_eq!(ours.newest_common(&[theirs.pos()]), Common::Nothing);
    assert_eq!(ours.newest_common(&[]), Common::Unknown);
    assert_eq!(ours.newest_common(&[Pos::default()]), Common::Unknown);
    // Of times that its log does not tell of.
    let beyond = at(here.txid + 1, CHECKSUM_FLAG);
    assert_eq!(ours.newest_common(&[beyond]), Common::Unknown);
    assert_eq!(
        ours.newest_common(&[at(u64::MAX, 0), here]),
        Common::At(here)
    );
    let c = Bed::replica();
    c.receive(DB, &snapshot(&ours).1).unwrap();
    assert_eq!(
        c.db(DB).newest_common(&[theirs.pos(), common]),
        Common::Unknown
    );
    // More than it looks at.
    let mut many = vec![at(common.txid, 1); 65_536];
    many.push(common);
    assert_eq!(ours.newest_common(&many), Common::Nothing);
}
