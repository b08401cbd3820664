//! The processor as ring 3 sees it: ports (IOPL 3), the time stamp counter, the gates into ring 0, the interrupt table.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU32, AtomicU64};

global_asm!(include_str!("boot.s"));

/// The gate's vector (`int3`), and what it is asked for in r11d.
const GATE: u8 = 3;
const GATE_IDLE: u32 = 0;
const GATE_CPUID: u32 = 1;
const GATE_RDMSR: u32 = 2;
const GATE_WRMSR: u32 = 3;

const RING_3: u8 = 3;
const RING_0: u8 = 0;

unsafe extern "C" {
    static mut idt: [[u64; 2]; 256];
    static exceptions: u8;
    fn gate();
}

/// An interrupt stub in ring 0.
pub type Stub = unsafe extern "C" fn();

fn set_gate(vector: u8, address: u64, ring: u8) {
    const PRESENT_INTERRUPT_GATE: u64 = 0x8e00;
    const RING_0_CODE: u64 = 0x08;
    let low = address & 0xffff
        | RING_0_CODE << 16
        | (PRESENT_INTERRUPT_GATE | u64::from(ring) << 13) << 32
        | (address >> 16 & 0xffff) << 48;
    // SAFETY: the table has 256 entries and nobody else writes to it; the processor reads the entry whole, and no
    // interrupt of this vector comes before it is set.
    unsafe { (&raw mut idt[usize::from(vector)]).write_volatile([low, address >> 32]) };
}

/// Lets interrupts of `vector` run `stub`.
pub fn set_interrupt(vector: u8, stub: Stub) {
    set_gate(vector, stub as usize as u64, RING_0);
}

/// Sets the entries of exceptions and gates. Called once, before anything else.
pub fn init() {
    for vector in 0..32u8 {
        set_gate(vector, &raw const exceptions as u64 + 16 * u64::from(vector), RING_0);
    }
    set_gate(GATE, gate as Stub as usize as u64, RING_3);
}

/// Sleeps until an interrupt comes, unless `pending` is not zero.
pub fn idle(pending: &AtomicU32) {
    // SAFETY: the gate reads the word and returns after an interrupt; it changes no register.
    unsafe { asm!("int3", in("r11") GATE_IDLE, in("rdi") pending.as_ptr()) };
}

/// CPUID as the machine monitor gives it (in ring 3 the processor itself might answer).
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let (eax, ebx, ecx, edx);
    // SAFETY: the gate executes CPUID and returns; rbx, which the compiler keeps for itself, is put back.
    unsafe {
        asm!(
            "mov {saved}, rbx",
            "int3",
            "xchg {saved}, rbx",
            in("r11") GATE_CPUID,
            saved = out(reg) ebx,
            inout("eax") leaf => eax,
            inout("ecx") subleaf => ecx,
            out("edx") edx,
        );
    }
    let ebx: u64 = ebx;
    [eax, ebx as u32, ecx, edx]
}

/// Reads a model-specific register, which must exist.
pub fn rdmsr(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the gate executes RDMSR and returns.
    unsafe { asm!("int3", in("r11") GATE_RDMSR, in("ecx") index, out("eax") low, out("edx") high) };
    u64::from(low) | u64::from(high) << 32
}

/// Writes a model-specific register.
///
/// # Safety
/// The register must exist, and the value must leave memory and control flow of the guest alone.
pub unsafe fn wrmsr(index: u32, value: u64) {
    // SAFETY: the gate executes WRMSR and returns; what it does is the caller's promise.
    unsafe {
        asm!(
            "int3",
            in("r11") GATE_WRMSR,
            in("ecx") index,
            in("eax") value as u32,
            in("edx") (value >> 32) as u32,
        );
    }
}

/// The time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 processor and CR4.TSD is not set.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Writes a byte to a port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: ring 3 has IOPL 3, and no port write of this program makes a device write to memory that Rust owns
    // but for the queues of virtio, which are given to it.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
}

/// Reads a byte from a port.
pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as for `out8`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) };
    value
}

/// Writes 16 bits to a port.
pub fn out16(port: u16, value: u16) {
    // SAFETY: as for `out8`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, preserves_flags)) };
}

/// Reads 16 bits from a port.
pub fn in16(port: u16) -> u16 {
    let value;
    // SAFETY: as for `out8`.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nostack, preserves_flags)) };
    value
}

/// Writes 32 bits to a port.
pub fn out32(port: u16, value: u32) {
    // SAFETY: as for `out8`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) };
}

/// Reads 32 bits from a port.
pub fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: as for `out8`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags)) };
    value
}

/// What the interrupt stubs of a processor write.
pub struct Counters {
    /// 1 after an interrupt, until ring 3 clears it.
    pub pending: &'static AtomicU32,
    /// Timer interrupts.
    pub timer: &'static AtomicU64,
    /// Other interrupts.
    pub other: &'static AtomicU64,
}

/// Counters of processor 0 or 1.
pub fn counters(processor: usize) -> Counters {
    unsafe extern "C" {
        static pending_0: AtomicU32;
        static pending_1: AtomicU32;
        static count_device: AtomicU64;
        static count_timer_0: AtomicU64;
        static count_timer_1: AtomicU64;
        static count_wake_1: AtomicU64;
    }
    // SAFETY: aligned statics of boot.s with these sizes, only ever accessed atomically.
    unsafe {
        if processor == 0 {
            Counters {
                pending: &pending_0,
                timer: &count_timer_0,
                other: &count_device,
            }
        } else {
            Counters {
                pending: &pending_1,
                timer: &count_timer_1,
                other: &count_wake_1,
            }
        }
    }
}

/// Stops this processor for good.
pub fn stop() -> ! {
    loop {
        idle(&AtomicU32::new(0));
    }
}
