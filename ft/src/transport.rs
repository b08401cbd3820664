//! Addresses and sockets of the log channel: `tcp:HOST:PORT` and `unix:PATH`.
//!
//! The channel carries a guest's whole memory, so plain TCP is refused beyond loopback unless the operator said
//! `insecure`.

use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

/// Errors of addresses and connections.
#[derive(Debug, Error)]
pub enum TransportError {
    /// Not an address that we know.
    #[error("`{0}` is not an address of the log channel: use tcp:HOST:PORT or unix:PATH")]
    BadAddress(String),
    /// Plain TCP to another host.
    #[error(
        "{0} is not loopback and plain TCP would show the guest's memory to the network: add `insecure` on a trusted network"
    )]
    Insecure(String),
    /// The name has no address.
    #[error("cannot find the host of {address}: {source}")]
    Resolve {
        /// As given.
        address: String,
        /// The resolver's answer.
        source: io::Error,
    },
    /// Nobody answers.
    #[error("cannot connect to {address}: {source} (is the backup VMM running with `ft receive`?)")]
    Connect {
        /// As given.
        address: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// As given.
        address: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl TransportError {
    /// The request itself is wrong, not the network.
    pub fn is_request_error(&self) -> bool {
        matches!(self, Self::BadAddress(_) | Self::Insecure(_))
    }

    /// Stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::BadAddress(_) => "ft_bad_address",
            Self::Insecure(_) => "ft_insecure",
            Self::Resolve { .. } => "ft_peer_unknown",
            Self::Connect { .. } => "ft_peer_unreachable",
            Self::Listen { .. } => "ft_cannot_listen",
        }
    }
}

/// A parsed address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `tcp:HOST:PORT`; the text after `tcp:`.
    Tcp(String),
    /// `unix:PATH`.
    Unix(PathBuf),
}

impl Address {
    /// Parses `tcp:HOST:PORT` or `unix:PATH`.
    pub fn parse(text: &str) -> Result<Self, TransportError> {
        let bad = || TransportError::BadAddress(text.to_string());
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() {
                Err(bad())
            } else {
                Ok(Self::Unix(path.into()))
            };
        }
        let tcp = text.strip_prefix("tcp:").ok_or_else(bad)?;
        let (host, port) = tcp.rsplit_once(':').ok_or_else(bad)?;
        if host.is_empty() || port.parse::<u16>().is_err() {
            return Err(bad());
        }
        Ok(Self::Tcp(tcp.to_string()))
    }

    fn resolve(tcp: &str, insecure: bool) -> Result<Vec<SocketAddr>, TransportError> {
        let address = format!("tcp:{tcp}");
        let found: Vec<SocketAddr> = tcp
            .to_socket_addrs()
            .map_err(|source| TransportError::Resolve {
                address: address.clone(),
                source,
            })?
            .collect();
        if !insecure && found.iter().any(|a| !a.ip().is_loopback()) {
            return Err(TransportError::Insecure(address));
        }
        Ok(found)
    }

    /// Connects; gives up after `timeout`.
    pub fn connect(&self, insecure: bool, timeout: Duration) -> Result<Stream, TransportError> {
        let failed = |source| TransportError::Connect {
            address: self.to_string(),
            source,
        };
        match self {
            Self::Unix(path) => Ok(Stream::Unix(UnixStream::connect(path).map_err(failed)?)),
            Self::Tcp(tcp) => {
                let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
                for addr in Self::resolve(tcp, insecure)? {
                    match TcpStream::connect_timeout(&addr, timeout) {
                        Ok(stream) => {
                            stream.set_nodelay(true).map_err(failed)?;
                            return Ok(Stream::Tcp(stream));
                        }
                        Err(e) => last = e,
                    }
                }
                Err(failed(last))
            }
        }
    }

    /// Listens.
    pub fn listen(&self, insecure: bool) -> Result<Listener, TransportError> {
        let failed = |source| TransportError::Listen {
            address: self.to_string(),
            source,
        };
        match self {
            Self::Unix(path) => {
                remove_dead_socket(path);
                let listener = UnixListener::bind(path).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                Ok(Listener::Unix(listener, path.clone()))
            }
            Self::Tcp(tcp) => {
                let found = Self::resolve(tcp, insecure)?;
                let listener = TcpListener::bind(&found[..]).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                Ok(Listener::Tcp(listener))
            }
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(tcp) => write!(f, "tcp:{tcp}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A socket file that nobody listens on any more is in the way of a new listener.
fn remove_dead_socket(path: &Path) {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    let refused = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
    if is_socket && UnixStream::connect(path).err().is_some_and(refused) {
        let _ = std::fs::remove_file(path);
    }
}

/// Waits for connections; does not block in [`Listener::accept`].
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// Unix socket and its path.
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// A waiting connection, or `WouldBlock`.
    pub fn accept(&self) -> io::Result<(Stream, String)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                Ok((Stream::Tcp(stream), format!("tcp:{peer}")))
            }
            Self::Unix(listener, path) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                Ok((Stream::Unix(stream), format!("unix:{}", path.display())))
            }
        }
    }

    /// Where it listens; with port 0 asked for, the port that was given.
    pub fn address(&self) -> io::Result<Address> {
        match self {
            Self::Tcp(listener) => Ok(Address::Tcp(listener.local_addr()?.to_string())),
            Self::Unix(_, path) => Ok(Address::Unix(path.clone())),
        }
    }

    /// For poll(2).
    pub fn as_raw_fd(&self) -> std::os::fd::RawFd {
        use std::os::fd::AsRawFd;
        match self {
            Self::Tcp(listener) => listener.as_raw_fd(),
            Self::Unix(listener, _) => listener.as_raw_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A connection.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(TcpStream),
    /// Unix socket.
    Unix(UnixStream),
}

impl Stream {
    /// A second handle of the same connection.
    pub fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Tcp(s) => s.try_clone().map(Self::Tcp),
            Self::Unix(s) => s.try_clone().map(Self::Unix),
        }
    }

    /// Ends the connection; blocked reads and writes return.
    pub fn shutdown(&self) {
        // An error says that it was closed already.
        let _ = match self {
            Self::Tcp(s) => s.shutdown(std::net::Shutdown::Both),
            Self::Unix(s) => s.shutdown(std::net::Shutdown::Both),
        };
    }

    /// Ends only the sending direction; the other side reads everything, then the end.
    pub fn shutdown_write(&self) {
        let _ = match self {
            Self::Tcp(s) => s.shutdown(std::net::Shutdown::Write),
            Self::Unix(s) => s.shutdown(std::net::Shutdown::Write),
        };
    }

    /// Bounds how long a read blocks.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.set_read_timeout(timeout),
            Self::Unix(s) => s.set_read_timeout(timeout),
        }
    }

    /// Bounds how long a write blocks.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.set_write_timeout(timeout),
            Self::Unix(s) => s.set_write_timeout(timeout),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.read(buf),
            Self::Unix(s) => s.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.write(buf),
            Self::Unix(s) => s.write(buf),
        }
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.write_vectored(bufs),
            Self::Unix(s) => s.write_vectored(bufs),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_parsed_and_bad_ones_named() {
        assert_eq!(Address::parse("tcp:h:1").unwrap(), Address::Tcp("h:1".into()));
        assert_eq!(Address::parse("tcp:[::1]:1").unwrap(), Address::Tcp("[::1]:1".into()));
        assert_eq!(Address::parse("unix:/a").unwrap(), Address::Unix("/a".into()));
        for bad in ["", "h:1", "tcp:", "tcp:h", "tcp::1", "tcp:h:70000", "unix:", "udp:h:1"] {
            let error = Address::parse(bad).unwrap_err();
            assert!(
                error.is_request_error() && error.to_string().contains(&format!("`{bad}`")),
                "{bad}"
            );
        }
    }

    #[test]
    fn plain_tcp_beyond_loopback_needs_insecure() {
        let error = Address::parse("tcp:192.0.2.1:1")
            .unwrap()
            .connect(false, Duration::from_millis(1))
            .unwrap_err();
        assert!(matches!(error, TransportError::Insecure(_)), "{error}");
        let error = Address::parse("tcp:0.0.0.0:0").unwrap().listen(false).unwrap_err();
        assert!(matches!(error, TransportError::Insecure(_)), "{error}");
        Address::parse("tcp:0.0.0.0:0").unwrap().listen(true).unwrap();
        Address::parse("tcp:127.0.0.1:0").unwrap().listen(false).unwrap();
    }

    #[test]
    fn a_unix_listener_takes_the_place_of_a_dead_one_but_not_of_a_live_one() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Unix(dir.path().join("s"));
        drop(UnixListener::bind(dir.path().join("s")).unwrap());
        let live = address.listen(false).unwrap();
        assert!(matches!(address.listen(false), Err(TransportError::Listen { .. })));
        // Somebody looked whether it is alive, and that is all.
        drop(live.accept().unwrap());
        assert_eq!(live.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(!dir.path().join("t").exists());
        drop(live);
        assert!(!dir.path().join("s").exists());
    }
}
