//! The backup's shell in the simulator: staging, shadow, takeover.

use std::collections::{BTreeMap, VecDeque};

use ft::core::backup::{Action, BackupState, Event, FromPrimary, ToPrimary};
use ft::core::ms;
use ft::core::staging::{StagedEpoch, Staging};
use ft::machine::{DiskChange, DiskIdentity, Identity, Input, Output, PAGE_SIZE, SharedDisk};
use ft::wire::frame::{EndMarker, Frame};

use crate::audit::Flip;
use crate::guest::{BLOCK, BLOCKS, Guest, PAGES, number};
use crate::stream::{Got, Message};
use crate::world::{Bug, Ev, Side, World, index};

pub struct BackupSide {
    pub core: BackupState,
    pub alive: bool,
    staging: Staging,
    pub shadow: Guest,
    /// Words of it that are not what was written.
    pub flips: BTreeMap<usize, Flip>,
    /// What of its disk survives a power cut, as far as flushes tell.
    pub platter: [u64; BLOCKS],
    todo: VecDeque<Action>,
    pub slow_until: u64,
    queue: VecDeque<(u64, StagedEpoch)>,
    applying: bool,
    /// State, outputs and changes of the shared disk of whole epochs.
    checkpoints: BTreeMap<u64, (u64, Vec<u64>, Vec<(u16, DiskChange)>)>,
    /// The last epoch that came whole: the truth for R1.
    pub whole: u64,
    /// Inputs as they came.
    pub inputs: Vec<(u64, u64)>,
    mark: u64,
    echo: u64,
    heard: u64,
    pub connected: bool,
    pub live: bool,
    /// It has the lock of the shared disk.
    pub locked: bool,
    /// Live: the last output that the VM remembers.
    pub outputs: u64,
    /// It can never become the VM.
    pub out: bool,
    pub fail_apply: bool,
    pub fail_activation: bool,
    /// The primary's lease must have ended when this side asked: it was silent, or made no sense.
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
        disks: [None, Some(SharedDisk { lock_gap: None })]
            .map(|shared| DiskIdentity {
                id: "d".into(),
                size: BLOCKS as u64 * BLOCK,
                readonly: false,
                shared,
            })
            .to_vec(),
        nics: 1,
    }
}

impl BackupSide {
    pub fn new(core: BackupState, now: u64) -> Self {
        Self {
            core,
            alive: true,
            staging: Staging::new(&identity(), 1 << 20),
            shadow: Guest::default(),
            flips: BTreeMap::new(),
            platter: [0; BLOCKS],
            todo: VecDeque::new(),
            slow_until: 0,
            queue: VecDeque::new(),
            applying: false,
            checkpoints: BTreeMap::new(),
            whole: 0,
            inputs: Vec::new(),
            mark: 0,
            echo: 0,
            heard: now,
            connected: true,
            live: false,
            locked: false,
            outputs: 0,
            out: false,
            fail_apply: false,
            fail_activation: false,
            by_silence: false,
        }
    }
}

impl World {
    pub fn send_to_primary(&mut self, frame: Frame) {
        if !self.s.b.alive || !self.s.b.connected {
            return;
        }
        let arrives = self.now + self.network_delay();
        let (mark, stamp) = (self.s.b.core.applied(), self.s.b.echo);
        self.s.streams[1].send(Message::new(arrives, mark, stamp, frame));
        self.at(arrives, Ev::Arrival(Side::Primary));
    }

    pub fn backup_step(&mut self, event: Event) {
        if !self.s.b.alive {
            return;
        }
        let now = self.clock(Side::Backup);
        let before = self.s.b.core.status();
        let actions = self.s.b.core.step(event.clone(), now);
        let after = self.s.b.core.status();
        if before.state != after.state {
            self.note(|| format!("backup: {:?} -> {:?} by {event:?}", before.state, after.state));
        }
        self.s.b.todo.extend(actions);
        self.backup_works();
    }

    /// Does what is to be done, unless the process is stopped or ends in the middle of it.
    pub fn backup_works(&mut self) {
        while self.s.stalled_until[index(Side::Backup)] <= self.now {
            if !self.s.b.alive {
                return self.s.b.todo.clear();
            }
            let Some(action) = self.s.b.todo.pop_front() else {
                return;
            };
            if !self.crashes_here(Side::Backup) {
                self.backup_does(action);
            }
        }
    }

    fn backup_does(&mut self, action: Action) {
        match action {
            Action::Send(ToPrimary::Ack(epoch)) => self.acknowledged(epoch),
            Action::Send(ToPrimary::Mismatch(wrong)) => {
                self.send_to_primary(Frame::Mismatch(wrong));
                if self.bug == Some(Bug::AckDamaged) {
                    let epoch = self.s.b.whole;
                    self.acknowledged(epoch);
                }
            }
            Action::Send(ToPrimary::Disarmed) => {
                self.s.b.out = true;
                self.send_to_primary(Frame::Disarmed);
            }
            Action::Send(ToPrimary::HandedOver(generation)) => {
                self.count("handovers", 1);
                self.send_to_primary(Frame::HandedOver(generation));
            }
            Action::Send(ToPrimary::HandoverFailed { mut generation, reason }) => {
                self.s.b.out = true;
                generation += u64::from(self.bug == Some(Bug::WrongGeneration));
                self.send_to_primary(Frame::HandoverFailed { generation, reason });
            }
            Action::Send(ToPrimary::Bye(reason)) => {
                self.s.b.out = true;
                self.send_to_primary(Frame::Bye(reason));
            }
            Action::Apply(epoch) => {
                let Some(mut staged) = self.s.b.staging.take(epoch) else {
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
                let shared = self.s.b.staging.take_shared(&mut staged);
                self.s.b.checkpoints.insert(epoch, (state, outputs, shared));
                if self.bug == Some(Bug::DiskOutOfOrder) {
                    staged.disk.reverse();
                }
                self.s.b.queue.push_back((epoch, staged));
                self.apply_next();
            }
            Action::AskArbiter { expected } => self.ask(Side::Backup, expected),
            Action::Disconnect | Action::Farewell => self.disconnect(Side::Backup),
            Action::Activate(epoch) => {
                let delay = self.below(ms(20));
                self.schedule(delay, Ev::Activated(epoch));
            }
            Action::Discard => self.s.b.out = true,
        }
    }

    fn acknowledged(&mut self, epoch: u64) {
        self.send_to_primary(Frame::Ack(epoch));
        if self.s.b.core.is_damaged() {
            self.violated(
                "R2",
                format!("epoch {epoch} is acknowledged by a shadow that is known to be wrong"),
            );
        }
    }

    fn apply_next(&mut self) {
        if !self.s.b.applying && !self.s.b.queue.is_empty() {
            self.s.b.applying = true;
            let delay = if self.now < self.s.b.slow_until {
                self.count("slow disk", 1);
                ms(100) + self.below(ms(300))
            } else if self.one_in(30) {
                self.below(ms(700))
            } else {
                self.below(ms(4))
            };
            if self.bug == Some(Bug::ActivateBeforeApplied) {
                let epoch = self.s.b.queue.back().map_or(0, |(epoch, _)| *epoch);
                self.backup_step(Event::Applied { epoch });
            }
            self.schedule(delay, Ev::Applied);
        }
    }

    pub fn applied(&mut self) {
        self.s.b.applying = false;
        let Some((epoch, staged)) = self.s.b.queue.pop_front() else {
            return;
        };
        if !self.s.b.alive || self.s.b.out || self.s.b.live {
            return;
        }
        if self.s.b.fail_apply {
            return self.backup_step(Event::ApplyFailed("disk full".into()));
        }
        for (runs, data) in &staged.pages {
            let page = runs[0].gpa as usize / PAGE_SIZE;
            self.s.b.shadow.ram[page] = number(data);
            self.overwritten(page);
        }
        for run in &staged.zero {
            let page = run.gpa as usize / PAGE_SIZE;
            self.s.b.shadow.ram[page] = 0;
            self.overwritten(page);
        }
        let flushes = self.durable && self.bug != Some(Bug::FlushIsForgotten);
        for (_, change) in &staged.disk {
            match change {
                DiskChange::Write { offset, data } => {
                    let block = (offset / BLOCK) as usize;
                    self.s.b.shadow.disk[block] = number(data);
                    self.overwritten(PAGES + block);
                }
                DiskChange::Flush if flushes => self.s.b.platter = self.sound_shadow().disk,
                _ => {}
            }
        }
        if epoch == 1 && flushes {
            self.s.b.platter = self.sound_shadow().disk;
        }
        self.compare(&staged);
        self.backup_step(Event::Applied { epoch });
        self.apply_next();
    }

    pub fn activated(&mut self, epoch: u64) {
        if !self.s.b.alive {
            return;
        }
        if self.shared {
            if !self.backup_claims() {
                return self.schedule(ms(10), Ev::Activated(epoch));
            }
            self.write_again(epoch);
        }
        if self.s.b.fail_activation {
            (self.s.b.out, self.s.b.locked) = (true, false);
            return self.backup_step(Event::ActivationFailed("no vCPUs".into()));
        }
        let Some((state, ..)) = self.s.b.checkpoints.get(&epoch) else {
            return self.violated("R2", format!("no state of epoch {epoch}"));
        };
        self.s.b.shadow.state = *state;
        let mut inputs: Vec<u64> = self
            .s
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
            self.s.b.mark
        };
        let again: Vec<u64> = self
            .s
            .b
            .checkpoints
            .range(..=epoch)
            .filter(|(e, _)| **e > mark)
            .flat_map(|(_, (_, ids, _))| ids.clone())
            .collect();
        self.count("inputs again", inputs.len() as u64);
        self.count("outputs again", again.len() as u64);
        self.s.b.shadow.shared = self.san.seen;
        self.check_flips();
        self.check_takeover(epoch, &inputs, &again);
        let known = self.s.made.iter().filter(|(_, made)| made.epoch <= epoch);
        self.s.b.outputs = known.map(|(id, _)| *id).max().unwrap_or(self.s.before);
        self.s.b.live = true;
        self.backup_step(Event::Activated);
        self.runs_alone();
    }

    /// What the primary may not have written, or not flushed.
    fn write_again(&mut self, epoch: u64) {
        let mark = match self.bug {
            Some(Bug::ForgetSharedWrites) => u64::MAX,
            _ => self.s.b.mark,
        };
        let later = self.s.b.checkpoints.range(..=epoch).filter(|(e, _)| **e > mark);
        let changes: Vec<DiskChange> = later
            .flat_map(|(_, (.., changes))| changes.iter().map(|(_, change)| change.clone()))
            .collect();
        for change in changes {
            if let DiskChange::Write { offset, data } = change {
                self.count("changes of the shared disk again", 1);
                self.san.seen[(offset / BLOCK) as usize] = number(&data);
            }
        }
    }

    pub fn backup_pulse(&mut self) {
        self.send_to_primary(Frame::Heartbeat);
        let armed = self.s.b.core.takes_data();
        let mut heard = self.s.b.heard;
        if self.bug == Some(Bug::Impatient) {
            heard = heard.saturating_sub(ms(300));
        }
        self.backup_step(Event::Tick { heard });
        self.s.b.by_silence |= armed && !self.s.b.core.takes_data();
    }

    pub fn backup_receives(&mut self) {
        while self.s.b.alive && self.s.b.connected {
            let Some(got) = self.receive(Side::Backup) else {
                break;
            };
            self.s.b.heard = self.clock(Side::Backup);
            let heard = self.s.b.heard;
            let (mark, stamp, frame) = match got {
                Got::Frame { mark, stamp, frame } => (mark, stamp, frame),
                Got::End => {
                    let reason = "closed".into();
                    self.backup_step(Event::PeerLost { heard, reason });
                    break;
                }
                Got::Broken(reason) => {
                    self.s.b.by_silence |= self.s.b.core.takes_data();
                    self.backup_step(Event::PeerBroken { heard, reason });
                    break;
                }
            };
            self.s.b.echo = self.s.b.echo.max(stamp);
            self.s.b.mark = self.s.b.mark.max(mark);
            if !self.s.b.core.takes_data() {
                continue;
            }
            self.take(frame);
        }
        if let Some(at) = self.s.streams[0].due()
            && at > self.now
            && self.s.b.connected
        {
            self.at(at, Ev::Arrival(Side::Backup));
        }
    }

    fn take(&mut self, frame: Frame) {
        if self.s.b.fail_apply && matches!(frame, Frame::Pages { epoch: 0, .. } | Frame::Disk { epoch: 0, .. }) {
            return self.backup_step(Event::Leave("the backup cannot take a copy: disk full".into()));
        }
        let b = &mut self.s.b;
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
            Frame::Audit { epoch, sums } => b.staging.audit(epoch, sums),
            Frame::DiskAudit { epoch, sums } => b.staging.disk_audit(epoch, sums),
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
        match self.s.b.staging.end(marker) {
            Ok((bytes, flushes)) => {
                self.s.b.whole = marker.epoch;
                let durable = self.durable && (flushes || marker.epoch == 1);
                self.backup_step(Event::Staged {
                    epoch: marker.epoch,
                    bytes,
                    durable: durable && self.bug != Some(Bug::AckBeforeDurable),
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
        if self.s.b.staging.end(&marker).is_err() {
            let _ = self.s.b.staging.end(&EndMarker {
                epoch,
                state_len: 8,
                ..EndMarker::default()
            });
        }
        self.s.b.whole = epoch;
        self.backup_step(Event::Staged {
            epoch,
            bytes: 0,
            durable: false,
        });
    }
}
