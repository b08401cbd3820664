//! The log channel: what a peer sends, through the reader and the decoder into the staging area and the state machines of
//! both sides.
//!
//! The first byte chooses: the bytes as they come; frames whose checksums are made right, to a backup; the same, to a
//! primary. The shells around the state machines are modelled here as `ft/src/backup/session.rs` has them.

use std::collections::BTreeMap;

use ft::config::FtLimits;
use ft::core::arbitration::Answer;
use ft::core::backup::{Action, BackupState, Event, FromPrimary};
use ft::core::primary::{self, FromBackup, PrimaryState, ToBackup};
use ft::core::staging::{StagedEpoch, Staging};
use ft::core::{MAX_IN_FLIGHT, ms};
use ft::machine::{DiskChange, DiskIdentity, Identity, Input as GuestInput, Output, PAGE_SIZE, PageRun};
use ft::wire::decode::decode;
use ft::wire::frame::{EndMarker, Frame, Kind, encode};
use ft::wire::header::Header;
use ft::wire::hello::{Hello, compare};
use ft::wire::lines::{LINE, PageLines};
use ft::wire::reader::FrameReader;

use crate::input::Input;
use crate::reach::reached;

const RAM: u64 = 64 * PAGE_SIZE as u64;
const DISK: u64 = 1 << 20;
/// Log bytes that an epoch may have here.
const LOG: u64 = 1 << 20;
/// A marker whose numbers are made right stands for this type.
const GOOD_END: u8 = 0xee;

fn identity() -> Identity {
    let disk = |id: &str, readonly| DiskIdentity {
        id: id.into(),
        size: DISK,
        readonly,
    };
    Identity {
        vm_id: "vm".into(),
        vmm_version: "1".into(),
        config: "{}".into(),
        memory: vec![(0, RAM / 2), (RAM, RAM / 2)],
        vcpus: 1,
        cpu_features: vec![("leaf 1 ecx".into(), 1)],
        tsc_khz: 1_000_000,
        disks: vec![disk("_disk0", false), disk("_disk1", true)],
        nics: 2,
    }
}

/// A frame's bytes with right number and checksums.
fn framed(seq: u64, kind: u8, flags: u8, mark: u64, stamp: u64, payload: &[u8]) -> Vec<u8> {
    let header = Header {
        kind,
        flags,
        seq,
        mark,
        stamp,
        len: payload.len() as u32,
        payload_crc: crc32c::crc32c(payload),
    };
    [&header.encode()[..], payload].concat()
}

/// What is decoded is encoded to the same again.
fn check_round_trip(frame: &Frame) {
    let out = encode(frame);
    let payload = |out: &ft::wire::frame::OutFrame<'_>| {
        let (head, body) = out.payload();
        [head, body].concat()
    };
    match (&out[..], frame) {
        // Pieces without content are left out.
        (_, Frame::Outputs { .. } | Frame::State { .. }) => {
            for part in &out {
                decode(part.kind() as u8, 0, payload(part)).expect("an own frame can be read");
            }
        }
        ([one], _) => {
            let back = decode(one.kind() as u8, 0, payload(one)).expect("an own frame can be read");
            assert_eq!(&back, frame);
        }
        (parts, _) => assert!(parts.len() > 1, "{frame:?} is encoded to nothing"),
    }
}

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

/// Reads all frames of `stream`.
fn read_all(stream: &[u8]) {
    let mut reader = FrameReader::new(stream);
    while let Ok((_, frame)) = reader.next(&mut || ()) {
        reached("frame read as it came");
        check_round_trip(&frame);
    }
}

/// Type, flags, payload.
fn frame_bytes<'a>(input: &mut Input<'a>) -> (u8, u8, &'a [u8]) {
    let (kind, flags) = (input.u8(), input.u8() & 1);
    let len = match input.u8() {
        small @ 0..=0x7f => usize::from(small),
        _ => usize::from(input.u16()),
    };
    (kind, flags, input.bytes(len))
}

fn to_backup(input: &mut Input<'_>) {
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
        && backup.now % ms(4) == 0
    {
        backup.broken(reason);
    }
}

fn to_primary(input: &mut Input<'_>) {
    let limits = FtLimits::default();
    let mut core = PrimaryState::new(1, (&limits).into(), MAX_IN_FLIGHT, 0);
    let (mut now, mut cut) = (0, 0u64);
    let mut started = false;
    while !input.is_empty() {
        now += ms(u64::from(input.u8()));
        let event = match input.u8() {
            0..=0x7f => {
                let (kind, flags, payload) = frame_bytes(input);
                let stamp = now.saturating_sub(ms(u64::from(input.u8())));
                let bytes = framed(0, kind, flags, 0, stamp, payload);
                match FrameReader::new(&bytes[..]).next(&mut || ()) {
                    Ok((envelope, frame)) => {
                        check_round_trip(&frame);
                        let message = match frame {
                            Frame::Heartbeat => FromBackup::Heartbeat,
                            Frame::Ack(epoch) => FromBackup::Ack(epoch),
                            Frame::Disarmed => FromBackup::Disarmed,
                            Frame::HandedOver(generation) => FromBackup::HandedOver(generation),
                            Frame::HandoverFailed { generation, reason } => {
                                FromBackup::HandoverFailed { generation, reason }
                            }
                            Frame::Bye(reason) => FromBackup::Bye(reason),
                            _ => continue,
                        };
                        primary::Event::Peer {
                            echo: envelope.stamp,
                            message,
                        }
                    }
                    Err(_) => continue,
                }
            }
            0x80..=0xbf => primary::Event::Tick {
                heard: now.saturating_sub(ms(u64::from(input.u8()))),
                running_bytes: input.u32().into(),
                output: input.u8() & 1 != 0,
            },
            0xc0..=0xdf => {
                started |= core.begin_first_checkpoint();
                if !started {
                    continue;
                }
                started = false;
                cut += 1;
                primary::Event::Checkpointed {
                    bytes: input.u32().into(),
                    dirty_bytes: input.u32().into(),
                }
            }
            0xe0..=0xe7 => primary::Event::Failover,
            0xe8..=0xef => primary::Event::Disable("operator".into()),
            0xf0..=0xf7 => primary::Event::Arbiter(Answer::Unknown { reason: "slow".into() }),
            _ => primary::Event::PeerLost("closed".into()),
        };
        for action in core.step(event, now) {
            match action {
                primary::Action::Checkpoint => started = true,
                primary::Action::Release(epoch) => {
                    reached("outputs released");
                    assert!(
                        epoch <= cut,
                        "R1: outputs of epoch {epoch} are released, {cut} were ended"
                    );
                }
                primary::Action::Send(ToBackup::Handover(epoch)) => assert!(epoch <= cut),
                _ => {}
            }
        }
    }
}

/// The target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 3 {
        0 => read_all(input.rest()),
        1 => to_backup(&mut input),
        _ => to_primary(&mut input),
    }
}

fn frames() -> Vec<Frame> {
    let run = |gpa, count| PageRun { gpa, count };
    let change = |change| Frame::Disk {
        epoch: 1,
        disk: 0,
        change,
    };
    let hello = Hello {
        node: "n".into(),
        identity: identity(),
        generation: 1,
        arbiter: "file:/x".into(),
        store: "s".into(),
        token: "t".into(),
        limits: FtLimits::default(),
        durability: Default::default(),
    };
    vec![
        Frame::Heartbeat,
        Frame::ZeroPages {
            epoch: 0,
            runs: vec![run(0, 32), run(RAM, 32)],
        },
        Frame::Pages {
            epoch: 1,
            runs: vec![run(PAGE_SIZE as u64, 1)],
            data: vec![7; PAGE_SIZE],
        },
        Frame::Lines {
            epoch: 1,
            pages: vec![PageLines {
                gpa: RAM,
                mask: 1 << 63 | 6,
            }],
            data: vec![6; 3 * LINE],
        },
        change(DiskChange::Write {
            offset: 512,
            data: vec![1; 64],
        }),
        change(DiskChange::Zero {
            offset: 0,
            len: 4096,
            unmap: true,
        }),
        change(DiskChange::Flush),
        Frame::Input {
            epoch: 1,
            input: GuestInput::Frame {
                nic: 1,
                data: vec![2; 60],
            },
        },
        Frame::Outputs {
            epoch: 1,
            outputs: vec![
                Output::Frame {
                    nic: 0,
                    data: vec![3; 60],
                },
                Output::Console {
                    console: 0,
                    data: vec![4; 3],
                },
            ],
        },
        Frame::Audit {
            epoch: 1,
            sums: vec![ft::audit::PageSum { gpa: 0, crc: 1 }],
        },
        Frame::State {
            epoch: 1,
            data: vec![5; 100],
        },
        Frame::Limits(FtLimits::default()),
        Frame::Hello(Box::new(hello)),
        Frame::Disarm("operator".into()),
        Frame::Handover(1),
        Frame::Ack(1),
        Frame::HandedOver(2),
        Frame::Bye("end".into()),
        Frame::HandoverFailed {
            generation: 2,
            reason: "no".into(),
        },
    ]
}

fn piece(kind: u8, payload: &[u8]) -> Vec<u8> {
    let len = (payload.len() as u16).to_le_bytes();
    [&[kind, 0, 0xff, len[0], len[1]][..], payload].concat()
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut raw = vec![0];
    let (mut epoch, mut each) = (vec![1, 0], Vec::new());
    let mut back = vec![2];
    for (seq, frame) in frames().iter().flat_map(encode).enumerate() {
        let (head, body) = frame.payload();
        let payload = [head, body].concat();
        let kind = frame.kind() as u8;
        raw.extend(framed(seq as u64, kind, 0, 0, 0, &payload));
        let one = piece(kind, &payload);
        each.push([&[1, 0, 1][..], &one].concat());
        if !matches!(
            frame.kind(),
            Kind::Hello
                | Kind::Disarm
                | Kind::Handover
                | Kind::Ack
                | Kind::HandedOver
                | Kind::HandoverFailed
                | Kind::Bye
        ) {
            epoch.extend([1]);
            epoch.extend(&one);
            epoch.push(0);
        } else {
            back.extend([10, 0xc0, 0, 1, 0, 0, 0, 1, 0, 0, 5, 0]);
            back.extend(&one);
            back.push(0);
        }
    }
    epoch.extend([1, GOOD_END, 0, 0, 0]);
    let mut taken_over = epoch.clone();
    taken_over.extend([1]);
    taken_over.extend(piece(
        Kind::Handover as u8,
        &postcard::to_stdvec(&1u64).expect("a number"),
    ));
    taken_over.push(0);
    let mut seeds = vec![raw, epoch, taken_over, back];
    seeds.extend(each);
    seeds
}
