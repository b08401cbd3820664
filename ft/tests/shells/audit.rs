//! The audit: what it finds in RAM and on disks, and how that is repaired.

use std::time::Duration;

use ft::config::{FtAudit, FtState};

use crate::bed::{Bed, eventually};
use crate::fake::{BLOCK, FakeVm, PAGE, identity, lock};

const DISK: u64 = 64 * BLOCK;
const RAM: u64 = 128 * PAGE as u64;

fn protected(audit: FtAudit) -> Bed {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    bed.protect_with(|config| config.audit = audit);
    bed
}

#[test]
fn r6_a_page_that_differs_from_the_primarys_ends_protection_by_its_address() {
    let bed = protected(FtAudit::Stop);
    bed.vm.write_ram(3 * PAGE as u64, &[7; 64]);
    eventually("an audit of all RAM", || bed.backup().info().audit.ram_bytes > 3 * RAM);
    assert_eq!(bed.backup().info().state, FtState::Protected);
    bed.vm.write_unlogged((1 << 20) + 5 * PAGE as u64, &[1]);
    bed.wait_backup(FtState::Failed);
    bed.wait_primary(FtState::Failed);
    for reason in [bed.primary().info().reason, bed.backup().info().reason] {
        let reason = reason.unwrap();
        assert!(reason.contains("audit: the RAM page at 0x105000"), "{reason}");
    }
    bed.vm.count_and_send();
    eventually("output", || bed.vm.sent() == [1]);
}

#[test]
fn r6_a_disk_that_differs_from_the_primarys_ends_protection_by_its_name_and_place() {
    let bed = protected(FtAudit::Stop);
    let mut n = 0u8;
    let done = |bed: &Bed, rounds: u64| {
        let (p, b) = (bed.primary().info().audit, bed.backup().info().audit);
        p.disk_rounds >= rounds && b.disk_bytes >= 2 * DISK
    };
    eventually("two rounds through a disk that is being written", || {
        n = n.wrapping_add(1);
        bed.vm.write_disk(u64::from(n) * 1000, &[n; 900]);
        bed.vm.zero_disk(u64::from(n) * 500, 100);
        bed.vm.count_and_send();
        done(&bed, 2)
    });
    assert_eq!(bed.backup().info().state, FtState::Protected);
    assert_eq!(bed.backup().info().audit.disk_rounds, 0);
    let before = bed.vm.sent().len();
    bed.vm.write_disk_unlogged(DISK - 1, &[1]);
    bed.wait_backup(FtState::Failed);
    bed.wait_primary(FtState::Failed);
    for reason in [bed.primary().info().reason, bed.backup().info().reason] {
        let reason = reason.unwrap();
        let named = "audit: disk _disk0 at 0x3f000, 4096 bytes, is not the primary's (checksum 0x";
        assert!(reason.contains(named), "{reason}");
    }
    bed.vm.count_and_send();
    eventually("output", || bed.vm.sent().len() > before);
}

/// Pages, zero pages, and pieces of a disk, while the guest works: all are found, sent anew, and the takeover is exact.
#[test]
fn r6_what_differs_is_sent_anew_and_the_takeover_is_exact() {
    let bed = protected(FtAudit::Repair);
    bed.vm.write_ram(3 * PAGE as u64, &[7; 64]);
    bed.vm.write_disk(0, &[5; 512]);
    // What is on its way would undo a flip.
    eventually("an equal shadow", || {
        let (vm, shadow) = (bed.vm.contents(), bed.host.shadow().contents());
        vm.ram == shadow.ram && vm.disks[0] == shadow.disks[0]
    });
    for (n, flip) in [
        |vm: &FakeVm| vm.flip_ram(3 * PAGE as u64 + 9),
        |vm: &FakeVm| vm.flip_ram((1 << 20) + 5 * PAGE as u64),
        |vm: &FakeVm| vm.flip_disk(7),
        |vm: &FakeVm| vm.flip_disk(DISK - 1),
    ]
    .iter()
    .enumerate()
    {
        flip(&bed.host.shadow());
        eventually("a repair", || {
            bed.vm.count_and_send();
            bed.vm.write_disk(BLOCK, &[n as u8; 100]);
            bed.backup().info().audit.repairs == n as u64 + 1
        });
        bed.wait_primary(FtState::Protected);
        bed.wait_backup(FtState::Protected);
        assert!(bed.primary().info().reason.is_none() && bed.backup().info().reason.is_none());
    }
    let (p, b) = (bed.primary().info().audit, bed.backup().info().audit);
    assert_eq!((p.mismatches, p.repairs, b.mismatches), (4, 4, 4));
    for (side, rule) in [("primary", "0x3000"), ("backup", "_disk0 at 0x3f000")] {
        let told = lock(&bed.events)
            .iter()
            .any(|(who, state, why)| who == side && state == "syncing" && why.contains(rule));
        assert!(told, "{side} {rule}");
    }
    bed.arbiter_reachable("p", false);
    bed.relay.cut();
    bed.wait_backup(FtState::Solo);
    bed.check_takeover();
}

/// While a place is known to be wrong nothing is acknowledged, and both sides say so.
#[test]
fn r2_a_shadow_that_is_known_to_be_wrong_commits_nothing() {
    let bed = protected(FtAudit::Repair);
    *lock(&bed.host.slow_apply) = Duration::from_secs(2);
    bed.host.shadow().flip_disk(7);
    bed.wait_backup(FtState::Syncing);
    bed.wait_primary(FtState::Syncing);
    let committed = bed.backup().info().committed;
    for reason in [bed.primary().info().reason, bed.backup().info().reason] {
        let reason = reason.unwrap();
        assert!(reason.contains("audit: disk _disk0 at 0x0, 4096 bytes"), "{reason}");
    }
    let sent = bed.vm.sent().len();
    bed.vm.count_and_send();
    let error = bed.primary().failover().unwrap_err().to_string();
    assert!(error.contains("needs a protected VM"), "{error}");
    std::thread::sleep(Duration::from_millis(500));
    if bed.backup().info().state == FtState::Syncing {
        assert_eq!((bed.backup().info().committed, bed.vm.sent().len()), (committed, sent));
    }
    bed.wait_backup(FtState::Protected);
    eventually("output", || bed.vm.sent().len() == sent + 1);
    bed.wait_primary(FtState::Protected);
}

#[test]
fn r6_too_much_that_differs_ends_protection() {
    let bed = protected(FtAudit::Repair);
    (0..17).for_each(|page| bed.host.shadow().flip_ram(page * PAGE as u64));
    bed.wait_backup(FtState::Failed);
    bed.wait_primary(FtState::Failed);
    let reason = bed.primary().info().reason.unwrap();
    assert!(
        reason.contains("more than 16 places were wrong within an hour"),
        "{reason}"
    );
    bed.vm.count_and_send();
    eventually("output", || bed.vm.sent() == [1]);
}

#[test]
fn r6_a_place_that_stays_wrong_ends_protection() {
    let bed = protected(FtAudit::Repair);
    *lock(&bed.host.stuck_disk) = true;
    bed.host.shadow().flip_disk(7);
    bed.wait_backup(FtState::Failed);
    bed.wait_primary(FtState::Failed);
    let reason = bed.primary().info().reason.unwrap();
    assert!(
        reason.contains("audit: disk _disk0 at 0x0") && reason.contains("although it was sent anew"),
        "{reason}"
    );
}
