//! What all parts of a simulation share: the seed's random numbers, the trace, and what was found.

use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::Instant;

/// Lines of the trace that a report shows.
const SHOWN: usize = 120;

/// See the module.
pub(crate) struct World {
    began: Instant,
    inner: Mutex<Inner>,
}

struct Inner {
    rng: StdRng,
    hash: DefaultHasher,
    lines: std::collections::VecDeque<String>,
    keep: usize,
    violation: Option<String>,
    ended: bool,
}

impl World {
    /// A world of this seed. With `TENURE_SIM_TRACE` in the environment reports show everything.
    pub fn new(seed: u64) -> Arc<World> {
        let keep = match std::env::var_os("TENURE_SIM_TRACE") {
            Some(_) => usize::MAX,
            None => SHOWN,
        };
        Arc::new(World {
            began: Instant::now(),
            inner: Mutex::new(Inner {
                rng: StdRng::seed_from_u64(seed),
                hash: DefaultHasher::new(),
                lines: Default::default(),
                keep,
                violation: None,
                ended: false,
            }),
        })
    }

    /// Time since the beginning.
    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Writes a line into the trace. It must say the same whenever the seed is the same.
    pub fn note(&self, line: impl AsRef<str>) {
        let now = self.now();
        let mut inner = self.inner.lock();
        let line = format!("{:9.3} {}", now.as_secs_f64(), line.as_ref());
        inner.hash.write(line.as_bytes());
        if inner.lines.len() >= inner.keep {
            inner.lines.pop_front();
        }
        inner.lines.push_back(line);
    }

    /// Notes that a promise was broken; the first one counts.
    pub fn violate(&self, text: impl AsRef<str>) {
        self.note(format!("VIOLATION: {}", text.as_ref()));
        let mut inner = self.inner.lock();
        inner.violation.get_or_insert(text.as_ref().to_owned());
    }

    /// The first promise that was broken.
    pub fn violation(&self) -> Option<String> {
        self.inner.lock().violation.clone()
    }

    /// Faults and clients end.
    pub fn end(&self) {
        self.inner.lock().ended = true;
    }

    /// Whether faults and clients are to end.
    pub fn has_ended(&self) -> bool {
        let inner = self.inner.lock();
        inner.ended || inner.violation.is_some()
    }

    /// The trace's hash.
    pub fn hash(&self) -> u64 {
        self.inner.lock().hash.finish()
    }

    /// The end of the trace.
    pub fn trace(&self) -> String {
        let inner = self.inner.lock();
        inner
            .lines
            .iter()
            .fold(String::new(), |all, line| all + line + "\n")
    }

    /// A number in this range.
    pub fn range(&self, range: std::ops::Range<u64>) -> u64 {
        self.inner.lock().rng.random_range(range)
    }

    /// Whether something happens that does once in `n` times.
    pub fn one_in(&self, n: u64) -> bool {
        self.range(0..n) == 0
    }

    /// A time in this range of milliseconds.
    pub fn ms(&self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.range(range))
    }
}
