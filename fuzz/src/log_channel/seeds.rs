//! Inputs of the log channel to begin with.

use ft::audit::{ChunkSum, Mismatch, Place};
use ft::config::FtLimits;
use ft::machine::{DiskChange, Input as GuestInput, Output, PAGE_SIZE, PageRun};
use ft::wire::frame::{Frame, Kind, encode};
use ft::wire::hello::Hello;
use ft::wire::lines::{LINE, PageLines};

use super::{GOOD_END, RAM, framed, identity};

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
        reprotect: None,
        audit: Default::default(),
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
            data: vec![7; PAGE_SIZE].into(),
        },
        Frame::Lines {
            epoch: 1,
            pages: vec![PageLines {
                gpa: RAM,
                mask: 1 << 63 | 6,
            }],
            data: vec![6; 3 * LINE].into(),
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
                data: vec![2; 60].into(),
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
        Frame::DiskAudit {
            epoch: 1,
            sums: vec![ChunkSum {
                disk: 0,
                offset: 4096,
                len: 4096,
                crc: 1,
            }],
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
        Frame::Mismatch(vec![Mismatch {
            place: Place::Page { gpa: 0 },
            found: 1,
            expected: 2,
        }]),
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
    let mut back = Vec::new();
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
                | Kind::Mismatch
        ) {
            epoch.extend([1]);
            epoch.extend(&one);
            epoch.push(0);
        } else {
            // After 10 ms a checkpoint of 256 bytes, nothing anew; 5 ms later the frame, with this moment's stamp.
            let first = [2, 10, 0xc0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 5, 0];
            back.push([&first[..], &one, &[0]].concat());
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
    let mut seeds = vec![raw, epoch, taken_over];
    seeds.extend(back);
    seeds.extend(each);
    seeds
}
