//! The x86-64 machine as the guest sees it before any device works: addresses, kernel, CPUID, ACPI tables.
//!
//! * [`layout`]: the guest physical address map;
//! * [`kernel`]: loads a PVH ELF or a bzImage, initramfs and command line, gives the boot vCPU's registers;
//! * [`cpuid`]: the CPUID leaves of each vCPU, and the feature words by which two hosts are compared;
//! * [`acpi`]: RSDP, XSDT, FADT, MADT, MCFG and DSDT.

pub mod acpi;
pub mod cpuid;
pub mod kernel;
pub mod layout;
