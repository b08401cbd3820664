//! Resets and what guests ask of their machine, beside checkpoints (needs /dev/kvm).

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::Events;
use crossbeam_channel::Receiver;
use vmm::state::{PowerRequest, VmState};
use vmm::vm::{Error, GuestRequest, Holder, Vm, VmContext};

const ENTRY: u32 = 0x10_0000;
/// Where nothing of the kernel lies.
const MARKED: u64 = 0x180_0000;

/// cli; hlt.
const IDLE: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];
/// mov dx, 0x600; mov al, 0x34; out dx, al; and again, for ever: sleep type 5, sleep enable.
const POWER_OFF: &[u8] = &[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xeb, 0xf7];
/// lidt [an empty table]; ud2: a triple fault.
const TRIPLE_FAULT: &[u8] = &[0x0f, 0x01, 0x1d, 0x20, 0x00, 0x10, 0x00, 0x0f, 0x0b];

/// A PVH kernel of `code` at [`ENTRY`].
fn kernel(dir: &Path, code: &[u8]) -> PathBuf {
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let u64s = |values: &[u64]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let (code_at, note_at, entry) = (0x1000u64, 0x1100u64, u64::from(ENTRY));
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend(u64s(&[entry, 64, 0]));
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    elf.extend(u64s(&[code_at, entry, entry, 0x40, 0x40, 0x1000]));
    elf.extend([4, 0, 0, 0, 4, 0, 0, 0]);
    elf.extend(u64s(&[note_at, 0, 0, 20, 20, 4]));
    elf.resize(code_at as usize, 0);
    elf.extend(code);
    elf.resize(note_at as usize, 0);
    elf.extend([4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    elf.extend(b"Xen\0");
    elf.extend(ENTRY.to_le_bytes());
    let path = dir.join("kernel");
    std::fs::write(&path, elf).unwrap();
    path
}

struct Bed {
    _dir: tempfile::TempDir,
    config: api::VmConfig,
    context: VmContext,
    requests: Receiver<GuestRequest>,
}

impl Bed {
    fn new(code: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = serde_json::json!({
            "payload": {"kernel": kernel(dir.path(), code)}, "memory": {"size": 32 << 20},
            "console": {"mode": "Off"}, "serial": {"mode": "Null"},
        });
        let (sender, requests) = crossbeam_channel::unbounded();
        Self {
            _dir: dir,
            config: serde_json::from_value(config).unwrap(),
            context: VmContext {
                hypervisor: Arc::new(hypervisor::kvm::KvmHypervisor::new().unwrap()),
                events: Events::none(),
                requests: sender,
                landlock: std::sync::Arc::default(),
            },
            requests,
        }
    }

    fn vm(&self) -> Arc<Vm> {
        Vm::new(self.config.clone(), None, &self.context).unwrap()
    }

    fn asked(&self) -> Option<GuestRequest> {
        self.requests.recv_timeout(Duration::from_secs(10)).ok()
    }
}

fn marked(vm: &Vm) -> bool {
    let mut byte = [0];
    vm.ram().read(MARKED, &mut byte).unwrap();
    byte == [7]
}

/// The shadow of `vm` as FT makes it: RAM and state at a checkpoint.
fn take_over(bed: &Bed, vm: &Vm) -> Arc<Vm> {
    vm.pause(Holder::Ft).unwrap();
    take_over_as(bed, vm, &vm.state().unwrap())
}

/// The same of a paused VM, with this state.
fn take_over_as(bed: &Bed, vm: &Vm, state: &VmState) -> Arc<Vm> {
    let shadow = bed.vm();
    for (gpa, size) in vm.ram().regions() {
        let mut bytes = vec![0; size as usize];
        vm.ram().read(gpa, &mut bytes).unwrap();
        shadow.ram().write(gpa, &bytes).unwrap();
    }
    shadow.set_state(state, 0).unwrap();
    shadow
}

#[test]
fn kvm_a_checkpoint_shows_no_half_of_a_reset() {
    let bed = Bed::new(IDLE);
    let vm = bed.vm();
    vm.boot().unwrap();
    for _ in 0..3 {
        vm.pause(Holder::Ft).unwrap();
        vm.ram().write(MARKED, &[7]).unwrap();
        let resetting = {
            let vm = vm.clone();
            std::thread::spawn(move || vm.reset())
        };
        std::thread::sleep(Duration::from_millis(200));
        assert!(marked(&vm), "reset in the middle of a checkpoint");
        vm.resume(Holder::Ft).unwrap();
        resetting.join().unwrap().unwrap();
        assert!(!marked(&vm));
    }
    vm.shutdown();
}

#[test]
fn kvm_a_stopped_vm_is_not_reset_and_not_asked_after_for_long() {
    let bed = Bed::new(IDLE);
    let vm = bed.vm();
    vm.boot().unwrap();
    vm.pause(Holder::Ft).unwrap();
    vm.ram().write(MARKED, &[7]).unwrap();
    let resetting = {
        let vm = vm.clone();
        std::thread::spawn(move || vm.reset())
    };
    std::thread::sleep(Duration::from_millis(50));
    vm.stop_for_good("lost");
    assert!(matches!(resetting.join().unwrap(), Err(Error::Stopped(_))));
    assert!(matches!(vm.reset(), Err(Error::Stopped(_))));
    assert!(marked(&vm));
    assert_eq!(
        (vm.stop_reason().as_deref(), vm.is_user_paused()),
        (Some("lost"), false)
    );
    vm.shutdown();
}

#[test]
fn kvm_a_power_off_that_the_dead_host_did_not_do_is_done_by_the_next() {
    let bed = Bed::new(POWER_OFF);
    let vm = bed.vm();
    vm.boot().unwrap();
    assert_eq!(bed.asked(), Some(GuestRequest::Shutdown));
    let shadow = take_over(&bed, &vm);
    assert!(bed.requests.is_empty(), "asked again, or before it runs");
    vm.shutdown();
    shadow.resume(Holder::User).unwrap();
    assert_eq!(bed.asked(), Some(GuestRequest::Shutdown));
    assert_eq!(shadow.asked(), Some(PowerRequest::Shutdown));
    shadow.shutdown();
}

#[test]
fn kvm_a_triple_fault_is_one_reset_whatever_comes_between_and_whoever_does_it() {
    let bed = Bed::new(TRIPLE_FAULT);
    let vm = bed.vm();
    vm.boot().unwrap();
    assert_eq!(bed.asked(), Some(GuestRequest::Reset));
    vm.ram().write(MARKED, &[7]).unwrap();
    for _ in 0..5 {
        vm.pause(Holder::Ft).unwrap();
        vm.resume(Holder::Ft).unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(bed.requests.is_empty());
    let shadow = take_over(&bed, &vm);
    vm.shutdown();
    assert!(!marked(&shadow));
    assert_eq!(shadow.asked(), None);
    shadow.resume(Holder::User).unwrap();
    assert_eq!(bed.asked(), Some(GuestRequest::Reset));
    shadow.reset().unwrap();
    assert_eq!(bed.asked(), Some(GuestRequest::Reset));
    shadow.shutdown();
}

#[test]
fn kvm_a_vm_from_a_host_with_another_cpuid_keeps_it_over_a_reset() {
    let bed = Bed::new(IDLE);
    let vm = bed.vm();
    vm.boot().unwrap();
    vm.pause(Holder::Ft).unwrap();
    let mut state = vm.state().unwrap();
    // The processor's name.
    let leaf = state.vcpus[0]
        .cpuid
        .iter_mut()
        .find(|leaf| leaf.function == 0x8000_0002);
    leaf.unwrap().eax ^= 1;
    let shadow = take_over_as(&bed, &vm, &state);
    vm.shutdown();
    shadow.resume(Holder::User).unwrap();
    for _ in 0..2 {
        shadow.reset().unwrap();
        shadow.pause(Holder::Ft).unwrap();
        assert_eq!(shadow.state().unwrap().vcpus[0].cpuid, state.vcpus[0].cpuid);
        shadow.resume(Holder::Ft).unwrap();
    }
    shadow.shutdown();
}

#[test]
fn kvm_a_paused_vm_says_so_in_its_state() {
    let bed = Bed::new(IDLE);
    let vm = bed.vm();
    vm.boot().unwrap();
    vm.pause(Holder::Ft).unwrap();
    assert!(!vm.state().unwrap().paused);
    vm.pause(Holder::User).unwrap();
    assert!(vm.state().unwrap().paused);
    vm.resume(Holder::User).unwrap();
    vm.resume(Holder::Ft).unwrap();
    vm.shutdown();
}
