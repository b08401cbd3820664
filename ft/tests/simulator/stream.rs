//! One direction of a connection: in order, with any delay.

use std::collections::VecDeque;

use ft::wire::frame::Frame;

pub const NEVER: u64 = u64::MAX;

#[derive(Debug, Clone)]
pub struct Message {
    pub arrives: u64,
    pub mark: u64,
    pub stamp: u64,
    /// `None`: the end of the stream.
    pub frame: Option<Frame>,
}

#[derive(Debug, Default)]
pub struct Stream {
    queue: VecDeque<Message>,
    last: u64,
    /// Nothing arrives before.
    pub blocked_until: u64,
    /// The sender closed it.
    pub closed: bool,
}

impl Stream {
    pub fn send(&mut self, mut message: Message) {
        if !self.closed {
            self.closed = message.frame.is_none();
            self.last = self.last.max(message.arrives);
            message.arrives = self.last;
            self.queue.push_back(message);
        }
    }

    /// A reset: what is under way is lost, only the end arrives.
    pub fn reset(&mut self, arrives: u64) {
        self.queue.clear();
        self.closed = true;
        self.queue.push_back(Message {
            arrives,
            mark: 0,
            stamp: 0,
            frame: None,
        });
    }

    pub fn due(&self) -> Option<u64> {
        let front = self.queue.front()?;
        (self.blocked_until != NEVER).then(|| front.arrives.max(self.blocked_until))
    }

    pub fn receive(&mut self, now: u64) -> Option<Message> {
        if self.due().is_some_and(|at| at <= now) {
            self.queue.pop_front()
        } else {
            None
        }
    }
}
