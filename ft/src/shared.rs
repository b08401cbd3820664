//! Changes of shared disks that are held until their epoch is committed, and then until they are on the disk (R1, R3).
//!
//! Owned by the interposer, under its lock: a change gets its epoch, its place in the log and its place here in one step.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::machine::DiskChange;
use crate::overlay::{Overlay, Piece};

/// Bytes that a change costs beside its data.
const OVERHEAD: u64 = 128;

/// A held change.
#[derive(Debug, Clone)]
pub struct HeldChange {
    /// Rises by one from change to change, of all disks.
    pub number: u64,
    /// Its epoch.
    pub epoch: u64,
    /// Index of the disk.
    pub disk: u16,
    /// The change.
    pub change: Arc<DiskChange>,
}

impl HeldChange {
    fn size(&self) -> u64 {
        OVERHEAD
            + match &*self.change {
                DiskChange::Write { data, .. } => data.len() as u64,
                _ => 0,
            }
    }
}

/// All held changes.
#[derive(Debug, Default)]
pub(crate) struct HeldChanges {
    /// In the order in which the guest made them.
    queue: VecDeque<HeldChange>,
    overlays: BTreeMap<u16, Overlay>,
    next: u64,
    bytes: u64,
}

impl HeldChanges {
    pub(crate) fn hold(&mut self, epoch: u64, disk: u16, change: DiskChange) {
        let (number, change) = (self.next, Arc::new(change));
        self.next += 1;
        self.overlays.entry(disk).or_default().insert(number, &change);
        let held = HeldChange {
            number,
            epoch,
            disk,
            change,
        };
        self.bytes += held.size();
        self.queue.push_back(held);
    }

    pub(crate) fn read(&self, disk: u16, offset: u64, len: u64) -> Vec<Piece> {
        let overlay = self.overlays.get(&disk);
        overlay.map_or_else(Vec::new, |overlay| overlay.read(offset, len))
    }

    /// Those of all epochs up to `epoch`, in order; they stay held.
    pub(crate) fn until(&self, epoch: u64) -> Vec<HeldChange> {
        self.queue
            .iter()
            .take_while(|held| held.epoch <= epoch)
            .cloned()
            .collect()
    }

    /// Changes up to this number are on the disk.
    pub(crate) fn written(&mut self, number: u64) {
        while let Some(held) = self.queue.pop_front_if(|held| held.number <= number) {
            self.bytes -= held.size();
            if let Some(overlay) = self.overlays.get_mut(&held.disk) {
                overlay.remove(held.number, &held.change);
            }
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn clear(&mut self) {
        self.written(u64::MAX);
    }
}
