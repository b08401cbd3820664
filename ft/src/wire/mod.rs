//! The log channel's format.
//!
//! A frame is a header of [`header::SIZE`] bytes and a payload. The header's checksum covers the header, its payload
//! checksum covers the payload; both are CRC-32C (R6). Frames of one connection are numbered without gaps.
//!
//! * [`header`]: the header; [`frame`]: what frames say, and their payloads' encoding; [`decode`]: the way back;
//! * [`hello`]: what both sides tell each other first;
//! * [`reader`]: frames from a byte stream;
//! * [`pages`]: batches of RAM pages: zero pages and unchanged lines left out, the rest compressed where that pays;
//!   [`lines`], [`sent`]: lines that changed since a page was sent last.
//!
//! Everything that a peer can make us allocate is bounded: a frame by [`MAX_PAYLOAD`], an epoch by the staging area's
//! limits ([`crate::core::staging`]).

pub mod decode;
pub mod frame;
pub mod header;
pub mod hello;
pub mod lines;
pub mod pages;
pub mod payload;
pub mod reader;
pub mod sent;

use thiserror::Error;

/// Version of the protocol; both sides must have the same.
pub const VERSION: u16 = 6;

/// Largest payload in bytes.
pub const MAX_PAYLOAD: usize = 4 << 20;

/// Most bytes of one disk change or state piece that the encoder puts into a frame; longer ones are split.
pub const MAX_PIECE: usize = 1 << 20;

/// A frame that cannot be ours, or is damaged. The peer that sent it is dropped (R6).
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// Not our protocol.
    #[error("not a frame of the log channel (magic {0:#010x})")]
    Magic(u32),
    /// Damaged header.
    #[error("frame header checksum is {found:#010x}, computed {computed:#010x}")]
    HeaderChecksum {
        /// In the frame.
        found: u32,
        /// Of the bytes that came.
        computed: u32,
    },
    /// Another version of the protocol.
    #[error("the other side speaks protocol version {0}, this one {VERSION}: run the same VMM version on both hosts")]
    Version(u16),
    /// A type that this version does not have.
    #[error("unknown frame type {0}")]
    Kind(u8),
    /// Longer than allowed.
    #[error("frame of {0} bytes is longer than the limit of {MAX_PAYLOAD}")]
    TooLong(u32),
    /// A gap or a repetition.
    #[error("frame number {found}, expected {expected}")]
    Sequence {
        /// In the frame.
        found: u64,
        /// What it should have been.
        expected: u64,
    },
    /// Damaged payload.
    #[error("payload checksum of a frame of type {} is {found:#010x}, computed {computed:#010x}", frame::Kind::describe(*.kind))]
    PayloadChecksum {
        /// Type of the frame.
        kind: u8,
        /// In the frame.
        found: u32,
        /// Of the bytes that came.
        computed: u32,
    },
    /// A payload that makes no sense.
    #[error("frame of type {kind}: {reason}")]
    Payload {
        /// Type of the frame.
        kind: &'static str,
        /// What is wrong.
        reason: &'static str,
    },
}
