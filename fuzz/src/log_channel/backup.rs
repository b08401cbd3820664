//! A primary's frames on the way into a backup.

use std::collections::BTreeMap;

use ft::core::arbitration::Answer;
use ft::core::backup::{Action, BackupState, Event, FromPrimary};
use ft::core::ms;
use ft::core::staging::{StagedEpoch, Staging};
use ft::machine::{DiskChange, Input as GuestInput, PAGE_SIZE, PageRun};
use ft::wire::frame::{EndMarker, Frame, Kind};
use ft::wire::hello::compare;
use ft::wire::reader::FrameReader;

use super::{DISK, GOOD_END, RAM, check_round_trip, frame_bytes, framed, identity};
use crate::input::Input;
use crate::reach::reached;

/// Log bytes that an epoch may have here.
const LOG: u64 = 1 << 20;

/// A backup without threads.
struct Backup {
    core: BackupState,
    staging: Staging,
    waiting: BTreeMap<u64, StagedEpoch>,
    /// What the next end marker must say.
    expected: BTreeMap<u64, EndMarker>,
    now: u64,
    /// Bytes that the shadow was made to write, against those that came.
    written: u64,
    applies: bool,
}

impl Backup {
    fn new(applies: bool) -> Self {
        Self {
            core: BackupState::new(1, ms(500), 256 << 20, 0),
            staging: Staging::new(&identity(), LOG),
            waiting: BTreeMap::new(),
            expected: BTreeMap::new(),
            now: 0,
            written: 0,
            applies,
        }
    }

    fn check_pages(&mut self, runs: &[PageRun]) {
        for run in runs {
            let (start, end) = (run.gpa, run.gpa + run.count * PAGE_SIZE as u64);
            let inside = |(base, len): &(u64, u64)| *base <= start && end <= base + len;
            assert!(
                identity().memory.iter().any(inside),
                "pages out of RAM reach the shadow"
            );
            self.written += run.count * PAGE_SIZE as u64;
        }
    }

    fn check_disk(&mut self, disk: u16, change: &DiskChange) {
        let end = match change {
            DiskChange::Write { offset, data } => offset + data.len() as u64,
            DiskChange::Zero { offset, len, .. } => offset + len,
            DiskChange::Flush => 0,
            DiskChange::Check { .. } => panic!("a check of a disk that is not shared reaches the shadow"),
        };
        assert!(disk == 0 && end <= DISK, "a change out of the disk reaches the shadow");
    }

    fn apply(&mut self, epoch: u64) {
        let Some(staged) = self.waiting.remove(&epoch) else {
            return;
        };
        for (runs, data) in &staged.pages {
            let pages: u64 = runs.iter().map(|run| run.count).sum();
            assert_eq!(data.len() as u64, pages * PAGE_SIZE as u64);
            self.check_pages(runs);
        }
        self.check_pages(&staged.zero);
        for (pages, data) in &staged.lines {
            let mut len = 0;
            for (gpa, run) in pages.iter().flat_map(|page| page.runs()) {
                assert!(run <= PAGE_SIZE && gpa % PAGE_SIZE as u64 + run as u64 <= PAGE_SIZE as u64);
                len += run;
            }
            assert_eq!(data.len(), len);
            let runs: Vec<PageRun> = pages
                .iter()
                .map(|page| PageRun {
                    gpa: page.gpa,
                    count: 1,
                })
                .collect();
            self.check_pages(&runs);
        }
        for (disk, change) in &staged.disk {
            self.check_disk(*disk, change);
        }
        reached("epoch applied");
        self.feed(Event::Applied { epoch });
    }

    fn feed(&mut self, event: Event) {
        for action in self.core.step(event, self.now) {
            match action {
                Action::Apply(epoch) => {
                    let staged = self.staging.take(epoch).expect("a whole epoch");
                    assert!(
                        staged.bytes() <= 2 * RAM + LOG + (64 << 20),
                        "an epoch beyond all bounds"
                    );
                    self.waiting.insert(epoch, staged);
                    if self.applies {
                        self.apply(epoch);
                    }
                }
                Action::AskArbiter { .. } => {
                    let answer = Event::Arbiter(Answer::Won);
                    self.feed(answer);
                }
                Action::Activate(epoch) => {
                    reached("takeover");
                    assert_eq!(
                        epoch,
                        self.core.applied(),
                        "R2: a takeover at an epoch that is not applied"
                    );
                    let inputs = self.staging.take_uncommitted_inputs(epoch);
                    assert!(inputs.iter().all(|GuestInput::Frame { nic, .. }| *nic < 2));
                    self.feed(Event::Activated);
                }
                Action::Send(_) | Action::Disconnect | Action::Farewell | Action::Discard => {}
            }
        }
    }

    fn broken(&mut self, reason: String) {
        let heard = self.now;
        self.feed(Event::PeerBroken { heard, reason });
    }

    /// As `Session::take`.
    fn take(&mut self, frame: Frame) -> Result<(), String> {
        let precopy = self.staging.whole() == 0;
        let counted = frame.clone();
        let result = match frame {
            Frame::Heartbeat => Ok(()),
            Frame::Pages { epoch: 0, runs, .. } | Frame::ZeroPages { epoch: 0, runs } if precopy => {
                let checked = self.staging.check_pages(&runs);
                if checked.is_ok() {
                    let before = self.written;
                    self.check_pages(&runs);
                    assert!(
                        self.written - before <= RAM,
                        "one frame makes the backup write more than the VM has"
                    );
                }
                checked
            }
            Frame::Disk { epoch: 0, disk, change } if precopy => {
                let checked = self.staging.check_disk(disk, &change);
                if checked.is_ok() {
                    self.check_disk(disk, &change);
                }
                checked
            }
            Frame::Pages { epoch, runs, data } => self.staging.pages(epoch, runs, data),
            Frame::ZeroPages { epoch, runs } => self.staging.zero_pages(epoch, &runs),
            Frame::Lines { epoch, pages, data } => self.staging.lines(epoch, pages, data),
            Frame::Disk { epoch, disk, change } => self.staging.disk(epoch, disk, change),
            Frame::Input { epoch, input } => self.staging.input(epoch, input),
            Frame::Outputs { epoch, outputs } => self.staging.outputs(epoch, outputs),
            Frame::Audit { epoch, sums } => self.staging.audit(epoch, sums),
            Frame::DiskAudit { epoch, sums } => self.staging.disk_audit(epoch, sums),
            Frame::State { epoch, data } => self.staging.state(epoch, &data),
            Frame::End(marker) => {
                let (bytes, durable) = self.staging.end(&marker).map_err(|e| e.to_string())?;
                reached("epoch whole");
                self.feed(Event::Staged {
                    epoch: marker.epoch,
                    bytes,
                    durable,
                });
                return Ok(());
            }
            Frame::Disarm(reason) => {
                self.feed(Event::Peer(FromPrimary::Disarm(reason)));
                return Ok(());
            }
            Frame::Handover(epoch) => {
                self.feed(Event::Peer(FromPrimary::Handover(epoch)));
                return Ok(());
            }
            Frame::Limits(limits) => {
                self.feed(Event::Peer(FromPrimary::Timeout(ms(limits
                    .heartbeat_timeout_ms
                    .into()))));
                return Ok(());
            }
            Frame::Hello(hello) => {
                // What admission does with it; a second one is an error like the others.
                let _ = compare(&hello.identity, &identity());
                return Err("a second hello".into());
            }
            _ => return Err("what only a backup sends".into()),
        };
        if result.is_ok() {
            self.count(&counted);
        }
        result.map_err(|e| e.to_string())
    }

    fn count(&mut self, frame: &Frame) {
        let mut add = |epoch: u64, f: &mut dyn FnMut(&mut EndMarker)| f(self.expected.entry(epoch).or_default());
        let pages = |runs: &[PageRun]| runs.iter().map(|run| run.count).sum::<u64>();
        match frame {
            Frame::Pages { epoch, runs, .. } => add(*epoch, &mut |m| m.pages += pages(runs)),
            Frame::ZeroPages { epoch, runs } => add(*epoch, &mut |m| m.zero_pages += pages(runs)),
            Frame::Lines { epoch, pages, .. } => add(*epoch, &mut |m| m.line_pages += pages.len() as u64),
            Frame::Disk { epoch, .. } => add(*epoch, &mut |m| m.disk += 1),
            Frame::Input { epoch, .. } => add(*epoch, &mut |m| m.inputs += 1),
            Frame::Outputs { epoch, outputs } => add(*epoch, &mut |m| m.outputs += outputs.len() as u64),
            Frame::Audit { epoch, sums } => add(*epoch, &mut |m| m.audited += sums.len() as u64),
            Frame::DiskAudit { epoch, sums } => add(*epoch, &mut |m| m.audited_chunks += sums.len() as u64),
            Frame::State { epoch, data } => add(*epoch, &mut |m| m.state_len += data.len() as u64),
            _ => {}
        }
    }

    fn good_end(&self, epoch: u64) -> Vec<u8> {
        let marker = EndMarker {
            epoch,
            ..self.expected.get(&epoch).copied().unwrap_or_default()
        };
        postcard::to_stdvec(&marker).expect("a marker that can be written")
    }
}

/// Frames whose checksums are made right.
pub(super) fn run(input: &mut Input<'_>) {
    let mut backup = Backup::new(input.u8() & 1 == 0);
    let mut seq = 0;
    while !input.is_empty() {
        backup.now += ms(u64::from(input.u8() & 0x3f));
        let (kind, flags, payload) = frame_bytes(input);
        let good;
        let (kind, payload) = if kind == GOOD_END {
            good = backup.good_end(backup.staging.whole() + 1);
            (Kind::End as u8, &good[..])
        } else {
            (kind, payload)
        };
        // A reader of its own for each, so that a bad frame does not end the rest.
        let bytes = framed(0, kind, flags, seq, seq, payload);
        let got = FrameReader::new(&bytes[..]).next(&mut || ());
        take(&mut backup, got.map(|(_, frame)| frame).map_err(|e| e.to_string()));
        seq += 1;
        let heard = backup.now;
        backup.feed(Event::Tick { heard });
        let next = backup.waiting.keys().next().copied();
        if let (Some(epoch), 0) = (next, input.u8() & 3) {
            backup.apply(epoch);
        }
    }
    let heard = backup.now;
    while let Some(epoch) = backup.waiting.keys().next().copied() {
        backup.apply(epoch);
    }
    backup.feed(Event::PeerLost {
        heard,
        reason: "the end".into(),
    });
}

fn take(backup: &mut Backup, got: Result<Frame, String>) {
    let result = got.and_then(|frame| {
        reached("frame decoded");
        check_round_trip(&frame);
        if backup.core.takes_data() {
            backup.take(frame)
        } else {
            Ok(())
        }
    });
    // The first error ends a session. Here only some do, so that one input tries more.
    if let Err(reason) = result
        && backup.now.is_multiple_of(ms(4))
    {
        backup.broken(reason);
    }
}
