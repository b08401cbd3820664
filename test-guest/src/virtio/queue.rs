//! A split virtqueue (virtio 1.2, 2.7), the driver's side.
//!
//! Memory order: what a descriptor says is written before the available index (release), the used index is read before
//! the entry (acquire); between publishing one's own index and reading the other side's event index stands a full fence,
//! as on the other side, so that at least one of the two sees the other's write.

use core::sync::atomic::{AtomicU16, Ordering, fence};

use alloc::vec::Vec;

use guest_core::ring::{available_len, descriptors_len, need_event, slot, used_len};

use crate::memory::dma;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Of the available ring: no interrupts, please; of the used ring: no notifications.
const SUPPRESS: u16 = 1;

/// A piece of memory in a request.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// Where.
    pub address: *mut u8,
    /// How long.
    pub len: u32,
    /// The device writes to it.
    pub device_writes: bool,
}

#[repr(C)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// The queue.
pub struct Queue {
    index: u16,
    size: u16,
    doorbell: *mut u16,
    event_index: bool,
    descriptors: *mut Descriptor,
    available: *mut u16,
    used: *mut u8,
    /// Free descriptors, as a stack.
    free: Vec<u16>,
    /// Our available index, and what it was at the last look at whether to notify.
    next_available: u16,
    notified: u16,
    next_used: u16,
}

impl Queue {
    /// A queue of `size` entries in fresh memory.
    pub fn new(index: u16, size: u16, doorbell: *mut u16, event_index: bool) -> Self {
        let queue = Self {
            index,
            size,
            doorbell,
            event_index,
            descriptors: dma(descriptors_len(size), 16).cast(),
            available: dma(available_len(size), 64).cast(),
            used: dma(used_len(size), 64),
            free: (0..size).rev().collect(),
            next_available: 0,
            notified: 0,
            next_used: 0,
        };
        queue.silence();
        queue
    }

    /// Addresses of the descriptors, the available ring and the used ring.
    pub fn addresses(&self) -> (u64, u64, u64) {
        (self.descriptors as u64, self.available as u64, self.used as u64)
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    fn available_word(&self, word: usize) -> &AtomicU16 {
        debug_assert!(word < available_len(self.size) / 2);
        // SAFETY: an aligned word of the available ring, which lives for ever and is accessed atomically only.
        unsafe { AtomicU16::from_ptr(self.available.add(word)) }
    }

    fn used_word(&self, byte: usize) -> &AtomicU16 {
        debug_assert!(byte < used_len(self.size));
        // SAFETY: an aligned word of the used ring, as above.
        unsafe { AtomicU16::from_ptr(self.used.add(byte).cast()) }
    }

    /// The name that the next request of `pieces` pieces will have; none if there is no room.
    pub fn peek(&self, pieces: usize) -> Option<u16> {
        self.free
            .len()
            .checked_sub(pieces)
            .and_then(|at| self.free.get(at).copied())
    }

    /// Gives a request to the device, which is told by the next [`Queue::notify`]. Returns the request's name, or none if
    /// there is no room.
    ///
    /// # Safety
    /// The pieces must be memory that nothing else uses until the request comes back.
    pub unsafe fn push(&mut self, pieces: &[Piece]) -> Option<u16> {
        if pieces.is_empty() || self.free.len() < pieces.len() {
            return None;
        }
        let mut next = None;
        for piece in pieces.iter().rev() {
            let at = self.free.pop()?;
            let flags = if piece.device_writes { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            let descriptor = Descriptor {
                address: piece.address as u64,
                len: piece.len,
                flags,
                next: next.unwrap_or(0),
            };
            // SAFETY: `at` is below the size, and the descriptor is not the device's.
            unsafe { self.descriptors.add(usize::from(at)).write_volatile(descriptor) };
            next = Some(at);
        }
        let head = next?;
        let ring = 2 + slot(self.next_available, self.size);
        self.available_word(ring).store(head, Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        self.available_word(1).store(self.next_available, Ordering::Release);
        Some(head)
    }

    /// Tells the device of new requests, if it wants to be told.
    pub fn notify(&mut self) {
        if self.notified == self.next_available {
            return;
        }
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let event = self.used_word(4 + 8 * usize::from(self.size)).load(Ordering::Relaxed);
            need_event(event, self.next_available, self.notified)
        } else {
            self.used_word(0).load(Ordering::Relaxed) & SUPPRESS == 0
        };
        self.notified = self.next_available;
        if wanted {
            // SAFETY: the queue's doorbell in a mapped BAR.
            unsafe { self.doorbell.write_volatile(self.index) };
        }
    }

    /// The device has returned requests that were not taken yet.
    pub fn has_used(&self) -> bool {
        self.used_word(2).load(Ordering::Acquire) != self.next_used
    }

    /// Takes the next request that the device has returned: its name and the number of bytes written.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        let entry = 4 + 8 * slot(self.next_used, self.size);
        // SAFETY: an entry of the used ring, which the device has finished, by its index.
        let (id, len) = unsafe {
            let entry = self.used.add(entry).cast::<u32>();
            (entry.read_volatile(), entry.add(1).read_volatile())
        };
        self.next_used = self.next_used.wrapping_add(1);
        assert!(
            id < u32::from(self.size),
            "virtio: queue {} returned request {id}",
            self.index
        );
        let head = id as u16;
        let mut at = head;
        for _ in 0..self.size {
            self.free.push(at);
            // SAFETY: a descriptor of a chain of ours, which is below the size.
            let descriptor = unsafe { self.descriptors.add(usize::from(at)).read_volatile() };
            if descriptor.flags & NEXT == 0 {
                break;
            }
            at = descriptor.next;
        }
        Some((head, len))
    }

    /// Asks for an interrupt when something comes back. True if something has come back meanwhile: no interrupt tells of
    /// that.
    pub fn listen(&self) -> bool {
        if self.event_index {
            self.available_word(2 + usize::from(self.size))
                .store(self.next_used, Ordering::Relaxed);
        }
        self.available_word(0).store(0, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.has_used()
    }

    /// Asks for no more interrupts. With the event index this needs no write: the index that was asked for is past.
    pub fn silence(&self) {
        if !self.event_index {
            self.available_word(0).store(SUPPRESS, Ordering::Relaxed);
        } else if self.next_used == 0 {
            // Nothing was asked for yet; index 0xffff is the furthest.
            self.available_word(2 + usize::from(self.size))
                .store(u16::MAX, Ordering::Relaxed);
        }
    }
}
