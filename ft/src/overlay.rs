//! What of a disk is held: the newest held bytes of every place, for reads that come before they are on the disk.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::machine::DiskChange;

/// A stretch of the disk whose newest content is a held change's.
#[derive(Debug)]
struct Segment {
    end: u64,
    number: u64,
    change: Arc<DiskChange>,
}

/// A piece of a read that held bytes answer.
#[derive(Debug, Clone)]
pub struct Piece {
    /// First byte, on the disk.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    change: Arc<DiskChange>,
}

impl Piece {
    /// The held bytes; `None`: zeroes.
    pub fn bytes(&self) -> Option<&[u8]> {
        match &*self.change {
            DiskChange::Write { offset, data } => {
                let from = (self.offset - offset) as usize;
                Some(&data[from..from + self.len as usize])
            }
            _ => None,
        }
    }
}

/// The held changes of one disk, by place.
#[derive(Debug, Default)]
pub struct Overlay {
    /// By their first byte; they do not overlap.
    segments: BTreeMap<u64, Segment>,
}

impl Overlay {
    /// The newest change; numbers rise. Flushes have no place.
    pub fn insert(&mut self, number: u64, change: &Arc<DiskChange>) {
        let (start, len) = change.range();
        let Some(end) = start.checked_add(len).filter(|end| *end > start) else {
            return;
        };
        self.clear(start, end);
        let change = change.clone();
        self.segments.insert(start, Segment { end, number, change });
    }

    /// Nothing is held of these bytes any more.
    fn clear(&mut self, start: u64, end: u64) {
        // What reaches into the range from before it, and perhaps out of it again.
        if let Some((_, before)) = self.segments.range_mut(..start).next_back()
            && before.end > start
        {
            let rest = Segment {
                change: before.change.clone(),
                ..*before
            };
            before.end = start;
            if rest.end > end {
                self.segments.insert(end, rest);
            }
        }
        while let Some(first) = self.segments.range(start..end).next().map(|(first, _)| *first) {
            if let Some(segment) = self.segments.remove(&first)
                && segment.end > end
            {
                self.segments.insert(end, segment);
            }
        }
    }

    /// The change is on the disk.
    pub fn remove(&mut self, number: u64, change: &DiskChange) {
        let (start, len) = change.range();
        let own = self
            .segments
            .range(start..start.saturating_add(len))
            .filter(|(_, s)| s.number == number);
        let own: Vec<u64> = own.map(|(first, _)| *first).collect();
        for first in own {
            self.segments.remove(&first);
        }
    }

    /// What is held of the bytes from `offset` on, ascending.
    pub fn read(&self, offset: u64, len: u64) -> Vec<Piece> {
        let end = offset.saturating_add(len);
        let before = self.segments.range(..offset).next_back();
        let inside = self.segments.range(offset..end);
        let piece = |(first, segment): (&u64, &Segment)| {
            let (from, to) = ((*first).max(offset), segment.end.min(end));
            (to > from).then(|| Piece {
                offset: from,
                len: to - from,
                change: segment.change.clone(),
            })
        };
        before.into_iter().chain(inside).filter_map(piece).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: usize = 64;

    #[derive(Debug, Clone)]
    enum Step {
        Hold { start: usize, len: usize, zero: bool },
        Write,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let hold = (0..SIZE, 0..SIZE, any::<bool>()).prop_map(|(start, len, zero)| Step::Hold { start, len, zero });
        let len = |step| match step {
            Step::Hold { start, len, zero } => Step::Hold {
                start,
                len: len.min(SIZE - start),
                zero,
            },
            other => other,
        };
        prop::collection::vec(prop_oneof![3 => hold, 2 => Just(Step::Write)].prop_map(len), 0..60)
    }

    /// Held changes over a disk, against a disk that has them all.
    fn check(steps: &[Step]) {
        let (mut disk, mut model) = ([0xffu8; SIZE], [0xffu8; SIZE]);
        let mut overlay = Overlay::default();
        let mut held: Vec<(u64, Arc<DiskChange>)> = Vec::new();
        for (number, step) in steps.iter().enumerate() {
            match step {
                Step::Hold { start, len, zero } => {
                    let (offset, value) = (*start as u64, if *zero { 0 } else { number as u8 + 1 });
                    let change = if *zero {
                        let (len, unmap) = (*len as u64, true);
                        DiskChange::Zero { offset, len, unmap }
                    } else {
                        let data = vec![value; *len];
                        DiskChange::Write { offset, data }
                    };
                    model[*start..start + len].fill(value);
                    let change = Arc::new(change);
                    overlay.insert(number as u64, &change);
                    held.push((number as u64, change));
                }
                Step::Write if !held.is_empty() => {
                    let (number, change) = held.remove(0);
                    let (offset, len) = change.range();
                    let to = &mut disk[offset as usize..(offset + len) as usize];
                    match &*change {
                        DiskChange::Write { data, .. } => to.copy_from_slice(data),
                        _ => to.fill(0),
                    }
                    overlay.remove(number, &change);
                }
                Step::Write => {}
            }
            for start in 0..SIZE {
                for len in [1, 3, SIZE - start] {
                    let len = len.min(SIZE - start);
                    let mut seen = disk;
                    let mut last = 0;
                    for piece in overlay.read(start as u64, len as u64) {
                        let from = piece.offset as usize;
                        assert!(from >= last.max(start) && piece.len > 0);
                        last = from + piece.len as usize;
                        assert!(last <= start + len);
                        match piece.bytes() {
                            Some(bytes) => seen[from..last].copy_from_slice(bytes),
                            None => seen[from..last].fill(0),
                        }
                    }
                    assert_eq!(seen[start..start + len], model[start..start + len]);
                }
            }
        }
        if held.is_empty() {
            assert!(overlay.segments.is_empty());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn r3_a_read_sees_held_changes_over_the_disk(steps in steps()) {
            check(&steps);
        }
    }

    #[test]
    fn what_lies_in_the_middle_of_an_older_change_splits_it() {
        let hold = |start, len, zero| Step::Hold { start, len, zero };
        check(&[
            hold(10, 30, false),
            hold(20, 5, true),
            hold(0, 64, false),
            Step::Write,
            hold(5, 50, true),
            Step::Write,
            Step::Write,
            Step::Write,
        ]);
        check(&[hold(3, 0, false), Step::Write]);
    }
}
