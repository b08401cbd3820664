//! What the audit does, and what `ft info` tells of it.

use serde::{Deserialize, Serialize};

use crate::audit::{ChunkSum, PageSum};
use crate::machine::PAGE_SIZE;

/// What becomes of a shadow that the audit finds to differ from the primary (R6).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FtAudit {
    /// It ends; the VM goes on unprotected.
    #[default]
    Stop,
    /// The place is sent anew, from the primary. Too many of them within an hour, or one that stays wrong, end it all the
    /// same.
    Repair,
}

impl FtAudit {
    /// Its name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Repair => "repair",
        }
    }
}

/// Figures of the audit since FT was enabled (R6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FtAuditInfo {
    /// What becomes of a shadow that differs.
    pub policy: FtAudit,
    /// RAM of the shadow that was compared, in bytes.
    pub ram_bytes: u64,
    /// Disks of the shadow that were compared, in bytes.
    pub disk_bytes: u64,
    /// How often all of RAM was gone through (primary).
    pub ram_rounds: u64,
    /// How often all replicated disks were gone through (primary).
    pub disk_rounds: u64,
    /// Places that differed (primary: that the backup asked for).
    pub mismatches: u64,
    /// Places that were sent anew (backup: and were right then).
    pub repairs: u64,
}

impl FtAuditInfo {
    /// These were compared.
    pub(crate) fn add(&mut self, pages: &[PageSum], chunks: &[ChunkSum]) {
        self.ram_bytes += (pages.len() * PAGE_SIZE) as u64;
        self.disk_bytes += chunks.iter().map(|chunk| u64::from(chunk.len)).sum::<u64>();
    }
}
