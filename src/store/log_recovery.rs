//! Opening a log: which segments count, and where the torn end of the last crash is cut off.

use std::collections::VecDeque;
use std::io;
use std::path::Path;

use super::disk::{Disk, Open};
use super::error::StoreError;
use super::log::REPLACEMENT;
use super::segment::{self, Segment};

/// A log as it was found.
pub(super) struct Opened {
    /// Its segments, with their whole records.
    pub segments: VecDeque<Segment>,
    /// Behind the last whole record stood another, which is lost: torn, or rotten.
    pub cut: bool,
}

/// Opens the segments in `dir`, which need not exist. Records above `verified` are read and
/// checked.
///
/// # Errors
/// Of the system, and when a record is damaged or missing that later ones say was on disk.
pub(super) fn open(disk: &dyn Disk, dir: &Path, verified: u64) -> Result<Opened, StoreError> {
    let mut names: Vec<u64> = Vec::new();
    match disk.list(dir) {
        Ok(entries) => {
            let parse = |n: &std::ffi::OsString| n.to_str().and_then(segment::parse_file_name);
            names.extend(entries.iter().filter_map(parse));
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(StoreError::io("list log", dir)(e)),
    }
    names.sort_unstable();
    finish_replacement(disk, dir, &mut names)?;
    open_segments(disk, dir, &names, verified)
}

/// Makes the names in a directory durable.
pub(super) fn sync_dir(disk: &dyn Disk, dir: &Path) -> Result<(), StoreError> {
    disk.sync_dir(dir)
        .map_err(StoreError::io("sync log directory", dir))
}

/// A snapshot that was to replace the log when the node ended: if it is whole it does so now.
fn finish_replacement(disk: &dyn Disk, dir: &Path, names: &mut Vec<u64>) -> Result<(), StoreError> {
    let path = dir.join(REPLACEMENT);
    if !disk.exists(&path) {
        return Ok(());
    }
    let whole = Segment::open(disk, &path, 0)?
        .segment
        .filter(|s| !s.is_empty());
    let Some(segment) = whole else {
        return disk
            .remove_file(&path)
            .map_err(StoreError::io("remove log segment", &path));
    };
    segment
        .write_again(0)
        .and_then(|()| segment.file.sync_all())
        .map_err(StoreError::io("sync log segment", &path))?;
    sync_dir(disk, dir)?;
    remove_segments(disk, dir, names)?;
    let name = dir.join(segment::file_name(segment.first_max));
    disk.rename(&path, &name)
        .map_err(StoreError::io("rename log segment", &path))?;
    sync_dir(disk, dir)?;
    *names = vec![segment.first_max];
    Ok(())
}

/// Opens the segments of these names in order, and cuts off the torn end of the last crash.
/// Nothing is changed before it is known that the end is torn and not damaged.
fn open_segments(
    disk: &dyn Disk,
    dir: &Path,
    names: &[u64],
    verified: u64,
) -> Result<Opened, StoreError> {
    let mut segments: VecDeque<Segment> = VecDeque::new();
    for name in names {
        let scanned = Segment::open(disk, &dir.join(segment::file_name(*name)), verified)?;
        let last = segments.back().and_then(Segment::last_txid);
        let follows = |s: &Segment| last.is_none_or(|t| Some(s.first_min) == t.checked_add(1));
        match scanned.segment.filter(|s| !s.is_empty() && follows(s)) {
            Some(segment) => segments.push_back(segment),
            None => break,
        }
    }
    let missing = segments
        .back()
        .and_then(Segment::last_txid)
        .map_or(1, |t| t.saturating_add(1));
    let torn = &names[segments.len()..];
    if let Some(last) = segments.back() {
        check_end(dir, last, missing)?;
    }
    for name in torn {
        check_torn(disk, dir, &dir.join(segment::file_name(*name)), missing)?;
    }
    remove_segments(disk, dir, torn)?;
    let cut = match segments.back() {
        Some(last) => cut_tail(last)?,
        None => false,
    };
    Ok(Opened { segments, cut })
}

/// An error if what stands behind a segment's last whole record says that `missing` was on disk.
fn check_end(dir: &Path, segment: &Segment, missing: u64) -> Result<(), StoreError> {
    if !segment.later_record_says_flushed(missing)? {
        return Ok(());
    }
    let what = format!(
        "transaction {missing:016x} is damaged, and later ones are there: restore the file, or remove {} and let the node fetch the database again",
        dir.display()
    );
    Err(StoreError::corrupt(&segment.path, what))
}

/// An error if this segment, which does not go on from those before it, is damaged or says that
/// `missing` was on disk.
fn check_torn(disk: &dyn Disk, dir: &Path, path: &Path, missing: u64) -> Result<(), StoreError> {
    let Some(segment) = Segment::open(disk, path, 0)?.segment else {
        return check_headerless(disk, path);
    };
    let flushed = segment.record_offsets().any(|o| {
        segment::read_header(&*segment.file, segment.salt, o)
            .is_ok_and(|h| h.flushed_txid >= missing)
    });
    if flushed {
        let what = format!("transactions from {missing:016x} on are missing before this segment");
        return Err(StoreError::corrupt(path, what));
    }
    check_end(dir, &segment, missing)
}

/// A segment without a header is torn if the header was never written, and damaged if it was.
fn check_headerless(disk: &dyn Disk, path: &Path) -> Result<(), StoreError> {
    let mut header = [0u8; segment::SEGMENT_HEADER_SIZE as usize];
    let read = disk.open(path, Open::Read).and_then(|f| {
        let whole = f.size()? >= segment::SEGMENT_HEADER_SIZE;
        if whole {
            f.read_exact_at(&mut header, 0)?;
        }
        Ok(())
    });
    read.map_err(StoreError::io("read log segment", path))?;
    if header.iter().all(|b| *b == 0) {
        return Ok(());
    }
    let what = "its header is damaged: restore the file, or remove the log and let the node fetch the database again";
    Err(StoreError::corrupt(path, what))
}

/// Zeros behind the last whole record, so that nothing of a torn one is ever read again. Whether
/// something stood there.
fn cut_tail(seg: &Segment) -> Result<bool, StoreError> {
    let mut head = [0u8; segment::RECORD_HEADER_SIZE];
    // The end of the file is nothing.
    let stood = seg.file.read_exact_at(&mut head, seg.tail).is_ok() && head.iter().any(|b| *b != 0);
    if stood {
        tracing::warn!(
            path = %seg.path.display(),
            offset = seg.tail,
            "the log's last transaction is not whole and is cut off: it was being written when the node ended, or the disk has lost it"
        );
    }
    let cut = || -> io::Result<()> {
        let len = seg.file.size()?;
        seg.file.set_len(seg.tail)?;
        seg.file.set_len(len.max(seg.tail))
    };
    cut().map_err(StoreError::io("cut log segment", &seg.path))?;
    Ok(stood)
}

fn remove_segments(disk: &dyn Disk, dir: &Path, names: &[u64]) -> Result<(), StoreError> {
    for name in names {
        let path = dir.join(segment::file_name(*name));
        disk.remove_file(&path)
            .map_err(StoreError::io("remove log segment", &path))?;
    }
    // Else a crash could bring them back behind records of the same numbers.
    if names.is_empty() {
        Ok(())
    } else {
        sync_dir(disk, dir)
    }
}
