//! Network devices.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{MacAddr, Refused};

/// A network device on a tap of the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetConfig {
    /// Name of the tap; a new one when not given (or empty).
    pub tap: Option<String>,
    /// Address that the tap gets on the host; left as it is when not given.
    pub ip: Option<IpAddr>,
    /// Netmask of `ip`.
    pub mask: Option<IpAddr>,
    /// The guest's MAC address; a random one when not given.
    pub mac: Option<MacAddr>,
    /// MAC address that the tap gets on the host; left as it is when not given.
    pub host_mac: Option<MacAddr>,
    /// Largest frame payload that the guest is told, and the tap's MTU.
    pub mtu: Option<u16>,
    /// Not offered.
    pub iommu: bool,
    /// Must be 2: one queue pair.
    pub num_queues: u32,
    /// Entries of each queue, a power of two.
    pub queue_size: u16,
    /// Not offered.
    pub vhost_user: bool,
    /// Not offered.
    pub vhost_socket: Refused,
    /// Without meaning, because vhost-user is not offered.
    pub vhost_mode: VhostMode,
    /// Device id; `_net0`, `_net1` ... when not given.
    pub id: Option<String>,
    /// Not offered.
    pub fds: Refused,
    /// Not offered.
    pub rate_limiter_config: Refused,
    /// Only segment 0 is offered.
    pub pci_segment: u16,
    /// Not offered.
    #[serde(skip_serializing_if = "Refused::is_null")]
    pub pci_device_id: Refused,
    /// TCP segmentation offload.
    pub offload_tso: bool,
    /// UDP fragmentation offload.
    pub offload_ufo: bool,
    /// Checksum offload.
    pub offload_csum: bool,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            tap: None,
            ip: None,
            mask: None,
            mac: None,
            host_mac: None,
            mtu: None,
            iommu: false,
            num_queues: 2,
            queue_size: 256,
            vhost_user: false,
            vhost_socket: Refused::default(),
            vhost_mode: VhostMode::default(),
            id: None,
            fds: Refused::default(),
            rate_limiter_config: Refused::default(),
            pci_segment: 0,
            pci_device_id: Refused::default(),
            offload_tso: true,
            offload_ufo: true,
            offload_csum: true,
        }
    }
}

/// Which side of a vhost-user connection listens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum VhostMode {
    /// The VMM connects.
    #[default]
    Client,
    /// The VMM listens.
    Server,
}
