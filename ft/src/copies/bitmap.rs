//! A set of blocks of one disk.

use super::{BLOCK, BlockRun};

/// Blocks of a disk, one bit for each. Words have 32 bits, as in the sidecar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockMap {
    words: Vec<u32>,
    blocks: u64,
}

impl BlockMap {
    /// None of the blocks of a disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        let blocks = size.div_ceil(BLOCK);
        Self {
            words: vec![0; blocks.div_ceil(32) as usize],
            blocks,
        }
    }

    /// Number of blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    pub(super) fn words(&self) -> &[u32] {
        &self.words
    }

    /// Blocks beyond the end of the disk are left out.
    pub(super) fn set_word(&mut self, index: usize, bits: u32) {
        let past = (self.blocks - (index as u64) * 32).min(32) as u32;
        let mask = if past == 32 { u32::MAX } else { (1 << past) - 1 };
        self.words[index] = bits & mask;
    }

    /// Adds a block; whether it is new. One beyond the end is none.
    pub fn insert(&mut self, block: u64) -> bool {
        if block >= self.blocks {
            return false;
        }
        let (word, bit) = (&mut self.words[(block / 32) as usize], 1 << (block % 32));
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Adds blocks.
    pub fn insert_run(&mut self, run: BlockRun) {
        let end = run.first.saturating_add(run.count).min(self.blocks);
        for block in run.first..end {
            self.insert(block);
        }
    }

    /// Whether a block is in it.
    pub fn contains(&self, block: u64) -> bool {
        block < self.blocks && self.words[(block / 32) as usize] & (1 << (block % 32)) != 0
    }

    /// Adds all blocks of another map of the same disk.
    pub fn join(&mut self, other: &Self) {
        self.words.iter_mut().zip(&other.words).for_each(|(a, b)| *a |= b);
    }

    /// Removes all.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Them, ascending and joined.
    pub fn runs(&self) -> Vec<BlockRun> {
        let mut runs: Vec<BlockRun> = Vec::new();
        for (index, word) in self.words.iter().enumerate().filter(|(_, word)| **word != 0) {
            for bit in (0..32).filter(|bit| word & (1 << bit) != 0) {
                let block = index as u64 * 32 + bit;
                match runs.last_mut() {
                    Some(run) if run.first + run.count == block => run.count += 1,
                    _ => runs.push(BlockRun { first: block, count: 1 }),
                }
            }
        }
        runs
    }

    /// At most `max` runs (at least 1) that contain them all: the smallest gaps are closed.
    pub fn coarse_runs(&self, max: usize) -> Vec<BlockRun> {
        let mut runs = self.runs();
        let mut gap = 1;
        while runs.len() > max.max(1) {
            let mut joined: Vec<BlockRun> = Vec::new();
            for run in runs {
                match joined.last_mut() {
                    Some(last) if run.first - (last.first + last.count) <= gap => {
                        last.count = run.first + run.count - last.first;
                    }
                    _ => joined.push(run),
                }
            }
            runs = joined;
            gap *= 2;
        }
        runs
    }
}

/// The blocks of a range of bytes.
pub(super) fn blocks_of(offset: u64, len: u64) -> std::ops::Range<u64> {
    if len == 0 {
        return 0..0;
    }
    offset / BLOCK..offset.saturating_add(len - 1) / BLOCK + 1
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set(size in 0u64..200 * BLOCK, blocks in proptest::collection::vec(0u64..250, 0..300)) {
            let mut map = BlockMap::new(size);
            let mut set = BTreeSet::new();
            for block in blocks {
                let fits = block < size.div_ceil(BLOCK);
                prop_assert_eq!(map.insert(block), fits && set.insert(block));
            }
            prop_assert_eq!(map.len(), set.len() as u64);
            prop_assert_eq!(map.is_empty(), set.is_empty());
            prop_assert!((0..250).all(|block| map.contains(block) == set.contains(&block)));
            let flat = |runs: &[BlockRun]| runs.iter().flat_map(|r| r.first..r.first + r.count).collect::<BTreeSet<_>>();
            prop_assert_eq!(&flat(&map.runs()), &set);
            for max in [1, 3, 10] {
                let runs = map.coarse_runs(max);
                prop_assert!(runs.len() <= max && flat(&runs).is_superset(&set));
                prop_assert!(flat(&runs).iter().all(|block| *block < map.blocks()));
            }
        }
    }

    #[test]
    fn bytes_and_blocks() {
        assert!(blocks_of(7, 0).is_empty());
        assert_eq!(blocks_of(BLOCK - 1, 2), 0..2);
        assert_eq!(blocks_of(BLOCK, BLOCK), 1..2);
        let mut map = BlockMap::new(33 * BLOCK);
        map.set_word(1, u32::MAX);
        assert_eq!(map.runs(), [BlockRun { first: 32, count: 1 }]);
    }
}
