//! What was sent last of some pages, so that of a page written again only the changed lines need be sent.
//!
//! The cache is a table that a page's number leads into directly; two pages with the same place compete for it. A page
//! that is there is what the other side has, or will have when it has applied what was sent.

use super::lines::{PageLines, difference};
use crate::machine::PAGE_SIZE;

/// Of the pages that find another in their place, one in so many takes it. So a set of pages that is larger than the
/// cache leaves most of what is cached alone, and pages that are not written any more go in the end.
const TAKES_OVER: u32 = 8;

/// No page has this address.
const NONE: u64 = u64::MAX;

/// How a page is to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Whole.
    Whole,
    /// These lines; 0: the other side has it already.
    Lines(u64),
}

/// Most lines of a page that are not sent as a whole page.
const MOST_LINES: u32 = 48;

/// A page that was written all over twice in a row is looked at again only after so many times that it is written; twice as
/// many each time that it was written all over again, up to 2 to the power of this.
const MOST_STRIKES: u8 = 6;

#[derive(Debug, Clone, Copy)]
struct Place {
    gpa: u64,
    /// How often in a row it was written all over when it was looked at.
    strikes: u8,
    /// Times that it is sent whole without a look. Until they are over its content here is not what was sent.
    skip: u8,
    /// How often in a row it was as it was sent.
    same: u8,
}

const VACANT: Place = Place {
    gpa: NONE,
    strikes: 0,
    skip: 0,
    same: 0,
};

/// So often in a row it must be the same to count as cold.
const COLD: u8 = 64;

/// Cold pages told at a time.
const COLD_AT_ONCE: usize = 32;

/// The cache.
#[derive(Debug, Default)]
pub struct SentPages {
    places: Vec<Place>,
    /// Contents. Not touched before it is used, so that an idle VM's cache takes no memory.
    bytes: Vec<u8>,
    competed: u32,
    cold: Vec<u64>,
}

impl SentPages {
    /// Whether there is a cache.
    pub fn is_on(&self) -> bool {
        !self.places.is_empty()
    }

    /// Pages that came again and again although they were not changed.
    pub fn take_cold(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.cold)
    }

    /// Makes it `mib` MiB large, and empty if that is a change; 0: no cache.
    pub fn resize(&mut self, mib: u32) {
        let places = (mib as usize) << 20 >> PAGE_SIZE.trailing_zeros();
        if places != self.places.len() {
            *self = Self {
                places: vec![VACANT; places],
                bytes: vec![0; places * PAGE_SIZE],
                competed: 0,
                cold: Vec::new(),
            };
        }
    }

    fn place(&self, gpa: u64) -> Option<usize> {
        let place = (gpa / PAGE_SIZE as u64).checked_rem(self.places.len() as u64);
        place.map(|place| place as usize)
    }

    /// The page at `gpa` becomes `new`: how that is to be sent. It counts as sent from here on.
    pub fn update(&mut self, gpa: u64, new: &[u8; PAGE_SIZE]) -> How {
        let Some(at) = self.place(gpa) else {
            return How::Whole;
        };
        let Some(old) = self.bytes[at * PAGE_SIZE..].first_chunk_mut::<PAGE_SIZE>() else {
            return How::Whole;
        };
        let place = &mut self.places[at];
        if place.gpa != gpa {
            if place.gpa != NONE {
                self.competed = self.competed.wrapping_add(1);
                if !self.competed.is_multiple_of(TAKES_OVER) {
                    return How::Whole;
                }
            }
            *place = Place { gpa, ..VACANT };
            *old = *new;
            return How::Whole;
        }
        if place.skip > 0 {
            place.skip -= 1;
            if place.skip == 0 {
                *old = *new;
            }
            return How::Whole;
        }
        let lines = PageLines {
            gpa: 0,
            mask: difference(old, new),
        };
        if lines.mask.count_ones() > MOST_LINES {
            place.skip = (1 << place.strikes) - 1;
            place.strikes = (place.strikes + 1).min(MOST_STRIKES);
            place.same = 0;
            if place.skip == 0 {
                *old = *new;
            }
            return How::Whole;
        }
        place.strikes = 0;
        if lines.mask == 0 {
            self.note_same(at);
            return How::Lines(0);
        }
        place.same = 0;
        for (address, len) in lines.runs() {
            let at = address as usize;
            old[at..at + len].copy_from_slice(&new[at..at + len]);
        }
        How::Lines(lines.mask)
    }

    fn note_same(&mut self, at: usize) {
        let place = &mut self.places[at];
        place.same += 1;
        if place.same == COLD {
            place.same = 0;
            if self.cold.len() < COLD_AT_ONCE {
                self.cold.push(place.gpa);
            }
        }
    }

    /// Whether the page at `gpa` was as it was sent when it was looked at last: then it is worth asking
    /// [`SentPages::is_same`] before it is copied.
    pub fn may_be_same(&self, gpa: u64) -> bool {
        let place = self.place(gpa).map(|at| self.places[at]);
        place.is_some_and(|place| place.gpa == gpa && place.skip == 0 && place.same > 0)
    }

    /// Whether the page at `gpa` is as it was sent. If so it need not be given to [`SentPages::update`].
    pub fn is_same(&mut self, gpa: u64, new: &[u8; PAGE_SIZE]) -> bool {
        let Some(at) = self.place(gpa) else { return false };
        let place = &self.places[at];
        let same = place.gpa == gpa && place.skip == 0 && self.bytes[at * PAGE_SIZE..].first_chunk() == Some(new);
        if same {
            self.note_same(at);
        }
        same
    }

    /// The page at `gpa` becomes something that is not told here.
    pub fn forget(&mut self, gpa: u64) {
        if let Some(at) = self.place(gpa)
            && self.places[at].gpa == gpa
        {
            self.places[at] = VACANT;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_whole_first_then_its_changed_lines_then_nothing() {
        let mut sent = SentPages::default();
        let mut page = [7; PAGE_SIZE];
        assert_eq!(sent.update(0x3000, &page), How::Whole);
        assert_eq!(sent.update(0x3000, &page), How::Whole, "there is no cache");
        sent.resize(1);
        assert_eq!(sent.update(0x3000, &page), How::Whole);
        assert_eq!(sent.update(0x3000, &page), How::Lines(0));
        page[65] = 8;
        page[4095] = 8;
        assert_eq!(sent.update(0x3000, &page), How::Lines(1 << 63 | 2));
        assert_eq!(sent.update(0x3000, &page), How::Lines(0));
        page.fill(9);
        assert_eq!(sent.update(0x3000, &page), How::Whole);
        assert_eq!(sent.update(0x3000, &page), How::Lines(0));
        sent.forget(0x3000);
        assert_eq!(sent.update(0x3000, &page), How::Whole);
        sent.resize(1);
        assert_eq!(sent.update(0x3000, &page), How::Lines(0));
        sent.resize(2);
        assert_eq!(sent.update(0x3000, &page), How::Whole);
    }

    #[test]
    fn a_page_that_is_always_written_all_over_is_hardly_looked_at() {
        let mut sent = SentPages::default();
        sent.resize(1);
        let page = |n: usize| [n as u8; PAGE_SIZE];
        (0..1000).for_each(|n| assert_eq!(sent.update(0, &page(n)), How::Whole));
        assert_eq!(sent.places[0].strikes, MOST_STRIKES);
        // Sooner or later it is seen that it has become another sort of page.
        let seen = (0..64).find(|_| sent.update(0, &page(7)) == How::Lines(0));
        assert!(seen.is_some());
        assert_eq!(sent.update(0, &page(7)), How::Lines(0));
    }

    #[test]
    fn only_a_page_that_is_known_to_be_as_it_was_sent_is_the_same() {
        let mut sent = SentPages::default();
        let (one, two) = ([1; PAGE_SIZE], [2; PAGE_SIZE]);
        assert!(!sent.may_be_same(0) && !sent.is_same(0, &one), "there is no cache");
        sent.resize(1);
        assert!(!sent.is_same(0, &one));
        sent.update(0, &one);
        assert!(!sent.may_be_same(0), "it was not the same yet");
        assert!(sent.is_same(0, &one) && sent.may_be_same(0));
        assert!(!sent.is_same(0, &two) && !sent.is_same(1 << 20, &one));
        sent.update(0, &two);
        assert!(!sent.may_be_same(0) && !sent.is_same(0, &one) && sent.is_same(0, &two));
        // While it is sent without a look, what is known of it is old.
        sent.update(0, &one);
        assert!(!sent.is_same(0, &two) && !sent.is_same(0, &one));
        for _ in 0..COLD {
            sent.update(1 << 12, &one);
        }
        assert!(sent.is_same(1 << 12, &one) && sent.take_cold() == [1 << 12]);
    }

    #[test]
    fn a_page_that_comes_unchanged_again_and_again_is_cold() {
        let mut sent = SentPages::default();
        assert!(!sent.is_on());
        sent.resize(1);
        let page = [7; PAGE_SIZE];
        for _ in 0..=COLD {
            assert!(sent.take_cold().is_empty());
            sent.update(0x5000, &page);
        }
        assert_eq!(sent.take_cold(), [0x5000]);
        for n in 0..3 * COLD {
            sent.update(0x5000, &[n / 2; PAGE_SIZE]);
        }
        assert!(sent.take_cold().is_empty());
    }

    #[test]
    fn pages_that_compete_are_whole_and_one_in_some_takes_the_place() {
        let mut sent = SentPages::default();
        sent.resize(1);
        let (page, other, size) = ([1; PAGE_SIZE], [2; PAGE_SIZE], 1 << 20);
        sent.update(0, &page);
        for _ in 1..TAKES_OVER {
            assert_eq!(sent.update(size, &other), How::Whole);
            assert_eq!(sent.update(0, &page), How::Lines(0));
        }
        assert_eq!(sent.update(size, &other), How::Whole);
        assert_eq!(sent.update(size, &other), How::Lines(0));
        assert_eq!(sent.update(0, &other), How::Whole);
        sent.forget(0);
        assert_eq!(sent.update(size, &other), How::Lines(0));
    }
}
