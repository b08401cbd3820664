//! Bits of the shadow that flip by themselves, and the audit that finds them.

use ft::audit::{ChunkSum, Mismatch, PageSum, Place};
use ft::core::backup::{Compared, Event};
use ft::core::staging::StagedEpoch;
use ft::machine::PAGE_SIZE;

use crate::guest::{BLOCK, BLOCKS, Guest, PAGES};
use crate::world::{Bug, World};

/// A word of the shadow that is not what was written there.
#[derive(Debug, Clone, Copy)]
pub struct Flip {
    /// What was.
    before: u64,
    /// A comparison found it.
    known: bool,
}

/// Words that can flip: pages, then blocks.
pub const WORDS: usize = PAGES + BLOCKS;

fn word(guest: &mut Guest, index: usize) -> &mut u64 {
    match index.checked_sub(PAGES) {
        None => &mut guest.ram[index],
        Some(block) => &mut guest.disk[block],
    }
}

fn index(place: &Place) -> usize {
    match place {
        Place::Page { gpa } => *gpa as usize / PAGE_SIZE,
        Place::Chunk { offset, .. } => PAGES + (offset / BLOCK) as usize,
    }
}

fn crc(value: u64) -> u32 {
    crc32c::crc32c(&value.to_le_bytes())
}

/// Checksums of an epoch.
#[derive(Debug, Default)]
pub struct Sums {
    pub pages: Vec<PageSum>,
    pub chunks: Vec<ChunkSum>,
}

impl Sums {
    /// Of these words of the guest.
    pub fn of(guest: &Guest, words: impl Iterator<Item = usize>) -> Self {
        let mut sums = Self::default();
        for i in words {
            match i.checked_sub(PAGES) {
                None => sums.pages.push(PageSum {
                    gpa: (i * PAGE_SIZE) as u64,
                    crc: crc(guest.ram[i]),
                }),
                Some(block) => sums.chunks.push(ChunkSum {
                    disk: 0,
                    offset: block as u64 * BLOCK,
                    len: BLOCK as u32,
                    crc: crc(guest.disk[block]),
                }),
            }
        }
        sums
    }
}

impl World {
    /// A bit of the shadow flips.
    pub fn flip_shadow(&mut self, i: usize) {
        let b = &mut self.s.b;
        if b.alive && !b.live && !b.out && b.whole > 0 {
            let word = word(&mut b.shadow, i);
            let before = *word;
            *word ^= 0x10;
            b.flips.entry(i).or_insert(Flip { before, known: false });
            self.count("bits of the shadow flipped", 1);
        }
    }

    /// The word was written anew.
    pub fn overwritten(&mut self, i: usize) {
        if let Some(Flip { known: true, .. }) = self.s.b.flips.remove(&i) {
            self.count("flips mended", 1);
        }
    }

    /// Words that the primary takes checksums of.
    pub fn audited(&mut self) -> Vec<usize> {
        let looks = self.one_in(2);
        (0..WORDS).filter(|_| looks && self.one_in(2)).collect()
    }

    /// The shadow without its flips.
    pub fn sound_shadow(&self) -> Guest {
        let mut shadow = self.s.b.shadow.clone();
        for (i, flip) in &self.s.b.flips {
            *word(&mut shadow, *i) = flip.before;
        }
        shadow
    }

    /// R6: what is known to be wrong never becomes the VM. What nobody has found yet cannot be told.
    pub fn check_flips(&mut self) {
        if self.s.b.flips.values().any(|flip| flip.known) {
            self.violated("R6", "a shadow that is known to be wrong becomes the VM".into());
        }
        if !self.s.b.flips.is_empty() {
            self.count("takeovers with a flip that nobody knew of", 1);
            self.s.b.shadow = self.sound_shadow();
            self.s.b.flips.clear();
        }
    }

    /// The backup compares an epoch that it has applied.
    pub fn compare(&mut self, staged: &StagedEpoch) {
        let pages = staged.audit.iter().map(|sum| (Place::Page { gpa: sum.gpa }, sum.crc));
        let chunks = staged.disk_audit.iter().map(|sum| {
            let ChunkSum { disk, offset, len, crc } = *sum;
            (Place::Chunk { disk, offset, len }, crc)
        });
        let (mut wrong, mut right) = (Vec::new(), Vec::new());
        for (place, expected) in pages.chain(chunks) {
            let i = index(&place);
            let found = crc(*word(&mut self.s.b.shadow, i));
            if found == expected {
                right.push(place);
                continue;
            }
            match self.s.b.flips.get_mut(&i) {
                Some(flip) => flip.known = true,
                None => {
                    let rule = if i < PAGES { "R2" } else { "R3" };
                    self.violated(
                        rule,
                        format!("{place:?} is not the primary's, and no bit of it flipped"),
                    );
                }
            }
            self.count("flips found", 1);
            wrong.push(Mismatch { place, found, expected });
        }
        let anew = staged.anew;
        if (wrong.is_empty() && !anew) || self.bug == Some(Bug::DamageIsForgotten) {
            return;
        }
        self.backup_step(Event::Compared(Compared {
            wrong,
            what: "wrong".into(),
            anew,
            right: if anew { right } else { Vec::new() },
        }));
    }

    /// The backup wants these sent anew.
    pub fn mismatch(&mut self, wrong: &[Mismatch]) -> u64 {
        let words = wrong.iter().map(|mismatch| index(&mismatch.place));
        self.s.p.repairs.extend(words);
        wrong.len() as u64
    }
}
