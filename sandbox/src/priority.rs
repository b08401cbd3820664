//! Real-time priority for the moments in which a whole VM stands still for a thread.
//!
//! On a busy host a thread that has no processor waits for a millisecond and more until it gets one. A checkpoint's thread
//! needs some hundred microseconds, a vCPU's on its way out of the guest some ten, and all clients wait for both: they go
//! before ordinary threads (SCHED_FIFO, the lowest priority) for that long. Where the process may not do that (it needs
//! CAP_SYS_NICE, or an RLIMIT_RTPRIO above 0), nothing happens.

use std::io;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};

/// Lowest real-time priority: before all ordinary threads, behind all others of real time.
const PRIORITY: libc::c_int = 1;

/// It was tried, and refused.
static REFUSED: AtomicBool = AtomicBool::new(false);

fn set_scheduler(thread: libc::pid_t, policy: libc::c_int, priority: libc::c_int) -> io::Result<()> {
    let mut param = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: sched_setscheduler(2) reads `param`, and changes nothing of this process's memory.
    match unsafe { libc::sched_setscheduler(thread, policy, &raw mut param) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives `thread` (its id; 0: the calling one) real-time priority, until it calls [`lower`]. It must not end meanwhile. Whether
/// it has it.
pub fn raise(thread: libc::pid_t) -> bool {
    if REFUSED.load(Ordering::Relaxed) {
        return false;
    }
    let raised = set_scheduler(thread, libc::SCHED_FIFO, PRIORITY);
    if let Err(e) = &raised
        && !REFUSED.swap(true, Ordering::Relaxed)
    {
        log::info!(
            "checkpoints have no real-time priority ({e}), so they wait for processors where the host is busy; \
             CAP_SYS_NICE or an RLIMIT_RTPRIO of 1 would allow it"
        );
    }
    raised.is_ok()
}

/// Makes the calling thread an ordinary one again.
pub fn lower() {
    if let Err(e) = set_scheduler(0, libc::SCHED_OTHER, 0) {
        log::error!("a thread keeps its real-time priority: {e}");
    }
}

/// The calling thread has real-time priority as long as this lives.
#[derive(Debug)]
pub struct Hurry(PhantomData<*const ()>);

impl Hurry {
    /// `None`: the process may not.
    pub fn begin() -> Option<Self> {
        raise(0).then_some(Self(PhantomData))
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        lower();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> libc::c_int {
        // SAFETY: sched_getscheduler(2) touches no memory; 0 is the calling thread.
        unsafe { libc::sched_getscheduler(0) }
    }

    #[test]
    fn a_thread_is_ordinary_again_afterwards() {
        let hurry = Hurry::begin();
        let expected = if hurry.is_some() {
            libc::SCHED_FIFO
        } else {
            libc::SCHED_OTHER
        };
        assert_eq!(policy(), expected);
        drop(hurry);
        assert_eq!(policy(), libc::SCHED_OTHER);
    }
}
