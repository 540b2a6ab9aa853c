//! What others ask of the role loop.
//!
//! Only a primary is asked for anything; whether it is one is looked at first, and an answer comes
//! within [`TIMEOUT`].

use std::time::Duration;

use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::time::timeout;

use super::Status;

/// How long a primary may take to do what it was asked.
const TIMEOUT: Duration = Duration::from_secs(15);

/// A wish, and where its answer goes.
#[derive(Debug)]
pub(super) struct Command {
    pub what: What,
    pub done: oneshot::Sender<Result<(), CommandError>>,
}

/// What is wished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// Hand the lease over to the connected replica of this node ID.
    Handoff(u64),
    /// Give the lease up, and leave it to others for a while (`lease.demote-delay`).
    Demote,
}

/// Why it was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// The node is not primary.
    #[error("this node is not the primary")]
    NotPrimary,
    /// It could not be done, and everything is as it was.
    #[error("{0}")]
    Failed(String),
    /// Nobody knows.
    #[error("the node did not answer within {} s", TIMEOUT.as_secs())]
    Timeout,
}

/// The way to the role loop.
#[derive(Debug, Clone)]
pub struct Commands {
    queue: mpsc::Sender<Command>,
    status: watch::Receiver<Status>,
}

/// The loop's end of it.
#[derive(Debug)]
pub struct CommandQueue(Mutex<mpsc::Receiver<Command>>);

/// A way to a role loop whose status is `status`.
pub fn commands(status: watch::Receiver<Status>) -> (Commands, CommandQueue) {
    let (queue, commands) = mpsc::channel(4);
    (
        Commands { queue, status },
        CommandQueue(Mutex::new(commands)),
    )
}

impl Commands {
    /// Hands the lease over to a connected replica, which has everything by then.
    pub async fn hand_over(&self, node_id: u64) -> Result<(), CommandError> {
        self.ask(What::Handoff(node_id)).await
    }

    /// Gives the lease up, and leaves it to others for a while.
    pub async fn demote(&self) -> Result<(), CommandError> {
        self.ask(What::Demote).await
    }

    async fn ask(&self, what: What) -> Result<(), CommandError> {
        if !self.status.borrow().is_primary {
            return Err(CommandError::NotPrimary);
        }
        let (done, answer) = oneshot::channel();
        let asked = async {
            // The loop is gone only when the node stops.
            if self.queue.send(Command { what, done }).await.is_err() {
                return Err(CommandError::NotPrimary);
            }
            answer.await.unwrap_or(Err(CommandError::NotPrimary))
        };
        timeout(TIMEOUT, asked)
            .await
            .unwrap_or(Err(CommandError::Timeout))
    }
}

impl CommandQueue {
    pub(super) async fn next(&self) -> Command {
        match self.0.lock().await.recv().await {
            Some(command) => command,
            // Nobody can ask any more.
            None => std::future::pending().await,
        }
    }

    /// Answers those who asked when it was too late.
    pub(super) fn refuse_all(&mut self) {
        while let Ok(command) = self.0.get_mut().try_recv() {
            let _ = command.done.send(Err(CommandError::NotPrimary));
        }
    }
}
