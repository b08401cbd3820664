//! The VMM as the REST API sees it: one VM at most, its life, and FT.
//!
//! Lock order: `slot`, then the VM's own locks. FT is called without `slot` held, because a takeover puts its VM there.
//! Guest requests (power-off, reset) are served by one control thread, which ends with the VMM.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use api::{
    ApiError, Events, Request, Response, RestoreConfig, VmConfig, VmInfo, VmSnapshotConfig, VmState as ApiVmState,
    VmmPingResponse, VmmService,
};
use hypervisor::Hypervisor;
use sandbox::ThreadKind;
use sandbox::landlock::Access;

use crate::interrupts::lock;
use crate::landlock::Landlock;
use crate::plugin::Plugin;
use crate::snapshot;
use crate::state::PowerRequest;
use crate::vm::{self, GuestRequest, Holder, Vm, VmContext};

/// How a VMM is made.
pub struct VmmOptions {
    /// The event monitor.
    pub events: Events,
    /// Arbiter for `ft enable` when the request names none: `file:DIR` or `etcd:HOST:PORT`.
    pub ft_arbiter: Option<String>,
    /// Which files the process may touch.
    pub landlock: Landlock,
}

#[derive(Default)]
struct Slot {
    config: Option<VmConfig>,
    vm: Option<Arc<Vm>>,
}

/// The virtual machine monitor.
pub struct Vmm {
    context: VmContext,
    slot: Arc<Mutex<Slot>>,
    plugin: Option<Arc<dyn Plugin>>,
    exit: Arc<(Mutex<bool>, Condvar)>,
}

fn error(status: u16, code: &str, message: impl std::fmt::Display) -> ApiError {
    ApiError {
        status,
        code: code.into(),
        message: message.to_string(),
    }
}

fn internal(e: impl std::fmt::Display) -> ApiError {
    error(500, "internal", e)
}

fn not_created() -> ApiError {
    error(404, "vm_not_created", "there is no VM: create one with vm.create first")
}

fn not_booted() -> ApiError {
    error(
        405,
        "vm_not_booted",
        "the VM is not running: boot it with vm.boot first",
    )
}

impl Vmm {
    /// Opens the hypervisor and starts the control thread.
    pub fn new(options: VmmOptions) -> anyhow::Result<Arc<Self>> {
        let hypervisor: Arc<dyn Hypervisor> = Arc::new(hypervisor::kvm::KvmHypervisor::new()?);
        let (requests, from_guest) = crossbeam_channel::unbounded();
        let context = VmContext {
            hypervisor,
            events: options.events,
            requests,
            landlock: Arc::new(options.landlock),
        };
        let slot: Arc<Mutex<Slot>> = Arc::default();
        #[cfg(feature = "ft")]
        let plugin: Option<Arc<dyn Plugin>> = {
            let adopted = slot.clone();
            let adopt = Arc::new(move |vm: Arc<Vm>| {
                let mut slot = lock(&adopted);
                slot.config = Some(vm.config().clone());
                slot.vm = Some(vm);
            });
            Some(crate::ft::FtPlugin::new(context.clone(), options.ft_arbiter, adopt)?)
        };
        #[cfg(not(feature = "ft"))]
        let plugin = {
            if options.ft_arbiter.is_some() {
                anyhow::bail!("this build has no fault tolerance (cargo feature `ft`)");
            }
            None
        };
        let vmm = Arc::new(Self {
            context,
            slot,
            plugin,
            exit: Arc::default(),
        });
        let weak = Arc::downgrade(&vmm);
        sandbox::spawn(ThreadKind::Control, "vmm-control", move || {
            while_alive(&weak, |vmm, request| vmm.guest_request(request), &from_guest);
        })?;
        Ok(vmm)
    }

    /// Blocks until the VMM is to end: vmm.shutdown, or a guest's power-off.
    pub fn wait_exit(&self) {
        let (flag, changed) = &*self.exit;
        let mut done = lock(flag);
        while !*done {
            done = changed.wait(done).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Asks [`Vmm::wait_exit`] to return.
    pub fn request_exit(&self) {
        let (flag, changed) = &*self.exit;
        *lock(flag) = true;
        changed.notify_all();
    }

    /// Ends the VM and FT; taps, sockets and files of this VMM are gone afterwards. Idempotent.
    pub fn close(&self) {
        self.end_vm("the VMM shuts down");
        if let Some(plugin) = &self.plugin {
            plugin.shutdown();
        }
        self.end_vm("the VMM shuts down");
    }

    fn emit(&self, event: &str) {
        self.context.events.emit("vm", event, &[]);
    }

    /// Requests of a VM that is gone, was reset meanwhile, or runs elsewhere now, are not served.
    fn is_asked(&self, request: PowerRequest) -> Option<Arc<Vm>> {
        self.vm()
            .filter(|vm| vm.asked() == Some(request) && vm.stop_reason().is_none())
    }

    fn guest_request(&self, request: GuestRequest) {
        match request {
            GuestRequest::Shutdown => {
                if self.is_asked(PowerRequest::Shutdown).is_none() {
                    return;
                }
                log::info!("the guest powered off");
                self.end_vm("the guest powered off");
                self.emit("shutdown");
                self.request_exit();
            }
            GuestRequest::Reset => {
                let Some(vm) = self.is_asked(PowerRequest::Reset) else {
                    return;
                };
                log::info!("the guest asked for a reset");
                self.emit("rebooting");
                match vm.reset() {
                    Ok(()) => self.emit("rebooted"),
                    Err(vm::Error::Stopped(reason)) => log::info!("the VM is not reset, it was stopped: {reason}"),
                    Err(e) => {
                        log::error!("reset of the VM failed, it is stopped: {e}");
                        self.end_vm("the reset of the VM failed");
                        self.emit("shutdown");
                    }
                }
            }
            GuestRequest::Failed(reason) => {
                log::error!("the VM is stopped: {reason}");
                if let Some(plugin) = &self.plugin {
                    plugin.vm_failed(&reason);
                }
                self.end_vm(&reason);
                self.emit("panic");
                self.request_exit();
            }
        }
    }

    fn vm(&self) -> Option<Arc<Vm>> {
        lock(&self.slot).vm.clone()
    }

    fn booted(&self) -> Result<Arc<Vm>, ApiError> {
        let slot = lock(&self.slot);
        match (&slot.vm, &slot.config) {
            (Some(vm), _) => Ok(vm.clone()),
            (None, Some(_)) => Err(not_booted()),
            (None, None) => Err(not_created()),
        }
    }

    fn end_vm(&self, reason: &str) {
        if let Some(vm) = self.vm()
            && let Some(plugin) = &self.plugin
        {
            vm.set_ending();
            plugin.vm_ends(reason);
        }
        let vm = lock(&self.slot).vm.take();
        if let Some(vm) = vm {
            vm.shutdown();
        }
    }

    /// A VM that was stopped here (another VMM runs it now) still holds its disks and taps, which a shadow needs.
    #[cfg(feature = "ft")]
    fn drop_stopped_vm(&self) {
        if self.vm().is_some_and(|vm| vm.stop_reason().is_some()) {
            self.end_vm("this VMM becomes a backup");
            lock(&self.slot).config = None;
        }
    }

    /// The slot, for a VM that is to be made; locked, so that no other is made meanwhile.
    fn vacant_slot(&self) -> Result<MutexGuard<'_, Slot>, ApiError> {
        if let Some(reason) = self.plugin.as_ref().and_then(|p| p.refuses_vm()) {
            return Err(error(409, "ft_backup", reason));
        }
        let slot = lock(&self.slot);
        if slot.config.is_some() {
            return Err(error(
                409,
                "vm_already_created",
                "there is a VM already: delete it with vm.delete first",
            ));
        }
        Ok(slot)
    }

    fn create(&self, config: VmConfig) -> Result<Response, ApiError> {
        let mut slot = self.vacant_slot()?;
        slot.config = Some(config);
        drop(slot);
        self.emit("created");
        Ok(Response::Empty)
    }

    fn boot(&self) -> Result<Response, ApiError> {
        // A takeover would put its VM in the place of this one.
        if let Some(reason) = self.plugin.as_ref().and_then(|p| p.refuses_vm()) {
            return Err(error(409, "ft_backup", reason));
        }
        let mut slot = lock(&self.slot);
        let Some(config) = slot.config.clone() else {
            return Err(not_created());
        };
        if slot.vm.is_some() {
            return Err(error(405, "vm_already_booted", "the VM is already running"));
        }
        self.emit("booting");
        self.begins(&config)?;
        let vm = Vm::new(config, None, &self.context).map_err(internal)?;
        vm.boot().map_err(internal)?;
        // With the formats of its disks, so that they are the same at the next boot.
        slot.config = Some(vm.config().clone());
        slot.vm = Some(vm);
        drop(slot);
        self.emit("booted");
        Ok(Response::Empty)
    }

    fn begins(&self, config: &VmConfig) -> Result<(), ApiError> {
        let told = self.plugin.as_ref().map(|plugin| plugin.vm_begins(config));
        told.unwrap_or(Ok(())).map_err(internal)
    }

    fn pause(&self) -> Result<Response, ApiError> {
        let vm = self.booted()?;
        if vm.is_user_paused() {
            return Err(error(405, "vm_already_paused", "the VM is paused already"));
        }
        self.emit("pausing");
        vm.pause(Holder::User).map_err(internal)?;
        self.emit("paused");
        Ok(Response::Empty)
    }

    fn resume(&self) -> Result<Response, ApiError> {
        let vm = self.booted()?;
        if !vm.is_user_paused() {
            return Err(error(405, "vm_not_paused", "the VM is not paused"));
        }
        self.emit("resuming");
        vm.resume(Holder::User).map_err(|e| error(409, "vm_stopped", e))?;
        self.emit("resumed");
        Ok(Response::Empty)
    }

    fn reboot(&self) -> Result<Response, ApiError> {
        let vm = self.booted()?;
        self.emit("rebooting");
        vm.reset().map_err(|e| match e {
            vm::Error::Stopped(_) => error(409, "vm_stopped", e),
            e => internal(e),
        })?;
        self.emit("rebooted");
        Ok(Response::Empty)
    }

    fn snapshot(&self, request: &VmSnapshotConfig) -> Result<Response, ApiError> {
        let vm = self.booted()?;
        if !vm.is_user_paused() {
            return Err(error(
                405,
                "vm_not_paused",
                "pause the VM with vm.pause before a snapshot",
            ));
        }
        let dir = snapshot::directory(&request.destination_url).map_err(|e| error(400, "bad_url", e))?;
        self.emit("snapshotting");
        if let Some(plugin) = &self.plugin {
            plugin.settle()?;
        }
        let state = vm.state().map_err(internal)?;
        vm.devices().flush_disks().map_err(internal)?;
        snapshot::save(&dir, vm.config(), &state, vm.ram()).map_err(internal)?;
        self.emit("snapshotted");
        Ok(Response::Empty)
    }

    fn restore(&self, request: &RestoreConfig) -> Result<Response, ApiError> {
        let mut slot = self.vacant_slot()?;
        let dir = snapshot::directory(&request.source_url).map_err(|e| error(400, "bad_url", e))?;
        self.emit("restoring");
        let (config, state) = snapshot::load(&dir).map_err(|e| error(400, "bad_snapshot", e))?;
        config.validate().map_err(|e| error(400, "bad_snapshot", e))?;
        self.context.landlock.allow(&dir, Access::READ);
        self.begins(&config)?;
        let vm = Vm::new(config.clone(), None, &self.context).map_err(internal)?;
        let loaded = snapshot::load_memory(&dir, vm.ram())
            .map_err(|e| error(400, "bad_snapshot", e))
            .and_then(|()| vm.set_state(&state, 0).map_err(|e| error(400, "bad_snapshot", e)));
        if let Err(e) = loaded {
            vm.shutdown();
            return Err(e);
        }
        if request.resume {
            vm.resume(Holder::User).map_err(internal)?;
        }
        slot.config = Some(config);
        slot.vm = Some(vm);
        drop(slot);
        self.emit("restored");
        Ok(Response::Empty)
    }

    fn info(&self) -> Result<Response, ApiError> {
        let slot = lock(&self.slot);
        let Some(config) = slot.config.clone() else {
            return Err(not_created());
        };
        let (state, memory_actual_size) = match &slot.vm {
            None => (ApiVmState::Created, config.memory.size),
            Some(vm) if vm.stop_reason().is_some() => (ApiVmState::Shutdown, vm.ram().size()),
            Some(vm) if vm.is_user_paused() => (ApiVmState::Paused, vm.ram().size()),
            Some(vm) => (ApiVmState::Running, vm.ram().size()),
        };
        let device_tree = slot.vm.as_ref().map(|vm| vm.devices().tree());
        Ok(Response::Info(Box::new(VmInfo {
            config,
            state,
            memory_actual_size: Some(memory_actual_size),
            device_tree,
        })))
    }

    fn ping(&self) -> Response {
        let mut features = vec!["kvm".to_string()];
        if self.plugin.is_some() {
            features.push("ft".into());
        }
        Response::Ping(VmmPingResponse {
            build_version: env!("CARGO_PKG_VERSION").into(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: i64::from(std::process::id()),
            features,
        })
    }
}

impl VmmService for Vmm {
    fn call(&self, request: Request) -> Result<Response, ApiError> {
        match request {
            Request::VmmPing => Ok(self.ping()),
            Request::VmmShutdown => {
                self.request_exit();
                Ok(Response::Empty)
            }
            Request::VmCreate(config) => self.create(*config),
            Request::VmBoot => self.boot(),
            Request::VmInfo => self.info(),
            Request::VmPause => self.pause(),
            Request::VmResume => self.resume(),
            Request::VmReboot => self.reboot(),
            Request::VmSnapshot(request) => self.snapshot(&request),
            Request::VmRestore(request) => self.restore(&request),
            Request::VmPowerButton => {
                let vm = self.booted()?;
                if vm.is_user_paused() {
                    return Err(error(
                        405,
                        "vm_paused",
                        "the VM is paused: resume it with vm.resume first",
                    ));
                }
                vm.power_button();
                Ok(Response::Empty)
            }
            Request::VmCounters => Ok(Response::Counters(self.booted()?.devices().counters())),
            Request::VmShutdown => {
                self.booted()?;
                self.end_vm("vm.shutdown was called");
                self.emit("shutdown");
                Ok(Response::Empty)
            }
            Request::VmDelete => {
                if lock(&self.slot).config.is_none() {
                    return Err(not_created());
                }
                self.end_vm("vm.delete was called");
                lock(&self.slot).config = None;
                self.emit("deleted");
                Ok(Response::Empty)
            }
            #[cfg(feature = "ft")]
            request => match &self.plugin {
                Some(plugin) => {
                    if matches!(request, Request::FtReceive(_)) {
                        self.drop_stopped_vm();
                    }
                    plugin.call(request, self.vm())
                }
                None => Err(error(501, "ft_not_built", "this build has no fault tolerance")),
            },
        }
    }
}

/// Serves guest requests as long as the VMM lives.
fn while_alive(
    vmm: &Weak<Vmm>,
    serve: impl Fn(&Vmm, GuestRequest),
    requests: &crossbeam_channel::Receiver<GuestRequest>,
) {
    while let Ok(request) = requests.recv() {
        let Some(vmm) = vmm.upgrade() else { return };
        serve(&vmm, request);
    }
}
