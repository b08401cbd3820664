//! Fault tolerance on this VMM: the [`Plugin`] that serves `vm.ft-*` and keeps the one FT session.
//!
//! * [`protected`]: the running VM as FT sees it; [`shadow`]: the backup's side; [`backends`], [`blocks`]: the interposer at
//!   the devices; [`shared`], [`disks`]: disks that both hosts see; [`consoles`]: where a shadow's consoles go;
//!   [`histories`]: what of the disks need not be copied again;
//! * [`reprotect`]: the thread that looks for a new backup.
//!
//! Lock order: `changing`, `session`, `search`, then FT's and the VM's own locks. FT's threads never take the first three.

mod backends;
mod blocks;
mod consoles;
mod disks;
mod histories;
mod protected;
mod reprotect;
mod shadow;
mod shared;

use std::path::Path;
use std::sync::{Arc, Mutex, Weak};

use api::{ApiError, Request, Response, VmConfig};
use crossbeam_channel::{Sender, bounded};
use ft::arbiter::Description;
use ft::arbiter::description::TlsFiles;
use ft::config::{FtEnableConfig, FtInfo, FtReceiveConfig};
use ft::reprotect::Policy;
use ft::{Backup, Cancel, EventSink, FtEvent, Offer, Primary};
use sandbox::landlock::Access;

use crate::devices::Disk;
use crate::interrupts::lock;
use crate::landlock::Landlock;
use crate::plugin::Plugin;
use crate::vm::{Vm, VmContext};
use histories::Kept;
use protected::ProtectedVm;
use reprotect::Search;
use shadow::{Adopt, VmShadowHost};

#[derive(Clone)]
enum Session {
    Off,
    Primary(Arc<Primary>),
    Backup(Arc<Backup>),
}

/// FT on this VMM.
pub struct FtPlugin {
    context: VmContext,
    arbiter: Option<String>,
    adopt: Adopt,
    kept: Kept,
    /// Held while a session is begun or ended, which may take its time.
    changing: Mutex<()>,
    session: Mutex<Session>,
    /// The search for a new backup, which rests while there is one.
    search: Mutex<Option<Search>>,
    /// The VM of a takeover.
    taken_over: Arc<Mutex<Weak<Vm>>>,
    /// Wakes the supervisor.
    waker: Sender<()>,
}

fn error(status: u16, code: &str, message: impl std::fmt::Display) -> ApiError {
    ApiError {
        status,
        code: code.into(),
        message: message.to_string(),
    }
}

impl FtPlugin {
    /// `arbiter`: default for requests that name none. `adopt` gets the VM of a takeover. Starts the supervisor.
    pub fn new(context: VmContext, arbiter: Option<String>, adopt: Adopt) -> std::io::Result<Arc<Self>> {
        allow_arbiter(&context.landlock, arbiter.as_deref());
        let taken_over: Arc<Mutex<Weak<Vm>>> = Arc::default();
        let noted = taken_over.clone();
        let adopt: Adopt = Arc::new(move |vm| {
            *lock(&noted) = Arc::downgrade(&vm);
            adopt(vm);
        });
        let (waker, woken) = bounded(1);
        let plugin = Arc::new(Self {
            context,
            arbiter,
            adopt,
            kept: Kept::default(),
            changing: Mutex::default(),
            session: Mutex::new(Session::Off),
            search: Mutex::default(),
            taken_over,
            waker,
        });
        reprotect::start(Arc::downgrade(&plugin), woken)?;
        Ok(plugin)
    }

    fn wake(&self) {
        // Full: it is woken already.
        let _ = self.waker.try_send(());
    }

    /// What this request names is left accessible when the VM comes.
    fn allow(&self, config: &FtReceiveConfig) {
        let landlock = &self.context.landlock;
        allow_arbiter(landlock, config.arbiter.as_deref());
        if let Some(tls) = &config.tls {
            landlock.allow(&tls.dir, Access::READ);
        }
        // A socket's file is removed at the end.
        let socket = config.listen.strip_prefix("unix:").map(Path::new);
        if let Some(dir) = socket.and_then(Path::parent).filter(|dir| dir.exists()) {
            landlock.allow(dir, Access::REMOVE);
        }
    }

    fn session(&self) -> Session {
        lock(&self.session).clone()
    }

    /// Puts a session in the place of the present one, which is returned.
    fn put(&self, session: Session) -> Session {
        std::mem::replace(&mut *lock(&self.session), session)
    }

    fn primary(&self, otherwise: &str) -> Result<Arc<Primary>, ApiError> {
        match self.session() {
            Session::Primary(primary) => Ok(primary),
            _ => Err(error(409, "ft_not_primary", otherwise)),
        }
    }

    fn events(&self) -> EventSink {
        let (events, waker) = (self.context.events.clone(), self.waker.clone());
        Arc::new(move |event: FtEvent| {
            let properties: Vec<(&str, String)> = event
                .properties
                .iter()
                .map(|(key, value)| (key.as_str(), value.clone()))
                .collect();
            events.emit("ft", event.event, &properties);
            let _ = waker.try_send(());
        })
    }

    fn enable(&self, mut config: FtEnableConfig, vm: Option<Arc<Vm>>) -> Result<Response, ApiError> {
        let vm = vm.ok_or_else(|| {
            error(
                404,
                "vm_not_running",
                "there is no running VM to protect: boot one first",
            )
        })?;
        let _changing = lock(&self.changing);
        self.may_begin(&vm)?;
        if config.arbiter.is_none() {
            config.arbiter.clone_from(&self.arbiter);
        }
        let failed = |e: ft::Error| error(e.status(), e.code(), &e);
        let policy = Policy::of_primary(&config).map_err(|e| failed(e.into()))?;
        let search = policy.map(|policy| Search::new(policy, &vm));
        let ids = config.shared_disks.clone();
        for id in &ids {
            disks::shareable(&vm, id).map_err(|refusal| error(400, &refusal.code, &refusal))?;
        }
        let identity = protected::own_identity(&vm, &ids).map_err(|e| failed(e.into()))?;
        let offer = ft::offer(identity, config, self.events(), &Cancel::default()).map_err(failed)?;
        self.begin(offer, vm, &ids)?;
        self.search_for(search);
        Ok(Response::Empty)
    }

    /// With `changing` locked: whether protection of `vm` can begin.
    fn may_begin(&self, vm: &Vm) -> Result<(), ApiError> {
        if let Some(reason) = vm.stop_reason() {
            return Err(error(409, "vm_stopped", format!("the VM was stopped here: {reason}")));
        }
        // With the lock: `vm_ends` comes after this session began, or has come.
        if vm.is_ending() {
            return Err(error(409, "vm_ends", "the VM is being shut down"));
        }
        match in_use(&self.session()) {
            Some(reason) => Err(error(409, "ft_in_use", reason)),
            None => Ok(()),
        }
    }

    /// With `changing` locked: a session by this offer in the place of the present one, which has ended. `shared`: ids of
    /// disks that are shared from now on.
    fn begin(&self, offer: Offer, vm: Arc<Vm>, shared: &[String]) -> Result<(), ApiError> {
        self.may_begin(&vm)?;
        // Its end was decided, but perhaps not done yet.
        if let Session::Primary(primary) = self.session() {
            primary.disable().map_err(|e| error(e.status(), e.code(), &e))?;
        }
        let histories = self.kept.of(&vm, shared);
        let machine = ProtectedVm::new(vm.clone(), histories, shared);
        let primary = offer.begin(machine).map_err(|e| error(e.status(), e.code(), &e))?;
        let disks = vm.devices().disks().iter();
        disks
            .filter(|disk| shared.contains(&disk.id))
            .for_each(Disk::set_shared);
        end(self.put(Session::Primary(Arc::new(primary))));
        Ok(())
    }

    fn receive(&self, mut config: FtReceiveConfig, vm: Option<Arc<Vm>>) -> Result<Response, ApiError> {
        if vm.is_some_and(|vm| vm.stop_reason().is_none()) {
            return Err(error(
                409,
                "vm_exists",
                "this VMM runs a VM: a backup must be a VMM without one",
            ));
        }
        let _changing = lock(&self.changing);
        if let Some(reason) = in_use(&self.session()) {
            return Err(error(409, "ft_in_use", reason));
        }
        if config.arbiter.is_none() {
            config.arbiter.clone_from(&self.arbiter);
        }
        self.search_for(None);
        end(self.put(Session::Off));
        self.allow(&config);
        let host = VmShadowHost {
            context: self.context.clone(),
            overrides: config.clone(),
            adopt: self.adopt.clone(),
            kept: self.kept.clone(),
        };
        let backup = ft::receive(Arc::new(host), config, self.events()).map_err(|e| error(e.status(), e.code(), &e))?;
        self.put(Session::Backup(Arc::new(backup)));
        Ok(Response::Empty)
    }
}

/// Leaves an arbiter's files accessible. A wrong description is told when the arbiter is opened.
fn allow_arbiter(landlock: &Landlock, description: Option<&str>) {
    match description.map(str::parse) {
        Some(Ok(Description::File(dir))) => landlock.allow(dir, Access::READ_WRITE),
        Some(Ok(Description::Etcd(cluster))) => {
            let own = |tls: &TlsFiles| tls.identity.clone().into_iter().flat_map(|(cert, key)| [cert, key]);
            let files = cluster.tls.iter().flat_map(|tls| own(tls).chain([tls.ca.clone()]));
            files.for_each(|path| landlock.allow(path, Access::READ));
        }
        Some(Err(_)) | None => {}
    }
}

/// Why no new session can begin, when the present one is at work.
fn in_use(session: &Session) -> Option<String> {
    use ft::config::FtState::*;
    if let Session::Primary(primary) = session
        && let Some(why) = primary.unfinished()
    {
        return Some(why);
    }
    let info = reprotect::report(session)?;
    match info.state {
        Disabled | Solo | Failed | Stopped => None,
        state => Some(format!(
            "FT is at work here (state {state:?}): `ch-remote ft disable` ends it"
        )),
    }
}

fn end(session: Session) {
    match session {
        Session::Off => {}
        Session::Primary(primary) => primary.shutdown(),
        Session::Backup(backup) => backup.shutdown(),
    }
}

impl Plugin for FtPlugin {
    fn call(&self, request: Request, vm: Option<Arc<Vm>>) -> Result<Response, ApiError> {
        match request {
            Request::FtEnable(config) => self.enable(config, vm),
            Request::FtReceive(config) => self.receive(config, vm),
            Request::FtInfo => {
                let mut info = reprotect::report(&self.session()).unwrap_or_else(FtInfo::disabled);
                self.show_search(&mut info);
                Ok(Response::Ft(Box::new(info)))
            }
            Request::FtDisable => {
                let _changing = lock(&self.changing);
                // A session that cannot end now goes on: without it the VM would have to stop.
                match self.session() {
                    Session::Off => return Err(error(409, "ft_off", "FT is off already")),
                    Session::Primary(primary) => primary.disable(),
                    Session::Backup(backup) => backup.disable(),
                }
                .map_err(|e| error(e.status(), e.code(), &e))?;
                self.search_for(None);
                end(self.put(Session::Off));
                self.kept.forget();
                Ok(Response::Empty)
            }
            Request::FtFailover => {
                let primary = self.primary("this VMM is not the primary of a protected VM")?;
                primary.failover().map_err(|e| error(e.status(), e.code(), &e))?;
                Ok(Response::Empty)
            }
            Request::FtConfig(patch) => {
                let primary = self.primary("limits are set on the primary of a protected VM")?;
                primary.configure(&patch).map_err(|e| error(e.status(), e.code(), &e))?;
                Ok(Response::Empty)
            }
            _ => Err(error(500, "internal", "not an FT request")),
        }
    }

    fn vm_ends(&self, reason: &str) {
        let _changing = lock(&self.changing);
        self.search_for(None);
        let ended = match self.session() {
            Session::Primary(primary) => {
                if let Err(e) = primary.disable() {
                    log::warn!("ft: {reason}, and the backup could not be told: {e}");
                }
                true
            }
            // After a takeover the VM is an ordinary one of this VMM; a backup that only listens has no VM.
            Session::Backup(backup) => backup.info().state == ft::config::FtState::Solo,
            Session::Off => false,
        };
        if ended {
            end(self.put(Session::Off));
        }
        self.kept.forget();
    }

    fn settle(&self) -> Result<(), ApiError> {
        match self.session() {
            Session::Primary(primary) => primary.settle().map_err(|e| error(e.status(), e.code(), &e)),
            Session::Backup(_) | Session::Off => Ok(()),
        }
    }

    fn vm_failed(&self, reason: &str) {
        let _changing = lock(&self.changing);
        self.search_for(None);
        if let Session::Primary(primary) = self.session()
            && in_use(&self.session()).is_some()
        {
            log::error!("ft: this host gives the VM up: {reason}");
            primary.give_up();
            self.put(Session::Off);
        }
    }

    fn shutdown(&self) {
        let _changing = lock(&self.changing);
        self.search_for(None);
        end(self.put(Session::Off));
    }

    fn vm_begins(&self, config: &VmConfig) -> Result<(), String> {
        histories::forget_copies(config)
    }

    fn refuses_vm(&self) -> Option<String> {
        match self.session() {
            session @ Session::Backup(_) if in_use(&session).is_some() => {
                Some("this VMM waits for a primary (`ft receive`): end that with `ch-remote ft disable` first".into())
            }
            _ => None,
        }
    }
}
