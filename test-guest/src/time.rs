//! Time: the time stamp counter and its frequency, kvmclock, the real-time clock.

use core::fmt::Write;
use core::sync::atomic::{AtomicU64, Ordering, fence};

use alloc::string::String;
use guest_core::rtc::{DateTime, Registers};

use crate::cpu::{self, cpuid, in8, out8, wrmsr};

const KVM_SIGNATURE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
const KVM_TIMING: u32 = 0x4000_0010;
const KVM_CLOCK: u32 = 1 << 3;
const MSR_KVM_CLOCK: u32 = 0x4b56_4d01;

/// The counter was set back if time seems to go back by more than this, in microseconds.
const JUMP: u64 = 100_000;

/// Time since boot by the time stamp counter; it never goes back.
pub struct Clock {
    khz: u64,
    start: AtomicU64,
    latest: AtomicU64,
    /// How the frequency was found.
    pub source: &'static str,
}

fn is_kvm() -> bool {
    let [_, a, b, c] = cpuid(KVM_SIGNATURE, 0);
    let has_hypervisor = cpuid(1, 0)[2] >> 31 != 0;
    has_hypervisor && [a, b, c] == [0x4b4d_564b, 0x564b_4d56, 0x4d]
}

fn khz_by_cpuid() -> Option<(u64, &'static str)> {
    if is_kvm() && cpuid(KVM_SIGNATURE, 0)[0] >= KVM_TIMING {
        let khz = cpuid(KVM_TIMING, 0)[0];
        if khz != 0 {
            return Some((khz.into(), "CPUID 0x40000010"));
        }
    }
    if cpuid(0, 0)[0] >= 0x15 {
        let [denominator, numerator, crystal, _] = cpuid(0x15, 0).map(u64::from);
        if denominator != 0 && numerator != 0 && crystal != 0 {
            return Some((crystal * numerator / denominator / 1000, "CPUID 0x15"));
        }
    }
    None
}

/// Counts ticks while channel 2 of the PIT runs for 50 ms; none if it does not run.
fn khz_by_pit() -> Option<(u64, &'static str)> {
    const PIT_HZ: u64 = 1_193_182;
    const MILLIS: u64 = 50;
    const PATIENCE: u32 = 1_000_000;
    let count = PIT_HZ * MILLIS / 1000;
    // Gate on, speaker off; channel 2, both bytes, mode 0.
    out8(0x61, in8(0x61) & !2 | 1);
    out8(0x43, 0xb0);
    out8(0x42, count as u8);
    out8(0x42, (count >> 8) as u8);
    let start = cpu::tsc();
    if in8(0x61) & 0x20 != 0 {
        return None;
    }
    for _ in 0..PATIENCE {
        if in8(0x61) & 0x20 != 0 {
            return Some(((cpu::tsc() - start) / MILLIS, "PIT"));
        }
    }
    None
}

fn khz_by_rtc() -> Option<(u64, &'static str)> {
    const PATIENCE: u32 = 1_000_000;
    let edge = || {
        let second = cmos(0);
        (0..PATIENCE).find(|_| cmos(0) != second).map(|_| cpu::tsc())
    };
    let start = edge()?;
    Some(((edge()? - start) / 1000, "RTC"))
}

fn cmos(register: u8) -> u8 {
    out8(0x70, register);
    in8(0x71)
}

/// Date and time of the real-time clock.
pub fn rtc() -> DateTime {
    const UPDATE_IN_PROGRESS: u8 = 0x80;
    let read = || {
        let mut patience = 1000;
        while cmos(0x0a) & UPDATE_IN_PROGRESS != 0 && patience > 0 {
            patience -= 1;
        }
        Registers {
            second: cmos(0x00),
            minute: cmos(0x02),
            hour: cmos(0x04),
            day: cmos(0x07),
            month: cmos(0x08),
            year: cmos(0x09),
            century: cmos(0x32),
            status_b: cmos(0x0b),
        }
    };
    let mut now = read();
    for _ in 0..8 {
        let again = read();
        if again == now {
            break;
        }
        now = again;
    }
    now.decode()
}

impl Clock {
    /// Finds out the counter's frequency.
    pub fn new(kvm: Option<&KvmClock>) -> Self {
        let by_kvm = || kvm.and_then(KvmClock::tsc_khz).map(|khz| (khz, "kvmclock"));
        let found = khz_by_cpuid().or_else(by_kvm).or_else(khz_by_pit).or_else(khz_by_rtc);
        let (khz, source) = found.unwrap_or((1_000_000, "a guess"));
        Self {
            khz: khz.max(1),
            start: AtomicU64::new(cpu::tsc()),
            latest: AtomicU64::new(0),
            source,
        }
    }

    /// Frequency of the time stamp counter.
    pub fn khz(&self) -> u64 {
        self.khz
    }

    /// Microseconds since boot.
    pub fn micros(&self) -> u64 {
        let tsc = cpu::tsc();
        let ticks = tsc.wrapping_sub(self.start.load(Ordering::Relaxed));
        // A counter that is behind its start gives the latest time again.
        let ticks = if ticks > u64::MAX / 2 { 0 } else { ticks };
        let now = (u128::from(ticks) * 1000 / u128::from(self.khz)) as u64;
        let latest = self.latest.fetch_max(now, Ordering::Relaxed);
        if now + JUMP < latest {
            // The counter was set back, by a machine monitor that moved the guest: time goes on from where it was.
            let ticks = (u128::from(latest) * u128::from(self.khz) / 1000) as u64;
            self.start.store(tsc.wrapping_sub(ticks), Ordering::Relaxed);
        }
        latest.max(now)
    }

    /// Waits for `micros`, busily.
    pub fn delay(&self, micros: u64) {
        let end = self.micros() + micros;
        while self.micros() < end {
            core::hint::spin_loop();
        }
    }
}

/// kvmclock's page (Linux Documentation/virt/kvm/x86/msr.rst).
#[repr(C, align(64))]
struct Page {
    version: u32,
    _pad: u32,
    tsc_timestamp: u64,
    system_time: u64,
    multiplier: u32,
    shift: i8,
    flags: u8,
}

static mut PAGE: Page = Page {
    version: 0,
    _pad: 0,
    tsc_timestamp: 0,
    system_time: 0,
    multiplier: 0,
    shift: 0,
    flags: 0,
};

/// kvmclock of the first processor.
pub struct KvmClock(());

impl KvmClock {
    /// Turns it on, where it is offered.
    pub fn new() -> Option<Self> {
        if !is_kvm() || cpuid(KVM_FEATURES, 0)[0] & KVM_CLOCK == 0 {
            return None;
        }
        // SAFETY: the MSR exists, by CPUID; KVM writes to the page, which is read volatile only.
        unsafe { wrmsr(MSR_KVM_CLOCK, &raw const PAGE as u64 | 1) };
        Some(Self(()))
    }

    /// A whole copy of the page; none while KVM does not fill it.
    fn page(&self) -> Option<Page> {
        let page = &raw const PAGE;
        for _ in 0..1000 {
            // SAFETY: a static that KVM writes to; the version tells whether the copy is whole.
            let (before, copy, after) = unsafe {
                let before = (&raw const (*page).version).read_volatile();
                fence(Ordering::Acquire);
                let copy = page.read_volatile();
                fence(Ordering::Acquire);
                (before, copy, (&raw const (*page).version).read_volatile())
            };
            if before != 0 && before & 1 == 0 && before == after {
                return Some(copy);
            }
        }
        None
    }

    /// The frequency of the time stamp counter that the page's scale means.
    fn tsc_khz(&self) -> Option<u64> {
        let page = self
            .page()
            .filter(|p| p.multiplier != 0 && p.shift.unsigned_abs() < 32)?;
        let khz = (1_000_000 << 32) / u64::from(page.multiplier);
        Some(if page.shift >= 0 {
            khz >> page.shift
        } else {
            khz << -page.shift
        })
    }

    /// Nanoseconds by kvmclock.
    pub fn nanos(&self) -> Option<u64> {
        let page = self.page().filter(|p| p.shift.unsigned_abs() < 32)?;
        let delta = u128::from(cpu::tsc().saturating_sub(page.tsc_timestamp));
        let scaled = if page.shift >= 0 {
            delta << page.shift
        } else {
            delta >> -page.shift
        };
        let nanos = (scaled * u128::from(page.multiplier) >> 32) as u64;
        Some(page.system_time.wrapping_add(nanos))
    }
}

/// The clocks as a line of JSON.
pub fn clocks(clock: &Clock, kvm: Option<&KvmClock>) -> String {
    let mut out = String::new();
    let (tsc, khz) = (cpu::tsc(), clock.khz());
    // Writing to a string does not fail.
    let _ = match kvm.and_then(KvmClock::nanos) {
        Some(ns) => write!(
            out,
            "{{\"tsc\":{tsc},\"tsc_khz\":{khz},\"kvmclock_ns\":{ns},\"rtc\":\"{}\"}}",
            rtc()
        ),
        None => write!(
            out,
            "{{\"tsc\":{tsc},\"tsc_khz\":{khz},\"kvmclock_ns\":null,\"rtc\":\"{}\"}}",
            rtc()
        ),
    };
    out
}
