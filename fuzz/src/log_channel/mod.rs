//! The log channel: what a peer sends, through the reader and the decoder into the staging area and the state machines of
//! both sides.
//!
//! The first byte chooses: the bytes as they come; frames whose checksums are made right, to a backup; the same, to a
//! primary. The shells around the state machines are modelled here as `ft/src/backup/session.rs` has them.
//!
//! * this file: frames, and the primary; `backup`: the backup; `seeds`: inputs to begin with.

mod backup;
mod seeds;

use ft::audit;
use ft::config::FtLimits;
use ft::core::arbitration::Answer;
use ft::core::primary::{self, FromBackup, PrimaryState, ToBackup};
use ft::core::staging::Staging;
use ft::core::{MAX_IN_FLIGHT, ms};
use ft::machine::{DiskIdentity, Identity, PAGE_SIZE};
use ft::wire::decode::decode;
use ft::wire::frame::{Frame, encode};
use ft::wire::header::Header;
use ft::wire::reader::FrameReader;
pub use seeds::seeds;

use crate::input::Input;
use crate::reach::reached;

const RAM: u64 = 64 * PAGE_SIZE as u64;
const DISK: u64 = 1 << 20;
/// A marker whose numbers are made right stands for this type.
const GOOD_END: u8 = 0xee;

fn identity() -> Identity {
    let disk = |id: &str, readonly| DiskIdentity {
        id: id.into(),
        size: DISK,
        readonly,
        shared: None,
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
                            Frame::Mismatch(wrong) => {
                                // As `Session::note_mismatch`.
                                let known = Staging::new(&identity(), 0);
                                if wrong.iter().any(|mismatch| known.check_place(&mismatch.place).is_err()) {
                                    continue;
                                }
                                FromBackup::Mismatch {
                                    places: wrong.len() as u64,
                                    what: audit::describe(&wrong, &identity().disks),
                                }
                            }
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
                    anew: input.u8().into(),
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
        1 => backup::run(&mut input),
        _ => to_primary(&mut input),
    }
}
