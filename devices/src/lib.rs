//! The non-virtio devices of the machine and the bus they sit on.
//!
//! * [`bus`]: address ranges -> devices, for I/O ports and MMIO;
//! * [`interrupt`]: how a device raises its line.

pub mod bus;
pub mod interrupt;
