//! Faults on real VMMs, one after the other: what must happen, what happened, figures.

mod cases;
mod cycles;

use std::process::ExitCode;

use anyhow::Result;
use bed1::table::{Outcome, Table};
use clap::Parser;

/// Tries faults on a protected VM under load and checks that at most one side runs it and that nothing is lost.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    table: Table,
    /// Cycles of enabling and disabling FT.
    #[arg(long, default_value_t = 50)]
    cycles: u32,
    /// Planned failovers in a row.
    #[arg(long, default_value_t = 200)]
    failovers: u32,
}

/// Numbers of the cases that repeat something.
struct Counts {
    cycles: u32,
    failovers: u32,
}

type Case = bed1::table::Case<Counts>;

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

fn run(args: &Args) -> Result<usize> {
    let all: Vec<Case> = cases::all().into_iter().chain(cycles::all()).collect();
    let counts = Counts {
        cycles: args.cycles,
        failovers: args.failovers,
    };
    args.table.run(&all, &counts)
}
