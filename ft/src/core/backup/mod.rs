//! The backup's side of the protocol.
//!
//! An epoch that is staged whole counts: at a loss of the primary the backup becomes the VM as it was at the end of the
//! last such epoch (R2), after a win of the arbiter (R4), for which it asks once that epoch is applied. The
//! acknowledgement may come later than that: when applying lags behind, which bounds what is staged, and when the epoch
//! must be on disk first (R5). It does come later while the shadow is known to be wrong somewhere: then nothing that is
//! staged can be taken over.

mod damage;
mod step;

use std::collections::VecDeque;

pub use self::damage::{Compared, MAX_REPAIRS};
pub use self::step::{Action, Event, FromPrimary, ToPrimary};

use self::damage::Damage;
use super::arbitration::{Answer, Arbitration};
use super::liveness::Silence;
use super::staging::MAX_AHEAD;
use super::{Nanos, ms};
use crate::config::FtState;
use crate::event::Status;

/// Silence that ends a session whose first checkpoint has not come.
const SYNC_TIMEOUT: Nanos = ms(10_000);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Phase {
    Syncing,
    Armed,
    /// Asks as soon as the last epoch is applied, and `unsure` is over.
    Arbitrating {
        arbitration: Arbitration,
        planned: bool,
        /// The primary, last heard then, made no sense: it may be alive, and its lease may hold.
        unsure: Option<Nanos>,
    },
    /// The arbiter was won; waits for the activation.
    TakingOver {
        planned: bool,
    },
    Live,
    /// Nothing to take over; what to tell the operator.
    Released,
    Stopped,
    Failed,
}

/// How a takeover went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Times {
    /// Last sign of life of the primary.
    pub heard: Nanos,
    /// When its loss was detected (planned: when the handover came).
    pub detected: Nanos,
    /// When the VM ran here.
    pub activated: Nanos,
}

/// The backup, for one session with a primary.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BackupState {
    phase: Phase,
    reason: Option<String>,
    generation: u64,
    timeout: Nanos,
    staged: u64,
    acked: u64,
    applied: u64,
    /// Epochs staged and not applied, with their bytes, and whether they must be on disk before they are acknowledged.
    unapplied: VecDeque<(u64, u64, bool)>,
    backlog: u64,
    silence: Silence,
    times: Times,
    damage: Damage,
}

impl BackupState {
    /// The primary was accepted at `now`. `timeout`: silence that counts as death; `backlog`: bytes staged and not
    /// applied above which acknowledgements wait.
    pub fn new(generation: u64, timeout: Nanos, backlog: u64, now: Nanos) -> Self {
        Self {
            phase: Phase::Syncing,
            reason: None,
            generation,
            timeout,
            staged: 0,
            acked: 0,
            applied: 0,
            unapplied: VecDeque::new(),
            backlog,
            silence: Silence::new(SYNC_TIMEOUT.max(timeout), now),
            times: Times::default(),
            damage: Damage::default(),
        }
    }

    /// What the audit finds is sent anew; otherwise it ends this backup.
    pub fn with_repair(mut self, repair: bool) -> Self {
        self.damage.repair = repair;
        self
    }

    /// For events and `ft info`.
    pub fn status(&self) -> Status {
        let state = match &self.phase {
            Phase::Syncing => FtState::Syncing,
            Phase::Armed if self.is_damaged() => FtState::Syncing,
            Phase::Armed => FtState::Protected,
            Phase::Arbitrating { .. } => FtState::WaitingForArbiter,
            Phase::TakingOver { .. } => FtState::TakingOver,
            Phase::Live => FtState::Solo,
            Phase::Released => FtState::Disabled,
            Phase::Stopped => FtState::Stopped,
            Phase::Failed => FtState::Failed,
        };
        let reason = match &self.phase {
            Phase::Arbitrating { arbitration, .. } => arbitration.explain(self.reason.clone()),
            Phase::Armed if self.is_damaged() => Some(self.damage.what.clone()),
            _ => self.reason.clone(),
        };
        Status {
            state,
            reason,
            generation: self.generation,
            epoch: self.staged + 1,
            committed: self.acked,
        }
    }

    /// Nothing will happen any more.
    pub fn is_over(&self) -> bool {
        matches!(
            self.phase,
            Phase::Live | Phase::Released | Phase::Stopped | Phase::Failed
        )
    }

    /// Whether data of the primary is still taken.
    pub fn takes_data(&self) -> bool {
        matches!(self.phase, Phase::Syncing | Phase::Armed)
    }

    /// The loss of the primary would make this backup ask the arbiter, or did.
    pub fn is_armed(&self) -> bool {
        matches!(
            self.phase,
            Phase::Armed | Phase::Arbitrating { .. } | Phase::TakingOver { .. }
        )
    }

    /// Whether it can be told to leave: not once it may have won a generation.
    pub fn may_leave(&self) -> bool {
        !matches!(self.phase, Phase::Arbitrating { .. } | Phase::TakingOver { .. })
    }

    /// The last epoch in RAM and disks.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// How the takeover went.
    pub fn times(&self) -> Times {
        self.times
    }

    /// One step.
    pub fn step(&mut self, event: Event, now: Nanos) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            Event::Tick { heard } => self.tick(heard, now, &mut out),
            Event::Staged { epoch, bytes, durable } => self.staged(epoch, bytes, durable, now, &mut out),
            Event::Compared(compared) => self.compared(compared, now, &mut out),
            Event::Applied { epoch } => self.has_applied(epoch, now, &mut out),
            Event::ApplyFailed(reason) => self.broken(format!("an epoch cannot be applied: {reason}"), &mut out),
            Event::Peer(message) => self.peer(message, now, &mut out),
            Event::PeerLost { heard, reason } => self.lose(reason, heard, false, now, &mut out),
            Event::PeerBroken { heard, reason } => self.drop_peer(reason, heard, now, &mut out),
            Event::Arbiter(answer) => self.answered(answer, now, &mut out),
            Event::Activated => {
                if let Phase::TakingOver { planned } = self.phase {
                    self.times.activated = now;
                    self.phase = Phase::Live;
                    if planned {
                        out.push(Action::Send(ToPrimary::HandedOver(self.generation)));
                    }
                    out.push(Action::Farewell);
                }
            }
            Event::ActivationFailed(reason) => {
                if let Phase::TakingOver { planned } = self.phase {
                    self.phase = Phase::Failed;
                    self.reason = Some(format!("the VM could not be activated: {reason}"));
                    if planned {
                        let generation = self.generation;
                        out.push(Action::Send(ToPrimary::HandoverFailed { generation, reason }));
                    }
                    out.push(Action::Farewell);
                }
            }
            Event::Leave(reason) => {
                if self.takes_data() {
                    self.release(reason.clone(), &mut out);
                    out.insert(0, Action::Send(ToPrimary::Bye(reason)));
                }
            }
        }
        out
    }

    fn tick(&mut self, heard: Nanos, now: Nanos, out: &mut Vec<Action>) {
        if self.takes_data() && self.silence.is_dead(heard, now) {
            let silent = now.saturating_sub(heard) / ms(1);
            self.lose(
                format!("the primary was silent for {silent} ms"),
                heard,
                false,
                now,
                out,
            );
        }
        if let Phase::Arbitrating { unsure, .. } = &mut self.phase
            && unsure.is_some_and(|heard| self.silence.is_dead(heard, now))
        {
            *unsure = None;
        }
        self.inquire(now, out);
    }

    /// Asks the arbiter, if it is time to. Not before every epoch that counts is applied: a win is of use only to who can
    /// become the VM, and keeps the other from going on. Who is known to be wrong somewhere never can.
    fn inquire(&mut self, now: Nanos, out: &mut Vec<Action>) {
        let applied = self.applied == self.staged;
        if applied && self.is_damaged() && matches!(self.phase, Phase::Arbitrating { .. }) {
            let before = self.reason.take().unwrap_or_default();
            let reason = format!("{before}; the shadow cannot take over: {}", self.damage.what);
            return self.broken(reason, out);
        }
        if let Phase::Arbitrating {
            arbitration,
            unsure: None,
            ..
        } = &mut self.phase
            && applied
            && arbitration.ask_again(now)
        {
            out.push(Action::AskArbiter {
                expected: self.generation,
            });
        }
    }

    fn staged(&mut self, epoch: u64, bytes: u64, durable: bool, now: Nanos, out: &mut Vec<Action>) {
        if !self.takes_data() {
            return;
        }
        if epoch != self.staged + 1 {
            let reason = format!("epoch {epoch} came after epoch {}", self.staged);
            return self.drop_peer(reason, now, now, out);
        }
        // Acknowledgements wait when applying lags behind. Who does not wait for them would fill this host's memory.
        if epoch > self.acked + MAX_AHEAD {
            let reason = format!("epoch {epoch} came before epoch {} was acknowledged", self.acked + 1);
            return self.drop_peer(reason, now, now, out);
        }
        if matches!(self.phase, Phase::Syncing) {
            self.phase = Phase::Armed;
            self.silence = Silence::new(self.timeout, now);
        }
        self.staged = epoch;
        self.unapplied.push_back((epoch, bytes, durable));
        out.push(Action::Apply(epoch));
        self.acknowledge(out);
    }

    fn acknowledge(&mut self, out: &mut Vec<Action>) {
        let waiting: u64 = self.unapplied.iter().map(|(_, bytes, _)| bytes).sum();
        let durable = self.unapplied.iter().find(|(.., durable)| *durable);
        let until = durable.map_or(self.staged, |(epoch, ..)| epoch - 1);
        if matches!(self.phase, Phase::Armed)
            && !self.is_damaged()
            && self.acked < until
            && (waiting <= self.backlog || self.unapplied.len() <= 1)
        {
            self.acked = until;
            out.push(Action::Send(ToPrimary::Ack(self.acked)));
        }
    }

    fn has_applied(&mut self, epoch: u64, now: Nanos, out: &mut Vec<Action>) {
        self.applied = self.applied.max(epoch);
        while self.unapplied.front().is_some_and(|(e, ..)| *e <= epoch) {
            self.unapplied.pop_front();
        }
        self.acknowledge(out);
        self.inquire(now, out);
    }

    fn broken(&mut self, reason: String, out: &mut Vec<Action>) {
        match self.phase {
            // The arbiter was not asked, and will not be: the primary, if it is alive, may go on.
            Phase::Syncing | Phase::Armed | Phase::Arbitrating { planned: true, .. } => {
                out.push(Action::Send(ToPrimary::Bye(reason.clone())));
            }
            Phase::Arbitrating { .. } => {}
            _ => return,
        }
        self.phase = Phase::Failed;
        self.reason = Some(reason);
        out.push(Action::Farewell);
        out.push(Action::Discard);
    }

    fn peer(&mut self, message: FromPrimary, now: Nanos, out: &mut Vec<Action>) {
        if !self.takes_data() {
            return;
        }
        match message {
            FromPrimary::Timeout(timeout) => {
                self.timeout = timeout;
                let armed = matches!(self.phase, Phase::Armed);
                self.silence
                    .set_timeout(if armed { timeout } else { SYNC_TIMEOUT.max(timeout) });
            }
            FromPrimary::Disarm(reason) => {
                self.release(reason, out);
                out.insert(0, Action::Send(ToPrimary::Disarmed));
            }
            FromPrimary::Handover(epoch) => {
                if epoch == 0 || epoch != self.acked || epoch != self.staged {
                    return self.drop_peer(
                        format!("handover of epoch {epoch}, which is not the last"),
                        now,
                        now,
                        out,
                    );
                }
                self.reason = Some("planned failover".into());
                self.times = Times {
                    heard: now,
                    detected: now,
                    activated: 0,
                };
                self.ask(true, None, now, out);
            }
        }
    }

    /// No takeover any more: by the primary's word or our own.
    fn release(&mut self, reason: String, out: &mut Vec<Action>) {
        self.phase = Phase::Released;
        self.reason = Some(reason);
        out.push(Action::Farewell);
        out.push(Action::Discard);
    }

    fn lose(&mut self, reason: String, heard: Nanos, unsure: bool, now: Nanos, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Syncing => self.release(format!("{reason}, before the VM was protected"), out),
            Phase::Armed => {
                self.reason = Some(reason);
                self.times = Times {
                    heard,
                    detected: now,
                    activated: 0,
                };
                out.push(Action::Disconnect);
                self.ask(false, unsure.then_some(heard), now, out);
            }
            _ => {}
        }
    }

    /// The primary makes no sense. It may be alive and well but for that, and not know yet that it is left: nothing is
    /// asked until its right to release outputs has ended (R4). It asks first, as a rule.
    fn drop_peer(&mut self, reason: String, heard: Nanos, now: Nanos, out: &mut Vec<Action>) {
        self.lose(reason, heard, true, now, out);
    }

    fn ask(&mut self, planned: bool, unsure: Option<Nanos>, now: Nanos, out: &mut Vec<Action>) {
        self.phase = Phase::Arbitrating {
            arbitration: Arbitration::begin(),
            planned,
            unsure,
        };
        self.inquire(now, out);
    }

    fn answered(&mut self, answer: Answer, now: Nanos, out: &mut Vec<Action>) {
        let Phase::Arbitrating {
            arbitration, planned, ..
        } = &mut self.phase
        else {
            return;
        };
        match answer {
            Answer::Unknown { reason } => arbitration.unanswered(reason, now),
            Answer::Won => {
                self.phase = Phase::TakingOver { planned: *planned };
                self.generation += 1;
                out.push(Action::Activate(self.staged));
            }
            Answer::Lost { winner } => {
                self.phase = Phase::Stopped;
                self.generation += 1;
                let before = self.reason.take().unwrap_or_default();
                let reason = format!(
                    "{before}; node {winner} won generation {} in the arbiter",
                    self.generation
                );
                self.reason = Some(reason);
                out.push(Action::Farewell);
                out.push(Action::Discard);
            }
        }
    }
}
