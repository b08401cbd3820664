//! The primary's side of the protocol.
//!
//! Before the end marker of the first checkpoint is sent, the backup cannot take over: a failure leaves the VM running
//! untouched. From that moment on the backup counts as armed, and without it the VM goes on only after a win of the
//! arbiter (R4), or after the backup's own word that it will never take over (`disarmed`, `bye`).

mod steps;

use std::collections::VecDeque;

use super::arbitration::{Answer, Arbitration};
use super::liveness::{Lease, Silence};
use super::pacing::{Limits, Pacing};
use super::{Nanos, ms};
use crate::config::FtState;
use crate::event::Status;

/// Longest wait for the backup's word that it is disarmed or has taken over.
const ANSWER_TIMEOUT: Nanos = ms(20_000);

/// A backup that gives signs of life, but has read nothing for so long, is of no use.
const DEAF_TIMEOUT: Nanos = ms(30_000);

/// Silence that ends an attempt to protect the VM while it is not protected anyway.
const SYNC_TIMEOUT: Nanos = ms(10_000);

/// Epochs that may be in flight beside the usual ones while places of the shadow must be sent anew: until it has them,
/// the backup acknowledges nothing.
const REPAIR_AHEAD: usize = 8;

/// What the primary has to do with a frame of the backup.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum FromBackup {
    /// Sign of life.
    Heartbeat,
    /// Everything up to this epoch is staged.
    Ack(u64),
    /// It will not take over.
    Disarmed,
    /// It is the VM now; the generation it won.
    HandedOver(u64),
    /// It won this generation, and will never run the VM.
    HandoverFailed {
        /// Generation that it won.
        generation: u64,
        /// Why it could not.
        reason: String,
    },
    /// It leaves and will not take over.
    Bye(String),
    /// So many places of its shadow are wrong and must be sent anew.
    Mismatch {
        /// How many.
        places: u64,
        /// Which, in words.
        what: String,
    },
}

/// What the primary tells the backup, beside data.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ToBackup {
    /// Do not take over any more.
    Disarm(String),
    /// Become the VM as it was at the end of this epoch.
    Handover(u64),
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Time passed, or the running epoch changed.
    Tick {
        /// When bytes last came from the backup.
        heard: Nanos,
        /// Bytes logged and held in the running epoch.
        running_bytes: u64,
        /// Outputs of the running epoch wait.
        output: bool,
    },
    /// The running epoch was ended; the VM stands still. Its end marker may be sent after this event, not before.
    Checkpointed {
        /// Bytes of it that wait for the backup.
        bytes: u64,
        /// Bytes of RAM in it.
        dirty_bytes: u64,
        /// Places of [`FromBackup::Mismatch`] that it sends anew.
        anew: u64,
    },
    /// A frame of the backup.
    Peer {
        /// Stamp in its header.
        echo: Nanos,
        /// What it says.
        message: FromBackup,
    },
    /// The connection is closed, or a frame is damaged or impossible.
    PeerLost(String),
    /// The arbiter's answer.
    Arbiter(Answer),
    /// The VM did not do what a checkpoint needs.
    MachineFailed(String),
    /// The operator ends FT, or the VM ends by its owner's will.
    Disable(String),
    /// The operator wants the backup to become the VM.
    Failover,
    /// New limits (the shell sends them to the backup right after this event).
    SetLimits(Limits),
    /// The held changes of shared disks of all epochs up to this one are on the disks, and flushed.
    Written(u64),
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// End the running epoch: pause, cut, copy, then [`Event::Checkpointed`].
    Checkpoint,
    /// Let the guest run on.
    Resume,
    /// Let the outputs of all epochs up to this one leave.
    Release(u64),
    /// Carry out the held changes of shared disks of all epochs up to this one, in order, then [`Event::Written`].
    Write(u64),
    /// Let the guest run this share of the time ([`PrimaryState::throttle`] tells it too).
    Throttle(u8),
    /// Tell the backup.
    Send(ToBackup),
    /// Try to raise the generation from `expected`.
    AskArbiter {
        /// Present generation.
        expected: u64,
    },
    /// Close the connection.
    Disconnect,
    /// The VM goes on without FT: release everything that is held, take the interposer away, resume.
    GoAlone,
    /// FT never began: stop tracking changes; the VM runs.
    Abandon,
    /// The VM must not run on here.
    Stop(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Phase {
    /// Pre-copy; `armed` tells whether checkpoint 1 is under way.
    Syncing,
    Running,
    /// `disarm` was sent; then the VM runs alone in `end`.
    Disarming {
        end: End,
        deadline: Nanos,
    },
    /// `handover` was sent.
    Offered {
        deadline: Nanos,
    },
    Arbitrating {
        arbitration: Arbitration,
        end: End,
    },
    Ended(FtState),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum End {
    Solo,
    Disabled,
    Failed,
}

impl End {
    fn state(self) -> FtState {
        match self {
            Self::Solo => FtState::Solo,
            Self::Disabled => FtState::Disabled,
            Self::Failed => FtState::Failed,
        }
    }
}

/// The primary.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PrimaryState {
    phase: Phase,
    reason: Option<String>,
    generation: u64,
    limits: Limits,
    max_in_flight: usize,
    armed: bool,
    epoch: u64,
    pacing: Pacing,
    /// Epochs cut and not committed, with their bytes.
    in_flight: VecDeque<(u64, u64)>,
    committed: u64,
    released: u64,
    shared: Option<Shared>,
    running_bytes: u64,
    output: bool,
    checkpointing: bool,
    /// The guest stands still after a checkpoint: it waits for room, or for the handover.
    still: bool,
    percent: u8,
    handover: Handover,
    silence: Silence,
    lease: Lease,
    /// When the backup became armed.
    armed_at: Nanos,
    damage: Damage,
}

/// What the backup found wrong in its shadow.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Damage {
    /// Places that are to be sent anew. Below zero: some were sent of which the core has not been told yet.
    places: i64,
    /// The last epoch that sent some: with its acknowledgement all before are right again.
    sent_with: Option<u64>,
    what: String,
}

impl Damage {
    /// The backup can take over as far as it knows.
    fn is_none(&self) -> bool {
        self.places == 0 && self.sent_with.is_none()
    }
}

/// Disks that the backup's host sees too: their changes are outputs (R1, R3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shared {
    /// Other outputs of an epoch wait for them (R5, `disk-of-both`).
    durable: bool,
    /// Up to this epoch they were asked to be carried out.
    asked: u64,
    /// Up to this epoch they are on the disk.
    written: u64,
    /// Bytes of changes that are not on the disk.
    held: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Handover {
    No,
    Wanted,
    /// This epoch is the last.
    Last(u64),
}

impl PrimaryState {
    /// The backup accepted at `now`; pre-copy begins.
    pub fn new(generation: u64, limits: Limits, max_in_flight: usize, now: Nanos) -> Self {
        Self {
            phase: Phase::Syncing,
            reason: None,
            generation,
            limits,
            max_in_flight,
            armed: false,
            epoch: 1,
            pacing: Pacing::new(now),
            in_flight: VecDeque::new(),
            committed: 0,
            released: 0,
            shared: None,
            running_bytes: 0,
            output: false,
            checkpointing: false,
            still: false,
            percent: 100,
            handover: Handover::No,
            silence: Silence::new(SYNC_TIMEOUT.max(limits.timeout), now),
            lease: Lease::new(limits.timeout),
            armed_at: now,
            damage: Damage::default(),
        }
    }

    /// The VM has shared disks. `durable`: outputs of an epoch wait until its changes of them are on the disk.
    #[must_use]
    pub fn with_shared_disks(mut self, durable: bool) -> Self {
        self.shared = Some(Shared {
            durable,
            asked: 0,
            written: 0,
            held: 0,
        });
        self
    }

    /// Bytes of changes that wait for shared disks; to be told before each step.
    pub fn note_held(&mut self, bytes: u64) {
        if let Some(shared) = &mut self.shared {
            shared.held = bytes;
        }
    }

    /// For events and `ft info`.
    pub fn status(&self) -> Status {
        let state = match &self.phase {
            Phase::Syncing => FtState::Syncing,
            Phase::Running if self.committed == 0 || !self.damage.is_none() => FtState::Syncing,
            Phase::Running | Phase::Disarming { .. } | Phase::Offered { .. } => FtState::Protected,
            Phase::Arbitrating { .. } => FtState::WaitingForArbiter,
            Phase::Ended(state) => *state,
        };
        let reason = match &self.phase {
            Phase::Arbitrating { arbitration, .. } => arbitration.explain(self.reason.clone()),
            Phase::Running if !self.damage.is_none() => Some(self.damage.what.clone()),
            _ => self.reason.clone(),
        };
        Status {
            state,
            reason,
            generation: self.generation,
            epoch: self.epoch,
            committed: self.committed,
        }
    }

    /// Limits in force.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Nothing will happen any more.
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Ended(_))
    }

    /// The backup is lost, and it is open who goes on.
    pub fn is_arbitrating(&self) -> bool {
        matches!(self.phase, Phase::Arbitrating { .. })
    }

    /// The last epoch whose outputs left.
    pub fn released(&self) -> u64 {
        self.released
    }

    /// The last committed epoch.
    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// Whether outputs of committed epochs may leave now (R4).
    pub fn may_release(&self, now: Nanos) -> bool {
        !matches!(self.phase, Phase::Ended(_) | Phase::Arbitrating { .. }) && self.lease.holds(now)
    }

    /// Bytes of epochs that are not committed, and of changes that are not on shared disks.
    pub fn lag(&self) -> u64 {
        let uncommitted: u64 = self.in_flight.iter().map(|(_, bytes)| bytes).sum();
        uncommitted + self.running_bytes + self.shared.map_or(0, |shared| shared.held)
    }

    /// Share of the time that the guest may run; 0 while it waits.
    pub fn percent(&self) -> u8 {
        if self.still { 0 } else { self.percent }
    }

    /// Whether a checkpoint that was taken is to be sent.
    pub fn sends(&self) -> bool {
        matches!(self.phase, Phase::Running)
    }

    /// The share that the guest is to be given while it runs.
    pub fn throttle(&self) -> u8 {
        self.percent
    }

    /// A handover was asked for and is not decided.
    pub fn hands_over(&self) -> bool {
        !self.is_over() && self.handover != Handover::No
    }

    fn has_room(&self) -> bool {
        let repair = if self.damage.places > 0 { REPAIR_AHEAD } else { 0 };
        self.in_flight.len() < self.max_in_flight + repair
    }

    /// A VM that stands still has an epoch to end only when places must be sent anew.
    fn may_checkpoint(&self) -> bool {
        let waits = self.still || matches!(self.handover, Handover::Last(_));
        matches!(self.phase, Phase::Running)
            && !self.checkpointing
            && self.has_room()
            && (!waits || self.damage.places > 0)
    }

    /// When the running epoch is to end; a [`Event::Tick`] is due then.
    pub fn deadline(&self) -> Option<Nanos> {
        let at = self.pacing.ends_at(&self.limits, self.output, self.running_bytes);
        let at_once = self.handover == Handover::Wanted || self.damage.places > 0;
        self.may_checkpoint().then_some(if at_once { 0 } else { at })
    }

    /// Pre-copy is done: the first checkpoint is to be taken (it goes on where pre-copy ended, in one pause). `false`:
    /// the attempt has ended meanwhile.
    pub fn begin_first_checkpoint(&mut self) -> bool {
        let ready = matches!(self.phase, Phase::Syncing) && !self.armed;
        self.checkpointing |= ready;
        ready
    }

    /// One step.
    pub fn step(&mut self, event: Event, now: Nanos) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            Event::Tick {
                heard,
                running_bytes,
                output,
            } => {
                (self.running_bytes, self.output) = (running_bytes, output);
                self.tick(heard, now, &mut out);
            }
            Event::Checkpointed {
                bytes,
                dirty_bytes,
                anew,
            } => self.checkpointed(bytes, dirty_bytes, anew, now, &mut out),
            Event::Peer { echo, message } => self.peer(echo, message, now, &mut out),
            Event::PeerLost(reason) => self.lose(reason, now, &mut out),
            Event::Arbiter(answer) => self.answered(answer, now, &mut out),
            Event::MachineFailed(reason) => {
                self.checkpointing = false;
                self.leave(End::Failed, reason, now, &mut out);
            }
            Event::Disable(reason) => match self.phase {
                Phase::Ended(FtState::Solo | FtState::Failed) => self.phase = Phase::Ended(FtState::Disabled),
                _ => self.leave(End::Disabled, reason, now, &mut out),
            },
            Event::Failover => {
                if matches!(self.phase, Phase::Running) && self.handover == Handover::No {
                    self.handover = Handover::Wanted;
                }
            }
            Event::Written(epoch) => self.has_written(epoch, now, &mut out),
            Event::SetLimits(limits) => {
                self.limits = limits;
                self.lease.set_timeout(limits.timeout, now);
                let timeout = if self.armed {
                    limits.timeout
                } else {
                    SYNC_TIMEOUT.max(limits.timeout)
                };
                self.silence.set_timeout(timeout);
            }
        }
        self.pace(now, &mut out);
        out
    }
}
