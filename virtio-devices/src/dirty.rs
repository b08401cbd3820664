//! The pages that the VMM itself wrote: vm-memory's dirty bitmap with a second level, so that taking the few dirty pages
//! of an epoch out of a large guest takes no longer than out of a small one.
//!
//! Any thread marks; one at a time takes. A bit of `groups` is set after the bits of its word, and taken before them: a
//! page that is marked meanwhile is found now or the next time.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

const PAGE_SHIFT: u32 = 12;

/// Dirty pages of a region of guest RAM.
#[derive(Debug, Default)]
pub struct DirtyPages {
    /// Bit n of word w: page 64 * w + n.
    words: Vec<AtomicU64>,
    /// Bit n of word g: words[64 * g + n] may have bits.
    groups: Vec<AtomicU64>,
}

fn zeroes(count: usize) -> Vec<AtomicU64> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}

impl DirtyPages {
    /// Takes all dirty pages, ascending: calls `f(w, bits)` where bit n of `bits` stands for page 64 * w + n.
    pub fn take(&self, mut f: impl FnMut(usize, u64)) {
        for (g, group) in self.groups.iter().enumerate() {
            // A look costs less than an exchange, and most find nothing.
            if group.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut rest = group.swap(0, Ordering::SeqCst);
            while rest != 0 {
                let w = g * 64 + rest.trailing_zeros() as usize;
                rest &= rest - 1;
                let bits = self.words.get(w).map_or(0, |word| word.swap(0, Ordering::SeqCst));
                if bits != 0 {
                    f(w, bits);
                }
            }
        }
    }
}

impl NewBitmap for DirtyPages {
    fn with_len(len: usize) -> Self {
        let words = len.div_ceil(64 << PAGE_SHIFT);
        Self {
            words: zeroes(words),
            groups: zeroes(words.div_ceil(64)),
        }
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyPages {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DirtyPages {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let (first, last) = (offset >> PAGE_SHIFT, offset.saturating_add(len - 1) >> PAGE_SHIFT);
        for w in first / 64..=last / 64 {
            let (Some(word), Some(group)) = (self.words.get(w), self.groups.get(w / 64)) else {
                return;
            };
            let from = first.max(w * 64) % 64;
            let to = last.min(w * 64 + 63) % 64;
            let bits = u64::MAX << from & u64::MAX >> (63 - to);
            if word.load(Ordering::SeqCst) & bits != bits {
                word.fetch_or(bits, Ordering::SeqCst);
            }
            let bit = 1 << (w % 64);
            if group.load(Ordering::SeqCst) & bit == 0 {
                group.fetch_or(bit, Ordering::SeqCst);
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset >> PAGE_SHIFT;
        let word = self.words.get(page / 64);
        word.is_some_and(|word| word.load(Ordering::SeqCst) >> (page % 64) & 1 != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PAGES: usize = 10_000;

    fn taken(dirty: &DirtyPages) -> BTreeSet<usize> {
        let mut pages = BTreeSet::new();
        dirty.take(|w, bits| pages.extend((0..64).filter(|n| bits >> n & 1 != 0).map(|n| w * 64 + n)));
        pages
    }

    proptest! {
        #[test]
        fn what_is_marked_is_taken_once(
            marks in proptest::collection::vec((0..PAGES << PAGE_SHIFT, 0usize..3_000_000), 0..20),
        ) {
            let dirty = DirtyPages::with_len(PAGES << PAGE_SHIFT);
            let mut expected = BTreeSet::new();
            for (offset, len) in marks {
                dirty.mark_dirty(offset, len);
                expected.extend((offset..offset + len).step_by(1 << PAGE_SHIFT).map(|at| at >> PAGE_SHIFT));
                expected.extend((len > 0).then(|| (offset + len - 1) >> PAGE_SHIFT));
                prop_assert_eq!(dirty.dirty_at(offset), expected.contains(&(offset >> PAGE_SHIFT)));
            }
            // The last word has bits for some more pages.
            let end = PAGES.next_multiple_of(64);
            expected.retain(|page| *page < end);
            prop_assert_eq!(taken(&dirty), expected);
            prop_assert!(taken(&dirty).is_empty());
        }
    }

    #[test]
    fn nothing_is_lost_while_others_mark() {
        let dirty = DirtyPages::with_len(PAGES << PAGE_SHIFT);
        let mut seen = BTreeSet::new();
        std::thread::scope(|scope| {
            let markers: Vec<_> = (0..2)
                .map(|n| {
                    let dirty = &dirty;
                    scope.spawn(move || {
                        (n..PAGES)
                            .step_by(2)
                            .for_each(|page| dirty.mark_dirty(page << PAGE_SHIFT, 1))
                    })
                })
                .collect();
            while markers.iter().any(|marker| !marker.is_finished()) {
                seen.append(&mut taken(&dirty));
            }
        });
        seen.append(&mut taken(&dirty));
        assert_eq!(seen.len(), PAGES);
    }
}
