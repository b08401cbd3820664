//! Power-off and reset by the registers that ACPI names.

use guest_core::acpi::{Platform, Register, Sleep};

use crate::cpu::{in16, out8, out16};
use crate::memory;
use crate::time::Clock;

/// How long the machine may take to obey, in microseconds.
const PATIENCE: u64 = 1_000_000;

fn write(register: Register, value: u8) {
    match register {
        Register::Port(port) => out8(port, value),
        Register::Memory(address) => {
            memory::map(address, 1, true);
            // SAFETY: the register that ACPI names, mapped just now.
            unsafe { (address as *mut u8).write_volatile(value) };
        }
    }
}

/// Powers off. Returns only if the machine goes on.
pub fn off(platform: &Platform, clock: &Clock) {
    match platform.sleep {
        Some(Sleep::Control(register, value)) => write(register, value),
        Some(Sleep::Pm1a { port, value, enable }) => {
            const ACPI_MODE: u16 = 1;
            if let (Some((command, on)), 0) = (enable, in16(port) & ACPI_MODE) {
                out8(command, on);
                let end = clock.micros() + PATIENCE;
                while in16(port) & ACPI_MODE == 0 && clock.micros() < end {}
            }
            out16(port, value);
        }
        None => return,
    }
    clock.delay(PATIENCE);
}

/// Resets. Returns only if the machine goes on.
pub fn reset(platform: &Platform, clock: &Clock) {
    let Some((register, value)) = platform.reset else {
        return;
    };
    write(register, value);
    clock.delay(PATIENCE);
}
