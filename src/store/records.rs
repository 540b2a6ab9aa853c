//! What the replication stream reads of a database.

use std::io::Read;

use bytes::Bytes;
use crc_fast::CrcAlgorithm::Crc64GoIso;

use crate::ltx::{Header, Pos};

use super::database::Database;
use super::error::StoreError;

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
#[derive(Clone, Debug)]
pub enum Next {
    /// Nothing: it has everything that is on disk here.
    UpToDate,
    /// This transaction.
    Record(Record),
    /// A snapshot: no transaction here follows its position.
    Snapshot,
}

/// Largest record that is sent as one piece; a larger transaction goes out as a snapshot, which is
/// streamed.
const MAX_RECORD: u64 = 256 << 20;

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
        let Some(mut record) = self.log().read(pos.txid + 1)? else {
            return Ok(Next::Snapshot);
        };
        if record.header.length > MAX_RECORD || record.header.max_txid > here.txid {
            return Ok(Next::Snapshot);
        }
        let mut bytes = Vec::with_capacity(record.header.length as usize);
        record
            .body
            .read_to_end(&mut bytes)
            .map_err(StoreError::io("read log segment", &record.path))?;
        if crc_fast::checksum(Crc64GoIso, &bytes) != record.header.body_crc {
            // The scrub deals with the log; the replica is given what is whole.
            tracing::warn!(
                db = self.name,
                path = %record.path.display(),
                txid = format!("{:016x}", record.header.max_txid),
                "a damaged transaction is not sent: a snapshot takes its place"
            );
            return Ok(Next::Snapshot);
        }
        let head = bytes
            .first_chunk()
            .ok_or_else(|| StoreError::corrupt(&record.path, "a record without an LTX header"))?;
        let header =
            Header::decode(head).map_err(StoreError::ltx(record.path.display().to_string()))?;
        if header.pre_apply_pos() != pos {
            return Ok(Next::Snapshot);
        }
        let tail = bytes.len().saturating_sub(crate::ltx::TRAILER_SIZE);
        let post = bytes[tail..]
            .first_chunk::<8>()
            .map_or(0, |b| u64::from_be_bytes(*b));
        Ok(Next::Record(Record {
            min_txid: record.header.min_txid,
            max_txid: record.header.max_txid,
            post_apply_checksum: post,
            bytes: bytes.into(),
        }))
    }

    /// Whether the log shows that this position is in the database's past.
    pub fn log_follows(&self, pos: Pos) -> Result<bool, StoreError> {
        let Some(mut record) = self.log().read(pos.txid + 1)? else {
            return Ok(false);
        };
        let mut head = [0u8; crate::ltx::HEADER_SIZE];
        record
            .body
            .read_exact(&mut head)
            .map_err(StoreError::io("read log segment", &record.path))?;
        let header =
            Header::decode(&head).map_err(StoreError::ltx(record.path.display().to_string()))?;
        Ok(header.pre_apply_pos() == pos)
    }

    /// Flushes what is applied, so that [`Database::pos`] is all there is. A failure is logged by
    /// the log, which then takes no more transactions.
    pub(super) fn settle(&self) {
        let _ = self.try_settle();
    }

    /// The same.
    ///
    /// # Errors
    /// If the flush fails.
    pub(super) fn try_settle(&self) -> Result<(), StoreError> {
        if self.has_unflushed() {
            self.log().flush_wait()?;
            self.note_flushed(self.log().flushed_txid());
        }
        Ok(())
    }
}
