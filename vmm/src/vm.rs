//! One VM: built parked, then booted or given a saved state, paused, resumed, reset, shut down.
//!
//! Lock order: `run` (who holds the VM still), then whatever vCPUs and devices lock. `run` is held while the VM is being
//! paused, resumed or reset, so that concurrent requests (the API's pause, FT's checkpoint, a reset) follow one another. A
//! pause can take as long as FT makes devices wait; who only asks (`vm.info`) takes no lock.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use api::{Events, VmConfig};
use hypervisor::{CpuIdEntry, Hypervisor, VcpuState, VmOptions};
use sandbox::ThreadKind;
use thiserror::Error;

use crate::devices::{DeviceManager, MachineSignals};
use crate::interrupts::{Router, lock};
use crate::landlock::Landlock;
use crate::memory::{self, GuestRam};
use crate::state::{self, PowerRequest, VmState};
use crate::vcpus::{self, Exits, GuestEvents, Pause, Vcpus};

/// Errors of a VM's life.
#[derive(Debug, Error)]
pub enum Error {
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The hypervisor refused something.
    #[error("{what}: {source}")]
    Hypervisor {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: hypervisor::Error,
    },
    /// vCPUs.
    #[error(transparent)]
    Vcpus(#[from] vcpus::Error),
    /// Devices.
    #[error(transparent)]
    Devices(#[from] crate::devices::Error),
    /// Kernel, initramfs, command line or ACPI tables.
    #[error(transparent)]
    Boot(#[from] crate::boot::Error),
    /// A saved state of another version or shape.
    #[error("saved state: {0}")]
    State(String),
    /// Its files.
    #[error(transparent)]
    Landlock(#[from] sandbox::landlock::Error),
    /// The VM was stopped for good.
    #[error("the VM was stopped: {0}")]
    Stopped(String),
}

/// What every VM of a VMM needs.
#[derive(Clone)]
pub struct VmContext {
    /// The hypervisor.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// The event monitor.
    pub events: Events,
    /// Gets what the guest asks for (power-off, reset).
    pub requests: crossbeam_channel::Sender<GuestRequest>,
    /// Which files the process may touch.
    pub landlock: Arc<Landlock>,
}

/// What a guest asks of the VMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestRequest {
    /// Power off.
    Shutdown,
    /// Reset.
    Reset,
    /// A vCPU cannot run on.
    Failed(String),
}

/// Who keeps a VM still. It runs when nobody does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Holder {
    /// Not started yet, or paused by the API.
    User = 1,
    /// A checkpoint is being taken.
    Ft = 2,
    /// FT slows the guest down; devices go on.
    Throttle = 4,
    /// The VMM changes something that the guest must not see half done (reset, backend exchange).
    Vmm = 8,
    /// Never to run again.
    Stopped = 16,
}

struct Signals {
    requests: crossbeam_channel::Sender<GuestRequest>,
    /// What the guest asked for and did not get yet: a part of its state. Asking again changes nothing.
    asked: Mutex<Option<PowerRequest>>,
}

impl Signals {
    fn send(&self, request: GuestRequest) {
        // The receiver lives as long as the VMM; after it, nobody is interested.
        let _ = self.requests.send(request);
    }

    fn ask(&self, request: PowerRequest) {
        let mut asked = lock(&self.asked);
        if asked.is_none() {
            *asked = Some(request);
            self.send(request.into());
        }
    }
}

impl From<PowerRequest> for GuestRequest {
    fn from(request: PowerRequest) -> Self {
        match request {
            PowerRequest::Shutdown => Self::Shutdown,
            PowerRequest::Reset => Self::Reset,
        }
    }
}

impl GuestEvents for Signals {
    fn reset(&self) {
        self.ask(PowerRequest::Reset);
    }

    fn failed(&self, reason: String) {
        self.send(GuestRequest::Failed(reason));
    }
}

impl MachineSignals for Signals {
    fn shutdown(&self) {
        self.ask(PowerRequest::Shutdown);
    }

    fn reset(&self) {
        self.ask(PowerRequest::Reset);
    }
}

struct Run {
    holders: u8,
    /// Since the vCPUs were parked their states are those that were read then.
    presaved: bool,
}

/// Dirty rings where this host has them; the largest, since a full one costs an exit.
fn dirty_log(hypervisor: &dyn Hypervisor) -> VmOptions {
    let dirty_ring_entries = if hypervisor.capabilities().dirty_ring {
        1 << 16
    } else {
        0
    };
    VmOptions { dirty_ring_entries }
}

/// One virtual machine.
pub struct Vm {
    config: VmConfig,
    uuid: String,
    kvm: Arc<dyn hypervisor::Vm>,
    cpuid: Vec<CpuIdEntry>,
    tsc_khz: u32,
    vcpus: Vcpus,
    devices: DeviceManager,
    ram: GuestRam,
    run: Mutex<Run>,
    /// Signalled when a hold ends, or will never end.
    released: Condvar,
    user_paused: AtomicBool,
    stopped: OnceLock<String>,
    signals: Arc<Signals>,
    /// The guest's request came with a loaded state, and nobody was told.
    untold: AtomicBool,
    ending: AtomicBool,
    /// vCPU states before the first instruction, for resets.
    power_on: Mutex<Vec<VcpuState>>,
    down: AtomicBool,
}

impl Vm {
    /// Builds the VM; nothing runs yet. `uuid` names it to FT's arbiter; a fresh one when `None`.
    pub fn new(config: VmConfig, uuid: Option<String>, context: &VmContext) -> Result<Arc<Self>, Error> {
        Self::build(config, uuid, context, None)
    }

    /// Builds a VM that runs elsewhere, under this `uuid`. Its disks in `shared`, by id, are written there for the time
    /// being: they are opened without their lock. A vCPU that cannot be pinned on this host as on the other runs where the
    /// process may.
    pub fn shadow(config: VmConfig, uuid: String, context: &VmContext, shared: &[String]) -> Result<Arc<Self>, Error> {
        Self::build(config, Some(uuid), context, Some(shared))
    }

    fn build(
        mut config: VmConfig,
        uuid: Option<String>,
        context: &VmContext,
        shadowed: Option<&[String]>,
    ) -> Result<Arc<Self>, Error> {
        context.landlock.restrict(&config)?;
        let hv = |what| move |source| Error::Hypervisor { what, source };
        let ram = GuestRam::new(&config.memory)?;
        let kvm = context
            .hypervisor
            .create_vm(dirty_log(context.hypervisor.as_ref()))
            .map_err(hv("create the VM"))?;
        ram.attach(kvm.as_ref())?;
        let vcpu_count = config.cpus.boot_vcpus;
        let supported = context
            .hypervisor
            .supported_cpuid()
            .map_err(hv("read the host's CPUID"))?;
        let tsc_khz = context.hypervisor.capabilities().tsc_khz.unwrap_or(0);
        let signals = Arc::new(Signals {
            requests: context.requests.clone(),
            asked: Mutex::default(),
        });
        let router = Router::new(kvm.clone());
        let shared = shadowed.unwrap_or_default();
        let devices = DeviceManager::new(&config, &ram, &kvm, &router, signals.clone(), shared)?;
        crate::disks::keep_formats(&mut config);
        let mut vcpus = Vec::with_capacity(usize::from(vcpu_count));
        let mut cpuid = Vec::new();
        for id in 0..vcpu_count {
            let mut vcpu = kvm.create_vcpu(id).map_err(hv("create a vCPU"))?;
            let entries = arch::cpuid::guest_cpuid(&supported, id, vcpu_count, Some(tsc_khz).filter(|k| *k > 0));
            vcpu.set_cpuid(&entries).map_err(hv("set CPUID"))?;
            if id == 0 {
                cpuid = entries;
            }
            vcpus.push(vcpu);
        }
        let exits = Exits {
            pio: devices.pio().clone(),
            mmio: devices.mmio().clone(),
            ioapic: devices.ioapic().clone(),
            events: signals.clone(),
        };
        let vcpus = Vcpus::start(vcpus, &config.cpus, &exits)?;
        match vcpus.not_pinned() {
            Some(e) if shadowed.is_none() => return Err(e.into()),
            Some(e) => log::warn!("{e}; it will run where this process may"),
            None => {}
        }
        let power_on = vcpus.states(false)?;
        Ok(Arc::new(Self {
            config,
            uuid: uuid.unwrap_or_else(|| uuid::Uuid::new_v4().to_string()),
            kvm,
            cpuid,
            tsc_khz,
            vcpus,
            devices,
            ram,
            run: Mutex::new(Run {
                holders: Holder::User as u8,
                presaved: false,
            }),
            released: Condvar::new(),
            user_paused: AtomicBool::new(true),
            stopped: OnceLock::new(),
            signals,
            untold: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            power_on: Mutex::new(power_on),
            down: AtomicBool::new(false),
        }))
    }

    /// The configuration.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Stable id of the VM.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// The hypervisor's VM.
    pub fn kvm(&self) -> &Arc<dyn hypervisor::Vm> {
        &self.kvm
    }

    /// CPUID of vCPU 0.
    pub fn cpuid(&self) -> &[CpuIdEntry] {
        &self.cpuid
    }

    /// Guest TSC frequency; 0 when the host does not tell it.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// The vCPUs.
    pub fn vcpus(&self) -> &Vcpus {
        &self.vcpus
    }

    /// The devices.
    pub fn devices(&self) -> &DeviceManager {
        &self.devices
    }

    /// Guest RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Loads the kernel and lets the boot vCPU start at its entry.
    pub fn boot(&self) -> Result<(), Error> {
        self.load()?;
        self.resume(Holder::User)
    }

    fn load(&self) -> Result<(), Error> {
        let registers = crate::boot::load(&self.config, &self.ram)?;
        self.vcpus.set_boot_registers(&registers)?;
        Ok(())
    }

    /// Holds the VM still: every vCPU out of the guest, every device at a request boundary. Idempotent for a holder.
    pub fn pause(&self, holder: Holder) -> Result<(), Error> {
        self.hold(&mut lock(&self.run), holder, Pause::default());
        Ok(())
    }

    /// The same for [`Holder::Ft`], with the vCPUs' states read at once. Whether a vCPU was late, see [`Vcpus::pause`].
    pub fn pause_for_checkpoint(&self, hurry: bool) -> bool {
        self.hold(&mut lock(&self.run), Holder::Ft, Pause { save: true, hurry })
    }

    fn hold(&self, run: &mut Run, holder: Holder, how: Pause) -> bool {
        let before = run.holders;
        run.holders |= holder as u8;
        if holder == Holder::User {
            self.user_paused.store(true, Ordering::SeqCst);
        }
        // Devices first: what the vCPUs' threads then read of their vCPUs is not changed by an interrupt any more.
        if before & !(Holder::Throttle as u8) == 0 {
            self.devices.pause();
        }
        if before == 0 {
            run.presaved = how.save;
            return self.vcpus.pause(how);
        }
        false
    }

    /// Takes a hold back; the VM runs when it was the last.
    pub fn resume(&self, holder: Holder) -> Result<(), Error> {
        let mut run = lock(&self.run);
        if let Some(reason) = self.stopped.get() {
            return Err(Error::Stopped(reason.clone()));
        }
        self.unhold(&mut run, holder);
        Ok(())
    }

    fn unhold(&self, run: &mut Run, holder: Holder) {
        let before = run.holders;
        run.holders &= !(holder as u8);
        run.presaved = false;
        if before & !(Holder::Throttle as u8) != 0 && run.holders & !(Holder::Throttle as u8) == 0 {
            self.devices.resume();
        }
        if holder == Holder::User {
            self.user_paused.store(false, Ordering::SeqCst);
        }
        if before != 0 && run.holders == 0 {
            self.vcpus.resume();
            if self.untold.swap(false, Ordering::SeqCst)
                && let Some(request) = *lock(&self.signals.asked)
            {
                self.signals.send(request.into());
            }
        }
        self.released.notify_all();
    }

    /// Holds only the vCPUs still.
    pub fn pause_vcpus(&self, holder: Holder) {
        let mut run = lock(&self.run);
        let before = run.holders;
        run.holders |= holder as u8;
        if before == 0 {
            self.vcpus.pause(Pause::default());
        }
    }

    /// Undoes [`Vm::pause_vcpus`].
    pub fn resume_vcpus(&self, holder: Holder) {
        self.unhold(&mut lock(&self.run), holder);
    }

    /// The user (or the API's pause) holds it.
    pub fn is_user_paused(&self) -> bool {
        self.user_paused.load(Ordering::SeqCst)
    }

    /// Its owner ends it: FT must not begin any more.
    pub fn set_ending(&self) {
        self.ending.store(true, Ordering::SeqCst);
    }

    /// See [`Vm::set_ending`].
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// What the guest asked for and did not get yet.
    pub fn asked(&self) -> Option<PowerRequest> {
        *lock(&self.signals.asked)
    }

    /// It never runs again here, and why.
    pub fn stop_reason(&self) -> Option<String> {
        self.stopped.get().cloned()
    }

    /// Holds the VM still for ever: this host lost or gave away the right to run it (rule R4).
    pub fn stop_for_good(&self, reason: &str) {
        let mut run = lock(&self.run);
        self.hold(&mut run, Holder::Stopped, Pause::default());
        self.stopped.get_or_init(|| reason.to_string());
        self.released.notify_all();
    }

    /// Complete state; the VM must be paused.
    pub fn state(&self) -> Result<VmState, Error> {
        let clock = self.kvm.clock().map_err(|source| Error::Hypervisor {
            what: "read kvmclock",
            source,
        })?;
        let presaved = lock(&self.run).presaved;
        let mut state = self.devices.save(self.vcpus.states(presaved)?, clock);
        (state.request, state.paused) = (self.asked(), self.is_user_paused());
        Ok(state)
    }

    /// Loads a complete state into this VM, which must never have run, and whose RAM must already be that state's.
    /// Guest clocks go on at their saved values plus `advance_ns`.
    pub fn set_state(&self, state: &VmState, advance_ns: u64) -> Result<(), Error> {
        if state.version != state::VERSION {
            return Err(Error::State(format!(
                "version {}, this VMM knows {}",
                state.version,
                state::VERSION
            )));
        }
        let clock = |source| Error::Hypervisor {
            what: "set kvmclock",
            source,
        };
        self.devices.load(state)?;
        self.kvm.set_clock(&state.clock, advance_ns).map_err(clock)?;
        self.vcpus.set_states(&state.vcpus, advance_ns)?;
        // A machine that came from another host keeps its CPUID over its resets.
        for (power_on, state) in lock(&self.power_on).iter_mut().zip(&state.vcpus) {
            power_on.cpuid.clone_from(&state.cpuid);
        }
        self.devices.kick();
        *lock(&self.signals.asked) = state.request;
        match state.request {
            // Done now, for a vCPU that fell into it cannot run.
            Some(PowerRequest::Reset) => self.reset(),
            Some(PowerRequest::Shutdown) => {
                self.untold.store(true, Ordering::SeqCst);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Resets the machine in place, as its reset button would: devices and vCPUs as at power-on, RAM zero, the kernel
    /// loaded anew. FT goes on over it: to the backup it is one more change of state. A checkpoint shows the machine as it
    /// was or as it will be, never half of it (R2): one under way is waited for, the next one waits for this.
    pub fn reset(&self) -> Result<(), Error> {
        let mut run = lock(&self.run);
        self.hold(&mut run, Holder::Vmm, Pause::default());
        while run.holders & Holder::Ft as u8 != 0 && self.stopped.get().is_none() {
            run = self.released.wait(run).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(reason) = self.stopped.get() {
            return Err(Error::Stopped(reason.clone()));
        }
        let result = (|| {
            self.devices.reset()?;
            self.ram.zero()?;
            self.vcpus.set_states(&lock(&self.power_on), 0)?;
            self.load()
        })();
        if result.is_ok() {
            *lock(&self.signals.asked) = None;
            self.unhold(&mut run, Holder::Vmm);
        }
        result
    }

    /// Presses the power button.
    pub fn power_button(&self) {
        self.devices.power_button();
    }

    /// Announces the VM's addresses on all its networks, as after a move.
    pub fn announce(&self) {
        for net in self.devices.nets() {
            net.announce();
        }
    }

    /// Announces the addresses some more times over the next second: a bridge port that has just come up, or a switch
    /// that still learns, may have dropped the first announcement.
    pub fn announce_again(self: &Arc<Self>) {
        let vm = Arc::downgrade(self);
        let again = move || {
            for pause_ms in [50, 150, 300, 500] {
                std::thread::sleep(Duration::from_millis(pause_ms));
                match vm.upgrade() {
                    Some(vm) if !vm.down.load(Ordering::SeqCst) && vm.stop_reason().is_none() => vm.announce(),
                    _ => return,
                }
            }
        };
        if let Err(e) = sandbox::spawn(ThreadKind::Announce, "announce", again) {
            log::warn!("the guest's addresses are announced only once: {e}");
        }
    }

    /// Ends all threads and closes all devices. Idempotent. Not from a vCPU or device thread.
    pub fn shutdown(&self) {
        if !self.down.swap(true, Ordering::SeqCst) {
            self.vcpus.stop();
            self.devices.shutdown();
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.shutdown();
    }
}
