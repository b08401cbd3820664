//! Reads a block request out of its chain (virtio 1.3, 5.2.6).

use crate::backend::BlockOp;
use crate::buffers::GuestByte;
use crate::ring::{Chain, QueueError};

/// Unit of offsets.
pub(super) const SECTOR: u64 = 512;
/// Bytes of the serial number.
pub(super) const ID_BYTES: usize = 20;
/// Sectors of one discard or write-zeroes request, 32 MiB.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 16;
/// Bytes of one read or write. More is refused, so that whoever copies a request needs bounded memory.
const MAX_DATA: usize = 32 << 20;

const HEADER: usize = 16;
const RANGE: usize = 16;
const UNMAP: u32 = 1;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Status byte of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// For the backend; data are what is left in the chain's buffers.
    Op(BlockOp),
    /// The serial number.
    GetId,
    /// Nothing but the status byte.
    Done(Status),
}

/// The disk, as requests are held against it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) size: u64,
    pub(super) readonly: bool,
}

impl Limits {
    fn holds(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.size)
    }
}

/// Takes header and status byte off the chain, so that the data are left.
pub(super) fn parse(chain: &mut Chain, limits: Limits) -> Result<(Request, GuestByte), QueueError> {
    let mut header = [0; HEADER];
    if chain.readable.read(0, &mut header) < HEADER {
        return Err(QueueError::TooShort);
    }
    chain.readable.drop_front(HEADER);
    let status = chain.writable.pop_byte().ok_or(QueueError::TooShort)?;
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let mut sector = [0; 8];
    sector.copy_from_slice(&header[8..]);
    let sector = u64::from_le_bytes(sector);
    Ok((request(chain, kind, sector, limits), status))
}

fn request(chain: &Chain, kind: u32, sector: u64, limits: Limits) -> Request {
    let data = match kind {
        T_IN => chain.writable.len(),
        T_OUT => chain.readable.len(),
        _ => 0,
    };
    let offset = sector.saturating_mul(SECTOR);
    let fits = (data as u64).is_multiple_of(SECTOR) && data <= MAX_DATA && limits.holds(offset, data as u64);
    match kind {
        T_IN | T_OUT if !fits => Request::Done(Status::IoError),
        T_OUT | T_DISCARD | T_WRITE_ZEROES if limits.readonly => Request::Done(Status::IoError),
        T_IN | T_OUT if data == 0 => Request::Done(Status::Ok),
        T_IN => Request::Op(BlockOp::Read { offset }),
        T_OUT => Request::Op(BlockOp::Write { offset }),
        T_FLUSH => Request::Op(BlockOp::Flush),
        T_GET_ID if chain.writable.len() < ID_BYTES => Request::Done(Status::IoError),
        T_GET_ID => Request::GetId,
        T_DISCARD | T_WRITE_ZEROES => range(chain, kind, limits),
        _ => Request::Done(Status::Unsupported),
    }
}

fn range(chain: &Chain, kind: u32, limits: Limits) -> Request {
    let mut bytes = [0; RANGE];
    if chain.readable.len() != RANGE || chain.readable.read(0, &mut bytes) != RANGE {
        return Request::Done(Status::IoError);
    }
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let sector = u64::from(word(0)) | u64::from(word(4)) << 32;
    let (sectors, flags) = (word(8), word(12));
    // virtio 1.3, 5.2.6.2: unknown flags are not supported, nor is `unmap` for a discard.
    let known = if kind == T_WRITE_ZEROES { UNMAP } else { 0 };
    if flags & !known != 0 {
        return Request::Done(Status::Unsupported);
    }
    let (offset, len) = (sector.saturating_mul(SECTOR), u64::from(sectors) * SECTOR);
    if sectors > MAX_ZERO_SECTORS || !limits.holds(offset, len) {
        return Request::Done(Status::IoError);
    }
    match kind {
        _ if len == 0 => Request::Done(Status::Ok),
        T_DISCARD => Request::Op(BlockOp::Discard { offset, len }),
        _ => Request::Op(BlockOp::WriteZeroes {
            offset,
            len,
            unmap: flags & UNMAP != 0,
        }),
    }
}
