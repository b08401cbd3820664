//! A protected VM under load whose log channel goes through a proxy.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::loads::{self, Loads};
use crate::pair::{Bed, Host, Options, Side};
use crate::proxy::Proxy;

/// Hang guard of a decision who runs the VM.
pub const LIMIT: Duration = Duration::from_secs(30);

/// The pair. The bed goes last.
pub struct Proxied {
    /// Runs the VM at first.
    pub primary: Host,
    /// Shadows it at first.
    pub backup: Host,
    /// Between them.
    pub proxy: Proxy,
    /// At work.
    pub loads: Loads,
    /// Below them.
    pub bed: Bed,
}

impl Proxied {
    /// Boots on host a, protects by host b, with every load at work.
    pub fn new(options: Options) -> Result<Self> {
        Self::prepared(options, &loads::Options::everything(1), |_| Ok(()))
    }

    /// The same with some loads only, and with something done to the bed before.
    pub fn prepared(
        options: Options,
        load: &loads::Options,
        prepare: impl FnOnce(&mut Bed) -> Result<()>,
    ) -> Result<Self> {
        let mut bed = Bed::new(options)?;
        prepare(&mut bed)?;
        let mut primary = bed.boot(Side::A)?;
        let loads = Loads::start(&bed, &loads::model(&bed), load)?;
        let mut backup = bed.backup(Side::B)?;
        let proxy = Proxy::before(&bed, &mut backup)?;
        bed.protect(&mut primary, &mut backup)?;
        ensure!(
            proxy.forward().passed() > 1 << 20,
            "the log channel does not use the proxy"
        );
        Ok(Self {
            primary,
            backup,
            proxy,
            loads,
            bed,
        })
    }

    /// Waits until exactly one side runs the VM and the other has stopped (R4), and checks what it runs. True: the backup
    /// took over.
    pub fn one_side_goes_on(&mut self) -> Result<bool> {
        let took_over = self.one_side_runs()?;
        let disk = if took_over {
            &self.backup.disk
        } else {
            &self.primary.disk
        };
        self.loads.verify(disk)?;
        Ok(took_over)
    }

    /// The same without a look at disk and RAM, for which the loads are held.
    pub fn one_side_runs(&mut self) -> Result<bool> {
        let backup = &mut self.backup.vmm;
        let mut states = (String::new(), String::new());
        self.primary.vmm.wait_for("one side to go on", LIMIT, |primary| {
            states = (primary.ft_state()?, backup.ft_state()?);
            match (states.0.as_str(), states.1.as_str()) {
                ("solo", "solo") => bail!("both sides run the VM"),
                ("solo", other) | (other, "solo") => {
                    Ok(matches!(other, "stopped" | "failed" | "disabled" | "listening"))
                }
                _ => Ok(false),
            }
        })?;
        let took_over = states.1 == "solo";
        let (runs, stopped) = if took_over {
            (&mut self.backup, &mut self.primary)
        } else {
            (&mut self.primary, &mut self.backup)
        };
        ensure!(runs.vmm.vm_state()? == "Running", "nobody runs the VM");
        ensure!(
            !stopped.vmm.vm_state().is_ok_and(|s| s == "Running"),
            "the VM runs on both sides"
        );
        self.loads
            .wait_progress(20)
            .with_context(|| format!("states {states:?}"))?;
        Ok(took_over)
    }

    /// Fails unless the VM is protected, and its loads get answers.
    pub fn still_protected(&self) -> Result<()> {
        self.loads.wait_progress(20)?;
        let states = (self.primary.vmm.ft_state()?, self.backup.vmm.ft_state()?);
        ensure!(
            states.0 == "protected" && states.1 == "protected",
            "protection was lost: {states:?}: {}",
            self.primary.vmm.tail()
        );
        Ok(())
    }
}
