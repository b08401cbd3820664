//! Saved state of the transport.

use pci::config_space::ConfigSpaceState;
use pci::msix::MsixState;
use serde::{Deserialize, Serialize};

/// Version of [`TransportState`].
pub const VERSION: u32 = 1;

/// One virtqueue. What is in its rings is in guest RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingState {
    /// Size that the driver chose.
    pub size: u16,
    /// The driver enabled it.
    pub enabled: bool,
    /// Guest address of the descriptor table.
    pub desc: u64,
    /// Guest address of the available ring.
    pub avail: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// MSI-X vector.
    pub vector: u16,
    /// Next entry of the available ring that the device takes.
    pub next_avail: u16,
    /// Next entry of the used ring that the device writes.
    pub next_used: u16,
}

/// Everything between the bus and the device model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// [`VERSION`] of the writer.
    pub version: u32,
    /// PCI configuration space.
    pub config: ConfigSpaceState,
    /// MSI-X table.
    pub msix: MsixState,
    /// ISR status.
    pub isr: u8,
    /// Device status.
    pub status: u8,
    /// Selected word of the offered features.
    pub device_feature_select: u32,
    /// Selected word of the accepted features.
    pub driver_feature_select: u32,
    /// Accepted features.
    pub driver_features: u64,
    /// MSI-X vector of configuration changes.
    pub config_vector: u16,
    /// Selected queue.
    pub queue_select: u16,
    /// Counts changes of the configuration.
    pub generation: u8,
    /// The queues.
    pub queues: Vec<RingState>,
}
