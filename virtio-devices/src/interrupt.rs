//! A device's interrupts: MSI-X vectors, and the ISR status for drivers that look at it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

use pci::msix::MsixConfig;

use crate::lock;
use crate::ring::NO_VECTOR;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Raises interrupts. Lock order: a device's core, then `msix`, then the machine's router.
pub(crate) struct Interrupts {
    pub(crate) msix: Mutex<MsixConfig>,
    isr: AtomicU8,
}

impl Interrupts {
    pub(crate) fn new(msix: MsixConfig) -> Self {
        Self {
            msix: Mutex::new(msix),
            isr: AtomicU8::new(0),
        }
    }

    fn raise(&self, bit: u8, vector: u16) {
        self.isr.fetch_or(bit, Ordering::AcqRel);
        if vector != NO_VECTOR {
            lock(&self.msix).trigger(vector);
        }
    }

    /// A queue has used buffers.
    pub(crate) fn queue(&self, vector: u16) {
        self.raise(ISR_QUEUE, vector);
    }

    /// The configuration or the status changed.
    pub(crate) fn config(&self, vector: u16) {
        self.raise(ISR_CONFIG, vector);
    }

    /// Reading the ISR status clears it.
    pub(crate) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    pub(crate) fn isr(&self) -> u8 {
        self.isr.load(Ordering::Acquire)
    }

    pub(crate) fn set_isr(&self, isr: u8) {
        self.isr.store(isr, Ordering::Release);
    }
}
