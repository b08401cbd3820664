//! The KVM backend.
//!
//! [`KvmHypervisor`] opens /dev/kvm; `vm` is a VM with its slots and dirty log, `dirty` its dirty rings, `vcpu` a vCPU and its state, `kick`
//! how another thread gets a vCPU out of the guest.

use std::sync::Arc;

use kvm_ioctls::{Cap, Kvm};

use crate::error::{Error, Result, ioctl};
use crate::{Capabilities, CpuIdEntry, Hypervisor, Vm, VmOptions};

mod dirty;
mod hot;
mod kick;
mod vcpu;
mod vm;

pub use kick::install_kick_handler;

/// The host's TSC now.
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 processor.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// KVM on this host.
pub struct KvmHypervisor {
    kvm: Arc<Kvm>,
    capabilities: Capabilities,
}

impl KvmHypervisor {
    /// Opens /dev/kvm and reads what it offers; also installs the kick signal's handler.
    pub fn new() -> Result<Self> {
        let kvm = Kvm::new().map_err(|e| Error::Open(e.to_string()))?;
        if kvm.get_api_version() != 12 {
            return Err(Error::Open(format!(
                "API version {} instead of 12",
                kvm.get_api_version()
            )));
        }
        for (cap, name) in [
            (Cap::SplitIrqchip, "split irqchip"),
            (Cap::ImmediateExit, "immediate exit"),
            (Cap::Irqfd, "irqfd"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::SignalMsi, "MSI delivery"),
            (Cap::UserMemory, "user memory slots"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(Error::Missing(name));
            }
        }
        kick::install_kick_handler();
        let mut capabilities = Capabilities {
            max_vcpus: kvm.get_max_vcpus() as u32,
            dirty_ring: kvm.check_extension_int(Cap::DirtyLogRing) > 0,
            tsc_khz: None,
            tsc_offset: false,
        };
        let vm = kvm.create_vm().map_err(ioctl("create a VM"))?;
        let split = kvm_bindings::kvm_enable_cap {
            cap: kvm_bindings::KVM_CAP_SPLIT_IRQCHIP,
            args: [24, 0, 0, 0],
            ..Default::default()
        };
        vm.enable_cap(&split).map_err(ioctl("use the split irqchip"))?;
        let probe = vm.create_vcpu(0).map_err(ioctl("create a vCPU"))?;
        capabilities.tsc_khz = probe.get_tsc_khz().ok().filter(|k| *k > 0);
        capabilities.tsc_offset = vcpu::has_tsc_offset(&probe);
        Ok(Self {
            kvm: Arc::new(kvm),
            capabilities,
        })
    }
}

impl Hypervisor for KvmHypervisor {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn supported_cpuid(&self) -> Result<Vec<CpuIdEntry>> {
        let cpuid = self
            .kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl("list CPUID"))?;
        Ok(cpuid.as_slice().to_vec())
    }

    fn create_vm(&self, options: VmOptions) -> Result<Arc<dyn Vm>> {
        Ok(Arc::new(vm::KvmVm::new(
            self.kvm.clone(),
            self.capabilities.clone(),
            options,
        )?))
    }
}
