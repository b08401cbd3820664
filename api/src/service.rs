//! The requests of the API, their answers, and the service that gives them.

use std::collections::BTreeMap;

#[cfg(feature = "ft")]
use ft::config::{FtEnableConfig, FtInfo, FtLimitsPatch, FtReceiveConfig};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::{Refused, VmConfig};

/// Whoever serves the API: the VMM. Called by several threads at the same time.
pub trait VmmService: Send + Sync {
    /// Serves one request. May take long (a snapshot of a large VM); other requests are served meanwhile.
    fn call(&self, request: Request) -> Result<Response, ApiError>;
}

/// A request. Its configuration is read, filled in and valid.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// `GET vmm.ping`
    VmmPing,
    /// `PUT vmm.shutdown`
    VmmShutdown,
    /// `PUT vm.create`
    VmCreate(Box<VmConfig>),
    /// `PUT vm.boot`
    VmBoot,
    /// `GET vm.info`
    VmInfo,
    /// `GET vm.counters`
    VmCounters,
    /// `PUT vm.pause`
    VmPause,
    /// `PUT vm.resume`
    VmResume,
    /// `PUT vm.reboot`
    VmReboot,
    /// `PUT vm.power-button`
    VmPowerButton,
    /// `PUT vm.shutdown`
    VmShutdown,
    /// `PUT vm.delete`
    VmDelete,
    /// `PUT vm.snapshot`
    VmSnapshot(VmSnapshotConfig),
    /// `PUT vm.restore`
    VmRestore(RestoreConfig),
    /// `PUT vm.ft-receive`
    #[cfg(feature = "ft")]
    FtReceive(FtReceiveConfig),
    /// `PUT vm.ft-enable`
    #[cfg(feature = "ft")]
    FtEnable(FtEnableConfig),
    /// `PUT vm.ft-disable`
    #[cfg(feature = "ft")]
    FtDisable,
    /// `PUT vm.ft-failover`
    #[cfg(feature = "ft")]
    FtFailover,
    /// `PUT vm.ft-config`: the limits that change.
    #[cfg(feature = "ft")]
    FtConfig(FtLimitsPatch),
    /// `GET vm.ft-info`
    #[cfg(feature = "ft")]
    FtInfo,
}

/// An answer that is no error.
#[derive(Debug, Clone, PartialEq)]
pub enum Response {
    /// Done; nothing to tell (204).
    Empty,
    /// Of `vmm.ping`.
    Ping(VmmPingResponse),
    /// Of `vm.info`.
    Info(Box<VmInfo>),
    /// Of `vm.counters`.
    Counters(VmCounters),
    /// Of `vm.ft-info`.
    #[cfg(feature = "ft")]
    Ft(Box<FtInfo>),
}

/// An error answer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{message} ({code})")]
pub struct ApiError {
    /// HTTP status.
    pub status: u16,
    /// Stable, for programs: `vm_not_created`.
    pub code: String,
    /// For people: what happened and what to do.
    pub message: String,
}

impl ApiError {
    /// An error with `status`, `code` and `message`.
    pub fn new(status: u16, code: &str, message: impl Into<String>) -> Self {
        Self {
            status,
            code: code.into(),
            message: message.into(),
        }
    }
}

/// JSON body of an error answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// [`ApiError::code`].
    pub code: String,
    /// [`ApiError::message`].
    pub message: String,
}

/// Body of `vmm.ping`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmPingResponse {
    /// Version with build details.
    #[serde(default)]
    pub build_version: String,
    /// Version of the VMM.
    pub version: String,
    /// Process id of the VMM.
    #[serde(default)]
    pub pid: i64,
    /// Cargo features that it was built with.
    #[serde(default)]
    pub features: Vec<String>,
}

/// Where a VM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Configured, not booted.
    Created,
    /// Runs.
    Running,
    /// Ended.
    Shutdown,
    /// Stands still.
    Paused,
    /// Stopped by a debugger; never with this VMM.
    BreakPoint,
}

/// Body of `vm.info`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmInfo {
    /// The configuration, with everything that was filled in.
    pub config: VmConfig,
    /// Where the VM is in its life.
    pub state: VmState,
    /// Bytes of guest RAM.
    pub memory_actual_size: Option<u64>,
    /// Devices by id.
    pub device_tree: Option<DeviceTree>,
}

/// Devices by id.
pub type DeviceTree = BTreeMap<String, DeviceNode>;

/// A device of the running VM.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceNode {
    /// Device id.
    pub id: String,
    /// Resources; always empty here.
    #[serde(default)]
    pub resources: Vec<serde_json::Value>,
    /// Ids of the devices behind it.
    #[serde(default)]
    pub children: Vec<String>,
    /// Address of a PCI device, for example `0000:00:01.0`.
    #[serde(default)]
    pub pci_bdf: Option<String>,
}

/// Body of `vm.counters`: values by counter, by device id.
pub type VmCounters = BTreeMap<String, BTreeMap<String, u64>>;

/// Body of `vm.snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSnapshotConfig {
    /// `file:///absolute/directory`
    pub destination_url: String,
}

/// Body of `vm.restore`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// `file:///absolute/directory`
    pub source_url: String,
    /// RAM is read before the VM can run; always so here.
    #[serde(default)]
    pub prefault: bool,
    /// `OnDemand` is not offered.
    #[serde(default)]
    pub memory_restore_mode: MemoryRestoreMode,
    /// The VM runs at once; otherwise it is paused.
    #[serde(default)]
    pub resume: bool,
    /// Not offered.
    #[serde(default, skip_serializing_if = "Refused::is_null")]
    pub zone_updates: Refused,
}

impl RestoreConfig {
    /// Refuses what is not offered.
    pub fn validate(&self) -> Result<(), ApiError> {
        let refuse = |field: &str| {
            let message = format!("{field}: not supported by this VMM; supported here: source_url, prefault, resume");
            Err(ApiError::new(400, "unsupported", message))
        };
        if self.memory_restore_mode != MemoryRestoreMode::Copy {
            return refuse("memory_restore_mode");
        }
        if !self.zone_updates.is_neutral() {
            return refuse("zone_updates");
        }
        Ok(())
    }
}

/// How RAM comes out of a snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryRestoreMode {
    /// Read as a whole.
    #[default]
    Copy,
    /// Not offered.
    OnDemand,
}
