//! Writing rotten bytes anew, out of what is whole.
//!
//! A page is known by its checksum: bytes that have it are the page, wherever they were found. It
//! is looked for without a lock, and put in place with the state locked, if it is still wanted.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::ltx::{self, Decoder};
use crate::sqlite::wal::{FRAME_HEADER_SIZE, FrameHeader};

use super::context::Job;
use super::database::{Database, FileKind, State, read_or_zeros};
use super::error::StoreError;
use super::fault::{Action, Place};

/// Pages that are looked for at a time: what is found of them is in memory.
const AT_ONCE: usize = 1024;

/// Pages by number and checksum.
type Wanted = BTreeMap<(u32, u64), Option<Found>>;

/// A page that was found in the log.
struct Found {
    page: Vec<u8>,
    /// How many pages the database had after the transaction that it was found in.
    commit: u32,
}

impl State {
    /// Whether the database file must hold the newest committed version of this page.
    pub(super) fn is_in_file(&self, pgno: u32) -> bool {
        self.page_size > 0
            && (1..=self.page_count).contains(&pgno)
            && pgno != ltx::lock_pgno(self.page_size)
            && !self.wal.newest.contains_key(&pgno)
    }

    /// Reads a page from the database file; whether it is the one that must be there. What the disk
    /// cannot read is not.
    pub(super) fn file_page_is_whole(
        &self,
        db: &Database,
        pgno: u32,
        page: &mut [u8],
    ) -> Result<bool, StoreError> {
        let file = self.database_file(&db.name)?;
        let at = u64::from(pgno - 1) * u64::from(self.page_size);
        match read_or_zeros(&*file.file, at, page) {
            Ok(()) => Ok(ltx::page_checksum(pgno, page) == self.sums.get(pgno)),
            Err(e) if e.raw_os_error() == Some(libc::EIO) => Ok(false),
            Err(e) => Err(StoreError::io("read database", db.path(FileKind::Database))(e)),
        }
    }
}

impl Database {
    /// Writes those of these pages of the database file anew that are rotten.
    pub(super) fn mend_pages(self: &Arc<Self>, pgnos: &[u32]) {
        for some in pgnos.chunks(AT_ONCE) {
            if let Err(e) = self.try_mend_pages(some) {
                tracing::warn!(db = self.name, error = %e, "damaged pages could not be mended; the next pass tries again");
            }
        }
    }

    fn try_mend_pages(self: &Arc<Self>, pgnos: &[u32]) -> Result<(), StoreError> {
        let mut wanted = self.rotten(&mut self.lock(), pgnos)?;
        if wanted.is_empty() {
            return Ok(());
        }
        self.find_in_log(&mut wanted)?;
        let mut st = self.lock();
        let mended = self.put_pages(&mut st, &wanted)?;
        let file = st.files.database.clone();
        drop(st);
        if let Some(file) = file.filter(|_| mended) {
            // A recovery does not write them again.
            file.file.sync_data().map_err(StoreError::io(
                "sync database",
                self.path(FileKind::Database),
            ))?;
        }
        Ok(())
    }

    /// Those of the pages that are rotten at this moment, with the checksums that they should have.
    fn rotten(self: &Arc<Self>, st: &mut State, pgnos: &[u32]) -> Result<Wanted, StoreError> {
        let mut wanted = Wanted::new();
        if st.broken.is_some() {
            return Ok(wanted);
        }
        self.follow(st)?;
        let mut page = vec![0u8; st.page_size as usize];
        for pgno in pgnos.iter().filter(|p| st.is_in_file(**p)) {
            if !st.file_page_is_whole(self, *pgno, &mut page)? && !self.checkpoint_is_ahead(st) {
                let key = (*pgno, st.sums.get(*pgno));
                wanted.insert(key, self.find_in_wal(st, key));
            }
        }
        Ok(wanted)
    }

    /// A committed frame of the WAL that has these bytes.
    fn find_in_wal(&self, st: &State, (pgno, sum): (u32, u64)) -> Option<Found> {
        let frames = &st.wal.frames[..st.wal.committed];
        let at = frames
            .iter()
            .rposition(|f| f.pgno == pgno && f.sum == sum)?;
        let mut page = vec![0u8; st.page_size as usize];
        let offset = st.wal.offset(at) + FRAME_HEADER_SIZE as u64;
        let wal = st.files.wal.as_ref()?;
        wal.file.read_exact_at(&mut page, offset).ok()?;
        (ltx::page_checksum(pgno, &page) == sum).then_some(Found { page, commit: 0 })
    }

    /// Looks for pages in the log, from the newest record to the oldest. Records that cannot be
    /// read are passed over.
    fn find_in_log(&self, wanted: &mut Wanted) -> Result<(), StoreError> {
        let mut before = u64::MAX;
        while wanted.values().any(Option::is_none) {
            let Some(start) = self.log().start_before(before) else {
                return Ok(());
            };
            before = start;
            if let Err(e) = self.find_in_record(start, wanted) {
                tracing::debug!(db = self.name, error = %e, "a record was passed over");
            }
        }
        Ok(())
    }

    fn find_in_record(&self, start: u64, wanted: &mut Wanted) -> Result<(), StoreError> {
        let Some(record) = self.log().read(start)? else {
            return Ok(());
        };
        let context = record.path.display().to_string();
        let reader = std::io::BufReader::with_capacity(256 << 10, record.body);
        let mut decoder = Decoder::new(reader).map_err(StoreError::ltx(&context))?;
        let commit = decoder.header().commit;
        let mut page = vec![0u8; decoder.header().page_size as usize];
        while let Some(pgno) = decoder.page(&mut page).map_err(StoreError::ltx(&context))? {
            if wanted.range((pgno, 0)..=(pgno, u64::MAX)).next().is_none() {
                continue;
            }
            let key = (pgno, ltx::page_checksum(pgno, &page));
            if let Some(place @ None) = wanted.get_mut(&key) {
                *place = Some(Found {
                    page: page.clone(),
                    commit,
                });
            }
        }
        Ok(())
    }

    /// Puts what was found into the database file, as far as it is still wanted; whether anything
    /// was. What was not found costs the database.
    fn put_pages(self: &Arc<Self>, st: &mut State, wanted: &Wanted) -> Result<bool, StoreError> {
        self.follow(st)?;
        let (mut mended, mut lost) = (false, Vec::new());
        let mut page = vec![0u8; st.page_size as usize];
        for ((pgno, sum), found) in wanted {
            // It may have been written meanwhile.
            if st.broken.is_some()
                || !st.is_in_file(*pgno)
                || st.sums.get(*pgno) != *sum
                || st.file_page_is_whole(self, *pgno, &mut page)?
                || self.checkpoint_is_ahead(st)
            {
                continue;
            }
            let Some(found) = found.as_ref().filter(|f| f.page.len() == page.len()) else {
                lost.push(*pgno);
                continue;
            };
            let file = st.database_file(&self.name)?;
            file.file
                .write_all_at(&found.page, u64::from(pgno - 1) * u64::from(st.page_size))
                .map_err(StoreError::io(
                    "write database",
                    self.path(FileKind::Database),
                ))?;
            self.context.keep(Job::InvalidateData(file.ino));
            mended = true;
            let what = format!("page {pgno} did not match its checksum {sum:016x}");
            self.report_fault(Place::Database, &what, Action::Repaired);
        }
        if let Some(first) = lost.first() {
            let what = format!(
                "page {first} does not match its checksum at {}, and the log does not have it ({} such pages)",
                st.pos,
                lost.len()
            );
            self.beyond_repair(st, Place::Database, &what);
        }
        Ok(mended)
    }

    /// At a start: all pages that do not match their checksums are written anew, if the log has
    /// them. Nobody is told by event: nobody listens yet.
    pub(super) fn mend_at_start(&self, st: &State) -> Result<(), StoreError> {
        let mut page = vec![0u8; st.page_size as usize];
        let mut rotten = Wanted::new();
        for pgno in (1..=st.page_count).filter(|p| st.is_in_file(*p)) {
            if rotten.len() < AT_ONCE && !st.file_page_is_whole(self, pgno, &mut page)? {
                rotten.insert((pgno, st.sums.get(pgno)), None);
            }
        }
        self.find_in_log(&mut rotten)?;
        let file = st.database_file(&self.name)?;
        for ((pgno, sum), found) in &rotten {
            let Some(found) = found.as_ref().filter(|f| f.page.len() == page.len()) else {
                continue;
            };
            file.file
                .write_all_at(&found.page, u64::from(pgno - 1) * u64::from(st.page_size))
                .map_err(StoreError::io(
                    "write database",
                    self.path(FileKind::Database),
                ))?;
            let what = format!("page {pgno} did not match its checksum {sum:016x}");
            self.report_fault(Place::Database, &what, Action::Repaired);
        }
        file.file.sync_data().map_err(StoreError::io(
            "sync database",
            self.path(FileKind::Database),
        ))
    }

    /// Writes a committed frame of the WAL anew, of the generation with these salts.
    pub(super) fn mend_frame(
        self: &Arc<Self>,
        index: usize,
        salts: (u32, u32),
    ) -> Result<(), StoreError> {
        let frame_at = |st: &State| {
            let same = st.wal.header.is_some_and(|h| (h.salt1, h.salt2) == salts);
            // Applications begin a WAL anew without a word to the node.
            let there =
                same && index < st.wal.committed && st.broken.is_none() && st.lane.is_none();
            there.then(|| st.wal.frames[index])
        };
        let Some(frame) = frame_at(&self.lock()) else {
            return Ok(());
        };
        let mut wanted = Wanted::from([((frame.pgno, frame.sum), None)]);
        self.find_in_log(&mut wanted)?;
        let found = wanted.into_values().next().flatten();
        let mut st = self.lock();
        if frame_at(&st).is_none() || self.frame_is_whole(&st, index)? {
            return Ok(());
        }
        let what = format!("frame {} (page {})", index + 1, frame.pgno);
        let Some(bytes) = self.rebuilt_frame(&st, index, found)? else {
            let what = format!("{what} is damaged, and nothing else has its page");
            self.beyond_repair(&mut st, Place::Wal, &what);
            return Ok(());
        };
        let wal = st.files.wal.clone();
        let wal = wal.ok_or_else(|| StoreError::Deleted(self.mount_name(FileKind::Wal)))?;
        wal.file
            .write_all_at(&bytes, st.wal.offset(index))
            .map_err(StoreError::io("write WAL", self.path(FileKind::Wal)))?;
        self.context.keep(Job::InvalidateData(wal.ino));
        let what = format!("{what} did not match its checksum");
        self.report_fault(Place::Wal, &what, Action::Repaired);
        Ok(())
    }

    /// Whether a committed frame is in the file as it was written.
    pub(super) fn frame_is_whole(&self, st: &State, index: usize) -> Result<bool, StoreError> {
        let (Some(header), Some(wal)) = (st.wal.header, &st.files.wal) else {
            return Ok(true);
        };
        let mut bytes = vec![0u8; FRAME_HEADER_SIZE + header.page_size as usize];
        match wal.file.read_exact_at(&mut bytes, st.wal.offset(index)) {
            Ok(()) => Ok(st.wal.frame_matches(index, &bytes)),
            Err(e) if e.raw_os_error() == Some(libc::EIO) => Ok(false),
            Err(e) => Err(StoreError::io("read WAL", self.path(FileKind::Wal))(e)),
        }
    }

    /// The bytes of a frame, out of what there is of it: its page in the WAL, the log or the database
    /// file, and what its checksum proves to have been its header.
    fn rebuilt_frame(
        &self,
        st: &State,
        index: usize,
        found: Option<Found>,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        let (Some(header), Some(wal)) = (st.wal.header, &st.files.wal) else {
            return Ok(None);
        };
        let frame = st.wal.frames[index];
        let mut bytes = vec![0u8; FRAME_HEADER_SIZE + header.page_size as usize];
        // What the disk cannot read is zeros, and does not match.
        let _ = wal.file.read_exact_at(&mut bytes, st.wal.offset(index));
        let (head, page) = bytes.split_at(FRAME_HEADER_SIZE);
        let on_disk = FrameHeader::decode(head.try_into().expect("of this length")).commit;
        let mut in_file = vec![0u8; page.len()];
        let file = st.database_file(&self.name)?;
        let at = u64::from(frame.pgno - 1) * u64::from(header.page_size);
        let _ = read_or_zeros(&*file.file, at, &mut in_file);
        let commit_of_record = found.as_ref().map_or(0, |f| f.commit);
        let sources = [
            Some(page),
            found.as_ref().map(|f| &f.page[..]),
            Some(&in_file[..]),
        ];
        let whole = sources
            .into_iter()
            .flatten()
            .find(|p| p.len() == page.len() && ltx::page_checksum(frame.pgno, p) == frame.sum);
        let Some(page) = whole else { return Ok(None) };
        let before = st.wal.chain_before(index);
        for commit in [on_disk, 0, commit_of_record, st.page_count] {
            let rebuilt = FrameHeader::for_page(&header, before, frame.pgno, commit, page);
            if rebuilt.checksum == frame.chain {
                return Ok(Some([&rebuilt.encode()[..], page].concat()));
            }
        }
        Ok(None)
    }
}
