//! The same guest under QEMU (virtio-pci): its devices and ours check each other, and its speed is compared.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::cleanup::{self, Registered};
use crate::netns::TAP;
use crate::pair::{BOOT_LIMIT, Bed, MAC, Side, guest_image, ready};

/// The QEMU of the system.
const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";

/// How QEMU is started.
pub struct Spec<'a> {
    /// The program.
    pub program: &'a Path,
    /// The host.
    pub side: Side,
    /// Machine, accelerator and processor, as QEMU's options.
    pub machine: &'a [&'a str],
    /// The guest has the host's disk.
    pub disk: bool,
    /// Further options.
    pub args: Vec<String>,
}

/// A running QEMU; killed when dropped.
pub struct Qemu {
    child: Child,
    _registered: Registered,
    stderr: PathBuf,
    /// Its serial log.
    pub serial: PathBuf,
}

impl Qemu {
    /// Boots the guest on host `a` of the bed, on an emulated q35 machine, and waits until its services listen.
    pub fn boot(bed: &Bed) -> Result<Self> {
        let mut this = Self::start(
            bed,
            &Spec {
                program: Path::new(PROGRAM),
                side: Side::A,
                machine: &["-machine", "q35", "-accel", "tcg", "-cpu", "max"],
                disk: true,
                args: Vec::new(),
            },
        )?;
        this.wait_ready(1)?;
        Ok(this)
    }

    /// Starts QEMU with the bed's guest; does not wait for it.
    pub fn start(bed: &Bed, spec: &Spec<'_>) -> Result<Self> {
        if !spec.program.exists() {
            bail!("{} is not there: run `scripts/deps test` first", spec.program.display());
        }
        let side = spec.side.name();
        let serial = bed.dir.join(format!("qemu-{side}.serial"));
        let stderr = bed.dir.join(format!("qemu-{side}.err"));
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &bed.network.ns(side)]).arg(spec.program);
        command.args(["-nodefaults", "-display", "none"]).args(spec.machine);
        let memory = format!("{}M", bed.options.memory_mib);
        command.args(["-smp", &bed.options.vcpus.to_string(), "-m", &memory]);
        command
            .arg("-kernel")
            .arg(guest_image()?)
            .args(["-append", &bed.cmdline()]);
        if spec.disk {
            let drive = format!("file={},if=none,format=raw,id=disk0", bed.disk(spec.side).display());
            command.args(["-drive", &drive]);
            command.args(["-device", "virtio-blk-pci,drive=disk0,disable-legacy=on"]);
        }
        command.args([
            "-netdev",
            &format!("tap,id=net0,ifname={TAP},script=no,downscript=no,vnet_hdr=on"),
        ]);
        command.args([
            "-device",
            &format!("virtio-net-pci,netdev=net0,mac={MAC},disable-legacy=on,romfile="),
        ]);
        command.args(["-device", "virtio-rng-pci,disable-legacy=on"]);
        command.args(["-serial", &format!("file:{}", serial.display())]);
        command
            .args(&spec.args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&stderr)?);
        let (child, registered) = cleanup::spawn(&mut command)?;
        Ok(Self {
            child,
            _registered: registered,
            stderr,
            serial,
        })
    }

    /// Its process: `ip netns exec` becomes the program.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to its standard error.
    pub fn errors(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Waits until the guest's services listen, for the `times`-th time.
    pub fn wait_ready(&mut self, times: usize) -> Result<()> {
        let start = Instant::now();
        while !ready(&self.serial, times)? {
            let ended = self.child.try_wait()?;
            if ended.is_some() || start.elapsed() > BOOT_LIMIT {
                let error = self.errors();
                let serial = std::fs::read_to_string(&self.serial).unwrap_or_default();
                bail!("the guest is not ready under QEMU (ended: {ended:?}): {error}\n{serial}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Waits until QEMU ends by itself.
    pub fn wait_end(&mut self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        while self.child.try_wait()?.is_none() {
            if start.elapsed() > limit {
                bail!(
                    "QEMU did not end within {} s after the guest's power-off",
                    limit.as_secs()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
