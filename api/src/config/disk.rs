//! Block devices.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Refused;

/// A block device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskConfig {
    /// An image file, or a block device of the host with a raw image.
    pub path: Option<PathBuf>,
    /// The guest cannot write.
    pub readonly: bool,
    /// Past the host's page cache (O_DIRECT).
    pub direct: bool,
    /// Not offered.
    pub iommu: bool,
    /// Must be 1.
    pub num_queues: u32,
    /// Entries of the queue, a power of two.
    pub queue_size: u16,
    /// Not offered.
    pub vhost_user: bool,
    /// Not offered.
    pub vhost_socket: Refused,
    /// Not offered.
    pub rate_limit_group: Refused,
    /// Not offered.
    pub rate_limiter_config: Refused,
    /// Device id; `_disk0`, `_disk1` ... when not given.
    pub id: Option<String>,
    /// Only segment 0 is offered.
    pub pci_segment: u16,
    /// Not offered.
    #[serde(skip_serializing_if = "Refused::is_null")]
    pub pci_device_id: Refused,
    /// Serial number that the guest sees, up to 20 bytes.
    pub serial: Option<String>,
    /// Not offered.
    pub queue_affinity: Refused,
    /// A qcow2 image may name other files, from which what it does not hold is read.
    pub backing_files: bool,
    /// Discarded blocks give their space back.
    pub sparse: bool,
    /// `Raw` or `Qcow2`. When it is not given the image must be raw: the format is never taken from the image's content,
    /// which a guest may have written.
    pub image_type: Option<ImageType>,
    /// How the image file is locked; `Full` is not offered.
    pub lock_granularity: LockGranularity,
    /// Uses threads instead of io_uring; printed by some versions of Cloud Hypervisor.
    #[serde(skip_serializing_if = "super::is_false")]
    pub disable_io_uring: bool,
    /// Not offered; printed by some versions of Cloud Hypervisor.
    #[serde(skip_serializing_if = "super::is_false")]
    pub disable_aio: bool,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            path: None,
            readonly: false,
            direct: false,
            iommu: false,
            num_queues: 1,
            queue_size: 128,
            vhost_user: false,
            vhost_socket: Refused::default(),
            rate_limit_group: Refused::default(),
            rate_limiter_config: Refused::default(),
            id: None,
            pci_segment: 0,
            pci_device_id: Refused::default(),
            serial: None,
            queue_affinity: Refused::default(),
            backing_files: false,
            sparse: true,
            image_type: None,
            lock_granularity: LockGranularity::default(),
            disable_io_uring: false,
            disable_aio: false,
        }
    }
}

/// Format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageType {
    /// Not offered.
    FixedVhd,
    /// QEMU's format, version 3.
    Qcow2,
    /// The disk's bytes, nothing else.
    Raw,
    /// Not offered.
    Vhdx,
    /// As when none is given.
    Unknown,
}

/// How an image file is locked against other processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockGranularity {
    /// Its byte range.
    #[default]
    ByteRange,
    /// Not offered.
    Full,
}
