//! Looking at a backup for damage, so that it is found before it is needed.
//!
//! It reads all of it, at the rate of the node's own scrub, on a thread of its own, while this node
//! is primary. What it finds it only notes: the backup's one writer then begins a new chain.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::sleep;
use tracing::{error, warn};

use crate::role::Status;
use crate::store::{ScrubOptions, Store};

use super::BackupClient;

/// The first look comes so long after the start, or after the interval if that is shorter.
const FIRST_DELAY: Duration = Duration::from_secs(60);

/// Databases whose backups are damaged.
#[derive(Default)]
pub(super) struct Damaged {
    /// With what is wrong.
    names: Mutex<BTreeMap<String, String>>,
    pub noticed: Notify,
}

impl Damaged {
    /// All that were found since the last time.
    pub fn take(&self) -> BTreeMap<String, String> {
        std::mem::take(&mut *self.names.lock())
    }

    /// Notes one.
    pub fn note(&self, db: String, what: String) {
        self.names.lock().insert(db, what);
    }
}

/// Looks at the backup again and again, until `shutdown` becomes true.
pub(super) async fn run(
    store: Arc<Store>,
    client: Arc<dyn BackupClient>,
    options: ScrubOptions,
    status: watch::Receiver<Status>,
    mut shutdown: watch::Receiver<bool>,
    damaged: Arc<Damaged>,
) {
    let mut wait = options.interval.min(FIRST_DELAY);
    loop {
        tokio::select! {
            () = sleep(wait) => {}
            _ = shutdown.wait_for(|stop| *stop) => return,
        }
        wait = options.interval;
        let look = Look {
            store: store.clone(),
            client: client.clone(),
            rate: options.rate,
            status: status.clone(),
            shutdown: shutdown.clone(),
            damaged: damaged.clone(),
        };
        if tokio::task::spawn_blocking(move || look.at_all())
            .await
            .is_err()
        {
            error!("the thread that looks at the backup panicked");
        }
    }
}

struct Look {
    store: Arc<Store>,
    client: Arc<dyn BackupClient>,
    rate: u64,
    status: watch::Receiver<Status>,
    shutdown: watch::Receiver<bool>,
    damaged: Arc<Damaged>,
}

impl Look {
    fn goes_on(&self) -> bool {
        self.status.borrow().is_primary && !*self.shutdown.borrow()
    }

    fn at_all(&self) {
        let ours = || {
            self.client
                .cluster_id()
                .is_ok_and(|id| id == self.store.cluster_id())
        };
        if !self.goes_on() || !ours() {
            return;
        }
        let mut due = Instant::now();
        let mut paced = |bytes: u64| {
            let now = Instant::now();
            due = due.max(now) + Duration::from_secs_f64(bytes as f64 / self.rate as f64);
            std::thread::sleep(due - now);
            self.goes_on()
        };
        for name in self.store.names() {
            if !self.goes_on() {
                return;
            }
            match self.client.verify(&name, &mut paced) {
                Ok(()) => {}
                Err(e) if e.is_damage() => {
                    self.damaged.note(name, e.to_string());
                    self.damaged.noticed.notify_one();
                }
                Err(e) => warn!(db = name, error = %e, "the backup cannot be looked at"),
            }
        }
    }
}
