//! Saved state of a block device.

use serde::{Deserialize, Serialize};

/// Version of [`BlockState`].
pub const VERSION: u32 = 1;

/// What is neither in the queue nor in the transport. No request is under way when a state is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// [`VERSION`] of the writer.
    pub version: u32,
    /// Size in bytes.
    pub size: u64,
    /// Logical block size that the guest was told.
    pub block_size: u32,
}
