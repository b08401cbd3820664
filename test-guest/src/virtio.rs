//! Virtio 1.x over PCI: the transport (virtio 1.2, 4.1), split queues and the drivers.

mod blk;
mod net;
mod queue;
mod rng;
mod transport;

pub use blk::{Block, Done, Operation};
pub use net::Net;
pub use rng::Rng;
pub use transport::Transport;

/// Device type of a network card.
pub const NET: u16 = 1;
/// Device type of a disk.
pub const BLOCK: u16 = 2;
/// Device type of a source of random numbers.
pub const RNG: u16 = 4;
