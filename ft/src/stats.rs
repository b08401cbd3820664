//! Measures: last, mean; median and 99th percentile of the last few thousand values.

use crate::config::FtStat;

/// Values of which the percentile is taken.
const WINDOW: usize = 4096;

/// One measure.
#[derive(Debug, Default)]
pub struct Stat {
    last: f64,
    sum: f64,
    count: u64,
    recent: Vec<f32>,
}

impl Stat {
    /// Adds a value.
    pub fn add(&mut self, value: f64) {
        self.last = value;
        self.sum += value;
        if self.recent.len() < WINDOW {
            self.recent.push(value as f32);
        } else {
            self.recent[self.count as usize % WINDOW] = value as f32;
        }
        self.count += 1;
    }

    /// Number of values.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// For the report.
    pub fn report(&self) -> FtStat {
        if self.count == 0 {
            return FtStat::default();
        }
        let mut sorted = self.recent.clone();
        let mut percentile = |percent: usize| {
            let index = (sorted.len() * percent).div_ceil(100).max(1) - 1;
            let (_, value, _) = sorted.select_nth_unstable_by(index, f32::total_cmp);
            f64::from(*value)
        };
        FtStat {
            last: self.last,
            mean: self.sum / self.count as f64,
            p50: percentile(50),
            p99: percentile(99),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_mean_and_percentile() {
        let mut stat = Stat::default();
        assert_eq!(stat.report(), FtStat::default());
        (1..=100).for_each(|n| stat.add(f64::from(n)));
        assert_eq!(
            stat.report(),
            FtStat {
                last: 100.0,
                mean: 50.5,
                p50: 50.0,
                p99: 99.0
            }
        );
        (0..2 * WINDOW).for_each(|_| stat.add(7.0));
        assert_eq!(stat.report().p99, 7.0);
        assert_eq!(stat.count(), 100 + 2 * WINDOW as u64);
    }
}
