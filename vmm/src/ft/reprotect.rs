//! The supervisor: looks for a new backup when the VM runs alone.
//!
//! One thread of each VMM. It sleeps until FT's state changes (the event sink wakes it), or until the next attempt is due.
//! Each attempt is what `ft enable` does, with two differences: the handshake is made without any lock, so that nobody who
//! ends FT or the VM has to wait for a host that does not answer; and the session of before stays, with what it has to
//! say, until a new one begins. Only the VM's identity is needed for a handshake; the VM itself may end meanwhile.
//!
//! Lock order: `changing`, `session`, `search`. `taken_over` is a leaf: FT's threads take it.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use ft::Cancel;
use ft::config::{FtEnableConfig, FtInfo, FtState};
use ft::reprotect::{Next, Policy, Retry};
use sandbox::ThreadKind;

use super::{FtPlugin, Session, protected};
use crate::interrupts::lock;
use crate::vm::Vm;

/// What is searched for, and how far that is.
pub(super) struct Search {
    policy: Policy,
    retry: Retry,
    vm: Weak<Vm>,
    /// Of the attempt under way; another one with each search.
    cancel: Arc<Cancel>,
}

impl Search {
    pub(super) fn new(policy: Policy, vm: &Arc<Vm>) -> Self {
        Self {
            retry: policy.retry(),
            policy,
            vm: Arc::downgrade(vm),
            cancel: Arc::default(),
        }
    }
}

/// One attempt.
struct Attempt {
    config: FtEnableConfig,
    vm: Weak<Vm>,
    cancel: Arc<Cancel>,
    number: u64,
}

/// Starts the thread; it ends with the plugin.
pub(super) fn start(plugin: Weak<FtPlugin>, woken: Receiver<()>) -> std::io::Result<()> {
    let run = move || {
        let mut wait = None;
        loop {
            match wait {
                None if woken.recv().is_err() => return,
                Some(wait) if woken.recv_timeout(wait) == Err(RecvTimeoutError::Disconnected) => return,
                _ => {}
            }
            let Some(plugin) = plugin.upgrade() else { return };
            wait = plugin.supervise();
        }
    };
    sandbox::spawn(ThreadKind::FtSupervisor, "ft-supervisor", run).map(drop)
}

/// The present session's report.
pub(super) fn report(session: &Session) -> Option<FtInfo> {
    match session {
        Session::Off => None,
        Session::Primary(primary) => Some(primary.info()),
        Session::Backup(backup) => Some(backup.info()),
    }
}

impl FtPlugin {
    /// Replaces what is searched for; an attempt under way ends.
    pub(super) fn search_for(&self, search: Option<Search>) {
        let old = std::mem::replace(&mut *lock(&self.search), search);
        if let Some(old) = old {
            old.cancel.cancel();
        }
        self.wake();
    }

    /// The search, in a report.
    pub(super) fn show_search(&self, info: &mut FtInfo) {
        if let Some(search) = &*lock(&self.search)
            && matches!(info.state, FtState::Solo | FtState::Failed)
        {
            info.reprotection = Some(search.retry.report(Instant::now()));
        }
    }

    /// Does what is due; returns when something is due again, unless it is woken.
    fn supervise(&self) -> Option<Duration> {
        loop {
            self.inherit();
            let attempt = match self.next_attempt() {
                Ok(attempt) => attempt,
                Err(wait) => return wait,
            };
            self.make(attempt);
        }
    }

    /// After a takeover: what the primary had been told is this host's business now.
    fn inherit(&self) {
        let _changing = lock(&self.changing);
        let Session::Backup(backup) = self.session() else {
            return;
        };
        let mut search = lock(&self.search);
        if search.is_none()
            && let (Some(policy), Some(vm)) = (backup.reprotect(), lock(&self.taken_over).upgrade())
        {
            *search = Some(Search::new(policy, &vm));
        }
    }

    /// What is due, or how long there is nothing to do.
    fn next_attempt(&self) -> Result<Attempt, Option<Duration>> {
        let session = self.session();
        let info = report(&session).ok_or(None)?;
        let mut search = lock(&self.search);
        let search = search.as_mut().ok_or(None)?;
        let now = Instant::now();
        match (info.state, &session) {
            (FtState::Protected, _) => {
                search.retry.protected(now);
                return Err(None);
            }
            (FtState::Solo, Session::Backup(_)) => search.retry.alone(None, now),
            (FtState::Solo | FtState::Failed, Session::Primary(_)) => search.retry.alone(info.peer.as_deref(), now),
            _ => return Err(None),
        }
        match search.retry.next(now) {
            Next::Never => Err(None),
            Next::Wait(wait) => Err(Some(wait)),
            Next::Try(address) => Ok(Attempt {
                config: FtEnableConfig {
                    // As they were set last.
                    limits: info.limits,
                    ..search.policy.request(&address)
                },
                vm: search.vm.clone(),
                cancel: search.cancel.clone(),
                number: search.retry.attempts(),
            }),
        }
    }

    fn make(&self, attempt: Attempt) {
        let (peer, number) = (attempt.config.peer.clone(), attempt.number.to_string());
        if attempt.number == 1 {
            self.tell("reprotecting", &[("peer", peer.clone()), ("attempt", number.clone())]);
        }
        let cancel = attempt.cancel.clone();
        let Err(reason) = self.attempt(attempt) else { return };
        let mut search = lock(&self.search);
        // Otherwise it was given up meanwhile.
        let Some(search) = search.as_mut().filter(|search| Arc::ptr_eq(&search.cancel, &cancel)) else {
            return;
        };
        if search.retry.failed(&reason, Instant::now()) {
            log::warn!("ft: attempt {number} to protect the VM again, by {peer}: {reason}");
            let properties = [("peer", peer), ("attempt", number), ("reason", reason)];
            self.tell("reprotect_failed", &properties);
        }
    }

    fn attempt(&self, attempt: Attempt) -> Result<(), String> {
        let Attempt { config, vm, cancel, .. } = attempt;
        let gone = || "the VM has ended".to_string();
        let present = vm.upgrade().ok_or_else(gone)?;
        let identity = protected::own_identity(&present, &[]).map_err(|e| e.to_string())?;
        drop(present);
        let offer = ft::offer(identity, config, self.events(), &cancel).map_err(|e| e.to_string())?;
        let _changing = lock(&self.changing);
        let vm = vm.upgrade().ok_or_else(gone)?;
        // Whoever ended FT or the VM, or enabled it otherwise, did so with the lock held.
        if cancel.is_cancelled() {
            return Err("given up".into());
        }
        self.begin(offer, vm, &[]).map_err(|e| e.message)?;
        if let Some(search) = &mut *lock(&self.search) {
            search.retry.accepted();
        }
        Ok(())
    }

    fn tell(&self, event: &str, properties: &[(&str, String)]) {
        self.context.events.emit("ft", event, properties);
    }
}
