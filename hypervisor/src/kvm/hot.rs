//! Hot pages: pages that are written in nearly every stretch between two harvests.
//!
//! Logging a page costs a fault at its first write after each harvest. A hot page is left writable instead and counts as
//! written whenever all that was written is asked for. That is done by naming a slot that does not exist in its entry of
//! the ring before the entry is given back: KVM protects nothing then (kvm_reset_dirty_gfn). A KVM that protects it all the
//! same does no harm: the page is logged again, and is reported either way.
//!
//! A page becomes cold again by taking its mapping away from KVM for a moment: the next write faults, and is logged.

use std::collections::BTreeSet;

/// No slot has this number: KVM has fewer than 32,768.
pub(super) const NO_SLOT: u32 = 0xffff;

/// A page: slot, number.
pub(super) type Page = (u32, u64);

/// Pages whose last writes are remembered; a page may push another out.
const REMEMBERED: usize = 16384;

/// Harvests that a page may miss and still count as written all the time: a fault costs more than so many comparisons.
const MISSED: u64 = 32;

/// Which pages are hot.
#[derive(Default)]
pub(super) struct Hot {
    most: usize,
    pages: BTreeSet<Page>,
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

    /// A page was found written. Whether it is to be left writable.
    pub(super) fn written(&mut self, page: Page) -> bool {
        if self.most == 0 {
            return self.pages.contains(&page);
        }
        let Some((known, seen)) = self.recent.get_mut(page.1 as usize % REMEMBERED) else {
            return false;
        };
        // Seen now already: by another vCPU, or by a vCPU that collected.
        let again = *known == page && *seen < self.turn && *seen + 1 + MISSED >= self.turn;
        (*known, *seen) = (page, self.turn);
        if again && self.pages.len() < self.most {
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

    /// Whether it is hot.
    pub(super) fn contains(&self, page: Page) -> bool {
        self.pages.contains(&page)
    }

    /// It is not any more.
    pub(super) fn cool(&mut self, page: Page) {
        self.pages.remove(&page);
    }

    /// All that are hot.
    pub(super) fn all(&self) -> Vec<Page> {
        self.pages.iter().copied().collect()
    }

    /// Every page is being protected: none is hot, and none becomes so until [`Hot::set_most`].
    pub(super) fn clear(&mut self) {
        self.pages.clear();
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
        assert!(hot.contains((0, 7)));
        hot.cool((0, 7));
        assert!(!hot.contains((0, 7)));
        hot.harvest();
        assert!(hot.written((1, 8)));
        assert_eq!(hot.all(), [(0, 8), (1, 8)]);
        hot.set_most(0);
        assert!(hot.written((0, 8)), "it stays until it is cooled");
        hot.set_most(2);
        hot.clear();
        hot.harvest();
        assert!(!hot.written((0, 8)) && hot.all().is_empty());
    }
}
