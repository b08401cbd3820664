//! Counts how far inputs get, so that a target that has stopped reaching the depths shows.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// By the address of the name: comparisons of text would catch the fuzzer's eye.
static REACHED: Mutex<BTreeMap<usize, (&'static str, u64)>> = Mutex::new(BTreeMap::new());

fn lock() -> MutexGuard<'static, BTreeMap<usize, (&'static str, u64)>> {
    REACHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `place` was reached once more.
pub fn reached(place: &'static str) {
    lock().entry(place.as_ptr() as usize).or_insert((place, 0)).1 += 1;
}

/// How often each place was reached.
pub fn counts() -> BTreeMap<&'static str, u64> {
    let mut counts = BTreeMap::new();
    for (place, count) in lock().values() {
        *counts.entry(*place).or_default() += count;
    }
    counts
}

/// Prints the counts to standard error.
pub fn report() {
    for (place, count) in counts() {
        eprintln!("reached: {count} {place}");
    }
}
