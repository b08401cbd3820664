//! Asking the arbiter until it answers. Both sides do it the same way; there is never more than one question under way.

use super::{Nanos, ms};

/// What came back from the arbiter.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Answer {
    /// The next generation is ours.
    Won,
    /// It is another node's.
    Lost {
        /// That node.
        winner: String,
    },
    /// No answer; who has it is open.
    Unknown {
        /// What went wrong.
        reason: String,
    },
}

const FIRST_BACKOFF: Nanos = ms(50);
const MAX_BACKOFF: Nanos = ms(2_000);

/// One arbitration.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Arbitration {
    asking: bool,
    retry_at: Nanos,
    backoff: Nanos,
    unanswered: Option<String>,
}

impl Arbitration {
    /// Begins: [`Arbitration::ask_again`] says so at once.
    pub fn begin() -> Self {
        Self {
            asking: false,
            retry_at: 0,
            backoff: FIRST_BACKOFF,
            unanswered: None,
        }
    }

    /// No answer came: wait, then ask again.
    pub fn unanswered(&mut self, reason: String, now: Nanos) {
        self.asking = false;
        self.retry_at = now + self.backoff;
        self.backoff = (self.backoff * 2).min(MAX_BACKOFF);
        self.unanswered = Some(reason);
    }

    /// Whether to ask again now; if so, the question counts as asked.
    pub fn ask_again(&mut self, now: Nanos) -> bool {
        let due = !self.asking && now >= self.retry_at;
        self.asking |= due;
        due
    }

    /// Why it was begun, and why there was no answer yet.
    pub fn explain(&self, reason: Option<String>) -> Option<String> {
        match (reason, &self.unanswered) {
            (Some(reason), Some(trouble)) => Some(format!("{reason}; no answer yet: {trouble}")),
            (reason, _) => reason,
        }
    }
}
