//! Clients of the test guest's services, and the judge of what they saw.
//!
//! Every client checks each byte of every answer; a connection that breaks, an answer that is wrong, late beyond the
//! hang guard or out of order is a failure in its [`Verdict`]. Clients never connect again by themselves: the same TCP
//! connections must outlive a failover.
//!
//! | module | what |
//! | --- | --- |
//! | [`dial`] | how a client reaches the guest (for example from within a network namespace) |
//! | [`runner`] | threads of a load: pause, resume, stop; [`runner::Load`] |
//! | [`meter`] | per connection: answers, latencies, gaps; [`Verdict`] |
//! | [`echo`], [`udp`] | request and response over TCP and UDP |
//! | [`bulk`] | sink and source: long streams of a known pattern |
//! | [`kv`], [`model`] | the key-value store's client, and the check of a disk image against what was acknowledged |
//! | [`control`] | the guest's control service: status, dirtying, clock, counter |
//! | [`pattern`], [`stats`] | pattern streams and random numbers; medians, percentiles, histograms |

pub mod bulk;
pub mod control;
pub mod dial;
pub mod echo;
pub mod kv;
pub mod meter;
pub mod model;
pub mod pattern;
pub mod runner;
pub mod stats;
pub mod udp;
pub mod wire;

pub use meter::Verdict;
pub use runner::Load;

/// TCP and UDP port of the echo service.
pub const ECHO_PORT: u16 = 7;
/// Port of the sink.
pub const SINK_PORT: u16 = 9000;
/// Port of the source.
pub const SOURCE_PORT: u16 = 9001;
/// Port of the key-value store.
pub const KV_PORT: u16 = 9002;
/// Port of the control service.
pub const CONTROL_PORT: u16 = 9003;
