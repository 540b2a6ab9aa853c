//! The disk of a node in one of its lives: the simulated one, on which flushes of logs take their time.

use std::ffi::OsString;
use std::fs::Metadata;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use crate::clock;
use crate::store::disk::sim::Sim;
use crate::store::disk::{Disk, DiskFile, File, Open};

use super::process::{self, Process};
use super::world::World;

/// See the module.
#[derive(Clone)]
pub(crate) struct NodeDisk(Arc<Shared>);

struct Shared {
    world: Arc<World>,
    process: Arc<Process>,
    disk: Arc<Sim>,
}

impl NodeDisk {
    pub fn new(world: &Arc<World>, process: &Arc<Process>, disk: &Arc<Sim>) -> NodeDisk {
        NodeDisk(Arc::new(Shared {
            world: world.clone(),
            process: process.clone(),
            disk: disk.clone(),
        }))
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
        Ok(self.wrap(path, self.0.disk.open(path, how)?))
    }

    fn temporary(&self, dir: &Path) -> io::Result<File> {
        Ok(self.wrap(dir, self.0.disk.temporary(dir)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.disk.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.0.disk.remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.0.disk.create_dir(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.0.disk.remove_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        self.0.disk.list(path)
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        Disk::metadata(&*self.0.disk, path)
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
        self.file.write_at(buf, offset)
    }

    fn set_len(&self, size: u64) -> io::Result<()> {
        self.file.set_len(size)
    }

    fn allocate(&self, size: u64) -> io::Result<()> {
        self.file.allocate(size)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.reserve(offset, len)
    }

    fn sync_data(&self) -> io::Result<()> {
        // What is written while it waits is not meant.
        self.file.sync_data()?;
        let Shared {
            world,
            process,
            disk,
        } = &*self.disk.0;
        // Whoever applies what comes holds locks that others do not wait for in a simulation.
        if self.log && process::in_client() {
            let takes = match world.range(0..40) {
                0 => world.ms(100..15_000),
                1..10 => world.ms(1..20),
                _ => return Ok(()),
            };
            let began = clock::now();
            while clock::now() < began + takes && !process.is_dead() {
                clock::pause(
                    (began + takes - clock::now()).min(std::time::Duration::from_millis(500)),
                );
            }
            process::wait(process.running());
        }
        match disk.is_dead() {
            true => Err(io::Error::other("the node was killed")),
            false => Ok(()),
        }
    }

    fn sync_all(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn begin_sync(&self, offset: u64, len: usize) {
        self.file.begin_sync(offset, len);
    }

    fn forget_cached(&self, offset: u64, len: usize) {
        self.file.forget_cached(offset, len);
    }

    fn metadata(&self) -> io::Result<Metadata> {
        self.file.metadata()
    }
}
