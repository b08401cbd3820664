//! The interposer at the devices: backends around the real backends.
//!
//! With FT on, each device's backend is wrapped; every call comes with the device's lock held, so the wrappers need no
//! lock of their own for order. The wrapped backend sits in a [`Slot`] so that it can be taken out again.
//!
//! * [`HeldNet`]: transmitted frames are copied and held (R1), received frames are copied and logged before the guest
//!   sees them (R8).
//! * disks: [`super::blocks`].
//! * [`HeldConsole`]: output is held (R1).
//! * [`ReplayNet`]: after a failover, gives the logged frames to the guest again (R8).

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

use ft::interposer::Interposer;
use virtio_devices::backend::{ConsoleBackend, MAX_FRAME_SIZE, NetBackend};

use crate::interrupts::lock;

/// Where a wrapped backend waits to be taken out again.
pub struct Slot<T: ?Sized>(Arc<Mutex<Option<Box<T>>>>);

impl<T: ?Sized> Clone for Slot<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: ?Sized> Slot<T> {
    pub(super) fn new(inner: Box<T>) -> Self {
        Self(Arc::new(Mutex::new(Some(inner))))
    }

    /// Takes the backend out; the wrapper answers with errors from then on.
    pub fn take(&self) -> Option<Box<T>> {
        lock(&self.0).take()
    }

    pub(super) fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> io::Result<R> {
        match lock(&self.0).as_deref_mut() {
            Some(inner) => Ok(f(inner)),
            None => Err(io::Error::other("the backend was taken out of its FT wrapper")),
        }
    }
}

/// Longest wait for a backend that cannot take a frame at the moment. Then frames are dropped, as a network does.
const TRANSMIT_PATIENCE_MS: i32 = 20;

/// Transmits frames whose epochs are committed. Only one of them waits for a jammed backend: who releases them has other
/// things to do.
pub fn transmit_all<'a>(backend: &mut dyn NetBackend, frames: impl Iterator<Item = &'a [u8]>) {
    let mut patience = TRANSMIT_PATIENCE_MS;
    for frame in frames {
        let mut sent = backend.transmit(&[IoSlice::new(frame)]);
        if sent.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock) && patience > 0 {
            let mut fd = libc::pollfd {
                fd: backend.poll_fd(),
                events: libc::POLLOUT,
                revents: 0,
            };
            // SAFETY: one valid pollfd; the backend keeps its descriptor open.
            if unsafe { libc::poll(&mut fd, 1, patience) } <= 0 {
                patience = 0;
            }
            sent = backend.transmit(&[IoSlice::new(frame)]);
        }
        if let Err(e) = sent {
            log::debug!("ft: a released frame is dropped: {e}");
        }
    }
}

impl Slot<dyn NetBackend> {
    /// Transmits frames that were held, past the wrapper.
    pub fn transmit_now<'a>(&self, frames: impl Iterator<Item = &'a [u8]>) {
        // A backend that was taken out has no more held frames: they were released before.
        let _ = self.with(|backend| transmit_all(backend, frames));
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
