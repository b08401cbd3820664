//! The little of ACPI that the guest needs: how to power off and reset, and which processors there are.

use alloc::vec::Vec;

use crate::bytes::{u32_at, u64_at};

/// Physical memory that can be read.
pub trait Memory {
    /// `len` bytes at `address`.
    fn read(&self, address: u64, len: usize) -> Option<&[u8]>;
}

/// A register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// An I/O port.
    Port(u16),
    /// A byte of memory.
    Memory(u64),
}

/// How to enter S5.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sleep {
    /// Hardware-reduced ACPI: write this byte to the sleep control register.
    Control(Register, u8),
    /// Write this word to PM1a control; ACPI mode is entered by writing the byte to the SMI command port, if given.
    Pm1a {
        /// PM1a control port.
        port: u16,
        /// Sleep type and enable.
        value: u16,
        /// SMI command port and value.
        enable: Option<(u16, u8)>,
    },
}

/// What the tables say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Platform {
    /// How to power off.
    pub sleep: Option<Sleep>,
    /// How to reset.
    pub reset: Option<(Register, u8)>,
    /// APIC ids of the enabled processors.
    pub processors: Vec<u32>,
}

const SLEEP_ENABLE_BYTE: u8 = 1 << 5;
const SLEEP_ENABLE_WORD: u16 = 1 << 13;
/// No table is larger.
const TABLE_MAX: usize = 1 << 20;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |a, b| a.wrapping_add(*b))
}

fn table<M: Memory>(memory: &M, address: u64) -> Option<&[u8]> {
    let len = u32_at(memory.read(address, 36)?, 4) as usize;
    if !(36..=TABLE_MAX).contains(&len) {
        return None;
    }
    memory.read(address, len).filter(|bytes| sum(bytes) == 0)
}

/// A generic address structure (ACPI 6.5, 5.2.3.2).
fn register(fadt: &[u8], at: usize) -> Option<Register> {
    let address = u64_at(fadt, at + 4);
    match (fadt.get(at)?, address) {
        (_, 0) => None,
        (0, _) => Some(Register::Memory(address)),
        (1, _) => u16::try_from(address).ok().map(Register::Port),
        _ => None,
    }
}

/// Sleep type of S5 for PM1a: the first element of the package \_S5 in the DSDT.
fn s5(dsdt: &[u8]) -> Option<u8> {
    const PACKAGE: u8 = 0x12;
    const BYTE_PREFIX: u8 = 0x0a;
    let at = dsdt.windows(5).position(|w| w[..4] == *b"_S5_" && w[4] == PACKAGE)? + 5;
    let length_bytes = 1 + usize::from(dsdt.get(at)? >> 6);
    let element = at + length_bytes + 1;
    match *dsdt.get(element)? {
        BYTE_PREFIX => dsdt.get(element + 1).copied(),
        n @ (0 | 1) => Some(n),
        _ => None,
    }
}

fn fadt<M: Memory>(memory: &M, fadt: &[u8], platform: &mut Platform) {
    const RESET_SUPPORTED: u32 = 1 << 10;
    const HARDWARE_REDUCED: u32 = 1 << 20;
    let flags = u32_at(fadt, 112);
    if flags & RESET_SUPPORTED != 0 {
        platform.reset = register(fadt, 116).zip(fadt.get(128).copied());
    }
    let dsdt = match u64_at(fadt, 140) {
        0 => u64::from(u32_at(fadt, 40)),
        address => address,
    };
    let Some(kind) = table(memory, dsdt).and_then(s5) else {
        return;
    };
    platform.sleep = if flags & HARDWARE_REDUCED != 0 {
        register(fadt, 244).map(|r| Sleep::Control(r, (kind & 7) << 2 | SLEEP_ENABLE_BYTE))
    } else {
        let command = u16::try_from(u32_at(fadt, 48)).ok().filter(|p| *p != 0);
        u16::try_from(u32_at(fadt, 64))
            .ok()
            .filter(|p| *p != 0)
            .map(|port| Sleep::Pm1a {
                port,
                value: u16::from(kind & 7) << 10 | SLEEP_ENABLE_WORD,
                enable: command.zip(fadt.get(52).copied().filter(|v| *v != 0)),
            })
    };
}

fn madt(madt: &[u8], platform: &mut Platform) {
    const ENABLED: u32 = 1;
    let mut at = 44;
    while at + 2 <= madt.len() {
        let len = usize::from(madt[at + 1]);
        let Some(entry) = madt.get(at..at + len).filter(|e| e.len() >= 2) else {
            return;
        };
        match entry[0] {
            0 if u32_at(entry, 4) & ENABLED != 0 => platform.processors.push(u32::from(entry[3])),
            9 if u32_at(entry, 8) & ENABLED != 0 => platform.processors.push(u32_at(entry, 4)),
            _ => {}
        }
        at += len;
    }
}

/// Reads the tables from the RSDP at `rsdp` on. What is missing or broken is left out.
pub fn read<M: Memory>(memory: &M, rsdp: u64) -> Platform {
    let mut platform = Platform::default();
    let Some(root) = memory
        .read(rsdp, 20)
        .filter(|r| r.starts_with(b"RSD PTR ") && sum(r) == 0)
    else {
        return platform;
    };
    let extended = memory.read(rsdp, 36).filter(|r| r[15] >= 2 && sum(r) == 0);
    let (address, width) = match extended.map(|r| u64_at(r, 24)) {
        Some(xsdt) if xsdt != 0 => (xsdt, 8),
        _ => (u64::from(u32_at(root, 16)), 4),
    };
    let Some(index) = table(memory, address) else {
        return platform;
    };
    for entry in index[36..].chunks_exact(width) {
        let address = if width == 8 {
            u64_at(entry, 0)
        } else {
            u64::from(u32_at(entry, 0))
        };
        let Some(found) = table(memory, address) else { continue };
        match &found[..4] {
            b"FACP" => fadt(memory, found, &mut platform),
            b"APIC" => madt(found, &mut platform),
            _ => {}
        }
    }
    platform
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Ram(Vec<u8>);

    impl Memory for Ram {
        fn read(&self, address: u64, len: usize) -> Option<&[u8]> {
            let at = usize::try_from(address).ok()?;
            self.0.get(at..at.checked_add(len)?)
        }
    }

    impl Ram {
        fn put(&mut self, at: usize, bytes: &[u8]) {
            self.0[at..at + bytes.len()].copy_from_slice(bytes);
        }

        fn table(&mut self, at: usize, signature: &[u8], body: &[u8]) {
            let mut bytes = vec![0; 36];
            bytes[..4].copy_from_slice(signature);
            bytes.extend_from_slice(body);
            let len = bytes.len() as u32;
            bytes[4..8].copy_from_slice(&len.to_le_bytes());
            bytes[9] = 0u8.wrapping_sub(sum(&bytes));
            self.put(at, &bytes);
        }
    }

    fn gas(space: u8, address: u64) -> Vec<u8> {
        let mut out = vec![space, 8, 0, 1];
        out.extend_from_slice(&address.to_le_bytes());
        out
    }

    fn machine(reduced: bool, xsdt: bool) -> Ram {
        let mut ram = Ram(vec![0; 0x4000]);
        let mut body = vec![0; 276 - 36];
        let mut set = |at: usize, bytes: &[u8]| body[at - 36..at - 36 + bytes.len()].copy_from_slice(bytes);
        set(40, &0x1800u32.to_le_bytes());
        set(48, &0xb2u32.to_le_bytes());
        set(52, &[2]);
        set(64, &0x604u32.to_le_bytes());
        set(112, &(1u32 << 10 | u32::from(reduced) << 20).to_le_bytes());
        set(116, &gas(1, 0xcf9));
        set(128, &[0xf]);
        set(244, &gas(1, 0x600));
        ram.table(0x1000, b"FACP", &body);
        // \_S5 as package of four: byte 5, byte 5, zero, zero.
        ram.table(0x1800, b"DSDT", b"\x08_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00");
        let mut body = vec![0; 8];
        body.extend_from_slice(&[0, 8, 0, 0, 1, 0, 0, 0, 0, 8, 1, 1, 1, 0, 0, 0, 0, 8, 2, 2, 0, 0, 0, 0]);
        body.extend_from_slice(&[1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        body.extend_from_slice(&[9, 16, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        ram.table(0x2000, b"APIC", &body);
        if xsdt {
            ram.table(
                0x3000,
                b"XSDT",
                &[0x1000u64.to_le_bytes(), 0x2000u64.to_le_bytes()].concat(),
            );
        } else {
            ram.table(
                0x3000,
                b"RSDT",
                &[0x1000u32.to_le_bytes(), 0x2000u32.to_le_bytes()].concat(),
            );
        }
        let mut rsdp = vec![0; 36];
        rsdp[..8].copy_from_slice(b"RSD PTR ");
        if xsdt {
            rsdp[15] = 2;
            rsdp[24..32].copy_from_slice(&0x3000u64.to_le_bytes());
        } else {
            rsdp[16..20].copy_from_slice(&0x3000u32.to_le_bytes());
        }
        rsdp[8] = 0u8.wrapping_sub(sum(&rsdp[..20]));
        rsdp[32] = 0u8.wrapping_sub(sum(&rsdp));
        ram.put(0x100, &rsdp);
        ram
    }

    #[test]
    fn hardware_reduced() {
        let found = read(&machine(true, true), 0x100);
        assert_eq!(
            found.sleep,
            Some(Sleep::Control(Register::Port(0x600), 5 << 2 | 1 << 5))
        );
        assert_eq!(found.reset, Some((Register::Port(0xcf9), 0xf)));
        assert_eq!(found.processors, vec![0, 1, 256]);
    }

    #[test]
    fn with_fixed_hardware() {
        let found = read(&machine(false, false), 0x100);
        let sleep = Sleep::Pm1a {
            port: 0x604,
            value: 5 << 10 | 1 << 13,
            enable: Some((0xb2, 2)),
        };
        assert_eq!(found.sleep, Some(sleep));
        assert_eq!(found.processors, vec![0, 1, 256]);
    }

    #[test]
    fn broken_tables_are_left_out() {
        let whole = machine(true, true);
        assert_eq!(read(&whole, 0x3ff0), Platform::default());
        assert_eq!(read(&whole, u64::MAX), Platform::default());
        // Any damaged byte gives an answer, if not the same one.
        for at in (0x100..0x124)
            .chain(0x1000..0x1120)
            .chain(0x2000..0x2060)
            .chain(0x3000..0x3040)
        {
            let mut ram = machine(true, true);
            ram.0[at] ^= 0xff;
            let _ = read(&ram, 0x100);
        }
        let mut ram = machine(true, true);
        ram.0[0x1050] ^= 1;
        assert_eq!((read(&ram, 0x100).reset, read(&ram, 0x100).processors.len()), (None, 3));
    }
}
