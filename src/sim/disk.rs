//! The disk of a simulated node: the real one, on which flushes of logs take their time, and which
//! is gone when the node is killed.

use std::ffi::OsString;
use std::fs::Metadata;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::clock;
use crate::store::disk::{Disk, DiskFile, File, Open, Real};

use super::process::{self, Process};
use super::world::World;

/// See the module.
#[derive(Clone)]
pub(crate) struct NodeDisk(Arc<Shared>);

struct Shared {
    world: Arc<World>,
    process: Arc<Process>,
    gone: AtomicBool,
}

impl NodeDisk {
    pub fn new(world: &Arc<World>, process: &Arc<Process>) -> NodeDisk {
        NodeDisk(Arc::new(Shared {
            world: world.clone(),
            process: process.clone(),
            gone: AtomicBool::new(false),
        }))
    }

    /// Nothing is written to it any more.
    pub fn kill(&self) {
        self.0.gone.store(true, Ordering::SeqCst);
    }

    fn check(&self) -> io::Result<()> {
        match self.0.gone.load(Ordering::SeqCst) {
            true => Err(io::Error::other("the node was killed")),
            false => Ok(()),
        }
    }

    fn wrap(&self, path: &Path, file: File) -> File {
        let log = path.components().any(|c| c.as_os_str() == "log");
        Arc::new(NodeFile {
            disk: self.clone(),
            log,
            file,
        })
    }
}

impl std::fmt::Debug for NodeDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NodeDisk")
    }
}

impl Disk for NodeDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<File> {
        if how != Open::Read {
            self.check()?;
        }
        Ok(self.wrap(path, Real.open(path, how)?))
    }

    fn temporary(&self, dir: &Path) -> io::Result<File> {
        Ok(self.wrap(dir, Real.temporary(dir)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.check()?;
        Real.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.check()?;
        Real.remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.check()?;
        Real.create_dir(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.check()?;
        Real.remove_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        let mut names = Real.list(path)?;
        names.sort();
        Ok(names)
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        Disk::metadata(&Real, path)
    }
}

#[derive(Debug)]
struct NodeFile {
    disk: NodeDisk,
    /// It belongs to a log.
    log: bool,
    file: File,
}

impl DiskFile for NodeFile {
    fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        self.file.descriptor()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        self.disk.check()?;
        self.file.write_at(buf, offset)
    }

    fn set_len(&self, size: u64) -> io::Result<()> {
        self.disk.check()?;
        self.file.set_len(size)
    }

    fn allocate(&self, size: u64) -> io::Result<()> {
        self.disk.check()?;
        self.file.allocate(size)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.check()?;
        self.file.reserve(offset, len)
    }

    fn sync_data(&self) -> io::Result<()> {
        let Shared { world, process, .. } = &*self.disk.0;
        // Whoever applies what comes holds locks that others do not wait for in a simulation.
        if self.log && process::in_client() {
            let takes = match world.range(0..40) {
                0 => world.ms(100..15_000),
                1..10 => world.ms(1..20),
                _ => return self.disk.check(),
            };
            let began = clock::now();
            while clock::now() < began + takes && !process.is_dead() {
                clock::pause(
                    (began + takes - clock::now()).min(std::time::Duration::from_millis(500)),
                );
            }
            process::wait(process.running());
        }
        self.disk.check()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.disk.check()
    }

    fn begin_sync(&self, _offset: u64, _len: usize) {}

    fn forget_cached(&self, offset: u64, len: usize) {
        self.file.forget_cached(offset, len);
    }

    fn metadata(&self) -> io::Result<Metadata> {
        self.file.metadata()
    }
}
