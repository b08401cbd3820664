//! The options of the VMM itself: `--api-socket`, `--event-monitor`, `--restore`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use super::{OptionError, Options};
use crate::RestoreConfig;
use crate::server::{ApiSocket, SocketError};

/// A path, or a descriptor that was handed over: `PATH`, `path=PATH` or `fd=N`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathOrFd {
    /// A path.
    Path(PathBuf),
    /// A descriptor of this process.
    Fd(RawFd),
}

impl PathOrFd {
    /// Reads the value of `option`.
    pub fn parse(option: &'static str, text: &str) -> Result<Self, OptionError> {
        if !text.starts_with("path=") && !text.starts_with("fd=") && !text.is_empty() {
            return Ok(Self::Path(text.into()));
        }
        let mut options = Options::parse(option, &["path", "fd"], text)?;
        match (options.take::<PathBuf>("path")?, options.take::<u16>("fd")?) {
            (Some(path), None) => Ok(Self::Path(path)),
            (None, Some(fd)) => Ok(Self::Fd(RawFd::from(fd))),
            _ => Err(options.error("must be a path, path=PATH or fd=NUMBER".into())),
        }
    }

    /// The API socket there.
    pub fn api_socket(&self) -> Result<ApiSocket, SocketError> {
        match self {
            Self::Path(path) => ApiSocket::bind(path),
            Self::Fd(fd) => ApiSocket::from_fd(*fd),
        }
    }

    /// A file there for appending, made when it does not exist.
    pub fn open_output(&self) -> io::Result<File> {
        match self {
            Self::Path(path) => {
                let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
                OpenOptions::new()
                    .append(true)
                    .create(true)
                    .mode(0o600)
                    .open(path)
                    .map_err(named)
            }
            Self::Fd(fd) => {
                // SAFETY: fcntl(2) takes any number.
                if *fd <= 2 || unsafe { libc::fcntl(*fd, libc::F_GETFD) } < 0 {
                    let reason = format!("fd={fd} is no open file that was handed over to this process");
                    return Err(io::Error::other(reason));
                }
                // SAFETY: it is open, and whoever started this process handed it over for this use.
                Ok(unsafe { OwnedFd::from_raw_fd(*fd) }.into())
            }
        }
    }
}

impl RestoreConfig {
    /// `--restore source_url=file:///dir,resume=on`
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let mut options = Options::parse("--restore", &["source_url", "prefault", "resume"], text)?;
        let mut config = Self {
            source_url: options.need("source_url")?,
            ..Self::default()
        };
        options.set("prefault", &mut config.prefault)?;
        options.set("resume", &mut config.resume)?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets() {
        let parse = |text| PathOrFd::parse("--api-socket", text);
        assert_eq!(parse("/a=b"), Ok(PathOrFd::Path("/a=b".into())));
        assert_eq!(parse("path=/a"), Ok(PathOrFd::Path("/a".into())));
        assert_eq!(parse("fd=7"), Ok(PathOrFd::Fd(7)));
        for bad in ["", "fd=x", "fd=-1", "path=", "path=/a,fd=7", "fd=7,x=1"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(PathOrFd::Fd(60_000).open_output().is_err());
        assert!(matches!(PathOrFd::Fd(60_000).api_socket(), Err(SocketError::Fd { .. })));
    }

    #[test]
    fn restore() {
        let config = RestoreConfig::parse("source_url=file:///a,resume=true").unwrap();
        assert!(config.resume && config.source_url == "file:///a");
        assert!(RestoreConfig::parse("resume=on").is_err());
    }
}
