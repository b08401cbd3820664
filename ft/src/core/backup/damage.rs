//! What becomes of what the audit finds (R6): the end of this backup, or a new copy of the place from the primary.
//!
//! From the moment when a place is known to be wrong until it was sent anew and found right, the backup neither
//! acknowledges an epoch nor takes over: that would be another VM than the primary's (R2, R3).

use std::collections::VecDeque;

use super::{Action, BackupState, Nanos, ToPrimary, ms};
use crate::audit::{Mismatch, Place};

/// Places that may be sent anew within [`SPAN`]: where more goes wrong, a host is not to be trusted.
pub const MAX_REPAIRS: usize = 16;

const SPAN: Nanos = ms(3_600_000);

/// How the shadow compares with the checksums of an epoch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Compared {
    /// Where it differs.
    pub wrong: Vec<Mismatch>,
    /// The same in words.
    pub what: String,
    /// The checksums are of places that this epoch sent anew, and of no others.
    pub anew: bool,
    /// If so: the places that are right.
    pub right: Vec<Place>,
}

/// What is known to be wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Damage {
    pub(super) repair: bool,
    places: Vec<Place>,
    /// In words, as it was found last.
    pub(super) what: String,
    /// When places were found wrong, within the last [`SPAN`].
    found: VecDeque<Nanos>,
    mismatches: u64,
    repairs: u64,
}

impl BackupState {
    /// Whether the shadow is known to be wrong somewhere.
    pub fn is_damaged(&self) -> bool {
        !self.damage.places.is_empty()
    }

    /// Places that were found wrong, and those of them that were found right again, in all.
    pub fn audit_counts(&self) -> (u64, u64) {
        (self.damage.mismatches, self.damage.repairs)
    }

    pub(super) fn compared(&mut self, compared: Compared, now: Nanos, out: &mut Vec<Action>) {
        let damage = &mut self.damage;
        let before = damage.places.len();
        damage.places.retain(|place| !compared.right.contains(place));
        damage.repairs += (before - damage.places.len()) as u64;
        if compared.wrong.is_empty() {
            return;
        }
        let known = |mismatch: &Mismatch| damage.places.contains(&mismatch.place);
        let new: Vec<Mismatch> = compared.wrong.into_iter().filter(|m| !known(m)).collect();
        damage.mismatches += new.len() as u64;
        damage.what = compared.what;
        while damage.found.front().is_some_and(|at| now.saturating_sub(*at) > SPAN) {
            damage.found.pop_front();
        }
        let found = damage.found.len() + new.len();
        if !damage.repair {
            let what = damage.what.clone();
            return self.broken(what, out);
        }
        if compared.anew {
            let what = format!("{}, although it was sent anew", damage.what);
            return self.broken(what, out);
        }
        if found > MAX_REPAIRS {
            let what = format!(
                "{}; more than {MAX_REPAIRS} places were wrong within an hour",
                damage.what
            );
            return self.broken(what, out);
        }
        damage.found.extend(new.iter().map(|_| now));
        damage.places.extend(new.iter().map(|mismatch| mismatch.place));
        if self.takes_data() && !new.is_empty() {
            out.push(Action::Send(ToPrimary::Mismatch(new)));
        }
    }
}
