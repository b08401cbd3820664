//! Frames from a byte stream.

use std::io::{self, IoSliceMut, Read};

use thiserror::Error;

use super::decode::decode;
use super::frame::Frame;
use super::payload::{Payload, Pool};
use super::{DecodeError, header};

/// Why no frame came.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The connection ended at the end of a frame, or in one.
    #[error("the connection was closed")]
    Closed,
    /// The kernel reports an error.
    #[error("the connection failed: {0}")]
    Io(#[source] io::Error),
    /// What came is no frame, or a damaged one.
    #[error("frame number {number}: {source}")]
    Decode {
        /// How many frames came before it.
        number: u64,
        /// What is wrong with it.
        source: DecodeError,
    },
}

/// What the header of a frame says beside its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope {
    /// See [`header`].
    pub mark: u64,
    /// See [`header`].
    pub stamp: u64,
    /// Bytes on the channel.
    pub size: usize,
}

/// Bytes read ahead: what of a large frame is read ahead is copied once more.
const BUFFER: usize = 8 << 10;

/// Reads frames; checks everything that does not need the protocol's state.
pub struct FrameReader<R> {
    stream: R,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    next_seq: u64,
    pool: Pool,
}

impl<R: Read> FrameReader<R> {
    /// Reads from `stream`, whose next frame must have number 0.
    pub fn new(stream: R) -> Self {
        Self {
            stream,
            buffer: vec![0; BUFFER].into(),
            start: 0,
            end: 0,
            next_seq: 0,
            pool: Pool::default(),
        }
    }

    /// The stream.
    pub fn get_ref(&self) -> &R {
        &self.stream
    }

    /// Whether a frame (or its beginning) was read already and waits in the buffer.
    pub fn has_buffered(&self) -> bool {
        self.start < self.end
    }

    fn fill(&mut self, wanted: usize, heard: &mut dyn FnMut()) -> Result<(), ReadError> {
        if self.buffer.len() - self.start < wanted {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        while self.end - self.start < wanted {
            match self.stream.read(&mut self.buffer[self.end..]) {
                Ok(0) => return Err(ReadError::Closed),
                Ok(n) => self.end += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(ReadError::Io(e)),
            }
            heard();
        }
        Ok(())
    }

    fn wrong(&self, source: DecodeError) -> ReadError {
        let number = self.next_seq;
        ReadError::Decode { number, source }
    }

    /// The next frame. `heard` is called whenever bytes arrive: a sign of life even in the middle of a long frame.
    pub fn next(&mut self, heard: &mut dyn FnMut()) -> Result<(Envelope, Frame), ReadError> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        self.fill(header::SIZE, heard)?;
        let mut bytes = [0; header::SIZE];
        bytes.copy_from_slice(&self.buffer[self.start..self.start + header::SIZE]);
        let header = header::Header::decode(&bytes).map_err(|e| self.wrong(e))?;
        if header.seq != self.next_seq {
            return Err(self.wrong(DecodeError::Sequence {
                found: header.seq,
                expected: self.next_seq,
            }));
        }
        self.start += header::SIZE;
        let payload = self.payload(header.len as usize, heard)?;
        let computed = crc32c::crc32c(&payload);
        if computed != header.payload_crc {
            return Err(self.wrong(DecodeError::PayloadChecksum {
                kind: header.kind,
                found: header.payload_crc,
                computed,
            }));
        }
        let size = header::SIZE + payload.len();
        let frame = decode(header.kind, header.flags, payload).map_err(|e| self.wrong(e))?;
        self.next_seq += 1;
        Ok((
            Envelope {
                mark: header.mark,
                stamp: header.stamp,
                size,
            },
            frame,
        ))
    }

    fn payload(&mut self, len: usize, heard: &mut dyn FnMut()) -> Result<Payload, ReadError> {
        let mut payload = self.pool.take(len);
        let mut filled = len.min(self.end - self.start);
        payload[..filled].copy_from_slice(&self.buffer[self.start..self.start + filled]);
        self.start += filled;
        while filled < len {
            (self.start, self.end) = (0, 0);
            // What follows it is read together with its end.
            let mut parts = [
                IoSliceMut::new(&mut payload[filled..]),
                IoSliceMut::new(&mut self.buffer),
            ];
            match self.stream.read_vectored(&mut parts) {
                Ok(0) => return Err(ReadError::Closed),
                Ok(n) => {
                    let of_payload = n.min(len - filled);
                    filled += of_payload;
                    self.end = n - of_payload;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(ReadError::Io(e)),
            }
            heard();
        }
        Ok(payload)
    }
}
