//! Panics and processor exceptions: say what happened, stop.

use core::panic::PanicInfo;

use crate::{cpu, serial};

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    serial::print(format_args!("test-guest: panic: {info}\n"), true);
    cpu::stop()
}

/// Filled in by boot.s.
#[repr(C)]
struct Record {
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rsp: u64,
    cr2: u64,
}

/// Where an exception continues in ring 3.
#[unsafe(no_mangle)]
extern "C" fn exception_main() -> ! {
    unsafe extern "C" {
        static exception_record: Record;
    }
    // SAFETY: written before this function was entered, never again after.
    let r = unsafe { &exception_record };
    serial::print(
        format_args!(
            "test-guest: panic: exception {} error {:#x} at rip {:#x} cs {:#x} rsp {:#x} cr2 {:#x}\n",
            r.vector, r.error, r.rip, r.cs, r.rsp, r.cr2
        ),
        true,
    );
    cpu::stop()
}

/// Named by the precompiled `alloc`, whose landing pads are never entered: panics do not unwind here.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    cpu::stop()
}

/// Named by the unwind tables of the same, which the linker script throws away.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() -> ! {
    cpu::stop()
}
