//! The entropy device (virtio 1.3, 5.4): fills buffers with random bytes of the host.

pub mod persist;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::RawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::model::{Io, Model, Ready};
use crate::ring::{Chain, QueueError};
use crate::{DeviceState, Error, GuestMemory};
use persist::{RngState, VERSION};

/// Number of queues.
pub const QUEUES: usize = 1;
const QUEUE_SIZE: u16 = 256;
/// Bytes given at most for one buffer; a driver asks again.
const MAX_BYTES: usize = 4096;
/// Buffers that are served before others may have the device.
const BATCH: usize = 32;

/// The entropy device.
pub struct Rng {
    source: Option<File>,
    chain: Chain,
}

/// Bytes of the kernel's generator, which never makes wait once the host has booted.
fn getrandom(bytes: &mut [u8]) -> io::Result<usize> {
    // SAFETY: `bytes` is valid for its length.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

impl Rng {
    /// A device whose bytes come from the file `source`. When it has none at the moment, the kernel's generator serves.
    pub fn new(source: &Path) -> Result<Self, Error> {
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(source)
            .map_err(|e| Error::Backend {
                what: format!("random number source {}", source.display()),
                source: e,
            })?;
        Ok(Self {
            source: Some(file),
            chain: Chain::default(),
        })
    }

    fn fill(&mut self, bytes: &mut [u8]) -> usize {
        if let Some(Ok(n @ 1..)) = self.source.as_mut().map(|file| file.read(bytes)) {
            return n;
        }
        match getrandom(bytes) {
            Ok(n) => n,
            Err(e) => {
                log::error!("no random numbers: {e}");
                0
            }
        }
    }
}

impl Model for Rng {
    const TYPE: u16 = 4;
    const CLASS: [u8; 3] = [0xff, 0, 0];

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn reset(&mut self, _memory: &GuestMemory) {}

    fn serve(&mut self, io: &mut Io<'_>, ready: &mut Ready) -> Result<(), QueueError> {
        *ready = Ready::default();
        let mut bytes = [0; MAX_BYTES];
        for _ in 0..BATCH {
            if !io.rings[0].pop(io.memory, &mut self.chain)? {
                if io.rings[0].enable_kicks(io.memory)? {
                    continue;
                }
                return io.finish(0);
            }
            if self.chain.readable.pieces() > 0 || self.chain.writable.pieces() == 0 {
                return Err(QueueError::Direction);
            }
            let want = self.chain.writable.len().min(MAX_BYTES);
            let n = self.fill(&mut bytes[..want]);
            let written = self.chain.writable.write(io.memory, 0, &bytes[..n]);
            io.rings[0].push_used(io.memory, self.chain.head, written as u32)?;
        }
        ready.set_queue(0, true);
        io.finish(0)
    }

    fn quiesce(&mut self, _io: &mut Io<'_>) -> Result<(), QueueError> {
        Ok(())
    }

    fn poll(&self) -> Option<(RawFd, bool)> {
        None
    }

    fn close(&mut self) {
        self.source = None;
    }

    fn state(&self) -> DeviceState {
        DeviceState::Rng(RngState { version: VERSION })
    }

    fn set_state(&mut self, state: &DeviceState) -> Result<(), Error> {
        match state {
            DeviceState::Rng(RngState { version: VERSION }) => Ok(()),
            DeviceState::Rng(state) => Err(Error::State(format!("entropy device, version {}", state.version))),
            other => Err(other.wrong_kind()),
        }
    }
}
