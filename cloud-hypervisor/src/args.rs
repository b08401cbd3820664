//! The command line of `cloud-hypervisor`: what it can hold, and what is to be done then.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use api::config::{
    ConsoleConfig, CpusConfig, DiskConfig, LandlockConfig, MemoryConfig, NetConfig, PayloadConfig, RngConfig,
};
use api::options::vmm::PathOrFd;
use api::{RestoreConfig, VmConfig};
use clap::{Arg, ArgAction, CommandFactory, FromArgMatches, Parser};

/// A virtual machine monitor, compatible with Cloud Hypervisor, with fault tolerance.
///
/// With --kernel the VM is created and booted at once; with --restore it comes from a snapshot; with --ft-receive this
/// VMM is the backup of a VM that runs elsewhere; otherwise the API (ch-remote) says what to do.
#[derive(Debug, Parser)]
#[command(
    name = "cloud-hypervisor",
    version,
    disable_version_flag = true,
    next_line_help = true
)]
#[command(
    after_help = "Options take key=value pairs with commas between; a value with a comma is put in \"quotes\".\n\
    Exit status: 0 after a clean end, 1 after an error, 2 for a wrong command line."
)]
pub struct Args {
    /// Serve the API on this Unix socket: PATH, path=PATH, or fd=N for a listening socket that was handed over.
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<String>,

    /// vCPUs: boot=N[,max=N][,topology=THREADS:CORES:DIES:PACKAGES] [default: boot=1]
    #[arg(long, value_name = "SPEC")]
    pub cpus: Option<String>,

    /// Guest RAM: size=SIZE[,mergeable=on|off][,shared=on|off][,hugepages=on|off][,hugepage_size=SIZE]
    /// [,prefault=on|off][,thp=on|off]; SIZE in bytes or with K, M, G, T [default: size=512M,thp=on]
    #[arg(long, value_name = "SPEC")]
    pub memory: Option<String>,

    /// Kernel to boot: a PVH ELF vmlinux or a bzImage.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    pub initramfs: Option<PathBuf>,

    /// Kernel command line.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,

    /// Block devices, each: path=FILE[,readonly=on|off][,direct=on|off][,serial=TEXT][,id=ID][,queue_size=N]
    /// [,image_type=raw|qcow2][,backing_files=on|off]. With --ft-receive: id=ID,path=FILE[,image_type=raw|qcow2], this
    /// host's file for the disk ID of the primary.
    #[arg(long, value_name = "SPEC", num_args = 1..)]
    pub disk: Vec<String>,

    /// Network devices, each: tap=NAME[,mac=MAC][,ip=ADDRESS,mask=MASK][,host_mac=MAC][,mtu=N][,id=ID][,queue_size=N]
    /// [,offload_tso|offload_ufo|offload_csum=on|off]. With --ft-receive: id=ID,tap=NAME, this host's tap for the
    /// device ID of the primary.
    #[arg(long, value_name = "SPEC", num_args = 1..)]
    pub net: Vec<String>,

    /// Source of the guest's random numbers: src=FILE [default: src=/dev/urandom]
    #[arg(long, value_name = "SPEC")]
    pub rng: Option<String>,

    /// Serial port: off, null, tty or file=PATH [default: null; with --ft-receive: as on the primary]
    #[arg(long, value_name = "MODE")]
    pub serial: Option<String>,

    /// virtio console: off, null, tty or file=PATH [default: tty; with --ft-receive: as on the primary]
    #[arg(long, value_name = "MODE")]
    pub console: Option<String>,

    /// Write events as JSON: path=PATH or fd=N.
    #[arg(long, value_name = "SPEC")]
    pub event_monitor: Option<String>,

    /// What happens when a thread makes a system call that is not on its list: true ends the process, log makes the
    /// kernel log it (and lets it pass), false has no lists.
    #[arg(long, value_name = "true|false|log", default_value = "true", value_parser = seccomp_mode)]
    pub seccomp: sandbox::Mode,

    /// Touch no other files than those that the VM's options (or its configuration) name.
    #[arg(long)]
    pub landlock: bool,

    /// Files and directories beside those, each: path=PATH,access=r|w|rw. For example where snapshots go, the arbiter's
    /// directory and certificates, when later requests will name them.
    #[arg(long, value_name = "SPEC", num_args = 1.., requires = "landlock")]
    pub landlock_rules: Vec<String>,

    /// Append the log to this file [default: standard error]
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,

    /// Log more: -v what happens, -vv details, -vvv everything [default: warnings and errors]
    #[arg(short, action = ArgAction::Count)]
    pub verbose: u8,

    /// Restore a VM from a snapshot: source_url=file:///DIR[,resume=on|off][,prefault=on|off] [default: resume=off]
    #[arg(long, value_name = "SPEC")]
    pub restore: Option<String>,

    /// Be a backup: listen=tcp:HOST:PORT|unix:PATH[,arbiter=ARBITER][,tls=DIR[,tls_peer=NAME]][,insecure=on|off]; together
    /// with --disk, --net, --serial and --console for what differs on this host. ARBITER: as for --ft-arbiter. tls: take
    /// only primaries with a certificate (DIR has ca.pem, cert.pem, key.pem), of this name if one is given. insecure=on
    /// allows plain TCP beyond loopback.
    #[cfg(feature = "ft")]
    #[arg(long, value_name = "SPEC")]
    pub ft_receive: Option<String>,

    /// Arbiter of fault tolerance, unless a request names one: file:DIR, a directory that both hosts share, or
    /// etcd:HOST:PORT[+HOST:PORT...][+ca=FILE[+cert=FILE+key=FILE]][+prefix=/PATH], an etcd cluster.
    #[cfg(feature = "ft")]
    #[arg(long, value_name = "ARBITER")]
    pub ft_arbiter: Option<String>,

    /// Print the version.
    #[arg(short = 'V', long, action = ArgAction::Version)]
    version: Option<bool>,
}

/// Options of Cloud Hypervisor that are not offered.
const NOT_OFFERED: &[&str] = &[
    "balloon",
    "debug-console",
    "device",
    "firmware",
    "fs",
    "gdb",
    "generic-vhost-user",
    "host-data",
    "igvm",
    "memory-zone",
    "no-shutdown",
    "numa",
    "pci-segment",
    "platform",
    "pmem",
    "pvpanic",
    "rate-limit-group",
    "tpm",
    "user-device",
    "vdpa",
    "vsock",
    "watchdog",
    #[cfg(not(feature = "ft"))]
    "ft-receive",
    #[cfg(not(feature = "ft"))]
    "ft-arbiter",
];

/// What to do at the start.
#[derive(Debug)]
pub enum Start {
    /// Only serve the API.
    Wait,
    /// Create this VM and boot it.
    Boot(Box<VmConfig>),
    /// Restore a VM.
    Restore(RestoreConfig),
    /// Be a backup.
    #[cfg(feature = "ft")]
    Receive(ft::config::FtReceiveConfig),
}

impl Args {
    /// Reads the process's arguments; ends the process for `--help`, `--version` and what clap refuses.
    pub fn from_command_line() -> Result<Self> {
        let supported = supported();
        let hidden = NOT_OFFERED.iter().map(|name| {
            Arg::new(*name)
                .long(*name)
                .hide(true)
                .num_args(0..)
                .allow_hyphen_values(false)
                .action(ArgAction::Append)
        });
        let matches = Self::command().args(hidden).get_matches();
        for name in NOT_OFFERED {
            let given = matches.value_source(name) == Some(clap::parser::ValueSource::CommandLine);
            ensure!(!given, "--{name} is not supported by this VMM; supported: {supported}");
        }
        Ok(Self::from_arg_matches(&matches)?)
    }

    /// What the options ask for. Nothing of the host is touched.
    pub fn start(&self) -> Result<Start> {
        // Wrong ones are a wrong command line, whatever the mode.
        self.landlock_rules()?;
        let modes = [
            ("--kernel", self.kernel.is_some()),
            ("--restore", self.restore.is_some()),
            #[cfg(feature = "ft")]
            ("--ft-receive", self.ft_receive.is_some()),
        ];
        let given: Vec<&str> = modes
            .iter()
            .filter(|(_, given)| *given)
            .map(|(name, _)| *name)
            .collect();
        ensure!(given.len() <= 1, "{} cannot be used together", given.join(" and "));
        match given.first() {
            Some(&"--kernel") => self.boot(),
            Some(&"--restore") => {
                self.refuse_others("--restore", &[])?;
                let config = RestoreConfig::parse(self.restore.as_deref().unwrap_or_default())?;
                Ok(Start::Restore(config))
            }
            #[cfg(feature = "ft")]
            Some(_) => self.receive(),
            _ => {
                self.refuse_others("a VM without --kernel", &[])?;
                ensure!(
                    self.api_socket.is_some(),
                    "nothing to do: give --kernel FILE to boot a VM, or --api-socket PATH to be told by ch-remote"
                );
                Ok(Start::Wait)
            }
        }
    }

    fn boot(&self) -> Result<Start> {
        let mut config = VmConfig {
            payload: Some(PayloadConfig {
                kernel: self.kernel.clone(),
                initramfs: self.initramfs.clone(),
                cmdline: self.cmdline.clone(),
                ..Default::default()
            }),
            ..Default::default()
        };
        if let Some(text) = &self.cpus {
            config.cpus = CpusConfig::parse(text)?;
        }
        if let Some(text) = &self.memory {
            config.memory = MemoryConfig::parse(text)?;
        }
        if !self.disk.is_empty() {
            config.disks = Some(
                self.disk
                    .iter()
                    .map(|text| DiskConfig::parse(text))
                    .collect::<Result<_, _>>()?,
            );
        }
        if !self.net.is_empty() {
            config.net = Some(
                self.net
                    .iter()
                    .map(|text| NetConfig::parse(text))
                    .collect::<Result<_, _>>()?,
            );
        }
        if let Some(text) = &self.rng {
            config.rng = RngConfig::parse(text)?;
        }
        if let Some(text) = &self.serial {
            config.serial = ConsoleConfig::parse("--serial", text)?;
        }
        if let Some(text) = &self.console {
            config.console = ConsoleConfig::parse("--console", text)?;
        }
        config.landlock_enable = self.landlock;
        config.landlock_rules = Some(self.landlock_rules()?).filter(|rules| !rules.is_empty());
        config.fill_in()?;
        config.validate()?;
        Ok(Start::Boot(Box::new(config)))
    }

    #[cfg(feature = "ft")]
    fn receive(&self) -> Result<Start> {
        use api::options::ft;
        self.refuse_others("--ft-receive", &["--disk", "--net", "--serial", "--console"])?;
        let mut config = ft::receive(self.ft_receive.as_deref().unwrap_or_default())?;
        config.disks = self.disk.iter().map(|text| ft::disk(text)).collect::<Result<_, _>>()?;
        config.net = self.net.iter().map(|text| ft::net(text)).collect::<Result<_, _>>()?;
        config.serial = self
            .serial
            .as_deref()
            .map(|text| ft::console("--serial", text))
            .transpose()?;
        config.console = self
            .console
            .as_deref()
            .map(|text| ft::console("--console", text))
            .transpose()?;
        Ok(Start::Receive(config))
    }

    /// Options that describe a new VM mean nothing where none is made.
    fn refuse_others(&self, mode: &str, allowed: &[&str]) -> Result<()> {
        let given = [
            ("--cpus", self.cpus.is_some()),
            ("--memory", self.memory.is_some()),
            ("--initramfs", self.initramfs.is_some()),
            ("--cmdline", self.cmdline.is_some()),
            ("--disk", !self.disk.is_empty()),
            ("--net", !self.net.is_empty()),
            ("--rng", self.rng.is_some()),
            ("--serial", self.serial.is_some()),
            ("--console", self.console.is_some()),
        ];
        for (name, given) in given {
            if given && !allowed.contains(&name) {
                bail!("{name} cannot be used with {mode}");
            }
        }
        Ok(())
    }

    /// Rules of Landlock.
    pub fn landlock_rules(&self) -> Result<Vec<LandlockConfig>> {
        let parse = |text: &String| {
            let rule = LandlockConfig::parse(text)?;
            let known = sandbox::landlock::Access::parse(&rule.access).is_some();
            ensure!(known, "--landlock-rules: access={} must be r, w or rw", rule.access);
            Ok(rule)
        };
        self.landlock_rules.iter().map(parse).collect()
    }

    /// Where the API is served.
    pub fn api_socket(&self) -> Result<Option<PathOrFd>> {
        Ok(self
            .api_socket
            .as_deref()
            .map(|text| PathOrFd::parse("--api-socket", text))
            .transpose()?)
    }

    /// Where events go.
    pub fn event_monitor(&self) -> Result<Option<PathOrFd>> {
        Ok(self
            .event_monitor
            .as_deref()
            .map(|text| PathOrFd::parse("--event-monitor", text))
            .transpose()?)
    }

    /// Default arbiter.
    pub fn arbiter(&self) -> Option<String> {
        #[cfg(feature = "ft")]
        return self.ft_arbiter.clone();
        #[cfg(not(feature = "ft"))]
        None
    }
}

fn seccomp_mode(text: &str) -> Result<sandbox::Mode, String> {
    match text {
        "true" => Ok(sandbox::Mode::Kill),
        "log" => Ok(sandbox::Mode::Log),
        "false" => Ok(sandbox::Mode::Off),
        _ => Err("possible are true, false and log".into()),
    }
}

fn supported() -> String {
    let command = Args::command();
    let names: Vec<String> = command
        .get_arguments()
        .filter_map(|a| a.get_long())
        .map(|l| format!("--{l}"))
        .collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(args: &[&str]) -> Result<Start> {
        Args::try_parse_from(std::iter::once(&"cloud-hypervisor").chain(args))?.start()
    }

    #[test]
    fn a_vm_from_options() {
        let args = [
            "--kernel", "/k", "--cpus", "boot=2", "--memory", "size=1G", "--disk", "path=/a", "path=/b",
        ];
        let Start::Boot(config) = start(&args).unwrap() else {
            panic!("no VM")
        };
        assert_eq!((config.cpus.boot_vcpus, config.memory.size), (2, 1 << 30));
        let ids: Vec<_> = config.disks.iter().flatten().filter_map(|d| d.id.as_deref()).collect();
        assert_eq!(ids, ["_disk0", "_disk1"]);
        assert_eq!(config.console.mode, api::ConsoleMode::Tty);
        assert_eq!(config.serial.mode, api::ConsoleMode::Null);
    }

    #[test]
    fn options_that_do_not_fit_together() {
        let reason = |args: &[&str]| start(args).unwrap_err().to_string();
        assert!(reason(&["--kernel", "/k", "--restore", "source_url=x"]).contains("--kernel and --restore"));
        assert!(reason(&["--restore", "source_url=x", "--cpus", "boot=1"]).contains("--cpus cannot be used"));
        assert!(reason(&["--api-socket", "/s", "--disk", "path=/a"]).contains("--disk cannot be used"));
        assert!(reason(&[]).contains("nothing to do"));
        assert!(matches!(start(&["--api-socket", "/s"]), Ok(Start::Wait)));
    }

    #[cfg(feature = "ft")]
    #[test]
    fn a_backup() {
        let args = [
            "--ft-receive",
            "listen=tcp:h:1",
            "--disk",
            "id=_disk0,path=/b",
            "--serial",
            "file=/s",
        ];
        let Start::Receive(config) = start(&args).unwrap() else {
            panic!("no backup")
        };
        assert_eq!(config.disks[0].id, "_disk0");
        assert_eq!(config.serial.as_deref(), Some("file:/s"));
        assert_eq!(config.console, None);
        assert!(start(&["--ft-receive", "listen=tcp:h:1", "--cpus", "boot=1"]).is_err());
        assert!(start(&["--ft-receive", "listen=tcp:h:1", "--disk", "path=/b"]).is_err());
    }

    #[test]
    fn landlock() {
        let rule = "path=/snapshots,access=rw";
        let args = [
            "--kernel",
            "/k",
            "--landlock",
            "--landlock-rules",
            rule,
            "path=/certs,access=r",
        ];
        let Start::Boot(config) = start(&args).unwrap() else {
            panic!("no VM")
        };
        assert!(config.landlock_enable);
        assert_eq!(config.landlock_rules.map(|rules| rules.len()), Some(2));
        assert!(start(&["--kernel", "/k", "--landlock-rules", rule]).is_err());
        assert!(start(&["--kernel", "/k", "--landlock", "--landlock-rules", "path=/x,access=x"]).is_err());
    }

    #[test]
    fn filters_are_on_unless_told_otherwise() {
        let mode = |args: &[&str]| Args::try_parse_from([&["cloud-hypervisor"], args].concat()).map(|a| a.seccomp);
        assert_eq!(mode(&[]).unwrap(), sandbox::Mode::Kill);
        assert_eq!(mode(&["--seccomp", "log"]).unwrap(), sandbox::Mode::Log);
        assert_eq!(mode(&["--seccomp", "false"]).unwrap(), sandbox::Mode::Off);
        assert!(mode(&["--seccomp", "maybe"]).is_err());
    }

    #[test]
    fn what_is_not_offered_is_no_option_of_ours() {
        let command = Args::command();
        for name in NOT_OFFERED {
            assert!(command.get_arguments().all(|a| a.get_long() != Some(name)), "{name}");
        }
    }
}
