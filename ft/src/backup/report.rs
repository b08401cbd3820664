//! Measures of a session, and its report for `ft info`.

use super::session::Session;
use crate::config::{FtAuditInfo, FtInfo, FtRole, FtState};
use crate::event::joined;
use crate::machine::{DiskChange, PAGE_SIZE, PageRun};
use crate::primary::session::lock;
use crate::stats::Stat;
use crate::wire::frame::Frame;

#[derive(Default)]
pub(super) struct Measures {
    epoch_bytes: Stat,
    received: u64,
    this_epoch: u64,
    ram: u64,
    disk: u64,
    pub(super) audit: FtAuditInfo,
}

impl Measures {
    /// A frame came.
    pub(super) fn add(&mut self, frame: &Frame, size: usize) {
        let pages = |runs: &[PageRun]| runs.iter().map(|r| r.count).sum::<u64>() * PAGE_SIZE as u64;
        self.received += size as u64;
        self.this_epoch += size as u64;
        match frame {
            Frame::Pages { epoch: 0, runs, .. } | Frame::ZeroPages { epoch: 0, runs } => self.ram += pages(runs),
            Frame::Disk { epoch: 0, change, .. } => {
                self.disk += match change {
                    DiskChange::Write { data, .. } => data.len() as u64,
                    DiskChange::Zero { len, .. } => *len,
                    DiskChange::Flush | DiskChange::Check { .. } => 0,
                };
            }
            Frame::End(marker) => {
                let bytes = std::mem::take(&mut self.this_epoch) as f64;
                if marker.epoch > 1 {
                    self.epoch_bytes.add(bytes);
                }
            }
            _ => {}
        }
    }
}

impl Session {
    /// The report.
    pub(super) fn info(&self) -> FtInfo {
        let core = lock(&self.core);
        let (status, times, (mismatches, repairs)) = (core.status(), core.times(), core.audit_counts());
        drop(core);
        let mut info = FtInfo::disabled();
        info.role = if status.state == FtState::Solo {
            FtRole::Primary
        } else {
            FtRole::Backup
        };
        info.state = status.state;
        info.reason = joined(status.reason, lock(&self.waits).clone());
        (info.generation, info.epoch, info.committed) = (status.generation, status.epoch, status.committed);
        info.epochs_total = status.committed;
        info.peer = Some(self.peer.clone());
        info.transport = Some(self.transport.clone());
        info.durability = self.hello.durability;
        info.arbiter = Some(self.arbiter_description.clone());
        info.limits = lock(&self.limits).clone();
        info.tell_spares(self.hello.reprotect.as_ref());
        let identity = &self.hello.identity;
        info.progress.ram_bytes_total = identity.memory.iter().map(|(_, size)| size).sum();
        let (copied, shared): (Vec<_>, Vec<_>) = identity.disks.iter().partition(|disk| disk.shared.is_none());
        info.progress.disk_bytes_total = copied.iter().filter(|disk| !disk.readonly).map(|disk| disk.size).sum();
        info.shared_disks = shared.iter().map(|disk| disk.id.clone()).collect();
        let measures = lock(&self.measures);
        info.progress.ram_bytes_sent = measures.ram;
        info.progress.disk_bytes_sent = measures.disk;
        info.bytes_sent = measures.received;
        info.audit = measures.audit;
        info.audit.policy = self.hello.audit;
        (info.audit.mismatches, info.audit.repairs) = (mismatches, repairs);
        info.epoch_bytes = measures.epoch_bytes.report();
        let since = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e6;
        if times.detected > 0 {
            info.detection_ms = Some(since(times.heard, times.detected));
        }
        if times.activated > 0 {
            info.activation_ms = Some(since(times.detected, times.activated));
        }
        info
    }
}
