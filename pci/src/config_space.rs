//! The configuration space of one function: type 0 header, BARs, capabilities (PCI Local Bus 3.0, 6.1 to 6.7).
//!
//! Every byte has a write mask; what the guest may not change stays. BAR registers answer a size probe by themselves
//! because the address bits below the size are not writable.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Size in bytes of the space (PCI Express: 4 KiB).
pub const SIZE: usize = 4096;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITY_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
/// End of the conventional space, where capabilities live.
const CAPABILITIES_END: usize = 0x100;
const COMMAND_MEMORY: u8 = 1 << 1;
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// Who a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class, subclass, programming interface.
    pub class: [u8; 3],
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// Errors of building or loading a space.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// No room for a capability.
    #[error("no room for a capability of {0} bytes")]
    Full(usize),
    /// A BAR that cannot be.
    #[error("BAR {index} of {size:#x} bytes at {addr:#x}")]
    Bar {
        /// Number.
        index: u8,
        /// Address.
        addr: u64,
        /// Size in bytes.
        size: u64,
    },
    /// A saved state of another shape.
    #[error("saved configuration space: {0}")]
    State(&'static str),
}

#[derive(Debug, Clone, Copy)]
struct Bar {
    index: u8,
    size: u64,
}

/// Saved state: the bytes that a guest can change, with the rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigSpaceState {
    /// Format of this struct: 1.
    pub version: u32,
    /// The first 256 bytes; beyond them nothing is writable.
    pub bytes: Vec<u8>,
}

/// The configuration space.
pub struct PciConfigSpace {
    bytes: Box<[u8; SIZE]>,
    writable: Box<[u8; CAPABILITIES_END]>,
    bars: Vec<Bar>,
    next_capability: usize,
    last_pointer: usize,
}

impl PciConfigSpace {
    /// A function without BARs and capabilities.
    pub fn new(ids: Ids) -> Self {
        let mut this = Self {
            bytes: Box::new([0; SIZE]),
            writable: Box::new([0; CAPABILITIES_END]),
            bars: Vec::new(),
            next_capability: FIRST_CAPABILITY,
            last_pointer: CAPABILITY_POINTER,
        };
        this.put(0x00, &ids.vendor.to_le_bytes());
        this.put(0x02, &ids.device.to_le_bytes());
        this.put(0x08, &[ids.revision, ids.class[2], ids.class[1], ids.class[0]]);
        this.put(0x2c, &ids.subsystem_vendor.to_le_bytes());
        this.put(0x2e, &ids.subsystem.to_le_bytes());
        // I/O and memory decoding, bus mastering; interrupt disable.
        this.writable[COMMAND] = 0b0000_0111;
        this.writable[COMMAND + 1] = 0b0000_0100;
        // Cache line size and interrupt line are the guest's own notes.
        this.writable[0x0c] = 0xff;
        this.writable[0x3c] = 0xff;
        this
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Adds a 64-bit memory BAR, placed at `addr`; memory decoding is on from the start, as firmware leaves it.
    /// `size` must be a power of two of at least 16 bytes, `addr` a multiple of it, `index` 0 to 4.
    pub fn add_bar64(&mut self, index: u8, addr: u64, size: u64, prefetchable: bool) -> Result<(), Error> {
        if index > 4 || !size.is_power_of_two() || size < 16 || !addr.is_multiple_of(size) {
            return Err(Error::Bar { index, addr, size });
        }
        let at = BAR0 + 4 * usize::from(index);
        let flags = 0b0100 | u64::from(prefetchable) << 3;
        self.put(at, &(addr | flags).to_le_bytes());
        self.writable[at..at + 8].copy_from_slice(&(!(size - 1)).to_le_bytes());
        self.bars.push(Bar { index, size });
        self.bytes[COMMAND] |= COMMAND_MEMORY;
        Ok(())
    }

    /// Adds a capability: `body` follows the id and next-pointer bytes; `writable` has a mask for each of its bytes.
    /// Returns the capability's offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<usize, Error> {
        let at = self.next_capability;
        let end = at + 2 + body.len();
        if end > CAPABILITIES_END || writable.len() > body.len() {
            return Err(Error::Full(body.len()));
        }
        self.bytes[at] = id;
        self.put(at + 2, body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.bytes[self.last_pointer] = at as u8;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.last_pointer = at + 1;
        self.next_capability = end.next_multiple_of(4);
        Ok(at)
    }

    /// Reads; beyond the space all ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset + i).copied().unwrap_or(0xff);
        }
    }

    /// Writes what the guest may change.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (i, value) in data.iter().enumerate() {
            if let (Some(mask), Some(byte)) = (self.writable.get(offset + i), self.bytes.get_mut(offset + i)) {
                *byte = *byte & !mask | value & mask;
            }
        }
    }

    /// A little-endian 16-bit register.
    pub fn word(&self, offset: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Sets bytes that the guest may not write.
    pub fn set(&mut self, offset: usize, data: &[u8]) {
        for (i, value) in data.iter().enumerate() {
            if let Some(byte) = self.bytes.get_mut(offset + i) {
                *byte = *value;
            }
        }
    }

    /// The memory BARs that decode now: (number, address, size in bytes).
    pub fn mapped_bars(&self) -> Vec<(u8, u64, u64)> {
        if self.bytes[COMMAND] & COMMAND_MEMORY == 0 {
            return Vec::new();
        }
        let address = |bar: &Bar| {
            let mut bytes = [0; 8];
            self.read(BAR0 + 4 * usize::from(bar.index), &mut bytes);
            u64::from_le_bytes(bytes) & !0xf
        };
        self.bars
            .iter()
            .map(|bar| (bar.index, address(bar), bar.size))
            .collect()
    }

    /// Saved state.
    pub fn state(&self) -> ConfigSpaceState {
        ConfigSpaceState {
            version: 1,
            bytes: self.bytes[..CAPABILITIES_END].to_vec(),
        }
    }

    /// Loads a saved state of the same function.
    pub fn set_state(&mut self, state: &ConfigSpaceState) -> Result<(), Error> {
        if state.version != 1 || state.bytes.len() != CAPABILITIES_END {
            return Err(Error::State("another version or length"));
        }
        let fixed = |bytes: &[u8]| -> Vec<u8> { bytes.iter().zip(self.writable.iter()).map(|(b, w)| b & !w).collect() };
        let status = STATUS..STATUS + 2;
        let (mut ours, mut theirs) = (fixed(&self.bytes[..CAPABILITIES_END]), fixed(&state.bytes));
        ours[status.clone()].fill(0);
        theirs[status].fill(0);
        if ours != theirs {
            return Err(Error::State("it is another device's"));
        }
        self.bytes[..CAPABILITIES_END].copy_from_slice(&state.bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> PciConfigSpace {
        let mut space = PciConfigSpace::new(Ids {
            vendor: 0x1af4,
            device: 0x1041,
            class: [2, 0, 0],
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 1,
        });
        space.add_bar64(0, 0x1_0000_0000, 0x8_0000, true).unwrap();
        space
    }

    #[test]
    fn a_size_probe_reads_back_the_size_and_a_move_moves() {
        let mut space = space();
        assert_eq!(space.mapped_bars(), vec![(0, 0x1_0000_0000, 0x8_0000)]);
        space.write(COMMAND, &[0]);
        assert!(space.mapped_bars().is_empty());
        space.write(BAR0, &[0xff; 8]);
        let mut bar = [0; 8];
        space.read(BAR0, &mut bar);
        assert_eq!(!(u64::from_le_bytes(bar) & !0xf) + 1, 0x8_0000);
        space.write(BAR0, &0x20_0008_0000u64.to_le_bytes());
        space.write(COMMAND, &[2]);
        assert_eq!(space.mapped_bars(), vec![(0, 0x20_0008_0000, 0x8_0000)]);
    }

    #[test]
    fn capabilities_are_chained_and_only_their_writable_bytes_change() {
        let mut space = space();
        let first = space.add_capability(0x11, &[0, 0, 1], &[0, 0x80]).unwrap();
        let second = space.add_capability(0x09, &[0; 14], &[]).unwrap();
        let mut byte = [0];
        space.read(CAPABILITY_POINTER, &mut byte);
        assert_eq!(usize::from(byte[0]), first);
        space.read(first + 1, &mut byte);
        assert_eq!(usize::from(byte[0]), second);
        space.write(first, &[0xff; 8]);
        let mut body = [0; 5];
        space.read(first, &mut body);
        assert_eq!(body, [0x11, second as u8, 0, 0x80, 1]);
        assert_eq!(space.add_capability(9, &[0; 250], &[]), Err(Error::Full(250)));
    }

    #[test]
    fn a_state_of_another_device_is_refused() {
        let mut space = space();
        let mut state = space.state();
        space.set_state(&state).unwrap();
        state.bytes[0] ^= 1;
        assert!(space.set_state(&state).is_err());
        state.bytes.truncate(3);
        assert!(space.set_state(&state).is_err());
    }
}
