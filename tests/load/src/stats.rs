//! Medians, percentiles and histograms.

use serde::Serialize;

/// What a set of values looks like. Zeroes when there was none.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Summary {
    /// How many values.
    pub count: u64,
    /// Smallest.
    pub min: f64,
    /// Half of the values are below.
    pub median: f64,
    /// Arithmetic mean.
    pub mean: f64,
    /// 99 percent of the values are below.
    pub p99: f64,
    /// 99.9 percent of the values are below.
    pub p999: f64,
    /// Largest.
    pub max: f64,
}

impl Summary {
    /// Of exact values, in any order.
    pub fn of(values: &[f64]) -> Self {
        let mut sorted: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (sorted.first(), sorted.last()) else {
            return Self::default();
        };
        let rank = |share: f64| sorted[((share * sorted.len() as f64).ceil() as usize).clamp(1, sorted.len()) - 1];
        Self {
            count: sorted.len() as u64,
            min,
            median: rank(0.5),
            mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
            p99: rank(0.99),
            p999: rank(0.999),
            max,
        }
    }

    /// Spread of repeated measurements: (largest - smallest) / median, 0 when there is no median.
    pub fn spread(&self) -> f64 {
        if self.median == 0.0 {
            0.0
        } else {
            (self.max - self.min) / self.median
        }
    }
}

const SUB_BITS: u32 = 5;

/// Counts of values in buckets that are at most 1/32 wide; bounded in memory however many values come.
#[derive(Debug, Clone, Default)]
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    sum: f64,
    min: u64,
    max: u64,
}

fn bucket(value: u64) -> usize {
    let bits = 64 - value.leading_zeros();
    let shift = bits.saturating_sub(SUB_BITS + 1);
    ((shift as usize) << SUB_BITS) + (value >> shift) as usize
}

/// Middle of a bucket.
fn middle(index: usize) -> u64 {
    let step = 1usize << SUB_BITS;
    if index < 2 * step {
        return index as u64;
    }
    let shift = index / step - 1;
    let low = ((index - shift * step) as u64) << shift;
    low + ((1u64 << shift) >> 1)
}

impl Histogram {
    /// Adds a value.
    pub fn add(&mut self, value: u64) {
        let index = bucket(value);
        if self.buckets.len() <= index {
            self.buckets.resize(index + 1, 0);
        }
        self.buckets[index] += 1;
        self.min = if self.count == 0 { value } else { self.min.min(value) };
        self.max = self.max.max(value);
        self.count += 1;
        self.sum += value as f64;
    }

    /// Adds all values of `other`.
    pub fn merge(&mut self, other: &Self) {
        if other.count == 0 {
            return;
        }
        if self.buckets.len() < other.buckets.len() {
            self.buckets.resize(other.buckets.len(), 0);
        }
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.min = if self.count == 0 {
            other.min
        } else {
            self.min.min(other.min)
        };
        self.max = self.max.max(other.max);
        self.count += other.count;
        self.sum += other.sum;
    }

    fn rank(&self, share: f64) -> f64 {
        let wanted = ((share * self.count as f64).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= wanted {
                return middle(index).clamp(self.min, self.max) as f64;
            }
        }
        self.max as f64
    }

    /// Summary, each value multiplied by `scale` (for example 0.001 for microseconds to milliseconds).
    pub fn summary(&self, scale: f64) -> Summary {
        if self.count == 0 {
            return Summary::default();
        }
        Summary {
            count: self.count,
            min: self.min as f64 * scale,
            median: self.rank(0.5) * scale,
            mean: self.sum / self.count as f64 * scale,
            p99: self.rank(0.99) * scale,
            p999: self.rank(0.999) * scale,
            max: self.max as f64 * scale,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn summary_of_known_values() {
        let s = Summary::of(&[3.0, 1.0, 2.0, 10.0]);
        assert_eq!(
            (s.count, s.min, s.median, s.mean, s.p99, s.max),
            (4, 1.0, 2.0, 4.0, 10.0, 10.0)
        );
        assert_eq!(s.spread(), 4.5);
        assert_eq!(Summary::of(&[]), Summary::default());
    }

    proptest! {
        #[test]
        fn histogram_is_near_the_exact_values(values in prop::collection::vec(0u64..10_000_000, 1..300), cut: prop::sample::Index) {
            let exact = Summary::of(&values.iter().map(|v| *v as f64).collect::<Vec<_>>());
            let (mut left, mut right) = (Histogram::default(), Histogram::default());
            let cut = cut.index(values.len());
            values[..cut].iter().for_each(|v| left.add(*v));
            values[cut..].iter().for_each(|v| right.add(*v));
            left.merge(&right);
            let near = left.summary(1.0);
            prop_assert_eq!((near.count, near.min, near.max), (exact.count, exact.min, exact.max));
            for (a, b) in [(near.median, exact.median), (near.p99, exact.p99)] {
                prop_assert!((a - b).abs() <= b / 32.0 + 1.0, "{} {}", a, b);
            }
        }
    }
}
