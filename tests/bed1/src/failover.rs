//! Kills under load, and the times around them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::loads::Loads;
use crate::pair::{Bed, Host, Side};

/// Hang guard of a takeover.
pub const TAKEOVER_LIMIT: Duration = Duration::from_secs(30);

/// What a kill looked like from outside and inside.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Takeover {
    /// Longest time between two answers on any connection around the kill.
    pub gap_ms: f64,
    /// The same of each connection, by load.
    pub gaps_ms: Vec<(String, Vec<f64>)>,
    /// From the last sign of life of the primary to its detected loss, as the backup says.
    pub detection_ms: Option<f64>,
    /// From detection to the resumed guest, as the backup says.
    pub activation_ms: Option<f64>,
    /// From the kill to the survivor's report that it runs alone, as seen from outside (polled).
    pub solo_ms: f64,
}

impl Takeover {
    /// The load with the longest gap.
    pub fn slowest(&self) -> &str {
        let slowest = self.gaps_ms.iter().find(|(_, gaps)| gaps.contains(&self.gap_ms));
        slowest.map_or("no load", |(name, _)| name)
    }

    /// The gap of each connection, all loads together.
    pub fn connections_ms(&self) -> impl Iterator<Item = f64> {
        self.gaps_ms.iter().flat_map(|(_, gaps)| gaps.iter().copied())
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Kills `victim`, waits until `survivor` runs alone and every connection has answers again.
pub fn kill(victim: &mut Host, survivor: &mut Host, loads: &Loads) -> Result<Takeover> {
    let moment = victim.vmm.kill()?;
    survivor.vmm.wait_ft_state("solo", TAKEOVER_LIMIT)?;
    let solo_ms = ms(moment.elapsed());
    after(moment, survivor, loads).map(|takeover| Takeover { solo_ms, ..takeover })
}

/// The times around a loss at `moment`, once `survivor` runs the VM.
pub fn after(moment: Instant, survivor: &mut Host, loads: &Loads) -> Result<Takeover> {
    let progress = loads.wait_progress(5);
    progress.with_context(|| {
        format!(
            "after the loss of the other side; {}: {}",
            survivor.vmm.name,
            survivor.vmm.tail()
        )
    })?;
    let gaps = loads.gaps_since(moment).into_iter();
    let info = survivor.vmm.ft_info()?;
    let mut takeover = Takeover {
        gaps_ms: gaps
            .map(|(name, gaps)| (name, gaps.into_iter().map(ms).collect()))
            .collect(),
        detection_ms: info["detection_ms"].as_f64(),
        activation_ms: info["activation_ms"].as_f64(),
        ..Takeover::default()
    };
    takeover.gap_ms = takeover.connections_ms().fold(0.0, f64::max);
    Ok(takeover)
}

/// Starts a fresh backup on `side` and protects `primary` by it. The backup's disk is what was left there.
pub fn protect_again(bed: &mut Bed, primary: &mut Host, side: Side) -> Result<(Host, Duration)> {
    let mut backup = bed.backup(side)?;
    let time = bed.protect(primary, &mut backup)?;
    Ok((backup, time))
}
