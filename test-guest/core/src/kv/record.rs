//! What is on the disk. Sector 0: the magic and the number of slots. Slot `j`: sector `1 + j` with a record or nothing.

use super::{KEY_MAX, VALUE_MAX};
use crate::bytes::{u16_at, u32_at, u64_at};
use crate::crc32c::crc32c;

/// Bytes of a sector, which holds one record.
pub const SECTOR: usize = 512;
/// First bytes of a disk with a store.
pub const DISK_MAGIC: &[u8; 8] = b"FTKV0001";

const RECORD_MAGIC: u32 = 0x4b56_5233;
const HEAD: usize = 20;

/// A record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Sequence number, from 1.
    pub seq: u64,
    /// Key.
    pub key: &'a [u8],
    /// Value.
    pub value: &'a [u8],
}

/// Writes a record into a sector. Key and value must have been checked for their lengths.
pub fn encode(record: &Record<'_>, sector: &mut [u8; SECTOR]) {
    let (key, value) = (
        &record.key[..record.key.len().min(KEY_MAX)],
        &record.value[..record.value.len().min(VALUE_MAX)],
    );
    let end = HEAD + key.len() + value.len();
    sector.fill(0);
    sector[..4].copy_from_slice(&RECORD_MAGIC.to_le_bytes());
    sector[8..16].copy_from_slice(&record.seq.to_le_bytes());
    sector[16..18].copy_from_slice(&(key.len() as u16).to_le_bytes());
    sector[18..20].copy_from_slice(&(value.len() as u16).to_le_bytes());
    sector[HEAD..HEAD + key.len()].copy_from_slice(key);
    sector[HEAD + key.len()..end].copy_from_slice(value);
    let crc = crc32c(&sector[8..]);
    sector[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// The record in a sector; none if there is none or it is damaged.
pub fn decode(sector: &[u8]) -> Option<Record<'_>> {
    if sector.len() != SECTOR || u32_at(sector, 0) != RECORD_MAGIC || u32_at(sector, 4) != crc32c(&sector[8..]) {
        return None;
    }
    let (key_len, value_len) = (usize::from(u16_at(sector, 16)), usize::from(u16_at(sector, 18)));
    if key_len == 0 || key_len > KEY_MAX || value_len > VALUE_MAX {
        return None;
    }
    let (key, value) = sector[HEAD..HEAD + key_len + value_len].split_at(key_len);
    Some(Record {
        seq: u64_at(sector, 8),
        key,
        value,
    })
}

/// A sector that says it is a record; one that [`decode`] does not take is damaged.
pub fn has_magic(sector: &[u8]) -> bool {
    u32_at(sector, 0) == RECORD_MAGIC
}

/// Writes sector 0 of a disk with `slots` slots.
pub fn disk_header(slots: u64, sector: &mut [u8; SECTOR]) {
    sector.fill(0);
    sector[..8].copy_from_slice(DISK_MAGIC);
    sector[8..16].copy_from_slice(&slots.to_le_bytes());
}

/// The number of slots in sector 0, if the disk holds a store.
pub fn disk_slots(sector: &[u8]) -> Option<u64> {
    sector.starts_with(DISK_MAGIC).then(|| u64_at(sector, 8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back() {
        for (key, value) in [(&b"k"[..], &b""[..]), (&[b'k'; 32], &[b'v'; 400]), (b"key", b"value")] {
            let record = Record { seq: 77, key, value };
            let mut sector = [0xff; SECTOR];
            encode(&record, &mut sector);
            assert_eq!(decode(&sector), Some(record));
            for at in 0..SECTOR {
                let mut bad = sector;
                bad[at] ^= 1;
                assert_eq!(decode(&bad), None, "byte {at}");
            }
        }
        assert_eq!(decode(&[0; SECTOR]), None);
    }

    #[test]
    fn layout() {
        let mut sector = [0; SECTOR];
        encode(
            &Record {
                seq: 0x0102,
                key: b"ab",
                value: b"xyz",
            },
            &mut sector,
        );
        assert_eq!(sector[..4], [0x33, 0x52, 0x56, 0x4b]);
        assert_eq!(sector[4..8], crc32c(&sector[8..]).to_le_bytes());
        assert_eq!(sector[8..25], *b"\x02\x01\0\0\0\0\0\0\x02\0\x03\0abxyz");
        disk_header(99, &mut sector);
        assert_eq!(disk_slots(&sector), Some(99));
        sector[0] = 0;
        assert_eq!(disk_slots(&sector), None);
    }
}
