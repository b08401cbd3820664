//! What an arbiter has seen of its store. What it sees later must continue that: a store that was exchanged, emptied or
//! put back to an earlier state would let a generation be won twice (R4), so it gives no answer any more.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{ArbiterError, Register, Verdict};

#[derive(Debug, Default)]
struct Seen {
    store: Option<String>,
    registers: HashMap<String, Register>,
}

/// Kept for as long as the session that opened the arbiter.
#[derive(Debug, Default)]
pub(super) struct Memory(Mutex<Seen>);

impl Memory {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store that was met first.
    pub fn store(&self) -> Option<String> {
        self.seen().store.clone()
    }

    /// This is the store now. `place` says where it was found.
    pub fn met(&self, place: &str, id: &str) -> Result<(), ArbiterError> {
        let mut seen = self.seen();
        match &seen.store {
            None => seen.store = Some(id.into()),
            Some(first) if first == id => {}
            Some(first) => {
                let reason = format!("is store {id} now, it was {first}: unmounted, emptied or exchanged?");
                return Err(corrupt(place, reason));
            }
        }
        Ok(())
    }

    /// The newest register of `vm_id` that was seen. To be asked before the store is, so that answers that overtake one
    /// another are no step back.
    pub fn register(&self, vm_id: &str) -> Option<Register> {
        self.seen().registers.get(vm_id).cloned()
    }

    /// The store shows `now`, after `before` was seen.
    pub fn saw(&self, place: &str, vm_id: &str, before: Option<&Register>, now: &Register) -> Result<(), ArbiterError> {
        if let Some(before) = before {
            if now.generation < before.generation {
                return Err(went_back(place, vm_id, now.generation, before.generation));
            }
            if now.generation == before.generation && now.winner != before.winner {
                let name = |register: &Register| register.winner.clone().unwrap_or_else(|| "nobody".into());
                let reason = format!(
                    "generation {} of {vm_id} is {}'s now, it was {}'s: was an old backup put back?",
                    now.generation,
                    name(now),
                    name(before)
                );
                return Err(corrupt(place, reason));
            }
        }
        let mut seen = self.seen();
        let newest = seen.registers.entry(vm_id.into()).or_insert_with(|| now.clone());
        if newest.generation < now.generation {
            *newest = now.clone();
        }
        Ok(())
    }

    /// The store shows that `generation` is `winner`'s, after `before` was seen: the verdict for `node`.
    pub fn decided(
        &self,
        place: &str,
        vm_id: &str,
        before: Option<&Register>,
        generation: u64,
        winner: String,
        node: &str,
    ) -> Result<Verdict, ArbiterError> {
        let now = Register {
            generation,
            winner: Some(winner.clone()),
        };
        // A late contender asks for a generation that was left behind.
        let before = before.filter(|before| before.generation <= generation);
        self.saw(place, vm_id, before, &now)?;
        Ok(if winner == node {
            Verdict::Won
        } else {
            Verdict::Lost { winner }
        })
    }
}

pub(super) fn corrupt(place: &str, reason: impl Into<String>) -> ArbiterError {
    ArbiterError::Corrupt {
        place: place.into(),
        reason: reason.into(),
    }
}

/// The store's newest generation is one that was left behind long ago.
pub(super) fn went_back(place: &str, vm_id: &str, now: u64, before: u64) -> ArbiterError {
    let reason = format!(
        "the generation of {vm_id} is {now}, it was {before} at least: was an old backup put back, or lost files?"
    );
    corrupt(place, reason)
}
