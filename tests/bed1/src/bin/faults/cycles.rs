//! Things done many times over: what a process uses must not grow.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bed1::failover;
use bed1::loads::{self, Loads};
use bed1::pair::{Bed, Host, Options, Side};
use bed1::process::Vmm;
use bed1::proxied::LIMIT;
use load::stats::Summary;

use crate::{Case, Counts, Outcome};

/// Growth of a process that is noise of its allocator, in MiB.
const NOISE: f64 = 24.0;

/// All cases.
pub fn all() -> Vec<Case> {
    let case = |name, must, run| Case { name, must, run };
    vec![
        case(
            "enable-disable",
            "the VM runs on, what both processes use does not grow",
            enable_disable,
        ),
        case(
            "failovers",
            "roles change both ways under load, nothing is lost, no connection breaks",
            failovers,
        ),
    ]
}

/// Open files, threads, resident MiB beyond guest RAM.
fn usage(vmm: &Vmm) -> Result<(usize, usize, f64)> {
    let (fds, threads) = vmm.fds_and_threads()?;
    Ok((fds, threads, vmm.memory_mib()?))
}

fn enable_disable(counts: &Counts) -> Outcome {
    let mut bed = Bed::new(Options::default())?;
    let mut primary = bed.boot(Side::A)?;
    let mut loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(1))?;
    let mut backup = bed.backup(Side::B)?;
    let mut before = None;
    for cycle in 0..counts.cycles {
        bed.protect(&mut primary, &mut backup)
            .with_context(|| format!("cycle {cycle}"))?;
        loads.wait_progress(2)?;
        primary.vmm.remote(&["ft", "disable"])?;
        primary.vmm.wait_ft_state("disabled", LIMIT)?;
        backup.vmm.wait_ft_state("listening", LIMIT)?;
        // By then a process has all that it keeps.
        if cycle == counts.cycles / 2 {
            before = Some((settled(&mut primary.vmm)?, settled(&mut backup.vmm)?));
        }
    }
    let before = before.context("no cycles")?;
    let after = (settled(&mut primary.vmm)?, settled(&mut backup.vmm)?);
    loads.wait_progress(10)?;
    loads.verify(&primary.disk)?;
    for (who, before, after) in [("primary", before.0, after.0), ("backup", before.1, after.1)] {
        ensure!(
            after.0 <= before.0 && after.1 <= before.1 && after.2 <= before.2 + NOISE,
            "what the {who} uses grew from {before:?} to {after:?} (files, threads, MiB)"
        );
    }
    let figures = vec![
        ("cycles", f64::from(counts.cycles)),
        ("primary_mib_before", before.0.2),
        ("primary_mib_after", after.0.2),
        ("backup_mib_before", before.1.2),
        ("backup_mib_after", after.1.2),
        ("primary_files", after.0.0 as f64),
        ("primary_threads", after.0.1 as f64),
    ];
    Ok(("runs on unprotected, nothing grew".into(), figures))
}

/// What a process uses once threads that are ending have ended.
fn settled(vmm: &mut Vmm) -> Result<(usize, usize, f64)> {
    let mut least = usage(vmm)?;
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(20));
        let now = usage(vmm)?;
        least = (least.0.min(now.0), least.1.min(now.1), least.2.min(now.2));
    }
    Ok(least)
}

fn failovers(counts: &Counts) -> Outcome {
    let mut bed = Bed::new(Options::default())?;
    let mut primary = bed.boot(Side::A)?;
    let mut loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(1))?;
    let (mut backup, _) = failover::protect_again(&mut bed, &mut primary, Side::B)?;
    let mut gaps = Vec::new();
    for round in 0..counts.failovers {
        let moved = change_roles(&mut bed, &loads, &mut primary, &mut backup, &mut gaps);
        moved.with_context(|| format!("failover {round}"))?;
    }
    loads.verify(&primary.disk)?;
    let verdicts = loads.drain()?;
    let (kept, all) = verdicts.iter().fold((0, 0), |(kept, all), v| {
        (kept + v.connections_kept, all + v.connections)
    });
    ensure!(kept == all, "only {kept} of {all} connections were kept");
    let gap = Summary::of(&gaps);
    let figures = vec![
        ("failovers", f64::from(counts.failovers)),
        ("gap_median_ms", gap.median),
        ("gap_p99_ms", gap.p99),
        ("gap_max_ms", gap.max),
    ];
    Ok((format!("roles changed, {kept} of {all} connections kept"), figures))
}

/// A planned failover; then the old primary's process is replaced by a new backup.
fn change_roles(
    bed: &mut Bed,
    loads: &Loads,
    primary: &mut Host,
    backup: &mut Host,
    gaps: &mut Vec<f64>,
) -> Result<()> {
    loads.new_phase();
    let moment = std::time::Instant::now();
    primary.vmm.remote(&["ft", "failover"])?;
    backup.vmm.wait_ft_state("solo", LIMIT)?;
    ensure!(primary.vmm.vm_state()? != "Running", "R4: the VM runs on both sides");
    gaps.push(failover::after(moment, backup, loads)?.gap_ms);
    primary.vmm.kill()?;
    let side = primary.side;
    std::mem::swap(primary, backup);
    let (new, _) = failover::protect_again(bed, primary, side)?;
    let old = std::mem::replace(backup, new);
    bed.forget_files(&old);
    Ok(())
}
