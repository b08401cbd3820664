//! Virtual CPUs.

use serde::{Deserialize, Serialize};

use super::yes;

/// Virtual CPUs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpusConfig {
    /// vCPUs of the VM.
    pub boot_vcpus: u8,
    /// At least `boot_vcpus`; more are never plugged in.
    pub max_vcpus: u8,
    /// Only one thread per core and one die per package: `null`, or a topology that says so.
    #[serde(default)]
    pub topology: Option<CpuTopology>,
    /// Not offered.
    #[serde(default)]
    pub kvm_hyperv: bool,
    /// Only Cloud Hypervisor's default is offered: the guest has the host's number.
    #[serde(default = "default_phys_bits")]
    pub max_phys_bits: u8,
    /// The guest sees the host's virtualization extensions, where the host offers them; `false` is not offered.
    #[serde(default = "yes")]
    pub nested: bool,
    /// Which CPUs of the host run which vCPU. A vCPU that is not named runs on those of the process.
    #[serde(default)]
    pub affinity: Option<Vec<CpuAffinity>>,
    /// Further CPU features.
    #[serde(default)]
    pub features: CpuFeatures,
    /// Core scheduling; `Vcpu` is not offered.
    #[serde(default)]
    pub core_scheduling: CoreSchedulingMode,
}

/// What Cloud Hypervisor prints unless told otherwise.
pub(super) const DEFAULT_PHYS_BITS: u8 = 46;

fn default_phys_bits() -> u8 {
    DEFAULT_PHYS_BITS
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: 1,
            topology: None,
            kvm_hyperv: false,
            max_phys_bits: default_phys_bits(),
            nested: true,
            affinity: None,
            features: CpuFeatures::default(),
            core_scheduling: CoreSchedulingMode::default(),
        }
    }
}

impl CpusConfig {
    /// CPUs of the host that run `vcpu`; none: those of the process.
    pub fn host_cpus(&self, vcpu: u8) -> &[u16] {
        let affinity = self.affinity.as_deref().unwrap_or_default();
        let found = affinity.iter().find(|a| a.vcpu == vcpu);
        found.map_or(&[], |a| &a.host_cpus)
    }
}

/// Where a vCPU runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuAffinity {
    /// Which vCPU; below `boot_vcpus`, each at most once.
    pub vcpu: u8,
    /// Numbers of the host's CPUs, at least one, each below [`MAX_HOST_CPUS`].
    pub host_cpus: Vec<u16>,
}

/// As many CPUs as the C library's set of them holds.
pub const MAX_HOST_CPUS: u16 = 1024;

/// Threads, cores, dies and packages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuTopology {
    /// Threads of a core.
    pub threads_per_core: u16,
    /// Cores of a die.
    pub cores_per_die: u16,
    /// Dies of a package.
    pub dies_per_package: u16,
    /// Packages of the machine.
    pub packages: u16,
}

/// Further CPU features.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CpuFeatures {
    /// Not offered.
    pub amx: bool,
}

/// Which threads of the host may share a core.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CoreSchedulingMode {
    /// Cloud Hypervisor's default.
    #[default]
    Vm,
    /// Not offered.
    Vcpu,
    /// The host's scheduler decides.
    Off,
}
