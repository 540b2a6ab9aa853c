//! The inodes that the kernel knows of.
//!
//! Invariant: a node is here as long as the kernel counts look-ups of it; its number is never used
//! for another file.

use std::collections::HashMap;
use std::sync::Arc;

use fuser::BackingId;
use parking_lot::{Mutex, RwLock};

use crate::store::{Database, DbFile, FileKind, SuperJournal};

/// Inode number of the root directory.
pub(super) const ROOT: u64 = 1;
/// Inode number of `.primary`.
pub(super) const PRIMARY: u64 = 2;
/// Inode number of `.lag`.
pub(super) const LAG: u64 = 3;
/// Inode number of `.lock`, where the second file system is mounted.
pub(super) const LOCK_DIR: u64 = 4;

/// What an inode is.
#[derive(Clone)]
pub(super) enum Node {
    Root,
    Primary,
    Lag,
    LockDir,
    /// `X-lock`, a link into the second file system.
    Lock(Arc<Database>),
    Pos(Arc<Database>),
    File(Arc<FileNode>),
    Super(Arc<SuperJournal>),
}

/// A file of a database.
pub(super) struct FileNode {
    pub db: Arc<Database>,
    pub file: Arc<DbFile>,
    /// The kernel's handle of the backing file, once opened with passthrough.
    pub backing: Mutex<Option<Arc<BackingId>>>,
}

impl Node {
    pub fn ino(&self) -> u64 {
        match self {
            Node::Root => ROOT,
            Node::Primary => PRIMARY,
            Node::Lag => LAG,
            Node::LockDir => LOCK_DIR,
            Node::Lock(db) => db.lock_ino,
            Node::Pos(db) => db.pos_ino,
            Node::File(f) => f.file.ino,
            Node::Super(j) => j.ino,
        }
    }

    /// Whether it is a file beside a database that is deleted. (A database itself keeps its bytes
    /// for those who have it open.)
    pub fn is_gone(&self) -> bool {
        matches!(self, Node::File(f) if f.file.kind != FileKind::Database && f.file.is_deleted())
    }
}

struct Entry {
    node: Node,
    lookups: u64,
}

/// See the module.
#[derive(Default)]
pub(super) struct Nodes {
    table: RwLock<HashMap<u64, Entry>>,
}

impl Nodes {
    /// The node of this number.
    pub fn get(&self, ino: u64) -> Option<Node> {
        match ino {
            ROOT => Some(Node::Root),
            PRIMARY => Some(Node::Primary),
            LAG => Some(Node::Lag),
            LOCK_DIR => Some(Node::LockDir),
            _ => self.table.read().get(&ino).map(|e| e.node.clone()),
        }
    }

    /// Counts a look-up. Returns the node that is known under the number.
    pub fn look_up(&self, node: Node) -> Node {
        let ino = node.ino();
        if ino <= LOCK_DIR {
            return node;
        }
        let mut table = self.table.write();
        let entry = table.entry(ino).or_insert(Entry { node, lookups: 0 });
        entry.lookups += 1;
        entry.node.clone()
    }

    /// The kernel forgets look-ups.
    pub fn forget(&self, ino: u64, count: u64) {
        let mut table = self.table.write();
        let Some(entry) = table.get_mut(&ino) else {
            return;
        };
        entry.lookups = entry.lookups.saturating_sub(count);
        if entry.lookups == 0 {
            table.remove(&ino);
        }
    }
}
