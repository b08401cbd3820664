//! What fault tolerance costs: the same guest under the same load with FT off and on, in turns, in one go.

mod measure;
mod page;
mod suite;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use bed1::only::Only;
use bed1::report::Table;
use clap::Parser;
use serde_json::json;

use measure::Outcome;

/// Measures what FT costs, and what it does, by load.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    only: Only,
    /// Times that FT is off and on for each load.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Seconds of each time.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Takeovers after a kill, and after silence; 0: none.
    #[arg(long, default_value_t = 10)]
    failovers: u32,
    /// Limits of FT as KEY=VALUE, as for `ch-remote ft enable`.
    #[arg(long, value_name = "KEY=VALUE", num_args = 1..)]
    limits: Vec<String>,
    /// The log channel is TLS.
    #[arg(long)]
    tls: bool,
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
        return Ok(());
    }
    args.only.check("load", all.iter().map(|load| load.name))?;
    let mut outcomes = Vec::new();
    for load in all.iter().filter(|load| args.only.has(load.name)) {
        eprintln!("==> {}: {}", load.name, load.what);
        let outcome = measure::run(load, args).with_context(|| load.name)?;
        println!("{}\n{}", load.name, outcome.table());
        outcomes.push(outcome);
    }
    let gaps = if args.failovers > 0 && args.only.everything() {
        eprintln!("==> failovers");
        let gaps = measure::gaps(args.failovers)?;
        let mut table = Table::default();
        gaps.rows(&mut table);
        println!("failovers\n{table}");
        Some(gaps)
    } else {
        None
    };
    let figures = json!({
        "rounds": args.rounds,
        "seconds": args.seconds,
        "tls": args.tls,
        "limits": args.limits,
        "loads": outcomes.iter().map(Outcome::json).collect::<Vec<_>>(),
        "failovers": gaps,
    });
    if let Some(path) = &args.json {
        std::fs::write(path, format!("{figures:#}")).with_context(|| path.display().to_string())?;
    }
    if let Some(path) = &args.html {
        std::fs::write(path, page::html(&outcomes, gaps.as_ref())).with_context(|| path.display().to_string())?;
    }
    Ok(())
}
