//! The REST API: its types, its server, its client.
//!
//! * [`config`]: [`VmConfig`], a VM's configuration in Cloud Hypervisor's JSON, and its checks;
//! * [`service`]: [`Request`], [`Response`], [`ApiError`] and [`VmmService`], which the VMM implements;
//! * [`events`]: the event monitor.

pub mod config;
pub mod events;
pub mod service;

pub use config::{
    ConfigError, ConsoleConfig, ConsoleMode, CpusConfig, DiskConfig, MacAddr, MemoryConfig, NetConfig, PayloadConfig,
    RngConfig, VmConfig,
};
pub use events::Events;
pub use service::{
    ApiError, DeviceNode, DeviceTree, Request, Response, RestoreConfig, VmCounters, VmInfo, VmSnapshotConfig, VmState,
    VmmPingResponse, VmmService,
};
