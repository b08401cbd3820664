//! `ft enable`: begins the session, then waits and shows how far the first copy is.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use api::Client;
use api::options::ft as options;
use ft::config::{FtAudit, FtDurability, FtEnableConfig, FtInfo, FtLimits, FtProgress, FtState};

use super::info::bytes;
use crate::args::Enable;
use crate::output;

const POLL: Duration = Duration::from_millis(100);
/// Between two plain lines, where there is no terminal to draw on.
const PLAIN_INTERVAL: Duration = Duration::from_secs(2);
const BAR: usize = 20;

/// Does `ft enable`.
pub fn run(client: &Client, args: &Enable, json: bool) -> Result<()> {
    let config = FtEnableConfig {
        peer: super::address(&args.peer)?,
        arbiter: args.arbiter.as_deref().map(super::arbiter).transpose()?,
        insecure: args.insecure,
        tls: super::tls(&args.tls)?,
        durability: if args.durability == FtDurability::DiskOfBoth.name() {
            FtDurability::DiskOfBoth
        } else {
            FtDurability::MemoryOfBoth
        },
        shared_disks: args.shared_disks.clone(),
        audit: if args.audit == FtAudit::Repair.name() {
            FtAudit::Repair
        } else {
            FtAudit::Stop
        },
        limits: options::limits(&args.limits)?.apply(&FtLimits::default()),
        auto_reprotect: args.auto_reprotect,
        spares: args
            .spares
            .iter()
            .map(|spare| super::address(spare))
            .collect::<Result<_>>()?,
    };
    client.put_json("vm.ft-enable", &config)?;
    if args.no_wait {
        super::finish(
            json,
            "the first copy has begun; `ch-remote ft info` tells how far it is",
        );
        return Ok(());
    }
    let start = Instant::now();
    let mut progress = Progress::new(json);
    let info = loop {
        let info = client.ft_info()?;
        match info.state {
            FtState::Syncing | FtState::WaitingForArbiter => progress.show(&info),
            // The next host is tried.
            _ if info.reprotection.is_some() => progress.show(&info),
            _ => break info,
        }
        std::thread::sleep(POLL);
    };
    progress.end();
    if info.state != FtState::Protected {
        bail!("the VM is not protected: {}", why_not(&info));
    }
    if json {
        output::json(&info);
    } else {
        let sent = bytes(info.bytes_sent as f64);
        output::line(&format!(
            "protected after {:.1} s: {sent} sent, epoch {}, generation {}",
            start.elapsed().as_secs_f64(),
            info.epoch,
            info.generation
        ));
    }
    Ok(())
}

fn why_not(info: &FtInfo) -> String {
    match (&info.reason, info.state) {
        (Some(reason), _) => reason.clone(),
        (None, FtState::Disabled) => "fault tolerance was switched off meanwhile".into(),
        (None, state) => format!("the state is {}; the logs of both VMMs tell more", state.name()),
    }
}

/// Shows progress on standard error: one line drawn again and again on a terminal, plain lines elsewhere.
struct Progress {
    json: bool,
    terminal: bool,
    drawn: bool,
    last: Option<Instant>,
}

impl Progress {
    fn new(json: bool) -> Self {
        Self {
            json,
            terminal: std::io::stderr().is_terminal(),
            drawn: false,
            last: None,
        }
    }

    fn show(&mut self, info: &FtInfo) {
        if self.json || (!self.terminal && self.last.is_some_and(|last| last.elapsed() < PLAIN_INTERVAL)) {
            return;
        }
        let text = match info.state {
            // The first moments, before the size of anything is known.
            FtState::Syncing if info.progress.ram_bytes_total == 0 => return,
            FtState::Syncing => text(&info.progress, self.terminal),
            state if info.reprotection.is_some() => {
                let tries = info.reprotection.as_ref().map(super::info::search).unwrap_or_default();
                format!(
                    "{}: {}; {tries}",
                    state.name(),
                    info.reason.as_deref().unwrap_or_default()
                )
            }
            state => state.name().into(),
        };
        self.last = Some(Instant::now());
        let mut stderr = std::io::stderr().lock();
        // Progress that nobody can see changes nothing.
        let _ = if self.terminal {
            write!(stderr, "\r{text}\x1b[K")
        } else {
            writeln!(stderr, "{text}")
        };
        let _ = stderr.flush();
        self.drawn = true;
    }

    fn end(&self) {
        if self.drawn && self.terminal {
            let _ = write!(std::io::stderr().lock(), "\r\x1b[K");
        }
    }
}

fn text(progress: &FtProgress, bars: bool) -> String {
    let mut text = part("RAM", progress.ram_bytes_remaining, progress.ram_bytes_total, bars);
    if progress.disk_bytes_total > 0 {
        text.push_str("  ");
        text.push_str(&part(
            "disks",
            progress.disk_bytes_remaining,
            progress.disk_bytes_total,
            bars,
        ));
    }
    text.push_str(&format!("  {}/s", bytes(progress.rate)));
    if progress.rate > 0.0 && progress.seconds_left.is_finite() {
        let left = progress.seconds_left.clamp(0.0, 1e7).ceil() as u64;
        text.push_str(&format!("  {}:{:02} left", left / 60, left % 60));
    }
    text
}

fn part(name: &str, remaining: u64, total: u64, bar: bool) -> String {
    let done = total.saturating_sub(remaining);
    let share = if total == 0 { 1.0 } else { done as f64 / total as f64 };
    let bar = if bar {
        let filled = (share * BAR as f64) as usize;
        format!("[{}{}] ", "#".repeat(filled), ".".repeat(BAR - filled))
    } else {
        String::new()
    };
    format!("{name} {bar}{:3.0} % of {}", share * 100.0, bytes(total as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_in_words() {
        let progress = FtProgress {
            ram_bytes_remaining: 256 << 20,
            ram_bytes_total: 1 << 30,
            disk_bytes_remaining: 0,
            disk_bytes_total: 4 << 30,
            rate: (100u64 << 20) as f64,
            seconds_left: 62.3,
            ..Default::default()
        };
        assert_eq!(
            text(&progress, false),
            "RAM  75 % of 1.0 GiB  disks 100 % of 4.0 GiB  100.0 MiB/s  1:03 left"
        );
        assert!(text(&progress, true).contains("[###############.....]"));
        assert_eq!(text(&FtProgress::default(), false), "RAM 100 % of 0 B  0 B/s");
        let odd = FtProgress {
            ram_bytes_remaining: 5,
            rate: 1.0,
            seconds_left: f64::NAN,
            ..Default::default()
        };
        assert!(text(&odd, true).starts_with("RAM"));
    }
}
