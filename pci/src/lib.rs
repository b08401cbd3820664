//! PCI: configuration space, BARs, MSI-X, the root complex with ECAM and 0xCF8/0xCFC.
//!
//! * this file: the traits a PCI function implements ([`PciDevice`]) and is given ([`MsiVectors`], [`NotifyRegistrar`]);
//! * [`config_space`]: one function's configuration space; [`msix`]: its MSI-X table; [`root`]: the bus.

pub mod config_space;
pub mod msix;
pub mod root;

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// A PCI function, as the root complex sees it. All methods may be called from any vCPU thread.
pub trait PciDevice: Send + Sync {
    /// Name for logs, for example `_disk0`.
    fn id(&self) -> &str;
    /// Reads 1, 2 or 4 bytes at `offset` (0..4096) of the configuration space.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Writes 1, 2 or 4 bytes at `offset` of the configuration space.
    fn config_write(&self, offset: u16, data: &[u8]);
    /// The memory BARs that decode now (COMMAND.MEM set): (BAR number, guest address, size in bytes).
    fn mapped_bars(&self) -> Vec<(u8, u64, u64)>;
    /// Reads within a BAR.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);
    /// Writes within a BAR.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);
}

/// The MSI-X vectors of one function; implemented by the machine on irqfds and MSI routes.
pub trait MsiVectors: Send + Sync {
    /// Sets (`Some((address, data))`) or takes away (`None`: masked or disabled) the message of a vector.
    fn set_route(&self, vector: u16, message: Option<(u64, u32)>) -> io::Result<()>;
    /// Delivers a vector; nothing happens when it has no route.
    fn trigger(&self, vector: u16) -> io::Result<()>;
}

/// Connects queue notifications to eventfds; implemented by the machine on ioeventfds.
pub trait NotifyRegistrar: Send + Sync {
    /// A guest write of any value to guest address `addr` signals `fd`.
    fn register(&self, addr: u64, fd: &EventFd) -> io::Result<()>;
    /// Undoes [`NotifyRegistrar::register`].
    fn unregister(&self, addr: u64, fd: &EventFd) -> io::Result<()>;
}
