//! What a device model implements, and what it is given while it works.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::GuestMemory;
use crate::interrupt::Interrupts;
use crate::ring::{QueueError, Ring};
use crate::{DeviceState, Error};

/// What needs to be looked at. A model clears what it is done with; what it leaves set is served again at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ready {
    /// Queues that were notified, one bit each.
    pub queues: u32,
    /// The backend's descriptor became readable.
    pub readable: bool,
    /// The backend's descriptor became writable.
    pub writable: bool,
}

impl Ready {
    /// Everything.
    pub(crate) const ALL: Self = Self {
        queues: u32::MAX,
        readable: true,
        writable: true,
    };

    /// Queue `index` was notified.
    pub(crate) fn queue(&self, index: usize) -> bool {
        self.queues >> index & 1 != 0
    }

    /// Queue `index` needs no more attention, or does again.
    pub(crate) fn set_queue(&mut self, index: usize, value: bool) {
        self.queues = self.queues & !(1 << index) | u32::from(value) << index;
    }

    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The device around a model, as the model may use it.
pub struct Io<'a> {
    pub(crate) memory: &'a GuestMemory,
    pub(crate) rings: &'a mut [Ring],
    pub(crate) interrupts: &'a Interrupts,
    pub(crate) contenders: &'a AtomicU32,
}

impl Io<'_> {
    /// Whether somebody waits for the device, for a checkpoint perhaps: more of a batch is better left for later.
    pub(crate) fn is_wanted(&self) -> bool {
        self.contenders.load(Ordering::Acquire) > 0
    }

    /// Publishes used buffers of queue `index` and interrupts the driver when it wants that.
    pub(crate) fn finish(&mut self, index: usize) -> Result<(), QueueError> {
        let ring = &mut self.rings[index];
        if ring.publish(self.memory)? {
            self.interrupts.queue(ring.vector);
        }
        Ok(())
    }
}

/// A kind of device, without its transport. All methods are called with the device's lock held. Public because it
/// bounds [`crate::Handle`]; not to be implemented elsewhere.
pub trait Model: Send + 'static {
    /// Device type (virtio 1.3, 5).
    const TYPE: u16;
    /// PCI class, subclass, programming interface.
    const CLASS: [u8; 3];

    /// Largest size of each queue.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Offered features of the device type.
    fn features(&self) -> u64 {
        0
    }
    /// Features that need one another are accepted together.
    fn consistent(&self, _accepted: u64) -> bool {
        true
    }
    /// Reads the device's configuration; beyond it zeroes.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    /// The driver is ready, or a state was loaded in which it is.
    fn activate(&mut self, _features: u64) {}
    /// The driver reset the device, or it failed: no request may touch guest RAM any longer.
    fn reset(&mut self, memory: &GuestMemory);
    /// Serves what is ready, a bounded part of it.
    fn serve(&mut self, io: &mut Io<'_>, ready: &mut Ready) -> Result<(), QueueError>;
    /// Finishes every started request and takes no more: the queues show all there is. The device may be inactive.
    fn quiesce(&mut self, io: &mut Io<'_>) -> Result<(), QueueError>;
    /// Something is left to serve although nothing new may come: a device that goes on must look.
    fn unfinished(&self) -> bool {
        false
    }
    /// The backend's descriptor, and whether the model waits for it to become writable.
    fn poll(&self) -> Option<(RawFd, bool)>;
    /// Gives the backend up.
    fn close(&mut self);
    /// Saved state.
    fn state(&self) -> DeviceState;
    /// Loads a saved state.
    fn set_state(&mut self, state: &DeviceState) -> Result<(), Error>;
}

/// Copies a part of a configuration structure; beyond its end zeroes.
pub(crate) fn read_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    if let Some(rest) = usize::try_from(offset).ok().and_then(|at| config.get(at..)) {
        let n = rest.len().min(data.len());
        data[..n].copy_from_slice(&rest[..n]);
    }
}
