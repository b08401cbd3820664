//! One pairing of a primary and a backup, and how a survivor gets a new backup.

use ft::core::backup::BackupState;
use ft::core::ms;
use ft::core::pacing::Limits;
use ft::core::primary::PrimaryState;

use crate::backup::BackupSide;
use crate::guest::Guest;
use crate::primary::{Made, PrimarySide, limits};
use crate::stream::Stream;
use crate::world::{Bug, Ev, Side, World, index};

use std::collections::BTreeMap;

/// The time of a host: its own start, its own rate, and jumps ahead.
#[derive(Debug, Clone, Copy)]
pub struct HostClock {
    offset: u64,
    /// Parts per thousand of the true rate.
    rate: u64,
    pub jumped: u64,
}

impl HostClock {
    pub fn at(&self, now: u64) -> u64 {
        self.offset + now * self.rate / 1000 + self.jumped
    }

    /// When it will show `at`.
    pub fn when(&self, at: u64, now: u64) -> u64 {
        now + (at.saturating_sub(self.at(now)) * 1000).div_ceil(self.rate)
    }
}

pub struct Session {
    pub p: PrimarySide,
    pub b: BackupSide,
    /// Primary to backup, backup to primary.
    pub streams: [Stream; 2],
    pub clocks: [HostClock; 2],
    /// A stopped process takes no step before.
    pub stalled_until: [u64; 2],
    /// The arbiter does not answer a side before.
    pub no_arbiter_until: [u64; 2],
    /// A side crashes when it has done so many actions more.
    pub crash_after: [Option<u64>; 2],
    /// The generation at the handshake.
    pub base: u64,
    /// Outputs that outsiders saw of the primary, and those before this session.
    pub seen: Vec<u64>,
    pub before: u64,
    /// Outputs by what the guest was then.
    pub made: BTreeMap<u64, Made>,
}

impl Session {
    fn new(base: u64, guest: Guest, before: u64, clocks: [HostClock; 2], now: u64, core: (usize, u64)) -> Self {
        let [mine, its] = clocks.map(|clock| clock.at(now));
        let primary = PrimaryState::new(base, Limits::from(&limits(core.1)), core.0, mine);
        let backup = BackupState::new(base, ms(500), 20_000, its);
        Self {
            p: PrimarySide::new(primary, guest, before, mine),
            b: BackupSide::new(backup, its),
            streams: [Stream::default(), Stream::default()],
            clocks,
            stalled_until: [0; 2],
            no_arbiter_until: [0; 2],
            crash_after: [None; 2],
            base,
            seen: Vec::new(),
            before,
            made: BTreeMap::new(),
        }
    }

    /// Before the first.
    pub fn none() -> Self {
        let clock = HostClock {
            offset: 1,
            rate: 1000,
            jumped: 0,
        };
        Self::new(0, Guest::default(), 0, [clock; 2], 0, (1, 0))
    }
}

impl World {
    /// A new session begins: the backup has accepted.
    pub fn begin_session(&mut self, guest: Guest, before: u64) {
        let base = match self.bug {
            Some(Bug::StaleGeneration) => 0,
            _ => self.winners.keys().next_back().copied().unwrap_or(0),
        };
        let clocks = [(); 2].map(|()| HostClock {
            offset: 1 + self.below(ms(100_000)),
            rate: 960 + self.below(81),
            jumped: 0,
        });
        let core = (self.below(4) as usize + 1, self.below(3));
        let mut session = Session::new(base, guest, before, clocks, self.now, core);
        if self.shared {
            session.p.core = session.p.core.with_shared_disks(self.durable);
            session.p.writer.locked = true;
        }
        session.b.core = session.b.core.with_repair(self.repair);
        self.add_session(session);
        self.schedule(0, Ev::Pulse(Side::Primary));
        self.schedule(ms(3), Ev::Pulse(Side::Backup));
        self.schedule(0, Ev::Guest);
        self.plan_faults();
        self.begin_precopy();
    }

    /// A side runs the VM alone: its operator starts a backup anew, some time.
    pub fn runs_alone(&mut self) {
        if self.sessions_left > 0 && self.is_newest() {
            self.sessions_left -= 1;
            let after = self.below(ms(400));
            self.schedule(after, Ev::Reprotect);
        }
    }

    /// The survivor, if it still is one, is the primary of a new session. The old one's loser may still be there.
    pub fn reprotect(&mut self) {
        let s = &self.s;
        let (side, guest, before) = if s.p.alive && s.p.alone && !s.p.stopped {
            (Side::Primary, s.p.guest.clone(), s.p.next)
        } else if s.b.live && s.b.alive {
            (Side::Backup, s.b.shadow.clone(), s.b.outputs)
        } else {
            return;
        };
        let busy = s.stalled_until[index(side)].max(s.no_arbiter_until[index(side)]);
        if busy > self.now {
            return self.at(busy, Ev::Reprotect);
        }
        match side {
            Side::Primary => self.s.p.alive = false,
            Side::Backup => self.s.b.alive = false,
        }
        self.count("sessions after the first", 1);
        self.note(|| format!("session: the {side:?} gets a new backup"));
        self.begin_session(guest, before);
    }
}
