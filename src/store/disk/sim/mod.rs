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

use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::{Disk, DiskFile, File, Open, real};
use file::SimFile;
use names::NameChange;
use state::{Change, Fate, Id, Node, State};

mod file;
mod names;
mod state;

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

fn eio() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

fn not_found() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

/// In the order in which they were made: SQLite makes up the names of super-journals.
fn by_age<'a>(
    names: impl Iterator<Item = (&'a OsString, &'a Id)>,
) -> impl Iterator<Item = (&'a OsString, &'a Id)> {
    let mut names: Vec<_> = names.collect();
    names.sort_by_key(|(_, id)| **id);
    names.into_iter()
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
                fail_read: None,
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

    /// Lets one read end with EIO, after this many others; `None`: none but by chance.
    pub fn fail_read(&self, after: Option<u64>) {
        self.state.lock().fail_read = after;
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
        for (name, id) in by_age(names.iter()) {
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
        let mut st = self.state.lock();
        if st.dead {
            return Err(eio());
        }
        let dir = match path == self.root {
            true => 0,
            false => {
                let (dir, name) = self.place(&mut st, path)?;
                *st.visible(dir).get(&name).ok_or_else(not_found)?
            }
        };
        let names = st.visible(dir).iter();
        Ok(by_age(names).map(|(name, _)| name.clone()).collect())
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
