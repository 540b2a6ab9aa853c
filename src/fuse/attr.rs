//! Attributes of nodes, and the contents of those that are made up.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};

use crate::store::{DbFile, FileKind, Role, Store, StoreError};

use super::nodes::{Node, ROOT};

/// The kernel asks no more, until it is told that something changed.
pub(super) const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// Bytes of `X-pos`: TXID, `/`, checksum, newline.
pub(super) const POS_SIZE: u64 = 34;
/// Bytes of `.lag`.
const LAG_SIZE: u64 = 11;

/// How long the kernel may believe the attributes of a node.
pub(super) fn ttl(node: &Node) -> Duration {
    match node {
        Node::File(f) if f.file.kind != FileKind::Shm => FOR_EVER,
        Node::Super(_) | Node::LockDir => FOR_EVER,
        _ => Duration::ZERO,
    }
}

/// How long the kernel may believe that a node's name stands for it.
pub(super) fn entry_ttl(node: &Node) -> Duration {
    match node {
        Node::File(_) | Node::Super(_) | Node::Pos(_) | Node::LockDir => FOR_EVER,
        _ => Duration::ZERO,
    }
}

/// The attributes of a node.
pub(super) fn of(store: &Store, node: &Node) -> Result<FileAttr, StoreError> {
    let primary = store.role() == Role::Primary;
    let (size, mtime, perm) = match node {
        Node::Root => (0, SystemTime::now(), if primary { 0o777 } else { 0o555 }),
        Node::Primary => (
            primary_text(store).map_or(0, |t| t.len() as u64),
            SystemTime::now(),
            0o444,
        ),
        Node::Lag => {
            let ms = u64::try_from(store.in_step_at().unwrap_or(0)).unwrap_or(0);
            let mtime = if primary {
                SystemTime::now()
            } else {
                UNIX_EPOCH + Duration::from_millis(ms)
            };
            (LAG_SIZE, mtime, 0o444)
        }
        // Whoever mounts there must be able to write it.
        Node::LockDir => (0, UNIX_EPOCH, 0o777),
        Node::Lock(db) => (lock_link(db.name()).len() as u64, UNIX_EPOCH, 0o777),
        Node::Pos(db) => {
            let ms = u64::try_from(db.timestamp()).unwrap_or(0);
            (POS_SIZE, UNIX_EPOCH + Duration::from_millis(ms), 0o444)
        }
        Node::Super(j) => (j.size(), SystemTime::now(), 0o666),
        Node::File(f) => (
            f.db.size(&f.file)?,
            modified(&f.file),
            permissions(f.file.kind, primary || f.db.holds_halt()),
        ),
    };
    Ok(FileAttr {
        ino: INodeNo(node.ino()),
        size,
        blocks: size.div_ceil(512),
        atime: mtime,
        mtime,
        ctime: mtime,
        crtime: mtime,
        kind: match node {
            Node::Root | Node::LockDir => FileType::Directory,
            Node::Lock(_) => FileType::Symlink,
            _ => FileType::RegularFile,
        },
        perm,
        nlink: if node.ino() == ROOT { 2 } else { 1 },
        // SAFETY: these two system calls cannot fail and touch no memory.
        uid: unsafe { libc::geteuid() },
        // SAFETY: as above.
        gid: unsafe { libc::getegid() },
        rdev: 0,
        blksize: 4096,
        flags: 0,
    })
}

fn permissions(kind: FileKind, primary: bool) -> u16 {
    // Readers of a WAL lock and mark its index, on a replica too.
    if primary || kind == FileKind::Shm {
        0o666
    } else {
        0o444
    }
}

fn modified(file: &DbFile) -> SystemTime {
    file.file
        .metadata()
        .and_then(|m| m.modified())
        .unwrap_or(UNIX_EPOCH)
}

/// What `X-lock` links to.
pub(super) fn lock_link(db: &str) -> String {
    format!("{}/{db}-lock", crate::store::LOCK_DIR)
}

/// What `.primary` holds, where there is one.
pub(super) fn primary_text(store: &Store) -> Option<String> {
    match store.role() {
        Role::Replica { hostname: Some(h) } => Some(format!("{h}\n")),
        _ => None,
    }
}

/// What `.lag` holds: ms behind the primary.
pub(super) fn lag_text(store: &Store) -> String {
    let never = i64::from(i32::MAX);
    format!("{:+010}\n", store.lag().unwrap_or(never).min(never))
}

/// What `X-pos` holds.
pub(super) fn pos_text(pos: crate::ltx::Pos) -> String {
    format!("{pos}\n")
}
