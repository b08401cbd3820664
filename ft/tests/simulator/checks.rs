//! The rules.

use ft::config::FtState;

use crate::world::{Side, World, index};

impl World {
    /// R1: the backup must have everything of the output's epoch. R4: nobody else runs the VM (but for outputs that a
    /// connection's end overtook: they are in the other's state, and are the same frames that it sends again).
    pub fn check_release(&mut self, epoch: u64, id: u64) {
        if self.b.whole < epoch {
            self.violated(
                "R1",
                format!(
                    "output {id} of epoch {epoch} left, the backup has epoch {}",
                    self.b.whole
                ),
            );
        }
        if self.b.live && self.b.by_silence {
            self.violated(
                "R4",
                format!("output {id} left from the primary after the backup took over by silence"),
            );
        }
    }

    pub fn outsiders_see(&mut self, side: Side, id: u64) {
        if side == Side::Primary && self.p.alone && self.b.live {
            self.violated("R4", format!("output {id}: both run the VM"));
        }
        self.seen.push((side, id));
    }

    /// The primary goes on without FT.
    pub fn goes_alone(&mut self) {
        self.p.alone = true;
        let won = self.arbiter.winners.values().next_back() == Some(&index(Side::Primary));
        let word = self.b.out && !self.b.live;
        if !won && !word {
            self.violated(
                "R4",
                "the primary goes on alone without a win or the backup's word".into(),
            );
        }
        if self.b.live {
            self.violated("R4", "the primary goes on alone while the backup runs the VM".into());
        }
    }

    /// The backup becomes the VM.
    pub fn check_takeover(&mut self, epoch: u64, inputs: &[u64], again: &[u64]) {
        if self.arbiter.winners.get(&1) != Some(&index(Side::Backup)) {
            self.violated("R4", "the backup becomes the VM without a win".into());
        }
        if self.p.alone || self.b.out {
            self.violated(
                "R4",
                "the backup becomes the VM although the primary goes on alone".into(),
            );
        }
        let Some(expected) = self.p.history.get(&epoch).cloned() else {
            return self.violated("R2", format!("takeover at epoch {epoch}, which never ended"));
        };
        let shadow = self.b.shadow.clone();
        if shadow.disk != expected.disk {
            self.violated(
                "R3",
                format!(
                    "disk {:x?}, at checkpoint {epoch} it was {:x?}",
                    shadow.disk, expected.disk
                ),
            );
        }
        if (shadow.ram, shadow.state) != (expected.ram, expected.state) {
            self.violated(
                "R2",
                format!("takeover at epoch {epoch}: another state than at its checkpoint"),
            );
        }
        let came: Vec<u64> = self
            .b
            .inputs
            .iter()
            .filter(|(e, _)| *e > epoch)
            .map(|(_, value)| *value)
            .collect();
        let logged: Vec<u64> = self
            .p
            .inputs
            .iter()
            .filter(|(e, _)| *e > epoch)
            .map(|(_, value)| *value)
            .collect();
        if inputs != came || !logged.starts_with(inputs) {
            self.violated(
                "R8",
                format!("given again {inputs:x?}, came {came:x?}, logged {logged:x?}"),
            );
        }
        self.check_outputs(epoch, again);
    }

    /// Everything that left came from epochs that the new VM remembers, and what it remembers has left or leaves now,
    /// in order.
    fn check_outputs(&mut self, epoch: u64, again: &[u64]) {
        let mut all: Vec<u64> = self.seen.iter().map(|(_, id)| *id).collect();
        let from_primary = all.len() as u64;
        if !all.iter().copied().eq(1..=from_primary) {
            self.violated("R1", format!("outputs left out of order: {all:?}"));
        }
        all.extend(again);
        let committed: Vec<u64> = self
            .output_epoch
            .iter()
            .filter(|(_, e)| **e <= epoch)
            .map(|(id, _)| *id)
            .collect();
        if let Some(id) = committed.iter().find(|id| !all.contains(id)) {
            self.violated("R1", format!("output {id} of a committed epoch is lost"));
        }
        if let Some(id) = all.iter().find(|id| !committed.contains(id)) {
            self.violated(
                "R1",
                format!("output {id} was seen, the VM that goes on knows nothing of it"),
            );
        }
        if !again.is_sorted() {
            self.violated("R1", format!("outputs leave out of order: {again:?}"));
        }
    }

    /// Everything healed long ago.
    pub fn check_end(&mut self) {
        // A protected VM may just be standing still for a checkpoint.
        let at_work = matches!(self.ends().0, FtState::Protected | FtState::Syncing) && !self.p.core.hands_over();
        let primary = self.p.alive && !self.p.stopped && (at_work || (self.p.alone && !self.p.paused));
        let backup = self.b.live && self.b.alive;
        if primary && backup {
            self.violated("R4", "both run the VM".into());
        }
        // The only one who may run the VM has no disk to run it on.
        let broken = self.b.fail_apply && self.arbiter.winners.get(&1) == Some(&index(Side::Backup));
        if !primary && !backup && !self.excused && !broken {
            let ends = self.ends();
            self.violated("liveness", format!("nobody runs the VM, the states are {ends:?}"));
        }
        if primary && self.p.alone && !self.p.held.is_empty() {
            self.violated("liveness", "the primary runs alone and holds outputs".into());
        }
        if primary {
            let ids: Vec<u64> = self.seen.iter().map(|(_, id)| *id).collect();
            if !ids.iter().copied().eq(1..=ids.len() as u64) {
                self.violated("R1", format!("outputs left out of order: {ids:?}"));
            }
        }
    }
}
