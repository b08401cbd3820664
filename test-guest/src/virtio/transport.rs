//! The PCI transport: capabilities, common configuration, features, queues (virtio 1.2, 4.1.4 and 3.1).

use core::sync::atomic::{Ordering, fence};

use crate::pci::{Function, Placer};
use crate::virtio::queue::Queue;

const VENDOR: u16 = 0x1af4;
const MODERN: u16 = 0x1040;
const CAPABILITY_VENDOR: u8 = 0x09;

const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_DEVICE: u8 = 4;

/// Offsets in the common configuration.
const DEVICE_FEATURE_SELECT: u64 = 0;
const DEVICE_FEATURE: u64 = 4;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const CONFIG_VECTOR: u64 = 16;
const STATUS: u64 = 20;
const CONFIG_GENERATION: u64 = 21;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_VECTOR: u64 = 26;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_NOTIFY: u64 = 30;
const QUEUE_DESCRIPTORS: u64 = 32;
const QUEUE_AVAILABLE: u64 = 40;
const QUEUE_USED: u64 = 48;
const COMMON_LEN: u64 = 56;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;

const NO_VECTOR: u16 = 0xffff;

/// A region of a BAR.
#[derive(Debug, Clone, Copy)]
struct Window {
    base: u64,
    len: u64,
}

impl Window {
    fn address(&self, offset: u64, len: u64) -> u64 {
        assert!(
            offset + len <= self.len,
            "virtio: register {offset:#x} is outside of its window"
        );
        self.base + offset
    }

    fn read8(&self, at: u64) -> u8 {
        // SAFETY: within the window, which is mapped device memory.
        unsafe { (self.address(at, 1) as *const u8).read_volatile() }
    }

    fn read16(&self, at: u64) -> u16 {
        // SAFETY: as above.
        unsafe { (self.address(at, 2) as *const u16).read_volatile() }
    }

    fn read32(&self, at: u64) -> u32 {
        // SAFETY: as above.
        unsafe { (self.address(at, 4) as *const u32).read_volatile() }
    }

    fn write8(&self, at: u64, value: u8) {
        // SAFETY: as above; what devices do to memory is confined to the queues that they were given.
        unsafe { (self.address(at, 1) as *mut u8).write_volatile(value) }
    }

    fn write16(&self, at: u64, value: u16) {
        // SAFETY: as above.
        unsafe { (self.address(at, 2) as *mut u16).write_volatile(value) }
    }

    fn write32(&self, at: u64, value: u32) {
        // SAFETY: as above.
        unsafe { (self.address(at, 4) as *mut u32).write_volatile(value) }
    }

    fn write64(&self, at: u64, value: u64) {
        self.write32(at, value as u32);
        self.write32(at + 4, (value >> 32) as u32);
    }
}

/// A virtio device.
pub struct Transport {
    /// Device type.
    pub kind: u16,
    /// Its queues interrupt.
    pub interrupts: bool,
    common: Window,
    notify: Window,
    notify_multiplier: u64,
    config: Option<Window>,
    features: u64,
}

impl Transport {
    /// Takes over `function` if it is a virtio device with the modern interface: resets it, and lets its queues send
    /// `vector` to the processor with APIC id `to` (none: they never interrupt).
    pub fn new(function: &Function, placer: &mut Placer, interrupt: Option<(u32, u8)>) -> Option<Self> {
        let (vendor, device) = function.id;
        if vendor != VENDOR || device < MODERN {
            return None;
        }
        let mut windows = [None; 5];
        let mut notify_multiplier = 0;
        for (id, at) in function.capabilities() {
            let kind = (function.location.read(at) >> 24) as u8;
            if id != CAPABILITY_VENDOR || !matches!(kind, CAP_COMMON | CAP_NOTIFY | CAP_DEVICE) {
                continue;
            }
            let bar = function.location.read(at + 4) as u8;
            let (offset, len) = (function.location.read(at + 8), function.location.read(at + 12));
            let (offset, len) = (u64::from(offset), u64::from(len));
            let slot = &mut windows[usize::from(kind)];
            if slot.is_some() {
                continue;
            }
            let (base, size) = function.bar(bar, placer)?;
            if offset + len > size {
                return None;
            }
            if kind == CAP_NOTIFY {
                notify_multiplier = function.location.read(at + 16).into();
            }
            *slot = Some(Window {
                base: base + offset,
                len,
            });
        }
        function.enable();
        let interrupts = interrupt.is_some_and(|(to, vector)| function.enable_msix(placer, to, vector));
        let [_, common, notify, _, config] = windows;
        let this = Self {
            kind: device - MODERN,
            interrupts,
            common: common.filter(|w: &Window| w.len >= COMMON_LEN)?,
            notify: notify?,
            notify_multiplier,
            config,
            features: 0,
        };
        this.common.write8(STATUS, 0);
        while this.common.read8(STATUS) != 0 {
            core::hint::spin_loop();
        }
        this.common.write8(STATUS, ACKNOWLEDGE);
        this.common.write8(STATUS, ACKNOWLEDGE | DRIVER);
        Some(this)
    }

    fn offered(&self) -> u64 {
        self.common.write32(DEVICE_FEATURE_SELECT, 0);
        let low = self.common.read32(DEVICE_FEATURE);
        self.common.write32(DEVICE_FEATURE_SELECT, 1);
        u64::from(self.common.read32(DEVICE_FEATURE)) << 32 | u64::from(low)
    }

    /// The device offers a feature.
    pub fn offers(&self, feature: u64) -> bool {
        self.offered() & feature != 0
    }

    /// Takes those of `wanted` features that are offered (with VERSION_1 and EVENT_IDX); false if the device refuses.
    pub fn negotiate(&mut self, wanted: u64) -> bool {
        self.features = self.offered() & (wanted | F_VERSION_1 | F_EVENT_IDX);
        for (half, value) in [(0, self.features as u32), (1, (self.features >> 32) as u32)] {
            self.common.write32(DRIVER_FEATURE_SELECT, half);
            self.common.write32(DRIVER_FEATURE, value);
        }
        self.common.write8(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        let accepted = self.common.read8(STATUS) & FEATURES_OK != 0;
        accepted && self.has(F_VERSION_1)
    }

    /// A feature was negotiated.
    pub fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// Sets up queue `index` with at most `wanted` entries.
    pub fn queue(&mut self, index: u16, wanted: u16) -> Option<Queue> {
        self.common.write16(QUEUE_SELECT, index);
        let size = guest_core::ring::queue_size(self.common.read16(QUEUE_SIZE), wanted);
        if size < 2 {
            return None;
        }
        self.common.write16(QUEUE_SIZE, size);
        let vector = if self.interrupts { 0 } else { NO_VECTOR };
        self.common.write16(QUEUE_VECTOR, vector);
        if self.interrupts && self.common.read16(QUEUE_VECTOR) != vector {
            self.interrupts = false;
        }
        let offset = u64::from(self.common.read16(QUEUE_NOTIFY)) * self.notify_multiplier;
        let doorbell = self.notify.address(offset, 2) as *mut u16;
        let queue = Queue::new(index, size, doorbell, self.has(F_EVENT_IDX));
        let (descriptors, available, used) = queue.addresses();
        self.common.write64(QUEUE_DESCRIPTORS, descriptors);
        self.common.write64(QUEUE_AVAILABLE, available);
        self.common.write64(QUEUE_USED, used);
        self.common.write16(QUEUE_ENABLE, 1);
        Some(queue)
    }

    /// The device may begin.
    pub fn start(&mut self) {
        self.common.write16(CONFIG_VECTOR, NO_VECTOR);
        fence(Ordering::SeqCst);
        self.common
            .write8(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// A byte of the device's configuration; 0 past its end.
    pub fn config8(&self, at: u64) -> u8 {
        match &self.config {
            Some(window) if at < window.len => window.read8(at),
            _ => 0,
        }
    }

    /// 64 bits of the device's configuration, read in one generation.
    pub fn config64(&self, at: u64) -> u64 {
        let Some(window) = self.config.filter(|w| at + 8 <= w.len) else {
            return 0;
        };
        loop {
            let generation = self.common.read8(CONFIG_GENERATION);
            let value = u64::from(window.read32(at)) | u64::from(window.read32(at + 4)) << 32;
            if self.common.read8(CONFIG_GENERATION) == generation {
                return value;
            }
        }
    }
}
