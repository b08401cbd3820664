//! virtio-blk: reads, writes and flushes, many at a time; buffers go in and come back with the answer.

use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::memory::dma;
use crate::virtio::queue::{Piece, Queue};
use crate::virtio::transport::Transport;

const F_READ_ONLY: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;

const QUEUE_SIZE: u16 = 256;
/// Header (16 bytes) and status byte of a request.
const HEAD: usize = 32;
const STATUS_AT: usize = 16;
const STATUS_OK: u8 = 0;
const STATUS_NONE: u8 = 0xff;

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Fill the buffer.
    Read,
    /// Write the buffer.
    Write,
    /// Make all finished writes durable.
    Flush,
}

/// An answered request.
pub struct Done {
    /// As given.
    pub tag: u64,
    /// It succeeded.
    pub ok: bool,
    /// As given, and filled by a read.
    pub data: Box<[u8]>,
}

struct UnderWay {
    tag: u64,
    data: Box<[u8]>,
}

/// The disk.
pub struct Block {
    queue: Queue,
    /// A head for each descriptor.
    heads: *mut u8,
    under_way: Vec<Option<UnderWay>>,
    /// 512-byte sectors.
    pub sectors: u64,
    /// Flushes mean something.
    pub can_flush: bool,
    /// Writes are refused.
    pub read_only: bool,
    /// It interrupts.
    pub interrupts: bool,
}

impl Block {
    /// Sets up the device.
    pub fn new(mut transport: Transport) -> Option<Self> {
        if !transport.negotiate(F_FLUSH | F_READ_ONLY) {
            return None;
        }
        let queue = transport.queue(0, QUEUE_SIZE)?;
        let size = usize::from(queue.size());
        transport.start();
        Some(Self {
            queue,
            heads: dma(HEAD * size, 16),
            under_way: (0..size).map(|_| None).collect(),
            sectors: transport.config64(0),
            can_flush: transport.has(F_FLUSH),
            read_only: transport.has(F_READ_ONLY),
            interrupts: transport.interrupts,
        })
    }

    /// Starts a request; gives the buffer back if there is no room now.
    pub fn submit(&mut self, operation: Operation, sector: u64, data: Box<[u8]>, tag: u64) -> Result<(), Box<[u8]>> {
        // The head's place is that of the first descriptor, which is the one that `push` takes last.
        let pieces_needed = if operation == Operation::Flush { 2 } else { 3 };
        let Some(head) = self.queue.peek(pieces_needed) else {
            return Err(data);
        };
        let mut data = data;
        // SAFETY: heads has HEAD bytes for each descriptor, and this one is free.
        let place = unsafe { self.heads.add(HEAD * usize::from(head)) };
        let kind = match operation {
            Operation::Read => TYPE_IN,
            Operation::Write => TYPE_OUT,
            Operation::Flush => TYPE_FLUSH,
        };
        // SAFETY: as above.
        unsafe {
            place.cast::<[u32; 2]>().write_volatile([kind, 0]);
            place.add(8).cast::<u64>().write_volatile(sector);
            place.add(STATUS_AT).write_volatile(STATUS_NONE);
        }
        let first = Piece {
            address: place,
            len: 16,
            device_writes: false,
        };
        let middle = Piece {
            address: data.as_mut_ptr(),
            len: data.len() as u32,
            device_writes: operation == Operation::Read,
        };
        let last = Piece {
            // SAFETY: the status byte is within the head.
            address: unsafe { place.add(STATUS_AT) },
            len: 1,
            device_writes: true,
        };
        // SAFETY: the head is this request's, and the buffer is kept untouched in `under_way` until it comes back.
        let pushed = unsafe {
            match operation {
                Operation::Flush => self.queue.push(&[first, last]),
                _ => self.queue.push(&[first, middle, last]),
            }
        };
        assert_eq!(pushed, Some(head), "the descriptor that was free");
        self.under_way[usize::from(head)] = Some(UnderWay { tag, data });
        Ok(())
    }

    /// Tells the device of what was submitted.
    pub fn notify(&mut self) {
        self.queue.notify();
    }

    /// The next answer.
    pub fn take(&mut self) -> Option<Done> {
        let (head, _) = self.queue.pop()?;
        let request = self.under_way[usize::from(head)].take()?;
        // SAFETY: the status byte of this request's head.
        let status = unsafe { self.heads.add(HEAD * usize::from(head) + STATUS_AT).read_volatile() };
        Some(Done {
            tag: request.tag,
            ok: status == STATUS_OK,
            data: request.data,
        })
    }

    /// See [`Queue::listen`].
    pub fn listen(&self) -> bool {
        self.queue.listen()
    }

    /// Requests have come back.
    pub fn has_used(&self) -> bool {
        self.queue.has_used()
    }

    /// See [`Queue::silence`].
    pub fn silence(&self) {
        self.queue.silence();
    }
}
