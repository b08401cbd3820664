//! How the VMM reaches fault tolerance: one trait, so that a build without it is a plain VMM.

use std::sync::Arc;

use api::{ApiError, Request, Response, VmConfig};

use crate::vm::Vm;

/// FT on this VMM. Called by API worker threads and by the VMM's control thread; must not call back into [`crate::Vmm`]
/// but through what it was given when it was made.
pub trait Plugin: Send + Sync {
    /// Serves the `vm.ft-*` requests. `vm` is this VMM's VM, if there is one.
    fn call(&self, request: Request, vm: Option<Arc<Vm>>) -> Result<Response, ApiError>;
    /// A VM with this configuration is about to be made by its owner, not by FT: its disks will be written. An error: it
    /// must not be made.
    fn vm_begins(&self, config: &VmConfig) -> Result<(), String>;
    /// The VM is about to end by its owner's will (guest power-off, vm.shutdown, vm.delete): its outputs leave, and the
    /// backup is told that there is nothing to take over.
    fn vm_ends(&self, reason: &str);
    /// The VM is paused by its owner: when this returns, everything that it wrote is on its disks.
    fn settle(&self) -> Result<(), ApiError>;
    /// The VM cannot run on here, and it is not known to be its own fault: this host counts as dead, and a backup takes
    /// over. Followed by `vm_ends`.
    fn vm_failed(&self, reason: &str);
    /// The VMM ends: nothing waits for a primary any longer, threads are joined.
    fn shutdown(&self);
    /// A VM cannot be made by the API now, with the reason (this VMM is a backup).
    fn refuses_vm(&self) -> Option<String>;
}
