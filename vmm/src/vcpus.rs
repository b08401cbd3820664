//! The vCPU threads and how they are paused.
//!
//! Each vCPU has a thread that holds the vCPU's mutex while the guest runs and gives it back while it is parked; whoever
//! pauses the VM may then take the mutex to save or load state. Lock order: `Shared::control`, never while holding a
//! vCPU; then a `Passage`. A parked thread waits on a condition variable; a kick gets a running one out of the guest.
//!
//! For a checkpoint each thread reads its vCPU's state itself, all at the same time, once all vCPUs are out of the guest
//! (none can send another an interrupt that the state of neither would have). Guest RAM stands still from then on too, so
//! whoever paused the VM goes on without waiting for the states. A thread that is late, because it has no processor, gets
//! real-time priority until it has done that: the whole VM waits for it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api::config::{CpusConfig, MAX_HOST_CPUS};
use devices::bus::Bus;
use devices::ioapic::Ioapic;
use hypervisor::{BootRegisters, Vcpu, VcpuExit, VcpuKicker, VcpuState};
use sandbox::ThreadKind;
use thiserror::Error;

use crate::interrupts::lock;
use crate::passage::Passage;

/// Errors of running vCPUs.
#[derive(Debug, Error)]
pub enum Error {
    /// The hypervisor refused a call for this vCPU.
    #[error("vCPU {0}: {1}")]
    Vcpu(usize, hypervisor::Error),
    /// No thread to be had.
    #[error("cannot start the thread of vCPU {0}: {1}")]
    Thread(usize, std::io::Error),
    /// Its affinity.
    #[error("vCPU {0} cannot run on the host's CPUs {1:?}, which cpus.affinity names: {2}")]
    Affinity(usize, Vec<u16>, std::io::Error),
    /// A saved state for another number of vCPUs.
    #[error("the state has {found} vCPUs, the VM has {expected}")]
    Count {
        /// vCPUs of this VM.
        expected: usize,
        /// vCPUs in the state.
        found: usize,
    },
}

/// What the guest asks of the VMM by way of a vCPU.
pub trait GuestEvents: Send + Sync {
    /// Triple fault or reset request.
    fn reset(&self);
    /// A vCPU can run no further.
    fn failed(&self, reason: String);
}

/// What vCPU exits reach.
#[derive(Clone)]
pub struct Exits {
    /// I/O ports.
    pub pio: Arc<Bus>,
    /// Memory-mapped devices.
    pub mmio: Arc<Bus>,
    /// Gets ends of interrupt.
    pub ioapic: Arc<Ioapic>,
    /// Resets and failures.
    pub events: Arc<dyn GuestEvents>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Target {
    Run,
    Park,
    Exit,
}

struct Control {
    target: Target,
    parked: usize,
    running: usize,
    /// How often states were loaded.
    loads: u64,
    kickers: Vec<Arc<dyn VcpuKicker>>,
    /// The first vCPU that does not run where it should.
    not_pinned: Option<Error>,
}

struct Shared {
    control: Mutex<Control>,
    /// Whoever parks the vCPUs will save their states. Set before they are kicked.
    save: AtomicBool,
    /// vCPUs that are in the guest, or on their way there.
    inside: AtomicUsize,
    /// Of each vCPU.
    passages: Vec<Passage>,
    /// Signalled when `target` changes.
    changed: Condvar,
    /// Signalled when all are parked, or one ends.
    all_parked: Condvar,
}

/// A vCPU that has a processor is out of the guest sooner.
const LATE: Duration = Duration::from_micros(100);

/// Longest wait of a vCPU thread for the other vCPUs to leave the guest. Beyond it one is busy with a long access to a
/// device; then the states are read by whoever asks for them.
const ALL_OUT: Duration = Duration::from_millis(2);

impl Shared {
    /// Waits until no vCPU is in the guest, but not longer than `limit`. They are on their way out, so this is short and not
    /// worth a sleep.
    fn all_out(&self, limit: Duration) -> bool {
        let began = Instant::now();
        while self.inside.load(Ordering::SeqCst) > 0 {
            if began.elapsed() > limit {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    fn hasten(&self) {
        self.passages.iter().for_each(Passage::hasten);
    }
}

/// How vCPUs are paused.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pause {
    /// Each thread reads its vCPU's state before it parks, in parallel, for [`Vcpus::states`], which waits for that:
    /// [`Vcpus::pause`] returns as soon as all are out of the guest. Devices must be held then.
    pub save: bool,
    /// With `save`: threads go before others of the host at once, not only when they are late.
    pub hurry: bool,
}

/// All vCPUs of a VM. Made parked.
pub struct Vcpus {
    vcpus: Vec<Arc<Mutex<Box<dyn Vcpu>>>>,
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Vcpus {
    /// Takes vCPUs that are ready to run and starts their threads, parked, on the host's CPUs that `config` names.
    pub fn start(vcpus: Vec<Box<dyn Vcpu>>, config: &CpusConfig, exits: &Exits) -> Result<Self, Error> {
        let vcpus: Vec<_> = vcpus.into_iter().map(|v| Arc::new(Mutex::new(v))).collect();
        let shared = Arc::new(Shared {
            control: Mutex::new(Control {
                target: Target::Park,
                parked: 0,
                running: vcpus.len(),
                loads: 0,
                kickers: Vec::with_capacity(vcpus.len()),
                not_pinned: None,
            }),
            save: AtomicBool::new(false),
            inside: AtomicUsize::new(0),
            passages: vcpus.iter().map(|_| Passage::default()).collect(),
            changed: Condvar::new(),
            all_parked: Condvar::new(),
        });
        let this = Self {
            vcpus,
            shared,
            threads: Mutex::new(Vec::new()),
        };
        for (i, vcpu) in this.vcpus.iter().enumerate() {
            let (vcpu, shared, exits) = (vcpu.clone(), this.shared.clone(), exits.clone());
            let host_cpus = u8::try_from(i).map_or(&[][..], |id| config.host_cpus(id)).to_vec();
            let run = move || {
                if let Err(e) = pin(&host_cpus) {
                    let not_pinned = &mut lock(&shared.control).not_pinned;
                    not_pinned.get_or_insert(Error::Affinity(i, host_cpus, e));
                }
                vcpu_thread(i, &vcpu, &shared, &exits);
            };
            let thread = sandbox::spawn(ThreadKind::Vcpu, format!("vcpu{i}"), run).map_err(|e| Error::Thread(i, e));
            match thread {
                Ok(thread) => lock(&this.threads).push(thread),
                Err(e) => {
                    lock(&this.shared.control).running = i;
                    return Err(e);
                }
            }
        }
        this.wait_parked();
        Ok(this)
    }

    /// The first vCPU that cannot run on the host's CPUs that it should run on, once: it runs where the process may.
    pub fn not_pinned(&self) -> Option<Error> {
        lock(&self.shared.control).not_pinned.take()
    }

    /// Number of vCPUs.
    pub fn len(&self) -> usize {
        self.vcpus.len()
    }

    /// There is always at least one; for completeness.
    pub fn is_empty(&self) -> bool {
        self.vcpus.is_empty()
    }

    /// Gets every vCPU out of the guest and waits until all are parked; their I/O instructions are complete. Whether one was
    /// late, if that was looked at.
    pub fn pause(&self, how: Pause) -> bool {
        let mut control = lock(&self.shared.control);
        if control.target == Target::Run {
            control.target = Target::Park;
            self.shared.save.store(how.save, Ordering::SeqCst);
            for kicker in &control.kickers {
                kicker.kick();
            }
            self.shared.changed.notify_all();
        }
        drop(control);
        if !how.save {
            self.wait_parked();
            return false;
        }
        if how.hurry {
            self.shared.hasten();
        }
        let late = !self.shared.all_out(LATE);
        if late {
            self.shared.hasten();
            // Its vCPU is still held by a thread that was inside, until it has read the state.
            if !self.shared.all_out(ALL_OUT) {
                self.wait_parked();
            }
        }
        late
    }

    fn wait_parked(&self) {
        let mut control = lock(&self.shared.control);
        while control.parked < control.running {
            control = self
                .shared
                .all_parked
                .wait(control)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets the vCPUs run on.
    pub fn resume(&self) {
        let mut control = lock(&self.shared.control);
        if control.target == Target::Park {
            control.target = Target::Run;
            self.shared.changed.notify_all();
        }
    }

    /// States of all vCPUs; only while paused. Their time stamp counters are all as of the moment of the first. With
    /// `presaved` those that the last pause read; nothing may have reached the vCPUs since.
    pub fn states(&self, presaved: bool) -> Result<Vec<VcpuState>, Error> {
        let mut states = Vec::with_capacity(self.vcpus.len());
        for (i, vcpu) in self.vcpus.iter().enumerate() {
            states.push(lock(vcpu).state(presaved).map_err(|e| Error::Vcpu(i, e))?);
        }
        if let Some(moment) = states.first().map(|s| s.host_tsc) {
            for state in &mut states {
                state.tsc = state.tsc.wrapping_sub(state.host_tsc.wrapping_sub(moment));
                state.host_tsc = moment;
            }
        }
        Ok(states)
    }

    /// Loads states; only while paused. Time stamp counters go on at their saved value plus `advance_ns`.
    pub fn set_states(&self, states: &[VcpuState], advance_ns: u64) -> Result<(), Error> {
        if states.len() != self.vcpus.len() {
            return Err(Error::Count {
                expected: self.vcpus.len(),
                found: states.len(),
            });
        }
        let base = hypervisor::kvm::host_tsc();
        for (i, (vcpu, state)) in self.vcpus.iter().zip(states).enumerate() {
            lock(vcpu)
                .set_state(state, advance_ns, base)
                .map_err(|e| Error::Vcpu(i, e))?;
        }
        lock(&self.shared.control).loads += 1;
        Ok(())
    }

    /// Lets the boot vCPU start at a kernel's entry; only while paused, in power-on state.
    pub fn set_boot_registers(&self, registers: &BootRegisters) -> Result<(), Error> {
        match self.vcpus.first() {
            Some(boot) => lock(boot).set_boot_registers(registers).map_err(|e| Error::Vcpu(0, e)),
            None => Ok(()),
        }
    }

    /// Ends all vCPU threads. Must not be called from one of them.
    pub fn stop(&self) {
        let mut control = lock(&self.shared.control);
        control.target = Target::Exit;
        for kicker in &control.kickers {
            kicker.kick();
        }
        self.shared.changed.notify_all();
        drop(control);
        for thread in lock(&self.threads).drain(..) {
            if thread.join().is_err() {
                log::error!("a vCPU thread panicked");
            }
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Lets the calling thread run on `host_cpus` only, of which the kernel leaves out those that the host does not have or the
/// process may not use. None given: nothing changes.
fn pin(host_cpus: &[u16]) -> std::io::Result<()> {
    if host_cpus.is_empty() {
        return Ok(());
    }
    // SAFETY: a set of CPUs is an array of integers, for which zeroes are a value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for cpu in host_cpus.iter().filter(|cpu| **cpu < MAX_HOST_CPUS) {
        // SAFETY: writes one bit of `set`, which has room for MAX_HOST_CPUS (CPU_SETSIZE).
        unsafe { libc::CPU_SET(usize::from(*cpu), &mut set) };
    }
    // SAFETY: reads `set`, whose size is given; 0 is the calling thread.
    match unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Parks as long as asked. True: the thread counts as inside of the guest now; false: it must end.
fn wait_for_run(index: usize, shared: &Shared, kicker: &dyn VcpuKicker) -> bool {
    let mut control = lock(&shared.control);
    let mut counted = false;
    loop {
        match control.target {
            Target::Run => {
                // Under the lock: a kick that follows a later change of `target` is not lost, and whoever changes it then
                // waits for this thread to come out of the guest.
                kicker.clear();
                shared.passages[index].enter();
                shared.inside.fetch_add(1, Ordering::SeqCst);
                break;
            }
            Target::Exit => break,
            Target::Park => {
                if !counted {
                    counted = true;
                    control.parked += 1;
                    if control.parked == control.running {
                        shared.all_parked.notify_all();
                    }
                }
                control = shared.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
    if counted {
        control.parked -= 1;
    }
    control.target == Target::Run
}

fn vcpu_thread(index: usize, vcpu: &Mutex<Box<dyn Vcpu>>, shared: &Shared, exits: &Exits) {
    let kicker = lock(vcpu).kicker();
    lock(&shared.control).kickers.push(kicker.clone());
    // As of which load of states this vCPU cannot go on. Only another state (a reset) changes that: the VM may be held and
    // let go (a checkpoint) before somebody handles the event, and what KVM runs after a triple fault is anything.
    let mut fallen = None;
    while wait_for_run(index, shared, kicker.as_ref()) {
        let loads = lock(&shared.control).loads;
        if fallen != Some(loads) {
            let mut held = lock(vcpu);
            let outcome = run_until_kicked(held.as_mut(), exits);
            shared.inside.fetch_sub(1, Ordering::SeqCst);
            match &outcome {
                Ok(Left::Kicked) if shared.save.load(Ordering::SeqCst) && shared.all_out(ALL_OUT) => {
                    if let Err(e) = held.presave() {
                        log::debug!("vCPU {index}: its state is not read ahead: {e}");
                    }
                }
                Ok(Left::TripleFault) => log_triple_fault(index, held.as_mut()),
                _ => {}
            }
            drop(held);
            shared.passages[index].leave();
            match outcome {
                Ok(Left::Kicked) => continue,
                Ok(Left::Reset | Left::TripleFault) => exits.events.reset(),
                Err(reason) => exits.events.failed(format!("vCPU {index}: {reason}")),
            }
            fallen = Some(loads);
        } else {
            shared.inside.fetch_sub(1, Ordering::SeqCst);
            shared.passages[index].leave();
        }
        let mut control = lock(&shared.control);
        while control.target == Target::Run {
            control = shared.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
    }
    let mut control = lock(&shared.control);
    control.running -= 1;
    shared.all_parked.notify_all();
}

/// Why a vCPU left its run loop.
enum Left {
    Kicked,
    Reset,
    TripleFault,
}

/// Tells where the guest was, for whoever looks for the fault in it.
fn log_triple_fault(index: usize, vcpu: &mut dyn Vcpu) {
    match vcpu.state(false) {
        Ok(s) => log::warn!(
            "vCPU {index}: triple fault, the VM is reset; rip {:#x}, rsp {:#x}, cr2 {:#x}, cr3 {:#x}, events {:?}",
            s.regs.rip,
            s.regs.rsp,
            s.sregs.cr2,
            s.sregs.cr3,
            s.events
        ),
        Err(e) => log::warn!("vCPU {index}: triple fault, the VM is reset; its state cannot be read: {e}"),
    }
}

fn run_until_kicked(vcpu: &mut dyn Vcpu, exits: &Exits) -> Result<Left, String> {
    loop {
        match vcpu.run().map_err(|e| e.to_string())? {
            VcpuExit::PioRead(port, data) => {
                exits.pio.read(u64::from(port), data);
            }
            VcpuExit::PioWrite(port, data) => {
                exits.pio.write(u64::from(port), data);
            }
            VcpuExit::MmioRead(addr, data) => {
                exits.mmio.read(addr, data);
            }
            VcpuExit::MmioWrite(addr, data) => {
                exits.mmio.write(addr, data);
            }
            VcpuExit::IoapicEoi(vector) => exits.ioapic.end_of_interrupt(vector),
            VcpuExit::Interrupted => return Ok(Left::Kicked),
            VcpuExit::Reset => return Ok(Left::Reset),
            VcpuExit::Shutdown => return Ok(Left::TripleFault),
            VcpuExit::Hlt => return Err("halted without a local APIC".into()),
            VcpuExit::Again => {}
        }
    }
}
