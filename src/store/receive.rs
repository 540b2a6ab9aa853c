//! Receiving a transaction from the primary: read it whole, check it whole, then apply it.
//!
//! Nothing of the database is touched before the LTX file was read to its end, its checksums were
//! found right, and it was found to follow this node's position.

use std::io::{self, Read, Write};
use std::sync::Arc;

use crate::ltx::{self, Decoder, Header, Pos};
use crate::sqlite::header::DbHeader;

use super::Store;
use super::capture::Captured;
use super::database::{Database, State};
use super::disk::Scratch;
use super::divergent::Common;
use super::error::StoreError;
use super::loose::{Loose, LooseFile};
use super::pages::PageList;
use super::replica_in_place::Run;
use super::room::{self, Room};

/// Bytes of a received file that are kept in memory; a larger one is spooled to disk. In tests, whose
/// files are small, there are some of both kinds.
const SPOOL_MEMORY: usize = if cfg!(test) { 24 << 10 } else { 8 << 20 };
/// After how many bytes of one the free space is looked at again.
const LOOK_EVERY: u64 = 8 << 20;

/// What became of a received file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// It was applied, and this is the position now.
    Applied(Pos),
    /// It was made by this node, or is known already: nothing was to be done.
    Known,
}

/// The bytes of an LTX file: in memory, or in what becomes a log's segment.
pub(super) struct Spool {
    memory: Vec<u8>,
    file: Option<Loose>,
    size: u64,
    scratch: Scratch,
}

impl Spool {
    pub fn new(scratch: Scratch) -> Spool {
        Spool {
            memory: Vec::new(),
            file: None,
            size: 0,
            scratch,
        }
    }

    pub fn add(&mut self, data: &[u8]) -> io::Result<()> {
        let at = self.size;
        self.size += data.len() as u64;
        if self.file.is_none() && self.memory.len() + data.len() > SPOOL_MEMORY {
            let mut file = Loose::new(&self.scratch)?;
            file.write_all(&std::mem::take(&mut self.memory))?;
            self.file = Some(file);
        }
        if at / LOOK_EVERY != self.size / LOOK_EVERY {
            let usable = Room::of(self.scratch.dir()).map(|room| room.usable());
            if usable.is_some_and(|usable| usable < LOOK_EVERY) {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
        }
        match &mut self.file {
            Some(file) => file.write_all(data),
            None => {
                self.memory.extend_from_slice(data);
                Ok(())
            }
        }
    }

    /// Bytes so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Copies bytes from `offset` on; returns how many, 0 at the end.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        if let Some(file) = &self.file {
            let mut body = file.body();
            body.skip(offset);
            return body.read(buf);
        }
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = self.memory.get(from..).unwrap_or_default();
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }

    /// The bytes from the beginning.
    pub fn reader(&self) -> Box<dyn Read + '_> {
        match &self.file {
            Some(file) => Box::new(io::BufReader::with_capacity(256 << 10, file.body())),
            None => Box::new(&self.memory[..]),
        }
    }

    /// What a log may take as it is; `None`: it is in memory.
    pub fn loose(&mut self) -> Option<&mut Loose> {
        self.file.as_mut()
    }
}

/// Bytes that are gathered before they are spooled.
const GATHERED: usize = 256 << 10;

struct Tee<'a> {
    from: &'a mut dyn Read,
    spool: &'a mut Spool,
    /// What was read and is not in the spool yet: reads are small where pages are not compressed.
    gathered: Vec<u8>,
}

impl Tee<'_> {
    fn spool(&mut self) -> io::Result<()> {
        self.spool.add(&self.gathered)?;
        self.gathered.clear();
        Ok(())
    }
}

impl Read for Tee<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.from.read(buf)?;
        self.gathered.extend_from_slice(&buf[..n]);
        if self.gathered.len() >= GATHERED {
            self.spool()?;
        }
        Ok(n)
    }
}

/// A whole LTX file that is right in itself.
pub(super) struct Incoming {
    pub header: Header,
    pub post_apply_checksum: u64,
    /// Its pages.
    pub pages: Arc<PageList>,
    /// What page 1 says of the journal mode, if page 1 is among them.
    pub wal_mode: Option<bool>,
    /// The change counter in page 1, likewise.
    pub change_counter: Option<u32>,
    pub spool: Spool,
    /// The database that it makes by itself, if that was written while it came.
    pub database: Option<LooseFile>,
}

impl Incoming {
    /// Reads all of it. `is_new`: there is no such database so far, and so nothing is in the way of
    /// the one that a snapshot makes.
    pub fn read(
        scratch: Scratch,
        from: &mut dyn Read,
        db: &str,
        is_new: bool,
    ) -> Result<Incoming, StoreError> {
        let failed = |e| StoreError::ltx(format!("transaction received for {db}"))(e);
        let dir = scratch.dir().to_owned();
        let io = |e| StoreError::io("spool a transaction in", &dir)(e);
        let mut spool = Spool::new(scratch.clone());
        let mut decoder = Decoder::new(Tee {
            from,
            spool: &mut spool,
            gathered: Vec::new(),
        })
        .map_err(failed)?;
        let header = *decoder.header();
        room::check(&dir, db, &header)?;
        let page_size = u64::from(header.page_size);
        let large = u64::from(header.commit) * page_size > SPOOL_MEMORY as u64;
        let database = match is_new && header.is_snapshot() && large {
            true => Some(LooseFile::new(&scratch).map_err(io)?),
            false => None,
        };
        let mut run = database.as_ref().map(|database| Run::new(database.file()));
        let mut page = vec![0u8; header.page_size as usize];
        let mut pages = PageList::default();
        let mut first = None;
        while let Some(pgno) = decoder.page(&mut page).map_err(failed)? {
            if pgno == 1 {
                first = DbHeader::parse(&page).ok();
            }
            if let Some(run) = &mut run {
                let at = u64::from(pgno - 1) * page_size;
                run.add(&page, at).map_err(io)?;
            }
            pages.push(pgno, ltx::page_checksum(pgno, &page));
        }
        run.map_or(Ok(()), |mut run| run.write()).map_err(io)?;
        let (mut tee, trailer) = decoder.finish().map_err(failed)?;
        tee.spool().map_err(io)?;
        ltx::check_transition(&header, &trailer, pages.len() as u32).map_err(failed)?;
        Ok(Incoming {
            header,
            post_apply_checksum: trailer.post_apply_checksum,
            pages: Arc::new(pages),
            wal_mode: first.map(|h| h.is_wal()),
            change_counter: first.map(|h| h.change_counter),
            spool,
            database,
        })
    }

    /// Compresses the pages as the log is to have them. A file that memory does not hold stays as
    /// it is.
    fn compress(&mut self, db: &str) -> Result<(), StoreError> {
        if self.spool.file.is_some() {
            return Ok(());
        }
        let compressed = ltx::with_lz4(&self.spool.memory);
        let compressed =
            compressed.map_err(StoreError::ltx(format!("transaction received for {db}")))?;
        if let Some(file) = compressed {
            self.spool.size = file.len() as u64;
            self.spool.memory = file;
            self.header.compressed = true;
        }
        Ok(())
    }

    pub fn pos(&self) -> Pos {
        Pos {
            txid: self.header.max_txid,
            checksum: self.post_apply_checksum,
        }
    }

    pub fn captured(&self, was_wal: bool) -> Captured {
        Captured {
            changed: self.pages.clone(),
            page_size: self.header.page_size,
            commit: self.header.commit,
            wal_mode: self.wal_mode.unwrap_or(was_wal) && self.header.commit > 0,
            pos: self.pos(),
            timestamp: self.header.timestamp,
        }
    }
}

/// A whole LTX file that has arrived, right in itself, and is still to be applied.
pub struct Arrived(Incoming);

impl Arrived {
    /// Its header.
    pub fn header(&self) -> &Header {
        &self.0.header
    }

    /// Bytes of it, about as many as it takes in memory or on disk until it is applied.
    pub fn size(&self) -> u64 {
        self.0.spool.size()
    }
}

impl Store {
    /// Reads exactly one LTX file, and checks all of it that can be checked without the database.
    /// Blocks on the reader and the disk. Nothing is changed.
    pub fn read_arriving(&self, name: &str, from: &mut dyn Read) -> Result<Arrived, StoreError> {
        super::names::check_database(name)?;
        let is_new = self.database(name).is_none_or(|db| !db.exists());
        let mut incoming = Incoming::read(self.scratch(), from, name, is_new)?;
        if self.context.options.compress {
            incoming.compress(name)?;
        }
        Ok(Arrived(incoming))
    }

    /// Whether files that follow the one that was read are better applied together with it.
    pub fn applies_in_groups(&self, name: &str, file: &Arrived) -> bool {
        let header = file.header();
        let single = header.node_id == self.node_id() || header.is_snapshot();
        !single && self.database(name).is_some_and(|db| db.applies_in_place())
    }

    /// Applies files that were read of one database, in order: at once if they are such as
    /// [`Store::applies_in_groups`] says and each follows the one before it, else one by one, and
    /// then those before the first that is refused are applied. See [`Store::receive`].
    ///
    /// # Errors
    /// As those of [`Store::receive`].
    pub fn receive_all(
        &self,
        name: &str,
        mut files: Vec<Arrived>,
        common: &mut dyn FnMut(&str, &[Pos]) -> Common,
    ) -> Result<(), StoreError> {
        if files.len() > 1
            && files.iter().all(|f| self.applies_in_groups(name, f))
            && let Some(db) = self.database(name)
        {
            let mut group: Vec<Incoming> = files.into_iter().map(|f| f.0).collect();
            db.end_hold(None);
            if db.apply_group(&mut group)? {
                return Ok(());
            }
            files = group.into_iter().map(Arrived).collect();
        }
        for file in files {
            self.take(name, file.0, common)?;
        }
        Ok(())
    }

    /// Reads exactly one LTX file, and applies it. Blocks: on the reader, on the disk, and in the
    /// rollback modes on applications that read, for a bounded time.
    ///
    /// # Errors
    /// [`StoreError::PositionMismatch`] if it does not follow this node's position (a snapshot
    /// always does); the file was read to its end then. Nothing is changed on any error.
    ///
    /// `common` is called only if a snapshot meets a database that is at another position: given
    /// the positions that this database has had (newest first, as many as the log knows, at most
    /// [`MAX_POSITIONS`](super::divergent::MAX_POSITIONS)), it answers what the primary shares of
    /// them. What it does not is set aside before the snapshot takes its place.
    pub fn receive(
        &self,
        name: &str,
        from: &mut dyn Read,
        common: &mut dyn FnMut(&str, &[Pos]) -> Common,
    ) -> Result<Received, StoreError> {
        let file = self.read_arriving(name, from)?;
        self.take(name, file.0, common)
    }

    fn take(
        &self,
        name: &str,
        incoming: Incoming,
        common: &mut dyn FnMut(&str, &[Pos]) -> Common,
    ) -> Result<Received, StoreError> {
        let own = incoming.header.node_id == self.node_id() && !incoming.header.is_snapshot();
        if own
            && self
                .database(name)
                .is_some_and(|db| db.knows_own(&incoming))
        {
            return Ok(Received::Known);
        }
        if let Some(db) = self.database(name) {
            // What another node made means that the halt lock is lost, if this one believed to
            // hold it; so does what this one made and was never told of.
            db.end_hold(None);
        }
        let db = self.database_for_apply(name, incoming.header.is_snapshot())?;
        if incoming.header.is_snapshot() {
            db.set_aside_before(&incoming, common)?;
        }
        let result = db.apply(incoming);
        self.forget_if_nothing(&db);
        result
    }
}

impl Database {
    /// Whether the file follows the position that the database is at.
    pub(super) fn check_follows(&self, incoming: &Incoming) -> Result<(), StoreError> {
        let st = self.lock();
        if incoming.header.is_snapshot() {
            return Ok(());
        }
        self.check_usable(&st)?;
        let need = incoming.header.pre_apply_pos();
        if need != st.pos {
            return Err(StoreError::PositionMismatch {
                db: self.name.clone(),
                have: st.pos,
                need,
            });
        }
        self.check_growth(&st, incoming)?;
        let expected = if incoming.header.page_size == st.page_size {
            st.sums
                .checksum_with(&incoming.pages, incoming.header.commit)
        } else {
            // Pages of another size: it holds them all.
            incoming.pages.total() | ltx::CHECKSUM_FLAG
        };
        let found = incoming.post_apply_checksum;
        if expected != found && incoming.header.commit > 0 {
            let source = ltx::LtxError::PostApplyChecksum { expected, found };
            return Err(StoreError::Ltx {
                context: format!(
                    "transaction {:016x} of {}",
                    incoming.header.max_txid, self.name
                ),
                source,
            });
        }
        Ok(())
    }

    /// An error if the file does not hold every page that it adds to the database.
    fn check_growth(&self, st: &State, incoming: &Incoming) -> Result<(), StoreError> {
        let Header {
            page_size, commit, ..
        } = incoming.header;
        let old = match page_size == st.page_size {
            true => st.page_count,
            false => 0,
        };
        if holds_what_it_adds(incoming, old) {
            return Ok(());
        }
        let what = format!(
            "transaction {:016x} makes it {commit} pages of {page_size} bytes, and does not hold all that are new",
            incoming.header.max_txid
        );
        let db = self.name.clone();
        Err(StoreError::Refused { db, what })
    }

    /// Applies a checked file; see the `replica` module for how.
    pub(super) fn apply(self: &Arc<Self>, mut incoming: Incoming) -> Result<Received, StoreError> {
        let mut locks = self.lock_applier();
        if incoming.pos() == self.lock().pos {
            return Ok(Received::Known);
        }
        self.check_follows(&incoming)?;
        self.apply_incoming(&mut locks, &mut incoming)?;
        Ok(Received::Applied(incoming.pos()))
    }
}

/// Whether the file has every page that it adds to a database of `old` pages: what another such page
/// is would be left open, and a header could make the database as large as it says.
pub(super) fn holds_what_it_adds(incoming: &Incoming, old: u32) -> bool {
    let Header {
        page_size, commit, ..
    } = incoming.header;
    let lock_page = ltx::lock_pgno(page_size);
    let lock_page = u32::from((old.saturating_add(1)..=commit).contains(&lock_page));
    let added = incoming.pages.pgnos().filter(|pgno| *pgno > old);
    let added = added.count() as u64 + u64::from(lock_page);
    u64::from(commit) <= u64::from(old) + added
}
