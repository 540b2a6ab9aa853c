//! The number of the last primary whose history this node has.
//!
//! Every primary has a number greater than those of all primaries before it that it knows of (see
//! `role`). A node keeps the number of the one that it was last in step with, or was itself, in
//! `<data>/epoch`: decimal, with a newline. It tells an old primary from the present one, and says
//! which of two nodes has the newer history.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::Store;
use super::disk::Disk;
use super::error::StoreError;

/// The file, and what it says.
pub(super) struct Epoch {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    current: Mutex<u64>,
}

impl Epoch {
    /// Reads the file of a data directory; 0 if there is none.
    pub fn open(disk: &Arc<dyn Disk>, dir: &Path) -> Result<Epoch, StoreError> {
        let path = dir.join("epoch");
        let current = match disk.read_to_string(&path) {
            Ok(Some(text)) => text.trim().parse().map_err(|_| {
                let what = "it should hold one number; if this node was never primary alone, remove the file";
                StoreError::corrupt(&path, what.to_owned())
            })?,
            Ok(None) => 0,
            Err(e) => return Err(StoreError::io("read", &path)(e)),
        };
        Ok(Epoch {
            disk: disk.clone(),
            path,
            current: Mutex::new(current),
        })
    }

    fn set(&self, epoch: u64) -> Result<(), StoreError> {
        let mut current = self.current.lock();
        if *current == epoch {
            return Ok(());
        }
        self.disk
            .replace(&self.path, |out| writeln!(out, "{epoch}"))
            .map_err(StoreError::io("write", &self.path))?;
        *current = epoch;
        Ok(())
    }
}

impl Store {
    /// The number of the last primary whose history this node has; 0 if it has none's.
    pub fn epoch(&self) -> u64 {
        *self.epoch.current.lock()
    }

    /// Keeps the number of the primary that this node is in step with, or is: on disk when this
    /// returns.
    pub fn set_epoch(&self, epoch: u64) -> Result<(), StoreError> {
        self.epoch.set(epoch)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::store::disk::Real;

    #[test]
    fn it_is_kept_and_nonsense_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let disk: Arc<dyn Disk> = Arc::new(Real);
        let epoch = Epoch::open(&disk, dir.path()).unwrap();
        assert_eq!(*epoch.current.lock(), 0);
        epoch.set(u64::MAX).unwrap();
        assert_eq!(
            *Epoch::open(&disk, dir.path()).unwrap().current.lock(),
            u64::MAX
        );
        epoch.set(7).unwrap();
        assert_eq!(fs::read(dir.path().join("epoch")).unwrap(), b"7\n");
        fs::write(dir.path().join("epoch"), "x").unwrap();
        assert!(Epoch::open(&disk, dir.path()).is_err());
    }
}
