//! Backends: what a device model hands requests to.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::RawFd;

/// Size in bytes of the virtio-net header that starts every frame here (virtio 1.3, 5.1.6: with num_buffers).
pub const VNET_HEADER_SIZE: usize = 12;

/// Largest frame with its header: 64 KiB of TCP segment, Ethernet and VLAN headers.
pub const MAX_FRAME_SIZE: usize = VNET_HEADER_SIZE + 65_550;

/// What carries a network device's frames. Frames start with the vnet header. Called with the device's lock held.
pub trait NetBackend: Send {
    /// Takes one frame of the guest. `WouldBlock`: try again when [`NetBackend::poll_fd`] is writable.
    fn transmit(&mut self, frame: &[IoSlice<'_>]) -> io::Result<()>;
    /// Fills `bufs` with one frame for the guest and returns its length. `WouldBlock`: none is waiting.
    fn receive(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize>;
    /// Readable when frames may be waiting. Watched for edges: it is looked at again after `WouldBlock` alone.
    fn poll_fd(&self) -> RawFd;
    /// Frames wait inside the backend itself although `poll_fd` may not be readable.
    fn has_pending(&self) -> bool {
        false
    }
    /// The guest's choice of checksum and segmentation offloads (TUN_F_* bits) for received frames.
    fn set_offloads(&mut self, tun_flags: u32) -> io::Result<()>;
}

/// One request to a disk; offsets and lengths in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockOp {
    /// Read at `offset` into the given buffers.
    Read {
        /// First byte.
        offset: u64,
    },
    /// Write at `offset` from the given buffers.
    Write {
        /// First byte.
        offset: u64,
    },
    /// Make all completed writes durable.
    Flush,
    /// The range's content is no longer needed.
    Discard {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The range must read as zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The backing store may be given back.
        unmap: bool,
    },
}

/// A finished request.
#[derive(Debug)]
pub struct BlockCompletion {
    /// As given to [`BlockBackend::submit`].
    pub tag: u64,
    /// Bytes moved, or the error.
    pub result: io::Result<u32>,
}

/// What serves a block device. Called with the device's lock held.
pub trait BlockBackend: Send {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// Starts a request, already checked to be within the disk. At the latest, it starts in the next call of
    /// [`BlockBackend::completions`], which follows each batch of submissions.
    ///
    /// # Safety
    /// Every iovec must stay valid (mapped, and for reads writable) until the completion of `tag` was returned.
    unsafe fn submit(&mut self, tag: u64, op: BlockOp, iovecs: &[libc::iovec]) -> io::Result<()>;
    /// Appends the requests that finished since the last call.
    fn completions(&mut self, out: &mut Vec<BlockCompletion>);
    /// Blocks until every submitted request has finished; their completions are then returned by
    /// [`BlockBackend::completions`].
    fn drain(&mut self) -> io::Result<()>;
    /// Becomes readable when completions wait. Watched for edges, never read.
    fn event_fd(&self) -> RawFd;
}

/// What a console's output goes to and its input comes from. Called with the device's lock held.
pub trait ConsoleBackend: Send {
    /// Takes bytes of the guest.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Input for the guest; `WouldBlock` when none waits, `Ok(0)` at the end of the input.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize>;
    /// Readable when input waits; `None` for an output-only console.
    fn poll_fd(&self) -> Option<RawFd>;
}
