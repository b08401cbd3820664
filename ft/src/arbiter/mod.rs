//! The arbiter: an outside test-and-set register that decides who may run a VM alone (R4).
//!
//! Per VM it holds a generation, which starts at 0. Going live and going solo each need one win: raising the generation
//! from g to g + 1 in one's own name. For every g there is exactly one winner for ever, so of two replicas that lose
//! sight of each other one goes on and the other stops.
//!
//! * [`Arbiter`]: the border; [`FileArbiter`]: files on a directory that both hosts reach; `EtcdArbiter` (feature
//!   `etcd`): keys in an etcd cluster;
//! * [`description`]: an operator's `KIND:...`, taken apart; [`open`]: from there to an arbiter;
//! * `record`: what a store holds for a won generation; `memory`: a store that is not the one of before is refused.

pub mod description;
#[cfg(feature = "etcd")]
mod etcd;
mod file;
mod memory;
mod record;

use std::sync::Arc;

use thiserror::Error;

use crate::core::arbitration::Answer;
pub use description::Description;
#[cfg(feature = "etcd")]
pub use etcd::EtcdArbiter;
pub use file::FileArbiter;

/// Errors of an arbiter. None of them says who won: the caller must ask again.
#[derive(Debug, Error)]
pub enum ArbiterError {
    /// The description is malformed or of an unknown kind.
    #[error(
        "arbiter `{text}`: {reason}; known kinds are file:DIR (a directory on storage that both hosts reach) and \
         etcd:HOST:PORT[+HOST:PORT...][+ca=FILE[+cert=FILE+key=FILE]][+prefix=/PATH] (an etcd cluster)"
    )]
    BadDescription {
        /// The description.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The VM's or node's id cannot be used as a name.
    #[error("`{0}` cannot be a name in the arbiter: 1 to 64 letters, digits, `-` and `_`")]
    BadName(String),
    /// The store does not answer.
    #[error("arbiter {what}: {source}")]
    Store {
        /// What was tried, where.
        what: String,
        /// The kernel's or the store's answer.
        source: std::io::Error,
    },
    /// The store's content is not ours, or not what it was.
    #[error("arbiter {place}: {reason}")]
    Corrupt {
        /// Where.
        place: String,
        /// What is wrong.
        reason: String,
    },
}

impl ArbiterError {
    /// The request itself is wrong, not the store.
    pub fn is_request_error(&self) -> bool {
        matches!(self, Self::BadDescription { .. } | Self::BadName(_))
    }

    /// Stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::BadDescription { .. } | Self::BadName(_) => "ft_bad_arbiter",
            Self::Store { .. } => "ft_arbiter_unreachable",
            Self::Corrupt { .. } => "ft_arbiter_corrupt",
        }
    }
}

/// What a VM's register holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Register {
    /// The generation.
    pub generation: u64,
    /// Who won it; `None` for generation 0.
    pub winner: Option<String>,
}

/// Answer to a test-and-set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The generation was raised in our name (now, or in an earlier call whose answer was lost).
    Won,
    /// Another node had raised it.
    Lost {
        /// Its id.
        winner: String,
    },
}

/// A test-and-set register per VM. Calls may block for as long as the store does.
///
/// An arbiter remembers the store that it met first and the registers that it saw. When the store is another one later,
/// or has gone back to an earlier state, every answer is [`ArbiterError::Corrupt`].
pub trait Arbiter: Send + Sync {
    /// Raises the generation of `vm_id` from `expected` to `expected + 1` in the name of `node`, unless that was done
    /// already.
    fn test_and_set(&self, vm_id: &str, expected: u64, node: &str) -> Result<Verdict, ArbiterError>;
    /// The present generation.
    fn read(&self, vm_id: &str) -> Result<Register, ArbiterError>;
    /// The store's random id; made when there is none.
    fn store_id(&self) -> Result<String, ArbiterError>;
    /// Leaves a mark that the other side looks for with [`Arbiter::sees`]: both then know that they use the same store.
    fn mark(&self, vm_id: &str, token: &str) -> Result<(), ArbiterError>;
    /// Whether the mark is there.
    fn sees(&self, vm_id: &str, token: &str) -> Result<bool, ArbiterError>;
    /// Takes the mark away again.
    fn unmark(&self, vm_id: &str, token: &str);
}

/// Opens the arbiter that `text` names. Nobody is asked yet.
pub fn open(text: &str) -> Result<Arc<dyn Arbiter>, ArbiterError> {
    match text.parse()? {
        Description::File(dir) => Ok(Arc::new(FileArbiter::open(&dir)?)),
        #[cfg(feature = "etcd")]
        Description::Etcd(cluster) => Ok(Arc::new(EtcdArbiter::open(cluster)?)),
        #[cfg(not(feature = "etcd"))]
        Description::Etcd(_) => Err(ArbiterError::BadDescription {
            text: text.into(),
            reason: "this build has no etcd (feature `etcd`)".into(),
        }),
    }
}

/// The arbiter's answer, for the core.
pub(crate) fn answer_of(answer: Result<Verdict, ArbiterError>) -> Answer {
    match answer {
        Ok(Verdict::Won) => Answer::Won,
        Ok(Verdict::Lost { winner }) => Answer::Lost { winner },
        Err(e) => Answer::Unknown { reason: e.to_string() },
    }
}
