//! From a payload, whose checksum was found right, to a frame. Nothing in it is trusted: a peer may be broken.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::frame::{
    DISK_CHECK, DISK_FLUSH, DISK_UNMAP, DISK_WRITE, DISK_ZERO, Frame, Kind, OUTPUT_CONSOLE, OUTPUT_FRAME,
};
use super::lines::PageLines;
use super::payload::Payload;
use super::{DecodeError, MAX_PAYLOAD, MAX_PIECE, header};
use crate::audit::{ChunkSum, Mismatch, PageSum};
use crate::config::FtLimits;
use crate::core::backup::MAX_REPAIRS;
use crate::machine::{DiskChange, Input, Output, PAGE_SIZE, PageRun};

fn bad(kind: &'static str, reason: &'static str) -> DecodeError {
    DecodeError::Payload { kind, reason }
}

/// FtLimits leaves out nothing when it is written, so postcard reads it; its ranges are checked.
fn limits(payload: &[u8]) -> Result<FtLimits, DecodeError> {
    let limits: FtLimits = whole("limits", payload)?;
    limits
        .validate()
        .map_err(|_| bad("limits", "a limit is out of range"))?;
    Ok(limits)
}

fn whole<'a, T: Deserialize<'a>>(kind: &'static str, payload: &'a [u8]) -> Result<T, DecodeError> {
    match postcard::take_from_bytes(payload) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(bad(kind, "bytes are left over")),
        Err(_) => Err(bad(kind, "cannot be read")),
    }
}

fn owned<T: DeserializeOwned>(kind: &'static str, payload: &[u8]) -> Result<T, DecodeError> {
    whole(kind, payload)
}

/// Cuts a fixed prefix off.
struct Prefix<'a> {
    kind: &'static str,
    rest: &'a [u8],
}

impl Prefix<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (first, rest) = self
            .rest
            .split_first_chunk()
            .ok_or_else(|| bad(self.kind, "is too short"))?;
        self.rest = rest;
        Ok(*first)
    }

    fn u64(&mut self) -> Result<u64, DecodeError> {
        self.take().map(u64::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.take().map(u32::from_le_bytes)
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        self.take().map(u16::from_le_bytes)
    }

    fn runs(&mut self) -> Result<(u64, Vec<PageRun>), DecodeError> {
        let (epoch, count) = (self.u64()?, self.u32()?);
        if count as usize > self.rest.len() / 16 {
            return Err(bad(self.kind, "has fewer page runs than it says"));
        }
        let mut runs = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let run = PageRun {
                gpa: self.u64()?,
                count: self.u64()?,
            };
            let page = PAGE_SIZE as u64;
            let end = run.count.checked_mul(page).and_then(|len| run.gpa.checked_add(len));
            if !run.gpa.is_multiple_of(page) || run.count == 0 || end.is_none() {
                return Err(bad(self.kind, "has a page run that is none"));
            }
            runs.push(run);
        }
        Ok((epoch, runs))
    }
}

/// The last `packed` bytes of `payload`, unpacked where they are compressed: `size` bytes, else it is an error.
fn content(
    kind: &'static str,
    flags: u8,
    mut payload: Payload,
    packed: usize,
    size: usize,
) -> Result<Payload, DecodeError> {
    payload.skip(payload.len() - packed);
    if flags & header::FLAG_LZ4 != 0 {
        let mut data = payload.another(size);
        return match lz4_flex::block::decompress_into(&payload, &mut data) {
            Ok(n) if n == size => Ok(data),
            _ => Err(bad(kind, "cannot be decompressed")),
        };
    }
    if payload.len() != size {
        return Err(bad(kind, "has another length than it says"));
    }
    Ok(payload)
}

fn lines(flags: u8, payload: Payload) -> Result<Frame, DecodeError> {
    let kind = "lines";
    let mut prefix = Prefix { kind, rest: &payload };
    let (epoch, count) = (prefix.u64()?, prefix.u32()? as usize);
    if count == 0 || count > prefix.rest.len() / 16 {
        return Err(bad(kind, "has fewer pages than it says, or none"));
    }
    let mut pages = Vec::with_capacity(count);
    let mut size = 0;
    for _ in 0..count {
        let page = PageLines {
            gpa: prefix.u64()?,
            mask: prefix.u64()?,
        };
        if !page.gpa.is_multiple_of(PAGE_SIZE as u64) || page.mask == 0 {
            return Err(bad(kind, "has an address that is no page's, or no line"));
        }
        size += page.bytes();
        pages.push(page);
    }
    if size > MAX_PAYLOAD {
        return Err(bad(kind, "has too many lines"));
    }
    let packed = prefix.rest.len();
    let data = content(kind, flags, payload, packed, size)?;
    Ok(Frame::Lines { epoch, pages, data })
}

fn pages(flags: u8, payload: Payload) -> Result<Frame, DecodeError> {
    let kind = "pages";
    let mut prefix = Prefix { kind, rest: &payload };
    let (epoch, runs) = prefix.runs()?;
    let packed = prefix.rest.len();
    let mut size = 0u64;
    for run in &runs {
        size = size.saturating_add(run.count.saturating_mul(PAGE_SIZE as u64));
    }
    if size == 0 || size > MAX_PAYLOAD as u64 {
        return Err(bad(kind, "has no pages, or too many"));
    }
    let data = content(kind, flags, payload, packed, size as usize)?;
    Ok(Frame::Pages { epoch, runs, data })
}

fn disk(payload: Payload) -> Result<Frame, DecodeError> {
    let kind = "disk";
    let mut prefix = Prefix { kind, rest: &payload };
    let (epoch, disk, [what]) = (prefix.u64()?, prefix.u16()?, prefix.take::<1>()?);
    let (offset, len) = (prefix.u64()?, prefix.u64()?);
    let left = prefix.rest.len();
    if offset.checked_add(len).is_none() {
        return Err(bad(kind, "ends beyond all disks"));
    }
    let change = match what {
        DISK_WRITE if left as u64 == len && left <= MAX_PIECE => {
            let data = prefix.rest.to_vec();
            DiskChange::Write { offset, data }
        }
        DISK_ZERO | DISK_UNMAP if left == 0 => DiskChange::Zero {
            offset,
            len,
            unmap: what == DISK_UNMAP,
        },
        DISK_FLUSH if left == 0 => DiskChange::Flush,
        DISK_CHECK if left == 4 && len <= MAX_PIECE as u64 => DiskChange::Check {
            offset,
            len,
            crc: prefix.u32()?,
        },
        _ => return Err(bad(kind, "is of no known kind, or has a wrong length")),
    };
    Ok(Frame::Disk { epoch, disk, change })
}

fn input(mut payload: Payload) -> Result<Frame, DecodeError> {
    let mut prefix = Prefix {
        kind: "input",
        rest: &payload,
    };
    let (epoch, nic) = (prefix.u64()?, prefix.u16()?);
    payload.skip(payload.len() - prefix.rest.len());
    let input = Input::Frame { nic, data: payload };
    Ok(Frame::Input { epoch, input })
}

fn outputs(payload: &[u8]) -> Result<Frame, DecodeError> {
    let kind = "outputs";
    let mut prefix = Prefix { kind, rest: payload };
    let epoch = prefix.u64()?;
    let mut outputs = Vec::new();
    while !prefix.rest.is_empty() {
        let ([what], index, len) = (prefix.take::<1>()?, prefix.u16()?, prefix.u32()? as usize);
        let (data, rest) = prefix
            .rest
            .split_at_checked(len)
            .ok_or_else(|| bad(kind, "is too short"))?;
        prefix.rest = rest;
        outputs.push(match what {
            OUTPUT_FRAME => Output::Frame {
                nic: index,
                data: data.to_vec(),
            },
            OUTPUT_CONSOLE => Output::Console {
                console: index,
                data: data.to_vec(),
            },
            _ => return Err(bad(kind, "is of no known kind")),
        });
    }
    Ok(Frame::Outputs { epoch, outputs })
}

fn audit(payload: &[u8]) -> Result<Frame, DecodeError> {
    let mut prefix = Prefix {
        kind: "audit",
        rest: payload,
    };
    let epoch = prefix.u64()?;
    let mut sums = Vec::with_capacity(prefix.rest.len() / 12);
    while !prefix.rest.is_empty() {
        let sum = PageSum {
            gpa: prefix.u64()?,
            crc: prefix.u32()?,
        };
        if !sum.gpa.is_multiple_of(PAGE_SIZE as u64) {
            return Err(bad("audit", "has an address that is no page's"));
        }
        sums.push(sum);
    }
    if sums.is_empty() {
        return Err(bad("audit", "has no checksum"));
    }
    Ok(Frame::Audit { epoch, sums })
}

fn disk_audit(payload: &[u8]) -> Result<Frame, DecodeError> {
    let kind = "disk audit";
    let mut prefix = Prefix { kind, rest: payload };
    let epoch = prefix.u64()?;
    let mut sums = Vec::with_capacity(prefix.rest.len() / 18);
    while !prefix.rest.is_empty() {
        sums.push(ChunkSum {
            disk: prefix.u16()?,
            offset: prefix.u64()?,
            len: prefix.u32()?,
            crc: prefix.u32()?,
        });
    }
    Ok(Frame::DiskAudit { epoch, sums })
}

/// Most bytes of one place of `mismatch`.
const MISMATCH: usize = 32;

fn mismatch(payload: &[u8]) -> Result<Frame, DecodeError> {
    let kind = "mismatch";
    let wrong: Vec<Mismatch> = if payload.len() > MISMATCH * MAX_REPAIRS {
        Vec::new()
    } else {
        owned(kind, payload)?
    };
    if (1..=MAX_REPAIRS).contains(&wrong.len()) {
        Ok(Frame::Mismatch(wrong))
    } else {
        Err(bad(kind, "names no place, or too many"))
    }
}

/// Decodes a payload.
pub fn decode(kind: u8, flags: u8, payload: impl Into<Payload>) -> Result<Frame, DecodeError> {
    let payload = payload.into();
    let known = Kind::from_byte(kind).ok_or(DecodeError::Kind(kind))?;
    if flags & !header::FLAG_LZ4 != 0 || (flags != 0 && !matches!(known, Kind::Pages | Kind::Lines)) {
        return Err(bad("any", "has unknown flags"));
    }
    let empty = |frame: Frame| {
        if payload.is_empty() {
            Ok(frame)
        } else {
            Err(bad("empty", "has a payload"))
        }
    };
    match known {
        Kind::Heartbeat => empty(Frame::Heartbeat),
        Kind::Disarmed => empty(Frame::Disarmed),
        Kind::Hello => {
            let hello: super::hello::Hello = owned("hello", &payload)?;
            hello
                .limits
                .validate()
                .map_err(|_| bad("hello", "a limit is out of range"))?;
            if hello.reprotect.as_ref().is_some_and(|r| r.check().is_err()) {
                return Err(bad("hello", "its spares are too many or no addresses"));
            }
            Ok(Frame::Hello(Box::new(hello)))
        }
        Kind::Accept => owned("accept", &payload).map(|accept| Frame::Accept(Box::new(accept))),
        Kind::Refuse => owned("refuse", &payload).map(Frame::Refuse),
        Kind::Pages => pages(flags, payload),
        Kind::Lines => lines(flags, payload),
        Kind::ZeroPages => {
            let mut prefix = Prefix {
                kind: "zero pages",
                rest: &payload,
            };
            let (epoch, runs) = prefix.runs()?;
            if prefix.rest.is_empty() {
                Ok(Frame::ZeroPages { epoch, runs })
            } else {
                Err(bad("zero pages", "is too long"))
            }
        }
        Kind::Disk => disk(payload),
        Kind::Input => input(payload),
        Kind::Outputs => outputs(&payload),
        Kind::State => {
            let mut prefix = Prefix {
                kind: "state",
                rest: &payload,
            };
            let epoch = prefix.u64()?;
            Ok(Frame::State {
                epoch,
                data: prefix.rest.to_vec(),
            })
        }
        Kind::End => owned("end", &payload).map(Frame::End),
        Kind::Ack => owned("ack", &payload).map(Frame::Ack),
        Kind::Disarm => owned("disarm", &payload).map(Frame::Disarm),
        Kind::Handover => owned("handover", &payload).map(Frame::Handover),
        Kind::HandedOver => owned("handed over", &payload).map(Frame::HandedOver),
        Kind::HandoverFailed => {
            owned("handover failed", &payload).map(|(generation, reason)| Frame::HandoverFailed { generation, reason })
        }
        Kind::Bye => owned("bye", &payload).map(Frame::Bye),
        Kind::Limits => limits(&payload).map(Frame::Limits),
        Kind::Audit => audit(&payload),
        Kind::DiskAudit => disk_audit(&payload),
        Kind::Mismatch => mismatch(&payload),
    }
}
