//! The root complex: bus 0 with its host bridge, reached through ECAM and through ports 0xCF8 to 0xCFF, and the windows
//! in which the functions' BARs lie.
//!
//! `functions` is fixed once the machine is built. The table of mapped BARs is exchanged as a whole after each write to
//! a configuration space, so that accesses to BARs take no lock but for its pointer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use devices::bus::BusDevice;
use serde::{Deserialize, Serialize};

use crate::PciDevice;
use crate::config_space::{self, ConfigSpaceState, Ids, PciConfigSpace};

/// Number of functions on the bus, host bridge included.
pub const MAX_DEVICES: usize = 32;
/// First I/O port of the configuration mechanism #1.
pub const PORT: u64 = 0xcf8;
/// Number of I/O ports.
pub const PORTS: u64 = 8;
/// Size in bytes of the ECAM window of one bus.
pub const ECAM_SIZE: u64 = 1 << 20;

/// Saved state of the root complex.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootState {
    /// Format of this struct: 1.
    pub version: u32,
    /// Address register of the configuration mechanism #1.
    pub address: u32,
    /// Host bridge.
    pub bridge: ConfigSpaceState,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Mapped {
    start: u64,
    end: u64,
    bar: u8,
    device: Arc<dyn PciDevice>,
}

/// Bus 0.
pub struct PciRoot {
    bridge: Mutex<PciConfigSpace>,
    functions: Vec<Arc<dyn PciDevice>>,
    mapped: RwLock<Arc<Vec<Mapped>>>,
    address: Mutex<u32>,
}

impl PciRoot {
    /// Puts `functions` at 0:1.0, 0:2.0 and so on, in order; at most [`MAX_DEVICES`] - 1.
    pub fn new(functions: Vec<Arc<dyn PciDevice>>) -> Arc<Self> {
        // Identifies itself as an Intel Q35-like host bridge without any of its registers.
        let bridge = PciConfigSpace::new(Ids {
            vendor: 0x8086,
            device: 0x0d57,
            class: [6, 0, 0],
            revision: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        let this = Self {
            bridge: Mutex::new(bridge),
            functions,
            mapped: RwLock::default(),
            address: Mutex::new(0),
        };
        this.remap();
        Arc::new(this)
    }

    /// Looks at all BARs anew, after configuration spaces were changed from outside (a restored state).
    pub fn remap(&self) {
        let mut mapped = Vec::new();
        for device in &self.functions {
            for (bar, start, size) in device.mapped_bars() {
                if let Some(end) = start.checked_add(size) {
                    mapped.push(Mapped {
                        start,
                        end,
                        bar,
                        device: device.clone(),
                    });
                }
            }
        }
        *self.mapped.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(mapped);
    }

    /// Saved state; the functions have their own.
    pub fn state(&self) -> RootState {
        RootState {
            version: 1,
            address: *lock(&self.address),
            bridge: lock(&self.bridge).state(),
        }
    }

    /// Loads a saved state. The functions' states must be loaded before: their BARs are looked at anew.
    pub fn set_state(&self, state: &RootState) -> Result<(), config_space::Error> {
        if state.version != 1 {
            return Err(config_space::Error::State("root complex of another version"));
        }
        lock(&self.bridge).set_state(&state.bridge)?;
        *lock(&self.address) = state.address;
        self.remap();
        Ok(())
    }

    fn config_read(&self, devfn: u8, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        match devfn {
            0 => lock(&self.bridge).read(usize::from(offset), data),
            n if n & 7 == 0 => {
                if let Some(device) = self.functions.get(usize::from(n >> 3) - 1) {
                    device.config_read(offset, data);
                }
            }
            _ => {}
        }
    }

    fn config_write(&self, devfn: u8, offset: u16, data: &[u8]) {
        match devfn {
            0 => lock(&self.bridge).write(usize::from(offset), data),
            n if n & 7 == 0 => {
                if let Some(device) = self.functions.get(usize::from(n >> 3) - 1) {
                    device.config_write(offset, data);
                    self.remap();
                }
            }
            _ => {}
        }
    }

    fn find(&self, addr: u64, len: usize) -> Option<(Arc<dyn PciDevice>, u8, u64)> {
        let mapped = self.mapped.read().unwrap_or_else(PoisonError::into_inner).clone();
        let hit = mapped
            .iter()
            .find(|m| m.start <= addr && addr < m.end && m.end - addr >= len as u64)?;
        Some((hit.device.clone(), hit.bar, addr - hit.start))
    }
}

/// The ECAM window (PCI Express Base, 7.2.2), bus 0 only.
pub struct Ecam(pub Arc<PciRoot>);

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.config_read((offset >> 12) as u8, (offset & 0xfff) as u16, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.config_write((offset >> 12) as u8, (offset & 0xfff) as u16, data);
    }
}

/// Configuration mechanism #1: address at 0xCF8, data at 0xCFC to 0xCFF.
pub struct Ports(pub Arc<PciRoot>);

impl Ports {
    fn target(&self, offset: u64) -> Option<(u8, u16)> {
        let address = *lock(&self.0.address);
        let enabled_bus_0 = address >> 31 == 1 && address >> 16 & 0xff == 0;
        enabled_bus_0.then_some(((address >> 8) as u8, (address & 0xfc) as u16 + (offset - 4) as u16))
    }
}

impl BusDevice for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&lock(&self.0.address).to_le_bytes());
        } else if offset >= 4
            && let Some((devfn, register)) = self.target(offset)
        {
            self.0.config_read(devfn, register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, [a, b, c, d]) = (offset, data) {
            let address = u32::from_le_bytes([*a, *b, *c, *d]);
            *lock(&self.0.address) = address;
        } else if offset >= 4
            && let Some((devfn, register)) = self.target(offset)
        {
            self.0.config_write(devfn, register, data);
        }
    }
}

/// A window of guest addresses in which BARs lie.
pub struct Window {
    /// The bus.
    pub root: Arc<PciRoot>,
    /// First address of the window.
    pub base: u64,
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, bar, at)) = self.root.find(self.base + offset, data.len()) {
            device.bar_read(bar, at, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((device, bar, at)) = self.root.find(self.base + offset, data.len()) {
            device.bar_write(bar, at, data);
        }
    }
}
