//! The running VM, as FT sees it: [`ft::machine::Protected`] on a [`Vm`].
//!
//! Owned by FT's primary session. `wraps` is taken only by that session's threads and by [`Protected::release`]; it is
//! taken before any device's lock, never after one.

use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use ft::copies::{Divergence, SessionId};
use ft::interposer::Interposer;
use ft::machine::{
    DiskChange, DiskIdentity, Identity, MachineError, Output, PageRun, Protected, SavedState, SharedDisk,
};
use sandbox::ThreadKind;
use virtio_devices::backend::{BlockBackend, ConsoleBackend, NetBackend};
use virtio_devices::block::DiskImage;

use super::backends::{HeldConsole, HeldNet, Slot};
use super::blocks::{ChangedBlocks, LoggedBlock, TrackedBlock};
use super::disks;
use super::histories::Histories;
use super::shared::SharedBlock;
use crate::devices::Disk;
use crate::interrupts::lock;
use crate::vm::{Holder, Vm};

pub(super) fn machine_error(e: impl std::fmt::Display) -> MachineError {
    MachineError(e.to_string())
}

pub(super) fn no_disk(disk: u16) -> MachineError {
    machine_error(format!("there is no disk {disk}"))
}

/// Full period of one slow-down cycle: the guest runs a share of it and stands still for the rest.
const THROTTLE_PERIOD: Duration = Duration::from_millis(10);

#[derive(Default)]
struct Wraps {
    nets: Vec<Slot<dyn NetBackend>>,
    disks: Vec<Option<Slot<dyn BlockBackend>>>,
    consoles: Vec<Option<Slot<dyn ConsoleBackend>>>,
}

struct DiskSide {
    size: u64,
    readonly: bool,
    shared: bool,
    changed: Arc<ChangedBlocks>,
}

/// A VM that FT protects.
pub struct ProtectedVm {
    vm: Arc<Vm>,
    disks: Vec<DiskSide>,
    histories: Arc<Histories>,
    wraps: Mutex<Wraps>,
    throttle: Arc<Throttle>,
}

/// What both sides must agree on, of this VM on this host.
/// Of this VM, which runs here. `shared`: ids of disks that the backup sees too, beside those that are known to be so.
pub(super) fn own_identity(vm: &Vm, shared: &[String]) -> Result<Identity, MachineError> {
    let mark = |disk: &Disk| (disk.is_shared() || shared.contains(&disk.id)).then(|| disks::mark(disk));
    let marks = vm.devices().disks().iter().map(|disk| mark(disk).transpose());
    identity(vm, &marks.collect::<Result<Vec<_>, _>>()?)
}

/// `shared`: of each disk, how it is shared.
pub(super) fn identity(vm: &Vm, shared: &[Option<SharedDisk>]) -> Result<Identity, MachineError> {
    let config = vm.config();
    let disks = vm.devices().disks().iter().enumerate();
    let disks = disks
        .map(|(i, d)| DiskIdentity {
            id: d.id.clone(),
            size: d.size,
            readonly: d.readonly,
            shared: shared.get(i).copied().flatten(),
        })
        .collect();
    Ok(Identity {
        vm_id: vm.uuid().to_string(),
        vmm_version: format!("{} (state {})", env!("CARGO_PKG_VERSION"), crate::state::VERSION),
        config: serde_json::to_string(config).map_err(machine_error)?,
        memory: vm.ram().regions(),
        vcpus: vm.vcpus().len() as u32,
        cpu_features: arch::cpuid::feature_words(vm.cpuid()),
        tsc_khz: vm.tsc_khz(),
        disks,
        nics: vm.devices().nets().len() as u32,
    })
}

impl ProtectedVm {
    /// Prepares `vm` for protection; nothing is changed in it yet. `histories` are those of its disks; `shared`: ids of disks
    /// that the backup sees too.
    pub fn new(vm: Arc<Vm>, histories: Arc<Histories>, shared: &[String]) -> Arc<Self> {
        let side = |disk: &Disk| DiskSide {
            size: disk.size,
            readonly: disk.readonly,
            shared: disk.is_shared() || shared.contains(&disk.id),
            changed: Arc::default(),
        };
        let disks = vm.devices().disks().iter().map(side).collect();
        Arc::new(Self {
            vm,
            disks,
            histories,
            wraps: Mutex::default(),
            throttle: Arc::new(Throttle(Mutex::new(ThrottleState {
                percent: 100,
                running: false,
            }))),
        })
    }

    fn disk(&self, disk: u16) -> Result<&DiskSide, MachineError> {
        self.disks.get(usize::from(disk)).ok_or_else(|| no_disk(disk))
    }

    fn image(&self, disk: u16) -> Result<Arc<dyn DiskImage>, MachineError> {
        let disks = self.vm.devices().disks();
        let disk = disks.get(usize::from(disk)).ok_or_else(|| no_disk(disk))?;
        disk.image().map_err(machine_error)
    }

    fn unwrap_disks(&self, wraps: &mut Wraps) {
        for (disk, slot) in self.vm.devices().disks().iter().zip(wraps.disks.drain(..)) {
            if let Some(slot) = slot {
                disk.exchange(|wrapper| slot.take().unwrap_or(wrapper));
            }
        }
    }
}

/// Keeps the guest standing still for a share of the time as long as `run_percent` is below 100.
fn throttle_thread(vm: Weak<Vm>, throttle: Arc<Throttle>) {
    loop {
        let percent = {
            let mut state = lock(&throttle.0);
            state.running = state.percent < 100;
            u32::from(state.percent)
        };
        if percent >= 100 {
            return;
        }
        let Some(vm) = vm.upgrade() else { return };
        let run = THROTTLE_PERIOD * percent / 100;
        vm.pause_vcpus(Holder::Throttle);
        std::thread::sleep(THROTTLE_PERIOD - run);
        vm.resume_vcpus(Holder::Throttle);
        drop(vm);
        std::thread::sleep(run);
    }
}

/// The guest's share of the time, and whether the thread that sees to it runs.
struct Throttle(Mutex<ThrottleState>);

struct ThrottleState {
    percent: u8,
    running: bool,
}

fn frame_of(output: &Output) -> Option<&[u8]> {
    match output {
        Output::Frame { data, .. } => Some(data),
        Output::Console { .. } => None,
    }
}

impl Protected for ProtectedVm {
    fn identity(&self) -> Result<Identity, MachineError> {
        let disks = self.vm.devices().disks().iter().zip(&self.disks);
        let shared = disks.filter(|(_, side)| side.shared).map(|(disk, _)| disk.id.clone());
        own_identity(&self.vm, &shared.collect::<Vec<_>>())
    }

    fn start_tracking(&self) -> Result<(), MachineError> {
        self.vm.ram().clear_own_writes();
        self.vm.kvm().start_dirty_log().map_err(machine_error)?;
        let mut wraps = lock(&self.wraps);
        for (disk, side) in self.vm.devices().disks().iter().zip(&self.disks) {
            side.changed.take(side.size, &mut Vec::new());
            let mut slot = None;
            disk.pause();
            disk.exchange(|inner| {
                let (wrapper, s) = TrackedBlock::wrap(inner, side.changed.clone());
                slot = Some(s);
                Box::new(wrapper)
            });
            disk.resume();
            wraps.disks.push(slot);
        }
        Ok(())
    }

    fn stop_tracking(&self) {
        let mut wraps = lock(&self.wraps);
        for disk in self.vm.devices().disks() {
            disk.pause();
        }
        self.unwrap_disks(&mut wraps);
        for disk in self.vm.devices().disks() {
            disk.resume();
        }
        if let Err(e) = self.vm.kvm().stop_dirty_log() {
            log::warn!("ft: dirty page log stays on: {e}");
        }
    }

    fn harvest_dirty(&self, hot: bool, out: &mut Vec<PageRun>) -> Result<(), MachineError> {
        let mut ranges = Vec::new();
        self.vm
            .ram()
            .harvest_dirty(self.vm.kvm().as_ref(), hot, &mut ranges)
            .map_err(machine_error)?;
        out.extend(ranges.iter().map(|r| PageRun {
            gpa: r.gpa,
            count: r.count,
        }));
        Ok(())
    }

    fn hot_pages(&self, most: usize, cold: &[u64]) -> Result<u64, MachineError> {
        let hot = self.vm.kvm().keep_hot(most, cold).map_err(machine_error)?;
        Ok(hot as u64)
    }

    fn read_memory(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MachineError> {
        self.vm.ram().read(gpa, buf).map_err(machine_error)
    }

    fn read_disk(&self, disk: u16, offset: u64, buf: &mut [u8]) -> Result<(), MachineError> {
        self.image(disk)?.read_at(offset, buf).map_err(machine_error)
    }

    fn harvest_dirty_blocks(&self, disk: u16, out: &mut Vec<(u64, u64)>) -> Result<(), MachineError> {
        let side = self.disk(disk)?;
        side.changed.take(side.size, out);
        Ok(())
    }

    fn pause(&self, hurry: bool) -> Result<bool, MachineError> {
        Ok(self.vm.pause_for_checkpoint(hurry))
    }

    fn save_state(&self) -> Result<SavedState, MachineError> {
        let state = self.vm.state().map_err(machine_error)?;
        Ok(Box::new(move || postcard::to_stdvec(&state).map_err(machine_error)))
    }

    fn resume(&self) -> Result<(), MachineError> {
        self.vm.resume(Holder::Ft).map_err(machine_error)
    }

    fn attach(&self, interposer: Arc<Interposer>, session: &SessionId) -> Result<(), MachineError> {
        let mut wraps = lock(&self.wraps);
        let devices = self.vm.devices();
        self.unwrap_disks(&mut wraps);
        self.histories.wrap(&self.vm);
        self.histories.begin(session);
        for (i, disk) in devices.disks().iter().enumerate() {
            if self.disks.get(i).is_some_and(|d| d.readonly) {
                wraps.disks.push(None);
                continue;
            }
            let shared = self.disks.get(i).is_some_and(|d| d.shared);
            disk.exchange(|inner| {
                let (wrapper, slot): (Box<dyn BlockBackend>, _) = if shared {
                    let (wrapper, slot) = SharedBlock::wrap(inner, interposer.clone(), i as u16);
                    (Box::new(wrapper), slot)
                } else {
                    let (wrapper, slot) = LoggedBlock::wrap(inner, interposer.clone(), i as u16);
                    (Box::new(wrapper), slot)
                };
                wraps.disks.push(Some(slot));
                wrapper
            });
        }
        for (i, net) in devices.nets().iter().enumerate() {
            net.exchange(|inner| {
                let (wrapper, slot) = HeldNet::wrap(inner, interposer.clone(), i as u16);
                wraps.nets.push(slot);
                Box::new(wrapper)
            });
        }
        for (i, console) in devices.consoles().iter().enumerate() {
            let mut slot = None;
            console.exchange(|inner| {
                let (wrapper, s) = HeldConsole::wrap(inner, interposer.clone(), i as u16);
                slot = Some(s);
                Box::new(wrapper)
            });
            wraps.consoles.push(slot);
        }
        Ok(())
    }

    fn detach(&self) -> Result<(), MachineError> {
        let mut wraps = lock(&self.wraps);
        let devices = self.vm.devices();
        self.unwrap_disks(&mut wraps);
        self.histories.go_alone();
        for (net, slot) in devices.nets().iter().zip(wraps.nets.drain(..)) {
            net.exchange(|wrapper| slot.take().unwrap_or(wrapper));
        }
        for (console, slot) in devices.consoles().iter().zip(wraps.consoles.drain(..)) {
            if let Some(slot) = slot {
                console.exchange(|wrapper| slot.take().unwrap_or(wrapper));
            }
        }
        Ok(())
    }

    fn divergence(&self, disk: u16) -> Option<Divergence> {
        self.histories.disk(disk)?.divergence()
    }

    fn refute(&self, disk: u16) {
        if let Some(history) = self.histories.disk(disk) {
            history.refute();
        }
    }

    fn confirm(&self, applied: u64, running: u64) {
        self.histories
            .all()
            .for_each(|history| history.confirm(applied, running));
    }

    fn release(&self, outputs: Vec<Output>) {
        let wraps = lock(&self.wraps);
        // Each device's outputs in their order; runs of frames of one device go out together.
        let mut rest = &outputs[..];
        while let Some(first) = rest.first() {
            let run = match first {
                Output::Frame { nic, .. } => {
                    let same = |o: &&Output| matches!(o, Output::Frame { nic: other, .. } if other == nic);
                    let count = rest.iter().take_while(same).count();
                    if let Some(slot) = wraps.nets.get(usize::from(*nic)) {
                        slot.transmit_now(rest[..count].iter().filter_map(frame_of));
                    }
                    count
                }
                Output::Console { console, data } => {
                    if let Some(Some(slot)) = wraps.consoles.get(usize::from(*console)) {
                        slot.write_now(data);
                    }
                    1
                }
            };
            rest = &rest[run..];
        }
    }

    fn write_shared(&self, disk: u16, change: &DiskChange) -> Result<(), MachineError> {
        disks::carry_out(self.image(disk)?.as_ref(), change)
    }

    fn yield_disks(&self) {
        disks::give_back(&self.vm);
    }

    fn claim_disks(&self) -> Result<Option<String>, MachineError> {
        disks::claim(&self.vm)
    }

    fn throttle(&self, run_percent: u8) {
        let mut state = lock(&self.throttle.0);
        state.percent = run_percent.clamp(1, 100);
        if state.percent == 100 || state.running {
            return;
        }
        let (vm, throttle) = (Arc::downgrade(&self.vm), self.throttle.clone());
        let started = sandbox::spawn(ThreadKind::FtThrottle, "ft-throttle", move || {
            throttle_thread(vm, throttle)
        });
        match started {
            Ok(_) => state.running = true,
            Err(e) => log::error!("ft: the guest cannot be slowed down: {e}"),
        }
    }

    fn stop(&self, reason: &str) {
        self.vm.stop_for_good(reason);
    }

    fn close_disks(&self) {
        self.histories.all().for_each(|history| history.close());
    }
}
