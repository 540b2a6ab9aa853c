//! A snapshot of a database as of one position, read while writers go on.
//!
//! Invariant: for every page that the snapshot still has to read, either its bytes of the
//! snapshot's position are its newest committed ones, or they were put into `Preserved` before
//! they changed. Whoever changes a committed page calls `State::preserve` first.

use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::ltx::{self, Encoder, Header, Pos};

use super::database::Database;
use super::disk::{File, Scratch};
use super::error::StoreError;

/// Pages read for each time that the database is locked.
const PAGES_PER_LOCK: u32 = 32;

/// Old versions of pages that changed since the snapshot began, in an unlinked file.
#[derive(Debug)]
pub(super) struct Preserved {
    /// Pages below are sent already.
    next: u32,
    pages: u32,
    page_size: u32,
    scratch: Scratch,
    kept: HashMap<u32, u64>,
    file: Option<File>,
    /// A page that it needs changed before it could be kept.
    lost: bool,
}

impl Preserved {
    /// Whether the snapshot will ask for this page and has not got its version yet.
    pub fn wants(&self, pgno: u32) -> bool {
        !self.lost && pgno >= self.next && pgno <= self.pages && !self.kept.contains_key(&pgno)
    }

    /// A checkpoint was faster: it has to be begun anew.
    pub fn give_up(&mut self) {
        self.lost = true;
    }

    /// Keeps the page's bytes.
    pub fn keep(&mut self, pgno: u32, page: &[u8]) -> io::Result<()> {
        if self.file.is_none() {
            self.file = Some(self.scratch.file()?);
        }
        let slot = self.kept.len() as u64;
        if let Some(file) = &self.file {
            file.write_all_at(page, slot * u64::from(self.page_size))?;
        }
        self.kept.insert(pgno, slot);
        Ok(())
    }

    fn read(&self, pgno: u32, page: &mut [u8]) -> io::Result<bool> {
        match (self.kept.get(&pgno), &self.file) {
            (Some(slot), Some(file)) => {
                file.read_exact_at(page, slot * u64::from(self.page_size))?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

/// See the module.
pub struct Snapshot {
    db: Arc<Database>,
    preserved: Arc<Mutex<Preserved>>,
    header: Header,
    checksum: u64,
}

impl Database {
    /// A snapshot as of the newest position, which is on disk when this returns.
    pub fn snapshot(self: &Arc<Self>) -> Result<Snapshot, StoreError> {
        loop {
            self.catch_up()?;
            self.log().flush_wait()?;
            let mut st = self.lock();
            self.check_usable(&st)?;
            if self.has_unflushed() && !st.committing {
                continue;
            }
            let page_size = if st.page_size == 0 {
                4096
            } else {
                st.page_size
            };
            let preserved = Arc::new(Mutex::new(Preserved {
                next: 1,
                pages: st.page_count,
                page_size,
                scratch: self.scratch(),
                kept: HashMap::new(),
                file: None,
                lost: false,
            }));
            st.snapshots.push(Arc::downgrade(&preserved));
            let header = Header {
                compressed: self.context.options.compress,
                page_size,
                commit: st.page_count,
                min_txid: 1,
                max_txid: st.pos.txid.max(1),
                timestamp: st.timestamp,
                pre_apply_checksum: 0,
                wal_offset: 0,
                wal_size: 0,
                wal_salt1: 0,
                wal_salt2: 0,
                node_id: self.context.node_id,
            };
            return Ok(Snapshot {
                db: self.clone(),
                preserved,
                header,
                checksum: st.pos.checksum,
            });
        }
    }
}

impl Snapshot {
    /// The position that it is of.
    pub fn pos(&self) -> Pos {
        Pos {
            txid: self.header.max_txid,
            checksum: self.checksum,
        }
    }

    /// Its LTX file is to have the pages as they are, without LZ4.
    pub fn without_lz4(&mut self) {
        self.header.compressed = false;
    }

    /// Writes it as an LTX file. `w` should buffer. The LTX header names this node as the creator
    /// only of transactions; a snapshot's is 0, so that a node never takes it for its own.
    pub fn write_to(&mut self, w: &mut dyn Write) -> Result<Pos, StoreError> {
        let name = self.db.name.clone();
        let failed = |e| StoreError::ltx(format!("snapshot of {name}"))(e);
        let header = Header {
            node_id: 0,
            ..self.header
        };
        let mut encoder = Encoder::new(w, header).map_err(failed)?;
        let lock_page = ltx::lock_pgno(header.page_size);
        self.for_pages(|pgno, page| {
            if pgno == lock_page {
                return Ok(());
            }
            encoder.page(pgno, page).map_err(failed)
        })?;
        encoder.finish(self.checksum).map_err(failed)?;
        Ok(self.pos())
    }

    /// Size in bytes of what [`Snapshot::write_database`] writes; 0: there is no database.
    pub fn database_size(&self) -> u64 {
        u64::from(self.header.commit) * u64::from(self.header.page_size)
    }

    /// Writes it as a SQLite database file, complete without a WAL; the page of the lock bytes is
    /// zeros. `w` should buffer.
    pub fn write_database(&mut self, w: &mut dyn Write) -> Result<(), StoreError> {
        let db = self.db.clone();
        self.for_pages(|_, page| {
            w.write_all(page)
                .map_err(StoreError::io("write an export of", &db.dir))
        })
    }

    /// Calls `each` for every page, ascending; the lock page is zeros.
    fn for_pages(
        &self,
        mut each: impl FnMut(u32, &[u8]) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let Header {
            page_size, commit, ..
        } = self.header;
        let lock_page = ltx::lock_pgno(page_size);
        let mut pages = vec![0u8; (page_size * PAGES_PER_LOCK) as usize];
        let mut next = 1;
        while next <= commit {
            let last = next.saturating_add(PAGES_PER_LOCK - 1).min(commit);
            self.read_pages(next, last, lock_page, &mut pages)?;
            for (pgno, page) in (next..=last).zip(pages.chunks_exact(page_size as usize)) {
                each(pgno, page)?;
            }
            let Some(after) = last.checked_add(1) else {
                break;
            };
            next = after;
        }
        Ok(())
    }

    fn read_pages(
        &self,
        first: u32,
        last: u32,
        lock_page: u32,
        pages: &mut [u8],
    ) -> Result<(), StoreError> {
        let mut st = self.db.lock();
        // Where checkpoints have copied pages meanwhile, they are read from the database file.
        self.db.follow(&mut st)?;
        let mut preserved = self.preserved.lock();
        if preserved.lost {
            return Err(self.db.refuse("a checkpoint with synchronous=OFF changed pages before this snapshot could keep them: it succeeds when it is tried again"));
        }
        for (pgno, page) in
            (first..=last).zip(pages.chunks_exact_mut(self.header.page_size as usize))
        {
            if pgno == lock_page {
                page.fill(0);
                continue;
            }
            let kept = preserved
                .read(pgno, page)
                .map_err(StoreError::io("read pages kept in", &self.db.dir))?;
            if !kept && let Err(e) = st.read_committed(&self.db, pgno, page) {
                self.db.note_copied_since(&mut st, e)?;
                st.read_committed(&self.db, pgno, page)?;
            }
        }
        preserved.next = last.saturating_add(1);
        Ok(())
    }
}
