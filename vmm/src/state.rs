//! The saved state of a whole VM, but for RAM and disks.
//!
//! The same structs are written to a snapshot directory (JSON) and sent with every FT checkpoint (postcard).

use devices::{ged, ioapic, rtc, serial};
use hypervisor::{ClockState, VcpuState};
use serde::{Deserialize, Serialize};
use virtio_devices::VirtioState;

/// Version of [`VmState`]; other versions are refused.
pub const VERSION: u32 = 2;

/// What a guest asks of its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PowerRequest {
    /// Power off.
    Shutdown,
    /// Reset.
    Reset,
}

/// Everything of a VM that is not RAM and not disk content.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmState {
    /// [`VERSION`] of the writer.
    pub version: u32,
    /// One per vCPU, in order.
    pub vcpus: Vec<VcpuState>,
    /// kvmclock.
    pub clock: ClockState,
    /// Interrupt controller.
    pub ioapic: ioapic::IoapicState,
    /// COM1.
    pub serial: serial::SerialState,
    /// CMOS.
    pub rtc: rtc::RtcState,
    /// Power management.
    pub ged: ged::GedState,
    /// PCI root complex.
    pub pci: pci::root::RootState,
    /// virtio devices by id, in PCI order.
    pub virtio: Vec<(String, VirtioState)>,
    /// Asked for by the guest, and not done yet.
    pub request: Option<PowerRequest>,
    /// The VM was paused by its owner.
    pub paused: bool,
}
