//! The services: a pool of connections for each TCP port, UDP echo, and what they share.

mod connection;
mod control;
mod store;
mod stream;

use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use guest_core::acpi::Platform;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Duration;

use crate::store::Store;
use crate::time::{Clock, KvmClock};
use crate::virtio::Rng;
use connection::Connection;

const ECHO: u16 = 7;
const SINK: u16 = 9000;
const SOURCE: u16 = 9001;
const STORE: u16 = 9002;
const CONTROL: u16 = 9003;

/// The places for connections to a port. Some always listen, as long as `most` allows.
struct Pool {
    port: u16,
    /// Places at the start, and at most.
    first: usize,
    most: usize,
    /// Bytes of the buffers.
    receive: usize,
    send: usize,
}

/// `window`: bytes of the buffers of streams.
fn pools(window: usize) -> [Pool; 5] {
    [
        pool(ECHO, 128 << 10, 128 << 10),
        pool(SINK, window, 16 << 10),
        pool(SOURCE, 16 << 10, window),
        pool(STORE, 64 << 10, 64 << 10),
        pool(CONTROL, 8 << 10, 8 << 10),
    ]
}

fn pool(port: u16, receive: usize, send: usize) -> Pool {
    Pool {
        port,
        first: 16,
        most: 32,
        receive,
        send,
    }
}

impl Pool {
    fn place(&self, sockets: &mut SocketSet<'_>) -> Connection {
        let buffer = |len| tcp::SocketBuffer::new(vec![0; len]);
        let mut socket = tcp::Socket::new(buffer(self.receive), buffer(self.send));
        socket.set_nagle_enabled(false);
        // As other stacks do: an answer that comes soon carries the acknowledgement (RFC 1122, 4.2.3.2).
        socket.set_ack_delay(Some(ACK_DELAY));
        socket.set_timeout(Some(TIMEOUT));
        socket.set_keep_alive(Some(KEEP_ALIVE));
        Connection::new(self.port, sockets.add(socket))
    }
}

/// Places of each pool that should listen.
const SPARE: usize = 8;
/// A peer that does not answer for this long is given up.
const TIMEOUT: Duration = Duration::from_secs(120);
const ACK_DELAY: Duration = Duration::from_millis(10);
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// Datagrams that wait for echo, and their bytes.
const DATAGRAMS: usize = 64;
const DATAGRAM_BYTES: usize = 128 << 10;

/// What the machine is asked to do once the answer is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// Power off.
    Off,
    /// Reset.
    Reset,
}

/// What services use of the rest of the guest.
pub struct Context {
    /// Time.
    pub clock: &'static Clock,
    /// kvmclock, where there is one.
    pub kvm_clock: Option<KvmClock>,
    /// The store, or why there is none.
    pub store: Result<Store, &'static str>,
    /// The source of random numbers, if there is one.
    pub rng: Option<Rng>,
    /// Power and processors.
    pub platform: Platform,
    /// Processors at work.
    pub processors: u32,
    /// Devices interrupt.
    pub interrupts: bool,
    /// Frames received and sent.
    pub frames: (u64, u64),
    /// Pages of the dirtier's arena.
    pub arena_pages: u64,
    /// Value of COUNT.
    pub count: u64,
    /// Set when the machine is to end.
    pub power: Option<Power>,
}

/// All services.
pub struct Services {
    pools: [Pool; 5],
    connections: Vec<Connection>,
    udp: SocketHandle,
    scratch: Vec<u8>,
}

impl Services {
    /// Listens on all ports; `window`: bytes of the buffers of streams.
    pub fn new(sockets: &mut SocketSet<'_>, window: usize) -> Self {
        let pools = pools(window);
        let mut connections = Vec::new();
        for pool in &pools {
            connections.extend((0..pool.first).map(|_| pool.place(sockets)));
        }
        let datagrams = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; DATAGRAMS], vec![0; DATAGRAM_BYTES]);
        let mut socket = udp::Socket::new(datagrams(), datagrams());
        // Port 7 is not 0, so that this does not fail.
        let _ = socket.bind(ECHO);
        Self {
            pools,
            connections,
            udp: sockets.add(socket),
            scratch: vec![0; 128 << 10],
        }
    }

    fn echo_datagrams(&mut self, sockets: &mut SocketSet<'_>) -> bool {
        let socket = sockets.get_mut::<udp::Socket<'_>>(self.udp);
        let mut worked = false;
        while socket.can_send()
            && let Ok((len, from)) = socket.recv_slice(&mut self.scratch)
        {
            // One that does not fit is lost, as datagrams may be.
            let _ = socket.send_slice(&self.scratch[..len], from.endpoint);
            worked = true;
        }
        worked
    }

    /// Adds places where none listens.
    fn grow(&mut self, sockets: &mut SocketSet<'_>) -> bool {
        let mut worked = false;
        for pool in &self.pools {
            let places = self.connections.iter().filter(|c| c.port == pool.port);
            let (all, free) = places.fold((0, 0), |(all, free), c| (all + 1, free + usize::from(c.free)));
            if free < SPARE && all < pool.most {
                self.connections.push(pool.place(sockets));
                worked = true;
            }
        }
        worked
    }

    /// Serves all; true if something was done.
    pub fn step(&mut self, sockets: &mut SocketSet<'_>, context: &mut Context) -> bool {
        let mut worked = self.echo_datagrams(sockets);
        if let Ok(store) = &mut context.store {
            worked |= store.step();
            for answer in store.answers() {
                if let Some(connection) = self.connections.get_mut(answer.owner.connection) {
                    connection.answer(answer);
                }
            }
        }
        if let Some(rng) = &mut context.rng
            && let Some(bytes) = rng.take()
        {
            let text: String = bytes.iter().map(|b| alloc::format!("{b:02x}")).collect();
            for connection in &mut self.connections {
                connection.random(&text);
            }
            worked = true;
        }
        for (place, connection) in self.connections.iter_mut().enumerate() {
            worked |= connection.step(place, sockets, context, &mut self.scratch);
        }
        worked |= self.grow(sockets);
        // PUTs that have just come go to the disk at once.
        if let Ok(store) = &mut context.store {
            store.step();
        }
        worked
    }
}
