//! The interposer at the disks.
//!
//! * [`TrackedBlock`]: during pre-copy, remembers which blocks were changed.
//! * [`LoggedBlock`]: logs every change of the disk in the order of its start (R3).

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

use ft::interposer::Interposer;
use ft::machine::DiskChange;
use virtio_devices::backend::{BlockBackend, BlockCompletion, BlockOp};

use super::backends::Slot;
use crate::interrupts::lock;

/// Blocks of a disk changed since they were last copied.
#[derive(Default)]
pub struct ChangedBlocks {
    blocks: Mutex<BTreeSet<u64>>,
}

/// Size in bytes of a block in [`ChangedBlocks`].
pub const TRACKED_BLOCK: u64 = 64 << 10;

impl ChangedBlocks {
    fn mark(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let mut blocks = lock(&self.blocks);
        for block in offset / TRACKED_BLOCK..=(offset + len - 1) / TRACKED_BLOCK {
            blocks.insert(block);
        }
    }

    /// Takes all changed (offset, length) ranges of a disk of `size` bytes, ascending and joined.
    pub fn take(&self, size: u64, out: &mut Vec<(u64, u64)>) {
        let first = out.len();
        for block in std::mem::take(&mut *lock(&self.blocks)) {
            let offset = block * TRACKED_BLOCK;
            let len = TRACKED_BLOCK.min(size.saturating_sub(offset));
            match out[first..].last_mut() {
                Some((o, l)) if *o + *l == offset => *l += len,
                _ => out.push((offset, len)),
            }
        }
    }
}

pub(super) fn changed_range(op: BlockOp, len: u64) -> Option<(u64, u64)> {
    match op {
        BlockOp::Write { offset } => Some((offset, len)),
        BlockOp::WriteZeroes { offset, len, .. } | BlockOp::Discard { offset, len } => Some((offset, len)),
        BlockOp::Read { .. } | BlockOp::Flush => None,
    }
}

pub(super) fn total(iovecs: &[libc::iovec]) -> u64 {
    iovecs.iter().map(|v| v.iov_len as u64).sum()
}

/// Remembers changed blocks. They are marked when the change is complete: a copy that reads the block earlier is
/// followed by another.
pub struct TrackedBlock {
    inner: Slot<dyn BlockBackend>,
    size: u64,
    event_fd: RawFd,
    changed: Arc<ChangedBlocks>,
    started: HashMap<u64, (u64, u64)>,
}

impl TrackedBlock {
    /// Wraps `inner`.
    pub fn wrap(inner: Box<dyn BlockBackend>, changed: Arc<ChangedBlocks>) -> (Self, Slot<dyn BlockBackend>) {
        let (size, event_fd) = (inner.size(), inner.event_fd());
        let slot = Slot::new(inner);
        (
            Self {
                inner: slot.clone(),
                size,
                event_fd,
                changed,
                started: HashMap::new(),
            },
            slot,
        )
    }
}

impl BlockBackend for TrackedBlock {
    fn size(&self) -> u64 {
        self.size
    }

    // SAFETY: asks what the trait does: until the request has ended the iovecs are mapped, for reads writable.
    unsafe fn submit(&mut self, tag: u64, op: BlockOp, iovecs: &[libc::iovec]) -> io::Result<()> {
        if let Some(range) = changed_range(op, total(iovecs)) {
            self.started.insert(tag, range);
        }
        // SAFETY: the caller's promise about the iovecs is passed on unchanged.
        let started = self
            .inner
            .with(|inner| unsafe { inner.submit(tag, op, iovecs) })
            .and_then(|started| started);
        if started.is_err() {
            self.started.remove(&tag);
        }
        started
    }

    fn completions(&mut self, out: &mut Vec<BlockCompletion>) {
        let first = out.len();
        let _ = self.inner.with(|inner| inner.completions(out));
        for completion in &out[first..] {
            if let Some((offset, len)) = self.started.remove(&completion.tag) {
                self.changed.mark(offset, len);
            }
        }
    }

    fn drain(&mut self) -> io::Result<()> {
        self.inner.with(|inner| inner.drain())?
    }

    fn event_fd(&self) -> RawFd {
        self.event_fd
    }
}

/// Logs changes. The bytes are copied out of guest memory once, and that copy is both logged and written, so that both
/// disks get the same bytes even when the guest changes its buffer meanwhile.
///
/// The log is applied in its order. A real disk serves requests that are under way in any order, so a change that
/// overlaps one under way waits for it: both disks then end up with the later one, as the log says.
pub struct LoggedBlock {
    inner: Slot<dyn BlockBackend>,
    size: u64,
    event_fd: RawFd,
    interposer: Arc<Interposer>,
    disk: u16,
    /// Bytes of writes under way.
    bounced: HashMap<u64, Box<[u8]>>,
    /// (offset, length) of changes under way, by tag.
    changing: HashMap<u64, (u64, u64)>,
}

impl LoggedBlock {
    /// Wraps `inner`, the backend of disk `disk`.
    pub fn wrap(
        inner: Box<dyn BlockBackend>,
        interposer: Arc<Interposer>,
        disk: u16,
    ) -> (Self, Slot<dyn BlockBackend>) {
        let (size, event_fd) = (inner.size(), inner.event_fd());
        let slot = Slot::new(inner);
        let (bounced, changing) = (HashMap::new(), HashMap::new());
        (
            Self {
                inner: slot.clone(),
                size,
                event_fd,
                interposer,
                disk,
                bounced,
                changing,
            },
            slot,
        )
    }

    fn wait_for_overlapping(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let overlaps = |(o, l): &(u64, u64)| offset < o + l && *o < offset + len;
        if self.changing.values().any(overlaps) {
            self.inner.with(|inner| inner.drain())??;
            // All are done; their completions are still to be fetched.
            self.changing.clear();
        }
        Ok(())
    }
}

/// Copies the bytes of a write out of guest memory.
///
/// # Safety
/// Every iovec must be mapped and readable.
pub(super) unsafe fn copy_out(iovecs: &[libc::iovec]) -> Vec<u8> {
    let mut data: Vec<u8> = Vec::with_capacity(total(iovecs) as usize);
    for v in iovecs {
        let at = data.len();
        data.reserve(v.iov_len);
        // SAFETY: the caller promises that the iovec is readable, and room for it was just reserved. The guest may
        // change the bytes meanwhile, which is its own race; they are only copied, never interpreted.
        unsafe {
            std::ptr::copy_nonoverlapping(v.iov_base.cast::<u8>(), data.as_mut_ptr().add(at), v.iov_len);
            data.set_len(at + v.iov_len);
        }
    }
    data
}

impl BlockBackend for LoggedBlock {
    fn size(&self) -> u64 {
        self.size
    }

    // SAFETY: asks what the trait does: until the request has ended the iovecs are mapped, for reads writable.
    unsafe fn submit(&mut self, tag: u64, op: BlockOp, iovecs: &[libc::iovec]) -> io::Result<()> {
        // What a discarded range reads as is the backend's choice; with two copies it must be the same on both.
        let op = match op {
            BlockOp::Discard { offset, len } => BlockOp::WriteZeroes {
                offset,
                len,
                unmap: true,
            },
            op => op,
        };
        let range = changed_range(op, total(iovecs));
        if let Some((offset, len)) = range {
            self.wait_for_overlapping(offset, len)?;
        }
        let mut bounce = None;
        let change = match op {
            BlockOp::Write { offset } => {
                // SAFETY: the caller promises that the iovecs stay valid until completion.
                let data = unsafe { copy_out(iovecs) };
                bounce = Some(data.clone().into_boxed_slice());
                Some(DiskChange::Write { offset, data })
            }
            BlockOp::WriteZeroes { offset, len, unmap } => Some(DiskChange::Zero { offset, len, unmap }),
            BlockOp::Flush => Some(DiskChange::Flush),
            BlockOp::Read { .. } | BlockOp::Discard { .. } => None,
        };
        let started = match &bounce {
            Some(bytes) => {
                let iovec = libc::iovec {
                    iov_base: bytes.as_ptr() as *mut libc::c_void,
                    iov_len: bytes.len(),
                };
                // SAFETY: the boxed bytes are kept in `bounced` until the completion of `tag`; moving the box does not
                // move them. A write only reads them.
                self.inner.with(|inner| unsafe { inner.submit(tag, op, &[iovec]) })
            }
            // SAFETY: the caller's promise about the iovecs is passed on unchanged.
            None => self.inner.with(|inner| unsafe { inner.submit(tag, op, iovecs) }),
        };
        started??;
        self.bounced.extend(bounce.map(|bytes| (tag, bytes)));
        self.changing.extend(range.map(|range| (tag, range)));
        if let Some(change) = change {
            self.interposer.log_disk(self.disk, change);
        }
        Ok(())
    }

    fn completions(&mut self, out: &mut Vec<BlockCompletion>) {
        let first = out.len();
        let _ = self.inner.with(|inner| inner.completions(out));
        for completion in &out[first..] {
            self.bounced.remove(&completion.tag);
            self.changing.remove(&completion.tag);
        }
    }

    fn drain(&mut self) -> io::Result<()> {
        self.inner.with(|inner| inner.drain())??;
        self.changing.clear();
        Ok(())
    }

    fn event_fd(&self) -> RawFd {
        self.event_fd
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_blocks_are_joined_and_cut_at_the_end_of_the_disk() {
        let changed = ChangedBlocks::default();
        changed.mark(TRACKED_BLOCK - 1, 2);
        changed.mark(5 * TRACKED_BLOCK, 1);
        changed.mark(0, 0);
        let mut out = Vec::new();
        changed.take(5 * TRACKED_BLOCK + 512, &mut out);
        assert_eq!(out, vec![(0, 2 * TRACKED_BLOCK), (5 * TRACKED_BLOCK, 512)]);
        out.clear();
        changed.take(5 * TRACKED_BLOCK, &mut out);
        assert!(out.is_empty());
    }

    /// Requests finish only when drained.
    struct Lazy {
        under_way: Vec<u64>,
        finished: Vec<u64>,
        drains: Arc<Mutex<Vec<Vec<u64>>>>,
    }

    impl BlockBackend for Lazy {
        fn size(&self) -> u64 {
            1 << 20
        }

        // SAFETY: asks less than the trait does: the iovecs are not looked into.
        unsafe fn submit(&mut self, tag: u64, _op: BlockOp, _iovecs: &[libc::iovec]) -> io::Result<()> {
            self.under_way.push(tag);
            Ok(())
        }

        fn completions(&mut self, out: &mut Vec<BlockCompletion>) {
            out.extend(
                self.finished
                    .drain(..)
                    .map(|tag| BlockCompletion { tag, result: Ok(0) }),
            );
        }

        fn drain(&mut self) -> io::Result<()> {
            let done = std::mem::take(&mut self.under_way);
            lock(&self.drains).push(done.clone());
            self.finished.extend(done);
            Ok(())
        }

        fn event_fd(&self) -> RawFd {
            -1
        }
    }

    #[derive(Default)]
    struct Log(Mutex<Vec<DiskChange>>);

    impl ft::interposer::LogSink for Log {
        fn input_frame(&self, _epoch: u64, _nic: u16, _data: &[u8]) -> u64 {
            0
        }

        fn disk_change(&self, _epoch: u64, _disk: u16, change: DiskChange) -> u64 {
            lock(&self.0).push(change);
            0
        }
    }

    #[test]
    fn a_change_waits_for_the_one_under_way_that_it_overlaps() {
        let (log, drains) = (Arc::new(Log::default()), Arc::new(Mutex::new(Vec::new())));
        let lazy = Lazy {
            under_way: Vec::new(),
            finished: Vec::new(),
            drains: drains.clone(),
        };
        let interposer = Interposer::new(1, 1 << 20, log.clone(), Arc::new(|| ()));
        let (mut disk, _) = LoggedBlock::wrap(Box::new(lazy), interposer, 0);
        let bytes = [7u8; 1024];
        let iovec = libc::iovec {
            iov_base: bytes.as_ptr() as *mut libc::c_void,
            iov_len: bytes.len(),
        };
        let mut submit = |tag, op, iovecs: &[libc::iovec]| {
            // SAFETY: `bytes` outlives the disk's use of it.
            unsafe { disk.submit(tag, op, iovecs) }.unwrap();
        };
        submit(1, BlockOp::Write { offset: 0 }, &[iovec]);
        submit(2, BlockOp::Write { offset: 1024 }, &[iovec]);
        submit(3, BlockOp::Read { offset: 0 }, &[iovec]);
        submit(4, BlockOp::Flush, &[]);
        assert!(lock(&drains).is_empty());
        submit(5, BlockOp::Discard { offset: 2047, len: 1 }, &[]);
        assert_eq!(*lock(&drains), [vec![1, 2, 3, 4]]);
        submit(6, BlockOp::Write { offset: 0 }, &[iovec]);
        assert_eq!(lock(&drains).len(), 1);
        let mut done = Vec::new();
        disk.completions(&mut done);
        assert_eq!(done.iter().map(|c| c.tag).collect::<Vec<_>>(), [1, 2, 3, 4]);
        disk.drain().unwrap();
        let zero = DiskChange::Zero {
            offset: 2047,
            len: 1,
            unmap: true,
        };
        let logged = lock(&log.0);
        assert_eq!(logged.len(), 5);
        assert_eq!((&logged[2], &logged[3]), (&DiskChange::Flush, &zero));
    }
}
