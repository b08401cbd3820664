//! virtio 1.x devices over PCI.
//!
//! * [`backend`]: the narrow border between a device model and what serves it (tap, file, console). The FT interposer
//!   is a backend around another backend; with FT off it is not there (rule R7).
//! * [`net`] with its [`net::tap`], [`block`] with its files ([`block::open`]), [`rng`], [`console`]: device models;
//! * [`handle`]: what the VMM holds of a device: pause, saved state, exchange of the backend;
//! * [`transport`]: the PCI function; [`model`]: what a device model implements; `ring`, `buffers`: virtqueues;
//!   `worker`: the device's thread; `interrupt`: how a device raises interrupts; [`DirtyPages`]: what they wrote to RAM.
//!
//! One worker thread per device. A device's queues and backend are behind one mutex: its worker holds it while it
//! serves a batch, the VMM takes it to pause, save, or exchange the backend. A paused device's worker does nothing
//! until it is resumed, so pausing needs no thread to answer.
//!
//! A guest that breaks the rules of a virtqueue gets its device marked failed (DEVICE_NEEDS_RESET); nothing else
//! happens.

pub mod backend;
pub mod block;
mod buffers;
pub mod console;
mod dirty;
pub mod handle;
mod interrupt;
pub mod model;
pub mod net;
mod ring;
pub mod rng;
#[cfg(test)]
mod testing;
pub mod transport;
mod worker;

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use block::Block;
pub use console::Console;
pub use dirty::DirtyPages;
pub use handle::{Handle, VirtioState};
pub use net::Net;
pub use ring::QueueError;
pub use rng::Rng;
pub use transport::{BAR_SIZE, PciResources};

/// Guest RAM, with a log of the pages that the VMM itself wrote (the hypervisor's dirty log does not see those).
pub type GuestMemory = vm_memory::GuestMemoryMmap<DirtyPages>;

/// Errors of making devices and of loading their state.
#[derive(Debug, Error)]
pub enum Error {
    /// No thread, no eventfd.
    #[error("cannot start the device's worker: {0}")]
    Worker(std::io::Error),
    /// The PCI configuration space.
    #[error(transparent)]
    Config(#[from] pci::config_space::Error),
    /// MSI-X.
    #[error(transparent)]
    Msix(#[from] pci::msix::StateError),
    /// A queue that cannot be.
    #[error("virtqueue: {0}")]
    Queue(QueueError),
    /// A saved state of another version or shape.
    #[error("saved virtio device state: {0}")]
    State(String),
    /// A backend refused.
    #[error("{what}: {source}")]
    Backend {
        /// What was tried.
        what: String,
        /// Why not.
        source: std::io::Error,
    },
}

/// Saved state of a device model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Network.
    Net(net::persist::NetState),
    /// Block.
    Block(block::persist::BlockState),
    /// Random numbers.
    Rng(rng::persist::RngState),
    /// Console.
    Console(console::persist::ConsoleState),
}

impl DeviceState {
    fn wrong_kind(&self) -> Error {
        let kind = match self {
            Self::Net(_) => "network",
            Self::Block(_) => "block",
            Self::Rng(_) => "rng",
            Self::Console(_) => "console",
        };
        Error::State(format!("it is that of a {kind} device"))
    }
}

/// MSI-X vectors that a device with `queues` queues needs: one for configuration changes, one for each queue.
pub fn vectors_for(queues: usize) -> u16 {
    queues as u16 + 1
}

/// Takes a mutex whose data stays valid even when a holder panicked.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
