//! Opening a log: which segments count, and where the torn end of the last crash is cut off.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use super::error::StoreError;
use super::log::REPLACEMENT;
use super::segment::{self, ScanEnd, Segment};

/// Opens the segments in `dir`, which need not exist. Records above `verified` are read and
/// checked.
///
/// # Errors
/// Of the system, and when a record is damaged or missing that later ones say was on disk.
pub(super) fn open(dir: &Path, verified: u64) -> Result<VecDeque<Segment>, StoreError> {
    let mut names: Vec<u64> = Vec::new();
    match fs::read_dir(dir) {
        Ok(entries) => {
            for entry in entries {
                let entry = entry.map_err(StoreError::io("list log", dir))?;
                names.extend(
                    entry
                        .file_name()
                        .to_str()
                        .and_then(segment::parse_file_name),
                );
            }
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(StoreError::io("list log", dir)(e)),
    }
    names.sort_unstable();
    finish_replacement(dir, &mut names)?;
    open_segments(dir, &names, verified)
}

/// Makes the names in a directory durable.
pub(super) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(StoreError::io("sync log directory", dir))
}

/// A snapshot that was to replace the log when the node ended: if it is whole it does so now.
fn finish_replacement(dir: &Path, names: &mut Vec<u64>) -> Result<(), StoreError> {
    let path = dir.join(REPLACEMENT);
    if !path.exists() {
        return Ok(());
    }
    let whole = Segment::open(&path, 0)?.segment.filter(|s| !s.is_empty());
    let Some(segment) = whole else {
        return fs::remove_file(&path).map_err(StoreError::io("remove log segment", &path));
    };
    remove_segments(dir, names)?;
    let name = dir.join(segment::file_name(segment.first_max));
    fs::rename(&path, &name).map_err(StoreError::io("rename log segment", &path))?;
    sync_dir(dir)?;
    *names = vec![segment.first_max];
    Ok(())
}

/// Opens the segments of these names in order, and cuts off the torn end of the last crash.
fn open_segments(
    dir: &Path,
    names: &[u64],
    verified: u64,
) -> Result<VecDeque<Segment>, StoreError> {
    let mut segments: VecDeque<Segment> = VecDeque::new();
    for (i, name) in names.iter().enumerate() {
        let path = dir.join(segment::file_name(*name));
        let scanned = Segment::open(&path, verified)?;
        let last = segments.back().and_then(Segment::last_txid);
        let follows = |s: &Segment| last.is_none_or(|t| s.first_min == t + 1);
        let Some(seg) = scanned.segment.filter(|s| !s.is_empty() && follows(s)) else {
            // What should follow `last` is missing. It is a torn end unless a later record knows better.
            let missing = last.map_or(1, |t| t + 1);
            check_torn(dir, &names[i..], missing, last.is_none())?;
            remove_segments(dir, &names[i..])?;
            break;
        };
        let expected = seg.last_txid().map_or(0, |t| t + 1);
        if scanned.end != ScanEnd::Clean || i + 1 == names.len() {
            if seg.later_record_says_flushed(expected)? {
                let what = format!(
                    "transaction {expected:016x} is damaged, and later ones are there: restore the file, or remove {} and let the node fetch the database again",
                    dir.display()
                );
                return Err(StoreError::corrupt(&seg.path, what));
            }
            cut_tail(&seg)?;
        }
        segments.push_back(seg);
    }
    Ok(segments)
}

/// Zeros behind the last whole record, so that nothing of a torn one is ever read again.
fn cut_tail(seg: &Segment) -> Result<(), StoreError> {
    let cut = || -> io::Result<()> {
        let len = seg.file.metadata()?.len();
        seg.file.set_len(seg.tail)?;
        seg.file.set_len(len.max(seg.tail))
    };
    cut().map_err(StoreError::io("cut log segment", &seg.path))
}

/// An error if any of these segments says that `missing` was on disk.
fn check_torn(dir: &Path, names: &[u64], missing: u64, first: bool) -> Result<(), StoreError> {
    for name in names {
        let path = dir.join(segment::file_name(*name));
        let Some(seg) = Segment::open(&path, 0)?.segment else {
            continue;
        };
        let mut offsets = seg.record_offsets();
        let flushed = offsets.any(|o| {
            segment::read_header(&seg.file, seg.salt, o).is_ok_and(|h| h.flushed_txid >= missing)
        });
        if flushed && !first {
            return Err(StoreError::corrupt(
                &path,
                format!("transactions from {missing:016x} on are missing before this segment"),
            ));
        }
    }
    Ok(())
}

fn remove_segments(dir: &Path, names: &[u64]) -> Result<(), StoreError> {
    for name in names {
        let path = dir.join(segment::file_name(*name));
        fs::remove_file(&path).map_err(StoreError::io("remove log segment", &path))?;
    }
    Ok(())
}
