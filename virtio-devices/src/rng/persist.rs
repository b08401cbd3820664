//! Saved state of a random number device.

use serde::{Deserialize, Serialize};

/// Version of [`RngState`].
pub const VERSION: u32 = 1;

/// There is nothing beside the queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {
    /// [`VERSION`] of the writer.
    pub version: u32,
}
