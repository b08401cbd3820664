//! What one connection saw: answers, latencies, gaps between answers, failures.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::stats::{Histogram, Summary};

/// Pauses between answers shorter than this are not remembered one by one.
const SHORTEST_GAP: Duration = Duration::from_millis(2);
/// Failures kept as text; further ones are only counted.
const KEPT_FAILURES: usize = 20;

#[derive(Default)]
struct Inner {
    answers: u64,
    bytes: u64,
    latency_us: Histogram,
    /// Since when the connection waits for its next answer.
    waiting_since: Option<Instant>,
    gaps: Vec<(Instant, Instant)>,
    failures: Vec<String>,
    failed: u64,
}

/// Meter of one connection; shared between its client and whoever watches.
#[derive(Default)]
pub struct Meter(Mutex<Inner>);

impl Meter {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client begins (or begins again after a pause) to expect answers: gaps count from here.
    pub fn expect_from_now(&self) {
        self.inner().waiting_since = Some(Instant::now());
    }

    /// The client expects nothing for a while.
    pub fn expect_nothing(&self) {
        self.inner().waiting_since = None;
    }

    /// An answer of `bytes` bytes came; `latency` since its request, where there is one.
    pub fn answer(&self, bytes: u64, latency: Option<Duration>) {
        let now = Instant::now();
        let mut inner = self.inner();
        inner.answers += 1;
        inner.bytes += bytes;
        if let Some(latency) = latency {
            inner.latency_us.add(latency.as_micros() as u64);
        }
        if let Some(since) = inner.waiting_since.replace(now)
            && now - since >= SHORTEST_GAP
        {
            inner.gaps.push((since, now));
        }
    }

    /// Something was wrong.
    pub fn failure(&self, what: impl Into<String>) {
        let mut inner = self.inner();
        inner.failed += 1;
        if inner.failures.len() < KEPT_FAILURES {
            inner.failures.push(what.into());
        }
    }

    /// Answers so far.
    pub fn answers(&self) -> u64 {
        self.inner().answers
    }

    /// Whether anything was wrong so far.
    pub fn failed(&self) -> bool {
        self.inner().failed > 0
    }

    /// Longest time between two answers that ended after `moment`; a wait that still goes on counts.
    pub fn longest_gap_since(&self, moment: Instant) -> Duration {
        let inner = self.inner();
        let running = inner.waiting_since.map_or(Duration::ZERO, |since| since.elapsed());
        let ended = inner
            .gaps
            .iter()
            .rev()
            .take_while(|(_, end)| *end > moment)
            .map(|(start, end)| *end - *start);
        ended.max().unwrap_or_default().max(running)
    }

    /// Forgets latencies and gaps so far: the next phase is measured on its own.
    pub fn new_phase(&self) {
        let mut inner = self.inner();
        inner.latency_us = Histogram::default();
        inner.gaps.clear();
    }

    /// Latencies of this phase, in microseconds.
    pub fn latency_us(&self) -> Histogram {
        self.inner().latency_us.clone()
    }

    fn add_to(&self, verdict: &mut Verdict, latency: &mut Histogram) {
        let inner = self.inner();
        verdict.connections += 1;
        verdict.connections_kept += u64::from(inner.failed == 0);
        verdict.answers += inner.answers;
        verdict.bytes += inner.bytes;
        verdict.failed += inner.failed;
        verdict.failures.extend(inner.failures.iter().cloned());
        latency.merge(&inner.latency_us);
    }
}

/// What a load saw on all its connections.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Verdict {
    /// Name of the load.
    pub name: String,
    /// Connections opened.
    pub connections: u64,
    /// Connections without any failure to the end.
    pub connections_kept: u64,
    /// Answers, all checked.
    pub answers: u64,
    /// Bytes, all checked.
    pub bytes: u64,
    /// Latency of requests in milliseconds, since the last phase began.
    pub latency_ms: Summary,
    /// Number of failures.
    pub failed: u64,
    /// The first failures in words.
    pub failures: Vec<String>,
}

impl Verdict {
    /// Sums up the meters of a load.
    pub fn of<'a>(name: &str, meters: impl IntoIterator<Item = &'a Meter>) -> Self {
        let mut verdict = Self {
            name: name.into(),
            ..Self::default()
        };
        let mut latency = Histogram::default();
        for meter in meters {
            meter.add_to(&mut verdict, &mut latency);
        }
        verdict.latency_ms = latency.summary(0.001);
        verdict
    }

    /// Nothing was wrong, and there were answers at all.
    pub fn good(&self) -> bool {
        self.failed == 0 && self.answers > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gap_around_a_moment_is_found() {
        let meter = Meter::default();
        meter.expect_from_now();
        std::thread::sleep(Duration::from_millis(60));
        meter.answer(1, None);
        std::thread::sleep(Duration::from_millis(5));
        let moment = Instant::now();
        std::thread::sleep(Duration::from_millis(20));
        meter.answer(1, None);
        meter.expect_nothing();
        let gap = meter.longest_gap_since(moment);
        assert!(
            gap >= Duration::from_millis(25) && gap < Duration::from_millis(60),
            "{gap:?}"
        );
        assert!(meter.longest_gap_since(moment - Duration::from_millis(50)) >= Duration::from_millis(60));
    }

    #[test]
    fn a_wait_without_answer_is_a_gap_too() {
        let meter = Meter::default();
        meter.expect_from_now();
        std::thread::sleep(Duration::from_millis(15));
        assert!(meter.longest_gap_since(Instant::now()) >= Duration::from_millis(15));
    }

    #[test]
    fn a_failure_spoils_the_verdict() {
        let (good, bad) = (Meter::default(), Meter::default());
        good.answer(10, Some(Duration::from_millis(3)));
        bad.answer(10, Some(Duration::from_millis(5)));
        assert!(Verdict::of("x", [&good, &bad]).good());
        bad.failure("wrong byte");
        let verdict = Verdict::of("x", [&good, &bad]);
        assert!(!verdict.good());
        assert_eq!(
            (verdict.connections, verdict.connections_kept, verdict.bytes),
            (2, 1, 20)
        );
        assert!(!Verdict::of("none", []).good());
    }
}
