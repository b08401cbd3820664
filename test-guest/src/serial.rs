//! COM1 (16550) for messages.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use crate::cpu::{in8, out8};

const PORT: u16 = 0x3f8;
const LINE_STATUS: u16 = PORT + 5;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
/// A transmitter that stays busy for so many reads is not there.
const PATIENCE: u32 = 100_000;

static BUSY: AtomicBool = AtomicBool::new(false);

struct Port;

impl Write for Port {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                put(b'\r');
            }
            put(byte);
        }
        Ok(())
    }
}

fn put(byte: u8) {
    let mut patience = PATIENCE;
    while in8(LINE_STATUS) & TRANSMITTER_EMPTY == 0 && patience > 0 {
        patience -= 1;
    }
    out8(PORT, byte);
}

/// 115200 baud, 8 data bits, no parity, FIFO on, no interrupts.
pub fn init() {
    for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7), (4, 3)] {
        out8(PORT + register, value);
    }
}

/// Writes a message; the processors take turns. In a panic (`force`) the turn is not waited for.
pub fn print(arguments: fmt::Arguments<'_>, force: bool) {
    let mut patience = PATIENCE * 100;
    while BUSY.swap(true, Ordering::Acquire) && !(force && patience == 0) {
        patience = patience.saturating_sub(1);
        core::hint::spin_loop();
    }
    // Writing to the port does not fail.
    let _ = Port.write_fmt(arguments);
    BUSY.store(false, Ordering::Release);
}

/// Writes one line that starts with the guest's name.
#[macro_export]
macro_rules! log {
    ($($argument:tt)*) => {
        $crate::serial::print(format_args!("test-guest: {}\n", format_args!($($argument)*)), false)
    };
}
