//! The backup's shell in the simulator: staging, shadow, takeover.

use std::collections::{BTreeMap, VecDeque};

use ft::core::backup::{Action, BackupState, Event, FromPrimary, ToPrimary};
use ft::core::ms;
use ft::core::staging::{StagedEpoch, Staging};
use ft::machine::{DiskChange, DiskIdentity, Identity, Input, Output, PAGE_SIZE};
use ft::wire::frame::{EndMarker, Frame};

use crate::guest::{BLOCK, BLOCKS, Guest, PAGES, number};
use crate::stream::Message;
use crate::world::{Bug, Ev, Side, World};

pub struct BackupSide {
    pub core: BackupState,
    pub alive: bool,
    staging: Staging,
    pub shadow: Guest,
    queue: VecDeque<(u64, StagedEpoch)>,
    applying: bool,
    /// State and outputs of whole epochs.
    checkpoints: BTreeMap<u64, (u64, Vec<u64>)>,
    /// The last epoch that came whole: the truth for R1.
    pub whole: u64,
    /// Inputs as they came.
    pub inputs: Vec<(u64, u64)>,
    mark: u64,
    echo: u64,
    heard: u64,
    pub connected: bool,
    pub live: bool,
    /// It can never become the VM.
    pub out: bool,
    pub fail_apply: bool,
    pub fail_activation: bool,
    /// The loss was found by silence.
    pub by_silence: bool,
}

fn identity() -> Identity {
    Identity {
        vm_id: "vm".into(),
        vmm_version: "1".into(),
        config: String::new(),
        memory: vec![(0, (PAGES * PAGE_SIZE) as u64)],
        vcpus: 1,
        cpu_features: Vec::new(),
        tsc_khz: 0,
        disks: vec![DiskIdentity {
            id: "d".into(),
            size: BLOCKS as u64 * BLOCK,
            readonly: false,
        }],
        nics: 1,
    }
}

impl BackupSide {
    pub fn new() -> Self {
        Self {
            core: BackupState::new(0, ms(500), 20_000, 1),
            alive: true,
            staging: Staging::new(&identity(), 1 << 20),
            shadow: Guest::default(),
            queue: VecDeque::new(),
            applying: false,
            checkpoints: BTreeMap::new(),
            whole: 0,
            inputs: Vec::new(),
            mark: 0,
            echo: 0,
            heard: 1,
            connected: true,
            live: false,
            out: false,
            fail_apply: false,
            fail_activation: false,
            by_silence: false,
        }
    }
}

impl World {
    pub fn send_to_primary(&mut self, frame: Frame) {
        if !self.b.alive || !self.b.connected {
            return;
        }
        let arrives = self.now + self.network_delay();
        let (mark, stamp) = (self.b.core.applied(), self.b.echo);
        self.streams[1].send(Message {
            arrives,
            mark,
            stamp,
            frame: Some(frame),
        });
        self.at(arrives, Ev::Arrival(Side::Primary));
    }

    pub fn backup_step(&mut self, event: Event) {
        if !self.b.alive {
            return;
        }
        let before = self.b.core.status();
        let actions = self.b.core.step(event.clone(), self.now);
        let after = self.b.core.status();
        if before.state != after.state {
            self.note(|| format!("backup: {:?} -> {:?} by {event:?}", before.state, after.state));
        }
        for action in actions {
            self.backup_does(action);
        }
    }

    fn backup_does(&mut self, action: Action) {
        match action {
            Action::Send(ToPrimary::Ack(epoch)) => self.send_to_primary(Frame::Ack(epoch)),
            Action::Send(ToPrimary::Disarmed) => {
                self.b.out = true;
                self.send_to_primary(Frame::Disarmed);
            }
            Action::Send(ToPrimary::HandedOver(generation)) => {
                self.count("handovers", 1);
                self.send_to_primary(Frame::HandedOver(generation));
            }
            Action::Send(ToPrimary::HandoverFailed { generation, reason }) => {
                self.b.out = true;
                self.send_to_primary(Frame::HandoverFailed { generation, reason });
            }
            Action::Send(ToPrimary::Bye(reason)) => {
                self.b.out = true;
                self.send_to_primary(Frame::Bye(reason));
            }
            Action::Apply(epoch) => {
                let Some(mut staged) = self.b.staging.take(epoch) else {
                    return self.violated("R2", format!("epoch {epoch} is to be applied and is not whole"));
                };
                let id = |output: &Output| match output {
                    Output::Frame { data, .. } | Output::Console { data, .. } => number(data),
                };
                let outputs = staged.outputs.iter().map(id).collect();
                let state = if staged.state.len() == 8 {
                    number(&staged.state)
                } else {
                    0
                };
                self.b.checkpoints.insert(epoch, (state, outputs));
                if self.bug == Some(Bug::DiskOutOfOrder) {
                    staged.disk.reverse();
                }
                self.b.queue.push_back((epoch, staged));
                self.apply_next();
            }
            Action::AskArbiter { expected } => self.ask(Side::Backup, expected),
            Action::Disconnect | Action::Farewell => self.disconnect(Side::Backup),
            Action::Activate(epoch) => {
                let delay = self.below(ms(20));
                self.schedule(delay, Ev::Activated(epoch));
            }
            Action::Discard => self.b.out = true,
        }
    }

    fn apply_next(&mut self) {
        if !self.b.applying && !self.b.queue.is_empty() {
            self.b.applying = true;
            let delay = if self.one_in(30) {
                self.below(ms(700))
            } else {
                self.below(ms(4))
            };
            if self.bug == Some(Bug::ActivateBeforeApplied) {
                let epoch = self.b.queue.back().map_or(0, |(epoch, _)| *epoch);
                self.backup_step(Event::Applied { epoch });
            }
            self.schedule(delay, Ev::Applied);
        }
    }

    pub fn applied(&mut self) {
        self.b.applying = false;
        let Some((epoch, staged)) = self.b.queue.pop_front() else {
            return;
        };
        if !self.b.alive || self.b.out || self.b.live {
            return;
        }
        if self.b.fail_apply {
            return self.backup_step(Event::ApplyFailed("disk full".into()));
        }
        for (runs, data) in &staged.pages {
            self.b.shadow.ram[runs[0].gpa as usize / PAGE_SIZE] = number(data);
        }
        for run in &staged.zero {
            self.b.shadow.ram[run.gpa as usize / PAGE_SIZE] = 0;
        }
        for (_, change) in &staged.disk {
            if let DiskChange::Write { offset, data } = change {
                self.b.shadow.disk[(offset / BLOCK) as usize] = number(data);
            }
        }
        self.backup_step(Event::Applied { epoch });
        self.apply_next();
    }

    pub fn activated(&mut self, epoch: u64) {
        if !self.b.alive {
            return;
        }
        if self.b.fail_activation {
            self.b.out = true;
            return self.backup_step(Event::ActivationFailed("no vCPUs".into()));
        }
        let Some((state, _)) = self.b.checkpoints.get(&epoch) else {
            return self.violated("R2", format!("no state of epoch {epoch}"));
        };
        self.b.shadow.state = *state;
        let mut inputs: Vec<u64> = self
            .b
            .staging
            .take_uncommitted_inputs(epoch)
            .iter()
            .map(|Input::Frame { data, .. }| number(data))
            .collect();
        if self.bug == Some(Bug::InputsOutOfOrder) {
            inputs.reverse();
        }
        let mark = if self.bug == Some(Bug::LoseCommittedOutputs) {
            u64::MAX
        } else {
            self.b.mark
        };
        let again: Vec<u64> = self
            .b
            .checkpoints
            .range(..=epoch)
            .filter(|(e, _)| **e > mark)
            .flat_map(|(_, (_, ids))| ids.clone())
            .collect();
        self.count("inputs again", inputs.len() as u64);
        self.count("outputs again", again.len() as u64);
        self.check_takeover(epoch, &inputs, &again);
        for id in again {
            self.outsiders_see(Side::Backup, id);
        }
        self.b.live = true;
        self.backup_step(Event::Activated);
    }

    pub fn backup_pulse(&mut self) {
        self.send_to_primary(Frame::Heartbeat);
        let armed = self.b.core.takes_data();
        self.backup_step(Event::Tick { heard: self.b.heard });
        self.b.by_silence |= armed && !self.b.core.takes_data();
    }

    pub fn backup_receives(&mut self) {
        while self.b.alive && self.b.connected {
            let Some(message) = self.streams[0].receive(self.now) else {
                break;
            };
            self.b.heard = self.now;
            let Some(frame) = message.frame else {
                let heard = self.b.heard;
                self.backup_step(Event::PeerLost {
                    heard,
                    reason: "closed".into(),
                });
                break;
            };
            self.b.echo = self.b.echo.max(message.stamp);
            self.b.mark = self.b.mark.max(message.mark);
            if !self.b.core.takes_data() {
                continue;
            }
            self.take(frame);
        }
        if let Some(at) = self.streams[0].due()
            && at > self.now
            && self.b.connected
        {
            self.at(at, Ev::Arrival(Side::Backup));
        }
    }

    fn take(&mut self, frame: Frame) {
        let b = &mut self.b;
        let result = match frame {
            Frame::Heartbeat => Ok(()),
            Frame::Pages { epoch: 0, runs, data } => {
                b.shadow.ram[runs[0].gpa as usize / PAGE_SIZE] = number(&data);
                Ok(())
            }
            Frame::Disk {
                epoch: 0,
                change: DiskChange::Write { offset, data },
                ..
            } => {
                b.shadow.disk[(offset / BLOCK) as usize] = number(&data);
                Ok(())
            }
            Frame::Pages { epoch, runs, data } => b.staging.pages(epoch, runs, data),
            Frame::ZeroPages { epoch, runs } => b.staging.zero_pages(epoch, &runs),
            Frame::Disk { epoch, disk, change } => b.staging.disk(epoch, disk, change),
            Frame::Input { epoch, input } => {
                let Input::Frame { data, .. } = &input;
                b.inputs.push((epoch, number(data)));
                b.staging.input(epoch, input)
            }
            Frame::Outputs { epoch, outputs } => b.staging.outputs(epoch, outputs),
            Frame::State { epoch, data } => {
                let result = b.staging.state(epoch, &data);
                if self.bug == Some(Bug::AckBeforeWhole) {
                    return self.ack_early(epoch);
                }
                result
            }
            Frame::End(marker) => return self.epoch_ends(&marker),
            Frame::Disarm(reason) => return self.backup_step(Event::Peer(FromPrimary::Disarm(reason))),
            Frame::Handover(epoch) => return self.backup_step(Event::Peer(FromPrimary::Handover(epoch))),
            Frame::Limits(limits) => {
                let timeout = ms(limits.heartbeat_timeout_ms.into());
                return self.backup_step(Event::Peer(FromPrimary::Timeout(timeout)));
            }
            other => panic!("{other:?}"),
        };
        if let Err(e) = result {
            self.violated("R6", format!("a correct primary is accused: {e}"));
        }
    }

    fn epoch_ends(&mut self, marker: &EndMarker) {
        if self.bug == Some(Bug::AckBeforeWhole) {
            return;
        }
        match self.b.staging.end(marker) {
            Ok((bytes, _)) => {
                self.b.whole = marker.epoch;
                self.backup_step(Event::Staged {
                    epoch: marker.epoch,
                    bytes,
                    durable: false,
                });
            }
            Err(e) => self.violated("R6", format!("a correct primary is accused: {e}")),
        }
    }

    /// The bug: what came so far counts as the epoch, without what it says it has.
    fn ack_early(&mut self, epoch: u64) {
        let marker = EndMarker {
            epoch,
            ..EndMarker::default()
        };
        if self.b.staging.end(&marker).is_err() {
            let _ = self.b.staging.end(&EndMarker {
                epoch,
                state_len: 8,
                ..EndMarker::default()
            });
        }
        self.b.whole = epoch;
        self.backup_step(Event::Staged {
            epoch,
            bytes: 0,
            durable: false,
        });
    }
}
