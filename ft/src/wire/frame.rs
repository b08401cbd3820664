//! What frames say, and how their payloads are encoded.
//!
//! Bulk payloads (pages, inputs, disk changes) have a fixed little-endian prefix and the bytes themselves; the small
//! ones are postcard.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::hello::{Accept, Hello};
use super::lines::PageLines;
use super::payload::Payload;
use super::{MAX_PIECE, header};
use crate::audit::{ChunkSum, Mismatch, PageSum};
use crate::config::FtLimits;
use crate::machine::{DiskChange, Input, Output, PageRun, Refusal};

/// Frame types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Sign of life.
    Heartbeat = 1,
    /// First frame of the primary.
    Hello = 2,
    /// The backup takes the VM.
    Accept = 3,
    /// The backup does not.
    Refuse = 4,
    /// RAM pages.
    Pages = 5,
    /// RAM pages that are zero.
    ZeroPages = 6,
    /// A change of a disk.
    Disk = 7,
    /// An input that the guest was given.
    Input = 8,
    /// Outputs held for the epoch.
    Outputs = 9,
    /// A piece of the saved state.
    State = 10,
    /// The epoch is complete.
    End = 11,
    /// The backup has the epoch.
    Ack = 12,
    /// The backup must not take over any more.
    Disarm = 13,
    /// It will not.
    Disarmed = 14,
    /// The backup is to become the VM.
    Handover = 15,
    /// It did.
    HandedOver = 16,
    /// It could not, and never will.
    HandoverFailed = 17,
    /// The backup leaves and will never take over.
    Bye = 18,
    /// Limits changed.
    Limits = 19,
    /// Checksums of pages that the epoch leaves as they were.
    Audit = 20,
    /// Changed lines of RAM pages.
    Lines = 21,
    /// Checksums of pieces of disks that the epoch leaves as they were.
    DiskAudit = 22,
    /// Places of the shadow that are wrong.
    Mismatch = 23,
}

impl Kind {
    /// From the header.
    pub fn from_byte(byte: u8) -> Option<Self> {
        use Kind::*;
        const ALL: [Kind; 23] = [
            Heartbeat,
            Hello,
            Accept,
            Refuse,
            Pages,
            ZeroPages,
            Disk,
            Input,
            Outputs,
            State,
            End,
            Ack,
            Disarm,
            Disarmed,
            Handover,
            HandedOver,
            HandoverFailed,
            Bye,
            Limits,
            Audit,
            Lines,
            DiskAudit,
            Mismatch,
        ];
        ALL.into_iter().find(|kind| *kind as u8 == byte)
    }

    /// Its name, for people.
    pub fn describe(byte: u8) -> String {
        Self::from_byte(byte).map_or_else(|| byte.to_string(), |kind| format!("{kind:?}"))
    }
}

/// Ends an epoch: what must have come for it to be whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndMarker {
    /// The epoch.
    pub epoch: u64,
    /// Pages with content.
    pub pages: u64,
    /// Pages that are zero.
    pub zero_pages: u64,
    /// Pages of which some lines come.
    pub line_pages: u64,
    /// Disk changes (pieces).
    pub disk: u64,
    /// Inputs.
    pub inputs: u64,
    /// Outputs.
    pub outputs: u64,
    /// Checksums of pages.
    pub audited: u64,
    /// Checksums of pieces of disks.
    pub audited_chunks: u64,
    /// The checksums are of places that the epoch sends anew, and of no others.
    pub anew: bool,
    /// Bytes of saved state.
    pub state_len: u64,
    /// Nanoseconds from the checkpoint to the sending of this frame.
    pub age_ns: u64,
}

/// A decoded frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Sign of life.
    Heartbeat,
    /// First frame of the primary.
    Hello(Box<Hello>),
    /// The backup takes the VM.
    Accept(Box<Accept>),
    /// The backup does not.
    Refuse(Refusal),
    /// RAM pages. Epoch 0: pre-copy, to be applied at once.
    Pages {
        /// Epoch.
        epoch: u64,
        /// Where they belong, in the order of `data`.
        runs: Vec<PageRun>,
        /// Their content.
        data: Payload,
    },
    /// RAM pages that are zero. Epoch 0: pre-copy.
    ZeroPages {
        /// Epoch.
        epoch: u64,
        /// Which.
        runs: Vec<PageRun>,
    },
    /// Lines of RAM pages that changed since the page was sent last.
    Lines {
        /// Epoch.
        epoch: u64,
        /// Which, in the order of `data`.
        pages: Vec<PageLines>,
        /// Their content.
        data: Payload,
    },
    /// A change of a disk. Epoch 0: pre-copy.
    Disk {
        /// Epoch.
        epoch: u64,
        /// Index of the disk.
        disk: u16,
        /// The change.
        change: DiskChange,
    },
    /// An input.
    Input {
        /// Epoch.
        epoch: u64,
        /// The input.
        input: Input,
    },
    /// Outputs of the epoch.
    Outputs {
        /// Epoch.
        epoch: u64,
        /// In order.
        outputs: Vec<Output>,
    },
    /// A piece of the saved state.
    State {
        /// Epoch.
        epoch: u64,
        /// The bytes.
        data: Vec<u8>,
    },
    /// The epoch is complete.
    End(EndMarker),
    /// The backup has everything up to this epoch.
    Ack(u64),
    /// The backup must not take over any more, and why.
    Disarm(String),
    /// It will not.
    Disarmed,
    /// The backup is to become the VM as it was at the end of this epoch.
    Handover(u64),
    /// It did; the generation it won.
    HandedOver(u64),
    /// It won this generation, could not become the VM, and never will.
    HandoverFailed {
        /// Generation that it won.
        generation: u64,
        /// Why.
        reason: String,
    },
    /// The backup leaves and will never take over.
    Bye(String),
    /// Limits changed.
    Limits(FtLimits),
    /// Checksums of pages of the primary, as they are at the end of the epoch.
    Audit {
        /// Epoch.
        epoch: u64,
        /// The checksums.
        sums: Vec<PageSum>,
    },
    /// Checksums of pieces of disks, as they are at the end of the epoch.
    DiskAudit {
        /// Epoch.
        epoch: u64,
        /// The checksums.
        sums: Vec<ChunkSum>,
    },
    /// Places of the shadow that are not the primary's: to be sent anew.
    Mismatch(Vec<Mismatch>),
}

/// A frame to be sent: `head` and `body` make the payload.
#[derive(Debug, Clone)]
pub struct OutFrame<'a> {
    kind: Kind,
    flags: u8,
    head: Vec<u8>,
    body: Cow<'a, [u8]>,
    crc: u32,
}

impl<'a> OutFrame<'a> {
    fn new(kind: Kind, flags: u8, head: Vec<u8>, body: Cow<'a, [u8]>) -> Self {
        let crc = crc32c::crc32c_append(crc32c::crc32c(&head), &body);
        Self {
            kind,
            flags,
            head,
            body,
            crc,
        }
    }

    fn postcard<T: Serialize>(kind: Kind, value: &T) -> Self {
        // Serialising plain data into memory cannot fail; an empty payload would be refused by the other side.
        Self::new(
            kind,
            0,
            postcard::to_stdvec(value).unwrap_or_default(),
            Cow::Borrowed(&[]),
        )
    }

    /// The header, with what is known only when the frame is sent.
    pub fn header(&self, seq: u64, mark: u64, stamp: u64) -> [u8; header::SIZE] {
        let len = (self.head.len() + self.body.len()) as u32;
        let header = header::Header {
            kind: self.kind as u8,
            flags: self.flags,
            seq,
            mark,
            stamp,
            len,
            payload_crc: self.crc,
        };
        header.encode()
    }

    /// The payload's two parts.
    pub fn payload(&self) -> (&[u8], &[u8]) {
        (&self.head, &self.body)
    }

    /// Bytes on the channel.
    pub fn size(&self) -> usize {
        header::SIZE + self.head.len() + self.body.len()
    }

    /// Type of the frame.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// RAM pages; `body` holds their content, lz4 compressed if `lz4`.
    pub fn pages(epoch: u64, runs: &[PageRun], body: Cow<'a, [u8]>, lz4: bool) -> Self {
        let flags = if lz4 { header::FLAG_LZ4 } else { 0 };
        Self::new(Kind::Pages, flags, run_list(epoch, runs), body)
    }

    /// Changed lines of pages; `body` as in [`OutFrame::pages`].
    pub fn lines(epoch: u64, pages: &[PageLines], body: Cow<'a, [u8]>, lz4: bool) -> Self {
        let flags = if lz4 { header::FLAG_LZ4 } else { 0 };
        let mut head = Vec::with_capacity(12 + 16 * pages.len());
        head.extend_from_slice(&epoch.to_le_bytes());
        head.extend_from_slice(&(pages.len() as u32).to_le_bytes());
        for page in pages {
            head.extend_from_slice(&page.gpa.to_le_bytes());
            head.extend_from_slice(&page.mask.to_le_bytes());
        }
        Self::new(Kind::Lines, flags, head, body)
    }
}

fn run_list(epoch: u64, runs: &[PageRun]) -> Vec<u8> {
    let mut head = Vec::with_capacity(12 + 16 * runs.len());
    head.extend_from_slice(&epoch.to_le_bytes());
    head.extend_from_slice(&(runs.len() as u32).to_le_bytes());
    for run in runs {
        head.extend_from_slice(&run.gpa.to_le_bytes());
        head.extend_from_slice(&run.count.to_le_bytes());
    }
    head
}

/// RAM pages that are zero.
pub fn zero_pages(epoch: u64, runs: &[PageRun]) -> OutFrame<'static> {
    OutFrame::new(Kind::ZeroPages, 0, run_list(epoch, runs), Cow::Borrowed(&[]))
}

/// Checksums of pages, in as many frames as they need.
pub fn audit(epoch: u64, sums: &[PageSum]) -> Vec<OutFrame<'static>> {
    let part = |sums: &[PageSum]| {
        let mut head = Vec::with_capacity(8 + 12 * sums.len());
        head.extend_from_slice(&epoch.to_le_bytes());
        for sum in sums {
            head.extend_from_slice(&sum.gpa.to_le_bytes());
            head.extend_from_slice(&sum.crc.to_le_bytes());
        }
        OutFrame::new(Kind::Audit, 0, head, Cow::Borrowed(&[]))
    };
    sums.chunks(MAX_PIECE / 12).map(part).collect()
}

/// Checksums of pieces of disks, at most as many as an epoch may have.
pub fn disk_audit(epoch: u64, sums: &[ChunkSum]) -> OutFrame<'static> {
    let mut head = Vec::with_capacity(8 + 18 * sums.len());
    head.extend_from_slice(&epoch.to_le_bytes());
    for sum in sums {
        head.extend_from_slice(&sum.disk.to_le_bytes());
        head.extend_from_slice(&sum.offset.to_le_bytes());
        head.extend_from_slice(&sum.len.to_le_bytes());
        head.extend_from_slice(&sum.crc.to_le_bytes());
    }
    OutFrame::new(Kind::DiskAudit, 0, head, Cow::Borrowed(&[]))
}

/// An input frame.
pub fn input_frame(epoch: u64, nic: u16, data: &[u8]) -> OutFrame<'static> {
    let mut head = Vec::with_capacity(10 + data.len());
    head.extend_from_slice(&epoch.to_le_bytes());
    head.extend_from_slice(&nic.to_le_bytes());
    head.extend_from_slice(data);
    OutFrame::new(Kind::Input, 0, head, Cow::Borrowed(&[]))
}

/// A disk change; one of more than [`MAX_PIECE`] bytes makes several frames.
pub fn disk_change(epoch: u64, disk: u16, change: DiskChange) -> Vec<OutFrame<'static>> {
    let head = |kind: u8, offset: u64, len: u64| {
        let mut head = Vec::with_capacity(27);
        head.extend_from_slice(&epoch.to_le_bytes());
        head.extend_from_slice(&disk.to_le_bytes());
        head.push(kind);
        head.extend_from_slice(&offset.to_le_bytes());
        head.extend_from_slice(&len.to_le_bytes());
        head
    };
    let frame = |head, body| OutFrame::new(Kind::Disk, 0, head, Cow::Owned(body));
    match change {
        DiskChange::Write { offset, data } if data.len() <= MAX_PIECE => {
            vec![frame(head(DISK_WRITE, offset, data.len() as u64), data)]
        }
        DiskChange::Write { offset, data } => {
            let piece = |(i, part): (usize, &[u8])| {
                frame(
                    head(DISK_WRITE, offset + (i * MAX_PIECE) as u64, part.len() as u64),
                    part.to_vec(),
                )
            };
            data.chunks(MAX_PIECE).enumerate().map(piece).collect()
        }
        DiskChange::Zero { offset, len, unmap } => {
            vec![frame(
                head(if unmap { DISK_UNMAP } else { DISK_ZERO }, offset, len),
                Vec::new(),
            )]
        }
        DiskChange::Flush => vec![frame(head(DISK_FLUSH, 0, 0), Vec::new())],
        DiskChange::Check { offset, len, crc } => {
            vec![frame(head(DISK_CHECK, offset, len), crc.to_le_bytes().to_vec())]
        }
    }
}

pub(super) const DISK_WRITE: u8 = 0;
pub(super) const DISK_ZERO: u8 = 1;
pub(super) const DISK_UNMAP: u8 = 2;
pub(super) const DISK_FLUSH: u8 = 3;
pub(super) const DISK_CHECK: u8 = 4;

/// The saved state, in pieces.
pub fn state(epoch: u64, data: &[u8]) -> Vec<OutFrame<'_>> {
    let piece = |part| OutFrame::new(Kind::State, 0, epoch.to_le_bytes().to_vec(), Cow::Borrowed(part));
    data.chunks(MAX_PIECE).map(piece).collect()
}

/// Outputs, in as many frames as they need; and the number of outputs in them.
pub fn outputs(epoch: u64, outputs: &[Output]) -> (Vec<OutFrame<'static>>, u64) {
    let mut frames = Vec::new();
    let mut count = 0;
    let mut head = epoch.to_le_bytes().to_vec();
    for output in outputs {
        let (kind, index, data) = match output {
            Output::Frame { nic, data } => (OUTPUT_FRAME, *nic, data),
            Output::Console { console, data } => (OUTPUT_CONSOLE, *console, data),
        };
        // Only console bytes can be longer than a piece; cut anywhere, they stay the same bytes.
        for part in data.chunks(MAX_PIECE) {
            if head.len() + part.len() > 2 * MAX_PIECE {
                let full = std::mem::replace(&mut head, epoch.to_le_bytes().to_vec());
                frames.push(OutFrame::new(Kind::Outputs, 0, full, Cow::Borrowed(&[])));
            }
            count += 1;
            head.push(kind);
            head.extend_from_slice(&index.to_le_bytes());
            head.extend_from_slice(&(part.len() as u32).to_le_bytes());
            head.extend_from_slice(part);
        }
    }
    if head.len() > 8 {
        frames.push(OutFrame::new(Kind::Outputs, 0, head, Cow::Borrowed(&[])));
    }
    (frames, count)
}

pub(super) const OUTPUT_FRAME: u8 = 0;
pub(super) const OUTPUT_CONSOLE: u8 = 1;

/// The small frames, and those that need no splitting.
pub fn encode(frame: &Frame) -> Vec<OutFrame<'static>> {
    let one = |frame| vec![frame];
    match frame {
        Frame::Heartbeat => one(OutFrame::new(Kind::Heartbeat, 0, Vec::new(), Cow::Borrowed(&[]))),
        Frame::Hello(hello) => one(OutFrame::postcard(Kind::Hello, hello)),
        Frame::Accept(accept) => one(OutFrame::postcard(Kind::Accept, accept)),
        Frame::Refuse(refusal) => one(OutFrame::postcard(Kind::Refuse, refusal)),
        Frame::Pages { epoch, runs, data } => one(OutFrame::new(
            Kind::Pages,
            0,
            run_list(*epoch, runs),
            Cow::Owned(data.to_vec()),
        )),
        Frame::ZeroPages { epoch, runs } => one(zero_pages(*epoch, runs)),
        Frame::Lines { epoch, pages, data } => one(OutFrame::lines(*epoch, pages, Cow::Owned(data.to_vec()), false)),
        Frame::Disk { epoch, disk, change } => disk_change(*epoch, *disk, change.clone()),
        Frame::Input {
            epoch,
            input: Input::Frame { nic, data },
        } => one(input_frame(*epoch, *nic, data)),
        Frame::Outputs { epoch, outputs: list } => outputs(*epoch, list).0,
        Frame::State { epoch, data } => {
            let piece =
                |part: &[u8]| OutFrame::new(Kind::State, 0, epoch.to_le_bytes().to_vec(), Cow::Owned(part.to_vec()));
            data.chunks(MAX_PIECE).map(piece).collect()
        }
        Frame::End(marker) => one(OutFrame::postcard(Kind::End, marker)),
        Frame::Ack(epoch) => one(OutFrame::postcard(Kind::Ack, epoch)),
        Frame::Disarm(reason) => one(OutFrame::postcard(Kind::Disarm, reason)),
        Frame::Disarmed => one(OutFrame::new(Kind::Disarmed, 0, Vec::new(), Cow::Borrowed(&[]))),
        Frame::Handover(epoch) => one(OutFrame::postcard(Kind::Handover, epoch)),
        Frame::HandedOver(generation) => one(OutFrame::postcard(Kind::HandedOver, generation)),
        Frame::HandoverFailed { generation, reason } => {
            one(OutFrame::postcard(Kind::HandoverFailed, &(generation, reason)))
        }
        Frame::Bye(reason) => one(OutFrame::postcard(Kind::Bye, reason)),
        Frame::Limits(limits) => one(OutFrame::postcard(Kind::Limits, limits)),
        Frame::Audit { epoch, sums } => audit(*epoch, sums),
        Frame::DiskAudit { epoch, sums } => one(disk_audit(*epoch, sums)),
        Frame::Mismatch(wrong) => one(OutFrame::postcard(Kind::Mismatch, wrong)),
    }
}
