//! The primary's shell in the simulator: guest, interposer, checkpoints.

use std::collections::BTreeMap;

use ft::config::FtLimits;
use ft::core::pacing::Limits;
use ft::core::primary::{Action, Event, FromBackup, PrimaryState, ToBackup};
use ft::machine::{DiskChange, Input, Output, PAGE_SIZE, PageRun};
use ft::wire::frame::{EndMarker, Frame};

use crate::guest::{BLOCK, BLOCKS, Guest, PAGES, page};
use crate::stream::Message;
use crate::world::{ACTIVE, Bug, Ev, Side, World};

pub struct PrimarySide {
    pub core: PrimaryState,
    pub alive: bool,
    pub guest: Guest,
    pub paused: bool,
    pub stopped: bool,
    /// The VM runs without FT.
    pub alone: bool,
    taking: bool,
    pub attached: bool,
    pub epoch: u64,
    dirty: [bool; PAGES],
    pub held: BTreeMap<u64, Vec<u64>>,
    /// (disk changes, inputs) of the running epoch.
    logged: (u64, u64),
    /// (epoch, input) as logged.
    pub inputs: Vec<(u64, u64)>,
    /// The guest at the end of each epoch.
    pub history: BTreeMap<u64, Guest>,
    next: u64,
    heard: u64,
    pub connected: bool,
    /// `disarm` was sent.
    pub disarmed: bool,
    deadline: u64,
}

pub fn limits(kind: u64) -> FtLimits {
    FtLimits {
        max_epoch_ms: [15, 40, 100][kind as usize % 3],
        min_epoch_us: [0, 500, 3000][kind as usize % 3],
        ..FtLimits::default()
    }
}

impl PrimarySide {
    pub fn new() -> Self {
        Self {
            core: PrimaryState::new(0, Limits::from(&limits(0)), 1, 1),
            alive: true,
            guest: Guest::default(),
            paused: false,
            stopped: false,
            alone: false,
            taking: false,
            attached: false,
            epoch: 1,
            dirty: [false; PAGES],
            held: BTreeMap::new(),
            logged: (0, 0),
            inputs: Vec::new(),
            history: BTreeMap::new(),
            next: 0,
            heard: 1,
            connected: true,
            disarmed: false,
            deadline: 0,
        }
    }

    pub fn configure(&mut self, max_in_flight: usize, kind: u64) {
        self.core = PrimaryState::new(0, Limits::from(&limits(kind)), max_in_flight, 1);
    }
}

impl World {
    pub fn send_to_backup(&mut self, frame: Frame) {
        if !self.p.alive || !self.p.connected {
            return;
        }
        let arrives = self.now + self.network_delay();
        let mark = self.p.core.released();
        self.streams[0].send(Message {
            arrives,
            mark,
            stamp: self.now,
            frame: Some(frame),
        });
        self.at(arrives, Ev::Arrival(Side::Backup));
    }

    pub fn begin_precopy(&mut self) {
        for i in 0..PAGES {
            let value = self.random();
            self.p.guest.ram[i] = value;
            let runs = vec![PageRun {
                gpa: (i * PAGE_SIZE) as u64,
                count: 1,
            }];
            self.send_to_backup(Frame::Pages {
                epoch: 0,
                runs,
                data: page(value),
            });
        }
        for i in 0..BLOCKS {
            let value = self.random();
            self.p.guest.disk[i] = value;
            self.send_to_backup(disk_frame(0, i, value));
        }
        if self.p.core.begin_first_checkpoint() {
            self.p.paused = true;
            self.p.taking = true;
            self.p.attached = true;
            self.schedule(ft::core::ms(2), Ev::Taken);
        }
    }

    pub fn guest_acts(&mut self) {
        if self.now > ACTIVE || !self.p.alive || self.p.stopped {
            return;
        }
        let pace = self.below(ft::core::ms(4)) + 100_000;
        self.schedule(pace, Ev::Guest);
        if self.p.paused {
            return;
        }
        let value = self.random();
        self.p.guest.mix(value);
        match value % 8 {
            0 | 1 => {
                let i = (value >> 8) as usize % PAGES;
                self.p.guest.ram[i] = if value >> 60 == 0 { 0 } else { value };
                self.p.dirty[i] = true;
            }
            2 | 3 => {
                let i = (value >> 8) as usize % BLOCKS;
                self.p.guest.disk[i] = value;
                if !self.p.alone {
                    self.p.logged.0 += 1;
                    self.send_to_backup(disk_frame(self.p.epoch, i, value));
                }
            }
            4 => {
                if !self.p.alone {
                    self.p.logged.1 += 1;
                    self.p.inputs.push((self.p.epoch, value));
                    let input = Input::Frame {
                        nic: 0,
                        data: value.to_le_bytes().to_vec(),
                    };
                    self.send_to_backup(Frame::Input {
                        epoch: self.p.epoch,
                        input,
                    });
                }
            }
            _ => {
                self.p.next += 1;
                let id = self.p.next;
                if self.p.alone {
                    self.outsiders_see(Side::Primary, id);
                } else {
                    self.output_epoch.insert(id, self.p.epoch);
                    self.p.held.entry(self.p.epoch).or_default().push(id);
                    self.primary_tick();
                }
            }
        }
    }

    pub fn checkpoint_taken(&mut self) {
        if !self.p.alive || self.p.stopped || !std::mem::take(&mut self.p.taking) {
            return;
        }
        let epoch = self.p.epoch;
        self.p.epoch += 1;
        self.p.history.insert(epoch, self.p.guest.clone());
        let (disk, inputs) = std::mem::take(&mut self.p.logged);
        let dirty = std::mem::take(&mut self.p.dirty);
        let pages = dirty.iter().filter(|d| **d).count() as u64;
        self.note(|| format!("primary: checkpoint {epoch}"));
        self.primary_step(Event::Checkpointed {
            bytes: 10_000,
            dirty_bytes: pages * PAGE_SIZE as u64,
        });
        if self.bug == Some(Bug::ReleaseBeforeCommit) {
            self.release(epoch);
        }
        if !self.p.core.sends() {
            return;
        }
        let outputs: Vec<u64> = self.p.held.get(&epoch).cloned().unwrap_or_default();
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
            ..EndMarker::default()
        };
        for i in (0..PAGES).filter(|i| dirty[*i]) {
            let runs = vec![PageRun {
                gpa: (i * PAGE_SIZE) as u64,
                count: 1,
            }];
            match self.p.guest.ram[i] {
                0 => {
                    marker.zero_pages += 1;
                    self.send_to_backup(Frame::ZeroPages { epoch, runs });
                }
                value => {
                    marker.pages += 1;
                    self.send_to_backup(Frame::Pages {
                        epoch,
                        runs,
                        data: page(value),
                    });
                }
            }
        }
        if !outputs.is_empty() {
            self.send_to_backup(Frame::Outputs { epoch, outputs });
        }
        // The guest may have run on already: the state is that of the checkpoint.
        let state = self.p.history[&epoch].state;
        self.send_to_backup(Frame::State {
            epoch,
            data: state.to_le_bytes().to_vec(),
        });
        self.send_to_backup(Frame::End(marker));
    }

    pub fn primary_step(&mut self, event: Event) {
        if !self.p.alive {
            return;
        }
        let before = self.p.core.status();
        let actions = self.p.core.step(event.clone(), self.now);
        let after = self.p.core.status();
        if before.state != after.state {
            self.note(|| format!("primary: {:?} -> {:?} by {event:?}", before.state, after.state));
        }
        for action in actions {
            self.primary_does(action);
        }
        if let Some(at) = self.p.core.deadline()
            && at != self.p.deadline
        {
            self.p.deadline = at;
            self.at(at.max(self.now), Ev::Deadline);
        }
    }

    fn primary_does(&mut self, action: Action) {
        match action {
            Action::Checkpoint => {
                self.p.paused = true;
                self.p.taking = true;
                let pause = self.below(ft::core::ms(3));
                self.schedule(pause, Ev::Taken);
            }
            Action::Resume => self.p.paused = false,
            Action::Release(epoch) => self.release(epoch),
            Action::Throttle(_) => {}
            Action::Send(ToBackup::Disarm(reason)) => {
                self.p.disarmed = true;
                self.send_to_backup(Frame::Disarm(reason));
            }
            Action::Send(ToBackup::Handover(epoch)) => self.send_to_backup(Frame::Handover(epoch)),
            Action::AskArbiter { expected } => self.ask(Side::Primary, expected),
            Action::Disconnect => self.disconnect(Side::Primary),
            Action::GoAlone => {
                self.goes_alone();
                let held = std::mem::take(&mut self.p.held);
                for id in held.into_values().flatten() {
                    self.outsiders_see(Side::Primary, id);
                }
                (self.p.paused, self.p.taking) = (false, false);
            }
            Action::Abandon => {
                self.p.alone = true;
                let held = std::mem::take(&mut self.p.held);
                for id in held.into_values().flatten() {
                    self.outsiders_see(Side::Primary, id);
                }
                (self.p.paused, self.p.taking) = (false, false);
            }
            Action::Stop(reason) => {
                self.note(|| format!("primary stops: {reason}"));
                self.p.stopped = true;
                self.p.held.clear();
            }
        }
    }

    fn release(&mut self, through: u64) {
        let later = self.p.held.split_off(&(through + 1));
        let now = std::mem::replace(&mut self.p.held, later);
        for (epoch, ids) in now {
            for id in ids {
                self.check_release(epoch, id);
                self.outsiders_see(Side::Primary, id);
            }
        }
    }

    pub fn primary_tick(&mut self) {
        let output = self.p.held.contains_key(&self.p.epoch);
        let heard = self.p.heard;
        self.primary_step(Event::Tick {
            heard,
            running_bytes: 100 * (self.p.logged.0 + self.p.logged.1),
            output,
        });
    }

    pub fn primary_pulse(&mut self) {
        self.send_to_backup(Frame::Heartbeat);
        self.primary_tick();
    }

    pub fn primary_receives(&mut self) {
        while self.p.alive && self.p.connected {
            let Some(message) = self.streams[1].receive(self.now) else {
                break;
            };
            self.p.heard = self.now;
            let Some(frame) = message.frame else {
                self.primary_step(Event::PeerLost("closed".into()));
                break;
            };
            let message_ = match frame {
                Frame::Heartbeat => FromBackup::Heartbeat,
                Frame::Ack(epoch) => FromBackup::Ack(epoch),
                Frame::Disarmed => FromBackup::Disarmed,
                Frame::HandedOver(generation) => FromBackup::HandedOver(generation),
                Frame::HandoverFailed { generation, reason } => FromBackup::HandoverFailed { generation, reason },
                Frame::Bye(reason) => FromBackup::Bye(reason),
                other => panic!("{other:?}"),
            };
            if let FromBackup::Ack(_) = message_ {
                self.count("commits", 1);
            }
            let lease_broken = self.bug == Some(Bug::ReleaseWithoutLease);
            let echo = if lease_broken { self.now } else { message.stamp };
            self.primary_step(Event::Peer {
                echo,
                message: message_,
            });
        }
        if let Some(at) = self.streams[1].due()
            && at > self.now
            && self.p.connected
        {
            self.at(at, Ev::Arrival(Side::Primary));
        }
    }
}

fn disk_frame(epoch: u64, block: usize, value: u64) -> Frame {
    let mut data = vec![0; 16];
    data[..8].copy_from_slice(&value.to_le_bytes());
    Frame::Disk {
        epoch,
        disk: 0,
        change: DiskChange::Write {
            offset: block as u64 * BLOCK,
            data,
        },
    }
}
