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

/// Both hosts lose their power at the same moment. With flushes on the disks of both, each copy alone has every write that
/// was acknowledged.
#[test]
fn r5_both_hosts_without_power_lose_no_acknowledged_write_with_disk_of_both() {
    let mut guest = Protected::start("ft-both-hosts", 2).unwrap();
    guest.receive("/dev/bed/backup").unwrap();
    guest.enable(60_000, "--durability disk-of-both").unwrap();
    guest.sessions(20).unwrap();
    let acknowledged = guest.cut_both().unwrap();
    println!("acknowledged: {acknowledged:?} (redis, echo, ssh)");
    for (host, disk) in [("a", "primary"), ("b", "backup")] {
        let found = guest.recover(host, disk, acknowledged).unwrap();
        println!("host {host}: {found:?}");
        assert_eq!(found.lost(), 0, "host {host}: {found:?}");
    }
    guest.bed.passed();
}
