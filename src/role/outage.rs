//! What an operator hears of a primary that cannot be reached: when it begins, once a minute while it
//! lasts, when it is over. And how long to wait between attempts.

use std::time::{Duration, Instant};

use tenure_lease::PrimaryInfo;
use tracing::{debug, info, warn};

use crate::clock;
use crate::stream::receiver::StreamError;

/// At most one line in this time about one lasting trouble.
const QUIET: Duration = Duration::from_secs(60);

fn since_then(at: Instant) -> Duration {
    clock::now().duration_since(at)
}

/// The state of the way to the primary.
pub(super) struct Outage {
    /// The first and the longest wait between attempts.
    delays: (Duration, Duration),
    /// When the first attempt failed, and the wait after the last one.
    on: Option<(Instant, Duration)>,
    /// When something was last logged about it.
    logged: Option<Instant>,
    /// The primary that was announced as followed.
    following: Option<PrimaryInfo>,
}

impl Outage {
    /// Waits `first` after the first failure, twice as long after each further one, up to `longest`.
    pub(super) fn new(first: Duration, longest: Duration) -> Self {
        let first = first.max(Duration::from_millis(10));
        Outage {
            delays: (first, longest.max(first)),
            on: None,
            logged: None,
            following: None,
        }
    }

    /// Whether the last attempt failed.
    pub(super) fn is_on(&self) -> bool {
        self.on.is_some()
    }

    /// Notes a failure and gives the time to wait.
    pub(super) fn failed(&mut self, primary: &PrimaryInfo, error: &StreamError) -> Duration {
        let (first, longest) = self.delays;
        let (since, delay) = match self.on {
            None => (clock::now(), first),
            Some((since, delay)) => (since, (delay * 2).min(longest)),
        };
        self.on = Some((since, delay));
        if self.logged.is_none_or(|at| since_then(at) >= QUIET) {
            self.logged = Some(clock::now());
            warn!(primary = primary.hostname, %error, "not replicating; trying again until it works");
        } else {
            debug!(primary = primary.hostname, %error, "not replicating");
        }
        delay
    }

    /// Notes that this node is in step with the primary.
    pub(super) fn over(&mut self, primary: &PrimaryInfo) {
        if let Some((since, _)) = self.on.take() {
            // A trouble that comes back within the minute stays as quiet as one that lasts.
            if self.logged.is_some_and(|at| at >= since) {
                let seconds = since_then(since).as_secs();
                info!(primary = primary.hostname, seconds, "replicating again");
                self.following = Some(primary.clone());
            }
        }
        if self.following.as_ref() != Some(primary) {
            info!(
                primary = primary.hostname,
                url = primary.advertise_url,
                "replicating"
            );
            self.following = Some(primary.clone());
        }
    }

    /// Forgets everything: this node follows nobody.
    pub(super) fn forget(&mut self) {
        (self.on, self.logged, self.following) = (None, None, None);
    }
}

/// How many troubles are told of within [`QUIET`].
const TROUBLES: usize = 8;

/// Trouble that is told of once a minute, however often it turns up, by itself or by turns with other
/// trouble.
#[derive(Default)]
pub(super) struct Complaint(Vec<(String, Instant)>);

impl Complaint {
    /// Whether trouble of this kind is to be logged now. A minute has at most [`TROUBLES`] kinds.
    pub(super) fn is_due(&mut self, kind: &str) -> bool {
        self.0.retain(|(_, at)| since_then(*at) < QUIET);
        let due = self.0.len() < TROUBLES && self.0.iter().all(|(said, _)| said != kind);
        if due {
            self.0.push((kind.to_owned(), clock::now()));
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_bound_and_begin_anew() {
        let primary = PrimaryInfo {
            hostname: "p".into(),
            advertise_url: "http://p".into(),
        };
        let mut outage = Outage::new(Duration::from_secs(1), Duration::from_secs(5));
        let waits: Vec<u64> = (0..5)
            .map(|_| outage.failed(&primary, &StreamError::Idle).as_secs())
            .collect();
        assert_eq!(waits, [1, 2, 4, 5, 5]);
        assert!(outage.is_on());
        outage.over(&primary);
        assert!(!outage.is_on());
        assert_eq!(outage.failed(&primary, &StreamError::Idle).as_secs(), 1);
    }

    #[test]
    fn a_complaint_is_not_repeated() {
        let mut complaint = Complaint::default();
        assert!(complaint.is_due("a"));
        assert!(!complaint.is_due("a"));
        assert!(complaint.is_due("b"));
        assert!(!complaint.is_due("a"), "not by turns either");
        let more = (0..100).filter(|i| complaint.is_due(&i.to_string()));
        assert_eq!(more.count(), TROUBLES - 2);
    }
}
