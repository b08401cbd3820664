//! What was sent last of some pages, so that of a page written again only the changed lines need be sent.
//!
//! The cache is a table that a page's number leads into directly; two pages with the same place compete for it. A page
//! that is there is what the other side has, or will have when it has applied what was sent.

use super::lines::difference;
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

/// The cache.
#[derive(Debug, Default)]
pub struct SentPages {
    /// Address of the page in each place.
    pages: Vec<u64>,
    /// Contents. Not touched before it is used, so that an idle VM's cache takes no memory.
    bytes: Vec<u8>,
    competed: u32,
}

impl SentPages {
    /// Makes it `mib` MiB large, and empty if that is a change; 0: no cache.
    pub fn resize(&mut self, mib: u32) {
        let places = (mib as usize) << 20 >> PAGE_SIZE.trailing_zeros();
        if places != self.pages.len() {
            *self = Self {
                pages: vec![NONE; places],
                bytes: vec![0; places * PAGE_SIZE],
                competed: 0,
            };
        }
    }

    fn place(&self, gpa: u64) -> Option<usize> {
        let place = (gpa / PAGE_SIZE as u64).checked_rem(self.pages.len() as u64);
        place.map(|place| place as usize)
    }

    /// The page at `gpa` becomes `new`: how that is to be sent. It counts as sent from here on.
    pub fn update(&mut self, gpa: u64, new: &[u8; PAGE_SIZE]) -> How {
        let Some(place) = self.place(gpa) else {
            return How::Whole;
        };
        let Some(old) = self.bytes[place * PAGE_SIZE..].first_chunk_mut::<PAGE_SIZE>() else {
            return How::Whole;
        };
        let holder = &mut self.pages[place];
        if *holder == gpa {
            let mask = difference(old, new);
            if mask.count_ones() > MOST_LINES {
                *old = *new;
                return How::Whole;
            }
            for (address, len) in (super::lines::PageLines { gpa: 0, mask }).runs() {
                let at = address as usize;
                old[at..at + len].copy_from_slice(&new[at..at + len]);
            }
            return How::Lines(mask);
        }
        if *holder != NONE {
            self.competed = self.competed.wrapping_add(1);
            if !self.competed.is_multiple_of(TAKES_OVER) {
                return How::Whole;
            }
        }
        *holder = gpa;
        *old = *new;
        How::Whole
    }

    /// The page at `gpa` becomes something that is not told here.
    pub fn forget(&mut self, gpa: u64) {
        if let Some(place) = self.place(gpa)
            && self.pages[place] == gpa
        {
            self.pages[place] = NONE;
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
