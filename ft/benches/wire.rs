//! What pages cost on their way: comparing, checksums, encoding, decoding, and whole epochs through reader and staging.

#![allow(clippy::unwrap_used)]

use std::convert::Infallible;
use std::hint::black_box;

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use ft::core::staging::Staging;
use ft::machine::{Identity, PAGE_SIZE, PageRun};
use ft::wire::decode::decode;
use ft::wire::frame::{EndMarker, Frame, OutFrame, encode, state};
use ft::wire::header::{self, Header};
use ft::wire::lines::{LINE, difference};
use ft::wire::pages::{PageEncoder, Sent};
use ft::wire::reader::FrameReader;
use ft::wire::sent::SentPages;

/// Pages that are encoded at a time.
const PAGES: usize = 256;

/// Size of the saved state of an epoch, in bytes: roughly that of a guest with two vCPUs.
const STATE: usize = 10 << 10;

/// What happened to pages since they were sent last.
#[derive(Debug, Clone, Copy)]
enum Written {
    /// New to the cache: all of them are sent.
    Whole,
    /// They are zero.
    Zero,
    /// So many of their 64 lines changed.
    Lines(usize),
}

impl Written {
    const ALL: [Self; 5] = [Self::Whole, Self::Zero, Self::Lines(1), Self::Lines(4), Self::Lines(64)];

    fn name(self) -> String {
        match self {
            Self::Whole => "whole".into(),
            Self::Zero => "zero".into(),
            Self::Lines(lines) => format!("{lines} lines changed"),
        }
    }

    /// The pages before and after.
    fn versions(self, pages: usize) -> [Vec<u8>; 2] {
        let old = noise(pages * PAGE_SIZE);
        let mut new = old.clone();
        match self {
            Self::Whole => {}
            Self::Zero => new.fill(0),
            Self::Lines(lines) => {
                for line in new.chunks_mut(LINE).step_by(PAGE_SIZE / LINE / lines) {
                    line[7] ^= 1;
                }
            }
        }
        [old, new]
    }
}

/// Bytes that do not compress.
fn noise(len: usize) -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    let word = |_| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()
    };
    (0..len / 8).flat_map(word).collect()
}

/// The first pages of RAM.
fn runs(pages: usize) -> [PageRun; 1] {
    [PageRun {
        gpa: 0,
        count: pages as u64,
    }]
}

fn encoder(written: Written, pages: usize) -> PageEncoder {
    let mut encoder = PageEncoder::default();
    if matches!(written, Written::Lines(_)) {
        encoder.sent.resize((pages * PAGE_SIZE).div_ceil(1 << 20) as u32);
    }
    encoder
}

fn encode_pages(encoder: &mut PageEncoder, epoch: u64, data: &mut [u8], each: &mut dyn FnMut(&OutFrame<'_>)) -> Sent {
    let pages = data.len() / PAGE_SIZE;
    let mut send = |frame: OutFrame<'_>| {
        each(&frame);
        Ok::<(), Infallible>(())
    };
    encoder.encode(epoch, &runs(pages), data, false, &mut send).unwrap()
}

/// The bytes of frames, numbered from 0.
#[derive(Default)]
struct Channel {
    bytes: Vec<u8>,
    frames: u64,
}

impl Channel {
    fn push(&mut self, frame: &OutFrame<'_>) {
        self.bytes.extend_from_slice(&frame.header(self.frames, 0, 0));
        let (head, body) = frame.payload();
        self.bytes.extend_from_slice(head);
        self.bytes.extend_from_slice(body);
        self.frames += 1;
    }
}

/// The frames of the newer versions of pages.
fn channel(written: Written, epoch: u64, pages: usize) -> (Channel, Sent) {
    let mut encoder = encoder(written, pages);
    let [mut old, mut new] = written.versions(pages);
    encode_pages(&mut encoder, epoch, &mut old, &mut |_| ());
    let mut channel = Channel::default();
    let sent = encode_pages(&mut encoder, epoch, &mut new, &mut |frame| channel.push(frame));
    (channel, sent)
}

fn group<'a>(c: &'a mut Criterion, name: &str, bytes: usize) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Bytes(bytes as u64));
    group
}

fn checksum(c: &mut Criterion) {
    for (name, len) in [("a page", PAGE_SIZE), ("1 MiB", 1 << 20)] {
        let data = noise(len);
        group(c, "crc32c", len).bench_function(name, |b| b.iter(|| crc32c::crc32c(black_box(&data))));
    }
}

fn compare(c: &mut Criterion) {
    let mut group = group(c, "compare a page", PAGE_SIZE);
    for lines in [0, 1, 4, 64] {
        let [mut old, new] = Written::Lines(lines.max(1)).versions(1);
        if lines == 0 {
            old.clone_from(&new);
        }
        let [old, new] = [&old, &new].map(|page| page.first_chunk::<PAGE_SIZE>().unwrap());
        group.bench_function(BenchmarkId::new("difference", format!("{lines} lines")), |b| {
            b.iter(|| difference(black_box(old), black_box(new)))
        });
        let mut sent = SentPages::default();
        sent.resize(1);
        let mut turn = false;
        group.bench_function(BenchmarkId::new("with what was sent", format!("{lines} lines")), |b| {
            b.iter(|| {
                turn = !turn;
                sent.update(0, black_box(if turn { new } else { old }))
            })
        });
    }
}

fn encoding(c: &mut Criterion) {
    let mut group = group(c, "encode 256 pages", PAGES * PAGE_SIZE);
    for written in Written::ALL {
        let mut encoder = encoder(written, PAGES);
        let [mut first, mut second] = written.versions(PAGES);
        if matches!(written, Written::Zero) {
            first.fill(0);
        }
        let mut turn = false;
        group.bench_function(written.name(), |b| {
            b.iter(|| {
                turn = !turn;
                let data = if turn { &mut first } else { &mut second };
                encode_pages(&mut encoder, 1, data, &mut |frame| {
                    black_box(frame.size());
                })
            })
        });
    }
}

fn decoding(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode a frame");
    for written in [Written::Whole, Written::Zero, Written::Lines(1), Written::Lines(4)] {
        let pages = if matches!(written, Written::Whole) { 64 } else { PAGES };
        let (Channel { bytes, .. }, _) = channel(written, 1, pages);
        let (first, rest) = bytes.split_first_chunk::<{ header::SIZE }>().unwrap();
        let header = Header::decode(first).unwrap();
        let payload = &rest[..header.len as usize];
        group.throughput(Throughput::Elements(pages as u64));
        group.bench_function(format!("{pages} pages, {}", written.name()), |b| {
            b.iter_batched(
                || payload.to_vec(),
                |payload| decode(header.kind, header.flags, payload).unwrap(),
                BatchSize::LargeInput,
            )
        });
    }
}

fn stage(staging: &mut Staging, frame: Frame) {
    match frame {
        Frame::Pages { epoch, runs, data } => staging.pages(epoch, runs, data),
        Frame::ZeroPages { epoch, runs } => staging.zero_pages(epoch, &runs),
        Frame::Lines { epoch, pages, data } => staging.lines(epoch, pages, data),
        Frame::State { epoch, data } => staging.state(epoch, &data),
        Frame::End(marker) => staging.end(&marker).map(|_| ()),
        other => panic!("{other:?}"),
    }
    .unwrap();
}

/// From the bytes of an epoch, in memory, to the epoch that can be applied.
fn epochs(c: &mut Criterion) {
    let identity = Identity {
        vm_id: "bench".into(),
        vmm_version: String::new(),
        config: String::new(),
        memory: vec![(0, 512 << 20)],
        vcpus: 2,
        cpu_features: Vec::new(),
        tsc_khz: 1_000_000,
        disks: Vec::new(),
        nics: 1,
    };
    let mut group = c.benchmark_group("read and stage an epoch");
    for written in [Written::Whole, Written::Lines(4)] {
        for pages in [50, 1_000, 10_000] {
            let (mut channel, sent) = channel(written, 1, pages);
            state(1, &noise(STATE)).iter().for_each(|frame| channel.push(frame));
            let end = EndMarker {
                epoch: 1,
                pages: sent.pages,
                line_pages: sent.line_pages,
                state_len: STATE as u64,
                ..EndMarker::default()
            };
            encode(&Frame::End(end)).iter().for_each(|frame| channel.push(frame));
            let Channel { bytes, frames } = channel;
            group.throughput(Throughput::ElementsAndBytes {
                elements: pages as u64,
                bytes: bytes.len() as u64,
            });
            group.sample_size(if pages > 1_000 { 20 } else { 100 });
            group.bench_function(BenchmarkId::new(written.name(), pages), |b| {
                b.iter_batched(
                    || (FrameReader::new(&bytes[..]), Staging::new(&identity, 1 << 20)),
                    |(mut reader, mut staging)| {
                        for _ in 0..frames {
                            stage(&mut staging, reader.next(&mut || ()).unwrap().1);
                        }
                        staging.take(1).unwrap()
                    },
                    BatchSize::PerIteration,
                )
            });
        }
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for bench in [checksum, compare, encoding, decoding, epochs] {
        bench(&mut criterion);
    }
    criterion.final_summary();
}
