//! Resets, power-off and pauses of a protected VM whose primary dies in the middle of them. Needs /dev/kvm and root.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bed1::loads::{self, Loads};
use bed1::netns::guest;
use bed1::pair::{Bed, Options, Side};
use bed1::services;
use load::CONTROL_PORT;
use load::control::Control;

const LIMIT: Duration = Duration::from_secs(30);

fn control(bed: &Bed) -> Result<Control> {
    Ok(Control::open(&*bed.network, guest(CONTROL_PORT))?)
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Waits until the guest answers; its counter.
fn answers(bed: &Bed) -> Result<u64> {
    let end = Instant::now() + LIMIT;
    loop {
        match control(bed).and_then(|mut control| Ok(control.count()?)) {
            Ok(count) => return Ok(count),
            Err(e) if Instant::now() > end => bail!("the guest does not answer: {e:#}"),
            Err(_) => std::thread::sleep(ms(20)),
        }
    }
}

#[test]
fn kvm_root_primaries_killed_in_the_middle_of_a_reset() -> Result<()> {
    let mut bed = Bed::new(Options::default())?;
    let mut primary = bed.boot(Side::A)?;
    let mut backup = bed.backup(Side::B)?;
    let model = loads::model(&bed);
    for (round, delay) in (0u64..).zip([0, 5, 40, 200]) {
        bed.protect(&mut primary, &mut backup)?;
        services::check_all(&*bed.network, 2, &primary.disk, &model, 100 * round + 1)?;
        if round % 2 == 0 {
            control(&bed)?.reboot()?;
        } else {
            primary.vmm.remote(&["reboot"])?;
        }
        std::thread::sleep(ms(delay));
        primary.vmm.kill()?;
        backup.vmm.wait_ft_state("solo", LIMIT)?;
        answers(&bed).with_context(|| backup.vmm.tail())?;
        // Whether it was reset before or after, what it acknowledged is there.
        services::check_all(&*bed.network, 2, &backup.disk, &model, 100 * round + 50)?;
        let side = primary.side;
        primary = backup;
        backup = bed.backup(side)?;
    }
    Ok(())
}

#[test]
fn kvm_root_a_paused_vm_is_still_paused_after_a_takeover() -> Result<()> {
    let mut bed = Bed::new(Options::default())?;
    let mut primary = bed.boot(Side::A)?;
    let mut backup = bed.backup(Side::B)?;
    bed.protect(&mut primary, &mut backup)?;
    let mut loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(3))?;
    loads.wait_progress(20)?;
    primary.vmm.remote(&["pause"])?;
    std::thread::sleep(ms(500));
    primary.vmm.kill()?;
    backup.vmm.wait_ft_state("solo", LIMIT)?;
    ensure!(backup.vmm.vm_state()? == "Paused", "the VM runs though it was paused");
    backup.vmm.remote(&["resume"])?;
    loads.wait_progress(20)?;
    loads.verify(&backup.disk)?;
    loads.stop().map(drop)
}

#[test]
fn kvm_root_a_backup_whose_primary_dies_while_the_guest_powers_off_ends_too() -> Result<()> {
    for delay in [0, 3] {
        let mut bed = Bed::new(Options::default())?;
        let mut primary = bed.boot(Side::A)?;
        let mut backup = bed.backup(Side::B)?;
        bed.protect(&mut primary, &mut backup)?;
        let asked = control(&bed)?.power_off();
        std::thread::sleep(ms(delay));
        primary.vmm.kill()?;
        // Either it was dismissed, or it has the VM, which powers off here (again, or for the first time if its epoch
        // was lost: then the guest's client has no answer and asks again).
        let end = Instant::now() + LIMIT;
        while !backup.vmm.ended()? {
            // A VMM that is about to end answers no more.
            let state = backup.vmm.ft_state().unwrap_or_default();
            if state == "listening" {
                break;
            }
            ensure!(Instant::now() < end, "asked: {asked:?}; {}", backup.vmm.tail());
            if asked.is_err() && state == "solo" {
                let _ = control(&bed).map(|control| control.power_off());
            }
            std::thread::sleep(ms(50));
        }
    }
    Ok(())
}

#[test]
fn kvm_root_a_protected_guest_that_powers_off_ends_its_vmm_well() -> Result<()> {
    let mut bed = Bed::new(Options::default())?;
    let mut primary = bed.boot(Side::A)?;
    let mut backup = bed.backup(Side::B)?;
    bed.protect(&mut primary, &mut backup)?;
    control(&bed)?.power_off()?;
    ensure!(
        primary.vmm.wait_end(LIMIT)?,
        "the VMM ended with an error: {}",
        primary.vmm.tail()
    );
    backup.vmm.wait_ft_state("listening", LIMIT)
}
