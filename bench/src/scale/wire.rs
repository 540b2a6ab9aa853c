//! Bytes of the stream for a small transaction: to a node of our own, and to a LiteFS node, which gets
//! LZ4 files.

use std::path::Path;
use std::time::Duration;

use rusqlite::Connection;

use super::raw::{Clients, Kind};
use super::{MAKE_TABLE, Scale, Target, insert_rows, print};
use crate::Result;
use crate::cases::{self, Mode};

/// Transactions of one run.
const TRANSACTIONS: u64 = 2000;
/// Rows of the table of which random ones are changed.
const ROWS: u64 = 20_000;

pub fn run(scale: &Scale, work: &Path) -> Result<()> {
    let [site, _] = scale.sites(work)?;
    let node = site.start()?;
    for mode in [Mode::Delete, Mode::Wal] {
        let db = cases::open(&node.mount().join(format!("{mode}.db")), mode, false)?;
        db.execute_batch(MAKE_TABLE)?;
        compare(scale, node.http(), &format!("{mode}, inserts"), 0.2, || {
            insert_rows(&db, TRANSACTIONS)
        })?;
        db.execute_batch("BEGIN")?;
        insert_rows(&db, ROWS)?;
        db.execute_batch("COMMIT")?;
        compare(
            scale,
            node.http(),
            &format!("{mode}, updates anywhere"),
            f64::NAN,
            || update_rows(&db),
        )?;
    }
    Ok(())
}

fn update_rows(db: &Connection) -> Result<()> {
    let last: i64 = db.query_row("SELECT max(id) FROM t", [], |row| row.get(0))?;
    let mut update =
        db.prepare("UPDATE t SET payload = hex(randomblob(50)) WHERE id = 1 + abs(random() % ?1)")?;
    for _ in 0..TRANSACTIONS {
        update.execute([last])?;
    }
    Ok(())
}

fn compare(
    scale: &Scale,
    http: &str,
    what: &str,
    target: f64,
    work: impl Fn() -> Result<()>,
) -> Result<()> {
    let mut figures = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..scale.runs {
        let mut clients = Clients::new(http)?;
        let kinds = [Kind::Tenure, Kind::LiteFs];
        let ids = kinds.map(|kind| clients.connect(kind));
        let [ours, theirs] = ids;
        let ids = [ours?, theirs?];
        // Until they have what there is.
        clients.read_for(Duration::from_millis(500));
        let before = ids.map(|id| clients.received(id));
        work()?;
        clients.read_for(Duration::from_millis(500));
        let [ours, theirs] =
            [0, 1].map(|i| (clients.received(ids[i]) - before[i]) as f64 / TRANSACTIONS as f64);
        figures[0].push(ours);
        figures[1].push(theirs);
        figures[2].push(ours / theirs);
    }
    let row = |side: &str| format!("wire, {what}, {side}");
    print(&row("to our own"), "bytes", &figures[0], Target::Open);
    print(&row("LZ4 files"), "bytes", &figures[1], Target::Open);
    let target = match target.is_nan() {
        true => Target::Open,
        false => Target::AtMost(target),
    };
    print(&row("against LZ4 files"), "ratio", &figures[2], target);
    Ok(())
}
