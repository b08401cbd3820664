//! The test guest on our VMM. Needs /dev/kvm and root.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bed1::loads::{self, Loads};
use bed1::netns::guest;
use bed1::pair::{Bed, Host, Options, Side, wait_ready};
use bed1::services;
use load::CONTROL_PORT;
use load::control::Control;

const END_LIMIT: Duration = Duration::from_secs(30);

fn bed(vcpus: u32) -> Result<Bed> {
    Bed::new(Options {
        vcpus,
        ..Options::default()
    })
}

fn control(bed: &Bed) -> Result<Control> {
    Ok(Control::open(&*bed.network, guest(CONTROL_PORT))?)
}

fn services_and_power_off(vcpus: u32) -> Result<()> {
    let mut bed = bed(vcpus)?;
    let mut host = bed.boot(Side::A)?;
    services::check_all(&*bed.network, vcpus, &host.disk, &loads::model(&bed), 1).with_context(|| host.vmm.tail())?;
    control(&bed)?.power_off()?;
    ensure!(
        host.vmm.wait_end(END_LIMIT)?,
        "the VMM ended with an error after power-off: {}",
        host.vmm.tail()
    );
    ensure!(!host.vmm.socket().exists(), "the API socket was left behind");
    Ok(())
}

#[test]
fn kvm_root_one_vcpu_serves_and_powers_off() -> Result<()> {
    services_and_power_off(1)
}

#[test]
fn kvm_root_two_vcpus_serve_and_power_off() -> Result<()> {
    services_and_power_off(2)
}

#[test]
fn kvm_root_a_vcpu_for_a_cpu_that_the_host_lacks_does_not_boot() -> Result<()> {
    let mut bed = Bed::new(Options {
        affinity: "[0@[0],1@[1023]]",
        ..Options::default()
    })?;
    let serial = bed.dir.join("serial");
    let args = bed.vm_args(Side::A, &serial)?;
    let failed = match bed.start(Side::A, &args) {
        Ok(mut host) => {
            ensure!(!host.vmm.wait_end(END_LIMIT)?, "the VMM ended well");
            host.vmm.tail()
        }
        Err(e) => format!("{e:#}"),
    };
    ensure!(
        failed.contains("vCPU 1 cannot run on the host's CPUs [1023]"),
        "{failed}"
    );
    Ok(())
}

#[test]
fn kvm_root_polling_guest_serves() -> Result<()> {
    let mut bed = Bed::new(Options {
        vcpus: 1,
        cmdline: "poll=1".into(),
        ..Options::default()
    })?;
    let host = bed.boot(Side::A)?;
    services::check_all(&*bed.network, 1, &host.disk, &loads::model(&bed), 1)
}

#[test]
fn kvm_root_pause_holds_the_guest_and_resume_lets_it_go_on() -> Result<()> {
    let mut bed = bed(2)?;
    let host = bed.boot(Side::A)?;
    let mut loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(3))?;
    for _ in 0..5 {
        host.vmm.remote(&["pause"])?;
        ensure!(host.vmm.vm_state()? == "Paused", "not paused");
        // What was sent before the pause may still arrive.
        std::thread::sleep(Duration::from_millis(100));
        let before: u64 = loads
            .verdicts()
            .iter()
            .filter(|v| v.name != "source")
            .map(|v| v.answers)
            .sum();
        std::thread::sleep(Duration::from_millis(300));
        let after: u64 = loads
            .verdicts()
            .iter()
            .filter(|v| v.name != "source")
            .map(|v| v.answers)
            .sum();
        ensure!(before == after, "{} answers came from a paused guest", after - before);
        ensure!(host.vmm.remote(&["pause"]).is_err(), "a second pause was accepted");
        host.vmm.remote(&["resume"])?;
        loads.wait_progress(20)?;
    }
    loads.verify(&host.disk)?;
    loads.stop().map(drop)
}

/// A boot by the guest's own reset or by the API: the store's records survive, RAM's counter does not.
fn reboot(how: impl Fn(&Bed, &Host) -> Result<()>) -> Result<()> {
    let mut bed = bed(2)?;
    let mut host = bed.boot(Side::A)?;
    let model = loads::model(&bed);
    services::check_all(&*bed.network, 2, &host.disk, &model, 1)?;
    let counted = control(&bed)?.count()?;
    for boot in 2..=3 {
        how(&bed, &host)?;
        wait_ready(&mut host, boot)?;
        ensure!(control(&bed)?.count()? <= counted, "the counter survived a reboot");
        services::check_all(&*bed.network, 2, &host.disk, &model, 10 * boot as u64)?;
    }
    Ok(())
}

#[test]
fn kvm_root_store_survives_a_reboot_from_inside() -> Result<()> {
    reboot(|bed, _| Ok(control(bed)?.reboot()?))
}

#[test]
fn kvm_root_store_survives_a_reboot_by_the_api() -> Result<()> {
    reboot(|_, host| host.vmm.remote(&["reboot"]).map(drop))
}

#[test]
fn kvm_root_vmm_shutdown_ends_everything() -> Result<()> {
    let mut bed = bed(1)?;
    let mut host = bed.boot(Side::A)?;
    host.vmm.remote(&["shutdown-vmm"])?;
    ensure!(
        host.vmm.wait_end(END_LIMIT)?,
        "the VMM ended with an error: {}",
        host.vmm.tail()
    );
    ensure!(!host.vmm.socket().exists(), "the API socket was left behind");
    // The tap is free again.
    bed.boot(Side::A).map(drop)
}
