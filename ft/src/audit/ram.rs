//! The audit of RAM, on the primary.
//!
//! After each checkpoint the controller takes the checksums of some pages while the guest runs, page after page through
//! all RAM. What the guest has not written by the next checkpoint was at that moment what it was when it was looked at:
//! those checksums go with that epoch.

use std::time::Instant;

use super::PageSum;
use crate::machine::{MachineError, PAGE_SIZE, Protected};

/// Most that is looked at in one go, in seconds of the rate: an idle VM makes an epoch in about this time.
const AT_ONCE: f64 = 0.2;

/// Owned by the controller thread.
#[derive(Debug)]
pub(crate) struct Auditor {
    /// Regions of RAM: address, size.
    memory: Vec<(u64, u64)>,
    /// Next page, counted through all regions.
    next: u64,
    /// When pages were last looked at.
    last: Instant,
    /// Pages that are due.
    due: f64,
    looked: Vec<PageSum>,
    rounds: u64,
}

impl Auditor {
    pub(crate) fn new(memory: &[(u64, u64)]) -> Self {
        Self {
            memory: memory.to_vec(),
            next: 0,
            last: Instant::now(),
            due: 0.0,
            looked: Vec::new(),
            rounds: 0,
        }
    }

    /// Address of page `next`, counted from 0 through all regions and round again.
    fn address(&mut self) -> u64 {
        let mut page = self.next;
        self.next += 1;
        for (gpa, size) in &self.memory {
            let pages = size / PAGE_SIZE as u64;
            if page < pages {
                return gpa + page * PAGE_SIZE as u64;
            }
            page -= pages;
        }
        self.next = 1;
        self.rounds += 1;
        self.memory.first().map_or(0, |(gpa, _)| *gpa)
    }

    /// Looks at as many pages as `mib_s` (MiB per second) allows. After a checkpoint; the VM may run.
    pub(crate) fn look(&mut self, machine: &dyn Protected, mib_s: u32) -> Result<(), MachineError> {
        self.looked.clear();
        let rate = f64::from(mib_s) * (1 << 20) as f64 / PAGE_SIZE as f64;
        let all: u64 = self.memory.iter().map(|(_, size)| size / PAGE_SIZE as u64).sum();
        let now = Instant::now();
        let elapsed = now.saturating_duration_since(self.last).as_secs_f64();
        self.last = now;
        self.due = (self.due + elapsed * rate).min(rate * AT_ONCE).min(all as f64);
        let mut page = [0; PAGE_SIZE];
        while self.due >= 1.0 {
            self.due -= 1.0;
            let gpa = self.address();
            machine.read_memory(gpa, &mut page)?;
            let crc = crc32c::crc32c(&page);
            self.looked.push(PageSum { gpa, crc });
        }
        Ok(())
    }

    /// How often all of RAM was gone through.
    pub(crate) fn rounds(&self) -> u64 {
        self.rounds
    }

    /// At the next checkpoint: the sums that are still true, given the pages written since.
    pub(crate) fn settle(&mut self, written: impl Fn(u64) -> bool) -> Vec<PageSum> {
        self.looked.retain(|sum| !written(sum.gpa));
        std::mem::take(&mut self.looked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_round_through_all_regions() {
        let page = PAGE_SIZE as u64;
        let mut auditor = Auditor::new(&[(0, 2 * page), (1 << 20, page)]);
        let addresses: Vec<u64> = (0..7).map(|_| auditor.address()).collect();
        assert_eq!(addresses, [0, page, 1 << 20, 0, page, 1 << 20, 0]);
        assert_eq!(auditor.rounds(), 2);
    }

    #[test]
    fn what_was_written_since_is_not_compared() {
        let mut auditor = Auditor::new(&[(0, 1 << 20)]);
        let sum = |gpa| PageSum { gpa, crc: 7 };
        auditor.looked = vec![sum(0), sum(4096), sum(8192)];
        assert_eq!(auditor.settle(|gpa| gpa == 4096), [sum(0), sum(8192)]);
        assert_eq!(auditor.settle(|_| false), []);
    }
}
