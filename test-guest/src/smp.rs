//! The second processor: its start, and its life with the worker.

use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};

use alloc::boxed::Box;

use crate::time::Clock;
use crate::work::{Next, Worker};
use crate::{apic, cpu, log};

/// Where the trampoline runs: page 8.
const TRAMPOLINE: usize = 0x8000;
/// How long the second processor may take to come up, in microseconds.
const PATIENCE: u64 = 2_000_000;
/// Sleeps shorter than this are not worth a timer, in microseconds.
const SHORT: u64 = 50;

static ALIVE: AtomicBool = AtomicBool::new(false);
/// It sleeps by `hlt`; where interrupts do not work it spins.
static MAY_SLEEP: AtomicBool = AtomicBool::new(false);
static APIC_ID: AtomicU32 = AtomicU32::new(0);
static JOB: AtomicPtr<Job> = AtomicPtr::new(core::ptr::null_mut());

struct Job {
    worker: Worker,
    clock: &'static Clock,
}

/// Starts the processor with APIC id `id`, which gets the worker; gives the worker back if it does not come up.
pub fn start(id: u32, worker: Worker, clock: &'static Clock, may_sleep: bool) -> Result<(), Worker> {
    unsafe extern "C" {
        static trampoline: u8;
        static trampoline_end: u8;
    }
    let job = Box::into_raw(Box::new(Job { worker, clock }));
    JOB.store(job, Ordering::Release);
    APIC_ID.store(id, Ordering::Relaxed);
    MAY_SLEEP.store(may_sleep, Ordering::Relaxed);
    let from = &raw const trampoline;
    let len = &raw const trampoline_end as usize - from as usize;
    // SAFETY: page 8 is RAM below the first MiB, which the boot loader's information that is still needed is not in
    // (it was read before), and the code fits into it.
    unsafe { core::ptr::copy_nonoverlapping(from, TRAMPOLINE as *mut u8, len) };
    apic::start(id, (TRAMPOLINE >> 12) as u8, clock);
    let end = clock.micros() + PATIENCE;
    while !ALIVE.load(Ordering::Acquire) {
        if clock.micros() > end {
            log!(
                "processor with APIC id {id} did not answer INIT and start-up within {} ms",
                PATIENCE / 1000
            );
            let job = JOB.swap(core::ptr::null_mut(), Ordering::AcqRel);
            // A processor that comes late finds no job and stops.
            return if job.is_null() {
                Ok(())
            } else {
                // SAFETY: made by Box::into_raw above, and taken back by this swap alone.
                Err(unsafe { Box::from_raw(job) }.worker)
            };
        }
        core::hint::spin_loop();
    }
    Ok(())
}

/// Makes the second processor look at its orders.
pub fn wake() {
    if ALIVE.load(Ordering::Acquire) && MAY_SLEEP.load(Ordering::Relaxed) {
        apic::wake(APIC_ID.load(Ordering::Relaxed));
    }
}

/// Ring 3 of the second processor.
#[unsafe(no_mangle)]
extern "C" fn secondary_main() -> ! {
    let job = JOB.swap(core::ptr::null_mut(), Ordering::AcqRel);
    if job.is_null() {
        cpu::stop();
    }
    // SAFETY: made by Box::into_raw, and taken by this swap alone.
    let mut job = unsafe { Box::from_raw(job) };
    apic::init_second();
    ALIVE.store(true, Ordering::Release);
    let pending = cpu::counters(1).pending;
    loop {
        pending.store(0, Ordering::SeqCst);
        let next = job.worker.step(job.clock, u64::MAX);
        let may_sleep = MAY_SLEEP.load(Ordering::Relaxed);
        match next {
            Next::Now => {}
            Next::At(time) => {
                let wait = time.saturating_sub(job.clock.micros());
                if may_sleep && wait >= SHORT {
                    apic::arm(wait);
                    cpu::idle(pending);
                } else {
                    core::hint::spin_loop();
                }
            }
            Next::Never if may_sleep => cpu::idle(pending),
            Next::Never => core::hint::spin_loop(),
        }
    }
}
