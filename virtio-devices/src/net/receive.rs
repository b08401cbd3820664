//! The receive side: frames go from the backend straight into the guest's buffers.
//!
//! How long a frame is, is known only when it is there. So the backend is given enough buffers for the largest frame,
//! and a spare piece of this process for what they lack. Buffers that a frame did not need stay in hand for the next.
//! A frame that ran into the spare piece waits until the driver has given buffers enough; the backend is asked for no
//! other meanwhile.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering::Relaxed;

use super::{BATCH, NetCounters, RX};
use crate::Error;
use crate::backend::{MAX_FRAME_SIZE, NetBackend, VNET_HEADER_SIZE};
use crate::buffers::io_slices_mut;
use crate::model::Io;
use crate::ring::{Chain, MAX_CHAIN, QueueError};

/// Offset of `num_buffers` in the vnet header.
const NUM_BUFFERS: usize = 10;
/// Pieces for one frame, the spare one included.
const MAX_PIECES: usize = MAX_CHAIN;

/// State of the receive side.
#[derive(Default)]
pub(super) struct Receiver {
    mergeable: bool,
    /// Room that is offered to the backend, as far as the guest has it.
    largest: usize,
    /// Chains taken from the queue and not used, in order.
    in_hand: VecDeque<Chain>,
    room: usize,
    pieces: usize,
    unused: Vec<Chain>,
    /// A frame that waits for buffers; empty: none.
    waiting: Vec<u8>,
    spare: Vec<u8>,
    iovecs: Vec<libc::iovec>,
}

// SAFETY: `iovecs` is rebuilt before each use from buffers that belong to no thread.
unsafe impl Send for Receiver {}

impl Receiver {
    pub(super) fn configure(&mut self, mergeable: bool, largest: usize) {
        (self.mergeable, self.largest) = (mergeable, largest);
        self.spare.resize(MAX_FRAME_SIZE, 0);
    }

    pub(super) fn reset(&mut self) {
        self.unused.extend(self.in_hand.drain(..));
        (self.room, self.pieces) = (0, 0);
        self.waiting.clear();
    }

    pub(super) fn waiting(&self) -> Option<&[u8]> {
        (!self.waiting.is_empty()).then_some(&self.waiting)
    }

    pub(super) fn set_waiting(&mut self, frame: Option<&[u8]>) -> Result<(), Error> {
        let frame = frame.unwrap_or_default();
        if !frame.is_empty() && !(VNET_HEADER_SIZE..=MAX_FRAME_SIZE).contains(&frame.len()) {
            return Err(Error::State(format!("a received frame of {} bytes", frame.len())));
        }
        self.waiting.clear();
        self.waiting.extend_from_slice(frame);
        Ok(())
    }

    /// Puts the chains in hand back into the queue.
    pub(super) fn put_back(&mut self, io: &mut Io<'_>) {
        io.rings[RX].put_back(self.in_hand.len() as u16);
        self.unused.extend(self.in_hand.drain(..));
        (self.room, self.pieces) = (0, 0);
    }

    /// Takes chains until there is room for `want` bytes. False when the queue has no more.
    fn take_chains(&mut self, io: &mut Io<'_>, want: usize) -> Result<bool, QueueError> {
        while self.room < want && (self.mergeable || self.in_hand.is_empty()) {
            let mut chain = self.unused.pop().unwrap_or_default();
            if !io.rings[RX].pop(io.memory, &mut chain)? {
                self.unused.push(chain);
                return Ok(false);
            }
            if chain.readable.pieces() > 0 {
                return Err(QueueError::Direction);
            }
            if chain.writable.len() < VNET_HEADER_SIZE {
                return Err(QueueError::TooShort);
            }
            let pieces = chain.writable.pieces();
            if self.pieces + pieces >= MAX_PIECES && !self.in_hand.is_empty() {
                self.unused.push(chain);
                io.rings[RX].put_back(1);
                return Ok(true);
            }
            self.room += chain.writable.len();
            self.pieces += pieces;
            self.in_hand.push_back(chain);
        }
        Ok(true)
    }

    /// Gives a frame of `len` bytes, which are in the first buffers in hand, to the driver.
    fn deliver(&mut self, io: &mut Io<'_>, len: usize, counters: &NetCounters) -> Result<(), QueueError> {
        let mut rest = len;
        let mut buffers: u16 = 0;
        for chain in &self.in_hand {
            if rest == 0 {
                break;
            }
            rest -= rest.min(chain.writable.len());
            buffers += 1;
        }
        if let Some(first) = self.in_hand.front() {
            first.writable.write(io.memory, NUM_BUFFERS, &buffers.to_le_bytes());
        }
        rest = len;
        for _ in 0..buffers {
            let Some(chain) = self.in_hand.pop_front() else { break };
            let used = rest.min(chain.writable.len());
            io.rings[RX].push_used(io.memory, chain.head, used as u32)?;
            self.room -= chain.writable.len();
            self.pieces -= chain.writable.pieces();
            rest -= used;
            self.unused.push(chain);
        }
        counters.rx_frames.fetch_add(1, Relaxed);
        counters.rx_bytes.fetch_add((len - VNET_HEADER_SIZE) as u64, Relaxed);
        Ok(())
    }

    /// Delivers the frame that waits. False when it has to wait on.
    fn deliver_waiting(&mut self, io: &mut Io<'_>, counters: &NetCounters) -> Result<bool, QueueError> {
        let len = self.waiting.len();
        let queue_has_more = self.take_chains(io, len)?;
        if self.room >= len {
            let frame = std::mem::take(&mut self.waiting);
            let mut done = 0;
            for chain in &self.in_hand {
                done += chain.writable.write(io.memory, 0, &frame[done..]);
            }
            self.deliver(io, len, counters)?;
            self.waiting = frame;
            self.waiting.clear();
            return Ok(true);
        }
        // No number of buffers will do: the queue is full of them, or the frame must fit into one.
        let full = self.in_hand.len() >= usize::from(io.rings[RX].size());
        if full || queue_has_more {
            self.waiting.clear();
            counters.rx_dropped.fetch_add(1, Relaxed);
            return Ok(true);
        }
        Ok(false)
    }

    /// Asks the backend for one frame; its length, which may be more than there is room for in the buffers in hand.
    fn read_frame(&mut self, backend: &mut dyn NetBackend) -> io::Result<usize> {
        self.iovecs.clear();
        for chain in &self.in_hand {
            self.iovecs.extend_from_slice(chain.writable.iovecs());
        }
        if self.room < MAX_FRAME_SIZE {
            self.iovecs.push(libc::iovec {
                iov_base: self.spare.as_mut_ptr().cast(),
                iov_len: MAX_FRAME_SIZE - self.room,
            });
        }
        // SAFETY: guest RAM stays mapped, `spare` stays where it is (it is not touched before the call returned), and
        // the slices are gone when the call returns. The driver gave these buffers to the device.
        backend.receive(unsafe { io_slices_mut(&mut self.iovecs) })
    }

    /// Tells the dirty log of the bytes that a frame of `len` bytes changed, whatever becomes of it.
    fn mark_dirty(&self, io: &Io<'_>, mut len: usize) {
        for chain in &self.in_hand {
            let n = len.min(chain.writable.len());
            chain.writable.mark_dirty(io.memory, n);
            len -= n;
            if len == 0 {
                return;
            }
        }
    }

    /// Keeps a frame of `len` bytes that ran into the spare piece.
    fn keep(&mut self, len: usize) {
        self.waiting.resize(len, 0);
        let mut done = 0;
        for chain in &self.in_hand {
            done += chain.writable.read(0, &mut self.waiting[done..]);
        }
        let rest = len - done;
        self.waiting[done..].copy_from_slice(&self.spare[..rest]);
    }

    /// Receives up to a batch of frames. True when the backend may have more and there are buffers for them.
    pub(super) fn receive(
        &mut self,
        backend: &mut dyn NetBackend,
        io: &mut Io<'_>,
        counters: &NetCounters,
    ) -> Result<bool, QueueError> {
        if !io.rings[RX].ready() {
            return Ok(false);
        }
        io.rings[RX].disable_kicks(io.memory)?;
        let mut served = 0;
        let more = loop {
            if served == BATCH || (served > 0 && io.is_wanted()) {
                break true;
            }
            served += 1;
            let stuck = if self.waiting.is_empty() {
                self.take_chains(io, self.largest)?;
                self.in_hand.is_empty()
            } else {
                !self.deliver_waiting(io, counters)?
            };
            if stuck {
                if io.rings[RX].enable_kicks(io.memory)? {
                    continue;
                }
                break false;
            }
            if self.in_hand.is_empty() {
                continue;
            }
            let len = match self.read_frame(backend) {
                Ok(len) => len.min(MAX_FRAME_SIZE),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break backend.has_pending(),
            };
            self.mark_dirty(io, len);
            if len < VNET_HEADER_SIZE {
                counters.rx_dropped.fetch_add(1, Relaxed);
            } else if len <= self.room {
                self.deliver(io, len, counters)?;
                // At once: the driver works on it, and gives buffers back, while the next frame is fetched.
                io.finish(RX)?;
            } else {
                self.keep(len);
            }
        };
        io.finish(RX)?;
        Ok(more)
    }
}
