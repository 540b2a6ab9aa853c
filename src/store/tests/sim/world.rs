//! A store on a simulated disk, SQLite's connections to it, and the models of its databases.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rusqlite::{Connection, OpenFlags};

use super::model::{Content, Model, compare, state_of, value};
use crate::ltx::{self, Pos};
use crate::store::disk::sim::{Faults, Keep, Sim};
use crate::store::tests::bed::{checksum, image, integrity};
use crate::store::tests::vfs::{Vfs, wait};
use crate::store::{
    Background, Database, FileKind, Next, Options, Random, Role, Store, StoreError,
};

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Crash {
    Process,
    Power(Keep),
}

/// A connection, with the databases that it has.
pub(super) struct Client {
    pub sql: Connection,
    pub db: usize,
    /// The database that it has attached, as `o`.
    pub other: Option<usize>,
    /// It is reading, in a transaction.
    pub reading: bool,
}

pub(super) struct World {
    pub rng: StdRng,
    pub disk: Arc<Sim>,
    /// Dropped in this order.
    pub clients: Vec<Client>,
    pub vfs: Option<Vfs>,
    pub store: Option<Arc<Store>>,
    pub models: Vec<Model>,
    /// Pairs of states, of two databases, that one transaction made.
    pub pairs: Vec<[(usize, usize); 2]>,
    /// An import has changed the size of pages.
    pub resized: bool,
    /// What fails although nobody died, while a life lasts.
    pub faults: Faults,
    /// Whether any life since the last check ended with the power.
    power: bool,
    /// What was done, for messages.
    pub story: Vec<String>,
}

pub(super) fn options(dir: &Path, disk: &Arc<Sim>, seed: u64) -> Options {
    Options {
        compress: false,
        retention: Duration::from_secs(400),
        strict_verify: false,
        disk: disk.clone(),
        background: Background::Manual,
        random: Random::seeded(seed),
        ..Options::new(dir)
    }
}

/// Whether an error is one that SQLite's users have to live with.
fn is_busy(e: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseBusy, DatabaseLocked};
    matches!(e.sqlite_error_code(), Some(DatabaseBusy | DatabaseLocked))
}

impl World {
    pub fn new(seed: u64, names: &[&str]) -> World {
        let disk = Sim::new(seed);
        let mut world = World {
            rng: StdRng::seed_from_u64(seed),
            disk,
            clients: Vec::new(),
            vfs: None,
            store: None,
            models: names.iter().map(|n| Model::new(n)).collect(),
            pairs: Vec::new(),
            resized: false,
            faults: Faults::default(),
            power: false,
            story: Vec::new(),
        };
        world.open().expect("an empty disk");
        world
    }

    pub fn store(&self) -> &Arc<Store> {
        self.store.as_ref().expect("open")
    }

    pub fn tell(&mut self, what: impl Into<String>) {
        let step = self.disk.steps();
        let line = format!("{step}: {}", what.into());
        if std::env::var_os("TENURE_TRACE").is_some() {
            eprintln!("{line}");
        }
        self.story.push(line);
    }

    fn open(&mut self) -> Result<(), StoreError> {
        let options = options(self.disk.root(), &self.disk, self.rng.random());
        let store = Store::open(options)?;
        store.set_role(Role::Primary);
        self.vfs = Some(Vfs::register(&store));
        self.store = Some(store);
        Ok(())
    }

    pub fn connect(&mut self, db: usize) -> rusqlite::Result<()> {
        let vfs = self.vfs.as_ref().expect("open");
        let name = format!("/{}", self.models[db].name);
        let sql =
            Connection::open_with_flags_and_vfs(name, OpenFlags::default(), vfs.name.as_c_str())?;
        sql.busy_timeout(Duration::ZERO)?;
        sql.execute_batch("PRAGMA temp_store=MEMORY")?;
        self.clients.push(Client {
            sql,
            db,
            other: None,
            reading: false,
        });
        Ok(())
    }

    /// Whether an error is to be expected: somebody is busy, the process died, or the disk fails.
    /// Any other ends the test.
    pub fn excuse(&mut self, what: &str, e: &rusqlite::Error) {
        self.tell(format!("  {what}: {e}"));
        let malformed = e.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseCorrupt);
        let checkpoints = what.contains("wal_checkpoint") || what.contains("journal_mode");
        if malformed && self.resized && checkpoints {
            // SQLite looks at the page size that it knows before it reads the one that is.
            return;
        }
        // A change of mode that was refused can leave SQLite with a WAL whose index it has not mapped:
        // its "unix" VFS answers a checkpoint so too.
        let unmapped =
            e.sqlite_error().map(|e| e.extended_code) == Some(rusqlite::ffi::SQLITE_IOERR_SHMLOCK);
        if unmapped || is_busy(e) || self.disk.is_dead() || self.is_faulty() {
            return;
        }
        let said = self.vfs.as_ref().map(Vfs::take_errors);
        panic!("{what}: {e}: {said:?}");
    }

    pub fn is_faulty(&self) -> bool {
        self.faults.eio + self.faults.read_eio + self.faults.full > 0
    }

    /// Notes what the node says of its databases.
    pub fn observe(&mut self) {
        let Some(store) = &self.store else { return };
        for model in &mut self.models {
            let db = store.database(&model.name);
            // One that is set aside says nothing.
            if let Some(db) = db.filter(|db| db.broken().is_none()) {
                model.observe(db.captured_pos(), db.pos());
            }
        }
    }

    pub fn close_clients(&mut self) {
        self.clients.clear();
    }

    fn end_life(&mut self) {
        self.close_clients();
        self.vfs = None;
        if let Some(store) = self.store.take() {
            store.run_background();
        }
    }

    /// A clean stop and a new start.
    pub fn restart(&mut self) {
        self.tell("restart");
        self.close_clients();
        self.store().run_background();
        self.store().close();
        self.observe();
        if self.disk.is_dead() {
            return;
        }
        self.end_life();
        self.disk.restart_process();
        let opened = self.open();
        self.disk.crash_at(None);
        self.disk.set_faults(Faults::default());
        let excused = self.disk.is_dead() || self.is_faulty();
        // It takes no writes either where it could not note that it does.
        let maimed = |s: &Arc<Store>| {
            !s.is_writable() || s.databases().iter().any(|db| db.broken().is_some())
        };
        match opened {
            Ok(()) if excused && self.store.as_ref().is_some_and(maimed) => self.disk.die(),
            Ok(()) => {
                self.check();
                self.disk.set_faults(self.faults);
            }
            // As after any other death.
            Err(e) if excused => {
                self.tell(format!("  {e}"));
                self.disk.die();
            }
            Err(e) => panic!("the data directory does not open: {e}"),
        }
    }

    /// The process or the power goes, and comes again, perhaps several times; then everything is
    /// checked. `again`: the crashes of recovery itself.
    pub fn crash(&mut self, how: Crash, again: &mut dyn FnMut(&mut World) -> Option<(u64, Crash)>) {
        self.observe();
        let mut how = how;
        loop {
            self.tell(format!("crash: {how:?}"));
            self.disk.set_faults(Faults::default());
            self.disk.die();
            self.end_life();
            match how {
                Crash::Process => self.disk.restart_process(),
                Crash::Power(keep) => {
                    self.power = true;
                    self.disk.restart_power(keep);
                }
            }
            let next = again(self);
            if let Some((steps, _)) = next {
                self.disk.crash_at(Some(self.disk.steps() + steps));
            }
            let opened = self.open();
            match (opened, next) {
                (_, Some((_, crash))) if self.disk.is_dead() => {
                    self.end_life();
                    how = crash;
                }
                (Ok(()), _) => {
                    self.disk.crash_at(None);
                    self.check();
                    self.disk.set_faults(self.faults);
                    return;
                }
                (Err(e), _) => panic!("the data directory does not open: {e}"),
            }
        }
    }

    /// A new process, one of whose reads fails while it starts, after this many others; where it
    /// could not do without, yet another one. Whether there were so many reads.
    pub fn start_with_a_read_error(&mut self, after: u64) -> bool {
        self.tell(format!("a start whose read {after} fails"));
        self.observe();
        self.disk.die();
        self.end_life();
        self.disk.restart_process();
        let before = self.disk.failed();
        self.disk.fail_read(Some(after));
        let opened = self.open();
        self.disk.fail_read(None);
        let failed = self.disk.failed() > before;
        let whole = |s: &Arc<Store>| s.databases().iter().all(|db| db.broken().is_none());
        match opened {
            Ok(()) if self.store.as_ref().is_some_and(whole) => self.check(),
            Err(e) if !failed => panic!("the data directory does not open: {e}"),
            _ => {
                assert!(failed, "a database is set aside");
                self.crash(Crash::Process, &mut |_| None);
            }
        }
        failed
    }

    /// Checks every database after a start, exactly.
    pub fn check(&mut self) {
        for i in 0..self.models.len() {
            let must = if self.power {
                self.models[i].durable
            } else {
                self.models[i].acked
            };
            self.check_database(i, must);
        }
        self.power = false;
        let models = &self.models;
        self.pairs.retain(|pair| {
            let [a, b] = pair.map(|(db, id)| models[db].stands_on(models[db].acked, id));
            assert_eq!(a, b, "half of a transaction over two databases: {pair:?}");
            a
        });
    }

    fn check_database(&mut self, i: usize, must: usize) {
        let name = self.models[i].name.clone();
        let db = self.store().database(&name);
        let Some(db) = db.filter(|db| db.broken().is_some() || db.page_count() > 0) else {
            let model = &mut self.models[i];
            let pos = self.store.as_ref().and_then(|s| s.database(&name));
            let pos = pos.map(|db| db.pos()).unwrap_or_default();
            let Some(gone) = model.gone(must) else {
                panic!("{name} is gone, state {must} was acknowledged");
            };
            return model.found(gone, must, pos);
        };
        assert_eq!(db.broken(), None, "{name}");
        let (pos, bytes) = image(&db);
        assert_eq!(db.pos(), pos, "{name}");
        assert_eq!(
            checksum(&bytes, db.page_size()),
            pos.checksum,
            "{name}: the checksum is that of the bytes"
        );
        self.connect(i).unwrap();
        let client = self.clients.pop().unwrap();
        integrity(&client.sql);
        let id = state_of(&client.sql, "main").unwrap();
        let model = &mut self.models[i];
        if id == 0 {
            // It has a page, by a transaction that made no table.
            let Some(gone) = model.gone(must) else {
                panic!("{name} is empty, state {must} was acknowledged");
            };
            model.found(gone, must, pos);
        } else {
            model.found(id, must, pos);
            let content = model.states[id].content.clone().expect("it was committed");
            compare(&client.sql, &content).unwrap();
        }
        drop(client);
        // That was a connection too: in WAL mode it may have done a checkpoint.
        self.observe();
    }

    /// Builds a database file of this content beside the simulated disk.
    pub fn file_of(&self, id: usize, content: &Content, page_size: u32) -> std::fs::File {
        let path = self.disk.root().with_extension("import");
        let _ = std::fs::remove_file(&path);
        let sql = Connection::open(&path).unwrap();
        sql.execute_batch(&format!("PRAGMA page_size={page_size}; PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; BEGIN; CREATE TABLE m(id); CREATE TABLE t(k INTEGER PRIMARY KEY, v); CREATE INDEX i ON t(v); INSERT INTO m VALUES ({id})"))
            .unwrap();
        for (k, (seed, len)) in &content.rows {
            sql.execute("INSERT INTO t VALUES (?, ?)", (k, value(*seed, *len)))
                .unwrap();
        }
        for x in &content.tables {
            sql.execute_batch(&format!("CREATE TABLE x{x}(a)")).unwrap();
        }
        sql.execute_batch("COMMIT").unwrap();
        drop(sql);
        let file = std::fs::File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file
    }

    /// Stops cleanly, changes a bit of a file, and starts again: every database is what it was, or
    /// set aside; and what it sends is what it was, or refused.
    pub fn rot_at_rest(&mut self) {
        self.close_clients();
        self.store().run_background();
        self.store().close();
        self.observe();
        self.end_life();
        self.disk.restart_process();
        let mut files = Vec::new();
        list_files(&self.disk.root().join("dbs"), &mut files);
        files.retain(|(_, len)| *len > 0);
        if files.is_empty() {
            return self.open().unwrap();
        }
        files.sort();
        let (path, len) = files[self.rng.random_range(0..files.len())].clone();
        let (offset, bit) = (self.rng.random_range(0..len), self.rng.random_range(0..8));
        self.tell(format!("bit {bit} of byte {offset} of {}", path.display()));
        self.disk.flip(&path, offset, bit);
        self.open().unwrap();
        for i in 0..self.models.len() {
            let name = self.models[i].name.clone();
            let db = self.store().database(&name);
            if let Some(reason) = db.as_ref().and_then(|db| db.broken()) {
                self.tell(format!("{name} is set aside: {reason}"));
                let own = path.starts_with(self.disk.root().join("dbs").join(&name));
                assert!(
                    own,
                    "{name} is set aside, it is not the one that was changed"
                );
                continue;
            }
            self.check_database(i, self.models[i].acked);
            if let Some(db) = self.store().database(&name) {
                self.check_stream(&db);
            }
        }
    }

    /// A replica that follows from any position on never gets anything that was not.
    fn check_stream(&self, db: &Arc<Database>) {
        let here = db.pos();
        // And the disk may return other bytes than are there.
        let rot = if here.txid.is_multiple_of(2) { 0 } else { 30 };
        self.disk.set_faults(Faults {
            rot,
            ..Faults::default()
        });
        for txid in 0..here.txid {
            let checksum = match db.log().read(txid + 1) {
                Ok(Some(record)) => match record.ltx_header() {
                    Ok(header) => header.pre_apply_checksum,
                    Err(_) => continue,
                },
                _ => continue,
            };
            let Ok(Next::Record(r)) = db.record_after(Pos { txid, checksum }) else {
                continue;
            };
            let Ok(summary) = ltx::verify(&r.bytes[..]) else {
                continue;
            };
            let pos = summary.trailer.post_apply_checksum;
            if let Some(seen) = self.model_of(db).seen.get(&r.max_txid) {
                assert_eq!(*seen, pos, "{}: transaction {:016x}", db.name(), r.max_txid);
            }
        }
        self.disk.set_faults(Faults::default());
    }

    fn model_of(&self, db: &Database) -> &Model {
        let model = self.models.iter().find(|m| m.name == db.name());
        model.expect("it has a model")
    }

    /// The state that a database is in, if it can be told: where a commit failed, that is not the
    /// newest one that was acknowledged for sure.
    pub fn newest(&mut self, i: usize) -> Option<usize> {
        let model = &self.models[i];
        if model
            .states
            .iter()
            .skip(model.acked + 1)
            .all(|s| !s.possible)
        {
            return Some(model.acked);
        }
        self.connect(i).ok()?;
        let client = self.clients.pop()?;
        let id = state_of(&client.sql, "main").ok()?;
        let model = &self.models[i];
        if id == 0 {
            return model.gone(model.acked);
        }
        assert!(
            model.stands_on(id, model.acked),
            "{}: state {id}",
            model.name
        );
        Some(id)
    }

    /// Removes a database, as `rm` does.
    pub fn drop_database(&mut self, i: usize) {
        let name = self.models[i].name.clone();
        self.clients.retain(|c| c.db != i && c.other != Some(i));
        let Some(db) = self.store().database(&name) else {
            return;
        };
        if db.file(FileKind::Database).is_none() {
            return;
        }
        let Some(parent) = self.newest(i) else { return };
        self.tell(format!("drop {name}"));
        // It takes its half with it, though the other may be finished only by the next start.
        self.pairs
            .retain(|pair| pair.iter().all(|(db, _)| *db != i));
        let model = &mut self.models[i];
        let gone = model.add(parent, None);
        model.states[gone].possible = true;
        match wait(|done| db.unlink(FileKind::Database, done)) {
            Ok(()) => {
                let pos = db.captured_pos();
                self.models[i].ack(gone, true, pos);
            }
            Err(e) if self.disk.is_dead() || self.is_faulty() => self.tell(format!("  {e}")),
            Err(e) => panic!("drop {name}: {e}"),
        }
        self.observe();
    }
}

fn list_files(dir: &Path, files: &mut Vec<(PathBuf, u64)>) {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    for entry in entries {
        let path = entry.unwrap().path();
        match path.metadata().unwrap() {
            m if m.is_dir() => list_files(&path, files),
            m => files.push((path, m.len())),
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let from = self.story.len().saturating_sub(60);
            eprintln!("what was done:\n{}", self.story[from..].join("\n"));
            // What is left cannot be taken down in order.
            self.clients.drain(..).for_each(std::mem::forget);
        }
        self.end_life();
    }
}
