//! Random histories: what applications and the node may do, chosen by a seed.

use std::time::Duration;

use rand::Rng;

use super::model::{Content, state_of, value};
use super::world::{Client, Crash, World};
use crate::ltx::Pos;
use crate::store::disk::sim::Keep;

const MODES: [&str; 4] = ["DELETE", "TRUNCATE", "PERSIST", "WAL"];
const SYNC: [&str; 4] = ["OFF", "NORMAL", "FULL", "EXTRA"];
const PAGE_SIZES: [u32; 4] = [512, 1024, 4096, 8192];
const MAX_CLIENTS: usize = 4;

impl Client {
    fn text(&self, query: &str) -> rusqlite::Result<String> {
        self.sql.query_row(query, [], |r| r.get(0))
    }

    fn number(&self, query: &str) -> rusqlite::Result<i64> {
        self.sql.query_row(query, [], |r| r.get(0))
    }

    /// Whether a commit of now survives a loss of power once it is acknowledged. In the rollback
    /// modes it does at any setting, as the node does not know it.
    fn is_durable(&self, schema: &str) -> rusqlite::Result<bool> {
        Ok(
            self.text(&format!("PRAGMA {schema}.journal_mode"))? != "wal"
                || self.number(&format!("PRAGMA {schema}.synchronous"))? >= 2,
        )
    }

    /// Whether SQLite makes it one transaction with that of another database.
    fn is_joined(&self, schema: &str) -> rusqlite::Result<bool> {
        Ok(
            self.text(&format!("PRAGMA {schema}.journal_mode"))? != "wal"
                && self.number(&format!("PRAGMA {schema}.synchronous"))? >= 1,
        )
    }
}

/// A part of a transaction: a state of a database that it is to make.
struct Part {
    db: usize,
    id: usize,
    durable: bool,
    joined: bool,
}

impl World {
    fn pick(&mut self, of: usize) -> usize {
        self.rng.random_range(0..of)
    }

    fn one_in(&mut self, n: u32) -> bool {
        self.rng.random_range(0..n) == 0
    }

    /// One thing that happens.
    pub fn act(&mut self) {
        if self.clients.is_empty() || (self.clients.len() < MAX_CLIENTS && self.one_in(8)) {
            self.open_client();
        } else {
            match self.pick(100) {
                0..55 => self.transaction(),
                55..62 => self.pragma_mode(),
                62..68 => self.pragma_sync(),
                68..75 => self.wal_checkpoint(),
                75..79 => self.vacuum(),
                79..84 => self.close_client(),
                84..87 => self.read_on(),
                87..91 => {
                    self.tell("background");
                    self.store().run_background();
                }
                91..95 => {
                    let (db, what) = (self.pick(self.models.len()), self.pick(3));
                    self.node_does(db, what);
                }
                95..97 => {
                    let db = self.pick(self.models.len());
                    self.drop_database(db);
                }
                97 => {
                    let db = self.pick(self.models.len());
                    let size = PAGE_SIZES[self.pick(4)];
                    self.import(db, size);
                }
                _ => self.restart(),
            }
        }
        self.observe();
    }

    fn open_client(&mut self) {
        let db = self.pick(self.models.len());
        if let Err(e) = self.connect(db) {
            return self.excuse("connect", &e);
        }
        let at = self.clients.len() - 1;
        let page_size = PAGE_SIZES[self.pick(PAGE_SIZES.len())];
        let (vacuum, spills) = (self.pick(3), self.one_in(3));
        let attach = self.models.len() > 1 && self.one_in(3);
        let other = (db + 1 + self.pick(self.models.len().max(2) - 1)) % self.models.len();
        let mut setup = format!("PRAGMA page_size={page_size}; PRAGMA auto_vacuum={vacuum};");
        if spills {
            setup += "PRAGMA cache_size=3; PRAGMA cache_spill=1;";
        }
        if attach {
            setup += &format!("ATTACH '/{}' AS o;", self.models[other].name);
        }
        self.tell(format!("client {at} of {db}: {setup}"));
        if let Err(e) = self.clients[at].sql.execute_batch(&setup) {
            self.clients.pop();
            return self.excuse("setup", &e);
        }
        if attach {
            self.clients[at].other = Some(other);
        }
    }

    fn close_client(&mut self) {
        let at = self.pick(self.clients.len());
        self.tell(format!("close client {at}"));
        self.clients.remove(at);
    }

    /// Begins a read transaction, or ends it.
    fn read_on(&mut self) {
        let at = self.pick(self.clients.len());
        let reading = self.clients[at].reading;
        self.tell(format!("client {at} reads: {}", !reading));
        let sql = if reading {
            "COMMIT"
        } else {
            "BEGIN; SELECT count(*) FROM sqlite_schema"
        };
        let r = self.clients[at].sql.execute_batch(sql);
        self.clients[at].reading = !self.clients[at].sql.is_autocommit();
        if let Err(e) = r {
            self.excuse("read", &e);
        }
    }

    fn idle_client(&mut self) -> Option<usize> {
        let at = self.pick(self.clients.len());
        (!self.clients[at].reading).then_some(at)
    }

    pub fn run(&mut self, at: usize, sql: &str) {
        self.tell(format!("client {at}: {sql}"));
        let c = &self.clients[at].sql;
        let r = c.prepare(sql).and_then(|mut s| {
            let mut rows = s.query([])?;
            while rows.next()?.is_some() {}
            Ok(())
        });
        if let Err(e) = r {
            self.excuse(sql, &e);
        }
    }

    fn pragma_mode(&mut self) {
        let Some(at) = self.idle_client() else { return };
        let mode = MODES[self.pick(4)];
        let schema = ["main", "o"][self.pick(2)];
        if schema == "o" && self.clients[at].other.is_none() {
            return;
        }
        // A connection that ends the WAL mode keeps its cache if the change counter is the one that it
        // knows, and commits in WAL mode need not change that: SQLite would go on with pages from
        // before what others have committed, in a plain directory too. So it reads first.
        let _ = state_of(&self.clients[at].sql, schema);
        self.run(at, &format!("PRAGMA {schema}.journal_mode={mode}"));
    }

    fn pragma_sync(&mut self) {
        let Some(at) = self.idle_client() else { return };
        let level = SYNC[self.pick(4)];
        self.run(at, &format!("PRAGMA main.synchronous={level}"));
        if self.clients[at].other.is_some() {
            self.run(at, &format!("PRAGMA o.synchronous={level}"));
        }
    }

    fn wal_checkpoint(&mut self) {
        let Some(at) = self.idle_client() else { return };
        let how = ["PASSIVE", "FULL", "RESTART", "TRUNCATE"][self.pick(4)];
        self.run(at, &format!("PRAGMA wal_checkpoint({how})"));
    }

    fn vacuum(&mut self) {
        let Some(at) = self.idle_client() else { return };
        match self.pick(4) {
            0 => self.run(at, "PRAGMA incremental_vacuum(3)"),
            1 => {
                let size = PAGE_SIZES[self.pick(4)];
                self.run(at, &format!("PRAGMA page_size={size}"));
                self.run(at, "VACUUM");
            }
            2 => {
                let how = self.pick(3);
                self.run(at, &format!("PRAGMA auto_vacuum={how}"));
                self.run(at, "VACUUM");
            }
            _ => self.run(at, "VACUUM"),
        }
    }

    /// What the node does now and then by itself.
    pub fn node_does(&mut self, i: usize, what: usize) {
        let name = self.models[i].name.clone();
        let Some(db) = self.store().database(&name) else {
            return;
        };
        self.tell(format!(
            "node: {} {name}",
            ["checkpoint", "prune", "new segment"][what]
        ));
        let r = match what {
            0 => db.checkpoint(),
            1 => db.prune_log(Duration::ZERO),
            _ => {
                db.log().age_segment();
                Ok(())
            }
        };
        if let Err(e) = r {
            let excused = self.disk.is_dead() || self.is_faulty();
            assert!(excused, "{name}: {e}");
        }
    }

    pub fn import(&mut self, i: usize, size: u32) {
        // It waits for readers in real time.
        self.clients.iter_mut().filter(|c| c.reading).for_each(|c| {
            let _ = c.sql.execute_batch("ROLLBACK");
            c.reading = !c.sql.is_autocommit();
        });
        if self.clients.iter().any(|c| c.reading) {
            return;
        }
        let mut content = Content::default();
        self.change(&mut content);
        let Some(parent) = self.newest(i) else { return };
        let id = self.models[i].add(parent, Some(content.clone()));
        let file = self.file_of(id, &content, size);
        let name = self.models[i].name.clone();
        self.tell(format!("import {name}: state {id}, pages of {size}"));
        self.models[i].states[id].possible = true;
        self.resized = true;
        match self.store().import(&name, file) {
            Ok(pos) => self.models[i].ack(id, true, pos),
            Err(e) => {
                self.tell(format!("  {e}"));
                let excused = self.disk.is_dead() || self.is_faulty();
                assert!(excused, "import of {name}: {e}");
            }
        }
    }

    /// Some rows more, fewer, or others.
    fn change(&mut self, content: &mut Content) {
        let changes = if self.one_in(6) { 40 } else { self.pick(6) };
        for _ in 0..=changes {
            let k = self.rng.random_range(0..60);
            if self.one_in(3) {
                content.rows.remove(&k);
            } else {
                let len = match self.pick(10) {
                    0 => self.pick(9000),
                    1..4 => self.pick(1500),
                    _ => self.pick(100),
                };
                content.rows.insert(k, (self.rng.random(), len));
            }
        }
        if self.one_in(6) {
            let x = self.rng.random_range(0..5);
            if !content.tables.remove(&x) {
                content.tables.insert(x);
            }
        }
    }

    /// A transaction of a client, on one database or two.
    fn transaction(&mut self) {
        let Some(at) = self.idle_client() else { return };
        let both = self.clients[at].other.is_some() && self.one_in(2);
        self.transaction_of(at, both);
    }

    pub fn transaction_of(&mut self, at: usize, both: bool) {
        let mut parts: Vec<Part> = Vec::new();
        let done = self.try_transaction(at, both, &mut parts);
        let client = &self.clients[at];
        let open = !client.sql.is_autocommit();
        match done {
            Ok(true) => self.acknowledge(&parts),
            Ok(false) => {}
            Err(e) => {
                self.excuse("transaction", &e);
            }
        }
        if open {
            // An error has left it open.
            if let Err(e) = self.clients[at].sql.execute_batch("ROLLBACK") {
                self.excuse("rollback", &e);
            }
        }
    }

    fn acknowledge(&mut self, parts: &[Part]) {
        for p in parts {
            let db = self.store().database(&self.models[p.db].name);
            let pos = db.map_or(Pos::default(), |db| db.captured_pos());
            self.models[p.db].ack(p.id, p.durable, pos);
        }
        if let [a, b] = parts
            && a.joined
            && b.joined
        {
            self.pairs.push([(a.db, a.id), (b.db, b.id)]);
        }
    }

    /// False: it was rolled back, as it was meant to be.
    fn try_transaction(
        &mut self,
        at: usize,
        both: bool,
        parts: &mut Vec<Part>,
    ) -> rusqlite::Result<bool> {
        let begin = if self.one_in(4) {
            "BEGIN EXCLUSIVE"
        } else {
            "BEGIN IMMEDIATE"
        };
        self.tell(format!(
            "client {at}: {begin}{}",
            if both { ", on both" } else { "" }
        ));
        self.clients[at].sql.execute_batch(begin)?;
        let (db, other) = (self.clients[at].db, self.clients[at].other);
        let schemas = [("main", Some(db)), ("o", other.filter(|_| both))];
        for (schema, db) in schemas {
            let Some(db) = db else { continue };
            let part = self.write(at, schema, db)?;
            parts.push(part);
        }
        let give_up = self.one_in(10);
        let end = if give_up { "ROLLBACK" } else { "COMMIT" };
        let ids: Vec<usize> = parts.iter().map(|p| p.id).collect();
        self.tell(format!("  {end} of {ids:?}"));
        if !give_up {
            for p in parts.iter() {
                self.models[p.db].states[p.id].possible = true;
            }
        }
        if let [a, b] = &parts[..]
            && !give_up
            && a.joined
            && b.joined
        {
            self.pairs.push([(a.db, a.id), (b.db, b.id)]);
        }
        self.clients[at].sql.execute_batch(end)?;
        Ok(!give_up)
    }

    /// Changes a database within a transaction.
    fn write(&mut self, at: usize, schema: &str, db: usize) -> rusqlite::Result<Part> {
        let base = state_of(&self.clients[at].sql, schema)?;
        let model = &self.models[db];
        let (parent, old) = if base == 0 {
            // Nothing is there, or no table yet.
            let gone = model.gone(model.acked);
            let name = &model.name;
            let gone = gone.unwrap_or_else(|| panic!("{name} is gone, not {}", model.acked));
            (gone, Content::default())
        } else {
            let state = &model.states[base];
            assert!(
                state.possible && model.stands_on(base, model.acked),
                "{}: state {base} is read, {} was acknowledged",
                model.name,
                model.acked
            );
            (base, state.content.clone().expect("it was written"))
        };
        let mut new = old.clone();
        self.change(&mut new);
        let undone = self.one_in(5);
        let id = self.models[db].add(parent, Some(new.clone()));
        let client = &self.clients[at];
        let c = &client.sql;
        let run = |sql: &str| c.execute_batch(&sql.replace('$', schema));
        let durable = client.is_durable(schema)?;
        let joined = client.is_joined(schema)?;
        if base == 0 {
            run(
                "CREATE TABLE $.m(id); INSERT INTO $.m VALUES (0); CREATE TABLE $.t(k INTEGER PRIMARY KEY, v); CREATE INDEX $.i ON t(v)",
            )?;
        }
        if undone {
            run(
                "SAVEPOINT s; UPDATE $.t SET v=zeroblob(700); CREATE TABLE $.y(a); ROLLBACK TO s; RELEASE s",
            )?;
        }
        for k in old.rows.keys().filter(|k| !new.rows.contains_key(k)) {
            c.execute(&format!("DELETE FROM {schema}.t WHERE k=?"), [k])?;
        }
        let put = format!("REPLACE INTO {schema}.t VALUES (?, ?)");
        for (k, (seed, len)) in new.rows.iter().filter(|(k, v)| old.rows.get(k) != Some(v)) {
            c.execute(&put, (k, value(*seed, *len)))?;
        }
        for x in new.tables.difference(&old.tables) {
            run(&format!("CREATE TABLE $.x{x}(a)"))?;
        }
        for x in old.tables.difference(&new.tables) {
            run(&format!("DROP TABLE $.x{x}"))?;
        }
        run(&format!("UPDATE $.m SET id={id}"))?;
        Ok(Part {
            db,
            id,
            durable,
            joined,
        })
    }

    /// A crash of some kind.
    pub fn any_crash(&mut self) -> Crash {
        match self.pick(8) {
            0..3 => Crash::Process,
            3 => Crash::Power(Keep::Nothing),
            4 => Crash::Power(Keep::All),
            _ => Crash::Power(Keep::Some),
        }
    }

    /// A crash in the middle of a recovery, perhaps.
    pub fn crash_again(&mut self) -> Option<(u64, Crash)> {
        if !self.one_in(3) {
            return None;
        }
        let steps = self.rng.random_range(1..25);
        Some((steps, self.any_crash()))
    }

    /// A whole history: some lives, each of which ends with a crash.
    pub fn live(&mut self, lives: usize, acts: usize) {
        for _ in 0..lives {
            let ahead = if self.one_in(2) {
                self.rng.random_range(1..80)
            } else {
                self.rng.random_range(1..600)
            };
            self.disk.crash_at(Some(self.disk.steps() + ahead));
            for _ in 0..acts {
                self.act();
                if self.disk.is_dead() {
                    break;
                }
            }
            let how = self.any_crash();
            self.crash(how, &mut World::crash_again);
        }
    }
}
