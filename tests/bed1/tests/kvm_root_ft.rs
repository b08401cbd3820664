//! Fault tolerance from end to end: kills, planned switches, refusals. Needs /dev/kvm and root.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bed1::chain::{Chain, Results, Victim};
use bed1::failover;
use bed1::loads::{self, Loads};
use bed1::pair::{Bed, Host, Options, Side};

const LIMIT: Duration = Duration::from_secs(30);

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

#[test]
fn kvm_root_primaries_killed_under_each_load() -> Result<()> {
    let mut bed = Bed::new(Options::default())?;
    let mut results = Results::default();
    let none = loads::Options::none();
    let each = [
        loads::Options {
            kv: 3,
            seed: 11,
            ..none.clone()
        },
        loads::Options {
            kv_piped: 2,
            seed: 21,
            ..none.clone()
        },
        loads::Options {
            echo: 6,
            seed: 31,
            ..none.clone()
        },
        loads::Options {
            sink: 2,
            source: 2,
            bulk_bytes_per_s: 4 << 20,
            ..none.clone()
        },
        loads::Options {
            dirty: (20_000, 5_000),
            ..none
        },
        loads::Options::everything(41),
    ];
    let mut chain = Chain::start(&mut bed, &each[0], &mut results)?;
    for (index, options) in each.iter().enumerate() {
        let what = || format!("under {options:?}");
        if index > 0 {
            chain.change_loads(options).with_context(what)?;
        }
        for delay in [120, 700] {
            chain.round(Victim::Primary, ms(delay)).with_context(what)?;
            chain.protect_again().with_context(what)?;
        }
    }
    chain.end()?;
    ensure!(results.takeovers.len() == 12 && results.acknowledged > 0 && results.dirtied > 0);
    Ok(())
}

/// Kills two primaries under all loads, each some time after the VM was protected.
fn two_primaries_killed(options: Options, seed: u64, delay: Duration) -> Result<()> {
    let mut bed = Bed::new(options)?;
    let mut results = Results::default();
    let mut chain = Chain::start(&mut bed, &loads::Options::everything(seed), &mut results)?;
    for _ in 0..2 {
        chain.round(Victim::Primary, delay)?;
        chain.protect_again()?;
    }
    chain.end()
}

#[test]
fn kvm_root_primaries_killed_over_tls_with_flushes_on_both_disks() -> Result<()> {
    let options = Options {
        tls: true,
        durability: "disk-of-both",
        ..Options::default()
    };
    two_primaries_killed(options, 6, ms(500))
}

#[test]
fn kvm_root_one_vcpu_takeover() -> Result<()> {
    let options = Options {
        vcpus: 1,
        ..Options::default()
    };
    two_primaries_killed(options, 5, ms(300))
}

#[test]
fn kvm_root_a_vcpus_affinity_is_kept_after_a_takeover() -> Result<()> {
    let mut bed = Bed::new(Options {
        affinity: "[1@[0,1023]]",
        ..Options::default()
    })?;
    let mut primary = bed.boot(Side::A)?;
    let anywhere = primary.vmm.cpus_of_thread("vcpu0")?;
    ensure!(anywhere != "0", "this needs two processors");
    let mut loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(7))?;
    let mut backup = bed.backup(Side::B)?;
    bed.protect(&mut primary, &mut backup)?;
    for host in [&primary, &backup] {
        ensure!(host.vmm.cpus_of_thread("vcpu0")? == anywhere, "vCPU 0 is not free");
        ensure!(host.vmm.cpus_of_thread("vcpu1")? == "0", "vCPU 1 is not pinned");
    }
    failover::kill(&mut primary, &mut backup, &loads)?;
    loads.verify(&backup.disk)?;
    loads.stop().map(drop)
}

#[test]
fn kvm_root_backups_killed_and_replaced() -> Result<()> {
    let mut bed = Bed::new(Options::default())?;
    let mut results = Results::default();
    let mut chain = Chain::start(&mut bed, &loads::Options::everything(6), &mut results)?;
    for delay in [50, 400, 900] {
        chain.round(Victim::Backup, ms(delay))?;
        ensure!(
            chain.primary.vmm.ft_info()?["role"] == "primary",
            "the survivor is no primary"
        );
        chain.protect_again()?;
    }
    // The replaced backup is as good as the first one.
    chain.round(Victim::Primary, ms(200))?;
    chain.end()
}

/// After a planned switch the old primary's VMM stays; it can be the backup of the next one.
#[test]
fn kvm_root_planned_failover_back_and_forth() -> Result<()> {
    let mut bed = Bed::new(Options::default())?;
    let mut primary = bed.boot(Side::A)?;
    let mut loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(8))?;
    let mut backup = bed.backup(Side::B)?;
    bed.protect(&mut primary, &mut backup)?;
    for _ in 0..3 {
        primary.vmm.remote(&["ft", "failover"])?;
        wait_runs(&mut backup)?;
        loads.wait_progress(20)?;
        ensure!(primary.vmm.vm_state()? != "Running", "the VM runs on both sides");
        loads.verify(&backup.disk)?;
        std::mem::swap(&mut primary, &mut backup);
        if primary.vmm.ft_state()? != "protected" {
            bed.receive(&mut backup)?;
            bed.protect(&mut primary, &mut backup)?;
        }
    }
    loads.stop().map(drop)
}

fn wait_runs(host: &mut Host) -> Result<()> {
    host.vmm.wait_for("the VM to run here", LIMIT, |vmm| {
        Ok(vmm.vm_state().is_ok_and(|s| s == "Running") && matches!(vmm.ft_state()?.as_str(), "solo" | "protected"))
    })
}

#[test]
fn kvm_root_r7_disable_leaves_a_plain_vm_and_enable_works_again() -> Result<()> {
    let mut bed = Bed::new(Options::default())?;
    let mut primary = bed.boot(Side::A)?;
    let mut loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(9))?;
    let mut backup = bed.backup(Side::B)?;
    bed.protect(&mut primary, &mut backup)?;
    primary.vmm.remote(&["ft", "disable"])?;
    primary.vmm.wait_ft_state("disabled", LIMIT)?;
    loads.wait_progress(20)?;
    // The backup knows that it was dismissed: it must not take over when the primary's connection goes.
    std::thread::sleep(ms(1500));
    ensure!(backup.vmm.ft_state()? != "solo", "a dismissed backup took over");
    ensure!(primary.vmm.remote(&["ft", "disable"]).is_err(), "FT was disabled twice");
    backup.vmm.kill()?;
    loads.wait_progress(20)?;
    let (mut backup, _) = failover::protect_again(&mut bed, &mut primary, Side::B)?;
    failover::kill(&mut primary, &mut backup, &loads)?;
    loads.verify(&backup.disk)?;
    loads.stop().map(drop)
}

#[test]
fn kvm_root_limits_are_changed_while_protected() -> Result<()> {
    let mut bed = Bed::new(Options::default())?;
    let mut results = Results::default();
    let mut chain = Chain::start(&mut bed, &loads::Options::everything(10), &mut results)?;
    let set = |chain: &Chain, body: &str| chain.primary.vmm.call("PUT", "vm.ft-config", Some(body));
    for (body, status) in [
        (r#"{"max_epoch_ms": 20}"#, 204),
        (r#"{"max_epoch_ms": 0}"#, 400),
        (r#"{"nonsense": 1}"#, 400),
    ] {
        let answer = set(&chain, body)?;
        ensure!(
            answer.status == status,
            "{body}: status {}: {}",
            answer.status,
            answer.body
        );
    }
    ensure!(
        chain.primary.vmm.ft_info()?["limits"]["max_epoch_ms"] == 20,
        "the limit was not changed"
    );
    chain.round(Victim::Primary, ms(300))?;
    chain.end()
}

/// A backup that was started with --ft-receive is the same as one that was asked by `ft receive`.
#[test]
fn kvm_root_backup_by_command_line_options_takes_over() -> Result<()> {
    let mut bed = Bed::new(Options::default())?;
    let mut primary = bed.boot(Side::A)?;
    let mut loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(12))?;
    let mut backup = bed.backup_by_options(Side::B)?;
    bed.protect(&mut primary, &mut backup)?;
    failover::kill(&mut primary, &mut backup, &loads)?;
    loads.verify(&backup.disk)?;
    loads.stop().map(drop)
}
