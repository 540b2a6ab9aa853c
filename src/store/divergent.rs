//! Divergence: what only this node has is set aside before a snapshot of the primary takes the
//! place of the database.
//!
//! It lies in `<data>/divergent/<database>/<unix ms>/<min>-<max>.ltx`, one LTX file a transaction,
//! or one for the whole database where the single ones are not there any more. All of it is on
//! disk, names included, before the database changes; if that fails, the snapshot is refused. Which
//! transactions they are is the primary's to say: it compares positions with its log. The oldest
//! common position is not looked for: histories part once, so what follows the newest is all.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::ltx::{self, Pos};

use super::context::Event;
use super::database::{Database, now_ms};
use super::disk::{Disk, Open, Writer};
use super::error::StoreError;
use super::log::LogRecord;
use super::receive::Incoming;

/// The most positions that are compared.
pub const MAX_POSITIONS: usize = 65_536;

/// What another node shares of a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Common {
    /// Everything up to this position, and nothing after it.
    At(Pos),
    /// Nothing that can be named: they parted before the oldest position that is known.
    Nothing,
    /// It cannot be told.
    Unknown,
}

impl Database {
    /// Which of these positions, newest first, are of this database's history: for a node that
    /// asks its primary. `Unknown` if the log holds nothing of the time that they are of. Reads a
    /// log record's header for each; positions beyond [`MAX_POSITIONS`] are not looked at.
    pub fn newest_common(&self, positions: &[Pos]) -> Common {
        let here = self.pos();
        let mut comparable = false;
        for pos in positions.iter().take(MAX_POSITIONS) {
            if *pos == here {
                return Common::At(*pos);
            }
            match self.checksum_at(pos.txid, here) {
                Ok(Some(checksum)) if checksum == pos.checksum => return Common::At(*pos),
                Ok(Some(_)) => comparable = true,
                Ok(None) => {}
                Err(e) => {
                    tracing::warn!(db = self.name, error = %e, "a position cannot be compared");
                    return Common::Unknown;
                }
            }
        }
        if comparable {
            Common::Nothing
        } else {
            Common::Unknown
        }
    }

    /// The database's checksum after this transaction, as far as the log tells.
    fn checksum_at(&self, txid: u64, here: Pos) -> Result<Option<u64>, StoreError> {
        if txid == here.txid {
            return Ok(Some(here.checksum));
        }
        if txid == 0 || txid > here.txid {
            return Ok(None);
        }
        let Some(next) = self.log().read(txid + 1)? else {
            return Ok(None);
        };
        Ok(Some(next.ltx_header()?.pre_apply_checksum))
    }

    /// The positions that this database has had, newest first, as far as the log tells.
    fn history(&self) -> Result<Vec<Pos>, StoreError> {
        let here = self.pos();
        let mut positions = vec![here];
        let first = self.log().first_txid().max(2);
        for txid in (first..=here.txid).rev().take(MAX_POSITIONS - 1) {
            let Some(record) = self.log().read(txid)? else {
                break;
            };
            positions.push(record.ltx_header()?.pre_apply_pos());
        }
        Ok(positions)
    }

    /// Sets aside what the sender of this snapshot does not have. `common` is asked what it shares
    /// of these positions, newest first.
    pub(super) fn set_aside_before(
        self: &Arc<Self>,
        incoming: &Incoming,
        common: &mut dyn FnMut(&str, &[Pos]) -> Common,
    ) -> Result<(), StoreError> {
        self.try_settle()?;
        let here = self.pos();
        if here.is_zero() || here == incoming.pos() || *self.aside.lock() == Some(here) {
            return Ok(());
        }
        let history = self.history()?;
        let common = common(&self.name, &history);
        let records = match common {
            Common::At(pos) if pos == here => return Ok(()),
            Common::At(pos) if history.contains(&pos) => self.records(pos.txid + 1, here.txid)?,
            Common::At(_) | Common::Nothing => None,
            Common::Unknown => self.unshared(incoming, here)?,
        };
        if records.as_ref().is_some_and(Vec::is_empty) {
            return Ok(());
        }
        let dir = self.divergent_dir()?;
        let kept = match records {
            Some(records) => keep_records(self.disk(), &dir, records),
            None => self.keep_whole(&dir),
        };
        let (from, to, count) = kept
            .and_then(|kept| self.sync_up(&dir).map(|()| kept))
            .inspect_err(|_| {
                // Half of it is of no use, and it is all still in the database.
                let _ = self.disk().remove_dir_of_files(&dir);
            })?;
        self.counters()
            .divergent
            .fetch_add(count, Ordering::Relaxed);
        tracing::error!(
            db = self.name,
            transactions = count,
            from = format!("{from:016x}"),
            to = format!("{to:016x}"),
            path = %dir.display(),
            "the primary does not have transactions of this node: they are set aside, its snapshot takes their place"
        );
        self.context.publish(Event::Divergent {
            db: self.name.clone(),
            from,
            to,
            path: dir,
        });
        // Should the snapshot be refused after all, it comes again.
        *self.aside.lock() = Some(here);
        Ok(())
    }

    /// Without the sender's word: all that the log has, if this node made some of it itself, in this
    /// life or another, since it last received something, or the snapshot does not reach it. `None`:
    /// some of it is, or may be, not in the log any more.
    fn unshared(
        &self,
        incoming: &Incoming,
        here: Pos,
    ) -> Result<Option<Vec<LogRecord>>, StoreError> {
        let mut reaches = incoming.header.max_txid;
        if here.txid == reaches && here != incoming.pos() {
            // It has another transaction in the last one's place.
            reaches -= 1;
        }
        let first = self.log().first_txid();
        if here.txid > reaches && first > reaches.saturating_add(1) {
            return Ok(None);
        }
        // What came from another node came with all that was before it.
        let mut own_since = first.max(1);
        let mut received = first <= 1;
        let mut next = own_since;
        while next <= here.txid {
            let Some(record) = self.log().read(next)? else {
                return Ok(None);
            };
            let header = record.ltx_header()?;
            next = record.header.max_txid.saturating_add(1);
            let node = header.node_id;
            if node != self.context.node_id && !self.context.lives.has(node) {
                (own_since, received) = (next, true);
            }
        }
        if own_since <= here.txid && !received {
            return Ok(None);
        }
        if own_since > here.txid && here.txid <= reaches {
            return Ok(Some(Vec::new()));
        }
        // What came before them is as doubtful: who made it may have gone on with it, as this node did.
        self.records(first.max(1), here.txid)
    }

    /// The records from one TXID to another; `None` if one is missing.
    fn records(&self, from: u64, to: u64) -> Result<Option<Vec<LogRecord>>, StoreError> {
        let (mut records, mut next) = (Vec::new(), from);
        while next <= to {
            let Some(record) = self.log().read(next)? else {
                return Ok(None);
            };
            next = record.header.max_txid.saturating_add(1);
            records.push(record);
        }
        Ok(Some(records))
    }

    /// A new directory for what is set aside now.
    fn divergent_dir(&self) -> Result<PathBuf, StoreError> {
        let parent = self
            .context
            .options
            .data_dir
            .join("divergent")
            .join(&self.name);
        self.disk()
            .create_dir_all(&parent)
            .map_err(StoreError::io("create", &parent))?;
        let mut ms = now_ms();
        loop {
            let dir = parent.join(ms.to_string());
            match self.disk().create_dir(&dir) {
                Ok(()) => return Ok(dir),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => ms += 1,
                Err(e) => return Err(StoreError::io("create", &dir)(e)),
            }
        }
    }

    /// Makes the names durable, from the files' up to that in the data directory.
    fn sync_up(&self, dir: &Path) -> Result<(), StoreError> {
        let dirs = dir.ancestors().take(4);
        for dir in dirs {
            self.disk()
                .sync_dir(dir)
                .map_err(StoreError::io("sync directory", dir))?;
        }
        Ok(())
    }

    /// Keeps the database as it is: a snapshot of all transactions.
    fn keep_whole(self: &Arc<Self>, dir: &Path) -> Result<(u64, u64, u64), StoreError> {
        let mut snapshot = self.snapshot()?;
        let to = snapshot.pos().txid;
        let path = dir.join(ltx::file_name(1, to));
        let file = self
            .disk()
            .open(&path, Open::New)
            .map_err(StoreError::io("create", &path))?;
        let mut out = io::BufWriter::with_capacity(1 << 20, Writer::new(file));
        snapshot.write_to(&mut out)?;
        out.into_inner()
            .map_err(io::IntoInnerError::into_error)
            .and_then(|w| w.file().sync_all())
            .map_err(StoreError::io("write", &path))?;
        Ok((1, to, to))
    }
}

/// First and last TXID, and how many transactions.
fn keep_records(
    disk: &dyn Disk,
    dir: &Path,
    records: Vec<LogRecord>,
) -> Result<(u64, u64, u64), StoreError> {
    let (mut from, mut to, mut count) = (u64::MAX, 0, 0);
    for record in records {
        let (min, max) = (record.header.min_txid, record.header.max_txid);
        let path = dir.join(ltx::file_name(min, max));
        let mut body = record.body;
        disk.open(&path, Open::New)
            .and_then(|file| {
                io::copy(&mut body, &mut Writer::new(file.clone()))?;
                file.sync_all()
            })
            .map_err(StoreError::io("set aside transactions in", &path))?;
        (from, to) = (from.min(min), to.max(max));
        count += max - min + 1;
    }
    Ok((from, to, count))
}
