//! Figures of the Debian guest on our VMM beside QEMU's.

use anyhow::Result;
use clap::Args;

/// Options of `scripts/bed2 compare`.
#[derive(Args)]
pub struct Options {
    /// Runs of each VMM, in alternation
    #[arg(long, default_value_t = 3)]
    pub runs: u32,
}

/// Measures and prints.
pub fn run(_options: &Options) -> Result<()> {
    anyhow::bail!("not there")
}
