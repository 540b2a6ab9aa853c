//! What the replication stream reads of a database.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use crc_fast::CrcAlgorithm::Crc64GoIso;

use crate::ltx::{self, Header, Pos};

use super::database::Database;
use super::error::StoreError;
use super::log::LogPlace;
use super::segment::{BodyReader, RecordHeader};

/// A transaction of the log.
#[derive(Clone, Debug)]
pub struct Record {
    /// First TXID.
    pub min_txid: u64,
    /// Last TXID.
    pub max_txid: u64,
    /// Checksum of the database after it.
    pub post_apply_checksum: u64,
    /// The whole LTX file.
    pub bytes: Bytes,
}

/// What a replica at some position needs next.
#[derive(Debug)]
pub enum Next {
    /// Nothing: it has everything that is on disk here.
    UpToDate,
    /// This transaction.
    Record(Record),
    /// This transaction, which is to be read piece by piece.
    Large(LargeRecord),
    /// A snapshot: no transaction here follows its position.
    Snapshot,
}

/// Largest record that is handed out as one piece. What waits for a replica that is slow is a few of
/// them.
const MAX_RECORD: u64 = 1 << 20;

/// Bytes that are read at a time to compare them with their checksum.
const PIECE: usize = 64 << 10;

/// A transaction of the log that is too large for memory. Its bytes stay as long as it is held.
#[derive(Debug)]
pub struct LargeRecord {
    path: PathBuf,
    header: RecordHeader,
    post_apply_checksum: u64,
    body: BodyReader,
}

impl LargeRecord {
    /// The position after it.
    pub fn pos(&self) -> Pos {
        Pos {
            txid: self.header.max_txid,
            checksum: self.post_apply_checksum,
        }
    }

    /// Bytes of the LTX file.
    pub fn size(&self) -> u64 {
        self.header.length
    }

    /// Whether the log still has what was written. Reads all of it.
    fn is_whole(&self) -> Result<bool, StoreError> {
        let (mut body, mut crc) = (self.body.clone(), crc_fast::Digest::new(Crc64GoIso));
        let mut piece = vec![0; PIECE];
        loop {
            match body.read(&mut piece) {
                Ok(0) => return Ok(crc.finalize() == self.header.body_crc),
                Ok(n) => crc.update(&piece[..n]),
                Err(e) => return Err(StoreError::io("read log segment", &self.path)(e)),
            }
        }
    }

    /// Writes the whole LTX file. `w` should buffer.
    pub fn write_to(mut self, w: &mut dyn Write) -> Result<Pos, StoreError> {
        let io = |e| StoreError::io("read log segment", &self.path)(e);
        io::copy(&mut self.body, w).map_err(io)?;
        Ok(self.pos())
    }

    /// The same in memory.
    pub fn load(self) -> Result<Record, StoreError> {
        let (header, post_apply_checksum) = (self.header, self.post_apply_checksum);
        let mut bytes = Vec::with_capacity(header.length as usize);
        self.write_to(&mut bytes)?;
        Ok(Record {
            min_txid: header.min_txid,
            max_txid: header.max_txid,
            post_apply_checksum,
            bytes: bytes.into(),
        })
    }
}

impl Database {
    /// What a replica at `pos` needs next. Blocks on a read of the log.
    pub fn record_after(&self, pos: Pos) -> Result<Next, StoreError> {
        let here = self.pos();
        if pos == here {
            return Ok(Next::UpToDate);
        }
        if pos.txid == 0 || pos.txid >= here.txid {
            return Ok(Next::Snapshot);
        }
        let Some(record) = self.log().read(pos.txid + 1)? else {
            return Ok(Next::Snapshot);
        };
        if record.header.max_txid > here.txid || record.ltx_header()?.pre_apply_pos() != pos {
            return Ok(Next::Snapshot);
        }
        let record = LargeRecord {
            post_apply_checksum: record.post_apply_checksum()?,
            path: record.path,
            header: record.header,
            body: record.body,
        };
        let (path, max_txid) = (record.path.clone(), record.header.max_txid);
        let whole = if record.header.length > MAX_RECORD {
            record.is_whole()?.then_some(Next::Large(record))
        } else {
            let crc = record.header.body_crc;
            let record = record.load()?;
            let whole = crc_fast::checksum(Crc64GoIso, &record.bytes) == crc;
            whole.then_some(Next::Record(record))
        };
        Ok(whole.unwrap_or_else(|| {
            // The scrub deals with the log; the replica is given what is whole.
            tracing::warn!(
                db = self.name,
                path = %path.display(),
                txid = format!("{max_txid:016x}"),
                "a damaged transaction is not sent: a snapshot takes its place"
            );
            Next::Snapshot
        }))
    }

    /// Where the log has the transaction that begins with this TXID.
    pub fn log_place(&self, min_txid: u64) -> Option<LogPlace> {
        self.log().place(min_txid)
    }

    /// The same LTX file with its pages as they are, for a stream that is compressed as a whole.
    pub fn without_lz4(&self, file: Bytes) -> Result<Bytes, StoreError> {
        let plain = ltx::without_lz4(&file);
        let plain = plain.map_err(StoreError::ltx(format!("transaction of {}", self.name)))?;
        Ok(plain.map_or(file, Bytes::from))
    }

    /// Whether the log shows that this position is in the database's past.
    pub fn log_follows(&self, pos: Pos) -> Result<bool, StoreError> {
        let Some(mut record) = self.log().read(pos.txid + 1)? else {
            return Ok(false);
        };
        let mut head = [0u8; ltx::HEADER_SIZE];
        record
            .body
            .read_exact(&mut head)
            .map_err(StoreError::io("read log segment", &record.path))?;
        let header =
            Header::decode(&head).map_err(StoreError::ltx(record.path.display().to_string()))?;
        Ok(header.pre_apply_pos() == pos)
    }

    /// Captures what is committed, and flushes what is applied, so that [`Database::pos`] is all there is. A failure is logged by
    /// the log, which then takes no more transactions.
    pub(super) fn settle(self: &Arc<Self>) {
        let _ = self.try_settle();
    }

    /// The same.
    ///
    /// # Errors
    /// If the flush fails.
    pub(super) fn try_settle(self: &Arc<Self>) -> Result<(), StoreError> {
        self.catch_up()?;
        if self.has_unflushed() {
            self.log().flush_wait()?;
            self.note_flushed(self.log().flushed_txid());
        }
        Ok(())
    }
}
