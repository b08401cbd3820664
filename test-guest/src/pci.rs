//! PCI by configuration mechanism #1 (ports 0xCF8 and 0xCFC): finding functions, their BARs, capabilities and MSI-X.

use alloc::vec::Vec;

use crate::cpu::{in32, out32};
use crate::memory;

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;

const COMMAND: u8 = 0x04;
const COMMAND_MEMORY: u32 = 1 << 1;
const COMMAND_MASTER: u32 = 1 << 2;
const COMMAND_INTX_OFF: u32 = 1 << 10;
const STATUS_CAPABILITIES: u32 = 1 << 20;
const BAR_0: u8 = 0x10;
const CAPABILITIES: u8 = 0x34;
const CAPABILITY_MSIX: u8 = 0x11;

/// Where BARs go that nobody placed: below the ECAM windows and APICs, above RAM.
const FREE_WINDOW: u64 = 0xd000_0000;

/// Where a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    bus: u8,
    device: u8,
    function: u8,
}

impl core::fmt::Display for Location {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}

/// A function.
#[derive(Debug, Clone)]
pub struct Function {
    /// Where.
    pub location: Location,
    /// Vendor and device id.
    pub id: (u16, u16),
}

impl Location {
    fn select(&self, register: u8) {
        let address = 1 << 31
            | u32::from(self.bus) << 16
            | u32::from(self.device) << 11
            | u32::from(self.function) << 8
            | u32::from(register & 0xfc);
        out32(ADDRESS, address);
    }

    /// Reads an aligned word of the configuration space.
    pub fn read(&self, register: u8) -> u32 {
        self.select(register);
        in32(DATA)
    }

    /// Writes an aligned word of the configuration space.
    pub fn write(&self, register: u8, value: u32) {
        self.select(register);
        out32(DATA, value);
    }
}

fn scan(bus: u8, depth: u8, found: &mut Vec<Function>) {
    const BRIDGE: u32 = 1;
    for device in 0..32 {
        for function in 0..8 {
            let location = Location { bus, device, function };
            let id = location.read(0);
            if id & 0xffff == 0xffff {
                if function == 0 {
                    break;
                }
                continue;
            }
            found.push(Function {
                location,
                id: (id as u16, (id >> 16) as u16),
            });
            let header = location.read(0x0c) >> 16;
            if header & 0x7f == BRIDGE {
                let secondary = (location.read(0x18) >> 8) as u8;
                if secondary > bus && depth < 8 {
                    scan(secondary, depth + 1, found);
                }
            }
            if function == 0 && header & 0x80 == 0 {
                break;
            }
        }
    }
}

/// All functions of bus 0 and of the buses behind its bridges.
pub fn functions() -> Vec<Function> {
    let mut found = Vec::new();
    scan(0, 0, &mut found);
    found
}

/// Gives out addresses for BARs that firmware has not placed.
pub struct Placer {
    next: u64,
}

impl Placer {
    /// Starts at the beginning of the window.
    pub fn new() -> Self {
        Self { next: FREE_WINDOW }
    }
}

impl Function {
    /// (id, position) of each capability.
    pub fn capabilities(&self) -> Vec<(u8, u8)> {
        let mut out = Vec::new();
        if self.location.read(COMMAND) & STATUS_CAPABILITIES == 0 {
            return out;
        }
        let mut at = self.location.read(CAPABILITIES) as u8 & 0xfc;
        // No list is longer than the space has words.
        while at >= 0x40 && out.len() < 48 {
            let head = self.location.read(at);
            out.push((head as u8, at));
            at = (head >> 8) as u8 & 0xfc;
        }
        out
    }

    /// Turns on memory decoding and bus mastering, turns off INTx.
    pub fn enable(&self) {
        let command = self.location.read(COMMAND) & 0xffff;
        self.location
            .write(COMMAND, command | COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_OFF);
    }

    /// Address and size of memory BAR `index`, mapped; placed first if nobody did.
    pub fn bar(&self, index: u8, placer: &mut Placer) -> Option<(u64, u64)> {
        const IO: u32 = 1;
        const TYPE_64: u32 = 4;
        if index > 5 {
            return None;
        }
        let register = BAR_0 + 4 * index;
        let low = self.location.read(register);
        if low & IO != 0 {
            return None;
        }
        let wide = low & 6 == TYPE_64 && index < 5;
        let high = if wide { self.location.read(register + 4) } else { 0 };
        let mut address = u64::from(high) << 32 | u64::from(low & !0xf);

        // Decoding is off while the size is asked for.
        let command = self.location.read(COMMAND) & 0xffff;
        self.location.write(COMMAND, command & !COMMAND_MEMORY);
        self.location.write(register, u32::MAX);
        let mut mask = u64::from(self.location.read(register) & !0xf) | 0xffff_ffff_0000_0000;
        if wide {
            self.location.write(register + 4, u32::MAX);
            mask = mask & 0xffff_ffff | u64::from(self.location.read(register + 4)) << 32;
        }
        let size = (!mask).wrapping_add(1);
        if address == 0 && size != 0 && size <= 1 << 28 {
            address = placer.next.next_multiple_of(size);
            placer.next = address + size;
        }
        self.location.write(register, address as u32 | low & 0xf);
        if wide {
            self.location.write(register + 4, (address >> 32) as u32);
        }
        self.location.write(COMMAND, command);
        if size == 0 || address == 0 {
            return None;
        }
        memory::map(address, size, true);
        Some((address, size))
    }

    /// Turns on MSI-X with entry 0 sending `vector` to the processor with APIC id `to`, the other entries masked.
    pub fn enable_msix(&self, placer: &mut Placer, to: u32, vector: u8) -> bool {
        const ENABLE: u32 = 1 << 31;
        const FUNCTION_MASK: u32 = 1 << 30;
        const ENTRY_MASK: u32 = 1;
        const MESSAGE: u32 = 0xfee0_0000;
        let Some((_, at)) = self.capabilities().into_iter().find(|(id, _)| *id == CAPABILITY_MSIX) else {
            return false;
        };
        let table = self.location.read(at + 4);
        let Some((base, size)) = self.bar((table & 7) as u8, placer) else {
            return false;
        };
        let offset = u64::from(table & !7);
        if offset + 16 > size {
            return false;
        }
        let control = self.location.read(at);
        self.location.write(at, control | ENABLE | FUNCTION_MASK);
        let entry = (base + offset) as *mut u32;
        for (word, value) in [(0, MESSAGE | to << 12), (1, 0), (2, u32::from(vector)), (3, 0)] {
            // SAFETY: entry 0 of the table, within a BAR that is mapped.
            unsafe { entry.add(word).write_volatile(value) };
        }
        let entries = (control >> 16 & 0x7ff) as u64 + 1;
        for other in 1..entries.min((size - offset) / 16) {
            // SAFETY: vector control of another entry of the table.
            unsafe { entry.add(4 * other as usize + 3).write_volatile(ENTRY_MASK) };
        }
        self.location.write(at, (control | ENABLE) & !FUNCTION_MASK);
        true
    }
}
