//! Both shells over loopback TCP, with VMs of plain byte arrays.

#![allow(clippy::unwrap_used)]

mod bed;
mod cycles;
mod fake;
mod loss;
mod normal;
mod refusal;
mod tls;
