//! Saved state of a console.

use serde::{Deserialize, Serialize};

/// Version of [`ConsoleState`].
pub const VERSION: u32 = 1;

/// There is nothing beside the queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// [`VERSION`] of the writer.
    pub version: u32,
}
