//! The pages of one epoch, copied out of guest RAM.
//!
//! With many pages written, most of them are copied while the guest still runs; when it stands still only those follow
//! that it wrote again meanwhile, each to the place of its older copy. So the pause grows with what the guest writes
//! during the copying, not with what it wrote during the epoch.

use crate::machine::{PAGE_SIZE, PageRun};

/// RAM copied per epoch for which room is kept ready, in bytes.
const ROOM: usize = 16 << 20;

const HUGE_PAGE: usize = 2 << 20;

/// After so many epochs that needed less than a quarter of the room, the rest is given back.
const SMALL_EPOCHS: u32 = 500;

/// Pages of one epoch and their content.
pub(super) struct Stage {
    /// In the order of their content in `bytes`.
    runs: Vec<PageRun>,
    /// The same, ascending by address, with the page of `bytes` where each begins.
    places: Vec<(PageRun, u64)>,
    bytes: Vec<u8>,
    pages: u64,
    small: u32,
}

/// Pages of `runs`.
pub(super) fn pages(runs: &[PageRun]) -> u64 {
    runs.iter().map(|run| run.count).sum()
}

/// [`ROOM`] bytes, touched now, so that no page of them has to be found while the guest stands still. In huge pages where the
/// host has them: less to translate for each copied page.
fn room() -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::with_capacity(ROOM);
    let start = bytes.as_mut_ptr();
    let skipped = start.align_offset(HUGE_PAGE).min(ROOM);
    let len = (ROOM - skipped) / HUGE_PAGE * HUGE_PAGE;
    // SAFETY: madvise(2) is given memory of this allocation, whose content it leaves as it is. A kernel without huge pages
    // refuses, which does no harm.
    unsafe { libc::madvise(start.add(skipped).cast(), len, libc::MADV_HUGEPAGE) };
    bytes.resize(ROOM, 1);
    bytes
}

impl Stage {
    pub(super) fn new() -> Self {
        Self {
            runs: Vec::new(),
            places: Vec::new(),
            bytes: room(),
            pages: 0,
            small: 0,
        }
    }

    /// Forgets the pages.
    pub(super) fn clear(&mut self) {
        let used = self.pages as usize * PAGE_SIZE;
        let large = self.bytes.len() > ROOM && used < self.bytes.len() / 4;
        self.small = if large { self.small + 1 } else { 0 };
        if self.small >= SMALL_EPOCHS {
            self.small = 0;
            self.bytes.truncate((self.bytes.len() / 2).max(ROOM));
            self.bytes.shrink_to_fit();
        }
        self.runs.clear();
        self.places.clear();
        self.pages = 0;
    }

    /// Number of pages.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether the page at `gpa` is one of them.
    pub(super) fn contains(&self, gpa: u64) -> bool {
        let at = self.places.partition_point(|(run, _)| run.end() <= gpa);
        self.places.get(at).is_some_and(|(run, _)| run.gpa <= gpa)
    }

    /// The pages and their content.
    pub(super) fn content(&mut self) -> (&[PageRun], &mut [u8]) {
        (&self.runs, &mut self.bytes[..self.pages as usize * PAGE_SIZE])
    }

    /// Room of `len` bytes for something else than the pages; the next pages take it.
    pub(super) fn scratch(&mut self, len: usize) -> &mut [u8] {
        let used = self.pages as usize * PAGE_SIZE;
        if self.bytes.len() < used + len {
            self.bytes.resize(used + len, 0);
        }
        &mut self.bytes[used..][..len]
    }

    /// Copies `written` pages (ascending) by means of `read` (address, where to); those that are here already anew.
    pub(super) fn copy<E>(
        &mut self,
        written: &[PageRun],
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let known = self.places.len();
        let mut next = 0;
        for run in written {
            let mut gpa = run.gpa;
            while gpa < run.end() {
                while next < known && self.places[next].0.end() <= gpa {
                    next += 1;
                }
                let (until, place) = match self.places[..known].get(next) {
                    Some((have, at)) if have.gpa <= gpa => (
                        have.end().min(run.end()),
                        Some(at + (gpa - have.gpa) / PAGE_SIZE as u64),
                    ),
                    Some((have, _)) => (have.gpa.min(run.end()), None),
                    None => (run.end(), None),
                };
                let count = (until - gpa) / PAGE_SIZE as u64;
                let at = place.unwrap_or_else(|| self.append(PageRun { gpa, count }));
                let at = at as usize * PAGE_SIZE;
                read(gpa, &mut self.bytes[at..at + count as usize * PAGE_SIZE])?;
                gpa = until;
            }
        }
        if known > 0 {
            self.places.sort_unstable_by_key(|(run, _)| run.gpa);
        }
        Ok(())
    }

    fn append(&mut self, run: PageRun) -> u64 {
        let at = self.pages;
        self.pages += run.count;
        let needed = self.pages as usize * PAGE_SIZE;
        if self.bytes.len() < needed {
            self.bytes.resize(needed.next_multiple_of(ROOM), 0);
        }
        self.runs.push(run);
        self.places.push((run, at));
        at
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn run(page: u64, count: u64) -> PageRun {
        PageRun {
            gpa: page * PAGE_SIZE as u64,
            count,
        }
    }

    /// Copies passes of written pages; each page's content tells the pass in which it was written last.
    fn check(stage: &mut Stage, passes: &[&[PageRun]]) {
        let mut expected = BTreeMap::new();
        for (pass, written) in passes.iter().enumerate() {
            let mut read = |gpa: u64, to: &mut [u8]| {
                for (i, page) in to.chunks_mut(PAGE_SIZE).enumerate() {
                    page[..8].copy_from_slice(&(gpa + (i * PAGE_SIZE) as u64).to_le_bytes());
                    page[8] = pass as u8;
                }
                Ok::<(), ()>(())
            };
            stage.copy(written, &mut read).unwrap();
            let pages = written
                .iter()
                .flat_map(|r| (0..r.count).map(|i| r.gpa + i * PAGE_SIZE as u64));
            expected.extend(pages.map(|gpa| (gpa, pass as u8)));
        }
        let (runs, content) = stage.content();
        let mut found = BTreeMap::new();
        let mut content = content.chunks(PAGE_SIZE);
        for run in runs {
            for i in 0..run.count {
                let (gpa, page) = (run.gpa + i * PAGE_SIZE as u64, content.next().unwrap());
                assert_eq!(page[..8], gpa.to_le_bytes());
                assert_eq!(found.insert(gpa, page[8]), None, "twice");
            }
        }
        assert_eq!(content.next(), None);
        assert_eq!(found, expected);
        for page in 0..100 {
            let gpa = page * PAGE_SIZE as u64;
            assert_eq!(stage.contains(gpa), expected.contains_key(&gpa));
        }
    }

    #[test]
    fn a_page_written_again_keeps_its_place_and_gets_its_new_content() {
        let mut stage = Stage::new();
        check(
            &mut stage,
            &[
                &[run(10, 5), run(20, 1), run(30, 10)],
                &[run(8, 4), run(14, 8), run(25, 2), run(39, 3)],
                &[],
                &[run(0, 50)],
            ],
        );
        stage.clear();
        assert_eq!(stage.pages(), 0);
        check(&mut stage, &[&[run(3, 1)], &[run(2, 1)], &[run(2, 2)]]);
    }

    #[test]
    fn room_grows_and_is_given_back_after_many_small_epochs() {
        let mut stage = Stage::new();
        let large = [run(0, 3 * (ROOM / PAGE_SIZE) as u64)];
        stage.copy(&large, |_, _| Ok::<(), ()>(())).unwrap();
        assert_eq!(stage.bytes.len(), 3 * ROOM);
        (0..SMALL_EPOCHS * 3).for_each(|_| stage.clear());
        assert_eq!(stage.bytes.len(), ROOM);
        check(&mut stage, &[&large]);
    }
}
