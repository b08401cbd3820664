//! Echo, sink and source.

use alloc::vec::Vec;

use guest_core::bytes::u64_at;
use guest_core::pattern::Pattern;
use smoltcp::socket::tcp::Socket;

use super::connection::Flow;

/// The sink reports after so many bytes each.
const REPORT: u64 = 64 << 10;

fn room(socket: &Socket<'_>) -> usize {
    if socket.may_send() {
        socket.send_capacity() - socket.send_queue()
    } else {
        0
    }
}

/// Sends back what comes.
pub struct Echo;

impl Echo {
    pub fn step(&mut self, socket: &mut Socket<'_>, scratch: &mut [u8]) -> Flow {
        let mut worked = false;
        loop {
            let most = room(socket).min(scratch.len());
            let Ok(len @ 1..) = socket.recv_slice(&mut scratch[..most]) else {
                break;
            };
            // There was room for it.
            let _ = socket.send_slice(&scratch[..len]);
            worked = true;
        }
        if socket.may_recv() { worked.into() } else { Flow::Over }
    }
}

/// Reads numbers at the head of a stream.
fn head(socket: &mut Socket<'_>, head: &mut Vec<u8>, len: usize) -> bool {
    while head.len() < len {
        let mut byte = [0];
        let Ok(1) = socket.recv_slice(&mut byte) else {
            return false;
        };
        head.push(byte[0]);
    }
    true
}

/// Checks a pattern stream.
#[derive(Default)]
pub struct Sink {
    head: Vec<u8>,
    pattern: Option<Pattern>,
    reported: u64,
}

impl Sink {
    pub fn step(&mut self, socket: &mut Socket<'_>) -> Flow {
        let mut worked = false;
        if self.pattern.is_none() && head(socket, &mut self.head, 8) {
            self.pattern = Some(Pattern::new(u64_at(&self.head, 0)));
            worked = true;
        }
        if let Some(pattern) = &mut self.pattern {
            while let Ok((len @ 1.., good)) = socket.recv(|bytes| (bytes.len(), (bytes.len(), pattern.check(bytes)))) {
                let _ = len;
                worked = true;
                if !good {
                    let _ = socket.send_slice(&u64::MAX.to_le_bytes());
                    return Flow::Over;
                }
            }
            while pattern.position - self.reported >= REPORT && room(socket) >= 8 {
                self.reported += REPORT;
                let _ = socket.send_slice(&self.reported.to_le_bytes());
                worked = true;
            }
        }
        if socket.may_recv() { worked.into() } else { Flow::Over }
    }
}

/// Sends a pattern stream.
#[derive(Default)]
pub struct Source {
    head: Vec<u8>,
    pattern: Option<(Pattern, u64)>,
}

impl Source {
    pub fn step(&mut self, socket: &mut Socket<'_>) -> Flow {
        let mut worked = false;
        if self.pattern.is_none() {
            if !head(socket, &mut self.head, 16) {
                return if socket.may_recv() { Flow::Idle } else { Flow::Over };
            }
            self.pattern = Some((Pattern::new(u64_at(&self.head, 0)), u64_at(&self.head, 8)));
        }
        let Some((pattern, length)) = &mut self.pattern else {
            return Flow::Idle;
        };
        while pattern.position < *length {
            let left = *length - pattern.position;
            let sent = socket.send(|bytes| {
                let len = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                pattern.fill(&mut bytes[..len]);
                (len, len)
            });
            match sent {
                Ok(1..) => worked = true,
                Ok(0) => return worked.into(),
                Err(_) => return Flow::Over,
            }
        }
        Flow::Over
    }
}
