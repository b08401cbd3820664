//! What `ft` answers to its caller when a request cannot be done.

use thiserror::Error;

use crate::arbiter::ArbiterError;
use crate::config::LimitError;
use crate::machine::{MachineError, Refusal};
use crate::reprotect::SparesError;
use crate::transport::TransportError;

/// Errors of the FT requests.
#[derive(Debug, Error)]
pub enum Error {
    /// The address is malformed, not allowed, or nobody answers there.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The arbiter is missing, unknown or does not answer.
    #[error(transparent)]
    Arbiter(#[from] ArbiterError),
    /// The request names no arbiter and the VMM has no default.
    #[error(
        "no arbiter is named: give one (`--arbiter file:DIR` or `--arbiter etcd:HOST:PORT`), or start the VMM \
             with `--ft-arbiter`"
    )]
    NoArbiter,
    /// A limit is out of range.
    #[error("limit {0}")]
    Limit(#[from] LimitError),
    /// The list of spares cannot be used.
    #[error(transparent)]
    Spares(#[from] SparesError),
    /// The backup does not take this VM.
    #[error("the backup refused: {0}")]
    Refused(#[from] Refusal),
    /// The other side does not speak our protocol, or hung up.
    #[error("the backup at {peer} did not complete the handshake: {reason}")]
    Handshake {
        /// Its address.
        peer: String,
        /// What happened.
        reason: String,
    },
    /// The VM does not do what FT needs.
    #[error("the VM cannot be protected: {0}")]
    Machine(#[from] MachineError),
    /// Not possible in the present state.
    #[error("{0}")]
    WrongState(String),
    /// The request was begun, and ended otherwise than asked.
    #[error("{0}")]
    Ended(String),
    /// The host gave no thread or other resource.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

impl Error {
    /// HTTP status for the REST API.
    pub fn status(&self) -> u16 {
        match self {
            Self::Transport(e) if e.is_request_error() => 400,
            Self::Arbiter(e) if e.is_request_error() => 400,
            Self::Transport(_) | Self::Arbiter(_) | Self::Handshake { .. } => 502,
            Self::NoArbiter | Self::Limit(_) | Self::Spares(_) => 400,
            Self::Refused(_) | Self::WrongState(_) => 409,
            Self::Machine(_) | Self::Ended(_) | Self::Host { .. } => 500,
        }
    }

    /// Stable code for programs.
    pub fn code(&self) -> &str {
        match self {
            Self::Transport(e) => e.code(),
            Self::Arbiter(e) => e.code(),
            Self::NoArbiter => "ft_no_arbiter",
            Self::Limit(_) => "ft_limit_out_of_range",
            Self::Spares(_) => "ft_bad_spares",
            Self::Refused(refusal) => &refusal.code,
            Self::Handshake { .. } => "ft_handshake_failed",
            Self::Machine(_) => "ft_machine_failed",
            Self::WrongState(_) => "ft_wrong_state",
            Self::Ended(_) => "ft_ended_otherwise",
            Self::Host { .. } => "ft_host_failed",
        }
    }
}
