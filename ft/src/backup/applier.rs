//! The thread that owns the way into the shadow: it applies committed epochs in order, and activates the shadow.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::session::Session;
use crate::audit::{self, Place};
use crate::core::Nanos;
use crate::core::backup::{Compared, Event, MAX_REPAIRS};
use crate::core::staging::StagedEpoch;
use crate::machine::{DiskChange, MachineError, Output, PAGE_SIZE, Shadow, Takeover};
use crate::primary::session::lock;

/// What the applier is to do.
pub(super) enum Job {
    /// Write an epoch's pages and disk changes.
    Apply(u64, Box<StagedEpoch>),
    /// Become the VM as at the end of this epoch.
    Activate(u64),
    /// Throw the shadow away.
    Discard,
}

/// What activation needs of a whole epoch, beside pages and disk changes.
pub(super) struct Checkpoint {
    pub(super) epoch: u64,
    pub(super) state: Vec<u8>,
    pub(super) outputs: Vec<Output>,
    /// Changes of shared disks, in order.
    pub(super) shared: Vec<(u16, DiskChange)>,
    /// Bytes of outputs and changes.
    pub(super) kept: u64,
    /// When its end marker came.
    pub(super) came: Nanos,
    /// Its age then.
    pub(super) age: Nanos,
}

impl Checkpoint {
    /// Of the epoch that was staged at `came`, with its changes of shared disks.
    pub(super) fn new(epoch: u64, staged: &mut StagedEpoch, shared: Vec<(u16, DiskChange)>, came: Nanos) -> Self {
        let outputs = std::mem::take(&mut staged.outputs);
        let held = |output: &Output| match output {
            Output::Frame { data, .. } | Output::Console { data, .. } => data.len() as u64,
        };
        let change = |(_, change): &(u16, DiskChange)| match change {
            DiskChange::Write { data, .. } => ENTRY + data.len() as u64,
            _ => ENTRY,
        };
        Self {
            epoch,
            kept: outputs.iter().map(held).sum::<u64>() + shared.iter().map(change).sum::<u64>(),
            state: std::mem::take(&mut staged.state),
            outputs,
            shared,
            came,
            age: staged.age_ns,
        }
    }
}

/// What activation gets of them.
struct Taken {
    state: Vec<u8>,
    /// Since that state.
    age: Duration,
    outputs: Vec<Output>,
    shared: Vec<(u16, DiskChange)>,
}

/// Bytes that a small entry costs beside its data.
const ENTRY: u64 = 64;

/// Pause before the locks of shared disks are asked for again.
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Checkpoints that activation may need: the newest for its state, and those whose outputs may not have left.
#[derive(Default)]
pub(super) struct Checkpoints(VecDeque<Checkpoint>);

impl Checkpoints {
    /// A new whole epoch. Older ones lose their state; those whose outputs left (up to `released`) are forgotten.
    pub(super) fn push(&mut self, checkpoint: Checkpoint, released: u64) {
        while self.0.front().is_some_and(|old| old.epoch <= released) {
            self.0.pop_front();
        }
        for old in &mut self.0 {
            old.state = Vec::new();
        }
        self.0.retain(|old| !old.outputs.is_empty() || !old.shared.is_empty());
        self.0.push_back(checkpoint);
    }

    /// Bytes of what the primary may not have let go of.
    pub(super) fn kept_bytes(&self) -> u64 {
        self.0.iter().map(|checkpoint| checkpoint.kept).sum()
    }

    /// What a takeover at the end of `epoch` needs; outputs and changes after `released`.
    fn take(&mut self, epoch: u64, released: u64, now: Nanos) -> Option<Taken> {
        let (mut outputs, mut shared) = (Vec::new(), Vec::new());
        let mut found = None;
        for checkpoint in self.0.drain(..).filter(|c| c.epoch <= epoch) {
            if checkpoint.epoch > released {
                outputs.extend(checkpoint.outputs);
                shared.extend(checkpoint.shared);
            }
            if checkpoint.epoch == epoch {
                let age = checkpoint.age.saturating_add(now.saturating_sub(checkpoint.came));
                found = Some((checkpoint.state, Duration::from_nanos(age)));
            }
        }
        found.map(|(state, age)| Taken {
            state,
            age,
            outputs,
            shared,
        })
    }
}

fn apply(session: &Session, shadow: &mut dyn Shadow, epoch: u64, staged: &StagedEpoch) -> Result<(), MachineError> {
    for (runs, data) in &staged.pages {
        let mut at = 0;
        for run in runs {
            let len = run.count as usize * PAGE_SIZE;
            shadow.write_memory(run.gpa, &data[at..at + len])?;
            at += len;
        }
    }
    write_zeroes(shadow, &staged.zero)?;
    for (pages, data) in &staged.lines {
        let mut at = 0;
        for (address, len) in pages.iter().flat_map(|page| page.runs()) {
            shadow.write_memory(address, &data[at..at + len])?;
            at += len;
        }
    }
    for (disk, change) in &staged.disk {
        if session.on_disk() || *change != DiskChange::Flush {
            shadow.apply_disk(*disk, change)?;
        }
    }
    if epoch == 1 && session.on_disk() {
        let disks = session.hello.identity.disks.iter().enumerate();
        for (disk, _) in disks.filter(|(_, disk)| disk.is_replicated()) {
            shadow.apply_disk(disk as u16, &DiskChange::Flush)?;
        }
    }
    if epoch == 1 {
        shadow.synced(&session.id());
    }
    Ok(())
}

/// Compares the shadow with an epoch's checksums; the epoch is applied.
fn compare(session: &Session, shadow: &mut dyn Shadow, staged: &StagedEpoch) -> Result<Compared, MachineError> {
    let (pages, chunks) = (&staged.audit, &staged.disk_audit);
    let disks = &session.hello.identity.disks;
    let (wrong, right) = audit::compare(shadow, disks, pages, chunks)?;
    lock(&session.measures).audit.add(pages, chunks);
    for mismatch in wrong.iter().take(MAX_REPAIRS) {
        log::error!("ft: {}", audit::describe(std::slice::from_ref(mismatch), disks));
    }
    for mismatch in &wrong {
        if let Place::Chunk { disk, offset, len } = mismatch.place {
            shadow.doubt(disk, offset, len.into());
        }
    }
    let (what, anew) = (audit::describe(&wrong, disks), staged.anew);
    let right = if anew { right } else { Vec::new() };
    Ok(Compared {
        wrong,
        what,
        anew,
        right,
    })
}

const ZERO_PAGES: usize = 16;
static ZEROES: [u8; ZERO_PAGES * PAGE_SIZE] = [0; ZERO_PAGES * PAGE_SIZE];

/// Makes pages zero.
pub(super) fn write_zeroes(shadow: &mut dyn Shadow, runs: &[crate::machine::PageRun]) -> Result<(), MachineError> {
    for run in runs {
        let (mut gpa, mut left) = (run.gpa, run.count);
        while left > 0 {
            let count = left.min(ZERO_PAGES as u64);
            shadow.write_memory(gpa, &ZEROES[..count as usize * PAGE_SIZE])?;
            gpa += count * PAGE_SIZE as u64;
            left -= count;
        }
    }
    Ok(())
}

/// The thread's body; ends when the session drops its end of `jobs`, or the shadow is gone.
pub(super) fn run(session: &Arc<Session>, jobs: &crossbeam_channel::Receiver<Job>) {
    let mut broken = false;
    for job in jobs {
        match job {
            Job::Apply(..) if broken => {}
            Job::Apply(epoch, staged) => {
                let result = match lock(&session.shadow).as_deref_mut() {
                    Some(shadow) => {
                        apply(session, shadow, epoch, &staged).and_then(|()| compare(session, shadow, &staged))
                    }
                    None => return,
                };
                match result {
                    Ok(compared) => {
                        if compared != Compared::default() {
                            session.feed(Event::Compared(compared));
                        }
                        session.feed(Event::Applied { epoch });
                    }
                    Err(e) => {
                        broken = true;
                        session.feed(Event::ApplyFailed(e.to_string()));
                    }
                }
            }
            Job::Activate(epoch) => {
                let event = match activate(session, epoch) {
                    Ok(()) => Event::Activated,
                    Err(e) => Event::ActivationFailed(e.to_string()),
                };
                session.feed(event);
                return;
            }
            Job::Discard => break,
        }
    }
    if let Some(shadow) = lock(&session.shadow).take() {
        shadow.discard(session.closes_disks());
    }
}

fn activate(session: &Session, epoch: u64) -> Result<(), MachineError> {
    let missing = || MachineError(format!("the state of epoch {epoch} is missing"));
    let mut shadow = lock(&session.shadow).take().ok_or_else(missing)?;
    if let Err(e) = claim(session, shadow.as_mut()) {
        shadow.discard(false);
        return Err(e);
    }
    let inputs = lock(&session.staging).take_uncommitted_inputs(epoch);
    let taken = lock(&session.checkpoints).take(epoch, session.released(), session.clock.now());
    let Some(taken) = taken else {
        shadow.discard(false);
        return Err(missing());
    };
    log::info!(
        "ft: activating epoch {epoch}: {} inputs again, {} outputs, {} changes of shared disks",
        inputs.len(),
        taken.outputs.len(),
        taken.shared.len()
    );
    // Some may be there already, from the primary; the disk ends up the same (R3).
    for (disk, change) in &taken.shared {
        if let Err(e) = shadow.apply_disk(*disk, change) {
            shadow.discard(false);
            return Err(e);
        }
    }
    shadow
        .activate(Takeover {
            state: taken.state,
            elapsed: taken.age,
            outputs: taken.outputs,
            inputs,
        })
        .map(drop)
}

/// Takes the locks of shared disks. The primary may be stopped in the middle of a write that would come late (R4): until it
/// has ended, or learnt that it lost and given them back, nothing is written here.
fn claim(session: &Session, shadow: &mut dyn Shadow) -> Result<(), MachineError> {
    while let Some(who) = shadow.claim_disks()? {
        let mut waits = lock(&session.waits);
        if waits.as_ref() != Some(&who) {
            log::warn!("ft: {who}");
        }
        *waits = Some(who);
        drop(waits);
        if session.quits() {
            return Err(MachineError(
                "FT was shut down while it waited for the lock of a shared disk".into(),
            ));
        }
        std::thread::sleep(LOCK_PAUSE);
    }
    *lock(&session.waits) = None;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(epoch: u64, shared: bool) -> Checkpoint {
        let data = vec![epoch as u8];
        let mut staged = StagedEpoch::default();
        staged
            .outputs
            .extend(shared.then_some(Output::Console { console: 0, data }));
        (staged.state, staged.age_ns) = (vec![epoch as u8], 7);
        let changes = if shared {
            vec![(0, DiskChange::Flush)]
        } else {
            Vec::new()
        };
        Checkpoint::new(epoch, &mut staged, changes, epoch * 100)
    }

    #[test]
    fn what_a_primary_never_releases_is_counted_and_epochs_without_outputs_are_not_kept() {
        let mut checkpoints = Checkpoints::default();
        for epoch in 1..=100 {
            checkpoints.push(checkpoint(epoch, epoch % 10 == 0), 0);
        }
        assert_eq!((checkpoints.0.len(), checkpoints.kept_bytes()), (10, 10 * (1 + ENTRY)));
        checkpoints.push(checkpoint(101, true), 100);
        assert_eq!(checkpoints.kept_bytes(), 1 + ENTRY);
        assert!(checkpoints.take(101, 100, 0).is_some());
    }

    #[test]
    fn a_takeover_gets_the_last_state_and_the_outputs_that_may_not_have_left() {
        let mut checkpoints = Checkpoints::default();
        for epoch in 1..=4 {
            checkpoints.push(checkpoint(epoch, true), epoch.saturating_sub(3));
        }
        assert_eq!(checkpoints.0.iter().filter(|c| !c.state.is_empty()).count(), 1);
        let taken = checkpoints.take(4, 3, 450).unwrap();
        assert_eq!((taken.state, taken.age), (vec![4], Duration::from_nanos(57)));
        assert_eq!(taken.shared.len(), 1);
        assert_eq!(
            taken.outputs,
            [Output::Console {
                console: 0,
                data: vec![4]
            }]
        );
        assert!(checkpoints.take(4, 0, 0).is_none());
    }
}
