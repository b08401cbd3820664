//! How a device raises an interrupt.

use std::io;

/// An interrupt line into the IOAPIC.
pub trait InterruptLine: Send + Sync {
    /// Raises (and, for an edge-triggered pin, lowers again) the line.
    fn trigger(&self) -> io::Result<()>;
    /// Sets the level of a level-triggered pin.
    fn set_level(&self, high: bool) -> io::Result<()>;
}

/// What the userspace IOAPIC needs of the machine: deliver an MSI-formatted message to the local APICs.
pub trait MsiSink: Send + Sync {
    /// Delivers one message (address, data) at once.
    fn deliver(&self, address: u64, data: u32) -> io::Result<()>;
}
