//! Kills the primary, and then the backup, at random moments under load, again and again, and checks every byte.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bed1::chain::{Chain, Results, Victim};
use bed1::failover::Takeover;
use bed1::loads;
use bed1::pair::{Bed, Options};
use bed1::report::Table;
use clap::Parser;
use load::pattern::Rng;
use load::stats::Summary;
use serde_json::{Value, json};

/// Kills the primary and the backup at random moments under load and checks that nothing was lost.
#[derive(Parser, Clone)]
struct Args {
    /// Kills of the primary.
    #[arg(long, default_value_t = 100)]
    primary_kills: u64,
    /// Kills of the backup, after those of the primary.
    #[arg(long, default_value_t = 20)]
    backup_kills: u64,
    /// Seed of the moments and the contents. Default: from the clock; printed.
    #[arg(long)]
    seed: Option<u64>,
    /// First kill (its moment depends on seed and number alone), to replay a failure.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Starts a new pair and boots the guest again for each kill, instead of one guest that lives through all.
    #[arg(long)]
    fresh: bool,
    /// Number of vCPUs of the guest.
    #[arg(long, default_value_t = 2)]
    vcpus: u32,
    /// RAM of the guest in MiB.
    #[arg(long, default_value_t = 256)]
    memory_mib: u64,
    /// Keeps logs and disks also when all is well.
    #[arg(long)]
    keep: bool,
    /// Prints the figures as JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |d| d.as_millis() as u64 % 1_000_000_007)
    });
    let start = Instant::now();
    let mut results = Results::default();
    let outcome = run(&args, seed, &mut results).and_then(|()| {
        let bound = 1 + (args.primary_kills + args.backup_kills) / 20;
        anyhow::ensure!(
            results.lapses <= bound,
            "protection lapsed {} times without a kill",
            results.lapses
        );
        Ok(())
    });
    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        println!("{:#}", as_json(&args, seed, &results, seconds, outcome.as_ref().err()));
    } else {
        println!("{}", as_table(&args, seed, &results, seconds));
    }
    match outcome {
        Ok(()) => {
            eprintln!("campaign passed");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("campaign FAILED: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args, seed: u64, results: &mut Results) -> Result<()> {
    let total = args.primary_kills + args.backup_kills;
    let victim = |kill: u64| {
        if kill < args.primary_kills {
            Victim::Primary
        } else {
            Victim::Backup
        }
    };
    let mut kill = args.from;
    while kill < total {
        let last = if args.fresh { kill + 1 } else { total };
        let options = Options {
            vcpus: args.vcpus,
            memory_mib: args.memory_mib,
            ..Options::default()
        };
        let mut bed = Bed::new(options)?;
        let outcome = chained(&mut bed, kill..last, seed, &victim, results);
        if outcome.is_err() || args.keep {
            eprintln!("logs and disks are kept in {}", bed.keep().display());
        }
        outcome?;
        kill = last;
    }
    Ok(())
}

/// Lets one guest live through a range of kills.
fn chained(
    bed: &mut Bed,
    kills: std::ops::Range<u64>,
    seed: u64,
    victim: &dyn Fn(u64) -> Victim,
    results: &mut Results,
) -> Result<()> {
    let options = loads::Options::everything(seed.wrapping_add(kills.start));
    let mut chain = Chain::start(bed, &options, results).context("start")?;
    for kill in kills.clone() {
        let replay = || {
            format!(
                "kill {kill} (of the {:?}), to replay: --seed {seed} --from {kill}",
                victim(kill)
            )
        };
        let delay = Rng::new(seed ^ (kill << 20)).within(50..1500);
        let line = chain
            .round(victim(kill), Duration::from_millis(delay))
            .with_context(replay)?;
        eprintln!("kill {kill}: {line}");
        if kill + 1 < kills.end {
            let ms = chain.protect_again().with_context(replay)?;
            eprintln!("    protected again in {ms:.0} ms");
        }
    }
    chain.end()
}

fn summary(takeovers: &[Takeover], f: impl Fn(&Takeover) -> Option<f64>) -> Summary {
    Summary::of(&takeovers.iter().filter_map(f).collect::<Vec<_>>())
}

/// Gaps of all connections.
fn connection_gaps(takeovers: &[Takeover]) -> Summary {
    let gaps = takeovers.iter().flat_map(Takeover::connections_ms);
    Summary::of(&gaps.collect::<Vec<_>>())
}

fn as_table(args: &Args, seed: u64, results: &Results, seconds: f64) -> Table {
    let mut table = Table::default();
    table.row("seed", seed.to_string());
    let (from_primary, from_backup) = planned(args);
    table.row(
        "takeovers after a kill of the primary",
        format!("{} of {from_primary}", results.takeovers.len()),
    );
    table.row(
        "went on after a kill of the backup",
        format!("{} of {from_backup}", results.solos.len()),
    );
    let connections: u64 = results.verdicts.iter().map(|v| v.connections).sum();
    let kept: u64 = results.verdicts.iter().map(|v| v.connections_kept).sum();
    let bytes: u64 = results.verdicts.iter().map(|v| v.bytes).sum();
    table.row("connections kept", format!("{kept} of {connections}"));
    table.row("acknowledged writes, all found", results.acknowledged.to_string());
    table.row("bytes checked", bed1::report::bytes(bytes));
    table.row("guest pages written and checked", results.dirtied.to_string());
    table.summary(
        "gap, primary killed",
        &summary(&results.takeovers, |t| Some(t.gap_ms)),
        "ms",
    );
    table.summary("    each connection", &connection_gaps(&results.takeovers), "ms");
    table.summary("detection", &summary(&results.takeovers, |t| t.detection_ms), "ms");
    table.summary("activation", &summary(&results.takeovers, |t| t.activation_ms), "ms");
    table.summary("gap, backup killed", &summary(&results.solos, |t| Some(t.gap_ms)), "ms");
    table.summary("time to protect", &Summary::of(&results.protect_ms), "ms");
    table.number("whole campaign", Some(seconds), "s");
    table
}

fn planned(args: &Args) -> (u64, u64) {
    let primary = args.primary_kills.saturating_sub(args.from);
    (
        primary,
        (args.primary_kills + args.backup_kills).saturating_sub(args.from) - primary,
    )
}

fn as_json(args: &Args, seed: u64, results: &Results, seconds: f64, error: Option<&anyhow::Error>) -> Value {
    let (primary_kills, backup_kills) = planned(args);
    json!({
        "seed": seed,
        "error": error.map(|e| format!("{e:#}")),
        "primary_kills": primary_kills,
        "takeovers": results.takeovers.len(),
        "backup_kills": backup_kills,
        "went_on_after_backup_kill": results.solos.len(),
        "acknowledged_writes": results.acknowledged,
        "pages_dirtied": results.dirtied,
        "lapses": results.lapses,
        "gap_ms": summary(&results.takeovers, |t| Some(t.gap_ms)),
        "gap_of_connections_ms": connection_gaps(&results.takeovers),
        "detection_ms": summary(&results.takeovers, |t| t.detection_ms),
        "activation_ms": summary(&results.takeovers, |t| t.activation_ms),
        "gap_backup_killed_ms": summary(&results.solos, |t| Some(t.gap_ms)),
        "protect_ms": Summary::of(&results.protect_ms),
        "loads": results.verdicts,
        "seconds": seconds,
    })
}
