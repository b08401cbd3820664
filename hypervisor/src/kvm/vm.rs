//! A KVM VM: memory slots, dirty log, interrupts, clock.
//!
//! Dirty pages are logged in the dirty rings when the VM was made with them, else in KVM's bitmap. Lock order: `slots`
//! (the table of slots and whether they are logged), then the rings' own mutex.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    KvmIrqRouting, kvm_dirty_gfn, kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::dirty::Rings;
use super::hot::REGION;
use super::vcpu::KvmVcpu;
use crate::error::{Error, Result, ioctl};
use crate::{
    Capabilities, ClockState, DirtyWord, IoEventAddress, MemorySlot, MsiMessage, MsiRoute, PAGE_SIZE, Vcpu, Vm,
    VmOptions,
};

const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
const IOAPIC_PINS: u64 = 24;

struct Slots {
    slots: BTreeMap<u32, MemorySlot>,
    logging: bool,
}

/// A VM.
pub struct KvmVm {
    // Kept open: the vCPUs' capability checks go through it.
    kvm: Arc<Kvm>,
    rings: Option<Arc<Rings>>,
    vm: VmFd,
    capabilities: Capabilities,
    slots: Mutex<Slots>,
}

impl KvmVm {
    pub(super) fn new(kvm: Arc<Kvm>, capabilities: Capabilities, options: VmOptions) -> Result<Self> {
        let vm = kvm.create_vm().map_err(ioctl("create a VM"))?;
        vm.set_tss_address(TSS_ADDRESS).map_err(ioctl("place the TSS"))?;
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(ioctl("place the identity map"))?;
        let split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            args: [IOAPIC_PINS, 0, 0, 0],
            ..Default::default()
        };
        vm.enable_cap(&split).map_err(ioctl("use the split irqchip"))?;
        let entries = options.dirty_ring_entries;
        let rings = if entries == 0 {
            None
        } else {
            let ring = kvm_enable_cap {
                cap: KVM_CAP_DIRTY_LOG_RING,
                args: [u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64, 0, 0, 0],
                ..Default::default()
            };
            vm.enable_cap(&ring).map_err(ioctl("use dirty rings"))?;
            Some(Arc::new(Rings::new(&vm, entries)?))
        };
        Ok(Self {
            kvm,
            rings,
            vm,
            capabilities,
            slots: Mutex::new(Slots {
                slots: BTreeMap::new(),
                logging: false,
            }),
        })
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_region(&self, slot: &MemorySlot, size: u64, log: bool) -> Result<()> {
        let mut flags = 0;
        if slot.readonly {
            flags |= KVM_MEM_READONLY;
        } else if log {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags,
            guest_phys_addr: slot.guest_addr,
            memory_size: size,
            userspace_addr: slot.host_addr,
        };
        // SAFETY: the contract of `MemorySlot::host_addr` is that the range stays mapped while the slot is in use.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(ioctl("set a memory slot"))
    }

    fn log(&self, on: bool) -> Result<()> {
        let mut slots = self.slots();
        for slot in slots.slots.values().filter(|s| !s.readonly) {
            self.set_region(slot, slot.size, on)?;
        }
        slots.logging = on;
        Ok(())
    }
}

/// Takes RAM from `host_addr` on away from KVM, which maps it anew, protected, at the guest's next access. False: that does not
/// go, as with huge pages of hugetlbfs.
fn unmap_for_a_moment(host_addr: u64, len: u64) -> Result<bool> {
    let protect = |protection| {
        // SAFETY: the pages are part of a slot, which stays mapped and writable (see `MemorySlot::host_addr`); that nobody
        // writes it meanwhile is the contract of `Vm::keep_hot`. Content is not changed.
        unsafe { libc::mprotect(host_addr as *mut libc::c_void, len as usize, protection) == 0 }
    };
    if !protect(libc::PROT_READ) {
        return Ok(false);
    }
    if protect(libc::PROT_READ | libc::PROT_WRITE) {
        return Ok(true);
    }
    Err(Error::Ioctl {
        what: "make RAM writable again",
        source: std::io::Error::last_os_error(),
    })
}

fn io_address(addr: IoEventAddress) -> kvm_ioctls::IoEventAddress {
    match addr {
        IoEventAddress::Pio(port) => kvm_ioctls::IoEventAddress::Pio(port),
        IoEventAddress::Mmio(gpa) => kvm_ioctls::IoEventAddress::Mmio(gpa),
    }
}

impl Vm for KvmVm {
    fn add_memory(&self, slot: MemorySlot) -> Result<()> {
        let mut slots = self.slots();
        self.set_region(&slot, slot.size, slots.logging)?;
        slots.slots.insert(slot.slot, slot);
        Ok(())
    }

    fn remove_memory(&self, slot: MemorySlot) -> Result<()> {
        let mut slots = self.slots();
        self.set_region(&slot, 0, false)?;
        slots.slots.remove(&slot.slot);
        Ok(())
    }

    fn start_dirty_log(&self) -> Result<()> {
        if let Some(rings) = &self.rings {
            rings.prepare();
        }
        self.log(true)?;
        // What was collected in an earlier round of logging does not count.
        let started = match &self.rings {
            Some(rings) => rings.restart(),
            None => self.harvest_dirty(true, &mut Vec::new()),
        };
        if started.is_err() {
            self.log(false)?;
        }
        started
    }

    fn stop_dirty_log(&self) -> Result<()> {
        self.log(false)
    }

    fn harvest_dirty(&self, hot: bool, out: &mut Vec<DirtyWord>) -> Result<()> {
        let slots = self.slots();
        if !slots.logging {
            return Ok(());
        }
        if let Some(rings) = &self.rings {
            return rings.take(hot, out);
        }
        for slot in slots.slots.values().filter(|s| !s.readonly) {
            let words = self.vm.get_dirty_log(slot.slot, slot.size as usize);
            let words = words.map_err(ioctl("read the dirty log"))?;
            let word = |(index, bits)| DirtyWord {
                slot: slot.slot,
                index,
                bits,
            };
            out.extend(words.into_iter().enumerate().map(word).filter(|word| word.bits != 0));
        }
        Ok(())
    }

    fn keep_hot(&self, most: usize, cold: &[u64]) -> Result<usize> {
        let Some(rings) = &self.rings else {
            return Ok(0);
        };
        let slots = self.slots();
        let page = |gpa: &u64| {
            let inside = |s: &&MemorySlot| *gpa >= s.guest_addr && gpa - s.guest_addr < s.size;
            let slot = slots.slots.values().find(inside)?;
            Some((slot.slot, (gpa - slot.guest_addr) / PAGE_SIZE))
        };
        let cold: Vec<_> = cold.iter().filter_map(page).collect();
        rings.keep_hot(most, &cold, |(slot, page)| match slots.slots.get(&slot) {
            Some(slot) => {
                let start = page * PAGE_SIZE;
                let len = (REGION * PAGE_SIZE).min(slot.size.saturating_sub(start));
                unmap_for_a_moment(slot.host_addr + start, len)
            }
            None => Ok(true),
        })
    }

    fn create_vcpu(&self, id: u8) -> Result<Box<dyn Vcpu>> {
        let fd = self.vm.create_vcpu(u64::from(id)).map_err(ioctl("create a vCPU"))?;
        if let Some(rings) = &self.rings {
            rings.add(&fd)?;
        }
        let vcpu = KvmVcpu::new(&self.kvm, &self.vm, fd, &self.capabilities, self.rings.clone())?;
        Ok(Box::new(vcpu))
    }

    fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<()> {
        self.vm.register_irqfd(fd, gsi).map_err(ioctl("register an irqfd"))
    }

    fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<()> {
        self.vm.unregister_irqfd(fd, gsi).map_err(ioctl("unregister an irqfd"))
    }

    fn register_ioevent(&self, fd: &EventFd, addr: IoEventAddress, datamatch: Option<(u64, u32)>) -> Result<()> {
        let addr = io_address(addr);
        match datamatch {
            None => self.vm.register_ioevent(fd, &addr, NoDatamatch),
            Some((value, 8)) => self.vm.register_ioevent(fd, &addr, value),
            Some((value, _)) => self.vm.register_ioevent(fd, &addr, value as u32),
        }
        .map_err(ioctl("register an ioeventfd"))
    }

    fn unregister_ioevent(&self, fd: &EventFd, addr: IoEventAddress, datamatch: Option<(u64, u32)>) -> Result<()> {
        let addr = io_address(addr);
        match datamatch {
            None => self.vm.unregister_ioevent(fd, &addr, NoDatamatch),
            Some((value, 8)) => self.vm.unregister_ioevent(fd, &addr, value),
            Some((value, _)) => self.vm.unregister_ioevent(fd, &addr, value as u32),
        }
        .map_err(ioctl("unregister an ioeventfd"))
    }

    fn set_msi_routes(&self, routes: &[MsiRoute]) -> Result<()> {
        let entries: Vec<kvm_irq_routing_entry> = routes
            .iter()
            .map(|route| kvm_irq_routing_entry {
                gsi: route.gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                u: kvm_irq_routing_entry__bindgen_ty_1 {
                    msi: kvm_irq_routing_msi {
                        address_lo: route.message.address as u32,
                        address_hi: (route.message.address >> 32) as u32,
                        data: route.message.data,
                        __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1 { pad: 0 },
                    },
                },
                ..Default::default()
            })
            .collect();
        let table =
            KvmIrqRouting::from_entries(&entries).map_err(|_| Error::Missing("room for so many interrupt routes"))?;
        self.vm.set_gsi_routing(&table).map_err(ioctl("set interrupt routes"))
    }

    fn signal_msi(&self, message: MsiMessage) -> Result<()> {
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        // 0 means that the guest blocked it (no such APIC, say): as on real hardware, the message is gone.
        self.vm.signal_msi(msi).map(|_| ()).map_err(ioctl("deliver an MSI"))
    }

    fn clock(&self) -> Result<ClockState> {
        Ok(ClockState {
            data: self.vm.get_clock().map_err(ioctl("read kvmclock"))?,
        })
    }

    fn set_clock(&self, state: &ClockState, advance_ns: u64) -> Result<()> {
        // Without flags KVM starts the clock at exactly this value; the saved host clocks are another boot's.
        let clock = kvm_bindings::kvm_clock_data {
            clock: state.data.clock.saturating_add(advance_ns),
            ..Default::default()
        };
        self.vm.set_clock(&clock).map_err(ioctl("set kvmclock"))
    }
}
