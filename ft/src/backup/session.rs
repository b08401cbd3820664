//! One pairing with a primary: the protocol core, and who performs its actions.
//!
//! The receiver thread stages what comes and acknowledges whole epochs itself; it never waits for the shadow once the VM
//! is protected. The pulse thread sends heartbeats and finds silence. Any thread may step the core; its actions are
//! done in their order.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use sandbox::ThreadKind;

use super::applier::{self, Checkpoint, Checkpoints, Job};
use super::report::Measures;
use crate::arbiter::{Arbiter, answer_of};
use crate::config::{FtAudit, FtDurability, FtInfo, FtLimits, FtRole, FtState};
use crate::copies::SessionId;
use crate::core::backup::{Action, BackupState, Event, FromPrimary, ToPrimary};
use crate::core::liveness::pulse;
use crate::core::ms;
use crate::core::staging::Staging;
use crate::event::{EventSink, Status, announce};
use crate::machine::{MachineError, PAGE_SIZE, Shadow};
use crate::outbox::{Clock, Outbox, Stamp};
use crate::primary::session::lock;
use crate::transport::Stream;
use crate::wire::frame::{Frame, encode};
use crate::wire::hello::Hello;
use crate::wire::reader::{FrameReader, ReadError};

/// Bytes staged and not applied above which acknowledgements wait.
const BACKLOG: u64 = 256 << 20;

/// How long a last word may take to leave.
const LAST_WORD: Duration = Duration::from_secs(2);

/// What a session is made of.
pub(super) struct SessionParts {
    pub(super) hello: Hello,
    pub(super) node: String,
    pub(super) peer: String,
    pub(super) transport: String,
    pub(super) arbiter: Arc<dyn Arbiter>,
    pub(super) arbiter_description: String,
    pub(super) shadow: Box<dyn Shadow>,
    pub(super) outbox: Outbox,
    pub(super) clock: Clock,
    pub(super) events: EventSink,
}

/// See the module's description.
pub(super) struct Session {
    pub(super) hello: Hello,
    node: String,
    pub(super) peer: String,
    pub(super) transport: String,
    arbiter: Arc<dyn Arbiter>,
    pub(super) arbiter_description: String,
    pub(super) core: Mutex<BackupState>,
    announced: Mutex<Option<Status>>,
    pub(super) limits: Mutex<FtLimits>,
    /// What a takeover waits for.
    pub(super) waits: Mutex<Option<String>>,
    pub(super) staging: Mutex<Staging>,
    pub(super) checkpoints: Mutex<Checkpoints>,
    pub(super) shadow: Mutex<Option<Box<dyn Shadow>>>,
    jobs: Mutex<Option<crossbeam_channel::Sender<Job>>>,
    outbox: Outbox,
    pub(super) clock: Clock,
    heard: AtomicU64,
    released: AtomicU64,
    pub(super) measures: Mutex<Measures>,
    over: Mutex<bool>,
    /// Notified when the session is over, when the receiver ends, and when the threads are to end.
    ended: Condvar,
    received_all: AtomicBool,
    /// It was told to leave.
    leaves: AtomicBool,
    quit: AtomicBool,
    events: EventSink,
}

/// Log bytes that an epoch may have: the primary stops its guest at `max_lag`, give or take what is under way.
fn log_limit(limits: &FtLimits) -> u64 {
    2 * (u64::from(limits.max_lag_mib) << 20) + (64 << 20)
}

impl Session {
    pub(super) fn new(parts: SessionParts) -> Arc<Self> {
        let now = parts.clock.now();
        let limits = parts.hello.limits.clone();
        let timeout = ms(limits.heartbeat_timeout_ms.into());
        let session = Self {
            core: Mutex::new(
                BackupState::new(parts.hello.generation, timeout, BACKLOG, now)
                    .with_repair(parts.hello.audit == FtAudit::Repair),
            ),
            announced: Mutex::new(None),
            staging: Mutex::new(Staging::new(&parts.hello.identity, log_limit(&limits))),
            limits: Mutex::new(limits),
            waits: Mutex::new(None),
            checkpoints: Mutex::default(),
            shadow: Mutex::new(Some(parts.shadow)),
            jobs: Mutex::new(None),
            hello: parts.hello,
            node: parts.node,
            peer: parts.peer,
            transport: parts.transport,
            arbiter: parts.arbiter,
            arbiter_description: parts.arbiter_description,
            outbox: parts.outbox,
            clock: parts.clock,
            heard: AtomicU64::new(now),
            released: AtomicU64::new(0),
            measures: Mutex::default(),
            over: Mutex::new(false),
            ended: Condvar::new(),
            received_all: AtomicBool::new(false),
            leaves: AtomicBool::new(false),
            quit: AtomicBool::new(false),
            events: parts.events,
        };
        session.announce(&lock(&session.core));
        Arc::new(session)
    }

    /// Serves the primary until the session's end; returns why it ended, and the report if that end is final.
    pub(super) fn serve(self: &Arc<Self>, reader: FrameReader<Stream>) -> (Option<String>, Option<FtInfo>) {
        let (jobs, todo) = crossbeam_channel::unbounded();
        *lock(&self.jobs) = Some(jobs);
        let mut threads = Vec::new();
        let mut spawn = |kind, name: &str, body: Box<dyn FnOnce() + Send>| match sandbox::spawn(kind, name, body) {
            Ok(thread) => threads.push(thread),
            Err(e) => self.feed(Event::Leave(format!("the backup cannot start a thread: {e}"))),
        };
        let s = self.clone();
        spawn(
            ThreadKind::FtApplier,
            "ft-applier",
            Box::new(move || applier::run(&s, &todo)),
        );
        let s = self.clone();
        spawn(ThreadKind::FtSender, "ft-sender", Box::new(move || s.send()));
        let s = self.clone();
        spawn(ThreadKind::FtPulse, "ft-pulse", Box::new(move || s.pulse()));
        // What comes from here on is the primary's, and more of it than any other thread reads.
        sandbox::threads::enter(ThreadKind::FtBackup);
        self.receive(reader);
        self.received_all.store(true, Ordering::SeqCst);
        self.signal();
        self.wait_over();
        *lock(&self.jobs) = None;
        self.outbox.close();
        for thread in threads {
            if thread.join().is_err() {
                log::error!("ft: a thread of the backup's session panicked");
            }
        }
        let info = self.info();
        match info.state {
            FtState::Disabled => (info.reason, None),
            _ if self.quit.load(Ordering::SeqCst) && !lock(&self.core).is_over() => (info.reason, None),
            _ => (info.reason.clone(), Some(info)),
        }
    }

    fn wait_over(&self) {
        let mut over = lock(&self.over);
        while !*over && !self.quit.load(Ordering::SeqCst) {
            let waited = self.ended.wait_timeout(over, Duration::from_millis(500));
            over = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn announce(&self, core: &BackupState) {
        let status = core.status();
        let mut announced = lock(&self.announced);
        let changed = |old: &Status| (old.state, &old.reason) != (status.state, &status.reason);
        if announced.as_ref().is_none_or(changed) {
            // After a release the listener says that it listens again.
            if status.state != FtState::Disabled {
                let role = if status.state == FtState::Solo {
                    FtRole::Primary
                } else {
                    FtRole::Backup
                };
                announce(&self.events, role, &status);
            }
            *announced = Some(status);
        }
    }

    /// Steps the core and does what it wants.
    pub(super) fn feed(self: &Arc<Self>, event: Event) {
        if matches!(event, Event::Leave(_)) {
            self.leaves.store(true, Ordering::SeqCst);
        }
        let mut core = lock(&self.core);
        let actions = core.step(event, self.clock.now());
        self.announce(&core);
        let over = core.is_over();
        self.outbox.mark.store(core.applied(), Ordering::Release);
        // Jobs are queued with the core locked: their order is the core's.
        let mut rest = Vec::new();
        for action in actions {
            match action {
                Action::Apply(epoch) => self.apply(epoch),
                Action::Activate(epoch) => self.job(Job::Activate(epoch)),
                Action::Discard => self.job(Job::Discard),
                action => rest.push(action),
            }
        }
        drop(core);
        for action in rest {
            match action {
                Action::Send(message) => self.tell(message),
                Action::AskArbiter { expected } => self.ask(expected),
                Action::Disconnect => self.outbox.close(),
                Action::Farewell => self.outbox.finish(LAST_WORD),
                Action::Apply(_) | Action::Activate(_) | Action::Discard => {}
            }
        }
        if over {
            *lock(&self.over) = true;
            self.ended.notify_all();
        }
    }

    fn job(&self, job: Job) {
        if let Some(jobs) = &*lock(&self.jobs) {
            // The applier has ended only when there is no shadow any more.
            let _ = jobs.send(job);
        }
    }

    /// With the core locked: a takeover must find the checkpoint that the core decided on, and no later one.
    fn apply(&self, epoch: u64) {
        let Some(mut staged) = lock(&self.staging).take(epoch) else {
            return;
        };
        // The primary writes them to shared disks itself, unless it is lost before it said that it did.
        let shared = lock(&self.staging).take_shared(&mut staged);
        let checkpoint = Checkpoint::new(epoch, &mut staged, shared, self.clock.now());
        lock(&self.checkpoints).push(checkpoint, self.released());
        self.job(Job::Apply(epoch, Box::new(staged)));
    }

    fn tell(&self, message: ToPrimary) {
        let frame = match message {
            ToPrimary::Ack(epoch) => Frame::Ack(epoch),
            ToPrimary::Disarmed => Frame::Disarmed,
            ToPrimary::HandedOver(generation) => Frame::HandedOver(generation),
            ToPrimary::HandoverFailed { generation, reason } => Frame::HandoverFailed { generation, reason },
            ToPrimary::Bye(reason) => Frame::Bye(reason),
            ToPrimary::Mismatch(wrong) => Frame::Mismatch(wrong),
        };
        // An error shows on the receiving side too, where it is dealt with.
        if let Err(e) = self.outbox.write_now(&encode(&frame)) {
            log::warn!("ft: {frame:?} did not reach the primary: {e}");
        }
    }

    fn ask(self: &Arc<Self>, expected: u64) {
        let session = self.clone();
        let asked = sandbox::spawn(ThreadKind::FtArbiter, "ft-arbiter", move || {
            let answer = session
                .arbiter
                .test_and_set(&session.hello.identity.vm_id, expected, &session.node);
            session.feed(Event::Arbiter(answer_of(answer)));
        });
        if let Err(e) = asked {
            let reason = format!("cannot start a thread: {e}");
            self.feed(Event::Arbiter(crate::core::arbitration::Answer::Unknown { reason }));
        }
    }

    fn lost(self: &Arc<Self>, reason: String) {
        self.feed(Event::PeerLost {
            heard: self.heard.load(Ordering::Acquire),
            reason,
        });
    }

    fn broken(self: &Arc<Self>, reason: String) {
        self.feed(Event::PeerBroken {
            heard: self.heard.load(Ordering::Acquire),
            reason,
        });
    }

    /// The disks are to be synced at the end. Not when this backup only waits for the next primary: it would let it wait.
    pub(super) fn closes_disks(&self) -> bool {
        let state = lock(&self.core).status().state;
        self.leaves.load(Ordering::SeqCst) || matches!(state, FtState::Stopped | FtState::Failed)
    }

    /// This session, in the history of the disks.
    pub(super) fn id(&self) -> SessionId {
        SessionId {
            name: self.hello.node.clone(),
            generation: self.hello.generation,
        }
    }

    /// Flushes must reach this host's disks.
    pub(super) fn on_disk(&self) -> bool {
        self.hello.durability == FtDurability::DiskOfBoth
    }

    /// The receiver: returns when the connection ends.
    fn receive(self: &Arc<Self>, mut reader: FrameReader<Stream>) {
        let mut heard = || self.heard.store(self.clock.now(), Ordering::Release);
        loop {
            let (envelope, frame) = match reader.next(&mut heard) {
                Ok(got) => got,
                Err(e @ ReadError::Decode { .. }) => return self.broken(format!("log channel: {e}")),
                Err(e) => return self.lost(format!("log channel: {e}")),
            };
            if let Stamp::Echo(stamp) = &self.outbox.stamp {
                stamp.fetch_max(envelope.stamp, Ordering::AcqRel);
            }
            self.released.fetch_max(envelope.mark, Ordering::AcqRel);
            if !lock(&self.core).takes_data() {
                // The end is decided; the rest is read only so that the last word arrives.
                continue;
            }
            lock(&self.measures).add(&frame, envelope.size);
            if let Err(e) = self.take(frame) {
                // The connection is closed by the core.
                self.broken(e);
            }
        }
    }

    fn take(self: &Arc<Self>, frame: Frame) -> Result<(), String> {
        let mut staging = lock(&self.staging);
        let precopy = staging.whole() == 0;
        let result = match frame {
            Frame::Heartbeat => Ok(()),
            Frame::Pages { epoch: 0, .. } | Frame::ZeroPages { epoch: 0, .. } | Frame::Disk { epoch: 0, .. }
                if precopy =>
            {
                let checked = match &frame {
                    Frame::Pages { runs, .. } | Frame::ZeroPages { runs, .. } => staging.check_pages(runs),
                    Frame::Disk { disk, change, .. } => staging.check_copy(*disk, change),
                    _ => Ok(()),
                };
                drop(staging);
                checked.map_err(|e| e.to_string())?;
                if let Err(e) = self.write_through(frame) {
                    // This host's fault, not the primary's.
                    self.feed(Event::Leave(format!("the backup cannot take a copy: {e}")));
                }
                return Ok(());
            }
            Frame::Pages { epoch, runs, data } => staging.pages(epoch, runs, data),
            Frame::ZeroPages { epoch, runs } => staging.zero_pages(epoch, &runs),
            Frame::Lines { epoch, pages, data } => staging.lines(epoch, pages, data),
            Frame::Disk { epoch, disk, change } => {
                self.check_kept(&staging)?;
                staging.disk(epoch, disk, change)
            }
            Frame::Input { epoch, input } => staging.input(epoch, input),
            Frame::Outputs { epoch, outputs } => {
                self.check_kept(&staging)?;
                staging.outputs(epoch, outputs)
            }
            Frame::Audit { epoch, sums } => staging.audit(epoch, sums),
            Frame::DiskAudit { epoch, sums } => staging.disk_audit(epoch, sums),
            Frame::State { epoch, data } => staging.state(epoch, &data),
            Frame::End(marker) => {
                let (bytes, flushes) = staging.end(&marker).map_err(|e| e.to_string())?;
                drop(staging);
                // The first one ends pre-copy, whose disk blocks count from now on.
                let first = marker.epoch == 1;
                // Nor before shared disks were found to be the primary's.
                let checks = first && self.hello.identity.disks.iter().any(|disk| disk.shared.is_some());
                let durable = (flushes || first) && self.on_disk() || checks;
                self.feed(Event::Staged {
                    epoch: marker.epoch,
                    bytes,
                    durable,
                });
                return Ok(());
            }
            Frame::Disarm(reason) => {
                drop(staging);
                self.feed(Event::Peer(FromPrimary::Disarm(reason)));
                return Ok(());
            }
            Frame::Handover(epoch) => {
                drop(staging);
                self.feed(Event::Peer(FromPrimary::Handover(epoch)));
                return Ok(());
            }
            Frame::Limits(limits) => {
                staging.set_log_limit(log_limit(&limits));
                drop(staging);
                let timeout = ms(limits.heartbeat_timeout_ms.into());
                *lock(&self.limits) = limits;
                self.feed(Event::Peer(FromPrimary::Timeout(timeout)));
                return Ok(());
            }
            other => {
                let what: String = format!("{other:?}").chars().take(40).collect();
                return Err(format!("the primary sent what only a backup sends: {what}"));
            }
        };
        result.map_err(|e| e.to_string())
    }

    /// A primary holds no more than that itself; one that never says that it let go of it must not fill this host.
    fn check_kept(&self, staging: &Staging) -> Result<(), String> {
        let kept = lock(&self.checkpoints).kept_bytes();
        if kept > staging.log_limit() {
            return Err(format!("the primary holds {kept} bytes of outputs and makes more"));
        }
        Ok(())
    }

    /// Pre-copy: nothing counts yet, so it goes straight into the shadow.
    fn write_through(&self, frame: Frame) -> Result<(), MachineError> {
        let mut shadow = lock(&self.shadow);
        let Some(shadow) = shadow.as_deref_mut() else {
            return Ok(());
        };
        match frame {
            Frame::Pages { runs, data, .. } => {
                let mut at = 0;
                runs.iter().try_for_each(|run| {
                    let len = run.count as usize * PAGE_SIZE;
                    at += len;
                    shadow.write_memory(run.gpa, &data[at - len..at])
                })
            }
            Frame::ZeroPages { runs, .. } => applier::write_zeroes(shadow, &runs),
            Frame::Disk { disk, change, .. } => shadow.apply_disk(disk, &change),
            _ => Ok(()),
        }
    }

    fn send(self: &Arc<Self>) {
        if let Err(e) = self.outbox.run() {
            self.lost(format!("log channel: {e}"));
        }
    }

    fn pulse(self: &Arc<Self>) {
        self.beat();
        // The last word is on its way; a primary that does not hang up then is hung up on.
        let over = lock(&self.over);
        let waits = |_: &mut bool| !self.received_all.load(Ordering::SeqCst) && !self.quit.load(Ordering::SeqCst);
        drop(self.ended.wait_timeout_while(over, LAST_WORD, waits));
        self.outbox.close();
    }

    fn beat(self: &Arc<Self>) {
        loop {
            let (heartbeat, timeout) = {
                let limits = lock(&self.limits);
                (ms(limits.heartbeat_ms.into()), ms(limits.heartbeat_timeout_ms.into()))
            };
            let (now, mut written) = (self.clock.now(), self.outbox.last_write());
            if now.saturating_sub(written) >= heartbeat {
                self.outbox.post(encode(&Frame::Heartbeat));
                written = now;
            }
            let heard = self.heard.load(Ordering::Acquire);
            self.feed(Event::Tick { heard });
            let over = lock(&self.over);
            if *over || self.quit.load(Ordering::SeqCst) {
                return;
            }
            let sleep = Duration::from_nanos(pulse(heartbeat, timeout, written, heard, now));
            let waited = self.ended.wait_timeout(over, sleep);
            if *waited.unwrap_or_else(PoisonError::into_inner).0 {
                return;
            }
        }
    }

    /// The last epoch whose outputs left, as far as the primary told.
    pub(super) fn released(&self) -> u64 {
        self.released.load(Ordering::Acquire)
    }

    pub(super) fn may_leave(&self) -> bool {
        lock(&self.core).may_leave()
    }

    pub(super) fn quits(&self) -> bool {
        self.quit.load(Ordering::SeqCst)
    }

    /// The threads are to end, whatever the state.
    pub(super) fn quit(&self) {
        self.quit.store(true, Ordering::SeqCst);
        self.outbox.close();
        self.signal();
    }

    /// Lets everybody look at the flags who waits for one of them; with the lock, so that nobody misses it between
    /// looking and sleeping.
    fn signal(&self) {
        drop(lock(&self.over));
        self.ended.notify_all();
    }
}
