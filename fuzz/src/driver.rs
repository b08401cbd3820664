//! A hostile driver: what it does with a device comes from the fuzzer, step by step. The device is the real one, served on
//! this thread.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use pci::{MsiVectors, NotifyRegistrar, PciDevice};
use virtio_devices::model::Model;
use virtio_devices::{GuestMemory, Handle, PciResources, VirtioState};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::input::Input;
use crate::reach::reached;

/// Guest RAM: two regions side by side, one behind a hole.
const RAM: [(u64, usize); 3] = [(0, 0x4_0000), (0x4_0000, 0x4_0000), (0x10_0000, 0x1_0000)];
/// First address of buffers; the rings are below.
pub const BUFFERS: u64 = 0x1_0000;
/// Where the first device's BAR is.
pub const BAR: u64 = 1 << 32;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const VERSION_1: u64 = 1 << 32;

/// Fresh guest RAM.
pub fn memory() -> Arc<GuestMemory> {
    let region = |(start, len): (u64, usize)| {
        let map = MmapRegion::new(len).expect("memory for the guest");
        GuestRegionMmap::new(map, GuestAddress(start)).expect("a region that ends")
    };
    Arc::new(GuestMemory::from_regions(RAM.map(region).into()).expect("regions that do not overlap"))
}

/// Whether the pieces are in guest RAM, all of them.
pub fn in_ram(memory: &GuestMemory, iovecs: &[libc::iovec]) -> bool {
    let inside = |iovec: &libc::iovec| {
        let start = iovec.iov_base as usize;
        memory.iter().any(|region| {
            let base = region.as_ptr() as usize;
            base <= start && start + iovec.iov_len <= base + region.len() as usize
        })
    };
    iovecs.iter().all(inside)
}

/// Gets what a device raises; holds it to the rules of KVM's routes and ioeventfds.
#[derive(Default)]
pub struct Machine {
    registered: Mutex<BTreeSet<u64>>,
}

impl MsiVectors for Machine {
    fn set_route(&self, _vector: u16, _message: Option<(u64, u32)>) -> io::Result<()> {
        Ok(())
    }

    fn trigger(&self, _vector: u16) -> io::Result<()> {
        reached("interrupt");
        Ok(())
    }
}

impl NotifyRegistrar for Machine {
    fn register(&self, addr: u64, _fd: &EventFd) -> io::Result<()> {
        let mut registered = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        // As KVM: an address is there once.
        if registered.insert(addr) {
            Ok(())
        } else {
            Err(io::ErrorKind::AlreadyExists.into())
        }
    }

    fn unregister(&self, addr: u64, _fd: &EventFd) -> io::Result<()> {
        let mut registered = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        if registered.remove(&addr) {
            Ok(())
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }
}

struct Queue {
    size: u16,
    next_desc: u16,
    avail: u16,
    desc_at: u64,
}

impl Queue {
    fn avail_at(&self) -> u64 {
        self.desc_at + 0x1000
    }

    fn used_at(&self) -> u64 {
        self.desc_at + 0x2000
    }
}

/// An address: mostly in a buffer, now and then at an edge or anywhere.
pub fn address(input: &mut Input<'_>) -> u64 {
    match input.u8() {
        0..=0x9f => BUFFERS + 16 * u64::from(input.u16()),
        0xa0..=0xbf => 0x4_0000 - u64::from(input.u8()),
        0xc0..=0xcf => 0x8_0000 - u64::from(input.u8()),
        0xd0..=0xdf => 0x10_0000 + u64::from(input.u16()),
        0xe0..=0xef => input.u16().into(),
        0xf0..=0xf7 => input.u32().into(),
        _ => input.u64(),
    }
}

fn length(input: &mut Input<'_>) -> u32 {
    match input.u8() {
        0..=0x7f => input.u8().into(),
        0x80..=0xcf => 512 * u32::from(input.u8()),
        0xd0..=0xef => input.u16().into(),
        _ => input.u32(),
    }
}

fn pieces(input: &mut Input<'_>) -> Vec<(u64, u32, bool)> {
    let shape = input.u8();
    let piece = |i: u8| {
        let write = match shape >> 6 {
            0 => false,
            1 => true,
            2 => i >= shape >> 3 & 7,
            _ => shape >> (i % 3) & 1 != 0,
        };
        (address(input), length(input), write)
    };
    (0..shape % 8).map(piece).collect()
}

/// A driver with its device.
pub struct Driver<M: Model> {
    /// Guest RAM.
    pub memory: Arc<GuestMemory>,
    /// The device.
    pub handle: Handle<M>,
    pci: Arc<dyn PciDevice>,
    queues: Vec<Queue>,
    held: u32,
}

impl<M: Model> Driver<M> {
    /// A device that no driver has touched.
    pub fn new(model: M, memory: Arc<GuestMemory>) -> Self {
        let machine = Arc::new(Machine::default());
        Self::on(model, memory, "_fuzz", BAR, &machine)
    }

    /// One of several devices of a machine.
    pub fn on(model: M, memory: Arc<GuestMemory>, id: &str, bar: u64, machine: &Arc<Machine>) -> Self {
        let sizes = model.queue_sizes();
        let resources = PciResources {
            bar,
            vectors: machine.clone(),
            registrar: machine.clone(),
        };
        let handle = Handle::without_worker(id.into(), memory.clone(), model, resources).expect("a device");
        let queue = |(i, size)| Queue {
            size,
            next_desc: 0,
            avail: 0,
            desc_at: 0x4000 * (i as u64 + 1),
        };
        Self {
            pci: handle.pci(),
            queues: sizes.into_iter().enumerate().map(queue).collect(),
            memory,
            handle,
            held: 0,
        }
    }

    /// Reads a register of the BAR.
    pub fn read(&self, offset: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        self.pci.bar_read(0, offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    /// Writes a register of the BAR.
    pub fn write(&self, offset: u64, len: usize, value: u64) {
        self.pci.bar_write(0, offset, &value.to_le_bytes()[..len]);
    }

    /// Resets the device, and brings it up as a good driver does, with these features as far as it offers them.
    pub fn bring_up(&mut self, features: u64) {
        for queue in &mut self.queues {
            (queue.next_desc, queue.avail) = (0, 0);
        }
        self.start(features);
    }

    /// See [`Driver::bring_up`]; for a driver that has added nothing yet.
    pub fn start(&self, features: u64) {
        self.write(0x14, 1, 0);
        let mut offered = 0;
        for word in 0..2 {
            self.write(0, 4, word);
            offered |= self.read(4, 4) << (32 * word);
        }
        let mut features = features & offered | VERSION_1;
        for _ in 0..2 {
            self.write(0x14, 1, 3);
            for word in 0..2 {
                self.write(8, 4, word);
                self.write(0xc, 4, features >> (32 * word) & 0xffff_ffff);
            }
            self.write(0x14, 1, 0xb);
            if self.read(0x14, 1) & 8 != 0 {
                break;
            }
            // Features that need one another.
            features = VERSION_1;
        }
        self.write(0x10, 2, 0);
        for i in 0..self.queues.len() {
            let (size, at) = (self.queues[i].size, self.queues[i].desc_at);
            let zero = vec![0; 0x2000];
            self.memory
                .write_slice(&zero, GuestAddress(at + 0x1000))
                .expect("rings in RAM");
            self.write(0x16, 2, i as u64);
            for (register, len, value) in [
                (0x18, 2, u64::from(size)),
                (0x1a, 2, i as u64 + 1),
                (0x20, 8, at),
                (0x28, 8, at + 0x1000),
                (0x30, 8, at + 0x2000),
                (0x1c, 2, 1),
            ] {
                self.write(register, len, value);
            }
        }
        for vector in 0..=self.queues.len() as u64 {
            self.write(0x4000 + 16 * vector, 8, 0xfee0_0000);
            self.write(0x4008 + 16 * vector, 8, 0x40 + vector);
        }
        // MSI-X on; its capability is the last.
        let mut at = [0];
        self.pci.config_read(0x34, &mut at);
        loop {
            let mut head = [0; 2];
            self.pci.config_read(at[0].into(), &mut head);
            if head[1] == 0 {
                break;
            }
            at[0] = head[1];
        }
        self.pci.config_write(u16::from(at[0]) + 2, &0x8000u16.to_le_bytes());
        self.write(0x14, 1, 0xf);
    }

    /// The device runs and has not failed.
    pub fn live(&self) -> bool {
        self.handle.live()
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        // An address out of RAM is the fuzzer's, and nothing is there to be written.
        let _ = self.memory.write_slice(bytes, GuestAddress(address));
    }

    /// Writes a descriptor into a table.
    fn put_desc(&self, table: u64, index: u16, (address, len, flags, next): (u64, u32, u16, u16)) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(table.wrapping_add(16 * u64::from(index)), &bytes);
    }

    /// Makes a chain of (address, length, device writes) available.
    pub fn add(&mut self, queue: usize, pieces: &[(u64, u32, bool)], indirect: bool) {
        let Some(q) = self.queues.get_mut(queue) else { return };
        let (size, table, head) = (q.size, q.desc_at, q.next_desc);
        let last = pieces.len().saturating_sub(1);
        if indirect {
            q.next_desc = (head + 1) % size;
            let at = BUFFERS - 0x1000;
            for (i, (address, len, write)) in pieces.iter().enumerate() {
                let flags = u16::from(*write) * WRITE | u16::from(i < last) * NEXT;
                self.put_desc(at, i as u16, (*address, *len, flags, i as u16 + 1));
            }
            self.put_desc(table, head, (at, 16 * pieces.len() as u32, INDIRECT, 0));
        } else {
            q.next_desc = (head + pieces.len() as u16) % size;
            for (i, (address, len, write)) in pieces.iter().enumerate() {
                let index = (head + i as u16) % size;
                let flags = u16::from(*write) * WRITE | u16::from(i < last) * NEXT;
                self.put_desc(table, index, (*address, *len, flags, (index + 1) % size));
            }
        }
        self.make_available(queue, head);
    }

    fn make_available(&mut self, queue: usize, head: u16) {
        let Some(q) = self.queues.get_mut(queue) else { return };
        let slot = q.avail_at() + 4 + 2 * u64::from(q.avail % q.size);
        q.avail = q.avail.wrapping_add(1);
        let (index, at) = (q.avail, q.avail_at() + 2);
        self.put(slot, &head.to_le_bytes());
        self.put(at, &index.to_le_bytes());
    }

    /// Notifies a queue and serves what there is to do.
    pub fn notify(&mut self, queue: usize) {
        self.write(0x3000 + 4 * queue as u64, 2, queue as u64);
        self.serve();
    }

    fn serve(&self) {
        if self.held == 0 {
            self.handle.serve();
        }
    }

    /// The used index of a queue: how many chains came back.
    pub fn used(&self, queue: usize) -> u16 {
        let at = self.queues.get(queue).map_or(0, Queue::used_at) + 2;
        self.memory.read_obj(GuestAddress(at)).unwrap_or(0)
    }

    /// Does what `input` says until it is empty. `special` does what is particular to the device.
    pub fn run(&mut self, input: &mut Input<'_>, special: &mut dyn FnMut(&mut Self, &mut Input<'_>)) {
        let start = input.u8();
        if start != 0xff {
            self.bring_up(u64::from(start & 1) << 29 | u64::from(start & 2) << 27 | u64::from(input.u32() & 0xff_ffff));
        }
        while !input.is_empty() {
            self.step(input, special);
        }
        if self.live() {
            reached("live to the end");
        }
        while self.held > 0 {
            self.resume();
        }
    }

    fn resume(&mut self) {
        self.held -= 1;
        self.handle.resume();
        self.serve();
    }

    fn step(&mut self, input: &mut Input<'_>, special: &mut dyn FnMut(&mut Self, &mut Input<'_>)) {
        let queue = |input: &mut Input<'_>| input.below(self.queues.len());
        match input.u8() % 20 {
            0..=4 => special(self, input),
            5 | 6 => {
                let q = queue(input);
                let pieces = pieces(input);
                self.add(q, &pieces, false);
            }
            7 => {
                let q = queue(input);
                let pieces = pieces(input);
                self.add(q, &pieces, true);
            }
            8 | 9 => {
                let q = queue(input);
                self.notify(q);
            }
            10 => {
                let q = queue(input);
                let desc = (
                    address(input),
                    length(input),
                    u16::from(input.u8()),
                    u16::from(input.u8()),
                );
                let index = input.u8().into();
                self.put_desc(self.queues[q].desc_at, index, desc);
            }
            11 => {
                let (q, head) = (queue(input), input.u8());
                self.make_available(q, head.into());
            }
            12 => {
                let q = queue(input);
                let (index, at) = (input.u16(), self.queues[q].avail_at());
                self.queues[q].avail = index;
                self.put(at + 2, &index.to_le_bytes());
                self.put(at, &u16::from(input.u8()).to_le_bytes());
            }
            13 => {
                let (at, n) = (address(input), input.u8());
                self.put(at, input.bytes(n.into()));
            }
            14 => {
                let offset = if input.u8() & 1 == 0 {
                    input.below(0x40) as u64
                } else {
                    input.u16().into()
                };
                let len = [1, 2, 4, 8][input.below(4)];
                let value = input.number();
                self.write(offset, len, value);
                self.serve();
            }
            15 => {
                let (offset, len) = (input.u16(), [1, 2, 4, 8][input.below(4)]);
                self.read(offset.into(), len);
            }
            16 => {
                let (offset, bytes) = (input.u16() & 0xfff, input.array::<4>());
                let len = [1, 2, 4][input.below(3)];
                self.pci.config_write(offset, &bytes[..len]);
                self.pci.config_read(offset, &mut [0; 4][..len]);
            }
            17 => self.hold(input),
            18 => {
                let features = u64::from(input.u32() & 0xff_ffff) | u64::from(input.u8() & 3) << 28;
                self.bring_up(features);
            }
            _ => {
                self.handle.kick();
                self.serve();
            }
        }
    }

    /// Pauses, saves the state, loads it (or what the fuzzer makes of it), resumes.
    fn hold(&mut self, input: &mut Input<'_>) {
        let what = input.u8();
        if what & 1 == 0 && self.held > 0 {
            return self.resume();
        }
        self.held += 1;
        self.handle.pause();
        if what & 2 == 0 {
            return;
        }
        let state = self.handle.state();
        let mut bytes = postcard::to_stdvec(&state).expect("a state that can be written");
        if what & 4 == 0 {
            // What a device saved, it loads, unless the driver damaged the rings meanwhile.
            let back: VirtioState = postcard::from_bytes(&bytes).expect("a state that can be read");
            assert_eq!(back, state);
            if self.handle.set_state(&state).is_ok() {
                reached("state loaded");
                assert_eq!(self.handle.state(), state);
            }
        } else {
            let at = usize::from(input.u16()) % bytes.len();
            bytes[at] = input.u8();
            if let Ok(damaged) = postcard::from_bytes::<VirtioState>(&bytes)
                && self.handle.set_state(&damaged).is_ok()
            {
                reached("damaged state loaded");
            }
        }
        self.resume();
    }
}
