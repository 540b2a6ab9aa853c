//! From changed pages to a record in the log: the part that all journal modes share.

use std::io::Write;
use std::sync::Arc;

use crate::ltx::{self, Encoder, Header, Pos};

use super::appender::Appender;
use super::database::{Database, State, now_ms};
use super::error::StoreError;
use super::gate::Pass;
use super::pages::PageList;

/// Transactions of this many pages and more are compressed only where that pays: else it takes longer
/// than to write them (see bench/RESULTS.md), and their writer waits for it.
const LARGE: usize = 256;
/// It pays if so many of their pages, taken from all over, come to a quarter.
const SAMPLES: usize = 8;

/// A transaction that is in the log and not yet in the state.
#[derive(Clone, Debug)]
pub(super) struct Captured {
    /// The pages that the record holds.
    pub changed: Arc<PageList>,
    pub page_size: u32,
    /// Pages of the database after it; 0: dropped.
    pub commit: u32,
    /// Whether the header of the database then asks for a WAL.
    pub wal_mode: bool,
    pub pos: Pos,
    pub timestamp: i64,
}

/// Where in the WAL a transaction lies.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct WalPlace {
    pub offset: i64,
    pub size: i64,
    pub salt1: u32,
    pub salt2: u32,
}

impl Database {
    /// The right to commit a transaction; held until it is answered.
    pub(super) fn begin_commit(&self) -> Result<Pass, StoreError> {
        if self.halt.is_held() {
            return Err(self.refuse("a commit while a replica holds the halt lock"));
        }
        let pass = self.context.gate.pass();
        pass.ok_or_else(|| StoreError::NotPrimary(self.name.clone()))
    }

    /// What a commit that is in the log is answered with: an error, if this node may not
    /// acknowledge it any more.
    pub(super) fn verdict(&self, pass: &Pass) -> Result<(), StoreError> {
        if pass.is_good() {
            return Ok(());
        }
        let e = StoreError::Unanswered(self.name.clone());
        self.warn_rarely(&e);
        Err(e)
    }

    /// Writes the record of a transaction of these pages to the log, where it is still to be
    /// committed. `read` gives the bytes of a page. The state is not changed.
    pub(super) fn append_transaction(
        &self,
        st: &State,
        changed: PageList,
        shape: Shape,
        place: WalPlace,
        read: impl FnMut(u32, &mut [u8]) -> Result<(), StoreError>,
    ) -> Result<(Captured, Appender<'_>), StoreError> {
        let txid = st.pos.txid + 1;
        let mut appender = self.log().begin(txid, txid)?;
        let captured = self.encode_transaction(st, changed, shape, place, read, &mut appender)?;
        Ok((captured, appender))
    }

    /// Writes the LTX file of a transaction that follows the state.
    pub(super) fn encode_transaction(
        &self,
        st: &State,
        changed: PageList,
        shape: Shape,
        place: WalPlace,
        mut read: impl FnMut(u32, &mut [u8]) -> Result<(), StoreError>,
        out: &mut dyn Write,
    ) -> Result<Captured, StoreError> {
        // What is passed through is committed, whatever this node is by now.
        if !self.is_writable() && st.lane.is_none() {
            return Err(StoreError::NotPrimary(self.name.clone()));
        }
        let txid = st.pos.txid + 1;
        let checksum = if shape.page_size == st.page_size || st.page_size == 0 {
            st.sums.checksum_with(&changed, shape.commit)
        } else {
            // Pages of another size: the record holds them all.
            changed.total() | ltx::CHECKSUM_FLAG
        };
        let mut page = vec![0u8; shape.page_size as usize];
        let header = Header {
            compressed: self.context.options.compress
                && (changed.len() < LARGE || is_compressible(&changed, &mut page, &mut read)?),
            page_size: shape.page_size,
            commit: shape.commit,
            min_txid: txid,
            max_txid: txid,
            timestamp: now_ms(),
            pre_apply_checksum: st.pos.checksum,
            wal_offset: place.offset,
            wal_size: place.size,
            wal_salt1: place.salt1,
            wal_salt2: place.salt2,
            node_id: self.context.node_id,
        };
        let failed = |e| StoreError::ltx(format!("transaction {txid:016x} of {}", self.name))(e);
        let mut encoder = Encoder::new(out, header).map_err(failed)?;
        for pgno in changed.pgnos() {
            read(pgno, &mut page)?;
            encoder.page(pgno, &page).map_err(failed)?;
        }
        encoder.finish(checksum).map_err(failed)?;
        Ok(Captured {
            changed: Arc::new(changed),
            page_size: shape.page_size,
            commit: shape.commit,
            wal_mode: shape.wal_mode,
            pos: Pos { txid, checksum },
            timestamp: header.timestamp,
        })
    }

    /// Moves the state on to a logged transaction. Where its bytes are is the caller's matter.
    pub(super) fn advance(&self, st: &mut State, c: &Captured) {
        if c.page_size != st.page_size && st.page_size != 0 {
            st.sums.resize(0);
        }
        st.sums.resize(c.commit);
        for (pgno, sum) in c.changed.iter() {
            st.sums.set(pgno, sum);
        }
        st.page_size = c.page_size;
        st.page_count = c.commit;
        st.wal_mode = c.wal_mode;
        st.pos = c.pos;
        st.timestamp = c.timestamp;
        // The next writer may come as soon as the locks are given up.
        st.importing = false;
    }

    /// After the bytes of the newest transaction are in place.
    pub(super) fn after_advance(self: &Arc<Self>, st: &mut State) {
        if self.context.options.strict_verify
            && let Err(e) = self.verify_pages(st).or_else(|e| {
                // Checkpoints of those who are passed through go on meanwhile.
                self.note_copied_since(st, e)?;
                self.verify_pages(st)
            })
            && !self.checkpoint_is_ahead(st)
        {
            self.set_broken(st, format!("strict-verify: {e}"));
        }
        self.maybe_checkpoint(st);
    }
}

/// Whether samples of the pages come to a quarter of their size. `page` is as large as one.
fn is_compressible(
    changed: &PageList,
    page: &mut [u8],
    read: &mut impl FnMut(u32, &mut [u8]) -> Result<(), StoreError>,
) -> Result<bool, StoreError> {
    let mut compressed = 0;
    let apart = changed.len() / SAMPLES;
    for pgno in changed.pgnos().step_by(apart).take(SAMPLES) {
        read(pgno, page)?;
        compressed += lz4_flex::block::compress(page).len();
    }
    Ok(compressed * 4 <= page.len() * SAMPLES)
}

/// What a database is after a transaction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub page_size: u32,
    pub commit: u32,
    pub wal_mode: bool,
}
