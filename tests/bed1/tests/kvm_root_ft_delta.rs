//! Re-protection with the disk that was left: only what differs is copied, and only where that is certain (R3). Needs
//! /dev/kvm and root.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bed1::failover::{self, TAKEOVER_LIMIT};
use bed1::loads::{self, Loads};
use bed1::pair::{Bed, Host, Options, Side};

const DATA_MIB: u64 = 256;

fn options() -> Options {
    Options {
        disk_mib: 64,
        data_mib: DATA_MIB,
        ..Options::default()
    }
}

/// Disk bytes that were copied and that were left out.
struct Copied {
    sent: u64,
    skipped: u64,
    /// Why disks were copied whole.
    reasons: Vec<String>,
}

impl std::fmt::Display for Copied {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} bytes sent, {} left out; {:?}",
            self.sent, self.skipped, self.reasons
        )
    }
}

impl Copied {
    fn of(primary: &Host, took: Duration) -> Result<Self> {
        let progress = primary.vmm.ft_info()?["progress"].clone();
        let bytes = |name: &str| progress[name].as_u64().unwrap_or(u64::MAX);
        let events = std::fs::read_to_string(primary.vmm.events())?;
        let newest = events.rsplit("\"syncing\"").next().unwrap_or_default();
        let reasons = newest.lines().filter(|line| line.contains("\"reason\""));
        let copied = Self {
            sent: bytes("disk_bytes_sent"),
            skipped: bytes("disk_bytes_skipped"),
            reasons: reasons.map(|line| line.trim().to_string()).collect(),
        };
        eprintln!(
            "    {} KiB of disk copied, {} KiB left out, protected after {:.0} ms",
            copied.sent >> 10,
            copied.skipped >> 10,
            took.as_secs_f64() * 1e3
        );
        Ok(copied)
    }

    fn all(&self) -> Result<()> {
        let all = (64 + DATA_MIB) << 20;
        ensure!(self.skipped == 0 && self.sent >= all, "not all was copied: {self}");
        Ok(())
    }

    /// A load of some seconds dirties little.
    fn little(&self) -> Result<()> {
        ensure!(self.sent < 16 << 20, "too much was copied: {self}");
        ensure!(self.skipped >= (DATA_MIB + 48) << 20, "too little was left out: {self}");
        Ok(())
    }
}

struct Pair {
    bed: Bed,
    primary: Host,
    backup: Host,
    loads: Loads,
}

impl Pair {
    /// Protected for the first time.
    fn new(seed: u64) -> Result<Self> {
        let mut bed = Bed::new(options())?;
        let mut primary = bed.boot(Side::A)?;
        // One PUT at a time: a guest that writes as fast as the machine can would soon have written its whole disk.
        let load = loads::Options {
            kv: 1,
            kv_piped: 0,
            ..loads::Options::everything(seed)
        };
        let loads = Loads::start(&bed, &loads::model(&bed), &load)?;
        let (backup, took) = failover::protect_again(&mut bed, &mut primary, Side::B)?;
        Copied::of(&primary, took)?.all()?;
        Ok(Self {
            bed,
            primary,
            backup,
            loads,
        })
    }

    fn swap(&mut self) {
        std::mem::swap(&mut self.primary, &mut self.backup);
    }

    /// Kills the primary; the backup is the primary then.
    fn kill_primary(&mut self) -> Result<()> {
        failover::kill(&mut self.primary, &mut self.backup, &self.loads)?;
        self.swap();
        self.loads.wait_progress(20)
    }

    fn kill_backup(&mut self) -> Result<()> {
        // Until it has applied the first checkpoint it has no record of its copy.
        let end = Instant::now() + TAKEOVER_LIMIT;
        for image in images(self) {
            while std::fs::read(sidecar(&image))?.first().is_none_or(|byte| *byte == 0) {
                ensure!(Instant::now() < end, "there is no record of {}", image.display());
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        failover::kill(&mut self.backup, &mut self.primary, &self.loads)?;
        self.loads.wait_progress(20)
    }

    /// Protects the survivor by a new VMM with what the dead one left.
    fn protect_again(&mut self) -> Result<Copied> {
        let side = self.backup.side;
        let (backup, took) = failover::protect_again(&mut self.bed, &mut self.primary, side)?;
        self.backup = backup;
        Copied::of(&self.primary, took)
    }

    /// With no request open: both hosts' images are the same, byte for byte, and what was acknowledged is there.
    fn compare(&mut self) -> Result<()> {
        self.loads.pause()?;
        for disk in [self.primary.disk.clone(), self.backup.disk.clone()] {
            self.loads.check_disk(&disk)?;
        }
        let data = |bed: &Bed| (bed.data(Side::A), bed.data(Side::B));
        for (a, b) in [(self.bed.disk(Side::A), self.bed.disk(Side::B)), data(&self.bed)] {
            ensure!(same(&a, &b)?, "{} and {} differ", a.display(), b.display());
        }
        self.loads.check_guest()?;
        self.loads.resume();
        Ok(())
    }
}

fn same(a: &Path, b: &Path) -> Result<bool> {
    // The backup applies in the background.
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let equal = std::fs::read(a)? == std::fs::read(b)?;
        if equal || Instant::now() > end {
            return Ok(equal);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn kvm_root_r3_killed_primaries_are_protected_again_by_their_differences() -> Result<()> {
    let mut pair = Pair::new(51)?;
    for round in 0..4 {
        std::thread::sleep(Duration::from_millis(200 + 300 * round));
        pair.kill_primary()?;
        pair.protect_again()?.little()?;
        pair.compare()?;
    }
    pair.kill_primary()?;
    pair.loads.verify(&pair.primary.disk)?;
    pair.loads.stop().map(drop)
}

#[test]
fn kvm_root_r3_killed_backups_come_back_with_their_differences() -> Result<()> {
    let mut pair = Pair::new(52)?;
    for _ in 0..3 {
        pair.kill_backup()?;
        pair.protect_again()?.little()?;
        pair.compare()?;
    }
    // What came back is as good as the first one.
    pair.kill_primary()?;
    pair.protect_again()?.little()?;
    pair.compare()
}

#[test]
fn kvm_root_r3_ten_planned_failovers_in_a_row_copy_little() -> Result<()> {
    let mut pair = Pair::new(53)?;
    for _ in 0..10 {
        pair.primary.vmm.remote(&["ft", "failover"])?;
        pair.backup.vmm.wait_ft_state("solo", TAKEOVER_LIMIT)?;
        pair.loads.wait_progress(20)?;
        pair.swap();
        pair.bed.receive(&mut pair.backup)?;
        let took = pair.bed.protect(&mut pair.primary, &mut pair.backup)?;
        Copied::of(&pair.primary, took)?.little()?;
    }
    pair.compare()
}

/// A backup that leaves in an orderly way closes its record; another process takes it up.
#[test]
fn kvm_root_r3_a_backup_that_left_comes_back_with_its_differences() -> Result<()> {
    let mut pair = Pair::new(54)?;
    pair.backup.vmm.remote(&["ft", "disable"])?;
    pair.primary.vmm.wait_ft_state("failed", TAKEOVER_LIMIT)?;
    pair.backup.vmm.remote(&["shutdown-vmm"])?;
    ensure!(
        pair.backup.vmm.wait_end(TAKEOVER_LIMIT)?,
        "the backup's VMM does not end"
    );
    pair.loads.wait_progress(20)?;
    pair.protect_again()?.little()?;
    pair.compare()
}

fn sidecar(image: &Path) -> PathBuf {
    format!("{}.ft", image.display()).into()
}

/// All is copied, and right, after the survivor's peer was killed and `change` happened to the images that it left.
fn all_after(seed: u64, change: impl FnOnce(&mut Pair) -> Result<()>) -> Result<()> {
    let mut pair = Pair::new(seed)?;
    pair.kill_primary()?;
    change(&mut pair)?;
    pair.protect_again()?.all()?;
    pair.compare()?;
    pair.kill_primary()?;
    pair.loads.verify(&pair.primary.disk).map(drop)
}

fn images(pair: &Pair) -> [PathBuf; 2] {
    [pair.backup.disk.clone(), pair.bed.data(pair.backup.side)]
}

#[test]
fn kvm_root_r3_with_a_tampered_record_all_is_copied() -> Result<()> {
    all_after(55, |pair| {
        for image in images(pair) {
            let file = File::options().read(true).write(true).open(sidecar(&image))?;
            let mut byte = [0];
            file.read_exact_at(&mut byte, 4096)?;
            file.write_all_at(&[byte[0] ^ 4], 4096)?;
        }
        Ok(())
    })
}

/// As somebody does who wants to start anew: by the same name, right after the kill.
#[test]
fn kvm_root_r3_with_another_image_all_is_copied() -> Result<()> {
    all_after(56, |pair| {
        pair.bed.new_disk(pair.backup.side)?;
        let data = pair.bed.data(pair.backup.side);
        std::fs::remove_file(&data)?;
        std::fs::write(&data, vec![9; (DATA_MIB << 20) as usize])?;
        Ok(())
    })
}

#[test]
fn kvm_root_r3_after_an_ordinary_boot_of_the_old_image_all_is_copied() -> Result<()> {
    all_after(57, |pair| {
        let side = pair.backup.side;
        // Its network would be the guest's: the guest must not run long, only its devices count.
        let mut args = pair.bed.vm_args(side, &pair.bed.dir.join("old.serial"))?;
        if let Some(at) = args.iter().position(|arg| arg == "--net") {
            args.drain(at..at + 2);
        }
        let mut old = pair.bed.start(side, &args)?;
        ensure!(old.vmm.vm_state()? == "Running", "the old image was not booted");
        for image in images(pair) {
            ensure!(!sidecar(&image).exists(), "the record of {} is left", image.display());
        }
        old.vmm.kill().map(drop)
    })
}
