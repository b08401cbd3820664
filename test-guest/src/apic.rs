//! Local APIC: x2APIC by MSR where the processor has it (the memory-mapped one elsewhere), its one-shot timer, and the
//! messages between processors.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::cpu::{self, Stub, rdmsr, set_interrupt, wrmsr};
use crate::memory;
use crate::time::Clock;

/// Interrupts of devices, to the first processor.
pub const VECTOR_DEVICE: u8 = 0x40;
/// The timer of the first processor.
const VECTOR_TIMER_0: u8 = 0x41;
/// The timer of the second.
const VECTOR_TIMER_1: u8 = 0x42;
/// Wakes the second processor.
const VECTOR_WAKE: u8 = 0x43;
const VECTOR_SPURIOUS: u8 = 0xff;

const BASE: u64 = 0xfee0_0000;
const MSR_APIC_BASE: u32 = 0x1b;
const ENABLE: u64 = 1 << 11;
const ENABLE_X2APIC: u64 = 1 << 10;

/// Offsets in the memory-mapped APIC; the MSR is 0x800 + offset / 16.
const ID: u32 = 0x20;
const TASK_PRIORITY: u32 = 0x80;
const SPURIOUS: u32 = 0xf0;
const COMMAND: u32 = 0x300;
const COMMAND_HIGH: u32 = 0x310;
const TIMER: u32 = 0x320;
const TIMER_INITIAL: u32 = 0x380;
const TIMER_CURRENT: u32 = 0x390;
const TIMER_DIVIDE: u32 = 0x3e0;
const DIVIDE_BY_16: u32 = 3;
const MASKED: u32 = 1 << 16;

static X2APIC: AtomicBool = AtomicBool::new(false);
/// Timer ticks per 1024 microseconds.
static TICKS: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" {
    fn irq_device_x2apic();
    fn irq_device_xapic();
    fn irq_timer_0_x2apic();
    fn irq_timer_0_xapic();
    fn irq_timer_1_x2apic();
    fn irq_timer_1_xapic();
    fn irq_wake_1_x2apic();
    fn irq_wake_1_xapic();
    fn irq_spurious();
}

fn x2apic() -> bool {
    X2APIC.load(Ordering::Relaxed)
}

fn read(register: u32) -> u32 {
    if x2apic() {
        rdmsr(0x800 + register / 16) as u32
    } else {
        // SAFETY: a register of the memory-mapped APIC, which `init` has mapped.
        unsafe { ((BASE + u64::from(register)) as *const u32).read_volatile() }
    }
}

fn write(register: u32, value: u32) {
    // SAFETY: a register of this processor's APIC. Interrupts that follow have their gates.
    unsafe {
        if x2apic() {
            wrmsr(0x800 + register / 16, u64::from(value));
        } else {
            ((BASE + u64::from(register)) as *mut u32).write_volatile(value);
        }
    }
}

/// The name of the mode, for messages.
pub fn mode() -> &'static str {
    if x2apic() { "x2APIC" } else { "xAPIC" }
}

/// This processor's APIC id.
pub fn id() -> u32 {
    if x2apic() { read(ID) } else { read(ID) >> 24 }
}

fn enable(timer_vector: u8) {
    let base = rdmsr(MSR_APIC_BASE);
    if x2apic() {
        // SAFETY: CPUID says that the mode exists; the APIC stays where it is.
        unsafe { wrmsr(MSR_APIC_BASE, base | ENABLE | ENABLE_X2APIC) };
    } else {
        // SAFETY: as above.
        unsafe { wrmsr(MSR_APIC_BASE, base | ENABLE) };
    }
    write(TASK_PRIORITY, 0);
    write(SPURIOUS, 0x100 | u32::from(VECTOR_SPURIOUS));
    write(TIMER_DIVIDE, DIVIDE_BY_16);
    write(TIMER, u32::from(timer_vector));
}

/// Sets up the gates and the first processor's APIC, and measures the timer's rate.
pub fn init(clock: &Clock) {
    const X2APIC_FEATURE: u32 = 1 << 21;
    X2APIC.store(cpu::cpuid(1, 0)[2] & X2APIC_FEATURE != 0, Ordering::Relaxed);
    if !x2apic() {
        memory::map(BASE, 4096, true);
    }
    let gates: [(u8, Stub, Stub); 4] = [
        (VECTOR_DEVICE, irq_device_x2apic, irq_device_xapic),
        (VECTOR_TIMER_0, irq_timer_0_x2apic, irq_timer_0_xapic),
        (VECTOR_TIMER_1, irq_timer_1_x2apic, irq_timer_1_xapic),
        (VECTOR_WAKE, irq_wake_1_x2apic, irq_wake_1_xapic),
    ];
    for (vector, by_msr, by_memory) in gates {
        set_interrupt(vector, if x2apic() { by_msr } else { by_memory });
    }
    set_interrupt(VECTOR_SPURIOUS, irq_spurious);
    enable(VECTOR_TIMER_0);

    write(TIMER, MASKED | u32::from(VECTOR_TIMER_0));
    write(TIMER_INITIAL, u32::MAX);
    let start = clock.micros();
    let first = read(TIMER_CURRENT);
    clock.delay(10_000);
    let last = read(TIMER_CURRENT);
    let elapsed = clock.micros() - start;
    write(TIMER_INITIAL, 0);
    write(TIMER, u32::from(VECTOR_TIMER_0));
    TICKS.store(
        u64::from(first.wrapping_sub(last)) * 1024 / elapsed.max(1),
        Ordering::Relaxed,
    );
}

/// Sets up the second processor's APIC; to be called on it.
pub fn init_second() {
    enable(VECTOR_TIMER_1);
}

/// Lets this processor's timer interrupt it once after `micros`.
pub fn arm(micros: u64) {
    let ticks = (micros.saturating_mul(TICKS.load(Ordering::Relaxed)) >> 10).clamp(1, u64::from(u32::MAX));
    write(TIMER_INITIAL, ticks as u32);
}

/// Sends `command` (mode and vector) to the processor with APIC id `to`.
fn send(to: u32, command: u32) {
    if x2apic() {
        // SAFETY: what the message does is known to the two callers.
        unsafe { wrmsr(0x800 + COMMAND / 16, u64::from(to) << 32 | u64::from(command)) };
    } else {
        write(COMMAND_HIGH, to << 24);
        write(COMMAND, command);
    }
}

/// INIT and two start-up messages (Intel SDM 3A, 9.4.4): processor `to` begins at `page` in real mode.
pub fn start(to: u32, page: u8, clock: &Clock) {
    const INIT: u32 = 0x4500;
    const STARTUP: u32 = 0x4600;
    send(to, INIT);
    clock.delay(10_000);
    for _ in 0..2 {
        send(to, STARTUP | u32::from(page));
        clock.delay(200);
    }
}

/// Wakes the second processor.
pub fn wake(to: u32) {
    const FIXED: u32 = 0x4000;
    send(to, FIXED | u32::from(VECTOR_WAKE));
}
