//! A VM's configuration, in Cloud Hypervisor's JSON.
//!
//! Every field of Cloud Hypervisor's `VmConfig` has its place here, so that what its `vm.info` prints is understood.
//! What this VMM does not offer must hold its neutral value; [`VmConfig::validate`] refuses it by name otherwise. Fields
//! that nobody knows are refused when the JSON is read.
//!
//! * [`cpus`], [`memory`], [`disk`], [`net`], [`console`], [`platform`]: the parts;
//! * [`landlock`]: further files; [`mac`]: MAC addresses; [`refused`]: parts that only hold their neutral value;
//! * [`fill`]: device ids and MAC addresses that the user did not give; [`validate`]: the checks.

pub mod console;
pub mod cpus;
pub mod disk;
pub mod fill;
pub mod landlock;
pub mod mac;
pub mod memory;
pub mod net;
pub mod platform;
pub mod refused;
pub mod validate;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use console::{ConsoleConfig, ConsoleMode, DebugConsoleConfig};
pub use cpus::{CoreSchedulingMode, CpuAffinity, CpuFeatures, CpuTopology, CpusConfig, MAX_HOST_CPUS};
pub use disk::{DiskConfig, ImageType, LockGranularity};
pub use landlock::LandlockConfig;
pub use mac::MacAddr;
pub use memory::{HotplugMethod, MemoryConfig};
pub use net::{NetConfig, VhostMode};
pub use platform::PlatformConfig;
pub use refused::Refused;
pub use validate::{ConfigError, Problem};

/// `true`, for serde.
fn yes() -> bool {
    true
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// Configuration of a virtual machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// Virtual CPUs.
    pub cpus: CpusConfig,
    /// Guest RAM.
    pub memory: MemoryConfig,
    /// What boots.
    pub payload: Option<PayloadConfig>,
    /// Not offered.
    pub rate_limit_groups: Refused,
    /// Block devices.
    pub disks: Option<Vec<DiskConfig>>,
    /// Network devices.
    pub net: Option<Vec<NetConfig>>,
    /// Source of the guest's random numbers.
    pub rng: RngConfig,
    /// Not offered.
    pub balloon: Refused,
    /// Not offered.
    pub fs: Refused,
    /// Not offered.
    pub generic_vhost_user: Refused,
    /// Not offered.
    pub pmem: Refused,
    /// Serial port COM1.
    pub serial: ConsoleConfig,
    /// virtio console.
    pub console: ConsoleConfig,
    /// Not offered but `Off`.
    pub debug_console: Option<DebugConsoleConfig>,
    /// Not offered.
    pub devices: Refused,
    /// Not offered.
    pub user_devices: Refused,
    /// Not offered.
    pub vdpa: Refused,
    /// Not offered.
    pub vsock: Refused,
    /// Not offered.
    pub numa: Refused,
    /// Not offered.
    pub iommu: bool,
    /// Not offered.
    pub watchdog: bool,
    /// Not offered.
    pub rtc: Refused,
    /// Not offered.
    pub pvpanic: bool,
    /// Not offered.
    pub pci_segments: Refused,
    /// Offered with its neutral values only.
    pub platform: Option<PlatformConfig>,
    /// Not offered.
    pub tpm: Refused,
    /// The VMM touches no other files than those of this configuration.
    pub landlock_enable: bool,
    /// And these.
    pub landlock_rules: Option<Vec<LandlockConfig>>,
    /// Not offered; printed by some versions of Cloud Hypervisor.
    #[serde(skip_serializing_if = "Refused::is_null")]
    pub sgx_epc: Refused,
    /// Not offered; printed by some builds of Cloud Hypervisor.
    #[serde(skip_serializing_if = "is_false")]
    pub gdb: bool,
    /// Not offered; printed by some versions of Cloud Hypervisor.
    #[serde(skip_serializing_if = "Refused::is_null")]
    pub preserved_fds: Refused,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            cpus: CpusConfig::default(),
            memory: MemoryConfig::default(),
            payload: None,
            rate_limit_groups: Refused::default(),
            disks: None,
            net: None,
            rng: RngConfig::default(),
            balloon: Refused::default(),
            fs: Refused::default(),
            generic_vhost_user: Refused::default(),
            pmem: Refused::default(),
            serial: ConsoleConfig {
                mode: ConsoleMode::Null,
                ..Default::default()
            },
            console: ConsoleConfig {
                mode: ConsoleMode::Tty,
                ..Default::default()
            },
            debug_console: None,
            devices: Refused::default(),
            user_devices: Refused::default(),
            vdpa: Refused::default(),
            vsock: Refused::default(),
            numa: Refused::default(),
            iommu: false,
            watchdog: false,
            rtc: Refused::default(),
            pvpanic: false,
            pci_segments: Refused::default(),
            platform: None,
            tpm: Refused::default(),
            landlock_enable: false,
            landlock_rules: None,
            sgx_epc: Refused::default(),
            gdb: false,
            preserved_fds: Refused::default(),
        }
    }
}

/// What a VM boots.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PayloadConfig {
    /// Not offered.
    pub firmware: Refused,
    /// A PVH ELF `vmlinux` or a bzImage.
    pub kernel: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// Initial RAM disk.
    pub initramfs: Option<PathBuf>,
    /// Not offered.
    #[serde(skip_serializing_if = "Refused::is_null")]
    pub igvm: Refused,
    /// Not offered.
    #[serde(skip_serializing_if = "Refused::is_null")]
    pub host_data: Refused,
}

/// Source of the guest's random numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngConfig {
    /// File that is read for them.
    pub src: PathBuf,
    /// Device id; `_rng` when not given.
    #[serde(default)]
    pub id: Option<String>,
    /// Not offered.
    #[serde(default)]
    pub iommu: bool,
    /// Only segment 0 is offered.
    #[serde(default)]
    pub pci_segment: u16,
    /// Not offered.
    #[serde(default, skip_serializing_if = "Refused::is_null")]
    pub pci_device_id: Refused,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            src: "/dev/urandom".into(),
            id: None,
            iommu: false,
            pci_segment: 0,
            pci_device_id: Refused::default(),
        }
    }
}
