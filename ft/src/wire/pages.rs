//! Batches of RAM pages: zero pages, and lines that the other side has already, are left out; the rest is compressed
//! where that pays.

use std::borrow::Cow;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::frame::{OutFrame, zero_pages};
use super::lines::PageLines;
use super::sent::{How, SentPages};
use crate::machine::{PAGE_SIZE, PageRun};

/// Pages with content in one frame.
const BATCH: u64 = 64;

/// A frame that has so many pages goes without those behind a gap, which would have to be moved.
const ENOUGH: u64 = 16;

/// Pages with changed lines in one frame.
const LINE_PAGES: usize = 256;

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
        Self {
            link: None,
            speed: 500e6,
            ratio: 0.5,
            until_probe: 0,
        }
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
    /// Pages of which some lines are sent.
    pub line_pages: u64,
    /// Bytes on the channel.
    pub bytes: u64,
}

/// Makes frames of pages; keeps its buffers from epoch to epoch.
#[derive(Debug, Default)]
pub struct PageEncoder {
    /// Whether compression pays.
    pub gain: Gain,
    /// What the epochs have sent.
    pub sent: SentPages,
    full: Vec<Batch>,
    zero: Vec<PageRun>,
    lines: Vec<PageLines>,
    line_bytes: Vec<u8>,
}

/// Full pages of one frame, which lie together.
#[derive(Debug)]
struct Batch {
    /// Where the first is, in bytes of all content.
    at: usize,
    runs: Vec<PageRun>,
    pages: u64,
}

impl Batch {
    fn bytes(&self) -> Range<usize> {
        self.at..self.at + self.pages as usize * PAGE_SIZE
    }
}

/// Appends a page, to the last run if it follows that.
pub(crate) fn push_page(runs: &mut Vec<PageRun>, gpa: u64) {
    match runs.last_mut() {
        Some(run) if run.end() == gpa => run.count += 1,
        _ => runs.push(PageRun { gpa, count: 1 }),
    }
}

/// Puts the page at `gpa`, whose content is in `range` of `data`, into the last frame or a new one.
fn add_full(frames: &mut Vec<Batch>, gpa: u64, range: Range<usize>, data: &mut [u8]) {
    let fits = |batch: &Batch| batch.pages < BATCH && (batch.pages < ENOUGH || batch.bytes().end == range.start);
    if !frames.last().is_some_and(fits) {
        frames.push(Batch {
            at: range.start,
            runs: Vec::new(),
            pages: 0,
        });
    }
    let Some(batch) = frames.last_mut() else { return };
    let to = batch.bytes().end;
    if to != range.start {
        data.copy_within(range, to);
    }
    push_page(&mut batch.runs, gpa);
    batch.pages += 1;
}

impl PageEncoder {
    /// Sorts the pages of `runs`, whose content is `data`, into full ones, zero ones and those of which some lines will
    /// do; the full ones of a frame are moved together, the lines are copied. With `delta` what is known to be sent is left out.
    fn sort(&mut self, runs: &[PageRun], data: &mut [u8], delta: bool) {
        self.full.clear();
        self.zero.clear();
        self.lines.clear();
        self.line_bytes.clear();
        let mut read = 0;
        for gpa in runs.iter().flat_map(PageRun::addresses) {
            let range = read..read + PAGE_SIZE;
            read += PAGE_SIZE;
            let Some(page) = data[range.clone()].first_chunk::<PAGE_SIZE>() else {
                return;
            };
            if *page == ZERO_PAGE {
                push_page(&mut self.zero, gpa);
                self.sent.forget(gpa);
                continue;
            }
            match if delta { self.sent.update(gpa, page) } else { How::Whole } {
                How::Whole => {
                    add_full(&mut self.full, gpa, range, data);
                }
                How::Lines(0) => {}
                How::Lines(mask) => {
                    let lines = PageLines { gpa, mask };
                    for (address, len) in lines.runs() {
                        let at = (address - gpa) as usize;
                        self.line_bytes.extend_from_slice(&page[at..at + len]);
                    }
                    self.lines.push(lines);
                }
            }
        }
    }

    /// Makes frames of the pages of `runs`, whose content is `data` (which is changed), and gives them to `send`. Zero
    /// pages are not even named if `skip_zero` (the other side's pages are zero already). In an epoch (not 0) lines that
    /// [`PageEncoder::sent`] knows the other side to have are left out: every page of every epoch must come here.
    pub fn encode<'a, E>(
        &mut self,
        epoch: u64,
        runs: &[PageRun],
        data: &'a mut [u8],
        skip_zero: bool,
        send: &mut dyn FnMut(OutFrame<'a>) -> Result<(), E>,
    ) -> Result<Sent, E> {
        self.sort(runs, data, epoch != 0);
        let data: &'a [u8] = data;
        let mut sent = Sent::default();
        if !skip_zero {
            for part in self.zero.chunks(ZERO_RUNS) {
                let frame = zero_pages(epoch, part);
                sent.bytes += frame.size() as u64;
                sent.zero_pages += part.iter().map(|run| run.count).sum::<u64>();
                send(frame)?;
            }
        }
        let mut rest = &self.line_bytes[..];
        for part in self.lines.chunks(LINE_PAGES) {
            let (raw, later) = rest.split_at(part.iter().map(|page| page.bytes()).sum());
            rest = later;
            let (body, lz4) = pack(&mut self.gain, Cow::Owned(raw.to_vec()));
            let frame = OutFrame::lines(epoch, part, body, lz4);
            sent.bytes += frame.size() as u64;
            sent.line_pages += part.len() as u64;
            send(frame)?;
        }
        for batch in &self.full {
            let (body, lz4) = pack(&mut self.gain, Cow::Borrowed(&data[batch.bytes()]));
            let frame = OutFrame::pages(epoch, &batch.runs, body, lz4);
            sent.bytes += frame.size() as u64;
            sent.pages += batch.pages;
            send(frame)?;
        }
        Ok(sent)
    }
}

/// The bytes, compressed if that pays, and whether they are.
fn pack<'a>(gain: &mut Gain, raw: Cow<'a, [u8]>) -> (Cow<'a, [u8]>, bool) {
    if gain.worth() {
        let begin = Instant::now();
        let packed = lz4_flex::block::compress(&raw);
        gain.note_batch(raw.len(), packed.len(), begin.elapsed());
        if packed.len() < raw.len() - raw.len() / 8 {
            return (Cow::Owned(packed), true);
        }
    }
    (raw, false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::decode::decode;
    use crate::wire::frame::Frame;

    fn run(page: u64, count: u64) -> PageRun {
        PageRun {
            gpa: page * PAGE_SIZE as u64,
            count,
        }
    }

    /// Encodes and decodes; returns the memory that the other side has.
    fn round_trip(encoder: &mut PageEncoder, runs: &[PageRun], data: &[u8], skip_zero: bool) -> (Vec<u8>, Sent) {
        let mut memory = vec![0xee; 1 << 20];
        let sent = send(encoder, &mut memory, runs, data, skip_zero);
        (memory, sent)
    }

    fn send(encoder: &mut PageEncoder, memory: &mut [u8], runs: &[PageRun], data: &[u8], skip_zero: bool) -> Sent {
        let mut copy = data.to_vec();
        let mut apply = |frame: OutFrame<'_>| {
            let bytes = frame.header(0, 0, 0);
            let header = crate::wire::header::Header::decode(&bytes).unwrap();
            let (head, body) = frame.payload();
            match decode(header.kind, header.flags, [head, body].concat()).unwrap() {
                Frame::Pages { epoch: 7, runs, data } => {
                    let mut at = 0;
                    for run in runs {
                        let len = run.count as usize * PAGE_SIZE;
                        memory[run.gpa as usize..][..len].copy_from_slice(&data[at..at + len]);
                        at += len;
                    }
                    assert_eq!(at, data.len());
                }
                Frame::ZeroPages { epoch: 7, runs } => {
                    for run in runs {
                        memory[run.gpa as usize..][..run.count as usize * PAGE_SIZE].fill(0);
                    }
                }
                Frame::Lines { epoch: 7, pages, data } => {
                    let mut at = 0;
                    for (address, len) in pages.iter().flat_map(|page| page.runs()) {
                        memory[address as usize..][..len].copy_from_slice(&data[at..at + len]);
                        at += len;
                    }
                    assert_eq!(at, data.len());
                }
                other => panic!("{other:?}"),
            }
            Ok::<(), ()>(())
        };
        encoder.encode(7, runs, &mut copy, skip_zero, &mut apply).unwrap()
    }

    proptest::proptest! {
        /// Whatever the guest writes, epoch after epoch, the other side has it; packed or not, with a cache that is
        /// smaller than what is written, too.
        #[test]
        fn r2_pages_written_again_and_again_are_the_same_on_the_other_side(
            epochs in proptest::collection::vec(
                proptest::collection::vec((0..PAGES, 0..PAGE_SIZE, 0usize..200, 0u8..4), 1..40),
                1..12,
            ),
            packed: bool,
        ) {
            let mut encoder = PageEncoder::default();
            encoder.sent.resize(1);
            if packed {
                encoder.gain.note_link(1_000_000, Duration::from_secs(1));
            }
            let mut here = vec![0; PAGES as usize * PAGE_SIZE];
            let mut there = here.clone();
            for writes in epochs {
                let mut written = std::collections::BTreeSet::new();
                for (page, at, len, value) in writes {
                    let bytes = &mut here[page as usize * PAGE_SIZE..][..PAGE_SIZE];
                    // Now and then a whole page.
                    let range = if len < 190 { at..(at + len).min(PAGE_SIZE) } else { 0..PAGE_SIZE };
                    bytes[range].fill(value);
                    written.insert(page);
                }
                let runs: Vec<PageRun> = written.iter().map(|page| run(*page, 1)).collect();
                let data: Vec<u8> = written
                    .iter()
                    .flat_map(|page| here[*page as usize * PAGE_SIZE..][..PAGE_SIZE].to_vec())
                    .collect();
                send(&mut encoder, &mut there, &runs, &data, false);
                proptest::prop_assert!(here == there);
            }
        }
    }

    /// More than the cache of 1 MiB has places for.
    const PAGES: u64 = 300;

    #[test]
    fn a_page_with_few_changes_costs_its_changed_lines() {
        let mut encoder = PageEncoder::default();
        encoder.sent.resize(1);
        let mut data = vec![1; 10 * PAGE_SIZE];
        let whole = round_trip(&mut encoder, &[run(0, 10)], &data, false).1;
        assert_eq!((whole.pages, whole.line_pages), (10, 0));
        data[5 * PAGE_SIZE] = 2;
        let lines = round_trip(&mut encoder, &[run(0, 10)], &data, false).1;
        assert_eq!((lines.pages, lines.line_pages), (0, 1));
        assert!(lines.bytes < 200, "{lines:?}");
    }

    #[test]
    fn full_and_zero_pages_arrive_where_they_belong_packed_or_not() {
        let runs = [run(1, 70), run(100, 3), run(200, 1)];
        let mut data = vec![0u8; 74 * PAGE_SIZE];
        for (page, bytes) in data.chunks_mut(PAGE_SIZE).enumerate().filter(|(page, _)| page % 5 != 0) {
            bytes.fill(page as u8);
        }
        let mut expected = vec![0xee; 1 << 20];
        let mut at = 0;
        for run in runs {
            let len = run.count as usize * PAGE_SIZE;
            expected[run.gpa as usize..][..len].copy_from_slice(&data[at..at + len]);
            at += len;
        }
        let mut encoder = PageEncoder::default();
        let (memory, plain) = round_trip(&mut encoder, &runs, &data, false);
        assert!(memory == expected);
        assert_eq!((plain.pages, plain.zero_pages), (59, 15));
        encoder.gain.note_link(1_000_000, Duration::from_secs(1));
        let (memory, packed) = round_trip(&mut encoder, &runs, &data, false);
        assert!(memory == expected);
        assert!(packed.bytes < plain.bytes / 10, "{packed:?}");
        let (memory, skipped) = round_trip(&mut encoder, &runs, &data, true);
        assert_eq!(skipped.zero_pages, 0);
        assert!(memory[PAGE_SIZE..2 * PAGE_SIZE].iter().all(|b| *b == 0xee));
    }

    #[test]
    fn what_does_not_get_smaller_is_probed_only_now_and_then() {
        let mut gain = Gain::default();
        assert!(!gain.worth());
        gain.note_link(1 << 20, Duration::from_secs(1));
        assert!(gain.worth());
        (0..100).for_each(|_| gain.note_batch(1000, 1000, Duration::from_micros(1)));
        assert_eq!((0..6400).filter(|_| gain.worth()).count(), 100);
    }
}
