//! The mark of a lane on disk: it tells a recovery that the WAL holds what the log may lack, and
//! from where on.
//!
//! `<database>/lane`: `TXID SALT1 SALT2 FRAMES`, in hex. Up to this TXID it counts: the log has
//! everything that is in the first so many frames of the WAL of these salts. A later record of the
//! log says by itself where in the WAL its transaction ends.

use std::io::Write;
use std::path::Path;

use super::super::disk::Disk;
use super::super::error::StoreError;

/// Its name in the database's directory.
pub(in crate::store) const MARK: &str = "lane";

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub txid: u64,
    pub salt1: u32,
    pub salt2: u32,
    pub frames: u64,
}

impl Mark {
    /// Writes it: on disk when this returns, the names of the directory with it.
    pub fn save(&self, disk: &dyn Disk, dir: &Path) -> Result<(), StoreError> {
        let path = dir.join(MARK);
        let Mark {
            txid,
            salt1,
            salt2,
            frames,
        } = self;
        disk.replace(&path, |out| {
            writeln!(out, "{txid:016x} {salt1:08x} {salt2:08x} {frames:x}")
        })
        .map_err(StoreError::io("write", &path))
    }

    /// Reads it; `None`: there is none.
    pub fn load(disk: &dyn Disk, dir: &Path) -> Result<Option<Mark>, StoreError> {
        let path = dir.join(MARK);
        let text = disk
            .read_to_string(&path)
            .map_err(StoreError::io("read", &path))?;
        let Some(text) = text else { return Ok(None) };
        let fields: Option<Vec<u64>> = text
            .split_ascii_whitespace()
            .map(|f| u64::from_str_radix(f, 16).ok())
            .collect();
        let salt = |n: u64| u32::try_from(n).ok();
        let mark = match fields.as_deref() {
            Some(&[txid, salt1, salt2, frames]) => {
                salt(salt1).zip(salt(salt2)).map(|(salt1, salt2)| Mark {
                    txid,
                    salt1,
                    salt2,
                    frames,
                })
            }
            _ => None,
        };
        let corrupt = || StoreError::corrupt(&path, "not TXID SALT1 SALT2 FRAMES in hex");
        mark.map(Some).ok_or_else(corrupt)
    }

    /// Removes it, if it is there: gone from the disk when this returns.
    pub fn remove(disk: &dyn Disk, dir: &Path) -> Result<(), StoreError> {
        let path = dir.join(MARK);
        disk.remove_file_if_there(&path)
            .and_then(|()| disk.sync_dir(dir))
            .map_err(StoreError::io("remove", &path))
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::disk::Real;
    use super::*;

    #[test]
    fn what_is_saved_is_loaded_and_anything_else_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        assert_eq!(Mark::load(&Real, dir).unwrap(), None);
        let mark = Mark {
            txid: 0x1234,
            salt1: u32::MAX,
            salt2: 7,
            frames: 1000,
        };
        mark.save(&Real, dir).unwrap();
        assert_eq!(Mark::load(&Real, dir).unwrap(), Some(mark));
        Mark::remove(&Real, dir).unwrap();
        Mark::remove(&Real, dir).unwrap();
        assert_eq!(Mark::load(&Real, dir).unwrap(), None);
        for bad in ["", "1 2 3", "1 2 3 4 5", "1 100000000 3 4", "1 2 x 4"] {
            std::fs::write(dir.join(MARK), bad).unwrap();
            assert!(Mark::load(&Real, dir).is_err(), "{bad:?}");
        }
    }
}
