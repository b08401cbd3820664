//! The rules.

use ft::config::FtState;

use crate::world::{Side, World};

impl World {
    /// R1: the backup must have everything of the output's epoch. R4: nobody else runs the VM (but for outputs that a
    /// connection's end overtook: they are in the other's state, and are the same frames that it sends again).
    pub fn check_release(&mut self, epoch: u64, id: u64) {
        let whole = self.s.b.whole;
        if whole < epoch {
            self.violated(
                "R1",
                format!("output {id} of epoch {epoch} left, the backup has epoch {whole}"),
            );
        }
        if self.s.b.live && self.s.b.by_silence {
            self.violated(
                "R4",
                format!("output {id} left from the primary after the backup took over by silence"),
            );
        }
        if self.durable {
            self.check_durable(id);
        }
    }

    /// The primary's write reaches the shared disk.
    pub fn check_write(&mut self, epoch: u64) {
        let whole = self.s.b.whole;
        if whole < epoch {
            let what = format!("a write of epoch {epoch} reached the shared disk, the backup has epoch {whole}");
            self.violated("R1", what);
        }
        if self.s.b.live || self.s.b.locked {
            self.violated("R4", format!("a late write of epoch {epoch} reached the shared disk"));
        }
    }

    /// R5: from now on outsiders know of the flushes before this output. If both hosts lost their power now, the backup's
    /// disk would have to have every write before them, or a later one in its place.
    fn check_durable(&mut self, id: u64) {
        let flushes = self.s.made.get(&id).map_or(0, |made| made.flushes);
        let Some(flushed) = flushes.checked_sub(1).map(|last| self.s.p.flushed[last]) else {
            return;
        };
        self.count("flushes that outsiders learnt of", 1);
        let disks = [self.s.b.platter, self.san.flushed];
        for (flushed, disk) in flushed.into_iter().zip(disks) {
            let there = disk.map(|value| self.s.p.writes.get(&value).copied().unwrap_or(0));
            if there.iter().zip(flushed).any(|(there, flushed)| *there < flushed) {
                let needs = format!("flush {flushes} needs writes {flushed:?}, the disk has {there:?}");
                self.violated("R5", format!("output {id} left, {needs}"));
            }
        }
    }

    /// An output leaves the primary.
    pub fn outsiders_see(&mut self, id: u64) {
        if self.s.p.alone && self.s.b.live {
            self.violated("R4", format!("output {id}: both run the VM"));
        }
        self.s.seen.push(id);
    }

    /// The primary goes on without FT.
    pub fn goes_alone(&mut self) {
        self.s.p.alone = true;
        let won = self.winners.values().next_back() == Some(&self.node(Side::Primary));
        let word = self.s.b.out && !self.s.b.live;
        if !won && !word {
            self.violated(
                "R4",
                "the primary goes on alone without a win or the backup's word".into(),
            );
        }
        if self.s.b.live {
            self.violated("R4", "the primary goes on alone while the backup runs the VM".into());
        }
    }

    /// The backup becomes the VM.
    pub fn check_takeover(&mut self, epoch: u64, inputs: &[u64], again: &[u64]) {
        if self.winners.get(&(self.s.base + 1)) != Some(&self.node(Side::Backup)) {
            self.violated("R4", "the backup becomes the VM without a win".into());
        }
        if self.s.p.alone || self.s.b.out {
            self.violated(
                "R4",
                "the backup becomes the VM although the primary goes on alone".into(),
            );
        }
        let committed = self.s.p.core.status().committed;
        if epoch < committed {
            self.violated(
                "R2",
                format!("takeover at epoch {epoch}, epoch {committed} was committed"),
            );
        }
        let Some(expected) = self.s.p.history.get(&epoch).cloned() else {
            return self.violated("R2", format!("takeover at epoch {epoch}, which never ended"));
        };
        let shadow = self.s.b.shadow.clone();
        if shadow.disk != expected.disk {
            self.violated(
                "R3",
                format!(
                    "disk {:x?}, at checkpoint {epoch} it was {:x?}",
                    shadow.disk, expected.disk
                ),
            );
        }
        if self.shared && shadow.shared != expected.shared {
            let (is, was) = (shadow.shared, expected.shared);
            self.violated(
                "R3",
                format!("shared disk {is:x?}, at checkpoint {epoch} it was {was:x?}"),
            );
        }
        if (shadow.ram, shadow.state) != (expected.ram, expected.state) {
            self.violated(
                "R2",
                format!("takeover at epoch {epoch}: another state than at its checkpoint"),
            );
        }
        let came: Vec<u64> = self
            .s
            .b
            .inputs
            .iter()
            .filter(|(e, _)| *e > epoch)
            .map(|(_, value)| *value)
            .collect();
        let logged: Vec<u64> = self
            .s
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
        self.check_order();
        let mut all = self.s.seen.clone();
        all.extend(again);
        let committed: Vec<u64> = self
            .s
            .made
            .iter()
            .filter(|(_, made)| made.epoch <= epoch)
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

    fn check_order(&mut self) {
        let first = self.s.before + 1;
        if !self.s.seen.iter().copied().eq(first..first + self.s.seen.len() as u64) {
            self.violated("R1", format!("outputs left out of order: {:?}", self.s.seen));
        }
    }

    /// Everything healed long ago: of all who ever held the VM exactly one runs it.
    pub fn check_end(&mut self) {
        let mut running = 0;
        for number in 0..self.sessions() {
            self.enter(number);
            let (primary, backup) = self.who_runs();
            running += u32::from(primary) + u32::from(backup);
            if primary {
                self.check_order();
            }
            if primary && self.s.p.alone && (!self.s.p.held.is_empty() || self.s.p.paused) {
                self.violated(
                    "liveness",
                    "the primary runs alone, and is paused or holds outputs".into(),
                );
            }
            if primary
                && self.s.p.alone
                && self.shared
                && (!self.s.p.writer.locked || self.s.p.guest.shared != self.san.seen)
            {
                self.violated(
                    "R3",
                    "the primary runs alone, and the shared disk is not its guest's".into(),
                );
            }
            if let Some(why) = self.still_waits() {
                self.violated("liveness", why);
            }
            if !primary && !backup && self.is_newest() {
                self.check_stop();
            }
        }
        if running > 1 {
            self.violated("R4", format!("{running} run the VM"));
        }
    }

    fn who_runs(&self) -> (bool, bool) {
        // A protected VM may just be standing still for a checkpoint.
        let at_work = matches!(self.ends().0, FtState::Protected | FtState::Syncing) && !self.s.p.core.hands_over();
        let primary = self.s.p.alive && !self.s.p.stopped && (at_work || self.s.p.alone);
        (primary, self.s.b.live && self.s.b.alive)
    }

    /// The arbiter answers and everything that could be noticed was: nobody waits any more.
    fn still_waits(&self) -> Option<String> {
        let (primary, backup) = self.ends();
        if self.s.p.alive && !self.s.p.core.is_over() && (primary != FtState::Protected || self.s.p.core.hands_over()) {
            return Some(format!("the primary still is {primary:?}"));
        }
        let pair = self.s.p.alive && primary == FtState::Protected;
        // Not armed, it waits for nothing that matters to the VM.
        (self.s.b.alive && self.s.b.core.is_armed() && !pair).then(|| format!("the backup still is {backup:?}"))
    }

    /// Nobody runs the VM: was there really nobody who could have gone on, as far as the protocol can know?
    fn check_stop(&mut self) {
        let winner = self.winners.get(&(self.s.base + 1)).copied();
        let backup_won = winner == Some(self.node(Side::Backup));
        let cannot = !self.s.b.alive || self.s.b.fail_activation;
        let why = if self.s.p.alive {
            // It stopped because the backup won, which then crashed or could not make the VM run, and could not say so.
            backup_won && cannot && !self.s.p.told
        } else {
            // It crashed, and its backup did too, cannot go on, had lost to it, was released or not armed yet.
            let lost = winner == Some(self.node(Side::Primary));
            let never_armed = self.s.b.whole == 0;
            cannot || self.s.b.out || lost || never_armed || self.s.b.fail_apply
        };
        if !why {
            let ends = self.ends();
            self.violated("liveness", format!("nobody runs the VM, the states are {ends:?}"));
        }
        self.count("nobody could go on", 1);
    }
}
