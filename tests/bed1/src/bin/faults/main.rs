//! Faults on real VMMs, one after the other: what must happen, what happened, figures.

mod cases;
mod cycles;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use bed1::only::Only;
use clap::Parser;
use serde_json::json;

/// Tries faults on a protected VM under load and checks that at most one side runs it and that nothing is lost.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    only: Only,
    /// Cycles of enabling and disabling FT.
    #[arg(long, default_value_t = 50)]
    cycles: u32,
    /// Planned failovers in a row.
    #[arg(long, default_value_t = 200)]
    failovers: u32,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// Numbers of the cases that repeat something.
struct Counts {
    cycles: u32,
    failovers: u32,
}

/// What happened: a sentence, figures.
type Outcome = Result<(String, Vec<(&'static str, f64)>)>;

/// A fault.
struct Case {
    name: &'static str,
    must: &'static str,
    run: fn(&Counts) -> Outcome,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failed) => {
            eprintln!("{failed} faults did not end as they must");
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("faults: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<u32> {
    let all: Vec<Case> = cases::all().into_iter().chain(cycles::all()).collect();
    if args.only.list {
        for case in &all {
            println!("{:28} {}", case.name, case.must);
        }
        return Ok(0);
    }
    args.only.check("fault", all.iter().map(|case| case.name))?;
    let counts = Counts {
        cycles: args.cycles,
        failovers: args.failovers,
    };
    let mut failed = 0;
    let mut rows = Vec::new();
    for case in all.iter().filter(|case| args.only.has(case.name)) {
        let start = Instant::now();
        let outcome = (case.run)(&counts);
        let seconds = start.elapsed().as_secs_f64();
        let good = outcome.is_ok();
        let (happened, figures) = outcome.unwrap_or_else(|e| (format!("FAILED: {e:#}"), Vec::new()));
        failed += u32::from(!good);
        let numbers: Vec<String> = figures
            .iter()
            .map(|(name, value)| format!("{name} {value:.1}"))
            .collect();
        if !args.json {
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
    let total = rows.len();
    if args.json {
        println!("{:#}", json!(rows));
    } else {
        println!("{} of {total} faults ended as they must", total as u32 - failed);
    }
    Ok(failed)
}
