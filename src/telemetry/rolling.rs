//! A file that rolls: when it is full it becomes `PATH.1`, what was `PATH.1` becomes `PATH.2`, and
//! what would be older than the last that is kept is removed. Older files are compressed (gzip,
//! `PATH.1.gz`) on a thread of their own.
//!
//! Why not a crate: `file-rotate`, the one that rolls by size and compresses, panics where a
//! directory or a rename fails and drops what it cannot write without a word.
//!
//! Invariant: only the thread that compresses touches `PATH.1` while it runs, and it has ended
//! before names are changed again.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use flate2::Compression;
use flate2::write::GzEncoder;

use crate::private;
use crate::thread;

/// See the module.
#[derive(Debug)]
pub(super) struct Rolling {
    path: PathBuf,
    file: File,
    /// Bytes in `file`.
    size: u64,
    /// Bytes from which on it is full.
    max_size: u64,
    /// Older files that are kept.
    max_count: u64,
    compress: bool,
    compressing: Option<JoinHandle<()>>,
}

impl Rolling {
    /// Opens the file, or goes on with the one that is there. Its directory is made if it is
    /// missing.
    pub(super) fn open(
        path: &Path,
        max_size: u64,
        max_count: u64,
        compress: bool,
    ) -> io::Result<Rolling> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        let file = append_to(path)?;
        let size = file.metadata()?.len();
        Ok(Rolling {
            path: path.to_owned(),
            file,
            size,
            max_size,
            max_count,
            compress,
            compressing: None,
        })
    }

    /// Appends whole lines; they stay in one file. The file is at most one call's bytes larger than
    /// its limit.
    pub(super) fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.size >= self.max_size {
            self.roll()?;
        }
        let written = self.file.write_all(lines);
        // After a failure it is not known how much of it is there.
        self.size = match &written {
            Ok(()) => self.size + lines.len() as u64,
            Err(_) => self.file.metadata()?.len(),
        };
        written
    }

    /// Begins a new file.
    fn roll(&mut self) -> io::Result<()> {
        self.join();
        if self.max_count == 0 {
            fs::remove_file(&self.path).or_else(absent)?;
        } else {
            for suffix in ["", ".gz"] {
                let of = |n| numbered(&self.path, n, suffix);
                fs::remove_file(of(self.max_count)).or_else(absent)?;
                for n in (1..self.max_count).rev() {
                    fs::rename(of(n), of(n + 1)).or_else(absent)?;
                }
            }
            let first = numbered(&self.path, 1, "");
            fs::rename(&self.path, &first).or_else(absent)?;
            if self.compress {
                self.compressing = compress_beside(first);
            }
        }
        self.file = append_to(&self.path)?;
        self.size = 0;
        Ok(())
    }

    /// Waits for the thread that compresses.
    pub(super) fn join(&mut self) {
        if let Some(thread) = self.compressing.take()
            && thread.join().is_err()
        {
            tracing::error!("compressing an old operation log failed: it stays as it is");
        }
    }
}

impl Drop for Rolling {
    fn drop(&mut self) {
        self.join();
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    private::options().create(true).append(true).open(path)
}

fn empty(path: &Path) -> io::Result<File> {
    let mut options = private::options();
    options.create(true).write(true).truncate(true).open(path)
}

/// `PATH.N` and a suffix.
fn numbered(path: &Path, n: u64, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(format!(".{n}{suffix}"));
    name.into()
}

/// A file that is not there need not be removed, or renamed.
fn absent(e: io::Error) -> io::Result<()> {
    match e.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(e),
    }
}

/// Starts a thread that compresses a file. A file that cannot be compressed stays as it is.
fn compress_beside(path: PathBuf) -> Option<JoinHandle<()>> {
    let shown = path.display().to_string();
    let work = move || {
        if let Err(error) = compress(&path) {
            tracing::warn!(path = %path.display(), %error, "an old operation log is not compressed");
        }
    };
    match thread::start("compress", work) {
        Ok(thread) => Some(thread),
        Err(error) => {
            tracing::warn!(path = shown, %error, "an old operation log is not compressed");
            None
        }
    }
}

/// Makes `PATH.gz` of `PATH`.
fn compress(path: &Path) -> io::Result<()> {
    let mut done = OsString::from(path);
    done.push(".gz");
    let mut unfinished = done.clone();
    unfinished.push(".tmp");
    let packed = (|| {
        let mut encoder = GzEncoder::new(empty(Path::new(&unfinished))?, Compression::fast());
        io::copy(&mut File::open(path)?, &mut encoder)?;
        encoder.finish()?;
        fs::rename(&unfinished, &done)
    })();
    if packed.is_err() {
        // It is the first error that counts.
        let _ = fs::remove_file(&unfinished);
    }
    packed.and_then(|()| fs::remove_file(path))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<String> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_newest_are_kept_compressed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/ops");
        let mut log = Rolling::open(&path, 10, 2, true).unwrap();
        for n in 0..5 {
            log.write(format!("line {n} of five\n").as_bytes()).unwrap();
        }
        drop(log);
        assert_eq!(
            names(&dir.path().join("sub")),
            ["ops", "ops.1.gz", "ops.2.gz"]
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "line 4 of five\n");
        for (n, line) in [(1, "line 3 of five\n"), (2, "line 2 of five\n")] {
            let mut text = String::new();
            let file = File::open(numbered(&path, n, ".gz")).unwrap();
            let mut decoder = flate2::read::GzDecoder::new(file);
            decoder.read_to_string(&mut text).unwrap();
            assert_eq!(text, line);
        }
    }

    #[test]
    fn it_goes_on_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ops");
        for n in 0..3 {
            let mut log = Rolling::open(&path, 15, 9, false).unwrap();
            log.write(format!("line {n}\n").as_bytes()).unwrap();
            log.write(b"more\n").unwrap();
        }
        assert_eq!(names(dir.path()), ["ops", "ops.1"]);
        let all = fs::read_to_string(numbered(&path, 1, "")).unwrap()
            + &fs::read_to_string(&path).unwrap();
        assert_eq!(all, "line 0\nmore\nline 1\nmore\nline 2\nmore\n");
    }

    #[test]
    fn none_is_kept_if_none_is_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ops");
        let mut log = Rolling::open(&path, 1, 0, true).unwrap();
        log.write(b"a\n").unwrap();
        log.write(b"b\n").unwrap();
        drop(log);
        assert_eq!(names(dir.path()), ["ops"]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "b\n");
    }
}
