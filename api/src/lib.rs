//! The REST API: its types, its server, its client.
//!
//! * [`config`]: [`VmConfig`], a VM's configuration in Cloud Hypervisor's JSON, and its checks;
//! * [`service`]: [`Request`], [`Response`], [`ApiError`] and [`VmmService`], which the VMM implements;
//! * [`server`]: the HTTP server on a Unix socket; [`client`]: a blocking client of it;
//! * [`options`]: the `key=value` syntax of the command line; [`events`]: the event monitor.
//!
//! `openapi/cloud-hypervisor.yaml` describes the API; a test holds it against these types.

pub mod client;
pub mod config;
pub mod events;
pub mod options;
pub mod server;
pub mod service;

pub use client::{Client, ClientError};
pub use config::{
    ConfigError, ConsoleConfig, ConsoleMode, CpusConfig, DiskConfig, MacAddr, MemoryConfig, NetConfig, PayloadConfig,
    RngConfig, VmConfig,
};
pub use events::Events;
pub use service::{
    ApiError, DeviceNode, DeviceTree, Request, Response, RestoreConfig, VmCounters, VmInfo, VmSnapshotConfig, VmState,
    VmmPingResponse, VmmService,
};
