//! Files beyond those of the VM's devices that its VMM may touch.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A file or directory that Landlock leaves accessible.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LandlockConfig {
    /// Which; of a directory all that is in it.
    pub path: PathBuf,
    /// `r`, `w` or `rw`.
    pub access: String,
}
