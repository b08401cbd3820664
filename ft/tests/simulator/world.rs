//! The world of one seed: time, chance, what is scheduled, the sessions and the arbiter.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use ft::config::FtState;
use ft::core::arbitration::Answer;
use ft::core::ms;

use crate::faults::Fault;
use crate::guest::{BLOCKS, Guest, PAGES};
use crate::san::San;
use crate::session::Session;
use crate::stream::Got;

/// Protocol bugs that the checks must find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    ReleaseBeforeCommit,
    AckBeforeWhole,
    ActivateBeforeApplied,
    DiskOutOfOrder,
    SoloWithoutAnswer,
    LiveWithoutAsking,
    ReleaseWithoutLease,
    InputsOutOfOrder,
    LoseCommittedOutputs,
    NeverAsk,
    /// Outputs leave although the process was stopped since the lease was looked at.
    ReleaseWithoutLook,
    /// Checksums and sequence numbers are not looked at.
    UseDamaged,
    /// An epoch with a flush is acknowledged once it is staged.
    AckBeforeDurable,
    /// The backup's disk is not flushed.
    FlushIsForgotten,
    /// The backup takes the primary for silent too early.
    Impatient,
    /// A new session does not read the generation from the arbiter.
    StaleGeneration,
    /// A handover that failed names another generation than the one that was spent.
    WrongGeneration,
    /// Changes of a shared disk are written when their epoch ends.
    WriteBeforeCommit,
    /// A takeover does not write what the primary may not have written.
    ForgetSharedWrites,
    /// The backup forgets changes that are not flushed.
    MarkBeforeFlush,
    /// What the guest wrote before it was protected is not flushed.
    FirstWithoutFlush,
    /// The backup does not wait for the lock of the shared disk.
    TakeWithoutLock,
    /// The backup forgets what the audit found.
    DamageIsForgotten,
    /// The primary sends nothing anew.
    RepairIsForgotten,
    /// A backup that is known to be wrong acknowledges.
    AckDamaged,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Primary,
    Backup,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ev {
    /// Look whether something arrives.
    Arrival(Side),
    /// The pulse thread.
    Pulse(Side),
    /// The controller's deadline.
    Deadline,
    /// The guest does something.
    Guest,
    /// The primary's writing thread looks what to do; a write reaches the shared disk.
    Write,
    Land,
    /// The checkpoint that was begun is taken.
    Taken,
    /// The oldest staged epoch is applied.
    Applied,
    /// The activation is done.
    Activated(u64),
    /// A question reaches the arbiter.
    Ask(Side, u64),
    /// Its answer comes back.
    Answer(Side, Answer),
    Fault(Fault),
    /// A stopped process goes on.
    Resume(Side),
    /// The survivor gets a new backup.
    Reprotect,
}

pub fn index(side: Side) -> usize {
    match side {
        Side::Primary => 0,
        Side::Backup => 1,
    }
}

/// How long faults strike and the guest works; after that, everything heals and must settle.
pub const ACTIVE: u64 = ms(900);
/// The longest fault, the longest silence that is no loss, the longest pause between two questions to the arbiter, and
/// as much again.
const SETTLED: u64 = ms(8_000);
/// A backup that never got a whole epoch is more patient.
const SYNCING: u64 = ms(13_000);
/// When a pair that is at peace may be left alone: every silence would have been noticed, and a loser of before has
/// asked an arbiter that it did not reach for long.
const QUIET: u64 = ms(4_500);

pub struct World {
    pub now: u64,
    rng: u64,
    seq: u64,
    queue: BinaryHeap<Reverse<(u64, u64, usize)>>,
    /// Events with the number of their session.
    slots: Vec<Option<(usize, Ev)>>,
    pub bug: Option<Bug>,
    /// The session at work, and its number.
    pub s: Session,
    number: usize,
    /// The others.
    parked: Vec<Option<Session>>,
    /// How many more there may be.
    pub sessions_left: u32,
    /// Who won each generation.
    pub winners: BTreeMap<u64, usize>,
    /// When faults and the guest end.
    pub active: u64,
    /// `disk-of-both`.
    pub durable: bool,
    /// There is a disk that both hosts see.
    pub shared: bool,
    pub san: San,
    /// What the audit finds is sent anew.
    pub repair: bool,
    /// All frames go through the real encoder and reader.
    real_wire: bool,
    pub violation: Option<String>,
    pub delay: u64,
    pub counts: BTreeMap<&'static str, u64>,
    tracing: bool,
    pub trace: Vec<String>,
}

impl World {
    pub fn new(seed: u64, bug: Option<Bug>, tracing: bool) -> Self {
        let mut world = Self {
            now: 1,
            rng: seed.wrapping_mul(0xA076_1D64_78BD_642F) ^ 0x5851_F42D_4C95_7F2D,
            seq: 0,
            queue: BinaryHeap::new(),
            slots: Vec::new(),
            bug,
            s: Session::none(),
            number: 0,
            parked: Vec::new(),
            sessions_left: 0,
            winners: BTreeMap::new(),
            active: 0,
            durable: false,
            shared: false,
            san: San::default(),
            repair: false,
            real_wire: false,
            violation: None,
            delay: 0,
            counts: BTreeMap::new(),
            tracing,
            trace: Vec::new(),
        };
        world.delay = [ms(1) / 10, ms(2), ms(30)][world.below(3) as usize];
        world.durable = world.one_in(2);
        world.real_wire = world.one_in(16);
        world.shared = world.one_in(2);
        world.repair = !world.one_in(3);
        world.sessions_left = [0, 0, 1, 2][world.below(4) as usize];
        let guest = Guest {
            ram: [(); PAGES].map(|()| world.random()),
            disk: [(); BLOCKS].map(|()| world.random()),
            shared: [(); BLOCKS].map(|()| world.random()),
            state: 0,
        };
        world.san.seen = guest.shared;
        world.begin_session(guest, 0);
        world
    }

    /// The new session is the one at work.
    pub fn add_session(&mut self, session: Session) {
        let old = std::mem::replace(&mut self.s, session);
        if let Some(place) = self.parked.get_mut(self.number) {
            *place = Some(old);
        }
        self.number = self.parked.len();
        self.parked.push(None);
    }

    /// That session is at work.
    pub fn enter(&mut self, number: usize) {
        if let Some(session) = self.parked[number].take() {
            self.parked[self.number] = Some(std::mem::replace(&mut self.s, session));
            self.number = number;
        }
    }

    pub fn sessions(&self) -> usize {
        self.parked.len()
    }

    pub fn is_first(&self) -> bool {
        self.parked.len() == 1
    }

    pub fn is_newest(&self) -> bool {
        self.number + 1 == self.parked.len()
    }

    /// The name of a side's node in the arbiter.
    pub fn node(&self, side: Side) -> usize {
        2 * self.number + index(side)
    }

    /// The time by a side's clock.
    pub fn clock(&self, side: Side) -> u64 {
        self.s.clocks[index(side)].at(self.now)
    }

    pub fn random(&mut self) -> u64 {
        self.rng = self.rng.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.rng;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.random() % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// A delay of the network; mostly short, sometimes very long.
    pub fn network_delay(&mut self) -> u64 {
        let base = self.delay;
        if self.now < self.active && self.one_in(60) {
            self.below(base * 20)
        } else {
            self.below(base) + base / 10
        }
    }

    pub fn schedule(&mut self, after: u64, event: Ev) {
        self.at(self.now + after, event);
    }

    pub fn at(&mut self, at: u64, event: Ev) {
        self.seq += 1;
        self.slots.push(Some((self.number, event)));
        self.queue.push(Reverse((at, self.seq, self.slots.len() - 1)));
    }

    pub fn note(&mut self, text: impl FnOnce() -> String) {
        if self.tracing {
            let line = format!("{:>10.3} ms  {}: {}", self.now as f64 / 1e6, self.number + 1, text());
            self.trace.push(line);
        }
    }

    pub fn violated(&mut self, rule: &str, what: String) {
        self.note(|| format!("VIOLATION {rule}: {what}"));
        self.violation.get_or_insert(format!("{rule}: {what}"));
    }

    pub fn count(&mut self, what: &'static str, n: u64) {
        *self.counts.entry(what).or_insert(0) += n;
    }

    pub fn ends(&self) -> (FtState, FtState) {
        (self.s.p.core.status().state, self.s.b.core.status().state)
    }

    fn stalled(&self, event: &Ev) -> Option<u64> {
        let side = match event {
            Ev::Arrival(side) | Ev::Pulse(side) | Ev::Answer(side, _) | Ev::Resume(side) => *side,
            Ev::Deadline | Ev::Guest | Ev::Taken | Ev::Write | Ev::Land => Side::Primary,
            Ev::Applied | Ev::Activated(_) => Side::Backup,
            Ev::Fault(fault) => fault.step_of()?,
            Ev::Ask(..) | Ev::Reprotect => return None,
        };
        let until = self.s.stalled_until[index(side)];
        (until > self.now).then_some(until)
    }

    pub fn run(&mut self) -> Result<(), String> {
        while let Some(Reverse((at, _, slot))) = self.queue.pop() {
            if at > self.active + self.patience()
                || self.violation.is_some()
                || (at > self.active + QUIET && self.is_quiet())
            {
                break;
            }
            self.now = self.now.max(at);
            let Some((number, event)) = self.slots[slot].take() else {
                continue;
            };
            self.enter(number);
            match self.stalled(&event) {
                Some(until) => self.at(until, event),
                None => self.dispatch(event),
            }
        }
        if self.violation.is_none() {
            self.check_end();
        }
        self.violation.clone().map_or(Ok(()), Err)
    }

    /// How long after the faults it may take until the VM runs, or everybody gave up.
    fn patience(&self) -> u64 {
        if self.s.b.whole == 0 { SYNCING } else { SETTLED }
    }

    fn is_quiet(&self) -> bool {
        self.is_newest()
            && self.ends() == (FtState::Protected, FtState::Protected)
            && self.s.p.alive
            && self.s.b.alive
            && !self.s.p.core.hands_over()
            && !self.s.p.disarmed
    }

    /// What arrives at a side. A frame that is not as it was sent must not be used, any other must (R6).
    pub fn receive(&mut self, to: Side) -> Option<Got> {
        let trusting = self.bug == Some(Bug::UseDamaged);
        let stream = &mut self.s.streams[1 - index(to)];
        let (got, sound) = stream.receive(self.now, self.real_wire, trusting)?;
        match &got {
            Got::Frame { frame, .. } if !sound && !trusting => {
                let what = format!("a damaged frame is used: {frame:?}");
                self.violated("R6", what);
            }
            Got::Broken(reason) if sound => {
                let what = format!("a correct peer is accused: {reason}");
                self.violated("R6", what);
            }
            Got::Broken(_) => {
                stream.abandon();
                self.count("damaged frames found", 1);
            }
            _ => {}
        }
        Some(got)
    }

    fn dispatch(&mut self, event: Ev) {
        match event {
            Ev::Arrival(Side::Backup) => self.backup_receives(),
            Ev::Arrival(Side::Primary) => self.primary_receives(),
            Ev::Pulse(side) => self.pulse(side),
            Ev::Deadline => self.primary_tick(),
            Ev::Guest => self.guest_acts(),
            Ev::Write => self.writes(),
            Ev::Land => self.lands(),
            Ev::Taken => self.checkpoint_taken(),
            Ev::Applied => self.applied(),
            Ev::Activated(epoch) => self.activated(epoch),
            Ev::Ask(side, expected) => self.asked(side, expected),
            Ev::Answer(side, answer) => self.answered(side, answer),
            Ev::Fault(fault) => self.strike(fault),
            Ev::Resume(Side::Primary) => self.primary_works(),
            Ev::Resume(Side::Backup) => self.backup_works(),
            Ev::Reprotect => self.reprotect(),
        }
    }

    fn pulse(&mut self, side: Side) {
        match side {
            Side::Primary if self.s.p.alive => self.primary_pulse(),
            Side::Backup if self.s.b.alive => self.backup_pulse(),
            _ => return,
        }
        let over = match side {
            Side::Primary => self.s.p.core.is_over(),
            Side::Backup => self.s.b.core.is_over(),
        };
        if !over {
            let jitter = self.below(ms(2));
            self.schedule(ms(23) + jitter, Ev::Pulse(side));
        }
    }

    pub fn ask(&mut self, side: Side, expected: u64) {
        if self.bug == Some(Bug::NeverAsk) {
            return;
        }
        let delay = if self.one_in(8) {
            self.below(ms(400))
        } else {
            self.below(ms(3))
        };
        self.note(|| format!("{side:?} asks the arbiter for generation {}", expected + 1));
        self.schedule(delay, Ev::Ask(side, expected));
    }

    fn asked(&mut self, side: Side, expected: u64) {
        let me = self.node(side);
        let delay = self.below(ms(3));
        if self.now < self.s.no_arbiter_until[index(side)] {
            let answer = Answer::Unknown {
                reason: "unreachable".into(),
            };
            return self.schedule(ms(100), Ev::Answer(side, answer));
        }
        let winner = *self.winners.entry(expected + 1).or_insert(me);
        self.note(|| format!("arbiter: generation {} belongs to {winner}", expected + 1));
        // The answer may be lost although the register was set.
        let answer = if self.now < self.active && self.one_in(10) {
            Answer::Unknown {
                reason: "the answer was lost".into(),
            }
        } else if winner == me {
            Answer::Won
        } else {
            Answer::Lost {
                winner: format!("node {winner}"),
            }
        };
        self.schedule(delay, Ev::Answer(side, answer));
    }

    fn answered(&mut self, side: Side, answer: Answer) {
        let answer = match (self.bug, side, answer) {
            (Some(Bug::SoloWithoutAnswer), Side::Primary, Answer::Unknown { .. }) => Answer::Won,
            (Some(Bug::LiveWithoutAsking), Side::Backup, _) => Answer::Won,
            (_, _, answer) => answer,
        };
        match side {
            Side::Primary => self.primary_step(ft::core::primary::Event::Arbiter(answer)),
            Side::Backup => self.backup_step(ft::core::backup::Event::Arbiter(answer)),
        }
    }
}
