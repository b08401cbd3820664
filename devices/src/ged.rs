//! Power: the ACPI sleep and reset registers of a hardware-reduced platform (ACPI 6.5, 4.8.3.7, 4.8.3.6), the power
//! button by the generic event device (5.6.9), and the 8042's reset line, which a kernel tries when ACPI fails.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::bus::BusDevice;
use crate::interrupt::InterruptLine;
use crate::lock;

/// I/O port of the sleep control register; the sleep status register is the next, the reset register the one after.
pub const PORT: u64 = 0x600;
/// Number of I/O ports: sleep control, sleep status, reset, events.
pub const PORTS: u64 = 4;
/// Value for the reset register.
pub const RESET_VALUE: u8 = 1;
/// Sleep type of S5, as in the DSDT's \_S5.
pub const SLEEP_TYPE_S5: u8 = 5;
/// IOAPIC pin of the generic event device.
pub const IRQ: u8 = 9;
/// I/O port of the 8042's command register.
pub const I8042_PORT: u64 = 0x64;
/// Bit of the event register: the power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 1;

const SLEEP_ENABLE: u8 = 1 << 5;

/// What the guest asks of the machine.
pub trait MachineSignals: Send + Sync {
    /// Power off.
    fn shutdown(&self);
    /// Reset.
    fn reset(&self);
}

/// Saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GedState {
    /// Format of this struct: 1.
    pub version: u32,
    /// Events that the guest has not read.
    pub events: u8,
}

/// A saved state of another version.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("power management state of version {0}")]
pub struct StateError(u32);

/// The registers. The event register reads as the pending events and clears them.
pub struct Ged {
    events: Mutex<u8>,
    line: Arc<dyn InterruptLine>,
    signals: Arc<dyn MachineSignals>,
}

impl Ged {
    /// `line`: the interrupt of the generic event device, edge-triggered.
    pub fn new(line: Arc<dyn InterruptLine>, signals: Arc<dyn MachineSignals>) -> Arc<Self> {
        Arc::new(Self {
            events: Mutex::new(0),
            line,
            signals,
        })
    }

    /// Presses the power button.
    pub fn power_button(&self) {
        *lock(&self.events) |= EVENT_POWER_BUTTON;
        if let Err(e) = self.line.trigger() {
            log::error!("power button: {e}");
        }
    }

    /// Saved state.
    pub fn state(&self) -> GedState {
        GedState {
            version: 1,
            events: *lock(&self.events),
        }
    }

    /// Loads a saved state.
    pub fn set_state(&self, state: &GedState) -> Result<(), StateError> {
        if state.version != 1 {
            return Err(StateError(state.version));
        }
        *lock(&self.events) = state.events;
        Ok(())
    }
}

impl BusDevice for Ged {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (3, Some(byte)) = (offset, data.first_mut()) {
            *byte = std::mem::take(&mut *lock(&self.events));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(value) = data.first().copied() else { return };
        if offset == 0 && value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_S5 {
            self.signals.shutdown();
        } else if offset == 2 && value == RESET_VALUE {
            self.signals.reset();
        }
    }
}

/// The 8042 keyboard controller, of which only the reset line is wired.
pub struct I8042(pub Arc<dyn MachineSignals>);

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first() == Some(&0xfe) {
            self.0.reset();
        }
    }
}
