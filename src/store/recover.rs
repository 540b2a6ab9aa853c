//! Opening a database: redo.
//!
//! The database file as of the saved position, then every record of the log after it, whole pages,
//! in order: the result is the newest logged transaction, whatever the crash left in the file.
//! Journal, WAL and index are then of no use and removed: what they hold beyond the log was never
//! acknowledged, because a commit is logged before it is answered. In the rollback modes, pages of
//! a transaction that was not logged never reached the file.

use std::path::Path;
use std::sync::Arc;

use crate::ltx::{self, Decoder, Pos};
use crate::sqlite::header::{self, DbHeader};

use super::context::Context;
use super::database::{Database, FileKind, State, read_or_zeros};
use super::disk::{File, Open};
use super::error::StoreError;
use super::fault::{Action, Place};
use super::litefs;
use super::log::Log;
use super::sums::{self, PageSums, SumsHeader};

/// Databases up to this size are read and compared with their checksums at every start.
const VERIFY_UP_TO: u64 = 16 << 20;

/// Opens the database in `dir`. `None`: there is nothing in it. A database that cannot be
/// recovered is returned set aside, with the reason logged; its files are left as they are.
pub(super) fn open(
    context: &Arc<Context>,
    name: &str,
    dir: &Path,
) -> Result<Option<Arc<Database>>, StoreError> {
    let options = &context.options;
    let saved = sums::load(&*options.disk, &dir.join("checksums"));
    let verified = saved
        .as_ref()
        .ok()
        .and_then(|s| s.as_ref())
        .map_or(0, |(h, _)| h.pos.txid);
    let log = match Log::open(options, &dir.join("log"), options.segment_age(), verified) {
        Ok(log) => log,
        Err(e) => {
            let db = Database::empty(context, name, dir, Log::unusable(options, &dir.join("log")));
            db.set_broken(&mut db.lock(), e.to_string());
            return Ok(Some(db));
        }
    };
    let db = Database::empty(context, name, dir, log);
    let saved = saved.or_else(|e| without_checksums(&db, e));
    let outcome = saved.and_then(|saved| {
        let foreign = litefs::newest(&*options.disk, &dir.join("ltx"))?
            .filter(|(_, max)| *max > db.log().last_txid());
        match foreign {
            Some(_) => litefs::carry_over(&db).map(|()| true),
            None => db
                .recover(saved)
                .and_then(|there| litefs::forget_newest(&db).map(|()| there)),
        }
    });
    match outcome {
        Ok(true) => {}
        Ok(false) => return Ok(None),
        Err(e) => db.set_broken(&mut db.lock(), e.to_string()),
    }
    db.publish_opened();
    Ok(Some(db))
}

/// Damaged checksums are not needed where the log has everything, or the file what the log ends with.
fn without_checksums<T>(db: &Database, e: StoreError) -> Result<Option<T>, StoreError> {
    // Others could not be read this time.
    if !matches!(e, StoreError::Corrupt { .. }) || db.log().first_txid() == 0 {
        return Err(e);
    }
    tracing::warn!(db = db.name, error = %e, "page checksums are computed again");
    // Its headers must not be taken for newer than those to come.
    let path = db.dir.join("checksums");
    db.disk()
        .remove_file(&path)
        .map_err(StoreError::io("remove page checksums", &path))?;
    Ok(None)
}

/// The change counter of a database file; 0 of one that is too short to have one.
fn change_counter(file: &File) -> u32 {
    let mut bytes = [0u8; 4];
    match file.read_exact_at(&mut bytes, 24) {
        Ok(()) => u32::from_be_bytes(bytes),
        Err(_) => 0,
    }
}

/// What was redone.
struct Redone {
    /// At least one transaction.
    any: bool,
    /// Among them a deletion, or a snapshot: the file that was found may be the one from before, which
    /// a loss of power brings back, and its change counter says nothing of what followed.
    anew: bool,
}

impl Database {
    /// False: there is nothing to recover.
    fn recover(
        self: &Arc<Self>,
        saved: Option<(SumsHeader, PageSums)>,
    ) -> Result<bool, StoreError> {
        let path = self.path(FileKind::Database);
        let (saved, sums) = saved.unwrap_or_default();
        if saved.pos.txid == 0 && self.log().last_txid() == 0 {
            if self.disk().metadata(&path).is_ok_and(|m| m.len() > 0) {
                return Err(StoreError::corrupt(
                    &path,
                    "a database file without a transaction log: nothing tells what it should be. Move it away, and load it through SQLite (.dump) or restore its log",
                ));
            }
            return Ok(false);
        }
        let file = self.open_backing()?;
        let mut st = self.lock();
        st.saved = saved;
        st.pos = saved.pos;
        st.page_size = saved.page_size;
        st.page_count = saved.pages;
        st.sums = sums;
        let before = change_counter(&file);
        let start = self.redo_start(&mut st)?;
        let Redone { mut any, anew } = self.redo(&mut st, &file, start)?;
        any |= self.recover_lane(&mut st, &file)?;
        if !anew {
            self.check_nothing_lost(before, &file)?;
        }
        self.finish_recovery(&mut st, file)?;
        let unsaved = st.saved.pos != st.pos;
        drop(st);
        self.remove_leftovers()?;
        if any || unsaved {
            self.checkpoint()?;
        }
        Ok(true)
    }

    /// In the rollback modes the file has a transaction only once the log has it on disk: a log whose
    /// last record is not whole has lost it if the file was further than what is left. `before`: the
    /// file's change counter before the redo.
    fn check_nothing_lost(&self, before: u32, file: &File) -> Result<(), StoreError> {
        let now = change_counter(file);
        if !self.log().was_cut() || (before.wrapping_sub(now) as i32) <= 0 {
            return Ok(());
        }
        let what = format!(
            "its last transaction is damaged: the database file was at change {before}, what is left leads to {now}"
        );
        Err(StoreError::corrupt(self.dir.join("log"), what))
    }

    /// The database file, made if it is missing.
    pub(super) fn open_backing(&self) -> Result<File, StoreError> {
        let path = self.path(FileKind::Database);
        self.disk()
            .open(&path, Open::Make)
            .map_err(StoreError::io("open database", &path))
    }

    /// Applies every record from `start` on to the file.
    fn redo(&self, st: &mut State, file: &File, start: u64) -> Result<Redone, StoreError> {
        let last = self.log().last_txid();
        let mut next = start;
        let mut redone = Redone {
            any: next <= last,
            anew: false,
        };
        while next <= last {
            let Some(record) = self.log().read(next)? else {
                return Err(StoreError::corrupt(
                    self.dir.join("log"),
                    format!("transaction {next:016x} is missing from the log"),
                ));
            };
            let max = record.header.max_txid;
            let context = format!("{}, transaction {max:016x}", record.path.display());
            let reader = std::io::BufReader::with_capacity(256 << 10, record.body);
            let decoder = Decoder::new(reader).map_err(StoreError::ltx(&context))?;
            let header = decoder.header();
            let replaces = header.is_snapshot() && (max > 1 || record.header.flushed_txid == max);
            redone.anew |= header.commit == 0 || replaces;
            self.redo_record(st, file, decoder, &context)?;
            next = max + 1;
        }
        Ok(redone)
    }

    /// Where to begin: after the saved position if the log goes on from it, else at a snapshot.
    fn redo_start(&self, st: &mut State) -> Result<u64, StoreError> {
        let (log, saved) = (self.log(), st.saved.pos);
        let (first, last) = (log.first_txid(), log.last_txid());
        if saved.txid > 0 && saved.txid <= last {
            let follows = match log.read(saved.txid + 1)? {
                Some(record) => record.ltx_header()?.pre_apply_checksum == saved.checksum,
                // The same TXID can be one of another history, which a snapshot brought.
                None => saved.txid == last && self.log_ends_with(saved)?,
            };
            if follows {
                return Ok(saved.txid + 1);
            }
        }
        if first == 1 {
            return Ok(1);
        }
        if saved.txid == 0
            && let Some(record) = log.read(first)?
        {
            // The file is of some moment since then: whole pages of all that followed are right
            // over it. What it then is, is checked as a whole.
            let header = record.ltx_header()?;
            st.pos = header.pre_apply_pos();
            st.page_size = header.page_size;
            return Ok(first);
        }
        let what = format!(
            "the log holds transactions {first:016x} to {last:016x}, and the database was saved at {saved}: they do not meet"
        );
        Err(StoreError::corrupt(self.dir.join("log"), what))
    }

    /// Whether the newest record of the log, of this TXID, leads to this checksum.
    fn log_ends_with(&self, pos: Pos) -> Result<bool, StoreError> {
        let newest = match self.log().read(pos.txid)? {
            Some(record) => Some(record),
            None => self.log().read(1)?,
        };
        let Some(mut record) = newest.filter(|r| r.header.max_txid == pos.txid) else {
            return Ok(false);
        };
        let trailer = ltx::TRAILER_SIZE as u64;
        record
            .body
            .skip(record.header.length.saturating_sub(trailer));
        let mut post_apply = [0u8; 8];
        std::io::Read::read_exact(&mut record.body, &mut post_apply)
            .map_err(StoreError::io("read log segment", &record.path))?;
        Ok(u64::from_be_bytes(post_apply) == pos.checksum)
    }

    fn redo_record<R: std::io::Read>(
        &self,
        st: &mut State,
        file: &File,
        mut decoder: Decoder<R>,
        context: &str,
    ) -> Result<(), StoreError> {
        let path = self.path(FileKind::Database);
        let h = *decoder.header();
        if h.is_snapshot() || h.page_size != st.page_size {
            st.sums = PageSums::default();
        }
        if !h.is_snapshot() && h.pre_apply_pos() != st.pos {
            return Err(StoreError::corrupt(
                &path,
                format!(
                    "{context} follows {}, the database is at {}",
                    h.pre_apply_pos(),
                    st.pos
                ),
            ));
        }
        st.sums.resize(h.commit);
        let mut page = vec![0u8; h.page_size as usize];
        while let Some(pgno) = decoder.page(&mut page).map_err(StoreError::ltx(context))? {
            file.write_all_at(&page, u64::from(pgno - 1) * u64::from(h.page_size))
                .map_err(StoreError::io("write database", &path))?;
            st.sums.set(pgno, ltx::page_checksum(pgno, &page));
        }
        let (_, trailer) = decoder.finish().map_err(StoreError::ltx(context))?;
        st.pos = Pos {
            txid: h.max_txid,
            checksum: trailer.post_apply_checksum,
        };
        (st.page_size, st.page_count, st.timestamp) = (h.page_size, h.commit, h.timestamp);
        Ok(())
    }

    /// Checks what the redo made, and makes it the database's state.
    pub(super) fn finish_recovery(&self, st: &mut State, file: File) -> Result<(), StoreError> {
        let path = self.path(FileKind::Database);
        if st.page_count == 0 {
            drop(file);
            self.disk()
                .remove_file(&path)
                .map_err(StoreError::io("remove", &path))?;
            st.page_size = 0;
            return Ok(());
        }
        let size = st.committed_size();
        let len = file
            .metadata()
            .map_err(StoreError::io("stat", &path))?
            .len();
        if len + u64::from(st.page_size) < size {
            return Err(StoreError::corrupt(
                &path,
                format!(
                    "{len} bytes long, {size} at its position {}: it was cut off",
                    st.pos
                ),
            ));
        }
        if st.sums.recomputed() != st.pos.checksum {
            self.sums_of_file(st, &file)?;
        }
        if len != size {
            file.set_len(size)
                .map_err(StoreError::io("resize", &path))?;
        }
        let mut head = [0u8; header::HEADER_SIZE];
        read_or_zeros(&*file, 0, &mut head).map_err(StoreError::io("read", &path))?;
        let h = DbHeader::parse(&head).map_err(|e| StoreError::corrupt(&path, e.to_string()))?;
        st.wal_mode = h.is_wal();
        (st.view_size, st.base_size, st.reserved) = (size, size, size);
        if st.timestamp == 0 {
            st.timestamp = file
                .metadata()
                .ok()
                .and_then(|m| m.modified().ok())
                .and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok())
                .map_or(0, |d| d.as_millis() as i64);
        }
        self.adopt_file(st, FileKind::Database, file);
        let verify = size <= VERIFY_UP_TO || self.context.options.strict_verify;
        let check = |st: &State| {
            if verify {
                self.verify_pages(st)
            } else {
                self.verify_first_page(st)
            }
        };
        let checked = check(st).or_else(|e| {
            // Pages of a transaction that the log has lost are no damage of the file.
            if self.log().was_cut() {
                return Err(e);
            }
            self.mend_at_start(st).and_then(|()| check(st))
        });
        checked.inspect_err(|_| {
            st.files.database = None;
        })
    }

    /// Without right checksums of its pages, the file is right if what it holds has the checksum of
    /// the position, which the log knows.
    fn sums_of_file(&self, st: &mut State, file: &File) -> Result<(), StoreError> {
        let path = self.path(FileKind::Database);
        let (saved, lock_page) = (st.sums.recomputed(), ltx::lock_pgno(st.page_size));
        let mut page = vec![0u8; st.page_size as usize];
        let mut sums = PageSums::default();
        sums.resize(st.page_count);
        for pgno in (1..=st.page_count).filter(|p| *p != lock_page) {
            let at = u64::from(pgno - 1) * u64::from(st.page_size);
            read_or_zeros(&**file, at, &mut page).map_err(StoreError::io("read", &path))?;
            sums.set(pgno, ltx::page_checksum(pgno, &page));
        }
        if sums.checksum() != st.pos.checksum {
            let what = format!(
                "its pages' checksums are saved as {saved:016x} in all, those of its bytes are {:016x}, its position is {}",
                sums.checksum(),
                st.pos
            );
            return Err(StoreError::corrupt(&path, what));
        }
        st.sums = sums;
        // What is saved is of no use.
        st.saved.pos = Pos::default();
        let what = "page checksums were missing or damaged; the database file is whole";
        self.report_fault(Place::Checksums, what, Action::Repaired);
        Ok(())
    }

    fn verify_first_page(&self, st: &State) -> Result<(), StoreError> {
        let mut page = vec![0u8; st.page_size as usize];
        st.read_committed(self, 1, &mut page)?;
        if ltx::page_checksum(1, &page) != st.sums.get(1) {
            return Err(StoreError::corrupt(
                self.path(FileKind::Database),
                format!("page 1 is not that of position {}", st.pos),
            ));
        }
        Ok(())
    }

    /// Journal, WAL and index of the last run.
    pub(super) fn remove_leftovers(&self) -> Result<(), StoreError> {
        for kind in [FileKind::Journal, FileKind::Wal, FileKind::Shm] {
            let path = self.path(kind);
            self.disk()
                .remove_file_if_there(&path)
                .map_err(StoreError::io("remove", &path))?;
        }
        self.remove_mark(&mut self.lock())
    }
}
