//! The hypervisor border: what the rest of the VMM may ask of the kernel's virtualization interface.
//!
//! Where to find what:
//! * this file: the traits [`Hypervisor`], [`Vm`] and [`Vcpu`] and the plain types they speak of;
//! * [`kvm`]: the KVM backend (kvm-ioctls);
//! * [`state`]: the versioned saved state of a vCPU and of the VM-wide clock.
//!
//! Thread rules: [`Hypervisor`] and [`Vm`] may be shared between threads; a [`Vcpu`] belongs to the one thread that
//! runs it, other threads reach it only through its [`VcpuKicker`].

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

mod error;
pub mod kvm;
pub mod state;

pub use error::{Error, Result};
pub use kvm_bindings::kvm_cpuid_entry2 as CpuIdEntry;
pub use state::{ClockState, VcpuState};

/// Size of a guest page in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// What one host's hypervisor offers, read once at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Largest number of vCPUs of one VM.
    pub max_vcpus: u32,
    /// The dirty ring (KVM_CAP_DIRTY_LOG_RING) is there; else dirty pages are logged in a bitmap.
    pub dirty_ring: bool,
    /// Guest TSC frequency in kHz, when the host tells it.
    pub tsc_khz: Option<u32>,
    /// The vCPU attribute KVM_VCPU_TSC_OFFSET can be set.
    pub tsc_offset: bool,
}

/// How a VM is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VmOptions {
    /// Dirty ring entries per vCPU; 0 = bitmap. A power of two, up to 65,536. Must be chosen before any vCPU is made.
    pub dirty_ring_entries: u32,
}

/// One piece of guest RAM backed by this process's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySlot {
    /// Slot number, unique within the VM.
    pub slot: u32,
    /// Guest physical address of the first byte; page aligned.
    pub guest_addr: u64,
    /// Size in bytes; a multiple of [`PAGE_SIZE`].
    pub size: u64,
    /// Address in this process; page aligned; must stay mapped as long as the slot is in use.
    pub host_addr: u64,
    /// The guest may not write.
    pub readonly: bool,
}

/// Dirty pages of a slot, 64 at a time: bit n of `bits` set = page 64 * `index` + n of the slot was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyWord {
    /// Slot number.
    pub slot: u32,
    /// Which word of the slot's bitmap.
    pub index: usize,
    /// Its bits, not all 0.
    pub bits: u64,
}

/// A message-signalled interrupt (PCI 3.0, 6.8; Intel SDM 3A 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MsiMessage {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// One entry of the interrupt routing table: a GSI that delivers an MSI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiRoute {
    /// Global system interrupt, as given to [`Vm::register_irqfd`].
    pub gsi: u32,
    /// The message that it delivers.
    pub message: MsiMessage,
}

/// Where an ioeventfd listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoEventAddress {
    /// I/O port.
    Pio(u64),
    /// Guest physical address.
    Mmio(u64),
}

/// Why a vCPU came out of the guest. Data slices are filled by the caller before the next [`Vcpu::run`].
#[derive(Debug)]
pub enum VcpuExit<'a> {
    /// The guest reads `data.len()` bytes from an I/O port.
    PioRead(u16, &'a mut [u8]),
    /// The guest writes to an I/O port.
    PioWrite(u16, &'a [u8]),
    /// The guest reads from an address without RAM.
    MmioRead(u64, &'a mut [u8]),
    /// The guest writes to an address without RAM.
    MmioWrite(u64, &'a [u8]),
    /// Split irqchip: the guest acknowledged this vector, tell the userspace IOAPIC.
    IoapicEoi(u8),
    /// The guest halted (only without an in-kernel LAPIC).
    Hlt,
    /// Triple fault.
    Shutdown,
    /// The guest asks for a reset through the hypervisor (KVM_SYSTEM_EVENT_RESET).
    Reset,
    /// Kicked, or a signal arrived: any pending I/O instruction is complete.
    Interrupted,
    /// Something inside the backend was done (a full dirty ring was emptied): run on.
    Again,
}

/// Entry to the host's virtualization interface.
pub trait Hypervisor: Send + Sync {
    /// What this host offers.
    fn capabilities(&self) -> &Capabilities;
    /// CPUID leaves that this host can give to a guest (KVM_GET_SUPPORTED_CPUID).
    fn supported_cpuid(&self) -> Result<Vec<CpuIdEntry>>;
    /// Makes an empty VM with a split irqchip of 24 IOAPIC pins (LAPICs in the kernel, IOAPIC in userspace), TSS and
    /// identity map addresses set.
    fn create_vm(&self, options: VmOptions) -> Result<Arc<dyn Vm>>;
}

/// One virtual machine.
pub trait Vm: Send + Sync {
    /// Adds a piece of RAM.
    fn add_memory(&self, slot: MemorySlot) -> Result<()>;
    /// Removes a piece of RAM.
    fn remove_memory(&self, slot: MemorySlot) -> Result<()>;
    /// Starts dirty logging of every writable slot; pages written earlier do not count.
    fn start_dirty_log(&self) -> Result<()>;
    /// Ends dirty logging.
    fn stop_dirty_log(&self) -> Result<()>;
    /// Appends the pages dirtied by vCPUs since the last call, ascending by slot and index, and clears the log (bitmap or
    /// ring, whichever the VM was made with). With the dirty ring all vCPUs' rings are harvested and reset; it then takes
    /// no longer for more RAM. Without `hot`, pages that [`Vm::keep_hot`] leaves writable are left to the next call with it.
    fn harvest_dirty(&self, hot: bool, out: &mut Vec<DirtyWord>) -> Result<()>;
    /// From here on up to `most` pages that are written all the time are left writable and reported by every harvest with
    /// `hot`, written or not, which saves their faults. The pages at the guest physical addresses `cold` are logged in the usual
    /// way again as soon as that costs little; with a `most` of 0 all are, where that goes. Only while no vCPU runs and nothing else
    /// writes RAM. Does nothing where the backend has no such thing. How many pages are hot now.
    fn keep_hot(&self, most: usize, cold: &[u64]) -> Result<usize>;
    /// Makes vCPU `id`, which is also its x2APIC id.
    fn create_vcpu(&self, id: u8) -> Result<Box<dyn Vcpu>>;
    /// Connects an eventfd to a GSI (KVM API 4.75).
    fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<()>;
    /// Undoes [`Vm::register_irqfd`].
    fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<()>;
    /// Signals `fd` instead of leaving the guest when it writes to `addr`, with `datamatch` = (value, length in bytes)
    /// only when it writes that value (KVM API 4.59).
    fn register_ioevent(&self, fd: &EventFd, addr: IoEventAddress, datamatch: Option<(u64, u32)>) -> Result<()>;
    /// Undoes [`Vm::register_ioevent`].
    fn unregister_ioevent(&self, fd: &EventFd, addr: IoEventAddress, datamatch: Option<(u64, u32)>) -> Result<()>;
    /// Replaces the whole interrupt routing table.
    fn set_msi_routes(&self, routes: &[MsiRoute]) -> Result<()>;
    /// Delivers an MSI at once (KVM API 4.70).
    fn signal_msi(&self, message: MsiMessage) -> Result<()>;
    /// Reads kvmclock and the host clocks it was read at.
    fn clock(&self) -> Result<ClockState>;
    /// Sets kvmclock to `state` plus `advance_ns` nanoseconds.
    fn set_clock(&self, state: &ClockState, advance_ns: u64) -> Result<()>;
}

/// One virtual CPU; belongs to the thread that runs it.
pub trait Vcpu: Send {
    /// Runs the guest until something needs the VMM. When [`VcpuKicker::kick`] was called, completes a pending I/O
    /// instruction and returns [`VcpuExit::Interrupted`].
    fn run(&mut self) -> Result<VcpuExit<'_>>;
    /// The handle by which other threads get this vCPU out of the guest. It is bound to the calling thread
    /// (pthread_self): call this from the thread that will run the vCPU, after [`kvm::install_kick_handler`].
    fn kicker(&mut self) -> Arc<dyn VcpuKicker>;
    /// Sets the CPUID leaves; before the first run.
    fn set_cpuid(&mut self, entries: &[CpuIdEntry]) -> Result<()>;
    /// Sets registers for a direct boot; see [`BootRegisters`].
    fn set_boot_registers(&mut self, regs: &BootRegisters) -> Result<()>;
    /// Reads the complete state ahead, for [`Vcpu::state`]. By the vCPU's own thread, after [`VcpuExit::Interrupted`],
    /// and when nothing outside changes the vCPU's interrupts any more: no other vCPU is in the guest, devices are held.
    /// Forgotten when the vCPU runs or gets another state.
    fn presave(&mut self) -> Result<()>;
    /// Complete state. Must not be called while the vCPU runs or has an I/O instruction pending. With `presaved` the one
    /// that was read ahead, if there is one; without, that one is forgotten.
    fn state(&mut self, presaved: bool) -> Result<VcpuState>;
    /// Restores a complete state. The guest's TSC goes on at its saved value plus `advance_ns` nanoseconds (by offset,
    /// the same for all vCPUs whose states have the same `tsc` and that are restored with the same `host_tsc_base`), so that time moves on over a failover.
    fn set_state(&mut self, state: &VcpuState, advance_ns: u64, host_tsc_base: u64) -> Result<()>;
}

/// Gets a vCPU out of the guest, from any thread.
pub trait VcpuKicker: Send + Sync {
    /// The current or next [`Vcpu::run`] returns [`VcpuExit::Interrupted`] soon. Idempotent.
    fn kick(&self);
    /// Takes a kick back; called by the vCPU's own thread before it runs on.
    fn clear(&self);
}

/// Registers of the boot vCPU at its first instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootRegisters {
    /// PVH (Xen's boot ABI): 32-bit protected mode without paging, flat segments, `rbx` = start info.
    Pvh {
        /// Entry point.
        entry: u64,
        /// Guest address of struct hvm_start_info.
        start_info: u64,
    },
    /// Linux 64-bit boot protocol: long mode, identity paging from `pml4`, `rsi` = zero page, GDT at `gdt`.
    Linux64 {
        /// Entry point (startup_64).
        entry: u64,
        /// Guest address of boot_params.
        zero_page: u64,
        /// Guest address of the PML4.
        pml4: u64,
        /// Guest address of the GDT: null, unused, 64-bit code (0x10), data (0x18), TSS (0x20..).
        gdt: u64,
        /// Size of the GDT in bytes.
        gdt_size: u16,
        /// Initial stack pointer.
        stack: u64,
    },
}
