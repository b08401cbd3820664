//! Fault tolerance: everything of it that is not KVM or virtio.
//!
//! * [`machine`]: the traits by which FT reaches the VM it protects ([`machine::Protected`]) and the shadow that it
//!   keeps ([`machine::Shadow`]); implemented by the `vmm` crate;
//! * [`config`]: settings and reports, as they appear in the REST API; [`event`]: what the event monitor gets;
//! * [`core`]: the protocol, as state machines without I/O, clock or threads; the simulator drives the same ones;
//! * [`wire`]: the log channel's format; [`transport`]: its addresses and sockets; [`outbox`]: who writes to them;
//! * [`interposer`]: holds outputs (R1) and logs inputs and disk changes (R3, R8) on the primary;
//! * [`copies`]: what the copies of a disk have in common, so that only differences are copied again (R3);
//! * [`shared`], [`overlay`]: changes of disks that both hosts see, held until they may be written (R1, R3);
//! * [`audit`]: compares the shadow's RAM and disks with the primary's while both run (R6);
//! * [`arbiter`]: the register that decides who may run alone (R4);
//! * [`primary`]: from [`enable`] over pre-copy and epochs to going solo, stopping, or handing over;
//! * [`backup`]: from [`receive`] over staging and applying to taking over;
//! * [`reprotect`]: which host is to be the next backup, and when it is asked;
//! * [`stats`], [`error`]: measures, and what goes wrong.

pub mod arbiter;
pub mod audit;
pub mod backup;
pub mod config;
pub mod copies;
pub mod core;
pub mod error;
pub mod event;
mod heap;
pub mod interposer;
pub mod machine;
pub mod outbox;
pub mod overlay;
pub mod primary;
pub mod reprotect;
pub mod shared;
pub mod stats;
pub mod transport;
pub mod wire;

pub use backup::{Backup, receive};
pub use error::Error;
pub use event::{EventSink, FtEvent};
pub use primary::{Cancel, Offer, Primary, enable, offer};
