//! Errors of the hypervisor border.

use thiserror::Error;

/// A refused call, with what was tried.
#[derive(Debug, Error)]
pub enum Error {
    /// The virtualization device cannot be opened or is too old.
    #[error("/dev/kvm cannot be used: {0}")]
    Open(String),
    /// An ioctl failed.
    #[error("KVM refused to {what}: {source}")]
    Ioctl {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// This host lacks something.
    #[error("this host's KVM has no {0}")]
    Missing(&'static str),
    /// Pages may have been written without being logged: logging must be started anew.
    #[error("KVM's log of written pages is incomplete: it was interrupted when it was read")]
    DirtyLog,
    /// The guest did something that KVM cannot carry on from.
    #[error("the guest cannot run on: {0}")]
    Guest(String),
    /// A saved state that cannot be loaded.
    #[error("saved vCPU state: {0}")]
    State(String),
}

/// Result of the hypervisor border.
pub type Result<T> = std::result::Result<T, Error>;

pub(crate) fn ioctl(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |e| Error::Ioctl {
        what,
        source: std::io::Error::from_raw_os_error(e.errno()),
    }
}
