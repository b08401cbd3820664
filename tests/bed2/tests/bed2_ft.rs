//! Fault tolerance on real Linux: a protected Debian guest outlives its primary.
//! These need qemu-system-x86_64 and the images of `scripts/images`.

use bed2::protected::Protected;

/// The primary VMM is killed; redis, echo and ssh sessions go on; nothing acknowledged is lost; the disk is clean.
#[test]
fn a_killed_primary_vmm_is_not_noticed() {
    let mut guest = Protected::start("ft-one-host", 1).unwrap();
    guest.protect().unwrap();
    guest.sessions(10).unwrap();
    guest.kill_primary().unwrap();
    guest.progress(10).unwrap();
    let report = guest.finish_sessions().unwrap();
    println!("{report:#?}");
    guest.finish(&report).unwrap();
}

/// The same, when the whole host of the primary loses its power.
#[test]
fn a_host_without_power_is_not_noticed() {
    let mut guest = Protected::start("ft-two-hosts", 2).unwrap();
    guest.protect().unwrap();
    guest.sessions(10).unwrap();
    guest.cut_primary().unwrap();
    guest.progress(10).unwrap();
    let report = guest.finish_sessions().unwrap();
    println!("{report:#?}");
    guest.finish(&report).unwrap();
}
