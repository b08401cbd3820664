//! One guest that lives through many kills: after each, the dead one's side gets a fresh VMM as the new backup.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use load::Verdict;
use load::kv::SharedModel;

use crate::failover::{self, Takeover};
use crate::loads::{self, Loads};
use crate::pair::{Bed, Host, Side};

/// Which side is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// The one that runs the VM.
    Primary,
    /// The one that shadows it.
    Backup,
}

/// What the kills of one or more chains looked like.
#[derive(Default)]
pub struct Results {
    /// Of each kill of a primary.
    pub takeovers: Vec<Takeover>,
    /// Of each kill of a backup.
    pub solos: Vec<Takeover>,
    /// Times that protection ended though nothing was killed: a side was so slow that it counted as dead. The VM runs on,
    /// but that should be rare.
    pub lapses: u64,
    /// Time of each protection.
    pub protect_ms: Vec<f64>,
    /// Of each load, at the end.
    pub verdicts: Vec<Verdict>,
    /// PUTs acknowledged, all of them found.
    pub acknowledged: u64,
    /// Pages that the guest's dirtier wrote and checked.
    pub dirtied: u64,
}

/// A protected guest under load.
pub struct Chain<'a> {
    bed: &'a mut Bed,
    /// Runs the VM.
    pub primary: Host,
    /// Shadows it; after a kill, the dead one until [`Chain::protect_again`].
    pub backup: Host,
    /// The loads.
    pub loads: Loads,
    model: SharedModel,
    results: &'a mut Results,
}

impl<'a> Chain<'a> {
    /// Boots the guest on host a, starts the loads, protects it by host b.
    pub fn start(bed: &'a mut Bed, options: &loads::Options, results: &'a mut Results) -> Result<Self> {
        let mut primary = bed.boot(Side::A)?;
        let model = loads::model(bed);
        let loads = Loads::start(bed, &model, options)?;
        let (backup, time) = failover::protect_again(bed, &mut primary, Side::B)?;
        results.protect_ms.push(time.as_secs_f64() * 1000.0);
        Ok(Self {
            bed,
            primary,
            backup,
            loads,
            model,
            results,
        })
    }

    /// Kills one side after `delay` and checks everything; afterwards the VM runs alone. A line for people is returned.
    pub fn round(&mut self, victim: Victim, delay: Duration) -> Result<String> {
        self.loads.new_phase();
        std::thread::sleep(delay);
        self.loads.check().context("before the kill")?;
        if self.primary.vmm.ft_state()? != "protected" {
            self.results.lapses += 1;
            self.settle()?;
            self.protect_again()?;
        }
        let takeover = match victim {
            Victim::Primary => failover::kill(&mut self.primary, &mut self.backup, &self.loads)?,
            Victim::Backup => failover::kill(&mut self.backup, &mut self.primary, &self.loads)?,
        };
        if victim == Victim::Primary {
            std::mem::swap(&mut self.primary, &mut self.backup);
        }
        let records = self.verify().context("after the kill")?;
        let mut line = format!(
            "{victim:?} on host {} killed after {} ms",
            self.backup.side.name(),
            delay.as_millis()
        );
        line.push_str(&format!(": gap {:.0} ms ({})", takeover.gap_ms, takeover.slowest()));
        for (what, ms) in [
            ("detection", takeover.detection_ms),
            ("activation", takeover.activation_ms),
        ] {
            if let Some(ms) = ms {
                line.push_str(&format!(", {what} {ms:.0} ms"));
            }
        }
        line.push_str(&format!(", {records} records on disk right"));
        match victim {
            Victim::Primary => self.results.takeovers.push(takeover),
            Victim::Backup => self.results.solos.push(takeover),
        }
        Ok(line)
    }

    /// After a lapse of protection: makes the side that runs the VM the primary again, and ends the other.
    fn settle(&mut self) -> Result<()> {
        let what = "one side to run the VM alone";
        let mut backup_runs = false;
        let backup = &self.backup.vmm;
        self.primary.vmm.wait_for(what, failover::TAKEOVER_LIMIT, |vmm| {
            backup_runs = backup.ft_state().is_ok_and(|state| state == "solo");
            Ok(backup_runs || vmm.ft_state()? == "solo")
        })?;
        if backup_runs {
            std::mem::swap(&mut self.primary, &mut self.backup);
        }
        self.backup.vmm.kill().map(drop)
    }

    /// After a kill: starts a fresh VMM where the dead one was and protects the survivor by it. Milliseconds.
    pub fn protect_again(&mut self) -> Result<f64> {
        let side = self.backup.side;
        let (new, time) = match failover::protect_again(self.bed, &mut self.primary, side) {
            Ok(protected) => protected,
            // The same lapse, before protection was complete: once more, if the VM runs on.
            Err(e) if self.primary.vmm.ft_state()? == "solo" => {
                eprintln!("    {e:#}");
                self.results.lapses += 1;
                failover::protect_again(self.bed, &mut self.primary, side)?
            }
            Err(e) => return Err(e),
        };
        let old = std::mem::replace(&mut self.backup, new);
        self.bed.forget_files(&old);
        let ms = time.as_secs_f64() * 1000.0;
        self.results.protect_ms.push(ms);
        Ok(ms)
    }

    /// Ends the loads that run and starts others on the same guest and store.
    pub fn change_loads(&mut self, options: &loads::Options) -> Result<()> {
        // One after the other: the counter's client must be alone.
        let verdicts = self.loads.drain()?;
        self.take(verdicts)?;
        self.loads = Loads::start(self.bed, &self.model, options)?;
        Ok(())
    }

    fn take(&mut self, verdicts: Vec<Verdict>) -> Result<()> {
        let bad: Vec<_> = verdicts
            .iter()
            .filter(|v| !v.good())
            .map(|v| format!("{}: {:?}", v.name, v.failures))
            .collect();
        self.results.verdicts.extend(verdicts);
        ensure!(bad.is_empty(), "loads failed: {}", bad.join("; "));
        Ok(())
    }

    /// With every request answered: the disk of the side that runs equals the model, the guest's RAM its own.
    pub fn verify(&mut self) -> Result<u64> {
        Ok(self.loads.verify(&self.primary.disk)?.acknowledged)
    }

    /// The last checks; stops the loads.
    pub fn end(mut self) -> Result<()> {
        self.loads.pause()?;
        self.loads.check_disk(&self.primary.disk)?;
        if self.primary.vmm.ft_state()? == "protected" {
            self.loads
                .check_disk(&self.backup.disk)
                .context("the disk of the protected VM's backup")?;
        }
        self.loads.check_gets()?;
        self.results.dirtied += self.loads.check_guest()?.dirtied;
        self.results.acknowledged += load::kv::lock(&self.model).acknowledged();
        self.loads.resume();
        let stopped = self.loads.drain()?;
        self.take(stopped)
    }
}
