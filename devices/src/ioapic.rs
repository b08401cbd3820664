//! The I/O APIC (82093AA), in userspace as KVM's split irqchip wants it: 24 pins at 0xfec0_0000.
//!
//! Interrupts go out as MSI messages through [`MsiSink`]; [`IoapicRoutes`] learns each pin's message, since KVM reports
//! an end of interrupt only for vectors that it knows of. Registers are behind one mutex; sink and routes are called
//! with it held.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::bus::BusDevice;
use crate::interrupt::{InterruptLine, MsiSink};
use crate::lock;

/// Number of pins.
pub const PINS: usize = 24;
/// Address of the register window.
pub const ADDRESS: u64 = 0xfec0_0000;
/// Size of the register window in bytes.
pub const SIZE: u64 = 0x1000;

const REG_SELECT: u64 = 0;
const REG_WINDOW: u64 = 0x10;
const REG_EOI: u64 = 0x40;
const VERSION: u32 = 0x20 | ((PINS as u32 - 1) << 16);

const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;

/// Learns the message of each pin.
pub trait IoapicRoutes: Send + Sync {
    /// Pin `pin` now sends `message` (address, data), or nothing (`None`: masked).
    fn pin_changed(&self, pin: u8, message: Option<(u64, u32)>);
}

/// Saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoapicState {
    /// Format of this struct: 1.
    pub version: u32,
    /// Selected register.
    pub select: u32,
    /// IOAPIC id register.
    pub id: u32,
    /// Redirection entries.
    pub entries: Vec<u64>,
    /// Levels of the pins, one bit each.
    pub levels: u32,
}

/// A saved state of another shape.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("IOAPIC state of version {version} with {entries} entries")]
pub struct StateError {
    version: u32,
    entries: usize,
}

/// The IOAPIC.
pub struct Ioapic {
    state: Mutex<IoapicState>,
    sink: Arc<dyn MsiSink>,
    routes: Arc<dyn IoapicRoutes>,
}

/// The MSI message of a redirection entry (Intel SDM 3A, 11.11; compatibility format).
fn message(entry: u64) -> (u64, u32) {
    let destination = entry >> 56;
    let logical = entry >> 11 & 1;
    let address = 0xfee0_0000 | destination << 12 | logical << 2;
    let data = (entry & 0x7ff) as u32 | (entry & LEVEL) as u32;
    (address, data | if entry & LEVEL != 0 { 1 << 14 } else { 0 })
}

impl Ioapic {
    /// All pins masked.
    pub fn new(sink: Arc<dyn MsiSink>, routes: Arc<dyn IoapicRoutes>) -> Arc<Self> {
        let state = IoapicState {
            version: 1,
            select: 0,
            id: 0,
            entries: vec![MASKED; PINS],
            levels: 0,
        };
        Arc::new(Self {
            state: Mutex::new(state),
            sink,
            routes,
        })
    }

    fn deliver(&self, state: &mut IoapicState, pin: usize) {
        let entry = state.entries[pin];
        if entry & MASKED != 0 || (entry & LEVEL != 0 && entry & REMOTE_IRR != 0) {
            return;
        }
        if entry & LEVEL != 0 {
            state.entries[pin] |= REMOTE_IRR;
        }
        let (address, data) = message(entry);
        if let Err(e) = self.sink.deliver(address, data) {
            log::warn!("IOAPIC pin {pin}: {e}");
        }
    }

    /// Sets the level of a pin; a rising edge, or a high level on a level-triggered pin, sends its message.
    pub fn set_level(&self, pin: u8, high: bool) {
        let pin = usize::from(pin);
        if pin >= PINS {
            return;
        }
        let mut state = lock(&self.state);
        let before = state.levels >> pin & 1 != 0;
        state.levels = state.levels & !(1 << pin) | u32::from(high) << pin;
        if high && !before {
            self.deliver(&mut state, pin);
        }
    }

    /// A vCPU finished with `vector`: level-triggered pins that are still high send again.
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut state = lock(&self.state);
        for pin in 0..PINS {
            let entry = state.entries[pin];
            if entry & LEVEL != 0 && entry & 0xff == u64::from(vector) && entry & REMOTE_IRR != 0 {
                state.entries[pin] &= !REMOTE_IRR;
                if state.levels >> pin & 1 != 0 {
                    self.deliver(&mut state, pin);
                }
            }
        }
    }

    fn read_register(state: &IoapicState) -> u32 {
        match state.select {
            0 => state.id,
            1 => VERSION,
            2 => state.id,
            n @ 0x10..=0x3f => {
                let entry = state.entries[(n as usize - 0x10) / 2];
                if n & 1 == 0 { entry as u32 } else { (entry >> 32) as u32 }
            }
            _ => 0,
        }
    }

    fn write_register(&self, state: &mut IoapicState, value: u32) {
        match state.select {
            0 => state.id = value & 0x0f00_0000,
            n @ 0x10..=0x3f => {
                let pin = (n as usize - 0x10) / 2;
                let entry = &mut state.entries[pin];
                if n & 1 == 0 {
                    let kept = *entry & (DELIVERY_STATUS | REMOTE_IRR);
                    *entry = *entry & !0xffff_ffff | u64::from(value) & 0x1_afff | kept;
                    if *entry & LEVEL == 0 {
                        *entry &= !REMOTE_IRR;
                    }
                } else {
                    *entry = *entry & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
                }
                let entry = *entry;
                self.announce(pin, entry);
                if entry & LEVEL != 0 && state.levels >> pin & 1 != 0 {
                    self.deliver(state, pin);
                }
            }
            _ => {}
        }
    }

    fn announce(&self, pin: usize, entry: u64) {
        self.routes
            .pin_changed(pin as u8, (entry & MASKED == 0).then(|| message(entry)));
    }

    /// Saved state.
    pub fn state(&self) -> IoapicState {
        lock(&self.state).clone()
    }

    /// Loads a saved state.
    pub fn set_state(&self, saved: &IoapicState) -> Result<(), StateError> {
        if saved.version != 1 || saved.entries.len() != PINS {
            return Err(StateError {
                version: saved.version,
                entries: saved.entries.len(),
            });
        }
        let mut state = lock(&self.state);
        *state = saved.clone();
        for (pin, entry) in state.entries.iter().enumerate() {
            self.announce(pin, *entry);
        }
        Ok(())
    }

    /// A device's line to pin `pin`.
    pub fn line(self: &Arc<Self>, pin: u8) -> Arc<Line> {
        Arc::new(Line {
            ioapic: self.clone(),
            pin,
        })
    }
}

impl BusDevice for Ioapic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        let value = match offset {
            REG_SELECT => state.select,
            REG_WINDOW => Self::read_register(&state),
            _ => 0,
        };
        data.fill(0);
        let bytes = value.to_le_bytes();
        let n = data.len().min(4);
        data[..n].copy_from_slice(&bytes[..n]);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        let n = data.len().min(4);
        bytes[..n].copy_from_slice(&data[..n]);
        let value = u32::from_le_bytes(bytes);
        match offset {
            REG_SELECT => lock(&self.state).select = value & 0xff,
            REG_WINDOW => self.write_register(&mut lock(&self.state), value),
            REG_EOI => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }
}

/// An interrupt line into the IOAPIC.
pub struct Line {
    ioapic: Arc<Ioapic>,
    pin: u8,
}

impl InterruptLine for Line {
    fn trigger(&self) -> std::io::Result<()> {
        self.ioapic.set_level(self.pin, true);
        self.ioapic.set_level(self.pin, false);
        Ok(())
    }

    fn set_level(&self, high: bool) -> std::io::Result<()> {
        self.ioapic.set_level(self.pin, high);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder {
        sent: Mutex<Vec<(u64, u32)>>,
        routes: Mutex<Vec<(u8, Option<(u64, u32)>)>>,
    }

    impl MsiSink for Recorder {
        fn deliver(&self, address: u64, data: u32) -> std::io::Result<()> {
            lock(&self.sent).push((address, data));
            Ok(())
        }
    }

    impl IoapicRoutes for Recorder {
        fn pin_changed(&self, pin: u8, message: Option<(u64, u32)>) {
            lock(&self.routes).push((pin, message));
        }
    }

    fn set(ioapic: &Ioapic, register: u32, value: u32) {
        ioapic.write(REG_SELECT, &register.to_le_bytes());
        ioapic.write(REG_WINDOW, &value.to_le_bytes());
    }

    fn made() -> (Arc<Ioapic>, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        (Ioapic::new(recorder.clone(), recorder.clone()), recorder)
    }

    #[test]
    fn edge_pin_sends_its_vector_to_its_cpu_once_an_edge() {
        let (ioapic, recorder) = made();
        ioapic.set_level(4, true);
        ioapic.set_level(4, false);
        assert!(lock(&recorder.sent).is_empty(), "masked");
        set(&ioapic, 0x10 + 9, 1 << 24);
        set(&ioapic, 0x10 + 8, 0x31);
        ioapic.line(4).trigger().unwrap();
        ioapic.line(4).trigger().unwrap();
        assert_eq!(*lock(&recorder.sent), vec![(0xfee0_1000, 0x31); 2]);
        assert_eq!(lock(&recorder.routes).last(), Some(&(4, Some((0xfee0_1000, 0x31)))));
    }

    #[test]
    fn level_pin_sends_again_after_the_end_of_interrupt_while_it_is_high() {
        let (ioapic, recorder) = made();
        set(&ioapic, 0x10 + 18, 0x8041);
        ioapic.set_level(9, true);
        ioapic.set_level(9, true);
        assert_eq!(lock(&recorder.sent).len(), 1);
        ioapic.end_of_interrupt(0x41);
        assert_eq!(lock(&recorder.sent).len(), 2);
        ioapic.set_level(9, false);
        ioapic.end_of_interrupt(0x41);
        assert_eq!(lock(&recorder.sent).len(), 2);
    }

    #[test]
    fn odd_accesses_are_harmless_and_state_survives() {
        let (ioapic, _) = made();
        for offset in 0..64 {
            for size in 1..=8 {
                let mut data = vec![0xff; size];
                ioapic.write(offset, &data);
                ioapic.read(offset, &mut data);
            }
        }
        for register in 0..=255u32 {
            set(&ioapic, register, u32::MAX);
        }
        let saved = ioapic.state();
        let (other, _) = made();
        other.set_state(&saved).unwrap();
        assert_eq!(other.state(), saved);
        assert!(
            other
                .set_state(&IoapicState {
                    entries: vec![0; 3],
                    ..saved
                })
                .is_err()
        );
    }
}
