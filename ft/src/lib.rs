//! Fault tolerance: everything of it that is not KVM or virtio.
//!
//! * [`machine`]: the traits by which FT reaches the VM it protects ([`machine::Protected`]) and the shadow that it
//!   keeps ([`machine::Shadow`]); implemented by the `vmm` crate;
//! * [`config`]: settings and reports, as they appear in the REST API.

pub mod config;
pub mod machine;
