//! Disks of a test's own: a small one in memory, and one that fails on demand. Both need root.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::Node;
use super::run::run;

const LIMIT: Duration = Duration::from_secs(30);

/// Detaches what is mounted there.
fn detach(at: &Path) {
    let path = CString::new(at.as_os_str().as_bytes()).expect("no NUL in a path");
    // SAFETY: a valid C string that lives through the call.
    unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
}

/// A file system in memory of limited size, detached when dropped.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts it at a directory. `None`, with the reason printed, where that is not allowed.
    pub fn mount(at: &Path, megabytes: u32) -> Option<SmallDisk> {
        let disk = SmallDisk(at.to_path_buf());
        match disk.mount_with(0, &format!("size={megabytes}m")) {
            Ok(()) => Some(disk),
            Err(error) => {
                println!("SKIPPED: no file system can be mounted here: {error}");
                None
            }
        }
    }

    /// Makes it read-only, or writable again. Nobody may have a file open for writing.
    pub fn set_read_only(&self, read_only: bool) {
        let read_only = if read_only { libc::MS_RDONLY } else { 0 };
        self.mount_with(libc::MS_REMOUNT | read_only, "")
            .expect("remount");
    }

    fn mount_with(&self, flags: libc::c_ulong, options: &str) -> std::io::Result<()> {
        let path = CString::new(self.0.as_os_str().as_bytes()).expect("no NUL in a path");
        let options = CString::new(options).expect("no NUL");
        let kind = c"tmpfs".as_ptr();
        // SAFETY: valid C strings that live through the call.
        match unsafe { libc::mount(kind, path.as_ptr(), kind, flags, options.as_ptr().cast()) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        detach(&self.0);
    }
}

/// `None`, with the reason printed, if it does not: the program may be missing, or loop devices.
fn succeeds(command: &mut Command) -> Option<()> {
    match command.output() {
        Ok(done) if done.status.success() => Some(()),
        other => {
            println!("SKIPPED: no ext4 in a file can be mounted here: {command:?}: {other:?}");
            None
        }
    }
}

/// Fills what is free on the node's disk; the file to remove for space.
pub fn fill(node: &Node) -> PathBuf {
    let path = node.data().join("filler");
    let mut file = std::fs::File::create(&path).expect("make the filler");
    let bytes = vec![0_u8; 4096];
    while std::io::Write::write_all(&mut file, &bytes).is_ok() {}
    path
}

/// An ext4 file system in a file, which turns read-only when it is told of an error, as a real one
/// does on a disk that fails. Detached when dropped.
pub struct FailingDisk {
    at: PathBuf,
    /// Its block device's name, as `loop0`.
    device: String,
}

impl FailingDisk {
    /// Makes it in the file `image` and mounts it at a directory. `None`, with the reason printed,
    /// where that is not possible.
    pub fn mount(at: &Path, image: &Path, megabytes: u64) -> Option<FailingDisk> {
        let file = std::fs::File::create(image).expect("make the image");
        file.set_len(megabytes << 20).expect("size the image");
        drop(file);
        succeeds(Command::new("mkfs.ext4").arg("-q").arg(image))?;
        FailingDisk::mount_image(at, image)
    }

    /// The same with an image that is there.
    pub fn mount_image(at: &Path, image: &Path) -> Option<FailingDisk> {
        let mut mount = Command::new("mount");
        succeeds(
            mount
                .args(["-o", "loop,errors=remount-ro"])
                .args([image, at]),
        )?;
        let at = at.canonicalize().expect("the mount point");
        let mounts = std::fs::read_to_string("/proc/self/mounts").expect("the list of mounts");
        let device = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ');
            let device = fields.next()?;
            (Path::new(fields.next()?) == at)
                .then(|| device.trim_start_matches("/dev/").to_string())
        });
        Some(FailingDisk {
            at,
            device: device.expect("the mount is in the list"),
        })
    }

    /// From now on it is read-only, whoever has files open for writing.
    pub fn fail(&self) {
        let trigger = format!("/sys/fs/ext4/{}/trigger_fs_error", self.device);
        std::fs::write(trigger, "a test").expect("make the file system fail");
    }
}

impl Drop for FailingDisk {
    fn drop(&mut self) {
        detach(&self.at);
        // The device goes with the last file that is open on the file system.
        let _ = run(&mut Command::new("sync"), b"", LIMIT);
    }
}
