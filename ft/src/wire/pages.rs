//! Batches of RAM pages: zero pages are left out, the rest is compressed where that pays.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use super::frame::{OutFrame, zero_pages};
use crate::machine::{PAGE_SIZE, PageRun};

/// Pages with content in one frame.
const BATCH: u64 = 64;

/// Runs in one frame of zero pages.
const ZERO_RUNS: usize = 4096;

/// Of batches that are not worth compressing, one in so many is, to see whether that changed.
const PROBE: u32 = 64;

static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Decides whether to compress: lz4 pays when the link is slower than what compression saves per second.
#[derive(Debug)]
pub struct Gain {
    /// Bytes per second of the link.
    link: Option<f64>,
    /// Bytes per second of the compressor.
    speed: f64,
    /// Compressed size to size.
    ratio: f64,
    until_probe: u32,
}

impl Default for Gain {
    fn default() -> Self {
        Self { link: None, speed: 500e6, ratio: 0.5, until_probe: 0 }
    }
}

fn blend(old: f64, new: f64) -> f64 {
    old * 0.8 + new * 0.2
}

impl Gain {
    /// What the link carried when it was the bottleneck.
    pub fn note_link(&mut self, bytes: u64, took: Duration) {
        let rate = bytes as f64 / took.as_secs_f64().max(1e-6);
        self.link = Some(self.link.map_or(rate, |old| blend(old, rate)));
    }

    fn note_batch(&mut self, raw: usize, packed: usize, took: Duration) {
        self.speed = blend(self.speed, raw as f64 / took.as_secs_f64().max(1e-6));
        self.ratio = blend(self.ratio, packed as f64 / raw as f64);
    }

    fn worth(&mut self) -> bool {
        let Some(link) = self.link else { return false };
        if link < self.speed * (1.0 - self.ratio) {
            return true;
        }
        self.until_probe = self.until_probe.checked_sub(1).unwrap_or(PROBE - 1);
        self.until_probe == 0
    }
}

/// What went into frames.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Pages with content.
    pub pages: u64,
    /// Zero pages.
    pub zero_pages: u64,
    /// Bytes on the channel.
    pub bytes: u64,
}

/// Makes frames of pages; keeps its buffers from epoch to epoch.
#[derive(Debug, Default)]
pub struct PageEncoder {
    /// Whether compression pays.
    pub gain: Gain,
    packed: Vec<u8>,
    full: Vec<PageRun>,
    zero: Vec<PageRun>,
}

fn push_page(runs: &mut Vec<PageRun>, gpa: u64) {
    match runs.last_mut() {
        Some(run) if run.gpa + run.count * PAGE_SIZE as u64 == gpa => run.count += 1,
        _ => runs.push(PageRun { gpa, count: 1 }),
    }
}

impl PageEncoder {
    /// Sorts the pages of `runs`, whose content is `data`, into full and zero ones; the full ones are moved together.
    fn sort(&mut self, runs: &[PageRun], data: &mut [u8]) {
        self.full.clear();
        self.zero.clear();
        let (mut read, mut write) = (0, 0);
        for run in runs {
            for page in 0..run.count {
                let gpa = run.gpa + page * PAGE_SIZE as u64;
                let range = read..read + PAGE_SIZE;
                read += PAGE_SIZE;
                if data[range.clone()] == ZERO_PAGE {
                    push_page(&mut self.zero, gpa);
                } else {
                    push_page(&mut self.full, gpa);
                    if write != range.start {
                        data.copy_within(range, write);
                    }
                    write += PAGE_SIZE;
                }
            }
        }
    }

    /// Sends the pages of `runs`, whose content is `data` (and is changed), with `send`. Zero pages are not even named
    /// if `skip_zero` (the other side's pages are zero already).
    pub fn encode<E>(
        &mut self,
        epoch: u64,
        runs: &[PageRun],
        data: &mut [u8],
        skip_zero: bool,
        send: &mut dyn FnMut(&OutFrame<'_>) -> Result<(), E>,
    ) -> Result<Sent, E> {
        self.sort(runs, data);
        let mut sent = Sent::default();
        if !skip_zero {
            for part in self.zero.chunks(ZERO_RUNS) {
                let frame = zero_pages(epoch, part);
                sent.bytes += frame.size() as u64;
                sent.zero_pages += part.iter().map(|run| run.count).sum::<u64>();
                send(&frame)?;
            }
        }
        let mut at = 0;
        let full = std::mem::take(&mut self.full);
        for batch in batches(&full) {
            let count: u64 = batch.iter().map(|run| run.count).sum();
            let raw = &data[at..at + count as usize * PAGE_SIZE];
            at += raw.len();
            let frame = Self::pack(&mut self.gain, &mut self.packed, epoch, &batch, raw);
            sent.bytes += frame.size() as u64;
            sent.pages += count;
            send(&frame)?;
        }
        self.full = full;
        Ok(sent)
    }

    fn pack<'a>(
        gain: &mut Gain,
        packed: &'a mut Vec<u8>,
        epoch: u64,
        batch: &[PageRun],
        raw: &'a [u8],
    ) -> OutFrame<'a> {
        if gain.worth() {
            let begin = Instant::now();
            packed.resize(lz4_flex::block::get_maximum_output_size(raw.len()), 0);
            if let Ok(n) = lz4_flex::block::compress_into(raw, packed) {
                gain.note_batch(raw.len(), n, begin.elapsed());
                if n < raw.len() - raw.len() / 8 {
                    return OutFrame::pages(epoch, batch, Cow::Borrowed(&packed[..n]), true);
                }
            }
        }
        OutFrame::pages(epoch, batch, Cow::Borrowed(raw), false)
    }
}

/// Cuts runs into groups of at most [`BATCH`] pages.
fn batches(runs: &[PageRun]) -> Vec<Vec<PageRun>> {
    let mut all = Vec::new();
    let mut batch = Vec::new();
    let mut room = BATCH;
    for run in runs {
        let mut rest = *run;
        while rest.count > 0 {
            let count = rest.count.min(room);
            batch.push(PageRun { gpa: rest.gpa, count });
            rest = PageRun { gpa: rest.gpa + count * PAGE_SIZE as u64, count: rest.count - count };
            room -= count;
            if room == 0 {
                all.push(std::mem::take(&mut batch));
                room = BATCH;
            }
        }
    }
    if !batch.is_empty() {
        all.push(batch);
    }
    all
}
