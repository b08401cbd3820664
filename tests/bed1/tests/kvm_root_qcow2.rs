//! Disks that are qcow2 images, on one host or both. Needs /dev/kvm, root and qemu-img.

use std::time::Duration;

use anyhow::{Result, ensure};
use bed1::chain::{Chain, Results, Victim};
use bed1::images;
use bed1::loads;
use bed1::pair::{Bed, Options, Side};

const LIMIT: Duration = Duration::from_secs(30);

/// Kills two primaries under all loads, hands the VM over once more, ends both VMMs in peace, and looks at what is on
/// the disks.
fn two_primaries_killed(image_types: [&'static str; 2], seed: u64) -> Result<()> {
    let options = Options {
        image_types,
        ..Options::default()
    };
    let mut bed = Bed::new(options)?;
    let disks = [Side::A, Side::B].map(|side| bed.disk(side));
    // The backup makes its own.
    std::fs::remove_file(&disks[1])?;
    let mut results = Results::default();
    let mut chain = Chain::start(&mut bed, &loads::Options::everything(seed), &mut results)?;
    for delay in [300, 900] {
        chain.round(Victim::Primary, Duration::from_millis(delay))?;
        chain.protect_again()?;
    }
    chain.verify()?;
    chain.loads.drain()?;
    // Nothing changes any more. What the backup takes over is what the primary saw.
    chain.primary.vmm.remote(&["ft", "failover"])?;
    chain.backup.vmm.wait_ft_state("solo", LIMIT)?;
    chain.primary.vmm.wait_ft_state("stopped", LIMIT)?;
    for host in [&mut chain.primary, &mut chain.backup] {
        host.vmm.signal(libc::SIGTERM)?;
        ensure!(host.vmm.wait_end(LIMIT)?, "{} does not end", host.vmm.name);
    }
    for (disk, image_type) in disks.iter().zip(image_types) {
        ensure!(images::is_qcow2(disk)? == (image_type == "qcow2"));
        if image_type == "qcow2" {
            images::check(disk)?;
        }
    }
    images::compare(&disks[0], &disks[1])?;
    ensure!(results.takeovers.len() == 2);
    Ok(())
}

#[test]
fn kvm_root_r3_primaries_killed_with_qcow2_disks() -> Result<()> {
    two_primaries_killed(["qcow2"; 2], 81)
}

#[test]
fn kvm_root_r3_a_raw_disk_is_replicated_as_qcow2_and_back() -> Result<()> {
    two_primaries_killed(["raw", "qcow2"], 82)
}
