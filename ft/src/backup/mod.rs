//! The backup: holds the shadow of a VM that runs elsewhere, and becomes that VM when the primary is lost.
//!
//! * [`receive()`] listens; [`Backup`] is the operator's handle;
//! * `listener`: accepts connections, drops foreign ones, refuses a second primary;
//! * `admission`: from the primary's hello to the shadow, or to a refusal;
//! * `session`: one pairing: the protocol core and who performs its actions; its receiver, pulse and sender threads;
//! * `report`: what `ft info` shows of a session;
//! * `applier`: the thread that writes committed epochs into the shadow, and activates it.

mod admission;
mod applier;
mod listener;
mod report;
mod session;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sandbox::ThreadKind;

use crate::Error;
use crate::arbiter;
use crate::config::{FtEnableConfig, FtInfo, FtReceiveConfig, FtRole, FtState, FtTls};
use crate::core::backup::Event;
use crate::event::{EventSink, Status, announce};
use crate::machine::ShadowHost;
use crate::primary::session::lock;
use crate::reprotect::Policy;
use crate::transport::{Address, Listener, Security, tls};
use session::Session;

/// Longest wait for a session to end when it was told to.
const PATIENCE: Duration = Duration::from_secs(30);

/// What listener, sessions and handle share.
struct Shared {
    host: Arc<dyn ShadowHost>,
    config: FtReceiveConfig,
    tls: Option<tls::Server>,
    address: Address,
    events: EventSink,
    slot: Mutex<Slot>,
    changed: Condvar,
    quit: AtomicBool,
    /// A byte in here makes the listener look at `quit` and `over`.
    waker: UnixStream,
}

#[derive(Default)]
struct Slot {
    /// A primary is being admitted or served.
    taken: bool,
    session: Option<Arc<Session>>,
    /// The last session's end is final: this backup waits for nobody any more.
    over: Option<FtInfo>,
    /// How the VM that was taken over is to be protected again.
    next: Option<Policy>,
    /// Why the last session ended.
    reason: Option<String>,
}

/// A backup that waits, shadows, or has taken over.
pub struct Backup {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Listens for a primary.
pub fn receive(host: Arc<dyn ShadowHost>, config: FtReceiveConfig, events: EventSink) -> Result<Backup, Error> {
    let address = Address::parse(&config.listen)?;
    if let Some(description) = &config.arbiter {
        arbiter::open(description)?;
    }
    let security = Security {
        insecure: config.insecure,
        tls: config.tls.as_ref(),
    };
    let tls = config.tls.as_ref().map(tls::Server::new).transpose()?;
    let listener = address.listen(security)?;
    let address = listener.address().map_err(|source| Error::Host {
        what: "ask for the listener's address",
        source,
    })?;
    let pair = UnixStream::pair().and_then(|(a, b)| a.set_nonblocking(true).map(|()| (a, b)));
    let (waker, woken) = pair.map_err(|source| Error::Host {
        what: "make a socket pair",
        source,
    })?;
    let shared = Arc::new(Shared {
        waker,
        host,
        config,
        tls,
        address,
        events,
        slot: Mutex::default(),
        changed: Condvar::new(),
        quit: AtomicBool::new(false),
    });
    shared.announce_listening(None);
    let backup = Backup {
        shared: shared.clone(),
        threads: Mutex::default(),
    };
    backup.start(shared, listener, woken)?;
    Ok(backup)
}

impl Shared {
    fn announce_listening(&self, reason: Option<String>) {
        let status = Status {
            state: FtState::Listening,
            reason,
            generation: 0,
            epoch: 0,
            committed: 0,
        };
        announce(&self.events, FtRole::Backup, &status);
    }

    fn quits(&self) -> bool {
        self.quit.load(Ordering::SeqCst)
    }

    /// Nobody is listened for any more.
    fn set_quit(&self) {
        self.quit.store(true, Ordering::SeqCst);
        self.wake_listener();
    }

    fn wake_listener(&self) {
        // When the socket is full, there is a byte in it.
        let _ = (&self.waker).write(&[1]);
    }

    /// Claims the one place for a primary.
    fn claim(&self) -> bool {
        let mut slot = lock(&self.slot);
        let free = !slot.taken && slot.over.is_none() && !self.quits();
        slot.taken |= free;
        free
    }

    /// The session (or the attempt) is over.
    fn leave(&self, reason: Option<String>, over: Option<FtInfo>) {
        let mut slot = lock(&self.slot);
        slot.next = self.policy(&slot);
        slot.taken = false;
        slot.session = None;
        slot.reason.clone_from(&reason);
        slot.over = over;
        let listens = slot.over.is_none();
        drop(slot);
        self.changed.notify_all();
        self.wake_listener();
        if listens && !self.quits() {
            self.announce_listening(reason);
        }
    }

    fn policy(&self, slot: &Slot) -> Option<Policy> {
        let session = slot.session.as_ref()?;
        let reprotect = session.hello.reprotect.clone()?;
        let info = session.info();
        let config = FtEnableConfig {
            peer: String::new(),
            arbiter: info.arbiter,
            insecure: self.config.insecure,
            // Whoever comes is known by the name that it is reached by.
            tls: self.config.tls.clone().map(|tls| FtTls { peer: None, ..tls }),
            durability: info.durability,
            shared_disks: info.shared_disks,
            audit: info.audit.policy,
            limits: info.limits,
            auto_reprotect: true,
            spares: Vec::new(),
        };
        let listened = [self.config.listen.clone(), self.address.to_string()];
        (info.state == FtState::Solo).then(|| Policy::of_backup(reprotect, listened, config))
    }

    fn wait_free(&self) -> bool {
        let end = Instant::now() + PATIENCE;
        let mut slot = lock(&self.slot);
        while slot.taken {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            slot = self
                .changed
                .wait_timeout(slot, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }
}

impl Backup {
    fn start(&self, shared: Arc<Shared>, listener: Listener, woken: UnixStream) -> Result<(), Error> {
        let run = move || listener::run(&shared, &listener, &woken);
        let thread = sandbox::spawn(ThreadKind::FtListen, "ft-listen", run).map_err(|source| Error::Host {
            what: "start a thread of FT",
            source,
        })?;
        lock(&self.threads).push(thread);
        Ok(())
    }

    /// Where it listens: as configured, with the port that was given if port 0 was asked for.
    pub fn address(&self) -> String {
        self.shared.address.to_string()
    }

    /// The report for `ft info`.
    pub fn info(&self) -> FtInfo {
        let slot = lock(&self.shared.slot);
        if let Some(info) = &slot.over {
            return info.clone();
        }
        if let Some(session) = &slot.session {
            return session.info();
        }
        let mut info = FtInfo::disabled();
        let ended = self.shared.quits();
        info.state = if ended { FtState::Disabled } else { FtState::Listening };
        info.role = if ended { FtRole::None } else { FtRole::Backup };
        info.reason.clone_from(&slot.reason);
        info.arbiter.clone_from(&self.shared.config.arbiter);
        info
    }

    /// After a takeover: how the VM is to be protected again, if its primary was told to see to that.
    pub fn reprotect(&self) -> Option<Policy> {
        let slot = lock(&self.shared.slot);
        slot.next.clone().or_else(|| self.shared.policy(&slot))
    }

    /// Ends this backup: its primary is told that nobody will take over, and runs on without protection. After a
    /// takeover there is nothing to end.
    pub fn disable(&self) -> Result<(), Error> {
        let session = lock(&self.shared.slot).session.clone();
        if let Some(session) = &session {
            if !session.may_leave() {
                let message = "the takeover has begun (the arbiter was asked): this backup cannot leave now";
                return Err(Error::WrongState(message.into()));
            }
            session.feed(Event::Leave("FT was disabled on the backup".into()));
        }
        self.shared.set_quit();
        if !self.shared.wait_free() {
            return Err(Error::Ended("the backup's session did not end in time".into()));
        }
        Ok(())
    }

    fn quit(&self) {
        self.shared.set_quit();
        if let Some(session) = &lock(&self.shared.slot).session {
            session.quit();
        }
        for thread in lock(&self.threads).drain(..) {
            if thread.join().is_err() {
                log::error!("ft: a thread of the backup panicked");
            }
        }
    }

    /// Ends this backup and all its threads. A VM that it took over runs on.
    pub fn shutdown(&self) {
        if let Err(e) = self.disable() {
            log::warn!("ft: {e}");
        }
        self.quit();
    }
}

impl Drop for Backup {
    fn drop(&mut self) {
        self.quit();
    }
}
