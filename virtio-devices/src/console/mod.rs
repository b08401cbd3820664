//! The console device (virtio 1.3, 5.3): one port, no size.

pub mod persist;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::RawFd;

use crate::backend::ConsoleBackend;
use crate::handle::Handle;
use crate::model::{Io, Model, Ready};
use crate::ring::{Chain, QueueError};
use crate::{DeviceState, Error, GuestMemory};
use persist::{ConsoleState, VERSION};

/// Number of queues.
pub const QUEUES: usize = 2;
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZE: u16 = 256;
/// Buffers that are served before others may have the device.
const BATCH: usize = 32;
/// Bytes that are moved at once.
const PIECE: usize = 4096;
/// Bytes of one output buffer that are written; a longer one is cut. Keeps one request short.
const MAX_OUTPUT: usize = 1 << 20;

/// The console device.
pub struct Console {
    backend: Option<Box<dyn ConsoleBackend>>,
    chain: Chain,
    /// The input may have bytes. It is looked at when there are buffers.
    input_waits: bool,
    input_ended: bool,
    output_failed: bool,
}

impl Console {
    /// A device on `backend`.
    pub fn new(backend: Box<dyn ConsoleBackend>) -> Self {
        Self {
            backend: Some(backend),
            chain: Chain::default(),
            input_waits: true,
            input_ended: false,
            output_failed: false,
        }
    }

    fn output(&mut self, io: &mut Io<'_>) -> Result<bool, QueueError> {
        let Some(backend) = &mut self.backend else {
            return Ok(false);
        };
        let mut piece = [0; PIECE];
        for _ in 0..BATCH {
            if !io.rings[TX].pop(io.memory, &mut self.chain)? {
                if io.rings[TX].enable_kicks(io.memory)? {
                    continue;
                }
                io.finish(TX)?;
                return Ok(false);
            }
            if self.chain.writable.pieces() > 0 {
                return Err(QueueError::Direction);
            }
            let mut done = 0;
            while done < MAX_OUTPUT {
                let n = self.chain.readable.read(done, &mut piece);
                if n == 0 {
                    break;
                }
                done += n;
                if let Err(e) = backend.write(&piece[..n])
                    && !std::mem::replace(&mut self.output_failed, true)
                {
                    log::warn!("virtio console: output is lost: {e}");
                }
            }
            io.rings[TX].push_used(io.memory, self.chain.head, 0)?;
        }
        io.finish(TX)?;
        Ok(true)
    }

    fn input(&mut self, io: &mut Io<'_>) -> Result<bool, QueueError> {
        let Some(backend) = &mut self.backend else {
            return Ok(false);
        };
        let mut piece = [0; PIECE];
        for _ in 0..BATCH {
            if !self.input_waits || self.input_ended {
                io.finish(RX)?;
                return Ok(false);
            }
            if !io.rings[RX].pop(io.memory, &mut self.chain)? {
                if io.rings[RX].enable_kicks(io.memory)? {
                    continue;
                }
                io.finish(RX)?;
                return Ok(false);
            }
            if self.chain.readable.pieces() > 0 || self.chain.writable.pieces() == 0 {
                return Err(QueueError::Direction);
            }
            let room = self.chain.writable.len().min(PIECE);
            match backend.read(&mut piece[..room]) {
                Ok(n @ 1..) => {
                    let written = self.chain.writable.write(io.memory, 0, &piece[..n.min(room)]);
                    io.rings[RX].push_used(io.memory, self.chain.head, written as u32)?;
                }
                result => {
                    io.rings[RX].put_back(1);
                    self.input_waits = false;
                    match result {
                        Ok(_) => self.input_ended = true,
                        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                        Err(e) => {
                            log::warn!("virtio console: no more input: {e}");
                            self.input_ended = true;
                        }
                    }
                }
            }
        }
        io.finish(RX)?;
        Ok(true)
    }
}

impl Model for Console {
    const TYPE: u16 = 3;
    const CLASS: [u8; 3] = [7, 0x80, 0];

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn reset(&mut self, _memory: &GuestMemory) {}

    fn serve(&mut self, io: &mut Io<'_>, ready: &mut Ready) -> Result<(), QueueError> {
        if ready.queue(TX) {
            let more = self.output(io)?;
            ready.set_queue(TX, more);
        }
        if ready.readable || ready.queue(RX) {
            self.input_waits |= ready.readable;
            let more = self.input(io)?;
            ready.set_queue(RX, more);
        }
        (ready.readable, ready.writable) = (false, false);
        Ok(())
    }

    fn quiesce(&mut self, _io: &mut Io<'_>) -> Result<(), QueueError> {
        Ok(())
    }

    fn poll(&self) -> Option<(RawFd, bool)> {
        let backend = self.backend.as_ref().filter(|_| !self.input_ended)?;
        backend.poll_fd().map(|fd| (fd, false))
    }

    fn close(&mut self) {
        self.backend = None;
    }

    fn state(&self) -> DeviceState {
        DeviceState::Console(ConsoleState { version: VERSION })
    }

    fn set_state(&mut self, state: &DeviceState) -> Result<(), Error> {
        match state {
            DeviceState::Console(ConsoleState { version: VERSION }) => Ok(()),
            DeviceState::Console(state) => Err(Error::State(format!("console, version {}", state.version))),
            other => Err(other.wrong_kind()),
        }
    }
}

impl Handle<Console> {
    /// Puts the backend that `f` makes of the present one in its place.
    pub fn exchange(&self, f: impl FnOnce(Box<dyn ConsoleBackend>) -> Box<dyn ConsoleBackend>) {
        self.exchange_with(|console| {
            console.backend = console.backend.take().map(f);
            console.input_waits = true;
        });
    }
}
