//! Has the kernel know a WAL's bytes before they are written again.
//!
//! The kernel cuts a cached write where it ends in a page of memory that it does not know whole. Of
//! a frame that lies across two such pages it makes three requests: the frame's header, and its page
//! in two pieces. Of what it has read before it makes two. SQLite begins its WAL again and again, so
//! the kernel reads each byte of it once more before it is written for the second time.
//!
//! Nothing depends on it: what the kernel has forgotten since costs a request more.

use std::ops::Range;
use std::sync::Arc;

use super::context::Job;
use super::database::{Database, DbFile, State};

/// How far ahead of the writer it is read, at least.
const AHEAD: u64 = 512 << 10;
/// Bytes that are read at a time.
const STEP: u64 = 8 << 20;

/// What the kernel knows of the WAL.
#[derive(Debug, Default)]
pub(super) struct WalCache {
    ino: u64,
    /// The file's size when it was last begun again: what lies beyond has never been written.
    size: u64,
    /// The kernel has read it up to here.
    known: u64,
}

impl WalCache {
    /// The WAL is begun again.
    fn begin(&mut self, ino: u64, size: u64) {
        let known = match self.ino == ino {
            true => self.known.min(size),
            false => 0,
        };
        *self = WalCache { ino, size, known };
    }

    /// What is to be read when the writer has come this far.
    fn next(&mut self, written: u64) -> Option<Range<u64>> {
        if self.known.max(written) >= self.size || written + AHEAD < self.known {
            return None;
        }
        let from = self.known;
        self.known = (from.max(written) + STEP).min(self.size);
        Some(from..self.known)
    }
}

impl Database {
    /// The WAL's header was written, which begins it again.
    pub(super) fn wal_begun(&self, st: &mut State, wal: &DbFile) {
        // Without its size it is only written more slowly.
        let size = wal.file.metadata().map_or(0, |m| m.len());
        st.wal_cache.begin(wal.ino, size);
    }

    /// The WAL was written up to `end`.
    pub(super) fn read_wal_ahead(self: &Arc<Self>, st: &mut State, end: u64) {
        if let Some(range) = st.wal_cache.next(end) {
            let ino = st.wal_cache.ino;
            self.context.keep(Job::ReadWal(self.clone(), ino, range));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wal_is_read_once_and_ahead_of_its_writer() {
        let mut cache = WalCache::default();
        let write = |cache: &mut WalCache, to: u64| {
            let mut read = Vec::new();
            for end in (32..=to).step_by(4120) {
                read.extend(cache.next(end));
                let known = end >= cache.size || cache.known >= cache.size.min(end + AHEAD);
                assert!(known, "{end}");
            }
            read
        };
        cache.begin(7, 32);
        assert_eq!(write(&mut cache, 30 << 20), [], "it has just been made");
        cache.begin(7, 20 << 20);
        let read = write(&mut cache, 30 << 20);
        assert_eq!((read[0].start, read.last().unwrap().end), (0, 20 << 20));
        assert!(read.windows(2).all(|w| w[0].end == w[1].start), "{read:?}");
        assert!(read.len() < 5, "{read:?}");
        cache.begin(7, 20 << 20);
        assert_eq!(write(&mut cache, 20 << 20), [], "it is known");
        cache.begin(7, 25 << 20);
        assert_eq!(write(&mut cache, 25 << 20), vec![20 << 20..25 << 20]);
        // Truncated, and grown again.
        cache.begin(7, 32);
        assert_eq!(write(&mut cache, 9000), []);
        cache.begin(7, 9000);
        assert_eq!(write(&mut cache, 9000), vec![32..9000]);
        cache.begin(8, 5000);
        assert_eq!(write(&mut cache, 5000), vec![0..5000], "another");
    }
}
