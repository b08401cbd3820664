//! The command line of `ch-remote`.

use std::path::PathBuf;

#[cfg(feature = "ft")]
use clap::Args;
use clap::{Parser, Subcommand};

/// Controls a cloud-hypervisor VMM through its API socket.
#[derive(Debug, Parser)]
#[command(name = "ch-remote", version)]
#[command(after_help = "Exit status: 0 when done, 1 after an error, 2 for a wrong command line.")]
pub struct Cli {
    /// The VMM's API socket: what it was given as --api-socket.
    #[arg(long, value_name = "PATH", global = true)]
    pub api_socket: Option<PathBuf>,

    /// Print JSON: results on standard output, errors ({"code", "message"}) on standard error.
    #[arg(long, global = true)]
    pub json: bool,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the VMM is to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Ask the VMM for its version (JSON)
    Ping,
    /// Create a VM from its configuration in JSON; it is not booted
    Create {
        /// File with the configuration; - for standard input
        #[arg(default_value = "-")]
        config: PathBuf,
    },
    /// Boot the created VM
    Boot,
    /// Print the VM's configuration and state (JSON)
    Info,
    /// Print the VM's counters (JSON)
    Counters,
    /// Pause the VM
    Pause,
    /// Let the paused VM go on
    Resume,
    /// Reboot the VM as by its reset button
    Reboot,
    /// Press the VM's power button: its system shuts down if it cares
    PowerButton,
    /// Shut the VM down at once; its configuration stays
    Shutdown,
    /// Delete the VM, running or not
    Delete,
    /// End the VMM, and its VM with it
    ShutdownVmm,
    /// Write a snapshot of the paused VM
    Snapshot {
        /// file:///DIRECTORY on the VMM's host
        url: String,
    },
    /// Restore a VM from a snapshot
    Restore {
        /// source_url=file:///DIRECTORY[,resume=on|off][,prefault=on|off]
        spec: String,
    },
    /// Fault tolerance: protect a running VM by a backup on another host
    #[cfg(feature = "ft")]
    #[command(subcommand)]
    Ft(FtCommand),
    /// Anything else, to be refused by name.
    #[command(external_subcommand)]
    Other(Vec<String>),
}

/// Fault tolerance.
#[cfg(feature = "ft")]
#[derive(Debug, Subcommand)]
pub enum FtCommand {
    /// Make this VMM (without a VM) a backup that waits for its primary
    Receive(Receive),
    /// Protect this VMM's running VM: copy RAM and disks to the backup while the VM runs, then keep both in step
    ///
    /// Waits until the VM is protected and shows how far the copy is. Interrupting the waiting does not end the enabling:
    /// `ft info` tells how it goes on, `ft disable` ends it.
    Enable(Enable),
    /// Make certificates for `--tls`: an authority and one directory per host, to be copied there (no VMM is needed)
    MakeCerts {
        /// New directory for them; its ca-key.pem signs more hosts' certificates later: keep it safe
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Hosts, by the name or address that others use in --peer
        #[arg(required = true, value_name = "HOST")]
        hosts: Vec<String>,
    },
    /// End protection: the VM goes on without a backup; a backup waits no longer
    Disable,
    /// Planned switchover: the backup becomes the primary, the VM goes on there
    Failover,
    /// Change limits while the VM is protected; without settings, show them
    Config {
        /// Limits as KEY=VALUE: max_epoch_ms (1-10000, default 200): longest epoch; min_epoch_us (0-1000000, 200):
        /// shortest epoch; max_epoch_mib (1-65536, 64): data that ends an epoch; overhead_percent (1-100, 100 = no
        /// bound): share of the time that checkpoints may take, epochs become as long as that needs; max_lag_mib
        /// (512): data not yet committed, beyond half of which the guest is slowed down; heartbeat_ms (5-10000, 50);
        /// heartbeat_timeout_ms (500, at least 3 heartbeats): silence after which the peer counts as dead;
        /// precopy_mib_s (0 = no limit): rate of the first copy; audit_mib_s (0-65536, 16): RAM of the backup that is
        /// compared with the primary's while both run (0 = none); audit_disk_mib_s (0-65536, 4): the same for disks;
        /// delta_cache_mib (0-65536, 32): memory that remembers pages as they were sent, so that only changed lines of
        /// a page are sent again (0 = whole pages)
        #[arg(value_name = "KEY=VALUE", verbatim_doc_comment)]
        settings: Vec<String>,
    },
    /// Show state, role, epochs and times of fault tolerance
    Info,
    /// Print a line of figures per interval, and every change of state, until interrupted
    Watch {
        /// Seconds between two lines, 0.1 to 3600
        #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
        interval: f64,
    },
}

#[cfg(feature = "ft")]
fn seconds(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "must be a number of seconds".to_string())?;
    if (0.1..=3600.0).contains(&value) {
        Ok(value)
    } else {
        Err("must be 0.1 to 3600 seconds".into())
    }
}

/// How the log channel is protected.
#[cfg(feature = "ft")]
#[derive(Debug, Args)]
pub struct Tls {
    /// Use TLS, and nothing else: directory on the VMM's host with ca.pem, cert.pem and key.pem (see `ft make-certs`)
    #[arg(long = "tls", value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// Name or address that the other side's certificate must be for [default: on the primary the host in --peer, on the
    /// backup any of the authority]
    #[arg(long, value_name = "NAME", requires = "tls_dir")]
    pub tls_peer: Option<String>,
}

/// `ft receive`
#[cfg(feature = "ft")]
#[derive(Debug, Args)]
pub struct Receive {
    /// Where to wait for the primary: tcp:HOST:PORT or unix:PATH
    pub listen: String,
    /// This host's file for a disk of the VM: id=ID,path=FILE[,image_type=raw|qcow2] (made when it does not exist)
    /// [default: the primary's path and format]
    #[arg(long, value_name = "SPEC", num_args = 1..)]
    pub disk: Vec<String>,
    /// This host's tap for a network device of the VM: id=ID,tap=NAME [default: the primary's name]
    #[arg(long, value_name = "SPEC", num_args = 1..)]
    pub net: Vec<String>,
    /// Serial port after a takeover: off, null, tty or file=PATH [default: as on the primary]
    #[arg(long, value_name = "MODE")]
    pub serial: Option<String>,
    /// virtio console after a takeover: off, null, tty or file=PATH [default: as on the primary]
    #[arg(long, value_name = "MODE")]
    pub console: Option<String>,
    /// Arbiter, where this host reaches it otherwise than the primary: as for `ft enable` [default: what the primary
    /// names]
    #[arg(long, value_name = "ARBITER")]
    pub arbiter: Option<String>,
    #[command(flatten)]
    pub tls: Tls,
    /// Allow plain TCP beyond loopback: the log channel carries the guest's whole memory
    #[arg(long)]
    pub insecure: bool,
}

/// `ft enable`
#[cfg(feature = "ft")]
#[derive(Debug, Args)]
pub struct Enable {
    /// The waiting backup: tcp:HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDRESS")]
    pub peer: String,
    /// Arbiter: file:DIR, a directory that both hosts share, or
    /// etcd:HOST:PORT[+HOST:PORT...][+ca=FILE[+cert=FILE+key=FILE]][+prefix=/PATH], an etcd cluster [default: the VMM's
    /// --ft-arbiter]
    #[arg(long, value_name = "ARBITER")]
    pub arbiter: Option<String>,
    #[command(flatten)]
    pub tls: Tls,
    /// Allow plain TCP beyond loopback: the log channel carries the guest's whole memory
    #[arg(long)]
    pub insecure: bool,
    /// What a flush that the guest saw complete survives: memory-of-both (the loss of either host) or disk-of-both (also a
    /// power cut of both; flushes then wait for the backup's disk)
    #[arg(long, value_name = "POLICY", default_value = "memory-of-both", value_parser = ["memory-of-both", "disk-of-both"])]
    pub durability: String,
    /// Id of a disk whose file or block device both hosts see (NFS, SAN): it is not copied, and nothing is written to it
    /// before the backup has it too; may be given several times. The backup's path is that of `ft receive --disk`
    #[arg(long = "shared-disk", value_name = "ID")]
    pub shared_disks: Vec<String>,
    /// What becomes of a backup whose RAM or disk the audit finds to differ from the primary's: stop (it ends, the VM goes
    /// on unprotected) or repair (the place is copied anew; the VM is not protected until then)
    #[arg(long, value_name = "POLICY", default_value = "stop", value_parser = ["stop", "repair"])]
    pub audit: String,
    /// Limits as for `ft config`, for example max_epoch_ms=50,precopy_mib_s=200
    #[arg(long, value_name = "KEY=VALUE", num_args = 1..)]
    pub limits: Vec<String>,
    /// Look for a new backup by itself whenever the VM runs alone: here after the loss of the backup, there after a
    /// takeover; until `ft disable`
    #[arg(long)]
    pub auto_reprotect: bool,
    /// Hosts that may be the new backup, in the order in which they are tried: tcp:HOST:PORT or unix:PATH, each with a VMM
    /// that waits (`ft receive`). The one in --peer is tried last, unless it is named here. Name this host too, if it is to
    /// be a backup one day
    #[arg(long, value_name = "ADDRESS", num_args = 1.., value_delimiter = ',', requires = "auto_reprotect")]
    pub spares: Vec<String>,
    /// Return as soon as the session has begun
    #[arg(long)]
    pub no_wait: bool,
}
