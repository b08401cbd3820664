//! The block device (virtio 1.3, 5.2): one queue; data go between guest RAM and the disk without a copy.
//!
//! * this file: the device; `request`: what a chain asks for; [`persist`]: saved state;
//! * [`image`]: what a disk image can do; `file`: raw ones; [`lock`]: their locks; `qcow2`; `uring` and `pool`: the two
//!   backends.
//!
//! Changes that overlap one that is under way wait for it. So they take effect in the order in which the guest gave
//! them, and a copy of the disk that is made from the log of changes is equal (rule R3).

mod file;
pub mod image;
pub mod lock;
#[cfg(test)]
mod order_tests;
pub mod persist;
mod pool;
mod qcow2;
mod request;
#[cfg(test)]
mod tests;
mod uring;

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::backend::{BlockBackend, BlockCompletion, BlockOp};
use crate::buffers::GuestByte;
use crate::handle::Handle;
use crate::model::{Io, Model, Ready, read_bytes};
use crate::ring::{Chain, QueueError};
use crate::{DeviceState, Error, GuestMemory};
pub use image::{DiskImage, DiskOptions, Format, backing_files, create, open};
use persist::{BlockState, VERSION};
use request::{ID_BYTES, Limits, MAX_ZERO_SECTORS, Request, SECTOR, Status, parse};

/// Number of queues.
pub const QUEUES: usize = 1;

/// Requests that are started before others may have the device.
const BATCH: usize = 64;
/// Data segments of a request at most, so that with header and status byte they are a usual number.
const MAX_SEGMENTS: u32 = 254;

/// Feature bits (virtio 1.3, 5.2.3).
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// How a block device is made.
#[derive(Debug, Clone)]
pub struct BlockOptions {
    /// The guest cannot write.
    pub readonly: bool,
    /// Serial number, up to 20 bytes; what is beyond is cut.
    pub serial: String,
    /// Largest size of the queue, a power of two.
    pub queue_size: u16,
    /// Logical block size that the guest is told.
    pub block_size: u32,
}

/// Counts of a block device.
#[derive(Debug, Default)]
pub struct BlockCounters {
    read_bytes: AtomicU64,
    read_ops: AtomicU64,
    write_bytes: AtomicU64,
    write_ops: AtomicU64,
    flush_ops: AtomicU64,
    errors: AtomicU64,
}

/// A request, and whether it is under way.
#[derive(Default)]
struct Slot {
    chain: Chain,
    busy: Option<Busy>,
}

#[derive(Clone, Copy)]
struct Busy {
    op: BlockOp,
    status: GuestByte,
}

/// The block device.
pub struct Block {
    options: BlockOptions,
    serial: [u8; ID_BYTES],
    size: u64,
    backend: Option<Box<dyn BlockBackend>>,
    /// As many as the queue is long. The tag of a request is its index.
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// The queue was not looked at to its end because no slot was free.
    stalled: bool,
    completions: Vec<BlockCompletion>,
    counters: Arc<BlockCounters>,
}

/// The bytes of the disk that a request changes.
fn changed(op: BlockOp, data: usize) -> Option<(u64, u64)> {
    match op {
        BlockOp::Write { offset } => Some((offset, offset + data as u64)),
        BlockOp::Discard { offset, len } | BlockOp::WriteZeroes { offset, len, .. } => Some((offset, offset + len)),
        BlockOp::Read { .. } | BlockOp::Flush => None,
    }
}

impl Block {
    /// A device on `backend`.
    pub fn new(options: BlockOptions, backend: Box<dyn BlockBackend>) -> Self {
        let mut serial = [0; ID_BYTES];
        for (to, from) in serial.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        let count = usize::from(options.queue_size);
        Self {
            serial,
            size: backend.size() / SECTOR * SECTOR,
            backend: Some(backend),
            slots: (0..count).map(|_| Slot::default()).collect(),
            free: (0..count).collect(),
            stalled: false,
            completions: Vec::new(),
            counters: Arc::default(),
            options,
        }
    }

    /// The device's counts.
    pub fn counters(&self) -> Arc<BlockCounters> {
        self.counters.clone()
    }

    fn under_way(&self) -> bool {
        self.free.len() < self.slots.len()
    }

    fn limits(&self) -> Limits {
        Limits {
            size: self.size,
            readonly: self.options.readonly,
        }
    }

    /// Finishes a request with its status byte. `data`: bytes written to the buffers before it.
    fn answer(
        &mut self,
        io: &mut Io<'_>,
        slot: usize,
        byte: GuestByte,
        status: Status,
        data: usize,
    ) -> Result<(), QueueError> {
        let head = self.slots[slot].chain.head;
        self.free.push(slot);
        if status != Status::Ok {
            self.counters.errors.fetch_add(1, Relaxed);
        }
        if !byte.write(io.memory, status as u8) {
            return Err(QueueError::Address);
        }
        io.rings[0].push_used(io.memory, head, data as u32 + 1)
    }

    /// Starts or answers the request in `slot`.
    fn start(&mut self, io: &mut Io<'_>, slot: usize) -> Result<(), QueueError> {
        let limits = self.limits();
        let parsed = parse(&mut self.slots[slot].chain, limits);
        let (request, status) = match parsed {
            Ok(parsed) => parsed,
            Err(e) => {
                self.free.push(slot);
                return Err(e);
            }
        };
        let op = match request {
            Request::Op(op) => op,
            Request::Done(result) => return self.answer(io, slot, status, result, 0),
            Request::GetId => {
                let written = self.slots[slot].chain.writable.write(io.memory, 0, &self.serial);
                return self.answer(io, slot, status, Status::Ok, written);
            }
        };
        self.wait_for_overlapping(io, slot, op)?;
        let chain = &self.slots[slot].chain;
        let iovecs = match op {
            BlockOp::Read { .. } => chain.writable.iovecs(),
            BlockOp::Write { .. } => chain.readable.iovecs(),
            _ => &[],
        };
        let started = match &mut self.backend {
            // SAFETY: the buffers are guest RAM, which stays mapped as long as the device lives; a device that is reset
            // or dropped drains its backend first.
            Some(backend) => unsafe { backend.submit(slot as u64, op, iovecs) },
            None => Err(std::io::ErrorKind::BrokenPipe.into()),
        };
        match started {
            Ok(()) => {
                self.slots[slot].busy = Some(Busy { op, status });
                Ok(())
            }
            Err(e) => {
                log::debug!("block request {op:?}: {e}");
                self.answer(io, slot, status, Status::IoError, 0)
            }
        }
    }

    fn wait_for_overlapping(&mut self, io: &mut Io<'_>, slot: usize, op: BlockOp) -> Result<(), QueueError> {
        let Some((start, end)) = changed(op, self.slots[slot].chain.readable.len()) else {
            return Ok(());
        };
        let overlaps = self.slots.iter().any(|other| {
            let range = other.busy.and_then(|busy| changed(busy.op, other.chain.readable.len()));
            range.is_some_and(|(s, e)| s < end && start < e)
        });
        if overlaps { self.drain(io) } else { Ok(()) }
    }

    /// Waits for everything under way and answers it.
    fn drain(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        if self.under_way()
            && let Some(backend) = &mut self.backend
            && let Err(e) = backend.drain()
        {
            log::error!("block device: requests cannot be waited for: {e}");
        }
        self.complete(io)
    }

    /// Starts what was submitted and answers what is finished.
    fn complete(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        let Some(backend) = &mut self.backend else {
            return Ok(());
        };
        let mut finished = std::mem::take(&mut self.completions);
        backend.completions(&mut finished);
        let mut result = Ok(());
        for completion in finished.drain(..) {
            let slot = completion.tag as usize;
            let Some(busy) = self.slots.get_mut(slot).and_then(|slot| slot.busy.take()) else {
                log::error!("block device: a completion of request {slot}, which is not under way");
                continue;
            };
            if result.is_ok() {
                result = self.finish_request(io, slot, busy, &completion);
            }
        }
        self.completions = finished;
        result
    }

    fn finish_request(
        &mut self,
        io: &mut Io<'_>,
        slot: usize,
        busy: Busy,
        completion: &BlockCompletion,
    ) -> Result<(), QueueError> {
        let chain = &self.slots[slot].chain;
        let (bytes, ops) = match busy.op {
            BlockOp::Read { .. } => (
                chain.writable.len(),
                Some((&self.counters.read_bytes, &self.counters.read_ops)),
            ),
            BlockOp::Write { .. } => (
                chain.readable.len(),
                Some((&self.counters.write_bytes, &self.counters.write_ops)),
            ),
            BlockOp::Flush => {
                self.counters.flush_ops.fetch_add(1, Relaxed);
                (0, None)
            }
            BlockOp::Discard { .. } | BlockOp::WriteZeroes { .. } => (0, None),
        };
        let mut written = 0;
        if let BlockOp::Read { .. } = busy.op {
            // The kernel wrote these pages, also when the read failed half-way. Before the completion is visible, so
            // that a checkpoint in which the guest sees it has the pages too.
            chain.writable.mark_dirty(io.memory, bytes);
            written = bytes;
        }
        match &completion.result {
            Ok(_) => {
                if let Some((byte_count, op_count)) = ops {
                    byte_count.fetch_add(bytes as u64, Relaxed);
                    op_count.fetch_add(1, Relaxed);
                }
                self.answer(io, slot, busy.status, Status::Ok, written)
            }
            Err(e) => {
                log::warn!("block request {:?} failed: {e}", busy.op);
                self.answer(io, slot, busy.status, Status::IoError, 0)
            }
        }
    }

    /// Starts requests from the queue.
    fn submit(&mut self, io: &mut Io<'_>) -> Result<bool, QueueError> {
        io.rings[0].disable_kicks(io.memory)?;
        self.stalled = false;
        for _ in 0..BATCH {
            let Some(slot) = self.free.pop() else {
                self.stalled = true;
                return Ok(false);
            };
            match io.rings[0].pop(io.memory, &mut self.slots[slot].chain) {
                Ok(true) => self.start(io, slot)?,
                other => {
                    self.free.push(slot);
                    other?;
                    if !io.rings[0].enable_kicks(io.memory)? {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    }
}

impl Model for Block {
    const TYPE: u16 = 2;
    const CLASS: [u8; 3] = [1, 0x80, 0];

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.options.queue_size; QUEUES]
    }

    fn features(&self) -> u64 {
        let features = feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH;
        if self.options.readonly {
            features | feature::RO
        } else {
            features | feature::DISCARD | feature::WRITE_ZEROES
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 60];
        let segments = MAX_SEGMENTS
            .min(u32::from(self.options.queue_size).saturating_sub(2))
            .max(1);
        config[0..8].copy_from_slice(&(self.size / SECTOR).to_le_bytes());
        config[12..16].copy_from_slice(&segments.to_le_bytes());
        config[20..24].copy_from_slice(&self.options.block_size.to_le_bytes());
        config[34..36].copy_from_slice(&(QUEUES as u16).to_le_bytes());
        // Discard: most sectors, most ranges, alignment. Write zeroes: most sectors, most ranges, may unmap.
        config[36..40].copy_from_slice(&MAX_ZERO_SECTORS.to_le_bytes());
        config[40..44].copy_from_slice(&1u32.to_le_bytes());
        config[44..48].copy_from_slice(&(self.options.block_size / SECTOR as u32).to_le_bytes());
        config[48..52].copy_from_slice(&MAX_ZERO_SECTORS.to_le_bytes());
        config[52..56].copy_from_slice(&1u32.to_le_bytes());
        config[56] = 1;
        read_bytes(&config, offset, data);
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self, memory: &GuestMemory) {
        if self.under_way()
            && let Some(backend) = &mut self.backend
        {
            if let Err(e) = backend.drain() {
                log::error!("block device: requests cannot be waited for: {e}");
            }
            backend.completions(&mut self.completions);
        }
        self.completions.clear();
        for slot in &mut self.slots {
            if let Some(Busy {
                op: BlockOp::Read { .. },
                ..
            }) = slot.busy.take()
            {
                // Nobody is told of these, but the kernel wrote them all the same.
                slot.chain.writable.mark_dirty(memory, slot.chain.writable.len());
            }
        }
        self.free = (0..self.slots.len()).collect();
        self.stalled = false;
    }

    fn serve(&mut self, io: &mut Io<'_>, ready: &mut Ready) -> Result<(), QueueError> {
        if ready.readable {
            self.complete(io)?;
        }
        (ready.readable, ready.writable) = (false, false);
        if ready.queue(0) || self.stalled {
            let more = self.submit(io);
            // Also after an error: what was submitted must be started.
            let completed = self.complete(io);
            ready.set_queue(0, more? || self.stalled && !self.free.is_empty());
            completed?;
        }
        io.finish(0)
    }

    fn quiesce(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        self.drain(io)?;
        io.finish(0)
    }

    fn unfinished(&self) -> bool {
        self.stalled
    }

    fn poll(&self) -> Option<(RawFd, bool)> {
        self.backend.as_ref().map(|backend| (backend.event_fd(), false))
    }

    fn close(&mut self) {
        self.backend = None;
    }

    fn state(&self) -> DeviceState {
        DeviceState::Block(BlockState {
            version: VERSION,
            size: self.size,
            block_size: self.options.block_size,
        })
    }

    fn set_state(&mut self, state: &DeviceState) -> Result<(), Error> {
        let DeviceState::Block(state) = state else {
            return Err(state.wrong_kind());
        };
        if state.version != VERSION {
            return Err(Error::State(format!("block device, version {}", state.version)));
        }
        if state.size != self.size {
            return Err(Error::State(format!(
                "disk of {} bytes, here it has {}",
                state.size, self.size
            )));
        }
        if !matches!(state.block_size, 512..=4096) || !state.block_size.is_power_of_two() {
            return Err(Error::State(format!("disk with blocks of {} bytes", state.block_size)));
        }
        self.options.block_size = state.block_size;
        Ok(())
    }
}

impl BlockCounters {
    /// Values by name.
    pub fn values(&self) -> BTreeMap<String, u64> {
        let values = [
            ("read_bytes", &self.read_bytes),
            ("read_ops", &self.read_ops),
            ("write_bytes", &self.write_bytes),
            ("write_ops", &self.write_ops),
            ("flush_ops", &self.flush_ops),
            ("errors", &self.errors),
        ];
        values
            .map(|(name, value)| (name.to_string(), value.load(Relaxed)))
            .into()
    }
}

impl Handle<Block> {
    /// Puts the backend that `f` makes of the present one in its place.
    pub fn exchange(&self, f: impl FnOnce(Box<dyn BlockBackend>) -> Box<dyn BlockBackend>) {
        self.exchange_with(|block| block.backend = block.backend.take().map(f));
    }
}
