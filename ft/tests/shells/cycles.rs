//! Again and again, without leaks.

use ft::config::FtState;

use crate::bed::{Bed, eventually};
use crate::fake::{FakeVm, identity, lock};

/// Threads of FT in this process, by their names; the other tests run beside this one in the same process, so it is
/// run in a process of its own.
fn count(dir: &str) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

fn cycles() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    let mut before = (0, 0);
    for cycle in 1..=20 {
        bed.protect();
        bed.vm.count_and_send();
        bed.vm.write_disk(cycle * 512, &[cycle as u8; 512]);
        eventually("output", || bed.vm.sent().len() as u64 == cycle);
        bed.arbiter_reachable("b", false);
        bed.relay.cut();
        bed.wait_primary(FtState::Solo);
        assert_eq!(bed.primary().info().generation, cycle);
        bed.primary.take().unwrap().shutdown();
        bed.arbiter_reachable("b", true);
        bed.wait_backup(FtState::Stopped);
        assert!(!*lock(&bed.vm.tracking) && lock(&bed.vm.interposer).is_none() && !bed.vm.is_paused());
        bed.new_backup();
        if cycle == 3 {
            before = (count("/proc/self/task"), count("/proc/self/fd"));
        }
    }
    eventually("all threads and descriptors gone", || {
        count("/proc/self/task") <= before.0 && count("/proc/self/fd") <= before.1
    });
    lock(&bed.vm.history).clear();
    // And the other way: the survivor of a takeover is protected by a new backup.
    for _ in 0..3 {
        bed.protect();
        bed.vm.count_and_send();
        bed.primary().failover().unwrap();
        bed.wait_backup(FtState::Solo);
        let live = bed.check_takeover();
        bed.primary.take().unwrap().shutdown();
        bed.vm = live;
        lock(&bed.vm.history).clear();
        lock(&bed.vm.wire).clear();
        bed.new_backup();
    }
}

#[test]
fn twenty_losses_and_reprotections_leave_nothing_behind() {
    if std::env::var_os("FT_CYCLES").is_some() {
        return cycles();
    }
    let exe = std::env::current_exe().unwrap();
    let name = "cycles::twenty_losses_and_reprotections_leave_nothing_behind";
    let status = std::process::Command::new(exe)
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env("FT_CYCLES", "1")
        .status()
        .unwrap();
    assert!(status.success());
}
