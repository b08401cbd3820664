//! Epochs on the backup, from their first frame until they are applied or dropped.
//!
//! Everything is checked before the epoch counts as whole: ranges against the VM's identity, numbers against the end
//! marker, sizes against the limits. What remains to go wrong when it is applied is the host's own hardware.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::audit::disk::{CHUNK, MAX_CHUNKS};
use crate::audit::{ChunkSum, PageSum, Place};
use crate::machine::{DiskChange, Identity, Input, Output, PAGE_SIZE, PageRun};
use crate::wire::frame::EndMarker;
use crate::wire::lines::PageLines;
use crate::wire::payload::Payload;

/// Largest saved state.
const MAX_STATE: u64 = 64 << 20;

/// Number of epochs that may be begun before the oldest of them is whole: up to 4 in flight ([`super::MAX_IN_FLIGHT`] is less),
/// one that repairs, and the running one.
pub(super) const MAX_AHEAD: u64 = 6;

/// A frame that cannot belong to this VM or this moment. The primary that sent it is dropped (R6).
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StagingError {
    /// The epoch is over already, or too far ahead.
    #[error("data of epoch {epoch} while epoch {expected} is expected")]
    Epoch {
        /// In the frame.
        epoch: u64,
        /// Expected.
        expected: u64,
    },
    /// Pages outside of RAM.
    #[error("{count} pages at {gpa:#x} are not in the VM's RAM")]
    Memory {
        /// Guest physical address.
        gpa: u64,
        /// Number of pages.
        count: u64,
    },
    /// A frame names pages again and again.
    #[error("a frame of {count} pages or more: the VM's RAM has fewer")]
    Repeated {
        /// Number of pages so far.
        count: u64,
    },
    /// A place outside of the disk, or on a disk that is not replicated.
    #[error("disk {disk}: {len} bytes at {offset}: no such place, or read-only")]
    Disk {
        /// Index of the disk.
        disk: u16,
        /// First byte.
        offset: u64,
        /// Length.
        len: u64,
    },
    /// No such device.
    #[error("there is no {what} {index}")]
    Device {
        /// Kind of device.
        what: &'static str,
        /// Its index.
        index: u16,
    },
    /// More than an epoch can have.
    #[error("epoch {epoch} has more {what} than the VM can make")]
    TooMuch {
        /// The epoch.
        epoch: u64,
        /// Of what.
        what: &'static str,
    },
    /// The end marker does not match what came.
    #[error("epoch {epoch} is not whole: {what} came {found} times, {expected} were sent")]
    NotWhole {
        /// The epoch.
        epoch: u64,
        /// Of what.
        what: &'static str,
        /// How many came.
        found: u64,
        /// How many were sent.
        expected: u64,
    },
}

/// Everything of one epoch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StagedEpoch {
    /// Pages with content.
    pub pages: Vec<(Vec<PageRun>, Payload)>,
    /// Zero pages.
    pub zero: Vec<PageRun>,
    /// Changed lines of pages.
    pub lines: Vec<(Vec<PageLines>, Payload)>,
    /// Changes of disks, in order.
    pub disk: Vec<(u16, DiskChange)>,
    /// Inputs, in order.
    pub inputs: Vec<Input>,
    /// Outputs that the primary holds, in order.
    pub outputs: Vec<Output>,
    /// Checksums that pages of the shadow must have when it is applied.
    pub audit: Vec<PageSum>,
    /// The same for pieces of its disks.
    pub disk_audit: Vec<ChunkSum>,
    /// They are of places that it sends anew, and of no others.
    pub anew: bool,
    /// The saved state at its end.
    pub state: Vec<u8>,
    /// Nanoseconds from the checkpoint to the sending of its end marker.
    pub age_ns: u64,
    flushes: bool,
    page_count: u64,
    zero_count: u64,
    line_count: u64,
    line_bytes: u64,
    output_count: u64,
    log_bytes: u64,
}

impl StagedEpoch {
    /// Bytes that it takes here.
    pub fn bytes(&self) -> u64 {
        self.page_count * PAGE_SIZE as u64 + self.line_bytes + self.log_bytes + self.state.len() as u64
    }
}

/// The staging area.
#[derive(Debug, Clone)]
pub struct Staging {
    memory: Vec<(u64, u64)>,
    /// Size of each disk; `None`: read-only.
    disks: Vec<Option<u64>>,
    shared: Vec<bool>,
    nics: u32,
    pages_limit: u64,
    log_limit: u64,
    epochs: BTreeMap<u64, StagedEpoch>,
    /// The last epoch that is whole.
    whole: u64,
}

/// Bytes that a small entry costs beside its data.
const ENTRY: u64 = 64;

impl Staging {
    /// For a VM; `log_limit` bounds the log and output bytes of an epoch.
    pub fn new(identity: &Identity, log_limit: u64) -> Self {
        Self {
            memory: identity.memory.clone(),
            disks: identity.disks.iter().map(|d| (!d.readonly).then_some(d.size)).collect(),
            shared: identity.disks.iter().map(|d| d.shared.is_some()).collect(),
            nics: identity.nics,
            pages_limit: identity.memory.iter().map(|(_, size)| size / PAGE_SIZE as u64).sum(),
            log_limit,
            epochs: BTreeMap::new(),
            whole: 0,
        }
    }

    /// Changes the bound of the log. It never falls: what is on its way was made under the old one.
    pub fn set_log_limit(&mut self, log_limit: u64) {
        self.log_limit = self.log_limit.max(log_limit);
    }

    /// The bound of the log.
    pub fn log_limit(&self) -> u64 {
        self.log_limit
    }

    /// Checks that pages are in RAM, and no more than RAM has: a small frame must not make the backup write for ever.
    pub fn check_pages(&self, runs: &[PageRun]) -> Result<(), StagingError> {
        let mut pages = 0;
        for run in runs {
            let (gpa, count) = (run.gpa, run.count);
            let len = count.checked_mul(PAGE_SIZE as u64);
            let end = len.and_then(|len| gpa.checked_add(len));
            let inside = |(start, size): &(u64, u64)| gpa >= *start && end.is_some_and(|end| end <= start + size);
            if count == 0 || gpa % PAGE_SIZE as u64 != 0 || !self.memory.iter().any(inside) {
                return Err(StagingError::Memory { gpa, count });
            }
            // Each run is within RAM, and there are not many of them in a frame: the sum fits.
            pages += count;
            if pages > self.pages_limit {
                return Err(StagingError::Repeated { count: pages });
            }
        }
        Ok(())
    }

    /// Checks that a change is within a disk that can be written.
    pub fn check_disk(&self, disk: u16, change: &DiskChange) -> Result<(), StagingError> {
        let (offset, len) = change.range();
        if matches!(change, DiskChange::Check { .. }) && !self.is_shared(disk) {
            return Err(StagingError::Disk { disk, offset, len });
        }
        self.check_range(disk, offset, len)
    }

    /// Checks that a place can be compared.
    pub fn check_place(&self, place: &Place) -> Result<(), StagingError> {
        match *place {
            Place::Page { gpa } => self.check_pages(&[PageRun { gpa, count: 1 }]),
            Place::Chunk { disk, offset, len } => {
                let len = u64::from(len);
                self.check_range(disk, offset, len)?;
                if (1..=CHUNK).contains(&len) {
                    Ok(())
                } else {
                    Err(StagingError::Disk { disk, offset, len })
                }
            }
        }
    }

    fn check_range(&self, disk: u16, offset: u64, len: u64) -> Result<(), StagingError> {
        let size = self.disks.get(usize::from(disk)).copied().flatten();
        match (size, offset.checked_add(len)) {
            (Some(size), Some(end)) if end <= size => Ok(()),
            _ => Err(StagingError::Disk { disk, offset, len }),
        }
    }

    /// Checks that a block of pre-copy is of a disk that is copied at all.
    pub fn check_copy(&self, disk: u16, block: &DiskChange) -> Result<(), StagingError> {
        let (offset, len) = block.range();
        match self.is_shared(disk) {
            true => Err(StagingError::Disk { disk, offset, len }),
            false => self.check_disk(disk, block),
        }
    }

    /// Both hosts see the disk.
    pub fn is_shared(&self, disk: u16) -> bool {
        self.shared.get(usize::from(disk)).copied().unwrap_or(false)
    }

    fn epoch(&mut self, epoch: u64) -> Result<&mut StagedEpoch, StagingError> {
        let expected = self.whole + 1;
        if epoch < expected || epoch > self.whole + MAX_AHEAD {
            return Err(StagingError::Epoch { epoch, expected });
        }
        Ok(self.epochs.entry(epoch).or_default())
    }

    /// Counts pages by means of `counter`.
    fn count_pages(
        &mut self,
        epoch: u64,
        count: u64,
        counter: impl FnOnce(&mut StagedEpoch) -> &mut u64,
    ) -> Result<&mut StagedEpoch, StagingError> {
        let limit = self.pages_limit;
        let staged = self.epoch(epoch)?;
        let counted = counter(staged);
        *counted = counted.saturating_add(count);
        let all = staged.zero_count.saturating_add(staged.page_count);
        if all.saturating_add(staged.line_count) > limit {
            return Err(StagingError::TooMuch { epoch, what: "pages" });
        }
        Ok(staged)
    }

    fn count_log(&mut self, epoch: u64, bytes: usize) -> Result<&mut StagedEpoch, StagingError> {
        let limit = self.log_limit;
        let staged = self.epoch(epoch)?;
        staged.log_bytes += bytes as u64 + ENTRY;
        if staged.log_bytes > limit {
            return Err(StagingError::TooMuch { epoch, what: "log" });
        }
        Ok(staged)
    }

    /// Pages with content.
    pub fn pages(&mut self, epoch: u64, runs: Vec<PageRun>, data: Payload) -> Result<(), StagingError> {
        self.check_pages(&runs)?;
        let count = runs.iter().map(|run| run.count).sum();
        let staged = self.count_pages(epoch, count, |staged| &mut staged.page_count)?;
        staged.pages.push((runs, data));
        Ok(())
    }

    /// Zero pages.
    pub fn zero_pages(&mut self, epoch: u64, runs: &[PageRun]) -> Result<(), StagingError> {
        self.check_pages(runs)?;
        let count = runs.iter().map(|run| run.count).sum();
        let staged = self.count_pages(epoch, count, |staged| &mut staged.zero_count)?;
        staged.zero.extend_from_slice(runs);
        Ok(())
    }

    /// Changed lines of pages.
    pub fn lines(&mut self, epoch: u64, pages: Vec<PageLines>, data: Payload) -> Result<(), StagingError> {
        for PageLines { gpa, .. } in &pages {
            self.check_pages(&[PageRun { gpa: *gpa, count: 1 }])?;
        }
        let staged = self.count_pages(epoch, pages.len() as u64, |staged| &mut staged.line_count)?;
        staged.line_bytes += data.len() as u64;
        staged.lines.push((pages, data));
        Ok(())
    }

    /// A change of a disk.
    pub fn disk(&mut self, epoch: u64, disk: u16, change: DiskChange) -> Result<(), StagingError> {
        self.check_disk(disk, &change)?;
        let bytes = if let DiskChange::Write { data, .. } = &change {
            data.len()
        } else {
            0
        };
        let staged = self.count_log(epoch, bytes)?;
        staged.flushes |= change == DiskChange::Flush;
        staged.disk.push((disk, change));
        Ok(())
    }

    fn check_nic(&self, index: u16) -> Result<(), StagingError> {
        if u32::from(index) < self.nics {
            Ok(())
        } else {
            Err(StagingError::Device {
                what: "network device",
                index,
            })
        }
    }

    /// An input.
    pub fn input(&mut self, epoch: u64, input: Input) -> Result<(), StagingError> {
        let Input::Frame { nic, data } = &input;
        self.check_nic(*nic)?;
        self.count_log(epoch, data.len())?.inputs.push(input);
        Ok(())
    }

    /// Outputs that the primary holds.
    pub fn outputs(&mut self, epoch: u64, outputs: Vec<Output>) -> Result<(), StagingError> {
        for output in &outputs {
            let bytes = match output {
                Output::Frame { nic, data } => {
                    self.check_nic(*nic)?;
                    data.len()
                }
                Output::Console { data, .. } => data.len(),
            };
            self.count_log(epoch, bytes)?.output_count += 1;
        }
        self.epoch(epoch)?.outputs.extend(outputs);
        Ok(())
    }

    /// Checksums of pages.
    pub fn audit(&mut self, epoch: u64, sums: Vec<PageSum>) -> Result<(), StagingError> {
        for sum in &sums {
            self.check_place(&Place::Page { gpa: sum.gpa })?;
        }
        let limit = self.pages_limit;
        let staged = self.epoch(epoch)?;
        if (staged.audit.len() + sums.len()) as u64 > limit {
            let what = "audited pages";
            return Err(StagingError::TooMuch { epoch, what });
        }
        staged.audit.extend(sums);
        Ok(())
    }

    /// Checksums of pieces of disks.
    pub fn disk_audit(&mut self, epoch: u64, sums: Vec<ChunkSum>) -> Result<(), StagingError> {
        for sum in &sums {
            let ChunkSum { disk, offset, len, .. } = *sum;
            self.check_place(&Place::Chunk { disk, offset, len })?;
        }
        let staged = self.epoch(epoch)?;
        if staged.disk_audit.len() + sums.len() > MAX_CHUNKS {
            let what = "audited pieces of disks";
            return Err(StagingError::TooMuch { epoch, what });
        }
        staged.disk_audit.extend(sums);
        Ok(())
    }

    /// A piece of the saved state.
    pub fn state(&mut self, epoch: u64, data: &[u8]) -> Result<(), StagingError> {
        let staged = self.epoch(epoch)?;
        if staged.state.len() as u64 + data.len() as u64 > MAX_STATE {
            return Err(StagingError::TooMuch { epoch, what: "state" });
        }
        staged.state.extend_from_slice(data);
        Ok(())
    }

    /// The epoch is said to be complete. Returns its size, and whether the guest flushed a disk in it.
    pub fn end(&mut self, marker: &EndMarker) -> Result<(u64, bool), StagingError> {
        let epoch = marker.epoch;
        if epoch != self.whole + 1 {
            return Err(StagingError::Epoch {
                epoch,
                expected: self.whole + 1,
            });
        }
        let staged = self.epoch(epoch)?;
        for (what, found, expected) in [
            ("pages", staged.page_count, marker.pages),
            ("zero pages", staged.zero_count, marker.zero_pages),
            ("pages of changed lines", staged.line_count, marker.line_pages),
            ("disk changes", staged.disk.len() as u64, marker.disk),
            ("inputs", staged.inputs.len() as u64, marker.inputs),
            ("outputs", staged.output_count, marker.outputs),
            ("audited pages", staged.audit.len() as u64, marker.audited),
            (
                "audited pieces of disks",
                staged.disk_audit.len() as u64,
                marker.audited_chunks,
            ),
            ("state bytes", staged.state.len() as u64, marker.state_len),
        ] {
            if found != expected {
                return Err(StagingError::NotWhole {
                    epoch,
                    what,
                    found,
                    expected,
                });
            }
        }
        (staged.age_ns, staged.anew) = (marker.age_ns, marker.anew);
        let whole = (staged.bytes(), staged.flushes);
        self.whole = epoch;
        Ok(whole)
    }

    /// The last epoch that is whole.
    pub fn whole(&self) -> u64 {
        self.whole
    }

    /// Takes a whole epoch out.
    pub fn take(&mut self, epoch: u64) -> Option<StagedEpoch> {
        if epoch > self.whole {
            None
        } else {
            self.epochs.remove(&epoch)
        }
    }

    /// Takes the changes of shared disks out of an epoch that was taken.
    pub fn take_shared(&self, staged: &mut StagedEpoch) -> Vec<(u16, DiskChange)> {
        let change = |(disk, change): &mut (u16, DiskChange)| {
            self.is_shared(*disk) && !matches!(change, DiskChange::Check { .. })
        };
        staged.disk.extract_if(.., change).collect()
    }

    /// The inputs of all epochs after `epoch`, in order: to be given to the guest again (R8). Everything else of them
    /// never happened.
    pub fn take_uncommitted_inputs(&mut self, epoch: u64) -> Vec<Input> {
        let later = self.epochs.split_off(&(epoch + 1));
        later.into_values().flat_map(|staged| staged.inputs).collect()
    }
}
