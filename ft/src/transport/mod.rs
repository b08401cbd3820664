//! Addresses and sockets of the log channel: `tcp:HOST:PORT` and `unix:PATH`.
//!
//! The channel carries a guest's whole memory, so TCP beyond loopback is TLS ([`tls`]), unless the operator said
//! `insecure`.

pub mod tls;

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::config::FtTls;
use tls::TlsStream;

/// Errors of addresses and connections.
#[derive(Debug, Error)]
pub enum TransportError {
    /// Not an address that we know.
    #[error("`{0}` is not an address of the log channel: use tcp:HOST:PORT or unix:PATH")]
    BadAddress(String),
    /// Plain TCP to another host.
    #[error(
        "{0} is not loopback and plain TCP would show the guest's memory to the network: use TLS (`tls`), or `insecure` on a trusted network"
    )]
    Insecure(String),
    /// TLS is for TCP.
    #[error("{0}: TLS is for tcp:HOST:PORT; a Unix socket needs none")]
    TlsNeedsTcp(String),
    /// A certificate or key cannot be used.
    #[error("TLS file {path}: {reason}")]
    TlsFiles {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// No name of a certificate.
    #[error("`{0}` is not a name that a certificate can have: use a DNS name or an IP address")]
    TlsName(String),
    /// The two sides did not agree.
    #[error("no TLS with {address}: {source} (do both sides use it, with certificates of the same authority?)")]
    Tls {
        /// As given.
        address: String,
        /// What happened.
        source: io::Error,
    },
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
        matches!(
            self,
            Self::BadAddress(_) | Self::Insecure(_) | Self::TlsNeedsTcp(_) | Self::TlsFiles { .. } | Self::TlsName(_)
        )
    }

    /// Stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::BadAddress(_) => "ft_bad_address",
            Self::Insecure(_) => "ft_insecure",
            Self::TlsNeedsTcp(_) | Self::TlsFiles { .. } | Self::TlsName(_) => "ft_tls_unusable",
            Self::Tls { .. } => "ft_tls_failed",
            Self::Resolve { .. } => "ft_peer_unknown",
            Self::Connect { .. } => "ft_peer_unreachable",
            Self::Listen { .. } => "ft_cannot_listen",
        }
    }
}

/// How a connection is protected.
#[derive(Debug, Clone, Copy, Default)]
pub struct Security<'a> {
    /// Plain TCP beyond loopback is allowed.
    pub insecure: bool,
    /// TCP is TLS.
    pub tls: Option<&'a FtTls>,
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

    fn resolve(tcp: &str, security: Security<'_>) -> Result<Vec<SocketAddr>, TransportError> {
        let address = format!("tcp:{tcp}");
        let found: Vec<SocketAddr> = tcp
            .to_socket_addrs()
            .map_err(|source| TransportError::Resolve {
                address: address.clone(),
                source,
            })?
            .collect();
        if !security.insecure && security.tls.is_none() && found.iter().any(|a| !a.ip().is_loopback()) {
            return Err(TransportError::Insecure(address));
        }
        Ok(found)
    }

    /// Name or address of the host, without port.
    fn host(tcp: &str) -> &str {
        tcp.rsplit_once(':').map_or(tcp, |(host, _)| host)
    }

    /// Connects; gives up after `timeout` (for connecting, and again for the TLS handshake).
    pub fn connect(&self, security: Security<'_>, timeout: Duration) -> Result<Stream, TransportError> {
        let failed = |source| TransportError::Connect {
            address: self.to_string(),
            source,
        };
        match self {
            Self::Unix(_) if security.tls.is_some() => Err(TransportError::TlsNeedsTcp(self.to_string())),
            Self::Unix(path) => Ok(Stream::Unix(UnixStream::connect(path).map_err(failed)?)),
            Self::Tcp(tcp) => {
                let tls = security
                    .tls
                    .map(|tls| tls::Client::new(tls, Self::host(tcp)))
                    .transpose()?;
                let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
                for addr in Self::resolve(tcp, security)? {
                    match TcpStream::connect_timeout(&addr, timeout) {
                        Ok(stream) => {
                            stream.set_nodelay(true).map_err(failed)?;
                            let Some(tls) = tls else {
                                return Ok(Stream::Tcp(stream));
                            };
                            let secured = tls.connect(stream, Instant::now() + timeout);
                            return secured.map(Stream::Tls).map_err(|source| TransportError::Tls {
                                address: self.to_string(),
                                source,
                            });
                        }
                        Err(e) => last = e,
                    }
                }
                Err(failed(last))
            }
        }
    }

    /// Listens. What is accepted is plain until [`Stream::secure`] was called.
    pub fn listen(&self, security: Security<'_>) -> Result<Listener, TransportError> {
        let failed = |source| TransportError::Listen {
            address: self.to_string(),
            source,
        };
        match self {
            Self::Unix(_) if security.tls.is_some() => Err(TransportError::TlsNeedsTcp(self.to_string())),
            Self::Unix(path) => {
                remove_dead_socket(path);
                let listener = UnixListener::bind(path).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                Ok(Listener::Unix(listener, path.clone()))
            }
            Self::Tcp(tcp) => {
                let found = Self::resolve(tcp, security)?;
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
    /// TLS on TCP.
    Tls(TlsStream),
    /// Unix socket.
    Unix(UnixStream),
}

impl Stream {
    /// The accepted connection as TLS; gives up at `deadline`. Blocks.
    pub fn secure(self, tls: &tls::Server, deadline: Instant) -> io::Result<Self> {
        match self {
            Self::Tcp(socket) => tls.accept(socket, deadline).map(Self::Tls),
            other => Ok(other),
        }
    }

    /// How it is protected, for `ft info`.
    pub fn describe(&self) -> String {
        match self {
            Self::Tcp(_) => "plain TCP".into(),
            Self::Tls(s) => s.describe(),
            Self::Unix(_) => "Unix socket".into(),
        }
    }

    /// A second handle of the same connection.
    pub fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Tcp(s) => s.try_clone().map(Self::Tcp),
            Self::Tls(s) => Ok(Self::Tls(s.clone())),
            Self::Unix(s) => s.try_clone().map(Self::Unix),
        }
    }

    /// Ends the connection; blocked reads and writes return.
    pub fn shutdown(&self) {
        // An error says that it was closed already.
        let _ = match self {
            Self::Tcp(s) => s.shutdown(std::net::Shutdown::Both),
            Self::Tls(s) => s.socket().shutdown(std::net::Shutdown::Both),
            Self::Unix(s) => s.shutdown(std::net::Shutdown::Both),
        };
    }

    /// Ends only the sending direction; the other side reads everything, then the end.
    pub fn shutdown_write(&self) {
        let _ = match self {
            Self::Tcp(s) => s.shutdown(std::net::Shutdown::Write),
            Self::Tls(s) => s.socket().shutdown(std::net::Shutdown::Write),
            Self::Unix(s) => s.shutdown(std::net::Shutdown::Write),
        };
    }

    /// Bounds how long a read blocks.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.set_read_timeout(timeout),
            Self::Tls(s) => s.socket().set_read_timeout(timeout),
            Self::Unix(s) => s.set_read_timeout(timeout),
        }
    }

    /// Bounds how long a write blocks.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.set_write_timeout(timeout),
            Self::Tls(s) => s.socket().set_write_timeout(timeout),
            Self::Unix(s) => s.set_write_timeout(timeout),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.read(buf),
            Self::Tls(s) => s.read(buf),
            Self::Unix(s) => s.read(buf),
        }
    }

    fn read_vectored(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.read_vectored(bufs),
            Self::Tls(s) => {
                let room = bufs.iter_mut().find(|buf| !buf.is_empty());
                room.map_or(Ok(0), |buf| s.read(buf))
            }
            Self::Unix(s) => s.read_vectored(bufs),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.write(buf),
            Self::Tls(s) => s.write_vectored(&[IoSlice::new(buf)]),
            Self::Unix(s) => s.write(buf),
        }
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.write_vectored(bufs),
            Self::Tls(s) => s.write_vectored(bufs),
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
            .connect(Security::default(), Duration::from_millis(1))
            .unwrap_err();
        assert!(matches!(error, TransportError::Insecure(_)), "{error}");
        let error = Address::parse("tcp:0.0.0.0:0")
            .unwrap()
            .listen(Security::default())
            .unwrap_err();
        assert!(matches!(error, TransportError::Insecure(_)), "{error}");
        let insecure = Security {
            insecure: true,
            tls: None,
        };
        Address::parse("tcp:0.0.0.0:0").unwrap().listen(insecure).unwrap();
        Address::parse("tcp:127.0.0.1:0")
            .unwrap()
            .listen(Security::default())
            .unwrap();
    }

    #[test]
    fn a_unix_listener_takes_the_place_of_a_dead_one_but_not_of_a_live_one() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Unix(dir.path().join("s"));
        drop(UnixListener::bind(dir.path().join("s")).unwrap());
        let live = address.listen(Security::default()).unwrap();
        assert!(matches!(
            address.listen(Security::default()),
            Err(TransportError::Listen { .. })
        ));
        // Somebody looked whether it is alive, and that is all.
        drop(live.accept().unwrap());
        assert_eq!(live.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(!dir.path().join("t").exists());
        drop(live);
        assert!(!dir.path().join("s").exists());
    }
}
