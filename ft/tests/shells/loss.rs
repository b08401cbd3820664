//! Losses: of the primary, of the backup, of the network, of the arbiter; and damaged frames.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ft::config::FtState;
use ft::machine::{Input, Output};

use crate::bed::{Bed, eventually};
use crate::fake::{FakeVm, identity, lock};
use crate::normal::busy_guest;

fn busy_bed(bed: &mut Bed) -> (Arc<AtomicBool>, std::thread::JoinHandle<u64>) {
    bed.protect();
    let quit = Arc::new(AtomicBool::new(false));
    let guest = busy_guest(&bed.vm, &quit);
    eventually("epochs", || bed.primary().info().epochs_total >= 10);
    (quit, guest)
}

/// The backup's VM went on from a checkpoint from which everything that the outside saw follows.
fn check_outside(bed: &Bed) {
    let live = bed.check_takeover();
    let (sent, again) = (bed.vm.sent(), live.sent());
    let counter = live.contents().counter;
    assert!(sent.iter().copied().eq(1..=sent.len() as u64));
    assert!(
        sent.len() as u64 <= counter,
        "saw {} of a VM that counts {counter}",
        sent.len()
    );
    // What was committed leaves from here if it had not left there.
    let missing = sent.len() as u64 + 1..=counter;
    assert!(
        missing.clone().all(|n| again.contains(&n)),
        "{missing:?} not in {again:?}"
    );
    assert!(again.is_sorted() && again.iter().all(|n| *n <= counter));
}

#[test]
fn a_lost_primary_is_taken_over_exactly_at_its_last_commit() {
    for round in 0..8 {
        let mut bed = Bed::new(FakeVm::new(identity("vm")));
        let (_, guest) = busy_bed(&mut bed);
        std::thread::sleep(Duration::from_millis(round * 3));
        // It cannot win, and cannot even ask: as good as dead, but its VM's history can be compared.
        bed.arbiter_reachable("p", false);
        bed.part(round % 2 == 1);
        bed.wait_backup(FtState::Solo);
        bed.wait_primary(FtState::WaitingForArbiter);
        check_outside(&bed);
        let info = bed.backup().info();
        assert_eq!(info.generation, 1);
        assert!(info.activation_ms.unwrap() < 5000.0 && info.detection_ms.is_some());
        eventually("the reason", || {
            bed.primary()
                .info()
                .reason
                .is_some_and(|reason| reason.contains("no answer yet"))
        });
        // Back in reach, it finds out that it lost, and stops.
        bed.arbiter_reachable("p", true);
        bed.wait_primary(FtState::Stopped);
        assert!(bed.vm.stop_reason().is_some(), "R4: it says `stopped` before the VM is");
        assert!(bed.vm.stop_reason().unwrap().contains("won generation 1"));
        guest.join().unwrap();
        check_outside(&bed);
    }
}

#[test]
fn r8_inputs_of_the_lost_epoch_are_given_again_in_order() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    let mut config = bed.config();
    config.limits.max_epoch_ms = 10_000;
    bed.primary = Some(bed.try_enable(config).unwrap());
    bed.wait_primary(FtState::Protected);
    bed.wait_backup(FtState::Protected);
    for n in 0..50u8 {
        bed.vm.receive(&[n; 100]);
    }
    // Logged at once, without any checkpoint.
    std::thread::sleep(Duration::from_millis(100));
    bed.arbiter_reachable("p", false);
    bed.relay.cut();
    bed.wait_backup(FtState::Solo);
    let live = bed.check_takeover();
    let expected: Vec<Input> = (0..50u8)
        .map(|n| Input::Frame {
            nic: 1,
            data: vec![n; 100].into(),
        })
        .collect();
    assert_eq!(*lock(&live.replayed), expected);
}

#[test]
fn outputs_that_were_committed_but_had_not_left_leave_from_the_backup() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    bed.protect();
    // The release of the primary never happens: its acknowledgement is lost with the connection.
    let vm = bed.vm.clone();
    vm.print("hello ");
    let n = vm.count_and_send().unwrap();
    eventually("commit", || !vm.sent().is_empty());
    bed.arbiter_reachable("p", false);
    bed.relay.cut();
    bed.wait_backup(FtState::Solo);
    let live = bed.check_takeover();
    // It is not told when the primary could still tell that they left; both are right (frames may come twice).
    let again = lock(&live.wire).clone();
    assert!(
        again.is_empty()
            || again.contains(&Output::Frame {
                nic: 0,
                data: n.to_le_bytes().to_vec()
            })
    );
}

#[test]
fn a_primary_that_loses_its_backup_goes_solo_by_the_arbiter() {
    for silent in [false, true] {
        let mut bed = Bed::new(FakeVm::new(identity("vm")));
        let (quit, guest) = busy_bed(&mut bed);
        bed.arbiter_reachable("b", false);
        bed.part(silent);
        bed.wait_primary(FtState::Solo);
        bed.wait_backup(FtState::WaitingForArbiter);
        assert!(bed.backup().disable().is_err());
        quit.store(true, Ordering::SeqCst);
        guest.join().unwrap();
        let count = bed.vm.contents().counter;
        eventually("all outputs", || bed.vm.sent().len() as u64 == count);
        assert!(bed.vm.sent().iter().copied().eq(1..=count));
        assert_eq!(bed.primary().info().generation, 1);
        bed.arbiter_reachable("b", true);
        bed.wait_backup(FtState::Stopped);
        assert!(bed.host.live().is_none());
        eventually("the shadow's end", || *lock(&bed.host.discarded) == 1);
    }
}

#[test]
fn when_both_ask_exactly_one_goes_on() {
    for _ in 0..10 {
        let mut bed = Bed::new(FakeVm::new(identity("vm")));
        let (quit, guest) = busy_bed(&mut bed);
        bed.relay.cut();
        eventually("a decision", || {
            let (p, b) = (bed.primary().info().state, bed.backup().info().state);
            matches!(
                (p, b),
                (FtState::Solo, FtState::Stopped) | (FtState::Stopped, FtState::Solo)
            )
        });
        quit.store(true, Ordering::SeqCst);
        guest.join().unwrap();
        let primary_lives = bed.primary().info().state == FtState::Solo;
        assert!(primary_lives || bed.vm.stop_reason().is_some());
        assert_eq!(bed.host.live().is_none(), primary_lives);
        if !primary_lives {
            check_outside(&bed);
        }
    }
}

#[test]
fn without_an_answer_neither_goes_on() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    let (quit, guest) = busy_bed(&mut bed);
    bed.arbiter_reachable("p", false);
    bed.arbiter_reachable("b", false);
    bed.relay.cut();
    bed.wait_primary(FtState::WaitingForArbiter);
    bed.wait_backup(FtState::WaitingForArbiter);
    quit.store(true, Ordering::SeqCst);
    let seen = bed.vm.sent().len();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(bed.vm.sent().len(), seen);
    assert!(bed.host.live().is_none());
    assert!(bed.primary().disable().is_err());
    guest.join().unwrap();
    bed.arbiter_reachable("p", true);
    bed.wait_primary(FtState::Solo);
    let count = bed.vm.contents().counter;
    eventually("all outputs", || bed.vm.sent().len() as u64 == count);
    bed.arbiter_reachable("b", true);
    bed.wait_backup(FtState::Stopped);
}

#[test]
fn a_damaged_frame_drops_the_peer_and_reaches_no_ram() {
    for at in [0, 5, 17, 38, 43, 44, 60, 5_000, 20_000, 40_000] {
        let mut bed = Bed::new(FakeVm::new(identity("vm")));
        let (_, guest) = busy_bed(&mut bed);
        bed.arbiter_reachable("p", false);
        bed.relay.damage.store(at, Ordering::SeqCst);
        bed.wait_backup(FtState::Solo);
        check_outside(&bed);
        let reason = bed.backup().info().reason.unwrap();
        assert!(reason.contains("checksum") || reason.contains("magic"), "{reason}");
        bed.arbiter_reachable("p", true);
        bed.wait_primary(FtState::Stopped);
        guest.join().unwrap();
    }
}

#[test]
fn a_backup_whose_disk_fails_says_so_and_the_vm_runs_on() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    bed.protect();
    *lock(&bed.host.fail_apply) = true;
    bed.vm.write_disk(0, &[1; 512]);
    bed.wait_backup(FtState::Failed);
    bed.wait_primary(FtState::Failed);
    let reason = bed.primary().info().reason.unwrap();
    assert!(reason.contains("the backup's disk is full"), "{reason}");
    bed.vm.count_and_send();
    eventually("output", || bed.vm.sent() == [1]);
    assert!(bed.host.live().is_none());
}

#[test]
fn a_backup_whose_disk_fails_in_the_first_copy_says_so_and_waits_anew() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    *lock(&bed.host.fail_apply) = true;
    bed.enable();
    bed.wait_primary(FtState::Failed);
    let reason = bed.primary().info().reason.unwrap();
    assert!(reason.contains("the backup's disk is full"), "{reason}");
    bed.wait_backup(FtState::Listening);
    bed.vm.count_and_send();
    eventually("output", || bed.vm.sent() == [1]);
}

#[test]
fn a_vm_whose_state_cannot_be_saved_runs_on_unprotected() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    bed.protect();
    *lock(&bed.vm.fail_save) = Some("KVM says no".into());
    bed.vm.count_and_send();
    bed.wait_primary(FtState::Failed);
    assert!(bed.primary().info().reason.unwrap().contains("KVM says no"));
    eventually("output", || bed.vm.sent() == [1]);
    bed.wait_backup(FtState::Listening);
}

#[test]
fn a_slow_apply_is_not_silence() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    bed.protect();
    *lock(&bed.host.slow_apply) = Duration::from_millis(900);
    bed.vm.write_disk(0, &[1; 512]);
    bed.vm.count_and_send();
    eventually("output", || bed.vm.sent() == [1]);
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(bed.primary().info().state, FtState::Protected);
    bed.arbiter_reachable("p", false);
    bed.relay.cut();
    bed.wait_backup(FtState::Solo);
    bed.check_takeover();
}

#[test]
fn a_backup_that_leaves_is_no_danger() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    bed.protect();
    // Even without the arbiter: it gave its word.
    bed.arbiter_reachable("p", false);
    bed.arbiter_reachable("b", false);
    bed.backup().disable().unwrap();
    bed.wait_primary(FtState::Failed);
    assert!(bed.primary().info().reason.unwrap().contains("left"));
    assert_eq!(bed.backup().info().state, FtState::Disabled);
    bed.vm.count_and_send();
    eventually("output", || bed.vm.sent() == [1]);
}

#[test]
fn a_loss_during_precopy_leaves_the_vm_untouched() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    for page in 0..60 {
        bed.vm.write_ram(page * 4096, &[9; 4096]);
    }
    let mut config = bed.config();
    config.limits.precopy_mib_s = 1;
    bed.primary = Some(bed.try_enable(config).unwrap());
    eventually("some progress", || bed.primary().info().progress.ram_bytes_sent > 0);
    assert_eq!(bed.primary().info().state, FtState::Syncing);
    bed.relay.cut();
    bed.wait_primary(FtState::Failed);
    bed.wait_backup(FtState::Listening);
    eventually("the end of tracking", || !*lock(&bed.vm.tracking));
    assert!(!bed.vm.is_paused() && lock(&bed.vm.interposer).is_none());
    bed.vm.count_and_send();
    assert_eq!(bed.vm.sent(), [1]);
    assert!(bed.host.live().is_none());
}

/// A primary whose vCPUs cannot run on, say: it knows itself that it is dead.
#[test]
fn a_primary_that_gives_up_is_taken_over() {
    for _ in 0..8 {
        let mut bed = Bed::new(FakeVm::new(identity("vm")));
        let (_, guest) = busy_bed(&mut bed);
        bed.primary().give_up();
        assert!(bed.vm.stop_reason().is_some());
        bed.wait_backup(FtState::Solo);
        check_outside(&bed);
        guest.join().unwrap();
    }
}

#[test]
fn a_release_that_the_takeover_overtakes_stops() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    let mut config = bed.config();
    (config.limits.min_epoch_us, config.limits.max_epoch_ms) = (300_000, 1_000);
    bed.primary = Some(bed.try_enable(config).unwrap());
    bed.wait_primary(FtState::Protected);
    *lock(&bed.vm.slow_release) = Duration::from_millis(1_500);
    (0..2_000).for_each(|_| assert!(bed.vm.count_and_send().is_some()));
    eventually("the first outputs", || !bed.vm.sent().is_empty());
    // As if the process was stopped in the middle of it.
    bed.arbiter_reachable("p", false);
    bed.relay.cut();
    bed.wait_backup(FtState::Solo);
    let left = bed.vm.sent().len();
    assert!(left < 2_000);
    bed.wait_primary(FtState::WaitingForArbiter);
    std::thread::sleep(Duration::from_millis(2_000));
    assert_eq!(bed.vm.sent().len(), left, "outputs of a primary that was taken over");
    // They are not lost where they belong.
    assert_eq!(bed.host.live().unwrap().sent().last(), Some(&2_000));
}

#[test]
fn what_one_release_leaves_the_next_one_takes() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    bed.protect();
    // Longer than the lease, shorter than the silence that counts.
    *lock(&bed.vm.slow_release) = Duration::from_millis(280);
    for _ in 0..3 {
        (0..600).for_each(|_| assert!(bed.vm.count_and_send().is_some()));
    }
    eventually("all outputs", || bed.vm.sent().len() == 1_800);
    assert!(bed.vm.sent().into_iter().eq(1..=1_800));
    assert_eq!(bed.primary().info().state, FtState::Protected);
}
