//! What the disk holds: what is durable, and what has been done since.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::Path;

use rand::Rng;
use rand::rngs::StdRng;

use super::names::NameChange;
use super::{Faults, eio};

/// Bytes that are written whole or not at all.
pub(super) const SECTOR: u64 = 512;

pub(super) type Id = usize;

#[derive(Debug)]
pub(super) struct State {
    pub(super) nodes: Vec<Node>,
    /// Changes of names that are not durable, in order.
    pub(super) names: Vec<NameChange>,
    pub(super) rng: StdRng,
    pub(super) steps: u64,
    pub(super) crash_at: Option<u64>,
    pub(super) dead: bool,
    /// Handles of an earlier life are of no use.
    pub(super) life: u64,
    pub(super) faults: Faults,
    /// This many reads from now one ends with EIO.
    pub(super) fail_read: Option<u64>,
    /// How many faults there were.
    pub(super) failed: u64,
    pub(super) ignore_syncs: bool,
    pub(super) trace: Option<Vec<String>>,
    /// Prints the trace too.
    pub(super) aloud: bool,
}

#[derive(Debug)]
pub(super) enum Node {
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
    pub(super) fn dir() -> Node {
        Node::Dir {
            durable: BTreeMap::new(),
            visible: BTreeMap::new(),
        }
    }

    pub(super) fn file(durable: Vec<u8>) -> Node {
        Node::File {
            reserved: durable.len() as u64,
            durable,
            pending: Vec::new(),
        }
    }
}

/// A change of a file that is not durable.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Write(u64, Vec<u8>),
    Size(u64),
}

/// What becomes of an operation.
pub(super) enum Fate {
    Done,
    /// It ends with this error; a crash may have let a part of it happen.
    Failed {
        error: io::Error,
        crash: bool,
    },
}

impl Change {
    pub(super) fn apply(&self, bytes: &mut Vec<u8>) {
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
    pub(super) fn apply_some(&self, bytes: &mut Vec<u8>, rng: &mut StdRng) {
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
    pub(super) fn file(&mut self, id: Id) -> (&mut Vec<u8>, &mut Vec<Change>) {
        match &mut self.nodes[id] {
            Node::File {
                durable, pending, ..
            } => (durable, pending),
            Node::Dir { .. } => panic!("a directory is no file"),
        }
    }

    pub(super) fn set_reserved(&mut self, id: Id, to: impl FnOnce(u64) -> u64) {
        if let Node::File { reserved, .. } = &mut self.nodes[id] {
            *reserved = to(*reserved);
        }
    }

    pub(super) fn has_space(&self, id: Option<Id>, end: u64) -> bool {
        match id.map(|id| &self.nodes[id]) {
            Some(Node::File { reserved, .. }) => *reserved >= end,
            _ => false,
        }
    }

    pub(super) fn visible(&mut self, id: Id) -> &mut BTreeMap<OsString, Id> {
        match &mut self.nodes[id] {
            Node::Dir { visible, .. } => visible,
            Node::File { .. } => panic!("a file is no directory"),
        }
    }

    pub(super) fn add(&mut self, node: Node) -> Id {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    pub(super) fn sync(&mut self, id: Id) {
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
    pub(super) fn fail_sync(&mut self, id: Id) {
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

    pub(super) fn note(&mut self, what: &str, path: &Path, a: u64, b: u64) {
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

    pub(super) fn step(&mut self, life: u64, needs_space: bool) -> io::Result<Fate> {
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

    /// Whether a read ends with EIO.
    pub(super) fn read_fails(&mut self) -> bool {
        let fails = match self.fail_read {
            Some(after) => {
                self.fail_read = after.checked_sub(1);
                after == 0
            }
            None => self.chance(self.faults.read_eio),
        };
        self.failed += u64::from(fails);
        fails
    }

    pub(super) fn chance(&mut self, of_1000: u32) -> bool {
        of_1000 > 0 && self.rng.random_range(0..1000) < of_1000
    }
}
