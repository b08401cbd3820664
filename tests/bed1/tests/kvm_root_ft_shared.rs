//! A disk that both hosts see: here, one file on one machine. Needs /dev/kvm and root.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bed1::chain::{Chain, Results, Victim};
use bed1::failover;
use bed1::loads::{self, Loads};
use bed1::pair::{Bed, Host, Options, Side};

const LIMIT: Duration = Duration::from_secs(30);

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn shared() -> Options {
    Options {
        shared: true,
        ..Options::default()
    }
}

/// After each kill the disk holds every acknowledged write, as [`Chain::round`] checks.
#[test]
fn kvm_root_r3_primaries_killed_with_a_shared_disk() -> Result<()> {
    let mut bed = Bed::new(shared())?;
    let mut results = Results::default();
    let store = |kv, kv_piped| loads::Options {
        kv,
        kv_piped,
        seed: 11 + kv as u64,
        ..loads::Options::none()
    };
    let each = [store(3, 0), store(0, 3), loads::Options::everything(41)];
    let mut chain = Chain::start(&mut bed, &each[0], &mut results)?;
    ensure!(chain.primary.vmm.ft_info()?["shared_disks"][0] == "_disk0");
    for (index, options) in each.iter().enumerate() {
        if index > 0 {
            chain.change_loads(options)?;
        }
        for delay in [120, 700] {
            chain.round(Victim::Primary, ms(delay))?;
            chain.protect_again()?;
        }
    }
    chain.end()?;
    ensure!(results.takeovers.len() == 6 && results.acknowledged > 0);
    Ok(())
}

#[test]
fn kvm_root_r5_primaries_killed_with_flushes_on_a_shared_disk() -> Result<()> {
    let mut bed = Bed::new(Options {
        durability: "disk-of-both",
        ..shared()
    })?;
    let mut results = Results::default();
    let mut chain = Chain::start(&mut bed, &loads::Options::everything(6), &mut results)?;
    for _ in 0..2 {
        chain.round(Victim::Primary, ms(500))?;
        chain.protect_again()?;
    }
    chain.end()
}

#[test]
fn kvm_root_r3_backups_killed_with_a_shared_disk() -> Result<()> {
    let mut bed = Bed::new(shared())?;
    let mut results = Results::default();
    let mut chain = Chain::start(&mut bed, &loads::Options::everything(16), &mut results)?;
    for delay in [50, 600] {
        chain.round(Victim::Backup, ms(delay))?;
        chain.protect_again()?;
    }
    chain.round(Victim::Primary, ms(200))?;
    chain.end()
}

struct Pair {
    bed: Bed,
    primary: Host,
    backup: Host,
    loads: Loads,
}

fn pair(seed: u64) -> Result<Pair> {
    let mut bed = Bed::new(shared())?;
    let mut primary = bed.boot(Side::A)?;
    let loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(seed))?;
    let mut backup = bed.backup(Side::B)?;
    bed.protect(&mut primary, &mut backup)?;
    Ok(Pair {
        bed,
        primary,
        backup,
        loads,
    })
}

fn answers(loads: &Loads) -> u64 {
    loads.verdicts().iter().map(|v| v.answers).sum()
}

/// A stopped process may be in the middle of a write: its lock says so, and the winner waits for it.
#[test]
fn kvm_root_r4_a_stopped_primary_keeps_a_shared_disk_until_it_knows_that_it_lost() -> Result<()> {
    let mut pair = pair(1)?;
    let moment = Instant::now();
    pair.primary.vmm.signal(libc::SIGSTOP)?;
    pair.backup.vmm.wait_for("the wait for the lock", LIMIT, |vmm| {
        let info = vmm.ft_info()?;
        let reason = info["reason"].as_str().unwrap_or_default();
        Ok(info["state"] == "taking_over" && reason.contains("has the lock of shared disk _disk0"))
    })?;
    let before = answers(&pair.loads);
    std::thread::sleep(ms(1000));
    ensure!(pair.backup.vmm.ft_state()? == "taking_over");
    ensure!(
        answers(&pair.loads) == before,
        "answers came although the disk was not free"
    );
    pair.primary.vmm.signal(libc::SIGCONT)?;
    pair.backup.vmm.wait_ft_state("solo", LIMIT)?;
    pair.primary.vmm.wait_ft_state("stopped", LIMIT)?;
    ensure!(pair.primary.vmm.vm_state()? != "Running", "the VM runs on both sides");
    failover::after(moment, &mut pair.backup, &pair.loads)?;
    ensure!(
        pair.backup.vmm.ft_info()?["reason"]
            .as_str()
            .is_none_or(|r| !r.contains("lock"))
    );
    pair.loads.wait_progress(20)?;
    pair.loads.verify(&pair.backup.disk)?;
    pair.loads.stop().map(drop)
}

/// The end of the stopped process frees the disk as well.
#[test]
fn kvm_root_r4_a_stopped_primary_that_is_killed_frees_a_shared_disk() -> Result<()> {
    let mut pair = pair(2)?;
    let moment = Instant::now();
    pair.primary.vmm.signal(libc::SIGSTOP)?;
    pair.backup.vmm.wait_ft_state("taking_over", LIMIT)?;
    pair.primary.vmm.kill()?;
    pair.backup.vmm.wait_ft_state("solo", LIMIT)?;
    failover::after(moment, &mut pair.backup, &pair.loads)?;
    pair.loads.verify(&pair.backup.disk)?;
    pair.loads.stop().map(drop)
}

#[test]
fn kvm_root_r3_planned_failover_of_a_shared_disk_back_and_forth() -> Result<()> {
    let Pair {
        bed,
        mut primary,
        mut backup,
        mut loads,
    } = pair(8)?;
    for _ in 0..3 {
        primary.vmm.remote(&["ft", "failover"])?;
        backup.vmm.wait_ft_state("solo", LIMIT)?;
        loads.wait_progress(20)?;
        ensure!(primary.vmm.vm_state()? != "Running", "the VM runs on both sides");
        loads.verify(&backup.disk)?;
        std::mem::swap(&mut primary, &mut backup);
        bed.receive(&mut backup)?;
        bed.protect(&mut primary, &mut backup)?;
    }
    loads.stop().map(drop)
}

#[test]
fn kvm_root_r3_disable_writes_what_is_held_for_a_shared_disk() -> Result<()> {
    let mut pair = pair(9)?;
    for _ in 0..2 {
        pair.primary.vmm.remote(&["ft", "disable"])?;
        pair.primary.vmm.wait_ft_state("disabled", LIMIT)?;
        pair.loads.wait_progress(20)?;
        pair.loads.verify(&pair.primary.disk)?;
        // It stays shared without being named again.
        pair.bed.options.shared = false;
        let args = pair.bed.enable_args(&pair.backup);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        pair.primary.vmm.remote(&args)?;
        pair.bed.options.shared = true;
        ensure!(pair.primary.vmm.ft_info()?["shared_disks"][0] == "_disk0");
    }
    failover::kill(&mut pair.primary, &mut pair.backup, &pair.loads)?;
    pair.loads.verify(&pair.backup.disk)?;
    pair.loads.stop().map(drop)
}

/// Power-off with changes that are held, and a boot from what is on the disk.
#[test]
fn kvm_root_r3_a_vm_that_ends_leaves_everything_on_a_shared_disk() -> Result<()> {
    let pair = pair(10)?;
    pair.loads.pause()?;
    pair.primary.vmm.remote(&["shutdown"])?;
    pair.loads.check_disk(&pair.bed.disk(Side::A))?;
    ensure!(
        pair.backup.vmm.ft_state()? != "solo",
        "the backup took an ended VM over"
    );
    Ok(())
}

/// What `ft enable` says, with its arguments changed.
fn refused(bed: &Bed, primary: &Host, backup: &Host, change: &dyn Fn(&mut Vec<String>)) -> String {
    let mut args = bed.enable_args(backup);
    change(&mut args);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let error = primary.vmm.remote(&args).err();
    error.map(|e| e.to_string()).unwrap_or_default()
}

#[test]
fn kvm_root_another_file_and_other_disks_are_refused() -> Result<()> {
    let mut bed = Bed::new(Options { vcpus: 1, ..shared() })?;
    let primary = bed.boot(Side::A)?;
    let loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(3))?;
    let mut backup = bed.start(Side::B, &[])?;
    // The same bytes, but not the same file.
    backup.disk = bed.dir.join("copy.img");
    std::fs::copy(bed.disk(Side::A), &backup.disk)?;
    bed.receive(&mut backup)?;
    let error = refused(&bed, &primary, &backup, &|_| ());
    ensure!(
        error.contains("lock is not seen") && error.contains("copy.img"),
        "{error}"
    );
    let error = refused(&bed, &primary, &backup, &|args| {
        args.iter_mut()
            .filter(|a| *a == "_disk0")
            .for_each(|a| *a = "_disk7".into());
    });
    ensure!(error.contains("no disk _disk7") && error.contains("_disk0"), "{error}");
    // A path that does not exist is not made: it would be another disk.
    let mut other = bed.start(Side::B, &[])?;
    other.disk = bed.dir.join("missing.img");
    bed.receive_at(&mut other, "tcp:10.99.0.2:6001")?;
    let error = refused(&bed, &primary, &other, &|_| ());
    ensure!(error.contains("missing.img") && !other.disk.exists(), "{error}");
    // Without being named as shared, the file is in use.
    let mut same = bed.start(Side::B, &[])?;
    bed.receive_at(&mut same, "tcp:10.99.0.2:6002")?;
    let error = refused(&bed, &primary, &same, &|args| {
        args.retain(|a| a != "--shared-disk" && a != "_disk0")
    });
    ensure!(error.contains("in use"), "{error}");
    loads.wait_progress(10)?;
    ensure!(primary.vmm.vm_state()? == "Running");
    loads.stop().map(drop)
}
