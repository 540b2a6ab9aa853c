//! Snapshots are of the position that they were taken at, whatever happens until they are written.

use std::io::{self, Write};

use rusqlite::Connection;

use super::bed::{Bed, image, set_mode, snapshot, unpack};
use super::vfs::wait;
use crate::ltx::Pos;
use crate::store::{FileKind, Snapshot};

const DB: &str = "a.db";

fn filled(mode: &str) -> (Bed, Connection) {
    let bed = Bed::primary();
    let c = bed.connect(DB);
    set_mode(&c, mode);
    c.execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v)")
        .unwrap();
    for _ in 0..8 {
        c.execute_batch("INSERT INTO t(v) VALUES (randomblob(60000))")
            .unwrap();
    }
    (bed, c)
}

fn take(bed: &Bed) -> Snapshot {
    bed.db(DB).snapshot().unwrap()
}

/// Writes it out, doing `each` between the pieces.
fn write_with(snapshot: &mut Snapshot, each: impl FnMut(usize)) -> (Pos, Vec<u8>) {
    struct Between<F> {
        bytes: Vec<u8>,
        pieces: usize,
        each: F,
    }
    impl<F: FnMut(usize)> Write for Between<F> {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.pieces += 1;
            (self.each)(self.pieces);
            self.bytes.extend_from_slice(buf);
            Ok(buf.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut out = Between {
        bytes: Vec::new(),
        pieces: 0,
        each,
    };
    let pos = snapshot.write_to(&mut out).unwrap();
    let image = unpack(&out.bytes);
    (pos, image)
}

#[test]
fn a_snapshot_keeps_its_state_while_writers_go_on() {
    for mode in ["delete", "persist", "wal"] {
        let (bed, c) = filled(mode);
        c.execute_batch("PRAGMA wal_autocheckpoint=20").unwrap();
        let before = bed.check(DB);
        let mut first = take(&bed);
        for _ in 0..20 {
            c.execute_batch("UPDATE t SET v = randomblob(9000) WHERE k = 1 + abs(random()) % 8")
                .unwrap();
        }
        let between = bed.check(DB);
        let mut second = take(&bed);
        c.execute_batch("DELETE FROM t WHERE k > 2; VACUUM")
            .unwrap();
        c.execute_batch("INSERT INTO t(v) VALUES (randomblob(900000))")
            .unwrap();
        let after = bed.check(DB);
        assert_eq!((first.pos(), second.pos()), (before.0, between.0));
        assert_eq!(write_with(&mut first, |_| {}), before, "{mode}");
        assert_eq!(write_with(&mut second, |_| {}), between, "{mode}");
        assert_eq!(image(&bed.db(DB)), after, "{mode}");
    }
}

#[test]
fn a_snapshot_keeps_its_state_while_it_is_written() {
    for mode in ["delete", "wal"] {
        let (bed, c) = filled(mode);
        c.execute_batch("PRAGMA wal_autocheckpoint=20").unwrap();
        let before = bed.check(DB);
        let mut s = take(&bed);
        let mut commits = 0;
        let found = write_with(&mut s, |piece| {
            if piece % 16 == 0 {
                commits += 1;
                let sql = match commits % 5 {
                    0 => "DELETE FROM t WHERE k = (SELECT max(k) FROM t)",
                    1 => "INSERT INTO t(v) VALUES (randomblob(100000))",
                    _ => "UPDATE t SET v = randomblob(50000) WHERE k = 1 + abs(random()) % 8",
                };
                c.execute_batch(sql).unwrap();
            }
        });
        assert!(commits >= 10, "{commits} commits meanwhile");
        assert_eq!(found, before, "{mode}");
        bed.check_killed(DB);
    }
}

#[test]
fn a_snapshot_outlives_a_change_of_page_size_and_a_drop() {
    let (bed, c) = filled("delete");
    let before = bed.check(DB);
    let mut first = take(&bed);
    c.execute_batch("PRAGMA page_size=512; VACUUM").unwrap();
    let between = bed.check(DB);
    let mut second = take(&bed);
    drop(c);
    wait(|done| bed.db(DB).unlink(FileKind::Database, done)).unwrap();
    let mut dropped = take(&bed);
    let c = bed.connect(DB);
    c.execute_batch("CREATE TABLE x(v); INSERT INTO x VALUES (zeroblob(100000))")
        .unwrap();
    assert_eq!(write_with(&mut first, |_| {}), before);
    assert_eq!(write_with(&mut second, |_| {}), between);
    assert_eq!(write_with(&mut dropped, |_| {}).1, Vec::<u8>::new());
    bed.check_killed(DB);
}

#[test]
fn a_replicas_snapshot_keeps_its_state_while_it_follows() {
    for mode in ["delete", "wal"] {
        let (primary, c) = filled(mode);
        let replica = Bed::replica();
        replica.follow(&primary, DB);
        let before = replica.check(DB);
        assert_eq!(before, primary.check(DB));
        let mut s = take(&replica);
        let mut records = 0;
        let found = write_with(&mut s, |piece| {
            if piece % 40 == 0 {
                c.execute_batch("UPDATE t SET v = randomblob(70000) WHERE k % 2 = 1")
                    .unwrap();
                replica.follow(&primary, DB);
                records += 1;
            }
        });
        assert!(records > 3);
        assert_eq!(found, before, "{mode}");
        assert_eq!(replica.check_killed(DB), primary.check(DB), "{mode}");
    }
}

#[test]
fn a_snapshot_given_up_keeps_nothing() {
    let (bed, c) = filled("delete");
    drop(take(&bed));
    let mut s = take(&bed);
    // A reader that goes away in the middle.
    struct Gone(usize);
    impl Write for Gone {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0 += buf.len();
            if self.0 > 100_000 {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            Ok(buf.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    assert!(s.write_to(&mut Gone(0)).is_err());
    drop(s);
    c.execute_batch("UPDATE t SET v = 1").unwrap();
    assert!(bed.db(DB).lock().snapshots.is_empty());
    let (pos, bytes) = snapshot(&bed.db(DB));
    assert_eq!((pos, unpack(&bytes)), bed.check(DB));
}
