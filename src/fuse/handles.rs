//! Which handles have the kernel's cache: SQLite's, and those that read alone, but for journals.
//!
//! Of a write through a cached handle the kernel shows the bytes to every other reader of the file
//! before the node has seen them, and takes them back if the node refuses. A program that knows
//! nothing of SQLite must therefore write past the cache, where its bytes are nobody's until they
//! are accepted. At the opening it is known by its flags: SQLite opens all its files for reading and
//! writing, does not follow a link, and asks for nothing else. Whoever opens otherwise loses speed
//! alone: reads are requests to the node, what is written is forgotten by the cache before the
//! writer is answered, and a shared mapping cannot be made, which SQLite does without.
//!
//! What arrives are the flags of open(2) but those that end at the opening (O_CLOEXEC, O_EXCL, ...).

use fuser::{FileHandle, FopenFlags};

use crate::store::FileKind;

use super::nodes::Node;

/// A handle as SQLite's. Copies have numbers of their own.
pub(super) const SQLITE: FileHandle = FileHandle(0);
/// A handle that reads and writes past the kernel's cache.
pub(super) const UNCACHED: FileHandle = FileHandle(u64::MAX);

/// What SQLite never asks for with a file of a database.
const FOREIGN: i32 = libc::O_APPEND
    | libc::O_DIRECT
    | libc::O_NOATIME
    | libc::O_NONBLOCK
    | libc::O_SYNC
    | libc::O_TRUNC;

/// The handle of a file that is opened with these flags, and how the kernel is to treat it.
pub(super) fn of(node: &Node, flags: i32) -> (FileHandle, FopenFlags) {
    let uncached = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH;
    let kept = FopenFlags::FOPEN_KEEP_CACHE;
    match node {
        // Written once, read hardly ever, and never mapped: a record that crosses a page of memory is
        // one request in place of two.
        Node::File(f) if f.file.kind == FileKind::Journal => (SQLITE, uncached),
        Node::File(_) if writes_unlike_sqlite(flags) => (UNCACHED, uncached | kept),
        Node::File(_) | Node::Super(_) => (SQLITE, kept | FopenFlags::FOPEN_NOFLUSH),
        // Their content changes without notice.
        _ => (SQLITE, uncached),
    }
}

fn writes_unlike_sqlite(flags: i32) -> bool {
    match flags & libc::O_ACCMODE {
        libc::O_RDONLY => false,
        libc::O_RDWR => flags & libc::O_NOFOLLOW == 0 || flags & FOREIGN != 0,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use libc::*;

    use super::writes_unlike_sqlite;

    #[test]
    fn sqlites_handles_and_readers_are_cached() {
        for flags in [
            O_RDWR | O_NOFOLLOW,
            O_RDWR | O_NOFOLLOW | O_LARGEFILE,
            O_RDWR | O_NOFOLLOW | O_CREAT,
            O_RDWR | O_NOFOLLOW | O_CREAT | O_EXCL | O_CLOEXEC,
            O_RDONLY,
            O_RDONLY | O_NONBLOCK | O_NOATIME,
        ] {
            assert!(!writes_unlike_sqlite(flags), "{flags:o}");
        }
        for flags in [
            O_RDWR,
            O_RDWR | O_CREAT,
            O_RDWR | O_CLOEXEC,
            O_RDWR | O_NOFOLLOW | O_APPEND,
            O_RDWR | O_NOFOLLOW | O_DSYNC,
            O_RDWR | O_NOFOLLOW | O_TRUNC,
            O_WRONLY,
            O_WRONLY | O_NOFOLLOW,
        ] {
            assert!(writes_unlike_sqlite(flags), "{flags:o}");
        }
    }
}
