//! virtio-rng: random bytes on request.

use guest_core::control::RNG_MAX;

use crate::memory::dma;
use crate::virtio::queue::{Piece, Queue};
use crate::virtio::transport::Transport;

/// The device, with one buffer.
pub struct Rng {
    queue: Queue,
    buffer: *mut u8,
    busy: bool,
    /// It interrupts.
    pub interrupts: bool,
}

impl Rng {
    /// Sets up the device.
    pub fn new(mut transport: Transport) -> Option<Self> {
        if !transport.negotiate(0) {
            return None;
        }
        let queue = transport.queue(0, 8)?;
        transport.start();
        Some(Self {
            queue,
            buffer: dma(RNG_MAX, 64),
            busy: false,
            interrupts: transport.interrupts,
        })
    }

    /// Asks for `count` bytes (at most [`RNG_MAX`]); false while another request is under way.
    pub fn ask(&mut self, count: usize) -> bool {
        if self.busy {
            return false;
        }
        let piece = Piece {
            address: self.buffer,
            len: count.min(RNG_MAX) as u32,
            device_writes: true,
        };
        // SAFETY: the buffer is read only when the request has come back.
        self.busy = unsafe { self.queue.push(&[piece]) }.is_some();
        self.queue.notify();
        self.busy
    }

    /// The bytes, if they have come; a device may give fewer than asked for.
    pub fn take(&mut self) -> Option<&[u8]> {
        let (_, len) = self.queue.pop()?;
        self.busy = false;
        // SAFETY: the device has returned the buffer; it holds at least so many bytes.
        Some(unsafe { core::slice::from_raw_parts(self.buffer, (len as usize).min(RNG_MAX)) })
    }

    /// See [`Queue::listen`].
    pub fn listen(&self) -> bool {
        self.queue.listen()
    }

    /// See [`Queue::silence`].
    pub fn silence(&self) {
        self.queue.silence();
    }
}
