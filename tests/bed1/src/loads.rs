//! Every load at once: key-value store, echo, bulk both ways, a counter, memory dirtying; and the checks of what it saw.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use load::control::{Control, Status};
use load::kv::{self, SharedModel};
use load::model::{DiskReport, Model, SECTOR};
use load::{CONTROL_PORT, ECHO_PORT, KV_PORT, Load, SINK_PORT, SOURCE_PORT, Verdict, bulk, control, echo, udp};

use crate::images;
use crate::netns::{Network, guest};
use crate::pair::Bed;

/// Hang guard of a load's progress, above the clients' own.
pub const PROGRESS_LIMIT: Duration = Duration::from_secs(60);
/// Hang guard of a backup that applies committed writes in the background.
const APPLY_LIMIT: Duration = Duration::from_secs(20);

/// What runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Connections with one PUT at a time.
    pub kv: usize,
    /// Connections with eight PUTs under way.
    pub kv_piped: usize,
    /// Echo connections.
    pub echo: usize,
    /// Sink connections.
    pub sink: usize,
    /// Source connections.
    pub source: usize,
    /// Bytes per second of each bulk connection (0: no limit).
    pub bulk_bytes_per_s: u64,
    /// UDP echoes, one each millisecond.
    pub udp: bool,
    /// The guest computes on its last processor.
    pub burn: bool,
    /// The guest's counter is asked for.
    pub counter: bool,
    /// Pages per second and working set of the guest's dirtier.
    pub dirty: (u64, u64),
    /// Seed of contents.
    pub seed: u64,
}

impl Options {
    /// All loads, as in the campaign.
    pub fn everything(seed: u64) -> Self {
        let (kv, kv_piped, echo, sink, source) = (2, 1, 3, 1, 1);
        Self {
            kv,
            kv_piped,
            echo,
            sink,
            source,
            bulk_bytes_per_s: 2 << 20,
            udp: false,
            burn: false,
            counter: true,
            dirty: (5000, 2000),
            seed,
        }
    }

    /// None; a start for single ones.
    pub fn none() -> Self {
        Self {
            kv: 0,
            kv_piped: 0,
            echo: 0,
            sink: 0,
            source: 0,
            bulk_bytes_per_s: 0,
            udp: false,
            burn: false,
            counter: true,
            dirty: (0, 0),
            seed: 1,
        }
    }
}

/// The loads at work.
pub struct Loads {
    /// What the store must hold.
    pub model: SharedModel,
    /// A connection of its own to the control service; it, too, lives through every failover.
    pub control: Control,
    network: Arc<Network>,
    loads: Vec<Load>,
}

/// An empty model for the bed's disks.
pub fn model(bed: &Bed) -> SharedModel {
    Arc::new(Mutex::new(Model::new((bed.options.disk_mib << 20) / SECTOR as u64 - 1)))
}

impl Loads {
    /// Connects everything and starts.
    pub fn start(bed: &Bed, model: &SharedModel, options: &Options) -> Result<Self> {
        let dial = &*bed.network;
        let seed = options.seed;
        let mut loads = Vec::new();
        if options.kv > 0 {
            let kv = kv::Options {
                connections: options.kv,
                seed,
                ..Default::default()
            };
            loads.push(kv::start(dial, guest(KV_PORT), model, &kv)?);
        }
        if options.kv_piped > 0 {
            let piped = kv::Options {
                connections: options.kv_piped,
                depth: 8,
                seed: seed + 1,
                ..Default::default()
            };
            loads.push(kv::start(dial, guest(KV_PORT), model, &piped)?);
        }
        if options.echo > 0 {
            let echo = echo::Options {
                connections: options.echo,
                seed,
                size: 16..1400,
                ..Default::default()
            };
            loads.push(echo::start(dial, guest(ECHO_PORT), &echo)?);
        }
        if options.sink > 0 {
            loads.push(bulk::sink(
                dial,
                guest(SINK_PORT),
                options.sink,
                options.bulk_bytes_per_s,
                seed,
            )?);
        }
        if options.source > 0 {
            loads.push(bulk::source(
                dial,
                guest(SOURCE_PORT),
                options.source,
                options.bulk_bytes_per_s,
                seed,
            )?);
        }
        let mut control = Control::open(dial, guest(CONTROL_PORT))?;
        control.dirty(options.dirty.0, options.dirty.1)?;
        control.burn(options.burn)?;
        if options.udp {
            loads.push(udp::start(dial, guest(ECHO_PORT), 64, Duration::from_millis(1))?.0);
        }
        if options.counter {
            loads.push(control::counter(dial, guest(CONTROL_PORT), Duration::from_millis(5))?);
        }
        let this = Self {
            model: model.clone(),
            control,
            network: bed.network.clone(),
            loads,
        };
        this.wait_progress(3)?;
        Ok(this)
    }

    /// Waits until every connection had that many further answers.
    pub fn wait_progress(&self, more: u64) -> Result<()> {
        for load in &self.loads {
            if !load.wait_progress(more, PROGRESS_LIMIT) {
                bail!(
                    "load {}: no progress within {} s",
                    load.name(),
                    PROGRESS_LIMIT.as_secs()
                );
            }
        }
        self.check()
    }

    /// An error when anything was wrong on any connection so far.
    pub fn check(&self) -> Result<()> {
        for load in &self.loads {
            let verdict = load.verdict();
            if verdict.failed > 0 {
                bail!(
                    "load {}: {} failures, the first: {}",
                    verdict.name,
                    verdict.failed,
                    verdict.failures.join("; ")
                );
            }
        }
        Ok(())
    }

    /// Longest wait for an answer since `moment` of each connection, by load.
    pub fn gaps_since(&self, moment: Instant) -> Vec<(String, Vec<Duration>)> {
        self.loads
            .iter()
            .map(|load| (load.name().to_string(), load.longest_gaps_since(moment)))
            .collect()
    }

    /// Latencies and gaps are measured anew from here.
    pub fn new_phase(&self) {
        self.loads.iter().for_each(Load::new_phase);
    }

    /// What was seen so far.
    pub fn verdicts(&self) -> Vec<Verdict> {
        self.loads.iter().map(Load::verdict).collect()
    }

    /// Lets every request be answered and holds the loads there, connections open, until [`Loads::resume`].
    pub fn pause(&self) -> Result<()> {
        for load in &self.loads {
            if !load.pause(PROGRESS_LIMIT) {
                bail!(
                    "load {}: requests unanswered for {} s",
                    load.name(),
                    PROGRESS_LIMIT.as_secs()
                );
            }
        }
        self.check()
    }

    /// Goes on after a pause.
    pub fn resume(&self) {
        self.loads.iter().for_each(Load::resume);
    }

    /// While paused: the disk image equals the acknowledged writes, and nothing is open.
    pub fn check_disk(&self, disk: &Path) -> Result<DiskReport> {
        check_disk(&self.model, disk)
    }

    /// The guest's own checks: no page of the dirtier lost or mixed up, no PUT of its count lost.
    pub fn check_guest(&mut self) -> Result<Status> {
        let status = self.control.status()?;
        if status.dirty_errors != 0 {
            bail!(
                "the guest found {} pages of RAM with a wrong value",
                status.dirty_errors
            );
        }
        Ok(status)
    }

    /// Stops the loads for a moment and checks disk image and guest.
    pub fn verify(&mut self, disk: &Path) -> Result<DiskReport> {
        self.pause()?;
        let report = self.check_disk(disk)?;
        self.check_guest()?;
        self.resume();
        Ok(report)
    }

    /// While paused: every key has its newest acknowledged value.
    pub fn check_gets(&self) -> Result<u64> {
        Ok(kv::check_all(&*self.network, guest(KV_PORT), &self.model)?)
    }

    /// Stops at request boundaries and tells what was seen.
    pub fn stop(mut self) -> Result<Vec<Verdict>> {
        self.drain()
    }

    /// The same; what stays is the control connection alone.
    pub fn drain(&mut self) -> Result<Vec<Verdict>> {
        self.control.dirty(0, 0)?;
        Ok(self.loads.drain(..).map(Load::stop).collect())
    }
}

/// Compares a disk image with the model while no PUT is under way. A backup applies committed writes in the background,
/// so a difference counts only when it stays.
pub fn check_disk(model: &SharedModel, disk: &Path) -> Result<DiskReport> {
    let start = Instant::now();
    loop {
        let mut file = images::open(disk).with_context(|| disk.display().to_string())?;
        let model = kv::lock(model);
        if model.unacknowledged() > 0 {
            bail!("{} PUTs were never acknowledged", model.unacknowledged());
        }
        match model.check_disk(&mut file) {
            Ok(report) => return Ok(report),
            Err(e) if start.elapsed() > APPLY_LIMIT => {
                return Err(e).with_context(|| format!("disk {}", disk.display()));
            }
            Err(_) => {}
        }
        drop(model);
        std::thread::sleep(Duration::from_millis(20));
    }
}
