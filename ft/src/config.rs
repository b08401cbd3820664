//! Settings and reports of FT, in the JSON of the REST API.

mod audit;

use std::path::PathBuf;

pub use audit::{FtAudit, FtAuditInfo};
use serde::{Deserialize, Serialize};

use crate::reprotect::{FtReprotection, Reprotect};

/// Body of PUT vm.ft-receive: wait for a primary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FtReceiveConfig {
    /// Where to listen: `tcp:HOST:PORT` or `unix:PATH`.
    pub listen: String,
    /// Arbiter, overrides the one that the primary names (same register, reached otherwise): `file:DIR` or `etcd:HOST:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arbiter: Option<String>,
    /// This host's files for the VM's disks, by device id; disks that are not named keep the primary's path.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<FtDiskOverride>,
    /// This host's taps for the VM's network devices, by device id.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<FtNetOverride>,
    /// Where the guest's serial console output goes on this host (`off`, `null`, `tty`, or `file:PATH`); default: as on
    /// the primary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// The same for the virtio console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<String>,
    /// Allow plain TCP beyond loopback.
    #[serde(default)]
    pub insecure: bool,
    /// Take only primaries that speak TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<FtTls>,
}

/// TLS of the log channel: certificates on both sides, TLS 1.3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FtTls {
    /// Directory with `ca.pem` (the authority that signed both sides), `cert.pem` and `key.pem` (this side's).
    pub dir: PathBuf,
    /// DNS name or IP address that the other side's certificate must be for. Default: on the primary, the host in
    /// `peer`; on the backup, any that the authority signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
}

/// What a flush that the guest saw complete, in a committed epoch, survives (R5).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FtDurability {
    /// It is on the primary's disk (of a shared disk: in the primary's memory) and in the backup's memory: survives the
    /// loss of either host.
    #[default]
    MemoryOfBoth,
    /// It is on both disks (of a shared disk: on the one): survives power cuts of both hosts, and the loss of one of two
    /// disks. A flush then takes the time of the backup's disk, too.
    DiskOfBoth,
}

impl FtDurability {
    /// Its name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::MemoryOfBoth => "memory-of-both",
            Self::DiskOfBoth => "disk-of-both",
        }
    }
}

/// This host's file for a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FtDiskOverride {
    /// Device id, for example `_disk0`.
    pub id: String,
    /// Path on this host; made (sparse, right size) when it does not exist.
    pub path: PathBuf,
    /// Format of the image on this host; the primary's when not given. What counts is what the guest sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_type: Option<FtImageType>,
}

/// Format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FtImageType {
    /// The disk's bytes, nothing else.
    Raw,
    /// QEMU's format.
    Qcow2,
}

/// This host's tap for a network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FtNetOverride {
    /// Device id, for example `_net1`.
    pub id: String,
    /// Name of the tap on this host.
    pub tap: String,
}

/// Body of PUT vm.ft-enable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FtEnableConfig {
    /// The backup's log channel: `tcp:HOST:PORT` or `unix:PATH`.
    pub peer: String,
    /// Arbiter: `file:DIR` or `etcd:HOST:PORT`. Default: the VMM's `--ft-arbiter`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arbiter: Option<String>,
    /// Allow plain TCP beyond loopback.
    #[serde(default)]
    pub insecure: bool,
    /// Speak TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<FtTls>,
    /// What flushes survive.
    #[serde(default)]
    pub durability: FtDurability,
    /// Ids of disks whose file or block device both hosts see: they are not copied, and nothing is written to them before
    /// the backup has it too. A disk stays shared for as long as its VM lives.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared_disks: Vec<String>,
    /// What becomes of a shadow that is found to differ.
    #[serde(default)]
    pub audit: FtAudit,
    /// Limits; can be changed later with vm.ft-config.
    #[serde(default)]
    pub limits: FtLimits,
    /// Whoever runs the VM alone, now or after a takeover, looks for a new backup by itself.
    #[serde(default)]
    pub auto_reprotect: bool,
    /// Hosts that may be that backup, in the order in which they are tried; `peer` is the last one unless it is named
    /// here. With it at most [`crate::reprotect::MAX_SPARES`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spares: Vec<String>,
}

/// Limits of the epoch controller and the failure detector; every field is optional in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FtLimits {
    /// Longest epoch in milliseconds, 1 to 10,000. An idle VM makes one epoch in this time.
    pub max_epoch_ms: u32,
    /// Shortest epoch in microseconds, 0 to 1,000,000: outputs waiting do not end an epoch earlier.
    pub min_epoch_us: u32,
    /// Dirty RAM or logged bytes of the running epoch, in MiB, at which it ends (1 to 65,536).
    pub max_epoch_mib: u32,
    /// Share of the time that checkpoints may take, in percent, 1 to 100: epochs become as long as that needs, up to 10 s,
    /// longer than `max_epoch_ms` too; 100 = no bound.
    pub overhead_percent: u32,
    /// Bound on bytes held for epochs that are not committed, in MiB; beyond half of it the guest is slowed down, at the bound it waits.
    pub max_lag_mib: u32,
    /// Heartbeat interval in milliseconds, 5 to 10,000.
    pub heartbeat_ms: u32,
    /// Silence after which the other side counts as dead, in milliseconds; at least 3 heartbeats.
    pub heartbeat_timeout_ms: u32,
    /// Rate limit of pre-copy in MiB/s; 0 = none.
    pub precopy_mib_s: u32,
    /// RAM of the shadow that is compared with the primary's, in MiB/s, 0 to 65,536 (R6); 0 = none.
    pub audit_mib_s: u32,
    /// The same for the shadow's replicated disks.
    pub audit_disk_mib_s: u32,
    /// Memory of the primary, in MiB, that remembers what was sent last of pages, so that of a page written again only the
    /// changed lines of 64 bytes are sent. 0 to 65,536; 0 = pages are sent whole.
    pub delta_cache_mib: u32,
}

impl Default for FtLimits {
    fn default() -> Self {
        Self {
            max_epoch_ms: 200,
            min_epoch_us: 200,
            max_epoch_mib: 64,
            overhead_percent: 100,
            max_lag_mib: 512,
            heartbeat_ms: 50,
            heartbeat_timeout_ms: 500,
            precopy_mib_s: 0,
            audit_mib_s: 16,
            audit_disk_mib_s: 4,
            delta_cache_mib: 32,
        }
    }
}

/// FT's state on this VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FtState {
    /// FT is off.
    Disabled,
    /// Backup: waits for a primary.
    Listening,
    /// Pre-copy of RAM and disks runs; not yet protected.
    Syncing,
    /// The last committed epoch can be taken over.
    Protected,
    /// The VM runs alone after its peer was lost (the arbiter was won).
    Solo,
    /// Backup: the arbiter was won, the VM is being activated.
    TakingOver,
    /// The peer is lost and the arbiter does not answer: outputs are held, nothing runs on alone (R4).
    WaitingForArbiter,
    /// This side lost the arbitration or handed over its role; its VM does not run.
    Stopped,
    /// FT failed; see `reason`.
    Failed,
}

impl FtState {
    /// Its name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Disabled => "disabled",
            Self::Listening => "listening",
            Self::Syncing => "syncing",
            Self::Protected => "protected",
            Self::Solo => "solo",
            Self::TakingOver => "taking_over",
            Self::WaitingForArbiter => "waiting_for_arbiter",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }
}

/// This VMM's part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FtRole {
    /// Neither.
    None,
    /// Runs the VM.
    Primary,
    /// Holds its shadow.
    Backup,
}

impl FtRole {
    /// Its name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Primary => "primary",
            Self::Backup => "backup",
        }
    }
}

/// Last, mean, median and 99th percentile of a measure.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct FtStat {
    /// Newest value.
    pub last: f64,
    /// Mean since FT was enabled.
    pub mean: f64,
    /// Median (of the last few thousand values).
    pub p50: f64,
    /// 99th percentile (of the last few thousand values).
    pub p99: f64,
}

/// Progress of pre-copy.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct FtProgress {
    /// RAM bytes sent, over all passes.
    pub ram_bytes_sent: u64,
    /// RAM bytes still to send in this pass.
    pub ram_bytes_remaining: u64,
    /// Size of guest RAM.
    pub ram_bytes_total: u64,
    /// Disk bytes sent, over all passes.
    pub disk_bytes_sent: u64,
    /// Disk bytes still to send in this pass.
    pub disk_bytes_remaining: u64,
    /// Size of all replicated disks.
    pub disk_bytes_total: u64,
    /// Disk bytes that were not sent, because the backup's old copy has them for certain (primary).
    pub disk_bytes_skipped: u64,
    /// Bytes per second, recent.
    pub rate: f64,
    /// Estimated seconds left.
    pub seconds_left: f64,
}

/// Body of GET vm.ft-info.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FtInfo {
    /// State on this VMM.
    pub state: FtState,
    /// Role of this VMM.
    pub role: FtRole,
    /// Why, when the state is `failed`, `stopped` or `solo`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The other side's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// How the log channel is protected: `TLS 1.3, ...`, `plain TCP` or `Unix socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transport: Option<String>,
    /// Arbiter in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arbiter: Option<String>,
    /// Generation that this side last knew to be won.
    pub generation: u64,
    /// Running epoch (backup: epoch being received).
    pub epoch: u64,
    /// Last committed epoch.
    pub committed: u64,
    /// What a completed flush of a committed epoch survives (R5).
    pub durability: FtDurability,
    /// Disks that both hosts see, by device id.
    #[serde(default)]
    pub shared_disks: Vec<String>,
    /// Limits in force.
    pub limits: FtLimits,
    /// Pre-copy.
    pub progress: FtProgress,
    /// Epochs committed since FT was enabled.
    pub epochs_total: u64,
    /// Epoch length in ms.
    pub epoch_ms: FtStat,
    /// Time the guest stood still per epoch, in ms.
    pub pause_ms: FtStat,
    /// Dirty pages per epoch.
    pub dirty_pages: FtStat,
    /// Log-channel bytes per epoch.
    pub epoch_bytes: FtStat,
    /// Time from the end of an epoch to its commit, in ms.
    pub commit_ms: FtStat,
    /// Time outputs were held, in ms: the latency added.
    pub added_latency_ms: FtStat,
    /// Outputs released per epoch.
    pub held_outputs: FtStat,
    /// Outputs held now.
    pub outputs_waiting: u64,
    /// Log-channel bytes sent (backup: received) in all.
    pub bytes_sent: u64,
    /// What was compared of the shadow with the primary (R6).
    pub audit: FtAuditInfo,
    /// Bytes that wait for the backup, or for a shared disk, now.
    pub lag_bytes: u64,
    /// Share of the time the guest may run, percent; below 100 when it is slowed down.
    pub run_percent: u8,
    /// Backup, after a failover: milliseconds from the last sign of life of the primary to its detected loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detection_ms: Option<f64>,
    /// Backup, after a failover: milliseconds from detection to the resumed guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activation_ms: Option<f64>,
    /// Whoever runs the VM alone looks for a new backup by itself.
    #[serde(default)]
    pub auto_reprotect: bool,
    /// Hosts that may be that backup, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spares: Vec<String>,
    /// How the search for a new backup goes, while the VM runs alone here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reprotection: Option<FtReprotection>,
}

impl FtInfo {
    pub(crate) fn tell_spares(&mut self, reprotect: Option<&Reprotect>) {
        self.auto_reprotect = reprotect.is_some();
        self.spares = reprotect.map(|r| r.spares.clone()).unwrap_or_default();
    }

    /// FT is off.
    pub fn disabled() -> Self {
        Self {
            state: FtState::Disabled,
            role: FtRole::None,
            reason: None,
            peer: None,
            transport: None,
            arbiter: None,
            generation: 0,
            epoch: 0,
            committed: 0,
            durability: FtDurability::default(),
            shared_disks: Vec::new(),
            limits: FtLimits::default(),
            progress: FtProgress::default(),
            epochs_total: 0,
            epoch_ms: FtStat::default(),
            pause_ms: FtStat::default(),
            dirty_pages: FtStat::default(),
            epoch_bytes: FtStat::default(),
            commit_ms: FtStat::default(),
            added_latency_ms: FtStat::default(),
            held_outputs: FtStat::default(),
            outputs_waiting: 0,
            bytes_sent: 0,
            audit: FtAuditInfo::default(),
            lag_bytes: 0,
            run_percent: 100,
            detection_ms: None,
            activation_ms: None,
            auto_reprotect: false,
            spares: Vec::new(),
            reprotection: None,
        }
    }
}

/// Body of PUT vm.ft-config: the limits to change; those that are not named stay as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FtLimitsPatch {
    /// See [`FtLimits::max_epoch_ms`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_epoch_ms: Option<u32>,
    /// See [`FtLimits::min_epoch_us`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_epoch_us: Option<u32>,
    /// See [`FtLimits::max_epoch_mib`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_epoch_mib: Option<u32>,
    /// See [`FtLimits::overhead_percent`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overhead_percent: Option<u32>,
    /// See [`FtLimits::max_lag_mib`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_lag_mib: Option<u32>,
    /// See [`FtLimits::heartbeat_ms`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heartbeat_ms: Option<u32>,
    /// See [`FtLimits::heartbeat_timeout_ms`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heartbeat_timeout_ms: Option<u32>,
    /// See [`FtLimits::precopy_mib_s`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precopy_mib_s: Option<u32>,
    /// See [`FtLimits::audit_mib_s`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit_mib_s: Option<u32>,
    /// See [`FtLimits::audit_disk_mib_s`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit_disk_mib_s: Option<u32>,
    /// See [`FtLimits::delta_cache_mib`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta_cache_mib: Option<u32>,
}

impl FtLimitsPatch {
    /// `limits` with the named fields changed.
    pub fn apply(&self, limits: &FtLimits) -> FtLimits {
        FtLimits {
            max_epoch_ms: self.max_epoch_ms.unwrap_or(limits.max_epoch_ms),
            min_epoch_us: self.min_epoch_us.unwrap_or(limits.min_epoch_us),
            max_epoch_mib: self.max_epoch_mib.unwrap_or(limits.max_epoch_mib),
            overhead_percent: self.overhead_percent.unwrap_or(limits.overhead_percent),
            max_lag_mib: self.max_lag_mib.unwrap_or(limits.max_lag_mib),
            heartbeat_ms: self.heartbeat_ms.unwrap_or(limits.heartbeat_ms),
            heartbeat_timeout_ms: self.heartbeat_timeout_ms.unwrap_or(limits.heartbeat_timeout_ms),
            precopy_mib_s: self.precopy_mib_s.unwrap_or(limits.precopy_mib_s),
            audit_mib_s: self.audit_mib_s.unwrap_or(limits.audit_mib_s),
            audit_disk_mib_s: self.audit_disk_mib_s.unwrap_or(limits.audit_disk_mib_s),
            delta_cache_mib: self.delta_cache_mib.unwrap_or(limits.delta_cache_mib),
        }
    }
}

/// A limit outside of its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {value} is out of range, allowed is {min} to {max}")]
pub struct LimitError {
    /// Field of [`FtLimits`].
    pub name: &'static str,
    /// What was asked for.
    pub value: u32,
    /// Smallest allowed value.
    pub min: u32,
    /// Largest allowed value.
    pub max: u32,
}

impl FtLimits {
    /// Checks every range.
    pub fn validate(&self) -> Result<(), LimitError> {
        let range = |name, value: u32, min: u32, max: u32| {
            if (min..=max).contains(&value) {
                Ok(())
            } else {
                Err(LimitError { name, value, min, max })
            }
        };
        range("max_epoch_ms", self.max_epoch_ms, 1, 10_000)?;
        range("min_epoch_us", self.min_epoch_us, 0, 1_000_000)?;
        range("max_epoch_mib", self.max_epoch_mib, 1, 65_536)?;
        range("overhead_percent", self.overhead_percent, 1, 100)?;
        range("max_lag_mib", self.max_lag_mib, 1, 65_536)?;
        range("heartbeat_ms", self.heartbeat_ms, 5, 10_000)?;
        range(
            "heartbeat_timeout_ms",
            self.heartbeat_timeout_ms,
            3 * self.heartbeat_ms,
            120_000,
        )?;
        range("audit_mib_s", self.audit_mib_s, 0, 65_536)?;
        range("audit_disk_mib_s", self.audit_disk_mib_s, 0, 65_536)?;
        range("delta_cache_mib", self.delta_cache_mib, 0, 65_536)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_changes_only_what_it_names() {
        let patch: FtLimitsPatch = serde_json::from_str(r#"{"max_epoch_ms": 7}"#).unwrap();
        let limits = patch.apply(&FtLimits::default());
        assert_eq!(
            limits,
            FtLimits {
                max_epoch_ms: 7,
                ..FtLimits::default()
            }
        );
        assert!(serde_json::from_str::<FtLimitsPatch>(r#"{"max_epoch": 7}"#).is_err());
    }

    #[test]
    fn limits_out_of_range_are_named() {
        let limits = FtLimits {
            heartbeat_ms: 100,
            heartbeat_timeout_ms: 299,
            ..FtLimits::default()
        };
        let error = limits.validate().unwrap_err();
        assert_eq!((error.name, error.min), ("heartbeat_timeout_ms", 300));
        assert_eq!(FtLimits::default().validate(), Ok(()));
    }
}
