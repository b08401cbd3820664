//! The bus: address ranges -> devices, used once for I/O ports and once for MMIO.
//!
//! vCPU threads call in concurrently; every device locks its own state. The table is fixed once the machine is built
//! (PCI BARs that move are handled inside the PCI root, which owns its whole windows), so that look-ups take no lock.

use std::collections::BTreeMap;
use std::sync::Arc;

use thiserror::Error;

/// A device that is reached by reads and writes of 1 to 8 bytes.
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset` from the start of the range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset` from the start of the range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Errors of building a bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// Two devices want the same addresses.
    #[error("address range {base:#x}..{end:#x} overlaps a device that is already there")]
    Overlap {
        /// First address.
        base: u64,
        /// One past the last address.
        end: u64,
    },
    /// Empty range, or past the end of the address space.
    #[error("address range at {base:#x} of {len:#x} bytes is not valid")]
    Range {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// Address ranges and their devices.
#[derive(Default, Clone)]
pub struct Bus {
    ranges: BTreeMap<u64, (u64, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device at `base..base + len`.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Error> {
        let end = base
            .checked_add(len)
            .filter(|_| len > 0)
            .ok_or(Error::Range { base, len })?;
        let clash = self
            .ranges
            .range(..end)
            .next_back()
            .is_some_and(|(start, (l, _))| start + l > base);
        if clash {
            return Err(Error::Overlap { base, end });
        }
        self.ranges.insert(base, (len, device));
        Ok(())
    }

    fn find(&self, addr: u64) -> Option<(u64, &Arc<dyn BusDevice>)> {
        let (base, (len, device)) = self.ranges.range(..=addr).next_back()?;
        (addr - base < *len).then_some((addr - base, device))
    }

    /// Reads; addresses without a device read as all ones, as on real hardware. Tells whether a device was there.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        match self.find(addr) {
            Some((offset, device)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes; dropped when no device is there. Tells whether a device was there.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        match self.find(addr) {
            Some((offset, device)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }
}
