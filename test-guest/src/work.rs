//! Load on the machine by request: the burner (computes) and the memory dirtier (writes pages and checks what it wrote
//! the round before). Orders come from the control service, on the first processor; the work is done on the second, or
//! in slices between polls of the network where there is only one.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use guest_core::work::Dirtier;

use crate::log;
use crate::memory::Region;
use crate::time::Clock;

const PAGE: u64 = 4096;
const LAST_WORD: u64 = PAGE - 8;
/// Rounds of the burner per count.
const BURN_ROUNDS: u32 = 1000;
/// Pages written between two looks at the clock.
const CHUNK: u64 = 64;
/// Longest time without a look at the orders, in microseconds.
const SLICE: u64 = 1000;
/// Wrong pages that are told on the console.
const TOLD: u64 = 5;

static ORDERS: AtomicU32 = AtomicU32::new(0);
static RATE: AtomicU64 = AtomicU64::new(0);
static PAGES: AtomicU64 = AtomicU64::new(0);
static BURN: AtomicBool = AtomicBool::new(false);

static BURNED: AtomicU64 = AtomicU64::new(0);
static DIRTIED: AtomicU64 = AtomicU64::new(0);
static ERRORS: AtomicU64 = AtomicU64::new(0);

/// Orders the dirtier.
pub fn dirty(rate: u64, pages: u64) {
    RATE.store(rate, Ordering::Relaxed);
    PAGES.store(pages, Ordering::Relaxed);
    ORDERS.fetch_add(1, Ordering::Release);
}

/// Orders the burner.
pub fn burn(on: bool) {
    BURN.store(on, Ordering::Release);
}

/// How far the work is.
pub struct Progress {
    /// Counts of the burner.
    pub burned: u64,
    /// Pages written.
    pub dirtied: u64,
    /// Pages that did not hold what they were given.
    pub errors: u64,
}

/// How far the work is.
pub fn progress() -> Progress {
    Progress {
        burned: BURNED.load(Ordering::Relaxed),
        dirtied: DIRTIED.load(Ordering::Relaxed),
        errors: ERRORS.load(Ordering::Relaxed),
    }
}

/// When there is work again.
pub enum Next {
    /// At once.
    Now,
    /// At this time, in microseconds.
    At(u64),
    /// After new orders.
    Never,
}

/// Does the work.
pub struct Worker {
    arena: &'static [Region],
    orders: u32,
    plan: Dirtier,
    burn_state: u64,
}

/// Pages of the arena.
pub fn arena_pages(arena: &[Region]) -> u64 {
    arena.iter().map(|r| (r.end - r.start) / PAGE).sum()
}

impl Worker {
    /// The arena is the dirtier's own.
    pub fn new(arena: &'static [Region]) -> Self {
        Self {
            arena,
            orders: 0,
            plan: Dirtier::default(),
            burn_state: 1,
        }
    }

    fn address(&self, mut page: u64) -> Option<u64> {
        for region in self.arena {
            let pages = (region.end - region.start) / PAGE;
            if page < pages {
                return Some(region.start + page * PAGE);
            }
            page -= pages;
        }
        None
    }

    fn write_page(&mut self) {
        let write = self.plan.take();
        let Some(address) = self.address(write.page) else {
            return;
        };
        for word in [0, LAST_WORD] {
            let cell = (address + word) as *mut u64;
            // SAFETY: a page of the arena, which is mapped and which this worker alone uses.
            let found = unsafe { cell.read_volatile() };
            if let Some(old) = write.old.filter(|old| *old != found) {
                let errors = ERRORS.fetch_add(1, Ordering::Relaxed);
                if errors < TOLD {
                    log!("page {address:#x}+{word:#x} holds {found:#x} instead of {old:#x}");
                }
            }
            // SAFETY: as above.
            unsafe { cell.write_volatile(write.new) };
        }
        DIRTIED.fetch_add(1, Ordering::Relaxed);
    }

    /// Works for at most `budget` microseconds (and one slice).
    pub fn step(&mut self, clock: &Clock, budget: u64) -> Next {
        let orders = ORDERS.load(Ordering::Acquire);
        let mut now = clock.micros();
        if orders != self.orders {
            self.orders = orders;
            let pages = PAGES.load(Ordering::Relaxed).min(arena_pages(self.arena));
            self.plan = Dirtier::new(RATE.load(Ordering::Relaxed), pages, now);
        }
        let end = now.saturating_add(budget.min(SLICE));
        loop {
            let due = self.plan.due(now);
            for _ in 0..due.min(CHUNK) {
                self.write_page();
            }
            let burning = BURN.load(Ordering::Relaxed);
            if burning {
                for _ in 0..BURN_ROUNDS {
                    self.burn_state = core::hint::black_box(self.burn_state ^ self.burn_state << 13);
                    self.burn_state ^= self.burn_state >> 7;
                    self.burn_state ^= self.burn_state << 17;
                }
                BURNED.fetch_add(1, Ordering::Relaxed);
            }
            if due <= CHUNK && !burning {
                break;
            }
            now = clock.micros();
            if now >= end {
                return Next::Now;
            }
        }
        if self.plan.on() {
            Next::At(self.plan.next_at())
        } else {
            Next::Never
        }
    }
}
