//! [`Bed`]: the hosts, their disks and the arbiter; how a guest is booted, shadowed and protected.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cleanup::{self, KEEP, Registered};
use crate::images;
use crate::netns::{GUEST_IP, Network, TAP};
use crate::process::{Vmm, binary};

/// MAC address of the guest.
pub const MAC: &str = "52:54:00:f7:00:01";
/// Hang guard of the guest's boot. QEMU without KVM takes longest.
pub const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// Hang guard of a pre-copy.
pub const PROTECT_LIMIT: Duration = Duration::from_secs(120);

/// How the VM looks.
#[derive(Debug, Clone)]
pub struct Options {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Where they run, as for `--cpus affinity=` (empty: anywhere).
    pub affinity: &'static str,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Disk in MiB.
    pub disk_mib: u64,
    /// A second disk in MiB, full of bytes that the guest does not touch (0: there is none).
    pub data_mib: u64,
    /// Disks beside that one, as large, which the guest leaves alone.
    pub idle_disks: u32,
    /// Format of the disk on hosts a and b: `raw` or `qcow2`.
    pub image_types: [&'static str; 2],
    /// Further words of the guest's command line.
    pub cmdline: String,
    /// Silence after which the other side counts as dead. Longer than the product's default, so that a machine that is
    /// busy with other work does not look like a dead one; a killed process is noticed by its closed connection.
    pub heartbeat_timeout_ms: u32,
    /// Further limits, as for `ft enable --limits`.
    pub limits: Vec<String>,
    /// The log channel is TLS.
    pub tls: bool,
    /// Flush durability policy.
    pub durability: &'static str,
    /// Both hosts have one disk.
    pub shared: bool,
    /// The spare host is used.
    pub spares: bool,
    /// What becomes of a shadow that differs.
    pub audit: &'static str,
    /// The VMM's program instead of the one beside this program. It may lack FT, so VMs get no arbiter.
    pub program: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            vcpus: 2,
            affinity: "",
            memory_mib: 256,
            disk_mib: 16,
            data_mib: 0,
            idle_disks: 0,
            image_types: ["raw"; 2],
            cmdline: String::new(),
            heartbeat_timeout_ms: 3000,
            limits: Vec::new(),
            tls: false,
            durability: "memory-of-both",
            shared: false,
            spares: false,
            audit: "stop",
            program: None,
        }
    }
}

/// One of the hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Namespace `a`.
    A,
    /// Namespace `b`.
    B,
    /// Namespace `s`: the spare host, where a test needs three.
    S,
}

impl Side {
    /// Name of the namespace.
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
            Self::S => "s",
        }
    }

    /// The other one of hosts a and b.
    pub fn other(self) -> Self {
        if self == Self::A { Self::B } else { Self::A }
    }
}

/// A VMM on a host.
pub struct Host {
    /// Where.
    pub side: Side,
    /// The process.
    pub vmm: Vmm,
    /// Its serial log.
    pub serial: PathBuf,
    /// Its disk.
    pub disk: PathBuf,
    /// Where it waits for a primary, when it is a backup.
    pub peer: String,
}

impl Host {
    /// Changes one bit of its disk behind the VMM's back, in the last sector, which the guest reaches last; its offset.
    pub fn flip_disk_bit(&self) -> Result<u64> {
        let disk = File::options().read(true).write(true).open(&self.disk)?;
        let at = disk.metadata()?.len() - 1;
        let mut byte = [0];
        disk.read_exact_at(&mut byte, at)?;
        disk.write_all_at(&[byte[0] ^ 4], at)?;
        Ok(at)
    }
}

/// The hosts, the network between them, a directory for all files. One bed at a time in a process: two cores are no
/// place for more, and tests are threads of one process.
pub struct Bed {
    /// The network; also the clients' way to the guest.
    pub network: Arc<Network>,
    /// Directory of all files.
    pub dir: PathBuf,
    /// How the VM looks.
    pub options: Options,
    /// Where a host's disk is, if not at its usual place.
    moved: Vec<(Side, PathBuf)>,
    started: u32,
    keep: bool,
    registered: Option<Registered>,
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

/// The test guest.
pub fn guest_image() -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let image = root.join("test-guest/target/release/test-guest");
    let missing = "the test guest is not built: run `(cd test-guest && cargo build --release)` first";
    image.canonicalize().context(missing)
}

impl Bed {
    /// Builds network and directory.
    pub fn new(options: Options) -> Result<Self> {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: geteuid(2) cannot fail and touches no memory.
        if unsafe { libc::geteuid() } != 0 {
            bail!("this needs root: network namespaces and taps are made");
        }
        cleanup::install()?;
        static COUNT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let dir = std::env::temp_dir().join(cleanup::name(count));
        let registered = Some(Registered::directory(&dir));
        let mut this = Self {
            network: Arc::new(Network::new()?),
            dir,
            options,
            moved: Vec::new(),
            started: 0,
            keep: false,
            registered,
            _alone: alone,
        };
        let made = cleanup::creating(|| std::fs::create_dir_all(this.dir.join("arbiter")));
        made.with_context(|| this.dir.display().to_string())?;
        for side in [Side::A, Side::B, Side::S] {
            this.new_disk(side)?;
        }
        this.started = 0;
        if this.options.tls {
            this.make_certs()?;
        }
        Ok(this)
    }

    fn make_certs(&self) -> Result<()> {
        let out = self.dir.join("certs");
        let hosts = [Side::A, Side::B, Side::S].map(|side| Network::log_ip(side.name()));
        let status = std::process::Command::new(binary("ch-remote")?)
            .args(["--json", "ft", "make-certs", "--out"])
            .arg(out)
            .args(hosts)
            .stdout(std::process::Stdio::null())
            .status()?;
        anyhow::ensure!(status.success(), "ch-remote ft make-certs: {status}");
        Ok(())
    }

    /// Options of `ch-remote ft` that protect the log channel, on the host of `side`.
    fn security(&self, side: Side) -> Vec<String> {
        if !self.options.tls {
            return vec!["--insecure".into()];
        }
        let certs = self.dir.join("certs").join(Network::log_ip(side.name()));
        let mut args = vec!["--tls".to_string(), certs.display().to_string()];
        // Of three, any other may be at the far end.
        if !self.options.spares {
            args.extend(["--tls-peer", Network::log_ip(side.other().name())].map(String::from));
        }
        args
    }

    /// The disk of a host.
    pub fn disk(&self, side: Side) -> PathBuf {
        let moved = self.moved.iter().find(|(of, _)| *of == side);
        let name = if self.options.shared { "shared" } else { side.name() };
        moved.map_or_else(|| self.dir.join(format!("{name}.img")), |(_, path)| path.clone())
    }

    /// Puts a host's disk, empty, somewhere else in the bed's directory.
    pub fn move_disk(&mut self, side: Side, to: &str) -> Result<()> {
        std::fs::remove_file(self.disk(side))?;
        self.moved.push((side, self.dir.join(to)));
        self.new_disk(side)
    }

    /// Makes a host's disks anew, empty.
    pub fn new_disk(&self, side: Side) -> Result<()> {
        for (_, path) in self.idle_disks(side) {
            File::create(path)?.set_len(self.options.disk_mib << 20)?;
        }
        match self.image_type(side) {
            "raw" => File::create(self.disk(side))?.set_len(self.options.disk_mib << 20)?,
            format => {
                let (path, size) = (
                    self.disk(side).display().to_string(),
                    format!("{}M", self.options.disk_mib),
                );
                images::qemu_img(&["create", "-q", "-f", format, &path, &size])?;
            }
        }
        Ok(())
    }

    /// The second disk of a host.
    pub fn data(&self, side: Side) -> PathBuf {
        self.dir.join(format!("{}.data", side.name()))
    }

    fn data_disk(&self, side: Side) -> Option<(String, PathBuf)> {
        (self.options.data_mib > 0).then(|| ("data".into(), self.data(side)))
    }

    /// Fills the second disk of a host.
    fn fill_data(&self, side: Side) -> Result<()> {
        let mut file = File::create(self.data(side))?;
        let mut bytes = vec![0; 1 << 20];
        for n in 0..self.options.data_mib {
            load::pattern::fill(n + 1, 0, &mut bytes);
            file.write_all(&bytes)?;
        }
        Ok(())
    }

    /// Ids and files of the disks that the guest leaves alone.
    fn idle_disks(&self, side: Side) -> Vec<(String, PathBuf)> {
        let file = |n| self.dir.join(format!("{}-idle{n}.img", side.name()));
        (0..self.options.idle_disks)
            .map(|n| (format!("idle{n}"), file(n)))
            .collect()
    }

    fn image_type(&self, side: Side) -> &'static str {
        self.options.image_types[usize::from(side == Side::B)]
    }

    /// The option that says of which format a host's disk is.
    fn format(&self, side: Side) -> String {
        match self.image_type(side) {
            // Not said, as by most who use it.
            "raw" if self.image_type(side.other()) == "raw" => String::new(),
            format => format!(",image_type={format}"),
        }
    }

    /// `file:DIR` of the arbiter.
    pub fn arbiter(&self) -> String {
        format!("file:{}", self.dir.join("arbiter").display())
    }

    /// The guest's command line.
    pub fn cmdline(&self) -> String {
        format!("ip={GUEST_IP}/24 {}", self.options.cmdline).trim().to_string()
    }

    fn cpus(&self) -> String {
        let Options { vcpus, affinity, .. } = &self.options;
        match *affinity {
            "" => format!("boot={vcpus}"),
            affinity => format!("boot={vcpus},affinity={affinity}"),
        }
    }

    /// The VM's options on the VMM's command line.
    pub fn vm_args(&self, side: Side, serial: &Path) -> Result<Vec<String>> {
        let args = [
            ("--kernel", guest_image()?.display().to_string()),
            ("--cmdline", self.cmdline()),
            ("--cpus", self.cpus()),
            ("--memory", format!("size={}M", self.options.memory_mib)),
            (
                "--disk",
                format!("path={}{}", self.disk(side).display(), self.format(side)),
            ),
            ("--net", format!("tap={TAP},mac={MAC}")),
            ("--serial", format!("file={}", serial.display())),
            ("--console", "off".into()),
        ];
        let arbiter = self.options.program.is_none().then(|| ("--ft-arbiter", self.arbiter()));
        let extra = self.idle_disks(side).into_iter().chain(self.data_disk(side));
        let extra = extra.map(|(id, path)| ("--disk", format!("path={},id={id}", path.display())));
        Ok(args
            .into_iter()
            .chain(arbiter)
            .chain(extra)
            .flat_map(|(option, value)| [option.to_string(), value])
            .collect())
    }

    fn next_name(&mut self, side: Side) -> String {
        self.started += 1;
        format!("{}{}", side.name(), self.started)
    }

    /// Starts a VMM without a VM.
    pub fn start(&mut self, side: Side, args: &[String]) -> Result<Host> {
        let name = self.next_name(side);
        let serial = self.dir.join(format!("{name}.serial"));
        let program = match &self.options.program {
            Some(program) => program.clone(),
            None => binary("cloud-hypervisor")?,
        };
        let vmm = Vmm::start(&program, &name, &self.network.ns(side.name()), &self.dir, args)?;
        Ok(Host {
            side,
            vmm,
            serial,
            disk: self.disk(side),
            peer: String::new(),
        })
    }

    /// Boots the guest and waits until its services listen.
    pub fn boot(&mut self, side: Side) -> Result<Host> {
        let serial = self.dir.join(format!("{}{}.serial", side.name(), self.started + 1));
        if self.options.data_mib > 0 && !self.data(side).exists() {
            self.fill_data(side)?;
        }
        let args = self.vm_args(side, &serial)?;
        let mut host = self.start(side, &args)?;
        wait_ready(&mut host, 1)?;
        Ok(host)
    }

    /// Starts a VMM that waits for a primary.
    pub fn backup(&mut self, side: Side) -> Result<Host> {
        let mut host = self.start(side, &[])?;
        self.receive(&mut host)?;
        Ok(host)
    }

    /// Lets a VMM wait for a primary.
    pub fn receive(&self, host: &mut Host) -> Result<()> {
        let peer = format!(
            "tcp:{}:{}",
            Network::log_ip(host.side.name()),
            7000 + self.started % 10_000
        );
        self.receive_at(host, &peer)
    }

    /// The same, at a given address.
    pub fn receive_at(&self, host: &mut Host, peer: &str) -> Result<()> {
        let disk = format!("id=_disk0,path={}{}", host.disk.display(), self.format(host.side));
        let serial = format!("file={}", host.serial.display());
        let (net, arbiter) = (format!("id=_net1,tap={TAP}"), self.arbiter());
        let args = [
            "ft", "receive", peer, "--disk", &disk, "--net", &net, "--serial", &serial,
        ];
        let idle = self.idle_disks(host.side).into_iter().chain(self.data_disk(host.side));
        let idle = idle.flat_map(|(id, path)| ["--disk".into(), format!("id={id},path={}", path.display())]);
        let more: Vec<String> = self.security(host.side).into_iter().chain(idle).collect();
        let more: Vec<&str> = more.iter().map(String::as_str).collect();
        host.vmm
            .remote(&[&args[..], &["--arbiter", &arbiter], &more].concat())?;
        host.peer = peer.into();
        Ok(())
    }

    /// The same by the VMM's own options instead of a request.
    pub fn backup_by_options(&mut self, side: Side) -> Result<Host> {
        let listen = format!("tcp:{}:{}", Network::log_ip(side.name()), 7000 + self.started % 10_000);
        let args = [
            (
                "--ft-receive",
                format!("listen={listen},arbiter={},insecure=on", self.arbiter()),
            ),
            ("--disk", format!("id=_disk0,path={}", self.disk(side).display())),
            ("--net", format!("id=_net1,tap={TAP}")),
            ("--serial", "null".into()),
        ];
        let args: Vec<String> = args
            .into_iter()
            .flat_map(|(option, value)| [option.to_string(), value])
            .collect();
        let mut host = self.start(side, &args)?;
        host.peer = listen;
        Ok(host)
    }

    /// Protects `primary` by `backup`; the time it took is returned.
    pub fn protect(&self, primary: &mut Host, backup: &mut Host) -> Result<Duration> {
        let start = Instant::now();
        let args = self.enable_args(backup);
        let args: Vec<&str> = args.iter().map(String::as_str).chain(["--no-wait"]).collect();
        let enable = primary.vmm.remote(&args);
        enable.with_context(|| format!("backup {}: {}", backup.vmm.name, backup.vmm.tail()))?;
        wait_protected(primary, backup)?;
        Ok(start.elapsed())
    }

    /// `ft enable` with what this bed needs.
    pub fn enable_args(&self, backup: &Host) -> Vec<String> {
        let (arbiter, limit) = (
            self.arbiter(),
            format!("heartbeat_timeout_ms={}", self.options.heartbeat_timeout_ms),
        );
        let args = [
            "ft",
            "enable",
            "--peer",
            &backup.peer,
            "--arbiter",
            &arbiter,
            "--durability",
            self.options.durability,
            "--audit",
            self.options.audit,
            "--limits",
            &limit,
        ];
        [
            args.map(String::from).to_vec(),
            self.shared_args(),
            self.options.limits.clone(),
            self.security(backup.side.other()),
        ]
        .concat()
    }

    fn shared_args(&self) -> Vec<String> {
        let args = if self.options.shared {
            &["--shared-disk", "_disk0"][..]
        } else {
            &[]
        };
        args.iter().map(ToString::to_string).collect()
    }

    /// Keeps the directory, for a look at logs and disks.
    pub fn keep(&mut self) -> &Path {
        self.keep = true;
        // Without the mark a later run would sweep it.
        drop(File::create(self.dir.join(KEEP)));
        &self.dir
    }

    /// Deletes the files of a host that is no longer needed, but for its disk.
    pub fn forget_files(&self, host: &Host) {
        for ending in ["log", "err", "events", "serial", "sock"] {
            drop(std::fs::remove_file(
                self.dir.join(format!("{}.{ending}", host.vmm.name)),
            ));
        }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if !self.keep {
            cleanup::delete_directory(&self.dir);
        }
        self.registered = None;
    }
}

/// Waits until the serial log says for the `times`-th time that the services listen.
pub fn wait_ready(host: &mut Host, times: usize) -> Result<()> {
    let serial = host.serial.clone();
    host.vmm
        .wait_for("the guest's readiness", BOOT_LIMIT, |_| ready(&serial, times))
}

/// Whether the guest's services listen, by its serial log.
pub fn ready(serial: &Path, times: usize) -> Result<bool> {
    let text = String::from_utf8_lossy(&std::fs::read(serial).unwrap_or_default()).into_owned();
    if let Some(at) = text.find("test-guest: panic") {
        bail!("the guest panicked: {}", &text[at..]);
    }
    Ok(text.matches("test-guest: ready").count() >= times)
}

/// Waits until both sides say that the VM is protected; fails at once when one of them gave up.
pub fn wait_protected(primary: &mut Host, backup: &mut Host) -> Result<()> {
    for host in [primary, backup] {
        host.vmm.wait_for("FT state protected", PROTECT_LIMIT, |vmm| {
            let info = vmm.ft_info()?;
            match info["state"].as_str() {
                Some("protected") => Ok(true),
                Some(state @ ("failed" | "stopped" | "disabled" | "solo")) => {
                    bail!(
                        "{}: protection ended in state {state}: {}: {}",
                        vmm.name,
                        info["reason"],
                        vmm.tail()
                    )
                }
                _ => Ok(false),
            }
        })?;
    }
    Ok(())
}
