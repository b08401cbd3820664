//! Where device workers' log entries go: to the backup, at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::audit::disk::DiskAudit;
use crate::interposer::LogSink;
use crate::machine::DiskChange;
use crate::outbox::Outbox;
use crate::wire::frame;

/// Sends log entries and counts them, for the end marker.
pub(super) struct Log {
    outbox: Arc<Outbox>,
    pub(super) inputs: AtomicU64,
    pub(super) disk: AtomicU64,
    /// Must know what is changed.
    pub(super) audit: DiskAudit,
}

impl Log {
    pub(super) fn new(outbox: Arc<Outbox>, audit: DiskAudit) -> Self {
        Self {
            outbox,
            inputs: AtomicU64::new(0),
            disk: AtomicU64::new(0),
            audit,
        }
    }
}

impl LogSink for Log {
    fn input_frame(&self, epoch: u64, nic: u16, data: &[u8]) -> u64 {
        self.inputs.fetch_add(1, Ordering::Relaxed);
        self.outbox.post([frame::input_frame(epoch, nic, data)])
    }

    fn disk_change(&self, epoch: u64, disk: u16, change: DiskChange) -> u64 {
        self.audit.changed(disk, &change);
        let frames = frame::disk_change(epoch, disk, change);
        self.disk.fetch_add(frames.len() as u64, Ordering::Relaxed);
        self.outbox.post(frames)
    }
}
