//! The interposer at the devices: backends around the real backends.
//!
//! With FT on, each device's backend is wrapped; every call comes with the device's lock held, so the wrappers need no
//! lock of their own for order. The wrapped backend sits in a [`Slot`] so that it can be taken out again.
//!
//! * [`HeldNet`]: transmitted frames are copied and held (R1), received frames are copied and logged before the guest
//!   sees them (R8).
//! * [`TrackedBlock`]: during pre-copy, remembers which blocks were changed.
//! * [`LoggedBlock`]: logs every change of the disk in the order of its start (R3).
//! * [`HeldConsole`]: output is held (R1).
//! * [`ReplayNet`]: after a failover, gives the logged frames to the guest again (R8).

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

use ft::interposer::Interposer;
use ft::machine::DiskChange;
use virtio_devices::backend::{BlockBackend, BlockCompletion, BlockOp, ConsoleBackend, MAX_FRAME_SIZE, NetBackend};

use crate::interrupts::lock;

/// Where a wrapped backend waits to be taken out again.
pub struct Slot<T: ?Sized>(Arc<Mutex<Option<Box<T>>>>);

impl<T: ?Sized> Clone for Slot<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: ?Sized> Slot<T> {
    fn new(inner: Box<T>) -> Self {
        Self(Arc::new(Mutex::new(Some(inner))))
    }

    /// Takes the backend out; the wrapper answers with errors from then on.
    pub fn take(&self) -> Option<Box<T>> {
        lock(&self.0).take()
    }

    fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> io::Result<R> {
        match lock(&self.0).as_deref_mut() {
            Some(inner) => Ok(f(inner)),
            None => Err(io::Error::other("the backend was taken out of its FT wrapper")),
        }
    }
}

/// Longest wait for a backend that cannot take a frame at the moment. Then the frame is dropped, as a network does.
const TRANSMIT_PATIENCE_MS: i32 = 20;

/// Transmits a frame whose epoch is committed.
pub fn transmit_or_drop(backend: &mut dyn NetBackend, frame: &[u8]) {
    for attempt in 0..2 {
        match backend.transmit(&[IoSlice::new(frame)]) {
            Ok(()) => return,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && attempt == 0 => {
                let mut fd = libc::pollfd {
                    fd: backend.poll_fd(),
                    events: libc::POLLOUT,
                    revents: 0,
                };
                // SAFETY: one valid pollfd; the backend keeps its descriptor open.
                unsafe { libc::poll(&mut fd, 1, TRANSMIT_PATIENCE_MS) };
            }
            Err(e) => return log::debug!("ft: a released frame is dropped: {e}"),
        }
    }
}

impl Slot<dyn NetBackend> {
    /// Transmits a frame that was held, past the wrapper.
    pub fn transmit_now(&self, frame: &[u8]) {
        // A backend that was taken out has no more held frames: they were released before.
        let _ = self.with(|backend| transmit_or_drop(backend, frame));
    }
}

impl Slot<dyn ConsoleBackend> {
    /// Writes bytes that were held, past the wrapper.
    pub fn write_now(&self, bytes: &[u8]) {
        match self.with(|backend| backend.write(bytes)) {
            Ok(Ok(())) => {}
            Ok(Err(e)) | Err(e) => log::debug!("ft: released console output is dropped: {e}"),
        }
    }
}

/// Copies `frame` into `bufs`; as much as there is room for. Returns the bytes copied.
fn scatter(frame: &[u8], bufs: &mut [IoSliceMut<'_>]) -> usize {
    let mut rest = frame;
    for buf in bufs {
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        rest = &rest[n..];
    }
    frame.len() - rest.len()
}

fn gather(frame: &[IoSlice<'_>]) -> Vec<u8> {
    let mut data = Vec::with_capacity(frame.iter().map(|s| s.len()).sum());
    for part in frame {
        data.extend_from_slice(part);
    }
    data
}

/// Holds transmitted frames, logs received ones.
pub struct HeldNet {
    inner: Slot<dyn NetBackend>,
    poll_fd: RawFd,
    interposer: Arc<Interposer>,
    nic: u16,
    frame: Vec<u8>,
}

impl HeldNet {
    /// Wraps `inner`, the backend of network device `nic`.
    pub fn wrap(inner: Box<dyn NetBackend>, interposer: Arc<Interposer>, nic: u16) -> (Self, Slot<dyn NetBackend>) {
        let poll_fd = inner.poll_fd();
        let slot = Slot::new(inner);
        (
            Self {
                inner: slot.clone(),
                poll_fd,
                interposer,
                nic,
                frame: vec![0; MAX_FRAME_SIZE],
            },
            slot,
        )
    }
}

impl NetBackend for HeldNet {
    fn transmit(&mut self, frame: &[IoSlice<'_>]) -> io::Result<()> {
        self.interposer.hold_frame(self.nic, gather(frame));
        Ok(())
    }

    fn receive(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let frame = &mut self.frame;
        let n = self
            .inner
            .with(|inner| inner.receive(&mut [IoSliceMut::new(frame)]))??;
        let room: usize = bufs.iter().map(|b| b.len()).sum();
        if n > room {
            // Dropped as a full receive queue drops it; never logged, so that a replay cannot differ.
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.interposer.log_frame(self.nic, &self.frame[..n]);
        Ok(scatter(&self.frame[..n], bufs))
    }

    fn poll_fd(&self) -> RawFd {
        self.poll_fd
    }

    fn has_pending(&self) -> bool {
        self.inner.with(|inner| inner.has_pending()).unwrap_or(false)
    }

    fn set_offloads(&mut self, tun_flags: u32) -> io::Result<()> {
        self.inner.with(|inner| inner.set_offloads(tun_flags))?
    }
}

/// Gives logged frames to the guest before those of the real backend.
pub struct ReplayNet {
    inner: Box<dyn NetBackend>,
    frames: VecDeque<Vec<u8>>,
}

impl ReplayNet {
    /// `frames` in the order in which the guest of the primary received them.
    pub fn new(inner: Box<dyn NetBackend>, frames: Vec<Vec<u8>>) -> Self {
        Self {
            inner,
            frames: frames.into(),
        }
    }
}

impl NetBackend for ReplayNet {
    fn transmit(&mut self, frame: &[IoSlice<'_>]) -> io::Result<()> {
        self.inner.transmit(frame)
    }

    fn receive(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let room: usize = bufs.iter().map(|b| b.len()).sum();
        while let Some(frame) = self.frames.pop_front() {
            if frame.len() <= room {
                return Ok(scatter(&frame, bufs));
            }
        }
        self.inner.receive(bufs)
    }

    fn poll_fd(&self) -> RawFd {
        self.inner.poll_fd()
    }

    fn has_pending(&self) -> bool {
        !self.frames.is_empty() || self.inner.has_pending()
    }

    fn set_offloads(&mut self, tun_flags: u32) -> io::Result<()> {
        self.inner.set_offloads(tun_flags)
    }
}

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

fn changed_range(op: BlockOp, len: u64) -> Option<(u64, u64)> {
    match op {
        BlockOp::Write { offset } => Some((offset, len)),
        BlockOp::WriteZeroes { offset, len, .. } | BlockOp::Discard { offset, len } => Some((offset, len)),
        BlockOp::Read { .. } | BlockOp::Flush => None,
    }
}

fn total(iovecs: &[libc::iovec]) -> u64 {
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
unsafe fn copy_out(iovecs: &[libc::iovec]) -> Vec<u8> {
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

/// Holds console output.
pub struct HeldConsole {
    inner: Slot<dyn ConsoleBackend>,
    poll_fd: Option<RawFd>,
    interposer: Arc<Interposer>,
    console: u16,
}

impl HeldConsole {
    /// Wraps `inner`, the backend of console `console`.
    pub fn wrap(
        inner: Box<dyn ConsoleBackend>,
        interposer: Arc<Interposer>,
        console: u16,
    ) -> (Self, Slot<dyn ConsoleBackend>) {
        let poll_fd = inner.poll_fd();
        let slot = Slot::new(inner);
        (
            Self {
                inner: slot.clone(),
                poll_fd,
                interposer,
                console,
            },
            slot,
        )
    }
}

impl ConsoleBackend for HeldConsole {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.interposer.hold_console(self.console, bytes);
        Ok(())
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.inner.with(|inner| inner.read(buf))?
    }

    fn poll_fd(&self) -> Option<RawFd> {
        self.poll_fd
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
