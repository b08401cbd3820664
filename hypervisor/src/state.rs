//! Saved state of a vCPU and of the VM-wide clock. Encodes alike with JSON and binary formats.

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

/// Version of [`VcpuState`] that this build writes and reads.
pub const VCPU_STATE_VERSION: u32 = 1;

/// Complete state of one vCPU.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VcpuState {
    /// [`VCPU_STATE_VERSION`] of the writer.
    pub version: u32,
    /// CPUID leaves.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, interrupt bitmap.
    pub sregs: kvm_sregs,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// XSAVE area as 32-bit words (KVM API 4.134, KVM_GET_XSAVE2).
    pub xsave: Vec<u32>,
    /// Model-specific registers.
    pub msrs: Vec<kvm_msr_entry>,
    /// Local APIC registers.
    pub lapic: kvm_lapic_state,
    /// Pending exceptions, interrupts, NMI, SMI.
    pub events: kvm_vcpu_events,
    /// Debug registers.
    pub debugregs: kvm_debugregs,
    /// Running, halted, waiting for SIPI ...
    pub mp_state: kvm_mp_state,
    /// Guest TSC at the moment of saving.
    pub tsc: u64,
    /// Host TSC at that moment.
    pub host_tsc: u64,
    /// Guest TSC frequency in kHz; 0 when not known.
    pub tsc_khz: u32,
}

/// kvmclock, and the host clocks at the moment it was read (KVM API 4.29).
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct ClockState {
    /// As KVM_GET_CLOCK gave it.
    pub data: kvm_clock_data,
}
