//! virtio over PCI (virtio 1.3, 4.1): one device as a PCI function.
//!
//! * this file: `Device`, its BAR and configuration space; `common`: the core behind the lock and the common
//!   configuration structure; [`persist`]: saved state.
//!
//! BAR 0, 32 KiB, 64-bit: each structure has a page of its own.
//!
//! Lock order: `space`, `core`, MSI-X, then the machine's interrupt router. vCPUs, the worker and the VMM take `core`;
//! the worker gives way to the others (see `Device::core`).

pub(crate) mod common;
pub mod persist;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use pci::config_space::{ConfigSpaceState, Ids, PciConfigSpace};
use pci::msix::{self, MsixConfig};
use pci::{MsiVectors, NotifyRegistrar, PciDevice};
use vmm_sys_util::epoll::Epoll;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::interrupt::Interrupts;
use crate::model::Model;
use crate::transport::common::{After, Core};
use crate::{Error, GuestMemory, lock};

/// Size in bytes of the BAR that a device needs.
pub const BAR_SIZE: u64 = 0x8000;
/// Its number.
pub(crate) const BAR: u8 = 0;

const PAGE: u64 = 0x1000;
const COMMON: u64 = 0;
const ISR: u64 = PAGE;
const CONFIG: u64 = 2 * PAGE;
const NOTIFY: u64 = 3 * PAGE;
const MSIX_TABLE: u64 = 4 * PAGE;
const MSIX_PBA: u64 = 5 * PAGE;
const NOTIFY_MULTIPLIER: u64 = 4;

const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
const CAPABILITY_VENDOR: u8 = 0x09;

/// Where a device is on the bus, and how it reaches the machine.
pub struct PciResources {
    /// Address of the BAR at power-on, a multiple of [`BAR_SIZE`].
    pub bar: u64,
    /// MSI-X vectors: one for configuration changes, one for each queue.
    pub vectors: Arc<dyn MsiVectors>,
    /// Makes queue notifications.
    pub registrar: Arc<dyn NotifyRegistrar>,
}

/// The configuration space with what follows from it.
struct Space {
    space: PciConfigSpace,
    power_on: ConfigSpaceState,
    msix_at: usize,
    window_at: usize,
    /// BAR address at which queue notifications are registered.
    notify_at: Option<u64>,
}

/// A device as a PCI function.
pub(crate) struct Device<M> {
    pub(crate) id: String,
    /// Before `memory`: a backend may work on guest RAM until it is dropped.
    core: Mutex<Core<M>>,
    pub(crate) memory: Arc<GuestMemory>,
    /// Others than the worker that wait for `core`.
    pub(crate) contenders: AtomicU32,
    /// Signalled when a hold on the device ends.
    pub(crate) released: Condvar,
    pub(crate) interrupts: Interrupts,
    pub(crate) epoll: Epoll,
    pub(crate) queue_events: Vec<EventFd>,
    pub(crate) wake: EventFd,
    pub(crate) thread: Mutex<Option<JoinHandle<()>>>,
    space: Mutex<Space>,
    registrar: Arc<dyn NotifyRegistrar>,
}

/// A vendor capability (virtio 1.3, 4.1.4) after its id and next pointer.
fn capability(kind: u8, offset: u64, len: u32, extra: &[u8]) -> Vec<u8> {
    let mut body = vec![(16 + extra.len()) as u8, kind, BAR, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&len.to_le_bytes());
    body.extend_from_slice(extra);
    body
}

fn build_space<M: Model>(bar: u64, queues: usize, msix: &MsixConfig) -> Result<Space, Error> {
    let mut space = PciConfigSpace::new(Ids {
        vendor: VENDOR,
        device: FIRST_DEVICE + M::TYPE,
        class: M::CLASS,
        revision: 1,
        subsystem_vendor: VENDOR,
        subsystem: FIRST_DEVICE + M::TYPE,
    });
    space.add_bar64(BAR, bar, BAR_SIZE, true)?;
    let page = PAGE as u32;
    let notify_len = (NOTIFY_MULTIPLIER as u32) * queues as u32;
    let mut add = |body: Vec<u8>, mask: &[u8]| space.add_capability(CAPABILITY_VENDOR, &body, mask);
    add(capability(1, COMMON, common::SIZE as u32, &[]), &[])?;
    let multiplier = (NOTIFY_MULTIPLIER as u32).to_le_bytes();
    add(capability(2, NOTIFY, notify_len, &multiplier), &[])?;
    add(capability(3, ISR, 1, &[]), &[])?;
    add(capability(4, CONFIG, page, &[]), &[])?;
    // The window into the BAR: the driver chooses BAR, offset, length, and accesses the last four bytes.
    let mask: Vec<u8> = (0..18).map(|i| if i == 2 || i >= 6 { 0xff } else { 0 }).collect();
    let window_at = add(capability(5, 0, 0, &[0; 4]), &mask)?;
    let (body, mask) = msix.capability(BAR, MSIX_TABLE as u32, MSIX_PBA as u32);
    let msix_at = space.add_capability(msix::CAPABILITY_ID, &body, &mask)?;
    Ok(Space {
        power_on: space.state(),
        space,
        msix_at,
        window_at,
        notify_at: None,
    })
}

impl<M: Model> Device<M> {
    pub(crate) fn new(
        id: String,
        memory: Arc<GuestMemory>,
        model: M,
        resources: PciResources,
    ) -> Result<Arc<Self>, Error> {
        let queues = model.queue_sizes().len();
        let vectors = crate::vectors_for(queues);
        let msix = MsixConfig::new(vectors, resources.vectors);
        let space = build_space::<M>(resources.bar, queues, &msix)?;
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::Worker);
        let device = Arc::new(Self {
            id,
            memory,
            core: Mutex::new(Core::new(model, vectors)?),
            contenders: AtomicU32::new(0),
            released: Condvar::new(),
            interrupts: Interrupts::new(msix),
            epoll: Epoll::new().map_err(Error::Worker)?,
            queue_events: (0..queues).map(|_| event()).collect::<Result<_, _>>()?,
            wake: event()?,
            thread: Mutex::new(None),
            space: Mutex::new(space),
            registrar: resources.registrar,
        });
        device.register_notifications(&mut lock(&device.space));
        Ok(device)
    }

    /// The core, for anyone but the worker, who stands back while somebody waits here. A mutex alone is not fair: a
    /// worker that takes it anew after each batch could keep others out for long.
    pub(crate) fn core(&self) -> MutexGuard<'_, Core<M>> {
        self.contenders.fetch_add(1, Ordering::AcqRel);
        let guard = lock(&self.core);
        self.contenders.fetch_sub(1, Ordering::AcqRel);
        guard
    }

    /// The core, for the worker.
    pub(crate) fn core_for_worker(&self) -> MutexGuard<'_, Core<M>> {
        while self.contenders.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
        lock(&self.core)
    }

    /// Makes the worker look at `full_pass` and `stop`.
    pub(crate) fn wake_worker(&self) {
        if let Err(e) = self.wake.write(1) {
            log::error!("{}: cannot wake the worker: {e}", self.id);
        }
    }

    /// Lets guest writes to the notification area signal the queues' eventfds, where the BAR now is. Where that is not
    /// possible (an address that clashes with another), `bar_write` does the same, slower.
    fn register_notifications(&self, space: &mut Space) {
        let bar = space
            .space
            .mapped_bars()
            .first()
            .map(|(_, address, _)| *address)
            .filter(|address| address.checked_add(BAR_SIZE).is_some());
        if bar == space.notify_at {
            return;
        }
        let addresses = |bar: u64| (0..).map(move |i: u64| bar + NOTIFY + NOTIFY_MULTIPLIER * i);
        if let Some(old) = space.notify_at.take() {
            for (fd, address) in self.queue_events.iter().zip(addresses(old)) {
                if let Err(e) = self.registrar.unregister(address, fd) {
                    log::debug!("{}: notification address {address:#x}: {e}", self.id);
                }
            }
        }
        if let Some(new) = bar {
            for (fd, address) in self.queue_events.iter().zip(addresses(new)) {
                if let Err(e) = self.registrar.register(address, fd) {
                    log::debug!("{}: notification address {address:#x}: {e}", self.id);
                }
            }
            space.notify_at = Some(new);
        }
    }

    /// The driver changed something in the configuration space.
    fn space_changed(&self, space: &mut Space) {
        let control = space.space.word(space.msix_at + 2);
        lock(&self.interrupts.msix).set_control(control);
        self.register_notifications(space);
    }

    /// Saved state of the configuration space.
    pub(crate) fn space_state(&self) -> ConfigSpaceState {
        lock(&self.space).space.state()
    }

    /// Loads the configuration space. MSI-X is loaded by itself.
    pub(crate) fn set_space_state(&self, state: &ConfigSpaceState) -> Result<(), Error> {
        let mut space = lock(&self.space);
        space.space.set_state(state)?;
        self.register_notifications(&mut space);
        Ok(())
    }

    /// The configuration space as at power-on.
    pub(crate) fn reset_space(&self) -> Result<(), Error> {
        let state = lock(&self.space).power_on.clone();
        self.set_space_state(&state)
    }

    /// The driver's window into the BAR, when it lies well: (BAR offset, length).
    fn window(space: &Space) -> Option<(u64, usize)> {
        let mut bytes = [0; 16];
        space.space.read(space.window_at, &mut bytes);
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (offset, len) = (u64::from(word(8)), word(12) as usize);
        let valid = bytes[4] == BAR && matches!(len, 1 | 2 | 4) && offset + len as u64 <= BAR_SIZE;
        valid.then_some((offset, len))
    }
}

/// Offset of the window's data in its capability.
const WINDOW_DATA: usize = 16;

impl<M: Model> PciDevice for Device<M> {
    fn id(&self) -> &str {
        &self.id
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut space = lock(&self.space);
        if usize::from(offset) == space.window_at + WINDOW_DATA
            && let Some((at, len)) = Self::window(&space)
        {
            let mut bytes = [0; 4];
            self.bar_read(BAR, at, &mut bytes[..len]);
            let window_data = space.window_at + WINDOW_DATA;
            space.space.set(window_data, &bytes);
        }
        space.space.read(usize::from(offset), data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut space = lock(&self.space);
        space.space.write(usize::from(offset), data);
        if usize::from(offset) == space.window_at + WINDOW_DATA
            && let Some((at, len)) = Self::window(&space)
            && data.len() >= len
        {
            self.bar_write(BAR, at, &data[..len]);
        }
        self.space_changed(&mut space);
    }

    fn mapped_bars(&self) -> Vec<(u8, u64, u64)> {
        lock(&self.space).space.mapped_bars()
    }

    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let at = offset % PAGE;
        match offset - at {
            COMMON => self.core().read(at as usize, data),
            ISR => {
                if let (0, Some(byte)) = (at, data.first_mut()) {
                    *byte = self.interrupts.take_isr();
                }
            }
            CONFIG => self.core().model.read_config(at, data),
            MSIX_TABLE => lock(&self.interrupts.msix).read_table(at, data),
            MSIX_PBA => lock(&self.interrupts.msix).read_pba(at, data),
            _ => {}
        }
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        let at = offset % PAGE;
        match offset - at {
            COMMON => {
                let memory = self.memory.clone();
                let after = self
                    .core()
                    .write(&self.id, at as usize, data, &memory, &self.interrupts);
                if after == After::Wake {
                    self.wake_worker();
                }
            }
            NOTIFY => {
                if let Some(event) = self.queue_events.get((at / NOTIFY_MULTIPLIER) as usize)
                    && let Err(e) = event.write(1)
                {
                    log::error!("{}: notification: {e}", self.id);
                }
            }
            MSIX_TABLE => lock(&self.interrupts.msix).write_table(at, data),
            _ => {}
        }
    }
}
