//! Guest RAM.

use serde::{Deserialize, Serialize};

use super::{Refused, yes};

/// Guest RAM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Bytes.
    pub size: u64,
    /// Lets the host merge equal pages (KSM).
    #[serde(default)]
    pub mergeable: bool,
    /// Without meaning, because no RAM is plugged in.
    #[serde(default)]
    pub hotplug_method: HotplugMethod,
    /// Not offered.
    #[serde(default)]
    pub hotplug_size: Option<u64>,
    /// Not offered.
    #[serde(default)]
    pub hotplugged_size: Option<u64>,
    /// RAM is a shared mapping of a memfd.
    #[serde(default)]
    pub shared: bool,
    /// RAM is made of the host's reserved huge pages.
    #[serde(default)]
    pub hugepages: bool,
    /// Their size in bytes; 2 MiB when not given.
    #[serde(default)]
    pub hugepage_size: Option<u64>,
    /// All RAM is allocated at creation.
    #[serde(default)]
    pub prefault: bool,
    /// Not offered.
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub reserve: bool,
    /// Not offered.
    #[serde(default)]
    pub zones: Refused,
    /// Transparent huge pages.
    #[serde(default = "yes")]
    pub thp: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            mergeable: false,
            hotplug_method: HotplugMethod::default(),
            hotplug_size: None,
            hotplugged_size: None,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            prefault: false,
            reserve: false,
            zones: Refused::default(),
            thp: true,
        }
    }
}

/// How RAM would be plugged in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HotplugMethod {
    /// ACPI.
    #[default]
    Acpi,
    /// virtio-mem.
    VirtioMem,
}
