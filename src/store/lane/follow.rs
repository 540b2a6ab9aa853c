//! Following the WAL behind the writers.
//!
//! Whatever number of SQLite's transactions has come since the last look becomes one of the log's:
//! of a page that all of them wrote, the last version alone is logged.
//!
//! Order: the first record of a new generation of the WAL is logged only once that generation's
//! header is on disk. So the WAL that a loss of power leaves is never of an earlier generation than
//! the log's last record.

use std::sync::Arc;

use crate::ltx;
use crate::sqlite::wal::{FRAME_HEADER_SIZE, FrameHeader, WAL_HEADER_SIZE, WalHeader};
use crate::sqlite::wal_index::{HEADER_COPY_SIZE, IndexHeader, N_BACKFILL_OFFSET};

use super::super::database::{Database, DbFile, FileKind, State, read_or_zeros};
use super::super::error::StoreError;
use super::super::wal::Frame;

/// Bytes of frames that are read at once.
const PIECE: usize = 256 << 10;

/// Frames that follow the committed ones and make whole transactions.
#[derive(Default)]
pub(super) struct Whole {
    pub frames: Vec<Frame>,
    /// The database's size after the last of them, in pages.
    pub commit: u32,
}

impl Database {
    /// Captures what is committed by now, if the database is passed through.
    pub(in crate::store) fn catch_up(self: &Arc<Self>) -> Result<(), StoreError> {
        self.follow(&mut self.lock())
    }

    /// The same with the state locked. A failure stops the writers until it is over.
    pub(in crate::store) fn follow(self: &Arc<Self>, st: &mut State) -> Result<(), StoreError> {
        if st.lane.is_none() || st.broken.is_some() {
            return Ok(());
        }
        let followed = self.follow_index(st);
        self.note_followed(st, followed.is_err());
        followed
    }

    /// The same when nobody publishes any more: what is whole in the WAL is committed.
    pub(super) fn follow_to_the_end(self: &Arc<Self>, st: &mut State) -> Result<(), StoreError> {
        if st.lane.is_none() || st.broken.is_some() {
            return Ok(());
        }
        self.follow_index(st)?;
        self.follow_chain(st)
    }

    /// Whether there is more in the WAL than is captured, be it a transaction or the beginning of
    /// one: it is worth another look soon.
    pub(super) fn has_more(&self) -> bool {
        let st = self.lock();
        let (Some(_), Some(wal)) = (&st.lane, &st.files.wal) else {
            return false;
        };
        let Some(header) = read_header(wal) else {
            return false;
        };
        let is_known = st
            .wal
            .header
            .is_some_and(|h| (h.salt1, h.salt2) == (header.salt1, header.salt2));
        let at = match is_known {
            true => st.wal.committed_end(),
            false => WAL_HEADER_SIZE as u64,
        };
        let mut head = [0u8; FRAME_HEADER_SIZE];
        let frame = match wal.file.read_exact_at(&mut head, at) {
            Ok(()) => FrameHeader::decode(&head),
            Err(_) => return false,
        };
        frame.pgno != 0 && (frame.salt1, frame.salt2) == (header.salt1, header.salt2)
    }

    /// Whether a whole transaction stands in the WAL that is not published: its writer may still do so.
    pub(super) fn has_unpublished(self: &Arc<Self>) -> Result<bool, StoreError> {
        let st = self.lock();
        let (Some(_), Some(wal)) = (&st.lane, &st.files.wal) else {
            return Ok(false);
        };
        Ok(self.whole_transactions(&st, wal, u32::MAX)?.commit != 0)
    }

    fn follow_index(self: &Arc<Self>, st: &mut State) -> Result<(), StoreError> {
        self.note_file_size(st)?;
        let Some(wal) = st.files.wal.clone() else {
            return Ok(());
        };
        let Some(shm) = st.files.shm.clone() else {
            // The index is in the memory of the one connection that there is.
            return self.follow_chain(st);
        };
        let Some(header) = self.published(&shm)?.filter(|h| h.mx_frame > 0) else {
            return Ok(());
        };
        let salts = (header.salt1, header.salt2);
        if st.wal.header.map(|h| (h.salt1, h.salt2)) != Some(salts) {
            self.begin_generation(st, &wal, salts)?;
        }
        if (header.mx_frame as usize) > st.wal.committed {
            let count = header.mx_frame - st.wal.committed as u32;
            let whole = self.whole_transactions(st, &wal, count)?;
            if whole.frames.last().map(|f| f.chain) != Some(header.frame_checksum) {
                return Err(self.refuse(format!(
                    "the WAL index counts {} frames, and the WAL has not what it says",
                    header.mx_frame
                )));
            }
            self.take(st, &wal, whole)?;
        }
        self.note_copied(st, &shm)
    }

    /// After a read of what is committed has failed: whether that was because a checkpoint has copied
    /// pages meanwhile, and their frames are overwritten. Else the error again.
    pub(in crate::store) fn note_copied_since(
        &self,
        st: &mut State,
        e: StoreError,
    ) -> Result<(), StoreError> {
        let Some(shm) = st.files.shm.clone().filter(|_| st.lane.is_some()) else {
            return Err(e);
        };
        let salts = st.wal.header.map(|h| (h.salt1, h.salt2));
        let is_over = |h: IndexHeader| Some((h.salt1, h.salt2)) != salts;
        if self.published(&shm)?.is_some_and(is_over) {
            st.wal.newest.clear();
            return Ok(());
        }
        self.note_copied(st, &shm)
    }

    /// Whether the database file may hold other bytes than were captured, and be no damage: the
    /// checkpoints of those who are passed through write it. While there is a lane nobody can tell.
    pub(in crate::store) fn checkpoint_is_ahead(&self, st: &State) -> bool {
        st.lane.is_some()
    }

    /// What checkpoints have copied is in the database file.
    fn note_copied(&self, st: &mut State, shm: &DbFile) -> Result<(), StoreError> {
        let salts = |h: IndexHeader| (h.mx_frame > 0).then_some((h.salt1, h.salt2));
        let ours = st.wal.header.map(|h| (h.salt1, h.salt2));
        let before = self.published(shm)?.and_then(salts);
        let mut copied = [0; 4];
        read_or_zeros(&*shm.file, N_BACKFILL_OFFSET, &mut copied)
            .map_err(StoreError::io("read WAL index", self.path(FileKind::Shm)))?;
        let copied = u32::from_ne_bytes(copied);
        // When a generation begins, its header comes first and then the number.
        let is_its = before == ours && self.published(shm)?.and_then(salts) == ours;
        // One that did not copy everything has left out the pages beyond the size that it knew of.
        if is_its && copied as usize == st.wal.committed {
            st.wal.newest.clear();
        }
        Ok(())
    }

    fn follow_chain(self: &Arc<Self>, st: &mut State) -> Result<(), StoreError> {
        let Some(wal) = st.files.wal.clone() else {
            return Ok(());
        };
        let Some(header) = read_header(&wal).filter(|h| h.page_size == st.page_size) else {
            return Ok(());
        };
        let salts = (header.salt1, header.salt2);
        if st.wal.header.map(|h| (h.salt1, h.salt2)) != Some(salts) {
            self.begin_generation(st, &wal, salts)?;
        }
        let whole = self.whole_transactions(st, &wal, u32::MAX)?;
        self.take(st, &wal, whole)
    }

    /// The WAL was begun anew: all that was in it is in the database file.
    fn begin_generation(
        &self,
        st: &mut State,
        wal: &DbFile,
        salts: (u32, u32),
    ) -> Result<(), StoreError> {
        let header = read_header(wal)
            .filter(|h| (h.salt1, h.salt2) == salts && h.page_size == st.page_size)
            .ok_or_else(|| self.refuse("the WAL index is of another WAL than there is"))?;
        wal.file
            .sync_data()
            .map_err(StoreError::io("sync WAL", self.path(FileKind::Wal)))?;
        self.disk()
            .sync_dir(&self.dir)
            .map_err(StoreError::io("sync", &self.dir))?;
        st.wal.reset();
        st.wal.header = Some(header);
        Ok(())
    }

    /// Logs what these frames make.
    fn take(
        self: &Arc<Self>,
        st: &mut State,
        wal: &DbFile,
        whole: Whole,
    ) -> Result<(), StoreError> {
        if whole.commit == 0 {
            return Ok(());
        }
        let committed = st.wal.committed;
        st.wal.frames.truncate(committed);
        st.wal.frames.extend(whole.frames);
        st.wal.written_to = st.wal.offset(st.wal.frames.len());
        let captured = self.capture_wal(st, wal, whole.commit);
        if captured.is_err() {
            st.wal.frames.truncate(committed);
        }
        captured.map(drop)
    }

    /// The whole transactions in up to `count` frames after the committed ones.
    pub(super) fn whole_transactions(
        &self,
        st: &State,
        wal: &DbFile,
        count: u32,
    ) -> Result<Whole, StoreError> {
        let Some(header) = st.wal.header else {
            return Ok(Whole::default());
        };
        let frame_size = FRAME_HEADER_SIZE + header.page_size as usize;
        let mut at = st.wal.committed_end();
        let mut chain = st.wal.chain_before(st.wal.committed);
        let (mut whole, mut frames) = (Whole::default(), Vec::new());
        let mut left = count as usize;
        let mut bytes = Vec::new();
        while left > 0 {
            bytes.resize((PIECE / frame_size).clamp(1, left) * frame_size, 0);
            let read = read_some(wal, at, &mut bytes)
                .map_err(StoreError::io("read WAL", self.path(FileKind::Wal)))?;
            let pieces = bytes[..read].chunks_exact(frame_size);
            if pieces.len() == 0 {
                return Ok(whole);
            }
            for piece in pieces {
                let (head, page) = piece.split_at(FRAME_HEADER_SIZE);
                let frame = FrameHeader::decode(head.try_into().expect("of this length"));
                let is_next = frame.pgno != 0
                    && (frame.salt1, frame.salt2) == (header.salt1, header.salt2)
                    && frame.expected_checksum(header.big_endian, chain, page) == frame.checksum;
                if !is_next {
                    return Ok(whole);
                }
                chain = frame.checksum;
                frames.push(Frame {
                    pgno: frame.pgno,
                    sum: ltx::page_checksum(frame.pgno, page),
                    chain,
                });
                if frame.commit != 0 {
                    whole.commit = frame.commit;
                    whole.frames.append(&mut frames);
                }
                left -= 1;
                at += frame_size as u64;
            }
        }
        Ok(whole)
    }

    /// Reads the index's header as a connection does: the first copy, and then the second.
    fn published(&self, shm: &DbFile) -> Result<Option<IndexHeader>, StoreError> {
        let (mut first, mut second) = ([0; HEADER_COPY_SIZE], [0; HEADER_COPY_SIZE]);
        read_or_zeros(&*shm.file, 0, &mut first)
            .and_then(|()| read_or_zeros(&*shm.file, HEADER_COPY_SIZE as u64, &mut second))
            .map_err(StoreError::io("read WAL index", self.path(FileKind::Shm)))?;
        Ok(IndexHeader::of_copies(&first, &second))
    }

    /// Checkpoints that this node does not see write the database file.
    fn note_file_size(&self, st: &mut State) -> Result<(), StoreError> {
        let file = st.database_file(&self.name)?;
        let size = file
            .file
            .size()
            .map_err(StoreError::io("stat", self.path(FileKind::Database)))?;
        (st.view_size, st.base_size) = (size, size);
        Ok(())
    }
}

/// The WAL's header, if it has one.
pub(super) fn read_header(wal: &DbFile) -> Option<WalHeader> {
    let mut bytes = [0u8; WAL_HEADER_SIZE];
    wal.file.read_exact_at(&mut bytes, 0).ok()?;
    WalHeader::decode(&bytes).ok()
}

fn read_some(wal: &DbFile, at: u64, bytes: &mut [u8]) -> std::io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match wal.file.read_at(&mut bytes[done..], at + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}
