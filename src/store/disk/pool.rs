//! The real disk, with few files open at a time: a node may have thousands of databases, of which
//! most are idle.
//!
//! A [`File`] of this disk is opened when it is used. Of those that are open beyond [`OPEN`], the ones
//! are closed that were not used for longest.
//!
//! Invariants:
//! - A file with bytes that were not synced stays open: an error of the kernel's in writing them is
//!   told to whoever syncs the file then, and might not be told to one who opens it anew.
//! - A file whose name is taken away, or given to another one, is open before that and stays open;
//!   one that is renamed is found under its new name. So is one whose descriptor was asked for: it
//!   stays the same.
//! - Names change only through the pool, with `names` locked for writing; a file is opened again with
//!   it locked for reading.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::{Mutex, RwLock, RwLockUpgradableReadGuard};

use super::{Disk, DiskFile, File, Open, Real, real};

/// So many files stay open though nobody uses them.
const OPEN: usize = 96;
/// How many files are looked at to close one.
const LOOKS: usize = 4;

/// See the module.
#[derive(Debug, Default)]
pub struct Pool(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    names: RwLock<Names>,
    /// Those that are open, in the order in which they are looked at.
    open: Mutex<VecDeque<Weak<Pooled>>>,
}

/// Every file that there is, by its name.
#[derive(Debug, Default)]
struct Names {
    files: HashMap<PathBuf, Vec<Weak<Pooled>>>,
    /// How many names there may be before those of files that are gone are looked for.
    sweep: usize,
}

/// A file, perhaps open.
#[derive(Debug)]
struct Pooled {
    shared: Arc<Shared>,
    this: Weak<Pooled>,
    write: bool,
    slot: Mutex<Slot>,
    /// It stays open, with this descriptor.
    pinned: OnceLock<Arc<fs::File>>,
    /// It was used since it was looked at last.
    used: AtomicBool,
    /// Something was written that was not synced.
    unsynced: AtomicBool,
}

#[derive(Debug)]
struct Slot {
    path: PathBuf,
    file: Option<Arc<fs::File>>,
}

impl Disk for Pool {
    fn open(&self, path: &Path, how: Open) -> io::Result<File> {
        let names = self.0.names.upgradable_read();
        let file = real::open(path, how)?;
        if file.metadata()?.is_dir() {
            return Ok(Arc::new(file));
        }
        let pooled = Arc::new_cyclic(|this| Pooled {
            shared: Arc::clone(&self.0),
            this: this.clone(),
            write: how != Open::Read,
            slot: Mutex::new(Slot {
                path: path.to_owned(),
                file: Some(Arc::new(file)),
            }),
            pinned: OnceLock::new(),
            used: AtomicBool::new(true),
            // That it was made or emptied leaves no bytes to be written.
            unsynced: AtomicBool::new(false),
        });
        let mut names = RwLockUpgradableReadGuard::upgrade(names);
        names.add(path, &pooled);
        drop(names);
        self.0.opened(pooled.this.clone());
        Ok(pooled)
    }

    fn temporary(&self, dir: &Path) -> io::Result<File> {
        Real.temporary(dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut names = self.0.names.write();
        names.pin(to)?;
        Real.rename(from, to)?;
        names.rename(from, to);
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut names = self.0.names.write();
        names.pin(path)?;
        Real.remove_file(path)?;
        names.files.remove(path);
        Ok(())
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        Real.create_dir(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        Real.remove_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        Real.list(path)
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        Real.metadata(path)
    }
}

impl Shared {
    /// One more is open.
    fn opened(&self, file: Weak<Pooled>) {
        self.open.lock().push_back(file);
        self.trim();
    }

    /// Closes some of those that are open beyond the number that may be.
    fn trim(&self) {
        let mut open = self.open.lock();
        for _ in 0..LOOKS {
            if open.len() <= OPEN {
                return;
            }
            let Some(file) = open.pop_front().and_then(|file| file.upgrade()) else {
                continue;
            };
            if !file.close() {
                open.push_back(file.this.clone());
            }
        }
    }
}

impl Names {
    fn add(&mut self, path: &Path, file: &Arc<Pooled>) {
        if self.files.len() >= self.sweep {
            let there = |files: &Vec<Weak<Pooled>>| files.iter().any(|f| f.strong_count() > 0);
            self.files.retain(|_, files| there(files));
            self.sweep = 2 * self.files.len() + OPEN;
        }
        let files = self.files.entry(path.to_owned()).or_default();
        files.retain(|file| file.strong_count() > 0);
        files.push(file.this.clone());
    }

    /// Files that are about to lose their name are open from now on.
    fn pin(&self, path: &Path) -> io::Result<()> {
        let files = self.files.get(path).into_iter().flatten();
        files
            .filter_map(Weak::upgrade)
            .try_for_each(|file| file.pin().map(|_| ()))
    }

    /// The files of a name, or of those below a directory, have another one.
    fn rename(&mut self, from: &Path, to: &Path) {
        self.files.remove(to);
        let old: Vec<PathBuf> = match self.files.contains_key(from) {
            true => vec![from.to_owned()],
            // A directory, most likely, which is rare.
            false => {
                let below = self.files.keys().filter(|path| path.starts_with(from));
                below.cloned().collect()
            }
        };
        for path in old {
            let new = match path.strip_prefix(from) {
                Ok(rest) if !rest.as_os_str().is_empty() => to.join(rest),
                _ => to.to_owned(),
            };
            let files = self.files.remove(&path).unwrap_or_default();
            for file in files.iter().filter_map(Weak::upgrade) {
                file.slot.lock().path.clone_from(&new);
            }
            self.files.entry(new).or_default().extend(files);
        }
    }
}

impl Pooled {
    /// The file, opened if it is not.
    fn file(&self) -> io::Result<Arc<fs::File>> {
        if let Some(file) = self.pinned.get() {
            return Ok(Arc::clone(file));
        }
        self.used.store(true, Ordering::Relaxed);
        if let Some(file) = &self.slot.lock().file {
            return Ok(Arc::clone(file));
        }
        let _names = self.shared.names.read();
        let (file, opened) = self.open_slot()?;
        if opened {
            self.shared.opened(self.this.clone());
        }
        Ok(file)
    }

    /// The file, and whether it was opened for that. The names are locked.
    fn open_slot(&self) -> io::Result<(Arc<fs::File>, bool)> {
        let mut slot = self.slot.lock();
        if let Some(file) = &slot.file {
            return Ok((Arc::clone(file), false));
        }
        let how = if self.write { Open::Write } else { Open::Read };
        let file = Arc::new(real::open(&slot.path, how)?);
        slot.file = Some(Arc::clone(&file));
        Ok((file, true))
    }

    /// It stays open from now on. The names are locked.
    fn pin(&self) -> io::Result<&Arc<fs::File>> {
        let (file, _) = self.open_slot()?;
        Ok(self.pinned.get_or_init(|| file))
    }

    /// Whether it needs to be looked at no more: it is closed, or stays open for good. One stays
    /// that was used since it was looked at last, is used now, or was not synced.
    fn close(&self) -> bool {
        if self.pinned.get().is_some() {
            return true;
        }
        let used = self.used.swap(false, Ordering::Relaxed);
        let mut slot = self.slot.lock();
        let in_use = slot.file.as_ref().is_some_and(|f| Arc::strong_count(f) > 1);
        if used || in_use || self.unsynced.load(Ordering::Acquire) {
            return false;
        }
        slot.file = None;
        true
    }

    /// Does what leaves something to be synced.
    fn change<T>(&self, change: impl FnOnce(&fs::File) -> io::Result<T>) -> io::Result<T> {
        let file = self.file()?;
        let done = change(&file);
        // While it is in use it is not closed.
        self.unsynced.store(true, Ordering::Release);
        done
    }

    fn sync(&self, sync: impl FnOnce(&fs::File) -> io::Result<()>) -> io::Result<()> {
        let file = self.file()?;
        // What is written from here on may be synced or not.
        let unsynced = self.unsynced.swap(false, Ordering::AcqRel);
        sync(&file).inspect_err(|_| self.unsynced.store(true, Ordering::Release))?;
        drop(file);
        if unsynced {
            self.shared.trim();
        }
        Ok(())
    }
}

impl DiskFile for Pooled {
    fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        let _names = self.shared.names.read();
        Ok(self.pin()?.as_fd())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        DiskFile::read_at(&*self.file()?, buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        self.change(|file| DiskFile::write_at(file, buf, offset))
    }

    fn set_len(&self, size: u64) -> io::Result<()> {
        self.change(|file| file.set_len(size))
    }

    fn allocate(&self, size: u64) -> io::Result<()> {
        self.change(|file| file.allocate(size))
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(|file| file.reserve(offset, len))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.sync(fs::File::sync_data)
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync(fs::File::sync_all)
    }

    fn metadata(&self) -> io::Result<Metadata> {
        self.file()?.metadata()
    }

    fn begin_sync(&self, offset: u64, len: usize) {
        if let Ok(file) = self.file() {
            file.begin_sync(offset, len);
        }
    }

    fn forget_cached(&self, offset: u64, len: usize) {
        if let Ok(file) = self.file() {
            file.forget_cached(offset, len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptors(dir: &Path) -> usize {
        let links = fs::read_dir("/proc/self/fd").unwrap();
        links
            .filter_map(|fd| fs::read_link(fd.unwrap().path()).ok())
            .filter(|path| path.starts_with(dir))
            .count()
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.size().unwrap() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// Files with their numbers as content, synced or not.
    fn many(pool: &Pool, dir: &Path, sync: bool) -> Vec<File> {
        (0..4 * OPEN)
            .map(|i| {
                let file = pool.open(&dir.join(i.to_string()), Open::New).unwrap();
                file.write_all_at(i.to_string().as_bytes(), 0).unwrap();
                if sync {
                    file.sync_data().unwrap();
                }
                file
            })
            .collect()
    }

    #[test]
    fn many_files_are_there_and_few_are_open() {
        let (pool, dir) = (Pool::default(), tempfile::tempdir().unwrap());
        let files = many(&pool, dir.path(), true);
        assert!(descriptors(dir.path()) <= OPEN + LOOKS);
        for (i, file) in files.iter().enumerate() {
            assert_eq!(content(file), i.to_string().as_bytes());
        }
        assert!(descriptors(dir.path()) <= OPEN + LOOKS);
        drop(files);
        assert_eq!(descriptors(dir.path()), 0);
    }

    #[test]
    fn what_is_not_synced_stays_open_until_it_is() {
        let (pool, dir) = (Pool::default(), tempfile::tempdir().unwrap());
        let files = many(&pool, dir.path(), false);
        assert_eq!(descriptors(dir.path()), files.len());
        files.iter().for_each(|file| file.sync_data().unwrap());
        // Each sync looks at a few of those that are open, twice before it closes one.
        for _ in 0..files.len() {
            files[0].write_all_at(b"0", 0).unwrap();
            files[0].sync_data().unwrap();
        }
        assert!(descriptors(dir.path()) <= OPEN + LOOKS);
    }

    #[test]
    fn names_change_under_files_that_are_closed() {
        let (pool, dir) = (Pool::default(), tempfile::tempdir().unwrap());
        let inner = dir.path().join("a");
        pool.create_dir(&inner).unwrap();
        let files = many(&pool, &inner, true);
        let moved = dir.path().join("b");
        pool.rename(&inner.join("0"), &inner.join("1")).unwrap();
        pool.remove_file(&inner.join("2")).unwrap();
        let new = pool.open(&inner.join("2"), Open::New).unwrap();
        new.write_all_at(b"new", 0).unwrap();
        pool.rename(&inner, &moved).unwrap();
        for (i, file) in files.iter().enumerate() {
            assert_eq!(content(file), i.to_string().as_bytes(), "{i}");
        }
        assert_eq!(content(&new), b"new");
        let again = pool.open(&moved.join("1"), Open::Read).unwrap();
        assert_eq!(content(&again), b"0");
    }

    #[test]
    fn a_descriptor_that_was_asked_for_stays() {
        let (pool, dir) = (Pool::default(), tempfile::tempdir().unwrap());
        let files = many(&pool, dir.path(), true);
        let fd = files[0].descriptor().unwrap();
        files.iter().for_each(|file| drop(content(file)));
        let other = fs::File::from(fd.try_clone_to_owned().unwrap());
        assert_eq!(other.metadata().unwrap().len(), 1);
    }
}
