//! What becomes of a state when nothing more goes wrong.

use ft::config::FtState;

use crate::pair::{B, P, Pair, TICKS};
use crate::step::{Budget, Step};

impl Pair {
    /// Whether exactly one runs the VM, or nobody can; `None`: not yet decided.
    pub fn decided(&self) -> Option<bool> {
        let (p, b) = (self.p.status().state, self.b.status().state);
        let pair = self.up == [true; 2] && (p, b) == (FtState::Protected, FtState::Protected) && !self.p.hands_over();
        if pair || self.live != self.alone {
            return Some(true);
        }
        let waits = (self.up[P] && !self.p.is_over()) || (self.up[B] && self.b.is_armed());
        if waits {
            return None;
        }
        let cannot = !self.up[B] || self.activation_failed;
        let lost = self.winners[1] == Some(P);
        // The primary stopped, or crashed, for good: the backup must be unable to go on, too.
        Some(if self.up[P] {
            self.winners[1] == Some(B) && cannot && !self.told
        } else {
            cannot || lost || self.out || self.whole == 0
        })
    }

    /// Faults end and the arbiter answers: whether that decides who goes on within `limit` steps of the clock.
    pub fn heals(mut self, limit: u64) -> bool {
        self.budget = Budget::default();
        self.stopped = [false; 2];
        let end = self.now / TICKS + limit;
        loop {
            if let Some(well) = self.decided() {
                return well;
            }
            let steps = self.steps(end);
            // All that needs no time happens first.
            let Some(step) = steps.iter().find(|step| **step != Step::Clock).or(steps.first()) else {
                return false;
            };
            self.take(*step, 0);
        }
    }
}
