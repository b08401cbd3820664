//! The same guest and services under QEMU's devices (q35, virtio-pci, TCG). Needs root and qemu-system-x86_64.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bed1::loads;
use bed1::netns::guest;
use bed1::pair::{Bed, Options, Side};
use bed1::qemu::Qemu;
use bed1::services;
use load::CONTROL_PORT;
use load::control::Control;

const END_LIMIT: Duration = Duration::from_secs(60);

fn services_reboot_power_off(vcpus: u32) -> Result<()> {
    let bed = Bed::new(Options {
        vcpus,
        ..Options::default()
    })?;
    let mut qemu = Qemu::boot(&bed)?;
    let model = loads::model(&bed);
    let serial = |qemu: &Qemu| format!("serial: {}", std::fs::read_to_string(&qemu.serial).unwrap_or_default());
    services::check_all(&*bed.network, vcpus, &bed.disk(Side::A), &model, 1).with_context(|| serial(&qemu))?;
    Control::open(&*bed.network, guest(CONTROL_PORT))?.reboot()?;
    qemu.wait_ready(2)?;
    services::check_all(&*bed.network, vcpus, &bed.disk(Side::A), &model, 5).with_context(|| serial(&qemu))?;
    Control::open(&*bed.network, guest(CONTROL_PORT))?.power_off()?;
    qemu.wait_end(END_LIMIT)
}

#[test]
fn root_qemu_one_vcpu() -> Result<()> {
    services_reboot_power_off(1)
}

#[test]
fn root_qemu_two_vcpus() -> Result<()> {
    services_reboot_power_off(2)
}

/// The store's disk format is the same on both: what was written under one VMM is read under the other.
#[test]
fn kvm_root_qemu_store_written_by_one_vmm_is_read_under_the_other() -> Result<()> {
    let mut bed = Bed::new(Options {
        vcpus: 1,
        ..Options::default()
    })?;
    let model = loads::model(&bed);
    let mut host = bed.boot(Side::A)?;
    services::check_all(&*bed.network, 1, &host.disk, &model, 1)?;
    host.vmm.remote(&["shutdown-vmm"])?;
    ensure!(host.vmm.wait_end(END_LIMIT)?, "the VMM ended with an error");
    let qemu = Qemu::boot(&bed)?;
    services::check_all(&*bed.network, 1, &host.disk, &model, 5)?;
    drop(qemu);
    bed.boot(Side::A)?;
    Ok(())
}
