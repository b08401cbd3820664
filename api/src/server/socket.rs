//! The socket that the API listens on.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why there is no API socket.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Somebody serves there.
    #[error("API socket {0}: another VMM listens there; give this one another path or end the other")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("API socket {0}: there is a file that is no socket; remove it or choose another path")]
    NotASocket(PathBuf),
    /// The path is longer than a socket address.
    #[error("API socket {0}: the path is too long, at most 107 bytes are possible")]
    TooLong(PathBuf),
    /// The kernel refuses it.
    #[error("API socket {path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The descriptor that was handed over cannot serve.
    #[error("API socket fd={fd}: {reason}; hand over a listening Unix stream socket")]
    Fd {
        /// Which.
        fd: RawFd,
        /// Why.
        reason: String,
    },
}

/// A listening Unix socket. Its file is removed when it is dropped, if it is still the same.
#[derive(Debug)]
pub struct ApiSocket {
    listener: UnixListener,
    file: Option<SocketFile>,
}

#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let same = fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.inode);
        if same {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl ApiSocket {
    /// Listens at `path`, with access for this user only. A socket file that a dead process left is replaced.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let error = |source| SocketError::Io {
            path: path.into(),
            source,
        };
        let listener = match listen(path) {
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => return Err(SocketError::TooLong(path.into())),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path)?;
                listen(path).map_err(error)?
            }
            result => result.map_err(error)?,
        };
        let metadata = fs::symlink_metadata(path).map_err(error)?;
        let file = SocketFile {
            path: path.into(),
            inode: (metadata.dev(), metadata.ino()),
        };
        Ok(Self {
            listener,
            file: Some(file),
        })
    }

    /// Takes over the listening socket `fd` of this process.
    pub fn from_fd(fd: RawFd) -> Result<Self, SocketError> {
        let error = |reason: String| SocketError::Fd { fd, reason };
        if fd <= 2 {
            return Err(error("is a standard stream".into()));
        }
        for (option, expected, what) in [
            (libc::SO_DOMAIN, libc::AF_UNIX, "it is no Unix socket"),
            (libc::SO_TYPE, libc::SOCK_STREAM, "it is no stream socket"),
            (libc::SO_ACCEPTCONN, 1, "it does not listen"),
        ] {
            let value = socket_option(fd, option).map_err(|e| error(e.to_string()))?;
            if value != expected {
                return Err(error(what.into()));
            }
        }
        // SAFETY: `fd` is an open socket, and whoever started this process handed it over to the API server.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self {
            listener: fd.into(),
            file: None,
        })
    }

    /// The listener, and what removes its file when it is dropped.
    pub(super) fn into_parts(self) -> (UnixListener, impl Sized + Send + 'static) {
        (self.listener, self.file)
    }
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let error = |source| SocketError::Io {
        path: path.into(),
        source,
    };
    if !fs::symlink_metadata(path).map_err(error)?.file_type().is_socket() {
        return Err(SocketError::NotASocket(path.into()));
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(error),
        Err(source) => Err(error(source)),
        Ok(_) => Err(SocketError::InUse(path.into())),
    }
}

fn socket_option(fd: RawFd, option: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` and `len` are valid for the time of the call; any number may be passed as descriptor.
    let result = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            option,
            std::ptr::from_mut(&mut value).cast(),
            &mut len,
        )
    };
    if result == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Binds and listens. The mode is set before the file exists, so that nobody else can ever connect.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: sockaddr_un is plain data, valid when zero.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    if bytes.is_empty() || bytes.contains(&0) || bytes.len() >= address.sun_path.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    // SAFETY: plain system call.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` is a new descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: plain system calls on a descriptor that `socket` keeps open; `address` is valid for its size.
    let result = unsafe {
        let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
        match libc::fchmod(socket.as_raw_fd(), 0o600) {
            0 => match libc::bind(socket.as_raw_fd(), std::ptr::from_ref(&address).cast(), len) {
                0 => libc::listen(socket.as_raw_fd(), 128),
                e => e,
            },
            e => e,
        }
    };
    if result == 0 {
        Ok(socket.into())
    } else {
        Err(io::Error::last_os_error())
    }
}
