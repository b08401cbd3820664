//! What the primary reports: `ft info`, and what is copied of its disks.

use super::session::{Session, lock};
use crate::config::{FtInfo, FtRole, FtState};
use crate::event::{FtEvent, joined};

impl Session {
    /// What is copied of a disk at first, and why all of it.
    pub(super) fn tell_copy(&self, disk: &str, copied: u64, skipped: u64, reason: String) {
        let why = if reason.is_empty() { "" } else { ": " };
        log::info!("ft: disk {disk}: {copied} bytes to copy, {skipped} are there already{why}{reason}");
        let mut properties = vec![
            ("disk".to_string(), disk.to_string()),
            ("copied".to_string(), copied.to_string()),
            ("skipped".to_string(), skipped.to_string()),
        ];
        if !reason.is_empty() {
            properties.push(("reason".to_string(), reason));
        }
        (self.events)(FtEvent {
            event: "disk_copy",
            properties,
        });
    }

    /// The report.
    pub(super) fn info(&self) -> FtInfo {
        let mut info = FtInfo::disabled();
        lock(&self.metrics).report(&mut info);
        (info.audit.policy, info.audit.disk_rounds) = (self.audit, self.log.audit.rounds());
        let status = self.status();
        let mut core = lock(&self.core);
        core.note_held(self.interposer.unwritten());
        (info.lag_bytes, info.run_percent) = (core.lag(), core.percent());
        drop(core);
        info.role = if status.state == FtState::Disabled {
            FtRole::None
        } else {
            FtRole::Primary
        };
        info.state = status.state;
        info.reason = joined(status.reason, self.disks.trouble());
        info.shared_disks = self.disks.ids();
        (info.generation, info.epoch, info.committed) = (status.generation, status.epoch, status.committed);
        info.peer = Some(self.peer.clone());
        info.transport = Some(self.transport.clone());
        info.durability = self.durability;
        info.arbiter = Some(self.arbiter_description.clone());
        info.limits = lock(&self.limits).clone();
        (info.outputs_waiting, _) = self.interposer.waiting();
        info.bytes_sent = self.outbox.bytes_written();
        info.tell_spares(self.reprotect.as_ref());
        info
    }
}
