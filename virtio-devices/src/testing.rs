//! A driver for tests: it does with a device what a guest's driver does, by the device's BAR and by rings in guest RAM.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use pci::{MsiVectors, NotifyRegistrar, PciDevice};
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::model::Model;
use crate::{GuestMemory, Handle, PciResources, VirtioState};

pub(crate) const RAM: u64 = 16 << 20;
/// First address that the tests use for buffers.
pub(crate) const BUFFERS: u64 = 1 << 20;
pub(crate) const BAR_ADDRESS: u64 = 1 << 32;
pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const INDIRECT: u64 = 1 << 28;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT_FLAG: u16 = 4;

const PATIENCE: Duration = Duration::from_secs(10);

/// 16 MiB of guest RAM.
pub(crate) fn memory() -> Arc<GuestMemory> {
    let region = MmapRegion::new(RAM as usize).unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    Arc::new(GuestMemory::from_regions(vec![region]).unwrap())
}

pub(crate) fn is_dirty(memory: &GuestMemory, address: u64) -> bool {
    let region = memory.find_region(GuestAddress(address)).unwrap();
    region.bitmap().dirty_at(address as usize)
}

pub(crate) fn clean(memory: &GuestMemory) {
    for region in memory.iter() {
        (**region).bitmap().take(|_, _| ());
    }
}

/// Counts what a device raises and where it registers notifications.
#[derive(Default)]
pub(crate) struct Machine {
    raised: Mutex<Vec<u32>>,
    changed: Condvar,
    pub(crate) registered: Mutex<Vec<u64>>,
}

impl Machine {
    pub(crate) fn raised(&self, vector: usize) -> u32 {
        self.raised.lock().unwrap().get(vector).copied().unwrap_or(0)
    }

    /// Waits until `vector` was raised more than `before` times.
    pub(crate) fn wait(&self, vector: usize, before: u32) {
        let raised = self.raised.lock().unwrap();
        let more = |raised: &mut Vec<u32>| raised.get(vector).copied().unwrap_or(0) <= before;
        let (_raised, result) = self.changed.wait_timeout_while(raised, PATIENCE, more).unwrap();
        assert!(!result.timed_out(), "vector {vector} was not raised");
    }
}

impl MsiVectors for Machine {
    fn set_route(&self, _vector: u16, _message: Option<(u64, u32)>) -> io::Result<()> {
        Ok(())
    }

    fn trigger(&self, vector: u16) -> io::Result<()> {
        let mut raised = self.raised.lock().unwrap();
        let len = raised.len().max(usize::from(vector) + 1);
        raised.resize(len, 0);
        raised[usize::from(vector)] += 1;
        self.changed.notify_all();
        Ok(())
    }
}

impl NotifyRegistrar for Machine {
    fn register(&self, addr: u64, _fd: &EventFd) -> io::Result<()> {
        self.registered.lock().unwrap().push(addr);
        Ok(())
    }

    fn unregister(&self, addr: u64, _fd: &EventFd) -> io::Result<()> {
        self.registered.lock().unwrap().retain(|a| *a != addr);
        Ok(())
    }
}

/// The driver's side of one queue.
pub(crate) struct DriverQueue {
    pub(crate) index: u16,
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    next_desc: u16,
    avail_index: u16,
    used_index: u16,
}

impl DriverQueue {
    fn new(index: u16, size: u16) -> Self {
        let base = 0x1_0000 * (u64::from(index) + 1);
        Self {
            index,
            size,
            desc: base,
            avail: base + 0x8000,
            used: base + 0xa000,
            next_desc: 0,
            avail_index: 0,
            used_index: 0,
        }
    }
}

/// A descriptor: address, length, flags, next.
pub(crate) type Desc = (u64, u32, u16, u16);

pub(crate) fn write_desc(memory: &GuestMemory, table: u64, index: u16, desc: Desc) {
    let (address, len, flags, next) = desc;
    let at = GuestAddress(table + 16 * u64::from(index));
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    memory.write_slice(&bytes, at).unwrap();
}

/// A driver with its device.
pub(crate) struct Driver<M: Model> {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) machine: Arc<Machine>,
    pub(crate) handle: Handle<M>,
    pub(crate) pci: Arc<dyn PciDevice>,
    pub(crate) queues: Vec<DriverQueue>,
}

impl<M: Model> Driver<M> {
    /// A device that no driver has touched.
    pub(crate) fn idle(model: M, memory: Arc<GuestMemory>) -> Self {
        let machine = Arc::new(Machine::default());
        let sizes = model.queue_sizes();
        let resources = PciResources {
            bar: BAR_ADDRESS,
            vectors: machine.clone(),
            registrar: machine.clone(),
        };
        let handle = Handle::new("_test", memory.clone(), model, resources).unwrap();
        let queues = sizes
            .iter()
            .enumerate()
            .map(|(i, size)| DriverQueue::new(i as u16, *size))
            .collect();
        let pci = handle.pci();
        Self {
            memory,
            machine,
            handle,
            pci,
            queues,
        }
    }

    /// A device that runs with the given features beside VERSION_1.
    pub(crate) fn start(model: M, features: u64) -> Self {
        let mut driver = Self::idle(model, memory());
        driver.bring_up(features);
        driver
    }

    pub(crate) fn read(&self, offset: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        self.pci.bar_read(0, offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    pub(crate) fn write(&self, offset: u64, len: usize, value: u64) {
        self.pci.bar_write(0, offset, &value.to_le_bytes()[..len]);
    }

    pub(crate) fn status(&self) -> u8 {
        self.read(0x14, 1) as u8
    }

    /// Offset of the MSI-X capability.
    fn msix_at(&self) -> u16 {
        let mut at = [0];
        self.pci.config_read(0x34, &mut at);
        loop {
            let mut head = [0; 2];
            self.pci.config_read(u16::from(at[0]), &mut head);
            if head[0] == 0x11 {
                return u16::from(at[0]);
            }
            at[0] = head[1];
            assert_ne!(at[0], 0);
        }
    }

    /// Resets the device and its queues, and brings it up again.
    pub(crate) fn bring_up(&mut self, features: u64) {
        self.write(0x14, 1, 0);
        assert_eq!(self.status(), 0);
        self.pci.config_write(self.msix_at() + 2, &0x8000u16.to_le_bytes());
        for vector in 0..=self.queues.len() as u64 {
            self.write(0x4000 + 16 * vector, 8, 0xfee0_0000);
            self.write(0x4008 + 16 * vector, 4, 0x40 + vector);
            self.write(0x400c + 16 * vector, 4, 0);
        }
        self.write(0x14, 1, 1);
        self.write(0x14, 1, 3);
        let features = features | VERSION_1;
        for word in 0..2 {
            self.write(0x08, 4, word);
            self.write(0x0c, 4, features >> (32 * word) & 0xffff_ffff);
        }
        self.write(0x14, 1, 11);
        assert_eq!(self.status(), 11, "features refused");
        self.write(0x10, 2, 0);
        for i in 0..self.queues.len() {
            let queue = DriverQueue::new(i as u16, self.queues[i].size);
            for (address, len) in [(queue.avail, 0x2000), (queue.used, 0x4000)] {
                self.memory.write_slice(&vec![0; len], GuestAddress(address)).unwrap();
            }
            self.set_up(&queue);
            self.queues[i] = queue;
        }
        self.write(0x14, 1, 15);
    }

    fn set_up(&self, queue: &DriverQueue) {
        self.write(0x16, 2, u64::from(queue.index));
        self.write(0x18, 2, u64::from(queue.size));
        self.write(0x1a, 2, u64::from(queue.index) + 1);
        self.write(0x20, 8, queue.desc);
        self.write(0x28, 4, queue.avail & 0xffff_ffff);
        self.write(0x2c, 4, queue.avail >> 32);
        self.write(0x30, 8, queue.used);
        self.write(0x1c, 2, 1);
        assert_eq!(self.read(0x1c, 2), 1);
    }

    /// Makes a chain of (address, length, device writes) available and returns its head. Not notified.
    pub(crate) fn add(&mut self, queue: usize, buffers: &[(u64, u32, bool)]) -> u16 {
        let memory = self.memory.clone();
        let q = &mut self.queues[queue];
        let head = q.next_desc;
        for (i, (address, len, write)) in buffers.iter().enumerate() {
            let index = q.next_desc;
            q.next_desc = (q.next_desc + 1) % q.size;
            let last = i + 1 == buffers.len();
            let flags = u16::from(*write) * WRITE | u16::from(!last) * NEXT;
            write_desc(&memory, q.desc, index, (*address, *len, flags, q.next_desc));
        }
        self.make_available(queue, head);
        head
    }

    /// Puts a head into the available ring.
    pub(crate) fn make_available(&mut self, queue: usize, head: u16) {
        let q = &mut self.queues[queue];
        let at = q.avail + 4 + 2 * u64::from(q.avail_index % q.size);
        self.memory.write_obj(head, GuestAddress(at)).unwrap();
        q.avail_index = q.avail_index.wrapping_add(1);
        self.memory
            .store(q.avail_index, GuestAddress(q.avail + 2), Ordering::Release)
            .unwrap();
    }

    pub(crate) fn notify(&self, queue: usize) {
        self.write(0x3000 + 4 * queue as u64, 2, queue as u64);
    }

    /// Used elements (head, length) that are new.
    pub(crate) fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let q = &mut self.queues[queue];
        let index: u16 = self.memory.load(GuestAddress(q.used + 2), Ordering::Acquire).unwrap();
        let mut elements = Vec::new();
        while q.used_index != index {
            let at = q.used + 4 + 8 * u64::from(q.used_index % q.size);
            let (id, len) = (GuestAddress(at), GuestAddress(at + 4));
            elements.push((self.memory.read_obj(id).unwrap(), self.memory.read_obj(len).unwrap()));
            q.used_index = q.used_index.wrapping_add(1);
        }
        // Event index: tell at the next.
        let at = GuestAddress(q.avail + 4 + 2 * u64::from(q.size));
        self.memory.write_obj(q.used_index, at).unwrap();
        elements
    }

    /// Waits for `count` used elements.
    pub(crate) fn wait_used(&mut self, queue: usize, count: usize) -> Vec<(u32, u32)> {
        let mut elements = Vec::new();
        self.wait_for("used buffers", |driver| {
            elements.extend(driver.used(queue));
            elements.len() >= count
        });
        assert_eq!(elements.len(), count);
        elements
    }

    pub(crate) fn wait_for(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Waits until the device says that it needs a reset.
    pub(crate) fn wait_failed(&mut self) {
        self.wait_for("the device to fail", |driver| driver.status() & 64 != 0);
    }

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Moves the driver, with its RAM and its place in the rings, to another device in the state of this one.
    pub(crate) fn migrate(self, model: M) -> Self {
        self.handle.pause();
        let state = self.handle.state();
        let bytes = postcard::to_stdvec(&state).unwrap();
        let state: VirtioState = postcard::from_bytes(&bytes).unwrap();
        let mut other = Driver::idle(model, self.memory.clone());
        other.handle.pause();
        other.handle.set_state(&state).unwrap();
        assert_eq!(other.handle.state(), state);
        other.handle.kick();
        other.handle.resume();
        other.queues = self.queues;
        other
    }
}
