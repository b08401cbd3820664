//! The backend on io_uring. Requests are handed to the kernel together, by the next call of `completions` or `drain`.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, Probe, opcode, types};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::file::{DiskFile, is_unsupported, punch_hole, zero_mode};
use super::image::DiskImage;
use crate::backend::{BlockBackend, BlockCompletion, BlockOp};

/// Bytes of a read through the page cache from which on a thread of the kernel does it: else this thread would copy one
/// after another.
const LONG_READ: usize = 128 << 10;

/// A request that the kernel has, or will get.
#[derive(Default)]
struct Pending {
    tag: u64,
    op: Option<BlockOp>,
    /// Kept until the request is complete: the kernel may read them late.
    iovecs: Vec<libc::iovec>,
}

/// The backend.
pub(super) struct Uring {
    ring: IoUring,
    disk: Arc<DiskFile>,
    event: EventFd,
    pending: Vec<Pending>,
    free: Vec<usize>,
    unsubmitted: usize,
    done: Vec<BlockCompletion>,
}

// SAFETY: the iovecs in `pending` belong to no thread; their submitter promised that they stay valid.
unsafe impl Send for Uring {}

impl Uring {
    /// Fails when the kernel has no io_uring, or lacks one of the operations.
    pub(super) fn new(disk: Arc<DiskFile>, queue_size: u16) -> io::Result<Self> {
        let ring = IoUring::new(u32::from(queue_size).max(1))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code)) || !ring.params().is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Self {
            ring,
            disk,
            event,
            pending: Vec::new(),
            free: Vec::new(),
            unsubmitted: 0,
            done: Vec::new(),
        })
    }

    fn under_way(&self) -> usize {
        self.pending.len() - self.free.len()
    }

    /// The entry for the request at `index`.
    fn entry(&self, index: usize, op: BlockOp) -> Entry {
        let iovecs = &self.pending[index].iovecs;
        let (pointer, count) = (iovecs.as_ptr(), iovecs.len() as u32);
        let plain = types::Fd(self.disk.plain_fd());
        let entry = match op {
            BlockOp::Read { offset } => {
                let fd = self.disk.fd(offset, iovecs);
                let cached = fd == self.disk.plain_fd();
                let long = cached && iovecs.iter().map(|v| v.iov_len).sum::<usize>() >= LONG_READ;
                let flags = if long { Flags::ASYNC } else { Flags::empty() };
                let read = opcode::Readv::new(types::Fd(fd), pointer, count).offset(offset);
                read.build().flags(flags)
            }
            BlockOp::Write { offset } => opcode::Writev::new(types::Fd(self.disk.fd(offset, iovecs)), pointer, count)
                .offset(offset)
                .build(),
            BlockOp::Flush => opcode::Fsync::new(plain).flags(types::FsyncFlags::DATASYNC).build(),
            BlockOp::Discard { offset, len } => opcode::Fallocate::new(plain, len)
                .offset(offset)
                .mode(punch_hole())
                .build(),
            BlockOp::WriteZeroes { offset, len, unmap } => opcode::Fallocate::new(plain, len)
                .offset(offset)
                .mode(zero_mode(unmap))
                .build(),
        };
        entry.user_data(index as u64)
    }

    /// Gives everything to the kernel and waits until `want` requests are complete.
    fn enter(&mut self, want: usize) -> io::Result<()> {
        loop {
            if self.unsubmitted == 0 && want == 0 {
                return Ok(());
            }
            match self.ring.submit_and_wait(want) {
                Ok(n) => {
                    self.unsubmitted -= n.min(self.unsubmitted);
                    if self.unsubmitted == 0 {
                        return Ok(());
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The kernel is short of memory, or of room for completions: make some.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    self.reap();
                    std::thread::sleep(Duration::from_micros(200));
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Takes what the kernel completed.
    fn reap(&mut self) {
        let (pending, free, done, disk) = (&mut self.pending, &mut self.free, &mut self.done, &self.disk);
        for entry in self.ring.completion() {
            let index = entry.user_data() as usize;
            let Some(request) = pending.get_mut(index) else {
                continue;
            };
            let Some(op) = request.op.take() else { continue };
            free.push(index);
            let result = conclude(disk, op, &request.iovecs, entry.result());
            let tag = request.tag;
            done.push(BlockCompletion { tag, result });
        }
    }
}

/// The kernel's answer as a request's result. What it did not finish (a short transfer, a mode that the file system
/// lacks) is finished here.
fn conclude(disk: &DiskFile, op: BlockOp, iovecs: &[libc::iovec], answer: i32) -> io::Result<u32> {
    let total: usize = iovecs.iter().map(|v| v.iov_len).sum();
    let (offset, write) = match op {
        BlockOp::Read { offset } => (offset, false),
        BlockOp::Write { offset } => (offset, true),
        _ if answer >= 0 => return Ok(0),
        _ => {
            let e = io::Error::from_raw_os_error(-answer);
            return match op {
                BlockOp::Discard { .. } if is_unsupported(&e) => Ok(0),
                BlockOp::WriteZeroes { offset, len, .. } if is_unsupported(&e) => disk.write_zeroes(offset, len),
                _ => Err(e),
            };
        }
    };
    let again = [-libc::EAGAIN, -libc::EINTR].contains(&answer);
    let done = match usize::try_from(answer) {
        Ok(n) if n == total => return Ok(n as u32),
        Ok(n) => n,
        Err(_) if again => 0,
        Err(_) => return Err(io::Error::from_raw_os_error(-answer)),
    };
    // SAFETY: the submitter's promise holds until the completion is returned.
    unsafe { disk.transfer(offset, iovecs, done, write) }
}

impl BlockBackend for Uring {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    // SAFETY: asks what the trait does: until the request has ended the iovecs are mapped, for reads writable.
    unsafe fn submit(&mut self, tag: u64, op: BlockOp, iovecs: &[libc::iovec]) -> io::Result<()> {
        let index = self.free.pop().unwrap_or_else(|| {
            self.pending.push(Pending::default());
            self.pending.len() - 1
        });
        let request = &mut self.pending[index];
        (request.tag, request.op) = (tag, Some(op));
        request.iovecs.clear();
        request.iovecs.extend_from_slice(iovecs);
        let entry = self.entry(index, op);
        loop {
            // SAFETY: descriptor, iovec array and buffers stay valid until the completion: the disk is owned, the array
            // is not touched while `op` is set, and the caller vouches for the buffers.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                break;
            }
            if let Err(e) = self.enter(0) {
                self.pending[index].op = None;
                self.free.push(index);
                return Err(e);
            }
        }
        self.unsubmitted += 1;
        Ok(())
    }

    fn completions(&mut self, out: &mut Vec<BlockCompletion>) {
        if self.unsubmitted > 0 {
            // Requests that complete at once are found below; they need not wake anyone.
            self.ring.completion().disable_eventfd();
            if let Err(e) = self.enter(0) {
                log::error!("io_uring: {e}");
            }
            self.reap();
            self.ring.completion().enable_eventfd();
        }
        // Again after the eventfd speaks: what completed in between would go unnoticed.
        self.reap();
        out.append(&mut self.done);
    }

    fn drain(&mut self) -> io::Result<()> {
        while self.under_way() > 0 {
            self.enter(1)?;
            self.reap();
        }
        Ok(())
    }

    fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel must not touch guest RAM any longer, nor the iovecs.
        if let Err(e) = self.drain() {
            log::error!("io_uring: requests cannot be waited for: {e}");
        }
    }
}
