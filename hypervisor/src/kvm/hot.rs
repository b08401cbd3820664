//! Hot pages: pages that are written in nearly every stretch between two harvests.
//!
//! Logging a page costs a fault at its first write after each harvest. A hot page is left writable instead and counts as
//! written whenever all that was written is asked for. That is done by naming a slot that does not exist in its entry of
//! the ring before the entry is given back: KVM protects nothing then (kvm_reset_dirty_gfn). A KVM that protects it all the
//! same does no harm: the page is logged again, and is reported either way.
//!
//! A page becomes cold again by naming it in the entry of another page that is hot, or becomes so: KVM protects what the
//! entry says when it is given back. There are such entries whenever KVM itself writes to a hot page, as to a guest's clock or
//! steal time after each stop. Where many pages of a region are cold, they need not wait for so many entries: the region's
//! mapping is taken away from KVM for a moment, and each next access faults. That is never done for a single page, for the
//! kernel takes at least a region away (split_huge_pmd_address), and all of its pages would fault anew.

use std::collections::{BTreeMap, BTreeSet};

/// No slot has this number: KVM has fewer than 32,768.
pub(super) const NO_SLOT: u32 = 0xffff;

/// A page: slot, number.
pub(super) type Page = (u32, u64);

/// Pages whose last writes are remembered; a page may push another out.
const REMEMBERED: usize = 16384;

/// Harvests that a page may miss and still count as written all the time: a fault costs more than so many comparisons.
const MISSED: u64 = 32;

/// Pages of a region: 2 MiB, what the kernel may map as one.
pub(super) const REGION: u64 = 512;

/// Cold pages of a region for which its mapping is taken away.
const MANY_COLD: usize = 64;

/// Which pages are hot.
#[derive(Default)]
pub(super) struct Hot {
    most: usize,
    pages: BTreeSet<Page>,
    /// Those of them that are not written any more and wait to be protected.
    cold: BTreeSet<Page>,
    /// Harvests so far.
    turn: u64,
    /// Pages that were written, and the turn when that was seen last.
    recent: Vec<(Page, u64)>,
}

impl Hot {
    /// At most so many pages are hot from here on; those that are stay.
    pub(super) fn set_most(&mut self, most: usize) {
        self.most = most;
        if most > 0 && self.recent.is_empty() {
            self.recent = vec![((NO_SLOT, 0), 0); REMEMBERED];
        }
    }

    /// A page was found written, and its entry is given back to KVM: the page to name in it, which is protected then and
    /// is hot no longer; `None`: no page.
    pub(super) fn give_back(&mut self, page: Page) -> Option<Page> {
        if !self.written(page) {
            return Some(page);
        }
        let cold = self.cold.pop_first()?;
        self.pages.remove(&cold);
        Some(cold)
    }

    /// A page was found written. Whether it is hot; it may have become so in place of a cold one.
    fn written(&mut self, page: Page) -> bool {
        if self.most == 0 {
            return self.pages.contains(&page);
        }
        let Some((known, seen)) = self.recent.get_mut(page.1 as usize % REMEMBERED) else {
            return false;
        };
        // Seen now already: by another vCPU, or by a vCPU that collected.
        let again = *known == page && *seen < self.turn && *seen + 1 + MISSED >= self.turn;
        (*known, *seen) = (page, self.turn);
        if again && (self.pages.len() < self.most || !self.cold.is_empty()) {
            self.pages.insert(page);
        }
        self.pages.contains(&page)
    }

    /// A harvest: the pages that count as written.
    pub(super) fn harvest(&mut self) -> &BTreeSet<Page> {
        self.turn += 1;
        &self.pages
    }

    /// How many are hot.
    pub(super) fn count(&self) -> usize {
        self.pages.len()
    }

    /// Of these pages, those that are hot are cold now.
    pub(super) fn note_cold(&mut self, pages: &[Page]) {
        self.cold.extend(pages.iter().filter(|page| self.pages.contains(page)));
    }

    /// The first pages of regions whose mapping is to be taken away: those with many cold pages, or, if no page may be hot,
    /// those with hot ones.
    pub(super) fn cold_regions(&self) -> Vec<Page> {
        let (pages, many) = match self.most {
            0 => (&self.pages, 1),
            _ => (&self.cold, MANY_COLD),
        };
        let mut counts = BTreeMap::<Page, usize>::new();
        for &(slot, page) in pages {
            *counts.entry((slot, page / REGION * REGION)).or_default() += 1;
        }
        counts.retain(|_, count| *count >= many);
        counts.into_keys().collect()
    }

    /// The mapping of the region from `first` on was taken away: its hot pages, which are so no longer.
    pub(super) fn cool_region(&mut self, first: Page) -> Vec<Page> {
        let region = first..(first.0, first.1 + REGION);
        let cooled: Vec<_> = self.pages.range(region).copied().collect();
        for page in &cooled {
            self.pages.remove(page);
            self.cold.remove(page);
        }
        cooled
    }

    /// Every page is being protected: none is hot, and none becomes so until [`Hot::set_most`].
    pub(super) fn clear(&mut self) {
        self.pages.clear();
        self.cold.clear();
        self.most = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_written_again_and_again_is_hot_until_it_is_cooled() {
        let mut hot = Hot::default();
        assert!(!hot.written((0, 7)));
        hot.set_most(2);
        hot.harvest();
        assert!(!hot.written((0, 7)) && !hot.written((0, 7)));
        hot.harvest();
        assert!(hot.written((0, 7)));
        assert!(!hot.written((0, 8)));
        for _ in 0..=MISSED {
            assert_eq!(*hot.harvest(), BTreeSet::from([(0, 7)]));
        }
        assert!(hot.written((0, 8)), "a few misses do not matter");
        assert!(!hot.written((1, 8)), "another page in the same place");
        hot.harvest();
        assert!(!hot.written((1, 8)), "there are enough");
        hot.note_cold(&[(0, 7), (0, 9)]);
        assert_eq!(hot.give_back((1, 9)), Some((1, 9)), "it is not hot itself");
        assert_eq!(hot.give_back((0, 8)), Some((0, 7)));
        assert_eq!(hot.give_back((0, 8)), None);
        for again in [false, true] {
            hot.harvest();
            assert_eq!(hot.written((1, 8)), again);
        }
        assert_eq!(*hot.harvest(), BTreeSet::from([(0, 8), (1, 8)]));
        hot.set_most(0);
        assert!(hot.written((0, 8)), "it stays until it is cooled");
        hot.set_most(2);
        hot.clear();
        hot.harvest();
        assert!(!hot.written((0, 8)) && hot.count() == 0);
    }

    #[test]
    fn many_cold_pages_of_a_region_are_cooled_at_once() {
        let mut hot = Hot::default();
        hot.set_most(1000);
        for _ in 0..2 {
            hot.harvest();
            (0..REGION + 9).for_each(|page| {
                hot.written((3, page));
            });
        }
        let cold: Vec<_> = (0..MANY_COLD as u64).map(|page| (3, 8 * page)).collect();
        hot.note_cold(&cold[1..]);
        assert!(hot.cold_regions().is_empty());
        hot.note_cold(&cold);
        assert_eq!(hot.cold_regions(), [(3, 0)]);
        assert_eq!(hot.cool_region((3, 0)).len(), REGION as usize);
        assert!(hot.cold_regions().is_empty() && hot.count() == 9);
        hot.set_most(0);
        assert_eq!(hot.cold_regions(), [(3, REGION)]);
        assert_eq!(hot.cool_region((3, REGION)).len(), 9);
        assert_eq!(hot.count(), 0);
    }
}
