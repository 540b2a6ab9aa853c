//! An open file of the simulated disk.

use std::fs::{self, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use rand::Rng;

use super::state::{Change, Fate, Id, SECTOR};
use super::{DiskFile, Sim, eio};

/// An open file of the disk.
#[derive(Debug)]
pub(super) struct SimFile {
    pub(super) sim: Arc<Sim>,
    pub(super) real: fs::File,
    /// `None`: it has no name, and nothing of it outlives the process.
    pub(super) id: Option<Id>,
    pub(super) life: u64,
    pub(super) path: PathBuf,
}

impl SimFile {
    fn sync(&self) -> io::Result<()> {
        let mut st = self.sim.state.lock();
        st.note("sync", &self.path, 0, 0);
        let fate = st.step(self.life, false)?;
        let Some(id) = self.id else { return Ok(()) };
        match fate {
            Fate::Done if st.ignore_syncs => Ok(()),
            Fate::Done => {
                st.sync(id);
                Ok(())
            }
            Fate::Failed { error, crash } => {
                // A crash in the middle of it leaves what any crash leaves.
                if !crash {
                    st.fail_sync(id);
                }
                Err(error)
            }
        }
    }

    /// A change of the file: all of it, or, in a crash, perhaps.
    fn resize(&self, what: &str, size: u64, needs_space: bool) -> io::Result<()> {
        let mut st = self.sim.state.lock();
        st.note(what, &self.path, size, 0);
        let failed = match st.step(self.life, needs_space)? {
            Fate::Done => None,
            Fate::Failed { error, crash } if crash && st.rng.random() => Some(error),
            Fate::Failed { error, .. } => return Err(error),
        };
        self.real.set_len(size)?;
        if let Some(id) = self.id {
            st.file(id).1.push(Change::Size(size));
            st.set_reserved(id, |_| size);
        }
        failed.map_or(Ok(()), Err)
    }
}

impl DiskFile for SimFile {
    fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        Ok(self.real.as_fd())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut st = self.sim.state.lock();
        if st.dead || self.life != st.life {
            return Err(eio());
        }
        if st.read_fails() {
            return Err(eio());
        }
        let rot = st.faults.rot;
        let n = FileExt::read_at(&self.real, buf, offset)?;
        if n > 0 && st.chance(rot) {
            let (at, bit) = (st.rng.random_range(0..n), st.rng.random_range(0..8));
            buf[at] ^= 1 << bit;
            st.failed += 1;
        }
        Ok(n)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let mut st = self.sim.state.lock();
        st.note("write", &self.path, offset, buf.len() as u64);
        let end = offset + buf.len() as u64;
        let needs_space = !st.has_space(self.id, end);
        let (n, failed) = match st.step(self.life, needs_space)? {
            Fate::Done => (buf.len(), None),
            Fate::Failed { error, .. } => {
                // Up to a border of a sector, or nothing.
                let end = offset + st.rng.random_range(0..=buf.len() as u64);
                let n = (end / SECTOR * SECTOR).saturating_sub(offset) as usize;
                (n, Some(error))
            }
        };
        self.real.write_all_at(&buf[..n], offset)?;
        if let Some(id) = self.id.filter(|_| n > 0) {
            let change = Change::Write(offset, buf[..n].to_vec());
            st.file(id).1.push(change);
            st.set_reserved(id, |r| r.max(offset + n as u64));
        }
        failed.map_or(Ok(n), Err)
    }

    fn set_len(&self, size: u64) -> io::Result<()> {
        self.resize("set_len", size, false)
    }

    fn allocate(&self, size: u64) -> io::Result<()> {
        if self.real.metadata()?.len() >= size {
            return Ok(());
        }
        self.resize("allocate", size, true)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        // Nothing to be seen of it, but that it can fail.
        let mut st = self.sim.state.lock();
        match st.step(self.life, true)? {
            Fate::Done => {
                if let Some(id) = self.id {
                    st.set_reserved(id, |r| r.max(offset + len));
                }
                Ok(())
            }
            Fate::Failed { error, .. } => Err(error),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.sync()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync()
    }

    fn begin_sync(&self, _offset: u64, _len: usize) {}

    fn forget_cached(&self, offset: u64, len: usize) {
        self.real.forget_cached(offset, len);
    }

    fn metadata(&self) -> io::Result<Metadata> {
        self.sim.check_alive()?;
        self.real.metadata()
    }
}
