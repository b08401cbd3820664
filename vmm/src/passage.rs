//! A vCPU's thread on its way into the guest and out of it.

use std::sync::Mutex;

use sandbox::priority;

use crate::interrupts::lock;

#[derive(Default)]
struct State {
    thread: libc::pid_t,
    inside: bool,
    hastened: bool,
}

/// Whoever waits until a vCPU has left the guest may give its thread real-time priority, which the thread gives back when
/// it has left. The lock is taken last, and held for one system call at most.
#[derive(Default)]
pub(crate) struct Passage(Mutex<State>);

impl Passage {
    /// The calling thread is the vCPU's, and goes into the guest.
    pub(crate) fn enter(&self) {
        let mut state = lock(&self.0);
        if state.thread == 0 {
            // SAFETY: gettid(2) touches no memory and cannot fail.
            state.thread = unsafe { libc::gettid() };
        }
        state.inside = true;
    }

    /// It has left the guest and done what a checkpoint waits for.
    pub(crate) fn leave(&self) {
        let mut state = lock(&self.0);
        state.inside = false;
        if std::mem::take(&mut state.hastened) {
            priority::lower();
        }
    }

    /// Gives it real-time priority, unless it has left.
    pub(crate) fn hasten(&self) {
        // With the lock, so that it cannot leave, let alone end, meanwhile.
        let mut state = lock(&self.0);
        if state.inside && !state.hastened {
            state.hastened = priority::raise(state.thread);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use super::*;

    fn policy() -> libc::c_int {
        // SAFETY: sched_getscheduler(2) touches no memory; 0 is the calling thread.
        unsafe { libc::sched_getscheduler(0) }
    }

    #[test]
    fn only_a_thread_inside_is_hastened_and_it_is_ordinary_again_once_it_left() {
        let passage = Arc::new(Passage::default());
        let may = priority::Hurry::begin().is_some();
        let (entered, inside) = channel();
        let (hastened, go_on) = channel();
        let theirs = passage.clone();
        let vcpu = std::thread::spawn(move || {
            let mut policies = Vec::new();
            for _ in 0..2 {
                theirs.enter();
                entered.send(()).unwrap();
                go_on.recv().unwrap();
                policies.push(policy());
                theirs.leave();
                policies.push(policy());
                entered.send(()).unwrap();
                go_on.recv().unwrap();
                policies.push(policy());
            }
            policies
        });
        passage.hasten();
        for _ in 0..4 {
            inside.recv().unwrap();
            passage.hasten();
            passage.hasten();
            hastened.send(()).unwrap();
        }
        let raised = if may { libc::SCHED_FIFO } else { libc::SCHED_OTHER };
        let round = [raised, libc::SCHED_OTHER, libc::SCHED_OTHER];
        assert_eq!(vcpu.join().unwrap(), [round, round].concat());
    }
}
