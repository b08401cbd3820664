//! One direction of a connection: in order, with any delay; and what a wire can do to a frame beside that.

use std::collections::VecDeque;

use ft::machine::DiskChange;
use ft::wire::frame::{Frame, encode};
use ft::wire::reader::{Envelope, FrameReader, ReadError};

pub const NEVER: u64 = u64::MAX;

#[derive(Debug, Clone)]
pub struct Message {
    pub arrives: u64,
    seq: u64,
    pub mark: u64,
    pub stamp: u64,
    /// `None`: the end of the stream.
    pub frame: Option<Frame>,
    /// Which bit is flipped on the way, if any.
    flip: Option<u64>,
}

impl Message {
    pub fn new(arrives: u64, mark: u64, stamp: u64, frame: Frame) -> Self {
        let frame = Some(frame);
        Self {
            arrives,
            seq: 0,
            mark,
            stamp,
            frame,
            flip: None,
        }
    }

    pub fn end(arrives: u64) -> Self {
        Self {
            arrives,
            seq: 0,
            mark: 0,
            stamp: 0,
            frame: None,
            flip: None,
        }
    }
}

/// What happens to the next frame. TCP's own checks make each of them rare, not impossible: its checksum is weak, and
/// what stands between the hosts may tamper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tamper {
    Flip(u64),
    Lose,
    Twice,
    /// It comes after the one that was sent after it.
    Late,
}

#[derive(Debug, Default)]
pub struct Stream {
    queue: VecDeque<Message>,
    last: u64,
    next_seq: u64,
    expected: u64,
    /// Nothing arrives before.
    pub blocked_until: u64,
    /// The sender closed it.
    pub closed: bool,
    pub tamper: Option<Tamper>,
    late: Option<Message>,
}

/// What came out of a stream.
#[derive(Debug)]
pub enum Got {
    Frame { mark: u64, stamp: u64, frame: Frame },
    End,
    Broken(String),
}

impl Stream {
    pub fn send(&mut self, mut message: Message) {
        if self.closed {
            return;
        }
        self.closed = message.frame.is_none();
        self.last = self.last.max(message.arrives);
        message.arrives = self.last;
        if self.closed {
            return self.queue.push_back(message);
        }
        message.seq = self.next_seq;
        self.next_seq += 1;
        let late = self.late.take();
        match self.tamper.take() {
            Some(Tamper::Lose) => {}
            Some(Tamper::Twice) => self.queue.extend([message.clone(), message]),
            Some(Tamper::Late) => self.late = Some(message),
            Some(Tamper::Flip(bit)) => {
                message.flip = Some(bit);
                self.queue.push_back(message);
            }
            None => self.queue.push_back(message),
        }
        self.queue.extend(late.map(|message| Message {
            arrives: self.last,
            ..message
        }));
    }

    /// A reset: what is under way is lost, only the end arrives.
    pub fn reset(&mut self, arrives: u64) {
        self.queue.clear();
        self.closed = true;
        self.queue.push_back(Message::end(arrives));
    }

    /// The host is without power: some of what is under way still arrives, the end never does.
    pub fn cut(&mut self, keep: u64) {
        let keep = keep as usize % (self.queue.len() + 1);
        self.queue.truncate(keep);
        self.closed = true;
    }

    pub fn due(&self) -> Option<u64> {
        let front = self.queue.front()?;
        (self.blocked_until != NEVER).then(|| front.arrives.max(self.blocked_until))
    }

    /// The next frame, if it is there, and whether it is as it was sent. It goes through the real reader if it was
    /// tampered with, or if `all` do; `trusting` is the bug of a reader that checks nothing.
    pub fn receive(&mut self, now: u64, all: bool, trusting: bool) -> Option<(Got, bool)> {
        if self.due().is_none_or(|at| at > now) {
            return None;
        }
        let message = self.queue.pop_front()?;
        let Some(frame) = message.frame else {
            return Some((Got::End, true));
        };
        let seq = message.seq.wrapping_sub(self.expected);
        self.expected += 1;
        let sound = seq == 0 && message.flip.is_none();
        let (mark, stamp) = (message.mark, message.stamp);
        if sound && !all {
            return Some((Got::Frame { mark, stamp, frame }, true));
        }
        if trusting {
            let frame = message.flip.map_or(frame.clone(), |bit| damaged(frame, bit));
            return Some((Got::Frame { mark, stamp, frame }, sound));
        }
        let got = match read(&bytes(&frame, seq, mark, stamp, message.flip)) {
            Ok((envelope, frame)) => Got::Frame {
                mark: envelope.mark,
                stamp: envelope.stamp,
                frame,
            },
            Err(e) => Got::Broken(e.to_string()),
        };
        Some((got, sound))
    }

    /// The receiver reads no more.
    pub fn abandon(&mut self) {
        self.queue.clear();
        self.closed = true;
    }
}

/// What a reader makes of a frame whose content it does not check.
fn damaged(mut frame: Frame, bit: u64) -> Frame {
    let data: &mut [u8] = match &mut frame {
        Frame::Pages { data, .. } => data,
        Frame::State { data, .. } => data,
        Frame::Disk {
            change: DiskChange::Write { data, .. },
            ..
        } => data,
        _ => return frame,
    };
    data[bit as usize % 8] ^= 1;
    frame
}

fn bytes(frame: &Frame, seq: u64, mark: u64, stamp: u64, flip: Option<u64>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for out in encode(frame) {
        bytes.extend_from_slice(&out.header(seq, mark, stamp));
        let (head, body) = out.payload();
        bytes.extend_from_slice(head);
        bytes.extend_from_slice(body);
    }
    if let Some(bit) = flip {
        let bit = bit % (bytes.len() as u64 * 8);
        bytes[bit as usize / 8] ^= 1 << (bit % 8);
    }
    bytes
}

/// A reader that has read everything before.
fn read(bytes: &[u8]) -> Result<(Envelope, Frame), ReadError> {
    FrameReader::new(bytes).next(&mut || ())
}
