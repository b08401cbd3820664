//! The parts of the test guest that need no machine, so that their tests run on the host.
//!
//! - [`acpi`]: the tables that power and processors need
//! - [`checksum`]: of TCP and UDP, for cards that offload it
//! - [`cmdline`]: the kernel command line
//! - [`control`]: requests of the control service, and its numbers as text
//! - [`crc32c`]: the checksum of records
//! - [`kv`]: the key-value store's requests, record format and bookkeeping
//! - [`pattern`]: the verifiable byte stream of sink and source
//! - [`ring`]: arithmetic of split virtqueues
//! - [`rtc`]: the CMOS clock's bytes as date and time
//! - [`work`]: which page the memory dirtier writes when, and with what
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod acpi;
pub mod bytes;
pub mod checksum;
pub mod cmdline;
pub mod control;
pub mod crc32c;
pub mod kv;
pub mod pattern;
pub mod ring;
pub mod rtc;
pub mod work;
