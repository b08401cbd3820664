//! What `ft info` tells of the audit.

use serde::{Deserialize, Serialize};

use crate::audit::{ChunkSum, PageSum};
use crate::machine::PAGE_SIZE;

/// Figures of the audit since FT was enabled (R6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FtAuditInfo {
    /// RAM of the shadow that was compared, in bytes.
    pub ram_bytes: u64,
    /// Disks of the shadow that were compared, in bytes.
    pub disk_bytes: u64,
    /// How often all of RAM was gone through (primary).
    pub ram_rounds: u64,
    /// How often all replicated disks were gone through (primary).
    pub disk_rounds: u64,
}

impl FtAuditInfo {
    /// These were compared.
    pub(crate) fn add(&mut self, pages: &[PageSum], chunks: &[ChunkSum]) {
        self.ram_bytes += (pages.len() * PAGE_SIZE) as u64;
        self.disk_bytes += chunks.iter().map(|chunk| u64::from(chunk.len)).sum::<u64>();
    }
}
