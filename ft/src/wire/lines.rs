//! Pages of which only some lines changed since they were sent last.
//!
//! A line is 64 bytes, so a page has 64 of them and a mask of one word says which are sent.

use crate::machine::PAGE_SIZE;

/// Bytes of a line.
pub const LINE: usize = PAGE_SIZE / 64;

/// The changed lines of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageLines {
    /// Guest physical address of the page.
    pub gpa: u64,
    /// Bit n: line n is sent. Never 0.
    pub mask: u64,
}

impl PageLines {
    /// Bytes of the lines.
    pub fn bytes(self) -> usize {
        self.mask.count_ones() as usize * LINE
    }

    /// The lines as runs of consecutive ones: (address, bytes of the run).
    pub fn runs(self) -> impl Iterator<Item = (u64, usize)> {
        let mut rest = self.mask;
        std::iter::from_fn(move || {
            let first = rest.trailing_zeros();
            if first == 64 {
                return None;
            }
            let count = (rest >> first).trailing_ones();
            // A run to the last line leaves nothing.
            rest &= u64::MAX.checked_shl(first + count).unwrap_or(0);
            Some((self.gpa + u64::from(first) * LINE as u64, count as usize * LINE))
        })
    }
}

/// The lines in which two pages differ.
pub fn difference(old: &[u8; PAGE_SIZE], new: &[u8; PAGE_SIZE]) -> u64 {
    let mut mask = 0;
    for (n, (old, new)) in old.chunks_exact(LINE).zip(new.chunks_exact(LINE)).enumerate() {
        // Without a branch in the line, so that it becomes a few vector instructions.
        let differs = old.iter().zip(new).fold(0, |all, (a, b)| all | (a ^ b));
        mask |= u64::from(differs != 0) << n;
    }
    mask
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_lines_of_the_difference_make_the_old_page_the_new_one(
            changes in proptest::collection::vec((0..PAGE_SIZE, 1u8..), 0..80),
        ) {
            let old = [0x5a; PAGE_SIZE];
            let mut new = old;
            for (at, by) in changes {
                new[at] ^= by;
            }
            let lines = PageLines { gpa: 0x7000, mask: difference(&old, &new) };
            let mut patched = old;
            let mut sent = 0;
            for (address, len) in lines.runs() {
                let at = (address - lines.gpa) as usize;
                patched[at..at + len].copy_from_slice(&new[at..at + len]);
                prop_assert!(at == 0 || lines.mask >> (at / LINE - 1) & 1 == 0);
                sent += len;
            }
            prop_assert!(patched == new);
            prop_assert_eq!(sent, lines.bytes());
        }
    }

    #[test]
    fn whole_and_edge_masks_make_whole_runs() {
        let runs = |mask| PageLines { gpa: 0, mask }.runs().collect::<Vec<_>>();
        assert_eq!(runs(u64::MAX), [(0, PAGE_SIZE)]);
        assert_eq!(runs(1), [(0, LINE)]);
        assert_eq!(runs(1 << 63), [(4032, LINE)]);
        assert_eq!(runs(1 << 63 | 6), [(64, 2 * LINE), (4032, LINE)]);
        assert_eq!(runs(0), []);
    }
}
