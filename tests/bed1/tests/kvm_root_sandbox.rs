//! System call filters and Landlock on real VMMs, in all that they do. Needs /dev/kvm and root.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bed1::loads::{self, Loads};
use bed1::netns::guest;
use bed1::pair::{Bed, Host, Options, Side, guest_image, wait_ready};
use bed1::process::Vmm;
use load::CONTROL_PORT;
use load::control::Control;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(30);

/// Name and value of `Seccomp:` of all threads of a VMM but the kernel's own.
fn threads(vmm: &Vmm) -> Result<Vec<(String, String)>> {
    let mut threads = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{}/task", vmm.pid()))? {
        // Some come and go.
        let Ok(status) = std::fs::read_to_string(task?.path().join("status")) else {
            continue;
        };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim().to_string()
        };
        let name = field("Name:");
        if !name.starts_with("iou-") && !name.starts_with("kvm-") {
            threads.push((name, field("Seccomp:")));
        }
    }
    Ok(threads)
}

/// Every thread is filtered, and those of `expected` are there (a new one has its name a moment later).
fn check(host: &Host, expected: &[&str]) -> Result<()> {
    let end = Instant::now() + LIMIT;
    loop {
        let threads = threads(&host.vmm)?;
        let bare: Vec<_> = threads.iter().filter(|(_, mode)| mode != "2").collect();
        ensure!(bare.is_empty(), "{}: without filter: {bare:?}", host.vmm.name);
        let there = |name: &&str| threads.iter().any(|(thread, _)| thread == name);
        if expected.iter().all(there) {
            return Ok(());
        }
        let late = Instant::now() > end;
        ensure!(!late, "{}: not all of {expected:?}: {threads:?}", host.vmm.name);
        std::thread::sleep(Duration::from_millis(20));
    }
}

const OWN: &[&str] = &[
    "cloud-hyperviso",
    "spawner",
    "api-server",
    "event-monitor",
    "signals",
    "vmm-control",
    "ft-supervisor",
];
const MACHINE: &[&str] = &["vcpu0", "vcpu1", "virtio_disk0", "virtio_net1", "virtio_rng"];
const PRIMARY: &[&str] = &["ft-control", "ft-audit", "ft-receiver", "ft-sender", "ft-pulse"];
const BACKUP: &[&str] = &["ft-listen", "ft-receiver", "ft-applier", "ft-sender", "ft-pulse"];

fn check_pair(primary: &Host, backup: &Host) -> Result<()> {
    check(primary, &[OWN, MACHINE, PRIMARY].concat())?;
    check(backup, &[OWN, MACHINE, BACKUP].concat())
}

/// Resets the guest from inside and waits for its services.
fn reset(bed: &Bed, host: &mut Host) -> Result<()> {
    let serial = std::fs::read_to_string(&host.serial).unwrap_or_default();
    let before = serial.matches("test-guest: ready").count();
    Control::open(&*bed.network, guest(CONTROL_PORT))?.reboot()?;
    wait_ready(host, before + 1)
}

#[test]
fn kvm_root_every_thread_is_filtered_whatever_the_vmm_does() -> Result<()> {
    let mut bed = Bed::new(Options::default())?;
    let mut primary = bed.boot(Side::A)?;
    check(&primary, &[OWN, MACHINE].concat())?;
    let mut backup = bed.backup(Side::B)?;
    check(&backup, &[OWN, &["ft-listen"][..]].concat())?;
    bed.protect(&mut primary, &mut backup)?;
    check_pair(&primary, &backup)?;
    let mut loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(11))?;
    loads.wait_progress(20)?;

    // An end of FT and a new beginning.
    primary.vmm.remote(&["ft", "disable"])?;
    loads.wait_progress(10)?;
    check(&primary, &[OWN, MACHINE].concat())?;
    backup.vmm.wait_ft_state("listening", LIMIT)?;
    bed.protect(&mut primary, &mut backup)?;
    primary.vmm.remote(&["ft", "config", "max_lag_mib=8"])?;
    loads.wait_progress(20)?;

    // A takeover, a new backup, and a planned failover.
    primary.vmm.kill()?;
    backup.vmm.wait_ft_state("solo", LIMIT)?;
    loads.wait_progress(20)?;
    check(&backup, &[OWN, MACHINE].concat())?;
    (primary, backup) = (backup, bed.backup(Side::A)?);
    bed.protect(&mut primary, &mut backup)?;
    check_pair(&primary, &backup)?;
    loads.wait_progress(10)?;
    primary.vmm.remote(&["ft", "failover"])?;
    backup.vmm.wait_ft_state("solo", LIMIT)?;
    loads.wait_progress(10)?;
    drop(primary);
    let mut solo = backup;

    // Another process by way of a snapshot.
    let url = format!("file://{}", bed.dir.join("snapshot").display());
    solo.vmm.remote(&["pause"])?;
    solo.vmm.remote(&["snapshot", &url])?;
    solo.vmm.kill()?;
    solo = bed.start(Side::A, &[])?;
    solo.vmm.remote(&["restore", &format!("source_url={url}")])?;
    solo.vmm.remote(&["resume"])?;
    check(&solo, &[OWN, MACHINE].concat())?;
    loads.wait_progress(20)?;
    loads.verify(&solo.disk)?;
    loads.stop()?;

    // Resets and ends.
    solo.vmm.remote(&["reboot"])?;
    check(&solo, &[OWN, MACHINE].concat())?;
    solo.vmm.remote(&["shutdown"])?;
    solo.vmm.remote(&["delete"])?;
    check(&solo, OWN)?;
    solo.vmm.remote(&["shutdown-vmm"])?;
    let end = Instant::now() + LIMIT;
    while !solo.vmm.ended()? {
        ensure!(Instant::now() < end, "the VMM does not end: {}", solo.vmm.tail());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn kvm_root_filters_can_be_switched_off() -> Result<()> {
    let mut bed = Bed::new(Options::default())?;
    let host = bed.start(Side::A, &["--seccomp".into(), "false".into()])?;
    let threads = threads(&host.vmm)?;
    ensure!(threads.iter().all(|(_, mode)| mode == "0"), "{threads:?}");
    Ok(())
}

/// Options of Landlock with what later requests will name: snapshots, arbiter, certificates.
fn landlock(bed: &Bed) -> Result<Vec<String>> {
    let snapshots = bed.dir.join("snapshots");
    std::fs::create_dir_all(&snapshots)?;
    let rule = |path: String, access| format!("path={path},access={access}");
    Ok(vec![
        "--landlock".into(),
        "--landlock-rules".into(),
        rule(snapshots.display().to_string(), "rw"),
        rule(bed.dir.join("arbiter").display().to_string(), "rw"),
        rule(bed.dir.join("certs").display().to_string(), "r"),
    ])
}

#[test]
fn kvm_root_a_protected_pair_lives_within_landlock() -> Result<()> {
    let mut bed = Bed::new(Options {
        tls: true,
        ..Options::default()
    })?;
    let locked = landlock(&bed)?;
    let serial = bed.dir.join("a1.serial");
    let args = [bed.vm_args(Side::A, &serial)?, locked.clone()].concat();
    let mut primary = bed.start(Side::A, &args)?;
    ensure!(primary.serial == serial, "{}", primary.serial.display());
    wait_ready(&mut primary, 1)?;
    let mut backup = bed.start(Side::B, &locked)?;
    bed.receive(&mut backup)?;
    let mut loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(5))?;
    for _ in 0..2 {
        bed.protect(&mut primary, &mut backup)?;
        check_pair(&primary, &backup)?;
        loads.wait_progress(20)?;
        primary.vmm.kill()?;
        backup.vmm.wait_ft_state("solo", LIMIT)?;
        loads.wait_progress(20)?;
        loads.verify(&backup.disk)?;
        let mut next = bed.start(primary.side, &locked)?;
        bed.receive(&mut next)?;
        (primary, backup) = (backup, next);
    }
    loads.stop()?;
    drop(backup);
    // The kernel is read again.
    reset(&bed, &mut primary)?;
    primary.vmm.remote(&["pause"])?;
    let url = |name: &str| format!("file://{}", bed.dir.join(name).display());
    let refused = primary.vmm.remote(&["snapshot", &url("elsewhere")]);
    let error = refused.err().map(|e| e.to_string()).unwrap_or_default();
    ensure!(error.contains("ermission denied"), "a snapshot elsewhere: {error:?}");
    primary.vmm.remote(&["snapshot", &url("snapshots/one")])?;
    primary.vmm.kill()?;
    let restore = [
        "--restore".into(),
        format!("source_url={},resume=on", url("snapshots/one")),
    ];
    let mut restored = bed.start(primary.side, &[&restore[..], &locked].concat())?;
    restored.serial.clone_from(&primary.serial);
    restored.vmm.remote(&["pause"])?;
    restored.vmm.remote(&["resume"])?;
    reset(&bed, &mut restored)
}

#[test]
fn kvm_root_landlock_by_the_api_holds_for_threads_that_were_there_before() -> Result<()> {
    let mut bed = Bed::new(Options::default())?;
    let host = bed.start(Side::A, &[])?;
    let disk = bed.disk(Side::A);
    let mut config = json!({
        "payload": {"kernel": guest_image()?, "cmdline": bed.cmdline()},
        "memory": {"size": 64 << 20},
        "disks": [{"path": disk}],
        "console": {"mode": "Off"},
        "landlock_enable": true,
        "landlock_rules": [{"path": "/nonexistent", "access": "r"}],
    });
    let call =
        |what: &str, body: Option<String>| -> Result<u16> { Ok(host.vmm.call("PUT", what, body.as_deref())?.status) };
    // A rule that cannot be kept is an error, and nothing is restricted.
    ensure!(call("vm.create", Some(config.to_string()))? == 204);
    ensure!(call("vm.boot", None)? == 500);
    ensure!(call("vm.delete", None)? == 204);
    config["landlock_rules"] = json!(null);
    ensure!(call("vm.create", Some(config.to_string()))? == 204);
    ensure!(call("vm.boot", None)? == 204, "{}", host.vmm.tail());
    host.vmm.remote(&["pause"])?;
    let url = format!("file://{}", bed.dir.join("snapshot").display());
    ensure!(
        host.vmm.remote(&["snapshot", &url]).is_err(),
        "a file that no rule allows"
    );
    host.vmm.remote(&["resume"])?;
    host.vmm.remote(&["reboot"]).context("the kernel is read again")?;
    // The same again is nothing new; another disk is.
    host.vmm.remote(&["shutdown"])?;
    ensure!(call("vm.boot", None)? == 204, "{}", host.vmm.tail());
    host.vmm.remote(&["delete"])?;
    config["disks"][0]["path"] = json!(bed.disk(Side::B));
    ensure!(call("vm.create", Some(config.to_string()))? == 204);
    ensure!(
        call("vm.boot", None)? == 500,
        "a disk that the first rules did not allow"
    );
    Ok(())
}
