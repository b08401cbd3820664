//! Counts how far inputs get, so that a target that has stopped reaching the depths shows.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

static REACHED: Mutex<BTreeMap<&'static str, u64>> = Mutex::new(BTreeMap::new());

fn lock() -> MutexGuard<'static, BTreeMap<&'static str, u64>> {
    REACHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `place` was reached once more.
pub fn reached(place: &'static str) {
    *lock().entry(place).or_default() += 1;
}

/// How often each place was reached.
pub fn counts() -> BTreeMap<&'static str, u64> {
    lock().clone()
}

/// Prints the counts to standard error.
pub fn report() {
    for (place, count) in counts() {
        eprintln!("reached: {count} {place}");
    }
}
