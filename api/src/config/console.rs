//! Serial port and virtio console.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Refused;

/// Where a console's bytes go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsoleMode {
    /// There is no such device.
    #[default]
    Off,
    /// Not offered.
    Pty,
    /// The VMM's standard input and output.
    Tty,
    /// Output is appended to a file.
    File,
    /// Not offered.
    Socket,
    /// Output is discarded.
    Null,
}

/// A serial port or virtio console.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Output file of mode `File`.
    #[serde(default)]
    pub file: Option<PathBuf>,
    /// Where the bytes go.
    pub mode: ConsoleMode,
    /// Not offered.
    #[serde(default)]
    pub iommu: bool,
    /// Not offered.
    #[serde(default)]
    pub socket: Refused,
    /// Device id; `_console` for the virtio console when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Only segment 0 is offered.
    #[serde(default)]
    pub pci_segment: u16,
    /// Not offered.
    #[serde(default, skip_serializing_if = "Refused::is_null")]
    pub pci_device_id: Refused,
}

/// The debug port; only `Off` is offered.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DebugConsoleConfig {
    /// Without meaning while the mode is `Off`.
    #[serde(default)]
    pub file: Option<PathBuf>,
    /// Must be `Off`.
    pub mode: ConsoleMode,
    /// Without meaning while the mode is `Off`.
    #[serde(default)]
    pub iobase: Option<u16>,
    /// Without meaning while the mode is `Off`.
    #[serde(default, skip_serializing_if = "Refused::is_null")]
    pub socket: Refused,
}
