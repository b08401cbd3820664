//! The KVM backend on this host's /dev/kvm, with a few instructions as guest. Needs /dev/kvm.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hypervisor::kvm::KvmHypervisor;
use hypervisor::{BootRegisters, Hypervisor, MemorySlot, PAGE_SIZE, Vcpu, VcpuExit, Vm, VmOptions};

const RAM: u64 = 8 << 20;
const CODE: u64 = 0x1000;
const FIRST_PAGE: u64 = 0x10_0000;
const PAGES: u8 = 16;

/// Writes one byte to each of 16 pages from 1 MiB on, then writes to port 0x10 for ever.
const PROGRAM: [u8; 25] = [
    0xbf, 0x00, 0x00, 0x10, 0x00, // mov edi, 0x100000
    0xb9, PAGES, 0x00, 0x00, 0x00, // mov ecx, 16
    0xc6, 0x07, 0xaa, // mov byte [edi], 0xaa
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 0x1000
    0xe2, 0xf5, // loop
    0xe6, 0x10, // out 0x10, al
    0xeb, 0xfc, // jmp to the out
];

/// Counts up in the first word of each page from 1 MiB to the end of RAM, for ever, with a pause after each. 32-bit and
/// 64-bit code.
const COUNTER: [u8; 30] = [
    0xbf, 0x00, 0x00, 0x10, 0x00, // mov edi, 0x100000
    0xff, 0x07, // inc dword [edi]
    0xb9, 0x30, 0x00, 0x00, 0x00, // mov ecx, 48
    0xe2, 0xfe, // loop to itself
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 0x1000
    0x81, 0xff, 0x00, 0x00, 0x80, 0x00, // cmp edi, 0x800000
    0x75, 0xe9, // jne to the inc
    0xeb, 0xe2, // jmp to the start
];

struct Machine {
    vm: Arc<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
    ram: *mut u8,
}

impl Machine {
    fn new(options: VmOptions) -> Self {
        Self::with_program(options, &PROGRAM)
    }

    fn with_program(options: VmOptions, program: &[u8]) -> Self {
        let hypervisor = KvmHypervisor::new().expect("this test needs /dev/kvm");
        let vm = hypervisor.create_vm(options).unwrap();
        // SAFETY: a fresh anonymous mapping.
        let ram = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                RAM as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(ram, libc::MAP_FAILED);
        let ram: *mut u8 = ram.cast();
        // SAFETY: CODE lies within the mapping, which nobody else uses yet.
        unsafe { std::ptr::copy_nonoverlapping(program.as_ptr(), ram.add(CODE as usize), program.len()) };
        let slot = MemorySlot {
            slot: 0,
            guest_addr: 0,
            size: RAM,
            host_addr: ram as u64,
            readonly: false,
        };
        vm.add_memory(slot).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid(&hypervisor.supported_cpuid().unwrap()).unwrap();
        vcpu.set_boot_registers(&BootRegisters::Pvh {
            entry: CODE,
            start_info: 0,
        })
        .unwrap();
        Self { vm, vcpu, ram }
    }

    /// Makes it go on at the program's start in ring 3, with 2 MiB pages: every KVM runs such code natively, so it writes
    /// without KVM's knowledge what is mapped for writing.
    fn enter_ring_3(&mut self) {
        let entries = (0..4).map(|n| (0x4000 + n * 8, n << 21 | 0x87));
        for (at, entry) in entries.chain([(0x2000, 0x3007), (0x3000, 0x4007)]) {
            // SAFETY: in the mapping, apart from the program, aligned; the vCPU stands still.
            unsafe { self.ram.add(at).cast::<u64>().write(entry as u64) };
        }
        let mut state = self.vcpu.state(false).unwrap();
        (state.regs.rip, state.regs.rflags) = (CODE, 2);
        let sregs = &mut state.sregs;
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (1 << 31 | 1 << 16 | 1, 0x2000, 1 << 5, 1 << 8 | 1 << 10);
        (sregs.cs.selector, sregs.cs.dpl, sregs.cs.l, sregs.cs.db) = (0x33, 3, 1, 0);
        for data in [
            &mut sregs.ss,
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
        ] {
            (data.selector, data.dpl) = (0x2b, 3);
        }
        self.vcpu.set_state(&state, 0, hypervisor::kvm::host_tsc()).unwrap();
    }

    fn run_to_port(&mut self) {
        loop {
            match self.vcpu.run().unwrap() {
                VcpuExit::PioWrite(0x10, _) => return,
                VcpuExit::Again | VcpuExit::Interrupted => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`; the vCPU does not run any more.
        unsafe { libc::munmap(self.ram.cast(), RAM as usize) };
    }
}

/// Pages of the only slot written since the last call.
fn harvest(vm: &dyn Vm) -> Vec<u64> {
    harvest_some(vm, true)
}

fn harvest_some(vm: &dyn Vm, hot: bool) -> Vec<u64> {
    let mut log = Vec::new();
    vm.harvest_dirty(hot, &mut log).unwrap();
    log.iter()
        .flat_map(|word| {
            let bit = |n: &u64| word.bits >> n & 1 != 0;
            (0..64).filter(bit).map(|n| word.index as u64 * 64 + n)
        })
        .collect()
}

fn dirty_log(options: VmOptions) {
    let mut machine = Machine::new(options);
    machine.vm.start_dirty_log().unwrap();
    machine.run_to_port();
    let expected: Vec<u64> = (0..u64::from(PAGES)).map(|n| FIRST_PAGE / PAGE_SIZE + n).collect();
    let found = harvest(machine.vm.as_ref());
    for page in &expected {
        assert!(
            found.contains(page),
            "page {page:#x} was written but is not in {found:x?}"
        );
    }
    machine.run_to_port();
    assert_eq!(
        harvest(machine.vm.as_ref()),
        Vec::<u64>::new(),
        "harvesting clears the log"
    );
    // Written again after harvest: logged again.
    machine
        .vcpu
        .set_boot_registers(&BootRegisters::Pvh {
            entry: CODE,
            start_info: 0,
        })
        .unwrap();
    machine.run_to_port();
    let again = harvest(machine.vm.as_ref());
    assert!(expected.iter().all(|p| again.contains(p)), "{again:x?}");
    machine.vm.stop_dirty_log().unwrap();
    assert!(harvest(machine.vm.as_ref()).is_empty());
}

#[test]
fn dirty_bitmap_sees_every_written_page_once_per_harvest() {
    dirty_log(VmOptions::default());
}

#[test]
fn dirty_ring_sees_every_written_page_once_per_harvest() {
    let hypervisor = KvmHypervisor::new().expect("this test needs /dev/kvm");
    let options = VmOptions {
        dirty_ring_entries: 1024,
    };
    if hypervisor.capabilities().dirty_ring {
        dirty_log(options);
    } else {
        assert!(
            hypervisor.create_vm(options).is_err(),
            "a ring on a host without it must be refused"
        );
    }
}

/// A kick that comes while a full ring is being collected makes KVM drop pages from its log (see `kvm::dirty`).
#[test]
fn r2_a_vcpu_that_is_kicked_all_the_time_loses_no_page_of_a_full_ring() {
    every_written_page_is_in_the_log(|_, _| Vec::new());
}

/// Hot pages are left writable; when they are cooled, their writes are logged as before.
#[test]
fn r2_no_page_is_lost_while_pages_become_hot_and_cold() {
    every_written_page_is_in_the_log(|vm, round| {
        let page = |n: u64| (FIRST_PAGE / PAGE_SIZE + n * 7 % 1700) * PAGE_SIZE;
        let cold: Vec<u64> = (0..40 * (round % 3)).map(|n| page(n + round)).collect();
        let most = if round % 10 == 9 { 0 } else { 500 };
        // Pages may be taken ahead, without those that are hot.
        let ahead = if round % 2 == 0 {
            harvest_some(vm, false)
        } else {
            Vec::new()
        };
        let hot = vm.keep_hot(most, &cold).unwrap();
        assert!(hot <= most, "{hot} pages are hot");
        ahead
    });
}

/// The guest counts in all pages; `between` is called before each harvest, and gives pages that it took from the log.
fn every_written_page_is_in_the_log(between: impl Fn(&dyn Vm, u64) -> Vec<u64>) {
    let hypervisor = KvmHypervisor::new().expect("this test needs /dev/kvm");
    if !hypervisor.capabilities().dirty_ring {
        return;
    }
    let options = VmOptions {
        dirty_ring_entries: 1024,
    };
    let mut machine = Machine::with_program(options, &COUNTER);
    machine.enter_ring_3();
    // Time in which a ring gets full while logging is started: it is started slot by slot.
    for n in 1..200 {
        let slot = MemorySlot {
            slot: n,
            guest_addr: RAM + u64::from(n) * PAGE_SIZE,
            size: PAGE_SIZE,
            host_addr: machine.ram as u64,
            readonly: false,
        };
        machine.vm.add_memory(slot).unwrap();
    }
    let kicker = machine.vcpu.kicker();
    let done = Arc::new(AtomicBool::new(false));
    let kicks = {
        let (kicker, done) = (kicker.clone(), done.clone());
        std::thread::spawn(move || {
            while !done.load(Ordering::SeqCst) {
                kicker.kick();
                std::thread::sleep(Duration::from_micros(10));
            }
        })
    };
    let word = |page: u64| {
        // SAFETY: within the mapping; the vCPU, driven by this thread, stands still.
        unsafe {
            machine
                .ram
                .add((page * PAGE_SIZE) as usize)
                .cast::<u32>()
                .read_volatile()
        }
    };
    let counted = || {
        (FIRST_PAGE / PAGE_SIZE..RAM / PAGE_SIZE)
            .map(word)
            .collect::<Vec<u32>>()
    };
    machine.vm.start_dirty_log().unwrap();
    let mut known = counted();
    for round in 0..40 {
        if round % 4 == 3 {
            // The guest runs while logging ends and starts anew, and fills its ring.
            machine.vm.stop_dirty_log().unwrap();
            let over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let (vcpu, kicker, over) = (&mut machine.vcpu, &kicker, &over);
                scope.spawn(move || {
                    while !over.load(Ordering::SeqCst) {
                        match vcpu.run().unwrap() {
                            VcpuExit::Interrupted => kicker.clear(),
                            VcpuExit::Again => (),
                            other => panic!("{other:?}"),
                        }
                    }
                });
                machine.vm.start_dirty_log().unwrap();
                known = counted();
                over.store(true, Ordering::SeqCst);
            });
        }
        let mut full = 0;
        while full < 3 {
            match machine.vcpu.run().unwrap() {
                VcpuExit::Interrupted => kicker.clear(),
                VcpuExit::Again => full += 1,
                other => panic!("{other:?}"),
            }
        }
        let mut logged = between(machine.vm.as_ref(), round);
        logged.extend(harvest(machine.vm.as_ref()));
        let now = counted();
        for page in logged {
            if let Some(at) = page.checked_sub(FIRST_PAGE / PAGE_SIZE) {
                known[at as usize] = now[at as usize];
            }
        }
        let bad: Vec<_> = known
            .iter()
            .zip(&now)
            .enumerate()
            .filter(|(_, (k, n))| k != n)
            .map(|(i, (k, n))| (i, *k, *n))
            .collect();
        if known != now {
            eprintln!("{} {bad:?} first {:?}", bad.len(), &now[..3]);
        }
        assert!(known == now, "a page was written and is not in the log, round {round}");
    }
    done.store(true, Ordering::SeqCst);
    kicks.join().unwrap();
}

#[test]
fn state_moves_to_another_vcpu() {
    let mut first = Machine::new(VmOptions::default());
    first.run_to_port();
    // Complete the port instruction before the state is read.
    let kicker = first.vcpu.kicker();
    kicker.kick();
    assert!(matches!(first.vcpu.run().unwrap(), VcpuExit::Interrupted));
    kicker.clear();
    let state = first.vcpu.state(false).unwrap();
    assert_eq!(
        (state.regs.rcx, state.regs.rdi),
        (0, FIRST_PAGE + u64::from(PAGES) * PAGE_SIZE)
    );
    let json = serde_json::to_string(&state).unwrap();
    let state = serde_json::from_str(&json).unwrap();

    let mut second = Machine::new(VmOptions::default());
    let base = hypervisor::kvm::host_tsc();
    second.vcpu.set_state(&state, 1_000_000, base).unwrap();
    second.run_to_port();
    let kicker = second.vcpu.kicker();
    kicker.kick();
    assert!(matches!(second.vcpu.run().unwrap(), VcpuExit::Interrupted));
    let moved = second.vcpu.state(false).unwrap();
    assert_eq!((moved.regs.rcx, moved.regs.rdi), (state.regs.rcx, state.regs.rdi));
    assert!(moved.tsc >= state.tsc, "time does not go back");
    let mut newer = state.clone();
    newer.version += 1;
    assert!(second.vcpu.set_state(&newer, 0, base).is_err());
}

#[test]
fn a_kick_from_another_thread_ends_a_run() {
    let mut machine = Machine::new(VmOptions::default());
    let kicker = machine.vcpu.kicker();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        kicker.kick();
    });
    loop {
        match machine.vcpu.run().unwrap() {
            VcpuExit::Interrupted => break,
            VcpuExit::PioWrite(..) | VcpuExit::Again => {}
            other => panic!("{other:?}"),
        }
    }
    thread.join().unwrap();
}
