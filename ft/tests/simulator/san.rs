//! A disk that both hosts see, in some worlds: who may write it, what is under way, and what survives.

use std::collections::VecDeque;

use ft::core::ms;
use ft::core::primary::Event;

use crate::guest::BLOCKS;
use crate::world::{Bug, Ev, Side, World};

/// Index of the shared disk.
pub const SHARED: u16 = 1;

/// The disk, which outlives every session.
#[derive(Debug, Clone, Default)]
pub struct San {
    /// What whoever looks sees.
    pub seen: [u64; BLOCKS],
    /// What survives the loss of the host that wrote last.
    pub flushed: [u64; BLOCKS],
}

/// A change that the primary holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    pub epoch: u64,
    pub block: usize,
    pub value: u64,
}

/// The primary's part: what it holds, and the thread that writes it.
#[derive(Debug, Default)]
pub struct Writer {
    pub held: VecDeque<Change>,
    /// The last epoch whose changes are on the disk, flushed.
    pub written: u64,
    /// Changes up to this epoch may be written.
    through: u64,
    /// How many of the present round are written.
    done: usize,
    at_work: bool,
    /// On its way to the disk: the process may be stopped until it lands.
    under_way: Option<Change>,
    /// It has the disk's lock.
    pub locked: bool,
}

impl World {
    /// The core allows it.
    pub fn may_write(&mut self, through: u64) {
        let w = &mut self.s.p.writer;
        w.through = w.through.max(through);
        if !std::mem::replace(&mut w.at_work, true) {
            let delay = self.below(ms(1));
            self.schedule(delay, Ev::Write);
        }
    }

    /// The writing thread looks what to do.
    pub fn writes(&mut self) {
        if !self.s.p.alive || self.s.p.stopped || self.s.p.alone || self.s.p.writer.under_way.is_some() {
            self.s.p.writer.at_work = false;
            return;
        }
        let now = self.clock(Side::Primary);
        if !self.s.p.core.may_release(now) {
            self.s.p.writer.done = 0;
            self.gives_lock_back();
            return self.schedule(ms(5), Ev::Write);
        }
        let w = &mut self.s.p.writer;
        let round = w.held.iter().take_while(|change| change.epoch <= w.through).count();
        if w.done < round {
            w.under_way = Some(w.held[w.done]);
            let delay = self.below(ms(1)) / 2;
            return self.schedule(delay, Ev::Land);
        }
        // Flushed at once; what took long was the writes.
        if self.bug != Some(Bug::MarkBeforeFlush) {
            self.san.flushed = self.san.seen;
        }
        let w = &mut self.s.p.writer;
        w.held.drain(..round);
        (w.done, w.written, w.at_work) = (0, w.through, false);
        let written = w.written;
        self.count("epochs on the shared disk", 1);
        self.primary_step(Event::Written(written));
        if self.s.p.writer.through > self.s.p.writer.written {
            self.may_write(0);
        }
    }

    /// A write reaches the disk.
    pub fn lands(&mut self) {
        let Some(change) = self.s.p.writer.under_way.take() else {
            return;
        };
        if !self.s.p.alive {
            return;
        }
        self.check_write(change.epoch);
        self.san.seen[change.block] = change.value;
        self.s.p.writer.done += 1;
        if self.s.p.stopped {
            return self.gives_lock_back();
        }
        if self.now < self.active && self.one_in(300) {
            let span = [ms(20), ms(700), ms(1_500)][self.below(3) as usize];
            self.count("stopped while writes are under way", 1);
            self.stall(Side::Primary, span);
        }
        self.schedule(0, Ev::Write);
    }

    /// When it is open who goes on, when it stops, and before a handover: but never while a write is under way.
    pub fn gives_lock_back(&mut self) {
        let p = &mut self.s.p;
        if (p.core.is_arbitrating() || p.stopped) && p.writer.under_way.is_none() {
            p.writer.locked = false;
        }
    }

    /// The VM goes on alone: the lock is taken again, and everything is written, in order.
    pub fn writes_all(&mut self) {
        if !self.shared {
            return;
        }
        if self.s.b.locked {
            self.violated("R4", "both sides have the lock of the shared disk".into());
        }
        let w = &mut self.s.p.writer;
        (w.locked, w.under_way) = (true, None);
        for change in std::mem::take(&mut w.held) {
            self.san.seen[change.block] = change.value;
        }
        self.san.flushed = self.san.seen;
    }

    /// The process of the primary is gone.
    pub fn primary_let_go(&mut self, power_cut: bool) {
        let w = &mut self.s.p.writer;
        let lost = w.locked && power_cut;
        (w.locked, w.under_way) = (false, None);
        if lost {
            // Of what was not flushed, some got there.
            for block in 0..BLOCKS {
                if self.one_in(2) {
                    self.san.seen[block] = self.san.flushed[block];
                }
            }
        }
    }

    /// Whether the backup has the disk now.
    pub fn backup_claims(&mut self) -> bool {
        if self.s.p.writer.locked && self.bug != Some(Bug::TakeWithoutLock) {
            self.count("waits for the lock", 1);
            return false;
        }
        self.s.b.locked = true;
        true
    }
}
