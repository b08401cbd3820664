//! TLS 1.3 for the log channel, with certificates on both sides.
//!
//! Either side shows a certificate that the other's `ca.pem` must have signed; the primary also checks that the backup's
//! is for the host that it meant, and either can insist on a name. There is no session resumption and no early data, so
//! nothing can be replayed, and no fallback: a side that was told to use TLS speaks nothing else.
//!
//! One thread reads a [`TlsStream`], several write to it. The reader waits for bytes of the network without a lock and
//! holds `connection` only to decrypt them; writers hold `outgoing` for a whole write and `connection` only to encrypt.
//! Lock order: `incoming` or `outgoing`, then `connection`.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustls::client::{Resumption, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection};

use super::TransportError;
use crate::config::FtTls;

/// Bytes that are taken from the network at a time.
const INCOMING: usize = 64 << 10;

/// Bytes that are encrypted at a time.
const OUTGOING: usize = 256 << 10;

/// Certificate of the authority that signed both sides' certificates.
pub const CA_FILE: &str = "ca.pem";
/// This side's certificate, with intermediate ones after it.
pub const CERT_FILE: &str = "cert.pem";
/// This side's private key.
pub const KEY_FILE: &str = "key.pem";

/// What both sides of a connection are made of.
struct Credentials {
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

fn bad(path: &Path, reason: impl std::fmt::Display) -> TransportError {
    TransportError::TlsFiles {
        path: path.to_path_buf(),
        reason: reason.to_string(),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TransportError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    match found {
        Ok(found) if found.is_empty() => Err(bad(path, "has no certificate")),
        Ok(found) => Ok(found),
        Err(e) => Err(bad(path, e)),
    }
}

impl Credentials {
    fn load(dir: &Path) -> Result<Self, TransportError> {
        let (ca, cert, key) = (dir.join(CA_FILE), dir.join(CERT_FILE), dir.join(KEY_FILE));
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&ca)? {
            roots.add(certificate).map_err(|e| bad(&ca, e))?;
        }
        let mode = std::fs::metadata(&key).map_err(|e| bad(&key, e))?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(bad(
                &key,
                format!("others can read it (mode {:o}): chmod 600", mode & 0o777),
            ));
        }
        Ok(Self {
            provider: Arc::new(rustls::crypto::ring::default_provider()),
            roots: Arc::new(roots),
            chain: certificates(&cert)?,
            key: PrivateKeyDer::from_pem_file(&key).map_err(|e| bad(&key, e))?,
        })
    }
}

fn server_name(name: &str) -> Result<ServerName<'static>, TransportError> {
    // An IPv6 address in brackets, as in tcp:[::1]:7000.
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(bare.to_string()).map_err(|_| TransportError::TlsName(name.to_string()))
}

/// Makes connections to a backup secure.
pub(super) struct Client {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Client {
    /// For a backup on `host`, unless `tls` names it otherwise.
    pub(super) fn new(tls: &FtTls, host: &str) -> Result<Self, TransportError> {
        let own = Credentials::load(&tls.dir)?;
        let name = server_name(tls.peer.as_deref().unwrap_or(host))?;
        let cert = tls.dir.join(CERT_FILE);
        let mut config = ClientConfig::builder_with_provider(own.provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| bad(&cert, e))?
            .with_root_certificates(own.roots)
            .with_client_auth_cert(own.chain, own.key)
            .map_err(|e| bad(&cert, e))?;
        config.resumption = Resumption::disabled();
        Ok(Self {
            config: Arc::new(config),
            name,
        })
    }

    pub(super) fn connect(&self, socket: TcpStream, deadline: Instant) -> io::Result<TlsStream> {
        let connection = ClientConnection::new(self.config.clone(), self.name.clone()).map_err(io::Error::other)?;
        TlsStream::new(socket, connection.into(), deadline)
    }
}

/// Makes connections of primaries secure.
pub struct Server {
    config: Arc<ServerConfig>,
    /// Name that the primary's certificate must be for.
    peer: Option<ServerName<'static>>,
}

impl Server {
    /// Reads certificates and key.
    pub fn new(tls: &FtTls) -> Result<Self, TransportError> {
        let own = Credentials::load(&tls.dir)?;
        let ca = tls.dir.join(CA_FILE);
        let cert = tls.dir.join(CERT_FILE);
        let verifier = WebPkiClientVerifier::builder_with_provider(own.roots, own.provider.clone())
            .build()
            .map_err(|e| bad(&ca, e))?;
        let mut config = ServerConfig::builder_with_provider(own.provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| bad(&cert, e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(own.chain, own.key)
            .map_err(|e| bad(&cert, e))?;
        config.send_tls13_tickets = 0;
        Ok(Self {
            config: Arc::new(config),
            peer: tls.peer.as_deref().map(server_name).transpose()?,
        })
    }

    pub(super) fn accept(&self, socket: TcpStream, deadline: Instant) -> io::Result<TlsStream> {
        let connection = ServerConnection::new(self.config.clone()).map_err(io::Error::other)?;
        let stream = TlsStream::new(socket, connection.into(), deadline)?;
        if let Some(name) = &self.peer {
            let shown = lock(&stream.0.connection)
                .peer_certificates()
                .and_then(|chain| chain.first().cloned());
            let shown = shown.ok_or_else(|| io::Error::other("the primary showed no certificate"))?;
            ParsedCertificate::try_from(&shown)
                .and_then(|certificate| verify_server_name(&certificate, name))
                .map_err(|e| io::Error::other(format!("the primary's certificate: {e}")))?;
        }
        Ok(stream)
    }
}

/// A connection; clones are the same one.
#[derive(Debug, Clone)]
pub struct TlsStream(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    socket: TcpStream,
    connection: Mutex<Connection>,
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Vec<u8>>,
}

/// Bytes of the network that were not given to the connection yet.
#[derive(Debug)]
struct Incoming {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Both sides agree on keys and look at each other's certificates.
fn handshake(mut socket: &TcpStream, connection: &mut Connection, deadline: Instant) -> io::Result<()> {
    while connection.is_handshaking() || connection.wants_write() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        socket.set_write_timeout(Some(left))?;
        let done = if connection.wants_write() {
            connection.write_tls(&mut socket)
        } else {
            connection.read_tls(&mut socket)
        };
        match done {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            Err(e) => return Err(e),
        }
        if let Err(e) = connection.process_new_packets() {
            // The other side is told why.
            let _ = connection.write_tls(&mut socket);
            return Err(io::Error::new(io::ErrorKind::InvalidData, e));
        }
    }
    socket.set_read_timeout(None)?;
    socket.set_write_timeout(None)
}

impl TlsStream {
    fn new(socket: TcpStream, mut connection: Connection, deadline: Instant) -> io::Result<Self> {
        handshake(&socket, &mut connection, deadline)?;
        connection.set_buffer_limit(Some(OUTGOING));
        let incoming = Incoming {
            bytes: vec![0; INCOMING].into(),
            start: 0,
            end: 0,
        };
        Ok(Self(Arc::new(Shared {
            socket,
            connection: Mutex::new(connection),
            incoming: Mutex::new(incoming),
            outgoing: Mutex::default(),
        })))
    }

    /// The socket below, for its time bounds and its end.
    pub(super) fn socket(&self) -> &TcpStream {
        &self.0.socket
    }

    /// For `ft info`.
    pub(super) fn describe(&self) -> String {
        let suite = lock(&self.0.connection).negotiated_cipher_suite();
        let suite = suite.and_then(|suite| suite.suite().as_str()).unwrap_or("?");
        format!("TLS 1.3, {suite}")
    }

    pub(super) fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        let mut incoming = lock(&self.0.incoming);
        loop {
            {
                let mut connection = lock(&self.0.connection);
                loop {
                    match connection.reader().read(buf) {
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                        // Whether the end was announced makes no difference: frames tell whether they are whole.
                        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                        result => return result,
                    }
                    let Incoming { bytes, start, end } = &mut *incoming;
                    if start == end {
                        break;
                    }
                    *start += connection.read_tls(&mut &bytes[*start..*end])?;
                    let checked = connection.process_new_packets();
                    checked.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
                }
            }
            let read = (&self.0.socket).read(&mut incoming.bytes)?;
            if read == 0 {
                return Ok(0);
            }
            (incoming.start, incoming.end) = (0, read);
        }
    }

    pub(super) fn write_vectored(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut outgoing = lock(&self.0.outgoing);
        outgoing.clear();
        let taken = {
            let mut connection = lock(&self.0.connection);
            let taken = connection.writer().write_vectored(bufs)?;
            while connection.wants_write() {
                connection.write_tls(&mut *outgoing)?;
            }
            taken
        };
        (&self.0.socket).write_all(&outgoing)?;
        Ok(taken)
    }
}
