//! The primary's shell in the simulator: guest, interposer, checkpoints.

use std::collections::{BTreeMap, VecDeque};

use ft::config::{FtLimits, FtState};
use ft::core::ms;
use ft::core::primary::{Action, Event, FromBackup, PrimaryState, ToBackup};
use ft::machine::{DiskChange, Input, Output, PAGE_SIZE, PageRun};
use ft::wire::frame::{EndMarker, Frame};

use crate::audit::Sums;
use crate::guest::{BLOCK, BLOCKS, Guest, PAGES, page};
use crate::san::{Change, SHARED, Writer};
use crate::stream::{Got, Message};
use crate::world::{Bug, Ev, Side, World, index};

/// What an output's guest was, when it made it.
#[derive(Debug, Clone, Copy)]
pub struct Made {
    pub epoch: u64,
    /// Flushes that it had seen completed.
    pub flushes: usize,
}

pub struct PrimarySide {
    pub core: PrimaryState,
    pub alive: bool,
    pub guest: Guest,
    pub paused: bool,
    pub stopped: bool,
    /// The VM runs without FT.
    pub alone: bool,
    taking: bool,
    pub epoch: u64,
    dirty: [bool; PAGES],
    pub held: BTreeMap<u64, Vec<u64>>,
    pub writer: Writer,
    /// Outputs on their way out, with their epochs, and the epoch up to which they are released.
    leaving: VecDeque<(u64, u64)>,
    through: u64,
    /// The last epoch whose outputs left.
    left: u64,
    todo: VecDeque<Action>,
    /// (disk changes, inputs) of the running epoch.
    logged: (u64, u64),
    /// (epoch, input) as logged.
    pub inputs: Vec<(u64, u64)>,
    /// The guest at the end of each epoch.
    pub history: BTreeMap<u64, Guest>,
    /// Number of each value that was ever written to the disk.
    pub writes: BTreeMap<u64, u64>,
    last_write: [u64; BLOCKS],
    last_shared: [u64; BLOCKS],
    /// The newest write of each block, of its own and of the shared disk, at each flush.
    pub flushed: Vec<[[u64; BLOCKS]; 2]>,
    /// The last output.
    pub next: u64,
    heard: u64,
    pub connected: bool,
    /// `disarm` was sent.
    pub disarmed: bool,
    /// It offered the VM, and was told that the backup cannot take it.
    pub told: bool,
    deadline: u64,
    /// Words of the shadow that the backup wants anew.
    pub repairs: Vec<usize>,
}

pub fn limits(kind: u64) -> FtLimits {
    FtLimits {
        max_epoch_ms: [15, 40, 100][kind as usize % 3],
        min_epoch_us: [0, 500, 3000][kind as usize % 3],
        overhead_percent: [100, 100, 10][kind as usize % 3],
        ..FtLimits::default()
    }
}

impl PrimarySide {
    pub fn new(core: PrimaryState, guest: Guest, before: u64, now: u64) -> Self {
        Self {
            core,
            alive: true,
            guest,
            paused: false,
            stopped: false,
            alone: false,
            taking: false,
            epoch: 1,
            dirty: [false; PAGES],
            held: BTreeMap::new(),
            writer: Writer::default(),
            leaving: VecDeque::new(),
            through: 0,
            left: 0,
            todo: VecDeque::new(),
            logged: (0, 0),
            inputs: Vec::new(),
            history: BTreeMap::new(),
            writes: BTreeMap::new(),
            last_write: [0; BLOCKS],
            last_shared: [0; BLOCKS],
            flushed: Vec::new(),
            next: before,
            heard: now,
            connected: true,
            disarmed: false,
            told: false,
            deadline: 0,
            repairs: Vec::new(),
        }
    }

    /// Nothing that it held will ever leave.
    pub fn drop_outputs(&mut self) {
        self.held.clear();
        self.leaving.clear();
        self.writer.held.clear();
    }

    fn writes_shared(&mut self, block: usize, value: u64) {
        let number = self.writes.len() as u64 + 1;
        self.writes.insert(value, number);
        self.last_shared[block] = number;
        self.guest.shared[block] = value;
    }

    fn writes(&mut self, block: usize, value: u64) {
        let number = self.writes.len() as u64 + 1;
        self.writes.insert(value, number);
        self.last_write[block] = number;
        self.guest.disk[block] = value;
    }
}

impl World {
    pub fn send_to_backup(&mut self, frame: Frame) {
        if !self.s.p.alive || !self.s.p.connected {
            return;
        }
        let arrives = self.now + self.network_delay();
        let written = if self.shared { self.s.p.writer.written } else { u64::MAX };
        let (mark, stamp) = (self.s.p.left.min(written), self.clock(Side::Primary));
        self.s.streams[0].send(Message::new(arrives, mark, stamp, frame));
        self.at(arrives, Ev::Arrival(Side::Backup));
    }

    pub fn begin_precopy(&mut self) {
        for i in 0..PAGES {
            let value = self.s.p.guest.ram[i];
            let runs = vec![PageRun {
                gpa: (i * PAGE_SIZE) as u64,
                count: 1,
            }];
            self.send_to_backup(Frame::Pages {
                epoch: 0,
                runs,
                data: page(value).into(),
            });
        }
        for i in 0..BLOCKS {
            let value = self.s.p.guest.disk[i];
            self.s.p.writes(i, value);
            self.send_to_backup(disk_frame(0, 0, i, value));
        }
        if self.s.p.core.begin_first_checkpoint() {
            self.s.p.paused = true;
            self.s.p.taking = true;
            self.schedule(ms(2), Ev::Taken);
        }
    }

    pub fn guest_acts(&mut self) {
        if self.now > self.active || !self.s.p.alive || self.s.p.stopped {
            return;
        }
        let pace = self.below(ms(4)) + 100_000;
        self.schedule(pace, Ev::Guest);
        if self.s.p.paused {
            return;
        }
        let value = self.random();
        self.s.p.guest.mix(value);
        match value % 10 {
            0 | 1 => {
                let i = (value >> 8) as usize % PAGES;
                self.s.p.guest.ram[i] = if value >> 60 == 0 { 0 } else { value };
                self.s.p.dirty[i] = true;
            }
            2 | 3 if self.shared && value >> 40 & 1 == 0 => {
                let block = (value >> 8) as usize % BLOCKS;
                self.s.p.writes_shared(block, value);
                if self.s.p.alone {
                    self.san.seen[block] = value;
                } else {
                    let epoch = self.s.p.epoch;
                    self.s.p.logged.0 += 1;
                    self.s.p.writer.held.push_back(Change { epoch, block, value });
                    self.send_to_backup(disk_frame(epoch, SHARED, block, value));
                }
            }
            2 | 3 => {
                let i = (value >> 8) as usize % BLOCKS;
                self.s.p.writes(i, value);
                if !self.s.p.alone {
                    self.s.p.logged.0 += 1;
                    self.send_to_backup(disk_frame(self.s.p.epoch, 0, i, value));
                }
            }
            4 => {
                if !self.s.p.alone {
                    self.s.p.logged.1 += 1;
                    self.s.p.inputs.push((self.s.p.epoch, value));
                    let input = Input::Frame {
                        nic: 0,
                        data: value.to_le_bytes().to_vec().into(),
                    };
                    self.send_to_backup(Frame::Input {
                        epoch: self.s.p.epoch,
                        input,
                    });
                }
            }
            5 => {
                // The primary's own disk has it before the guest goes on.
                let flushed = [self.s.p.last_write, self.s.p.last_shared];
                self.s.p.flushed.push(flushed);
                let disks = match (self.s.p.alone, self.shared) {
                    (true, _) => 0,
                    (false, shared) => 1 + u16::from(shared),
                };
                for disk in 0..disks {
                    self.s.p.logged.0 += 1;
                    self.send_to_backup(Frame::Disk {
                        epoch: self.s.p.epoch,
                        disk,
                        change: DiskChange::Flush,
                    });
                }
                if self.s.p.alone {
                    self.san.flushed = self.san.seen;
                }
            }
            _ => {
                self.s.p.next += 1;
                let id = self.s.p.next;
                if self.s.p.alone {
                    self.outsiders_see(id);
                } else {
                    let (epoch, flushes) = (self.s.p.epoch, self.s.p.flushed.len());
                    self.s.made.insert(id, Made { epoch, flushes });
                    self.s.p.held.entry(self.s.p.epoch).or_default().push(id);
                    self.primary_tick();
                }
            }
        }
    }

    pub fn checkpoint_taken(&mut self) {
        if !self.s.p.alive || self.s.p.stopped || !std::mem::take(&mut self.s.p.taking) {
            return;
        }
        let epoch = self.s.p.epoch;
        self.s.p.epoch += 1;
        self.s.p.history.insert(epoch, self.s.p.guest.clone());
        // Before the first end marker: it is what the backup would find.
        if epoch == 1 && self.bug != Some(Bug::FirstWithoutFlush) {
            self.san.flushed = self.san.seen;
        }
        let repairs = std::mem::take(&mut self.s.p.repairs);
        for word in &repairs {
            match word.checked_sub(PAGES) {
                _ if self.bug == Some(Bug::RepairIsForgotten) => {}
                None => self.s.p.dirty[*word] = true,
                Some(block) => {
                    self.s.p.logged.0 += 1;
                    let value = self.s.p.guest.disk[block];
                    self.send_to_backup(disk_frame(epoch, 0, block, value));
                }
            }
        }
        let anew = !repairs.is_empty() && self.bug != Some(Bug::RepairIsForgotten);
        let words = if anew { repairs.clone() } else { self.audited() };
        let sums = Sums::of(&self.s.p.guest, words.into_iter());
        let (disk, inputs) = std::mem::take(&mut self.s.p.logged);
        let dirty = std::mem::take(&mut self.s.p.dirty);
        let pages = dirty.iter().filter(|d| **d).count() as u64;
        self.note(|| format!("primary: checkpoint {epoch}"));
        self.primary_step(Event::Checkpointed {
            bytes: 10_000,
            dirty_bytes: pages * PAGE_SIZE as u64,
            anew: repairs.len() as u64,
        });
        if self.bug == Some(Bug::ReleaseBeforeCommit) {
            self.release(epoch);
            self.primary_works();
        }
        if self.bug == Some(Bug::WriteBeforeCommit) && self.shared {
            self.may_write(epoch);
        }
        if !self.s.p.core.sends() {
            return;
        }
        let outputs: Vec<u64> = self.s.p.held.get(&epoch).cloned().unwrap_or_default();
        let outputs: Vec<Output> = outputs
            .iter()
            .map(|id| Output::Frame {
                nic: 0,
                data: id.to_le_bytes().to_vec(),
            })
            .collect();
        let mut marker = EndMarker {
            epoch,
            disk,
            inputs,
            outputs: outputs.len() as u64,
            state_len: 8,
            audited: sums.pages.len() as u64,
            audited_chunks: sums.chunks.len() as u64,
            anew,
            ..EndMarker::default()
        };
        for i in (0..PAGES).filter(|i| dirty[*i]) {
            let runs = vec![PageRun {
                gpa: (i * PAGE_SIZE) as u64,
                count: 1,
            }];
            match self.s.p.guest.ram[i] {
                0 => {
                    marker.zero_pages += 1;
                    self.send_to_backup(Frame::ZeroPages { epoch, runs });
                }
                value => {
                    marker.pages += 1;
                    self.send_to_backup(Frame::Pages {
                        epoch,
                        runs,
                        data: page(value).into(),
                    });
                }
            }
        }
        if !outputs.is_empty() {
            self.send_to_backup(Frame::Outputs { epoch, outputs });
        }
        if !sums.pages.is_empty() {
            let sums = sums.pages;
            self.send_to_backup(Frame::Audit { epoch, sums });
        }
        if !sums.chunks.is_empty() {
            let sums = sums.chunks;
            self.send_to_backup(Frame::DiskAudit { epoch, sums });
        }
        // The guest may have run on already: the state is that of the checkpoint.
        let state = self.s.p.history[&epoch].state;
        self.send_to_backup(Frame::State {
            epoch,
            data: state.to_le_bytes().to_vec(),
        });
        self.send_to_backup(Frame::End(marker));
    }

    pub fn primary_step(&mut self, event: Event) {
        if !self.s.p.alive {
            return;
        }
        let now = self.clock(Side::Primary);
        let before = self.s.p.core.status();
        let held = 100 * self.s.p.writer.held.len() as u64;
        self.s.p.core.note_held(held);
        let actions = self.s.p.core.step(event.clone(), now);
        let after = self.s.p.core.status();
        if before.state != after.state {
            self.note(|| format!("primary: {:?} -> {:?} by {event:?}", before.state, after.state));
        }
        self.s.p.todo.extend(actions);
        self.primary_works();
        if let Some(at) = self.s.p.core.deadline()
            && at != self.s.p.deadline
        {
            self.s.p.deadline = at;
            let when = self.s.clocks[0].when(at, self.now);
            self.at(when, Ev::Deadline);
        }
    }

    /// Does what is to be done, unless the process is stopped or ends in the middle of it.
    pub fn primary_works(&mut self) {
        while self.s.stalled_until[index(Side::Primary)] <= self.now {
            if !self.s.p.alive {
                self.s.p.todo.clear();
                return self.s.p.drop_outputs();
            }
            if let Some((epoch, id)) = self.s.p.leaving.pop_front() {
                self.leaves(epoch, id);
            } else if let Some(action) = self.s.p.todo.pop_front() {
                if !self.crashes_here(Side::Primary) {
                    self.primary_does(action);
                }
            } else {
                return;
            }
        }
    }

    /// An output that may leave, if it still may: the process may have been stopped since.
    fn leaves(&mut self, epoch: u64, id: u64) {
        let now = self.clock(Side::Primary);
        if !self.s.p.core.may_release(now) && self.bug != Some(Bug::ReleaseWithoutLook) {
            self.s.p.held.entry(epoch).or_default().insert(0, id);
            while let Some((epoch, id)) = self.s.p.leaving.pop_back() {
                let place = self.s.p.held.entry(epoch).or_default();
                let at = place.iter().position(|other| *other > id).unwrap_or(place.len());
                place.insert(at, id);
            }
            self.s.p.left = epoch - 1;
            return self.count("outputs taken back", 1);
        }
        self.check_release(epoch, id);
        self.outsiders_see(id);
        if self.s.p.leaving.is_empty() {
            self.s.p.left = self.s.p.through;
        }
        if self.now < self.active && self.one_in(400) {
            let span = [ms(20), ms(700), ms(1_500)][self.below(3) as usize];
            self.count("stopped while outputs leave", 1);
            self.stall(Side::Primary, span);
        }
    }

    fn primary_does(&mut self, action: Action) {
        match action {
            Action::Checkpoint => {
                self.s.p.paused = true;
                self.s.p.taking = true;
                let pause = self.below(ms(3));
                self.schedule(pause, Ev::Taken);
            }
            Action::Resume => self.s.p.paused = false,
            Action::Release(epoch) => self.release(epoch),
            Action::Throttle(_) => {}
            Action::Write(epoch) => self.may_write(epoch),
            Action::Send(ToBackup::Disarm(reason)) => {
                self.s.p.disarmed = true;
                self.send_to_backup(Frame::Disarm(reason));
            }
            Action::Send(ToBackup::Handover(epoch)) => {
                self.s.p.writer.locked = false;
                self.send_to_backup(Frame::Handover(epoch));
            }
            Action::AskArbiter { expected } => {
                self.gives_lock_back();
                self.ask(Side::Primary, expected);
            }
            Action::Disconnect => self.disconnect(Side::Primary),
            Action::GoAlone => {
                self.goes_alone();
                self.runs_on();
            }
            Action::Abandon => self.runs_on(),
            Action::Stop(reason) => {
                self.note(|| format!("primary stops: {reason}"));
                self.s.p.stopped = true;
                self.s.p.drop_outputs();
                self.gives_lock_back();
            }
        }
    }

    /// Without FT, with everything released.
    fn runs_on(&mut self) {
        self.s.p.alone = true;
        for id in std::mem::take(&mut self.s.p.held).into_values().flatten() {
            self.outsiders_see(id);
        }
        self.writes_all();
        (self.s.p.paused, self.s.p.taking) = (false, false);
        self.runs_alone();
    }

    fn release(&mut self, through: u64) {
        let later = self.s.p.held.split_off(&(through + 1));
        let now = std::mem::replace(&mut self.s.p.held, later);
        let outputs = now
            .into_iter()
            .flat_map(|(epoch, ids)| ids.into_iter().map(move |id| (epoch, id)));
        self.s.p.leaving.extend(outputs);
        self.s.p.through = through;
        if self.s.p.leaving.is_empty() {
            self.s.p.left = through;
        }
    }

    pub fn primary_tick(&mut self) {
        let output = self.s.p.held.contains_key(&self.s.p.epoch);
        let heard = self.s.p.heard;
        self.primary_step(Event::Tick {
            heard,
            running_bytes: 100 * (self.s.p.logged.0 + self.s.p.logged.1),
            output,
        });
    }

    pub fn primary_pulse(&mut self) {
        self.send_to_backup(Frame::Heartbeat);
        self.primary_tick();
    }

    pub fn primary_receives(&mut self) {
        while self.s.p.alive && self.s.p.connected {
            let Some(got) = self.receive(Side::Primary) else {
                break;
            };
            self.s.p.heard = self.clock(Side::Primary);
            let (stamp, frame) = match got {
                Got::Frame { stamp, frame, .. } => (stamp, frame),
                Got::End => {
                    self.primary_step(Event::PeerLost("closed".into()));
                    break;
                }
                Got::Broken(reason) => {
                    self.primary_step(Event::PeerLost(reason));
                    break;
                }
            };
            let message = match frame {
                Frame::Heartbeat => FromBackup::Heartbeat,
                Frame::Ack(epoch) => FromBackup::Ack(epoch),
                Frame::Disarmed => FromBackup::Disarmed,
                Frame::HandedOver(generation) => FromBackup::HandedOver(generation),
                Frame::HandoverFailed { generation, reason } => FromBackup::HandoverFailed { generation, reason },
                Frame::Bye(reason) => FromBackup::Bye(reason),
                Frame::Mismatch(wrong) => {
                    let places = self.mismatch(&wrong);
                    let what = "wrong".into();
                    FromBackup::Mismatch { places, what }
                }
                other => panic!("{other:?}"),
            };
            let offered = self.s.p.core.status().state == FtState::Protected;
            self.s.p.told |= offered && matches!(message, FromBackup::HandoverFailed { .. });
            if let FromBackup::Ack(_) = message {
                self.count("commits", 1);
            }
            let lease_broken = self.bug == Some(Bug::ReleaseWithoutLease);
            let echo = if lease_broken { self.s.p.heard } else { stamp };
            self.primary_step(Event::Peer { echo, message });
        }
        if let Some(at) = self.s.streams[1].due()
            && at > self.now
            && self.s.p.connected
        {
            self.at(at, Ev::Arrival(Side::Primary));
        }
    }
}

fn disk_frame(epoch: u64, disk: u16, block: usize, value: u64) -> Frame {
    let mut data = vec![0; 16];
    data[..8].copy_from_slice(&value.to_le_bytes());
    Frame::Disk {
        epoch,
        disk,
        change: DiskChange::Write {
            offset: block as u64 * BLOCK,
            data,
        },
    }
}
