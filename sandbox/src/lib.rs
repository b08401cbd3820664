//! What the VMM's process may ask of the kernel, for the day when a guest or a peer has found a hole in the VMM.
//!
//! * [`threads`]: the one way to start a thread: each has a [`ThreadKind`], and with it its filter;
//! * [`seccomp`]: the filters: which system calls a kind of thread may make;
//! * [`table`]: the table from kind to calls;
//! * [`landlock`]: which files the whole process may touch;
//! * [`priority`]: which threads go before those of others, and when.
//!
//! Nothing is restricted before [`threads::confine`] or [`landlock::restrict`] was called, so that libraries and tests
//! which start threads by [`threads::spawn`] need not care.

pub mod landlock;
pub mod priority;
pub mod seccomp;
pub mod table;
pub mod threads;

pub use seccomp::Mode;
pub use threads::{ThreadKind, confine, spawn};
