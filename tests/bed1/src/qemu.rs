//! The same guest under QEMU (q35, virtio-pci, TCG): its devices and ours check each other.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::cleanup::{self, Registered};
use crate::netns::TAP;
use crate::pair::{BOOT_LIMIT, Bed, MAC, Side, guest_image, ready};

/// A running QEMU; killed when dropped.
pub struct Qemu {
    child: Child,
    _registered: Registered,
    stderr: PathBuf,
    /// Its serial log.
    pub serial: PathBuf,
}

impl Qemu {
    /// Boots the guest on host `a` of the bed and waits until its services listen.
    pub fn boot(bed: &Bed) -> Result<Self> {
        if !Path::new("/usr/bin/qemu-system-x86_64").exists() {
            bail!("qemu-system-x86_64 is not installed: run `scripts/deps test` first");
        }
        let (serial, stderr) = (bed.dir.join("qemu.serial"), bed.dir.join("qemu.err"));
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &bed.network.ns("a"), "qemu-system-x86_64"]);
        command.args([
            "-nodefaults",
            "-display",
            "none",
            "-machine",
            "q35",
            "-accel",
            "tcg",
            "-cpu",
            "max",
        ]);
        command.args([
            "-smp",
            &bed.options.vcpus.to_string(),
            "-m",
            &format!("{}M", bed.options.memory_mib),
        ]);
        command
            .arg("-kernel")
            .arg(guest_image()?)
            .args(["-append", &bed.cmdline()]);
        command.args([
            "-drive",
            &format!("file={},if=none,format=raw,id=disk0", bed.disk(Side::A).display()),
        ]);
        command.args(["-device", "virtio-blk-pci,drive=disk0,disable-legacy=on"]);
        command.args([
            "-netdev",
            &format!("tap,id=net0,ifname={TAP},script=no,downscript=no,vnet_hdr=on"),
        ]);
        command.args([
            "-device",
            &format!("virtio-net-pci,netdev=net0,mac={MAC},disable-legacy=on"),
        ]);
        command.args(["-device", "virtio-rng-pci,disable-legacy=on"]);
        command.args(["-serial", &format!("file:{}", serial.display())]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&stderr)?);
        let (child, registered) = cleanup::spawn(&mut command)?;
        let mut this = Self {
            child,
            _registered: registered,
            stderr,
            serial,
        };
        this.wait_ready(1)?;
        Ok(this)
    }

    /// Waits until the guest's services listen, for the `times`-th time.
    pub fn wait_ready(&mut self, times: usize) -> Result<()> {
        let start = Instant::now();
        while !ready(&self.serial, times)? {
            let ended = self.child.try_wait()?;
            if ended.is_some() || start.elapsed() > BOOT_LIMIT {
                let error = std::fs::read_to_string(&self.stderr).unwrap_or_default();
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
