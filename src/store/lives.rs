//! The lives of this node in which it has taken applications' writes.
//!
//! A node has a new ID at every start, and each transaction carries the ID of the node that made it.
//! Which of them this node has made itself, in whichever life, is what it must not lose when the
//! primary cannot tell whether it has them (see the module `divergent`). So the ID is on disk, in
//! `<data>/lives`, before the first write: 16 hex digits a line, oldest first.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::disk::Disk;
use super::error::StoreError;

/// The most that are kept; transactions of older ones have left the log long ago.
const MAX_LIVES: usize = 1_000;

/// The file, and what it says.
pub(super) struct Lives {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    ids: Mutex<Vec<u64>>,
}

impl Lives {
    /// Reads the file of a data directory.
    pub fn open(disk: &Arc<dyn Disk>, dir: &Path) -> Result<Lives, StoreError> {
        let path = dir.join("lives");
        let text = disk
            .read_to_string(&path)
            .map_err(StoreError::io("read", &path))?;
        let id = |line: &str| {
            u64::from_str_radix(line, 16).map_err(|_| {
                let what = format!("{line:?} should be a node ID of 16 hex digits");
                StoreError::corrupt(&path, what)
            })
        };
        let text = text.unwrap_or_default();
        let ids: Result<Vec<u64>, StoreError> = text.lines().map(id).collect();
        Ok(Lives {
            disk: disk.clone(),
            ids: Mutex::new(ids?),
            path,
        })
    }

    /// Whether this node had the ID when it took writes.
    pub fn has(&self, id: u64) -> bool {
        self.ids.lock().contains(&id)
    }

    /// Adds an ID: on disk when this returns.
    pub fn add(&self, id: u64) -> Result<(), StoreError> {
        let mut ids = self.ids.lock();
        if ids.contains(&id) {
            return Ok(());
        }
        let kept = ids.len().saturating_sub(MAX_LIVES - 1);
        let new: Vec<u64> = ids[kept..].iter().copied().chain([id]).collect();
        self.disk
            .replace(&self.path, |out| {
                let lines = new.iter().map(|id| format!("{id:016X}\n"));
                out.write_all(lines.collect::<String>().as_bytes())
            })
            .map_err(StoreError::io("write", &self.path))?;
        *ids = new;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::disk::Real;

    #[test]
    fn they_are_kept_and_nonsense_is_an_error() {
        let (dir, disk) = (
            tempfile::tempdir().unwrap(),
            Arc::new(Real) as Arc<dyn Disk>,
        );
        let lives = Lives::open(&disk, dir.path()).unwrap();
        assert!(!lives.has(7));
        for id in 1..=MAX_LIVES as u64 + 1 {
            lives.add(id).unwrap();
        }
        let again = Lives::open(&disk, dir.path()).unwrap();
        for lives in [lives, again] {
            assert!(lives.has(MAX_LIVES as u64 + 1) && lives.has(2) && !lives.has(1));
        }
        std::fs::write(dir.path().join("lives"), "x\n").unwrap();
        assert!(Lives::open(&disk, dir.path()).is_err());
    }
}
