//! The controller thread: it alone pauses and resumes the VM, attaches and takes away the interposer.
//!
//! ```text
//! pre-copy -> pause, last of the disks, attach, checkpoint 1, resume -> [ sleep -> checkpoint -> send ]* -> let go or stop
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sandbox::priority::Hurry;

use super::precopy;
use super::rush::Rush;
use super::session::{Session, lock};
use super::stage::Stage;
use crate::audit::ram::Auditor;
use crate::core::ms;
use crate::core::primary::{Action, Event};
use crate::heap;
use crate::machine::{MachineError, Output, PageRun};
use crate::wire::pages::PageEncoder;

/// What the controller keeps from epoch to epoch.
pub(super) struct Controller {
    pub(super) session: Arc<Session>,
    pub(super) encoder: PageEncoder,
    pub(super) stage: Stage,
    pub(super) auditor: Auditor,
    /// What was written last, while it is being copied.
    pub(super) runs: Vec<PageRun>,
    /// Those of them that are to be copied.
    pub(super) changed: Vec<PageRun>,
    /// Pages written in the epoch that are as they were sent last, and are left out.
    pub(super) same: u64,
    /// Pages written per second in the last epoch, but for hot ones.
    pub(super) dirty_rate: f64,
    /// Bytes of the last state.
    pub(super) state_len: u64,
    pub(super) epoch_began: Instant,
    todo: VecDeque<Action>,
    /// While the guest stands still for a checkpoint.
    hurry: Option<Hurry>,
    rush: Rush,
    paused: bool,
    tracking: bool,
    attached: bool,
    /// The VM was stopped for good.
    stopped: bool,
    /// The last action was done: nothing more to do.
    done: bool,
}

/// Timers of this thread fire when they should; the default slack of 50 us is a good part of an epoch.
fn sharpen_timers() {
    // SAFETY: prctl(2) with PR_SET_TIMERSLACK takes a plain number and affects the calling thread alone.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_000 as libc::c_ulong, 0, 0, 0) };
}

/// The thread's body.
pub(super) fn run(session: &Arc<Session>) {
    sharpen_timers();
    let mut controller = Controller {
        session: session.clone(),
        encoder: PageEncoder::default(),
        stage: Stage::new(),
        auditor: Auditor::new(&session.identity.memory),
        runs: Vec::new(),
        changed: Vec::new(),
        same: 0,
        dirty_rate: 0.0,
        state_len: 0,
        epoch_began: Instant::now(),
        todo: VecDeque::new(),
        hurry: None,
        rush: Rush::default(),
        paused: false,
        tracking: false,
        attached: false,
        stopped: false,
        done: false,
    };
    if let Err(e) = controller.begin() {
        controller.failed(e);
    }
    controller.serve();
    session.finish();
    if controller.stopped {
        session.machine.close_disks();
    }
    drop(controller);
    heap::give_back();
}

/// Why protection did not begin.
pub(super) enum BeginError {
    /// The VM.
    Machine(MachineError),
    /// The connection.
    Channel(std::io::Error),
    /// The core knows already.
    Ended,
}

impl From<MachineError> for BeginError {
    fn from(e: MachineError) -> Self {
        Self::Machine(e)
    }
}

impl From<std::io::Error> for BeginError {
    fn from(e: std::io::Error) -> Self {
        Self::Channel(e)
    }
}

impl From<BeginError> for Event {
    fn from(e: BeginError) -> Self {
        match e {
            BeginError::Machine(e) => Self::MachineFailed(e.to_string()),
            BeginError::Channel(e) => Self::PeerLost(format!("log channel: {e}")),
            BeginError::Ended => Session::TICK,
        }
    }
}

impl Controller {
    /// Everything up to the first checkpoint.
    fn begin(&mut self) -> Result<(), BeginError> {
        self.session.machine.start_tracking()?;
        self.tracking = true;
        let pending = precopy::run(self)?;
        // So that little is left to be flushed in the pause.
        self.session.flush_disks()?;
        self.fit_cache();
        let left = precopy::set_aside(self, pending)?;
        let begin = Instant::now();
        self.pause()?;
        precopy::last_pass(self, left)?;
        let session = &self.session;
        session.machine.attach(session.interposer.clone(), &session.id)?;
        self.attached = true;
        self.session.vouch_for_disks()?;
        if !lock(&self.session.core).begin_first_checkpoint() {
            return Err(BeginError::Ended);
        }
        self.checkpoint(begin)
    }

    fn serve(&mut self) {
        while !self.done {
            let mailed = std::mem::take(&mut lock(&self.session.mailbox).actions);
            self.todo.extend(mailed);
            if let Some(action) = self.todo.pop_front() {
                self.perform(action);
                continue;
            }
            self.drive(Session::TICK);
            if !self.todo.is_empty() {
                continue;
            }
            if self.session.quit.load(Ordering::SeqCst) {
                if lock(&self.session.core).is_over() {
                    // It is decided who runs the VM, and what that means for this side is on its way to the mailbox.
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                return self.give_up();
            }
            let deadline = lock(&self.session.core).deadline();
            let longest = self.session.clock.now() + ms(1_000);
            self.session.sleep(deadline.unwrap_or(longest).min(longest));
        }
    }

    /// Steps the core; what it wants of this thread is done in [`Controller::serve`].
    pub(super) fn drive(&mut self, event: Event) {
        let actions = self.session.step(event);
        self.todo.extend(actions);
    }

    /// Does at once what the core wants, if it is `wanted`; the rest stays for [`Controller::serve`].
    pub(super) fn perform_first(&mut self, wanted: &Action) {
        if let Some(at) = self.todo.iter().position(|action| action == wanted) {
            self.todo.remove(at);
            self.perform(wanted.clone());
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Checkpoint => {
                if let Err(e) = self.next_checkpoint() {
                    self.failed(e);
                }
            }
            Action::Resume => self.resume(),
            Action::GoAlone | Action::Abandon => self.let_go(),
            Action::Stop(reason) => self.stop(&reason),
            // Performed by the session.
            Action::Release(_)
            | Action::Write(_)
            | Action::Throttle(_)
            | Action::Send(_)
            | Action::AskArbiter { .. }
            | Action::Disconnect => {}
        }
    }

    fn failed(&mut self, e: BeginError) {
        if let BeginError::Channel(_) = &e {
            self.session.hear_last_word();
        }
        self.drive(e.into());
    }

    /// Before the guest stands still: a new cache takes its time.
    fn fit_cache(&mut self) {
        let mib = lock(&self.session.limits).delta_cache_mib;
        self.encoder.sent.resize(mib);
    }

    fn next_checkpoint(&mut self) -> Result<(), BeginError> {
        self.copy_ahead()?;
        self.fit_cache();
        let begin = Instant::now();
        self.hurry = if self.rush.is_on() { Hurry::begin() } else { None };
        let taken = self
            .pause()
            .map_err(BeginError::from)
            .and_then(|()| self.checkpoint(begin));
        self.hurry = None;
        taken
    }

    pub(super) fn pause(&mut self) -> Result<(), MachineError> {
        if !self.paused {
            self.session.interposer.begin_cut();
            let late = self.session.machine.pause(self.hurry.is_some())?;
            self.paused = true;
            self.rush.note(late);
        }
        Ok(())
    }

    pub(super) fn resume(&mut self) {
        self.session.interposer.end_cut();
        if self.paused {
            self.paused = false;
            if let Err(e) = self.session.machine.resume() {
                log::error!("ft: the VM does not resume: {e}");
            }
        }
        self.hurry = None;
        self.epoch_began = Instant::now();
    }

    /// The VM goes on as an ordinary one: everything held leaves in order, then the interposer is taken away, then the
    /// guest runs.
    fn let_go(&mut self) {
        let session = self.session.clone();
        let problem = |what: &str, e: MachineError| log::error!("ft: {what}: {e}");
        if self.attached {
            if let Err(e) = self.pause() {
                problem("pausing the VM to end FT", e);
            }
            let order = lock(&session.releasing);
            let outputs: Vec<Output> = session
                .interposer
                .close()
                .into_iter()
                .flat_map(|held| held.outputs)
                .collect();
            if !outputs.is_empty() {
                session.machine.release(outputs);
            }
            drop(order);
            if !session.write_all() {
                // The guest took it for done: it cannot go on without.
                return self.stop("FT was shut down before shared disks had taken everything");
            }
            if let Err(e) = session.machine.detach() {
                problem("taking the interposer away", e);
            }
            self.attached = false;
        }
        if self.tracking {
            session.machine.stop_tracking();
            self.tracking = false;
        }
        session.end_throttle();
        self.resume();
        self.done = true;
    }

    fn stop(&mut self, reason: &str) {
        // Workers that wait for room would keep the VM from being paused; what they still send is held and dropped.
        self.session.interposer.begin_cut();
        self.session.machine.stop(reason);
        self.session.give_disks_up();
        self.session.machine_stopped();
        drop(self.session.interposer.close());
        self.stopped = true;
        self.done = true;
    }

    /// The VMM ends FT's threads while it is open who runs the VM: then it is not this side (R4).
    fn give_up(&mut self) {
        if self.attached {
            self.stop("FT was shut down while it was open who runs the VM");
        } else {
            self.let_go();
        }
    }
}
