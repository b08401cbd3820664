//! Loads the payload of a VM: ACPI tables, kernel, initramfs, command line.

use std::fs::File;
use std::path::Path;

use api::VmConfig;
use hypervisor::BootRegisters;
use thiserror::Error;

use crate::memory::GuestRam;

/// Why a VM cannot boot.
#[derive(Debug, Error)]
pub enum Error {
    /// The configuration names no kernel.
    #[error("the VM has no kernel: set payload.kernel (--kernel PATH)")]
    NoKernel,
    /// A payload file cannot be opened.
    #[error("cannot open the {what} {path}: {source}")]
    Open {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// Its path.
        path: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The kernel, initramfs or command line does not fit or is not valid.
    #[error(transparent)]
    Kernel(#[from] arch::kernel::Error),
    /// The ACPI tables do not fit.
    #[error(transparent)]
    Acpi(#[from] arch::acpi::Error),
}

fn open(what: &'static str, path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|source| Error::Open {
        what,
        path: path.display().to_string(),
        source,
    })
}

/// Puts everything into guest RAM and gives the boot vCPU's registers. The VM must not run.
pub fn load(config: &VmConfig, ram: &GuestRam) -> Result<BootRegisters, Error> {
    let payload = config.payload.as_ref().ok_or(Error::NoKernel)?;
    let mut kernel = open("kernel", payload.kernel.as_deref().ok_or(Error::NoKernel)?)?;
    let mut initramfs = payload
        .initramfs
        .as_deref()
        .map(|path| open("initramfs", path))
        .transpose()?;
    let memory = ram.memory().as_ref();
    let rsdp = arch::acpi::install(memory, ram.size(), config.cpus.boot_vcpus)?;
    let cmdline = payload.cmdline.as_deref().unwrap_or("");
    Ok(arch::kernel::load(
        memory,
        &mut kernel,
        initramfs.as_mut(),
        cmdline,
        rsdp,
    )?)
}
