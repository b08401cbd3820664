//! Physical memory, which is mapped one to one: what the boot loader tells of it, the page tables beyond the first GiB,
//! the heap, and the arena of the memory dirtier.

use alloc::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use alloc::string::String;
use alloc::vec::Vec;

use guest_core::acpi;
use guest_core::bytes::{u32_at, u64_at};
use spinning_top::RawSpinlock;
use talc::TalcLock;
use talc::source::Manual;

#[global_allocator]
static HEAP: TalcLock<RawSpinlock, Manual> = TalcLock::new(Manual);

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// A page of the identity map.
const LARGE_PAGE: u64 = 2 * MIB;
const PAGE: usize = 4096;
/// What one top-level entry maps; nothing above is reached.
const MAPPABLE: u64 = 512 * GIB;
/// The share of RAM that becomes heap: one in so many.
const HEAP_SHARE: u64 = 3;
const HEAP_MAX: u64 = 512 * MIB;
const HEAP_MIN: u64 = 40 * MIB;
const CMDLINE_MAX: usize = 4096;
const MAP_MAX: usize = 128;

const PRESENT_WRITABLE_USER: u64 = 7;
const LARGE: u64 = 1 << 7;
/// Write-through and cache disabled.
const UNCACHED: u64 = 0x18;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

unsafe extern "C" {
    static start_info: u64;
    static image_end: u8;
    static mut pdpt: [u64; 512];
}

/// A stretch of RAM.
#[derive(Debug, Clone, Copy)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
}

/// What the boot loader told.
pub struct BootInfo {
    /// Command line.
    pub cmdline: String,
    /// Address of the RSDP; 0 if unknown.
    pub rsdp: u64,
    /// RAM above 1 MiB that is neither image nor heap, in whole pages.
    pub arena: Vec<Region>,
    /// Bytes of RAM.
    pub ram: u64,
}

/// Memory at an address that is known to be readable: RAM or firmware tables below 4 GiB.
pub struct Physical;

impl acpi::Memory for Physical {
    fn read(&self, address: u64, len: usize) -> Option<&[u8]> {
        let end = address.checked_add(len as u64)?;
        if address == 0 || end > 4 * GIB {
            return None;
        }
        map(address, len as u64, false);
        // SAFETY: mapped just now; firmware tables and boot information are read-only from here on. Addresses without
        // memory read as ones.
        Some(unsafe { core::slice::from_raw_parts(address as *const u8, len) })
    }
}

/// Zeroed memory that a device may use: its physical address is its address. Never freed.
pub fn dma(len: usize, align: usize) -> *mut u8 {
    let layout = Layout::from_size_align(len.max(1), align.max(16)).unwrap_or(Layout::new::<u128>());
    // SAFETY: the layout is not empty.
    let memory = unsafe { alloc_zeroed(layout) };
    if memory.is_null() {
        handle_alloc_error(layout);
    }
    memory
}

/// Adds `len` bytes at `start` to the identity map; what is mapped already stays as it is.
pub fn map(start: u64, len: u64, device: bool) {
    let end = start.saturating_add(len);
    assert!(end <= MAPPABLE, "address {end:#x} is out of reach");
    let flags = PRESENT_WRITABLE_USER | LARGE | if device { UNCACHED } else { 0 };
    let mut page = start & !(LARGE_PAGE - 1);
    while page < end {
        // SAFETY: the tables are identity-mapped, writable from ring 3, and changed by the first processor alone.
        // Entries only go from absent to present, which needs no flush of the translation buffers.
        unsafe {
            let table = &raw mut pdpt[(page / GIB) as usize];
            if table.read_volatile() & 1 == 0 {
                table.write_volatile(dma(PAGE, PAGE) as u64 | PRESENT_WRITABLE_USER);
            }
            let entry = ((table.read_volatile() & ADDRESS) as *mut u64).add((page % GIB / LARGE_PAGE) as usize);
            if entry.read_volatile() & 1 == 0 {
                entry.write_volatile(page | flags);
            }
        }
        page += LARGE_PAGE;
    }
}

fn low(address: u64, len: usize) -> &'static [u8] {
    if address == 0 || address.saturating_add(len as u64) > GIB {
        return &[];
    }
    // SAFETY: within the first GiB, which is mapped from the start; the boot loader's structures do not change.
    unsafe { core::slice::from_raw_parts(address as *const u8, len) }
}

/// RAM above 1 MiB by the boot loader's memory map.
fn ram(info: &[u8]) -> impl Iterator<Item = Region> + use<'_> {
    const RAM: u32 = 1;
    let count = (u32_at(info, 48) as usize).min(MAP_MAX);
    low(u64_at(info, 40), 24 * count)
        .chunks_exact(24)
        .filter(|entry| u32_at(entry, 16) == RAM)
        .map(|entry| Region {
            start: u64_at(entry, 0).max(MIB),
            end: u64_at(entry, 0).saturating_add(u64_at(entry, 8)).min(MAPPABLE),
        })
        .filter(|region| region.start < region.end)
}

/// Reads the boot loader's information (hvm_start_info), makes the heap, maps all RAM.
pub fn init() -> BootInfo {
    const MAGIC: u32 = 0x336e_c578;
    // SAFETY: written by boot.s before ring 3 was entered.
    let info = low(unsafe { (&raw const start_info).read_volatile() } & 0xffff_ffff, 56);
    assert!(
        u32_at(info, 0) == MAGIC && u32_at(info, 4) >= 1,
        "no PVH start information with memory map"
    );
    let image = (&raw const image_end as u64).next_multiple_of(LARGE_PAGE);
    let total: u64 = ram(info).map(|r| r.end - r.start).sum();
    let wanted = (total / HEAP_SHARE).clamp(HEAP_MIN, HEAP_MAX);
    let heap_end = ram(info)
        .filter(|r| r.start < image && image < r.end)
        .map(|r| r.end.min(GIB).min(image + wanted))
        .next()
        .unwrap_or(image);
    assert!(
        heap_end > image + HEAP_MIN / 2,
        "too little memory: {} MiB",
        total / MIB
    );
    // SAFETY: RAM of which nothing else is in use, within the first GiB, which is mapped.
    let claimed = unsafe { HEAP.lock().claim(image as *mut u8, (heap_end - image) as usize) };
    assert!(claimed.is_some(), "the heap was refused");

    let mut arena = Vec::new();
    for region in ram(info) {
        map(region.start, region.end - region.start, false);
        let holds_image = region.start < image && image < region.end;
        let start = if holds_image { heap_end } else { region.start };
        let (start, end) = (start.next_multiple_of(PAGE as u64), region.end & !(PAGE as u64 - 1));
        if start < end {
            arena.push(Region { start, end });
        }
    }
    let text = low(u64_at(info, 24), CMDLINE_MAX);
    let len = text.iter().position(|b| *b == 0).unwrap_or(0);
    BootInfo {
        cmdline: String::from_utf8_lossy(&text[..len]).into_owned(),
        rsdp: u64_at(info, 32),
        arena,
        ram: total,
    }
}
