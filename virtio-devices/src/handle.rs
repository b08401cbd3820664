//! What the VMM holds of a device: life cycle, saved state, and exchange of the backend.

use std::sync::Arc;

use pci::PciDevice;
use serde::{Deserialize, Serialize};

use crate::model::Model;
use crate::transport::common::{Core, status};
use crate::transport::persist::{TransportState, VERSION};
use crate::transport::{Device, PciResources};
use crate::{DeviceState, Error, GuestMemory, lock};

/// Saved state of one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    /// PCI function, negotiation, queues.
    pub transport: TransportState,
    /// The device model.
    pub device: DeviceState,
}

/// A device with its worker; both end when this is dropped. All methods may be called from any thread but a vCPU's
/// while it executes an access to the device.
pub struct Handle<M: Model> {
    pub(crate) device: Arc<Device<M>>,
}

impl<M: Model> Handle<M> {
    /// Makes the device and starts its worker. It is not held.
    pub fn new(
        id: impl Into<String>,
        memory: Arc<GuestMemory>,
        model: M,
        resources: PciResources,
    ) -> Result<Self, Error> {
        let handle = Self::without_worker(id.into(), memory, model, resources)?;
        handle.device.start_worker()?;
        Ok(handle)
    }

    /// The device without its worker. With the feature `fuzzing`, `Handle::serve` does the worker's work on the caller's
    /// thread, so that what happens depends on the calls alone.
    pub fn without_worker(
        id: String,
        memory: Arc<GuestMemory>,
        model: M,
        resources: PciResources,
    ) -> Result<Self, Error> {
        let device = Device::new(id, memory, model, resources)?;
        device.watch_all()?;
        Ok(Self { device })
    }

    /// What the worker does until it would sleep. The device must not be held.
    #[cfg(feature = "fuzzing")]
    pub fn serve(&self) {
        use crate::worker::{Round, round};
        let mut ready = crate::model::Ready::default();
        while round(&self.device, &mut ready, false) == Round::Served {}
    }

    /// Device id, for example `_disk0`.
    pub fn id(&self) -> &str {
        &self.device.id
    }

    /// The device as a PCI function.
    pub fn pci(&self) -> Arc<dyn PciDevice> {
        self.device.clone()
    }

    /// Holds the device still: requests that were started are finished and in the used rings, no more are taken, all
    /// interrupts were raised. Holds add up.
    pub fn pause(&self) {
        let device = &self.device;
        let mut core = device.core();
        core.holds += 1;
        core.quiesce(&device.id, &device.memory, &device.interrupts);
    }

    /// Takes a hold back.
    pub fn resume(&self) {
        let mut core = self.device.core();
        core.holds = core.holds.saturating_sub(1);
        if core.holds == 0 {
            self.device.released.notify_all();
            core.full_pass |= core.model.unfinished();
            if core.full_pass {
                self.device.wake_worker();
            }
        }
    }

    /// Looks at all queues once as if they were notified, and raises all interrupts: notifications and interrupts that
    /// were under way when a state was saved are not in it. A device that is held does its part when it is resumed.
    pub fn kick(&self) {
        let mut core = self.device.core();
        core.full_pass = true;
        if core.live() {
            lock(&self.device.interrupts.msix).trigger_all();
        }
        if core.holds == 0 {
            self.device.wake_worker();
        }
    }

    /// The driver was told that the device failed and has not reset it.
    pub fn failed(&self) -> bool {
        self.device.core().status & status::NEEDS_RESET != 0
    }

    /// The driver runs the device.
    pub fn live(&self) -> bool {
        self.device.core().live()
    }

    /// Saved state; the device must be held.
    pub fn state(&self) -> VirtioState {
        let config = self.device.space_state();
        let core = self.device.core();
        let transport = TransportState {
            version: VERSION,
            config,
            msix: lock(&self.device.interrupts.msix).state(),
            isr: self.device.interrupts.isr(),
            status: core.status,
            device_feature_select: core.device_feature_select,
            driver_feature_select: core.driver_feature_select,
            driver_features: core.driver_features,
            config_vector: core.config_vector,
            queue_select: core.queue_select,
            generation: core.generation,
            queues: core.rings.iter().map(|ring| ring.state()).collect(),
        };
        VirtioState {
            transport,
            device: core.model.state(),
        }
    }

    /// Loads a saved state of the same device; guest RAM must be that state's. The device must be held. After an error
    /// the device is as after [`Handle::reset`], or partly as before.
    pub fn set_state(&self, state: &VirtioState) -> Result<(), Error> {
        let device = &self.device;
        let transport = &state.transport;
        if transport.version != VERSION {
            return Err(Error::State(format!(
                "version {}, known is {VERSION}",
                transport.version
            )));
        }
        device.set_space_state(&transport.config)?;
        let mut core = device.core();
        if transport.queues.len() != core.rings.len() {
            let (found, expected) = (transport.queues.len(), core.rings.len());
            return Err(Error::State(format!("{found} queues, the device has {expected}")));
        }
        core.reset(&device.memory, &device.interrupts);
        core.model.set_state(&state.device)?;
        lock(&device.interrupts.msix).set_state(&transport.msix)?;
        device.interrupts.set_isr(transport.isr);
        load_core(&mut core, transport)?;
        if core.live()
            && let Err(e) = core.activate(&device.memory)
        {
            core.reset(&device.memory, &device.interrupts);
            return Err(Error::Queue(e));
        }
        Ok(())
    }

    /// As at power-on.
    pub fn reset(&self) -> Result<(), Error> {
        self.device.reset_space()?;
        let mut core = self.device.core();
        core.reset(&self.device.memory, &self.device.interrupts);
        core.generation = 0;
        lock(&self.device.interrupts.msix).reset();
        Ok(())
    }

    /// Ends the worker and gives the backend up. Idempotent. Not from the worker itself.
    pub fn shutdown(&self) {
        {
            let mut core = self.device.core();
            core.stop = true;
            self.device.released.notify_all();
            self.device.wake_worker();
        }
        if let Some(thread) = lock(&self.device.thread).take()
            && thread.join().is_err()
        {
            log::error!("{}: the worker panicked", self.device.id);
        }
        let mut core = self.device.core();
        self.device.unwatch(&mut core);
        core.model.reset(&self.device.memory);
        core.status = 0;
        core.model.close();
    }

    /// Changes the backend by `f` while nothing is under way, watches the new one, and lets the worker look at it.
    pub(crate) fn exchange_with(&self, f: impl FnOnce(&mut M)) {
        let device = &self.device;
        let mut core = device.core();
        core.quiesce(&device.id, &device.memory, &device.interrupts);
        device.unwatch(&mut core);
        f(&mut core.model);
        device.watch(&mut core);
        core.full_pass = true;
        if core.holds == 0 {
            device.wake_worker();
        }
    }
}

fn load_core<M: Model>(core: &mut Core<M>, state: &TransportState) -> Result<(), Error> {
    let settled = state.status & (status::FEATURES_OK | status::DRIVER_OK) != 0;
    if state.driver_features & !core.offered() != 0 && settled {
        let missing = state.driver_features & !core.offered();
        return Err(Error::State(format!("features {missing:#x} are not offered here")));
    }
    core.status = state.status;
    core.device_feature_select = state.device_feature_select;
    core.driver_feature_select = state.driver_feature_select;
    core.driver_features = state.driver_features;
    core.config_vector = state.config_vector;
    core.queue_select = state.queue_select;
    core.generation = state.generation;
    for (ring, saved) in core.rings.iter_mut().zip(&state.queues) {
        ring.set_state(saved);
    }
    Ok(())
}

impl<M: Model> Drop for Handle<M> {
    fn drop(&mut self) {
        self.shutdown();
    }
}
