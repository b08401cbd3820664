//! Things done many times over: what a process uses must not grow.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bed1::failover;
use bed1::loads::{self, Loads};
use bed1::pair::{Bed, Host, Options, Side};
use bed1::process::{Resources, Vmm};
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
            after.fds <= before.fds && after.threads <= before.threads && after.memory_mib <= before.memory_mib + NOISE,
            "what the {who} uses grew from {before:?} to {after:?}"
        );
    }
    let figures = vec![
        ("cycles", f64::from(counts.cycles)),
        ("primary_mib_before", before.0.memory_mib),
        ("primary_mib_after", after.0.memory_mib),
        ("backup_mib_before", before.1.memory_mib),
        ("backup_mib_after", after.1.memory_mib),
        ("primary_files", after.0.fds as f64),
        ("primary_threads", after.0.threads as f64),
    ];
    Ok(("runs on unprotected, nothing grew".into(), figures))
}

/// What a process uses once threads that are ending have ended.
fn settled(vmm: &mut Vmm) -> Result<Resources> {
    let mut least = vmm.resources()?;
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(20));
        let now = vmm.resources()?;
        least = Resources {
            fds: least.fds.min(now.fds),
            threads: least.threads.min(now.threads),
            memory_mib: least.memory_mib.min(now.memory_mib),
        };
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
