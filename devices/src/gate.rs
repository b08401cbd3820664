//! A gate that outside events (terminal input, the power button) pass on their way into the machine. It is closed while
//! the machine is held still, so that a saved state never shows half an event.

use std::sync::{Condvar, Mutex, PoisonError};

use crate::lock;

#[derive(Default)]
struct State {
    closed: bool,
    inside: usize,
}

/// The gate. Any thread may pass; one owner closes and opens it.
#[derive(Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// Runs `f` while the gate is open; waits for that first.
    pub fn pass<R>(&self, f: impl FnOnce() -> R) -> R {
        let mut state = lock(&self.state);
        while state.closed {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.inside += 1;
        drop(state);
        let result = f();
        lock(&self.state).inside -= 1;
        self.changed.notify_all();
        result
    }

    /// Closes the gate and waits until nobody is inside.
    pub fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        while state.inside > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Opens it again.
    pub fn open(&self) {
        lock(&self.state).closed = false;
        self.changed.notify_all();
    }
}
