//! The audit (R6): while both sides run, the shadow's RAM and disks are compared with the primary's.
//!
//! * [`ram`]: which pages, and when their checksums count;
//! * [`disk`]: the same for disks, on a thread of its own;
//! * here: checksums as they are sent, and the backup's comparison.
//!
//! In both cases checksums are taken while the guest runs, and those go with an epoch that were still true at its end:
//! the audit adds nothing to the pause but looking through what was written. The backup compares when it has applied the
//! epoch. What it finds is RAM or a disk that changed there without being sent (a hole in the log of changes), or that
//! changed by itself, here or there. Which of the two sides is wrong it cannot tell: the primary's counts, since its VM runs.

pub mod disk;
pub mod ram;

use serde::{Deserialize, Serialize};

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

/// A place of the VM that is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Place {
    /// A page of RAM.
    Page {
        /// Its guest physical address.
        gpa: u64,
    },
    /// A piece of a replicated disk.
    Chunk {
        /// Index of the disk.
        disk: u16,
        /// First byte.
        offset: u64,
        /// Length in bytes, 1 to [`disk::CHUNK`].
        len: u32,
    },
}

/// Where the shadow is not the primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mismatch {
    /// Where.
    pub place: Place,
    /// Checksum of the shadow.
    pub found: u32,
    /// Checksum of the primary.
    pub expected: u32,
}

/// What was found, in words: the first of it, and how much more. `disks` are the VM's.
pub fn describe(wrong: &[Mismatch], disks: &[DiskIdentity]) -> String {
    let Some(Mismatch { place, found, expected }) = wrong.first() else {
        return String::new();
    };
    let name = match *place {
        Place::Page { gpa } => format!("the RAM page at {gpa:#x}"),
        Place::Chunk { disk, offset, len } => {
            format!("disk {} at {offset:#x}, {len} bytes,", disk_name(disk, disks))
        }
    };
    let more = match wrong.len() - 1 {
        0 => String::new(),
        more => format!(", nor are {more} other places"),
    };
    format!("audit: {name} is not the primary's (checksum {found:#010x}, there {expected:#010x}){more}")
}

fn disk_name(disk: u16, disks: &[DiskIdentity]) -> &str {
    disks.get(usize::from(disk)).map_or("?", |disk| &disk.id)
}

/// The backup's side: compares with the shadow, to which the epoch that the checksums came with is applied. Returns where
/// it differs, and the other places. An error: the shadow cannot be read.
pub(crate) fn compare(
    shadow: &dyn Shadow,
    disks: &[DiskIdentity],
    pages: &[PageSum],
    chunks: &[ChunkSum],
) -> Result<(Vec<Mismatch>, Vec<Place>), MachineError> {
    let (mut wrong, mut right) = (Vec::new(), Vec::new());
    let mut check = |place, found: u32, expected: u32| {
        if found == expected {
            right.push(place);
        } else {
            wrong.push(Mismatch { place, found, expected });
        }
    };
    let mut page = [0; PAGE_SIZE];
    for sum in pages {
        shadow.read_memory(sum.gpa, &mut page)?;
        check(Place::Page { gpa: sum.gpa }, crc32c::crc32c(&page), sum.crc);
    }
    let mut chunk = Vec::new();
    for sum in chunks {
        let ChunkSum { disk, offset, len, crc } = *sum;
        chunk.resize(len as usize, 0);
        shadow.read_disk(disk, offset, &mut chunk).map_err(|e| {
            let name = disk_name(disk, disks);
            MachineError(format!("audit: disk {name} at {offset:#x} cannot be read: {e}"))
        })?;
        check(Place::Chunk { disk, offset, len }, crc32c::crc32c(&chunk), crc);
    }
    Ok((wrong, right))
}
