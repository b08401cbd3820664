//! A KVM vCPU: running it, its boot registers, its complete state.
//!
//! The list of MSRs to save is chosen once, when the vCPU is made; saving then is a handful of ioctls into buffers that
//! are kept.

use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_SYNC_REGS, KVM_CAP_XSAVE2, KVM_EXIT_DIRTY_RING_FULL, KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS, KVM_SYSTEM_EVENT_RESET, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Msrs, Xsave, kvm_device_attr,
    kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events,
};
use kvm_ioctls::{Kvm, SyncReg, VcpuFd, VmFd};

use super::dirty::Rings;
use super::kick::Target;
use crate::error::{Error, Result, ioctl};
use crate::state::VCPU_STATE_VERSION;
use crate::{BootRegisters, Capabilities, CpuIdEntry, Vcpu, VcpuExit, VcpuKicker, VcpuState};

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_TSC_ADJUST: u32 = 0x3b;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MSR_IA32_MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, write-back by default.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

// kvm-ioctls offers the device attributes of vCPUs on other architectures only.
vmm_sys_util::ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, kvm_bindings::KVMIO, 0xe1, kvm_device_attr);
vmm_sys_util::ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, kvm_bindings::KVMIO, 0xe2, kvm_device_attr);
vmm_sys_util::ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, kvm_bindings::KVMIO, 0xe3, kvm_device_attr);

fn tsc_offset_ioctl(fd: &VcpuFd, request: libc::c_ulong, value: &mut u64) -> std::io::Result<()> {
    let attr = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(value) as u64,
        flags: 0,
    };
    // SAFETY: the requests read a struct kvm_device_attr, whose `addr` points to a u64 that outlives the call.
    match unsafe { vmm_sys_util::ioctl::ioctl_with_ref(fd, request, &attr) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// The vCPU attribute KVM_VCPU_TSC_OFFSET is there (KVM API, vcpu devices, 4.1).
pub(super) fn has_tsc_offset(fd: &VcpuFd) -> bool {
    tsc_offset_ioctl(fd, KVM_HAS_DEVICE_ATTR(), &mut 0).is_ok()
}

/// A vCPU.
pub(super) struct KvmVcpu {
    fd: VcpuFd,
    msrs: Vec<u32>,
    /// Extra 32-bit words of the XSAVE area beyond the 4,096 bytes of struct kvm_xsave.
    xsave_extra: usize,
    has_xsave2: bool,
    tsc_offset: bool,
    kicker: Option<Arc<Target>>,
    rings: Option<Arc<Rings>>,
    /// As given to `set_cpuid`.
    cpuid: Vec<CpuIdEntry>,
    tsc_khz: u32,
    /// KVM_RUN leaves registers and events in the page that it shares (KVM API, KVM_CAP_SYNC_REGS).
    sync_regs: bool,
    presaved: Option<Box<VcpuState>>,
}

impl KvmVcpu {
    pub(super) fn new(
        kvm: &Kvm,
        vm: &VmFd,
        fd: VcpuFd,
        capabilities: &Capabilities,
        rings: Option<Arc<Rings>>,
    ) -> Result<Self> {
        let listed = kvm.get_msr_index_list().map_err(ioctl("list MSRs"))?;
        let xsave_size = vm.check_extension_raw(u64::from(KVM_CAP_XSAVE2));
        let xsave_size = usize::try_from(xsave_size).unwrap_or(0);
        let all_regs = (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS) as i32;
        let sync_regs = vm.check_extension_raw(u64::from(KVM_CAP_SYNC_REGS));
        let mut this = Self {
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
            sync_regs: sync_regs >= 0 && sync_regs & all_regs == all_regs,
            fd,
            msrs: Vec::new(),
            xsave_extra: xsave_size.saturating_sub(4096).div_ceil(4),
            has_xsave2: xsave_size > 0,
            tsc_offset: capabilities.tsc_offset,
            kicker: None,
            rings,
            cpuid: Vec::new(),
            presaved: None,
        };
        this.choose_msrs(listed.as_slice());
        Ok(this)
    }

    /// Keeps the MSRs that can be read and written back now. The TSC is handled apart.
    fn choose_msrs(&mut self, listed: &[u32]) {
        for index in listed.iter().copied().filter(|i| *i != MSR_IA32_TSC) {
            let Ok(mut one) = Msrs::from_entries(&[kvm_msr_entry {
                index,
                ..Default::default()
            }]) else {
                continue;
            };
            if self.fd.get_msrs(&mut one).is_ok_and(|n| n == 1) && self.fd.set_msrs(&one).is_ok_and(|n| n == 1) {
                self.msrs.push(index);
            }
        }
    }

    fn read_msr(&self, index: u32) -> Result<Option<u64>> {
        let mut one = Msrs::from_entries(&[kvm_msr_entry {
            index,
            ..Default::default()
        }])
        .map_err(|_| Error::Missing("room for an MSR"))?;
        let n = self.fd.get_msrs(&mut one).map_err(ioctl("read an MSR"))?;
        Ok((n == 1).then(|| one.as_slice()[0].data))
    }

    fn write_msr(&self, index: u32, data: u64) -> Result<()> {
        let one = Msrs::from_entries(&[kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }])
        .map_err(|_| Error::Missing("room for an MSR"))?;
        match self.fd.set_msrs(&one).map_err(ioctl("write an MSR"))? {
            1 => Ok(()),
            _ => Err(Error::State(format!(
                "MSR {index:#x} cannot be set to {data:#x} on this host"
            ))),
        }
    }

    /// The guest's TSC, and the host's at the same moment. By the offset where there is one, so that the vCPUs of a VM
    /// stay in step to the tick.
    fn tsc(&self) -> Result<(u64, u64)> {
        if self.tsc_offset {
            let mut offset = 0;
            tsc_offset_ioctl(&self.fd, KVM_GET_DEVICE_ATTR(), &mut offset).map_err(|source| Error::Ioctl {
                what: "read the TSC offset",
                source,
            })?;
            let host = super::host_tsc();
            return Ok((host.wrapping_add(offset), host));
        }
        let tsc = self.read_msr(MSR_IA32_TSC)?.unwrap_or(0);
        Ok((tsc, super::host_tsc()))
    }

    fn xsave(&self) -> Result<Vec<u32>> {
        let whole = |region: &[u32], extra: &[u32]| [region, extra].concat();
        if self.has_xsave2 {
            let mut xsave = Xsave::new(self.xsave_extra).map_err(|_| Error::Missing("room for XSAVE"))?;
            // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 tells.
            unsafe { self.fd.get_xsave2(&mut xsave) }.map_err(ioctl("read XSAVE"))?;
            Ok(whole(&xsave.as_fam_struct_ref().xsave.region, xsave.as_slice()))
        } else {
            Ok(self.fd.get_xsave().map_err(ioctl("read XSAVE"))?.region.to_vec())
        }
    }

    fn read_msrs(&self) -> Result<Vec<kvm_msr_entry>> {
        let entry = |index: &u32| kvm_msr_entry {
            index: *index,
            ..Default::default()
        };
        let entries: Vec<kvm_msr_entry> = self.msrs.iter().map(entry).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| Error::Missing("room for MSRs"))?;
        let read = self.fd.get_msrs(&mut msrs).map_err(ioctl("read MSRs"))?;
        if read != entries.len() {
            let index = entries.get(read).map_or(0, |e| e.index);
            return Err(Error::State(format!("MSR {index:#x} can no longer be read")));
        }
        Ok(msrs.as_slice().to_vec())
    }

    /// Registers and events by a KVM_RUN that a kick ends before it begins: one call for three. `None` where that does not
    /// go.
    fn synced(&mut self) -> Option<(kvm_regs, kvm_sregs, kvm_vcpu_events)> {
        if !self.sync_regs || self.fd.get_kvm_run().immediate_exit == 0 {
            return None;
        }
        const ALL: [SyncReg; 3] = [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents];
        ALL.into_iter().for_each(|reg| self.fd.set_sync_valid_reg(reg));
        let interrupted = self.fd.run().is_err_and(|e| e.errno() == libc::EINTR);
        ALL.into_iter().for_each(|reg| self.fd.clear_sync_valid_reg(reg));
        let regs = self.fd.sync_regs();
        interrupted.then_some((regs.regs, regs.sregs, regs.events))
    }

    /// Every ioctl on a vCPU has its price (some microseconds where KVM is itself virtualized), so there are few.
    fn read_state(&mut self, kicked: bool) -> Result<VcpuState> {
        // MP state first: reading it lets KVM process pending INIT and SIPI (KVM API 4.38).
        let mp_state = self.fd.get_mp_state().map_err(ioctl("read the MP state"))?;
        let (regs, sregs, events) = match if kicked { self.synced() } else { None } {
            Some(synced) => synced,
            None => (
                self.fd.get_regs().map_err(ioctl("read registers"))?,
                self.fd.get_sregs().map_err(ioctl("read segment registers"))?,
                self.fd.get_vcpu_events().map_err(ioctl("read pending events"))?,
            ),
        };
        let xsave = self.xsave()?;
        let xcrs = self.fd.get_xcrs().map_err(ioctl("read XCRs"))?;
        let debugregs = self.fd.get_debug_regs().map_err(ioctl("read debug registers"))?;
        // The APIC timer's deadline is among them, and the APIC comes after it: a timer that fires in between is in both, not
        // in neither.
        let msrs = self.read_msrs()?;
        let lapic = self.fd.get_lapic().map_err(ioctl("read the local APIC"))?;
        let (tsc, host_tsc) = self.tsc()?;
        Ok(VcpuState {
            version: VCPU_STATE_VERSION,
            cpuid: self.cpuid.clone(),
            regs,
            sregs,
            xcrs,
            xsave,
            msrs,
            lapic,
            events,
            debugregs,
            mp_state,
            tsc,
            host_tsc,
            tsc_khz: self.tsc_khz,
        })
    }

    fn set_xsave(&self, words: &[u32]) -> Result<()> {
        let expected = 1024 + self.xsave_extra;
        if words.len() != expected {
            return Err(Error::State(format!(
                "XSAVE area of {} words, this host's has {expected}",
                words.len()
            )));
        }
        let mut xsave = Xsave::new(self.xsave_extra).map_err(|_| Error::Missing("room for XSAVE"))?;
        // SAFETY: only the fixed region is written; the length of the flexible array is not touched.
        unsafe { xsave.as_mut_fam_struct() }
            .xsave
            .region
            .copy_from_slice(&words[..1024]);
        xsave.as_mut_slice().copy_from_slice(&words[1024..]);
        // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 tells (4,096 bytes without that capability).
        unsafe { self.fd.set_xsave2(&xsave) }.map_err(ioctl("write XSAVE"))
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        if let Some(kicker) = &self.kicker {
            kicker.retire();
        }
    }
}

fn segment(base: u64, selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long || type_ & 8 == 0),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn tss(selector: u16) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0x67,
        selector,
        type_: 11,
        present: 1,
        ..Default::default()
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<VcpuExit<'_>> {
        self.presaved = None;
        use kvm_ioctls::VcpuExit as Kvm;
        match self.fd.run() {
            Ok(exit) => Ok(match exit {
                Kvm::IoIn(port, data) => VcpuExit::PioRead(port, data),
                Kvm::IoOut(port, data) => VcpuExit::PioWrite(port, data),
                Kvm::MmioRead(addr, data) => VcpuExit::MmioRead(addr, data),
                Kvm::MmioWrite(addr, data) => VcpuExit::MmioWrite(addr, data),
                Kvm::IoapicEoi(vector) => VcpuExit::IoapicEoi(vector),
                Kvm::Hlt => VcpuExit::Hlt,
                Kvm::Shutdown => VcpuExit::Shutdown,
                Kvm::Intr => VcpuExit::Interrupted,
                Kvm::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => VcpuExit::Reset,
                Kvm::SystemEvent(..) => VcpuExit::Shutdown,
                Kvm::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
                    if let Some(rings) = &self.rings {
                        rings.collect()?;
                    }
                    VcpuExit::Again
                }
                other => return Err(Error::Guest(format!("KVM exit {other:?}"))),
            }),
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => Ok(VcpuExit::Interrupted),
            Err(e) => Err(ioctl("run the vCPU")(e)),
        }
    }

    fn kicker(&mut self) -> Arc<dyn VcpuKicker> {
        let immediate_exit = std::ptr::from_mut(&mut self.fd.get_kvm_run().immediate_exit);
        // SAFETY: the byte is in the kvm_run mapping, which lives as long as `fd`; drop retires the target first.
        let target = Arc::new(unsafe { Target::new(immediate_exit) });
        if let Some(old) = self.kicker.replace(target.clone()) {
            old.retire();
        }
        target
    }

    fn set_cpuid(&mut self, entries: &[CpuIdEntry]) -> Result<()> {
        let cpuid = CpuId::from_entries(entries).map_err(|_| Error::Missing("room for so many CPUID leaves"))?;
        self.fd.set_cpuid2(&cpuid).map_err(ioctl("set CPUID"))?;
        self.cpuid = entries.to_vec();
        Ok(())
    }

    fn set_boot_registers(&mut self, boot: &BootRegisters) -> Result<()> {
        self.presaved = None;
        let mut sregs = self.fd.get_sregs().map_err(ioctl("read segment registers"))?;
        let mut regs = kvm_regs {
            rflags: 2,
            ..Default::default()
        };
        match *boot {
            BootRegisters::Pvh { entry, start_info } => {
                sregs.cs = segment(0, 0x8, 11, false);
                sregs.ds = segment(0, 0x10, 3, false);
                sregs.tr = tss(0x18);
                sregs.gdt = kvm_dtable::default();
                sregs.idt = kvm_dtable::default();
                sregs.cr0 = 1;
                sregs.cr3 = 0;
                sregs.cr4 = 0;
                sregs.efer = 0;
                regs.rip = entry;
                regs.rbx = start_info;
            }
            BootRegisters::Linux64 {
                entry,
                zero_page,
                pml4,
                gdt,
                gdt_size,
                stack,
            } => {
                sregs.cs = segment(0, 0x10, 11, true);
                sregs.ds = segment(0, 0x18, 3, false);
                sregs.tr = tss(0x20);
                sregs.gdt = kvm_dtable {
                    base: gdt,
                    limit: gdt_size.saturating_sub(1),
                    ..Default::default()
                };
                sregs.idt = kvm_dtable::default();
                sregs.cr0 = 1 << 31 | 1;
                sregs.cr3 = pml4;
                sregs.cr4 = 1 << 5;
                sregs.efer = 1 << 8 | 1 << 10;
                regs.rip = entry;
                regs.rsi = zero_page;
                regs.rsp = stack;
                regs.rbp = stack;
            }
        }
        (sregs.es, sregs.fs, sregs.gs, sregs.ss) = (sregs.ds, sregs.ds, sregs.ds, sregs.ds);
        self.fd.set_sregs(&sregs).map_err(ioctl("set segment registers"))?;
        self.fd.set_regs(&regs).map_err(ioctl("set registers"))?;
        // As firmware leaves them: fast strings and write-back memory. A host without one of these MSRs needs neither.
        let _ = self.write_msr(MSR_IA32_MISC_ENABLE, MSR_IA32_MISC_ENABLE_FAST_STRING);
        let _ = self.write_msr(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK);
        let mut lapic = self.fd.get_lapic().map_err(ioctl("read the local APIC"))?;
        // LINT0 takes external interrupts, LINT1 NMI (Intel MP specification, 3.6.2.2).
        for (register, mode) in [(0x350usize, 0x700u32), (0x360, 0x400)] {
            for (i, byte) in mode.to_le_bytes().iter().enumerate() {
                lapic.regs[register + i] = *byte as std::os::raw::c_char;
            }
        }
        self.fd.set_lapic(&lapic).map_err(ioctl("set the local APIC"))
    }

    fn presave(&mut self) -> Result<()> {
        self.presaved = Some(Box::new(self.read_state(true)?));
        Ok(())
    }

    fn state(&mut self, presaved: bool) -> Result<VcpuState> {
        match self.presaved.take().filter(|_| presaved) {
            Some(state) => Ok(*state),
            None => self.read_state(false),
        }
    }

    fn set_state(&mut self, state: &VcpuState, advance_ns: u64, host_tsc_base: u64) -> Result<()> {
        self.presaved = None;
        if state.version != VCPU_STATE_VERSION {
            return Err(Error::State(format!(
                "version {}, this VMM knows {VCPU_STATE_VERSION}",
                state.version
            )));
        }
        let own_khz = self.tsc_khz;
        // KVM's own measure of a frequency differs from boot to boot by some hundred parts per million.
        if own_khz.abs_diff(state.tsc_khz) > state.tsc_khz / 1000 {
            return Err(Error::State(format!(
                "guest TSC runs at {} kHz, this host's at {own_khz} kHz",
                state.tsc_khz
            )));
        }
        // A vCPU that has run (the VM is being reset) takes no other CPUID, and KVM minds even the same one.
        if self.cpuid != state.cpuid {
            self.set_cpuid(&state.cpuid)?;
        }
        self.fd
            .set_mp_state(state.mp_state)
            .map_err(ioctl("set the MP state"))?;
        self.fd
            .set_sregs(&state.sregs)
            .map_err(ioctl("set segment registers"))?;
        self.fd.set_regs(&state.regs).map_err(ioctl("set registers"))?;
        self.fd.set_xcrs(&state.xcrs).map_err(ioctl("set XCRs"))?;
        self.set_xsave(&state.xsave)?;
        let advance = u128::from(advance_ns) * u128::from(state.tsc_khz) / 1_000_000;
        let tsc = state.tsc.wrapping_add(advance as u64);
        let find = |index| state.msrs.iter().find(|m| m.index == index).map(|m| m.data);
        if let Some(adjust) = find(MSR_IA32_TSC_ADJUST) {
            self.write_msr(MSR_IA32_TSC_ADJUST, adjust)?;
        }
        if self.tsc_offset {
            let mut offset = tsc.wrapping_sub(host_tsc_base);
            tsc_offset_ioctl(&self.fd, KVM_SET_DEVICE_ATTR(), &mut offset).map_err(|source| Error::Ioctl {
                what: "set the TSC offset",
                source,
            })?;
        } else {
            let since = super::host_tsc().wrapping_sub(host_tsc_base);
            self.write_msr(MSR_IA32_TSC, tsc.wrapping_add(since))?;
        }
        for msr in &state.msrs {
            if msr.index != MSR_IA32_TSC_ADJUST && msr.index != MSR_IA32_TSC_DEADLINE {
                self.write_msr(msr.index, msr.data)?;
            }
        }
        self.fd.set_lapic(&state.lapic).map_err(ioctl("set the local APIC"))?;
        if let Some(deadline) = find(MSR_IA32_TSC_DEADLINE) {
            self.write_msr(MSR_IA32_TSC_DEADLINE, deadline)?;
        }
        self.fd
            .set_vcpu_events(&state.events)
            .map_err(ioctl("set pending events"))?;
        self.fd
            .set_debug_regs(&state.debugregs)
            .map_err(ioctl("set debug registers"))?;
        // Tells a guest with kvmclock that it stood still, so that its lockup detector keeps quiet; EINVAL without one.
        let _ = self.fd.kvmclock_ctrl();
        Ok(())
    }
}
