//! Loads a kernel (PVH ELF or bzImage, told apart by content), initramfs and command line into guest RAM and prepares
//! what the kernel's entry code expects: `hvm_start_info` (Xen's x86/HVM direct boot ABI, version 1) or the zero page
//! with page tables and GDT (Linux 64-bit boot protocol).
//!
//! Images are hostile: whatever they say is checked against RAM before it is used.

use std::io::{Read, Seek, SeekFrom};

use hypervisor::BootRegisters;
use linux_loader::loader::{BzImage, Elf, KernelLoader, PvhBootCapability};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, ReadVolatile};

use crate::layout;

const GDT: u64 = 0x500;
const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const MEMORY_MAP: u64 = 0x6100;
const ZERO_PAGE: u64 = 0x7000;
const STACK: u64 = 0x8ff0;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORIES: u64 = 0xb000;
const CMDLINE: u64 = 0x2_0000;

/// Longest command line in bytes that Linux keeps (COMMAND_LINE_SIZE - 1).
pub const CMDLINE_MAX: usize = 2047;
/// Where a bzImage's protected-mode part goes.
const BZIMAGE_START: u64 = 0x20_0000;
/// Most program headers that a kernel may have.
const PROGRAM_HEADERS_MAX: u16 = 128;
const PAGE: u64 = 4096;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Why a kernel was not loaded.
#[derive(Debug, Error)]
pub enum Error {
    /// Neither ELF nor bzImage.
    #[error("the kernel is neither an ELF file with a PVH entry nor an x86 bzImage")]
    Unknown,
    /// An ELF file without PVH entry.
    #[error("the ELF kernel has no PVH entry note (Linux: CONFIG_PVH); use a bzImage or a kernel with it")]
    NoPvh,
    /// A bzImage without the 64-bit entry.
    #[error("the bzImage cannot be entered in 64-bit mode (boot protocol {0:#x}; at least 0x20c with XLF_KERNEL_64)")]
    No64BitEntry(u16),
    /// The image contradicts itself or the machine.
    #[error("the kernel image is not valid: {0}")]
    Image(String),
    /// Does not fit.
    #[error("{what} needs RAM up to {end:#x}, usable RAM ends at {limit:#x}: give the VM more memory")]
    TooLarge {
        /// What does not fit.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// Where it must end.
        limit: u64,
    },
    /// The command line is too long.
    #[error("the command line has {len} bytes, the kernel takes {max}")]
    Cmdline {
        /// Bytes given.
        len: usize,
        /// Bytes that the kernel takes.
        max: usize,
    },
    /// The command line has a NUL byte in it.
    #[error("the command line contains a NUL byte")]
    CmdlineNul,
    /// Reading a file.
    #[error("cannot read the {what}: {source}")]
    Read {
        /// Which file.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// Writing guest RAM.
    #[error("cannot write {what} to guest RAM at {address:#x}: {reason}")]
    Write {
        /// What was written.
        what: &'static str,
        /// Guest address.
        address: u64,
        /// Why not.
        reason: String,
    },
}

fn write<M: GuestMemoryBackend>(memory: &M, what: &'static str, address: u64, data: &[u8]) -> Result<(), Error> {
    memory
        .write_slice(data, GuestAddress(address))
        .map_err(|e| Error::Write {
            what,
            address,
            reason: e.to_string(),
        })
}

fn read_at<F: Read + Seek>(file: &mut F, what: &'static str, offset: u64, data: &mut [u8]) -> Result<(), Error> {
    file.seek(SeekFrom::Start(offset))
        .and_then(|_| file.read_exact(data))
        .map_err(|source| Error::Read { what, source })
}

fn u16_at(data: &[u8], at: usize) -> u16 {
    data.get(at..at + 2)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u16::from_le_bytes)
}

fn u32_at(data: &[u8], at: usize) -> u32 {
    data.get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

fn u64_at(data: &[u8], at: usize) -> u64 {
    data.get(at..at + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

/// Loads everything; the ACPI tables must be there already, their RSDP at `rsdp`. Gives the boot vCPU's registers.
pub fn load<M, F>(
    memory: &M,
    kernel: &mut F,
    initramfs: Option<&mut F>,
    cmdline: &str,
    rsdp: u64,
) -> Result<BootRegisters, Error>
where
    M: GuestMemoryBackend,
    F: Read + ReadVolatile + Seek,
{
    let ram_size: u64 = memory.iter().map(|r| r.len()).sum();
    let size = kernel
        .seek(SeekFrom::End(0))
        .map_err(|source| Error::Read { what: "kernel", source })?;
    let mut head = vec![0; size.min(PAGE) as usize];
    read_at(kernel, "kernel", 0, &mut head)?;
    if head.starts_with(b"\x7fELF") {
        load_pvh(memory, ram_size, kernel, &head, initramfs, cmdline, rsdp)
    } else if head.get(0x202..0x206) == Some(b"HdrS") {
        load_bzimage(memory, ram_size, kernel, &head, initramfs, cmdline, rsdp)
    } else {
        Err(Error::Unknown)
    }
}

fn load_cmdline<M: GuestMemoryBackend>(memory: &M, cmdline: &str, max: usize) -> Result<(), Error> {
    if cmdline.len() > max {
        return Err(Error::Cmdline {
            len: cmdline.len(),
            max,
        });
    }
    if cmdline.contains('\0') {
        return Err(Error::CmdlineNul);
    }
    write(memory, "the command line", CMDLINE, cmdline.as_bytes())?;
    write(memory, "the command line", CMDLINE + cmdline.len() as u64, &[0])
}

/// Puts the initramfs as high as it can be below `limit` and above `kernel_end`; gives (address, size).
fn load_initramfs<M, F>(memory: &M, file: Option<&mut F>, kernel_end: u64, limit: u64) -> Result<(u64, u64), Error>
where
    M: GuestMemoryBackend,
    F: Read + ReadVolatile + Seek,
{
    let Some(file) = file else { return Ok((0, 0)) };
    let read = |source| Error::Read {
        what: "initramfs",
        source,
    };
    let size = file.seek(SeekFrom::End(0)).map_err(read)?;
    if size == 0 {
        return Ok((0, 0));
    }
    let too_large = || Error::TooLarge {
        what: "the initramfs",
        end: kernel_end.saturating_add(size),
        limit,
    };
    let address = limit.checked_sub(size).ok_or_else(too_large)? & !(PAGE - 1);
    if address < kernel_end {
        return Err(too_large());
    }
    file.rewind().map_err(read)?;
    memory
        .read_exact_volatile_from(GuestAddress(address), file, size as usize)
        .map_err(|e| Error::Write {
            what: "the initramfs",
            address,
            reason: e.to_string(),
        })?;
    Ok((address, size))
}

/// (address, length, type) of the memory that the kernel is told of.
fn memory_map(ram_size: u64) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::CONVENTIONAL_END, E820_RAM),
        (
            layout::ACPI_START,
            layout::EXTENDED_START - layout::ACPI_START,
            E820_RESERVED,
        ),
        (
            layout::EXTENDED_START,
            layout::low_ram_end(ram_size).saturating_sub(layout::EXTENDED_START),
            E820_RAM,
        ),
        (layout::ECAM_START, layout::ECAM_SIZE, E820_RESERVED),
    ];
    map.extend(
        layout::ram_regions(ram_size)
            .into_iter()
            .skip(1)
            .map(|(base, len)| (base, len, E820_RAM)),
    );
    map
}

/// Checks the program headers: every segment in RAM above 1 MiB. Gives the end of the highest.
fn check_elf<F: Read + Seek>(kernel: &mut F, head: &[u8], limit: u64) -> Result<u64, Error> {
    const ELFCLASS64: u8 = 2;
    const MACHINE_X86_64: u16 = 62;
    const PT_LOAD: u32 = 1;
    const PHDR: usize = 56;
    let invalid = |reason: String| Err(Error::Image(reason));
    if head.len() < 64 || head[4] != ELFCLASS64 || u16_at(head, 18) != MACHINE_X86_64 {
        return invalid("not a 64-bit x86 ELF file".into());
    }
    let (offset, size, count) = (u64_at(head, 32), u16_at(head, 54), u16_at(head, 56));
    if usize::from(size) != PHDR || count == 0 || count > PROGRAM_HEADERS_MAX {
        return invalid(format!("{count} program headers of {size} bytes"));
    }
    let file_size = kernel
        .seek(SeekFrom::End(0))
        .map_err(|source| Error::Read { what: "kernel", source })?;
    let mut headers = vec![0; usize::from(count) * PHDR];
    read_at(kernel, "kernel", offset, &mut headers)?;
    let mut kernel_end = 0;
    for header in headers.chunks_exact(PHDR) {
        let (from, paddr) = (u64_at(header, 8), u64_at(header, 24));
        let (in_file, in_memory) = (u64_at(header, 32), u64_at(header, 40));
        if from.checked_add(in_file).is_none_or(|end| end > file_size) {
            return invalid(format!(
                "segment at file offset {from:#x} of {in_file:#x} bytes is past the end"
            ));
        }
        if u32_at(header, 0) != PT_LOAD || in_memory == 0 {
            continue;
        }
        let end = paddr.saturating_add(in_memory.max(in_file));
        if paddr < layout::EXTENDED_START {
            return invalid(format!("segment at {paddr:#x} is below 1 MiB"));
        }
        if end > limit {
            return Err(Error::TooLarge {
                what: "the kernel",
                end,
                limit,
            });
        }
        kernel_end = end.max(kernel_end);
    }
    if kernel_end == 0 {
        return invalid("no segment to load".into());
    }
    Ok(kernel_end)
}

fn load_pvh<M, F>(
    memory: &M,
    ram_size: u64,
    kernel: &mut F,
    head: &[u8],
    initramfs: Option<&mut F>,
    cmdline: &str,
    rsdp: u64,
) -> Result<BootRegisters, Error>
where
    M: GuestMemoryBackend,
    F: Read + ReadVolatile + Seek,
{
    const MAGIC: u32 = 0x336e_c578;
    let limit = layout::low_ram_end(ram_size);
    let kernel_end = check_elf(kernel, head, limit)?;
    let loaded = Elf::load(memory, None, kernel, None).map_err(|e| Error::Image(e.to_string()))?;
    let PvhBootCapability::PvhEntryPresent(GuestAddress(entry)) = loaded.pvh_boot_cap else {
        return Err(Error::NoPvh);
    };
    if !(layout::EXTENDED_START..kernel_end).contains(&entry) {
        return Err(Error::Image(format!("PVH entry {entry:#x} is outside of the kernel")));
    }
    load_cmdline(memory, cmdline, CMDLINE_MAX)?;
    let (initramfs_at, initramfs_size) = load_initramfs(memory, initramfs, kernel_end, limit)?;

    let map = memory_map(ram_size);
    let mut info = Vec::with_capacity(56);
    info.extend_from_slice(&MAGIC.to_le_bytes());
    info.extend_from_slice(&1u32.to_le_bytes());
    info.extend_from_slice(&0u32.to_le_bytes());
    info.extend_from_slice(&u32::from(initramfs_size > 0).to_le_bytes());
    for word in [if initramfs_size > 0 { MODULES } else { 0 }, CMDLINE, rsdp, MEMORY_MAP] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    info.extend_from_slice(&(map.len() as u32).to_le_bytes());
    info.extend_from_slice(&0u32.to_le_bytes());
    write(memory, "hvm_start_info", START_INFO, &info)?;
    let module: Vec<u8> = [initramfs_at, initramfs_size, 0, 0]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect();
    write(memory, "the module list", MODULES, &module)?;
    let mut entries = Vec::new();
    for (base, len, kind) in map {
        entries.extend_from_slice(&base.to_le_bytes());
        entries.extend_from_slice(&len.to_le_bytes());
        entries.extend_from_slice(&u64::from(kind).to_le_bytes());
    }
    write(memory, "the memory map", MEMORY_MAP, &entries)?;
    Ok(BootRegisters::Pvh {
        entry,
        start_info: START_INFO,
    })
}

fn load_bzimage<M, F>(
    memory: &M,
    ram_size: u64,
    kernel: &mut F,
    head: &[u8],
    initramfs: Option<&mut F>,
    cmdline: &str,
    rsdp: u64,
) -> Result<BootRegisters, Error>
where
    M: GuestMemoryBackend,
    F: Read + ReadVolatile + Seek,
{
    const HEADER: usize = 0x1f1;
    const XLF_KERNEL_64: u16 = 1;
    const STARTUP_64: u64 = 0x200;
    const ACPI_RSDP: usize = 0x70;
    const E820_COUNT: usize = 0x1e8;
    const E820_TABLE: usize = 0x2d0;

    let version = u16_at(head, 0x206);
    if version < 0x20c || u16_at(head, 0x236) & XLF_KERNEL_64 == 0 {
        return Err(Error::No64BitEntry(version));
    }
    let limit = layout::low_ram_end(ram_size);
    // The kernel unpacks itself where it is loaded or at its preferred address, whichever is higher.
    let (preferred, init_size) = (u64_at(head, 0x258), u64::from(u32_at(head, 0x260)));
    let kernel_end = preferred.max(BZIMAGE_START).saturating_add(init_size);
    if kernel_end > limit {
        return Err(Error::TooLarge {
            what: "the kernel",
            end: kernel_end,
            limit,
        });
    }
    let loaded = BzImage::load(memory, Some(GuestAddress(BZIMAGE_START)), kernel, None)
        .map_err(|e| Error::Image(e.to_string()))?;
    if loaded.kernel_end > limit || loaded.kernel_end <= BZIMAGE_START + STARTUP_64 {
        return Err(Error::Image(format!("the kernel ends at {:#x}", loaded.kernel_end)));
    }
    let kernel_end = kernel_end.max(loaded.kernel_end);
    load_cmdline(memory, cmdline, CMDLINE_MAX.min(u32_at(head, 0x238) as usize))?;
    let initrd_limit = limit.min(u64::from(u32_at(head, 0x22c)).saturating_add(1));
    let (initramfs_at, initramfs_size) = load_initramfs(memory, initramfs, kernel_end, initrd_limit)?;

    let mut zero_page = vec![0u8; PAGE as usize];
    // The setup header ends where its jump instruction's target says (Documentation/arch/x86/boot.rst).
    let header_end = (0x202 + usize::from(head[0x201])).min(head.len()).min(0x290);
    if header_end < 0x264 {
        return Err(Error::Image(format!("the setup header ends at {header_end:#x}")));
    }
    zero_page[HEADER..header_end].copy_from_slice(&head[HEADER..header_end]);
    let mut put = |at: usize, data: &[u8]| zero_page[at..at + data.len()].copy_from_slice(data);
    put(0x1fa, &0xffffu16.to_le_bytes()); // vid_mode: normal
    put(0x210, &[0xff]); // type_of_loader: unregistered
    put(0x214, &(BZIMAGE_START as u32).to_le_bytes());
    put(0x218, &(initramfs_at as u32).to_le_bytes());
    put(0x21c, &(initramfs_size as u32).to_le_bytes());
    put(0x228, &(CMDLINE as u32).to_le_bytes());
    put(ACPI_RSDP, &rsdp.to_le_bytes());
    let map = memory_map(ram_size);
    put(E820_COUNT, &[map.len() as u8]);
    for (i, (base, len, kind)) in map.iter().enumerate() {
        let at = E820_TABLE + 20 * i;
        put(at, &base.to_le_bytes());
        put(at + 8, &len.to_le_bytes());
        put(at + 16, &kind.to_le_bytes());
    }
    write(memory, "the zero page", ZERO_PAGE, &zero_page)?;
    let gdt_size = write_long_mode(memory)?;
    Ok(BootRegisters::Linux64 {
        entry: BZIMAGE_START + STARTUP_64,
        zero_page: ZERO_PAGE,
        pml4: PML4,
        gdt: GDT,
        gdt_size,
        stack: STACK,
    })
}

/// Identity page tables of 2 MiB pages for the first 4 GiB, and the GDT; gives the GDT's size.
fn write_long_mode<M: GuestMemoryBackend>(memory: &M) -> Result<u16, Error> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    write(memory, "page tables", PML4, &(PDPT | PRESENT_WRITABLE).to_le_bytes())?;
    for i in 0..4 {
        let directory = PAGE_DIRECTORIES + i * PAGE;
        write(
            memory,
            "page tables",
            PDPT + 8 * i,
            &(directory | PRESENT_WRITABLE).to_le_bytes(),
        )?;
        let entries: Vec<u8> = (0..512u64)
            .flat_map(|n| (((i * 512 + n) << 21) | PRESENT_WRITABLE | LARGE).to_le_bytes())
            .collect();
        write(memory, "page tables", directory, &entries)?;
    }
    // Null, unused, 64-bit code, data, TSS (two slots), as hypervisor::BootRegisters::Linux64 promises.
    let gdt: [u64; 6] = [
        0,
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x008f_8b00_0000_ffff,
        0,
    ];
    let bytes: Vec<u8> = gdt.iter().flat_map(|d| d.to_le_bytes()).collect();
    write(memory, "the GDT", GDT, &bytes)?;
    Ok(bytes.len() as u16)
}

#[cfg(test)]
mod tests;
