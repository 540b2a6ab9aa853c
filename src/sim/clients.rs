//! Applications: each writes and reads through SQLite on its node, and notes what it was told.
//!
//! An application's work is a coroutine: it gives way in the middle of a transaction, and where the
//! node flushes its log in the middle of a commit.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rusqlite::Connection;
use tokio::time::sleep;

use crate::clock;
use crate::store::Role;

use super::check::Ack;
use super::node::{Cluster, Life};
use super::process;

/// The databases, with their journal modes.
pub(crate) const DATABASES: [(&str, &str); 2] = [("w.db", "wal"), ("d.db", "delete")];

/// Writes on a node until the world ends.
pub(crate) async fn writer(cluster: Arc<Cluster>, node: usize, application: usize) {
    let world = cluster.world.clone();
    let mut number = 0;
    while !world.has_ended() {
        sleep(world.ms(5..400)).await;
        let Some(life) = cluster.nodes[node].life() else {
            continue;
        };
        // On a replica it would only be refused, mostly.
        if life.process.is_paused() || (life.store.role() != Role::Primary && !world.one_in(20)) {
            continue;
        }
        number += 1;
        let id = ((application as i64) << 32) | number;
        let (db, mode) = DATABASES[world.range(0..2) as usize];
        work(&cluster, node, &life, move |cluster, life| {
            write(cluster, node, application, life, db, mode, id)
        })
        .await;
    }
}

/// Reads on a node until the world ends.
pub(crate) async fn reader(cluster: Arc<Cluster>, node: usize, application: usize) {
    let world = cluster.world.clone();
    while !world.has_ended() {
        sleep(world.ms(50..3_000)).await;
        let Some(life) = cluster.nodes[node].life() else {
            continue;
        };
        if life.process.is_paused() {
            continue;
        }
        let (db, _) = DATABASES[world.range(0..2) as usize];
        work(&cluster, node, &life, move |cluster, life| {
            read(cluster, node, application, life, db)
        })
        .await;
    }
}

/// Writes once into each database, on whoever is primary then, and again until that is done: what
/// only a replica has of a database gives way to it.
pub(crate) async fn last_words(cluster: &Arc<Cluster>) {
    let mut number = 0;
    for (db, mode) in DATABASES {
        let before = cluster.checker.tally().acks;
        while cluster.checker.tally().acks == before {
            sleep(Duration::from_millis(300)).await;
            let lives = cluster.nodes.iter().filter_map(|n| Some((n.id, n.life()?)));
            let writable = lives.into_iter().find(|(_, l)| l.store.is_writable());
            let Some((node, life)) = writable else {
                continue;
            };
            number += 1;
            let id = (1 << 50) + number;
            work(cluster, node, &life, move |cluster, life| {
                write(cluster, node, 1_000, life, db, mode, id)
            })
            .await;
        }
    }
}

/// Runs an operation of an application.
async fn work(
    cluster: &Arc<Cluster>,
    node: usize,
    life: &Arc<Life>,
    operation: impl FnOnce(&Cluster, &Life) + Send + 'static,
) {
    let (on, to) = (cluster.clone(), life.clone());
    life.busy.fetch_add(1, Ordering::Relaxed);
    let done = process::spawn_free(process::coroutine(move || {
        operation(&on, &to);
        to.busy.fetch_sub(1, Ordering::Relaxed);
    }));
    if let Err(error) = done.await {
        cluster
            .world
            .violate(format!("an application of n{node}: {error}"));
        life.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The application's connection to a database, out of those that it keeps.
fn connection(
    cluster: &Cluster,
    life: &Life,
    application: usize,
    db: &'static str,
) -> rusqlite::Result<Connection> {
    let kept = life.connections.lock().remove(&(application, db));
    match kept.filter(|_| !cluster.world.one_in(10)) {
        Some(kept) => Ok(kept),
        None => {
            let new = life.connect(db)?;
            new.busy_timeout(Duration::ZERO)?;
            new.pragma_update(None, "synchronous", "FULL")?;
            Ok(new)
        }
    }
}

fn keep(life: &Life, application: usize, db: &'static str, connection: Connection) {
    if !life.process.is_dead() {
        life.connections
            .lock()
            .insert((application, db), connection);
    }
}

fn write(
    cluster: &Cluster,
    node: usize,
    application: usize,
    life: &Life,
    db: &'static str,
    mode: &str,
    id: i64,
) {
    let world = &cluster.world;
    let written = connection(cluster, life, application, db).and_then(|c| {
        let fresh: i64 = c.query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get(0))?;
        if fresh == 0 && life.store.role() == Role::Primary {
            c.query_row(&format!("PRAGMA journal_mode = {mode}"), [], |_| Ok(()))?;
        }
        c.execute_batch("BEGIN IMMEDIATE")?;
        c.execute_batch(
            "CREATE TABLE IF NOT EXISTS log (id INTEGER PRIMARY KEY, n INTEGER, pad BLOB)",
        )?;
        let size = world.range(1..3_000) as i64;
        c.execute(
            "INSERT INTO log SELECT ?1, count(*) + 1, zeroblob(?2) FROM log",
            (id, size),
        )?;
        match world.range(0..30) {
            0 => clock::pause(world.ms(100..4_000)),
            1..6 => clock::pause(world.ms(1..30)),
            _ => {}
        }
        c.execute_batch("COMMIT")?;
        Ok(c)
    });
    match written {
        Ok(connection) => {
            if let Some(database) = life.store.database(db) {
                cluster.checker.acknowledged(Ack {
                    id,
                    db,
                    node,
                    epoch: life.store.epoch(),
                    pos: database.captured_pos(),
                });
            }
            keep(life, application, db, connection);
        }
        Err(error) => world.note(format!("n{node} does not write {id} of {db}: {error}")),
    }
}

fn read(cluster: &Cluster, node: usize, application: usize, life: &Life, db: &'static str) {
    let world = &cluster.world;
    if life
        .store
        .database(db)
        .is_none_or(|db| db.page_count() == 0)
    {
        return;
    }
    let primary = |life: &Life| (life.store.is_writable(), life.store.epoch());
    let before = primary(life);
    let told = cluster.checker.acknowledged_by(node, before.1, db);
    let seen = connection(cluster, life, application, db).and_then(|c| {
        let rows = rows(&c)?;
        keep(life, application, db, c);
        Ok(rows)
    });
    match seen {
        Ok(rows) => {
            cluster.checker.read();
            world.note(format!("n{node} reads {} rows of {db}", rows.ids.len()));
            if let Some(wrong) = rows.wrong() {
                world.violate(format!("n{node} reads {db}: {wrong}"));
            }
            let missing = told.iter().find(|id| !rows.ids.contains(*id));
            if let (Some(id), true, true) = (missing, before.0, before == primary(life)) {
                world.violate(format!(
                    "n{node}, primary {}, does not read {id} of {db}, which it acknowledged",
                    before.1
                ));
            }
        }
        Err(error) => world.note(format!("n{node} does not read {db}: {error}")),
    }
}

/// What a database has.
pub(crate) struct Rows {
    pub ids: BTreeSet<i64>,
    last: i64,
}

impl Rows {
    /// What is wrong with it: rows are numbered without a gap.
    pub fn wrong(&self) -> Option<String> {
        let n = self.ids.len() as i64;
        (n != self.last).then(|| format!("{n} rows, and the last is number {}", self.last))
    }
}

/// Reads everything.
pub(crate) fn rows(c: &Connection) -> rusqlite::Result<Rows> {
    let table: i64 = c.query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get(0))?;
    let mut all = Rows {
        ids: BTreeSet::new(),
        last: 0,
    };
    if table == 0 {
        return Ok(all);
    }
    let mut select = c.prepare("SELECT id, n FROM log")?;
    let mut found = select.query([])?;
    while let Some(row) = found.next()? {
        all.ids.insert(row.get(0)?);
        all.last = all.last.max(row.get(1)?);
    }
    Ok(all)
}
