//! FT beside QEMU's COLO: the same guest and load in this VMM with FT off and on, in QEMU alone, and in QEMU with COLO.

use std::path::Path;

use anyhow::{Context, Result};
use bed1::report::Table;
use load::stats::Summary;
use serde_json::{Value, json};

use crate::measure::{self, Seen, Setup, spread};
use crate::suite::Workload;
use crate::{Args, page};

/// Loads that are measured unless others are named. Those of the key-value store need a disk, which COLO has not here.
const LOADS: [&str; 7] = [
    "cpu",
    "dirty-100-256",
    "echo-1",
    "echo-32",
    "udp",
    "bulk-out",
    "bulk-in",
];

struct Round {
    /// This VMM, FT off and on.
    ours: [Seen; 2],
    qemu: Seen,
    /// And checkpoints per second; or why there is nothing.
    colo: Result<(Seen, f64), String>,
}

/// What was seen of a load.
pub struct Comparison {
    name: &'static str,
    rounds: Vec<Round>,
}

/// Measures the loads; each is printed when it is there.
pub fn run(all: &[Workload], args: &Args, program: &Path) -> Result<Vec<Comparison>> {
    let program = program.canonicalize().with_context(|| program.display().to_string())?;
    let setup = Setup {
        rounds: 1,
        ..args.setup.clone()
    };
    let mut comparisons = Vec::new();
    for load in all.iter().filter(|load| args.only.has_of(&LOADS, load.name)) {
        eprintln!("==> {}: {}", load.name, load.what);
        let round = |_| {
            let ours = measure::run(load, &setup)?.first().context("no round")?;
            let qemu = measure::under_qemu(load, &setup, &program)?;
            let colo = measure::under_colo(load, &setup, &program);
            let colo = colo.inspect_err(|e| eprintln!("    COLO: {e:#}"));
            Ok(Round {
                ours,
                qemu,
                colo: colo.map_err(|e| format!("{e:#}")),
            })
        };
        let rounds: Result<Vec<Round>> = (0..args.setup.rounds.max(1)).map(round).collect();
        let comparison = Comparison {
            name: load.name,
            rounds: rounds.context(load.name)?,
        };
        println!("{}\n{}", load.name, comparison.table());
        comparisons.push(comparison);
    }
    Ok(comparisons)
}

impl Comparison {
    fn figures(&self) -> Vec<(&'static str, Summary)> {
        let all = |f: &dyn Fn(&Round) -> f64| Summary::of(&self.rounds.iter().map(f).collect::<Vec<_>>());
        // Rounds in which COLO gave a figure.
        let colo = |f: &dyn Fn(&Round, Seen, f64) -> f64| {
            let one = |round: &Round| Some(f(round, round.colo.as_ref().ok()?.0, round.colo.as_ref().ok()?.1));
            Summary::of(&self.rounds.iter().filter_map(one).collect::<Vec<_>>())
        };
        let mut figures = vec![
            ("rate, FT off", all(&|round| round.ours[0].rate)),
            ("rate, FT on", all(&|round| round.ours[1].rate)),
            ("FT on / off", all(&|round| round.ours[1].rate / round.ours[0].rate)),
            ("rate, QEMU", all(&|round| round.qemu.rate)),
            ("rate, COLO", colo(&|_, seen, _| seen.rate)),
            ("COLO / QEMU", colo(&|round, seen, _| seen.rate / round.qemu.rate)),
            ("COLO, checkpoints per s", colo(&|_, _, checkpoints| checkpoints)),
        ];
        // Streams and memory have none.
        if self.rounds.iter().any(|round| round.qemu.latency[0] > 0.0) {
            let ours = |at: usize| all(&|round| round.ours[1].latency[at] - round.ours[0].latency[at]);
            let theirs = |at: usize| colo(&|round, seen, _| seen.latency[at] - round.qemu.latency[at]);
            figures.extend([
                ("FT, added latency p50 (ms)", ours(0)),
                ("FT, added latency p99", ours(1)),
                ("COLO, added latency p50 (ms)", theirs(0)),
                ("COLO, added latency p99", theirs(1)),
                ("FT, longest latency", all(&|round| round.ours[1].latency[2])),
                ("COLO, longest latency", colo(&|_, seen, _| seen.latency[2])),
            ]);
        }
        figures
    }

    fn failures(&self) -> impl Iterator<Item = &str> {
        self.rounds
            .iter()
            .filter_map(|round| round.colo.as_ref().err())
            .map(String::as_str)
    }

    fn table(&self) -> Table {
        let mut table = Table::default();
        for (what, summary) in self.figures() {
            table.row(what, spread(&summary));
        }
        for failure in self.failures() {
            table.row("COLO gave no figure", failure);
        }
        table
    }
}

/// For programs.
pub fn json(comparisons: &[Comparison]) -> Value {
    let of = |comparison: &Comparison| {
        let failures: Vec<&str> = comparison.failures().collect();
        json!({"name": comparison.name, "figures": measure::spreads(&comparison.figures()), "colo_failures": failures})
    };
    json!({"colo": comparisons.iter().map(of).collect::<Vec<_>>()})
}

/// The page.
pub fn html(comparisons: &[Comparison]) -> String {
    page::tables(
        comparisons
            .iter()
            .map(|comparison| (comparison.name, comparison.table())),
    )
}
