//! The guest physical address map. It depends on the RAM size alone, never on the host, so that both hosts of a
//! protected VM build the same machine.
//!
//! ```text
//! 0                RAM (boot structures below 640 KiB, see the kernel module)
//! 0xe_0000         ACPI tables
//! 0xf_fff0         real-mode reset vector
//! 0x10_0000        RAM, up to 3 GiB
//! 0xc000_0000      PCI window for 32-bit BARs
//! 0xe800_0000      ECAM of bus 0
//! 0xfec0_0000      IOAPIC; 0xfee0_0000 local APICs; 0xfffb_d000 TSS of KVM
//! 0x1_0000_0000    the rest of RAM
//! above RAM        PCI window for 64-bit BARs
//! ```

/// End of RAM below 4 GiB at most, and start of the device hole.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Start of RAM above the device hole.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// First address of the window for 32-bit BARs.
pub const PCI32_START: u64 = 0xc000_0000;
/// Size of the window for 32-bit BARs in bytes.
pub const PCI32_SIZE: u64 = ECAM_START - PCI32_START;
/// ECAM window of segment 0, bus 0 (PCI Express Base, 7.2.2).
pub const ECAM_START: u64 = 0xe800_0000;
/// Size of the ECAM window: one bus.
pub const ECAM_SIZE: u64 = 1 << 20;
/// The IOAPIC.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// The local APICs.
pub const LAPIC_START: u64 = 0xfee0_0000;
/// Three pages that KVM wants on Intel processors.
pub const TSS_START: u64 = 0xfffb_d000;
/// ACPI tables, RSDP first.
pub const ACPI_START: u64 = 0xe_0000;
/// Room for ACPI tables in bytes.
pub const ACPI_SIZE: u64 = RESET_VECTOR - ACPI_START;
/// Where a processor in real mode finds the firmware's first instruction (f000:fff0).
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// End of conventional RAM.
pub const CONVENTIONAL_END: u64 = 0xa_0000;
/// Start of extended RAM.
pub const EXTENDED_START: u64 = 0x10_0000;
/// Size of the window for 64-bit BARs in bytes.
pub const PCI64_SIZE: u64 = 32 << 30;

/// (guest address, length) of each piece of RAM of a machine with `size` bytes, ascending.
pub fn ram_regions(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(LOW_RAM_END);
    let mut regions = vec![(0, low)];
    if size > low {
        regions.push((HIGH_RAM_START, size - low));
    }
    regions
}

/// One past the last byte of RAM below the device hole.
pub fn low_ram_end(size: u64) -> u64 {
    size.min(LOW_RAM_END)
}

/// (first address, length) of the window for 64-bit BARs: above RAM, 4 GiB aligned.
pub fn pci64_window(ram_size: u64) -> (u64, u64) {
    let ram_end = HIGH_RAM_START.saturating_add(ram_size.saturating_sub(LOW_RAM_END));
    let base = ram_end.saturating_add((4 << 30) - 1) & !((4 << 30) - 1);
    (base, PCI64_SIZE)
}

/// RAM and the windows fit into `bits` bits of guest physical address.
pub fn fits(ram_size: u64, bits: u8) -> bool {
    let (base, len) = pci64_window(ram_size);
    bits >= 64 || base.checked_add(len).is_some_and(|end| end <= 1 << bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_hole_free() {
        assert_eq!(ram_regions(1 << 30), vec![(0, 1 << 30)]);
        assert_eq!(ram_regions(3 << 30), vec![(0, 3 << 30)]);
        assert_eq!(ram_regions(5 << 30), vec![(0, 3 << 30), (4 << 30, 2 << 30)]);
    }

    #[test]
    fn the_64_bit_window_is_above_ram() {
        for gib in [1u64, 3, 4, 8, 100] {
            let (base, _) = pci64_window(gib << 30);
            let (start, len) = ram_regions(gib << 30).pop().unwrap();
            assert!(base >= start + len && base >= HIGH_RAM_START && base % (4 << 30) == 0);
        }
        assert!(fits(8 << 30, 40));
        assert!(!fits(64 << 30, 36));
    }
}
