//! A TCP connection with hang guards: nothing waits for ever.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use thiserror::Error;

use crate::dial::Dial;

/// Silence of the guest after which a client gives up. A hang guard, far above any failover.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(40);

/// What can go wrong on a connection.
#[derive(Debug, Error)]
pub enum Error {
    /// No connection.
    #[error("connect to {to}: {source}")]
    Connect {
        /// Where to.
        to: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The connection broke.
    #[error("connection broke while {doing}: {source}")]
    Broken {
        /// What was done.
        doing: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The guest closed the connection.
    #[error("the guest closed the connection while {doing}")]
    Closed {
        /// What was done.
        doing: &'static str,
    },
    /// Nothing came for too long.
    #[error("no progress for {} s while {doing}", SILENCE_LIMIT.as_secs())]
    Hang {
        /// What was done.
        doing: &'static str,
    },
    /// The answer is not what it must be.
    #[error("{0}")]
    Wrong(String),
}

/// A connection, with a buffer for lines.
pub struct Wire {
    stream: TcpStream,
    buffer: Vec<u8>,
    start: usize,
}

fn classify(doing: &'static str, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Error::Hang { doing },
        io::ErrorKind::UnexpectedEof => Error::Closed { doing },
        _ => Error::Broken { doing, source },
    }
}

impl Wire {
    /// Connects.
    pub fn open(dial: &dyn Dial, to: SocketAddr) -> Result<Self, Error> {
        let connect = |source| Error::Connect { to, source };
        let stream = dial.tcp(to).map_err(connect)?;
        stream.set_nodelay(true).map_err(connect)?;
        stream.set_read_timeout(Some(SILENCE_LIMIT)).map_err(connect)?;
        stream.set_write_timeout(Some(SILENCE_LIMIT)).map_err(connect)?;
        Ok(Self {
            stream,
            buffer: Vec::new(),
            start: 0,
        })
    }

    /// Sends all bytes.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.stream.write_all(bytes).map_err(|e| classify("sending", e))
    }

    /// Fills `buf`.
    pub fn receive(&mut self, buf: &mut [u8]) -> Result<(), Error> {
        let kept = (self.buffer.len() - self.start).min(buf.len());
        buf[..kept].copy_from_slice(&self.buffer[self.start..self.start + kept]);
        self.start += kept;
        self.stream
            .read_exact(&mut buf[kept..])
            .map_err(|e| classify("waiting for an answer", e))
    }

    /// Whether something can be received without waiting, be it the connection's end.
    pub fn is_ready(&self) -> Result<bool, Error> {
        let broken = |e| classify("looking for an answer", e);
        if self.start < self.buffer.len() {
            return Ok(true);
        }
        self.stream.set_nonblocking(true).map_err(broken)?;
        let found = self.stream.peek(&mut [0]);
        self.stream.set_nonblocking(false).map_err(broken)?;
        match found {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(broken(e)),
        }
    }

    /// Receives what is there, at least one byte; 0 means the guest closed.
    pub fn receive_some(&mut self, buf: &mut [u8]) -> Result<usize, Error> {
        loop {
            match self.stream.read(buf) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map_err(|e| classify("receiving a stream", e)),
            }
        }
    }

    /// Receives a line, without its newline.
    pub fn line(&mut self) -> Result<String, Error> {
        const DOING: &str = "waiting for a line";
        let mut searched = self.start;
        loop {
            if let Some(i) = self.buffer[searched..].iter().position(|b| *b == b'\n') {
                let line = self.buffer[self.start..searched + i].to_vec();
                self.start = searched + i + 1;
                return String::from_utf8(line).map_err(|_| Error::Wrong("a line that is not UTF-8".into()));
            }
            if self.buffer.len() - self.start > 64 << 10 {
                return Err(Error::Wrong("a line longer than 64 KiB".into()));
            }
            self.buffer.drain(..self.start);
            self.start = 0;
            searched = self.buffer.len();
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(Error::Closed { doing: DOING }),
                Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(classify(DOING, e)),
            }
        }
    }

    /// What ends this connection from another thread.
    pub fn ender(&self) -> Result<Ender, Error> {
        Ok(Ender(
            self.stream.try_clone().map_err(|e| classify("cloning the socket", e))?,
        ))
    }
}

/// Ends a connection, whatever its owner waits for.
pub struct Ender(TcpStream);

impl Ender {
    /// Ends both directions.
    pub fn end(&self) {
        // Fails only when the connection is gone already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}
