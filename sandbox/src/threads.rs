//! How threads are started.
//!
//! A thread inherits the filters of the one that starts it and can only add to them. So that a kind's list is exactly
//! what its threads may do, and so that no other thread needs the right to start threads at all, one thread starts them
//! all, the `spawner`. It may do what any of its children may, and itself does nothing else.

use std::io;
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::thread::{Builder, JoinHandle};

use crate::seccomp::{Error, Filters, Mode};

/// Kinds of threads. Each has its own row in [`crate::table`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ThreadKind {
    /// The process's first thread: starts and ends everything.
    Main,
    /// Starts all the others.
    Spawner,
    /// Serves what the guest asks of the machine.
    Control,
    /// The API's connections and their parsing.
    ApiServer,
    /// One request of the API.
    ApiWorker,
    /// Writes events.
    EventMonitor,
    /// Waits for signals.
    Signals,
    /// Brings a terminal's input to the serial port.
    SerialInput,
    /// Runs the guest.
    Vcpu,
    /// A virtio device's worker.
    Virtio,
    /// Does a disk's requests where the kernel has no io_uring.
    DiskIo,
    /// Announces the guest's addresses some more times.
    Announce,
    /// FT's controller on the primary: pre-copy and checkpoints.
    FtControl,
    /// Reads disks on the primary, to compare them.
    FtAudit,
    /// Receives on the primary.
    FtReceiver,
    /// Sends what was posted, on either side.
    FtSender,
    /// Heartbeats, on either side.
    FtPulse,
    /// Writes what may be written to disks that both hosts see.
    FtDisks,
    /// Asks the arbiter.
    FtArbiter,
    /// Slows the guest down.
    FtThrottle,
    /// Accepts connections on the backup.
    FtListen,
    /// A connection on the backup, until its primary is accepted: builds the shadow.
    FtAdmission,
    /// The same thread afterwards: receives on the backup.
    FtBackup,
    /// Writes the shadow and activates it.
    FtApplier,
    /// Looks for a new backup when the VM runs alone.
    FtSupervisor,
}

impl ThreadKind {
    /// All kinds.
    pub const ALL: [Self; 25] = [
        Self::Main,
        Self::Spawner,
        Self::Control,
        Self::ApiServer,
        Self::ApiWorker,
        Self::EventMonitor,
        Self::Signals,
        Self::SerialInput,
        Self::Vcpu,
        Self::Virtio,
        Self::DiskIo,
        Self::Announce,
        Self::FtControl,
        Self::FtAudit,
        Self::FtReceiver,
        Self::FtSender,
        Self::FtPulse,
        Self::FtDisks,
        Self::FtArbiter,
        Self::FtThrottle,
        Self::FtListen,
        Self::FtAdmission,
        Self::FtBackup,
        Self::FtApplier,
        Self::FtSupervisor,
    ];
}

type Started = io::Result<JoinHandle<()>>;

struct Order {
    name: String,
    body: Box<dyn FnOnce() + Send>,
    started: SyncSender<Started>,
}

struct Confined {
    filters: Filters,
    spawner: Sender<Order>,
}

static CONFINED: OnceLock<Confined> = OnceLock::new();

/// Filters the calling thread, which is the process's first and only one, and from now on all that are started by
/// [`spawn`]. Once per process.
pub fn confine(mode: Mode) -> Result<(), Error> {
    let Some(filters) = Filters::compile(mode)? else {
        return Ok(());
    };
    let (spawner, orders) = channel::<Order>();
    let confined = Confined { filters, spawner };
    if CONFINED.set(confined).is_err() {
        return Err(Error::Twice);
    }
    let serve = move || {
        enter(ThreadKind::Spawner);
        for order in orders {
            let started = Builder::new().name(order.name).spawn(order.body);
            // Whoever asked waits.
            let _ = order.started.send(started);
        }
    };
    Builder::new()
        .name("spawner".into())
        .spawn(serve)
        .map_err(Error::Spawner)?;
    enter(ThreadKind::Main);
    Ok(())
}

/// Starts a thread of this kind.
pub fn spawn(kind: ThreadKind, name: impl Into<String>, body: impl FnOnce() + Send + 'static) -> Started {
    let Some(confined) = CONFINED.get() else {
        return Builder::new().name(name.into()).spawn(body);
    };
    let (started, answer) = sync_channel(1);
    let order = Order {
        name: name.into(),
        body: Box::new(move || {
            enter(kind);
            body();
        }),
        started,
    };
    let gone = || io::Error::other("the thread that starts threads is gone");
    confined.spawner.send(order).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

/// Gives the calling thread the filter of `kind`, on top of those that it has: rights can only be lost.
pub fn enter(kind: ThreadKind) {
    let Some(confined) = CONFINED.get() else { return };
    if let Err(e) = confined.filters.apply(kind) {
        // A thread without its filter must not run, and none of its callers could do better.
        log::error!("seccomp filter of {kind:?}: {e}");
        eprintln!("cloud-hypervisor: seccomp filter of {kind:?}: {e}");
        std::process::abort();
    }
}
