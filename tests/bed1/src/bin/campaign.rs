//! Kills the primary, and then the backup, at random moments under load, again and again, and checks every byte.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bed1::failover::{self, Takeover};
use bed1::loads::{self, Loads};
use bed1::pair::{Bed, Host, Options, Side};
use bed1::report::Table;
use clap::Parser;
use load::Verdict;
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Primary,
    Backup,
}

#[derive(Default)]
struct Results {
    takeovers: Vec<Takeover>,
    solos: Vec<Takeover>,
    protect_ms: Vec<f64>,
    verdicts: Vec<Verdict>,
    acknowledged: u64,
    dirtied: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |d| d.as_millis() as u64 % 1_000_000_007)
    });
    let start = Instant::now();
    let mut results = Results::default();
    let outcome = run(&args, seed, &mut results);
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
        let mut chain = Chain::start(&mut bed, seed.wrapping_add(kill), results);
        let outcome = match &mut chain {
            Err(_) => Ok(()),
            Ok(chain) => (kill..last).try_for_each(|kill| {
                let what = victim(kill);
                let round = chain.round(what, kill, seed, kill + 1 < last);
                round.with_context(|| format!("kill {kill} (of the {what:?}), to replay: --seed {seed} --from {kill}"))
            }),
        };
        let outcome = outcome.and_then(|()| chain.context("start").and_then(Chain::end));
        if outcome.is_err() || args.keep {
            eprintln!("logs and disks are kept in {}", bed.keep().display());
        }
        outcome?;
        kill = last;
    }
    Ok(())
}

/// One guest that lives through kills; roles and hosts swap.
struct Chain<'a> {
    bed: &'a mut Bed,
    primary: Host,
    backup: Host,
    loads: Loads,
    results: &'a mut Results,
}

impl<'a> Chain<'a> {
    fn start(bed: &'a mut Bed, seed: u64, results: &'a mut Results) -> Result<Self> {
        let mut primary = bed.boot(Side::A)?;
        let model = loads::model(bed);
        let loads = Loads::start(bed, &model, &loads::Options::everything(seed))?;
        let (backup, time) = failover::protect_again(bed, &mut primary, Side::B)?;
        results.protect_ms.push(time.as_secs_f64() * 1000.0);
        Ok(Self {
            bed,
            primary,
            backup,
            loads,
            results,
        })
    }

    fn round(&mut self, victim: Victim, kill: u64, seed: u64, go_on: bool) -> Result<()> {
        let delay = Rng::new(seed ^ (kill << 20)).within(50..1500);
        self.loads.new_phase();
        std::thread::sleep(Duration::from_millis(delay));
        self.loads.check().context("before the kill")?;
        let takeover = match victim {
            Victim::Primary => failover::kill(&mut self.primary, &mut self.backup, &self.loads)?,
            Victim::Backup => failover::kill(&mut self.backup, &mut self.primary, &self.loads)?,
        };
        if victim == Victim::Primary {
            std::mem::swap(&mut self.primary, &mut self.backup);
        }
        // `primary` is the survivor now, `backup` the dead one.
        let records = self.verify().context("after the kill")?;
        let mut line = format!(
            "kill {kill}: {victim:?} on host {} after {delay} ms: gap {:.0} ms, detection {}, activation {}, {records} records",
            self.backup.side.name(),
            takeover.gap_ms,
            text(takeover.detection_ms),
            text(takeover.activation_ms),
        );
        match victim {
            Victim::Primary => self.results.takeovers.push(takeover),
            Victim::Backup => self.results.solos.push(takeover),
        }
        if go_on || victim == Victim::Backup {
            let (new, time) = failover::protect_again(self.bed, &mut self.primary, self.backup.side)?;
            let old = std::mem::replace(&mut self.backup, new);
            self.bed.forget_files(&old);
            let ms = time.as_secs_f64() * 1000.0;
            line.push_str(&format!(", protected again in {ms:.0} ms"));
            self.results.protect_ms.push(ms);
        }
        eprintln!("{line}");
        Ok(())
    }

    /// With every request answered: the survivor's disk equals the model, the guest's RAM its own.
    fn verify(&mut self) -> Result<u64> {
        self.loads.pause()?;
        let report = self.loads.check_disk(&self.primary.disk)?;
        self.loads.check_guest()?;
        self.loads.resume();
        Ok(report.acknowledged)
    }

    fn end(mut self) -> Result<()> {
        self.loads.pause()?;
        self.loads.check_disk(&self.primary.disk)?;
        if self.primary.vmm.ft_state()? == "protected" {
            self.loads
                .check_disk(&self.backup.disk)
                .context("the protected VM's backup")?;
        }
        self.loads.check_gets()?;
        self.results.dirtied += self.loads.check_guest()?.dirtied;
        self.results.acknowledged += load::kv::lock(&self.loads.model).acknowledged();
        self.loads.resume();
        let verdicts = self.loads.stop()?;
        let bad: Vec<_> = verdicts
            .iter()
            .filter(|v| !v.good())
            .map(|v| format!("{}: {:?}", v.name, v.failures))
            .collect();
        self.results.verdicts.extend(verdicts);
        anyhow::ensure!(bad.is_empty(), "loads failed: {}", bad.join("; "));
        Ok(())
    }
}

fn text(ms: Option<f64>) -> String {
    ms.map_or("not reported".into(), |ms| format!("{ms:.0} ms"))
}

fn summary(takeovers: &[Takeover], f: impl Fn(&Takeover) -> Option<f64>) -> Summary {
    Summary::of(&takeovers.iter().filter_map(f).collect::<Vec<_>>())
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
        "gap_ms": summary(&results.takeovers, |t| Some(t.gap_ms)),
        "detection_ms": summary(&results.takeovers, |t| t.detection_ms),
        "activation_ms": summary(&results.takeovers, |t| t.activation_ms),
        "gap_backup_killed_ms": summary(&results.solos, |t| Some(t.gap_ms)),
        "protect_ms": Summary::of(&results.protect_ms),
        "loads": results.verdicts,
        "seconds": seconds,
    })
}
