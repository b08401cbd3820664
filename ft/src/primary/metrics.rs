//! Measures of the primary.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::audit::{ChunkSum, PageSum};
use crate::config::{FtAuditInfo, FtInfo, FtProgress};
use crate::stats::Stat;

/// What a checkpoint cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct Checkpoint {
    /// From its begin to its end.
    pub epoch: Duration,
    /// The guest stood still.
    pub pause: Duration,
    /// Pages in it.
    pub pages: u64,
}

/// See [`FtInfo`] for what each is.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Pre-copy.
    pub progress: FtProgress,
    epoch_ms: Stat,
    pause_ms: Stat,
    dirty_pages: Stat,
    epoch_bytes: Stat,
    commit_ms: Stat,
    added_latency_ms: Stat,
    held_outputs: Stat,
    audit: FtAuditInfo,
    /// When the epochs that are not committed ended, and what they sent.
    open: VecDeque<(u64, Instant, u64)>,
    /// A large epoch's bytes and time to commit, for the estimate of the link's speed.
    telling: Option<(u64, Duration)>,
}

/// Smallest epoch that tells something about the link's speed.
const TELLING: u64 = 256 << 10;

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Metrics {
    /// An epoch ended.
    pub fn checkpoint(&mut self, number: u64, ended: Instant, measured: Checkpoint) {
        self.open.push_back((number, ended, 0));
        self.pause_ms.add(ms(measured.pause));
        // The first checkpoint ends pre-copy, not an epoch.
        if number > 1 {
            self.epoch_ms.add(ms(measured.epoch));
            self.dirty_pages.add(measured.pages as f64);
        }
    }

    /// Checksums went with an epoch; how often all of RAM was gone through.
    pub fn audited(&mut self, pages: &[PageSum], chunks: &[ChunkSum], ram_rounds: u64) {
        self.audit.add(pages, chunks);
        self.audit.ram_rounds = ram_rounds;
    }

    /// The backup found so many places wrong.
    pub fn mismatches(&mut self, places: u64) {
        self.audit.mismatches += places;
    }

    /// So many places were sent anew.
    pub fn sent_anew(&mut self, places: u64) {
        self.audit.repairs += places;
    }

    /// Everything of it is sent.
    pub fn sent(&mut self, number: u64, bytes: u64) {
        self.epoch_bytes.add(bytes as f64);
        if let Some(open) = self.open.iter_mut().find(|(n, ..)| *n == number) {
            open.2 = bytes;
        }
    }

    /// Epochs up to this one are committed.
    pub fn commit(&mut self, number: u64) {
        while self.open.front().is_some_and(|(n, ..)| *n <= number) {
            if let Some((_, ended, bytes)) = self.open.pop_front() {
                self.commit_ms.add(ms(ended.elapsed()));
                if bytes >= TELLING {
                    self.telling = Some((bytes, ended.elapsed()));
                }
            }
        }
    }

    /// A large epoch's bytes and time to commit, if there was one since the last call.
    pub fn take_telling(&mut self) -> Option<(u64, Duration)> {
        self.telling.take()
    }

    /// Outputs of an epoch left.
    pub fn released(&mut self, outputs: usize, age: Option<Duration>) {
        self.held_outputs.add(outputs as f64);
        if let Some(age) = age {
            self.added_latency_ms.add(ms(age));
        }
    }

    /// Fills in what is known here.
    pub fn report(&self, info: &mut FtInfo) {
        info.progress = self.progress;
        info.epochs_total = self.commit_ms.count();
        info.epoch_ms = self.epoch_ms.report();
        info.pause_ms = self.pause_ms.report();
        info.dirty_pages = self.dirty_pages.report();
        info.epoch_bytes = self.epoch_bytes.report();
        info.commit_ms = self.commit_ms.report();
        info.added_latency_ms = self.added_latency_ms.report();
        info.held_outputs = self.held_outputs.report();
        info.audit = self.audit;
    }
}
