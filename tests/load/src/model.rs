//! What the key-value store must hold: the judge of acknowledged writes and of disk images.
//!
//! The record with sequence number `seq` is in slot `seq % N`, which is sector `1 + slot` of the disk.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read, Seek, SeekFrom};

use serde::Serialize;
use thiserror::Error;

/// Bytes of a sector and of a record.
pub const SECTOR: usize = 512;
/// First bytes of a formatted disk.
pub const DISK_MAGIC: &[u8; 8] = b"FTKV0001";
/// First word of a record.
pub const RECORD_MAGIC: u32 = 0x4b56_5233;
/// Longest value in bytes.
pub const MAX_VALUE: usize = 400;
/// Longest key in bytes.
pub const MAX_KEY: usize = 32;
const HEAD: usize = 20;
/// Differences kept as text.
const KEPT: usize = 20;

/// Errors of the check of a disk image.
#[derive(Debug, Error)]
pub enum Error {
    /// The image cannot be read.
    #[error("disk image: {0}")]
    Io(#[from] io::Error),
    /// The image is not what was acknowledged.
    #[error("{lost} acknowledged writes lost, {foreign} other differences, the first: {}", first.join("; "))]
    Different {
        /// Acknowledged records that are not there.
        lost: u64,
        /// Anything else that is wrong.
        foreign: u64,
        /// The first differences in words.
        first: Vec<String>,
    },
}

/// A record of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Sequence number.
    pub seq: u64,
    /// Key.
    pub key: String,
    /// Value.
    pub value: String,
}

impl Record {
    /// The sector that holds this record.
    pub fn encode(&self) -> [u8; SECTOR] {
        let mut sector = [0; SECTOR];
        sector[..4].copy_from_slice(&RECORD_MAGIC.to_le_bytes());
        sector[8..16].copy_from_slice(&self.seq.to_le_bytes());
        sector[16..18].copy_from_slice(&(self.key.len() as u16).to_le_bytes());
        sector[18..20].copy_from_slice(&(self.value.len() as u16).to_le_bytes());
        let (key, value) = (self.key.as_bytes(), self.value.as_bytes());
        sector[HEAD..HEAD + key.len()].copy_from_slice(key);
        sector[HEAD + key.len()..HEAD + key.len() + value.len()].copy_from_slice(value);
        let crc = crc32c::crc32c(&sector[8..]);
        sector[4..8].copy_from_slice(&crc.to_le_bytes());
        sector
    }

    /// The record in a sector; `None` for a slot that was never written.
    pub fn decode(sector: &[u8; SECTOR]) -> Result<Option<Self>, String> {
        let word = |at: usize| u32::from_le_bytes([sector[at], sector[at + 1], sector[at + 2], sector[at + 3]]);
        if word(0) != RECORD_MAGIC {
            let empty = sector.iter().all(|b| *b == 0);
            return if empty {
                Ok(None)
            } else {
                Err("neither a record nor empty".into())
            };
        }
        if word(4) != crc32c::crc32c(&sector[8..]) {
            return Err("a record with a wrong checksum".into());
        }
        let half = |at: usize| usize::from(u16::from_le_bytes([sector[at], sector[at + 1]]));
        let (key_len, value_len) = (half(16), half(18));
        if key_len == 0 || key_len > MAX_KEY || value_len > MAX_VALUE {
            return Err(format!(
                "a record with key length {key_len} and value length {value_len}"
            ));
        }
        let end = HEAD + key_len + value_len;
        if sector[end..].iter().any(|b| *b != 0) {
            return Err("a record that is not zero filled".into());
        }
        let text =
            |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| "a record that is not text".to_string());
        Ok(Some(Self {
            seq: u64::from(word(8)) | u64::from(word(12)) << 32,
            key: text(&sector[HEAD..HEAD + key_len])?,
            value: text(&sector[HEAD + key_len..end])?,
        }))
    }
}

/// What a check of a disk image found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct DiskReport {
    /// Slots of the disk.
    pub slots: u64,
    /// Slots whose record is the newest acknowledged one.
    pub acknowledged: u64,
    /// Slots with a record that was sent and not acknowledged (yet).
    pub unacknowledged: u64,
    /// Slots that were never written.
    pub empty: u64,
}

/// All that clients sent to one store, and what it acknowledged.
#[derive(Debug, Default)]
pub struct Model {
    /// Acknowledged records, newest per slot once the slot count is known; by sequence number until then.
    acknowledged: HashMap<u64, Record>,
    seen: HashSet<u64>,
    newest: HashMap<String, Record>,
    /// Sent, not acknowledged: (key, value); values are unique.
    pending: HashSet<(String, String)>,
    slots: u64,
    acknowledged_total: u64,
}

impl Model {
    /// An empty store with this number of slots (sectors of the disk less one).
    pub fn new(slots: u64) -> Self {
        Self {
            slots: slots.max(1),
            ..Self::default()
        }
    }

    /// A PUT is about to be sent.
    pub fn sent(&mut self, key: &str, value: &str) {
        self.pending.insert((key.into(), value.into()));
    }

    /// A PUT was refused.
    pub fn refused(&mut self, key: &str, value: &str) {
        self.pending.remove(&(key.into(), value.into()));
    }

    /// A PUT was acknowledged with `seq`. An error: the store cannot have given this number.
    pub fn acknowledge(&mut self, seq: u64, key: &str, value: &str) -> Result<(), String> {
        if !self.pending.remove(&(key.to_string(), value.to_string())) {
            return Err(format!("seq {seq}: {key} was acknowledged but never sent"));
        }
        if seq == 0 || !self.seen.insert(seq) {
            return Err(format!("seq {seq} was given twice, the second time to {key}"));
        }
        self.acknowledged_total += 1;
        let record = Record {
            seq,
            key: key.into(),
            value: value.into(),
        };
        match self.newest.get_mut(key) {
            Some(newest) if newest.seq < seq => *newest = record.clone(),
            Some(_) => {}
            None => {
                self.newest.insert(key.into(), record.clone());
            }
        }
        match self.acknowledged.get_mut(&(seq % self.slots)) {
            Some(old) if old.seq < seq => *old = record,
            Some(_) => {}
            None => {
                self.acknowledged.insert(seq % self.slots, record);
            }
        }
        Ok(())
    }

    /// Number of PUTs acknowledged.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged_total
    }

    /// Number of PUTs sent and not acknowledged.
    pub fn unacknowledged(&self) -> usize {
        self.pending.len()
    }

    /// Newest acknowledged record of each key.
    pub fn newest(&self) -> impl Iterator<Item = &Record> {
        self.newest.values()
    }

    /// Judges the store's answer to a GET for `key`.
    pub fn check_get(&self, key: &str, answer: Option<(u64, &str)>) -> Result<(), String> {
        let known = self.newest.get(key);
        match (known, answer) {
            (Some(known), Some((seq, value))) if seq == known.seq && value == known.value => Ok(()),
            (_, Some((seq, value)))
                if seq > known.map_or(0, |r| r.seq) && self.pending.contains(&(key.to_string(), value.to_string())) =>
            {
                Ok(())
            }
            (None, None) => Ok(()),
            (Some(known), answer) => Err(format!(
                "{key}: acknowledged with seq {}, the store has {answer:?}",
                known.seq
            )),
            (None, Some(answer)) => Err(format!("{key}: the store has {answer:?}, which was never sent")),
        }
    }

    /// Compares a disk image with what was acknowledged: every acknowledged record that no later one of its slot replaced
    /// is there, unchanged, and nothing is there that was not sent.
    pub fn check_disk(&self, image: &mut (impl Read + Seek)) -> Result<DiskReport, Error> {
        let size = image.seek(SeekFrom::End(0))?;
        image.seek(SeekFrom::Start(0))?;
        let mut report = DiskReport {
            slots: (size / SECTOR as u64).saturating_sub(1),
            ..DiskReport::default()
        };
        let (mut lost, mut foreign, mut first) = (0, 0, Vec::new());
        let mut note = |is_loss: bool, text: String| {
            *(if is_loss { &mut lost } else { &mut foreign }) += 1;
            if first.len() < KEPT {
                first.push(text);
            }
        };
        if report.slots != self.slots {
            note(
                false,
                format!("the disk has {} slots, the model {}", report.slots, self.slots),
            );
        }
        let mut bytes = Vec::with_capacity(size as usize);
        image.read_to_end(&mut bytes)?;
        let mut sectors = bytes.chunks_exact(SECTOR);
        let start = sectors.next().unwrap_or_default();
        let head = [&DISK_MAGIC[..], &report.slots.to_le_bytes()].concat();
        if !start.starts_with(&head) || start[head.len()..].iter().any(|b| *b != 0) {
            note(false, "sector 0 is not that of a formatted store".into());
        }
        for (slot, sector) in sectors.enumerate() {
            let mut whole = [0; SECTOR];
            whole.copy_from_slice(sector);
            match self.judge(slot as u64, &whole) {
                Ok(Found::Acknowledged) => report.acknowledged += 1,
                Ok(Found::Unacknowledged) => report.unacknowledged += 1,
                Ok(Found::Empty) => report.empty += 1,
                Err(text) => note(
                    self.acknowledged.contains_key(&(slot as u64)),
                    format!("slot {slot}: {text}"),
                ),
            }
        }
        if first.is_empty() {
            Ok(report)
        } else {
            Err(Error::Different { lost, foreign, first })
        }
    }

    fn judge(&self, slot: u64, sector: &[u8; SECTOR]) -> Result<Found, String> {
        let expected = self.acknowledged.get(&slot);
        match (Record::decode(sector)?, expected) {
            (None, None) => Ok(Found::Empty),
            (None, Some(expected)) => Err(format!("empty, acknowledged was seq {}", expected.seq)),
            (Some(found), Some(expected)) if found == *expected => Ok(Found::Acknowledged),
            (Some(found), expected) => {
                let later = found.seq > expected.map_or(0, |e| e.seq) && found.seq % self.slots == slot;
                if later && self.pending.contains(&(found.key.clone(), found.value.clone())) {
                    return Ok(Found::Unacknowledged);
                }
                let acknowledged = expected.map_or("none".into(), |e| format!("seq {} of {}", e.seq, e.key));
                Err(format!(
                    "seq {} of {}, acknowledged was {acknowledged}",
                    found.seq, found.key
                ))
            }
        }
    }
}

enum Found {
    Acknowledged,
    Unacknowledged,
    Empty,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    const SLOTS: u64 = 8;

    fn put(model: &mut Model, disk: &mut [u8], seq: u64, key: &str, value: &str) {
        model.sent(key, value);
        model.acknowledge(seq, key, value).unwrap();
        write(
            disk,
            &Record {
                seq,
                key: key.into(),
                value: value.into(),
            },
        );
    }

    fn write(disk: &mut [u8], record: &Record) {
        let at = (1 + record.seq % SLOTS) as usize * SECTOR;
        disk[at..at + SECTOR].copy_from_slice(&record.encode());
    }

    fn store() -> (Model, Vec<u8>) {
        let mut disk = vec![0; (SLOTS as usize + 1) * SECTOR];
        disk[..8].copy_from_slice(DISK_MAGIC);
        disk[8..16].copy_from_slice(&SLOTS.to_le_bytes());
        (Model::new(SLOTS), disk)
    }

    fn check(model: &Model, disk: &[u8]) -> Result<DiskReport, Error> {
        model.check_disk(&mut Cursor::new(disk))
    }

    #[test]
    fn a_right_disk_passes_also_after_wrap() {
        let (mut model, mut disk) = store();
        for seq in 1..=13 {
            put(&mut model, &mut disk, seq, &format!("k{}", seq % 3), &format!("v{seq}"));
        }
        let report = check(&model, &disk).unwrap();
        assert_eq!((report.acknowledged, report.unacknowledged, report.empty), (8, 0, 0));
        assert_eq!(model.acknowledged(), 13);
    }

    #[test]
    fn a_lost_or_old_or_changed_record_is_found() {
        let (mut model, mut disk) = store();
        (1..=5).for_each(|seq| put(&mut model, &mut disk, seq, "k", &format!("v{seq}")));
        let mut lost = disk.clone();
        lost[4 * SECTOR..5 * SECTOR].fill(0);
        assert!(check(&model, &lost).unwrap_err().to_string().contains("slot 3: empty"));
        let mut changed = disk.clone();
        changed[4 * SECTOR + 22] ^= 1;
        assert!(
            check(&model, &changed)
                .unwrap_err()
                .to_string()
                .contains("wrong checksum")
        );
        let old = disk.clone();
        put(&mut model, &mut disk, 11, "k", "v11");
        assert!(check(&model, &disk).is_ok());
        assert!(
            check(&model, &old)
                .unwrap_err()
                .to_string()
                .contains("acknowledged was seq 11")
        );
    }

    #[test]
    fn only_what_was_sent_may_be_there() {
        let (mut model, mut disk) = store();
        put(&mut model, &mut disk, 1, "k", "v1");
        model.sent("k", "v2");
        write(
            &mut disk,
            &Record {
                seq: 2,
                key: "k".into(),
                value: "v2".into(),
            },
        );
        let report = check(&model, &disk).unwrap();
        assert_eq!((report.acknowledged, report.unacknowledged, report.empty), (1, 1, 6));
        write(
            &mut disk,
            &Record {
                seq: 3,
                key: "k".into(),
                value: "v3".into(),
            },
        );
        assert!(check(&model, &disk).is_err());
    }

    #[test]
    fn a_sequence_number_is_given_once() {
        let mut model = Model::new(SLOTS);
        model.sent("k", "a");
        model.sent("k", "b");
        model.acknowledge(1, "k", "a").unwrap();
        assert!(model.acknowledge(1, "k", "b").is_err());
        assert!(model.acknowledge(2, "k", "never sent").is_err());
    }

    #[test]
    fn gets_are_judged() {
        let mut model = Model::new(SLOTS);
        model.sent("k", "a");
        assert!(model.check_get("k", None).is_ok());
        assert!(model.check_get("k", Some((1, "a"))).is_ok());
        model.acknowledge(1, "k", "a").unwrap();
        assert!(model.check_get("k", None).is_err());
        assert!(model.check_get("k", Some((1, "a"))).is_ok());
        assert!(model.check_get("k", Some((1, "b"))).is_err());
        assert!(model.check_get("other", Some((1, "b"))).is_err());
    }
}
