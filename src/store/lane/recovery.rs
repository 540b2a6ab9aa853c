//! A start after a lane that did not end: what is whole in the WAL and not in the log becomes one
//! more transaction.
//!
//! It is logged like any other. If another node has been primary meanwhile, its history does not
//! have it, and it is set aside and reported as divergent (see the module `divergent`).
//!
//! Processes may live that have the old files open: the kernel passes their reads and writes
//! through without a node. They are fenced off before the WAL is read.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use super::super::database::{Database, FileKind, State};
use super::super::disk::{File, Open};
use super::super::error::StoreError;
use super::Lane;
use super::fence;
use super::follow::read_header;
use super::mark::Mark;

impl Database {
    /// Takes up what the WAL has and the log lacks, into the log, the file and the state, which are as
    /// of the log's end; whether there was anything.
    pub(in crate::store) fn recover_lane(
        self: &Arc<Self>,
        st: &mut State,
        file: &File,
    ) -> Result<bool, StoreError> {
        let Some(mark) = self.load_mark()? else {
            return Ok(false);
        };
        st.marked = true;
        if st.page_count == 0 {
            return Ok(false);
        }
        let open = |kind| -> Result<Option<File>, StoreError> {
            let path = self.path(kind);
            if !self.disk().exists(&path) {
                return Ok(None);
            }
            // An immutable file cannot be opened for writing.
            unfreeze(&path).map_err(StoreError::io("make writable", &path))?;
            let opened = self.disk().open(&path, Open::Write);
            opened.map(Some).map_err(StoreError::io("open", &path))
        };
        let Some(wal) = open(FileKind::Wal)? else {
            return Ok(false);
        };
        if let Some(shm) = open(FileKind::Shm)? {
            let shm = self.adopt_file(st, FileKind::Shm, shm);
            fence::close_index(&shm)
                .map_err(StoreError::io("close WAL index", self.path(FileKind::Shm)))?;
            st.files.shm = None;
        }
        self.adopt_file(st, FileKind::Wal, wal);
        self.adopt_file(st, FileKind::Database, file.clone());
        st.lane = Some(Lane::default());
        self.freeze(st);
        // Its record may be the first of this life.
        self.context.lives.add(self.context.node_id)?;
        let before = st.pos;
        let taken = self.start_behind(st, mark).and_then(|new| match new {
            true => self.put_away(st),
            false => Ok(()),
        });
        // The file's name goes with the other leftovers, if it is still there.
        self.thaw(st);
        st.files.database = None;
        st.files.wal = None;
        st.wal.reset();
        st.lane = None;
        taken?;
        if st.pos != before {
            tracing::info!(db = self.name, from = %before, to = %st.pos, "what was committed while no node followed the WAL is taken up");
        }
        Ok(st.pos != before)
    }

    /// Sets the state to the last frame of the WAL that the log has; whether there is anything new
    /// to be found after it.
    fn start_behind(&self, st: &mut State, mark: Mark) -> Result<bool, StoreError> {
        let Some(wal) = st.files.wal.clone() else {
            return Ok(false);
        };
        let Some(header) = read_header(&wal) else {
            return Ok(false);
        };
        let (salts, end) = self.logged_end(st, mark)?;
        if salts != (header.salt1, header.salt2) {
            // A later generation, of which the log has nothing.
            return Ok(true);
        }
        st.wal.header = Some(header);
        let there = self.whole_transactions(st, &wal, u32::MAX)?.frames;
        if there.len() < end as usize {
            // The log was on disk, and the WAL was not.
            return Ok(false);
        }
        st.wal.frames = there;
        st.wal.frames.truncate(end as usize);
        st.wal.committed = end as usize;
        Ok(true)
    }

    /// Of which generation of the WAL the log's last transaction is, and with which number of frames
    /// it ends there.
    fn logged_end(&self, st: &State, mark: Mark) -> Result<((u32, u32), u64), StoreError> {
        let of_mark = ((mark.salt1, mark.salt2), mark.frames);
        if st.pos.txid <= mark.txid {
            return Ok(of_mark);
        }
        let Some(record) = self.log().read(st.pos.txid)? else {
            return Ok(of_mark);
        };
        let h = record.ltx_header()?;
        let frame_size = u64::from(h.page_size) + crate::sqlite::wal::FRAME_HEADER_SIZE as u64;
        let end = (h.wal_offset as u64)
            .saturating_add(h.wal_size as u64)
            .saturating_sub(crate::sqlite::wal::WAL_HEADER_SIZE as u64);
        Ok(((h.wal_salt1, h.wal_salt2), end / frame_size))
    }
}

fn unfreeze(path: &Path) -> std::io::Result<()> {
    let file = std::fs::File::open(path)?;
    fence::set_immutable(file.as_fd(), false)
}
