//! A backup's snapshot applied to a primary whose databases are open.

use super::bed::Bed;
use crate::ltx::Pos;
use crate::store::{Role, StoreError};

const DB: &str = "x.db";

fn snapshot(bed: &Bed) -> Vec<u8> {
    let mut ltx = Vec::new();
    bed.db(DB).snapshot().unwrap().write_to(&mut ltx).unwrap();
    ltx
}

#[test]
fn open_connections_see_what_was_restored() {
    for mode in ["delete", "truncate", "persist", "wal"] {
        for page_size in [1024, 4096] {
            let ahead = Bed::primary();
            let c = ahead.connect(DB);
            c.execute_batch(&format!(
                "PRAGMA page_size=4096; PRAGMA journal_mode={mode}; CREATE TABLE t (a); INSERT INTO t VALUES (1);"
            ))
            .unwrap();
            let behind = ahead.killed();
            behind.store.set_role(Role::Primary);
            let open = behind.connect(DB);
            let rows = |sql: &str| -> i64 { open.query_row(sql, [], |r| r.get(0)).unwrap() };
            assert_eq!(rows("SELECT count(*) FROM t"), 1);
            c.execute_batch(&format!(
                "CREATE TABLE u (a); INSERT INTO u VALUES (zeroblob(70000)), (2);
                 PRAGMA journal_mode=delete; PRAGMA page_size={page_size}; VACUUM; PRAGMA journal_mode={mode};"
            ))
            .unwrap();
            let ltx = snapshot(&ahead);
            let here = behind.check(DB).0;
            let wrong = Pos {
                txid: here.txid - 1,
                ..here
            };
            let refused = behind.store.restore(DB, wrong, &mut &ltx[..]);
            assert!(
                matches!(refused, Err(StoreError::PositionMismatch { .. })),
                "{refused:?}"
            );
            assert_eq!(behind.check(DB).0, here);
            let pos = behind.store.restore(DB, here, &mut &ltx[..]).unwrap();
            assert_eq!(pos, ahead.db(DB).pos());
            assert_eq!(rows("SELECT count(*) FROM u"), 2, "{mode} {page_size}");
            open.execute_batch("INSERT INTO t VALUES (3)").unwrap();
            assert_eq!(behind.check(DB).0.txid, pos.txid + 1);
            assert_eq!(behind.killed().check(DB), behind.check(DB));
        }
    }
}

#[test]
fn a_database_that_was_dropped_stays_so() {
    let ahead = Bed::primary();
    ahead
        .connect(DB)
        .execute_batch("CREATE TABLE t (a);")
        .unwrap();
    let behind = ahead.killed();
    behind.store.set_role(Role::Primary);
    let (done, dropped) = std::sync::mpsc::channel();
    ahead.db(DB).unlink(
        crate::store::FileKind::Database,
        Box::new(move |r| done.send(r).unwrap()),
    );
    dropped.recv().unwrap().unwrap();
    let ltx = snapshot(&ahead);
    let here = behind.db(DB).pos();
    let pos = behind.store.restore(DB, here, &mut &ltx[..]).unwrap();
    assert_eq!(pos, ahead.db(DB).pos());
    assert_eq!(behind.db(DB).page_count(), 0);
    behind
        .connect(DB)
        .execute_batch("CREATE TABLE u (a);")
        .unwrap();
    assert_eq!(behind.check(DB).0.txid, pos.txid + 1);
}
