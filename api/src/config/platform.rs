//! Platform settings: accepted with their neutral values.

use serde::{Deserialize, Serialize};

use super::{Refused, yes};

/// Platform settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlatformConfig {
    /// Must be 1.
    #[serde(default = "one")]
    pub num_pci_segments: u16,
    /// Not offered.
    #[serde(default)]
    pub iommu_segments: Refused,
    /// Without meaning, because no IOMMU is offered.
    #[serde(default = "default_iommu_bits")]
    pub iommu_address_width_bits: u8,
    /// Not offered.
    #[serde(default)]
    pub system_serial_number: Refused,
    /// Not offered.
    #[serde(default)]
    pub serial_number: Refused,
    /// Not offered.
    #[serde(default)]
    pub system_uuid: Refused,
    /// Not offered.
    #[serde(default)]
    pub uuid: Refused,
    /// Not offered.
    #[serde(default)]
    pub oem_strings: Refused,
    /// Not offered.
    #[serde(default)]
    pub system_manufacturer: Refused,
    /// Not offered.
    #[serde(default)]
    pub system_product_name: Refused,
    /// Not offered.
    #[serde(default)]
    pub system_version: Refused,
    /// Not offered.
    #[serde(default)]
    pub system_family: Refused,
    /// Not offered.
    #[serde(default)]
    pub system_sku_number: Refused,
    /// Not offered.
    #[serde(default)]
    pub chassis_asset_tag: Refused,
    /// Not offered.
    #[serde(default)]
    pub tdx: bool,
    /// Not offered.
    #[serde(default)]
    pub sev_snp: bool,
    /// Not offered.
    #[serde(default)]
    pub iommufd: bool,
    /// Without meaning, because no VFIO device is offered.
    #[serde(default = "yes")]
    pub vfio_p2p_dma: bool,
}

fn one() -> u16 {
    1
}

fn default_iommu_bits() -> u8 {
    64
}
