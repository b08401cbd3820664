//! What can happen, and how often.

use ft::core::primary::{FromBackup, ToBackup};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    Heartbeat,
    /// An epoch and its end marker.
    Epoch(u64),
    ToBackup(ToBackup),
    FromBackup(FromBackup),
    /// The end of the stream.
    End,
}

/// How often what may go wrong, or is done by operators.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Budget {
    pub crashes: u8,
    pub power_cuts: u8,
    pub damages: u8,
    pub resets: u8,
    /// Questions that do not reach the arbiter, or whose answers are lost.
    pub unanswered: u8,
    pub stops: u8,
    pub disks: u8,
    pub activations: u8,
    pub failovers: u8,
    pub disables: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Time passes for all.
    Clock,
    /// The next message of this direction arrives.
    Deliver(usize),
    /// The checkpoint is taken.
    Taken,
    /// Outputs that are on their way leave.
    Leave,
    /// The oldest epoch is applied.
    Applied,
    ApplyFails,
    Activated,
    ActivationFails,
    /// The question of this side reaches the arbiter, whose answer is on its way back.
    Answers(usize),
    /// It does not.
    Unreachable(usize),
    /// It does, and the answer is lost.
    AnswerLost(usize),
    /// The answer arrives.
    Hears(usize),
    /// A process ends, and its kernel closes the connection.
    Crash(usize),
    /// A host ends, and nobody closes anything.
    PowerCut(usize),
    /// The next message of this direction is damaged.
    Damage(usize),
    /// The connection breaks for both, with what is under way.
    Reset,
    /// A process is stopped.
    Stop(usize),
    Continue(usize),
    Failover,
    Disable,
}
