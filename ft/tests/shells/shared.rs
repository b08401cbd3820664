//! A disk that both hosts see.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ft::config::{FtDurability, FtState};
use ft::machine::{DiskIdentity, Identity, SharedDisk};

use crate::bed::{Bed, eventually};
use crate::fake::{BLOCK, FakeVm, PAGE, identity, lock};
use crate::san::San;

const SIZE: u64 = 64 * BLOCK;

fn shared_identity() -> Identity {
    let mut identity = identity("vm");
    identity.disks.push(DiskIdentity {
        id: "_disk2".into(),
        size: SIZE,
        readonly: false,
        shared: Some(SharedDisk { lock_gap: None }),
    });
    identity
}

fn bed() -> (Bed, Arc<San>) {
    let san = Arc::new(San::new(SIZE));
    let vm = FakeVm::on(shared_identity(), &san);
    assert_eq!(san.claim(vm.number), None);
    let bed = Bed::new(vm);
    *lock(&bed.host.san) = Some(san.clone());
    (bed, san)
}

/// A guest that writes the shared disk, over and over the same places, and tells the world each time.
fn guest(vm: &Arc<FakeVm>, quit: &Arc<AtomicBool>) -> std::thread::JoinHandle<u64> {
    let (vm, quit) = (vm.clone(), quit.clone());
    std::thread::spawn(move || {
        let mut n = 0u64;
        while !quit.load(Ordering::SeqCst) {
            n += 1;
            let mut alive = vm.write_shared_disk(n * 37 % 60 * BLOCK + n % 300, &[n as u8; 3000])
                && vm.write_ram(n * 7 % 60 * PAGE as u64, &n.to_le_bytes());
            if n.is_multiple_of(11) {
                alive &= vm.zero_shared_disk(n % 50 * BLOCK, 5000);
            }
            if n.is_multiple_of(13) {
                alive &= vm.flush_shared_disk();
            }
            if !alive || vm.count_and_send().is_none() {
                break;
            }
            std::thread::sleep(Duration::from_micros(300));
        }
        n
    })
}

struct Busy {
    bed: Bed,
    san: Arc<San>,
    quit: Arc<AtomicBool>,
    guest: std::thread::JoinHandle<u64>,
}

fn busy() -> Busy {
    let (mut bed, san) = bed();
    bed.protect();
    let quit = Arc::new(AtomicBool::new(false));
    let guest = guest(&bed.vm, &quit);
    eventually("epochs", || bed.primary().info().epochs_total >= 10);
    Busy { bed, san, quit, guest }
}

/// A primary with a write under way that does not end, and that is left.
fn stuck() -> Busy {
    let busy = busy();
    busy.bed.arbiter_reachable("p", false);
    busy.san.hang(true);
    std::thread::sleep(Duration::from_millis(50));
    busy.bed.relay.cut();
    busy.bed.wait_backup(FtState::TakingOver);
    busy
}

impl Busy {
    fn rest(self) -> (Bed, Arc<San>) {
        self.quit.store(true, Ordering::SeqCst);
        self.guest.join().unwrap();
        (self.bed, self.san)
    }
}

/// The backup's VM and the disk are as at the end of its last epoch.
fn check(bed: &Bed, san: &San) {
    let live = bed.check_takeover();
    assert!(
        san.bytes() == live.contents().disks[2],
        "R3: the shared disk is not the VM's"
    );
    assert_eq!(san.inner().owner, Some(live.number));
}

#[test]
fn r1_a_shared_disk_is_written_once_the_epoch_is_committed_and_not_before() {
    let (mut bed, san) = bed();
    bed.protect();
    assert_eq!(bed.primary().info().shared_disks, ["_disk2"]);
    assert_eq!(bed.backup().info().shared_disks, ["_disk2"]);
    assert_eq!(bed.primary().info().progress.disk_bytes_total, 64 * BLOCK);
    let before = san.bytes();
    bed.relay.stall(true);
    bed.vm.write_shared_disk(1000, b"held");
    std::thread::sleep(Duration::from_millis(100));
    assert!(san.bytes() == before && bed.primary().info().lag_bytes >= 4);
    bed.relay.stall(false);
    eventually("the write", || san.bytes()[1000..1004] == *b"held");
    eventually("the flush", || san.inner().flushed[1000..1004] == *b"held");
    eventually("nothing held", || bed.primary().info().lag_bytes == 0);
    assert!(san.inner().writers.iter().all(|who| *who == bed.vm.number));
}

#[test]
fn r3_a_takeover_finds_a_shared_disk_as_the_last_epoch_left_it() {
    for round in 0..6 {
        let busy = busy();
        let (bed, san) = (&busy.bed, &busy.san);
        std::thread::sleep(Duration::from_millis(round * 3));
        bed.arbiter_reachable("p", false);
        bed.part(round % 2 == 1);
        bed.wait_backup(FtState::Solo);
        check(bed, san);
        // The primary is alive, and writes nothing any more.
        let writers = san.inner().writers.len();
        bed.arbiter_reachable("p", true);
        bed.wait_primary(FtState::Stopped);
        let (bed, san) = busy.rest();
        assert_eq!(san.inner().writers.len(), writers);
        check(&bed, &san);
    }
}

/// As far as a takeover goes, what was not flushed died with its host.
#[test]
fn r3_what_the_primary_wrote_and_did_not_flush_is_written_again() {
    for _ in 0..4 {
        let busy = stuck();
        let (bed, san) = (&busy.bed, &busy.san);
        {
            // The write that is under way is the last one of a host that is gone.
            let inner = &mut *san.inner();
            inner.bytes.clone_from(&inner.flushed);
            inner.owner = None;
        }
        bed.wait_backup(FtState::Solo);
        check(bed, san);
        // A stuck write would fail the primary's thread: it has no lock.
        bed.vm.forget_san();
        san.hang(false);
        busy.rest();
    }
}

#[test]
fn r4_a_write_that_is_under_way_keeps_the_backup_waiting() {
    let busy = stuck();
    let (bed, san) = (&busy.bed, &busy.san);
    eventually("the reason", || {
        let reason = bed.backup().info().reason.unwrap_or_default();
        reason.contains(&format!("host {} has the lock", bed.vm.number))
    });
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(bed.backup().info().state, FtState::TakingOver);
    assert!(bed.host.live().is_none());
    san.hang(false);
    bed.wait_backup(FtState::Solo);
    check(bed, san);
    bed.arbiter_reachable("p", true);
    bed.wait_primary(FtState::Stopped);
    let (bed, san) = busy.rest();
    check(&bed, &san);
}

#[test]
fn r3_a_planned_failover_hands_a_shared_disk_over() {
    let busy = busy();
    busy.bed.primary().failover().unwrap();
    assert_eq!(busy.bed.primary().info().state, FtState::Stopped);
    busy.bed.wait_backup(FtState::Solo);
    let writers = busy.san.inner().writers.clone();
    assert!(
        writers.iter().all(|who| *who == busy.bed.vm.number),
        "nothing was left to be written"
    );
    let (bed, san) = busy.rest();
    check(&bed, &san);
    assert_eq!(bed.host.live().unwrap().contents(), bed.vm.contents());
}

#[test]
fn r4_a_failed_handover_takes_the_disk_back() {
    let (mut bed, san) = bed();
    bed.protect();
    bed.vm.write_shared_disk(0, b"one");
    *lock(&bed.host.fail_activation) = true;
    bed.primary().failover().unwrap_err();
    assert_eq!(bed.primary().info().state, FtState::Solo);
    eventually("the VM here", || {
        !bed.vm.is_paused() && lock(&bed.vm.interposer).is_none()
    });
    bed.vm.write_shared_disk(3, b"two");
    assert_eq!(san.bytes()[..6], *b"onetwo");
    assert_eq!(san.inner().owner, Some(bed.vm.number));
}

#[test]
fn r3_a_primary_that_goes_alone_writes_everything() {
    for silent in [false, true] {
        let busy = busy();
        let bed = &busy.bed;
        bed.arbiter_reachable("b", false);
        bed.part(silent);
        bed.wait_primary(FtState::Solo);
        let (bed, san) = busy.rest();
        eventually("the end of FT", || {
            lock(&bed.vm.interposer).is_none() && !bed.vm.is_paused()
        });
        assert!(san.bytes() == bed.vm.contents().disks[2]);
        bed.arbiter_reachable("b", true);
        bed.wait_backup(FtState::Stopped);
        assert_eq!(san.inner().owner, Some(bed.vm.number));
    }
}

#[test]
fn r3_disable_writes_everything() {
    let busy = busy();
    busy.bed.primary().disable().unwrap();
    let (bed, san) = busy.rest();
    assert!(lock(&bed.vm.interposer).is_none());
    assert!(san.bytes() == bed.vm.contents().disks[2]);
    bed.wait_backup(FtState::Listening);
}

#[test]
fn r3_a_shared_disk_that_fails_is_tried_again_and_nothing_is_lost() {
    let (mut bed, san) = bed();
    let mut config = bed.config();
    config.limits.max_lag_mib = 1;
    bed.primary = Some(bed.try_enable(config).unwrap());
    bed.wait_primary(FtState::Protected);
    san.inner().broken = true;
    let quit = Arc::new(AtomicBool::new(false));
    let guest = guest(&bed.vm, &quit);
    eventually("the reason", || {
        let reason = bed.primary().info().reason.unwrap_or_default();
        reason.contains("_disk2 cannot be written (the fabric is down)")
    });
    // The guest waits, however many epochs are committed meanwhile.
    eventually("the bound", || bed.primary().info().lag_bytes > 900_000);
    std::thread::sleep(Duration::from_millis(300));
    let info = bed.primary().info();
    assert!(info.lag_bytes < 3 << 20, "{} bytes", info.lag_bytes);
    assert_eq!(info.state, FtState::Protected);
    san.inner().broken = false;
    let counted = bed.vm.contents().counter;
    eventually("the guest to go on", || bed.vm.contents().counter > counted + 100);
    quit.store(true, Ordering::SeqCst);
    guest.join().unwrap();
    eventually("all of it", || san.bytes() == bed.vm.contents().disks[2]);
    assert_eq!(bed.primary().info().reason, None);
}

#[test]
fn another_disk_is_found_out_before_the_vm_counts_as_protected() {
    let (mut bed, san) = bed();
    let other = San::new(SIZE);
    other.inner().bytes.fill(0xdd);
    *lock(&bed.host.san) = Some(Arc::new(other));
    bed.enable();
    bed.wait_primary(FtState::Failed);
    let reason = bed.primary().info().reason.unwrap();
    assert!(reason.contains("another disk"), "{reason}");
    bed.vm.write_shared_disk(0, b"here");
    eventually("the write", || san.bytes()[..4] == *b"here");
}

#[test]
fn r5_with_disk_of_both_outputs_wait_for_the_flush_of_a_shared_disk() {
    let (mut bed, san) = bed();
    let config = ft::config::FtEnableConfig {
        durability: FtDurability::DiskOfBoth,
        ..bed.config()
    };
    bed.primary = Some(bed.try_enable(config).unwrap());
    bed.wait_primary(FtState::Protected);
    for n in 1..=20u8 {
        let flushes = san.inner().flushes;
        bed.vm.write_shared_disk(u64::from(n) * 512, &[n; 512]);
        bed.vm.flush_shared_disk();
        bed.vm.count_and_send();
        eventually("output", || bed.vm.sent().len() == usize::from(n));
        let inner = san.inner();
        assert!(
            inner.flushes > flushes && inner.flushed[usize::from(n) * 512] == n,
            "output {n}"
        );
    }
    // Without it, outputs wait for the backup alone.
    san.hang(true);
    bed.vm.write_shared_disk(0, &[1; 512]);
    bed.vm.count_and_send();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(bed.vm.sent().len(), 20);
    san.hang(false);
    eventually("output", || bed.vm.sent().len() == 21);
}

/// A snapshot, say: what the guest wrote before it was paused must be on the disk that goes with it.
#[test]
fn r3_who_waits_for_shared_disks_finds_everything_on_them() {
    let (mut bed, san) = bed();
    bed.protect();
    bed.relay.stall(true);
    bed.vm.write_shared_disk(7, b"before");
    std::thread::scope(|scope| {
        let settled = scope.spawn(|| bed.primary().settle());
        std::thread::sleep(Duration::from_millis(100));
        assert!(!settled.is_finished());
        bed.relay.stall(false);
        settled.join().unwrap().unwrap();
    });
    assert_eq!(san.inner().flushed[7..13], *b"before");
}

#[test]
fn r3_disable_does_not_let_the_vm_go_on_without_what_a_broken_disk_did_not_take() {
    let (mut bed, san) = bed();
    bed.protect();
    san.inner().broken = true;
    bed.vm.write_shared_disk(5, b"late");
    std::thread::scope(|scope| {
        let disabled = scope.spawn(|| bed.primary().disable());
        eventually("the wait", || {
            bed.primary().unfinished().is_some_and(|why| why.contains("fabric"))
        });
        assert!(bed.vm.is_paused());
        san.inner().broken = false;
        disabled.join().unwrap().unwrap();
    });
    assert!(!bed.vm.is_paused() && bed.primary().unfinished().is_none());
    assert_eq!(san.bytes()[5..9], *b"late");
    // Ended in the middle of it, the VM stops.
    bed.new_backup();
    bed.protect();
    san.inner().broken = true;
    bed.vm.write_shared_disk(5, b"last");
    std::thread::scope(|scope| {
        let disabled = scope.spawn(|| bed.primary().disable());
        eventually("the wait", || bed.primary().unfinished().is_some());
        bed.primary().give_up();
        drop(disabled.join().unwrap());
    });
    assert!(bed.vm.stop_reason().is_some_and(|why| why.contains("shared disks")));
    assert_eq!(san.bytes()[5..9], *b"late");
}
