//! Which record is the newest of each key, and which slot the next one takes: sequence number `seq` goes to slot
//! `seq % slots`, and a number whose slot holds a live record, or one that is being written, is skipped.

use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

use super::Key;

/// The store has as many keys as it may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// Where a record is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its sequence number.
    pub seq: u64,
    /// Its slot.
    pub slot: u64,
}

#[derive(Debug, Default)]
struct Entry {
    /// The newest durable record; 0 before the first.
    seq: u64,
    /// Records being written.
    writing: u32,
}

/// The index.
#[derive(Debug)]
pub struct Index {
    slots: u64,
    keys: BTreeMap<Key, Entry>,
    keys_max: u64,
    /// A bit per slot: taken by a live record or one being written.
    taken: Vec<u64>,
    used: u64,
    next: u64,
}

impl Index {
    /// The index of an empty store with `slots` slots, for at most `keys_max` keys and half as many as slots.
    pub fn new(slots: u64, keys_max: u64) -> Self {
        let words = usize::try_from(slots.div_ceil(64)).unwrap_or(0);
        Self {
            slots,
            keys: BTreeMap::new(),
            keys_max: keys_max.min(slots / 2),
            taken: vec![0; words],
            used: 0,
            next: 1,
        }
    }

    fn slot(&self, seq: u64) -> u64 {
        seq % self.slots.max(1)
    }

    fn taken(&self, slot: u64) -> bool {
        self.taken
            .get((slot / 64) as usize)
            .is_none_or(|word| word >> (slot % 64) & 1 != 0)
    }

    fn mark(&mut self, slot: u64, on: bool) {
        if let Some(word) = self.taken.get_mut((slot / 64) as usize) {
            let bit = 1 << (slot % 64);
            match (on, *word & bit != 0) {
                (true, false) => self.used += 1,
                (false, true) => self.used -= 1,
                _ => {}
            }
            *word = if on { *word | bit } else { *word & !bit };
        }
    }

    /// Recovery: there is a record of `key` with number `seq` in slot `slot`. A record in a wrong slot does not count.
    pub fn found(&mut self, key: &[u8], seq: u64, slot: u64) {
        if seq == 0 || slot != self.slot(seq) {
            return;
        }
        self.next = self.next.max(seq.saturating_add(1));
        let entry = match self.keys.get_mut(key) {
            Some(entry) => entry,
            None => self.keys.entry(key.into()).or_default(),
        };
        if seq > entry.seq {
            let old = core::mem::replace(&mut entry.seq, seq);
            if old != 0 {
                self.mark(self.slot(old), false);
            }
            self.mark(slot, true);
        }
    }

    /// The newest record of `key`.
    pub fn get(&self, key: &[u8]) -> Option<Place> {
        let seq = self.keys.get(key)?.seq;
        (seq != 0).then(|| Place {
            seq,
            slot: self.slot(seq),
        })
    }

    /// A slot is free for one more record.
    pub fn has_room(&self) -> bool {
        self.used < self.slots
    }

    /// Takes a number and slot for a new record of `key`; [`Index::has_room`] must hold.
    pub fn begin(&mut self, key: &[u8]) -> Result<Place, Full> {
        if !self.has_room() || (!self.keys.contains_key(key) && self.keys.len() as u64 >= self.keys_max) {
            return Err(Full);
        }
        while self.taken(self.slot(self.next)) {
            self.next += 1;
        }
        let place = Place {
            seq: self.next,
            slot: self.slot(self.next),
        };
        self.next += 1;
        self.mark(place.slot, true);
        match self.keys.get_mut(key) {
            Some(entry) => entry.writing += 1,
            None => {
                self.keys.insert(key.into(), Entry { seq: 0, writing: 1 });
            }
        }
        Ok(place)
    }

    /// The record is durable (`done`), or could not be written.
    pub fn end(&mut self, key: &[u8], place: Place, done: bool) {
        let Some(entry) = self.keys.get_mut(key) else { return };
        entry.writing = entry.writing.saturating_sub(1);
        let free = if done && place.seq > entry.seq {
            core::mem::replace(&mut entry.seq, place.seq)
        } else {
            place.seq
        };
        if entry.seq == 0 && entry.writing == 0 {
            self.keys.remove(key);
        }
        if free != 0 {
            self.mark(self.slot(free), false);
        }
    }

    /// The number after the highest given out.
    pub fn next_seq(&self) -> u64 {
        self.next
    }

    /// Keys with a record.
    pub fn keys(&self) -> usize {
        self.keys.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk of slots: (key, seq).
    type Disk = Vec<Option<(Vec<u8>, u64)>>;

    fn put(index: &mut Index, disk: &mut Disk, key: &[u8]) -> Result<u64, Full> {
        let place = index.begin(key)?;
        disk[place.slot as usize] = Some((key.to_vec(), place.seq));
        index.end(key, place, true);
        Ok(place.seq)
    }

    #[test]
    fn live_records_are_never_overwritten_and_recovery_finds_them() {
        let slots = 16;
        let mut index = Index::new(slots, 100);
        let mut disk: Disk = vec![None; slots as usize];
        let mut newest = BTreeMap::new();
        let mut last = 0;
        for n in 0..1000u64 {
            let key = [b'a' + (crate::pattern::word(1, n) % 8) as u8];
            let seq = put(&mut index, &mut disk, &key).unwrap();
            assert!(seq > last);
            last = seq;
            newest.insert(key, seq);
            for (key, seq) in &newest {
                assert_eq!(disk[(seq % slots) as usize], Some((key.to_vec(), *seq)));
                assert_eq!(
                    index.get(key),
                    Some(Place {
                        seq: *seq,
                        slot: seq % slots
                    })
                );
            }
        }
        assert_eq!(
            put(&mut index, &mut disk, b"z"),
            Err(Full),
            "half of the slots have keys"
        );
        let mut again = Index::new(slots, 100);
        for (slot, record) in disk.iter().enumerate() {
            if let Some((key, seq)) = record {
                again.found(key, *seq, slot as u64);
            }
        }
        assert_eq!(again.next_seq(), index.next_seq());
        assert_eq!(
            (again.keys(), again.used, again.taken),
            (index.keys(), index.used, index.taken)
        );
    }

    #[test]
    fn several_at_once() {
        let mut index = Index::new(4, 100);
        let first = index.begin(b"k").unwrap();
        let second = index.begin(b"k").unwrap();
        assert_eq!(index.get(b"k"), None);
        index.end(b"k", first, true);
        assert_eq!(index.get(b"k"), Some(first));
        index.end(b"k", second, true);
        assert_eq!((index.get(b"k"), index.used), (Some(second), 1));
        let failed = index.begin(b"other").unwrap();
        index.end(b"other", failed, false);
        assert_eq!((index.get(b"other"), index.keys(), index.used), (None, 1, 1));
    }

    #[test]
    fn writes_under_way_fill_the_store() {
        let mut index = Index::new(4, 100);
        for _ in 0..4 {
            assert!(index.has_room());
            index.begin(b"k").unwrap();
        }
        assert!(!index.has_room());
        assert_eq!(index.begin(b"k"), Err(Full));
        let mut none = Index::new(0, 100);
        assert_eq!(none.begin(b"k"), Err(Full));
        none.found(b"k", 1, 0);
    }

    #[test]
    fn keys_are_limited() {
        let mut index = Index::new(100, 2);
        for key in [b"a", b"b", b"a"] {
            let place = index.begin(key).unwrap();
            index.end(key, place, true);
        }
        assert_eq!(index.begin(b"c"), Err(Full));
        assert!(index.begin(b"b").is_ok());
    }

    #[test]
    fn records_in_wrong_slots_do_not_count() {
        let mut index = Index::new(8, 100);
        index.found(b"k", 3, 4);
        index.found(b"k", 0, 0);
        assert_eq!((index.get(b"k"), index.next_seq()), (None, 1));
    }
}
