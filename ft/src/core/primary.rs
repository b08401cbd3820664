//! The primary's side of the protocol.
//!
//! Before the end marker of the first checkpoint is sent, the backup cannot take over: a failure leaves the VM running
//! untouched. From that moment on the backup counts as armed, and without it the VM goes on only after a win of the
//! arbiter (R4), or after the backup's own word that it will never take over (`disarmed`, `bye`).

use std::collections::VecDeque;

use super::arbitration::{Answer, Arbitration};
use super::liveness::{Lease, Silence};
use super::pacing::{Limits, Pacing};
use super::{Nanos, ms};
use crate::config::FtState;
use crate::event::Status;

/// Longest wait for the backup's word that it is disarmed or has taken over.
const ANSWER_TIMEOUT: Nanos = ms(20_000);

/// Silence that ends an attempt to protect the VM while it is not protected anyway.
const SYNC_TIMEOUT: Nanos = ms(10_000);

/// What the primary has to do with a frame of the backup.
#[derive(Debug, Clone, PartialEq, Eq)]
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
}

/// What the primary tells the backup, beside data.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// Let the guest run this share of the time.
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

#[derive(Debug, Clone)]
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
#[derive(Debug, Clone)]
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
    running_bytes: u64,
    output: bool,
    checkpointing: bool,
    /// The guest stands still after a checkpoint: it waits for room, or for the handover.
    still: bool,
    percent: u8,
    handover: Handover,
    silence: Silence,
    lease: Lease,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
            running_bytes: 0,
            output: false,
            checkpointing: false,
            still: false,
            percent: 100,
            handover: Handover::No,
            silence: Silence::new(SYNC_TIMEOUT.max(limits.timeout), now),
            lease: Lease::new(limits.timeout),
        }
    }

    /// For events and `ft info`.
    pub fn status(&self) -> Status {
        let state = match &self.phase {
            Phase::Syncing => FtState::Syncing,
            Phase::Running if self.committed == 0 => FtState::Syncing,
            Phase::Running | Phase::Disarming { .. } | Phase::Offered { .. } => FtState::Protected,
            Phase::Arbitrating { .. } => FtState::WaitingForArbiter,
            Phase::Ended(state) => *state,
        };
        let trouble = match &self.phase {
            Phase::Arbitrating { arbitration, .. } => arbitration.trouble(),
            _ => None,
        };
        let reason = match (&self.reason, trouble) {
            (Some(reason), Some(trouble)) => Some(format!("{reason}; no answer yet: {trouble}")),
            (reason, _) => reason.clone(),
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

    /// The last epoch whose outputs left.
    pub fn released(&self) -> u64 {
        self.released
    }

    /// Bytes of epochs that are not committed.
    pub fn lag(&self) -> u64 {
        self.in_flight.iter().map(|(_, bytes)| bytes).sum::<u64>() + self.running_bytes
    }

    /// Share of the time that the guest may run; 0 while it waits.
    pub fn percent(&self) -> u8 {
        if self.still { 0 } else { self.percent }
    }

    /// Whether a checkpoint that was taken is to be sent.
    pub fn sends(&self) -> bool {
        matches!(self.phase, Phase::Running)
    }

    /// A handover was asked for and is not decided.
    pub fn hands_over(&self) -> bool {
        !self.is_over() && self.handover != Handover::No
    }

    fn has_room(&self) -> bool {
        self.in_flight.len() < self.max_in_flight
    }

    fn may_checkpoint(&self) -> bool {
        matches!(self.phase, Phase::Running)
            && !self.checkpointing
            && !self.still
            && self.has_room()
            && !matches!(self.handover, Handover::Last(_))
    }

    /// When the running epoch is to end; a [`Event::Tick`] is due then.
    pub fn deadline(&self) -> Option<Nanos> {
        let at = self.pacing.ends_at(&self.limits, self.output, self.running_bytes);
        self.may_checkpoint()
            .then_some(if self.handover == Handover::Wanted { 0 } else { at })
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
            Event::Checkpointed { bytes, dirty_bytes } => self.checkpointed(bytes, dirty_bytes, now, &mut out),
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

    fn pace(&mut self, now: Nanos, out: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Running) {
            return;
        }
        let percent = self.pacing.percent(&self.limits, self.lag(), self.has_room(), now);
        if percent != self.percent {
            self.percent = percent;
            out.push(Action::Throttle(percent));
        }
        if self.deadline().is_some_and(|at| now >= at) {
            self.checkpointing = true;
            out.push(Action::Checkpoint);
        }
    }

    fn tick(&mut self, heard: Nanos, now: Nanos, out: &mut Vec<Action>) {
        let expected = self.generation;
        match &mut self.phase {
            Phase::Ended(_) => return,
            Phase::Arbitrating { arbitration, .. } => {
                if arbitration.ask_again(now) {
                    out.push(Action::AskArbiter { expected });
                }
                return;
            }
            Phase::Disarming { deadline, .. } | Phase::Offered { deadline } if now >= *deadline => {
                let reason = "the backup lives but did not answer in time".to_string();
                return self.lose(reason, now, out);
            }
            _ => {}
        }
        if self.silence.is_dead(heard, now) {
            let silent = now.saturating_sub(heard) / ms(1);
            self.lose(format!("the backup was silent for {silent} ms"), now, out);
        }
    }

    fn checkpointed(&mut self, bytes: u64, dirty_bytes: u64, now: Nanos, out: &mut Vec<Action>) {
        if !self.checkpointing || self.is_over() {
            return;
        }
        self.checkpointing = false;
        let ended = self.epoch;
        self.epoch += 1;
        self.pacing.next(dirty_bytes, now);
        (self.running_bytes, self.output) = (0, false);
        if matches!(self.phase, Phase::Syncing) {
            self.armed = true;
            self.phase = Phase::Running;
            self.silence = Silence::new(self.limits.timeout, now);
        }
        if !matches!(self.phase, Phase::Running) {
            // The backup was lost while the checkpoint was taken. Its outputs stay held; the guest may run.
            out.push(Action::Resume);
            return;
        }
        self.in_flight.push_back((ended, bytes));
        if self.handover == Handover::Wanted {
            self.handover = Handover::Last(ended);
        }
        self.still = matches!(self.handover, Handover::Last(_)) || self.lag() >= self.limits.max_lag;
        if !self.still {
            out.push(Action::Resume);
        }
    }

    fn peer(&mut self, echo: Nanos, message: FromBackup, now: Nanos, out: &mut Vec<Action>) {
        if matches!(self.phase, Phase::Ended(_) | Phase::Arbitrating { .. }) {
            return;
        }
        if echo > now {
            return self.lose("the backup returned a stamp from the future".into(), now, out);
        }
        if echo > 0 {
            self.lease.renew(echo);
        }
        match message {
            FromBackup::Heartbeat => {}
            FromBackup::Ack(epoch) => {
                if epoch >= self.epoch {
                    return self.lose(
                        format!("the backup acknowledged epoch {epoch}, which was not sent"),
                        now,
                        out,
                    );
                }
                // Acknowledgements count for all epochs before; an older one may arrive after a newer.
                self.committed = self.committed.max(epoch);
                while self.in_flight.front().is_some_and(|(e, _)| *e <= epoch) {
                    self.in_flight.pop_front();
                }
                if self.still && self.handover == Handover::No && self.lag() < self.limits.max_lag {
                    self.still = false;
                    self.pacing.restart(now);
                    out.push(Action::Resume);
                }
            }
            FromBackup::Disarmed => match self.phase {
                Phase::Disarming { end, .. } => self.alone(end, out),
                _ => return self.lose("the backup answers what it was not asked".into(), now, out),
            },
            FromBackup::Bye(reason) => {
                self.reason = Some(format!("the backup left and will not take over: {reason}"));
                if self.armed {
                    self.alone(End::Failed, out);
                } else {
                    self.abandon(End::Failed, out);
                }
            }
            FromBackup::HandedOver(generation) => match self.phase {
                Phase::Offered { .. } => {
                    self.generation = generation;
                    self.stop(
                        format!("the VM was handed over to the backup, which won generation {generation}"),
                        out,
                    );
                }
                _ => return self.lose("the backup says it took over, unasked".into(), now, out),
            },
            FromBackup::HandoverFailed { generation, reason } => match self.phase {
                Phase::Offered { .. } if generation == self.generation + 1 => {
                    // It spent that generation and is out of the race: ours is the next.
                    self.generation = generation;
                    return self.lose(format!("the backup could not become the VM: {reason}"), now, out);
                }
                _ => return self.lose("the backup says its takeover failed, unasked".into(), now, out),
            },
        }
        self.release(now, out);
    }

    /// Outputs of committed epochs leave as long as the lease holds (R1, R4); after that, a handover may be offered.
    fn release(&mut self, now: Nanos, out: &mut Vec<Action>) {
        if matches!(self.phase, Phase::Ended(_) | Phase::Arbitrating { .. }) {
            return;
        }
        if self.committed > self.released && self.lease.holds(now) {
            self.released = self.committed;
            out.push(Action::Release(self.released));
        }
        if let (Handover::Last(epoch), Phase::Running) = (self.handover, &self.phase)
            && self.released >= epoch
        {
            self.phase = Phase::Offered {
                deadline: now + ANSWER_TIMEOUT,
            };
            out.push(Action::Send(ToBackup::Handover(epoch)));
        }
    }

    /// The backup does not count any more.
    fn lose(&mut self, reason: String, _now: Nanos, out: &mut Vec<Action>) {
        let end = match &self.phase {
            Phase::Ended(_) | Phase::Arbitrating { .. } => return,
            Phase::Disarming { end, .. } => *end,
            Phase::Syncing if !self.armed => {
                self.reason = Some(reason);
                return self.abandon(End::Failed, out);
            }
            _ => End::Solo,
        };
        self.reason = Some(reason);
        self.phase = Phase::Arbitrating {
            arbitration: Arbitration::begin(),
            end,
        };
        out.push(Action::Disconnect);
        out.push(Action::AskArbiter {
            expected: self.generation,
        });
    }

    fn answered(&mut self, answer: Answer, now: Nanos, out: &mut Vec<Action>) {
        let Phase::Arbitrating { arbitration, end } = &mut self.phase else {
            return;
        };
        match answer {
            Answer::Unknown { reason } => arbitration.unanswered(reason, now),
            Answer::Won => {
                let end = *end;
                self.generation += 1;
                self.alone(end, out);
            }
            Answer::Lost { winner } => {
                self.generation += 1;
                let before = self.reason.take().unwrap_or_default();
                self.stop(
                    format!(
                        "{before}; node {winner} won generation {} in the arbiter",
                        self.generation
                    ),
                    out,
                );
            }
        }
    }

    /// FT ends by our own will.
    fn leave(&mut self, end: End, reason: String, now: Nanos, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Syncing if !self.armed => {
                self.reason = Some(reason);
                self.abandon(end, out);
            }
            Phase::Running => {
                self.reason = Some(reason.clone());
                self.phase = Phase::Disarming {
                    end,
                    deadline: now + ANSWER_TIMEOUT,
                };
                out.push(Action::Send(ToBackup::Disarm(reason)));
            }
            _ => {}
        }
    }

    fn alone(&mut self, end: End, out: &mut Vec<Action>) {
        self.finish(end.state());
        out.push(Action::Disconnect);
        out.push(Action::GoAlone);
    }

    fn abandon(&mut self, end: End, out: &mut Vec<Action>) {
        self.finish(end.state());
        out.push(Action::Disconnect);
        out.push(Action::Abandon);
    }

    fn stop(&mut self, reason: String, out: &mut Vec<Action>) {
        self.finish(FtState::Stopped);
        self.reason = Some(reason.clone());
        out.push(Action::Disconnect);
        out.push(Action::Stop(reason));
    }

    fn finish(&mut self, state: FtState) {
        self.phase = Phase::Ended(state);
        self.in_flight.clear();
        (self.running_bytes, self.output, self.still, self.percent) = (0, false, false, 100);
    }
}
