//! One load with FT off and on in turns; the gaps of takeovers.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bed1::chain::{Chain, Results, Victim};
use bed1::colo::{self, Colo};
use bed1::loads::{self, Loads};
use bed1::pair::{Bed, Host, Options, Side};
use bed1::proxied::{LIMIT, Proxied};
use bed1::proxy::Proxy;
use bed1::report::Table;
use clap::Args;
use load::control::Status;
use load::stats::Summary;
use serde::Serialize;
use serde_json::{Value, json};

use crate::bound;
use crate::suite::{Metric, Workload};

/// Time that a change of FT is given before it is measured.
const SETTLE: Duration = Duration::from_millis(500);

/// The gap of a connection should not be above this.
const GAP_TARGET_MS: f64 = 60.0;

/// Guests with at least this much RAM, in MiB, get streams with buffers as large as Linux gives them: what a stream may
/// have under way bounds it when the other side's answers are held for an epoch.
const WIDE: u64 = 512;

/// How loads are measured.
#[derive(Debug, Clone, Args)]
pub struct Setup {
    /// Times that FT is off and on for each load.
    #[arg(long, default_value_t = 3)]
    pub rounds: u32,
    /// Seconds of each time.
    #[arg(long, default_value_t = 3.0)]
    pub seconds: f64,
    /// vCPUs of the guest.
    #[arg(long, default_value_t = 2)]
    pub vcpus: u32,
    /// RAM of the guest in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    pub memory: u64,
    /// Disks of the guest; it uses one.
    #[arg(long, default_value_t = 1)]
    pub disks: u32,
    /// Limits of FT as KEY=VALUE, as for `ch-remote ft enable`.
    #[arg(long, value_name = "KEY=VALUE", num_args = 1..)]
    pub limits: Vec<String>,
    /// The log channel is TLS.
    #[arg(long)]
    pub tls: bool,
    /// Microseconds that the log channel takes longer, each way: it goes through a proxy, with 0 too.
    #[arg(long, value_name = "US")]
    pub link_delay: Option<u64>,
    /// Most that the log channel carries each way, in Mbit/s, by the proxy; 0: no limit.
    #[arg(long, value_name = "MBIT")]
    pub link_rate: Option<u64>,
}

/// What was seen in one stretch of time.
#[derive(Debug, Clone, Default)]
struct Window {
    /// Of the metric, per second.
    rate: f64,
    /// In ms.
    latency: Summary,
    /// Processor seconds per second of the VMM that runs the VM, and of the backup.
    cpu: (f64, f64),
    /// `ft info` at its end.
    info: Option<Value>,
    /// Bytes on the log channel per second.
    sent: f64,
    /// Pages written by the guest's dirtier per second.
    dirtied: f64,
}

/// What clients saw of a load in one stretch of time.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// Of the metric, per second.
    pub rate: f64,
    /// Latency in ms: median, 99th percentile, longest; 0: the load has none.
    pub latency: [f64; 3],
}

impl Window {
    fn seen(&self) -> Seen {
        Seen {
            rate: self.rate,
            latency: [self.latency.median, self.latency.p99, self.latency.max],
        }
    }
}

/// Off and on, round by round.
pub struct Outcome {
    /// Name of the load.
    pub name: &'static str,
    /// In words.
    pub what: String,
    metric: Metric,
    off: Vec<Window>,
    on: Vec<Window>,
    /// MiB that the primary uses beyond guest RAM, off and on.
    memory: (f64, f64),
    /// Time from `ft enable` to protection, in ms.
    protect: Vec<f64>,
    /// Round trips of the log channel's network alone, in ms.
    round_trips: Summary,
    /// What the proxy adds to them, in ms.
    delay: f64,
    /// Bytes per second that the log channel's network carries when nothing else runs; of streams.
    carried: Summary,
    /// Time to copy one of as many pages as a stream writes, in ms.
    copied: Summary,
}

/// Pages that a stream writes in an epoch.
const STREAM_PAGES: usize = 1000;

/// Processor time of a process so far: that of its threads, in the scheduler's nanoseconds (proc_pid_schedstat(5)).
fn cpu(pid: u32) -> Result<Duration> {
    let mut nanoseconds = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        // A thread may end while they are listed.
        let Ok(stat) = std::fs::read_to_string(task.path().join("schedstat")) else {
            continue;
        };
        let spent = stat.split_whitespace().next().context("an empty schedstat")?;
        nanoseconds += spent.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}

struct Sample {
    at: Instant,
    status: Status,
    answers: u64,
    bytes: u64,
    cpu: (Duration, Duration),
    sent: u64,
}

/// Who runs the guest.
struct Running<'a> {
    /// The process, and that of the backup.
    pids: (u32, Option<u32>),
    /// The VMM that has FT, if it is to be asked about it.
    ft: Option<&'a Host>,
}

impl<'a> Running<'a> {
    fn pair(primary: &'a Host, backup: &Host) -> Self {
        Self {
            pids: (primary.vmm.pid(), Some(backup.vmm.pid())),
            ft: Some(primary),
        }
    }

    /// A process that has no FT.
    fn process(pid: u32) -> Self {
        Self {
            pids: (pid, None),
            ft: None,
        }
    }
}

fn sample(running: &Running<'_>, loads: &mut Loads) -> Result<Sample> {
    let verdicts = loads.verdicts();
    let sent = match running.ft {
        Some(host) => host.vmm.ft_info()?["bytes_sent"].as_u64(),
        None => None,
    };
    Ok(Sample {
        status: loads.control.status()?,
        at: Instant::now(),
        answers: verdicts.iter().map(|v| v.answers).sum(),
        bytes: verdicts.iter().map(|v| v.bytes).sum(),
        cpu: (cpu(running.pids.0)?, running.pids.1.map_or(Ok(Duration::ZERO), cpu)?),
        sent: sent.unwrap_or_default(),
    })
}

/// One stretch of `seconds`.
fn window(load: &Workload, running: &Running<'_>, loads: &mut Loads, seconds: f64) -> Result<Window> {
    std::thread::sleep(SETTLE);
    let before = sample(running, loads)?;
    loads.new_phase();
    std::thread::sleep(Duration::from_secs_f64(seconds));
    let verdicts = loads.verdicts();
    let after = sample(running, loads)?;
    loads.check()?;
    let time = (after.at - before.at).as_secs_f64();
    let rate = |before: u64, after: u64| after.saturating_sub(before) as f64 / time;
    let dirtied = rate(before.status.dirtied, after.status.dirtied);
    let used = |before: Duration, after: Duration| after.saturating_sub(before).as_secs_f64() / time;
    Ok(Window {
        rate: match load.metric {
            Metric::Burned => rate(before.status.burn, after.status.burn),
            Metric::Dirtied => dirtied,
            Metric::Answers => rate(before.answers, after.answers),
            Metric::Bytes => rate(before.bytes, after.bytes),
            Metric::Idle => 0.0,
        },
        latency: verdicts.first().map(|v| v.latency_ms).unwrap_or_default(),
        cpu: (used(before.cpu.0, after.cpu.0), used(before.cpu.1, after.cpu.1)),
        info: None,
        sent: rate(before.sent, after.sent),
        dirtied,
    })
}

fn bed(setup: &Setup, program: Option<PathBuf>) -> Result<Bed> {
    let wide = setup.memory >= WIDE;
    let bed = Bed::new(Options {
        vcpus: setup.vcpus,
        memory_mib: setup.memory,
        disk_mib: 64,
        idle_disks: setup.disks.saturating_sub(1),
        limits: setup.limits.clone(),
        tls: setup.tls,
        cmdline: if wide { "window=2048".into() } else { String::new() },
        program,
        ..Options::default()
    })?;
    bed.network.usual_buffers()?;
    Ok(bed)
}

/// A load on a guest that boots for it in the VMM `program`, which is not asked for FT.
pub fn without_ft(load: &Workload, setup: &Setup, program: &Path) -> Result<Seen> {
    let mut bed = bed(setup, Some(program.into()))?;
    let host = bed.boot(Side::A)?;
    on_its_own(load, setup, &bed, &Running::process(host.vmm.pid()))
}

/// The same in QEMU.
pub fn under_qemu(load: &Workload, setup: &Setup, program: &Path) -> Result<Seen> {
    let bed = bed(setup, None)?;
    let qemu = colo::alone(&bed, program)?;
    on_its_own(load, setup, &bed, &Running::process(qemu.pid()))
}

/// The same in QEMU with COLO, and checkpoints per second.
pub fn under_colo(load: &Workload, setup: &Setup, program: &Path) -> Result<(Seen, f64)> {
    let bed = bed(setup, None)?;
    let mut colo = Colo::boot(&bed, program)?;
    let (before, began) = (colo.checkpoints()?, Instant::now());
    let seen = on_its_own(load, setup, &bed, &Running::process(colo.pid()))?;
    let checkpoints = colo.checkpoints()? - before;
    Ok((seen, checkpoints as f64 / began.elapsed().as_secs_f64()))
}

fn on_its_own(load: &Workload, setup: &Setup, bed: &Bed, running: &Running<'_>) -> Result<Seen> {
    let mut loads = Loads::start(bed, &loads::model(bed), &load.loads)?;
    let window = window(load, running, &mut loads, setup.seconds)?;
    loads.check_guest()?;
    loads.stop()?;
    Ok(window.seen())
}

/// Puts a longer or slower link between the primary and `backup`, if that is wanted.
fn link(setup: &Setup, bed: &Bed, backup: &mut Host) -> Result<Option<Proxy>> {
    if setup.link_delay.or(setup.link_rate).is_none() {
        return Ok(None);
    }
    let proxy = Proxy::before(bed, backup)?;
    for direction in [proxy.forward(), proxy.back()] {
        direction.delay(Duration::from_micros(setup.link_delay.unwrap_or_default()));
        direction.rate(setup.link_rate.unwrap_or_default() * 125_000);
    }
    Ok(Some(proxy))
}

/// Measures a load.
pub fn run(load: &Workload, setup: &Setup) -> Result<Outcome> {
    let (rounds, seconds) = (setup.rounds.max(1), setup.seconds);
    let mut bed = bed(setup, None)?;
    let round_trips = bound::round_trips(&bed.network)?;
    let (carried, copied) = match load.metric {
        Metric::Bytes => (bound::carried(&bed.network)?, bound::copied(STREAM_PAGES)?),
        _ => Default::default(),
    };
    let mut primary = bed.boot(Side::A)?;
    let mut backup = bed.backup(Side::B)?;
    let _link = link(setup, &bed, &mut backup)?;
    let mut loads = Loads::start(&bed, &loads::model(&bed), &load.loads)?;
    let (mut off, mut on, mut memory, mut protect) = (Vec::new(), Vec::new(), (0.0, 0.0), Vec::new());
    for round in 0..rounds {
        off.push(window(load, &Running::pair(&primary, &backup), &mut loads, seconds)?);
        if round == 0 {
            memory.0 = primary.vmm.memory_mib()?;
        }
        protect.push(bed.protect(&mut primary, &mut backup)?.as_secs_f64() * 1e3);
        let mut protected = window(load, &Running::pair(&primary, &backup), &mut loads, seconds)?;
        let info = primary.vmm.ft_info()?;
        ensure!(info["state"] == "protected", "protection ended: {}", info["reason"]);
        protected.info = Some(info);
        on.push(protected);
        memory.1 = f64::max(memory.1, primary.vmm.memory_mib()?);
        primary.vmm.remote(&["ft", "disable"])?;
        primary.vmm.wait_ft_state("disabled", LIMIT)?;
        backup.vmm.wait_ft_state("listening", LIMIT)?;
    }
    loads.check_guest()?;
    loads.stop()?;
    Ok(Outcome {
        name: load.name,
        what: load.what.clone(),
        metric: load.metric,
        off,
        on,
        memory,
        protect,
        round_trips,
        delay: 2e-3 * setup.link_delay.unwrap_or_default() as f64,
        carried,
        copied,
    })
}

fn of(windows: &[Window], f: impl Fn(&Window) -> f64) -> Summary {
    Summary::of(&windows.iter().map(f).collect::<Vec<_>>())
}

fn info(window: &Window, measure: &str, what: &str) -> f64 {
    window
        .info
        .as_ref()
        .and_then(|info| info[measure][what].as_f64())
        .unwrap_or_default()
}

fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        1000.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Figures without a unit, for programs.
pub fn spreads(figures: &[(&'static str, Summary)]) -> Value {
    let one = |(what, s): &(&str, Summary)| {
        let spread = json!({"median": s.median, "min": s.min, "max": s.max});
        ((*what).to_string(), spread)
    };
    figures.iter().map(one).collect::<serde_json::Map<_, _>>().into()
}

/// Median (least - most), for people.
pub fn spread(s: &Summary) -> String {
    format!("{} ({} - {})", number(s.median), number(s.min), number(s.max))
}

impl Outcome {
    /// On / off of the metric, round by round.
    pub fn ratio(&self) -> Summary {
        let ratios: Vec<f64> = self
            .off
            .iter()
            .zip(&self.on)
            .map(|(off, on)| on.rate / off.rate)
            .collect();
        Summary::of(&ratios)
    }

    /// What clients saw in the first round, off and on.
    pub fn first(&self) -> Option<[Seen; 2]> {
        Some([self.off.first()?.seen(), self.on.first()?.seen()])
    }

    fn added(&self, f: impl Fn(&Summary) -> f64) -> Summary {
        let added: Vec<f64> = self
            .off
            .iter()
            .zip(&self.on)
            .map(|(off, on)| f(&on.latency) - f(&off.latency))
            .collect();
        Summary::of(&added)
    }

    /// All figures: name, unit, summary over the rounds.
    pub fn figures(&self) -> Vec<(&'static str, &'static str, Summary)> {
        let mut figures = Vec::new();
        let unit = match self.metric {
            Metric::Burned => "counts/s",
            Metric::Dirtied => "pages/s",
            Metric::Answers => "answers/s",
            Metric::Bytes => "bytes/s",
            Metric::Idle => "",
        };
        if self.metric != Metric::Idle {
            figures.push(("off", unit, of(&self.off, |w| w.rate)));
            figures.push(("on", unit, of(&self.on, |w| w.rate)));
            figures.push(("on / off", "", self.ratio()));
        }
        if self.metric == Metric::Bytes {
            figures.push(("log channel's network alone", "bytes/s", self.carried));
            // All processors are busy in both: the time for a byte is what it takes without FT and what the log takes.
            let most = |w: &Window| 1.0 / (1.0 + w.rate / self.carried.median);
            figures.push((
                "most: a stream whose bytes go over the log once",
                "on / off",
                of(&self.off, most),
            ));
        }
        if self.on.iter().any(|w| w.latency.count > 0) {
            figures.push(("latency off p50", "ms", of(&self.off, |w| w.latency.median)));
            figures.push(("added latency p50", "ms", self.added(|l| l.median)));
            figures.push(("added latency p99", "ms", self.added(|l| l.p99)));
            figures.push(("added latency p99.9", "ms", self.added(|l| l.p999)));
            figures.push(("longest latency off", "ms", of(&self.off, |w| w.latency.max)));
            figures.push(("longest latency on", "ms", of(&self.on, |w| w.latency.max)));
        }
        let on = |f: &dyn Fn(&Window) -> f64| of(&self.on, f);
        figures.push((
            "least: pause p50 + round trip of the log channel p50",
            "ms",
            on(&|w| info(w, "pause_ms", "p50") + self.round_trips.median + self.delay),
        ));
        figures.push(("epochs", "/s", on(&|w| 1000.0 / info(w, "epoch_ms", "mean").max(1e-3))));
        figures.push(("dirty pages per epoch p50", "", on(&|w| info(w, "dirty_pages", "p50"))));
        if self.metric == Metric::Bytes {
            figures.push((
                "least pause: copying its dirty pages p50 alone",
                "ms",
                on(&|w| info(w, "dirty_pages", "p50") * self.copied.median),
            ));
        }
        figures.push(("pause p50", "ms", on(&|w| info(w, "pause_ms", "p50"))));
        figures.push(("pause p99", "ms", on(&|w| info(w, "pause_ms", "p99"))));
        figures.push(("log channel", "MiB/s", on(&|w| w.sent / (1 << 20) as f64)));
        let written = |w: &Window| {
            let pages = info(w, "dirty_pages", "mean") * 1000.0 / info(w, "epoch_ms", "mean").max(1e-3);
            w.sent / (pages * 4096.0).max(1.0)
        };
        figures.push(("log channel bytes per byte of dirty pages", "", on(&written)));
        let used: Vec<f64> = self
            .off
            .iter()
            .zip(&self.on)
            .map(|(off, on)| on.cpu.0 - off.cpu.0)
            .collect();
        figures.push(("processors, primary, on - off", "", Summary::of(&used)));
        figures.push(("processors, backup", "", on(&|w| w.cpu.1)));
        figures.push((
            "memory of FT on the primary",
            "MiB",
            Summary::of(&[self.memory.1 - self.memory.0]),
        ));
        figures.push(("time to protect", "ms", Summary::of(&self.protect)));
        figures
    }

    /// (dirty pages per epoch, pause in ms), medians.
    pub fn pause(&self) -> (f64, f64) {
        (
            of(&self.on, |w| info(w, "dirty_pages", "p50")).median,
            of(&self.on, |w| info(w, "pause_ms", "p50")).median,
        )
    }

    /// MiB per second that the guest's dirtier wrote with FT off, if it is that load.
    pub fn dirty_rate(&self) -> Option<f64> {
        (self.metric == Metric::Dirtied).then(|| of(&self.off, |w| w.dirtied).median / 256.0)
    }

    /// For people: median (least - most).
    pub fn table(&self) -> Table {
        let mut table = Table::default();
        for (name, unit, summary) in self.figures() {
            table.row(name, format!("{} {unit}", spread(&summary)).trim_end());
        }
        table
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let figures: serde_json::Map<String, Value> = self
            .figures()
            .into_iter()
            .map(|(name, unit, summary)| {
                (
                    name.into(),
                    json!({"unit": unit, "median": summary.median, "min": summary.min, "max": summary.max}),
                )
            })
            .collect();
        json!({"name": self.name, "what": self.what, "figures": figures})
    }
}

/// Gaps that clients saw, in ms.
#[derive(Debug, Clone, Serialize)]
pub struct Gaps {
    /// Of each connection.
    killed: Summary,
    /// Of the connection with the longest gap in each takeover.
    killed_slowest: Summary,
    /// Connections whose gap was above [`GAP_TARGET_MS`].
    killed_late: usize,
    detection: Summary,
    activation: Summary,
    /// Of each connection, beyond the heartbeat timeout.
    silent_beyond_timeout: Summary,
    /// Connections for which that was above [`GAP_TARGET_MS`].
    silent_late: usize,
}

impl Gaps {
    /// For people.
    pub fn rows(&self, table: &mut Table) {
        table.summary("gap of each connection, process killed", &self.killed, "ms");
        let late = |late: usize, all: &Summary| format!("{late} of {}", all.count);
        let above = format!("    above {GAP_TARGET_MS} ms");
        table.row(above.clone(), late(self.killed_late, &self.killed));
        table.summary("    longest in each takeover", &self.killed_slowest, "ms");
        table.summary("    detection", &self.detection, "ms");
        table.summary("    activation", &self.activation, "ms");
        table.summary(
            "gap of each connection beyond the timeout, host silent",
            &self.silent_beyond_timeout,
            "ms",
        );
        table.row(above, late(self.silent_late, &self.silent_beyond_timeout));
    }
}

/// Takeovers under a light load of requests.
pub fn gaps(count: u32) -> Result<Gaps> {
    let light = loads::Options {
        echo: 2,
        kv: 1,
        ..loads::Options::none()
    };
    let mut results = Results::default();
    {
        let mut bed = Bed::new(Options::default())?;
        let mut chain = Chain::start(&mut bed, &light, &mut results)?;
        for round in 0..count {
            chain.round(Victim::Primary, Duration::from_millis(300))?;
            if round + 1 < count {
                chain.protect_again()?;
            }
        }
        chain.end()?;
    }
    let timeout = 500;
    let mut silent = Vec::new();
    for _ in 0..count.min(5) {
        let options = Options {
            heartbeat_timeout_ms: timeout,
            ..Options::default()
        };
        let mut pair = Proxied::prepared(options, &light, |_| Ok(()))?;
        std::thread::sleep(SETTLE);
        let moment = Instant::now();
        pair.proxy.forward().stall(true);
        pair.proxy.back().stall(true);
        pair.one_side_runs()?;
        let progress = pair.loads.wait_progress(5);
        progress?;
        let gaps = pair.loads.gaps_since(moment).into_iter().flat_map(|(_, gaps)| gaps);
        silent.extend(gaps.map(|gap| gap.as_secs_f64() * 1e3 - f64::from(timeout)));
    }
    let of = |f: &dyn Fn(&bed1::failover::Takeover) -> Option<f64>| {
        Summary::of(&results.takeovers.iter().filter_map(f).collect::<Vec<_>>())
    };
    let connections = results
        .takeovers
        .iter()
        .flat_map(bed1::failover::Takeover::connections_ms);
    let connections: Vec<f64> = connections.collect();
    Ok(Gaps {
        killed: Summary::of(&connections),
        killed_slowest: of(&|t| Some(t.gap_ms)),
        killed_late: connections.iter().filter(|gap| **gap > GAP_TARGET_MS).count(),
        detection: of(&|t| t.detection_ms),
        activation: of(&|t| t.activation_ms),
        silent_beyond_timeout: Summary::of(&silent),
        silent_late: silent.iter().filter(|gap| **gap > GAP_TARGET_MS).count(),
    })
}
