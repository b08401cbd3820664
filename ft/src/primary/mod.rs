//! The primary: protects a running VM.
//!
//! * [`offer`] connects and shakes hands, [`Offer::begin`] starts the threads, [`enable`] does both; [`Primary`] is the
//!   operator's handle;
//! * `session`: what the threads share: the protocol core and who performs its actions;
//! * `controller`: the thread that copies (pre-copy, checkpoints) and that alone pauses and resumes the VM;
//! * `precopy`, `checkpoint`: what it does in the two stages; `repair`: what it sends anew; `rush`: when checkpoints go before
//!   what else the host does;
//! * `disks`: the thread that writes to shared disks what may be written;
//! * `metrics`: measures for `ft info`; `report`: what is told of a session.
//!
//! Threads: controller; sender (writes what device workers post); receiver (acknowledgements: it releases outputs
//! itself, so that nobody has to be woken); disks (if any are shared); pulse (heartbeats, silence, retries); audit (reads
//! disks); one per question to the arbiter.
//! Lock order: the release lock or the writing lock, core, then interposer, then outbox or audit. Machine calls are made
//! without any of them but the first two.

pub mod checkpoint;
pub mod controller;
mod disks;
mod entries;
mod handshake;
pub mod metrics;
pub mod precopy;
mod repair;
mod report;
mod rush;
pub mod session;
mod stage;

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use sandbox::ThreadKind;

use crate::Error;
use crate::config::{FtEnableConfig, FtInfo, FtLimitsPatch, FtState};
use crate::core::primary::Event;
use crate::event::EventSink;
use crate::machine::Protected;
use crate::transport::Stream;
use crate::wire::frame::{Frame, encode};
use crate::wire::reader::FrameReader;
pub(crate) use handshake::unique_name;
pub use handshake::{Cancel, Offer, offer};
use session::{Session, lock};

/// Longest wait for the end of FT or of a handover.
const PATIENCE: Duration = Duration::from_secs(30);

/// A VM under protection (or on the way there, or its last state).
pub struct Primary {
    session: Arc<Session>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Changes of limits follow one another.
    configuring: Mutex<()>,
}

/// Begins to protect `machine`. Returns when the backup has accepted; pre-copy then runs in the background, and
/// [`Primary::info`] tells how far it is. On an error the VM is untouched.
pub fn enable(machine: Arc<dyn Protected>, config: FtEnableConfig, events: EventSink) -> Result<Primary, Error> {
    offer(machine.identity()?, config, events, &Cancel::default())?.begin(machine)
}

impl Primary {
    fn start(session: Arc<Session>, reader: FrameReader<Stream>) -> Result<Self, Error> {
        let primary = Self {
            session,
            threads: Mutex::default(),
            configuring: Mutex::default(),
        };
        if let Err(e) = primary.start_threads(reader) {
            primary.quit();
            return Err(e);
        }
        Ok(primary)
    }

    fn start_threads(&self, reader: FrameReader<Stream>) -> Result<(), Error> {
        let session = &self.session;
        let mut threads = lock(&self.threads);
        let mut spawn = |kind: ThreadKind, name: &str, body: Box<dyn FnOnce() + Send>| {
            let started = sandbox::spawn(kind, name, body);
            threads.push(started.map_err(|source| Error::Host {
                what: "start a thread of FT",
                source,
            })?);
            Ok::<(), Error>(())
        };
        let s = session.clone();
        spawn(
            ThreadKind::FtReceiver,
            "ft-receiver",
            Box::new(move || s.receive(reader)),
        )?;
        let s = session.clone();
        spawn(ThreadKind::FtSender, "ft-sender", Box::new(move || s.send()))?;
        if session.identity.disks.iter().any(|disk| disk.shared.is_some()) {
            let s = session.clone();
            spawn(ThreadKind::FtDisks, "ft-disks", Box::new(move || s.write_disks()))?;
        }
        let s = session.clone();
        spawn(ThreadKind::FtPulse, "ft-pulse", Box::new(move || s.pulse()))?;
        let s = session.clone();
        spawn(
            ThreadKind::FtAudit,
            "ft-audit",
            Box::new(move || s.log.audit.run(s.machine.as_ref())),
        )?;
        let s = session.clone();
        spawn(
            ThreadKind::FtControl,
            "ft-control",
            Box::new(move || controller::run(&s)),
        )
    }

    /// The report for `ft info`.
    pub fn info(&self) -> FtInfo {
        self.session.info()
    }

    /// Why the VM does not go on yet although FT has ended.
    pub fn unfinished(&self) -> Option<String> {
        let session = &self.session;
        let ended = lock(&session.core).is_over() && !session.is_finished();
        ended.then(|| {
            let (bytes, why) = (session.interposer.unwritten(), session.disks.trouble());
            let why = why.unwrap_or_else(|| "it is being written".into());
            format!("FT has ended, and {bytes} bytes wait for shared disks: {why}")
        })
    }

    fn finished(&self) -> Result<(), Error> {
        self.unfinished().map_or(Ok(()), |why| Err(Error::Ended(why)))
    }

    /// Ends FT: the backup first promises not to take over, then outputs held are released and the VM runs on as an
    /// ordinary one. Also for a VM that ends by its owner's will.
    pub fn disable(&self) -> Result<(), Error> {
        let status = lock(&self.session.core).status();
        match status.state {
            FtState::Disabled | FtState::Stopped => {
                // Decided, but perhaps not done yet.
                self.session.wait_end(PATIENCE);
                return self.finished();
            }
            FtState::WaitingForArbiter => {
                let reason = status.reason.unwrap_or_default();
                let message = format!("FT cannot be ended while it is open who runs the VM ({reason})");
                return Err(Error::WrongState(message));
            }
            _ => {}
        }
        if lock(&self.session.core).hands_over() {
            return Err(Error::WrongState(
                "a planned failover is under way: FT cannot be ended now".into(),
            ));
        }
        self.session.feed(Event::Disable("FT was disabled".into()));
        self.session.wait_end(PATIENCE);
        let status = lock(&self.session.core).status();
        match status.state {
            FtState::Disabled | FtState::Solo | FtState::Failed => self.finished(),
            state => {
                let reason = status.reason.unwrap_or_default();
                Err(Error::Ended(format!(
                    "FT was not ended as asked, its state is {state:?}: {reason}"
                )))
            }
        }
    }

    /// Makes the backup the VM; this side's VM stops. Returns when that is done.
    pub fn failover(&self) -> Result<(), Error> {
        let status = lock(&self.session.core).status();
        if status.state != FtState::Protected {
            let message = format!(
                "a planned failover needs a protected VM, the state is {:?}",
                status.state
            );
            return Err(Error::WrongState(message));
        }
        self.session.feed(Event::Failover);
        if !lock(&self.session.core).hands_over() {
            return Err(Error::WrongState(
                "FT is being ended: a failover cannot begin now".into(),
            ));
        }
        self.session.wait_end(PATIENCE);
        let status = self.session.status();
        if status.state == FtState::Stopped {
            return Ok(());
        }
        let reason = status.reason.unwrap_or_default();
        Err(Error::Ended(format!(
            "the backup did not take the VM over, it runs on here ({:?}): {reason}",
            status.state
        )))
    }

    /// Changes limits.
    pub fn configure(&self, patch: &FtLimitsPatch) -> Result<(), Error> {
        let _configuring = lock(&self.configuring);
        let before = lock(&self.session.limits).clone();
        let changed = patch.apply(&before);
        changed.validate()?;
        let (event, frame) = (
            Event::SetLimits((&changed).into()),
            encode(&Frame::Limits(changed.clone())),
        );
        if changed.heartbeat_timeout_ms > before.heartbeat_timeout_ms {
            // The backup first: every frame that is stamped after the core knows must come to it after this one, for a
            // stamp that returns makes the lease longer. A lost connection shows elsewhere.
            let _ = self.session.outbox.write_now(&frame);
            self.session.feed(event);
        } else {
            self.session.feed(event);
            self.session.outbox.post(frame);
        }
        self.session.interposer.set_bound(session::interposer_bound(&changed));
        *lock(&self.session.limits) = changed;
        Ok(())
    }

    /// Waits until what the guest wrote to shared disks is on them. The VM must stand still, or there is no end to it.
    pub fn settle(&self) -> Result<(), Error> {
        self.session.settle(PATIENCE)
    }

    /// This side is broken: its VM stops, the backup is left to take over.
    pub fn give_up(&self) {
        self.quit();
    }

    fn quit(&self) {
        self.session.quit();
        for thread in lock(&self.threads).drain(..) {
            if thread.join().is_err() {
                log::error!("ft: a thread of the primary panicked");
            }
        }
    }

    /// Ends FT as [`Primary::disable`] does, and all its threads. If it is open who runs the VM, it stops here.
    pub fn shutdown(&self) {
        if let Err(e) = self.disable() {
            log::warn!("ft: {e}");
        }
        self.quit();
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        self.quit();
    }
}
