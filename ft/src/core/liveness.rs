//! Signs of life.
//!
//! [`Silence`] tells when the other side counts as dead. A side that was itself stopped for a while (its host was
//! suspended, its process had no CPU) must not take its own absence for the other's silence: after a late tick the
//! silence is counted anew. A clock that jumps ahead between two ticks must not make silence either: no more than an
//! eighth of the timeout counts between them.
//!
//! [`Lease`] is why a primary whose backup took over by silence does not release anything late (R4). Each frame of the
//! primary carries its clock, each frame of the backup returns the newest such stamp. The backup waits a whole timeout
//! after that frame before it takes over; the primary releases only within 3/4 of a timeout after it sent it. So when
//! the backup becomes the VM, the primary's right to release has ended by its own clock, whatever the network delays.
//! An eighth of the timeout covers the difference of the clocks' rates, an eighth one jump of the backup's clock.

use super::Nanos;

/// Detects silence.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Silence {
    timeout: Nanos,
    /// Silence counts from here at the earliest.
    floor: Nanos,
    last_tick: Nanos,
}

impl Silence {
    /// The other side was heard at `now`.
    pub fn new(timeout: Nanos, now: Nanos) -> Self {
        Self {
            timeout,
            floor: now,
            last_tick: now,
        }
    }

    /// Changes the timeout.
    pub fn set_timeout(&mut self, timeout: Nanos) {
        self.timeout = timeout;
    }

    /// Whether the other side, last heard at `heard`, counts as dead. To be called at least eight times per timeout.
    pub fn is_dead(&mut self, heard: Nanos, now: Nanos) -> bool {
        let gap = now.saturating_sub(self.last_tick);
        self.last_tick = now;
        if gap > self.timeout / 2 {
            self.floor = now;
        } else if let Some(excess) = gap.checked_sub(self.timeout / 8) {
            self.floor = (heard.max(self.floor) + excess).min(now);
        }
        now.saturating_sub(heard.max(self.floor)) > self.timeout
    }
}

/// Rest of a silence that is waited for beyond its end, so that it is over then by any count.
const BEYOND: Nanos = 1_000_000;

/// How long a side may sleep at `now` before it sends a heartbeat, if it has written nothing since `written`, and asks
/// [`Silence`] again about the other side, last heard at `heard`.
pub fn pulse(heartbeat: Nanos, timeout: Nanos, written: Nanos, heard: Nanos, now: Nanos) -> Nanos {
    let silence = match (heard + timeout).checked_sub(now) {
        Some(left) => (left + BEYOND).min(timeout / 10),
        // It may count from later on.
        None => timeout / 20,
    };
    silence.min((written + heartbeat).saturating_sub(now))
}

/// The primary's right to release.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Lease {
    timeout: Nanos,
    /// A longer timeout, in force when the backup returned a stamp later than this.
    longer: Option<(Nanos, Nanos)>,
    until: Nanos,
}

impl Lease {
    /// No stamp has returned yet.
    pub fn new(timeout: Nanos) -> Self {
        Self {
            timeout,
            longer: None,
            until: 0,
        }
    }

    /// The timeout changes, and the backup is told at `now`: a shorter one counts at once, a longer one from when the
    /// backup is known to have it.
    pub fn set_timeout(&mut self, timeout: Nanos, now: Nanos) {
        if timeout <= self.timeout {
            self.until = self.until.saturating_sub(self.timeout - timeout);
            self.timeout = timeout;
            self.longer = None;
        } else {
            self.longer = Some((timeout, now));
        }
    }

    /// The backup returned this stamp.
    pub fn renew(&mut self, stamp: Nanos) {
        if let Some((timeout, told)) = self.longer
            && stamp > told
        {
            self.timeout = timeout;
            self.longer = None;
        }
        self.until = self.until.max(stamp + (self.timeout - self.timeout / 4));
    }

    /// When it ends; 0: it never began.
    pub fn until(&self) -> Nanos {
        self.until
    }

    /// Whether outputs may leave now.
    pub fn holds(&self, now: Nanos) -> bool {
        now < self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_found_but_not_ones_own_absence() {
        let mut silence = Silence::new(100, 0);
        assert!((0..=10).all(|n| !silence.is_dead(0, n * 10)));
        assert!(silence.is_dead(0, 110));
        let mut silence = Silence::new(100, 0);
        assert!(!silence.is_dead(0, 10));
        assert!(!silence.is_dead(0, 1000));
        assert!((1001..=1100).all(|now| !silence.is_dead(0, now)));
        assert!(silence.is_dead(0, 1101));
    }

    #[test]
    fn a_clock_that_jumps_makes_an_eighth_of_the_silence_at_most() {
        for jump in [0, 10, 49, 50, 51, 99, 1000] {
            let mut silence = Silence::new(100, 0);
            assert!((0..=20).all(|now| !silence.is_dead(0, now)));
            let dead = (21..=200).find(|now| silence.is_dead(0, now + jump)).unwrap();
            assert!(dead > 87, "jump of {jump}: dead after {dead}");
        }
    }

    #[test]
    fn a_side_sleeps_until_something_is_due() {
        let (heartbeat, timeout) = (50_000_000, 500_000_000);
        let sleep = |written, heard, now| pulse(heartbeat, timeout, written, heard, now);
        assert_eq!(sleep(100, 100, 100), 50_000_000);
        assert_eq!(sleep(100, 100, 30_000_100), 20_000_000, "a heartbeat is due");
        assert_eq!(sleep(0, 100, 60_000_000), 0, "it is overdue");
        assert_eq!(sleep(490_000_000, 100, 490_000_100), 11_000_000, "the silence ends");
        assert_eq!(
            sleep(600_000_000, 100, 600_000_100),
            25_000_000,
            "it does not count from when it began"
        );
        // At least eight times per timeout, see Silence.
        assert!((0..2000).all(|n| sleep(n * 1_000_000, 0, n * 1_000_000) <= timeout / 8));
    }

    #[test]
    fn a_lease_ends_before_the_backups_timeout() {
        let mut lease = Lease::new(800);
        assert!(!lease.holds(0));
        lease.renew(1000);
        assert!(lease.holds(1599) && !lease.holds(1600));
        lease.renew(500);
        assert!(lease.holds(1599));
        lease.set_timeout(400, 1100);
        assert!(!lease.holds(1300));
        lease.set_timeout(1600, 1200);
        lease.renew(1200);
        assert!(!lease.holds(1500));
        lease.renew(1201);
        assert!(lease.holds(2400) && !lease.holds(2401));
    }
}
