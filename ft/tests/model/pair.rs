//! A primary, a backup, the connection between them and the arbiter, with a coarse clock; each step is atomic.

use std::collections::VecDeque;

use ft::config::{FtLimits, FtState};
use ft::core::arbitration::Answer;
use ft::core::backup::{self, BackupState, FromPrimary, ToPrimary};
use ft::core::pacing::Limits;
use ft::core::primary::{self, FromBackup, PrimaryState, ToBackup};
use ft::core::{Nanos, ms};

use crate::step::{Budget, Message, Step};

/// The silence that counts as death is this many ticks; both sides look at the clock at each.
const TIMEOUT: u64 = 8;
const TICK: Nanos = ms(500) / TIMEOUT;
/// A step of the clock. Three of them are more than the timeout, two are as long as the primary's lease.
pub const TICKS: u64 = 3;

/// Index of the primary and of the backup: of processes, and of the direction in which they send.
pub const P: usize = 0;
pub const B: usize = 1;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pair {
    pub now: u64,
    pub p: PrimaryState,
    pub b: BackupState,
    pub up: [bool; 2],
    pub stopped: [bool; 2],
    /// What is under way, with its stamp.
    pub wires: [VecDeque<(Nanos, Message)>; 2],
    /// Whether a side has not closed its end.
    pub open: [bool; 2],
    pub heard: [Nanos; 2],
    pub echo: Nanos,
    pub taking: bool,
    /// Epochs up to this one are leaving; up to that one they have left.
    pub leaving: Option<u64>,
    pub left: u64,
    pub applying: VecDeque<u64>,
    pub activating: Option<u64>,
    pub whole: u64,
    pub questions: [Option<u64>; 2],
    pub answers: [Option<Answer>; 2],
    pub winners: [Option<usize>; 3],
    /// The primary runs the VM without FT, or does not run it any more.
    pub alone: bool,
    pub halted: bool,
    pub live: bool,
    /// The backup can never become the VM, and the primary may know.
    pub out: bool,
    /// It asked the arbiter when the primary's lease must have ended.
    pub unhurried: bool,
    pub activation_failed: bool,
    /// The primary, which had offered the VM, was told so.
    pub told: bool,
    pub budget: Budget,
    /// A rule that is broken.
    pub broken: Option<&'static str>,
}

fn limits() -> Limits {
    Limits {
        min_epoch: 0,
        max_epoch: ms(1_000_000),
        ..Limits::from(&FtLimits::default())
    }
}

impl Pair {
    pub fn new(in_flight: usize, budget: Budget) -> Self {
        let mut pair = Self {
            now: 1,
            p: PrimaryState::new(0, limits(), in_flight, TICK),
            b: BackupState::new(0, TIMEOUT * TICK, 1, TICK),
            up: [true; 2],
            stopped: [false; 2],
            wires: Default::default(),
            open: [true; 2],
            heard: [TICK; 2],
            echo: 0,
            taking: true,
            leaving: None,
            left: 0,
            applying: VecDeque::new(),
            activating: None,
            whole: 0,
            questions: [None; 2],
            answers: [None, None],
            winners: [None; 3],
            alone: false,
            halted: false,
            live: false,
            out: false,
            unhurried: false,
            activation_failed: false,
            told: false,
            budget,
            broken: None,
        };
        pair.p.begin_first_checkpoint();
        pair
    }

    fn time(&self) -> Nanos {
        self.now * TICK
    }

    fn breaks(&mut self, rule: &'static str) {
        self.broken.get_or_insert(rule);
    }

    fn works(&self, side: usize) -> bool {
        self.up[side] && !self.stopped[side]
    }

    /// Everything that may happen next; with `end`, the clock stops then.
    pub fn steps(&self, end: u64) -> Vec<Step> {
        let (p, b, budget) = (self.works(P), self.works(B), &self.budget);
        let over = [self.p.is_over(), self.b.is_over()];
        let all = over[P] && over[B];
        let steps = [
            (Step::Clock, self.now < end * TICKS && !all),
            (Step::Deliver(P), self.can_deliver(P)),
            (Step::Deliver(B), self.can_deliver(B)),
            (Step::Taken, p && self.taking),
            (Step::Leave, p && self.leaving.is_some()),
            (Step::Applied, b && !self.applying.is_empty()),
            (Step::ApplyFails, b && !self.applying.is_empty() && budget.disks > 0),
            (Step::Activated, b && self.activating.is_some()),
            (
                Step::ActivationFails,
                b && self.activating.is_some() && budget.activations > 0,
            ),
            (Step::Reset, self.open == [true; 2] && budget.resets > 0),
            (Step::Failover, p && !over[P] && budget.failovers > 0),
            (Step::Disable, p && !over[P] && budget.disables > 0),
        ];
        let mut steps: Vec<Step> = steps
            .into_iter()
            .filter(|(_, can)| *can)
            .map(|(step, _)| step)
            .collect();
        for side in [P, B] {
            let asked = self.questions[side].is_some();
            let each = [
                (Step::Answers(side), asked),
                (Step::Unreachable(side), asked && budget.unanswered > 0),
                (Step::AnswerLost(side), asked && budget.unanswered > 0),
                (Step::Hears(side), self.works(side) && self.answers[side].is_some()),
                (Step::Crash(side), self.up[side] && budget.crashes > 0),
                (Step::PowerCut(side), self.up[side] && budget.power_cuts > 0),
                (Step::Damage(side), self.can_deliver(side) && budget.damages > 0),
                (Step::Stop(side), self.works(side) && !over[side] && budget.stops > 0),
                (Step::Continue(side), self.up[side] && self.stopped[side]),
            ];
            steps.extend(each.into_iter().filter(|(_, can)| *can).map(|(step, _)| step));
        }
        steps
    }

    fn can_deliver(&self, from: usize) -> bool {
        let to = 1 - from;
        self.works(to) && self.open[to] && !self.wires[from].is_empty()
    }

    /// One step; `epochs` is the last that the guest ends by itself.
    pub fn take(&mut self, step: Step, epochs: u64) {
        let budget = &mut self.budget;
        match step {
            Step::Clock => self.clock(epochs),
            Step::Deliver(P) => self.backup_hears(),
            Step::Deliver(_) => self.primary_hears(),
            Step::Taken => self.taken(epochs),
            Step::Leave => self.leave(),
            Step::Applied => {
                if let Some(epoch) = self.applying.pop_front() {
                    self.backup(backup::Event::Applied { epoch });
                }
            }
            Step::ApplyFails => {
                budget.disks -= 1;
                self.applying.clear();
                self.backup(backup::Event::ApplyFailed("disk".into()));
            }
            Step::Activated => self.activated(),
            Step::ActivationFails => {
                budget.activations -= 1;
                self.activating = None;
                (self.out, self.activation_failed) = (true, true);
                self.backup(backup::Event::ActivationFailed("vcpus".into()));
            }
            Step::Answers(side) => self.answers(side, true),
            Step::AnswerLost(side) => {
                budget.unanswered -= 1;
                self.answers(side, false);
            }
            Step::Unreachable(side) => {
                budget.unanswered -= 1;
                self.questions[side] = None;
                self.answers[side] = Some(unknown());
            }
            Step::Hears(side) => {
                if let Some(answer) = self.answers[side].take() {
                    match side {
                        P => self.primary(primary::Event::Arbiter(answer)),
                        _ => self.backup(backup::Event::Arbiter(answer)),
                    }
                }
            }
            Step::Crash(side) => {
                budget.crashes -= 1;
                self.close(side);
                self.ends(side);
            }
            Step::PowerCut(side) => {
                budget.power_cuts -= 1;
                self.ends(side);
            }
            Step::Damage(from) => {
                budget.damages -= 1;
                self.wires[from].clear();
                self.heard[1 - from] = self.time();
                let (heard, reason) = (self.time(), "damaged".to_string());
                match from {
                    P => {
                        self.unhurried |= self.b.takes_data();
                        self.backup(backup::Event::PeerBroken { heard, reason });
                    }
                    _ => self.primary(primary::Event::PeerLost(reason)),
                }
            }
            Step::Reset => {
                budget.resets -= 1;
                for wire in &mut self.wires {
                    wire.clear();
                    wire.push_back((0, Message::End));
                }
                self.open = [true; 2];
            }
            Step::Stop(side) => {
                budget.stops -= 1;
                self.stopped[side] = true;
            }
            Step::Continue(side) => self.stopped[side] = false,
            Step::Failover => {
                budget.failovers -= 1;
                self.primary(primary::Event::Failover);
            }
            Step::Disable => {
                budget.disables -= 1;
                self.primary(primary::Event::Disable("operator".into()));
            }
        }
    }

    /// A sign of life leaves at its beginning, unless something else is under way.
    fn clock(&mut self, epochs: u64) {
        for tick in 0..TICKS {
            self.now += 1;
            self.tick(tick == 0, epochs);
        }
    }

    fn tick(&mut self, first: bool, epochs: u64) {
        if self.works(P) && !self.p.is_over() {
            if first && self.wires[P].is_empty() {
                self.send(P, Message::Heartbeat);
            }
            self.primary_tick(epochs);
        }
        if self.works(B) && !self.b.is_over() {
            if first && self.wires[B].is_empty() {
                self.send(B, Message::Heartbeat);
            }
            let took = self.b.takes_data();
            self.backup(backup::Event::Tick { heard: self.heard[B] });
            self.unhurried |= took && !self.b.takes_data();
        }
    }

    fn primary_tick(&mut self, epochs: u64) {
        let (running_bytes, output) = (0, self.p.status().epoch <= epochs);
        self.primary(primary::Event::Tick {
            heard: self.heard[P],
            running_bytes,
            output,
        });
    }

    fn send(&mut self, side: usize, message: Message) {
        let ended = matches!(self.wires[side].back(), Some((_, Message::End)));
        if self.up[side] && self.open[side] && !ended {
            let stamp = if side == P { self.time() } else { self.echo };
            self.wires[side].push_back((stamp, message));
        }
    }

    fn close(&mut self, side: usize) {
        self.send(side, Message::End);
        self.open[side] = false;
    }

    fn ends(&mut self, side: usize) {
        (self.up[side], self.open[side]) = (false, false);
        (self.questions[side], self.answers[side]) = (None, None);
        if side == P {
            (self.taking, self.leaving, self.alone) = (false, None, false);
        } else {
            self.applying.clear();
            self.activating = None;
            self.live = false;
        }
    }

    fn backup_hears(&mut self) {
        let Some((stamp, message)) = self.wires[P].pop_front() else {
            return;
        };
        self.heard[B] = self.time();
        self.echo = self.echo.max(stamp);
        match message {
            Message::End => {
                let (heard, reason) = (self.time(), "closed".into());
                self.backup(backup::Event::PeerLost { heard, reason });
            }
            _ if !self.b.takes_data() => {}
            Message::Epoch(epoch) => {
                self.whole = epoch;
                self.backup(backup::Event::Staged {
                    epoch,
                    bytes: 1,
                    durable: epoch % 2 == 1,
                });
            }
            Message::ToBackup(ToBackup::Disarm(reason)) => {
                self.backup(backup::Event::Peer(FromPrimary::Disarm(reason)));
            }
            Message::ToBackup(ToBackup::Handover(epoch)) => {
                self.backup(backup::Event::Peer(FromPrimary::Handover(epoch)));
            }
            Message::Heartbeat | Message::FromBackup(_) => {}
        }
    }

    fn primary_hears(&mut self) {
        let Some((echo, message)) = self.wires[B].pop_front() else {
            return;
        };
        self.heard[P] = self.time();
        let event = match message {
            Message::End => primary::Event::PeerLost("closed".into()),
            Message::FromBackup(message) => {
                let failed = matches!(message, FromBackup::HandoverFailed { .. });
                self.told |= failed && self.p.status().state == FtState::Protected;
                primary::Event::Peer { echo, message }
            }
            _ => primary::Event::Peer {
                echo,
                message: FromBackup::Heartbeat,
            },
        };
        self.primary(event);
    }

    fn primary(&mut self, event: primary::Event) {
        for action in self.p.step(event, self.time()) {
            match action {
                primary::Action::Checkpoint => self.taking = true,
                // There is no shared disk.
                primary::Action::Resume | primary::Action::Throttle(_) | primary::Action::Write(_) => {}
                primary::Action::Release(epoch) => {
                    self.leaving = Some(epoch);
                    // Only a process that may be stopped in between takes its time.
                    if self.budget.stops == 0 {
                        self.leave();
                    }
                }
                primary::Action::Send(message) => self.send(P, Message::ToBackup(message)),
                primary::Action::AskArbiter { expected } => self.questions[P] = Some(expected),
                primary::Action::Disconnect => self.close(P),
                primary::Action::GoAlone => self.goes_alone(),
                primary::Action::Abandon => {
                    (self.alone, self.leaving) = (true, None);
                    if self.whole > 0 {
                        self.breaks("R4: FT is said not to have begun, and the backup is armed");
                    }
                }
                primary::Action::Stop(_) => (self.halted, self.leaving) = (true, None),
            }
        }
    }

    fn goes_alone(&mut self) {
        let won = self.winners.iter().flatten().last() == Some(&P);
        if self.live || !(won || self.out) {
            self.breaks("R4: the primary goes on alone without a win or the backup's word");
        }
        (self.alone, self.leaving, self.taking) = (true, None, false);
    }

    fn taken(&mut self, epochs: u64) {
        self.taking = false;
        let epoch = self.p.status().epoch;
        self.primary(primary::Event::Checkpointed {
            bytes: 1,
            dirty_bytes: 1,
            anew: 0,
        });
        if self.p.sends() {
            self.send(P, Message::Epoch(epoch));
            self.primary_tick(epochs);
        }
    }

    fn leave(&mut self) {
        let Some(epoch) = self.leaving.take() else { return };
        if !self.p.may_release(self.time()) {
            return;
        }
        self.left = self.left.max(epoch);
        if epoch > self.whole {
            self.breaks("R1: an output leaves before its epoch is committed");
        }
        if self.live && self.unhurried {
            self.breaks("R4: an output leaves from the primary while the backup runs the VM");
        }
    }

    fn backup(&mut self, event: backup::Event) {
        for action in self.b.step(event, self.time()) {
            match action {
                backup::Action::Send(message) => {
                    self.out |= matches!(
                        message,
                        ToPrimary::Disarmed | ToPrimary::Bye(_) | ToPrimary::HandoverFailed { .. }
                    );
                    self.send(B, Message::FromBackup(word(message)));
                }
                backup::Action::Apply(epoch) => self.applying.push_back(epoch),
                backup::Action::AskArbiter { expected } => self.questions[B] = Some(expected),
                backup::Action::Disconnect | backup::Action::Farewell => self.close(B),
                backup::Action::Activate(epoch) => self.activating = Some(epoch),
                backup::Action::Discard => {
                    self.out = true;
                    self.applying.clear();
                }
            }
        }
    }

    fn activated(&mut self) {
        let Some(epoch) = self.activating.take() else { return };
        if self.winners[1] != Some(B) || self.alone || self.out {
            self.breaks("R4: the backup becomes the VM without a win, or while the primary goes on");
        }
        if epoch != self.whole || epoch < self.left || !self.applying.is_empty() {
            self.breaks("R2: the backup becomes the VM at another epoch than the last");
        }
        self.live = true;
        self.backup(backup::Event::Activated);
    }

    fn answers(&mut self, side: usize, arrives: bool) {
        let Some(expected) = self.questions[side].take() else {
            return;
        };
        let winner = *self.winners[expected as usize + 1].get_or_insert(side);
        self.answers[side] = Some(if !arrives {
            unknown()
        } else if winner == side {
            Answer::Won
        } else {
            Answer::Lost { winner: "other".into() }
        });
    }
}

fn unknown() -> Answer {
    Answer::Unknown { reason: "none".into() }
}

fn word(message: ToPrimary) -> FromBackup {
    match message {
        ToPrimary::Ack(epoch) => FromBackup::Ack(epoch),
        ToPrimary::Disarmed => FromBackup::Disarmed,
        ToPrimary::HandedOver(generation) => FromBackup::HandedOver(generation),
        ToPrimary::HandoverFailed { generation, reason } => FromBackup::HandoverFailed { generation, reason },
        ToPrimary::Bye(reason) => FromBackup::Bye(reason),
        ToPrimary::Mismatch(wrong) => FromBackup::Mismatch {
            places: wrong.len() as u64,
            what: String::new(),
        },
    }
}
