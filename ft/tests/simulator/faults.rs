//! What goes wrong, and what operators do.

use ft::core::{backup, ms, primary};
use ft::wire::frame::Frame;

use crate::primary::limits;
use crate::stream::NEVER;
use crate::world::{ACTIVE, Ev, Side, World, index};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    Crash(Side),
    /// The connection breaks for both.
    Break,
    /// A direction is dead for so long (or for ever).
    Block(Side, u64),
    /// A process is stopped for so long.
    Stall(Side, u64),
    /// A side does not reach the arbiter for so long.
    NoArbiter(Side, u64),
    /// A damaged frame arrives.
    Damage(Side),
    ApplyFails,
    ActivationFails,
    CheckpointFails,
    Disable,
    Failover,
    Leave,
    Limits,
}

impl World {
    pub fn plan_faults(&mut self) {
        let count = [0, 1, 1, 1, 2, 2, 3, 4][self.below(8) as usize];
        for _ in 0..count {
            let at = self.below(ACTIVE);
            let side = if self.one_in(2) { Side::Primary } else { Side::Backup };
            let span = [ms(20), ms(200), ms(700), ms(2_000)][self.below(4) as usize];
            let fault = match self.below(20) {
                0..=3 => Fault::Crash(side),
                4 | 5 => Fault::Break,
                6 => Fault::Block(side, NEVER),
                7 => Fault::Block(side, span),
                8 | 9 => Fault::Stall(side, span),
                10 => Fault::Damage(side),
                11 => Fault::ApplyFails,
                12 => Fault::ActivationFails,
                13 => Fault::CheckpointFails,
                14 => Fault::Disable,
                15 | 16 => Fault::Failover,
                17 => Fault::Leave,
                18 => Fault::Limits,
                _ => Fault::NoArbiter(side, span),
            };
            if self.one_in(5) {
                let other = if self.one_in(2) { Side::Primary } else { Side::Backup };
                self.at(at.saturating_sub(ms(5)), Ev::Fault(Fault::NoArbiter(other, ms(1_500))));
            }
            self.at(at, Ev::Fault(fault));
        }
    }

    pub fn disconnect(&mut self, side: Side) {
        let connected = match side {
            Side::Primary => &mut self.p.connected,
            Side::Backup => &mut self.b.connected,
        };
        if !std::mem::take(connected) {
            return;
        }
        let arrives = self.now + self.network_delay();
        let end = crate::stream::Message {
            arrives,
            mark: 0,
            stamp: 0,
            frame: None,
        };
        self.streams[index(side)].send(end);
        self.at(arrives, Ev::Arrival(other(side)));
    }

    /// Something after which nobody may be left to run the VM is excused, unless the survivor had a clear way.
    fn fatal(&mut self, survivor_has_a_way: bool) {
        self.fatal += 1;
        let undecided = self.arbiter.winners.is_empty() && self.asking == [0; 2];
        self.excused |= self.fatal > 1 || !survivor_has_a_way || !undecided;
    }

    pub fn strike(&mut self, fault: Fault) {
        self.note(|| format!("fault: {fault:?}"));
        match fault {
            Fault::Crash(Side::Primary) => {
                if self.p.alive {
                    let way = self.b.core.is_armed() && self.b.alive && !self.b.fail_apply && !self.b.fail_activation;
                    // A `disarm` under way still arrives.
                    self.fatal(way && !self.p.alone && !self.p.disarmed);
                    self.p.alive = false;
                    self.end_of(Side::Primary);
                }
            }
            Fault::Crash(Side::Backup) => {
                if self.b.alive {
                    self.fatal(self.p.alive && !self.b.live);
                    self.b.alive = false;
                    self.b.out |= !self.b.live;
                    self.b.live = false;
                    self.end_of(Side::Backup);
                }
            }
            Fault::Break => {
                for side in [Side::Primary, Side::Backup] {
                    let at = self.now + self.network_delay();
                    self.streams[index(side)].reset(at);
                    self.at(at, Ev::Arrival(other(side)));
                }
            }
            Fault::Block(side, span) => {
                let until = if span == NEVER { NEVER } else { self.now + span };
                self.streams[index(side)].blocked_until = until;
                if until != NEVER {
                    self.at(until, Ev::Arrival(other(side)));
                }
            }
            Fault::Stall(side, span) => self.stalled_until[index(side)] = self.now + span,
            Fault::NoArbiter(side, span) => self.arbiter.unreachable_until[index(side)] = self.now + span,
            Fault::Damage(Side::Primary) => self.primary_step(primary::Event::PeerLost("bad checksum".into())),
            Fault::Damage(Side::Backup) => {
                let heard = self.now;
                self.backup_step(backup::Event::PeerBroken {
                    heard,
                    reason: "bad checksum".into(),
                });
            }
            Fault::ApplyFails => {
                if self.b.alive && !self.b.live {
                    self.fatal(self.p.alive);
                    self.b.fail_apply = true;
                }
            }
            Fault::ActivationFails => {
                if self.b.alive && !self.b.live {
                    // With an unplanned loss the winner cannot go on: nobody can.
                    self.fatal(false);
                    self.b.fail_activation = true;
                }
            }
            Fault::CheckpointFails => self.primary_step(primary::Event::MachineFailed("KVM".into())),
            Fault::Disable => self.primary_step(primary::Event::Disable("operator".into())),
            Fault::Failover => self.primary_step(primary::Event::Failover),
            Fault::Leave => {
                // The operator took away the one who was about to notice.
                self.excused |= !self.p.alive && self.b.core.may_leave();
                self.backup_step(backup::Event::Leave("operator".into()));
            }
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
            self.streams[index(side)].reset(at);
        } else {
            let end = crate::stream::Message {
                arrives: at,
                mark: 0,
                stamp: 0,
                frame: None,
            };
            self.streams[index(side)].send(end);
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
