//! Both shells over loopback TCP, with VMs of plain byte arrays.

#![allow(clippy::unwrap_used)]

mod audit;
mod bed;
#[cfg(feature = "etcd")]
#[path = "../etcd/cluster.rs"]
#[allow(dead_code)]
mod cluster;
mod cycles;
mod delta;
#[cfg(feature = "etcd")]
mod etcd;
mod fake;
mod host;
mod image;
mod loss;
mod normal;
mod refusal;
mod san;
mod secure;
mod shared;
#[cfg(feature = "etcd")]
#[path = "../etcd/tls.rs"]
#[allow(dead_code)]
mod tls;
