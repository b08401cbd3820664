//! What the primary's threads share: the protocol core, and who performs its actions.
//!
//! `feed` steps the core and performs what can be done from any thread (release, slow down, send, ask, disconnect); what
//! pauses or changes the VM goes to the controller's mailbox.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sandbox::ThreadKind;

use crate::arbiter::{Arbiter, answer_of};
use crate::audit::disk::DiskAudit;
use crate::config::{FtAudit, FtDurability, FtLimits, FtRole, FtState};
use crate::copies::{CopyClaim, SessionId};
use crate::core::arbitration::Answer;
use crate::core::liveness::pulse;
use crate::core::primary::{Action, Event, FromBackup, PrimaryState, ToBackup};
use crate::core::{MAX_IN_FLIGHT, Nanos};
use crate::event::{EventSink, Status, announce};
use crate::interposer::Interposer;
use crate::machine::{Identity, Protected};
use crate::outbox::{Clock, Outbox};
use crate::primary::disks::Disks;
use crate::primary::entries::Log;
use crate::primary::metrics::Metrics;
use crate::primary::repair::Repairs;
use crate::reprotect::Reprotect;
use crate::transport::Stream;
use crate::wire::frame::{Frame, encode};
use crate::wire::reader::FrameReader;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Outputs released at once.
const AT_ONCE: usize = 256;

/// Longest wait for what the backup said before it hung up.
const LAST_WORD: Duration = Duration::from_millis(500);

/// What a session is made of.
pub struct SessionParts {
    pub(super) identity: Identity,
    pub(super) arbiter: Arc<dyn Arbiter>,
    pub(super) arbiter_description: String,
    pub(super) node: String,
    pub(super) peer: String,
    pub(super) transport: String,
    pub(super) durability: FtDurability,
    pub(super) audit: FtAudit,
    pub(super) generation: u64,
    /// What the backup's copies of the disks are.
    pub(super) copies: Vec<CopyClaim>,
    pub(super) limits: FtLimits,
    pub(super) outbox: Outbox,
    pub(super) clock: Clock,
    pub(super) events: EventSink,
    pub(super) reprotect: Option<Reprotect>,
}

/// What the controller is to do next.
#[derive(Default)]
pub(super) struct Mailbox {
    pub(super) actions: VecDeque<Action>,
    /// Something changed that it should look at.
    pub(super) woken: bool,
    /// It sleeps until then unless it is woken.
    pub(super) until: Nanos,
    /// FT is over and its last action done.
    pub(super) finished: bool,
}

/// The interposer stops device workers a little later than the core stops the guest.
pub(super) fn interposer_bound(limits: &FtLimits) -> u64 {
    u64::from(limits.max_lag_mib) << 20
}

/// The primary's side of one pairing.
pub struct Session {
    pub(super) machine: Arc<dyn Protected>,
    pub(super) identity: Identity,
    arbiter: Arc<dyn Arbiter>,
    pub(super) arbiter_description: String,
    node: String,
    pub(super) peer: String,
    pub(super) transport: String,
    pub(super) durability: FtDurability,
    /// This session, in the history of the disks.
    pub(super) id: SessionId,
    pub(super) copies: Vec<CopyClaim>,
    pub(super) audit: FtAudit,
    pub(super) repairs: Repairs,
    pub(super) core: Mutex<PrimaryState>,
    announced: Mutex<Option<Status>>,
    /// The VM was stopped for good. Only then the state says so: whoever reads `stopped` may count on it (R4).
    stopped: AtomicBool,
    pub(super) limits: Mutex<FtLimits>,
    pub(super) outbox: Arc<Outbox>,
    pub(super) log: Arc<Log>,
    pub(super) interposer: Arc<Interposer>,
    pub(super) clock: Clock,
    heard: AtomicU64,
    /// The last epoch that the backup applied, as far as it told.
    applied: AtomicU64,
    pub(super) mailbox: Mutex<Mailbox>,
    /// Wakes the controller.
    changed: Condvar,
    /// Wakes everybody who waits for the end, or for the backup's last word.
    ended: Condvar,
    /// Outputs leave in order: whoever takes them out of the interposer holds this until they have left.
    pub(super) releasing: Mutex<()>,
    pub(super) disks: Disks,
    /// The guest is not slowed down any more. Held while it is slowed down.
    alone: Mutex<bool>,
    pub(super) metrics: Mutex<Metrics>,
    pub(super) quit: AtomicBool,
    received_all: AtomicBool,
    pub(super) events: EventSink,
    pub(super) reprotect: Option<Reprotect>,
}

impl Session {
    pub(super) fn new(machine: Arc<dyn Protected>, parts: SessionParts) -> Arc<Self> {
        Arc::new_cyclic(|weak: &std::sync::Weak<Self>| {
            let outbox = Arc::new(parts.outbox);
            let log = Arc::new(Log::new(outbox.clone(), DiskAudit::new(&parts.identity)));
            let session = weak.clone();
            let waker = Arc::new(move || {
                if let Some(session) = session.upgrade() {
                    session.wake();
                }
            });
            let interposer = Interposer::new(1, interposer_bound(&parts.limits), log.clone(), waker);
            let now = parts.clock.now();
            let mut core = PrimaryState::new(parts.generation, (&parts.limits).into(), MAX_IN_FLIGHT, now);
            let disks = Disks::new(&parts.identity);
            if disks.any() {
                core = core.with_shared_disks(parts.durability == FtDurability::DiskOfBoth);
            }
            let session = Self {
                machine,
                identity: parts.identity,
                arbiter: parts.arbiter,
                arbiter_description: parts.arbiter_description,
                id: SessionId {
                    name: parts.node.clone(),
                    generation: parts.generation,
                },
                node: parts.node,
                peer: parts.peer,
                transport: parts.transport,
                durability: parts.durability,
                copies: parts.copies,
                audit: parts.audit,
                repairs: Repairs::default(),
                core: Mutex::new(core),
                announced: Mutex::new(None),
                stopped: AtomicBool::new(false),
                limits: Mutex::new(parts.limits),
                outbox,
                log,
                interposer,
                clock: parts.clock,
                heard: AtomicU64::new(now),
                applied: AtomicU64::new(0),
                mailbox: Mutex::default(),
                changed: Condvar::new(),
                ended: Condvar::new(),
                releasing: Mutex::new(()),
                disks,
                alone: Mutex::new(false),
                metrics: Mutex::default(),
                quit: AtomicBool::new(false),
                received_all: AtomicBool::new(false),
                events: parts.events,
                reprotect: parts.reprotect,
            };
            session.announce(&lock(&session.core));
            session
        })
    }

    pub(super) fn wake(&self) {
        lock(&self.mailbox).woken = true;
        self.changed.notify_one();
    }

    /// The controller's sleep until it is woken, or until `deadline`.
    pub(super) fn sleep(&self, deadline: Nanos) {
        let mut mailbox = lock(&self.mailbox);
        mailbox.until = deadline;
        while mailbox.actions.is_empty() && !mailbox.woken && !self.quit.load(Ordering::SeqCst) {
            let left = deadline.saturating_sub(self.clock.now());
            if left == 0 {
                break;
            }
            let waited = self.changed.wait_timeout(mailbox, Duration::from_nanos(left));
            mailbox = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        mailbox.woken = false;
        mailbox.until = 0;
    }

    /// Waits for the end of FT, but not longer than `timeout`.
    pub(super) fn wait_end(&self, timeout: Duration) {
        let end = self.clock.now().saturating_add(timeout.as_nanos() as u64);
        let mut mailbox = lock(&self.mailbox);
        while !mailbox.finished && !self.quit.load(Ordering::SeqCst) {
            let left = end.saturating_sub(self.clock.now());
            if left == 0 {
                return;
            }
            let waited = self.ended.wait_timeout(mailbox, Duration::from_nanos(left));
            mailbox = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn is_finished(&self) -> bool {
        lock(&self.mailbox).finished
    }

    pub(super) fn finish(&self) {
        self.log.audit.close();
        lock(&self.mailbox).finished = true;
        self.ended.notify_all();
        self.disks.wake();
    }

    /// All threads are to end.
    pub(super) fn quit(&self) {
        self.quit.store(true, Ordering::SeqCst);
        self.outbox.close();
        self.log.audit.close();
        // With the lock, so that nobody misses it between looking and sleeping.
        drop(lock(&self.mailbox));
        self.changed.notify_all();
        self.ended.notify_all();
        self.disks.wake();
    }

    /// Called with the core locked, so that changes are announced in their order.
    fn announce(&self, core: &PrimaryState) {
        let status = core.status();
        if status.state == FtState::Stopped && !self.stopped.load(Ordering::SeqCst) {
            return;
        }
        let mut announced = lock(&self.announced);
        let changed = |old: &Status| (old.state, &old.reason) != (status.state, &status.reason);
        if announced.as_ref().is_none_or(changed) {
            announce(&self.events, FtRole::Primary, &status);
            *announced = Some(status);
        }
    }

    /// The controller has stopped the VM.
    pub(super) fn machine_stopped(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.announce(&lock(&self.core));
    }

    /// The state, as far as it has come about.
    pub(super) fn status(&self) -> Status {
        let decided = lock(&self.core).status();
        if decided.state == FtState::Stopped && !self.stopped.load(Ordering::SeqCst) {
            return lock(&self.announced).clone().unwrap_or(decided);
        }
        decided
    }

    /// Steps the core; what pauses or changes the VM is returned, the rest is done.
    pub(super) fn step(self: &Arc<Self>, event: Event) -> Vec<Action> {
        let mut core = lock(&self.core);
        let event = match event {
            // Read under the core's lock: an older value must not overwrite a newer one.
            Event::Tick { .. } => self.tick(),
            event => event,
        };
        core.note_held(self.interposer.unwritten());
        let actions = core.step(event, self.clock.now());
        self.announce(&core);
        drop(core);
        actions.into_iter().filter_map(|action| self.perform(action)).collect()
    }

    fn tick(&self) -> Event {
        Event::Tick {
            heard: self.heard.load(Ordering::Acquire),
            running_bytes: self.interposer.running_bytes(),
            output: self.interposer.has_output(),
        }
    }

    /// A tick; its values are read when it is processed.
    pub(super) const TICK: Event = Event::Tick {
        heard: 0,
        running_bytes: 0,
        output: false,
    };

    /// Steps the core from any thread but the controller.
    pub(super) fn feed(self: &Arc<Self>, event: Event) {
        let heavy = self.step(event);
        let deadline = lock(&self.core).deadline();
        let mut mailbox = lock(&self.mailbox);
        if !heavy.is_empty() || deadline.is_some_and(|at| at < mailbox.until) {
            mailbox.actions.extend(heavy);
            mailbox.woken = true;
            self.changed.notify_one();
        }
    }

    fn perform(self: &Arc<Self>, action: Action) -> Option<Action> {
        match action {
            Action::Release(epoch) => self.release(epoch),
            Action::Send(ToBackup::Disarm(reason)) => drop(self.outbox.post(encode(&Frame::Disarm(reason)))),
            Action::Send(ToBackup::Handover(epoch)) => {
                // Another thread may just be about to: the mark of this frame must cover what left.
                self.release(epoch);
                // The guest stands still and everything is written: the backup needs the locks now.
                self.yield_disks(|core| !core.is_over());
                self.outbox.post(encode(&Frame::Handover(epoch)));
            }
            Action::Write(epoch) => self.disks.may_write(epoch),
            Action::AskArbiter { expected } => {
                self.disks.wake();
                self.ask(expected);
            }
            Action::Disconnect => self.outbox.close(),
            Action::Throttle(_) => self.throttle(),
            heavy => return Some(heavy),
        }
        None
    }

    /// From any thread, for the controller may be busy sending the very epoch that makes the guest too fast. What counts
    /// is the core's newest word.
    fn throttle(&self) {
        let alone = lock(&self.alone);
        if !*alone {
            let percent = lock(&self.core).throttle();
            self.machine.throttle(percent);
        }
    }

    /// The guest runs at full speed from here on.
    pub(super) fn end_throttle(&self) {
        *lock(&self.alone) = true;
        self.machine.throttle(100);
    }

    /// The core's word may be old by now: this thread, or the whole process, may have been stopped since. So the lease is
    /// looked at again before each few outputs (R4); what it does not cover stays held for the next word.
    fn release(&self, epoch: u64) {
        let order = lock(&self.releasing);
        let mut ages = Vec::new();
        let mut taken = VecDeque::from(self.interposer.take_committed(epoch));
        let mut left = epoch;
        'epochs: while let Some(held) = taken.front_mut() {
            let (count, age) = (held.outputs.len(), held.age());
            while !held.outputs.is_empty() {
                if !lock(&self.core).may_release(self.clock.now()) {
                    left = held.epoch - 1;
                    break 'epochs;
                }
                let rest = held.outputs.split_off(held.outputs.len().min(AT_ONCE));
                self.machine.release(std::mem::replace(&mut held.outputs, rest));
            }
            ages.push((count, age));
            taken.pop_front();
        }
        self.interposer.put_back(taken.into());
        self.disks.released.fetch_max(left, Ordering::AcqRel);
        self.mark();
        drop(order);
        let mut metrics = lock(&self.metrics);
        for (count, age) in ages {
            metrics.released(count, age);
        }
    }

    /// Lets the machine forget which blocks of its disks were changed in epochs that the backup has applied. While epoch
    /// `running` runs, from the thread that ends it.
    pub(super) fn confirm(&self, running: u64) {
        let committed = lock(&self.core).committed();
        self.machine
            .confirm(self.applied.load(Ordering::Acquire).min(committed), running);
    }

    fn ask(self: &Arc<Self>, expected: u64) {
        // This side stops; a win would keep the other from going on.
        if self.quit.load(Ordering::SeqCst) {
            return;
        }
        let session = self.clone();
        let asked = sandbox::spawn(ThreadKind::FtArbiter, "ft-arbiter", move || {
            let answer = session
                .arbiter
                .test_and_set(&session.identity.vm_id, expected, &session.node);
            session.feed(Event::Arbiter(answer_of(answer)));
        });
        if let Err(e) = asked {
            log::error!("ft: cannot ask the arbiter: {e}");
            let mut core = lock(&self.core);
            let reason = format!("cannot start a thread: {e}");
            core.step(Event::Arbiter(Answer::Unknown { reason }), self.clock.now());
        }
    }

    /// The receiver thread.
    pub(super) fn receive(self: &Arc<Self>, reader: FrameReader<Stream>) {
        self.receive_all(reader);
        self.received_all.store(true, Ordering::SeqCst);
        // With the lock, so that nobody misses it between looking and sleeping.
        drop(lock(&self.mailbox));
        self.ended.notify_all();
    }

    /// A backup that leaves says why before it hangs up. Whoever fails to write to it lets the receiver hear that.
    pub(super) fn hear_last_word(&self) {
        let mailbox = lock(&self.mailbox);
        let waits = |_: &mut Mailbox| !self.received_all.load(Ordering::SeqCst) && !self.quit.load(Ordering::SeqCst);
        drop(self.ended.wait_timeout_while(mailbox, LAST_WORD, waits));
    }

    fn receive_all(self: &Arc<Self>, mut reader: FrameReader<Stream>) {
        let mut heard = || self.heard.store(self.clock.now(), Ordering::Release);
        loop {
            let (envelope, frame) = match reader.next(&mut heard) {
                Ok(got) => got,
                Err(e) => return self.feed(Event::PeerLost(format!("log channel: {e}"))),
            };
            self.applied.fetch_max(envelope.mark, Ordering::AcqRel);
            let message = match frame {
                Frame::Heartbeat => FromBackup::Heartbeat,
                Frame::Ack(epoch) => FromBackup::Ack(epoch),
                Frame::Disarmed => FromBackup::Disarmed,
                Frame::HandedOver(generation) => FromBackup::HandedOver(generation),
                Frame::HandoverFailed { generation, reason } => FromBackup::HandoverFailed { generation, reason },
                Frame::Bye(reason) => FromBackup::Bye(reason),
                Frame::Mismatch(wrong) => match self.note_mismatch(&wrong) {
                    Ok(message) => message,
                    Err(reason) => return self.feed(Event::PeerLost(reason)),
                },
                _ => {
                    return self.feed(Event::PeerLost(
                        "the backup sent a frame that only a primary sends".into(),
                    ));
                }
            };
            let acknowledged = if let FromBackup::Ack(epoch) = message {
                Some(epoch)
            } else {
                None
            };
            self.feed(Event::Peer {
                echo: envelope.stamp,
                message,
            });
            if let Some(epoch) = acknowledged {
                lock(&self.metrics).commit(epoch);
            }
        }
    }

    /// The sender thread.
    pub(super) fn send(self: &Arc<Self>) {
        if let Err(e) = self.outbox.run() {
            self.hear_last_word();
            self.feed(Event::PeerLost(format!("log channel: {e}")));
        }
    }

    /// The pulse thread: heartbeats, silence, deadlines, retries. Never blocks on the network.
    pub(super) fn pulse(self: &Arc<Self>) {
        while !self.quit.load(Ordering::SeqCst) {
            let (heartbeat, timeout, over) = {
                let core = lock(&self.core);
                (core.limits().heartbeat, core.limits().timeout, core.is_over())
            };
            if over {
                return;
            }
            let (now, mut written) = (self.clock.now(), self.outbox.last_write());
            if now.saturating_sub(written) >= heartbeat {
                self.outbox.post(encode(&Frame::Heartbeat));
                written = now;
            }
            self.feed(Self::TICK);
            let heard = self.heard.load(Ordering::Acquire);
            self.wait_end(Duration::from_nanos(pulse(heartbeat, timeout, written, heard, now)));
        }
    }
}
