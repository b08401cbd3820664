//! ACPI tables of a hardware-reduced platform (ACPI 6.5): RSDP, XSDT, FADT, MADT, MCFG and a DSDT with the PCI host
//! bridge, COM1, the real-time clock, the processors, and the power button behind a generic event device.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, ONE, OpRegion, OpRegionSpace,
    Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::{GenericAddress, Sdt};
use acpi_tables::{Aml, AmlSink};
use devices::ged;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::layout;

const OEM: [u8; 6] = *b"FTVMM ";
const OEM_TABLE: [u8; 8] = *b"FTVMMTBL";
const COM1_PORT: u16 = 0x3f8;
const COM1_IRQ: u32 = 4;
const RTC_PORT: u16 = 0x70;

/// Why the tables are not in guest RAM.
#[derive(Debug, Error)]
pub enum Error {
    /// Too many processors.
    #[error("the ACPI tables of {len:#x} bytes do not fit into {max:#x} bytes")]
    TooLarge {
        /// Bytes that they need.
        len: usize,
        /// Bytes there are.
        max: u64,
    },
    /// Guest RAM refused them.
    #[error("cannot write the ACPI tables to guest RAM: {0}")]
    Write(String),
}

fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut sdt = Sdt::new(*signature, 36, revision, OEM, OEM_TABLE, 1);
    sdt.append_slice(body);
    sdt
}

fn fadt(dsdt: u64) -> Sdt {
    const PWR_BUTTON: u32 = 1 << 4;
    const SLP_BUTTON: u32 = 1 << 5;
    const RESET_REG_SUP: u32 = 1 << 10;
    const HW_REDUCED: u32 = 1 << 20;
    const VGA_NOT_PRESENT: u16 = 1 << 2;
    let port = |n: u64| GenericAddress::io_port_address::<u8>((ged::PORT + n) as u16);
    let mut fadt = Sdt::new(*b"FACP", 276, 6, OEM, OEM_TABLE, 1);
    fadt.write(40, dsdt as u32);
    fadt.write(109, VGA_NOT_PRESENT);
    fadt.write(112, PWR_BUTTON | SLP_BUTTON | RESET_REG_SUP | HW_REDUCED);
    fadt.write(116, port(2));
    fadt.write(128, ged::RESET_VALUE);
    fadt.write(131, 5u8);
    fadt.write(140, dsdt);
    fadt.write(244, port(0));
    fadt.write(256, port(1));
    fadt
}

fn madt(vcpus: u8) -> Sdt {
    let mut body = Vec::new();
    body.extend_from_slice(&(layout::LAPIC_START as u32).to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    for id in 0..vcpus {
        // Processor local APIC: uid, APIC id, enabled.
        body.extend_from_slice(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    body.extend_from_slice(&[1, 12, 0, 0]);
    body.extend_from_slice(&(layout::IOAPIC_START as u32).to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    // Local APIC NMI: LINT1 of all processors.
    body.extend_from_slice(&[4, 6, 0xff, 0, 0, 1]);
    table(b"APIC", 5, &body)
}

fn mcfg() -> Sdt {
    let mut body = vec![0; 8];
    body.extend_from_slice(&layout::ECAM_START.to_le_bytes());
    // Segment 0, buses 0 to 0.
    body.extend_from_slice(&[0; 8]);
    table(b"MCFG", 1, &body)
}

fn pci_host(aml: &mut Vec<u8>, ram_size: u64) {
    let (base64, len64) = layout::pci64_window(ram_size);
    Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_CCA".into(), &ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &AddressSpace::new_bus_number(0u16, 0u16),
                    &IO::new(0xcf8, 0xcf8, 1, 8),
                    &AddressSpace::new_io(0u16, 0xcf7u16, None),
                    &AddressSpace::new_io(0xd00u16, 0xffffu16, None),
                    &AddressSpace::new_memory(
                        AddressSpaceCacheable::NotCacheable,
                        true,
                        layout::PCI32_START as u32,
                        (layout::PCI32_START + layout::PCI32_SIZE - 1) as u32,
                        None,
                    ),
                    &AddressSpace::new_memory(
                        AddressSpaceCacheable::NotCacheable,
                        true,
                        base64,
                        base64 + (len64 - 1),
                        None,
                    ),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
    // Claims the ECAM window, without which Linux does not use it.
    Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(
                    true,
                    layout::ECAM_START as u32,
                    layout::ECAM_SIZE as u32,
                )]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

fn board(aml: &mut Vec<u8>) {
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, COM1_IRQ),
                    &IO::new(COM1_PORT, COM1_PORT, 1, 8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
    Device::new(
        "RTC_".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(RTC_PORT, RTC_PORT, 1, 2)]),
            ),
        ],
    )
    .to_aml_bytes(aml);
    Device::new(
        "PWRB".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &ZERO),
        ],
    )
    .to_aml_bytes(aml);
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, u32::from(ged::IRQ))]),
            ),
            &OpRegion::new("GREG".into(), OpRegionSpace::SystemIO, &((ged::PORT + 3) as u16), &ONE),
            &Field::new(
                "GREG".into(),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"EVTS", 8)],
            ),
            // Reading EVTS clears it, so it is read once.
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &Store::new(&Local(0), &Path::new("EVTS")),
                    &And::new(&Local(1), &Local(0), &ged::EVENT_POWER_BUTTON),
                    &If::new(&Local(1), vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &0x80u8)]),
                ],
            ),
        ],
    )
    .to_aml_bytes(aml);
}

fn processors(aml: &mut Vec<u8>, vcpus: u8) {
    for id in 0..vcpus {
        Device::new(
            format!("C{id:03X}").as_str().into(),
            vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &id)],
        )
        .to_aml_bytes(aml);
    }
}

fn dsdt(ram_size: u64, vcpus: u8) -> Sdt {
    let mut children = Vec::new();
    pci_host(&mut children, ram_size);
    board(&mut children);
    processors(&mut children, vcpus);
    let mut aml = Scope::raw("\\_SB_".into(), children);
    let s5 = ged::SLEEP_TYPE_S5;
    Name::new("_S5_".into(), &Package::new(vec![&s5, &s5, &ZERO, &ZERO])).to_aml_bytes(&mut aml);
    table(b"DSDT", 6, &aml)
}

/// All tables, to be put at `address`; the RSDP comes first.
pub fn tables(address: u64, ram_size: u64, vcpus: u8) -> Vec<u8> {
    let mut out = vec![0; 64];
    let mut place = |table: &Sdt| {
        let at = address + out.len() as u64;
        out.extend_from_slice(table.as_slice());
        out.resize(out.len().next_multiple_of(16), 0);
        at
    };
    let dsdt = place(&dsdt(ram_size, vcpus));
    let entries = [place(&fadt(dsdt)), place(&madt(vcpus)), place(&mcfg())];
    let body: Vec<u8> = entries.iter().flat_map(|a| a.to_le_bytes()).collect();
    let xsdt = place(&table(b"XSDT", 1, &body));
    let mut rsdp: Vec<u8> = Vec::new();
    let sink: &mut dyn AmlSink = &mut rsdp;
    Rsdp::new(OEM, xsdt).to_aml_bytes(sink);
    out[..rsdp.len()].copy_from_slice(&rsdp);
    out
}

/// What stands at the reset vector in place of a firmware: `mov al, 0xfe; out 0x64, al; hlt; jmp $-1`. Linux on a
/// hardware-reduced platform wants to reset by EFI, which is not there, and then jumps to the vector in real mode.
const RESET_CODE: [u8; 7] = [0xb0, 0xfe, 0xe6, ged::I8042_PORT as u8, 0xf4, 0xeb, 0xfd];

/// Writes the tables to their place in guest RAM, and code to the reset vector; gives the RSDP's address.
pub fn install<M: GuestMemoryBackend>(memory: &M, ram_size: u64, vcpus: u8) -> Result<u64, Error> {
    let bytes = tables(layout::ACPI_START, ram_size, vcpus);
    if bytes.len() as u64 > layout::ACPI_SIZE {
        return Err(Error::TooLarge {
            len: bytes.len(),
            max: layout::ACPI_SIZE,
        });
    }
    memory
        .write_slice(&bytes, GuestAddress(layout::ACPI_START))
        .and_then(|()| memory.write_slice(&RESET_CODE, GuestAddress(layout::RESET_VECTOR)))
        .map_err(|e| Error::Write(e.to_string()))?;
    Ok(layout::ACPI_START)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |a, b| a.wrapping_add(*b))
    }

    #[test]
    fn every_table_is_reachable_with_its_length_and_checksum() {
        for vcpus in [1u8, 2, 255] {
            let base = layout::ACPI_START;
            let bytes = tables(base, 4 << 30, vcpus);
            assert!(bytes.len() as u64 <= layout::ACPI_SIZE);
            let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            assert_eq!(&bytes[..8], b"RSD PTR ");
            assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
            let check = |address: u64, signature: &[u8]| {
                let at = (address - base) as usize;
                let len = u32_at(at + 4) as usize;
                assert_eq!(&bytes[at..at + 4], signature);
                assert_eq!(sum(&bytes[at..at + len]), 0);
                (at, len)
            };
            let (xsdt, len) = check(u64_at(24), b"XSDT");
            assert_eq!(len, 36 + 3 * 8);
            let (fadt, len) = check(u64_at(xsdt + 36), b"FACP");
            assert_eq!((len, u32_at(fadt + 112) >> 20 & 1), (276, 1));
            assert_eq!(u64_at(fadt + 244 + 4), ged::PORT);
            check(u64_at(fadt + 140), b"DSDT");
            let (_, len) = check(u64_at(xsdt + 44), b"APIC");
            assert_eq!(len, 44 + 8 * usize::from(vcpus) + 12 + 6);
            let (mcfg, len) = check(u64_at(xsdt + 52), b"MCFG");
            assert_eq!((len, u64_at(mcfg + 44)), (60, layout::ECAM_START));
        }
    }
}
