//! The audit (R6): while both sides run, the shadow's RAM and disks are compared with the primary's.
//!
//! * [`ram`]: which pages, and when their checksums count;
//! * [`disk`]: the same for disks, on a thread of its own;
//! * here: checksums as they are sent, and the backup's comparison.
//!
//! In both cases checksums are taken while the guest runs, and those go with an epoch that were still true at its end:
//! the audit adds nothing to the pause but looking through what was written. The backup compares when it has applied the
//! epoch. What it finds is RAM or a disk that changed there without being sent (a hole in the log of changes), or that
//! changed by itself, here or there. Which of the two sides is wrong it cannot tell.

pub mod disk;
pub mod ram;

use std::fmt;

use crate::machine::{DiskIdentity, MachineError, PAGE_SIZE, Shadow};

/// Checksum of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageSum {
    /// Its guest physical address.
    pub gpa: u64,
    /// CRC-32C of its content.
    pub crc: u32,
}

/// Checksum of a piece of a replicated disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSum {
    /// Index of the disk.
    pub disk: u16,
    /// First byte.
    pub offset: u64,
    /// Length in bytes, 1 to [`disk::CHUNK`].
    pub len: u32,
    /// CRC-32C of its content.
    pub crc: u32,
}

/// Where the shadow is not the primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A page of RAM.
    Page {
        /// Its guest physical address.
        gpa: u64,
    },
    /// A piece of a disk.
    Chunk {
        /// Index of the disk.
        disk: u16,
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u32,
    },
}

/// What the backup found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// Where.
    pub place: Place,
    /// Id of the disk, if it is one.
    pub disk_id: Option<String>,
    /// Checksum of the shadow.
    pub found: u32,
    /// Checksum of the primary.
    pub expected: u32,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place {
            Place::Page { gpa } => write!(f, "audit: the RAM page at {gpa:#x} is not the primary's")?,
            Place::Chunk { disk, offset, len } => {
                f.write_str("audit: disk ")?;
                match &self.disk_id {
                    Some(id) => f.write_str(id)?,
                    None => write!(f, "{disk}")?,
                }
                write!(f, " at {offset:#x}, {len} bytes, is not the primary's")?;
            }
        }
        write!(f, " (checksum {:#010x}, there {:#010x})", self.found, self.expected)
    }
}

/// The backup's side: compares with the shadow, to which the epoch that the checksums came with is applied. An error: the
/// shadow cannot be read.
pub(crate) fn compare(
    shadow: &dyn Shadow,
    disks: &[DiskIdentity],
    pages: &[PageSum],
    chunks: &[ChunkSum],
) -> Result<Vec<Mismatch>, MachineError> {
    let mut found = Vec::new();
    let mut check = |place, crc: u32, expected: u32, disk_id: Option<String>| {
        if crc != expected {
            found.push(Mismatch {
                place,
                disk_id,
                found: crc,
                expected,
            });
        }
    };
    let mut page = [0; PAGE_SIZE];
    for sum in pages {
        shadow.read_memory(sum.gpa, &mut page)?;
        check(Place::Page { gpa: sum.gpa }, crc32c::crc32c(&page), sum.crc, None);
    }
    let mut chunk = Vec::new();
    for sum in chunks {
        let ChunkSum { disk, offset, len, crc } = *sum;
        let id = disks.get(usize::from(disk)).map(|disk| disk.id.clone());
        chunk.resize(len as usize, 0);
        shadow.read_disk(disk, offset, &mut chunk).map_err(|e| {
            let name = id.clone().unwrap_or_default();
            MachineError(format!("audit: disk {name} at {offset:#x} cannot be read: {e}"))
        })?;
        check(Place::Chunk { disk, offset, len }, crc32c::crc32c(&chunk), crc, id);
    }
    Ok(found)
}
