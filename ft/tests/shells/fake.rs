//! A VM over plain byte arrays: RAM, disks, devices that call the interposer, and a complete history of checkpoints.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use ft::copies::{Divergence, SessionId};
use ft::interposer::Interposer;
use ft::machine::*;

use crate::image::Image;

use crate::san::{DISK, San};

pub const PAGE: usize = PAGE_SIZE;
pub const BLOCK: u64 = 4096;

/// Everything that a checkpoint must contain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Contents {
    pub ram: Vec<u8>,
    pub disks: Vec<Vec<u8>>,
    pub counter: u64,
}

#[derive(Default)]
struct Gate {
    paused: bool,
    inside: u32,
    stopped: Option<String>,
}

pub struct FakeVm {
    pub identity: Identity,
    /// Its name at the shared disk.
    pub number: u64,
    pub san: Mutex<Option<Arc<San>>>,
    pub contents: Mutex<Contents>,
    gate: Mutex<Gate>,
    moved: Condvar,
    dirty: Mutex<BTreeSet<u64>>,
    blocks: Mutex<Vec<BTreeSet<u64>>>,
    pub interposer: Mutex<Option<Arc<Interposer>>>,
    /// What left the VM.
    pub wire: Mutex<Vec<Output>>,
    /// What the guest was given after a takeover.
    pub replayed: Mutex<Vec<Input>>,
    /// Contents at each `save_state`.
    pub history: Mutex<Vec<Contents>>,
    pub tracking: Mutex<bool>,
    pub fail_save: Mutex<Option<String>>,
    pub throttled: Mutex<Vec<u8>>,
    /// The image of disk 0, if it has one.
    pub image: Mutex<Option<Image>>,
    /// How long each call of `release` takes after its outputs left.
    pub slow_release: Mutex<Duration>,
}

pub fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap()
}

pub fn identity(id: &str) -> Identity {
    Identity {
        vm_id: id.into(),
        vmm_version: "1".into(),
        config: "{}".into(),
        memory: vec![(0, 64 * PAGE as u64), (1 << 20, 64 * PAGE as u64)],
        vcpus: 2,
        cpu_features: vec![("leaf 1 ecx".into(), 7)],
        tsc_khz: 1000,
        disks: vec![
            DiskIdentity {
                id: "_disk0".into(),
                size: 64 * BLOCK,
                readonly: false,
                shared: None,
            },
            DiskIdentity {
                id: "_disk1".into(),
                size: 8 * BLOCK,
                readonly: true,
                shared: None,
            },
        ],
        nics: 2,
    }
}

impl FakeVm {
    pub fn new(identity: Identity) -> Arc<Self> {
        let ram: u64 = identity.memory.iter().map(|(_, size)| size).sum();
        let disks = identity.disks.iter().map(|d| vec![0; d.size as usize]).collect();
        Self::with(
            identity,
            Contents {
                ram: vec![0; ram as usize],
                disks,
                counter: 0,
            },
        )
    }

    pub fn with(identity: Identity, contents: Contents) -> Arc<Self> {
        let blocks = identity.disks.iter().map(|_| BTreeSet::new()).collect();
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        Arc::new(Self {
            identity,
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            san: Mutex::default(),
            contents: Mutex::new(contents),
            gate: Mutex::default(),
            moved: Condvar::new(),
            dirty: Mutex::default(),
            blocks: Mutex::new(blocks),
            interposer: Mutex::default(),
            wire: Mutex::default(),
            replayed: Mutex::default(),
            history: Mutex::default(),
            tracking: Mutex::new(false),
            fail_save: Mutex::default(),
            throttled: Mutex::default(),
            image: Mutex::default(),
            slow_release: Mutex::default(),
        })
    }

    /// With a disk that other hosts see, too, and whose content is there already.
    pub fn on(identity: Identity, san: &Arc<San>) -> Arc<Self> {
        let vm = Self::new(identity);
        lock(&vm.contents).disks[usize::from(DISK)] = san.bytes();
        *lock(&vm.san) = Some(san.clone());
        vm
    }

    pub fn san(&self) -> Option<Arc<San>> {
        lock(&self.san).clone()
    }

    /// What is stuck on the way to it is lost.
    pub fn forget_san(&self) {
        *lock(&self.san) = None;
    }

    fn change_shared(&self, change: &DiskChange) -> bool {
        self.run(|vm| {
            let (offset, len) = change.range();
            let range = offset as usize..(offset + len) as usize;
            match change {
                DiskChange::Write { data, .. } => {
                    lock(&vm.contents).disks[usize::from(DISK)][range].copy_from_slice(data);
                }
                _ => lock(&vm.contents).disks[usize::from(DISK)][range].fill(0),
            }
            match lock(&vm.interposer).clone() {
                Some(i) => i.hold_disk(DISK, change.clone()),
                None => vm.san().unwrap().carry_out(vm.number, change).unwrap(),
            }
        })
        .is_some()
    }

    pub fn write_shared_disk(&self, offset: u64, data: &[u8]) -> bool {
        let data = data.to_vec();
        self.change_shared(&DiskChange::Write { offset, data })
    }

    pub fn zero_shared_disk(&self, offset: u64, len: u64) -> bool {
        let unmap = true;
        self.change_shared(&DiskChange::Zero { offset, len, unmap })
    }

    pub fn flush_shared_disk(&self) -> bool {
        self.change_shared(&DiskChange::Flush)
    }

    pub fn offset(&self, gpa: u64, len: usize) -> Result<usize, MachineError> {
        let mut base = 0;
        for (start, size) in &self.identity.memory {
            if gpa >= *start && gpa + len as u64 <= start + size {
                return Ok(base + (gpa - start) as usize);
            }
            base += *size as usize;
        }
        Err(MachineError(format!("no RAM at {gpa:#x}")))
    }

    /// Runs a device or vCPU operation: never while paused. `None`: the VM is stopped for good.
    pub fn run<R>(&self, op: impl FnOnce(&Self) -> R) -> Option<R> {
        let mut gate = lock(&self.gate);
        while gate.paused && gate.stopped.is_none() {
            gate = self.moved.wait(gate).unwrap();
        }
        if gate.stopped.is_some() {
            return None;
        }
        gate.inside += 1;
        drop(gate);
        let result = op(self);
        lock(&self.gate).inside -= 1;
        self.moved.notify_all();
        Some(result)
    }

    fn poke(&self, gpa: u64, data: &[u8]) {
        let at = self.offset(gpa, data.len()).unwrap();
        lock(&self.contents).ram[at..at + data.len()].copy_from_slice(data);
        for page in gpa / PAGE as u64..=(gpa + data.len() as u64 - 1) / PAGE as u64 {
            lock(&self.dirty).insert(page);
        }
    }

    pub fn write_ram(&self, gpa: u64, data: &[u8]) -> bool {
        self.run(|vm| vm.poke(gpa, data)).is_some()
    }

    /// A write that the log of written pages misses.
    pub fn write_unlogged(&self, gpa: u64, data: &[u8]) {
        let at = self.offset(gpa, data.len()).unwrap();
        self.run(|vm| lock(&vm.contents).ram[at..at + data.len()].copy_from_slice(data));
    }

    /// A change of the disk that the log misses.
    pub fn write_disk_unlogged(&self, offset: u64, data: &[u8]) {
        self.run(|vm| lock(&vm.contents).disks[0][offset as usize..][..data.len()].copy_from_slice(data));
    }

    /// A bit of RAM flips by itself.
    pub fn flip_ram(&self, gpa: u64) {
        let at = self.offset(gpa, 1).unwrap();
        lock(&self.contents).ram[at] ^= 0x10;
    }

    /// A bit of the disk flips by itself.
    pub fn flip_disk(&self, offset: u64) {
        lock(&self.contents).disks[0][offset as usize] ^= 0x10;
    }

    /// The guest counts and sends the new value.
    pub fn count_and_send(&self) -> Option<u64> {
        self.run(|vm| {
            let n = {
                let mut contents = lock(&vm.contents);
                contents.counter += 1;
                contents.counter
            };
            vm.poke(0, &n.to_le_bytes());
            vm.output(Output::Frame {
                nic: 0,
                data: n.to_le_bytes().to_vec(),
            });
            n
        })
    }

    fn output(&self, output: Output) {
        let interposer = lock(&self.interposer).clone();
        match (interposer, output) {
            (Some(i), Output::Frame { nic, data }) => i.hold_frame(nic, data),
            (Some(i), Output::Console { console, data }) => i.hold_console(console, &data),
            (None, output) => lock(&self.wire).push(output),
        }
    }

    pub fn print(&self, text: &str) {
        self.run(|vm| {
            vm.output(Output::Console {
                console: 0,
                data: text.into(),
            })
        });
    }

    /// The guest receives a frame and keeps it in RAM.
    pub fn receive(&self, frame: &[u8]) -> bool {
        self.run(|vm| {
            if let Some(i) = lock(&vm.interposer).clone() {
                i.log_frame(1, frame);
            }
            vm.poke(8 * PAGE as u64, frame);
        })
        .is_some()
    }

    pub fn write_disk(&self, offset: u64, data: &[u8]) -> bool {
        self.run(|vm| {
            vm.change_image(&DiskChange::Write {
                offset,
                data: data.to_vec(),
            });
            lock(&vm.contents).disks[0][offset as usize..][..data.len()].copy_from_slice(data);
            match lock(&vm.interposer).clone() {
                Some(i) => i.log_disk(
                    0,
                    DiskChange::Write {
                        offset,
                        data: data.to_vec(),
                    },
                ),
                None => {
                    let last = (offset + data.len() as u64 - 1) / BLOCK;
                    lock(&vm.blocks)[0].extend(offset / BLOCK..=last);
                }
            }
        })
        .is_some()
    }

    fn change_image(&self, change: &DiskChange) {
        if let Some(image) = &*lock(&self.image) {
            image.change(change);
        }
    }

    /// The guest flushes its disk, and tells the world.
    pub fn flush_and_send(&self) {
        let flushed = self.run(|vm| {
            if let Some(i) = lock(&vm.interposer).clone() {
                i.log_disk(0, DiskChange::Flush);
            }
        });
        if flushed.is_some() {
            self.count_and_send();
        }
    }

    pub fn zero_disk(&self, offset: u64, len: u64) {
        self.run(|vm| {
            let unmap = true;
            vm.change_image(&DiskChange::Zero { offset, len, unmap });
            lock(&vm.contents).disks[0][offset as usize..][..len as usize].fill(0);
            match lock(&vm.interposer).clone() {
                Some(i) => i.log_disk(
                    0,
                    DiskChange::Zero {
                        offset,
                        len,
                        unmap: true,
                    },
                ),
                None => lock(&vm.blocks)[0].extend(offset / BLOCK..=(offset + len - 1) / BLOCK),
            }
        });
    }

    pub fn contents(&self) -> Contents {
        lock(&self.contents).clone()
    }

    pub fn stop_reason(&self) -> Option<String> {
        lock(&self.gate).stopped.clone()
    }

    pub fn is_paused(&self) -> bool {
        lock(&self.gate).paused
    }

    /// Counter values that left the VM, in order.
    pub fn sent(&self) -> Vec<u64> {
        let numbers = |output: &Output| match output {
            Output::Frame { data, .. } => Some(u64::from_le_bytes(data[..].try_into().unwrap())),
            Output::Console { .. } => None,
        };
        lock(&self.wire).iter().filter_map(numbers).collect()
    }

    fn hold(&self) {
        let mut gate = lock(&self.gate);
        gate.paused = true;
        while gate.inside > 0 {
            gate = self.moved.wait(gate).unwrap();
        }
    }
}

impl Protected for FakeVm {
    fn identity(&self) -> Result<Identity, MachineError> {
        Ok(self.identity.clone())
    }

    fn start_tracking(&self) -> Result<(), MachineError> {
        assert!(!std::mem::replace(&mut *lock(&self.tracking), true));
        lock(&self.dirty).clear();
        Ok(())
    }

    fn stop_tracking(&self) {
        assert!(std::mem::replace(&mut *lock(&self.tracking), false));
    }

    fn harvest_dirty(&self, _hot: bool, out: &mut Vec<PageRun>) -> Result<(), MachineError> {
        let pages = std::mem::take(&mut *lock(&self.dirty));
        out.extend(pages.into_iter().map(|page| PageRun {
            gpa: page * PAGE as u64,
            count: 1,
        }));
        Ok(())
    }

    fn read_memory(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MachineError> {
        let at = self.offset(gpa, buf.len())?;
        buf.copy_from_slice(&lock(&self.contents).ram[at..at + buf.len()]);
        Ok(())
    }

    fn read_disk(&self, disk: u16, offset: u64, buf: &mut [u8]) -> Result<(), MachineError> {
        buf.copy_from_slice(&lock(&self.contents).disks[usize::from(disk)][offset as usize..][..buf.len()]);
        Ok(())
    }

    fn harvest_dirty_blocks(&self, disk: u16, out: &mut Vec<(u64, u64)>) -> Result<(), MachineError> {
        let blocks = std::mem::take(&mut lock(&self.blocks)[usize::from(disk)]);
        out.extend(blocks.into_iter().map(|block| (block * BLOCK, BLOCK)));
        Ok(())
    }

    fn pause(&self, _: bool) -> Result<bool, MachineError> {
        assert!(!self.is_paused() || self.stop_reason().is_some(), "pauses do not nest");
        self.hold();
        Ok(false)
    }

    fn save_state(&self) -> Result<SavedState, MachineError> {
        assert!(self.is_paused());
        if let Some(reason) = lock(&self.fail_save).clone() {
            return Err(MachineError(reason));
        }
        let contents = self.contents();
        let state = contents.counter.to_le_bytes().to_vec();
        lock(&self.history).push(contents);
        Ok(Box::new(move || Ok(state)))
    }

    fn resume(&self) -> Result<(), MachineError> {
        lock(&self.gate).paused = false;
        self.moved.notify_all();
        Ok(())
    }

    fn attach(&self, interposer: Arc<Interposer>, session: &SessionId) -> Result<(), MachineError> {
        assert!(self.is_paused());
        if let Some(image) = &*lock(&self.image) {
            image.history.begin(session);
        }
        assert!(lock(&self.interposer).replace(interposer).is_none());
        Ok(())
    }

    fn detach(&self) -> Result<(), MachineError> {
        assert!(self.is_paused());
        assert!(lock(&self.interposer).take().is_some());
        if let Some(image) = &*lock(&self.image) {
            image.history.go_alone();
        }
        Ok(())
    }

    fn divergence(&self, disk: u16) -> Option<Divergence> {
        assert_eq!(disk, 0);
        lock(&self.image).as_ref()?.history.divergence()
    }

    fn refute(&self, _disk: u16) {
        lock(&self.image).as_ref().unwrap().history.refute();
    }

    fn confirm(&self, applied: u64, running: u64) {
        if let Some(image) = &*lock(&self.image) {
            image.history.confirm(applied, running);
        }
    }

    fn close_disks(&self) {
        assert!(self.stop_reason().is_some());
        if let Some(image) = &*lock(&self.image) {
            image.close();
        }
    }

    fn release(&self, outputs: Vec<Output>) {
        lock(&self.wire).extend(outputs);
        let pause = *lock(&self.slow_release);
        std::thread::sleep(pause);
    }

    fn write_shared(&self, _disk: u16, change: &DiskChange) -> Result<(), MachineError> {
        let Some(san) = self.san() else {
            return Err(MachineError("the disk is closed".into()));
        };
        san.wait();
        match self.san() {
            Some(san) => san.carry_out(self.number, change),
            None => Ok(()),
        }
    }

    fn yield_disks(&self) {
        self.san().iter().for_each(|san| san.give_back(self.number));
    }

    fn claim_disks(&self) -> Result<Option<String>, MachineError> {
        Ok(self.san().and_then(|san| san.claim(self.number)))
    }

    fn throttle(&self, run_percent: u8) {
        lock(&self.throttled).push(run_percent);
    }

    fn stop(&self, reason: &str) {
        self.hold();
        lock(&self.gate).stopped = Some(reason.to_string());
        self.moved.notify_all();
    }
}
