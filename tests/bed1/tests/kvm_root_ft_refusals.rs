//! Requests that FT must refuse, by naming what is wrong, with the running VM untouched. Needs /dev/kvm and root.

use std::fs::File;
use std::time::Duration;

use anyhow::{Result, ensure};
use bed1::loads::{self, Loads};
use bed1::pair::{Bed, Host, Options, Side};

/// `ft enable` must fail, name `words`, and leave the primary running.
fn refused(primary: &mut Host, loads: &Loads, args: &[&str], words: &[&str]) -> Result<()> {
    let error = primary.vmm.remote(&[&["ft", "enable"], args].concat()).err();
    let error = error.map(|e| e.to_string()).unwrap_or_default();
    for word in words {
        ensure!(
            error.contains(word),
            "ft enable {args:?}: the answer does not name {word:?}: {error:?}"
        );
    }
    let state = primary.vmm.ft_state()?;
    ensure!(
        matches!(state.as_str(), "disabled" | "failed"),
        "state {state} after a refusal"
    );
    ensure!(primary.vmm.vm_state()? == "Running", "the VM does not run any more");
    loads.wait_progress(10)
}

#[test]
fn kvm_root_enable_is_refused_by_name_and_the_vm_runs_on() -> Result<()> {
    let mut bed = Bed::new(Options {
        vcpus: 1,
        ..Options::default()
    })?;
    // A VMM without a default arbiter.
    let serial = bed.dir.join("first.serial");
    let mut args = bed.vm_args(Side::A, &serial)?;
    args.truncate(args.len() - 2);
    let mut primary = bed.start(Side::A, &args)?;
    primary.serial = serial;
    bed1::pair::wait_ready(&mut primary, 1)?;
    let arbiter = bed.arbiter();
    let loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(1))?;

    let nobody = ["--peer", "tcp:10.99.0.2:6999", "--arbiter", &arbiter, "--insecure"];
    refused(&mut primary, &loads, &nobody, &["10.99.0.2:6999"])?;

    let mut backup = bed.backup(Side::B)?;
    let peer = backup.peer.clone();
    refused(&mut primary, &loads, &["--peer", &peer, "--insecure"], &["--arbiter"])?;
    refused(
        &mut primary,
        &loads,
        &["--peer", &peer, "--arbiter", &arbiter],
        &["insecure", "not loopback"],
    )?;
    let missing = format!("file:{}/no-such-directory", bed.dir.display());
    refused(
        &mut primary,
        &loads,
        &["--peer", &peer, "--arbiter", &missing, "--insecure"],
        &["no-such-directory"],
    )?;
    // Both sides must mean the same register.
    let other = bed.dir.join("other-arbiter");
    std::fs::create_dir(&other)?;
    let other = format!("file:{}", other.display());
    refused(
        &mut primary,
        &loads,
        &["--peer", &peer, "--arbiter", &other, "--insecure"],
        &["arbiter"],
    )?;

    // A backup's disk of another size.
    let mut other_disk = bed.start(Side::B, &[])?;
    other_disk.disk = bed.dir.join("other.img");
    File::create(&other_disk.disk)?.set_len((bed.options.disk_mib + 1) << 20)?;
    bed.receive_at(&mut other_disk, "tcp:10.99.0.2:6001")?;
    let to_other = ["--peer", "tcp:10.99.0.2:6001", "--arbiter", &arbiter, "--insecure"];
    refused(&mut primary, &loads, &to_other, &["_disk0", "size"])?;

    // Overrides of devices that the VM does not have.
    let odd = bed.start(Side::B, &[])?;
    odd.vmm.remote(&[
        "ft",
        "receive",
        "tcp:10.99.0.2:6002",
        "--disk",
        "id=_disk9,path=/nonexistent",
        "--insecure",
    ])?;
    let to_odd = ["--peer", "tcp:10.99.0.2:6002", "--arbiter", &arbiter, "--insecure"];
    refused(&mut primary, &loads, &to_odd, &["_disk9"])?;

    // A backup that is refused is not used up: the right request works at last.
    bed.protect(&mut primary, &mut backup)?;
    let second = primary
        .vmm
        .remote(&["ft", "enable", "--peer", &peer, "--arbiter", &arbiter, "--insecure"]);
    ensure!(second.is_err(), "a protected VM was protected a second time");
    loads.wait_progress(10)?;
    loads.stop().map(drop)
}

#[test]
fn kvm_root_receive_is_refused_where_it_cannot_work() -> Result<()> {
    let mut bed = Bed::new(Options {
        vcpus: 1,
        ..Options::default()
    })?;
    let empty = bed.start(Side::B, &[])?;
    for (args, word) in [
        (vec!["tcp:10.99.0.2:6003"], "insecure"),
        (vec!["tcp:10.99.0.2"], "tcp:10.99.0.2"),
        (vec!["tcp:10.99.0.77:6003", "--insecure"], "10.99.0.77"),
        (vec!["carrier-pigeon:6003", "--insecure"], "carrier-pigeon"),
    ] {
        let error = empty.vmm.remote(&[&["ft", "receive"], &args[..]].concat()).err();
        let error = error.map(|e| e.to_string()).unwrap_or_default();
        ensure!(error.contains(word), "ft receive {args:?}: {error:?}");
    }
    let host = bed.boot(Side::A)?;
    let error = host
        .vmm
        .remote(&["ft", "receive", "tcp:10.99.0.1:6003", "--insecure"])
        .err();
    ensure!(error.is_some(), "a VMM that runs a VM became a backup");
    for verb in ["disable", "failover"] {
        ensure!(host.vmm.remote(&["ft", verb]).is_err(), "ft {verb} worked with FT off");
    }
    std::thread::sleep(Duration::from_millis(50));
    ensure!(host.vmm.vm_state()? == "Running");
    Ok(())
}
