//! Places of the shadow that the backup found wrong are sent anew (R6).
//!
//! The receiver notes them; the controller takes them at the next checkpoint, while the VM stands still. A piece of a disk
//! goes into the log as a write of what is there, so it has its place in the order of the guest's own writes (R3).

use std::sync::Mutex;

use super::controller::Controller;
use super::session::{Session, lock};
use crate::audit::{self, ChunkSum, Mismatch, PageSum, Place};
use crate::config::FtAudit;
use crate::core::backup::MAX_REPAIRS;
use crate::core::primary::FromBackup;
use crate::core::staging::Staging;
use crate::machine::{DiskChange, MachineError, PAGE_SIZE, PageRun};

/// What is to be sent anew.
#[derive(Debug, Default)]
pub(super) struct Repairs(Mutex<Vec<Place>>);

/// What was put into an epoch, with its checksums.
#[derive(Debug, Default)]
pub(super) struct Anew {
    pub(super) pages: Vec<PageSum>,
    pub(super) chunks: Vec<ChunkSum>,
}

impl Anew {
    /// Number of places.
    pub(super) fn places(&self) -> u64 {
        (self.pages.len() + self.chunks.len()) as u64
    }
}

impl Session {
    /// The backup names places that are wrong; an error: they make no sense.
    pub(super) fn note_mismatch(&self, wrong: &[Mismatch]) -> Result<FromBackup, String> {
        if self.audit != FtAudit::Repair {
            return Err("the backup wants places sent anew, which is not its task".into());
        }
        let known = Staging::new(&self.identity, 0);
        let what = audit::describe(wrong, &self.identity.disks);
        let places: Vec<Place> = wrong.iter().map(|mismatch| mismatch.place).collect();
        for place in &places {
            let wrong = |e| format!("the backup names a place that the VM does not have: {e}");
            known.check_place(place).map_err(wrong)?;
        }
        let mut queue = lock(&self.repairs.0);
        if queue.len() + places.len() > MAX_REPAIRS {
            return Err("the backup wants more sent anew than it may".into());
        }
        queue.extend(&places);
        drop(queue);
        for mismatch in wrong {
            let one = std::slice::from_ref(mismatch);
            log::error!("ft: on the backup: {}", audit::describe(one, &self.identity.disks));
        }
        lock(&self.metrics).mismatches(places.len() as u64);
        let count = places.len() as u64;
        Ok(FromBackup::Mismatch { places: count, what })
    }
}

impl Controller {
    /// Puts what is to be sent anew into the epoch that ends, with the VM still.
    pub(super) fn send_anew(&mut self) -> Result<Anew, MachineError> {
        let session = self.session.clone();
        let machine = &session.machine;
        let mut anew = Anew::default();
        for place in std::mem::take(&mut *lock(&session.repairs.0)) {
            match place {
                Place::Page { gpa } => {
                    // Whole, whatever the backup is said to have.
                    self.encoder.sent.forget(gpa);
                    let mut crc = 0;
                    self.stage.copy(&[PageRun { gpa, count: 1 }], |gpa, to: &mut [u8]| {
                        machine.read_memory(gpa, to)?;
                        crc = crc32c::crc32c(&to[..PAGE_SIZE]);
                        Ok::<(), MachineError>(())
                    })?;
                    anew.pages.push(PageSum { gpa, crc });
                }
                Place::Chunk { disk, offset, len } => {
                    let mut data = vec![0; len as usize];
                    machine.read_disk(disk, offset, &mut data)?;
                    let crc = crc32c::crc32c(&data);
                    session.interposer.log_disk(disk, DiskChange::Write { offset, data });
                    anew.chunks.push(ChunkSum { disk, offset, len, crc });
                }
            }
        }
        Ok(anew)
    }
}
