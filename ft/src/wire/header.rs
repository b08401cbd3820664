//! The frame header.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `CHFT` |
//! | 4 | 2 | protocol version |
//! | 6 | 1 | frame type |
//! | 7 | 1 | flags |
//! | 8 | 8 | sequence number, from 0 |
//! | 16 | 8 | mark: from the primary, the last epoch whose outputs left; from the backup, the last epoch applied |
//! | 24 | 8 | stamp: from the primary, its clock; from the backup, the newest stamp that it got (the lease, R4) |
//! | 32 | 4 | payload length |
//! | 36 | 4 | CRC-32C of the payload |
//! | 40 | 4 | CRC-32C of the header up to here |

use super::{DecodeError, MAX_PAYLOAD, VERSION};

/// Size in bytes.
pub const SIZE: usize = 44;

const MAGIC: u32 = u32::from_le_bytes(*b"CHFT");

/// Payload pages are lz4 compressed.
pub const FLAG_LZ4: u8 = 1;

/// A decoded header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Frame type, see [`super::frame::Kind`].
    pub kind: u8,
    /// Flags.
    pub flags: u8,
    /// Sequence number.
    pub seq: u64,
    /// See the table.
    pub mark: u64,
    /// See the table.
    pub stamp: u64,
    /// Payload length.
    pub len: u32,
    /// CRC-32C of the payload.
    pub payload_crc: u32,
}

fn u32_at(bytes: &[u8; SIZE], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; SIZE], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

impl Header {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = self.kind;
        bytes[7] = self.flags;
        bytes[8..16].copy_from_slice(&self.seq.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.mark.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.stamp.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.len.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.payload_crc.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..40]);
        bytes[40..44].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Checks everything that can be checked without the payload. The magic comes first and the checksum before the
    /// version: a damaged version number must not read as a wrong version.
    pub fn decode(bytes: &[u8; SIZE]) -> Result<Self, DecodeError> {
        let magic = u32_at(bytes, 0);
        if magic != MAGIC {
            return Err(DecodeError::Magic(magic));
        }
        let (found, computed) = (u32_at(bytes, 40), crc32c::crc32c(&bytes[..40]));
        if found != computed {
            return Err(DecodeError::HeaderChecksum { found, computed });
        }
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        if version != VERSION {
            return Err(DecodeError::Version(version));
        }
        let len = u32_at(bytes, 32);
        if len as usize > MAX_PAYLOAD {
            return Err(DecodeError::TooLong(len));
        }
        Ok(Self {
            kind: bytes[6],
            flags: bytes[7],
            seq: u64_at(bytes, 8),
            mark: u64_at(bytes, 16),
            stamp: u64_at(bytes, 24),
            len,
            payload_crc: u32_at(bytes, 36),
        })
    }
}
