//! A client of the key-value store: requests by line, answers in their order.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::vec::Vec;

use guest_core::kv::{Request, parse};
use smoltcp::socket::tcp::Socket;

use super::Context;
use super::connection::Flow;
use crate::store::{Answer, Owner};

/// Requests under way on one connection.
const DEPTH: usize = 256;
/// Bytes of answers that may wait for a client to read them.
const OUTPUT: usize = 64 << 10;
/// Longest request line.
const LINE: usize = 512;

/// The line buffer of a text service.
#[derive(Default)]
pub struct Lines {
    buffer: Vec<u8>,
    start: usize,
    scanned: usize,
}

/// A line, or why there is none.
pub enum Line {
    /// A line without its end: this many bytes, to be asked for by [`Lines::take`].
    Whole(usize),
    /// It has not come yet.
    Missing,
    /// It is too long.
    TooLong,
}

impl Lines {
    /// Reads what has come, up to some lines' worth.
    pub fn fill(&mut self, socket: &mut Socket<'_>) -> bool {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.scanned -= self.start;
            self.start = 0;
        }
        let mut worked = false;
        while self.buffer.len() < 16 * LINE {
            let room = 16 * LINE - self.buffer.len();
            let Ok(1..) = socket.recv(|bytes| {
                let len = bytes.len().min(room);
                self.buffer.extend_from_slice(&bytes[..len]);
                (len, len)
            }) else {
                break;
            };
            worked = true;
        }
        worked
    }

    /// Looks for the next line's end.
    pub fn next(&mut self) -> Line {
        let end = self.buffer[self.scanned..].iter().position(|b| *b == b'\n');
        match end {
            Some(offset) => {
                self.scanned += offset;
                Line::Whole(self.scanned - self.start)
            }
            None => {
                self.scanned = self.buffer.len();
                if self.scanned - self.start > LINE {
                    Line::TooLong
                } else {
                    Line::Missing
                }
            }
        }
    }

    /// The line that [`Lines::next`] has found; it stays until [`Lines::done`].
    pub fn line(&self, len: usize) -> &[u8] {
        &self.buffer[self.start..self.start + len]
    }

    /// Goes past the line.
    pub fn done(&mut self, len: usize) {
        self.start += len + 1;
        self.scanned = self.start;
    }
}

/// Bytes that wait for room in the send buffer.
#[derive(Default)]
pub struct Output {
    bytes: Vec<u8>,
}

impl Output {
    /// Adds bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// So much waits that no more requests should be taken: the client does not read its answers.
    pub fn is_full(&self) -> bool {
        self.bytes.len() >= OUTPUT
    }

    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Sends as much as there is room for.
    pub fn send(&mut self, socket: &mut Socket<'_>) -> bool {
        if self.bytes.is_empty() {
            return false;
        }
        match socket.send_slice(&self.bytes) {
            Ok(0) => false,
            Ok(len) => {
                self.bytes.drain(..len);
                true
            }
            Err(_) => {
                self.bytes.clear();
                true
            }
        }
    }
}

/// The client.
#[derive(Default)]
pub struct Requests {
    lines: Lines,
    output: Output,
    /// Answers in the order of requests; the first one's ticket is `first`.
    answers: VecDeque<Option<Vec<u8>>>,
    first: u64,
    broken: bool,
}

impl Requests {
    /// The store's answer to a request.
    pub fn answer(&mut self, answer: Answer) {
        let at = answer.owner.ticket.wrapping_sub(self.first);
        if let Some(slot) = usize::try_from(at).ok().and_then(|at| self.answers.get_mut(at)) {
            *slot = Some(answer.text);
        }
    }

    /// Hands the line to the store; false if it must wait for the answers to earlier ones.
    fn request(&mut self, len: usize, owner: Owner, context: &mut Context) -> bool {
        let store = match &mut context.store {
            Ok(store) => store,
            Err(reason) => {
                self.answers.push_back(Some(format!("ERR {reason}\n").into_bytes()));
                return true;
            }
        };
        let answer = match parse(self.lines.line(len)) {
            Ok(Request::Put { key, value }) => {
                store.put(owner, key, value);
                None
            }
            // Reads see the writes of the same client, so that they wait for these.
            Ok(Request::Get(_) | Request::Stat) if self.answers.iter().any(Option::is_none) => return false,
            Ok(Request::Get(key)) => {
                store.get(owner, key);
                None
            }
            Ok(Request::Stat) => Some(store.stat()),
            Err(reason) => Some(format!("ERR {reason}\n").into_bytes()),
        };
        self.answers.push_back(answer);
        true
    }

    pub fn step(&mut self, place: usize, generation: u64, socket: &mut Socket<'_>, context: &mut Context) -> Flow {
        let mut worked = self.lines.fill(socket);
        while !self.broken && self.answers.len() < DEPTH && !self.output.is_full() {
            match self.lines.next() {
                Line::Whole(len) => {
                    let owner = Owner {
                        connection: place,
                        generation,
                        ticket: self.first + self.answers.len() as u64,
                    };
                    if !self.request(len, owner, context) {
                        break;
                    }
                    self.lines.done(len);
                    worked = true;
                }
                Line::Missing => break,
                Line::TooLong => {
                    self.answers.push_back(Some(b"ERR line too long\n".to_vec()));
                    self.broken = true;
                }
            }
        }
        while let Some(Some(_)) = self.answers.front()
            && let Some(Some(text)) = self.answers.pop_front()
        {
            self.first += 1;
            self.output.push(&text);
        }
        worked |= self.output.send(socket);
        let nothing_comes = self.broken || (!socket.may_recv() && matches!(self.lines.next(), Line::Missing));
        if nothing_comes && self.answers.is_empty() && self.output.is_empty() {
            return Flow::Over;
        }
        worked.into()
    }
}
