//! The device's core behind its lock, and the common configuration structure (virtio 1.3, 4.1.4.3) on it.

use std::os::fd::RawFd;
use std::sync::atomic::AtomicU32;

use crate::interrupt::Interrupts;
use crate::model::{Io, Model, Ready};
use crate::ring::{NO_VECTOR, QueueError, Ring};
use crate::{Error, GuestMemory};

/// Device status bits (virtio 1.3, 2.1).
pub(crate) mod status {
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const NEEDS_RESET: u8 = 64;
}

const F_INDIRECT_DESC: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;

/// Size of the structure in bytes, with the two queue words of virtio 1.2 and the admin queue's of 1.3 (all zero).
pub(crate) const SIZE: usize = 0x40;

/// What the lock of a device protects.
pub(crate) struct Core<M> {
    pub(crate) model: M,
    pub(crate) rings: Vec<Ring>,
    pub(crate) status: u8,
    pub(crate) device_feature_select: u32,
    pub(crate) driver_feature_select: u32,
    pub(crate) driver_features: u64,
    pub(crate) config_vector: u16,
    pub(crate) queue_select: u16,
    pub(crate) generation: u8,
    vectors: u16,
    /// Descriptor of the backend that the worker watches, and whether for being writable too.
    pub(crate) watched: Option<(RawFd, bool)>,
    /// How many hold the device still.
    pub(crate) holds: u32,
    /// The worker must look at everything once.
    pub(crate) full_pass: bool,
    /// The worker must end.
    pub(crate) stop: bool,
}

/// What has to follow a write, outside of the core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    Nothing,
    /// The device came alive: the worker must look at it.
    Wake,
}

impl<M: Model> Core<M> {
    pub(crate) fn new(model: M, vectors: u16) -> Result<Self, Error> {
        let rings = model.queue_sizes().into_iter().map(Ring::new);
        Ok(Self {
            rings: rings.collect::<Result<_, _>>().map_err(Error::Queue)?,
            model,
            status: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            generation: 0,
            vectors,
            watched: None,
            holds: 0,
            full_pass: false,
            stop: false,
        })
    }

    pub(crate) fn offered(&self) -> u64 {
        self.model.features() | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX
    }

    /// The driver runs it and it has not failed.
    pub(crate) fn live(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    /// As after a reset by the driver (virtio 1.3, 2.4).
    pub(crate) fn reset(&mut self, memory: &GuestMemory, interrupts: &Interrupts) {
        self.model.reset(memory);
        for ring in &mut self.rings {
            ring.reset();
        }
        self.status = 0;
        (
            self.device_feature_select,
            self.driver_feature_select,
            self.driver_features,
        ) = (0, 0, 0);
        (self.config_vector, self.queue_select) = (NO_VECTOR, 0);
        interrupts.set_isr(0);
    }

    /// Marks the device failed until the driver resets it (virtio 1.3, 2.1.2).
    pub(crate) fn fail(&mut self, id: &str, error: QueueError, memory: &GuestMemory, interrupts: &Interrupts) {
        if self.status & status::NEEDS_RESET == 0 {
            log::warn!("{id}: {error}: the device needs a reset by its driver");
            self.status |= status::NEEDS_RESET;
            self.model.reset(memory);
            interrupts.config(self.config_vector);
        }
    }

    /// Makes queues and model ready for use.
    pub(crate) fn activate(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        let event_idx = self.driver_features & F_EVENT_IDX != 0;
        for ring in &mut self.rings {
            ring.activate(memory, event_idx)?;
        }
        self.model.activate(self.driver_features);
        self.full_pass = true;
        Ok(())
    }

    /// Serves what is ready; the worker calls this. `contenders` wait for the device.
    pub(crate) fn serve(
        &mut self,
        id: &str,
        memory: &GuestMemory,
        interrupts: &Interrupts,
        contenders: &AtomicU32,
        ready: &mut Ready,
    ) {
        if std::mem::take(&mut self.full_pass) {
            *ready = Ready::ALL;
        }
        if !self.live() {
            *ready = Ready::default();
            return;
        }
        // Bits of queues that do not exist would never be cleared.
        ready.queues &= (1 << self.rings.len()) - 1;
        let rings = &mut self.rings;
        let mut io = Io {
            memory,
            rings,
            interrupts,
            contenders,
        };
        if let Err(e) = self.model.serve(&mut io, ready) {
            *ready = Ready::default();
            self.fail(id, e, memory, interrupts);
        }
    }

    /// Finishes what was started.
    pub(crate) fn quiesce(&mut self, id: &str, memory: &GuestMemory, interrupts: &Interrupts) {
        let rings = &mut self.rings;
        let mut io = Io {
            memory,
            rings,
            interrupts,
            contenders: &AtomicU32::new(0),
        };
        if let Err(e) = self.model.quiesce(&mut io) {
            self.fail(id, e, memory, interrupts);
        }
    }

    fn selected(&self) -> Option<&Ring> {
        self.rings.get(usize::from(self.queue_select))
    }

    fn registers(&self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let word = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(0x04, &word(self.offered(), self.device_feature_select).to_le_bytes());
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(
            0x0c,
            &word(self.driver_features, self.driver_feature_select).to_le_bytes(),
        );
        put(0x10, &self.config_vector.to_le_bytes());
        put(0x12, &(self.rings.len() as u16).to_le_bytes());
        put(0x14, &[self.status, self.generation]);
        put(0x16, &self.queue_select.to_le_bytes());
        if let Some(ring) = self.selected() {
            put(0x18, &ring.size().to_le_bytes());
            put(0x1a, &ring.vector.to_le_bytes());
            put(0x1c, &u16::from(ring.enabled()).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            for (i, address) in ring.addresses().iter().enumerate() {
                put(0x20 + 8 * i, &address.to_le_bytes());
            }
        }
        bytes
    }

    pub(crate) fn read(&self, offset: usize, data: &mut [u8]) {
        crate::model::read_bytes(&self.registers(), offset as u64, data);
    }

    fn valid_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors { vector } else { NO_VECTOR }
    }

    /// A write of a register's whole width; 64-bit registers also by halves. Anything else is dropped.
    pub(crate) fn write(
        &mut self,
        id: &str,
        offset: usize,
        data: &[u8],
        memory: &GuestMemory,
        interrupts: &Interrupts,
    ) -> After {
        let mut bytes = [0; 8];
        let Some(target) = bytes.get_mut(..data.len()) else {
            return After::Nothing;
        };
        target.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = value as u32,
            (0x08, 4) => self.driver_feature_select = value as u32,
            (0x0c, 4) => self.accept_word(value as u32),
            (0x10, 2) => self.config_vector = self.valid_vector(value as u16),
            (0x14, 1) => return self.write_status(id, value as u8, memory, interrupts),
            (0x16, 2) => self.queue_select = value as u16,
            (0x18..=0x37, _) => self.write_queue(offset, data.len(), value),
            _ => {}
        }
        After::Nothing
    }

    fn accept_word(&mut self, value: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
            1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    fn write_queue(&mut self, offset: usize, len: usize, value: u64) {
        let vector = self.valid_vector(value as u16);
        let set_up = self.status & status::DRIVER_OK == 0;
        let Some(ring) = self.rings.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        match (offset, len) {
            (0x1a, 2) => ring.vector = vector,
            (0x18, 2) if set_up => ring.set_size(value as u16),
            (0x1c, 2) if set_up && value == 1 => ring.enable(),
            (0x20..=0x37, 4 | 8) if set_up => {
                let (which, half) = ((offset - 0x20) / 8, offset % 8);
                let old = ring.addresses()[which];
                match (half, len) {
                    (0, 8) => ring.set_address(which, value),
                    (0, 4) => ring.set_address(which, old & !0xffff_ffff | value),
                    (4, 4) => ring.set_address(which, old & 0xffff_ffff | value << 32),
                    _ => {}
                }
            }
            _ => {}
        }
    }

    fn write_status(&mut self, id: &str, value: u8, memory: &GuestMemory, interrupts: &Interrupts) -> After {
        if value == 0 {
            self.reset(memory, interrupts);
            return After::Nothing;
        }
        // A driver only adds bits; NEEDS_RESET is the device's.
        let added = value & !self.status & !status::NEEDS_RESET;
        self.status |= added & !(status::FEATURES_OK | status::DRIVER_OK);
        if added & status::FEATURES_OK != 0 {
            let features = self.driver_features;
            let fits = features & !self.offered() == 0 && features & F_VERSION_1 != 0;
            if fits && self.model.consistent(features) {
                self.status |= status::FEATURES_OK;
            } else {
                log::debug!(
                    "{id}: features {features:#x} refused, offered are {:#x}",
                    self.offered()
                );
            }
        }
        if added & status::DRIVER_OK != 0 && self.status & status::FEATURES_OK != 0 {
            self.status |= status::DRIVER_OK;
            match self.activate(memory) {
                Ok(()) => return After::Wake,
                Err(e) => self.fail(id, e, memory, interrupts),
            }
        }
        After::Nothing
    }
}
