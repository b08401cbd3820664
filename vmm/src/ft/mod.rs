//! Fault tolerance on this VMM: the [`Plugin`] that serves `vm.ft-*` and keeps the one FT session.
//!
//! * [`protected`]: the running VM as FT sees it; [`shadow`]: the backup's side; [`backends`]: the interposer at the
//!   devices; [`consoles`]: where a shadow's consoles go.
//!
//! Lock order: `session`, then FT's and the VM's own locks. FT's threads never take `session`.

mod backends;
mod consoles;
mod protected;
mod shadow;

use std::sync::{Arc, Mutex};

use api::{ApiError, Request, Response};
use ft::config::{FtEnableConfig, FtInfo, FtReceiveConfig};
use ft::{Backup, EventSink, FtEvent, Primary};

use crate::interrupts::lock;
use crate::plugin::Plugin;
use crate::vm::{Vm, VmContext};
use protected::ProtectedVm;
use shadow::{Adopt, VmShadowHost};

enum Session {
    Off,
    Primary(Primary),
    Backup(Backup),
}

/// FT on this VMM.
pub struct FtPlugin {
    context: VmContext,
    arbiter: Option<String>,
    adopt: Adopt,
    session: Mutex<Session>,
}

fn error(status: u16, code: &str, message: impl std::fmt::Display) -> ApiError {
    ApiError {
        status,
        code: code.into(),
        message: message.to_string(),
    }
}

impl FtPlugin {
    /// `arbiter`: default for requests that name none. `adopt` gets the VM of a takeover.
    pub fn new(context: VmContext, arbiter: Option<String>, adopt: Adopt) -> Self {
        Self {
            context,
            arbiter,
            adopt,
            session: Mutex::new(Session::Off),
        }
    }

    fn events(&self) -> EventSink {
        let events = self.context.events.clone();
        Arc::new(move |event: FtEvent| {
            let properties: Vec<(&str, String)> = event
                .properties
                .iter()
                .map(|(key, value)| (key.as_str(), value.clone()))
                .collect();
            events.emit("ft", event.event, &properties);
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
        if let Some(reason) = vm.stop_reason() {
            return Err(error(409, "vm_stopped", format!("the VM was stopped here: {reason}")));
        }
        let mut session = lock(&self.session);
        if let Some(reason) = in_use(&session) {
            return Err(error(409, "ft_in_use", reason));
        }
        if config.arbiter.is_none() {
            config.arbiter.clone_from(&self.arbiter);
        }
        let machine = ProtectedVm::new(vm).map_err(|e| error(500, "ft_not_possible", e))?;
        end(std::mem::replace(&mut *session, Session::Off));
        let primary = ft::enable(machine, config, self.events()).map_err(|e| error(e.status(), e.code(), &e))?;
        *session = Session::Primary(primary);
        Ok(Response::Empty)
    }

    fn receive(&self, mut config: FtReceiveConfig, vm: Option<Arc<Vm>>) -> Result<Response, ApiError> {
        if vm.is_some_and(|vm| vm.stop_reason().is_none()) {
            return Err(error(
                409,
                "vm_exists",
                "this VMM runs a VM: a backup must be a VMM without one",
            ));
        }
        let mut session = lock(&self.session);
        if let Some(reason) = in_use(&session) {
            return Err(error(409, "ft_in_use", reason));
        }
        if config.arbiter.is_none() {
            config.arbiter.clone_from(&self.arbiter);
        }
        end(std::mem::replace(&mut *session, Session::Off));
        let host = VmShadowHost {
            context: self.context.clone(),
            overrides: config.clone(),
            adopt: self.adopt.clone(),
        };
        let backup = ft::receive(Arc::new(host), config, self.events()).map_err(|e| error(e.status(), e.code(), &e))?;
        *session = Session::Backup(backup);
        Ok(Response::Empty)
    }
}

/// Why no new session can begin, when the present one is at work.
fn in_use(session: &Session) -> Option<String> {
    use ft::config::FtState::*;
    let info = match session {
        Session::Off => return None,
        Session::Primary(primary) => primary.info(),
        Session::Backup(backup) => backup.info(),
    };
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
                let info = match &*lock(&self.session) {
                    Session::Off => FtInfo::disabled(),
                    Session::Primary(primary) => primary.info(),
                    Session::Backup(backup) => backup.info(),
                };
                Ok(Response::Ft(Box::new(info)))
            }
            Request::FtDisable => {
                let session = std::mem::replace(&mut *lock(&self.session), Session::Off);
                let result = match &session {
                    Session::Off => return Err(error(409, "ft_off", "FT is off already")),
                    Session::Primary(primary) => primary.disable(),
                    Session::Backup(backup) => backup.disable(),
                };
                end(session);
                result.map_err(|e| error(e.status(), e.code(), &e))?;
                Ok(Response::Empty)
            }
            Request::FtFailover => match &*lock(&self.session) {
                Session::Primary(primary) => {
                    primary.failover().map_err(|e| error(e.status(), e.code(), &e))?;
                    Ok(Response::Empty)
                }
                _ => Err(error(
                    409,
                    "ft_not_primary",
                    "this VMM is not the primary of a protected VM",
                )),
            },
            Request::FtConfig(patch) => match &*lock(&self.session) {
                Session::Primary(primary) => {
                    primary.configure(&patch).map_err(|e| error(e.status(), e.code(), &e))?;
                    Ok(Response::Empty)
                }
                _ => Err(error(
                    409,
                    "ft_not_primary",
                    "limits are set on the primary of a protected VM",
                )),
            },
            _ => Err(error(500, "internal", "not an FT request")),
        }
    }

    fn vm_ends(&self, reason: &str) {
        let mut session = lock(&self.session);
        let ended = match &*session {
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
            end(std::mem::replace(&mut *session, Session::Off));
        }
    }

    fn shutdown(&self) {
        end(std::mem::replace(&mut *lock(&self.session), Session::Off));
    }

    fn refuses_vm(&self) -> Option<String> {
        match &*lock(&self.session) {
            Session::Backup(backup) if !matches!(backup.info().state, ft::config::FtState::Failed) => {
                Some("this VMM waits for a primary (`ft receive`): end that with `ch-remote ft disable` first".into())
            }
            _ => None,
        }
    }
}
