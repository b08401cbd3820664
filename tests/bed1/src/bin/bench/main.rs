//! What fault tolerance costs: the same guest under the same load with FT off and on, in turns, in one go.

mod bound;
mod colo;
mod measure;
mod page;
mod plain;
mod scaling;
mod suite;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use bed1::only::Only;
use bed1::report::Table;
use clap::Parser;
use serde_json::json;

use measure::{Outcome, Setup};

/// Name of what is measured beside the loads.
const FAILOVERS: &str = "failovers";

/// Measures what FT costs, and what it does, by load.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    only: Only,
    #[command(flatten)]
    setup: Setup,
    /// Takeovers after a kill, and after silence; 0: none.
    #[arg(long, default_value_t = 10)]
    failovers: u32,
    /// Instead: some loads with more and more vCPUs, RAM, disks, and pairs of VMs.
    #[arg(long)]
    scaling: bool,
    /// Instead: some loads, with FT off, on this build and on another of `cloud-hypervisor` that has no FT.
    #[arg(long, value_name = "PROGRAM", conflicts_with = "scaling")]
    plain: Option<PathBuf>,
    /// Instead: some loads, without a disk, beside QEMU with and without COLO; a QEMU that has COLO (scripts/deps colo).
    #[arg(long, value_name = "QEMU", conflicts_with_all = ["scaling", "plain"])]
    colo: Option<PathBuf>,
    /// Writes all figures as JSON into this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Writes tables and curves into this HTML file.
    #[arg(long)]
    html: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let all = suite::all();
    if args.only.list {
        for load in &all {
            println!("{:20} {}", load.name, load.what);
        }
        println!("{FAILOVERS:20} takeovers under a light load");
        return Ok(());
    }
    args.only
        .check("load", all.iter().map(|load| load.name).chain([FAILOVERS]))?;
    if args.scaling {
        let curves = scaling::run(&all, args)?;
        return write(args, &scaling::json(&curves), &scaling::html(&curves));
    }
    if let Some(program) = &args.plain {
        let pairs = plain::run(&all, args, program)?;
        return write(args, &plain::json(&pairs), &plain::html(&pairs));
    }
    if let Some(program) = &args.colo {
        let comparisons = colo::run(&all, args, program)?;
        return write(args, &colo::json(&comparisons), &colo::html(&comparisons));
    }
    let mut outcomes = Vec::new();
    for load in all.iter().filter(|load| args.only.has(load.name)) {
        eprintln!("==> {}: {}", load.name, load.what);
        let outcome = measure::run(load, &args.setup).with_context(|| load.name)?;
        println!("{}\n{}", load.name, outcome.table());
        outcomes.push(outcome);
    }
    let gaps = if args.failovers > 0 && args.only.has(FAILOVERS) {
        eprintln!("==> {FAILOVERS}");
        let gaps = measure::gaps(args.failovers)?;
        let mut table = Table::default();
        gaps.rows(&mut table);
        println!("{FAILOVERS}\n{table}");
        Some(gaps)
    } else {
        None
    };
    let figures = json!({
        "rounds": args.setup.rounds,
        "seconds": args.setup.seconds,
        "tls": args.setup.tls,
        "link_delay_us": args.setup.link_delay,
        "link_rate_mbit": args.setup.link_rate,
        "limits": args.setup.limits,
        "loads": outcomes.iter().map(Outcome::json).collect::<Vec<_>>(),
        "failovers": gaps,
    });
    write(args, &figures, &page::html(&outcomes, gaps.as_ref()))
}

/// The files that were asked for.
fn write(args: &Args, figures: &serde_json::Value, page: &str) -> Result<()> {
    if let Some(path) = &args.json {
        std::fs::write(path, format!("{figures:#}")).with_context(|| path.display().to_string())?;
    }
    if let Some(path) = &args.html {
        std::fs::write(path, page).with_context(|| path.display().to_string())?;
    }
    Ok(())
}
