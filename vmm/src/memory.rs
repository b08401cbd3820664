//! Guest RAM: its mapping in this process, its KVM slots, its dirty pages, its copy in a snapshot.
//!
//! RAM is mapped once and stays mapped as long as [`GuestRam`] lives. Dirty pages come from two places: the
//! hypervisor's log (vCPUs) and the log that vm-memory keeps of the VMM's own writes; [`GuestRam::harvest_dirty`]
//! joins them.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use api::MemoryConfig;
use hypervisor::{DirtyWord, MemorySlot, PAGE_SIZE, Vm};
use thiserror::Error;
use virtio_devices::{DirtyPages, GuestMemory};
use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};

/// Errors of guest RAM.
#[derive(Debug, Error)]
pub enum Error {
    /// The size is zero, not a multiple of the page size, or over the limit.
    #[error("memory size {0} bytes: must be a multiple of {1} bytes, at least 2 MiB and at most 8 TiB")]
    Size(u64, u64),
    /// The kernel gave no memory.
    #[error("cannot map {size} bytes of guest RAM{hint}: {source}")]
    Map {
        /// Bytes asked for.
        size: u64,
        /// What to do.
        hint: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// vm-memory refused the layout.
    #[error("guest RAM layout: {0}")]
    Layout(String),
    /// The hypervisor refused a slot or its dirty log.
    #[error("guest RAM slot: {0}")]
    Slot(#[from] hypervisor::Error),
    /// An access outside of RAM.
    #[error("access to guest RAM at {gpa:#x}, {len} bytes: {reason}")]
    Access {
        /// Guest physical address.
        gpa: u64,
        /// Length in bytes.
        len: usize,
        /// What went wrong.
        reason: String,
    },
    /// Reading or writing the snapshot's memory file.
    #[error("memory file at offset {offset}: {source}")]
    File {
        /// Offset in bytes.
        offset: u64,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Pages `gpa .. gpa + count * 4096`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRange {
    /// Guest physical address of the first page.
    pub gpa: u64,
    /// Number of pages.
    pub count: u64,
}

/// The log of the VMM's own writes to a region.
fn own_writes(region: &GuestRegionMmap<DirtyPages>) -> &DirtyPages {
    std::ops::Deref::deref(region).bitmap()
}

/// All RAM of one VM.
pub struct GuestRam {
    memory: Arc<GuestMemory>,
    slots: Vec<MemorySlot>,
    private: bool,
}

fn memfd(size: u64, hugepage_size: Option<u64>) -> io::Result<File> {
    let mut flags = libc::MFD_CLOEXEC;
    if let Some(huge) = hugepage_size {
        flags |= libc::MFD_HUGETLB | (huge.trailing_zeros() << libc::MFD_HUGE_SHIFT);
    }
    // SAFETY: the name is a NUL-terminated constant, the flags are memfd_create(2)'s.
    let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nothing else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size)?;
    Ok(file)
}

impl GuestRam {
    /// Maps RAM as `config` says: anonymous memory (transparent huge pages unless `thp=off`), a memfd mapping when
    /// `shared=on`, huge pages of `hugepage_size` (2 MiB unless given) when `hugepages=on`.
    pub fn new(config: &MemoryConfig) -> Result<Self, Error> {
        let huge = config.hugepages.then(|| config.hugepage_size.unwrap_or(2 << 20));
        let unit = huge.unwrap_or(PAGE_SIZE);
        let valid_unit = unit.is_power_of_two() && unit >= PAGE_SIZE;
        if !valid_unit || !config.size.is_multiple_of(unit) || config.size < 2 << 20 || config.size > 8 << 40 {
            return Err(Error::Size(config.size, unit));
        }
        let file_backed = config.shared || config.hugepages;
        let hint = if config.hugepages {
            " (are enough huge pages reserved? see /proc/sys/vm/nr_hugepages)"
        } else {
            " (does this host have enough free memory?)"
        };
        let map_error = |source| Error::Map {
            size: config.size,
            hint,
            source,
        };
        let file = if file_backed {
            Some(Arc::new(memfd(config.size, huge).map_err(map_error)?))
        } else {
            None
        };
        let mut regions = Vec::new();
        let mut offset = 0;
        for (gpa, len) in arch::layout::ram_regions(config.size) {
            let prefault = if config.prefault { libc::MAP_POPULATE } else { 0 };
            let mut builder = MmapRegionBuilder::new_with_bitmap(len as usize, DirtyPages::with_len(len as usize))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
            builder = match &file {
                Some(file) => builder
                    .with_file_offset(FileOffset::from_arc(file.clone(), offset))
                    .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE | prefault),
                None => {
                    builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | prefault)
                }
            };
            let region = builder
                .build()
                .map_err(|e| map_error(io::Error::other(e.to_string())))?;
            if config.thp && !file_backed {
                // SAFETY: the range is the mapping just made; MADV_HUGEPAGE changes no content. A kernel without
                // transparent huge pages answers EINVAL, which costs speed and nothing else.
                unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_HUGEPAGE) };
            }
            if config.mergeable {
                // SAFETY: as above; MADV_MERGEABLE changes no content. A kernel without KSM answers EINVAL, and merges
                // nothing.
                unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_MERGEABLE) };
            }
            let region = GuestRegionMmap::new(region, GuestAddress(gpa))
                .ok_or_else(|| Error::Layout(format!("region at {gpa:#x} of {len:#x} bytes")))?;
            regions.push(region);
            offset += len;
        }
        let memory = GuestMemory::from_regions(regions).map_err(|e| Error::Layout(e.to_string()))?;
        let slots = memory
            .iter()
            .enumerate()
            .map(|(i, region)| MemorySlot {
                slot: i as u32,
                guest_addr: region.start_addr().0,
                size: region.len(),
                host_addr: region.as_ptr() as u64,
                readonly: false,
            })
            .collect();
        Ok(Self {
            memory: Arc::new(memory),
            slots,
            private: !file_backed,
        })
    }

    /// The memory, as devices see it.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// (guest physical address, size in bytes) of each region, ascending.
    pub fn regions(&self) -> Vec<(u64, u64)> {
        self.slots.iter().map(|s| (s.guest_addr, s.size)).collect()
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.slots.iter().map(|s| s.size).sum()
    }

    /// Gives all regions to the VM.
    pub fn attach(&self, vm: &dyn Vm) -> Result<(), Error> {
        for slot in &self.slots {
            vm.add_memory(*slot)?;
        }
        Ok(())
    }

    /// Appends the pages written since the last call, ascending, and clears both logs. `hot` as for [`Vm::harvest_dirty`].
    pub fn harvest_dirty(&self, vm: &dyn Vm, hot: bool, out: &mut Vec<PageRange>) -> Result<(), Error> {
        let mut log = Vec::new();
        vm.harvest_dirty(hot, &mut log)?;
        for (slot, region) in self.slots.iter().zip(self.memory.iter()) {
            let slot_number = slot.slot;
            own_writes(region).take(|index, bits| {
                log.push(DirtyWord {
                    slot: slot_number,
                    index,
                    bits,
                });
            });
        }
        // Two ascending stretches or a few, which is what this sort is quick with.
        log.sort_by_key(|word| (word.slot, word.index));
        for slot in &self.slots {
            let first = log.partition_point(|word| word.slot < slot.slot);
            let end = log.partition_point(|word| word.slot <= slot.slot);
            append_runs(slot, &log[first..end], out);
        }
        Ok(())
    }

    /// Forgets the VMM's own writes so far.
    pub fn clear_own_writes(&self) {
        for region in self.memory.iter() {
            own_writes(region).take(|_, _| ());
        }
    }

    /// Copies RAM at `gpa` to `buf`.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Error> {
        let len = buf.len();
        self.memory
            .read_slice(buf, GuestAddress(gpa))
            .map_err(|e| Error::Access {
                gpa,
                len,
                reason: e.to_string(),
            })
    }

    /// Copies `data` to RAM at `gpa`.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), Error> {
        self.memory
            .write_slice(data, GuestAddress(gpa))
            .map_err(|e| Error::Access {
                gpa,
                len: data.len(),
                reason: e.to_string(),
            })
    }

    /// Makes all RAM zero, as at power-on. The VM must be paused.
    pub fn zero(&self) -> Result<(), Error> {
        for (slot, region) in self.slots.iter().zip(self.memory.iter()) {
            if self.private {
                // SAFETY: the range is this region's whole private mapping; MADV_DONTNEED makes it read as zeroes and
                // keeps it mapped. No vCPU runs and no device works on it.
                let r = unsafe { libc::madvise(region.as_ptr().cast(), slot.size as usize, libc::MADV_DONTNEED) };
                if r != 0 {
                    let source = io::Error::last_os_error();
                    return Err(Error::Map {
                        size: slot.size,
                        hint: "",
                        source,
                    });
                }
                region.bitmap().mark_dirty(0, slot.size as usize);
                continue;
            }
            let zeroes = vec![0u8; 1 << 20];
            let mut done = 0;
            while done < slot.size {
                let n = (slot.size - done).min(zeroes.len() as u64) as usize;
                region
                    .write_slice(&zeroes[..n], MemoryRegionAddress(done))
                    .map_err(|e| Error::Access {
                        gpa: slot.guest_addr + done,
                        len: n,
                        reason: e.to_string(),
                    })?;
                done += n as u64;
            }
        }
        Ok(())
    }

    /// Writes all RAM to `file`, region after region; pages of zeroes are left as holes.
    pub fn save(&self, file: &File) -> Result<(), Error> {
        file.set_len(self.size())
            .map_err(|source| Error::File { offset: 0, source })?;
        self.walk(|ram, gpa, offset, buf| {
            ram.read(gpa, buf)?;
            if buf.iter().all(|b| *b == 0) {
                return Ok(());
            }
            file.write_all_at(buf, offset)
                .map_err(|source| Error::File { offset, source })
        })
    }

    /// Reads all RAM from a file that [`GuestRam::save`] wrote.
    pub fn load(&self, file: &File) -> Result<(), Error> {
        let len = file
            .metadata()
            .map_err(|source| Error::File { offset: 0, source })?
            .len();
        if len != self.size() {
            let source = io::Error::other(format!("has {len} bytes, the VM's RAM has {}", self.size()));
            return Err(Error::File { offset: 0, source });
        }
        self.walk(|ram, gpa, offset, buf| {
            file.read_exact_at(buf, offset)
                .map_err(|source| Error::File { offset, source })?;
            if buf.iter().all(|b| *b == 0) {
                return Ok(());
            }
            ram.write(gpa, buf)
        })
    }

    /// Calls `f(self, guest address, file offset, buffer)` for RAM in pieces of up to 64 KiB.
    fn walk(&self, mut f: impl FnMut(&Self, u64, u64, &mut [u8]) -> Result<(), Error>) -> Result<(), Error> {
        let mut buf = vec![0u8; 64 << 10];
        let mut offset = 0;
        for slot in &self.slots {
            let mut done = 0;
            while done < slot.size {
                let n = (slot.size - done).min(buf.len() as u64) as usize;
                f(self, slot.guest_addr + done, offset, &mut buf[..n])?;
                done += n as u64;
                offset += n as u64;
            }
        }
        Ok(())
    }
}

/// Appends what `words`, ascending by index, say; an index may come twice.
fn append_runs(slot: &MemorySlot, words: &[DirtyWord], out: &mut Vec<PageRange>) {
    let pages = slot.size / PAGE_SIZE;
    let mut run: Option<PageRange> = None;
    for same in words.chunk_by(|a, b| a.index == b.index) {
        let index = same[0].index as u64;
        let mut rest = same.iter().fold(0, |all, word| all | word.bits);
        while rest != 0 {
            let bit = u64::from(rest.trailing_zeros());
            rest &= rest - 1;
            let page = index * 64 + bit;
            if page >= pages {
                break;
            }
            let gpa = slot.guest_addr + page * PAGE_SIZE;
            match &mut run {
                Some(r) if r.gpa + r.count * PAGE_SIZE == gpa => r.count += 1,
                _ => {
                    out.extend(run.take());
                    run = Some(PageRange { gpa, count: 1 });
                }
            }
        }
    }
    out.extend(run);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(gpa: u64, pages: u64) -> MemorySlot {
        MemorySlot {
            slot: 0,
            guest_addr: gpa,
            size: pages * PAGE_SIZE,
            host_addr: 0,
            readonly: false,
        }
    }

    #[test]
    fn runs_join_neighbours_across_words_and_ignore_bits_past_the_end() {
        let mut out = Vec::new();
        let word = |index, bits| DirtyWord { slot: 0, index, bits };
        let words = [word(0, 1), word(0, 1 | 1 << 63), word(1, 0b11), word(2, u64::MAX)];
        append_runs(&slot(0x10_0000, 130), &words, &mut out);
        let page = |n: u64| 0x10_0000 + n * PAGE_SIZE;
        assert_eq!(
            out,
            vec![
                PageRange { gpa: page(0), count: 1 },
                PageRange {
                    gpa: page(63),
                    count: 3
                },
                PageRange {
                    gpa: page(128),
                    count: 2
                }
            ]
        );
    }
}
