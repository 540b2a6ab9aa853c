//! The scrub: reads everything that a node keeps, slowly, and compares it with what the store knows.
//!
//! Of each database in turn: the pages of its file with their checksums, the frames of its WAL with
//! the chain, the file of checksums with those in memory, and the records of its log with their
//! CRCs. It is read without a lock; what does not match is read again with the state locked, when
//! it must match, so that a change meanwhile is never taken for damage. What is done about damage
//! is `fault`'s and `mend`'s.
//!
//! Bounds: [`Pace`] holds it to so many bytes a second; locks are held for one page at a time (for
//! a piece of the checksums); memory is [`PIECE`].

use std::io::BufWriter;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crate::ltx;
use crate::sqlite::wal::FRAME_HEADER_SIZE;
use crate::thread;

use super::Store;
use super::database::{Database, now_ms, read_or_zeros};
use super::error::StoreError;
use super::fault::{Action, Place};
use super::log::WRITE_BUFFER;
use super::loose::Loose;
use super::segment::Segment;

/// Bytes that are read at once.
const PIECE: usize = 256 << 10;
/// The first pass begins so long after the start, or after the interval if that is shorter: a node
/// that starts has other things to do.
const FIRST_DELAY: Duration = Duration::from_secs(60);
/// How often it is tried to get rid of a damaged segment in one pass, and the pause in between.
const LOG_TRIES: u32 = 20;
const LOG_PAUSE: Duration = Duration::from_millis(100);

/// How often and how fast.
#[derive(Clone, Copy, Debug)]
pub struct ScrubOptions {
    /// From the end of a pass to the beginning of the next.
    pub interval: Duration,
    /// Bytes a second; more than 0.
    pub rate: u64,
}

/// A scrub that runs; it ends, within a piece, when this is dropped.
#[derive(Debug)]
pub struct Scrub(#[expect(dead_code, reason = "its end is the sign")] Sender<()>);

impl Store {
    /// Begins to scrub, on a thread of its own.
    ///
    /// # Errors
    /// If there can be no thread.
    pub fn scrub(self: &Arc<Self>, options: ScrubOptions) -> std::io::Result<Scrub> {
        assert!(options.rate > 0, "a scrub that reads nothing never ends");
        let (handle, stop) = channel();
        let store = Arc::downgrade(self);
        thread::start("scrub", move || {
            let mut pace = Pace::new(options.rate, stop);
            let mut wait = options.interval.min(FIRST_DELAY);
            while pace.pause(wait) && pass(&store, &mut pace).is_some() {
                wait = options.interval;
            }
        })?;
        Ok(Scrub(handle))
    }
}

/// One look at everything. `None`: it is to end.
fn pass(store: &Weak<Store>, pace: &mut Pace) -> Option<()> {
    let names = store.upgrade()?.names();
    for name in names {
        let Some(db) = store.upgrade()?.database(&name) else {
            continue;
        };
        if db.broken().is_some() {
            continue;
        }
        match db.scrub(pace) {
            Ok(Some(())) => {}
            Ok(None) => return None,
            Err(e) => {
                tracing::warn!(db = name, error = %e, "the scrub could not look at all of it");
            }
        }
    }
    let store = store.upgrade()?;
    let stats = store.fault_stats();
    stats.last_pass.store(now_ms(), Ordering::Relaxed);
    stats.passes.fetch_add(1, Ordering::Relaxed);
    Some(())
}

/// Holds a reader to a rate.
struct Pace {
    rate: u64,
    stop: Receiver<()>,
    /// When what was read so far has taken its time.
    due: Instant,
}

impl Pace {
    fn new(rate: u64, stop: Receiver<()>) -> Pace {
        Pace {
            rate,
            stop,
            due: Instant::now(),
        }
    }

    /// Waits as long as these bytes take. `None`: it is to end.
    fn take(&mut self, bytes: u64) -> Option<()> {
        let now = Instant::now();
        // What was not read in time is not made up for.
        let took = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        self.due = self.due.max(now) + took;
        self.pause(self.due - now).then_some(())
    }

    /// Waits; false: it is to end.
    fn pause(&self, time: Duration) -> bool {
        matches!(self.stop.recv_timeout(time), Err(RecvTimeoutError::Timeout))
    }
}

/// What a look at something came to: an error, or whether to go on.
type Looked = Result<Option<()>, StoreError>;

/// Goes on to the next, or ends.
macro_rules! or_end {
    ($looked:expr) => {
        if $looked.is_none() {
            return Ok(None);
        }
    };
}

impl Database {
    fn scrub(self: &Arc<Self>, pace: &mut Pace) -> Looked {
        or_end!(self.scrub_pages(pace)?);
        or_end!(self.scrub_wal(pace)?);
        if self.broken().is_some() {
            return Ok(Some(()));
        }
        or_end!(self.scrub_checksums(pace)?);
        self.scrub_log(pace)
    }

    /// The database file.
    fn scrub_pages(self: &Arc<Self>, pace: &mut Pace) -> Looked {
        let mut next = 1u32;
        let mut bytes = vec![0u8; PIECE];
        loop {
            let (file, page_size, count) = {
                let st = self.lock();
                let Some(file) = st.files.database.clone() else {
                    return Ok(Some(()));
                };
                (file, st.page_size, st.page_count)
            };
            if page_size == 0 || next > count {
                return Ok(Some(()));
            }
            let pages = (PIECE as u32 / page_size).min(count - next + 1);
            let piece = &mut bytes[..(pages * page_size) as usize];
            let at = u64::from(next - 1) * u64::from(page_size);
            file.file.forget_cached(at, piece.len());
            or_end!(pace.take(piece.len() as u64));
            let readable = read_or_zeros(&*file.file, at, piece).is_ok();
            let sums: Vec<u64> = (next..)
                .zip(piece.chunks_exact(page_size as usize))
                .map(|(pgno, page)| ltx::page_checksum(pgno, page))
                .collect();
            let (looked_at, odd) = {
                let st = self.lock();
                let pages = (next..).zip(&sums).filter(|(p, _)| st.is_in_file(*p));
                let differs = |(pgno, sum): &(u32, &u64)| !readable || st.sums.get(*pgno) != **sum;
                let odd: Vec<u32> = pages.clone().filter(differs).map(|(p, _)| p).collect();
                (pages.count(), odd)
            };
            // Rotten, or changed meanwhile: it is looked at again there.
            self.mend_pages(&odd);
            self.note_scrubbed(piece.len() as u64, looked_at as u64, 0);
            match next.checked_add(pages) {
                Some(n) => next = n,
                None => return Ok(Some(())),
            }
        }
    }

    /// The committed frames of the WAL, of one generation.
    fn scrub_wal(self: &Arc<Self>, pace: &mut Pace) -> Looked {
        let mut next = 0usize;
        let mut generation = None;
        loop {
            let (wal, header, count) = {
                let st = self.lock();
                let (Some(wal), Some(header), None) =
                    (st.files.wal.clone(), st.wal.header, &st.lane)
                else {
                    return Ok(Some(()));
                };
                (wal, header, st.wal.committed)
            };
            let salts = (header.salt1, header.salt2);
            if *generation.get_or_insert(salts) != salts || next >= count {
                return Ok(Some(()));
            }
            let frame_size = FRAME_HEADER_SIZE + header.page_size as usize;
            let frames = (PIECE / frame_size).clamp(1, count - next);
            let mut bytes = vec![0u8; frames * frame_size];
            let at = crate::sqlite::wal::frame_offset(next as u32 + 1, header.page_size);
            or_end!(pace.take(bytes.len() as u64));
            // A WAL that was cut short meanwhile is another one.
            let readable = read_or_zeros(&*wal.file, at, &mut bytes).is_ok();
            let odd: Vec<usize> = {
                let st = self.lock();
                let same = st.wal.header.is_some_and(|h| (h.salt1, h.salt2) == salts);
                let there = if same { st.wal.committed } else { 0 };
                (next..there)
                    .zip(bytes.chunks_exact(frame_size))
                    .filter(|(i, frame)| !readable || !st.wal.frame_matches(*i, frame))
                    .map(|(i, _)| i)
                    .collect()
            };
            for index in odd {
                self.mend_frame(index, salts)?;
            }
            self.note_scrubbed(bytes.len() as u64, frames as u64, 0);
            next += frames;
        }
    }

    /// The file of checksums.
    fn scrub_checksums(self: &Arc<Self>, pace: &mut Pace) -> Looked {
        let mut next = 0u32;
        loop {
            let (read, odd, end) = self.compare_checksums(next)?;
            if let Some(what) = odd {
                self.save_checksums_anew()?;
                self.report_fault(Place::Checksums, &what, Action::Repaired);
            }
            self.note_scrubbed(read, 0, 0);
            or_end!(pace.take(read));
            match end {
                Some(n) => next = n,
                None => return Ok(Some(())),
            }
        }
    }

    /// The records of the log, and the headers of its segments.
    fn scrub_log(self: &Arc<Self>, pace: &mut Pace) -> Looked {
        for segment in self.log().segments() {
            let flushed = self.log().flushed_txid();
            let mut damage = segment.header_damage();
            for (txid, offset) in (segment.first_max..).zip(segment.record_offsets()) {
                if damage.is_some() || txid > flushed {
                    break;
                }
                let (read, found) = segment.record_damage(offset, txid);
                self.note_scrubbed(read, 0, 1);
                damage = found;
                or_end!(pace.take(read));
            }
            // It may have been replaced or removed meanwhile.
            if let Some(what) = damage
                && self.log().still_has(&segment)
            {
                or_end!(self.begin_log_anew(&segment, &what, pace)?);
            }
        }
        Ok(Some(()))
    }

    /// Gets rid of a damaged segment. The database file is whole: the pages were looked at before.
    fn begin_log_anew(self: &Arc<Self>, bad: &Segment, what: &str, pace: &Pace) -> Looked {
        let what = format!("{}: {what}", bad.path.display());
        tracing::warn!(db = self.name, what, "damage in the transaction log");
        self.log().end_segment();
        for _ in 0..LOG_TRIES {
            self.log().flush_wait()?;
            if self.drop_segments(bad)? || self.replace_log()? {
                self.report_fault(Place::Log, &what, Action::LogBegunAnew);
                return Ok(Some(()));
            }
            if !pace.pause(LOG_PAUSE) {
                return Ok(None);
            }
        }
        tracing::warn!(
            db = self.name,
            what,
            "the damage in the transaction log stays until the next pass: the database is written all the time"
        );
        Ok(Some(()))
    }

    /// Removes the log up to and with this segment, if there is more of it and the database file
    /// has what it holds.
    fn drop_segments(self: &Arc<Self>, bad: &Segment) -> Result<bool, StoreError> {
        if self.log().ends_with(bad) {
            return Ok(false);
        }
        self.checkpoint()?;
        let saved = self.lock().saved.pos.txid;
        let Some(last) = bad.last_txid().filter(|last| *last <= saved) else {
            return Ok(false);
        };
        self.log().prune(last, Duration::ZERO)?;
        Ok(!self.log().still_has(bad))
    }

    /// Puts a snapshot of the database in the place of the log, if nothing is written meanwhile.
    fn replace_log(self: &Arc<Self>) -> Result<bool, StoreError> {
        let mut snapshot = self.snapshot()?;
        let pos = snapshot.pos();
        let failed = |e| StoreError::io("write a snapshot beside", &self.dir)(e);
        let mut segment = Loose::new(&self.data_scratch()).map_err(failed)?;
        let mut out = BufWriter::with_capacity(WRITE_BUFFER, &mut segment);
        snapshot.write_to(&mut out)?;
        out.into_inner().map_err(|e| failed(e.into_error()))?;
        segment.sync().map_err(failed)?;
        let st = self.lock();
        if st.pos != pos || st.committing || st.broken.is_some() {
            return Ok(false);
        }
        self.log().take(&mut segment, 1, pos.txid)?;
        Ok(true)
    }
}
