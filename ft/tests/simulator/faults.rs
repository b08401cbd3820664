//! What goes wrong, and what operators do.

use ft::core::{backup, ms, primary};
use ft::wire::frame::Frame;

use crate::audit::WORDS;
use crate::primary::limits;
use crate::stream::{Message, NEVER, Tamper};
use crate::world::{ACTIVE, Ev, Side, World, index};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// A process ends; its kernel closes the connection.
    Crash(Side),
    /// It ends after so many actions more, in the middle of a step.
    CrashAfter(Side, u64),
    /// A host is gone, and nobody closes anything.
    PowerCut(Side),
    /// The connection breaks for both.
    Break,
    /// A direction is dead for so long (or for ever).
    Block(Side, u64),
    /// Both are.
    Partition(u64),
    /// A process is stopped for so long.
    Stall(Side, u64),
    /// A host's clock jumps ahead.
    ClockJump(Side, u64),
    /// A side does not reach the arbiter for so long.
    NoArbiter(Side, u64),
    /// The next frame of a side does not arrive as it was sent.
    Tamper(Side, Tamper),
    /// The backup's disk is slow for so long.
    SlowDisk(u64),
    /// It takes nothing any more.
    DiskFull,
    /// A bit of a word of the shadow flips.
    FlipShadow(usize),
    ActivationFails,
    CheckpointFails,
    Disable,
    Failover,
    Leave,
    Limits,
}

impl Fault {
    /// Of whose process it is a step: it waits while that is stopped.
    pub fn step_of(&self) -> Option<Side> {
        match self {
            Self::CheckpointFails | Self::Disable | Self::Failover | Self::Limits => Some(Side::Primary),
            Self::Leave => Some(Side::Backup),
            _ => None,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Crash(_) => "fault: crash",
            Self::CrashAfter(..) => "fault: crash in a step",
            Self::PowerCut(_) => "fault: power cut",
            Self::Break => "fault: broken connection",
            Self::Block(..) => "fault: dead direction",
            Self::Partition(_) => "fault: partition",
            Self::Stall(..) => "fault: stopped process",
            Self::ClockJump(..) => "fault: clock jump",
            Self::NoArbiter(..) => "fault: no arbiter",
            Self::Tamper(_, Tamper::Flip(_)) => "fault: flipped bit",
            Self::Tamper(_, Tamper::Lose) => "fault: lost frame",
            Self::Tamper(_, Tamper::Twice) => "fault: frame twice",
            Self::Tamper(_, Tamper::Late) => "fault: frame late",
            Self::SlowDisk(_) => "fault: slow disk",
            Self::DiskFull => "fault: full disk",
            Self::FlipShadow(_) => "fault: flipped shadow",
            Self::ActivationFails => "fault: activation",
            Self::CheckpointFails => "fault: checkpoint",
            Self::Disable => "operator: disable",
            Self::Failover => "operator: failover",
            Self::Leave => "operator: backup ends",
            Self::Limits => "operator: limits",
        }
    }
}

impl World {
    fn any_side(&mut self) -> Side {
        if self.one_in(2) { Side::Primary } else { Side::Backup }
    }

    /// The faults of a session that begins now.
    pub fn plan_faults(&mut self) {
        let active = if self.is_first() { ACTIVE } else { ACTIVE / 2 };
        self.active = self.now + active;
        let count = [0, 1, 1, 1, 2, 2, 3, 4][self.below(8) as usize];
        for _ in 0..count {
            let at = self.now + self.below(active);
            let side = self.any_side();
            let span = [ms(20), ms(200), ms(700), ms(2_000)][self.below(4) as usize];
            let fault = match self.below(33) {
                0..=2 => Fault::Crash(side),
                3 | 4 => Fault::CrashAfter(side, self.below(60)),
                5 | 6 => Fault::PowerCut(side),
                7 | 8 => Fault::Break,
                9 => Fault::Block(side, NEVER),
                10 => Fault::Block(side, span),
                11 => Fault::Partition(if self.one_in(2) { NEVER } else { span }),
                12 | 13 => Fault::Stall(side, span),
                14 => Fault::ClockJump(side, [ms(30), ms(200), ms(2_000)][self.below(3) as usize]),
                15 | 16 => {
                    let bit = self.random();
                    let tamper = [Tamper::Flip(bit), Tamper::Lose, Tamper::Twice, Tamper::Late];
                    Fault::Tamper(side, tamper[self.below(4) as usize])
                }
                17 => Fault::SlowDisk(span),
                18 | 19 => Fault::DiskFull,
                20 => Fault::ActivationFails,
                21 => Fault::CheckpointFails,
                22 => Fault::Disable,
                23..=25 => Fault::Failover,
                26 => Fault::Leave,
                27 => Fault::Limits,
                28..=30 => Fault::FlipShadow(self.below(WORDS as u64) as usize),
                _ => Fault::NoArbiter(side, span),
            };
            if self.one_in(5) {
                let other = self.any_side();
                self.at(at.saturating_sub(ms(5)), Ev::Fault(Fault::NoArbiter(other, ms(1_500))));
            }
            if matches!(fault, Fault::ClockJump(..)) && self.one_in(2) {
                // Jumps do harm while a side waits for silence or holds a lease.
                let (before, span) = (self.below(ms(400)), ms(200) + self.below(ms(300)));
                let cut = at.saturating_sub(before).max(self.now);
                self.at(cut, Ev::Fault(Fault::Partition(span)));
            }
            self.at(at, Ev::Fault(fault));
        }
    }

    /// The process is stopped, wherever it is.
    pub fn stall(&mut self, side: Side, span: u64) {
        let until = &mut self.s.stalled_until[index(side)];
        *until = (*until).max(self.now + span);
        let until = *until;
        self.at(until, Ev::Resume(side));
    }

    /// Whether the process ends before its next action.
    pub fn crashes_here(&mut self, side: Side) -> bool {
        let left = &mut self.s.crash_after[index(side)];
        let crashes = *left == Some(0);
        *left = left.and_then(|left| left.checked_sub(1));
        if crashes {
            self.strike(Fault::Crash(side));
        }
        crashes
    }

    pub fn disconnect(&mut self, side: Side) {
        let connected = match side {
            Side::Primary => &mut self.s.p.connected,
            Side::Backup => &mut self.s.b.connected,
        };
        if !std::mem::take(connected) {
            return;
        }
        let arrives = self.now + self.network_delay();
        self.s.streams[index(side)].send(Message::end(arrives));
        self.at(arrives, Ev::Arrival(other(side)));
    }

    fn dies(&mut self, side: Side) -> bool {
        let alive = match side {
            Side::Primary => &mut self.s.p.alive,
            Side::Backup => &mut self.s.b.alive,
        };
        std::mem::take(alive)
    }

    fn disk_let_go(&mut self, side: Side, power_cut: bool) {
        match side {
            Side::Primary => self.primary_let_go(power_cut),
            Side::Backup => self.s.b.locked = false,
        }
    }

    pub fn strike(&mut self, fault: Fault) {
        self.note(|| format!("{fault:?}"));
        self.count(fault.name(), 1);
        match fault {
            Fault::Crash(side) => {
                if self.dies(side) {
                    self.end_of(side);
                    self.disk_let_go(side, false);
                }
            }
            Fault::CrashAfter(side, actions) => self.s.crash_after[index(side)] = Some(actions),
            Fault::PowerCut(side) => {
                if self.dies(side) {
                    let keep = self.random();
                    self.s.streams[index(side)].cut(keep);
                    self.disk_let_go(side, true);
                }
            }
            Fault::Break => {
                for side in [Side::Primary, Side::Backup] {
                    let at = self.now + self.network_delay();
                    self.s.streams[index(side)].reset(at);
                    self.at(at, Ev::Arrival(other(side)));
                }
            }
            Fault::Block(side, span) => {
                let until = if span == NEVER { NEVER } else { self.now + span };
                self.s.streams[index(side)].blocked_until = until;
                if until != NEVER {
                    self.at(until, Ev::Arrival(other(side)));
                }
            }
            Fault::Partition(span) => {
                self.strike(Fault::Block(Side::Primary, span));
                self.strike(Fault::Block(Side::Backup, span));
            }
            Fault::Stall(side, span) => self.stall(side, span),
            Fault::ClockJump(side, span) => self.s.clocks[index(side)].jumped += span,
            Fault::NoArbiter(side, span) => self.s.no_arbiter_until[index(side)] = self.now + span,
            Fault::Tamper(side, tamper) => self.s.streams[index(side)].tamper = Some(tamper),
            Fault::SlowDisk(span) => self.s.b.slow_until = self.now + span,
            Fault::DiskFull => self.s.b.fail_apply = true,
            Fault::FlipShadow(word) => self.flip_shadow(word),
            Fault::ActivationFails => self.s.b.fail_activation |= !self.s.b.live,
            Fault::CheckpointFails => self.primary_step(primary::Event::MachineFailed("KVM".into())),
            Fault::Disable => self.primary_step(primary::Event::Disable("operator".into())),
            Fault::Failover => self.primary_step(primary::Event::Failover),
            Fault::Leave => self.backup_step(backup::Event::Leave("operator".into())),
            Fault::Limits => {
                let kind = self.below(3);
                let mut changed = limits(kind);
                changed.heartbeat_timeout_ms = [200, 500, 1_000][self.below(3) as usize];
                self.primary_step(primary::Event::SetLimits((&changed).into()));
                self.send_to_backup(Frame::Limits(changed));
            }
        }
    }

    /// The kernel closes a dead process's sockets: what was sent still arrives, or a reset overtakes it.
    fn end_of(&mut self, side: Side) {
        let at = self.now + self.network_delay();
        if self.one_in(3) {
            self.s.streams[index(side)].reset(at);
        } else {
            self.s.streams[index(side)].send(Message::end(at));
        }
        self.at(at + self.delay * 20, Ev::Arrival(other(side)));
        self.at(at, Ev::Arrival(other(side)));
    }
}

pub fn other(side: Side) -> Side {
    match side {
        Side::Primary => Side::Backup,
        Side::Backup => Side::Primary,
    }
}
