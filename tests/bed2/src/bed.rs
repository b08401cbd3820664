//! A bed: its description, its folders, starting and ending it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::host::{Host, make_disks};
use crate::places::{self, Places};

/// How long a host may take to boot.
const BOOT: Duration = Duration::from_secs(120);

/// What to start.
pub struct Spec {
    /// Name in messages and of the folder.
    pub name: String,
    /// The folder for results; by default one under the build folder that [`Bed::passed`] removes.
    pub out: Option<PathBuf>,
    /// One or two hosts; they are called `a` and `b`.
    pub hosts: Vec<HostSpec>,
}

/// One host.
#[derive(Clone)]
pub struct HostSpec {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory: u32,
    /// Further disks: `/dev/bed/NAME` on the host.
    pub disks: Vec<Disk>,
}

/// A disk of a host.
#[derive(Clone)]
pub struct Disk {
    /// Its name, at most 20 characters.
    pub name: String,
    /// What it holds at the start.
    pub content: Content,
    /// All hosts reach this one disk, as a LUN of a SAN.
    pub shared: bool,
}

impl Disk {
    /// Its file in the bed's folder `out`, as `host` has it.
    pub(crate) fn file(&self, out: &Path, host: &str) -> PathBuf {
        match self.shared {
            true => out.join(format!("{}.img", self.name)),
            false => out.join(format!("{}-{host}.img", self.name)),
        }
    }
}

/// What a disk holds at the start.
#[derive(Clone)]
pub enum Content {
    /// A copy of this file.
    CopyOf(PathBuf),
    /// Zeros, as large as this file.
    BlankLike(PathBuf),
}

impl Spec {
    /// `hosts` like hosts without further disks. One alone has two vCPUs and 4 GiB; of two each has one vCPU and 3 GiB:
    /// on two processors two such hosts are no slower, and what vCPUs of one host race for in the emulator is not met.
    pub fn new(name: &str, hosts: usize) -> Self {
        let (cpus, memory) = if hosts == 1 { (2, 4096) } else { (1, 3072) };
        let host = HostSpec {
            cpus,
            memory,
            disks: Vec::new(),
        };
        Self {
            name: name.into(),
            out: None,
            hosts: vec![host; hosts],
        }
    }

    /// Gives host number `host` a copy of the Debian guest's disk.
    pub fn guest_disk(mut self, host: usize, name: &str) -> Result<Self> {
        let content = Content::CopyOf(places::images()?.join("guest/disk.img"));
        self.hosts[host].disks.push(Disk {
            name: name.into(),
            content,
            shared: false,
        });
        Ok(self)
    }

    /// Gives all hosts one copy of the Debian guest's disk together.
    pub fn shared_guest_disk(mut self, name: &str) -> Result<Self> {
        let disk = Disk {
            name: name.into(),
            content: Content::CopyOf(places::images()?.join("guest/disk.img")),
            shared: true,
        };
        for host in &mut self.hosts {
            host.disks.push(disk.clone());
        }
        Ok(self)
    }

    /// Gives host number `host` a blank disk of the size of the Debian guest's.
    pub fn blank_disk(mut self, host: usize, name: &str) -> Result<Self> {
        let content = Content::BlankLike(places::images()?.join("guest/disk.img"));
        self.hosts[host].disks.push(Disk {
            name: name.into(),
            content,
            shared: false,
        });
        Ok(self)
    }
}

/// A running bed. Its hosts and their disks end with it; its logs stay unless it [passed](Bed::passed).
pub struct Bed {
    hosts: Vec<Host>,
    specs: Vec<HostSpec>,
    places: Places,
    keep: bool,
    passed: bool,
}

impl Bed {
    /// Starts the hosts and waits until they take commands.
    pub fn start(spec: Spec) -> Result<Self> {
        places::require("qemu-system-x86_64", "qemu-system-x86")?;
        let (images, programs) = (places::images()?, places::programs()?);
        if spec.hosts.is_empty() || spec.hosts.len() > 2 {
            bail!("a bed has one or two hosts, not {}", spec.hosts.len());
        }
        let keep = spec.out.is_some();
        let out = match spec.out {
            Some(dir) => dir,
            None => temporary(&programs, &spec.name)?,
        };
        for dir in ["cmd-a", "cmd-b", "logs", "arbiter"] {
            let _ = fs::remove_dir_all(out.join(dir));
            fs::create_dir_all(out.join(dir)).with_context(|| out.display().to_string())?;
        }
        end_with_signal();
        let mut bed = Self {
            hosts: Vec::new(),
            specs: spec.hosts,
            places: Places {
                images,
                programs,
                out: out.canonicalize()?,
                sockets: sockets()?,
            },
            keep,
            passed: false,
        };
        let joined = bed.specs.len() == 2;
        for (name, host) in ["a", "b"].into_iter().zip(&bed.specs) {
            make_disks(name, host, &bed.places)?;
            bed.hosts.push(Host::start(name, host, joined, &bed.places)?);
        }
        for host in &mut bed.hosts {
            host.wait_ready(BOOT)?;
        }
        Ok(bed)
    }

    /// Host `a` or `b`; panics for another name.
    pub fn host(&mut self, name: &str) -> &mut Host {
        self.hosts
            .iter_mut()
            .find(|host| host.name() == name)
            .unwrap_or_else(|| panic!("the bed has no host {name}"))
    }

    /// Boots a host that is off, with its disks as they are, and waits until it takes commands.
    pub fn restart(&mut self, name: &str) -> Result<()> {
        let joined = self.specs.len() == 2;
        for (host, spec) in self.hosts.iter_mut().zip(&self.specs) {
            if host.name() == name {
                *host = Host::start(name, spec, joined, &self.places)?;
                host.wait_ready(BOOT)?;
            }
        }
        Ok(())
    }

    /// All hosts.
    pub fn hosts(&mut self) -> &mut [Host] {
        &mut self.hosts
    }

    /// The folder with results, logs and disks; `/out` on the hosts.
    pub fn out(&self) -> &Path {
        &self.places.out
    }

    /// The file of a disk; an error when the host has none of this name.
    pub fn disk(&self, host: &str, disk: &str) -> Result<PathBuf> {
        let hosts = self.hosts.iter().zip(&self.specs);
        let mut disks = hosts
            .filter(|(running, _)| running.name() == host)
            .flat_map(|(_, spec)| &spec.disks);
        let disk = disks
            .find(|d| d.name == disk)
            .with_context(|| format!("host {host} has no disk {disk}"))?;
        Ok(disk.file(self.out(), host))
    }

    /// Ends a bed of which all went well: nothing of it stays.
    pub fn passed(mut self) {
        self.passed = true;
    }

    /// Powers all hosts off that still run, so that all they wrote is on their disks.
    pub fn power_off(&mut self) -> Result<()> {
        self.hosts.iter_mut().try_for_each(Host::power_off)
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.hosts.clear();
        let _ = fs::remove_dir_all(&self.places.sockets);
        if self.keep {
            return;
        }
        if self.passed {
            let _ = fs::remove_dir_all(&self.places.out);
        } else {
            eprintln!("bed 2: logs are in {}", self.places.out.display());
            remove_disks(&self.places.out);
        }
    }
}

/// Checks that the ext4 file system in `image` is clean: `e2fsck -fn` finds nothing, and no journal waits for replay.
pub fn check_file_system(image: &Path) -> Result<()> {
    places::require("e2fsck", "e2fsprogs")?;
    let output = Command::new("e2fsck").arg("-fn").arg(image).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() || text.contains("skipping journal recovery") {
        bail!("{}: the file system is not clean:\n{text}", image.display());
    }
    Ok(())
}

/// The content of a file in the ext4 file system in `image`.
pub fn file_in_image(image: &Path, path: &str) -> Result<String> {
    places::require("debugfs", "e2fsprogs")?;
    let output = Command::new("debugfs")
        .args(["-R", &format!("cat {path}")])
        .arg(image)
        .output()?;
    if output.stdout.is_empty() {
        bail!(
            "{}: no {path}: {}",
            image.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A folder for one bed under the build folder; those that ended processes left are removed.
fn temporary(programs: &Path, name: &str) -> Result<PathBuf> {
    let parent = programs.join("bed2-runs");
    fs::create_dir_all(&parent)?;
    for entry in fs::read_dir(&parent)?.flatten() {
        let pid = entry.file_name().to_string_lossy().rsplit('.').next().map(String::from);
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            remove_disks(&entry.path());
        }
    }
    static COUNT: AtomicU32 = AtomicU32::new(1);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let dir = parent.join(format!("{name}-{number}.{}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir(&dir)?;
    Ok(dir)
}

/// A fresh folder for sockets.
fn sockets() -> Result<PathBuf> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("bed2.{}.{number}", std::process::id()));
    // An earlier process of the same number may have been killed.
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
    Ok(dir)
}

fn remove_disks(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|e| e == "img") {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// SIGINT and SIGTERM end this process; the hosts' processes end with the thread that started them (host.rs).
fn end_with_signal() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Ok(mut signals) = signal_hook::iterator::Signals::new([libc::SIGINT, libc::SIGTERM]) {
            std::thread::spawn(move || {
                if let Some(signal) = signals.forever().next() {
                    eprintln!("bed 2: interrupted; the hosts are ended");
                    std::process::exit(128 + signal);
                }
            });
        }
    });
}
