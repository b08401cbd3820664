//! One virtqueue as a device model sees it: chains come out checked, used buffers go back in batches.
//!
//! On virtio-queue's split ring. What that crate leaves open is done here: a chain that ends early because it is
//! malformed is told from one that is complete, used elements are published together (virtio 1.3, 5.1.6.4: a driver
//! must see all buffers of a merged frame at once), and interrupts are suppressed by flag as well as by event index.

use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::GuestMemory;
use crate::buffers::Buffers;
use crate::transport::persist::RingState;

/// Longest chain that is taken, in descriptors: the number of pieces that one system call takes (IOV_MAX).
pub(crate) const MAX_CHAIN: usize = 1024;
/// Vector number that means none (virtio 1.3, 4.1.5.1.2).
pub(crate) const NO_VECTOR: u16 = 0xffff;

const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// What is wrong with a queue or a chain. The device needs a reset afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum QueueError {
    /// The available index ran ahead of the ring, or the ring is not in RAM.
    #[error("the available ring is not valid")]
    Available,
    /// A ring is misaligned, not in RAM, or its size is not a power of two up to the offered one.
    #[error("the queue's addresses or size are not valid")]
    Layout,
    /// A loop, an index out of range, an unreadable or nested indirect table.
    #[error("a descriptor chain does not end")]
    Chain,
    /// More than 1,024 descriptors.
    #[error("a descriptor chain is too long")]
    TooLong,
    /// A buffer that is not in RAM.
    #[error("a descriptor points outside of RAM")]
    Address,
    /// A buffer that the device reads follows one that it writes, or one is of the wrong kind for this queue.
    #[error("a descriptor has the wrong direction")]
    Direction,
    /// Too few bytes for what must be in every request.
    #[error("a request is too short")]
    TooShort,
    /// The used ring is not in RAM.
    #[error("the used ring cannot be written")]
    Used,
}

/// A descriptor chain.
#[derive(Default)]
pub(crate) struct Chain {
    /// Index of its first descriptor, which names it in the used ring.
    pub(crate) head: u16,
    /// What the device reads.
    pub(crate) readable: Buffers,
    /// What the device writes.
    pub(crate) writable: Buffers,
}

/// A virtqueue.
pub(crate) struct Ring {
    queue: Queue,
    /// As the driver wrote them, checked when it enables the queue.
    size: u16,
    addresses: [u64; 3],
    enabled: bool,
    pub(crate) vector: u16,
    /// Used elements written but not published.
    unpublished: u16,
    /// Used index at the last decision about an interrupt.
    signalled: u16,
}

impl Ring {
    /// `max_size` is a power of two, up to 32,768.
    pub(crate) fn new(max_size: u16) -> Result<Self, QueueError> {
        Ok(Self {
            queue: Queue::new(max_size).map_err(|_| QueueError::Layout)?,
            size: max_size,
            addresses: [0; 3],
            enabled: false,
            vector: NO_VECTOR,
            unpublished: 0,
            signalled: 0,
        })
    }

    pub(crate) fn reset(&mut self) {
        self.queue.reset();
        (self.size, self.addresses, self.enabled) = (self.queue.max_size(), [0; 3], false);
        (self.vector, self.unpublished, self.signalled) = (NO_VECTOR, 0, 0);
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// The driver chose a size; kept until the queue is enabled, when it is checked.
    pub(crate) fn set_size(&mut self, size: u16) {
        if !self.enabled {
            self.size = size;
        }
    }

    /// Descriptor table, available ring, used ring.
    pub(crate) fn addresses(&self) -> [u64; 3] {
        self.addresses
    }

    pub(crate) fn set_address(&mut self, which: usize, address: u64) {
        if let (false, Some(slot)) = (self.enabled, self.addresses.get_mut(which)) {
            *slot = address;
        }
    }

    pub(crate) fn enabled(&self) -> bool {
        self.enabled
    }

    pub(crate) fn enable(&mut self) {
        self.enabled = true;
    }

    /// Makes the queue ready for use as the driver set it up.
    pub(crate) fn activate(&mut self, memory: &GuestMemory, event_idx: bool) -> Result<(), QueueError> {
        if !self.enabled {
            return Ok(());
        }
        let layout = |_| QueueError::Layout;
        let [desc, avail, used] = self.addresses;
        self.queue.try_set_size(self.size).map_err(layout)?;
        self.queue
            .try_set_desc_table_address(GuestAddress(desc))
            .map_err(layout)?;
        self.queue
            .try_set_avail_ring_address(GuestAddress(avail))
            .map_err(layout)?;
        self.queue
            .try_set_used_ring_address(GuestAddress(used))
            .map_err(layout)?;
        let size = usize::from(self.size);
        let parts = [(desc, 16 * size), (avail, 6 + 2 * size), (used, 6 + 8 * size)];
        for (address, len) in parts {
            let in_ram = address.checked_add(len as u64).is_some() && memory.check_range(GuestAddress(address), len);
            // virtio-queue takes an available ring at 0 for one that was not set.
            if !in_ram || avail == 0 {
                return Err(QueueError::Layout);
            }
        }
        self.queue.set_event_idx(event_idx);
        self.queue.set_ready(true);
        Ok(())
    }

    /// The queue can be served.
    pub(crate) fn ready(&self) -> bool {
        self.queue.ready()
    }

    /// Takes the next chain into `chain`; false when there is none.
    pub(crate) fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<bool, QueueError> {
        if !self.queue.ready() {
            return Ok(false);
        }
        let mut available = self.queue.iter(memory).map_err(|_| QueueError::Available)?;
        let Some(descriptors) = available.next() else {
            return Ok(false);
        };
        chain.head = descriptors.head_index();
        chain.readable.clear();
        chain.writable.clear();
        // An iterator of virtio-queue ends without a word at anything malformed; then the last descriptor that it gave
        // still announces another, or there was none at all.
        let mut complete = false;
        for (count, descriptor) in descriptors.enumerate() {
            if count >= MAX_CHAIN {
                return Err(QueueError::TooLong);
            }
            let write_only = descriptor.is_write_only();
            let buffers = if write_only {
                &mut chain.writable
            } else if chain.writable.pieces() == 0 {
                &mut chain.readable
            } else {
                return Err(QueueError::Direction);
            };
            if !buffers.push(memory, descriptor.addr().0, descriptor.len() as usize) {
                return Err(QueueError::Address);
            }
            complete = !descriptor.has_next();
        }
        if chain.readable.pieces() + chain.writable.pieces() > MAX_CHAIN {
            return Err(QueueError::TooLong);
        }
        if complete { Ok(true) } else { Err(QueueError::Chain) }
    }

    /// Puts the last `count` popped chains back; they come out again.
    pub(crate) fn put_back(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Gives a chain back with `len` bytes written; the driver sees it at the next [`Ring::publish`].
    pub(crate) fn push_used(&mut self, memory: &GuestMemory, head: u16, len: u32) -> Result<(), QueueError> {
        let index = self.queue.next_used().wrapping_add(self.unpublished) % self.size.max(1);
        let address = self.addresses[2] + 4 + 8 * u64::from(index);
        // struct virtq_used_elem: id, then length.
        let element = u64::from(head) | u64::from(len) << 32;
        memory
            .write_obj(element.to_le(), GuestAddress(address))
            .map_err(|_| QueueError::Used)?;
        self.unpublished = self.unpublished.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver all chains given back; true when it wants an interrupt for them.
    pub(crate) fn publish(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let count = std::mem::take(&mut self.unpublished);
        if count == 0 {
            return Ok(false);
        }
        let next = self.queue.next_used().wrapping_add(count);
        self.queue.set_next_used(next);
        let [_, avail, used] = self.addresses;
        memory
            .store(next.to_le(), GuestAddress(used + 2), Ordering::Release)
            .map_err(|_| QueueError::Used)?;
        // The driver arms interrupts, then looks at the used index; here it is the other way round.
        fence(Ordering::SeqCst);
        let load = |offset: u64| {
            memory
                .load::<u16>(GuestAddress(avail + offset), Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(|_| QueueError::Available)
        };
        let before = std::mem::replace(&mut self.signalled, next);
        if self.queue.event_idx_enabled() {
            let event = load(4 + 2 * u64::from(self.size))?;
            // virtio 1.3, 2.7.7.1: the event index was passed since the last time.
            Ok(next.wrapping_sub(event).wrapping_sub(1) < next.wrapping_sub(before))
        } else {
            Ok(load(0)? & AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    /// The driver need not notify: the device is looking at the queue anyway.
    pub(crate) fn disable_kicks(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        if !self.ready() {
            return Ok(());
        }
        self.queue.disable_notification(memory).map_err(|_| QueueError::Used)
    }

    /// The driver must notify; true when something came in meanwhile, for which it does not.
    pub(crate) fn enable_kicks(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        if !self.ready() {
            return Ok(false);
        }
        self.queue.enable_notification(memory).map_err(|_| QueueError::Used)
    }

    pub(crate) fn state(&self) -> RingState {
        let [desc, avail, used] = self.addresses;
        RingState {
            size: self.size,
            enabled: self.enabled,
            desc,
            avail,
            used,
            vector: self.vector,
            next_avail: self.queue.next_avail(),
            next_used: self.queue.next_used(),
        }
    }

    pub(crate) fn set_state(&mut self, state: &RingState) {
        self.reset();
        (self.size, self.addresses) = (state.size, [state.desc, state.avail, state.used]);
        (self.enabled, self.vector) = (state.enabled, state.vector);
        self.queue.set_next_avail(state.next_avail);
        self.queue.set_next_used(state.next_used);
        self.signalled = state.next_used;
    }
}
