//! The world of one seed: time, chance, what is scheduled, the arbiter, and what outsiders saw.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use ft::config::FtState;
use ft::core::arbitration::Answer;
use ft::core::ms;

use crate::backup::BackupSide;
use crate::faults::Fault;
use crate::primary::PrimarySide;
use crate::stream::Stream;

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
}

#[derive(Debug, Default)]
pub struct ArbiterModel {
    pub winners: BTreeMap<u64, Side0>,
    pub unreachable_until: [u64; 2],
}

/// `Side` as a number, so that it has an order.
pub type Side0 = usize;

pub fn index(side: Side) -> Side0 {
    match side {
        Side::Primary => 0,
        Side::Backup => 1,
    }
}

/// When faults and the guest end; after that, everything heals and must settle.
pub const ACTIVE: u64 = ms(900);
const SETTLED: u64 = ms(12_000);
/// When a pair that is at peace may be left alone: every silence would have been noticed.
const QUIET: u64 = ACTIVE + ms(3_500);

pub struct World {
    pub now: u64,
    rng: u64,
    seq: u64,
    queue: BinaryHeap<Reverse<(u64, u64, usize)>>,
    slots: Vec<Option<Ev>>,
    pub bug: Option<Bug>,
    /// Primary to backup, backup to primary.
    pub streams: [Stream; 2],
    pub p: PrimarySide,
    pub b: BackupSide,
    pub arbiter: ArbiterModel,
    /// A stopped process takes no step before.
    pub stalled_until: [u64; 2],
    /// Outputs that outsiders saw, by whom they were released.
    pub seen: Vec<(Side, u64)>,
    pub output_epoch: BTreeMap<u64, u64>,
    /// Faults after which it is no wonder that no VM runs.
    pub fatal: u32,
    pub excused: bool,
    pub asking: [u32; 2],
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
            streams: [Stream::default(), Stream::default()],
            p: PrimarySide::new(),
            b: BackupSide::new(),
            arbiter: ArbiterModel::default(),
            stalled_until: [0; 2],
            seen: Vec::new(),
            output_epoch: BTreeMap::new(),
            fatal: 0,
            excused: false,
            asking: [0; 2],
            violation: None,
            delay: 0,
            counts: BTreeMap::new(),
            tracing,
            trace: Vec::new(),
        };
        world.delay = [ms(1) / 10, ms(2), ms(30)][world.below(3) as usize];
        let (in_flight, kind) = (world.below(4) as usize + 1, world.below(3));
        world.p.configure(in_flight, kind);
        world.schedule(0, Ev::Pulse(Side::Primary));
        world.schedule(ms(3), Ev::Pulse(Side::Backup));
        world.schedule(0, Ev::Guest);
        world.plan_faults();
        world.begin_precopy();
        world
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
        if self.now < ACTIVE && self.one_in(60) {
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
        self.slots.push(Some(event));
        self.queue.push(Reverse((at, self.seq, self.slots.len() - 1)));
    }

    pub fn note(&mut self, text: impl FnOnce() -> String) {
        if self.tracing {
            let line = format!("{:>10.3} ms  {}", self.now as f64 / 1e6, text());
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

    pub fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.counts.iter().map(|(what, n)| (*what, *n))
    }

    pub fn ends(&self) -> (FtState, FtState) {
        (self.p.core.status().state, self.b.core.status().state)
    }

    fn stalled(&self, event: &Ev) -> Option<u64> {
        let side = match event {
            Ev::Arrival(side) | Ev::Pulse(side) | Ev::Answer(side, _) => *side,
            Ev::Deadline | Ev::Guest | Ev::Taken => Side::Primary,
            Ev::Applied | Ev::Activated(_) => Side::Backup,
            Ev::Ask(..) | Ev::Fault(_) => return None,
        };
        let until = self.stalled_until[index(side)];
        (until > self.now).then_some(until)
    }

    pub fn run(&mut self) -> Result<(), String> {
        while let Some(Reverse((at, _, slot))) = self.queue.pop() {
            if at > SETTLED || self.violation.is_some() || (at > QUIET && self.is_quiet()) {
                break;
            }
            self.now = self.now.max(at);
            let Some(event) = self.slots[slot].take() else { continue };
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

    fn is_quiet(&self) -> bool {
        self.ends() == (FtState::Protected, FtState::Protected) && !self.p.core.hands_over() && !self.p.disarmed
    }

    fn dispatch(&mut self, event: Ev) {
        match event {
            Ev::Arrival(Side::Backup) => self.backup_receives(),
            Ev::Arrival(Side::Primary) => self.primary_receives(),
            Ev::Pulse(side) => self.pulse(side),
            Ev::Deadline => self.primary_tick(),
            Ev::Guest => self.guest_acts(),
            Ev::Taken => self.checkpoint_taken(),
            Ev::Applied => self.applied(),
            Ev::Activated(epoch) => self.activated(epoch),
            Ev::Ask(side, expected) => self.asked(side, expected),
            Ev::Answer(side, answer) => self.answered(side, answer),
            Ev::Fault(fault) => self.strike(fault),
        }
    }

    fn pulse(&mut self, side: Side) {
        match side {
            Side::Primary if self.p.alive => self.primary_pulse(),
            Side::Backup if self.b.alive => self.backup_pulse(),
            _ => return,
        }
        let over = match side {
            Side::Primary => self.p.core.is_over(),
            Side::Backup => self.b.core.is_over(),
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
        self.asking[index(side)] += 1;
        let delay = if self.one_in(8) {
            self.below(ms(400))
        } else {
            self.below(ms(3))
        };
        self.note(|| format!("{side:?} asks the arbiter for generation {}", expected + 1));
        self.schedule(delay, Ev::Ask(side, expected));
    }

    fn asked(&mut self, side: Side, expected: u64) {
        let me = index(side);
        self.asking[me] -= 1;
        let delay = self.below(ms(3));
        if self.now < self.arbiter.unreachable_until[me] {
            let answer = Answer::Unknown {
                reason: "unreachable".into(),
            };
            return self.schedule(ms(100), Ev::Answer(side, answer));
        }
        let winner = *self.arbiter.winners.entry(expected + 1).or_insert(me);
        self.note(|| format!("arbiter: generation {} belongs to {winner}", expected + 1));
        // The answer may be lost although the register was set.
        let answer = if self.now < ACTIVE && self.one_in(10) {
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
