//! What must hold whatever happens, and what the applications were told.
//!
//! - Who acknowledged as primary number N: nobody acknowledges as a lower number later, and nobody
//!   else as N.
//! - What was acknowledged is in the end in the database, or was set aside on a node that reported it.
//! - Positions grow; where one goes back or becomes another, the node has reported what it set aside,
//!   or had nothing of its own.
//! - A read on a primary sees all that this primary has acknowledged. A read anywhere sees whole
//!   transactions, in their order, without a gap.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::ltx::{Decoder, Pos};
use crate::store::{Event, Store};

use super::world::World;

/// A commit that an application was told of.
#[derive(Clone, Debug)]
pub(crate) struct Ack {
    pub id: i64,
    pub db: &'static str,
    pub node: usize,
    pub epoch: u64,
    /// The database's position after it.
    pub pos: Pos,
}

#[derive(Debug)]
struct Report {
    db: String,
    from: u64,
    to: u64,
    path: PathBuf,
}

/// See the module.
pub(crate) struct Checker {
    world: Arc<World>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    acks: Vec<Ack>,
    reports: Vec<Report>,
    /// By node and database: where it is, and how many reports it had made by then.
    positions: BTreeMap<(usize, String), (Pos, usize)>,
    /// All positions that any node has been at, with how they were reached first.
    shared: BTreeMap<(String, u64), BTreeSet<u64>>,
    /// By node and database: reports made.
    reported: BTreeMap<(usize, String), usize>,
    /// Who acknowledged as which number.
    primaries: BTreeMap<u64, usize>,
    /// Who was ever primary.
    in_office: BTreeSet<usize>,
    transactions: u64,
    divergent: u64,
    reads: u64,
}

/// What a run was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub acks: usize,
    pub transactions: u64,
    pub primaries: usize,
    pub divergent: u64,
    pub reads: u64,
    pub faults: u64,
}

impl Checker {
    pub fn new(world: &Arc<World>) -> Checker {
        Checker {
            world: world.clone(),
            inner: Mutex::default(),
        }
    }

    pub fn tally(&self) -> Tally {
        let inner = self.inner.lock();
        Tally {
            acks: inner.acks.len(),
            transactions: inner.transactions,
            primaries: inner.primaries.len(),
            divergent: inner.divergent,
            reads: inner.reads,
            faults: 0,
        }
    }

    /// An application was told that its commit is done.
    pub fn acknowledged(&self, ack: Ack) {
        self.world.note(format!(
            "n{} acknowledges {} of {} as primary {} at {}",
            ack.node, ack.id, ack.db, ack.epoch, ack.pos
        ));
        let mut inner = self.inner.lock();
        let newest = inner.primaries.last_key_value().map(|(e, n)| (*e, *n));
        let wrong = match newest {
            Some((epoch, node)) if epoch > ack.epoch => Some(format!(
                "n{} acknowledges as primary {} after n{node} did as {epoch}",
                ack.node, ack.epoch
            )),
            Some((epoch, node)) if epoch == ack.epoch && node != ack.node => Some(format!(
                "n{} and n{node} both acknowledge as primary {epoch}",
                ack.node
            )),
            _ => None,
        };
        inner.primaries.insert(ack.epoch, ack.node);
        inner.acks.push(ack);
        drop(inner);
        if let Some(wrong) = wrong {
            self.world.violate(wrong);
        }
    }

    /// Acknowledged commits of a node as this primary.
    pub fn acknowledged_by(&self, node: usize, epoch: u64, db: &str) -> Vec<i64> {
        let inner = self.inner.lock();
        let acks = inner.acks.iter();
        acks.filter(|a| a.node == node && a.epoch == epoch && a.db == db)
            .map(|a| a.id)
            .collect()
    }

    /// Whether all that this node has, others have too: it was never primary, and there was one.
    pub fn is_dispensable(&self, node: usize) -> bool {
        let inner = self.inner.lock();
        !inner.acks.is_empty() && !inner.in_office.contains(&node)
    }

    /// A node has lost its data.
    pub fn forget(&self, node: usize) {
        self.inner.lock().positions.retain(|(n, _), _| *n != node);
    }

    pub fn read(&self) {
        self.inner.lock().reads += 1;
    }

    /// A node was started: it is where it was, or further by what it had not told of yet.
    pub fn node_started(&self, node: usize, store: &Arc<Store>) {
        for db in store.databases() {
            if let Some(reason) = db.broken() {
                let text = format!("n{node}: {} is set aside at the start: {reason}", db.name());
                self.world.violate(text);
            }
        }
        let positions = store.positions();
        let before: Vec<(String, Pos)> = {
            let inner = self.inner.lock();
            let of_node = inner.positions.iter().filter(|((n, _), _)| *n == node);
            of_node
                .map(|((_, db), (pos, _))| (db.clone(), *pos))
                .collect()
        };
        for (db, pos) in before {
            let now = positions.get(&db).copied().unwrap_or_default();
            if now.txid < pos.txid || (now.txid == pos.txid && now != pos) {
                self.world.violate(format!(
                    "n{node} was at {pos} of {db}, and is at {now} after its start"
                ));
            }
        }
        for (db, pos) in positions {
            self.moved(node, &db, pos);
        }
    }

    /// A node tells something.
    pub fn event(&self, node: usize, event: &Event) {
        match event {
            Event::Tx { db, pos, .. } => {
                self.inner.lock().transactions += 1;
                self.moved(node, db, *pos);
            }
            Event::PrimaryChange {
                is_primary,
                hostname,
            } => {
                if *is_primary {
                    self.inner.lock().in_office.insert(node);
                }
                let hostname = hostname.as_deref().unwrap_or("nobody");
                let text = match is_primary {
                    true => format!("n{node} is primary"),
                    false => format!("n{node} follows {hostname}"),
                };
                self.world.note(text);
            }
            Event::Divergent { db, from, to, path } => {
                self.world
                    .note(format!("n{node} sets aside {from}-{to} of {db}"));
                let mut inner = self.inner.lock();
                inner.divergent += 1;
                *inner.reported.entry((node, db.clone())).or_default() += 1;
                inner.reports.push(Report {
                    db: db.clone(),
                    from: *from,
                    to: *to,
                    path: path.clone(),
                });
            }
            #[allow(unreachable_patterns)]
            _ => {}
        }
    }

    fn moved(&self, node: usize, db: &str, pos: Pos) {
        self.world.note(format!("n{node} {db} at {pos}"));
        let mut inner = self.inner.lock();
        let key = (node, db.to_owned());
        let reported = inner.reported.get(&key).copied().unwrap_or_default();
        let before = inner.positions.insert(key, (pos, reported));
        inner
            .shared
            .entry((db.to_owned(), pos.txid))
            .or_default()
            .insert(pos.checksum);
        let Some((before, reports)) = before else {
            return;
        };
        let back = pos.txid < before.txid || (pos.txid == before.txid && pos != before);
        drop(inner);
        if back && reported == reports {
            self.world.violate(format!(
                "n{node} goes from {before} to {pos} in {db} without a report"
            ));
        }
    }

    /// In the end: what was acknowledged is among these rows of the database, or set aside.
    pub fn kept(&self, db: &str, rows: &BTreeSet<i64>) {
        let inner = self.inner.lock();
        let lost = inner
            .acks
            .iter()
            .filter(|a| a.db == db && !rows.contains(&a.id));
        for ack in lost {
            if !inner.reports.iter().any(|report| report.has(ack)) {
                self.world
                    .violate(format!("lost without a report: {ack:?}"));
                return;
            }
        }
    }
}

impl Report {
    /// Whether this commit was set aside.
    fn has(&self, ack: &Ack) -> bool {
        if self.db != ack.db || !(self.from..=self.to).contains(&ack.pos.txid) {
            return false;
        }
        let Ok(files) = std::fs::read_dir(&self.path) else {
            return false;
        };
        files.flatten().any(|file| {
            let bytes = std::fs::read(file.path()).unwrap_or_default();
            let Ok(mut decoder) = Decoder::new(&bytes[..]) else {
                return false;
            };
            let header = *decoder.header();
            let mut page = vec![0; header.page_size as usize];
            while let Ok(Some(_)) = decoder.page(&mut page) {}
            let Ok((_, trailer)) = decoder.finish() else {
                return false;
            };
            // A snapshot has everything up to its position.
            let whole = header.is_snapshot() && header.max_txid >= ack.pos.txid;
            whole
                || (header.max_txid == ack.pos.txid
                    && trailer.post_apply_checksum == ack.pos.checksum)
        })
    }
}
