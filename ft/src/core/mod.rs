//! The protocol, as state machines: events and the time go in, actions come out. No I/O, no clock, no thread.
//!
//! * [`primary`]: when an epoch ends, what is released, what happens at a loss, at `disable` and at `failover`;
//! * [`backup`]: what is acknowledged and applied, and when the backup becomes the VM;
//! * [`pacing`]: the primary's epoch lengths and the guest's slow-down;
//! * [`liveness`]: silence, and the primary's lease on releasing outputs;
//! * [`arbitration`]: asking the arbiter until it answers;
//! * [`staging`]: epochs on the backup from their first frame until they are applied.
//!
//! The same machines run in production ([`crate::primary`], [`crate::backup`]) and in the simulator
//! (`ft/tests/simulator`).

pub mod arbitration;
pub mod backup;
pub mod liveness;
pub mod pacing;
pub mod primary;
pub mod staging;

/// Monotonic nanoseconds of one host, from any start.
pub type Nanos = u64;

/// Milliseconds to [`Nanos`].
pub const fn ms(n: u64) -> Nanos {
    n * 1_000_000
}

/// Epochs cut but not committed at which the primary waits. State machines and format take any number; one in flight
/// keeps the latency of outputs lowest when the channel is the bottleneck, because a second epoch would queue behind.
pub const MAX_IN_FLIGHT: usize = 1;
