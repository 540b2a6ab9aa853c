//! A message that is said once in a while, however often there is cause for it.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// When such a message was said last.
#[derive(Debug)]
pub struct Seldom {
    every: Duration,
    last: Mutex<Option<Instant>>,
}

impl Seldom {
    /// It is said every `every` at most.
    pub const fn new(every: Duration) -> Seldom {
        Seldom {
            every,
            last: Mutex::new(None),
        }
    }

    /// Whether it is to be said now; then it was.
    pub fn due(&self) -> bool {
        let now = Instant::now();
        let mut last = self.last.lock();
        let due = last.is_none_or(|last| now.duration_since(last) >= self.every);
        if due {
            *last = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_due_once_in_a_while() {
        let hourly = Seldom::new(Duration::from_secs(3600));
        assert!(hourly.due() && !hourly.due() && !hourly.due());
        let always = Seldom::new(Duration::ZERO);
        assert!(always.due() && always.due());
    }
}
