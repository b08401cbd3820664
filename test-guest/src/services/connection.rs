//! One place of a pool: it listens, serves a connection, and listens again.

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, State};

use super::control::Control;
use super::store::Requests;
use super::stream::{Echo, Sink, Source};
use super::{CONTROL, Context, SINK, SOURCE, STORE};
use crate::store::Answer;

/// A connection that we have closed may take this long to go, in microseconds.
const LINGER: u64 = 5_000_000;

enum Service {
    Echo(Echo),
    Sink(Sink),
    Source(Source),
    Store(Requests),
    Control(Control),
}

/// How a connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Nothing happened.
    Idle,
    /// Something was done.
    Worked,
    /// It is over: close it.
    Over,
}

impl From<bool> for Flow {
    fn from(worked: bool) -> Self {
        if worked { Flow::Worked } else { Flow::Idle }
    }
}

/// The place.
pub struct Connection {
    /// Its pool.
    pub port: u16,
    handle: SocketHandle,
    service: Service,
    generation: u64,
    /// When we closed it.
    closed_at: Option<u64>,
    /// It listens.
    pub free: bool,
}

fn service(port: u16) -> Service {
    match port {
        SINK => Service::Sink(Sink::default()),
        SOURCE => Service::Source(Source::default()),
        STORE => Service::Store(Requests::default()),
        CONTROL => Service::Control(Control::default()),
        _ => Service::Echo(Echo),
    }
}

impl Connection {
    /// A place of the pool of `port`.
    pub fn new(port: u16, handle: SocketHandle) -> Self {
        Self {
            port,
            handle,
            service: service(port),
            generation: 0,
            closed_at: None,
            free: true,
        }
    }

    /// The store's answer to a request of this connection, or of one that was here before.
    pub fn answer(&mut self, answer: Answer) {
        if let Service::Store(requests) = &mut self.service
            && answer.owner.generation == self.generation
        {
            requests.answer(answer);
        }
    }

    /// Random bytes have come.
    pub fn random(&mut self, text: &str) {
        if let Service::Control(control) = &mut self.service {
            control.random(text);
        }
    }

    /// Serves; true if something was done.
    pub fn step(
        &mut self,
        place: usize,
        sockets: &mut SocketSet<'_>,
        context: &mut Context,
        scratch: &mut [u8],
    ) -> bool {
        let socket = sockets.get_mut::<Socket<'_>>(self.handle);
        match socket.state() {
            // A connection in TIME-WAIT has nothing left to say: the place is wanted for the next one.
            State::Closed | State::TimeWait => {
                if !self.free {
                    self.service = service(self.port);
                    self.generation += 1;
                    self.closed_at = None;
                    self.free = true;
                }
                // The port is not 0 and the socket is not open, so that this does not fail.
                let _ = socket.listen(self.port);
                return true;
            }
            State::Listen | State::SynSent | State::SynReceived => return false,
            _ => self.free = false,
        }
        if let Some(since) = self.closed_at {
            if context.clock.micros() > since + LINGER {
                socket.abort();
                return true;
            }
            return false;
        }
        let flow = match &mut self.service {
            Service::Echo(echo) => echo.step(socket, scratch),
            Service::Sink(sink) => sink.step(socket),
            Service::Source(source) => source.step(socket),
            Service::Store(requests) => requests.step(place, self.generation, socket, context),
            Service::Control(control) => control.step(socket, context),
        };
        if flow == Flow::Over {
            socket.close();
            self.closed_at = Some(context.clock.micros());
        }
        flow != Flow::Idle
    }
}
