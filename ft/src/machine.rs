//! The machine, as FT sees it.
//!
//! The VMM implements [`Protected`] (the running VM on the primary), [`ShadowHost`] and [`Shadow`] (the VM's shadow on
//! the backup). FT implements the holding and logging of outputs and inputs ([`crate::interposer::Interposer`]), which
//! the VMM's device workers call.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::copies::{CopyClaim, Divergence, SessionId};
use crate::interposer::Interposer;
use crate::wire::payload::Payload;

/// Guest page size in bytes.
pub const PAGE_SIZE: usize = 4096;

/// What must be equal on both sides, and what the backup builds its shadow from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Stable id of the VM (also names it in the arbiter).
    pub vm_id: String,
    /// Version of the VMM, and of its saved-state format.
    pub vmm_version: String,
    /// VmConfig as JSON; FT does not look into it.
    pub config: String,
    /// Guest RAM: (guest physical address, size in bytes), ascending.
    pub memory: Vec<(u64, u64)>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest-visible CPU features, one name per feature word (for example `leaf 0x7.0 ebx` -> value), ascending.
    pub cpu_features: Vec<(String, u32)>,
    /// Guest TSC frequency in kHz.
    pub tsc_khz: u32,
    /// Disks in the order of their indexes.
    pub disks: Vec<DiskIdentity>,
    /// Number of network devices.
    pub nics: u32,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskIdentity {
    /// Device id, for example `_disk0`.
    pub id: String,
    /// Size in bytes.
    pub size: u64,
    /// The guest cannot write it: it is not copied, the backup must have it already (same size).
    pub readonly: bool,
    /// Both hosts see the same file or device. Otherwise, if it can be written, each has a copy of its own.
    pub shared: Option<SharedDisk>,
}

impl DiskIdentity {
    /// Each host has a copy of its own, kept equal by FT.
    pub fn is_replicated(&self) -> bool {
        !self.readonly && self.shared.is_none()
    }
}

/// How the backup finds out that a shared disk is the primary's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedDisk {
    /// A byte far beyond the disk's end, chosen at random, that the primary's lock of the whole file leaves out: the
    /// backup must find exactly this byte free. `None`: locks of this disk do not reach other hosts.
    pub lock_gap: Option<u64>,
}

/// A failed call into the machine.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct MachineError(pub String);

/// Pages of guest RAM: `count` pages from guest physical address `gpa` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// Guest physical address of the first page.
    pub gpa: u64,
    /// Number of pages.
    pub count: u64,
}

impl PageRun {
    /// The address behind its last page.
    pub(crate) fn end(&self) -> u64 {
        self.gpa + self.count * PAGE_SIZE as u64
    }

    /// The address of each of its pages.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = u64> + use<> {
        (self.gpa..self.end()).step_by(PAGE_SIZE)
    }
}

/// An output that may leave the VM once its epoch is committed (rule R1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Output {
    /// A frame with its vnet header.
    Frame {
        /// Index of the network device.
        nic: u16,
        /// The frame.
        data: Vec<u8>,
    },
    /// Console bytes.
    Console {
        /// Index of the console (0: serial, 1: virtio-console).
        console: u16,
        /// The bytes.
        data: Vec<u8>,
    },
}

/// An input that the guest of the primary was given, kept for the resumed guest (rule R8).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A received frame with its vnet header.
    Frame {
        /// Index of the network device.
        nic: u16,
        /// The frame.
        data: Payload,
    },
}

/// A change of a disk (rule R3), in the order in which the guest's requests were started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskChange {
    /// Bytes written.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes.
        data: Vec<u8>,
    },
    /// The range reads as zeroes.
    Zero {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The backing store may be given back.
        unmap: bool,
    },
    /// A flush that the guest asked for. A shadow is told of it only where flushes must reach its disk (R5).
    Flush,
    /// No change: what is there must have this CRC-32C, or the two sides do not see the same shared disk.
    Check {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The checksum.
        crc: u32,
    },
}

/// Checksum (CRC-32C) of a disk's bytes, for [`DiskChange::Check`].
pub fn checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
}

impl DiskChange {
    /// (first byte, length) of the bytes that it is about.
    pub fn range(&self) -> (u64, u64) {
        match self {
            Self::Write { offset, data } => (*offset, data.len() as u64),
            Self::Zero { offset, len, .. } | Self::Check { offset, len, .. } => (*offset, *len),
            Self::Flush => (0, 0),
        }
    }
}

/// A state that was saved, but not encoded yet: that can wait until the VM runs again.
pub type SavedState = Box<dyn FnOnce() -> Result<Vec<u8>, MachineError> + Send>;

/// The running VM. Methods may be called from FT's own threads; `pause`..`resume` pairs never nest.
pub trait Protected: Send + Sync {
    /// What the backup needs to build the shadow.
    fn identity(&self) -> Result<Identity, MachineError>;
    /// Starts logging of dirty pages and dirty disk blocks (both complete from here on).
    fn start_tracking(&self) -> Result<(), MachineError>;
    /// Ends it.
    fn stop_tracking(&self);
    /// Appends the runs of pages written since the last call (vCPUs' and the VMM's own writes), ascending, and clears
    /// the log. Without `hot`, hot pages are left to the next call with it. May be called while the VM runs or is paused.
    fn harvest_dirty(&self, hot: bool, out: &mut Vec<PageRun>) -> Result<(), MachineError>;
    /// Up to `most` pages that are written all the time may be hot (those that are stay): reported by every harvest with
    /// `hot`, written or not. The pages `cold` are not written any more: they are to be reported when they are. Only while
    /// paused, before the harvest. How many are hot.
    fn hot_pages(&self, _most: usize, _cold: &[u64]) -> Result<u64, MachineError> {
        Ok(0)
    }
    /// Copies guest RAM; `buf.len()` bytes from `gpa` on.
    fn read_memory(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MachineError>;
    /// Copies bytes of a disk as the guest sees it; may be called while the VM runs (pre-copy, audit) or is paused, from
    /// several threads at once. What a request under way changes may be read as it was or as it will be.
    fn read_disk(&self, disk: u16, offset: u64, buf: &mut [u8]) -> Result<(), MachineError>;
    /// Appends the (offset, length) ranges of a disk that were changed since the last call, ascending, and clears them.
    /// While an interposer is attached no blocks are tracked: it logs the changes themselves.
    fn harvest_dirty_blocks(&self, disk: u16, out: &mut Vec<(u64, u64)>) -> Result<(), MachineError>;
    /// Gets every vCPU out of the guest and every device worker to a request boundary. With `hurry` vCPUs go before other
    /// threads of the host at once, else only when they are late. Whether one was: because it waited for a processor.
    fn pause(&self, hurry: bool) -> Result<bool, MachineError>;
    /// Complete state but for RAM and disks: vCPUs, interrupt controllers, clocks, devices. Only while paused.
    fn save_state(&self) -> Result<SavedState, MachineError>;
    /// Lets the guest run on.
    fn resume(&self) -> Result<(), MachineError>;
    /// Puts the interposer between the devices and their backends. Only while paused. What the disks are now is what this
    /// session begins with: from here on blocks are remembered that the backup may not have (see [`crate::copies`]).
    fn attach(&self, interposer: Arc<Interposer>, session: &SessionId) -> Result<(), MachineError>;
    /// Takes it away again. Only while paused. Changed blocks are remembered further on.
    fn detach(&self) -> Result<(), MachineError>;
    /// What is known of the copy of a disk that the last peer has. May be called while the VM runs: what is changed later
    /// is in [`Protected::harvest_dirty_blocks`], if that was begun before.
    fn divergence(&self, disk: u16) -> Option<Divergence>;
    /// The peer's copy of a disk turned out to be something else than it claims.
    fn refute(&self, disk: u16);
    /// The backup has applied all epochs up to `applied`; `running` is the running one.
    fn confirm(&self, applied: u64, running: u64);
    /// Lets outputs leave, in this order. Called by FT when their epoch is committed, or when the VM goes solo.
    fn release(&self, outputs: Vec<Output>);
    /// Carries out a change of a shared disk and waits for it. May be done again after an error.
    fn write_shared(&self, disk: u16, change: &DiskChange) -> Result<(), MachineError>;
    /// Gives the locks of shared disks back: from here on this side does not write them.
    fn yield_disks(&self);
    /// Takes them again. `Some`: another process has one, and which.
    fn claim_disks(&self) -> Result<Option<String>, MachineError>;
    /// Lets the guest run only this share of the time, 1 to 100 percent.
    fn throttle(&self, run_percent: u8);
    /// This side lost the arbitration, or roles were exchanged: the VM must not run on here.
    fn stop(&self, reason: &str);
    /// After [`Protected::stop`]: the disks are synced, and what is known of them is kept for the time when this side is to
    /// be a backup. May take long. Only FT's last call.
    fn close_disks(&self);
}

/// Why a backup does not take a VM.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct Refusal {
    /// Stable code, for example `disk_size_mismatch`.
    pub code: String,
    /// Sentence that names the difference and says what to do.
    pub message: String,
}

/// The backup VMM: builds shadows.
pub trait ShadowHost: Send + Sync {
    /// Builds a shadow: RAM allocated, devices made, nothing runs, nothing is sent.
    fn create_shadow(&self, offered: &Identity) -> Result<Box<dyn Shadow>, Refusal>;
}

/// What a shadow needs beside its RAM and disks to become the VM.
#[derive(Debug)]
pub struct Takeover {
    /// As [`Protected::save_state`] gave it at the end of the last committed epoch.
    pub state: Vec<u8>,
    /// Time since then.
    pub elapsed: Duration,
    /// Outputs of committed epochs of which the primary did not say that they left, oldest first. They must leave before
    /// the guest resumes, so that they stay in front of what it sends next. The primary may have sent them after all:
    /// a repeated frame is what a network may do, repeated console bytes are the price of losing none.
    pub outputs: Vec<Output>,
    /// Inputs of the epochs that were not committed, in order.
    pub inputs: Vec<Input>,
}

/// The VM's shadow. Owned by one FT thread.
pub trait Shadow: Send {
    /// What this shadow is; FT refuses the pairing and names every difference to the offered identity.
    fn identity(&self) -> Identity;
    /// What its copies of the disks are, before anything is written to them; in the order of the disks.
    fn claims(&mut self) -> Vec<CopyClaim>;
    /// A range of a disk was found to differ from the primary's: it is no proof of anything until the next session.
    fn doubt(&mut self, disk: u16, offset: u64, len: u64);
    /// The disks are those of the end of the session's first epoch: copies of that session's from now on.
    fn synced(&mut self, session: &SessionId);
    /// Writes RAM; the range was checked against [`Identity::memory`]. Whole lines ([`crate::wire::lines::LINE`]).
    fn write_memory(&mut self, gpa: u64, data: &[u8]) -> Result<(), MachineError>;
    /// Reads RAM (audit).
    fn read_memory(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MachineError>;
    /// Copies bytes of the backup's own copy of a replicated disk (audit); the range is within [`Identity::disks`].
    fn read_disk(&self, disk: u16, offset: u64, buf: &mut [u8]) -> Result<(), MachineError>;
    /// Applies a committed change to the backup's own copy of a disk. Of shared disks, what is there can be checked at any
    /// time; they are changed only after [`Shadow::claim_disks`].
    fn apply_disk(&mut self, disk: u16, change: &DiskChange) -> Result<(), MachineError>;
    /// Takes the locks of shared disks, which the primary has until it has ended or given them back: the proof that it
    /// cannot write any more. `Some`: another process still has one, and which.
    fn claim_disks(&mut self) -> Result<Option<String>, MachineError>;
    /// Becomes the VM: loads the state, moves its clocks on, announces its addresses, lets the committed outputs leave,
    /// gives the logged inputs to the guest again (R8), resumes. After this the VMM runs a normal VM, whose
    /// [`Protected`] side is returned.
    fn activate(self: Box<Self>, takeover: Takeover) -> Result<Arc<dyn Protected>, MachineError>;
    /// The shadow is no longer needed. With `close_disks` its disks are synced, so that what they are is known after a boot
    /// of this host, too; that may take long.
    fn discard(self: Box<Self>, close_disks: bool);
}
