//! virtio-net as smoltcp's device: frames go straight between the queues' buffers and the stack.

use alloc::vec::Vec;

use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

use crate::memory::dma;
use crate::virtio::queue::{Piece, Queue};
use crate::virtio::transport::Transport;

const F_MAC: u64 = 1 << 5;
const F_MRG_RXBUF: u64 = 1 << 15;

const QUEUE_SIZE: u16 = 256;
const BUFFER: usize = 2048;
/// struct virtio_net_hdr with num_buffers, which is always there in virtio 1.
const HEADER: usize = 12;
const NUM_BUFFERS_AT: usize = 10;
const FRAME_MAX: usize = 1514;

/// A queue with a buffer for each descriptor.
struct Ring {
    queue: Queue,
    buffers: *mut u8,
}

impl Ring {
    fn new(queue: Queue) -> Self {
        let buffers = dma(BUFFER * usize::from(queue.size()), 4096);
        Self { queue, buffers }
    }

    fn buffer(&self, request: u16) -> *mut u8 {
        // SAFETY: requests are below the queue's size, and there are as many buffers.
        unsafe { self.buffers.add(BUFFER * usize::from(request)) }
    }

    /// Gives the buffer of the next free descriptor to the device.
    fn push(&mut self, len: usize, device_writes: bool) {
        let Some(next) = self.queue.peek(1) else { return };
        let piece = Piece {
            address: self.buffer(next),
            len: len as u32,
            device_writes,
        };
        // SAFETY: a buffer belongs to its descriptor, and this one is free.
        unsafe { self.queue.push(&[piece]) };
    }
}

/// The card.
pub struct Net {
    receive: Ring,
    transmit: Ring,
    /// A frame that came in several buffers.
    joined: Vec<u8>,
    mergeable: bool,
    /// Its address.
    pub mac: [u8; 6],
    /// It interrupts.
    pub interrupts: bool,
    /// Frames received.
    pub received: u64,
    /// Frames sent.
    pub sent: u64,
}

impl Net {
    /// Sets up the device; `fallback` is the address if it has none.
    pub fn new(mut transport: Transport, fallback: [u8; 6]) -> Option<Self> {
        if !transport.negotiate(F_MAC | F_MRG_RXBUF) {
            return None;
        }
        let receive = Ring::new(transport.queue(0, QUEUE_SIZE)?);
        let transmit = Ring::new(transport.queue(1, QUEUE_SIZE)?);
        let mac = if transport.has(F_MAC) {
            core::array::from_fn(|i| transport.config8(i as u64))
        } else {
            fallback
        };
        transport.start();
        let mut this = Self {
            receive,
            transmit,
            joined: Vec::new(),
            mergeable: transport.has(F_MRG_RXBUF),
            mac,
            interrupts: transport.interrupts,
            received: 0,
            sent: 0,
        };
        for _ in 0..this.receive.queue.size() {
            this.receive.push(BUFFER, true);
        }
        this.receive.queue.notify();
        Some(this)
    }

    /// Tells the device of frames to send and of buffers to fill.
    pub fn notify(&mut self) {
        self.transmit.queue.notify();
        self.receive.queue.notify();
    }

    /// Takes back buffers of frames that were sent.
    fn reclaim(&mut self) {
        while self.transmit.queue.pop().is_some() {}
    }

    /// Asks for an interrupt on received frames, and on sent ones if there is no room for more. True if there is
    /// something to do now.
    pub fn listen(&mut self) -> bool {
        let mut more = self.receive.queue.listen();
        if self.transmit.queue.peek(1).is_none() {
            more |= self.transmit.queue.listen();
        } else {
            self.transmit.queue.silence();
        }
        more
    }

    /// See [`Queue::silence`].
    pub fn silence(&self) {
        self.receive.queue.silence();
        self.transmit.queue.silence();
    }

    /// The next frame: first buffer and length with header; further buffers are joined.
    fn next_frame(&mut self) -> Option<Frame> {
        let (request, len) = self.receive.queue.pop()?;
        let buffer = self.receive.buffer(request);
        let len = (len as usize).min(BUFFER);
        if len <= HEADER {
            self.receive.push(BUFFER, true);
            return Some(Frame { buffer, len: 0 });
        }
        // SAFETY: the header is within the buffer, which the device has returned.
        let buffers = unsafe { buffer.add(NUM_BUFFERS_AT).cast::<u16>().read_volatile() };
        // SAFETY: as above, `len` bytes.
        let first = unsafe { core::slice::from_raw_parts(buffer.add(HEADER), len - HEADER) };
        if !self.mergeable || buffers <= 1 {
            return Some(Frame {
                buffer,
                len: len - HEADER,
            });
        }
        self.joined.clear();
        self.joined.extend_from_slice(first);
        self.receive.push(BUFFER, true);
        for _ in 1..buffers {
            let Some((request, len)) = self.receive.queue.pop() else {
                break;
            };
            let buffer = self.receive.buffer(request);
            // SAFETY: a returned buffer, as above.
            let part = unsafe { core::slice::from_raw_parts(buffer, (len as usize).min(BUFFER)) };
            self.joined.extend_from_slice(part);
            self.receive.push(BUFFER, true);
        }
        Some(Frame {
            buffer: core::ptr::null_mut(),
            len: self.joined.len(),
        })
    }
}

struct Frame {
    /// Null: the frame is in `joined`.
    buffer: *mut u8,
    len: usize,
}

/// A received frame.
pub struct Received<'a> {
    ring: &'a mut Ring,
    joined: &'a [u8],
    frame: Frame,
}

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        if self.frame.buffer.is_null() || self.frame.len == 0 {
            return f(&self.joined[..self.frame.len]);
        }
        // SAFETY: the device has returned the buffer, and gets it back only below.
        let bytes = unsafe { core::slice::from_raw_parts(self.frame.buffer.add(HEADER), self.frame.len) };
        let result = f(bytes);
        self.ring.push(BUFFER, true);
        result
    }
}

/// Room for a frame to send.
pub struct Sending<'a> {
    ring: &'a mut Ring,
    sent: &'a mut u64,
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let len = len.min(BUFFER - HEADER);
        let Some(next) = self.ring.queue.peek(1) else {
            return f(&mut alloc::vec![0; len]);
        };
        let buffer = self.ring.buffer(next);
        // SAFETY: the buffer belongs to a descriptor that is free.
        let (header, frame) = unsafe { core::slice::from_raw_parts_mut(buffer, HEADER + len) }.split_at_mut(HEADER);
        header.fill(0);
        let result = f(frame);
        self.ring.push(HEADER + len, false);
        *self.sent += 1;
        result
    }
}

impl Device for Net {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received<'_>, Sending<'_>)> {
        self.reclaim();
        // A frame may need an answer at once.
        self.transmit.queue.peek(1)?;
        let frame = self.next_frame()?;
        self.received += 1;
        let received = Received {
            ring: &mut self.receive,
            joined: &self.joined,
            frame,
        };
        let sending = Sending {
            ring: &mut self.transmit,
            sent: &mut self.sent,
        };
        Some((received, sending))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sending<'_>> {
        self.reclaim();
        self.transmit.queue.peek(1)?;
        Some(Sending {
            ring: &mut self.transmit,
            sent: &mut self.sent,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_MAX;
        capabilities
    }
}
