//! Bed 1: two VMMs in network namespaces on one machine, the test guest, and clients.
//!
//! ```text
//!   namespace c: clients on bridge br0 (192.168.100.1)
//!        |  to-a                         |  to-b
//!   namespace a: br0 - tap0         namespace b: br0 - tap0
//!        cloud-hypervisor  <---log0--->  cloud-hypervisor
//! ```
//!
//! A third host, namespace s, is joined to all of them in the same way.
//!
//! | module | what |
//! | --- | --- |
//! | [`cleanup`] | what must be gone when the program ends, also by a signal |
//! | [`netns`] | the network; a [`load::dial::Dial`] from the client's namespace |
//! | [`only`] | `--only` and `--list` of a program |
//! | [`process`], [`http`] | one VMM process and its API |
//! | [`images`] | disk images, seen from outside |
//! | [`pair`] | [`pair::Bed`]: hosts with disks and the arbiter; boot, backup, protect |
//! | [`loads`] | every load at once, and the checks of what it saw |
//! | [`failing`] | a disk that gives I/O errors when it is told to |
//! | [`failover`] | kills, and the times and gaps around them |
//! | [`chain`] | one guest that lives through many kills |
//! | [`services`] | every service of the guest, checked once |
//! | [`proxy`] | a TCP proxy that delays, slows down, stalls, damages and cuts, for fault tests |
//! | [`proxied`] | a protected VM whose log channel goes through it |
//! | [`qemu`], [`colo`] | the same guest under QEMU, and under QEMU's own fault tolerance |
//! | [`report`] | tables |
//! | [`table`] | cases that are run one after the other: what must happen, what happened, figures |
//!
//! Programs: `demo`, `campaign`, `faults` and `bench`. Everything needs root and /dev/kvm.

pub mod chain;
pub mod cleanup;
pub mod colo;
pub mod failing;
pub mod failover;
pub mod http;
pub mod images;
pub mod loads;
pub mod netns;
pub mod only;
pub mod pair;
pub mod process;
pub mod proxied;
pub mod proxy;
pub mod qemu;
pub mod report;
pub mod services;
pub mod table;
