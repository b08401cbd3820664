//! Bed 2: real Linux on real KVM, by nesting. One or two hosts run a stock Debian kernel under
//! `qemu-system-x86_64 -accel tcg`; the VMM runs in them, and Debian guests run on the VMM.
//!
//! * [`bed`]: what a bed is made of, starting it, its folders, its end;
//! * [`host`]: one nested host: its qemu process, running commands on it, cutting its power;
//! * [`protected`]: a protected Debian guest that loses a side, step by step; [`faults`]: the table of what can go wrong;
//! * [`places`]: where programs, images and the hosts' own files are;
//! * `bin/bed2.rs`: the command line (`scripts/bed2`); `bin/bed2-client.rs`: the client that runs on a host and holds
//!   sessions with a guest; [`client`] is its inside;
//! * [`compare`]: figures beside QEMU; [`bench`]: with FT off and on; [`figures`]: how both are read and shown.
//!
//! What runs inside the hosts is in `scripts/bed2.d`; images are built by `scripts/images`.

pub mod bed;
pub mod bench;
pub mod client;
pub mod compare;
pub mod faults;
pub mod figures;
pub mod host;
pub mod places;
pub mod protected;

pub use bed::{Bed, Spec};
pub use host::{Host, Output, Running};
