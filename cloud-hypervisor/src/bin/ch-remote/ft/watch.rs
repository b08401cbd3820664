//! `ft watch`: a line of figures per interval, and every change of state.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use api::Client;
use ft::config::{FtInfo, FtState};

use super::info::bytes;
use crate::output;

/// Lines between two headings.
const HEADING_EVERY: u32 = 20;
/// How often the state is looked at between two lines.
const POLL: Duration = Duration::from_millis(100);

/// Watches until interrupted, or until the VMM is gone.
pub fn run(client: &Client, interval: f64, json: bool) -> Result<()> {
    let interval = Duration::from_secs_f64(interval);
    let mut before: Option<(Instant, FtInfo)> = None;
    let mut state: Option<FtState> = None;
    let mut lines = 0;
    loop {
        let info = client.ft_info().context("the watching ends")?;
        let changed = state.replace(info.state) != Some(info.state);
        if changed && !json {
            let reason = info.reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default();
            output::line(&format!("state {}{reason}", info.state.name()));
        }
        let due = before.as_ref().is_none_or(|(at, _)| at.elapsed() >= interval);
        if due || (changed && json) {
            if json {
                output::line(&serde_json::to_string(&info)?);
            } else {
                if lines % HEADING_EVERY == 0 {
                    output::line(&heading());
                }
                lines += 1;
                output::line(&figures(&info, before.as_ref().map(|(at, info)| (at.elapsed(), info))));
            }
            before = Some((Instant::now(), info));
        }
        std::thread::sleep(POLL.min(interval));
    }
}

fn heading() -> String {
    format!(
        "{:>12} {:>10} {:>9} {:>10} {:>10} {:>10} {:>11} {:>10} {:>8} {:>12}",
        "epoch", "committed", "epochs/s", "length ms", "pause ms", "pages", "sent/s", "lag", "waiting", "added ms p99"
    )
}

fn figures(info: &FtInfo, before: Option<(Duration, &FtInfo)>) -> String {
    let per_second = |now: u64, then: fn(&FtInfo) -> u64| {
        before.map_or(0.0, |(elapsed, info)| {
            now.saturating_sub(then(info)) as f64 / elapsed.as_secs_f64().max(1e-3)
        })
    };
    format!(
        "{:>12} {:>10} {:>9.1} {:>10.2} {:>10.3} {:>10.0} {:>11} {:>10} {:>8} {:>12.3}",
        info.epoch,
        info.committed,
        per_second(info.epochs_total, |i| i.epochs_total),
        info.epoch_ms.last,
        info.pause_ms.last,
        info.dirty_pages.last,
        bytes(per_second(info.bytes_sent, |i| i.bytes_sent)),
        bytes(info.lag_bytes as f64),
        info.outputs_waiting,
        info.added_latency_ms.p99
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_their_heading() {
        let mut info = FtInfo::disabled();
        info.epochs_total = 30;
        let before = FtInfo::disabled();
        let line = figures(&info, Some((Duration::from_secs(2), &before)));
        assert!(line.contains(" 15.0 "), "{line}");
        assert_eq!(line.len(), heading().len());
    }
}
