//! A protected VM survives the killing of its primary, with figures.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bed1::failover::{self, Takeover};
use bed1::loads::{self, Loads};
use bed1::pair::{Bed, Options, Side};
use bed1::report::{self, Table};
use clap::Parser;
use load::Verdict;
use serde_json::{Value, json};

/// Protects a VM, kills its primary with SIGKILL under load, and prints what clients saw.
#[derive(Parser)]
struct Args {
    /// Seconds of load before the kill, and again after it.
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// Number of vCPUs of the guest.
    #[arg(long, default_value_t = 2)]
    vcpus: u32,
    /// RAM of the guest in MiB.
    #[arg(long, default_value_t = 256)]
    memory_mib: u64,
    /// Silence after which the other side counts as dead, in ms.
    #[arg(long, default_value_t = 500)]
    heartbeat_timeout_ms: u32,
    /// Protects the log channel by TLS.
    #[arg(long)]
    tls: bool,
    /// Prints the figures as JSON.
    #[arg(long)]
    json: bool,
}

/// What the disk check says when nothing is wrong.
const EQUAL: &str = "equal to the acknowledged writes";

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("demo: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn say(text: &str) {
    eprintln!("==> {text}");
}

struct Outcome {
    before: Vec<Verdict>,
    protected: Vec<Verdict>,
    end: Vec<Verdict>,
    info: Value,
    protected_s: f64,
    protect_ms: f64,
    takeover: Takeover,
    acknowledged: u64,
    unacknowledged: usize,
    /// Acknowledged writes that are not on the survivor's disk.
    lost: u64,
    /// What the disk check says.
    disk: String,
    dirty_errors: u64,
}

fn run(args: &Args) -> Result<bool> {
    let mut bed = Bed::new(Options {
        vcpus: args.vcpus,
        memory_mib: args.memory_mib,
        heartbeat_timeout_ms: args.heartbeat_timeout_ms,
        tls: args.tls,
        ..Options::default()
    })?;
    let outcome = outcome(args, &mut bed);
    if outcome.is_err() {
        eprintln!("logs and disks are kept in {}", bed.keep().display());
    }
    let outcome = outcome?;
    let good = outcome.end.iter().all(Verdict::good)
        && outcome.unacknowledged == 0
        && outcome.dirty_errors == 0
        && outcome.disk.starts_with(EQUAL);
    if args.json {
        println!("{:#}", as_json(&outcome, good))
    } else {
        print!("{}", as_table(&outcome))
    }
    eprintln!("{}", if good { "nothing was lost" } else { "SOMETHING WAS LOST" });
    Ok(good)
}

fn outcome(args: &Args, bed: &mut Bed) -> Result<Outcome> {
    let time = Duration::from_secs(args.seconds.max(1));
    say(&format!(
        "host a: booting the guest ({} vCPUs, {} MiB)",
        args.vcpus, args.memory_mib
    ));
    let mut primary = bed.boot(Side::A)?;
    say("clients: key-value store, echo, bulk, memory dirtying");
    let model = loads::model(bed);
    let mut loads = Loads::start(bed, &model, &loads::Options::everything(1))?;
    std::thread::sleep(time / 2);
    let before = loads.verdicts();

    say("host b: waiting for a primary; ft enable on host a");
    let mut backup = bed.backup(Side::B)?;
    let protect_ms = protect(bed, &mut primary, &mut backup)?;
    loads.new_phase();
    let since = Instant::now();
    say(&format!("protected; load for {} s", time.as_secs()));
    std::thread::sleep(time);
    let info = primary.vmm.ft_info()?;
    let (protected, protected_s) = (loads.verdicts(), since.elapsed().as_secs_f64());

    say("SIGKILL of the primary");
    let takeover = failover::kill(&mut primary, &mut backup, &loads)?;
    say(&format!("host b runs the VM; load for {} s more", time.as_secs()));
    std::thread::sleep(time);
    loads.pause()?;
    loads.check_gets()?;
    let (lost, disk) = match loads.check_disk(&backup.disk) {
        Ok(report) => (0, format!("{EQUAL} ({} records)", report.acknowledged)),
        Err(e) => match e.downcast_ref::<load::model::Error>() {
            Some(load::model::Error::Different { lost, .. }) => (*lost, format!("DIFFERENT: {e:#}")),
            _ => return Err(e),
        },
    };
    let dirty_errors = loads.control.status()?.dirty_errors;
    loads.resume();
    let end = loads.stop()?;
    let (acknowledged, unacknowledged) = {
        let model = load::kv::lock(&model);
        (model.acknowledged(), model.unacknowledged())
    };
    Ok(Outcome {
        before,
        protected,
        end,
        info,
        protected_s,
        protect_ms,
        takeover,
        acknowledged,
        unacknowledged,
        lost,
        disk,
        dirty_errors,
    })
}

/// `ft enable` as an operator would call it, with its progress on this terminal.
fn protect(bed: &Bed, primary: &mut bed1::pair::Host, backup: &mut bed1::pair::Host) -> Result<f64> {
    let start = Instant::now();
    let args = bed.enable_args(backup);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let enabled = primary.vmm.remote_shown(&args);
    enabled.with_context(|| format!("the backup: {}", backup.vmm.tail()))?;
    bed1::pair::wait_protected(primary, backup)?;
    Ok(start.elapsed().as_secs_f64() * 1000.0)
}

fn sum(verdicts: &[Verdict], f: impl Fn(&Verdict) -> u64) -> u64 {
    verdicts.iter().map(f).sum()
}

fn rates(outcome: &Outcome) -> (f64, u64) {
    let epochs = outcome.info["epochs_total"].as_f64().unwrap_or_default();
    (
        epochs / outcome.protected_s,
        outcome.info["bytes_sent"].as_u64().unwrap_or_default(),
    )
}

fn as_json(outcome: &Outcome, good: bool) -> Value {
    let (epochs_per_s, bytes_replicated) = rates(outcome);
    json!({
        "good": good,
        "connections": sum(&outcome.end, |v| v.connections),
        "connections_kept": sum(&outcome.end, |v| v.connections_kept),
        "acknowledged_writes": outcome.acknowledged,
        "acknowledged_writes_lost": outcome.lost,
        "disk": outcome.disk,
        "stream_errors": sum(&outcome.end, |v| v.failed),
        "ram_errors": outcome.dirty_errors,
        "takeover": outcome.takeover,
        "protect_ms": outcome.protect_ms,
        "epochs_per_s": epochs_per_s,
        "bytes_replicated": bytes_replicated,
        "unprotected": outcome.before,
        "protected": outcome.protected,
        "whole_run": outcome.end,
        "ft_info_before_kill": outcome.info,
    })
}

fn as_table(outcome: &Outcome) -> Table {
    let mut table = Table::default();
    let connections = sum(&outcome.end, |v| v.connections);
    let kept = sum(&outcome.end, |v| v.connections_kept);
    table.row("connections kept", format!("{kept} of {connections}"));
    let lost = if outcome.disk.starts_with("equal") { "0" } else { "SOME" };
    table.row(
        "acknowledged writes lost",
        format!("{lost} of {}", outcome.acknowledged),
    );
    table.row("disk of the survivor", outcome.disk.clone());
    table.row("stream errors", sum(&outcome.end, |v| v.failed).to_string());
    table.row("wrong pages of RAM", outcome.dirty_errors.to_string());
    table.number("client-visible gap", Some(outcome.takeover.gap_ms), "ms");
    for (name, gaps) in &outcome.takeover.gaps_ms {
        let longest = gaps.iter().copied().fold(0.0, f64::max);
        table.number(&format!("    {name}"), Some(longest), "ms");
    }
    table.number("detection", outcome.takeover.detection_ms, "ms");
    table.number("activation", outcome.takeover.activation_ms, "ms");
    table.number("time to protect", Some(outcome.protect_ms), "ms");
    let (epochs_per_s, bytes_replicated) = rates(outcome);
    table.number("epochs/s", Some(epochs_per_s), "");
    let stat = |name: &str| {
        let value = |what: &str| outcome.info[name][what].as_f64().unwrap_or_default();
        format!("mean {:.2}  p99 {:.2}", value("mean"), value("p99"))
    };
    table.row("pause per epoch", format!("{} ms", stat("pause_ms")));
    table.row("added latency", format!("{} ms", stat("added_latency_ms")));
    table.row("dirty pages per epoch", stat("dirty_pages"));
    table.row("bytes replicated", report::bytes(bytes_replicated));
    for (before, protected) in outcome.before.iter().zip(&outcome.protected) {
        let (b, p) = (&before.latency_ms, &protected.latency_ms);
        if b.count > 0 {
            let what = format!("latency {} unprotected / protected", before.name);
            table.row(
                what,
                format!(
                    "median {:.2} / {:.2}  p99 {:.2} / {:.2} ms",
                    b.median, p.median, b.p99, p.p99
                ),
            );
        }
    }
    table
}
