//! The transaction log of one database: the truth that everything else is a cache of.
//!
//! Invariants:
//! - Records are contiguous in TXIDs from the oldest to the newest; a snapshot replaces the log.
//!   It is written beside the log, under a name of its own; once it is on disk, the log before it
//!   is removed, and it takes its place. A start that finds one whole finishes that.
//! - An append is in the page cache when [`Appender::commit`] returns: it survives the process.
//!   It survives power loss once a [`Log::flush`] that began later has ended.
//! - One flush at a time, and it serves everybody who asked before it began: the first to ask
//!   flushes on its own thread, those who come meanwhile leave a callback and no thread.
//! - After a failed flush nothing is known of the unflushed tail: the log refuses all appends
//!   until the node starts anew and reads what is there.
//! - The newest record is never removed.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::clock;
use crate::ltx;

use super::appender::Appender;
use super::context::{Options, Random};
use super::disk::{Disk, File, Open};
use super::error::StoreError;
use super::log_recovery::{self, sync_dir};
use super::loose::Loose;
use super::segment::{self, BodyReader, RecordHeader, Segment};

/// A segment that has grown to this many bytes is followed by a new one.
pub(super) const SEGMENT_SIZE: u64 = 4 << 20;
/// The segment of a snapshot that is to replace the log.
pub(super) const REPLACEMENT: &str = "replacement";
/// How much of a record is gathered before it is written.
pub(super) const WRITE_BUFFER: usize = 1 << 20;

type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

/// The log of one database.
pub struct Log {
    disk: Arc<dyn Disk>,
    random: Random,
    dir: PathBuf,
    /// A segment older than this is followed by a new one, so that retention can remove it.
    segment_age: Duration,
    cut: bool,
    inner: Mutex<Inner>,
    flush: Mutex<FlushState>,
    /// Told the TXID up to which the log is on disk, before anybody who waits for it, and with the
    /// log locked: it must not call the log.
    on_flushed: OnceLock<Box<dyn Fn(u64) + Send + Sync>>,
}

/// What the log knows of its segments.
pub(super) struct Inner {
    pub(super) segments: VecDeque<Segment>,
    /// When the active segment was begun.
    began: Instant,
    /// Number of appends so far, for [`FlushState`].
    pub(super) seq: u64,
    /// Last TXID known to be on disk.
    pub(super) flushed_txid: u64,
    /// How often another log took this one's place: what a flush found before is of no use after.
    history: u64,
    /// Files of ended segments, and directories, that the next flush must sync too.
    unsynced: Vec<File>,
    /// The record behind the last one, which nobody reads before it is confirmed.
    pub(super) held: Option<RecordHeader>,
    /// The next record begins a new segment.
    ended: bool,
    /// The directories above have been synced in this life, or will be with the next flush.
    has_names: bool,
    /// Why nothing more can be appended.
    pub(super) failed: Option<String>,
}

impl Inner {
    /// The one that is appended to.
    fn tail_segment(&mut self) -> &mut Segment {
        self.segments.back_mut().expect("an append makes one")
    }

    fn find(&self, min_txid: u64) -> Option<(&Segment, u64)> {
        let newest_first = self.segments.iter().rev();
        newest_first
            .filter_map(|s| Some((s, s.offset_of(min_txid)?)))
            .next()
    }

    /// The newest TXID, 0 if there is none. The active segment may still be empty.
    fn last_txid(&self) -> u64 {
        self.segments
            .iter()
            .rev()
            .find_map(Segment::last_txid)
            .unwrap_or(0)
    }
}

/// Where a record is: no other one was or will be there, in any log, once this one is flushed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogPlace {
    segment: u64,
    offset: u64,
}

struct FlushState {
    flushed_seq: u64,
    running: bool,
    waiters: Vec<(u64, Done)>,
}

/// What a log holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogStats {
    /// Number of records.
    pub records: u64,
    /// Bytes of its segments in use.
    pub bytes: u64,
}

impl Log {
    /// Opens the log in `dir`, which need not exist. The torn end of a crash is cut off; records
    /// above `verified` are checked byte by byte. A bad record before good, flushed ones is an
    /// error.
    pub fn open(
        options: &Options,
        dir: &Path,
        segment_age: Duration,
        verified: u64,
    ) -> Result<Log, StoreError> {
        let opened = log_recovery::open(&*options.disk, dir, verified)?;
        let mut log = Log::of(options, dir, segment_age, opened.segments, None);
        log.cut = opened.cut;
        log.sync_opened()?;
        Ok(log)
    }

    /// A log that takes nothing, for a database whose log cannot be opened.
    pub fn unusable(options: &Options, dir: &Path) -> Log {
        Log::of(
            options,
            dir,
            options.segment_age(),
            VecDeque::new(),
            Some("it could not be opened".to_owned()),
        )
    }

    fn of(
        options: &Options,
        dir: &Path,
        segment_age: Duration,
        segments: VecDeque<Segment>,
        failed: Option<String>,
    ) -> Log {
        let flushed_txid = segments.back().and_then(Segment::last_txid).unwrap_or(0);
        Log {
            disk: options.disk.clone(),
            random: options.random.clone(),
            dir: dir.to_owned(),
            segment_age,
            cut: false,
            inner: Mutex::new(Inner {
                segments,
                began: clock::now(),
                seq: 0,
                flushed_txid,
                history: 0,
                unsynced: Vec::new(),
                held: None,
                ended: false,
                has_names: false,
                failed,
            }),
            flush: Mutex::new(FlushState {
                flushed_seq: 0,
                running: false,
                waiters: Vec::new(),
            }),
            on_flushed: OnceLock::new(),
        }
    }

    /// Whether a record at its end was lost when it was opened, torn or rotten.
    pub fn was_cut(&self) -> bool {
        self.cut
    }

    /// Removes every record.
    pub fn clear(&self) -> Result<(), StoreError> {
        let mut inner = self.inner.lock();
        while let Some(s) = inner.segments.pop_front() {
            self.disk
                .remove_file(&s.path)
                .map_err(StoreError::io("remove log segment", &s.path))?;
        }
        inner.held = None;
        inner.flushed_txid = 0;
        inner.history += 1;
        Ok(())
    }

    /// Makes the held record a part of the log, if it is this one and is on disk.
    pub fn confirm(&self, txid: u64) -> bool {
        let mut inner = self.inner.lock();
        let held = inner.held.take_if(|h| h.max_txid == txid);
        let (Some(header), None) = (held, &inner.failed) else {
            return false;
        };
        inner.tail_segment().push(&header);
        inner.flushed_txid = txid;
        true
    }

    /// Gives the held record up: it is gone from the disk when this returns.
    ///
    /// # Errors
    /// Of the system. The log takes no more transactions then: a start may find it.
    pub fn withdraw(&self) -> Result<(), StoreError> {
        self.withdraw_held(&mut self.inner.lock())
    }

    fn withdraw_held(&self, inner: &mut Inner) -> Result<(), StoreError> {
        if inner.held.take().is_none() {
            return Ok(());
        }
        // What stood at a place that was flushed never stands there as another record.
        inner.ended = true;
        let segment = inner.tail_segment();
        let path = segment.path.clone();
        let gone = if segment.is_empty() {
            inner.segments.pop_back();
            let removed = self.disk.remove_file(&path);
            removed.and_then(|()| self.disk.sync_dir(&self.dir))
        } else {
            segment.end().and_then(|()| segment.file.sync_all())
        };
        gone.map_err(|e| {
            inner.failed = Some(format!("a transaction could not be withdrawn: {e}"));
            StoreError::io("withdraw a transaction from log segment", &path)(e)
        })
    }

    /// Names who is told of every flush. Once only.
    pub fn set_on_flushed(&self, hook: impl Fn(u64) + Send + Sync + 'static) {
        let first = self.on_flushed.set(Box::new(hook)).is_ok();
        assert!(first, "a log has one listener");
    }

    /// What was read may have been in the page cache alone, names included.
    fn sync_opened(&self) -> Result<(), StoreError> {
        let inner = self.inner.lock();
        let Some(last) = inner.segments.back() else {
            return Ok(());
        };
        let flushed = last.says_flushed()?;
        for s in inner.segments.iter().rev() {
            if s.last_txid().is_some_and(|t| t <= flushed) {
                break;
            }
            s.write_again(flushed)
                .and_then(|()| s.file.sync_all())
                .map_err(StoreError::io("sync log segment", &s.path))?;
        }
        for dir in self.dir.ancestors().take(3) {
            sync_dir(&*self.disk, dir)?;
        }
        Ok(())
    }

    /// The last TXID, 0 while empty.
    pub fn last_txid(&self) -> u64 {
        self.inner.lock().last_txid()
    }

    /// The first TXID that is still there as a record; 0 while empty.
    pub fn first_txid(&self) -> u64 {
        self.inner
            .lock()
            .segments
            .front()
            .filter(|s| !s.is_empty())
            .map_or(0, |s| s.first_min)
    }

    /// The last TXID that is known to be on disk.
    pub fn flushed_txid(&self) -> u64 {
        self.inner.lock().flushed_txid
    }

    /// Records and bytes.
    pub fn stats(&self) -> LogStats {
        let inner = self.inner.lock();
        LogStats {
            records: inner.segments.iter().map(|s| s.len() as u64).sum(),
            bytes: inner.segments.iter().map(|s| s.tail).sum(),
        }
    }

    /// Bytes of records with a TXID above this: what a recovery from there would read.
    pub fn bytes_after(&self, txid: u64) -> u64 {
        let inner = self.inner.lock();
        inner
            .segments
            .iter()
            .filter(|s| s.last_txid().is_some_and(|t| t > txid))
            .map(|s| {
                s.tail
                    - s.offset_of(txid + 1)
                        .unwrap_or(segment::SEGMENT_HEADER_SIZE)
            })
            .sum()
    }

    /// Begins a record; nothing is changed until it is committed.
    ///
    /// `min_txid` must follow the last record, or be 1: a snapshot, which replaces the log.
    pub fn begin(&self, min_txid: u64, max_txid: u64) -> Result<Appender<'_>, StoreError> {
        let mut inner = self.inner.lock();
        let replaces = self.check_next(&mut inner, min_txid)?;
        let rotate = match inner.segments.back() {
            None => true,
            Some(_) if replaces || min_txid != max_txid || inner.ended => true,
            Some(s) => {
                s.tail > SEGMENT_SIZE || clock::now().duration_since(inner.began) > self.segment_age
            }
        };
        if rotate {
            let path = self.next_segment(&mut inner, max_txid, replaces)?;
            let salt = self.random.next();
            let new = Segment::create(&*self.disk, path, salt, min_txid, max_txid)?;
            inner.follow_with(new);
        }
        Ok(Appender::new(
            &*self.disk,
            inner,
            min_txid,
            max_txid,
            replaces,
        ))
    }

    /// Takes a record that was written already, with the segment that it is in, as an appender's commit
    /// does with what was written to it.
    pub fn take(&self, loose: &mut Loose, min_txid: u64, max_txid: u64) -> Result<(), StoreError> {
        let mut inner = self.inner.lock();
        let replaces = self.check_next(&mut inner, min_txid)?;
        let path = self.next_segment(&mut inner, max_txid, replaces)?;
        let flushed = if replaces {
            max_txid
        } else {
            inner.flushed_txid
        };
        let mut segment = loose
            .seal(self.random.next(), (min_txid, max_txid), flushed)
            .map_err(StoreError::io("write log segment", loose.path()))?;
        loose
            .keep_as(&path)
            .map_err(StoreError::io("rename log segment", &path))?;
        segment.path = path;
        if replaces {
            return inner.replace(&*self.disk, segment);
        }
        inner.follow_with(segment);
        inner.seq += 1;
        Ok(())
    }

    /// An error if the log takes no more transactions.
    pub fn check_open(&self) -> Result<(), StoreError> {
        self.check_not_failed(&self.inner.lock())
    }

    fn check_not_failed(&self, inner: &Inner) -> Result<(), StoreError> {
        match &inner.failed {
            None => Ok(()),
            Some(reason) => Err(StoreError::corrupt(
                &self.dir,
                format!("the log takes no more transactions: {reason}"),
            )),
        }
    }

    /// Whether the record that begins with this TXID takes the place of the log.
    fn check_next(&self, inner: &mut Inner, min_txid: u64) -> Result<bool, StoreError> {
        self.check_not_failed(inner)?;
        self.withdraw_held(inner)?;
        let last = inner.last_txid();
        assert!(
            min_txid == 1 || min_txid == last + 1 || last == 0,
            "log gap: {last} then {min_txid}"
        );
        Ok(min_txid == 1 && last > 0)
    }

    /// Makes ready for a segment that begins with this TXID, and says where it is to be.
    fn next_segment(
        &self,
        inner: &mut Inner,
        max_txid: u64,
        replaces: bool,
    ) -> Result<PathBuf, StoreError> {
        self.disk
            .create_dir_all(&self.dir)
            .map_err(StoreError::io("create log directory", &self.dir))?;
        if !inner.has_names {
            for parent in self.dir.ancestors().skip(1).take(2) {
                inner.unsynced.push(self.open_dir(parent)?);
            }
            inner.has_names = true;
        }
        inner.unsynced.push(self.open_dir(&self.dir)?);
        if let Some(old) = inner.segments.back_mut() {
            old.end()
                .map_err(StoreError::io("end log segment", &old.path))?;
            inner.unsynced.push(old.file.clone());
        }
        Ok(match replaces {
            true => self.dir.join(REPLACEMENT),
            false => self.dir.join(segment::file_name(max_txid)),
        })
    }

    fn open_dir(&self, dir: &Path) -> Result<File, StoreError> {
        self.disk
            .open(dir, Open::Read)
            .map_err(StoreError::io("open directory", dir))
    }

    /// The segments as they are now; what is appended later is not in them.
    pub fn segments(&self) -> Vec<Segment> {
        self.inner.lock().segments.iter().cloned().collect()
    }

    /// Whether this segment is still a part of the log.
    pub fn still_has(&self, segment: &Segment) -> bool {
        let inner = self.inner.lock();
        inner.segments.iter().any(|s| s.salt == segment.salt)
    }

    /// Whether this segment is the one that is appended to.
    pub fn ends_with(&self, segment: &Segment) -> bool {
        let inner = self.inner.lock();
        inner
            .segments
            .back()
            .is_some_and(|s| s.salt == segment.salt)
    }

    /// Has the next record begin a new segment.
    pub fn end_segment(&self) {
        self.inner.lock().ended = true;
    }

    /// The first TXID of the newest record that begins before this one.
    pub fn start_before(&self, txid: u64) -> Option<u64> {
        let inner = self.inner.lock();
        let newest_first = inner.segments.iter().rev().filter(|s| !s.is_empty());
        newest_first
            .filter(|s| s.first_min < txid)
            .map(|s| {
                let last = s.last_txid().unwrap_or(s.first_max).min(txid - 1);
                if last > s.first_max {
                    last
                } else {
                    s.first_min
                }
            })
            .next()
    }

    /// Calls `done` once everything appended so far is on disk: on this thread, before returning,
    /// if no flush is under way, else later from the thread that flushes.
    pub fn flush(&self, done: impl FnOnce(io::Result<()>) + Send + 'static) {
        let target = self.inner.lock().seq;
        let mut state = self.flush.lock();
        if state.flushed_seq >= target {
            drop(state);
            return done(Ok(()));
        }
        state.waiters.push((target, Box::new(done)));
        if state.running {
            return;
        }
        state.running = true;
        drop(state);
        self.lead_flushes();
    }

    /// The same, waiting.
    pub fn flush_wait(&self) -> Result<(), StoreError> {
        let (tx, rx) = std::sync::mpsc::channel();
        self.flush(move |r| {
            // The receiver waits until this is called.
            tx.send(r).ok();
        });
        #[cfg(test)]
        while crate::sim::process::in_coroutine() {
            match rx.try_recv() {
                Ok(r) => return r.map_err(StoreError::io("flush log", &self.dir)),
                Err(std::sync::mpsc::TryRecvError::Disconnected) => break,
                Err(_) => crate::clock::pause(Duration::from_millis(1)),
            }
        }
        rx.recv()
            .unwrap_or_else(|_| Err(io::Error::other("flush abandoned")))
            .map_err(StoreError::io("flush log", &self.dir))
    }

    fn lead_flushes(&self) {
        loop {
            let (seq, result) = self.flush_once();
            let mut state = self.flush.lock();
            if result.is_ok() {
                state.flushed_seq = seq;
            }
            let (ready, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut state.waiters)
                .into_iter()
                .partition(|(s, _)| *s <= seq || result.is_err());
            state.waiters = rest;
            let again = !state.waiters.is_empty();
            state.running = again;
            drop(state);
            for (_, done) in ready {
                done(match &result {
                    Ok(()) => Ok(()),
                    Err(e) => Err(io::Error::new(e.kind(), e.to_string())),
                });
            }
            if !again {
                return;
            }
        }
    }

    fn flush_once(&self) -> (u64, io::Result<()>) {
        let (seq, txid, history, active, others) = {
            let mut inner = self.inner.lock();
            if let Some(reason) = &inner.failed {
                // The kernel tells of lost pages once: a later success would mean nothing.
                return (inner.seq, Err(io::Error::other(reason.clone())));
            }
            let others = std::mem::take(&mut inner.unsynced);
            let active = inner.segments.back().map(|s| s.file.clone());
            let txid = inner.last_txid();
            (inner.seq, txid, inner.history, active, others)
        };
        let result = others
            .iter()
            .try_for_each(|f| f.sync_all())
            .and_then(|()| active.as_ref().map_or(Ok(()), |f| f.sync_data()));
        let mut inner = self.inner.lock();
        match &result {
            Ok(()) if inner.history == history => {
                // One that was held may have been confirmed since.
                let txid = txid.max(inner.flushed_txid);
                inner.flushed_txid = txid;
                // Under the lock, so that what it is told never goes back.
                if let Some(hook) = self.on_flushed.get() {
                    hook(txid);
                }
            }
            Ok(()) => {}
            Err(e) => {
                tracing::error!(log = %self.dir.display(), error = %e, "flush of the transaction log failed: the database takes no more writes until the node is started anew");
                inner.failed = Some(format!("a flush failed: {e}"));
            }
        }
        (seq, result)
    }

    /// The record that begins with this TXID; `None` if it is not there (any more).
    pub fn read(&self, min_txid: u64) -> Result<Option<LogRecord>, StoreError> {
        let inner = self.inner.lock();
        let Some((seg, offset)) = inner.find(min_txid) else {
            return Ok(None);
        };
        let header = segment::read_header(&*seg.file, seg.salt, offset)
            .map_err(StoreError::io("read log segment", &seg.path))?;
        Ok(Some(LogRecord {
            header,
            body: seg.body_reader(offset, header.length),
            path: seg.path.clone(),
        }))
    }

    /// Where the record is that begins with this TXID.
    pub fn place(&self, min_txid: u64) -> Option<LogPlace> {
        let inner = self.inner.lock();
        let (segment, offset) = inner.find(min_txid)?;
        Some(LogPlace {
            segment: segment.salt,
            offset,
        })
    }

    /// Removes segments of which every record is at most `keep_after` (needed no more by recovery
    /// or backups) and was last written to before `older_than` ago. Returns the number of records.
    pub fn prune(&self, keep_after: u64, older_than: Duration) -> Result<u64, StoreError> {
        let mut removed = 0;
        loop {
            let (path, len) = {
                let inner = self.inner.lock();
                let Some(s) = inner.segments.front() else {
                    break;
                };
                let age = s
                    .file
                    .metadata()
                    .and_then(|m| m.modified())
                    .map_err(StoreError::io("stat log segment", &s.path))?;
                let old = age.elapsed().is_ok_and(|a| a > older_than);
                // One that follows may hold nothing but a record that may still be withdrawn.
                let is_newest = inner.segments.get(1).is_none_or(Segment::is_empty);
                if is_newest || !old || s.last_txid().is_some_and(|t| t > keep_after) {
                    break;
                }
                (s.path.clone(), s.len() as u64)
            };
            // One that came back after a crash, without those that followed, would be a gap: that
            // the one before it is gone is on disk first, and one that stays is tried again.
            sync_dir(&*self.disk, &self.dir)?;
            let mut inner = self.inner.lock();
            if inner.segments.front().is_none_or(|s| s.path != path) {
                // Others have removed it, or a snapshot took the place of all.
                continue;
            }
            self.disk
                .remove_file_if_there(&path)
                .map_err(StoreError::io("remove log segment", &path))?;
            inner.segments.pop_front();
            removed += len;
        }
        Ok(removed)
    }

    /// Lets the next record begin a segment, as if the present one were old.
    #[cfg(test)]
    pub(super) fn age_segment(&self) {
        let mut inner = self.inner.lock();
        let old = self.segment_age + Duration::from_secs(1);
        inner.began = inner.began.checked_sub(old).unwrap_or(inner.began);
    }

    /// Gives unused space back at a clean stop.
    pub fn close(&self) -> Result<(), StoreError> {
        self.flush_wait()?;
        let mut inner = self.inner.lock();
        if let Some(s) = inner.segments.back_mut() {
            s.file
                .set_len(s.tail)
                .map_err(StoreError::io("trim log segment", &s.path))?;
            s.allocated = s.tail;
        }
        Ok(())
    }
}

/// A record, found.
#[derive(Debug)]
pub struct LogRecord {
    /// Its header.
    pub header: RecordHeader,
    /// Its LTX file.
    pub body: BodyReader,
    /// The segment, for messages.
    pub path: PathBuf,
}

impl LogRecord {
    /// The checksum that its LTX file ends at; the body is still read from its beginning.
    pub fn post_apply_checksum(&self) -> Result<u64, StoreError> {
        let mut tail = self.body.clone();
        tail.skip(self.header.length.saturating_sub(ltx::TRAILER_SIZE as u64));
        let mut checksum = [0u8; 8];
        tail.peek(&mut checksum)
            .map_err(StoreError::io("read log segment", &self.path))?;
        Ok(u64::from_be_bytes(checksum))
    }

    /// The header of its LTX file; the body is still read from its beginning.
    pub fn ltx_header(&self) -> Result<ltx::Header, StoreError> {
        let mut head = [0u8; ltx::HEADER_SIZE];
        self.body
            .peek(&mut head)
            .map_err(StoreError::io("read log segment", &self.path))?;
        ltx::Header::decode(&head).map_err(StoreError::ltx(self.path.display().to_string()))
    }
}

impl Inner {
    /// A snapshot stands for everything: once it is on disk, the log before it goes. After an error
    /// it is not known which of them a start would find.
    pub(super) fn replace(&mut self, disk: &dyn Disk, new: Segment) -> Result<(), StoreError> {
        self.take_place(disk, new).inspect_err(|e| {
            self.failed = Some(format!("a snapshot could not take its place: {e}"));
        })
    }

    /// The last segment, which has ended, is followed by this one.
    fn follow_with(&mut self, new: Segment) {
        self.segments.push_back(new);
        self.began = clock::now();
        self.ended = false;
    }

    fn take_place(&mut self, disk: &dyn Disk, mut new: Segment) -> Result<(), StoreError> {
        let max_txid = new.first_max;
        new.file
            .sync_all()
            .map_err(StoreError::io("sync log segment", &new.path))?;
        let dir = new.path.parent().map(Path::to_owned).unwrap_or_default();
        sync_dir(disk, &dir)?;
        while let Some(s) = self.segments.pop_front() {
            disk.remove_file(&s.path)
                .map_err(StoreError::io("remove log segment", &s.path))?;
        }
        // Else a crash could bring them back beside it.
        sync_dir(disk, &dir)?;
        let path = dir.join(segment::file_name(max_txid));
        disk.rename(&new.path, &path)
            .map_err(StoreError::io("rename log segment", &new.path))?;
        sync_dir(disk, &dir)?;
        new.path = path;
        self.segments.push_back(new);
        // What was flushed before is of another history.
        self.flushed_txid = max_txid;
        self.history += 1;
        self.ended = false;
        Ok(())
    }
}
