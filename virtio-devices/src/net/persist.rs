//! Saved state of a network device.

use serde::{Deserialize, Serialize};

/// Version of [`NetState`].
pub const VERSION: u32 = 1;

/// An address that the guest announced as its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LearnedAddress {
    /// IPv4.
    V4([u8; 4]),
    /// IPv6.
    V6([u8; 16]),
}

/// What is neither in the queues nor in the transport.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// [`VERSION`] of the writer.
    pub version: u32,
    /// MAC address.
    pub mac: [u8; 6],
    /// A received frame, with its vnet header, that waits for buffers.
    pub waiting: Option<Vec<u8>>,
    /// Addresses to announce after a move, the newest last.
    pub learned: Vec<LearnedAddress>,
}
