//! When an epoch ends, and how much the guest is slowed down.
//!
//! An epoch ends when output waits and the shortest time has passed, when its dirty RAM (as the last epochs' rate lets
//! expect) or its log is large, or when the longest time has passed; in each case only when the pipeline has room. Where
//! checkpoints may take only a share of the time, epochs are as long as that needs, unless they get too large.

use super::{Nanos, ms};
use crate::config::FtLimits;

/// Limits in the units used here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Limits {
    /// Longest epoch.
    pub max_epoch: Nanos,
    /// Shortest epoch.
    pub min_epoch: Nanos,
    /// Share of the time that checkpoints may take, in percent.
    pub overhead_percent: u32,
    /// Bytes of an epoch at which it ends.
    pub max_epoch_bytes: u64,
    /// Bytes of uncommitted epochs at which the guest waits.
    pub max_lag: u64,
    /// Heartbeat interval.
    pub heartbeat: Nanos,
    /// Silence that counts as death.
    pub timeout: Nanos,
}

impl From<&FtLimits> for Limits {
    fn from(limits: &FtLimits) -> Self {
        Self {
            max_epoch: ms(limits.max_epoch_ms.into()),
            min_epoch: Nanos::from(limits.min_epoch_us) * 1000,
            overhead_percent: limits.overhead_percent.clamp(1, 100),
            max_epoch_bytes: u64::from(limits.max_epoch_mib) << 20,
            max_lag: u64::from(limits.max_lag_mib) << 20,
            heartbeat: ms(limits.heartbeat_ms.into()),
            timeout: ms(limits.heartbeat_timeout_ms.into()),
        }
    }
}

/// Slowest that the guest is made before it has to wait.
const MIN_PERCENT: u8 = 10;

/// No epoch is made longer than this for the sake of the time that checkpoints take.
const LONGEST: Nanos = 10_000_000_000;

/// The running epoch.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pacing {
    began: Nanos,
    /// Bytes of RAM dirtied per second, of the last epochs.
    dirty_rate: u64,
    /// When the epoch's checkpoint was begun; 0: not, or it does not matter.
    ended: Nanos,
    /// Time that the last checkpoints took.
    checkpoint: Nanos,
}

impl Pacing {
    /// An epoch begins.
    pub fn new(now: Nanos) -> Self {
        Self {
            began: now,
            dirty_rate: 0,
            ended: 0,
            checkpoint: 0,
        }
    }

    /// The epoch's checkpoint is begun.
    pub fn end(&mut self, limits: &Limits, now: Nanos) {
        self.ended = if limits.overhead_percent < 100 { now } else { 0 };
    }

    /// The epoch ended with so much dirty RAM, and the next begins.
    pub fn next(&mut self, dirty_bytes: u64, now: Nanos) {
        let took = now.saturating_sub(self.began).max(100_000);
        let rate = u128::from(dirty_bytes) * 1_000_000_000 / u128::from(took);
        self.dirty_rate = self.dirty_rate / 2 + u64::try_from(rate / 2).unwrap_or(u64::MAX / 2);
        if self.ended > 0 {
            self.checkpoint = self.checkpoint / 2 + now.saturating_sub(self.ended).min(LONGEST) / 2;
        }
        self.began = now;
    }

    /// The guest runs again only now.
    pub fn restart(&mut self, now: Nanos) {
        self.began = now;
    }

    fn age(&self, now: Nanos) -> Nanos {
        now.saturating_sub(self.began)
    }

    /// What an epoch lasts at least, so that checkpoints of the time that the last ones took are rare enough.
    fn budget(&self, limits: &Limits) -> Nanos {
        let percent = Nanos::from(limits.overhead_percent);
        (self.checkpoint * (100 - percent) / percent).min(LONGEST)
    }

    /// When the epoch ends, if nothing more happens.
    pub fn ends_at(&self, limits: &Limits, output: bool, running_bytes: u64) -> Nanos {
        if running_bytes >= limits.max_epoch_bytes {
            return self.began;
        }
        let longest = if output {
            limits.min_epoch.min(limits.max_epoch)
        } else {
            limits.max_epoch
        };
        let longest = longest.max(self.budget(limits));
        let room = u128::from(limits.max_epoch_bytes - running_bytes);
        // Never shorter than the shortest epoch for the sake of a guess.
        let filled = room * 1_000_000_000 / u128::from(self.dirty_rate.max(1));
        let filled = Nanos::try_from(filled).unwrap_or(Nanos::MAX);
        self.began + longest.min(filled.max(limits.min_epoch))
    }

    /// Share of the time that the guest may run: full up to half of the lag bound, less and less towards the bound; and
    /// less when the pipeline has had no room for longer than an epoch should last.
    pub fn percent(&self, limits: &Limits, lag: u64, room: bool, now: Nanos) -> u8 {
        let half = limits.max_lag / 2;
        let span = u64::from(100 - MIN_PERCENT);
        let by_lag = 100 - (lag.saturating_sub(half).min(half) * span / half.max(1)) as u8;
        let longest = limits.max_epoch.max(self.budget(limits));
        let overdue = if room {
            0
        } else {
            self.age(now).saturating_sub(2 * longest)
        };
        let by_age = 100 - (overdue.saturating_mul(span) / (8 * longest).max(1)).min(span) as u8;
        // In steps, so that it does not change all the time.
        by_lag.min(by_age) / 10 * 10
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            max_epoch: ms(100),
            ..Limits::from(&FtLimits::default())
        }
    }

    #[test]
    fn output_size_or_time_end_an_epoch() {
        let mut pacing = Pacing::new(1000);
        assert_eq!(pacing.ends_at(&limits(), false, 0), 1000 + ms(100));
        assert_eq!(pacing.ends_at(&limits(), true, 0), 1000 + 200_000);
        assert_eq!(pacing.ends_at(&limits(), false, 64 << 20), 1000);
        // 64 MiB in 20 ms: the next such epoch ends in about 40 ms, for the rate is a mean with the idle time before.
        pacing.next(64 << 20, 1000 + ms(20));
        let ends = pacing.ends_at(&limits(), false, 0) - 1000 - ms(20);
        assert!((ms(39)..=ms(41)).contains(&ends), "{ends}");
        assert!(pacing.ends_at(&limits(), false, (64 << 20) - 1) >= 1000 + ms(20) + 200_000);
    }

    #[test]
    fn epochs_are_as_long_as_dear_checkpoints_need() {
        let quarter = Limits {
            overhead_percent: 25,
            ..limits()
        };
        let mut pacing = Pacing::new(1000);
        let mut now = 1000;
        for _ in 0..20 {
            pacing.end(&quarter, now);
            now += ms(60);
            pacing.next(0, now);
        }
        let length = |limits: &Limits, output| pacing.ends_at(limits, output, 0) - now;
        // 60 ms are a quarter of 240 ms.
        assert!(
            (ms(179)..=ms(180)).contains(&length(&quarter, true)),
            "{}",
            length(&quarter, true)
        );
        assert_eq!(length(&quarter, true), length(&quarter, false));
        // Nothing of it without the bound; too much data ends the epoch all the same.
        assert_eq!((length(&limits(), true), length(&limits(), false)), (200_000, ms(100)));
        assert_eq!(pacing.ends_at(&quarter, true, 64 << 20), now);
        assert_eq!(
            pacing.percent(&quarter, 0, false, now + ms(350)),
            100,
            "it is not overdue"
        );
        let rare = Limits {
            overhead_percent: 1,
            ..limits()
        };
        assert!(
            (ms(5_900)..=ms(5_940)).contains(&length(&rare, false)),
            "{}",
            length(&rare, false)
        );
    }

    #[test]
    fn the_guest_is_slowed_down_towards_the_bound() {
        let pacing = Pacing::new(0);
        let percent = |lag_mib: u64| pacing.percent(&limits(), lag_mib << 20, true, 0);
        assert_eq!(
            (percent(0), percent(256), percent(512), percent(5000)),
            (100, 100, 10, 10)
        );
        assert!(percent(300) < 100 && percent(400) < percent(300));
        assert_eq!(pacing.percent(&limits(), 0, false, ms(200)), 100);
        assert!(pacing.percent(&limits(), 0, false, ms(600)) < 60);
        assert_eq!(pacing.percent(&limits(), 0, false, ms(5000)), 10);
    }
}
