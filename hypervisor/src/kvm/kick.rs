//! Getting a vCPU out of the guest: `immediate_exit` plus a signal without effect.
//!
//! The kicker writes `immediate_exit` into the vCPU's shared kvm_run page first, then signals the thread: wherever the
//! thread is, its current or next KVM_RUN returns. `alive` is locked while the page or the thread is touched, and
//! cleared before either goes away.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use crate::VcpuKicker;

fn signal_number() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn ignore(_: libc::c_int) {}

/// Installs the signal handler once per process. It does nothing: the signal only ends the ioctl.
pub fn install_kick_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: an all-zero sigaction is valid; the handler is async-signal-safe since it does nothing.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as libc::sighandler_t;
            libc::sigaction(signal_number(), &action, std::ptr::null_mut());
        }
    });
}

/// What a kick reaches, as long as the vCPU exists.
pub(super) struct Target {
    pub(super) alive: Mutex<Option<Alive>>,
}

pub(super) struct Alive {
    immediate_exit: *const AtomicU8,
    thread: libc::pthread_t,
}

// SAFETY: the pointer is only used under the mutex while the page it points into is mapped; the page is atomically
// accessed shared memory.
unsafe impl Send for Alive {}

impl Target {
    /// # Safety
    /// `immediate_exit` must stay valid until [`Target::retire`] was called.
    pub(super) unsafe fn new(immediate_exit: *const u8) -> Self {
        // SAFETY: pthread_self has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        Self {
            alive: Mutex::new(Some(Alive {
                immediate_exit: immediate_exit.cast(),
                thread,
            })),
        }
    }

    /// The vCPU goes away: later kicks do nothing.
    pub(super) fn retire(&self) {
        *self.alive.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn set(&self, value: u8, signal: bool) {
        let alive = self.alive.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(alive) = &*alive {
            // SAFETY: `alive` is Some, so the kvm_run page is mapped; KVM reads the byte atomically.
            unsafe { (*alive.immediate_exit).store(value, Ordering::SeqCst) };
            if signal {
                // SAFETY: the thread that owns the vCPU retires the target before it ends.
                unsafe { libc::pthread_kill(alive.thread, signal_number()) };
            }
        }
    }
}

impl VcpuKicker for Target {
    fn kick(&self) {
        self.set(1, true);
    }

    fn clear(&self) {
        self.set(0, false);
    }
}
