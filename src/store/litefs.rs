//! Data directories shared with LiteFS: one LTX file a transaction in `ltx`, the database changed
//! in place, a hot journal or a WAL possibly beside it.
//!
//! At the first start such a directory is carried over: journal rolled back, WAL applied, every
//! page read once, the result compared with the newest LTX file; the LTX files become the first
//! records of the log. Transactions that reached the WAL and no LTX file are logged then. At a
//! clean stop the newest record is left as an LTX file, which is what LiteFS needs to open the
//! directory again.

use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::ltx::{self, Encoder, Header, Pos};
use crate::sqlite::header::{self, DbHeader};
use crate::sqlite::journal::Journal;
use crate::sqlite::wal::{
    FRAME_HEADER_SIZE, FrameHeader, WAL_HEADER_SIZE, WalHeader, frame_offset,
};

use super::database::{Database, FileKind, State, now_ms, read_or_zeros};
use super::disk::{Disk, DiskFile, File, Open, Reader};
use super::error::StoreError;
use super::pages::PageList;
use super::sums::PageSums;

/// First and last TXID of the newest LTX file in a directory, which need not exist.
pub(super) fn newest(disk: &dyn Disk, dir: &Path) -> Result<Option<(u64, u64)>, StoreError> {
    Ok(list(disk, dir)?.into_iter().max_by_key(|(_, max)| *max))
}

fn list(disk: &dyn Disk, dir: &Path) -> Result<Vec<(u64, u64)>, StoreError> {
    let entries = match disk.list(dir) {
        Ok(e) => e,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(StoreError::io("list LTX files in", dir)(e)),
    };
    let mut files = Vec::new();
    for entry in entries {
        files.extend(entry.to_str().and_then(ltx::parse_file_name));
    }
    files.sort_unstable();
    Ok(files)
}

/// Makes a directory that LiteFS wrote last our own.
pub(super) fn carry_over(db: &Arc<Database>) -> Result<(), StoreError> {
    let dir = db.dir.join("ltx");
    let files = list(db.disk(), &dir)?;
    let Some(&(min, max)) = files.last() else {
        return Ok(());
    };
    let newest_path = dir.join(ltx::file_name(min, max));
    let (header, pos) = read_pos(db.disk(), &newest_path)?;
    let file = db.open_backing()?;
    let mut st = db.lock();
    (st.pos, st.page_size, st.page_count, st.timestamp) =
        (pos, header.page_size, header.commit, header.timestamp);
    let extra = if header.commit > 0 {
        db.settle_files(&mut st, &file, &header)?
    } else {
        Vec::new()
    };
    db.adopt_ltx_files(&dir, &files)?;
    db.finish_recovery(&mut st, file)?;
    for tx in extra {
        db.log_extra(&mut st, tx)?;
    }
    drop(st);
    db.log().flush_wait()?;
    db.remove_leftovers()?;
    db.checkpoint()?;
    forget_newest(db)?;
    tracing::info!(db = db.name, pos = %db.lock().pos, "carried over from a LiteFS data directory");
    Ok(())
}

fn read_pos(disk: &dyn Disk, path: &Path) -> Result<(Header, Pos), StoreError> {
    let file = disk
        .open(path, Open::Read)
        .map_err(StoreError::io("open", path))?;
    let summary = ltx::verify(BufReader::new(Reader::new(file)))
        .map_err(StoreError::ltx(path.display().to_string()))?;
    Ok((
        summary.header,
        Pos {
            txid: summary.header.max_txid,
            checksum: summary.trailer.post_apply_checksum,
        },
    ))
}

/// A transaction found in the WAL and in no LTX file.
struct Extra {
    pages: Vec<(u32, Vec<u8>)>,
    commit: u32,
}

impl Database {
    /// Rolls the journal back, applies the WAL, and finds the position among its transactions.
    /// Returns those after it.
    fn settle_files(
        &self,
        st: &mut State,
        file: &File,
        newest: &Header,
    ) -> Result<Vec<Extra>, StoreError> {
        self.roll_back_journal(file)?;
        let mut sums = read_sums(&**file, &self.path(FileKind::Database), newest.page_size)?;
        let mut found = sums.checksum() == st.pos.checksum && sums.len() == newest.commit;
        let mut extra = Vec::new();
        for tx in self.wal_transactions(newest.page_size)? {
            if found && st.sums.len() == 0 {
                st.sums = std::mem::take(&mut sums);
            }
            if found {
                extra.push(tx);
                continue;
            }
            sums.resize(tx.commit);
            for (pgno, page) in tx.pages.iter().filter(|(p, _)| *p <= tx.commit) {
                file.write_all_at(page, u64::from(*pgno - 1) * u64::from(newest.page_size))
                    .map_err(StoreError::io(
                        "write database",
                        self.path(FileKind::Database),
                    ))?;
                sums.set(*pgno, ltx::page_checksum(*pgno, page));
            }
            found = sums.checksum() == st.pos.checksum && sums.len() == newest.commit;
        }
        if st.sums.len() == 0 {
            st.sums = sums;
        }
        if !found {
            let what = format!(
                "its pages give checksum {:016x} ({} pages), the newest LTX file says {} ({} pages)",
                st.sums.checksum(),
                st.sums.len(),
                st.pos,
                newest.commit
            );
            return Err(StoreError::corrupt(self.path(FileKind::Database), what));
        }
        Ok(extra)
    }

    fn roll_back_journal(&self, file: &File) -> Result<(), StoreError> {
        let path = self.path(FileKind::Journal);
        let Ok(journal) = self.disk().open(&path, Open::Read) else {
            return Ok(());
        };
        let len = journal.size().map_err(StoreError::io("stat", &path))?;
        let bad =
            |e: crate::sqlite::journal::JournalError| StoreError::corrupt(&path, e.to_string());
        let Some(mut journal) =
            Journal::open(BufReader::new(Reader::new(journal)), len).map_err(bad)?
        else {
            return Ok(());
        };
        let (page_size, pages) = (journal.header().page_size, journal.header().initial_pages);
        while let Some((pgno, page)) = journal.next().map_err(bad)? {
            file.write_all_at(page, u64::from(pgno - 1) * u64::from(page_size))
                .map_err(StoreError::io("roll back", self.path(FileKind::Database)))?;
        }
        file.set_len(u64::from(page_size) * u64::from(pages))
            .map_err(StoreError::io("roll back", self.path(FileKind::Database)))
    }

    /// The committed transactions of the WAL, in order.
    fn wal_transactions(&self, page_size: u32) -> Result<Vec<Extra>, StoreError> {
        let path = self.path(FileKind::Wal);
        let Ok(wal) = self.disk().open(&path, Open::Read) else {
            return Ok(Vec::new());
        };
        let mut head = [0u8; WAL_HEADER_SIZE];
        read_or_zeros(&*wal, 0, &mut head).map_err(StoreError::io("read", &path))?;
        let Some(header) = WalHeader::decode(&head)
            .ok()
            .filter(|h| h.page_size == page_size)
        else {
            return Ok(Vec::new());
        };
        let (mut found, mut open, mut chain) = (Vec::new(), Vec::new(), header.checksum);
        let mut frame = vec![0u8; FRAME_HEADER_SIZE + page_size as usize];
        for n in 1..u32::MAX {
            if wal
                .read_exact_at(&mut frame, frame_offset(n, page_size))
                .is_err()
            {
                break;
            }
            let (head, page) = frame.split_at(FRAME_HEADER_SIZE);
            let h = FrameHeader::decode(head.try_into().expect("of this length"));
            let whole = h.pgno != 0
                && (h.salt1, h.salt2) == (header.salt1, header.salt2)
                && h.expected_checksum(header.big_endian, chain, page) == h.checksum;
            if !whole {
                break;
            }
            chain = h.checksum;
            open.push((h.pgno, page.to_vec()));
            if h.commit != 0 {
                found.push(Extra {
                    pages: std::mem::take(&mut open),
                    commit: h.commit,
                });
            }
        }
        Ok(found)
    }

    /// The LTX files that lead up to the newest one without a gap become the log.
    fn adopt_ltx_files(&self, dir: &Path, files: &[(u64, u64)]) -> Result<(), StoreError> {
        let path = |f: &(u64, u64)| dir.join(ltx::file_name(f.0, f.1));
        let mut first = files.len() - 1;
        let single = |f: &(u64, u64)| f.0 == f.1;
        while first > 0
            && files[first - 1].1 + 1 == files[first].0
            && files[first].0 != 1
            && single(&files[first])
        {
            first -= 1;
        }
        // Whatever log there was is older than what LiteFS did since.
        self.log().clear()?;
        for f in &files[first..] {
            let p: PathBuf = path(f);
            let source = self
                .disk()
                .open(&p, Open::Read)
                .map_err(StoreError::io("open", &p))?;
            let mut appender = self.log().begin(f.0, f.1)?;
            std::io::copy(&mut Reader::new(source), &mut appender)
                .map_err(StoreError::io("copy to the log", &p))?;
            appender.commit()?;
        }
        Ok(())
    }

    fn log_extra(self: &Arc<Self>, st: &mut State, tx: Extra) -> Result<(), StoreError> {
        let mut pages = tx.pages;
        pages.reverse();
        pages.sort_by_key(|(p, _)| *p);
        pages.dedup_by_key(|(p, _)| *p);
        pages.retain(|(p, _)| *p <= tx.commit);
        let changed: PageList = pages
            .iter()
            .map(|(p, d)| (*p, ltx::page_checksum(*p, d)))
            .collect();
        let txid = st.pos.txid + 1;
        let checksum = st.sums.checksum_with(&changed, tx.commit);
        let header = Header {
            compressed: self.context.options.compress,
            page_size: st.page_size,
            commit: tx.commit,
            min_txid: txid,
            max_txid: txid,
            timestamp: now_ms(),
            pre_apply_checksum: st.pos.checksum,
            wal_offset: 0,
            wal_size: 0,
            wal_salt1: 0,
            wal_salt2: 0,
            node_id: self.context.node_id,
        };
        let context = || format!("transaction {txid:016x} of {}", self.name);
        let mut appender = self.log().begin(txid, txid)?;
        let mut encoder =
            Encoder::new(&mut appender, header).map_err(StoreError::ltx(context()))?;
        let file = st.database_file(&self.name)?;
        for (pgno, page) in &pages {
            encoder
                .page(*pgno, page)
                .map_err(StoreError::ltx(context()))?;
            file.file
                .write_all_at(page, u64::from(*pgno - 1) * u64::from(st.page_size))
                .map_err(StoreError::io(
                    "write database",
                    self.path(FileKind::Database),
                ))?;
        }
        encoder
            .finish(checksum)
            .map_err(StoreError::ltx(context()))?;
        appender.commit()?;
        let mut head = [0u8; header::HEADER_SIZE];
        read_or_zeros(&*file.file, 0, &mut head)
            .map_err(StoreError::io("read", self.path(FileKind::Database)))?;
        let wal_mode = DbHeader::parse(&head).is_ok_and(|h| h.is_wal());
        let pos = Pos { txid, checksum };
        let c = super::capture::Captured {
            changed: Arc::new(changed),
            page_size: st.page_size,
            commit: tx.commit,
            wal_mode,
            pos,
            timestamp: header.timestamp,
        };
        self.advance(st, &c);
        let size = st.committed_size();
        self.set_file_size(st, &*file.file, size)?;
        (st.view_size, st.base_size) = (size, size);
        Ok(())
    }
}

pub(super) fn read_sums(
    file: &dyn DiskFile,
    path: &Path,
    page_size: u32,
) -> Result<PageSums, StoreError> {
    let len = file.size().map_err(StoreError::io("stat", path))?;
    let pages = u32::try_from(len / u64::from(page_size))
        .map_err(|_| StoreError::corrupt(path, "too large for a database"))?;
    let mut sums = PageSums::default();
    sums.resize(pages);
    let mut page = vec![0u8; page_size as usize];
    for pgno in (1..=pages).filter(|p| *p != ltx::lock_pgno(page_size)) {
        file.read_exact_at(&mut page, u64::from(pgno - 1) * u64::from(page_size))
            .map_err(StoreError::io("read database", path))?;
        sums.set(pgno, ltx::page_checksum(pgno, &page));
    }
    Ok(sums)
}

/// Takes away what the last clean stop, or LiteFS, left: from now on the log moves on without it,
/// and after a snapshot of a lower TXID it would look like news, even if a loss of power brought it
/// back.
pub(super) fn forget_newest(db: &Database) -> Result<(), StoreError> {
    let dir = db.dir.join("ltx");
    let files = list(db.disk(), &dir)?;
    if files.is_empty() {
        return Ok(());
    }
    for (min, max) in files {
        let path = dir.join(ltx::file_name(min, max));
        db.disk()
            .remove_file(&path)
            .map_err(StoreError::io("remove", &path))?;
    }
    db.disk()
        .sync_dir(&dir)
        .map_err(StoreError::io("sync", &dir))
}

/// Leaves the newest record as an LTX file, synced, and no other.
pub(super) fn leave_newest(db: &Arc<Database>) -> Result<(), StoreError> {
    let pos = db.pos();
    if pos.txid == 0 {
        return Ok(());
    }
    let dir = db.dir.join("ltx");
    db.disk()
        .create_dir_all(&dir)
        .map_err(StoreError::io("create", &dir))?;
    let record = match db.log().read(pos.txid)? {
        Some(r) => r,
        None => match db.log().read(1)? {
            Some(r) if r.header.max_txid == pos.txid => r,
            _ => return Ok(()),
        },
    };
    let name = ltx::file_name(record.header.min_txid, record.header.max_txid);
    let path = dir.join(&name);
    let mut body: Box<dyn Read> = Box::new(record.body);
    db.disk()
        .replace(&path, |out| std::io::copy(&mut body, out).map(|_| ()))
        .map_err(StoreError::io("write", &path))?;
    for (min, max) in list(db.disk(), &dir)? {
        let other = dir.join(ltx::file_name(min, max));
        if other != path {
            db.disk()
                .remove_file(&other)
                .map_err(StoreError::io("remove", &other))?;
        }
    }
    Ok(())
}
