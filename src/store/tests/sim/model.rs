//! What a database may hold: every state that a transaction made or tried to make, each with the
//! one that it was made on, and how far each promise reaches.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::Connection;

use crate::ltx::Pos;

/// What the tables hold: the rows of `t` (seed and length of each value), and which tables there
/// are besides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Content {
    pub rows: BTreeMap<i64, (u64, usize)>,
    pub tables: BTreeSet<u32>,
}

/// A state of a database.
#[derive(Debug)]
pub(super) struct State {
    pub parent: usize,
    /// `None`: there is no database.
    pub content: Option<Content>,
    /// Its commit was begun: it may be there.
    pub possible: bool,
    /// The TXID that the node had when it was acknowledged; 0 if it was not.
    pub txid: u64,
}

/// A database, as it may be.
#[derive(Debug)]
pub(super) struct Model {
    pub name: String,
    pub states: Vec<State>,
    /// The newest state that was acknowledged.
    pub acked: usize,
    /// The newest state that has to outlive a loss of power.
    pub durable: usize,
    /// Positions that were seen, by TXID.
    pub seen: BTreeMap<u64, u64>,
    /// The newest position that was told to the world.
    pub told: u64,
}

impl Model {
    pub fn new(name: &str) -> Model {
        Model {
            name: name.to_owned(),
            states: vec![State {
                parent: 0,
                content: None,
                possible: true,
                txid: 0,
            }],
            acked: 0,
            durable: 0,
            seen: BTreeMap::new(),
            told: 0,
        }
    }

    /// A state that a transaction on `parent` is going to make.
    pub fn add(&mut self, parent: usize, content: Option<Content>) -> usize {
        self.states.push(State {
            parent,
            content,
            possible: false,
            txid: 0,
        });
        self.states.len() - 1
    }

    /// Whether `id` is `base`, or was made on it.
    pub fn stands_on(&self, mut id: usize, base: usize) -> bool {
        while id > base {
            id = self.states[id].parent;
        }
        id == base
    }

    /// The newest state without a database that is `base` or was made on it.
    pub fn gone(&self, base: usize) -> Option<usize> {
        (0..self.states.len()).rev().find(|id| {
            let s = &self.states[*id];
            s.possible && s.content.is_none() && self.stands_on(*id, base)
        })
    }

    pub fn ack(&mut self, id: usize, durable: bool, pos: Pos) {
        self.acked = id;
        self.states[id].txid = pos.txid;
        if durable {
            self.durable = id;
        }
    }

    /// Notes what the node says of itself: the newest position, and the one that is on disk.
    pub fn observe(&mut self, captured: Pos, told: Pos) {
        for pos in [captured, told] {
            let seen = *self.seen.entry(pos.txid).or_insert(pos.checksum);
            assert_eq!(
                seen, pos.checksum,
                "{}: two transactions {:016x}",
                self.name, pos.txid
            );
        }
        assert!(
            told.txid >= self.told,
            "{}: the position went back from {:016x} to {told}",
            self.name,
            self.told
        );
        self.told = told.txid;
        // Whoever could read it has it. One that was refused and yet is what others were made on has
        // a TXID that nobody knows.
        let mut id = self.acked;
        let is_told = |s: &State| (1..=told.txid).contains(&s.txid);
        while id > self.durable && !is_told(&self.states[id]) {
            id = self.states[id].parent;
        }
        self.durable = self.durable.max(id);
    }

    /// After a crash: the state found, and its position. What did not outlive it never was.
    pub fn found(&mut self, id: usize, must: usize, pos: Pos) {
        assert!(
            self.states[id].possible,
            "{}: state {id} was never committed",
            self.name
        );
        assert!(
            self.stands_on(id, must),
            "{}: state {id} was found, {must} was acknowledged (the last of all: {})",
            self.name,
            self.acked
        );
        assert!(
            pos.txid >= self.told,
            "{}: {pos} was found, transaction {:016x} could be read by replicas",
            self.name,
            self.told
        );
        if let Some(checksum) = self.seen.get(&pos.txid) {
            assert_eq!(*checksum, pos.checksum, "{} at {pos}", self.name);
        }
        self.seen.split_off(&pos.txid);
        self.seen.insert(pos.txid, pos.checksum);
        for (other, state) in self.states.iter_mut().enumerate() {
            state.possible &= other <= id;
        }
        (self.acked, self.durable, self.told) = (id, id, pos.txid);
        self.states[id].txid = pos.txid;
    }
}

/// The bytes of a value.
pub(super) fn value(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// The number of the state that a schema of a connection is in; 0: there is none.
pub(super) fn state_of(c: &Connection, schema: &str) -> rusqlite::Result<usize> {
    let there: bool = c.query_row(
        &format!("SELECT count(*) FROM {schema}.sqlite_schema WHERE name='m'"),
        [],
        |r| r.get(0),
    )?;
    if !there {
        return Ok(0);
    }
    c.query_row(&format!("SELECT id FROM {schema}.m"), [], |r| {
        r.get::<_, i64>(0).map(|id| id as usize)
    })
}

/// What the tables of a connection hold, against what they should.
pub(super) fn compare(c: &Connection, content: &Content) -> rusqlite::Result<()> {
    let mut rows = BTreeMap::new();
    let mut read = c.prepare("SELECT k, v FROM t ORDER BY k")?;
    let mut found = read.query([])?;
    while let Some(row) = found.next()? {
        rows.insert(row.get::<_, i64>(0)?, row.get::<_, Vec<u8>>(1)?);
    }
    let keys: Vec<i64> = rows.keys().copied().collect();
    let expected: Vec<i64> = content.rows.keys().copied().collect();
    assert_eq!(keys, expected, "the rows that are there");
    for (k, (seed, len)) in &content.rows {
        assert!(rows[k] == value(*seed, *len), "row {k} is another one");
    }
    let mut tables = BTreeSet::new();
    let mut read = c.prepare("SELECT name FROM sqlite_schema WHERE name GLOB 'x[0-9]*'")?;
    let mut found = read.query([])?;
    while let Some(row) = found.next()? {
        tables.insert(row.get::<_, String>(0)?[1..].parse::<u32>().unwrap());
    }
    assert_eq!(tables, content.tables, "the tables that are there");
    Ok(())
}
