//! Whose turn it is when there is no primary, so that the one that takes over has the most data.
//!
//! Candidates make themselves known through the lease service, each with its placement: the number
//! of the last primary whose history it has, and how many transactions. While a candidate follows a
//! primary its entry is not settled: its data grows. Once the primary is gone it says its last word,
//! looks at the others, and leaves the lease to one that is better placed, or that has not said its
//! last word yet, for a bounded time ([`BETTER_WAIT`], [`UNSETTLED_WAIT`]): one that is dead must not
//! keep the cluster without a primary. A primary makes no entry; it writes down how far it is
//! ([`tenure_lease::Lease::record`]), which tells a node that lacks something even when nobody else
//! is there, and keeps one without any data from ever being primary of a cluster that has some.
//!
//! All of this is advice for the better: that there is one primary at a time is the lease's doing
//! alone, and what a worse choice would replace is set aside by the store.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tenure_lease::{Candidate, LeaseError, Leaser, Placement};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{debug, info};

use crate::clock;
use crate::store::Store;
use crate::stream::format_node_id;
use crate::task;

use super::bounded;

/// How long a better placed candidate, or the return of what the last primary had, is waited for.
const BETTER_WAIT: Duration = Duration::from_secs(2);

/// How long a candidate that has not yet said its last word is waited for.
const UNSETTLED_WAIT: Duration = Duration::from_secs(1);

/// How long to wait before the others are looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How long after a failure a candidate is announced again.
const RETRY: Duration = Duration::from_secs(1);

/// What this candidate says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It follows a primary.
    Following,
    /// It follows nobody.
    Settled,
    /// It is primary, and says nothing.
    Primary,
}

/// What a candidate is to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Acquire the lease.
    Mine,
    /// Look again after this time.
    Wait(Duration),
    /// Wait for another to become primary.
    Never,
}

/// A candidate's part in elections.
pub(super) struct Election {
    store: Arc<Store>,
    leaser: Arc<dyn Leaser>,
    standing: watch::Sender<Standing>,
    /// Since when this node knows of no primary.
    vacant_since: Option<Instant>,
}

/// How far this node's data reaches. Whoever asks does not wait for the disk on the runtime's thread:
/// a primary's lease must be renewed meanwhile.
pub(super) async fn placement(store: &Arc<Store>) -> Placement {
    let asked = store.clone();
    let counted = task::blocking(move || Placement {
        epoch: asked.epoch(),
        transactions: asked.transactions(),
    });
    // It fails only if it panicked, and then nothing is known of the data.
    counted.await.unwrap_or_default()
}

async fn entry(store: &Arc<Store>, hostname: &str, settled: bool) -> Candidate {
    Candidate {
        node_id: format_node_id(store.node_id()),
        hostname: hostname.to_owned(),
        placement: placement(store).await,
        settled,
    }
}

impl Election {
    /// Takes part for as long as it lives, if this node is a candidate.
    pub fn new(store: Arc<Store>, leaser: Arc<dyn Leaser>, candidate: bool) -> Election {
        let standing = watch::Sender::new(Standing::Settled);
        if candidate {
            let announcer = announce(store.clone(), leaser.clone(), standing.subscribe());
            task::spawn(announcer);
        }
        Election {
            store,
            leaser,
            standing,
            vacant_since: None,
        }
    }

    /// There is a primary, and this node is or follows it.
    pub fn over(&mut self, standing: Standing) {
        self.vacant_since = None;
        self.standing.send_if_modified(|s| {
            let changed = *s != standing;
            *s = standing;
            changed
        });
    }

    /// There is no primary: is it this node's turn?
    pub async fn turn(&mut self) -> Result<Turn, LeaseError> {
        let since = *self.vacant_since.get_or_insert_with(clock::now);
        self.standing.send_replace(Standing::Settled);
        let own = entry(&self.store, self.leaser.hostname(), true).await;
        if bounded(self.leaser.announce(&own)).await?.is_none() {
            return Ok(Turn::Mine);
        }
        let candidates = bounded(self.leaser.candidates()).await?;
        let recorded = bounded(self.leaser.recorded()).await?.unwrap_or_default();
        let others = candidates.iter().filter(|c| c.node_id != own.node_id);
        let turn = decide(
            own.placement,
            others,
            recorded,
            clock::now().duration_since(since),
        );
        match turn {
            Turn::Mine => {
                info!(placement = ?own.placement, ?recorded, others = candidates.len().saturating_sub(1), "no primary: this node takes its turn")
            }
            _ => debug!(placement = ?own.placement, ?recorded, ?candidates, ?turn, "no primary"),
        }
        Ok(turn)
    }
}

fn decide<'a>(
    own: Placement,
    others: impl Iterator<Item = &'a Candidate> + Clone,
    recorded: Placement,
    waited: Duration,
) -> Turn {
    let any_data =
        recorded.transactions > 0 || others.clone().any(|c| c.placement.transactions > 0);
    if own.transactions == 0 && any_data {
        return Turn::Never;
    }
    let better = recorded > own || others.clone().any(|c| c.settled && c.placement > own);
    let unsettled = others.clone().any(|c| !c.settled);
    if (better && waited < BETTER_WAIT) || (unsettled && waited < UNSETTLED_WAIT) {
        return Turn::Wait(LOOK_AGAIN);
    }
    Turn::Mine
}

/// Keeps a candidate known, until the service needs none or the election is gone.
async fn announce(
    store: Arc<Store>,
    leaser: Arc<dyn Leaser>,
    mut standing: watch::Receiver<Standing>,
) {
    loop {
        let now = *standing.borrow_and_update();
        let again = match now {
            Standing::Primary => Duration::MAX,
            _ => {
                let entry = entry(&store, leaser.hostname(), now == Standing::Settled).await;
                match bounded(leaser.announce(&entry)).await {
                    Ok(Some(lasts)) => lasts / 3,
                    Ok(None) => return,
                    Err(error) => {
                        debug!(%error, "this candidate could not be announced");
                        RETRY
                    }
                }
            }
        };
        tokio::select! {
            biased;
            changed = standing.changed() => if changed.is_err() {
                return;
            },
            () = sleep(again) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(epoch: u64, transactions: u64, settled: bool) -> Candidate {
        Candidate {
            node_id: String::new(),
            hostname: String::new(),
            placement: at(epoch, transactions),
            settled,
        }
    }

    fn at(epoch: u64, transactions: u64) -> Placement {
        Placement {
            epoch,
            transactions,
        }
    }

    fn turn(own: Placement, others: &[Candidate], recorded: Placement, ms: u64) -> Turn {
        decide(own, others.iter(), recorded, Duration::from_millis(ms))
    }

    #[test]
    fn the_better_placed_goes_first_for_a_bounded_time() {
        let wait = Turn::Wait(LOOK_AGAIN);
        let worse = candidate(3, 10, true);
        assert_eq!(turn(at(3, 10), &[], at(0, 0), 0), Turn::Mine);
        assert_eq!(
            turn(at(3, 10), std::slice::from_ref(&worse), at(3, 10), 0),
            Turn::Mine
        );
        for better in [candidate(3, 11, true), candidate(4, 1, true)] {
            let others = [worse.clone(), better];
            assert_eq!(turn(at(3, 10), &others, at(0, 0), 0), wait);
            assert_eq!(turn(at(3, 10), &others, at(0, 0), 2_000), Turn::Mine);
        }
        // One that may have more than it has said.
        let unsettled = [candidate(3, 1, false)];
        assert_eq!(turn(at(3, 10), &unsettled, at(0, 0), 999), wait);
        assert_eq!(turn(at(3, 10), &unsettled, at(0, 0), 1_000), Turn::Mine);
        // The last primary had more.
        assert_eq!(turn(at(3, 10), &[], at(3, 11), 0), wait);
        assert_eq!(turn(at(3, 10), &[], at(3, 11), 2_000), Turn::Mine);
    }

    #[test]
    fn a_node_without_data_is_never_primary_where_there_is_some() {
        let day = 86_400_000;
        assert_eq!(turn(at(0, 0), &[], at(1, 1), day), Turn::Never);
        assert_eq!(
            turn(at(9, 0), &[candidate(1, 1, false)], at(0, 0), day),
            Turn::Never
        );
        assert_eq!(
            turn(at(0, 0), &[candidate(5, 0, true)], at(0, 0), day),
            Turn::Mine
        );
    }
}
