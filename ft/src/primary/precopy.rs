//! Pre-copy: RAM and disks go to the backup while the guest runs, in passes, until little is left.
//!
//! The first pass sends everything (RAM pages that are zero are left out: a fresh shadow's RAM is zero; zero disk
//! blocks are sent as such, for the backup's file may hold anything). Of a disk whose old copy the backup has for certain
//! it sends only what differs ([`crate::copies`]). Each further pass sends what changed meanwhile.
//! When passes stop shrinking, the guest is slowed down. The little that is left of RAM goes with the first checkpoint, so the
//! guest stands still in the end no longer than at any other, unless it is so much that it must be sent in that pause. Of disks
//! only what was written while the rest was sent is left for the pause.

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::controller::{BeginError, Controller};
use super::session::lock;
use super::stage::pages;
use crate::copies::{self, BlockMap, BlockRun, CopyClaim};
use crate::machine::{DiskChange, PAGE_SIZE, PageRun};
use crate::wire::frame::{self, OutFrame};

/// What is changed and not yet sent.
#[derive(Default)]
pub(super) struct Pending {
    ram: Vec<PageRun>,
    /// (disk, offset, length)
    disks: Vec<(u16, u64, u64)>,
}

impl Pending {
    fn ram_bytes(&self) -> u64 {
        pages(&self.ram) * PAGE_SIZE as u64
    }

    fn disk_bytes(&self) -> u64 {
        self.disks.iter().map(|(.., len)| len).sum()
    }

    fn bytes(&self) -> u64 {
        self.ram_bytes() + self.disk_bytes()
    }
}

/// Pages read and sent at once.
const CHUNK_PAGES: u64 = 256;

/// Disk bytes read and sent at once.
const CHUNK: u64 = 1 << 20;

/// Disk blocks that are looked at for being zero.
const BLOCK: usize = 64 << 10;

/// As much as this may be left for the first checkpoint.
const SMALL: u64 = 4 << 20;

/// Or as much as goes in this time, and is at most half of what an epoch may have.
const SMALL_TIME: Duration = Duration::from_millis(30);

const MAX_PASSES: u32 = 30;

/// Share of the time that the guest gets when passes do not shrink, one after the other.
const SLOW_DOWN: [u8; 3] = [60, 30, 15];

/// Speed, rate limit and progress.
struct Pace {
    began: Instant,
    sent: u64,
    /// Since the rate was last computed.
    window: (Instant, u64),
    rate: f64,
}

/// Copies until little is left; that is returned.
pub(super) fn run(c: &mut Controller) -> Result<Pending, BeginError> {
    let session = c.session.clone();
    let disks: Vec<(u16, u64)> = copied(c).collect();
    let ram_total: u64 = session.identity.memory.iter().map(|(_, size)| size).sum();
    let mut pending = Pending {
        ram: session
            .identity
            .memory
            .iter()
            .map(|(gpa, size)| PageRun {
                gpa: *gpa,
                count: size / PAGE_SIZE as u64,
            })
            .collect(),
        disks: Vec::new(),
    };
    let mut skipped = 0;
    for (disk, size) in &disks {
        let ranges = first_ranges(c, *disk, *size)?;
        skipped += size - ranges.iter().map(|(_, len)| len).sum::<u64>();
        pending
            .disks
            .extend(ranges.into_iter().map(|(offset, len)| (*disk, offset, len)));
    }
    {
        let progress = &mut lock(&session.metrics).progress;
        progress.ram_bytes_total = ram_total;
        progress.disk_bytes_total = disks.iter().map(|(_, size)| size).sum();
        progress.disk_bytes_skipped = skipped;
    }
    let mut pace = Pace {
        began: Instant::now(),
        sent: 0,
        window: (Instant::now(), 0),
        rate: 0.0,
    };
    let (mut before, mut stuck) = (u64::MAX, 0);
    for pass in 0..MAX_PASSES {
        send(c, &pending, pass == 0, Some(&mut pace))?;
        pending = harvest(c)?;
        let left = pending.bytes();
        let rate = pace.sent as f64 / pace.began.elapsed().as_secs_f64().max(1e-3);
        let soon = (rate * SMALL_TIME.as_secs_f64()) as u64;
        if left <= SMALL.max(soon.min(most_of_epoch(c) / 2)) {
            break;
        }
        if left > before / 5 * 4 {
            match SLOW_DOWN.get(stuck) {
                Some(percent) => session.machine.throttle(*percent),
                None => break,
            }
            stuck += 1;
        }
        before = left;
    }
    Ok(pending)
}

/// Bytes of an epoch at which it ends.
fn most_of_epoch(c: &Controller) -> u64 {
    u64::from(lock(&c.session.limits).max_epoch_mib) << 20
}

/// What is left, while the VM still runs: the disks' part is sent, RAM's and what is written meanwhile is copied for the
/// first checkpoint. More RAM than an epoch may have is left for the pause, and returned.
pub(super) fn set_aside(c: &mut Controller, mut pending: Pending) -> Result<Vec<PageRun>, BeginError> {
    let ram = std::mem::take(&mut pending.ram);
    let began = Instant::now();
    send(c, &pending, false, None)?;
    if pages(&ram) * PAGE_SIZE as u64 > most_of_epoch(c) {
        return Ok(ram);
    }
    let machine = c.session.machine.clone();
    c.stage.copy(&ram, |gpa, to| machine.read_memory(gpa, to))?;
    c.copy_passes(began, f64::MAX)?;
    Ok(Vec::new())
}

/// What is still left, with the VM paused, but for RAM that was written since: it goes with the first checkpoint.
pub(super) fn last_pass(c: &mut Controller, ram: Vec<PageRun>) -> Result<(), BeginError> {
    let disks = harvest_disks(c)?;
    send(c, &Pending { ram, disks }, false, None)?;
    let session = c.session.clone();
    session.machine.throttle(100);
    let progress = &mut lock(&session.metrics).progress;
    (progress.rate, progress.seconds_left) = (0.0, 0.0);
    Ok(())
}

fn copied(c: &Controller) -> impl Iterator<Item = (u16, u64)> {
    let disks = c.session.identity.disks.clone();
    (0u16..)
        .zip(disks)
        .filter(|(_, disk)| disk.is_replicated())
        .map(|(i, disk)| (i, disk.size))
}

/// (offset, length) of what must be copied of a disk at first: all of it, if it is not certain that less suffices.
fn first_ranges(c: &mut Controller, disk: u16, size: u64) -> Result<Vec<(u64, u64)>, BeginError> {
    let session = c.session.clone();
    let id = &session.identity.disks[usize::from(disk)].id;
    let claim = session.copies.get(usize::from(disk));
    let mut found = copies::plan(session.machine.divergence(disk), claim, size);
    if let (Ok(blocks), Some(CopyClaim::Known(claim))) = (&found, claim)
        && let Some(block) = unlike_sample(c, disk, size, blocks, &claim.sample)?
    {
        session.machine.refute(disk);
        found = Err(format!("block {block} of the backup's copy is not what it should be"));
    }
    let (ranges, reason): (Vec<(u64, u64)>, String) = match found {
        Ok(blocks) => {
            let ranges = blocks.runs().into_iter().map(|run| copies::bytes_of(run, size));
            (ranges.collect(), String::new())
        }
        Err(reason) => (vec![(0, size)], reason.chars().take(500).collect()),
    };
    let bytes: u64 = ranges.iter().map(|(_, len)| len).sum();
    session.tell_copy(id, bytes, size - bytes, reason);
    Ok(ranges)
}

/// The first block of the backup's sample that it need not get, and does not have.
fn unlike_sample(
    c: &mut Controller,
    disk: u16,
    size: u64,
    differing: &BlockMap,
    sample: &[(u64, u32)],
) -> Result<Option<u64>, BeginError> {
    let machine = c.session.machine.clone();
    for (block, sum) in sample.iter().filter(|(block, _)| !differing.contains(*block)) {
        let (offset, len) = copies::bytes_of(
            BlockRun {
                first: *block,
                count: 1,
            },
            size,
        );
        let content = c.stage.scratch(len as usize);
        machine.read_disk(disk, offset, content)?;
        // What the guest changes meanwhile was marked before.
        if crc32c::crc32c(content) != *sum && !machine.divergence(disk).is_some_and(|d| d.changed.contains(*block)) {
            return Ok(Some(*block));
        }
    }
    Ok(None)
}

fn harvest(c: &mut Controller) -> Result<Pending, BeginError> {
    let mut ram = Vec::new();
    c.session.machine.harvest_dirty(true, &mut ram)?;
    Ok(Pending {
        ram,
        disks: harvest_disks(c)?,
    })
}

fn harvest_disks(c: &Controller) -> Result<Vec<(u16, u64, u64)>, BeginError> {
    let (mut disks, mut ranges) = (Vec::new(), Vec::new());
    for (disk, _) in copied(c) {
        ranges.clear();
        c.session.machine.harvest_dirty_blocks(disk, &mut ranges)?;
        disks.extend(ranges.iter().map(|(offset, len)| (disk, *offset, *len)));
    }
    Ok(disks)
}

fn send(c: &mut Controller, pending: &Pending, first: bool, mut pace: Option<&mut Pace>) -> Result<(), BeginError> {
    let session = c.session.clone();
    {
        let progress = &mut lock(&session.metrics).progress;
        progress.ram_bytes_remaining = pending.ram_bytes();
        progress.disk_bytes_remaining = pending.disk_bytes();
    }
    for (disk, offset, len) in &pending.disks {
        let (mut at, end) = (*offset, offset + len);
        while at < end {
            let n = CHUNK.min(end - at);
            let sent = send_disk(c, *disk, at, n as usize)?;
            at += n;
            account(c, 0, n, sent, &mut pace)?;
        }
    }
    for run in &pending.ram {
        let mut rest = *run;
        while rest.count > 0 {
            let part = PageRun {
                gpa: rest.gpa,
                count: rest.count.min(CHUNK_PAGES),
            };
            rest = PageRun {
                gpa: rest.gpa + part.count * PAGE_SIZE as u64,
                count: rest.count - part.count,
            };
            let sent = send_ram(c, part, first)?;
            account(c, part.count * PAGE_SIZE as u64, 0, sent, &mut pace)?;
        }
    }
    Ok(())
}

fn send_ram(c: &mut Controller, run: PageRun, first: bool) -> Result<u64, BeginError> {
    let session = c.session.clone();
    let chunk = c.stage.scratch(run.count as usize * PAGE_SIZE);
    session.machine.read_memory(run.gpa, chunk)?;
    let mut frames = Vec::new();
    let mut collect = |frame| {
        frames.push(frame);
        Ok::<(), io::Error>(())
    };
    let sent = c.encoder.encode(0, &[run], chunk, first, &mut collect)?;
    let begin = Instant::now();
    session.outbox.write_now(&frames)?;
    drop(frames);
    if sent.pages >= CHUNK_PAGES / 2 {
        c.encoder.gain.note_link(sent.bytes, begin.elapsed());
    }
    Ok(sent.bytes)
}

fn send_disk(c: &mut Controller, disk: u16, offset: u64, len: usize) -> Result<u64, BeginError> {
    let session = c.session.clone();
    let chunk = c.stage.scratch(len);
    session.machine.read_disk(disk, offset, chunk)?;
    let mut frames: Vec<OutFrame<'static>> = Vec::new();
    let mut at = 0;
    while at < len {
        let is_zero = |at: usize| chunk[at..len.min(at + BLOCK)].iter().all(|b| *b == 0);
        let zero = is_zero(at);
        let begin = at;
        while at < len && is_zero(at) == zero {
            at = len.min(at + BLOCK);
        }
        let offset = offset + begin as u64;
        let change = if zero {
            DiskChange::Zero {
                offset,
                len: (at - begin) as u64,
                unmap: true,
            }
        } else {
            DiskChange::Write {
                offset,
                data: chunk[begin..at].to_vec(),
            }
        };
        frames.extend(frame::disk_change(0, disk, change));
    }
    session.outbox.write_now(&frames)?;
    Ok(frames.iter().map(|f| f.size() as u64).sum())
}

/// Progress, the end of the attempt, the rate limit.
fn account(c: &Controller, ram: u64, disk: u64, sent: u64, pace: &mut Option<&mut Pace>) -> Result<(), BeginError> {
    let session = &c.session;
    if session.quit.load(Ordering::SeqCst) || lock(&session.core).is_over() {
        return Err(BeginError::Ended);
    }
    let mut metrics = lock(&session.metrics);
    let progress = &mut metrics.progress;
    progress.ram_bytes_sent += ram;
    progress.disk_bytes_sent += disk;
    progress.ram_bytes_remaining = progress.ram_bytes_remaining.saturating_sub(ram);
    progress.disk_bytes_remaining = progress.disk_bytes_remaining.saturating_sub(disk);
    let Some(pace) = pace else { return Ok(()) };
    pace.sent += ram + disk;
    pace.window.1 += ram + disk;
    let window = pace.window.0.elapsed();
    if window >= Duration::from_millis(250) || pace.rate == 0.0 {
        pace.rate = pace.window.1 as f64 / window.as_secs_f64().max(1e-3);
        if window >= Duration::from_millis(250) {
            pace.window = (Instant::now(), 0);
        }
    }
    progress.rate = pace.rate;
    let left = progress.ram_bytes_remaining + progress.disk_bytes_remaining;
    progress.seconds_left = left as f64 / pace.rate.max(1.0);
    drop(metrics);
    let limit = lock(&session.limits).precopy_mib_s;
    if limit > 0 {
        let due = Duration::from_secs_f64(sent as f64 / (f64::from(limit) * (1 << 20) as f64));
        session.wait_end(due);
    }
    Ok(())
}
