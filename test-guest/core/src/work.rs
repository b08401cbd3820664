//! The memory dirtier's plan: it goes round a working set of pages at a given rate; each write puts the number of the
//! round, and finds that of the round before.

/// The plan and where it stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dirtier {
    rate: u64,
    pages: u64,
    /// Round, from 1; the first writes without a check.
    round: u64,
    page: u64,
    /// Time in microseconds when `due` began to count.
    since: u64,
    /// Pages written since then.
    written: u64,
}

/// One page write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Write {
    /// Page of the working set.
    pub page: u64,
    /// What the page must hold; none in the first round.
    pub old: Option<u64>,
    /// What it gets.
    pub new: u64,
}

/// What is not caught up after this long is dropped, in microseconds: a guest that stood still does not burst.
const CATCH_UP: u64 = 100_000;

fn value(round: u64, page: u64) -> u64 {
    crate::pattern::word(round, page)
}

impl Dirtier {
    /// `rate` pages per second in a working set of `pages`; either 0 is off.
    pub fn new(rate: u64, pages: u64, now: u64) -> Self {
        Self {
            rate,
            pages,
            round: 1,
            page: 0,
            since: now,
            written: 0,
        }
    }

    /// There is work at some time.
    pub fn on(&self) -> bool {
        self.rate > 0 && self.pages > 0
    }

    /// Page writes that are due at `now` (microseconds).
    pub fn due(&mut self, now: u64) -> u64 {
        if !self.on() {
            return 0;
        }
        let elapsed = now.saturating_sub(self.since);
        let target = (u128::from(elapsed) * u128::from(self.rate) / 1_000_000) as u64;
        let due = target.saturating_sub(self.written);
        // Starts the count anew now and then, so that rounding and lateness do not add up.
        if elapsed > 10 * CATCH_UP {
            let keep = due.min((u128::from(CATCH_UP) * u128::from(self.rate) / 1_000_000) as u64);
            self.since = now - (u128::from(keep) * 1_000_000 / u128::from(self.rate)) as u64;
            self.written = 0;
            return keep;
        }
        due
    }

    /// When the next write is due, in microseconds.
    pub fn next_at(&self) -> u64 {
        let at = u128::from(self.written + 1) * 1_000_000 / u128::from(self.rate.max(1));
        self.since.saturating_add(at as u64)
    }

    /// The next write.
    pub fn take(&mut self) -> Write {
        let write = Write {
            page: self.page,
            old: (self.round > 1).then(|| value(self.round - 1, self.page)),
            new: value(self.round, self.page),
        };
        self.written += 1;
        self.page += 1;
        if self.page >= self.pages {
            self.page = 0;
            self.round += 1;
        }
        write
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_round_finds_what_the_last_left() {
        let mut plan = Dirtier::new(1000, 7, 0);
        let mut memory = [0; 7];
        for n in 0..100 {
            let write = plan.take();
            assert_eq!(write.page, n % 7);
            let cell = &mut memory[write.page as usize];
            assert_eq!(write.old, (n >= 7).then_some(*cell));
            assert_ne!(write.new, *cell);
            *cell = write.new;
        }
    }

    #[test]
    fn keeps_the_rate() {
        for (rate, step) in [(1u64, 1000u64), (10_000, 1000), (123_457, 50)] {
            let mut plan = Dirtier::new(rate, 1000, 5);
            let mut done = 0;
            let mut now = 5;
            while now < 10_000_005 {
                now += step;
                for _ in 0..plan.due(now) {
                    plan.take();
                    done += 1;
                }
                assert!(plan.next_at() + 1 + 1_000_000 / rate >= now);
            }
            let wanted = rate * 10;
            assert!(
                done <= wanted && done + wanted / 100 + 1 >= wanted,
                "{done} of {wanted}"
            );
        }
    }

    #[test]
    fn a_pause_is_no_debt() {
        let mut plan = Dirtier::new(10_000, 10, 0);
        assert_eq!(plan.due(1000), 10);
        assert_eq!(plan.due(60_000_000), 1000);
        assert!(!Dirtier::new(0, 5, 0).on() && !Dirtier::new(5, 0, 0).on());
    }
}
