//! A table of cases, run one after the other: what must happen, what happened, figures.

use std::time::Instant;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use crate::only::Only;

/// What happened: a sentence, figures.
pub type Outcome = Result<(String, Vec<(&'static str, f64)>)>;

/// A case.
pub struct Case<Options> {
    /// Its name on the command line.
    pub name: &'static str,
    /// What must happen.
    pub must: &'static str,
    /// Makes it happen; an error when it ended otherwise.
    pub run: fn(&Options) -> Outcome,
}

/// Which cases, and how they are shown.
#[derive(Debug, Args)]
pub struct Table {
    #[command(flatten)]
    only: Only,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

impl Table {
    /// Runs the chosen cases and prints the table; the number of those that did not end as they must.
    pub fn run<Options>(&self, all: &[Case<Options>], options: &Options) -> Result<usize> {
        if self.only.list {
            for case in all {
                println!("{:28} {}", case.name, case.must);
            }
            return Ok(0);
        }
        self.only.check("fault", all.iter().map(|case| case.name))?;
        let mut failed = 0;
        let mut rows = Vec::new();
        for case in all.iter().filter(|case| self.only.has(case.name)) {
            let start = Instant::now();
            let outcome = (case.run)(options);
            let seconds = start.elapsed().as_secs_f64();
            let good = outcome.is_ok();
            let (happened, figures) = outcome.unwrap_or_else(|e| (format!("FAILED: {e:#}"), Vec::new()));
            failed += usize::from(!good);
            let numbers: Vec<String> = figures
                .iter()
                .map(|(name, value)| format!("{name} {value:.1}"))
                .collect();
            if !self.json {
                println!(
                    "{}  {} ({seconds:.0} s)",
                    if good { "ok    " } else { "FAILED" },
                    case.name
                );
                println!("        must      {}", case.must);
                println!("        happened  {happened}");
                if !numbers.is_empty() {
                    println!("        figures   {}", numbers.join(", "));
                }
            }
            rows.push(json!({
                "fault": case.name,
                "must": case.must,
                "good": good,
                "happened": happened,
                "figures": figures.into_iter().map(|(name, value)| (name.to_string(), json!(value))).collect::<serde_json::Map<_, _>>(),
                "seconds": seconds,
            }));
        }
        if self.json {
            println!("{:#}", json!(rows));
        } else {
            println!("{} of {} faults ended as they must", rows.len() - failed, rows.len());
        }
        Ok(failed)
    }
}
