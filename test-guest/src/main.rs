//! A bare-metal guest in ring 3 for testing virtual machine monitors.
//!
//! `boot.s` (with [`cpu`]) is all that runs in ring 0: the PVH entry, the start of a second processor, interrupt stubs
//! and a gate for four privileged instructions. Everything else runs in ring 3, one to one on physical memory:
//!
//! - [`guest`]: finds devices, then the loop that serves
//! - [`memory`], [`apic`], [`time`], [`serial`], [`power`], [`smp`], [`fault`]: the machine
//! - [`pci`], [`virtio`]: devices
//! - [`services`], [`store`], [`work`]: what clients see
//!
//! What needs no machine is in the crate `guest-core`, with its tests.
#![no_std]
#![no_main]

extern crate alloc;

mod apic;
mod cpu;
mod fault;
mod guest;
mod libc;
mod memory;
mod pci;
mod power;
mod serial;
mod services;
mod smp;
mod store;
mod time;
mod virtio;
mod work;

/// Ring 3 of the first processor.
#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    cpu::init();
    serial::init();
    guest::run()
}
