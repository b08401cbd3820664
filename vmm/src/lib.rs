//! One VM's life: configuration -> memory, vCPUs, devices; pause, snapshot, fault tolerance.
//!
//! * [`service`]: [`Vmm`], what the REST API talks to; owns the VM and FT;
//! * [`vm`]: one VM: build, boot, pause, reset, shut down, saved state;
//! * [`vcpus`]: the vCPU threads; [`memory`]: guest RAM and its dirty pages; [`interrupts`]: GSIs, irqfds, MSI routes;
//! * [`devices`]: all devices of a machine on their buses; [`disks`]: images and their formats; [`console`]: where serial
//!   and console output goes;
//! * [`boot`]: kernel, ACPI tables, command line; [`state`]: the saved state; [`snapshot`]: its files;
//! * [`landlock`]: the files that the process may touch for a VM;
//! * [`plugin`]: the small trait by which FT is reached; `ft` (feature `ft`): FT on this VMM.

pub mod boot;
pub mod console;
pub mod devices;
pub mod disks;
#[cfg(feature = "ft")]
pub mod ft;
pub mod interrupts;
pub mod landlock;
pub mod memory;
mod passage;
pub mod plugin;
pub mod service;
pub mod snapshot;
pub mod state;
pub mod vcpus;
pub mod vm;

pub use service::{Vmm, VmmOptions};
