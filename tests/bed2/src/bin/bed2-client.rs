//! Runs on a nested host: holds sessions with the Debian guest and reports what became of them.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bed2::client::{self, Progress};
use clap::{Parser, Subcommand};

/// Client of the Debian guest in bed 2.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Hold redis, echo and ssh sessions until FILE exists; write the report to FILE.json
    ///
    /// Prints a line with each session's number of answers now and then.
    Hold {
        /// The guest's address
        guest: String,
        /// The file that ends the sessions
        file: PathBuf,
        /// Longest time in seconds
        #[arg(long, default_value_t = 300)]
        limit: u64,
    },
    /// Check that the guest has every acknowledged write of a report
    Verify {
        /// The guest's address
        guest: String,
        /// The report
        report: PathBuf,
    },
    /// Print how many of the first acknowledged redis writes a freshly booted guest lacks, and the last one that it has
    Recovered {
        /// The guest's address
        guest: String,
        /// Number of acknowledged writes
        acknowledged: u64,
    },
}

/// Between two lines with the numbers of answers: what the last one does not tell counts as not acknowledged when the power
/// of this host is cut.
const TELLING: Duration = Duration::from_millis(20);

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Hold { guest, file, limit } => {
            let progress = Progress::default();
            let report = std::thread::scope(|scope| {
                scope.spawn(|| {
                    let start = Instant::now();
                    while !file.exists()
                        && !progress.stop.load(Ordering::Relaxed)
                        && start.elapsed() < Duration::from_secs(limit)
                    {
                        std::thread::sleep(TELLING);
                        let counts = progress.answered.each_ref().map(|count| count.load(Ordering::Relaxed));
                        println!("{} {} {}", counts[0], counts[1], counts[2]);
                    }
                    progress.stop.store(true, Ordering::Relaxed);
                });
                client::hold(&guest, &progress)
            });
            let text = serde_json::to_string_pretty(&report)?;
            fs::write(file.with_extension("json"), &text)?;
            report.check(1)
        }
        Command::Verify { guest, report } => {
            let text = fs::read_to_string(&report).with_context(|| report.display().to_string())?;
            client::verify(&guest, &serde_json::from_str(&text)?)
        }
        Command::Recovered { guest, acknowledged } => {
            let (missing, last) = client::recovered(&guest, acknowledged)?;
            println!("{missing} {last}");
            Ok(())
        }
    }
}
