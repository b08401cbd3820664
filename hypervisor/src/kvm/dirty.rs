//! KVM's dirty ring (KVM API 8.29): each vCPU reports the pages that it wrote in a ring shared with this process.
//!
//! A ring belongs to its vCPU; whoever harvests collects all rings under one mutex into `slots`, one bitmap per slot,
//! and lets KVM protect the collected pages again. vCPUs whose ring is full collect by themselves and run on, so
//! nothing outside of the backend knows which of the two logs is in use.
//!
//! Since Linux 6.16, KVM_RESET_DIRTY_RINGS stops early when a signal is pending, and forgets up to 64 pages that it has
//! taken out of the ring by then: they stay writable and are never logged again. A kicked vCPU whose ring is full is such
//! a case. So signals are blocked meanwhile, and every collected page must be in the count that KVM returns; if one is
//! not, the log is incomplete, and says so until logging is started anew. What this does not see is a stop signal, which
//! cannot be blocked, between KVM's taking the very last entry and its next look at the ring.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::{VcpuFd, VmFd};

use super::hot::{Hot, NO_SLOT, Page};
use crate::error::{Error, Result};
use crate::{DirtyWord, PAGE_SIZE};

const GFN_DIRTY: u32 = 1;
const GFN_RESET: u32 = 2;

vmm_sys_util::ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, kvm_bindings::KVMIO, 0xc7);

/// The mapped ring of one vCPU.
struct Ring {
    entries: *mut kvm_dirty_gfn,
    len: u32,
    next: u32,
}

// SAFETY: the mapping belongs to this struct alone and is only touched under `Rings::state`.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd, len: u32) -> Result<Self> {
        let bytes = len as usize * size_of::<kvm_dirty_gfn>();
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as i64;
        // SAFETY: a fresh shared mapping of the vCPU's ring; KVM checks offset and length.
        let entries = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset,
            )
        };
        if entries == libc::MAP_FAILED {
            let source = io::Error::last_os_error();
            return Err(Error::Ioctl {
                what: "map a dirty ring",
                source,
            });
        }
        Ok(Self {
            entries: entries.cast(),
            len,
            next: 0,
        })
    }

    /// Takes every reported page; gives how many there were. What `page` gives for one is protected when the ring is reset
    /// (`kvm_dirty_ring_reset` reads slot and offset from the entry).
    fn collect(&mut self, mut page: impl FnMut(Page) -> Option<Page>) -> u32 {
        let mut taken = 0;
        while taken < self.len {
            // SAFETY: `next` is below `len`, the mapping has `len` entries.
            let entry = unsafe { self.entries.add((self.next % self.len) as usize) };
            // SAFETY: the field is a properly aligned u32 in the mapping; KVM and this process access it atomically.
            let flags = unsafe { AtomicU32::from_ptr(std::ptr::addr_of_mut!((*entry).flags)) };
            if flags.load(Ordering::Acquire) & (GFN_DIRTY | GFN_RESET) != GFN_DIRTY {
                break;
            }
            // SAFETY: a dirty entry is not written by KVM until it was reset.
            let (slot, offset) = unsafe { ((*entry).slot, (*entry).offset) };
            let (slot, offset) = page((slot & 0xffff, offset)).unwrap_or((NO_SLOT, 0));
            // SAFETY: as above; KVM reads it when the ring is reset, after `flags` said that it may.
            unsafe { ((*entry).slot, (*entry).offset) = (slot, offset) };
            flags.store(GFN_RESET, Ordering::Release);
            self.next = (self.next + 1) % self.len;
            taken += 1;
        }
        taken
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length and nobody else knows it.
        unsafe { libc::munmap(self.entries.cast(), self.len as usize * size_of::<kvm_dirty_gfn>()) };
    }
}

/// The bitmap of a slot, and which of its words have bits.
#[derive(Default)]
struct SlotLog {
    words: Vec<u64>,
    used: Vec<usize>,
}

impl SlotLog {
    fn set(&mut self, page: u64) {
        let (index, bit) = ((page / 64) as usize, page % 64);
        if self.words.len() <= index {
            self.words.resize(index + 1, 0);
        }
        let word = &mut self.words[index];
        if *word == 0 {
            self.used.push(index);
        }
        *word |= 1 << bit;
    }

    /// Takes everything.
    fn take(&mut self, mut f: impl FnMut(usize, u64)) {
        self.used.sort_unstable();
        for index in self.used.drain(..) {
            f(index, std::mem::take(&mut self.words[index]));
        }
    }
}

#[derive(Default)]
struct State {
    rings: Vec<Ring>,
    slots: BTreeMap<u32, SlotLog>,
    /// Entries collected that KVM did not take back yet.
    open: u32,
    /// Pages may be written without being logged.
    incomplete: bool,
    hot: Hot,
}

/// All signals of this thread are blocked as long as it lives; none is lost.
struct BlockedSignals(libc::sigset_t);

impl BlockedSignals {
    fn new() -> Self {
        // SAFETY: all-zero sets are valid and are filled by the calls; the mask is this thread's own.
        unsafe {
            let (mut all, mut old): (libc::sigset_t, libc::sigset_t) = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old);
            Self(old)
        }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the mask that this thread had; the value is not sent to another thread.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}

/// The rings of all vCPUs of a VM.
pub(super) struct Rings {
    // A descriptor of its own: a vCPU may outlive the VM's struct.
    vm: OwnedFd,
    entries: u32,
    state: Mutex<State>,
}

impl Rings {
    /// `entries` per vCPU.
    pub(super) fn new(vm: &VmFd, entries: u32) -> Result<Self> {
        // SAFETY: `vm` keeps the descriptor open for the time of this call.
        let vm = unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) }
            .as_fd()
            .try_clone_to_owned();
        let vm = vm.map_err(|source| Error::Ioctl {
            what: "duplicate the VM's descriptor",
            source,
        })?;
        Ok(Self {
            vm,
            entries,
            state: Mutex::default(),
        })
    }

    /// Maps the ring of a new vCPU.
    pub(super) fn add(&self, vcpu: &VcpuFd) -> Result<()> {
        let ring = Ring::map(vcpu, self.entries)?;
        self.state().rings.push(ring);
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves all reported pages to the bitmaps and lets KVM log them anew.
    pub(super) fn collect(&self) -> Result<()> {
        self.collect_locked(&mut self.state())
    }

    fn collect_locked(&self, state: &mut State) -> Result<()> {
        let State {
            rings,
            slots,
            open,
            hot,
            ..
        } = state;
        for ring in rings {
            *open += ring.collect(|page| {
                let mut log = |(slot, page)| slots.entry(slot).or_default().set(page);
                let protect = hot.give_back(page);
                log(page);
                if let Some(cold) = protect
                    && cold != page
                {
                    // Written perhaps since the last harvest.
                    log(cold);
                }
                protect
            });
        }
        if state.open == 0 {
            return Ok(());
        }
        let blocked = BlockedSignals::new();
        // SAFETY: the ioctl has no argument; `vm` is this struct's own descriptor.
        let reset = unsafe { libc::ioctl(self.vm.as_raw_fd(), KVM_RESET_DIRTY_RINGS()) };
        let source = io::Error::last_os_error();
        drop(blocked);
        if reset < 0 && source.kind() != io::ErrorKind::Interrupted {
            return Err(Error::Ioctl {
                what: "reset the dirty rings",
                source,
            });
        }
        state.open = state.open.saturating_sub(u32::try_from(reset).unwrap_or(0));
        state.incomplete |= state.open > 0;
        Ok(())
    }

    /// Every page is about to be protected anew. None may be hot from here on: a vCPU whose ring is full collects by itself,
    /// and what it left writable after that would never be logged.
    pub(super) fn prepare(&self) {
        let mut state = self.state();
        state.hot.clear();
        state.incomplete = false;
    }

    /// Every page was protected anew since [`Rings::prepare`]: forgets what was logged.
    pub(super) fn restart(&self) -> Result<()> {
        let mut state = self.state();
        self.collect_locked(&mut state)?;
        state.slots.values_mut().for_each(|log| log.take(|_, _| ()));
        if state.incomplete { Err(Error::DirtyLog) } else { Ok(()) }
    }

    /// See [`crate::Vm::keep_hot`]. `unmap` takes the mapping of a region, given by its first page, away from KVM for a
    /// moment; false: it cannot, and its pages stay hot.
    pub(super) fn keep_hot(
        &self,
        most: usize,
        cold: &[Page],
        mut unmap: impl FnMut(Page) -> Result<bool>,
    ) -> Result<usize> {
        let mut state = self.state();
        let State { slots, hot, .. } = &mut *state;
        hot.set_most(most);
        if most > 0 && cold.is_empty() {
            // No region has more cold pages than before.
            return Ok(hot.count());
        }
        hot.note_cold(cold);
        for region in hot.cold_regions() {
            if unmap(region)? {
                for (slot, page) in hot.cool_region(region) {
                    // Written perhaps since the last harvest.
                    slots.entry(slot).or_default().set(page);
                }
            }
        }
        Ok(hot.count())
    }

    /// Collects, then takes everything, ascending; hot pages only `with_hot`.
    pub(super) fn take(&self, with_hot: bool, out: &mut Vec<DirtyWord>) -> Result<()> {
        let mut state = self.state();
        self.collect_locked(&mut state)?;
        if state.incomplete {
            return Err(Error::DirtyLog);
        }
        let State { slots, hot, .. } = &mut *state;
        let pages = hot.harvest();
        for &(slot, page) in pages.iter().filter(|_| with_hot) {
            slots.entry(slot).or_default().set(page);
        }
        for (slot, log) in slots {
            let slot = *slot;
            log.take(|index, bits| out.push(DirtyWord { slot, index, bits }));
        }
        Ok(())
    }
}
