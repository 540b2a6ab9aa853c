//! A backup that is waited for, but not for ever: a network file system that is gone lets whoever
//! asks it stand.
//!
//! A thread that hangs in a call cannot be ended. It is given up: should the call return one day, it
//! is an error then, so that nothing is done any more that nobody waits for.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::ltx::Pos;

use super::{BackupClient, BackupError, Batch};

/// How long a backup may show no sign of life while it is asked.
pub(super) const ANSWER: Duration = Duration::from_secs(10);
/// How often it is looked for one.
const LOOK: Duration = Duration::from_millis(100);

/// A backup, and when it last showed a sign of life.
pub(super) struct Patient {
    client: Arc<dyn BackupClient>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// A call is under way, and was seen to get on at this time.
    asked: Option<Instant>,
    given_up: bool,
}

impl Patient {
    pub fn new(client: Arc<dyn BackupClient>) -> Patient {
        Patient {
            client,
            state: Mutex::default(),
        }
    }

    /// Returns once the backup has hung for [`ANSWER`]; it is given up then.
    pub async fn hangs(&self) -> BackupError {
        loop {
            tokio::time::sleep(LOOK).await;
            let mut state = self.state.lock();
            if state.asked.is_some_and(|at| at.elapsed() >= ANSWER) {
                state.given_up = true;
                return self.error();
            }
        }
    }

    fn error(&self) -> BackupError {
        BackupError::Hangs {
            place: self.client.place(),
            seconds: ANSWER.as_secs(),
        }
    }

    fn ask<T>(
        &self,
        call: impl FnOnce(&dyn BackupClient) -> Result<T, BackupError>,
    ) -> Result<T, BackupError> {
        {
            let mut state = self.state.lock();
            if state.given_up {
                return Err(self.error());
            }
            state.asked = Some(Instant::now());
        }
        let answer = call(&*self.client);
        let mut state = self.state.lock();
        state.asked = None;
        if state.given_up {
            return Err(self.error());
        }
        answer
    }
}

/// What is written to it is a sign of life.
struct Signs<'a> {
    patient: &'a Patient,
    out: &'a mut dyn Write,
}

impl Write for Signs<'_> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        let n = self.out.write(buf)?;
        self.patient.state.lock().asked = Some(Instant::now());
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

impl BackupClient for Patient {
    fn place(&self) -> String {
        self.client.place()
    }

    fn cluster_id(&self) -> Result<Option<String>, BackupError> {
        self.ask(|c| c.cluster_id())
    }

    fn set_cluster_id(&self, id: &str) -> Result<(), BackupError> {
        self.ask(|c| c.set_cluster_id(id))
    }

    fn positions(&self) -> Result<BTreeMap<String, Pos>, BackupError> {
        self.ask(|c| c.positions())
    }

    fn contains(&self, db: &str, pos: Pos) -> Result<bool, BackupError> {
        self.ask(|c| c.contains(db, pos))
    }

    fn write(&self, db: &str, batch: &mut Batch) -> Result<(), BackupError> {
        self.ask(|c| c.write(db, batch))
    }

    fn verify(&self, db: &str, read: &mut dyn FnMut(u64) -> bool) -> Result<(), BackupError> {
        self.ask(|c| c.verify(db, read))
    }

    fn fetch_snapshot(&self, db: &str, out: &mut dyn Write) -> Result<Pos, BackupError> {
        self.ask(|c| c.fetch_snapshot(db, &mut Signs { patient: self, out }))
    }
}
