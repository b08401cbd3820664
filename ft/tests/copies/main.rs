//! Delta re-protection against a model: random sequences of writes, acknowledgements, kills, takeovers and copies that are
//! broken off, on two image files of a few blocks. After every completed copy both must be equal; that the checks
//! find forgotten blocks is shown by bugs put in.

#![allow(clippy::unwrap_used)]

mod record;

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use ft::copies::{BLOCK, BlockRun, CopyClaim, DiskHistory, SessionId, ShadowCopy, Sidecar, bytes_of, plan};

const SIZE: u64 = 40 * BLOCK + 512;
const VM: &str = "vm";
const DISK: &str = "_disk0";

/// What is done wrong on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bug {
    None,
    /// The doubtful blocks of the peer are not copied.
    ForgetDoubtful,
    /// The blocks that this side changed are not copied.
    ForgetOwn,
    /// A sidecar takes no marks.
    NoMarks,
    /// Epochs count as applied when they were sent.
    ConfirmEarly,
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

type Write = (u64, Vec<u8>);

struct Host {
    path: PathBuf,
    file: File,
}

impl Host {
    fn new(dir: &tempfile::TempDir, name: &str) -> Self {
        let path = dir.path().join(name);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .unwrap();
        file.set_len(SIZE).unwrap();
        Self { path, file }
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    fn write(&self, (offset, data): &Write) {
        self.file.write_all_at(data, *offset).unwrap();
    }

    fn shadow(&self) -> ShadowCopy {
        ShadowCopy::open(&self.path, VM, DISK, SIZE)
    }

    fn history(&self) -> DiskHistory {
        history(Sidecar::open(&self.path).unwrap())
    }
}

fn history(sidecar: Option<Sidecar>) -> DiskHistory {
    DiskHistory::new(VM, DISK, SIZE, sidecar).keeping(Duration::ZERO)
}

struct World {
    random: Random,
    bug: Bug,
    hosts: [Host; 2],
    /// Which host runs the VM.
    runs: usize,
    history: DiskHistory,
    sessions: u64,
    /// Copies that could leave something out.
    proofs: u64,
    /// Blocks that were left out.
    skipped: u64,
    serial: u8,
}

impl World {
    fn new(dir: &tempfile::TempDir, seed: u64, bug: Bug) -> Self {
        let hosts = [Host::new(dir, "a"), Host::new(dir, "b")];
        Self {
            random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            bug,
            history: hosts[0].history(),
            hosts,
            runs: 0,
            sessions: 0,
            proofs: 0,
            skipped: 0,
            serial: 0,
        }
    }

    fn some_write(&mut self) -> Write {
        self.serial = self.serial.wrapping_add(1).max(1);
        let len = 1 + self.random.below(3 * BLOCK);
        // Mostly in one corner, so that blocks are written again and again.
        let span = if self.random.chance(70) { 12 * BLOCK } else { SIZE };
        let offset = self.random.below(span).min(SIZE - len);
        (offset, vec![self.serial; len as usize])
    }

    /// The guest writes on its own disk.
    fn guest_writes(&mut self) -> Write {
        let write = self.some_write();
        if self.bug != Bug::NoMarks {
            self.history.mark(write.0, write.1.len() as u64);
        }
        // A process may die between the mark and the write, or in the middle of it: the caller decides.
        write
    }

    /// Copies the disk to the other host; `Some(shadow)` when it is complete.
    fn copy(&mut self) -> Option<ShadowCopy> {
        let peer = 1 - self.runs;
        let mut shadow = self.hosts[peer].shadow();
        let claim = shadow.claim();
        let mut known = self.history.divergence();
        if let (Bug::ForgetOwn, Some(known)) = (self.bug, &mut known) {
            known.changed.clear();
        }
        let claim = match claim {
            CopyClaim::Known(mut claim) => {
                if self.bug == Bug::ForgetDoubtful {
                    claim.doubtful.clear();
                }
                CopyClaim::Known(claim)
            }
            unknown => unknown,
        };
        let runs = match plan(known, Some(&claim), SIZE) {
            Ok(blocks) => {
                self.proofs += 1;
                self.skipped += blocks.blocks() - blocks.len();
                blocks.runs()
            }
            Err(_) => vec![BlockRun {
                first: 0,
                count: SIZE.div_ceil(BLOCK),
            }],
        };
        let mut left: Vec<(u64, u64)> = runs.into_iter().map(|run| bytes_of(run, SIZE)).collect();
        // The guest writes meanwhile; what it changed is copied once more.
        while let Some((offset, len)) = left.pop() {
            if self.random.chance(5) {
                let write = self.guest_writes();
                self.hosts[self.runs].write(&write);
                left.push((write.0, write.1.len() as u64));
            }
            if self.random.chance(2) {
                return None;
            }
            let mut data = vec![0; len as usize];
            self.hosts[self.runs].file.read_exact_at(&mut data, offset).unwrap();
            shadow.before_write(offset, len);
            self.hosts[peer].write(&(offset, data));
        }
        Some(shadow)
    }

    /// One session: from the copy to the loss of one side. An error says what differs.
    fn session(&mut self) -> Result<(), String> {
        let Some(mut shadow) = self.copy() else { return Ok(()) };
        let peer = 1 - self.runs;
        if self.hosts[0].content() != self.hosts[1].content() {
            return Err(format!("the disks differ after copy {}", self.sessions + 1));
        }
        self.sessions += 1;
        let id = SessionId {
            name: format!("primary-{}", self.sessions),
            generation: self.sessions,
        };
        self.history.begin(&id);
        if self.random.chance(10) {
            // The backup dies before it knows that the copy is complete.
            self.history.go_alone();
            return Ok(());
        }
        shadow.synced(&id);
        let (mut running, mut applied, mut sent) = (2, 1, VecDeque::<Vec<Write>>::new());
        let mut now = Vec::new();
        for _ in 0..self.random.below(30) {
            match self.random.below(10) {
                0..5 => {
                    let write = self.guest_writes();
                    self.hosts[self.runs].write(&write);
                    now.push(write);
                }
                5..7 => {
                    sent.push_back(std::mem::take(&mut now));
                    running += 1;
                }
                7..9 => {
                    for write in sent.pop_front().into_iter().flatten() {
                        shadow.before_write(write.0, write.1.len() as u64);
                        self.hosts[peer].write(&write);
                    }
                    applied = running - 1 - sent.len() as u64;
                }
                _ => {
                    let confirmed = if self.bug == Bug::ConfirmEarly {
                        running
                    } else {
                        applied
                    };
                    self.history.confirm(confirmed, running);
                }
            }
        }
        match self.random.below(3) {
            // The primary is lost, in the middle of a write perhaps.
            0 => {
                let write = self.guest_writes();
                let cut = self.random.below(write.1.len() as u64 + 1) as usize;
                self.hosts[self.runs].write(&(write.0, write.1[..cut].to_vec()));
                if self.random.chance(30) {
                    self.history.close();
                }
                for write in sent.into_iter().flatten() {
                    shadow.before_write(write.0, write.1.len() as u64);
                    self.hosts[peer].write(&write);
                }
                self.history = history(shadow.into_sidecar());
                self.history.took_over(&id);
                self.runs = peer;
            }
            // The backup is lost, in the middle of an epoch perhaps.
            _ => {
                for write in sent.pop_front().into_iter().flatten() {
                    if self.random.chance(60) {
                        shadow.before_write(write.0, write.1.len() as u64);
                        self.hosts[peer].write(&write);
                    }
                }
                if self.random.chance(30) {
                    shadow.close();
                }
                self.history.go_alone();
            }
        }
        for _ in 0..self.random.below(5) {
            let write = self.guest_writes();
            self.hosts[self.runs].write(&write);
        }
        Ok(())
    }
}

/// (proofs, blocks left out), or what differs.
fn run(seed: u64, bug: Bug) -> Result<(u64, u64), String> {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(&dir, seed, bug);
    for _ in 0..12 {
        world.session()?;
    }
    Ok((world.proofs, world.skipped))
}

fn seeds() -> u64 {
    std::env::var("FT_COPIES_SEEDS").map_or(25, |n| n.parse().unwrap())
}

#[test]
fn r3_after_every_delta_copy_the_disks_are_equal() {
    let (mut proofs, mut skipped) = (0, 0);
    for seed in 1..=seeds() {
        let (p, s) = run(seed, Bug::None).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        (proofs, skipped) = (proofs + p, skipped + s);
    }
    // It is of use.
    assert!(
        proofs > seeds() * 4 && skipped > proofs * 10,
        "{proofs} proofs, {skipped} blocks left out"
    );
}

#[test]
fn r3_forgotten_blocks_are_caught() {
    for bug in [Bug::ForgetDoubtful, Bug::ForgetOwn, Bug::NoMarks, Bug::ConfirmEarly] {
        assert!(
            (1..=seeds()).any(|seed| run(seed, bug).is_err()),
            "{bug:?} was not caught"
        );
    }
}

#[test]
fn r3_only_blocks_of_applied_epochs_are_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let host = Host::new(&dir, "a");
    let history = host.history();
    let id = SessionId {
        name: "primary-x".into(),
        generation: 0,
    };
    history.begin(&id);
    let changed = || -> Vec<u64> {
        history
            .divergence()
            .unwrap()
            .changed
            .runs()
            .iter()
            .map(|run| run.first)
            .collect()
    };
    history.mark(0, 1);
    // Epoch 2 runs; only the first one is applied, again and again.
    history.confirm(1, 2);
    history.mark(5 * BLOCK, 1);
    history.confirm(1, 3);
    history.confirm(1, 4);
    assert_eq!(changed(), [0, 5]);
    // The older map is that of epochs up to 2, the newer one that of epochs up to 4.
    history.confirm(2, 4);
    assert_eq!(changed(), [5]);
    history.mark(5 * BLOCK, 1);
    history.confirm(3, 5);
    assert_eq!(changed(), [5]);
    // A disk that failed to change a block is not what the log says, whatever was applied.
    history.mark_failed(9 * BLOCK, 1);
    (4..9).for_each(|epoch| history.confirm(epoch, epoch + 1));
    assert_eq!(changed(), [9]);
    // The sidecar has the same.
    drop(history);
    let CopyClaim::Known(claim) = host.shadow().claim() else {
        panic!("no claim")
    };
    assert_eq!(
        (claim.session, claim.doubtful),
        (id, vec![BlockRun { first: 9, count: 1 }])
    );
}

/// As in production: a block that is written again and again is marked once in a while.
#[test]
fn blocks_are_kept_for_a_second() {
    let history = DiskHistory::new(VM, DISK, SIZE, None);
    history.begin(&SessionId {
        name: "primary-x".into(),
        generation: 0,
    });
    history.mark(0, 1);
    (1..100).for_each(|epoch| history.confirm(epoch, epoch + 1));
    assert!(history.is_changed(0));
}
