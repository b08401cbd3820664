//! The key-value store, without its disk and its connections: requests, records, and which slot a record may take.

mod index;
mod record;
mod request;

pub use index::{Full, Index, Place};
pub use record::{DISK_MAGIC, Record, SECTOR, decode, disk_header, disk_slots, encode, has_magic};
pub use request::{Request, parse};

/// Longest key in bytes.
pub const KEY_MAX: usize = 32;
/// Longest value in bytes.
pub const VALUE_MAX: usize = 400;

/// A key.
pub type Key = alloc::boxed::Box<[u8]>;
