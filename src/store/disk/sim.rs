//! A disk that lies: for simulations.
//!
//! What the running process sees are real files, in a directory of the disk's own in memory, so
//! that locks and mappings work as they always do. Beside them the disk keeps what is durable, and
//! what has been done since. Invariants:
//! - A file is durable as of its last sync; a write after that may be lost by sectors, each for
//!   itself, and so may a change of size.
//! - A name is durable as of its directory's last sync. Changes after that may be lost, each for
//!   itself; of one name they are kept in order. A rename is kept whole or not at all.
//! - A crash of the process loses nothing that was written. A crash of the power keeps some of it.
//! - After a sync that failed, what it was to write is lost or not, and no later sync helps.
//! - Files without a name are gone with the process.
//!
//! A step is an operation that changes anything, or a sync. A crash can be put at any step: it is
//! done in part, or not, and everything after it fails. Changes through a mapping are not seen.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::{Disk, DiskFile, File, Open, real};

/// Bytes that are written whole or not at all.
const SECTOR: u64 = 512;

/// What a power loss keeps of what is not durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    Nothing,
    All,
    Some,
}

/// What goes wrong: how many of 1,000 operations, each by chance.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// Changes and syncs that end with EIO.
    pub eio: u32,
    /// Reads that end with EIO.
    pub read_eio: u32,
    /// Operations that need space and end with ENOSPC.
    pub full: u32,
    /// Reads that return a byte that was never written.
    pub rot: u32,
}

/// The disk. Clones of the `Arc` are the same one.
#[derive(Debug)]
pub(crate) struct Sim {
    me: Weak<Sim>,
    root: PathBuf,
    state: Mutex<State>,
    _dir: tempfile::TempDir,
}

type Id = usize;

#[derive(Debug)]
struct State {
    nodes: Vec<Node>,
    /// Changes of names that are not durable, in order.
    names: Vec<NameChange>,
    rng: StdRng,
    steps: u64,
    crash_at: Option<u64>,
    dead: bool,
    /// Handles of an earlier life are of no use.
    life: u64,
    faults: Faults,
    /// How many faults there were.
    failed: u64,
    ignore_syncs: bool,
    trace: Option<Vec<String>>,
    /// Prints the trace too.
    aloud: bool,
}

#[derive(Debug)]
enum Node {
    Dir {
        durable: BTreeMap<OsString, Id>,
        visible: BTreeMap<OsString, Id>,
    },
    File {
        durable: Vec<u8>,
        pending: Vec<Change>,
        /// Up to here there is space.
        reserved: u64,
    },
}

impl Node {
    fn dir() -> Node {
        Node::Dir {
            durable: BTreeMap::new(),
            visible: BTreeMap::new(),
        }
    }

    fn file(durable: Vec<u8>) -> Node {
        Node::File {
            reserved: durable.len() as u64,
            durable,
            pending: Vec::new(),
        }
    }
}

/// A change of a file that is not durable.
#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<u8>),
    Size(u64),
}

/// A name that was given to a node, or taken away.
#[derive(Clone, Debug)]
struct NameChange {
    at: (Id, OsString),
    to: Option<Id>,
    /// Of a rename: the name that went.
    from: Option<(Id, OsString)>,
}

impl NameChange {
    fn touches(&self, other: &NameChange) -> bool {
        let mine = [Some(&self.at), self.from.as_ref()];
        let theirs = [Some(&other.at), other.from.as_ref()];
        mine.iter().flatten().any(|n| theirs.contains(&Some(n)))
    }
}

/// What becomes of an operation.
enum Fate {
    Done,
    /// It ends with this error; a crash may have let a part of it happen.
    Failed {
        error: io::Error,
        crash: bool,
    },
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

fn not_found() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Change::Write(at, data) => {
                let (start, end) = (*at as usize, *at as usize + data.len());
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[start..end].copy_from_slice(data);
            }
            Change::Size(n) => bytes.resize(*n as usize, 0),
        }
    }

    /// Applies a part of it.
    fn apply_some(&self, bytes: &mut Vec<u8>, rng: &mut StdRng) {
        let Change::Write(at, data) = self else {
            if rng.random() {
                self.apply(bytes);
            }
            return;
        };
        // Whole or gone most often: that is what finds orders that were not kept.
        let torn = rng.random_range(0..4) == 0;
        let whole: bool = rng.random();
        let mut from = 0;
        while from < data.len() {
            let start = at + from as u64;
            let to = data.len().min(from + (SECTOR - start % SECTOR) as usize);
            if if torn { rng.random() } else { whole } {
                Change::Write(start, data[from..to].to_vec()).apply(bytes);
            }
            from = to;
        }
    }
}

impl State {
    fn file(&mut self, id: Id) -> (&mut Vec<u8>, &mut Vec<Change>) {
        match &mut self.nodes[id] {
            Node::File {
                durable, pending, ..
            } => (durable, pending),
            Node::Dir { .. } => panic!("a directory is no file"),
        }
    }

    fn set_reserved(&mut self, id: Id, to: impl FnOnce(u64) -> u64) {
        if let Node::File { reserved, .. } = &mut self.nodes[id] {
            *reserved = to(*reserved);
        }
    }

    fn has_space(&self, id: Option<Id>, end: u64) -> bool {
        match id.map(|id| &self.nodes[id]) {
            Some(Node::File { reserved, .. }) => *reserved >= end,
            _ => false,
        }
    }

    fn visible(&mut self, id: Id) -> &mut BTreeMap<OsString, Id> {
        match &mut self.nodes[id] {
            Node::Dir { visible, .. } => visible,
            Node::File { .. } => panic!("a file is no directory"),
        }
    }

    fn add(&mut self, node: Node) -> Id {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    fn change_name(&mut self, change: NameChange) {
        if let Some((dir, name)) = &change.from {
            self.visible(*dir).remove(name);
        }
        let (dir, name) = change.at.clone();
        match change.to {
            Some(id) => self.visible(dir).insert(name, id),
            None => self.visible(dir).remove(&name),
        };
        self.names.push(change);
    }

    /// Makes those changes of names durable that are wanted, with all that they stand on.
    fn settle_names(&mut self, wanted: impl FnMut(&NameChange) -> bool) {
        let mut keep: Vec<bool> = self.names.iter().map(wanted).collect();
        for later in (0..keep.len())
            .rev()
            .filter(|i| keep[*i])
            .collect::<Vec<_>>()
        {
            let mut group = vec![later];
            while let Some(i) = group.pop() {
                for (earlier, change) in self.names[..i].iter().enumerate() {
                    if !keep[earlier] && change.touches(&self.names[i]) {
                        keep[earlier] = true;
                        group.push(earlier);
                    }
                }
            }
        }
        let names = std::mem::take(&mut self.names);
        for (change, keep) in names.into_iter().zip(keep) {
            if !keep {
                self.names.push(change);
                continue;
            }
            let durable = |s: &mut State, id: Id, f: &dyn Fn(&mut BTreeMap<OsString, Id>)| {
                if let Node::Dir { durable, .. } = &mut s.nodes[id] {
                    f(durable);
                }
            };
            if let Some((dir, name)) = &change.from {
                durable(self, *dir, &|d| {
                    d.remove(name);
                });
            }
            let (dir, name) = &change.at;
            durable(self, *dir, &|d| {
                match change.to {
                    Some(id) => d.insert(name.clone(), id),
                    None => d.remove(name),
                };
            });
        }
    }

    fn sync(&mut self, id: Id) {
        match &mut self.nodes[id] {
            Node::File {
                durable, pending, ..
            } => {
                pending.drain(..).for_each(|c| c.apply(durable));
            }
            Node::Dir { .. } => self.settle_names(|c| {
                c.at.0 == id || c.from.as_ref().is_some_and(|(dir, _)| *dir == id)
            }),
        }
    }

    /// A sync that failed: some of it is durable, and the rest will never be.
    fn fail_sync(&mut self, id: Id) {
        let mut rng = self.rng.clone();
        if let Node::File {
            durable, pending, ..
        } = &mut self.nodes[id]
        {
            pending
                .drain(..)
                .for_each(|c| c.apply_some(durable, &mut rng));
        }
        self.rng = rng;
    }

    fn note(&mut self, what: &str, path: &Path, a: u64, b: u64) {
        if let Some(trace) = &mut self.trace {
            // SQLite makes up the names of super-journals.
            let path = path.to_str().unwrap_or("?");
            let path = path.split("-mj").next().unwrap_or(path);
            let line = format!("{what} {path} {a} {b}");
            if self.aloud {
                eprintln!("    {}: {line}", self.steps + 1);
            }
            trace.push(line);
        }
    }

    fn step(&mut self, life: u64, needs_space: bool) -> io::Result<Fate> {
        if self.dead || life != self.life {
            return Err(eio());
        }
        self.steps += 1;
        if self.crash_at == Some(self.steps) {
            self.dead = true;
            return Ok(Fate::Failed {
                error: eio(),
                crash: true,
            });
        }
        let error = if self.chance(self.faults.eio) {
            eio()
        } else if needs_space && self.chance(self.faults.full) {
            io::Error::from_raw_os_error(libc::ENOSPC)
        } else {
            return Ok(Fate::Done);
        };
        self.failed += 1;
        Ok(Fate::Failed {
            error,
            crash: false,
        })
    }

    fn chance(&mut self, of_1000: u32) -> bool {
        of_1000 > 0 && self.rng.random_range(0..1000) < of_1000
    }
}

impl Sim {
    /// An empty disk.
    pub fn new(seed: u64) -> Arc<Sim> {
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() {
            tempfile::tempdir_in(memory)
        } else {
            tempfile::tempdir()
        };
        let dir = dir.expect("a directory for a simulated disk");
        Arc::new_cyclic(|me| Sim {
            me: me.clone(),
            root: dir.path().to_owned(),
            state: Mutex::new(State {
                nodes: vec![Node::dir()],
                names: Vec::new(),
                rng: StdRng::seed_from_u64(seed),
                steps: 0,
                crash_at: None,
                dead: false,
                life: 0,
                faults: Faults::default(),
                failed: 0,
                ignore_syncs: false,
                trace: std::env::var_os("TENURE_TRACE").map(|_| Vec::new()),
                aloud: std::env::var_os("TENURE_TRACE").is_some(),
            }),
            _dir: dir,
        })
    }

    /// The data directory: an empty one, durable.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Other chances from here on.
    pub fn reseed(&self, seed: u64) {
        self.state.lock().rng = StdRng::seed_from_u64(seed);
    }

    /// How many steps there were.
    pub fn steps(&self) -> u64 {
        self.state.lock().steps
    }

    /// Lets the process die at this step; everything fails from there on.
    pub fn crash_at(&self, step: Option<u64>) {
        self.state.lock().crash_at = step;
    }

    /// Whether the process has died.
    pub fn is_dead(&self) -> bool {
        self.state.lock().dead
    }

    /// Lets it die now.
    pub fn die(&self) {
        self.state.lock().dead = true;
    }

    /// What goes wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.state.lock().faults = faults;
    }

    /// How many operations failed, or returned other bytes, other than by a crash.
    pub fn failed(&self) -> u64 {
        self.state.lock().failed
    }

    /// Answers syncs without doing them.
    pub fn ignore_syncs(&self) {
        self.state.lock().ignore_syncs = true;
    }

    /// Notes every step from now on.
    pub fn start_trace(&self) {
        self.state.lock().trace = Some(Vec::new());
    }

    /// The steps noted.
    pub fn take_trace(&self) -> Vec<String> {
        self.state.lock().trace.take().unwrap_or_default()
    }

    /// A new process: everything that was written is there, and is no more durable than it was.
    pub fn restart_process(&self) {
        let mut st = self.state.lock();
        st.dead = false;
        st.crash_at = None;
        st.life += 1;
    }

    /// A new machine: what is durable is there, and some of the rest.
    pub fn restart_power(&self, keep: Keep) {
        let mut st = self.state.lock();
        let mut rng = st.rng.clone();
        st.settle_names(|_| match keep {
            Keep::Nothing => false,
            Keep::All => true,
            Keep::Some => rng.random(),
        });
        for node in &mut st.nodes {
            let Node::File {
                durable, pending, ..
            } = node
            else {
                continue;
            };
            for change in pending.drain(..) {
                match keep {
                    Keep::Nothing => {}
                    Keep::All => change.apply(durable),
                    Keep::Some => change.apply_some(durable, &mut rng),
                }
            }
        }
        st.rng = rng;
        st.names.clear();
        for entry in fs::read_dir(&self.root).expect("the disk's directory") {
            let entry = entry.expect("the disk's directory");
            let gone = if entry.file_type().expect("a type").is_dir() {
                fs::remove_dir_all(entry.path())
            } else {
                fs::remove_file(entry.path())
            };
            gone.expect("room for the next life");
        }
        let old = std::mem::take(&mut st.nodes);
        st.nodes.push(Node::dir());
        Sim::write_out(&mut st, &old, 0, 0, &self.root);
        st.dead = false;
        st.crash_at = None;
        st.life += 1;
    }

    fn write_out(st: &mut State, old: &[Node], from: Id, to: Id, path: &Path) {
        let Node::Dir { durable: names, .. } = &old[from] else {
            return;
        };
        for (name, id) in names {
            let path = path.join(name);
            let new = match &old[*id] {
                Node::Dir { .. } => {
                    fs::create_dir(&path).expect("a directory of the next life");
                    let new = st.add(Node::dir());
                    Sim::write_out(st, old, *id, new, &path);
                    new
                }
                Node::File { durable, .. } => {
                    fs::write(&path, durable).expect("a file of the next life");
                    st.add(Node::file(durable.clone()))
                }
            };
            if let Node::Dir { durable, visible } = &mut st.nodes[to] {
                durable.insert(name.clone(), new);
                visible.insert(name.clone(), new);
            }
        }
    }

    /// Changes a bit of a file at rest, behind everybody's back.
    pub fn flip(&self, path: &Path, offset: u64, bit: u8) {
        let mut st = self.state.lock();
        let (dir, name) = self.place(&mut st, path).expect("a file of the disk");
        let id = st.visible(dir)[&name];
        let (durable, pending) = st.file(id);
        pending.drain(..).for_each(|c| c.apply(durable));
        durable[offset as usize] ^= 1 << bit;
        fs::write(path, &*durable).expect("a file of the disk");
    }

    /// The directory of a path, which must exist, and the name in it.
    fn place(&self, st: &mut State, path: &Path) -> io::Result<(Id, OsString)> {
        let inside = path.strip_prefix(&self.root).map_err(|_| not_found())?;
        let mut parts: Vec<&OsStr> = inside.iter().collect();
        let name = parts.pop().unwrap_or(OsStr::new(""));
        let mut dir = 0;
        for part in parts {
            dir = *st.visible(dir).get(part).ok_or_else(not_found)?;
            if matches!(st.nodes[dir], Node::File { .. }) {
                return Err(not_found());
            }
        }
        Ok((dir, name.to_owned()))
    }

    fn inside<'a>(&self, path: &'a Path) -> &'a Path {
        path.strip_prefix(&self.root).unwrap_or(path)
    }

    /// Does `act` and then changes a name, as the step's fate has it.
    fn change_name(
        &self,
        what: &str,
        path: &Path,
        act: impl FnOnce() -> io::Result<()>,
        change: impl FnOnce(&mut State) -> io::Result<NameChange>,
    ) -> io::Result<()> {
        let mut st = self.state.lock();
        st.note(what, self.inside(path), 0, 0);
        let life = st.life;
        let failed = match st.step(life, what == "create_dir")? {
            Fate::Done => None,
            Fate::Failed { error, crash } if crash && st.rng.random() => Some(error),
            Fate::Failed { error, .. } => return Err(error),
        };
        let change = change(&mut st);
        act()?;
        let change = change?;
        st.change_name(change);
        failed.map_or(Ok(()), Err)
    }

    fn handle(&self, st: &State, real: fs::File, id: Option<Id>, path: &Path) -> File {
        Arc::new(SimFile {
            sim: self.me.upgrade().expect("it is being used"),
            real,
            id,
            life: st.life,
            path: self.inside(path).to_owned(),
        })
    }

    fn check_alive(&self) -> io::Result<()> {
        if self.state.lock().dead {
            return Err(eio());
        }
        Ok(())
    }
}

impl Disk for Sim {
    fn open(&self, path: &Path, how: Open) -> io::Result<File> {
        let mut st = self.state.lock();
        if st.dead {
            return Err(eio());
        }
        if path == self.root {
            return Ok(self.handle(&st, real::open(path, Open::Read)?, Some(0), path));
        }
        let (dir, name) = self.place(&mut st, path)?;
        let found = st.visible(dir).get(&name).copied();
        let creates = found.is_none() && !matches!(how, Open::Read | Open::Write);
        if creates || (found.is_some() && how == Open::Empty) {
            st.note("open", self.inside(path), creates.into(), 0);
            let life = st.life;
            if let Fate::Failed { error, crash } = st.step(life, creates)? {
                if !(crash && creates) {
                    return Err(error);
                }
                real::open(path, how)?;
                let id = st.add(Node::file(Vec::new()));
                st.change_name(NameChange {
                    at: (dir, name),
                    to: Some(id),
                    from: None,
                });
                return Err(error);
            }
        }
        let file = real::open(path, how)?;
        let id = match found {
            Some(id) => {
                if how == Open::Empty {
                    st.file(id).1.push(Change::Size(0));
                }
                id
            }
            None => {
                let id = st.add(Node::file(Vec::new()));
                st.change_name(NameChange {
                    at: (dir, name),
                    to: Some(id),
                    from: None,
                });
                id
            }
        };
        Ok(self.handle(&st, file, Some(id), path))
    }

    fn temporary(&self, dir: &Path) -> io::Result<File> {
        let mut st = self.state.lock();
        st.note("temporary", self.inside(dir), 0, 0);
        let life = st.life;
        if let Fate::Failed { error, .. } = st.step(life, true)? {
            return Err(error);
        }
        let file = tempfile::tempfile_in(dir)?;
        Ok(self.handle(&st, file, None, dir))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change_name(
            "rename",
            to,
            || fs::rename(from, to),
            |st| {
                let (old, new) = (self.place(st, from)?, self.place(st, to)?);
                let id = *st.visible(old.0).get(&old.1).ok_or_else(not_found)?;
                Ok(NameChange {
                    at: new,
                    to: Some(id),
                    from: Some(old),
                })
            },
        )
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        if !self.exists_visibly(path)? {
            return Err(not_found());
        }
        let change = |st: &mut State| {
            Ok(NameChange {
                at: self.place(st, path)?,
                to: None,
                from: None,
            })
        };
        self.change_name("remove", path, || fs::remove_file(path), change)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        if self.exists_visibly(path)? {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let change = |st: &mut State| {
            let at = self.place(st, path)?;
            let id = st.add(Node::dir());
            Ok(NameChange {
                at,
                to: Some(id),
                from: None,
            })
        };
        self.change_name("create_dir", path, || fs::create_dir(path), change)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let empty = fs::read_dir(path)?.next().is_none();
        if !empty {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        let change = |st: &mut State| {
            Ok(NameChange {
                at: self.place(st, path)?,
                to: None,
                from: None,
            })
        };
        self.change_name("remove_dir", path, || fs::remove_dir(path), change)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        self.check_alive()?;
        fs::read_dir(path)?
            .map(|entry| Ok(entry?.file_name()))
            .collect()
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        self.check_alive()?;
        fs::metadata(path)
    }
}

impl Sim {
    fn exists_visibly(&self, path: &Path) -> io::Result<bool> {
        self.check_alive()?;
        Ok(path.exists())
    }
}

/// An open file of the disk.
#[derive(Debug)]
struct SimFile {
    sim: Arc<Sim>,
    real: fs::File,
    /// `None`: it has no name, and nothing of it outlives the process.
    id: Option<Id>,
    life: u64,
    path: PathBuf,
}

impl SimFile {
    fn sync(&self) -> io::Result<()> {
        let mut st = self.sim.state.lock();
        st.note("sync", &self.path, 0, 0);
        let fate = st.step(self.life, false)?;
        let Some(id) = self.id else { return Ok(()) };
        match fate {
            Fate::Done if st.ignore_syncs => Ok(()),
            Fate::Done => {
                st.sync(id);
                Ok(())
            }
            Fate::Failed { error, crash } => {
                // A crash in the middle of it leaves what any crash leaves.
                if !crash {
                    st.fail_sync(id);
                }
                Err(error)
            }
        }
    }

    /// A change of the file: all of it, or, in a crash, perhaps.
    fn resize(&self, what: &str, size: u64, needs_space: bool) -> io::Result<()> {
        let mut st = self.sim.state.lock();
        st.note(what, &self.path, size, 0);
        let failed = match st.step(self.life, needs_space)? {
            Fate::Done => None,
            Fate::Failed { error, crash } if crash && st.rng.random() => Some(error),
            Fate::Failed { error, .. } => return Err(error),
        };
        self.real.set_len(size)?;
        if let Some(id) = self.id {
            st.file(id).1.push(Change::Size(size));
            st.set_reserved(id, |_| size);
        }
        failed.map_or(Ok(()), Err)
    }
}

impl AsFd for SimFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.real.as_fd()
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut st = self.sim.state.lock();
        if st.dead || self.life != st.life {
            return Err(eio());
        }
        let faults = st.faults;
        if st.chance(faults.read_eio) {
            st.failed += 1;
            return Err(eio());
        }
        let n = FileExt::read_at(&self.real, buf, offset)?;
        if n > 0 && st.chance(faults.rot) {
            let (at, bit) = (st.rng.random_range(0..n), st.rng.random_range(0..8));
            buf[at] ^= 1 << bit;
            st.failed += 1;
        }
        Ok(n)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let mut st = self.sim.state.lock();
        st.note("write", &self.path, offset, buf.len() as u64);
        let end = offset + buf.len() as u64;
        let needs_space = !st.has_space(self.id, end);
        let (n, failed) = match st.step(self.life, needs_space)? {
            Fate::Done => (buf.len(), None),
            Fate::Failed { error, .. } => {
                // Up to a border of a sector, or nothing.
                let end = offset + st.rng.random_range(0..=buf.len() as u64);
                let n = (end / SECTOR * SECTOR).saturating_sub(offset) as usize;
                (n, Some(error))
            }
        };
        self.real.write_all_at(&buf[..n], offset)?;
        if let Some(id) = self.id.filter(|_| n > 0) {
            let change = Change::Write(offset, buf[..n].to_vec());
            st.file(id).1.push(change);
            st.set_reserved(id, |r| r.max(offset + n as u64));
        }
        failed.map_or(Ok(n), Err)
    }

    fn set_len(&self, size: u64) -> io::Result<()> {
        self.resize("set_len", size, false)
    }

    fn allocate(&self, size: u64) -> io::Result<()> {
        if self.real.metadata()?.len() >= size {
            return Ok(());
        }
        self.resize("allocate", size, true)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        // Nothing to be seen of it, but that it can fail.
        let mut st = self.sim.state.lock();
        match st.step(self.life, true)? {
            Fate::Done => {
                if let Some(id) = self.id {
                    st.set_reserved(id, |r| r.max(offset + len));
                }
                Ok(())
            }
            Fate::Failed { error, .. } => Err(error),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.sync()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync()
    }

    fn metadata(&self) -> io::Result<Metadata> {
        self.sim.check_alive()?;
        self.real.metadata()
    }
}
