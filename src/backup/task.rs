//! The primary's side of a backup: what is sent and what is restored, and when.
//!
//! A round looks at the databases that changed, at most once a second. In between nothing runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, BufWriter, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::{error, info, warn};

use crate::ltx::{self, Pos};
use crate::role::Status;
use crate::store::{Common, Database, Next, Record, ScrubOptions, Store};

use super::check::{self, Damaged};
use super::patience::Patient;
use super::{BackupClient, BackupError, Batch};

/// Transactions are gathered for so long.
const BATCH_TIME: Duration = Duration::from_secs(1);
/// How many bytes of records are gathered for one file; a larger one goes alone.
const BATCH_BYTES: usize = 64 << 20;
/// The largest transaction that is held in memory, in bytes.
const MAX_RECORD: u64 = 256 << 20;
/// How many records are merged at once.
const BATCH_RECORDS: usize = 256;
/// Wait after the first failure; doubled with each further one.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// Longest wait after a failure.
const LAST_RETRY: Duration = Duration::from_secs(60);
/// How often a failure is logged.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);
/// What takes longer is said to take long, as often.
const SLOW: Duration = Duration::from_secs(60);
/// How long a node that stops gives the last transactions.
const LAST_ROUND: Duration = Duration::from_secs(3);
/// How long a node that stops is waited for to take no more writes.
const STEP_DOWN: Duration = Duration::from_secs(2);

/// Brings a node that starts, and may not write yet, up to the backup: an empty one joins the
/// backup's cluster; databases that it lacks, or of which the backup has what follows, are
/// restored.
///
/// # Errors
/// If this node is empty and the backup cannot be read, or does not answer: it would begin another history. A node that
/// has databases starts without its backup.
pub async fn restore_at_start(
    store: Arc<Store>,
    client: Arc<dyn BackupClient>,
) -> Result<(), BackupError> {
    let empty = store.names().is_empty();
    let patient = Arc::new(Patient::new(client));
    let asked = patient.clone();
    let restored = tokio::task::spawn_blocking(move || restore_all(&store, &*asked));
    let restored = tokio::select! {
        done = restored => done.unwrap_or_else(|e| {
            Err(BackupError::io("restore", ".")(std::io::Error::other(e)))
        }),
        hangs = patient.hangs() => Err(hangs),
    };
    match restored {
        Err(error) if !empty => {
            error!(%error, "the backup cannot be read: nothing is restored from it");
            Ok(())
        }
        done => done,
    }
}

fn restore_all(store: &Store, client: &dyn BackupClient) -> Result<(), BackupError> {
    let Some(backup_id) = client.cluster_id()? else {
        return Ok(());
    };
    match store.cluster_id() {
        Some(id) if id == backup_id => {}
        None if store.names().is_empty() => store.set_cluster_id(&backup_id)?,
        here => {
            let here = here.unwrap_or_else(|| "none".to_owned());
            let error = BackupError::Cluster {
                backup: backup_id,
                here,
            };
            error!(%error, "nothing is restored");
            return Ok(());
        }
    }
    let here = store.positions();
    for (name, backup) in client.positions()? {
        let at = here.get(&name).copied().unwrap_or_default();
        if backup.txid <= at.txid || store.database(&name).is_some_and(|d| d.broken().is_some()) {
            continue;
        }
        if !at.is_zero() && !client.contains(&name, at)? {
            let error = BackupError::Diverged {
                db: name,
                here: at,
                backup,
            };
            error!(%error, "not restored");
            continue;
        }
        let mut file = fetch(store, client, &name)?;
        // What this node has is in the backup's past: nothing of it is lost.
        let mut shared = |_: &str, history: &[Pos]| {
            history
                .first()
                .map_or(Common::Nothing, |here| Common::At(*here))
        };
        store.receive(&name, &mut file, &mut shared)?;
        info!(db = name, pos = %backup, "restored from the backup");
    }
    Ok(())
}

/// The backup's snapshot, read and checked, in a file of the data directory.
fn fetch(
    store: &Store,
    client: &dyn BackupClient,
    name: &str,
) -> Result<BufReader<File>, BackupError> {
    let file = store.spool_file()?;
    let spooled = |e| BackupError::io("spool the backup of", name)(e);
    let mut out = BufWriter::new(&file);
    client.fetch_snapshot(name, &mut out)?;
    out.flush().map_err(spooled)?;
    drop(out);
    let mut file = file;
    file.seek(SeekFrom::Start(0)).map_err(spooled)?;
    Ok(BufReader::new(file))
}

/// Keeps the backup up to date while this node is primary, until `shutdown` becomes true; then
/// sends what is left.
///
/// `look`: how often and fast it is looked at for damage, if at all.
pub async fn run(
    store: Arc<Store>,
    client: Arc<dyn BackupClient>,
    look: Option<ScrubOptions>,
    mut status: watch::Receiver<Status>,
    mut shutdown: watch::Receiver<bool>,
) {
    let damaged = Arc::new(Damaged::default());
    if let Some(options) = look {
        tokio::spawn(check::run(
            store.clone(),
            client.clone(),
            options,
            status.clone(),
            shutdown.clone(),
            damaged.clone(),
        ));
    }
    loop {
        tokio::select! {
            r = status.wait_for(|s| s.is_primary) => if r.is_err() { return },
            _ = shutdown.wait_for(|stop| *stop) => return,
        }
        let session = Session {
            store: store.clone(),
            client: client.clone(),
            damaged: damaged.clone(),
            have: None,
        };
        if session.run(status.clone(), &mut shutdown).await {
            return;
        }
    }
}

/// One time of being primary.
struct Session {
    store: Arc<Store>,
    client: Arc<dyn BackupClient>,
    damaged: Arc<Damaged>,
    /// Where the backup is; unknown at first, and after a failure.
    have: Option<BTreeMap<String, Pos>>,
}

/// What a round left undone.
struct Undone {
    databases: BTreeSet<String>,
    error: BackupError,
}

impl Session {
    /// True if the node stops.
    async fn run(
        mut self,
        mut status: watch::Receiver<Status>,
        shutdown: &mut watch::Receiver<bool>,
    ) -> bool {
        let mut changes = self.store.subscribe();
        let mut complaint = Complaint::default();
        let mut retry = FIRST_RETRY;
        // `None`: all of them.
        let mut due: Option<BTreeSet<String>> = None;
        loop {
            let (session, undone) = self.round_off_thread(due).await;
            self = session;
            let wait = match undone {
                None => {
                    complaint.is_over();
                    retry = FIRST_RETRY;
                    due = Some(BTreeSet::new());
                    None
                }
                Some(undone) => {
                    complaint.raise(&undone.error);
                    due = (!undone.databases.is_empty()).then_some(undone.databases);
                    let wait = retry;
                    retry = (retry * 2).min(LAST_RETRY);
                    Some(wait)
                }
            };
            let again = async {
                match wait {
                    Some(wait) => sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            let pause = tokio::select! {
                () = again => Duration::ZERO,
                () = self.damaged.noticed.notified() => Duration::ZERO,
                names = changes.changed() => {
                    if let Some(due) = &mut due {
                        due.extend(names);
                    }
                    // What fails is tried again in its own time, and the rest with it.
                    wait.unwrap_or(BATCH_TIME).max(BATCH_TIME)
                }
                _ = shutdown.wait_for(|stop| *stop) => Duration::ZERO,
                _ = status.wait_for(|s| !s.is_primary) => Duration::ZERO,
            };
            tokio::select! {
                () = sleep(pause) => {}
                _ = shutdown.wait_for(|stop| *stop) => {}
                _ = status.wait_for(|s| !s.is_primary) => {}
            }
            if *shutdown.borrow() {
                self.last_round(status).await;
                return true;
            }
            if !status.borrow().is_primary {
                return false;
            }
        }
    }

    /// The node stops: what it committed to the end is sent too.
    async fn last_round(self, mut status: watch::Receiver<Status>) {
        let stepped_down = status.wait_for(|s| !s.is_primary);
        // A node that does not step down in time ends all the same.
        let _ = timeout(STEP_DOWN, stepped_down).await;
        match timeout(LAST_ROUND, self.round_off_thread(None)).await {
            Ok((_, None)) => {}
            Ok((_, Some(undone))) => {
                error!(error = %undone.error, "the last transactions are not in the backup; the next start sends them")
            }
            Err(_) => error!(
                "the last transactions are not in the backup: it took too long; the next start sends them"
            ),
        }
    }

    async fn round_off_thread(
        mut self,
        due: Option<BTreeSet<String>>,
    ) -> (Session, Option<Undone>) {
        let (store, client, damaged) = (
            self.store.clone(),
            self.client.clone(),
            self.damaged.clone(),
        );
        let mut round = tokio::task::spawn_blocking(move || {
            let undone = self.round(due);
            (self, undone)
        });
        let done = loop {
            match timeout(SLOW, &mut round).await {
                Ok(done) => break done,
                Err(_) => {
                    let place = client.place();
                    warn!(
                        place,
                        "the backup has not taken what it was given for a minute: if it hangs, look at the disk or network that it is on"
                    );
                }
            }
        };
        match done {
            Ok(done) => done,
            Err(e) => {
                let error = BackupError::io("back up", ".")(std::io::Error::other(e));
                let session = Session {
                    store,
                    client,
                    damaged,
                    have: None,
                };
                let undone = Undone {
                    databases: BTreeSet::new(),
                    error,
                };
                (session, Some(undone))
            }
        }
    }

    fn round(&mut self, due: Option<BTreeSet<String>>) -> Option<Undone> {
        let failed = |error| {
            Some(Undone {
                databases: BTreeSet::new(),
                error,
            })
        };
        let (mut have, mut due) = match (self.have.take(), due) {
            (Some(have), Some(due)) => (have, due),
            _ => match self.begin() {
                Ok(have) => {
                    let mut all = self.store.names();
                    all.extend(have.keys().cloned());
                    (have, all)
                }
                Err(e) => return failed(e),
            },
        };
        let damaged = self.damaged.take();
        due.extend(damaged.keys().cloned());
        let mut undone: Option<Undone> = None;
        for name in due {
            let at = have.get(&name).copied().unwrap_or_default();
            let synced = match damaged.get(&name) {
                Some(what) => self.renew(&name, what).inspect_err(|_| {
                    self.damaged.note(name.clone(), what.clone());
                }),
                None => self.sync(&name, at),
            };
            match synced {
                Ok(pos) => {
                    have.insert(name, pos);
                }
                Err(error) => {
                    let undone = undone.get_or_insert(Undone {
                        databases: BTreeSet::new(),
                        error,
                    });
                    undone.databases.insert(name);
                }
            }
        }
        // After a failure it is asked where it is.
        self.have = undone.is_none().then_some(have);
        undone
    }

    /// Makes sure of whose backup it is, and asks where it is.
    fn begin(&self) -> Result<BTreeMap<String, Pos>, BackupError> {
        match (self.client.cluster_id()?, self.store.cluster_id()) {
            (Some(backup), Some(here)) if backup == here => {}
            (None, Some(here)) => self.client.set_cluster_id(&here)?,
            (backup, here) => {
                return Err(BackupError::Cluster {
                    backup: backup.unwrap_or_else(|| "none".to_owned()),
                    here: here.unwrap_or_else(|| "none".to_owned()),
                });
            }
        }
        self.client.positions()
    }

    /// Brings backup and node to one position of a database; that position.
    fn sync(&self, name: &str, mut backup: Pos) -> Result<Pos, BackupError> {
        loop {
            let db = self.store.database(name);
            let here = db.as_ref().map_or(Pos::default(), |d| d.pos());
            if backup == here {
                if let Some(db) = db {
                    db.note_backed_up(here.txid);
                }
                return Ok(here);
            }
            if backup.txid >= here.txid {
                return self.restore(name, here, backup);
            }
            let Some(db) = db else { return Ok(backup) };
            let mut batch = self.batch(&db, backup)?;
            match self.client.write(name, &mut batch) {
                Ok(()) => {}
                Err(e) if e.is_damage() => return self.renew(name, &e.to_string()),
                Err(e) => return Err(e),
            }
            backup = batch.end();
            db.note_backed_up(backup.txid);
        }
    }

    /// Begins a new chain in the place of a damaged one; the position of its snapshot.
    fn renew(&self, name: &str, what: &str) -> Result<Pos, BackupError> {
        let Some(db) = self.store.database(name).filter(|d| !d.pos().is_zero()) else {
            return Ok(Pos::default());
        };
        error!(
            db = name,
            what, "the backup is damaged: a new snapshot takes its place"
        );
        let mut batch = self.snapshot(&db, false)?;
        self.client.write(name, &mut batch)?;
        db.note_backup_damage(what);
        db.note_backed_up(batch.end().txid);
        Ok(batch.end())
    }

    /// A snapshot of now. `continues`: the backup's end is in its past.
    fn snapshot(&self, db: &Arc<Database>, continues: bool) -> Result<Batch, BackupError> {
        let file = self.store.spool_file()?;
        let mut out = BufWriter::with_capacity(1 << 20, &file);
        let pos = db.snapshot()?.write_to(&mut out)?;
        out.flush()
            .map_err(BackupError::io("spool a snapshot of", db.name()))?;
        drop(out);
        Ok(Batch {
            from: Pos::default(),
            continues,
            positions: vec![pos],
            ltx: file,
        })
    }

    fn restore(&self, name: &str, here: Pos, backup: Pos) -> Result<Pos, BackupError> {
        let shared =
            backup.txid > here.txid && (here.is_zero() || self.client.contains(name, here)?);
        if !shared {
            return Err(BackupError::Diverged {
                db: name.to_owned(),
                here,
                backup,
            });
        }
        let mut file = fetch(&self.store, &*self.client, name)?;
        let pos = self.store.restore(name, here, &mut file)?;
        info!(db = name, %pos, "restored from the backup");
        if let Some(db) = self.store.database(name) {
            db.note_backed_up(pos.txid);
        }
        Ok(pos)
    }

    /// What follows the backup's end, as much as makes a good file.
    fn batch(&self, db: &Arc<Database>, backup: Pos) -> Result<Batch, BackupError> {
        let mut records: Vec<Record> = Vec::new();
        let (mut bytes, mut at) = (0, backup);
        let mut positions = Vec::new();
        while bytes < BATCH_BYTES && records.len() < BATCH_RECORDS {
            let record = match db.record_after(at)? {
                Next::Record(record) => record,
                // A larger one goes as a snapshot, which is not held in memory.
                Next::Large(large) if large.size() <= MAX_RECORD => large.load()?,
                _ => break,
            };
            at = Pos {
                txid: record.max_txid,
                checksum: record.post_apply_checksum,
            };
            bytes += record.bytes.len();
            positions.push(at);
            records.push(record);
        }
        if records.is_empty() {
            return self.snapshot(db, backup.is_zero() || db.log_follows(backup)?);
        }
        let file = self.store.spool_file()?;
        let spooled = |e| BackupError::io("spool transactions of", db.name())(e);
        let mut out = BufWriter::with_capacity(1 << 20, &file);
        match &records[..] {
            [one] => out.write_all(&one.bytes).map_err(spooled)?,
            many => {
                let files = many.iter().map(|r| &r.bytes[..]).collect();
                ltx::merge(files, &mut out).map_err(BackupError::ltx(db.name()))?;
            }
        }
        out.flush().map_err(spooled)?;
        drop(out);
        Ok(Batch {
            from: backup,
            continues: true,
            positions,
            ltx: file,
        })
    }
}

/// What an operator is told: at once, then once a minute, and when it is over.
#[derive(Default)]
struct Complaint {
    last: Option<Instant>,
    raised: bool,
}

impl Complaint {
    fn raise(&mut self, error: &BackupError) {
        self.raised = true;
        if self.last.is_none_or(|at| at.elapsed() >= COMPLAIN_EVERY) {
            self.last = Some(Instant::now());
            error!(%error, "the backup fails; it is tried again");
        }
    }

    fn is_over(&mut self) {
        if std::mem::take(&mut self.raised) {
            info!("the backup works again");
        }
    }
}
