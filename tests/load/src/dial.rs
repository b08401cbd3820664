//! How a client reaches the guest.

use std::io;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

/// Longest wait for a TCP connection.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(20);

/// Opens the sockets of the clients. A socket keeps the network namespace that it was opened in, so an implementation
/// can open it in another namespace than the one the client's thread runs in.
pub trait Dial: Send + Sync {
    /// Connects to a TCP service.
    fn tcp(&self, to: SocketAddr) -> io::Result<TcpStream>;
    /// Makes a UDP socket that speaks to `to`.
    fn udp(&self, to: SocketAddr) -> io::Result<UdpSocket>;
}

/// Dials from the namespace of the calling thread.
#[derive(Debug, Clone, Copy, Default)]
pub struct Local;

impl Dial for Local {
    fn tcp(&self, to: SocketAddr) -> io::Result<TcpStream> {
        TcpStream::connect_timeout(&to, CONNECT_LIMIT)
    }

    fn udp(&self, to: SocketAddr) -> io::Result<UdpSocket> {
        let any: SocketAddr = if to.is_ipv4() {
            ([0, 0, 0, 0], 0).into()
        } else {
            ([0u16; 8], 0).into()
        };
        let socket = UdpSocket::bind(any)?;
        socket.connect(to)?;
        Ok(socket)
    }
}
