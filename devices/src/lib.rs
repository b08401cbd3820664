//! The non-virtio devices of the machine and the bus they sit on.
//!
//! * [`bus`]: address ranges -> devices, for I/O ports and MMIO;
//! * [`interrupt`]: how a device raises its line;
//! * [`ioapic`]: the userspace IOAPIC; [`serial`]: COM1; [`rtc`]: CMOS clock; [`ged`]: power button, sleep and reset;
//! * [`gate`]: keeps outside events away from a machine that is held still.

pub mod bus;
pub mod gate;
pub mod ged;
pub mod interrupt;
pub mod ioapic;
pub mod rtc;
pub mod serial;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes a mutex whose data stays valid even when a holder panicked.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
