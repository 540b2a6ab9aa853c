//! The handles of programs that copy a database file. All others have no state here.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::store::CopiedFile;

/// The most copies at a time.
const MAX_COPIES: usize = 4096;

/// See the module.
#[derive(Default)]
pub(super) struct Copies {
    last: AtomicU64,
    open: Mutex<HashMap<u64, Arc<CopiedFile>>>,
}

impl Copies {
    /// A handle for the copy; `None` if there are too many.
    pub fn begin(&self, copy: CopiedFile) -> Option<u64> {
        let mut open = self.open.lock();
        if open.len() >= MAX_COPIES {
            return None;
        }
        let handle = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        open.insert(handle, Arc::new(copy));
        Some(handle)
    }

    /// The copy that a handle is of.
    pub fn get(&self, handle: u64) -> Option<Arc<CopiedFile>> {
        if handle == 0 {
            return None;
        }
        self.open.lock().get(&handle).cloned()
    }

    /// The file was emptied without saying by which handle: opening it to copy does that, and
    /// nothing of SQLite's. Whether there is such a handle.
    pub fn empty(&self, ino: u64) -> bool {
        let open = self.open.lock();
        let emptied = open.values().filter(|c| c.ino() == ino && c.empty());
        emptied.count() > 0
    }

    /// The handle is given up.
    pub fn end(&self, handle: u64) -> Option<Arc<CopiedFile>> {
        if handle == 0 {
            return None;
        }
        self.open.lock().remove(&handle)
    }
}
