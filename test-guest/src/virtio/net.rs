//! virtio-net as smoltcp's device: frames go straight between the queues' buffers and the stack.

use core::num::NonZeroUsize;

use alloc::vec::Vec;

use guest_core::checksum;
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, TxToken};
use smoltcp::time::Instant;

use crate::memory::dma;
use crate::virtio::queue::{Piece, Queue};
use crate::virtio::transport::Transport;

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_HOST_TSO4: u64 = 1 << 11;
const F_MRG_RXBUF: u64 = 1 << 15;

const QUEUE_SIZE: u16 = 256;
const BUFFER: usize = 2048;
/// struct virtio_net_hdr with num_buffers, which is always there in virtio 1.
const HEADER: usize = 12;
const NUM_BUFFERS_AT: usize = 10;
const FLAG_NEEDS_CSUM: u8 = 1;
const FLAG_DATA_VALID: u8 = 2;
const GSO_TCPV4: u8 = 1;
const FRAME_MAX: usize = 1514;
/// Buffers for frames that the card cuts into segments, their size, and the longest such frame (of which the IP packet
/// stays below 64 KiB).
const LARGE_BUFFERS: usize = 32;
const LARGE_BUFFER: usize = 1 << 16;
const LARGE_FRAME_MAX: usize = 14 + 65_000;

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

    /// Gives another buffer, which belongs to that descriptor for now, to the device for reading.
    fn push_from(&mut self, buffer: *mut u8, len: usize) {
        let piece = Piece {
            address: buffer,
            len: len as u32,
            device_writes: false,
        };
        // SAFETY: nothing else uses the buffer until the request comes back.
        unsafe { self.queue.push(&[piece]) };
    }
}

/// Large buffers for sending; each is free or on its way with a request.
struct Large {
    buffers: *mut u8,
    free: Vec<usize>,
    /// For each request, its large buffer.
    under_way: Vec<Option<usize>>,
}

impl Large {
    fn new(queue_size: u16, count: usize) -> Self {
        Self {
            buffers: dma(LARGE_BUFFER * count, 4096),
            free: (0..count).collect(),
            under_way: (0..queue_size).map(|_| None).collect(),
        }
    }
}

/// What the card takes off us.
#[derive(Clone, Copy)]
struct Offloads {
    /// Checksums of sent TCP segments.
    send_checksum: bool,
    /// Received frames may have a checksum that is not finished.
    receive_checksum: bool,
    /// Cutting large TCP segments.
    segmentation: bool,
}

/// The card.
pub struct Net {
    receive: Ring,
    transmit: Ring,
    large: Large,
    offloads: Offloads,
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
        // Segments that the card has joined come in several buffers.
        let joined = if transport.offers(F_MRG_RXBUF) { F_GUEST_TSO4 } else { 0 };
        if !transport.negotiate(F_MAC | F_MRG_RXBUF | F_CSUM | F_GUEST_CSUM | F_HOST_TSO4 | joined) {
            return None;
        }
        let receive = Ring::new(transport.queue(0, QUEUE_SIZE)?);
        let transmit = Ring::new(transport.queue(1, QUEUE_SIZE)?);
        let mac = if transport.has(F_MAC) {
            core::array::from_fn(|i| transport.config8(i as u64))
        } else {
            fallback
        };
        let offloads = Offloads {
            send_checksum: transport.has(F_CSUM),
            receive_checksum: transport.has(F_GUEST_CSUM),
            segmentation: transport.has(F_CSUM) && transport.has(F_HOST_TSO4),
        };
        transport.start();
        let large = Large::new(
            transmit.queue.size(),
            if offloads.segmentation { LARGE_BUFFERS } else { 0 },
        );
        let mut this = Self {
            receive,
            transmit,
            large,
            offloads,
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
        while let Some((request, _)) = self.transmit.queue.pop() {
            if let Some(buffer) = self.large.under_way[usize::from(request)].take() {
                self.large.free.push(buffer);
            }
        }
    }

    /// A frame of any size can be sent.
    fn can_send(&self) -> bool {
        self.transmit.queue.peek(1).is_some() && (!self.offloads.segmentation || !self.large.free.is_empty())
    }

    /// Asks for an interrupt on received frames, and on sent ones if there is no room for more. True if there is
    /// something to do now.
    pub fn listen(&mut self) -> bool {
        let mut more = self.receive.queue.listen();
        if !self.can_send() {
            more |= self.transmit.queue.listen();
        } else {
            self.transmit.queue.silence();
        }
        more
    }

    /// Frames have come.
    pub fn has_used(&self) -> bool {
        self.receive.queue.has_used()
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
        let (flags, buffers) = unsafe {
            (
                buffer.read_volatile(),
                buffer.add(NUM_BUFFERS_AT).cast::<u16>().read_volatile(),
            )
        };
        // SAFETY: as above, `len` bytes.
        let first = unsafe { core::slice::from_raw_parts(buffer.add(HEADER), len - HEADER) };
        let mut frame = Frame {
            buffer,
            len: len - HEADER,
        };
        if self.mergeable && buffers > 1 {
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
            frame = Frame {
                buffer: core::ptr::null_mut(),
                len: self.joined.len(),
            };
        }
        // The stack does not look at checksums then; a frame of which nobody else has is looked at here.
        if self.offloads.receive_checksum && flags & (FLAG_NEEDS_CSUM | FLAG_DATA_VALID) == 0 {
            let bytes = if frame.buffer.is_null() {
                &self.joined[..]
            } else {
                first
            };
            if !checksum::holds(bytes) {
                if !frame.buffer.is_null() {
                    self.receive.push(BUFFER, true);
                }
                frame = Frame {
                    buffer: core::ptr::null_mut(),
                    len: 0,
                };
            }
        }
        Some(frame)
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
    large: &'a mut Large,
    offloads: Offloads,
    sent: &'a mut u64,
    segment: u16,
}

impl Sending<'_> {
    /// What the card is to do with the frame (virtio 1.2, 5.1.6.2).
    fn header(&self, frame: &mut [u8]) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        if !self.offloads.send_checksum {
            return header;
        }
        if let Some(partial) = checksum::prepare(frame) {
            header[0] = FLAG_NEEDS_CSUM;
            header[6..8].copy_from_slice(&partial.start.to_le_bytes());
            header[8..10].copy_from_slice(&partial.offset.to_le_bytes());
            if self.segment != 0 {
                header[1] = GSO_TCPV4;
                header[2..4].copy_from_slice(&partial.headers.to_le_bytes());
                header[4..6].copy_from_slice(&self.segment.to_le_bytes());
            }
        }
        header
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let large = len > BUFFER - HEADER;
        let len = len.min(if large { LARGE_BUFFER } else { BUFFER } - HEADER);
        let Some(next) = self.ring.queue.peek(1) else {
            return f(&mut alloc::vec![0; len]);
        };
        let buffer = match self.large.free.last().copied().filter(|_| large) {
            Some(number) => {
                self.large.free.pop();
                self.large.under_way[usize::from(next)] = Some(number);
                // SAFETY: there are as many large buffers as numbers.
                unsafe { self.large.buffers.add(LARGE_BUFFER * number) }
            }
            None if large => return f(&mut alloc::vec![0; len]),
            None => self.ring.buffer(next),
        };
        // SAFETY: the buffer belongs to a descriptor that is free, and is at least so long.
        let (header, frame) = unsafe { core::slice::from_raw_parts_mut(buffer, HEADER + len) }.split_at_mut(HEADER);
        let result = f(frame);
        header.copy_from_slice(&self.header(frame));
        self.ring.push_from(buffer, HEADER + len);
        *self.sent += 1;
        result
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment = meta.segmentation_offload_size.map_or(0, |n| n.get());
    }
}

impl Device for Net {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received<'_>, Sending<'_>)> {
        self.reclaim();
        // A frame may need an answer at once.
        if !self.can_send() {
            return None;
        }
        let frame = self.next_frame()?;
        self.received += 1;
        let received = Received {
            ring: &mut self.receive,
            joined: &self.joined,
            frame,
        };
        let sending = Sending {
            ring: &mut self.transmit,
            large: &mut self.large,
            offloads: self.offloads,
            sent: &mut self.sent,
            segment: 0,
        };
        Some((received, sending))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sending<'_>> {
        self.reclaim();
        if !self.can_send() {
            return None;
        }
        Some(Sending {
            ring: &mut self.transmit,
            large: &mut self.large,
            offloads: self.offloads,
            sent: &mut self.sent,
            segment: 0,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_MAX;
        let (send, receive) = (self.offloads.send_checksum, self.offloads.receive_checksum);
        capabilities.checksum.tcp = match (send, receive) {
            (false, false) => Checksum::Both,
            (true, false) => Checksum::Rx,
            (false, true) => Checksum::Tx,
            (true, true) => Checksum::None,
        };
        capabilities.checksum.udp = if receive { Checksum::Tx } else { Checksum::Both };
        if self.offloads.segmentation {
            capabilities.segmentation.tcpv4 = NonZeroUsize::new(LARGE_FRAME_MAX);
        }
        capabilities
    }
}
