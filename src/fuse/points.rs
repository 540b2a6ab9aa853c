//! Mount points: what is mounted where, and getting rid of what a killed node left.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use crate::thread;

use super::{FS_NAME, MountError};

/// How long a mount may take to say whether it lives.
const PROBE: Duration = Duration::from_secs(2);
/// How many mounts on top of each other are detached.
const MAX_STACK: usize = 16;

/// Makes the mount point ready: there, empty, with no dead mount of ours on it. Returns its
/// absolute path.
pub(super) fn prepare(dir: &Path, skip_unmount: bool) -> Result<PathBuf, MountError> {
    let point = |what: String| MountError::Point {
        dir: dir.to_owned(),
        what,
    };
    let absolute = std::path::absolute(dir).map_err(|e| point(e.to_string()))?;
    if !skip_unmount {
        detach_stale(&absolute).map_err(|what| MountError::Point {
            dir: absolute.clone(),
            what,
        })?;
    }
    fs::create_dir_all(&absolute).map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => point("it is a file, and must be a directory".to_owned()),
        _ => point(format!("cannot be made: {e}")),
    })?;
    let mut entries = fs::read_dir(&absolute).map_err(|e| match e.kind() {
        io::ErrorKind::NotADirectory => point("it is a file, and must be a directory".to_owned()),
        _ => point(e.to_string()),
    })?;
    if entries.next().is_some() {
        return Err(point("it is not empty: choose another directory, or move the files away (databases can be loaded through the mount afterwards)".to_owned()));
    }
    absolute.canonicalize().map_err(|e| point(e.to_string()))
}

/// Detaches mounts of ours at `dir` that no process serves any more.
fn detach_stale(dir: &Path) -> Result<(), String> {
    for _ in 0..MAX_STACK {
        let mounted =
            mounted_at(dir).map_err(|e| format!("cannot read the table of mounts: {e}"))?;
        // What is not ours is left alone; whether it can be used is seen next.
        let ours =
            |(kind, source): &(String, String)| kind.starts_with("fuse") && source == FS_NAME;
        if !mounted.as_ref().is_some_and(ours) {
            return Ok(());
        }
        if is_served(dir) {
            return Err(
                "another node is mounted there: stop it, or choose another directory".to_owned(),
            );
        }
        tracing::info!(dir = %dir.display(), "detaching the mount of a node that ended");
        detach(dir).map_err(|e| format!("a dead mount cannot be detached: {e}"))?;
    }
    Err(format!("more than {MAX_STACK} mounts on top of each other"))
}

/// Whether a process answers for the mount. One that does not answer at all counts as served: it
/// may be stopped, and its clients wait for it.
fn is_served(dir: &Path) -> bool {
    let (tx, rx) = mpsc::channel();
    let path = dir.to_owned();
    let probe = move || {
        let dead = fs::read_dir(&path).is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN));
        // Nobody listens any more after the probe's time.
        tx.send(!dead).ok();
    };
    // Without a thread nothing is sent either.
    let _ = thread::start("probe", probe);
    rx.recv_timeout(PROBE).unwrap_or(true)
}

/// What is mounted on top at exactly this path: the file system's type and source.
fn mounted_at(dir: &Path) -> io::Result<Option<(String, String)>> {
    let table = fs::read("/proc/self/mountinfo")?;
    let mut found = None;
    for line in table.split(|b| *b == b'\n') {
        let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        let Some(separator) = fields.iter().position(|f| *f == b"-") else {
            continue;
        };
        if let (Some(point), Some(kind), Some(source)) = (
            fields.get(4),
            fields.get(separator + 1),
            fields.get(separator + 2),
        ) && unescape(point) == dir
        {
            let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
            found = Some((text(kind), text(source)));
        }
    }
    Ok(found)
}

/// Undoes the octal escapes of the table of mounts.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut i = 0;
    while i < field.len() {
        let octal = field
            .get(i + 1..i + 4)
            .filter(|d| field[i] == b'\\' && d.iter().all(|b| (b'0'..=b'7').contains(b)));
        match octal {
            Some(d) => {
                out.push(
                    d.iter()
                        .fold(0u8, |n, b| n.wrapping_mul(8).wrapping_add(b - b'0')),
                );
                i += 4;
            }
            None => {
                out.push(field[i]);
                i += 1;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

/// Takes a mount out of the name space, files open or not.
pub(super) fn detach(dir: &Path) -> io::Result<()> {
    let path = CString::new(dir.as_os_str().as_bytes())?;
    // SAFETY: a system call with a string that outlives it.
    if unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) } == 0 {
        return Ok(());
    }
    let e = io::Error::last_os_error();
    if e.raw_os_error() != Some(libc::EPERM) {
        return Err(e);
    }
    // Without privilege, the program that mounted it unmounts it.
    let helped = ["fusermount3", "fusermount"].iter().any(|program| {
        std::process::Command::new(program)
            .args(["-u", "-z", "--"])
            .arg(dir)
            .status()
            .is_ok_and(|s| s.success())
    });
    if helped { Ok(()) } else { Err(e) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_and_mounts() {
        assert_eq!(unescape(br"/a\040b\134c"), PathBuf::from("/a b\\c"));
        assert_eq!(unescape(br"/a\04"), PathBuf::from(r"/a\04"));
        assert!(mounted_at(Path::new("/proc")).unwrap().is_some());
        assert_eq!(mounted_at(Path::new("/proc/no such")).unwrap(), None);
    }

    #[test]
    fn a_mount_point_must_be_an_empty_directory() {
        let dir = tempfile::tempdir().unwrap();
        let made = prepare(&dir.path().join("a/b"), false).unwrap();
        assert!(made.is_dir());
        fs::write(dir.path().join("a/file"), b"x").unwrap();
        let full = prepare(&dir.path().join("a"), false)
            .unwrap_err()
            .to_string();
        assert!(full.contains("not empty"), "{full}");
        let file = prepare(&dir.path().join("a/file"), false)
            .unwrap_err()
            .to_string();
        assert!(file.contains("is a file"), "{file}");
    }
}
