//! What KVM costs at a checkpoint: harvesting dirty pages, and reading a vCPU's state. Needs /dev/kvm.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use hypervisor::kvm::KvmHypervisor;
use hypervisor::{BootRegisters, DirtyWord, Hypervisor, MemorySlot, PAGE_SIZE, Vcpu, VcpuExit, Vm, VmOptions};

const RAM: u64 = 512 << 20;
const CODE: u64 = 0x1000;
const FIRST_PAGE: u64 = 0x10_0000;

/// Entries of a vCPU's dirty ring: more than any of these benches dirties, so that all is left to the harvest.
const RING: u32 = 16 << 10;

/// Counts up in the first word of `pages` pages, spread over RAM from 1 MiB on, then writes to port 0x10; for ever.
fn program(pages: u32) -> Vec<u8> {
    let stride = (RAM - FIRST_PAGE) / PAGE_SIZE / u64::from(pages) * PAGE_SIZE;
    let mut code = vec![0xbf]; // mov edi, 1 MiB
    code.extend((FIRST_PAGE as u32).to_le_bytes());
    code.push(0xb9); // mov ecx, pages
    code.extend(pages.to_le_bytes());
    code.extend([0xff, 0x07]); // inc dword [edi]
    code.extend([0x81, 0xc7]); // add edi, stride
    code.extend((stride as u32).to_le_bytes());
    code.extend([0xe2, 0xf6]); // loop to the inc
    code.extend([0xe6, 0x10]); // out 0x10, al
    code.extend([0xeb, 0xe8]); // jmp to the start
    code
}

/// A VM with one vCPU. Its RAM stays mapped until the process ends.
struct Machine {
    vm: Arc<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
}

impl Machine {
    fn new(kvm: &KvmHypervisor, options: VmOptions, program: &[u8]) -> Self {
        let vm = kvm.create_vm(options).unwrap();
        // SAFETY: a fresh anonymous mapping.
        let ram = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                RAM as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        assert_ne!(ram, libc::MAP_FAILED);
        // SAFETY: CODE and what follows it lie within the mapping, which nobody else uses yet.
        unsafe { std::ptr::copy_nonoverlapping(program.as_ptr(), ram.cast::<u8>().add(CODE as usize), program.len()) };
        vm.add_memory(MemorySlot {
            slot: 0,
            guest_addr: 0,
            size: RAM,
            host_addr: ram as u64,
            readonly: false,
        })
        .unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
        vcpu.set_boot_registers(&BootRegisters::Pvh {
            entry: CODE,
            start_info: 0,
        })
        .unwrap();
        Self { vm, vcpu }
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

    /// The guest dirties its pages; then how long the harvest of them takes.
    fn harvest(&mut self, words: &mut Vec<DirtyWord>, least: u32) -> Duration {
        self.run_to_port();
        words.clear();
        let begin = Instant::now();
        self.vm.harvest_dirty(true, words).unwrap();
        let took = begin.elapsed();
        let found: u32 = words.iter().map(|word| word.bits.count_ones()).sum();
        assert!(found >= least, "{found} of {least} pages are in the log");
        took
    }
}

fn harvests(c: &mut Criterion, kvm: &KvmHypervisor) {
    let mut group = c.benchmark_group("harvest dirty pages of 512 MiB");
    group.sample_size(20);
    for (log, dirty_ring_entries) in [("ring", RING), ("bitmap", 0)] {
        if dirty_ring_entries > 0 && !kvm.capabilities().dirty_ring {
            eprintln!("this host's KVM has no dirty ring: only the bitmap is measured");
            continue;
        }
        for pages in [50, 1_000, 10_000] {
            let mut machine = Machine::new(kvm, VmOptions { dirty_ring_entries }, &program(pages));
            machine.run_to_port();
            machine.vm.start_dirty_log().unwrap();
            let mut words = Vec::new();
            group.throughput(Throughput::Elements(pages.into()));
            group.bench_function(BenchmarkId::new(log, pages), |b| {
                b.iter_custom(|times| (0..times).map(|_| machine.harvest(&mut words, pages)).sum())
            });
        }
    }
    group.finish();
}

fn states(c: &mut Criterion, kvm: &KvmHypervisor) {
    let mut machine = Machine::new(kvm, VmOptions::default(), &program(1));
    machine.run_to_port();
    // Completes the port instruction.
    let kicker = machine.vcpu.kicker();
    kicker.kick();
    assert!(matches!(machine.vcpu.run().unwrap(), VcpuExit::Interrupted));
    kicker.clear();
    let mut group = c.benchmark_group("state of a vCPU");
    group.throughput(Throughput::Elements(1));
    group.bench_function("by its own thread, ahead", |b| {
        b.iter(|| machine.vcpu.presave().unwrap())
    });
    group.bench_function("by another", |b| b.iter(|| machine.vcpu.state(false).unwrap()));
    group.finish();
}

fn main() -> Result<(), String> {
    let kvm = KvmHypervisor::new().map_err(|e| format!("this bench needs /dev/kvm: {e}"))?;
    let mut criterion = Criterion::default().configure_from_args();
    harvests(&mut criterion, &kvm);
    states(&mut criterion, &kvm);
    criterion.final_summary();
    Ok(())
}
