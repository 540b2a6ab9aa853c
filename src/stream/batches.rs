//! What the log holds for replicas, read once for all that are at the same position.
//!
//! When a transaction is committed, every stream needs the same bytes at the same moment. The first
//! to ask reads them, on a thread for such work; those who ask meanwhile wait for it, without a
//! thread, and get what it read.
//!
//! Invariant: what was read is given out only while the log has it where it was read. A log that
//! another one has replaced has it nowhere.
//!
//! Bounds: one batch is kept for those who come a little later, whatever database it is of; any other
//! lives as long as a stream sends it.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::Mutex as Turn;

use crate::ltx::Pos;
use crate::store::{Database, LargeRecord, LogPlace, Next, Record, StoreError};
use crate::task;

/// How many bytes of records are fetched from the log at once; a larger one comes alone.
const BATCH_BYTES: usize = 256 << 10;

/// How many records are fetched from the log at once.
const BATCH_RECORDS: usize = 256;

/// What the log holds for a replica.
pub(super) enum Batch {
    UpToDate,
    Records(Arc<Records>),
    Large(LargeRecord),
    Snapshot,
}

/// Records that follow a position.
#[derive(Debug)]
pub(super) struct Records {
    from: Pos,
    /// Where the log had the first of them.
    place: LogPlace,
    plain: bool,
    pub records: Vec<Record>,
}

/// What was read last of one database; locked while it is read.
type Last = Arc<Turn<Weak<Records>>>;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Batches {
    databases: Mutex<BTreeMap<String, Last>>,
    newest: Mutex<Option<Arc<Records>>>,
}

impl Batches {
    /// The records of `db` that follow `from`, as many as make a good batch; `plain`: their pages
    /// without LZ4. `None`: the thread that read them died.
    pub async fn after(
        &self,
        db: &Arc<Database>,
        from: Pos,
        plain: bool,
    ) -> Option<Result<Batch, StoreError>> {
        let last = self.last(db.name());
        let mut last = last.lock().await;
        let fits = |r: &Arc<Records>| {
            r.from == from
                && r.plain == plain
                && db.log_place(from.txid.saturating_add(1)) == Some(r.place)
        };
        if let Some(records) = last.upgrade().filter(fits) {
            return Some(Ok(Batch::Records(records)));
        }
        let reader = Arc::clone(db);
        let read = task::blocking(move || read(&reader, from, plain)).await;
        let batch = read.ok()?;
        if let Ok(Batch::Records(records)) = &batch {
            *last = Arc::downgrade(records);
            *self.newest.lock() = Some(Arc::clone(records));
        }
        Some(batch)
    }

    fn last(&self, name: &str) -> Last {
        let mut databases = self.databases.lock();
        match databases.get(name) {
            Some(last) => Arc::clone(last),
            None => Arc::clone(databases.entry(name.to_owned()).or_default()),
        }
    }
}

/// Blocks on the disk.
fn read(db: &Database, from: Pos, plain: bool) -> Result<Batch, StoreError> {
    let place = db.log_place(from.txid.saturating_add(1));
    let (mut records, mut bytes, mut at) = (Vec::new(), 0, from);
    while bytes < BATCH_BYTES && records.len() < BATCH_RECORDS {
        match db.record_after(at)? {
            Next::Record(mut record) => {
                if plain {
                    record.bytes = db.without_lz4(record.bytes)?;
                }
                bytes += record.bytes.len();
                at = Pos {
                    txid: record.max_txid,
                    checksum: record.post_apply_checksum,
                };
                records.push(record);
            }
            Next::UpToDate if records.is_empty() => return Ok(Batch::UpToDate),
            Next::Snapshot if records.is_empty() => return Ok(Batch::Snapshot),
            Next::Large(record) if records.is_empty() => return Ok(Batch::Large(record)),
            Next::UpToDate | Next::Snapshot | Next::Large(_) => break,
        }
    }
    // Without a place it was removed, or another took its place, while it was read.
    let place = place.unwrap_or_default();
    Ok(Batch::Records(Arc::new(Records {
        from,
        place,
        plain,
        records,
    })))
}
