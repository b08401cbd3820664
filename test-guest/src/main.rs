//! A bare-metal guest in ring 3 for testing virtual machine monitors.
#![no_std]
#![no_main]

extern crate alloc;

mod cpu;
mod fault;
mod memory;
mod serial;

/// Ring 3 of the first processor.
#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    cpu::init();
    serial::init();
    log!("hello from ring 3");
    let t = cpu::tsc();
    let v = cpu::cpuid(0x4000_0000, 0);
    log!("cpuid {:x?} {} ", v, cpu::tsc() - t);
    let v = cpu::cpuid(0, 0);
    log!("cpuid {:x?}", v);
    let mut x = 1u64;
    let t = cpu::tsc();
    for i in 0..10_000_000u64 { x = core::hint::black_box(x.wrapping_mul(3) + i); }
    log!("10M loop {} cycles", cpu::tsc() - t);
    log!("apic base {:x}", cpu::rdmsr(0x1b));
    // SAFETY: test
    unsafe { (0x4000_0000_00 as *mut u8).write_volatile(1) };
    panic!("done");
}

#[unsafe(no_mangle)]
extern "C" fn secondary_main() -> ! {
    cpu::stop()
}
