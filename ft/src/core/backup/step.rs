//! What goes into the backup's state machine, and what comes out.

use super::damage::Compared;
use crate::audit::Mismatch;
use crate::core::Nanos;
use crate::core::arbitration::Answer;

/// What the backup has to do with a frame of the primary, beside data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromPrimary {
    /// Do not take over any more.
    Disarm(String),
    /// Become the VM as it was at the end of this epoch.
    Handover(u64),
    /// New silence timeout.
    Timeout(Nanos),
}

/// What the backup tells the primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToPrimary {
    /// Everything up to this epoch is staged.
    Ack(u64),
    /// We will not take over.
    Disarmed,
    /// We are the VM; the generation that we won.
    HandedOver(u64),
    /// We won this generation, and will never run the VM.
    HandoverFailed {
        /// Generation that we won.
        generation: u64,
        /// Why we could not.
        reason: String,
    },
    /// We leave.
    Bye(String),
    /// The shadow is wrong there: send these places anew.
    Mismatch(Vec<Mismatch>),
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Time passed.
    Tick {
        /// When bytes last came from the primary.
        heard: Nanos,
    },
    /// An epoch has come whole.
    Staged {
        /// The epoch.
        epoch: u64,
        /// Its size.
        bytes: u64,
        /// It must be on disk before it is acknowledged (R5).
        durable: bool,
    },
    /// An epoch's checksums were compared with the shadow, to which it was just applied; [`Event::Applied`] follows.
    Compared(Compared),
    /// The oldest epoch handed to [`Action::Apply`] is in the shadow's RAM and disks.
    Applied {
        /// The epoch.
        epoch: u64,
    },
    /// It could not be applied; the shadow is broken.
    ApplyFailed(String),
    /// A frame of the primary.
    Peer(FromPrimary),
    /// The connection is closed.
    PeerLost {
        /// When bytes last came.
        heard: Nanos,
        /// What happened.
        reason: String,
    },
    /// A frame is damaged or impossible.
    PeerBroken {
        /// When bytes last came.
        heard: Nanos,
        /// What is wrong.
        reason: String,
    },
    /// The arbiter's answer.
    Arbiter(Answer),
    /// The VM runs here.
    Activated,
    /// It could not be made to run.
    ActivationFailed(String),
    /// The operator ends this backup.
    Leave(String),
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Tell the primary.
    Send(ToPrimary),
    /// Apply a staged epoch, in the background, in order.
    Apply(u64),
    /// Try to raise the generation from `expected`.
    AskArbiter {
        /// Present generation.
        expected: u64,
    },
    /// Close the connection at once.
    Disconnect,
    /// Close the connection, after what was sent before.
    Farewell,
    /// Become the VM as it was at the end of this epoch, which is applied.
    Activate(u64),
    /// The shadow is not needed any more.
    Discard,
}
