//! What is held and what is sent: frames through the interposer, held changes of shared disks, the outbox over loopback.

#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use ft::interposer::{Interposer, LogSink};
use ft::machine::{DiskChange, PAGE_SIZE};
use ft::outbox::{Clock, Outbox, Stamp};
use ft::overlay::Overlay;
use ft::transport::Stream;
use ft::wire::frame::{EndMarker, Frame, OutFrame, encode, input_frame, state};
use ft::wire::lines::{LINE, PageLines};
use ft::wire::reader::FrameReader;

/// Bytes of a frame of the guest's: Ethernet's largest without its checksum.
const FRAME: usize = 1514;

/// Bytes of a disk change.
const CHANGE: usize = 4096;

/// A log that goes nowhere: what is measured is the interposer.
struct Nowhere;

impl LogSink for Nowhere {
    fn input_frame(&self, _epoch: u64, _nic: u16, data: &[u8]) -> u64 {
        data.len() as u64
    }

    fn disk_change(&self, _epoch: u64, _disk: u16, change: DiskChange) -> u64 {
        change.range().1
    }
}

fn interposer() -> Arc<Interposer> {
    Interposer::new(1, 1 << 30, Arc::new(Nowhere), Arc::new(|| ()))
}

fn frames(c: &mut Criterion) {
    let mut group = c.benchmark_group("interposer");
    for count in [1, 64, 1_000] {
        group.throughput(Throughput::Elements(count as u64));
        let interposer = interposer();
        group.bench_function(BenchmarkId::new("hold and release frames", count), |b| {
            b.iter_batched(
                || vec![vec![0x5a; FRAME]; count],
                |frames| {
                    for frame in frames {
                        interposer.hold_frame(0, frame);
                    }
                    let epoch = interposer.cut().epoch;
                    interposer.take_committed(epoch)
                },
                BatchSize::SmallInput,
            )
        });
    }
    group.throughput(Throughput::Elements(1));
    let (log, data) = (interposer(), vec![0x5a; FRAME]);
    log.unblock();
    group.bench_function("log a received frame", |b| {
        b.iter(|| log.log_frame(0, black_box(&data)))
    });
    group.finish();
}

/// A change of the `n`th piece of a disk.
fn change(n: u64) -> DiskChange {
    DiskChange::Write {
        offset: n * CHANGE as u64,
        data: vec![n as u8; CHANGE],
    }
}

fn overlay(c: &mut Criterion) {
    let mut group = c.benchmark_group("overlay of 1,000 changes");
    group.throughput(Throughput::Elements(1));
    let held: Vec<_> = (0..1_000).map(|n| Arc::new(change(2 * n))).collect();
    let mut overlay = Overlay::default();
    for (number, change) in (0..).zip(&held) {
        overlay.insert(number, change);
    }
    let size = CHANGE as u64;
    for (name, offset, len) in [
        ("read what is held", 1_000 * size, size),
        ("read what is not held", 1_001 * size, size),
        ("read 1 MiB, half of it held", 500 * size, 1 << 20),
    ] {
        group.bench_function(name, |b| b.iter(|| overlay.read(black_box(offset), black_box(len))));
    }
    let (again, other) = (held[300].clone(), Arc::new(change(601)));
    let mut number = held.len() as u64;
    for (name, change) in [("write and remove, new place", &other), ("write again", &again)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                number += 1;
                overlay.insert(number, change);
                if Arc::ptr_eq(change, &other) {
                    overlay.remove(number, change);
                }
            })
        });
    }
    group.finish();
    let interposer = interposer();
    let mut group = c.benchmark_group("shared disk");
    group.throughput(Throughput::Bytes(size));
    let mut number = 0;
    group.bench_function("hold and release a change of 4 KiB", |b| {
        b.iter_batched(
            || change(7),
            |change| {
                interposer.hold_disk(0, change);
                let epoch = interposer.cut().epoch;
                interposer.take_committed(epoch);
                let held = interposer.held_changes(epoch);
                interposer.written(number);
                number += 1;
                held
            },
            BatchSize::SmallInput,
        )
    });
}

/// Two ends of a connection over loopback, as the log channel's are set up.
fn pair() -> [Stream; 2] {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    [near, far].map(|socket| {
        socket.set_nodelay(true).unwrap();
        Stream::Tcp(socket)
    })
}

fn outbox(stream: &Stream, stamp: Stamp) -> Arc<Outbox> {
    Arc::new(Outbox::new(stream, Clock::default(), stamp).unwrap())
}

/// Frames posted at once, as by a device worker, until the other side has read them all.
fn posted(c: &mut Criterion) {
    let [near, far] = pair();
    let outbox = outbox(&near, Stamp::Clock);
    let sender = {
        let outbox = outbox.clone();
        std::thread::spawn(move || outbox.run())
    };
    let (last, seen) = mpsc::channel();
    // Frames of epoch 1 end a burst.
    let reader = std::thread::spawn(move || {
        let mut reader = FrameReader::new(far);
        while let Ok((_, frame)) = reader.next(&mut || ()) {
            if matches!(frame, Frame::Input { epoch: 1, .. }) {
                last.send(()).unwrap();
            }
        }
    });
    let mut group = c.benchmark_group("outbox");
    let data = vec![0x5a; FRAME];
    for count in [1, 8, 64] {
        group.throughput(Throughput::Elements(count));
        group.bench_function(BenchmarkId::new("frames of a wake-up", count), |b| {
            b.iter(|| {
                outbox.post((1..=count).map(|n| input_frame(u64::from(n == count), 0, &data)));
                seen.recv().unwrap();
            })
        });
    }
    group.finish();
    outbox.close();
    sender.join().unwrap().ok();
    reader.join().unwrap();
}

/// A small epoch: changed lines of 40 pages, 10 KiB of saved state, the end marker.
fn small_epoch<'a>(lines: &'a [u8], saved: &'a [u8]) -> Vec<OutFrame<'a>> {
    let page = |n| PageLines {
        gpa: n * PAGE_SIZE as u64,
        mask: 0b1111,
    };
    let pages: Vec<_> = (0..(lines.len() / (4 * LINE)) as u64).map(page).collect();
    let mut frames = vec![OutFrame::lines(1, &pages, lines.into(), false)];
    frames.extend(state(1, saved));
    frames.extend(encode(&Frame::End(EndMarker {
        epoch: 1,
        line_pages: pages.len() as u64,
        state_len: saved.len() as u64,
        ..EndMarker::default()
    })));
    frames
}

/// From the first byte of a small epoch to its acknowledgement, with encoding and decoding, without applying.
fn round_trip(c: &mut Criterion) {
    let [near, far] = pair();
    let sending = outbox(&near, Stamp::Clock);
    let backup = std::thread::spawn(move || {
        let answers = outbox(&far, Stamp::Echo(Default::default()));
        let mut reader = FrameReader::new(far);
        while let Ok((_, frame)) = reader.next(&mut || ()) {
            if let Frame::End(marker) = frame {
                answers.write_now(&encode(&Frame::Ack(marker.epoch))).unwrap();
            }
        }
    });
    let mut reader = FrameReader::new(near);
    let (lines, saved) = (vec![0x5a; 40 * 4 * LINE], vec![0xa5; 10 << 10]);
    let bytes: usize = small_epoch(&lines, &saved).iter().map(OutFrame::size).sum();
    let mut group = c.benchmark_group("round trip");
    group.throughput(Throughput::Bytes(bytes as u64));
    group.bench_function("small epoch and its acknowledgement", |b| {
        b.iter(|| {
            sending.write_now(&small_epoch(&lines, &saved)).unwrap();
            let (_, answer) = reader.next(&mut || ()).unwrap();
            assert_eq!(answer, Frame::Ack(1));
        })
    });
    group.finish();
    sending.close();
    backup.join().unwrap();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for bench in [frames, overlay, posted, round_trip] {
        bench(&mut criterion);
    }
    criterion.final_summary();
}
