//! This build with FT never asked for, beside a build without the feature `ft`: a guest boots in each in turns.

use std::path::Path;

use anyhow::{Context, Result};
use bed1::process::binary;
use bed1::report::Table;
use load::stats::Summary;
use serde_json::{Value, json};

use crate::measure::{self, Seen, spread};
use crate::suite::Workload;
use crate::{Args, page};

/// Loads that are measured unless others are named.
const LOADS: [&str; 5] = ["echo-1", "bulk-out", "bulk-in", "kv", "dirty-100-256"];

/// What was seen of a load, in both builds.
pub struct Pair {
    name: &'static str,
    /// Of this build and the plain one, round by round.
    rounds: Vec<[Seen; 2]>,
}

/// Measures the loads with this build and with `plain`; each is printed when it is there.
pub fn run(all: &[Workload], args: &Args, plain: &Path) -> Result<Vec<Pair>> {
    let ours = binary("cloud-hypervisor")?;
    let plain = plain.canonicalize().with_context(|| plain.display().to_string())?;
    let mut pairs = Vec::new();
    for load in all.iter().filter(|load| args.only.has_of(&LOADS, load.name)) {
        eprintln!("==> {}: {}", load.name, load.what);
        let mut rounds = Vec::new();
        for round in 0..args.setup.rounds.max(1) {
            let one = |program: &Path| {
                let figures = measure::without_ft(load, &args.setup, program);
                figures.with_context(|| format!("{}: {}", load.name, program.display()))
            };
            // Who is first takes turns too.
            rounds.push(if round % 2 == 0 {
                [one(&ours)?, one(&plain)?]
            } else {
                let second = one(&plain)?;
                [one(&ours)?, second]
            });
        }
        let pair = Pair {
            name: load.name,
            rounds,
        };
        println!("{}\n{}", load.name, pair.table());
        pairs.push(pair);
    }
    Ok(pairs)
}

impl Pair {
    fn figures(&self) -> Vec<(&'static str, Summary)> {
        let of = |f: &dyn Fn(&[Seen; 2]) -> f64| Summary::of(&self.rounds.iter().map(f).collect::<Vec<_>>());
        let mut figures = vec![
            ("rate, with the feature ft", of(&|[ours, _]| ours.rate)),
            ("rate, without", of(&|[_, plain]| plain.rate)),
            ("with / without", of(&|[ours, plain]| ours.rate / plain.rate)),
        ];
        // Streams and memory have none.
        if self.rounds.iter().flatten().any(|one| one.latency[0] > 0.0) {
            figures.extend([
                ("latency p50 (ms), with", of(&|[ours, _]| ours.latency[0])),
                ("latency p50 (ms), without", of(&|[_, plain]| plain.latency[0])),
                (
                    "with - without",
                    of(&|[ours, plain]| ours.latency[0] - plain.latency[0]),
                ),
            ]);
        }
        figures
    }

    fn table(&self) -> Table {
        let mut table = Table::default();
        for (what, summary) in self.figures() {
            table.row(what, spread(&summary));
        }
        table
    }
}

/// For programs.
pub fn json(pairs: &[Pair]) -> Value {
    let of = |pair: &Pair| json!({"name": pair.name, "figures": measure::spreads(&pair.figures())});
    json!({"plain": pairs.iter().map(of).collect::<Vec<_>>()})
}

/// The page.
pub fn html(pairs: &[Pair]) -> String {
    page::tables(pairs.iter().map(|pair| (pair.name, pair.table())))
}
